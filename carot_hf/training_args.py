"""The options of a run, checked before any model is loaded, and the presets of the papers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from inspect import get_annotations
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from .basics.redaction import SECRET, public
from .calibration.names import DEFAULT_BEST_METRIC, HOME, SHIFTED, SPLIT, check_selection, greater_is_better
from .models.lora import check_lora_options, check_penalties
from .objective.losses import SAME_CLASS
from .objective.terms import TEXT, VISUAL, needs_teacher, penalties, weight_fields
from .teacher.average import check_momentum

TEACHERS = ("ema", "frozen", "beta")
ON_BAD_IMAGE = ("raise", "skip")
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules
_SCALED_STEPS = ("warmup_steps", "teacher_update_every", "logging_steps")
PUBLISHED_STEPS = 500  # of the papers
_SHORT_RUN, _PARTS = 5_000, 50
_STOCK = ("max_steps", "gradient_accumulation_steps", "bf16", "fp16", "tf32", "optim", "label_smoothing_factor", "seed")
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


class Published(int):
    """A number of steps of the papers, of ImageNet's 25,030, that nobody has named: a short run takes its share."""


@dataclass(frozen=True)
class Preset:
    """A method of a paper: the arguments in which it differs from the defaults, and where they come from."""

    arguments: Mapping[str, Any]
    source: str


PRESETS: dict[str, Preset] = {
    "ft": Preset(
        {"objective": "cross_entropy", "distillation_weight": 0.0, "learning_rate": 3e-5, "max_grad_norm": 1.0},
        "Cross-entropy of a linear head that starts as the zero-shot classes; the text tower is left behind. CaRot "
        "2023, A.1; WiSE-FT (arXiv 2109.01903).",
    ),
    "ft-ls": Preset(
        {
            "objective": "cross_entropy",
            "distillation_weight": 0.0,
            "learning_rate": 3e-5,
            "max_grad_norm": 1.0,
            "label_smoothing_factor": 0.1,
        },
        "ft with smoothed targets. CaRot 2023, Table 1; the paper picks epsilon from {0.01, 0.03, 0.05, 0.1, 0.2} on "
        "the validation split.",
    ),
    "lp-ft": Preset(
        {
            "objective": "cross_entropy",
            "linear_probe": True,
            "distillation_weight": 0.0,
            "learning_rate": 3e-5,
            "max_grad_norm": 1.0,
        },
        "A linear probe on the frozen tower first, then ft from that head. Kumar et al. 2022 (arXiv 2202.10054).",
    ),
    "flyp": Preset(
        {"distillation_weight": 0.0},
        "Contrastive loss alone. FLYP (arXiv 2212.00638); the baseline of CaRot's Table 1.",
    ),
    "flyp-ls": Preset(
        {"distillation_weight": 0.0, "label_smoothing_factor": 0.1},
        "Contrastive loss with smoothed targets in both directions. CaRot 2023, section 2.3; the paper picks epsilon "
        "from {0.01, 0.03, 0.05, 0.1, 0.2} on the validation split.",
    ),
    "carot": Preset(
        {"distillation_weight": 0.75},
        "Contrastive loss + 0.75 x distillation from an EMA teacher that moves every 500 steps. CaRot 2023, Eq. 1-2.",
    ),
    "carot-2024": Preset(
        {"distillation_weight": 3.0, "orthogonality_weight": 0.2, "cross_norm_weight": 0.05},
        "The NeurIPS 2024 version: with both projections held apart and the visual one near orthonormal. Its code "
        "halves the contrastive term but sums the two directions of the distillation with weight 1.5: 3.0 here.",
    ),
    "tracer": Preset(
        {
            "distillation_weight": 1.8,
            "feature_distillation_weight": 0.9,
            "cross_norm_weight": 0.05,
            "teacher": "beta",
            "teacher_update_every": 1,
        },
        "Distillation of features and of contrastive relations from a beta-weighted mean of all snapshots. TRACER "
        "(arXiv 2605.29380): its FD + CRD, 0.9 (L_fd + 2 L_kd), without ICL and CrossKD. The published code weighs "
        "0.9 (3.906 L_fd + L_kd + ICL + CrossKD) and flips images.",
    ),
}


