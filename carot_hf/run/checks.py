"""What cannot be trained as it is: said before anything is loaded or trained."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from ..basics.escape import guarded
from ..calibration.metrics import GROUP_METRICS, METRICS, scaled_metrics
from ..calibration.names import DEFAULT_BEST_METRIC, HOME, SHIFTED, SPLIT, check_selection, chosen_by, set_of
from ..data.balanced import balanced_labels
from ..data.perturbed_set import bank_of
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite, needed
from ..data.transforms import check_processor
from ..training_args import CaRotTrainingArguments
from .early_stopping import check_alone

logger = guarded(logging.getLogger(__name__))


def check_launch(args: CaRotTrainingArguments) -> None:
    """Refuse processes that do not know of each other: each would train alone and write the same files."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() != args.world_size:
        raise ValueError(
            f"Expected {dist.get_world_size()} processes that train together, got {args.world_size} in the training "
            "arguments. On a machine without accelerators add `--use_cpu`."
        )


def check_options(
    args: CaRotTrainingArguments, suite: ShiftSuite, processing_class: Any, compute_metrics: Any, kwargs: dict[str, Any]
) -> None:
    """Refuse what a trainer is made with, before its model is looked at."""
    if not isinstance(args, CaRotTrainingArguments):
        raise TypeError(
            f"Expected CaRotTrainingArguments, got {type(args).__name__}. Make them with "
            "CaRotTrainingArguments.from_preset('carot', output_dir=...)."
        )
    if processing_class is None:
        raise ValueError("Expected the processor of the model, got None. Pass it as `processing_class`.")
    check_processor(processing_class)
    for name in ("compute_loss_func", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"Expected no `{name}`, got one. Override `CaRotTrainer.compute_loss`, or pass `compute_metrics`, "
                "which is called with the logits of each set."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"Expected one process a device, got one process with {args.n_gpu} GPUs. nn.DataParallel would split the "
            "contrastive batch; start with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES."
        )
    check_alone(args, kwargs.get("callbacks") or ())
    if kwargs.get("train_dataset") is None:
        needed(suite.train, "training", "to train on")
    needed(suite.validation, "validation", "to fit a temperature and to choose checkpoints on")
    if args.calibration_method == "density" and "train_dataset" not in kwargs:
        bank_of(suite.train)  # refused now, and not after the training
    if args.class_balanced and "train_dataset" not in kwargs:
        balanced_labels(suite.train)
    if args.metric_for_best_model is not None:
        _check_best_metric(args, suite, others=compute_metrics is not None or "eval_dataset" in kwargs)
        if "eval_dataset" not in kwargs:
            _check_measured(args, suite)


def _check_best_metric(args: CaRotTrainingArguments, suite: ShiftSuite, *, others: bool) -> None:
    """Refuse a metric that cannot choose a model; ``others``: there may be metrics and sets beside the suite's."""
    metric = str(args.metric_for_best_model)
    homes, test = (SPLIT, HOME, suite.test.name), suite.test.name
    check_selection(metric, args.greater_is_better, homes, (SHIFTED, *suite.shifts))
    known = {f"{name}_{key}" for name in homes for key in METRICS}
    grouped = {SPLIT: suite.validation, HOME: suite.test, test: suite.test}
    grouped = {name: data for name, data in grouped.items() if getattr(data, "groups", None) is not None}
    known |= {f"{name}_{key}" for name in grouped for key in GROUP_METRICS}
    known |= {f"{name}_{key}_ts" for name in homes[1:] for key in scaled_metrics()}
    if metric.removeprefix("eval_") not in known and not others:
        raise ValueError(
            f"Expected `metric_for_best_model` as eval_<set>_<metric> with a set of {homes} and a metric of "
            f"{(*METRICS,)}, got {metric!r}. Use for example '{DEFAULT_BEST_METRIC}'; there is no evaluation loss."
        )
    if chosen_by(metric, test):
        logger.warning(
            "`metric_for_best_model` %s chooses the model by the test set '%s', which is reported: its figures will be "
            "too good. Use '%s' to choose by the held-out split.",
            metric,
            test,
            DEFAULT_BEST_METRIC,
        )


def _check_measured(args: CaRotTrainingArguments, suite: ShiftSuite) -> None:
    """Refuse a metric that chooses a model by a set that no evaluation during training measures."""
    metric = str(args.metric_for_best_model)
    watched = getattr(args.eval_strategy, "value", args.eval_strategy) != "no"
    if watched and args.eval_sets == SPLIT and set_of(metric, (SPLIT, HOME, suite.test.name)) not in (SPLIT, None):
        raise ValueError(
            f"Expected `metric_for_best_model` of the set 'validation' with `eval_sets` 'validation', got {metric!r}. "
            f"Pass `eval_sets` 'all' (--eval_sets all) to measure every set during training, or use "
            f"'{DEFAULT_BEST_METRIC}'."
        )


def check_optimizer(optimizer: Any, model: Any) -> None:
    """Refuse an optimizer of other parameters than the model's: they may have been replaced since it was made."""
    if optimizer is None:
        return
    held = {id(value): value for group in optimizer.param_groups for value in group["params"]}
    own = {id(value): value for value in model.parameters()}
    trained = {key for key, value in own.items() if value.requires_grad}
    strange = len(held.keys() - own.keys())
    if strange or not held.keys() & trained:
        raise ValueError(
            f"Expected an optimizer of the parameters that are trained, got one with {strange} that are not the "
            f"model's and {len(held.keys() & trained)} of the {len(trained)} that are trained: `lora_rank`, "
            "`objective` or `model_init` have put others in their place. Leave `optimizers` out and set `optim`, "
            "`learning_rate` and `weight_decay`, or override `create_optimizer`."
        )
    if missing := len(trained - held.keys()):
        logger.warning("%d of %d trained parameters are not in the optimizer: they stay.", missing, len(trained))


def check_training_set(train: ShiftSet, args: CaRotTrainingArguments) -> ShiftSet:
    """Return a set that is to be trained on.

    Raises:
        ValueError: If it has neither labels nor captions, its terms forbid it, or its classes cannot be balanced.
    """
    objective = args.objective
    if train.label_column is None and (train.caption_column is None or objective == "cross_entropy"):
        raise ValueError(
            f"Expected labels in set '{train.name}', got none. Each training caption is made from a class name; "
            "name a `caption_column` if the images have captions of their own."
        )
    if train.test_only:
        raise ValueError(f"Expected a set that may be trained on, got '{train.name}', whose terms forbid it.")
    if args.class_balanced:
        balanced_labels(train)
    return train
