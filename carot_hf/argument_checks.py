"""What the options of a run may be: ranges, and what goes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .data.augment import AUGMENTATIONS
from .objective.losses import SAME_CLASS
from .objective.terms import MOVED, PAIRS, TEXT, VISUAL, fields_with, penalties, weight_fields
from .teacher.average import check_momentum

TEACHERS = ("ema", "frozen", "beta")
ON_BAD_IMAGE = ("raise", "skip")
EVAL_SETS = ("validation", "all")
# Arguments of transformers that would be ignored here or break the method: what they may be, and what to do instead.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": (
        (False,),
        "It would make the contrastive batch smaller. Set `contrastive_batch_size`, and lower "
        "`per_device_train_batch_size` until it fits.",
    ),
    "include_for_metrics": (([], None), "`compute_metrics` gets the logits and the labels of each set."),
    "prediction_loss_only": ((False,), "There is no evaluation loss: embeddings are what is evaluated."),
    "label_names": ((None, ["labels"]), "Labels are called `labels` here."),
    "remove_unused_columns": ((False,), "It would drop images and labels."),
    "include_num_input_tokens_seen": (("no", False), "The tokens of captions say nothing about images."),
    "neftune_noise_alpha": ((None, 0, 0.0), "Its noise is made for language models."),
    "use_liger_kernel": ((False,), "It has no kernels for these models."),
    "enable_jit_checkpoint": ((False,), "On SIGTERM the step is finished and saved anyway."),
    "eval_use_gather_object": ((False,), "Embeddings are tensors of one shape."),
    "dataloader_in_order": ((True,), "Runs would not repeat."),
    "parallelism_config": ((None,), "Use DDP: `accelerate launch --multi_gpu`."),
    "train_sampling_strategy": (("random", "sequential"), "Captions are trimmed to the batch as they are."),
}
_RANGES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "teacher_momentum_ramp": (lambda v: 0 <= v <= 1, "in [0, 1]", "It is a share of the run, not a number of steps."),
    "teacher_update_every": (lambda v: v >= 0, ">= 0", "0 freezes the teacher."),
    "label_smoothing_factor": (
        lambda v: 0 <= v < 1,
        "in [0, 1)",
        "It is the share of the target that is spread evenly.",
    ),
    "teacher_beta": (lambda v: 0 < v < float("inf"), "> 0", "TRACER uses 0.5."),
    "lora_rank": (lambda v: v >= 0, ">= 0", "0 trains all weights, without LoRA."),
    "early_stopping_patience": (
        lambda v: isinstance(v, int) and v >= 0,
        "a whole number >= 0",
        "It counts evaluations during training; 0 switches early stopping off.",
    ),
    "early_stopping_threshold": (lambda v: 0 <= v < float("inf"), ">= 0 and finite", "0: any progress counts."),
    "n_bins": (lambda v: v >= 1, ">= 1", "The papers use 10."),
    "calibration_criterion": (
        lambda v: v in ("nll", "ece"),
        "'nll' or 'ece'",
        "'nll' is the standard, 'ece' the CaRot paper's.",
    ),
    "calibration_method": (
        lambda v: v in ("temperature", "perturbed", "density"),
        "'temperature', 'perturbed' or 'density'",
        "'density' holds best where data shift.",
    ),
    "batch_eval_metrics": (
        lambda v: not v,
        "False",
        "Calibration errors are properties of a whole set; `compute_metrics` is called once with all of its logits.",
    ),
}


def check_ranges(args: Any) -> None:
    """Refuse arguments out of range, or that do not go together.

    Args:
        args: :class:`~carot_hf.CaRotTrainingArguments`.
    Raises:
        ValueError: If there is such an argument.
    """
    _check_objective(args)
    _check_penalised(args)
    for name, (accepted, cure) in _REFUSED.items():
        if hasattr(args, name) and getattr(args, name) not in accepted:
            raise ValueError(f"Expected `{name}` {accepted[0]!r}, got {getattr(args, name)!r}. {cure}")
    if unknown := [name for name in weight_fields() if not hasattr(args, name)]:
        raise ValueError(
            f"Expected training arguments with `{unknown[0]}`, which weighs a term of TERMS, got {type(args).__name__} "
            "without it: the term would be off in silence. Add the field in a subclass, or correct the name in the row."
        )
    for name in (*weight_fields(), "max_logit_multiplier"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise ValueError(f"Expected `{name}` >= 0 and finite, got {getattr(args, name)}. 0 switches it off.")
    for name in ("teacher_momentum_start", "teacher_momentum_end"):
        check_momentum(name, getattr(args, name))
    for name, (holds, expected, cure) in _RANGES.items():
        if not holds(getattr(args, name)):
            raise ValueError(f"Expected `{name}` {expected}, got {getattr(args, name)!r}. {cure}")
    if args.lora_alpha is not None and (args.lora_alpha < 1 or not args.lora_rank):
        raise ValueError(
            f"Expected `lora_alpha` None, or >= 1 with `lora_rank` >= 1, got {args.lora_alpha} with rank "
            f"{args.lora_rank}. None means twice the rank."
        )
    _check_stopping(args)
    bounds = args.calibration_bounds
    if bounds is not None and (len(bounds) != 2 or not 0 < bounds[0] < bounds[1] < float("inf")):
        raise ValueError(
            f"Expected `calibration_bounds` as a lowest and a highest temperature above 0, got {bounds}. The "
            "papers use 0.5 and 10."
        )
    if args.class_balanced and args.train_sampling_strategy == "sequential":
        raise ValueError(
            "Expected `train_sampling_strategy` 'random' with `class_balanced`, got 'sequential'. The order of the "
            "data set has the classes as they are: leave one of them out."
        )
    if args.bf16_full_eval or args.fp16_full_eval:
        raise ValueError(
            "Expected `bf16_full_eval` and `fp16_full_eval` False, got True. They round the model's own weights, "
            "and with them the scale that calibration sets; use `bf16` or `fp16`, which act in evaluation too."
        )


def _check_stopping(args: Any) -> None:
    """Refuse early stopping by nothing."""
    patience, when = args.early_stopping_patience, getattr(args.eval_strategy, "value", args.eval_strategy)
    if patience and when == "no":
        raise ValueError(
            f"Expected `eval_strategy` 'epoch' or 'steps' with `early_stopping_patience` {patience}, got 'no'. It "
            "counts evaluations during training: add --eval_strategy epoch, or leave it out."
        )
    if args.early_stopping_threshold and not patience:
        raise ValueError(
            f"Expected `early_stopping_patience` above 0 with `early_stopping_threshold` "
            f"{args.early_stopping_threshold}, got 0, which never stops early. Set it, or leave the threshold out."
        )


def _check_objective(args: Any) -> None:
    for name, known in (
        ("objective", ("contrastive", "cross_entropy")),
        ("teacher", TEACHERS),
        ("same_class", SAME_CLASS),
        ("augment", (*AUGMENTATIONS,)),
        ("freeze", (None, "vision", "text")),
        ("on_bad_image", ON_BAD_IMAGE),
        ("eval_sets", EVAL_SETS),
    ):
        if getattr(args, name) not in known:
            raise ValueError(f"Expected `{name}` to be one of {known}, got {getattr(args, name)!r}. Choose one.")
    if args.objective == "contrastive":
        if args.linear_probe:
            raise ValueError(
                "Expected `linear_probe` False with the contrastive objective, got True. There is no linear head; "
                "use the preset 'lp-ft' or `objective` 'cross_entropy'."
            )
        return
    for name in fields_with(PAIRS, MOVED, VISUAL, TEXT):
        if getattr(args, name):
            raise ValueError(
                f"Expected `{name}` 0 with the objective 'cross_entropy', got {getattr(args, name)}. It needs both "
                "towers; set it to 0, or use a preset with the contrastive objective."
            )
    if args.same_class != "negative" or args.freeze == "text":
        raise ValueError(
            f"Expected `same_class` 'negative' and `freeze` None or 'vision' with the objective 'cross_entropy', "
            f"got {args.same_class!r} and {args.freeze!r}. A linear head knows no pairs and no text tower."
        )


def _check_penalised(args: Any) -> None:
    """Refuse a penalty on the projection of a frozen tower: it would act on a part of what it names, or nothing."""
    towers = {VISUAL: "vision", TEXT: "text"}
    for name, modules in penalties().items():
        if getattr(args, name) and args.freeze in [towers[module] for module in modules]:
            raise ValueError(
                f"Expected `{name}` 0 with `freeze` '{args.freeze}', whose projection it would move, got "
                f"{getattr(args, name)}. Set it to 0, or train both towers."
            )