@dataclass(repr=False)  # the one of TrainingArguments hides tokens
class CaRotTrainingArguments(TrainingArguments):
    r"""Arguments of :class:`~carot_hf.CaRotTrainer`: those of ``TrainingArguments`` and the ones below.

    The defaults are CaRot's for ViT-B/16 on ImageNet. ``label_smoothing_factor`` is the epsilon of the methods.

    <Tip>

    Defaults that differ from ``TrainingArguments``:

    - ``learning_rate`` 1e-5, ``weight_decay`` 0.1, ``warmup_steps`` 500, ``lr_scheduler_type`` cosine,
      ``num_train_epochs`` 10, ``per_device_train_batch_size`` 512 (divide it by the number of devices),
      ``max_grad_norm`` 0 (no clipping): the published protocol.
    - ``per_device_eval_batch_size`` 256: only embeddings are computed.
    - ``remove_unused_columns`` False: it would drop images and labels.
    - ``dataloader_drop_last`` True: a filled-up last batch would bring repeated samples, that is false negatives.
      It acts in training only; evaluation sees every sample once. Where it is False, several processes share the
      samples of the last batch, each once.
    - ``warmup_steps``, ``teacher_update_every`` and ``logging_steps`` are 500, as published for ImageNet's 25,030
      steps. Where nobody has named them and a run has fewer than 5,000 steps, `scale_constants` makes them its share:
      2 % of the steps, 50 updates, 50 lines. With ``parity`` they stay.
    - ``ddp_find_unused_parameters`` False: every parameter of CLIP is used.
    - ``logging_nan_inf_filter`` False: a loss that is not finite stops the run, it is not hidden.
    - ``eval_do_concat_batches`` False: embeddings are joined once, not after each batch.
    - ``hub_strategy`` "end": nothing uncalibrated is published during training.
    - ``metric_for_best_model``: where one is needed and none is given, ``eval_validation_nll``;
      ``greater_is_better`` follows from the metric's name. Metrics of shifted sets are refused.
    - ``dataloader_persistent_workers`` is True if there are workers: starting them costs seconds an epoch.
    - ``dataloader_pin_memory`` is switched off where there is no accelerator to pin for.

    </Tip>

    Args:
        objective: "contrastive": image-caption pairs. "cross_entropy": a linear head on the image tower (FT); the model
            becomes a :class:`~carot_hf.CLIPClassifier`.
        linear_probe: Fit the head on frozen features before the first step (LP-FT).
        same_class: What other samples of the same class are in the contrastive loss: "negative" (as published),
            "positive" or "ignore"; see :func:`~carot_hf.objective.losses.same_class_targets`.
        freeze: Tower that is not trained, with its projection: "vision" or "text".
        lora_rank: Rank of LoRA adapters (peft) on the linear layers of both towers; only they are trained, and averaged
            by the teacher, and the saved model has them merged. 0: no adapters, all weights are trained.
        lora_alpha: Their scale is ``lora_alpha / lora_rank``; ``None``: twice the rank.
        distillation_weight: lambda, the weight of the distillation from the teacher; 0: no teacher.
        feature_distillation_weight: Weight of the squared distance to the teacher's embeddings (TRACER).
        orthogonality_weight: Weight of ``|| W_v^T W_v - I ||_F`` on the visual projection.
        cross_norm_weight: Weight of ``|| W_v W_t^T ||_F`` of the two projections.
        teacher: "ema" (CaRot), "frozen" (the pretrained model), or "beta" (TRACER's weighted mean of all snapshots).
        teacher_beta: b of the "beta" teacher's kernel.
        teacher_update_every: Optimizer steps between updates of the teacher; 0: it stays the pretrained model.
        teacher_momentum_start: m0, weight of the old teacher in an update at step 0.
        teacher_momentum_end: m1, its weight after the ramp.
        teacher_momentum_ramp: r, share of the run over which the momentum rises from m0 to m1.
        max_logit_multiplier: exp(logit_scale) is clamped to it during training.
        parity: Do as the published code: decay all parameters, never clamp the logit scale.
        n_bins: Confidence bins of the calibration errors.
        calibration_criterion: What ``calibrate`` minimises on the validation split, "nll" or "ece".
        calibration_bounds: Lowest and highest temperature that ``calibrate`` and ``evaluate`` look for; ``None``: 0.5
            and 10, as published, and for SigLIP 0.05 and 20.
        overwrite_output_dir: Train into an ``output_dir`` that holds a finished model, ``metrics.json`` or a card.
        reliability_diagrams: Draw the diagrams of each final evaluation.
        contrastive_batch_size: Pairs in the contrastive loss of a step, over all devices, embedded
            ``per_device_train_batch_size`` at a time (gradient cache); 0: as many as the devices hold at once.
        float32_weights: Train a half-precision checkpoint in float32. ``False``: in bfloat16, as it comes, with the
            optimizer's moments; half the memory, but a step that changes a weight by less than 1/256 is mostly lost,
            and at the published learning rate that is nearly every step. The teacher stays float32. With LoRA only the
            frozen network stays bfloat16, so that no step is lost, and the merged model is saved in float32.
        on_bad_image: An image that cannot be decoded is an error ("raise"), or replaced by the next one of its set and
            listed in the end ("skip").
        dataloader_persistent_workers: Keep the workers of the training loader from epoch to epoch; ``None``: if there
            are any.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(
        default=0.1, metadata={"help": "Weight decay of AdamW; tensors of fewer than two dimensions are exempt."}
    )
    warmup_steps: float = field(
        default=Published(500),
        metadata={
            "help": "Steps of linear warm-up; below 1: a share of all steps. Not given, and fewer than 5,000 steps: "
            "1/50 of them."
        },
    )
    logging_steps: float = field(
        default=Published(500),
        metadata={"help": "Steps between lines of the log. Not given, and fewer than 5,000 steps: 50 lines a run."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate after warm-up."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(
        default=512, metadata={"help": "Training pairs a device and micro-batch. The published batch is 512 in all."}
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images a device in evaluation."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0: none, as published."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave it off: it would drop images and labels."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last partial training batch; evaluation always sees all samples."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Off: every parameter of CLIP is used in each step."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is not finite stops the run instead of being hidden."}
    )
    eval_do_concat_batches: bool = field(
        default=False, metadata={"help": "Off: embeddings are joined once after the last batch."}
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "When to push. 'end': nothing uncalibrated is published during training."}
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric that chooses the best checkpoint, e.g. eval_validation_nll (taken where one is needed and "
            "none is given) or eval_id_accuracy. Metrics of shifted sets are refused."
        },
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether a larger metric is better; follows from the metric's name if not given."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder to go on from; without a value the newest complete one in output_dir.",
            "nargs": "?",
            "const": "latest",
        },
    )
    objective: str = field(
        default="contrastive",
        metadata={
            "help": "'contrastive': image-caption pairs. 'cross_entropy': a linear head on the image tower.",
            "choices": ["contrastive", "cross_entropy"],
        },
    )
    linear_probe: bool = field(
        default=False, metadata={"help": "With 'cross_entropy': fit the head on frozen features first (LP-FT)."}
    )
    same_class: str = field(
        default="negative",
        metadata={
            "help": "What other samples of the same class in the batch are: 'negative' (as published), 'positive' "
            "(they share the target) or 'ignore' (left out).",
            "choices": list(SAME_CLASS),
        },
    )
    freeze: str | None = field(
        default=None,
        metadata={"help": "Tower that is not trained, with its projection.", "choices": ["vision", "text"]},
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA adapters on the attention and MLP layers of both towers; the rest is frozen. Needs "
            "peft. 0: no adapters."
        },
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "LoRA's scale is lora_alpha / lora_rank. Default: twice the rank."}
    )
    distillation_weight: float = field(
        default=0.75, metadata={"help": "Weight (lambda) of the distillation from the EMA teacher. 0: no teacher."}
    )
    feature_distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the squared distance to the teacher's embeddings (TRACER)."}
    )
    orthogonality_weight: float = field(
        default=0.0, metadata={"help": "Weight of the orthogonality penalty on the visual projection (CaRot-2024)."}
    )
    cross_norm_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-norm penalty on the two projections (CaRot-2024)."}
    )
    teacher: str = field(
        default="ema",
        metadata={
            "help": "How the teacher follows the student: 'ema' (CaRot), 'frozen' (never) or 'beta' (TRACER).",
            "choices": list(TEACHERS),
        },
    )
    teacher_beta: float = field(default=0.5, metadata={"help": "b of the 'beta' teacher's kernel Beta(b, b)."})
    teacher_update_every: int = field(
        default=Published(500),
        metadata={
            "help": "Optimizer steps between updates of the teacher. 0: it is never updated. Not given, and fewer than "
            "5,000 steps: 50 updates a run."
        },
    )
    teacher_momentum_start: float = field(
        default=0.05, metadata={"help": "Momentum m0 at step 0, in [0, 1]; it is the weight of the old teacher."}
    )
    teacher_momentum_end: float = field(default=0.9, metadata={"help": "Momentum m1 after the ramp, in [0, 1]."})
    teacher_momentum_ramp: float = field(
        default=0.2, metadata={"help": "Share of the run, in [0, 1], over which the momentum rises from m0 to m1."}
    )
    max_logit_multiplier: float = field(
        default=100.0, metadata={"help": "exp(logit_scale) is clamped to this during training. 0: no clamp."}
    )
    parity: bool = field(
        default=False,
        metadata={"help": "Do as the published code: decay all parameters and never clamp the logit scale."},
    )
    n_bins: int = field(default=10, metadata={"help": "Confidence bins of the calibration errors."})
    calibration_criterion: str = field(
        default="nll",
        metadata={"help": "What the temperature minimises on the validation split.", "choices": ["nll", "ece"]},
    )
    calibration_bounds: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest temperature that is looked for. Default: 0.5 10, for SigLIP 0.05 20."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into an output_dir that holds a finished model, metrics.json or a card."},
    )

    contrastive_batch_size: int = field(
        default=0,
        metadata={
            "help": "Pairs in the contrastive loss of a step, over all devices, embedded per_device_train_batch_size "
            "at a time, twice: the gradient of the large batch in the memory of the small one. 0: no such cache."
        },
    )
    float32_weights: bool = field(
        default=True,
        metadata={
            "help": "Train a half-precision checkpoint in float32. Off: in bfloat16, as it comes, which loses steps "
            "that change a weight by less than 1/256."
        },
    )
    on_bad_image: str = field(
        default="raise",
        metadata={
            "help": "An image that cannot be decoded: stop with its set and index ('raise'), or take the next one "
            "of the set in its place and list the replaced ones in the end ('skip').",
            "choices": list(ON_BAD_IMAGE),
        },
    )
    dataloader_persistent_workers: bool | None = field(
        default=None,
        metadata={"help": "Keep the workers of the training loader from epoch to epoch. Default: if there are any."},
    )
    reliability_diagrams: bool = field(
        default=True,
        metadata={
            "help": "After each evaluation outside of training write reliability diagrams into output_dir and send "
            "them to TensorBoard, W&B or trackio if among the reporters. Needs matplotlib."
        },
    )

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> CaRotTrainingArguments:
        """Make arguments from a method's name.

        Args:
            preset: A key of ``PRESETS``: "ft", "ft-ls", "lp-ft", "flyp", "flyp-ls", "carot", "carot-2024", "tracer".
            **overrides: Any argument, ``output_dir`` first of all; they go before the preset. For a suite pass
                ``**{**suite.recommended, ...}``.
        Raises:
            ValueError: If there is no such preset.
        """
        return cls(**{**preset_arguments(preset), **overrides})

    def __post_init__(self) -> None:
        # before Trainer's own checks make plain numbers of them
        self._unnamed: dict[str, float] = {
            name: float(getattr(self, name)) for name in _SCALED_STEPS if isinstance(getattr(self, name), Published)
        }
        self._check_ranges()
        _refuse_sharding(self)
        self._set_best_metric()
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self._join_processes()
        super().__post_init__()
        self._check_adapters()
        self._set_accumulation()
        self._check_batch()
        config = self.accelerator_config
        for name in ("split_batches", "dispatch_batches"):
            if getattr(config, name, None):
                raise ValueError(
                    f"Expected `{name}` of `accelerator_config` unset, got {getattr(config, name)}. Each process loads "
                    "its own `per_device_train_batch_size` pairs: the whole batch is part of the method."
                )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("Expected a GPU for `fp16`, got none. Use `bf16`, which works on a CPU too, or neither.")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False

    def recheck(self) -> None:
        """Check the arguments anew, after a hyperparameter search or somebody by hand has set some of them.

        Raises:
            ValueError: As when they were made.
        """
        self._check_ranges()
        self._check_adapters()
        self._set_accumulation(before=self._of_cache)
        self._check_batch()

    def scale_constants(self, steps: int) -> dict[str, Any]:
        """Bring the published numbers of steps that nobody has named to their share of a short run.

        Args:
            steps: Optimizer steps of the run.
        Returns:
            What was set; nothing if the run has 5,000 steps or more, or with ``parity``.
        """
        short = steps < _SHORT_RUN and not self.parity
        share = max(1, round(steps / _PARTS))
        return self.take_constants(dict.fromkeys(self.unnamed(), share if short else PUBLISHED_STEPS))

    def take_constants(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set numbers of steps that nobody has named, and say which of them changed."""
        changed = {}
        for name in self.unnamed() & values.keys():
            if values[name] != getattr(self, name):
                setattr(self, name, values[name])
                changed[name] = values[name]
            self._unnamed[name] = float(values[name])
        return changed

    def unnamed(self) -> set[str]:
        """The numbers of steps that nobody has named: neither when the arguments were made nor since."""
        return {name for name, value in self._unnamed.items() if getattr(self, name) == value}

    def _check_adapters(self) -> None:
        if self.lora_rank:
            check_lora_options(self)
            check_penalties(None, self)

    def _join_processes(self) -> None:
        """Start the process group on CPUs, with ``ddp_timeout``: transformers passes that on for other devices only."""
        on_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token out of pickles: transformers publishes one if a run pushes while it trains."""
        return {**self.__dict__, "hub_token": None}

    def changed(self) -> dict[str, Any]:
        """The arguments of the method that differ from the defaults, for the card of a model; no folder, no token."""
        own = set(_STOCK)
        for kind in type(self).__mro__[: type(self).__mro__.index(TrainingArguments)]:
            own |= get_annotations(kind).keys()
        found = {}
        ours = {item.name: item for item in fields(CaRotTrainingArguments)}
        for item in fields(self):
            known = ours.get(item.name, item)  # a subclass may have another default
            default = known.default if known.default_factory is MISSING else known.default_factory()
            value = getattr(self, item.name)
            published = item.name != "resume_from_checkpoint" and not SECRET.search(item.name)
            if item.name in own and value != default and published:
                found[item.name] = value
        return found

    def to_json_string(self) -> str:
        """Return the arguments as they stand in event files: no token, password or folder of the machine."""
        return json.dumps(public(self.to_dict()), indent=2)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss reads a teacher."""
        return needs_teacher(self)

    @property
    def clamps_logit_scale(self) -> bool:
        """Whether ``exp(logit_scale)`` is clamped during training."""
        return self.max_logit_multiplier > 0 and not self.parity and self.objective == "contrastive"

    def _set_accumulation(self, before: int = 0) -> None:
        """Let Trainer collect the micro-batches of one contrastive batch; ``before``: of another one."""
        whole, at_once = self.contrastive_batch_size, self.per_device_train_batch_size * self.world_size
        self._of_cache = 0
        if before:
            self.gradient_accumulation_steps: int = 1
        if whole == 0:
            return
        if self.objective != "contrastive":
            raise ValueError(
                f"Expected `contrastive_batch_size` 0 with the objective '{self.objective}', got {whole}. Its "
                "loss is a mean over samples: use `gradient_accumulation_steps`."
            )
        if whole < at_once or whole % at_once:
            raise ValueError(
                f"Expected `contrastive_batch_size` to be a multiple of the {at_once} pairs that the devices hold "
                f"at once (`per_device_train_batch_size` x processes), got {whole}. Change one of them."
            )
        if self.gradient_accumulation_steps not in (1, whole // at_once):
            raise ValueError(
                f"Expected `gradient_accumulation_steps` 1 with `contrastive_batch_size`, got "
                f"{self.gradient_accumulation_steps}. The cache sets it."
            )
        self.gradient_accumulation_steps = whole // at_once
        self._of_cache = self.gradient_accumulation_steps  # not the user's own

    def _check_batch(self) -> None:
        """Refuse a contrastive loss of one pair: it is 0 whatever the model does, and only the decay would act."""
        pairs = max(self.contrastive_batch_size, self.per_device_train_batch_size * self.world_size)
        if self.objective == "contrastive" and pairs < 2:
            raise ValueError(
                f"Expected two pairs or more in the contrastive loss, got {pairs}. Raise "
                "`per_device_train_batch_size`, or set `contrastive_batch_size`, which embeds them a few at a time."
            )

    def _check_ranges(self) -> None:
        self._check_objective()
        self._check_penalised()
        for name, (accepted, cure) in _REFUSED.items():
            if hasattr(self, name) and getattr(self, name) not in accepted:
                raise ValueError(f"Expected `{name}` {accepted[0]!r}, got {getattr(self, name)!r}. {cure}")
        for name in (*weight_fields(), "max_logit_multiplier"):
            if not 0 <= getattr(self, name, 0.0) < float("inf"):
                raise ValueError(f"Expected `{name}` >= 0 and finite, got {getattr(self, name)}. 0 switches it off.")
        for name in ("teacher_momentum_start", "teacher_momentum_end"):
            check_momentum(name, getattr(self, name))
        if not 0 <= self.teacher_momentum_ramp <= 1:
            raise ValueError(
                f"Expected `teacher_momentum_ramp` in [0, 1], got {self.teacher_momentum_ramp}. "
                "It is a share of the run, not a number of steps."
            )
        if self.teacher_update_every < 0:
            raise ValueError(
                f"Expected `teacher_update_every` >= 0, got {self.teacher_update_every}. 0 freezes the teacher."
            )
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"Expected `label_smoothing_factor` in [0, 1), got {self.label_smoothing_factor}. "
                "It is the share of the target that is spread evenly."
            )
        if not 0 < self.teacher_beta < float("inf"):
            raise ValueError(f"Expected `teacher_beta` > 0, got {self.teacher_beta}. TRACER uses 0.5.")
        if self.lora_rank < 0:
            raise ValueError(f"Expected `lora_rank` >= 0, got {self.lora_rank}. 0 trains all weights, without LoRA.")
        if self.lora_alpha is not None and (self.lora_alpha < 1 or not self.lora_rank):
            raise ValueError(
                f"Expected `lora_alpha` None, or >= 1 with `lora_rank` >= 1, got {self.lora_alpha} with rank "
                f"{self.lora_rank}. None means twice the rank."
            )
        if self.n_bins < 1:
            raise ValueError(f"Expected `n_bins` >= 1, got {self.n_bins}. The papers use 10.")
        bounds = self.calibration_bounds
        if bounds is not None and (len(bounds) != 2 or not 0 < bounds[0] < bounds[1] < float("inf")):
            raise ValueError(
                f"Expected `calibration_bounds` as a lowest and a highest temperature above 0, got {bounds}. The "
                "papers use 0.5 and 10."
            )
        if self.calibration_criterion not in ("nll", "ece"):
            raise ValueError(
                f"Expected `calibration_criterion` 'nll' or 'ece', got {self.calibration_criterion!r}. "
                "'nll' is the standard, 'ece' the CaRot paper's."
            )
        if self.batch_eval_metrics:
            raise ValueError(
                "Expected `batch_eval_metrics` False, got True. Calibration errors are properties of a whole set; "
                "`compute_metrics` is called once with all of its logits."
            )

        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "Expected `bf16_full_eval` and `fp16_full_eval` False, got True. They round the model's own weights, "
                "and with them the scale that calibration sets; use `bf16` or `fp16`, which act in evaluation too."
            )

    def _check_objective(self) -> None:
        for name, known in (
            ("objective", ("contrastive", "cross_entropy")),
            ("teacher", TEACHERS),
            ("same_class", SAME_CLASS),
            ("freeze", (None, "vision", "text")),
            ("on_bad_image", ON_BAD_IMAGE),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"Expected `{name}` to be one of {known}, got {getattr(self, name)!r}. Choose one.")
        if self.objective == "contrastive":
            if self.linear_probe:
                raise ValueError(
                    "Expected `linear_probe` False with the contrastive objective, got True. There is no linear head; "
                    "use the preset 'lp-ft' or `objective` 'cross_entropy'."
                )
            return
        for name in weight_fields():
            if getattr(self, name, 0.0):
                raise ValueError(
                    f"Expected `{name}` 0 with the objective 'cross_entropy', got {getattr(self, name)}. It needs both "
                    "towers; set it to 0, or use a preset with the contrastive objective."
                )
        if self.same_class != "negative" or self.freeze == "text":
            raise ValueError(
                f"Expected `same_class` 'negative' and `freeze` None or 'vision' with the objective 'cross_entropy', "
                f"got {self.same_class!r} and {self.freeze!r}. A linear head knows no pairs and no text tower."
            )

    def _check_penalised(self) -> None:
        """Refuse a penalty on the projection of a frozen tower: it would act on a part of what it names, or nothing."""
        towers = {VISUAL: "vision", TEXT: "text"}
        for name, modules in penalties().items():
            if getattr(self, name, 0.0) and self.freeze in [towers[module] for module in modules]:
                raise ValueError(
                    f"Expected `{name}` 0 with `freeze` '{self.freeze}', whose projection it would move, got "
                    f"{getattr(self, name)}. Set it to 0, or train both towers."
                )

    def _set_best_metric(self) -> None:
        if self.metric_for_best_model is None and (
            self.load_best_model_at_end or self.save_strategy == "best" or self.lr_scheduler_type in _BY_METRIC
        ):
            self.metric_for_best_model = DEFAULT_BEST_METRIC
        metric = self.metric_for_best_model
        if metric is None:
            return
        # the names of other sets are known to the trainer, which checks the rest
        check_selection(metric, self.greater_is_better, homes=(SPLIT, HOME), shifts=(SHIFTED,), all_sets=False)
        if self.greater_is_better is None:
            self.greater_is_better = greater_is_better(metric)
        if self.lr_scheduler_type in _BY_METRIC:
            self._set_direction()

    def _set_direction(self) -> None:
        """Let a schedule that follows a metric know which direction is better: it takes any for one of a loss."""
        given = self.lr_scheduler_kwargs
        options: dict[str, Any] = json.loads(given) if isinstance(given, str) else dict(given or {})
        better = "max" if self.greater_is_better else "min"
        if options.setdefault("mode", better) != better:
            raise ValueError(
                f"Expected `mode` '{better}' in `lr_scheduler_kwargs` for `metric_for_best_model` "
                f"{self.metric_for_best_model!r}, got {options['mode']!r}. Leave it out."
            )
        self.lr_scheduler_kwargs: Any = options


def preset_arguments(preset: str) -> dict[str, Any]:
    """Return the arguments of a preset, or raise a ValueError that lists the presets."""
    if preset not in PRESETS:
        raise ValueError(f"Expected a preset of {sorted(PRESETS)}, got {preset!r}. Correct the name.")
    return dict(PRESETS[preset].arguments)


def _refuse_sharding(args: CaRotTrainingArguments) -> None:
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise ValueError(
            "Expected DDP or one device, got FSDP. It cannot wrap CLIPModel, whose logit_scale has no dimension to "
            "shard. Launch with `accelerate launch --multi_gpu` (DDP); CLIP fits one device."
        )
    if _zero_stage(args.deepspeed) == 3:
        raise ValueError(
            "Expected DDP or one device, got DeepSpeed ZeRO-3. It shards the weights that the teacher follows by name, "
            "and CLIPModel's logit_scale has no dimension to shard. Launch with `accelerate launch --multi_gpu` (DDP)."
        )


def _zero_stage(config: Any) -> int:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        config = config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if stage is not None and not config:
            return int(stage)
    if isinstance(config, str) and not config.startswith("{") and not Path(config).is_file():
        raise ValueError(f"Expected a DeepSpeed config, got no such file: {config}. Correct the path in `deepspeed`.")
    if isinstance(config, str):
        config = json.loads(config if config.startswith("{") else Path(config).read_text(encoding="utf-8"))
    return int((config or {}).get("zero_optimization", {}).get("stage", 0)) if isinstance(config, Mapping) else 0
