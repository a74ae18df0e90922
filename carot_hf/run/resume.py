"""What a run is, written into its checkpoints, and what may be different when it goes on: refused, or said."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from ..basics.content_hash import sha256_of_facts
from ..basics.installed import versions
from ..basics.redaction import SECRET
from ..basics.whole_file import write_whole
from ..models.lora import adapter_facts, base_model
from ..training_args import CaRotTrainingArguments
from .checkpoint_files import STATE_NAME
from .early_stopping import waited

RUN_NAME = "run.json"
_FORMAT = 1

# Arguments of ours that change no step of the training. LoRA is read off the model, the batch has facts of its own.
_OF_EVALUATION = (
    "n_bins",
    "calibration_criterion",
    "calibration_bounds",
    "calibration_method",
    "reliability_diagrams",
    "overwrite_output_dir",
)
_WATCHING = ("eval_sets", "early_stopping_patience", "early_stopping_threshold")
_ELSEWHERE = ("lora_rank", "lora_alpha", "contrastive_batch_size", "on_bad_image", *_WATCHING)
# Arguments of Trainer without which it is another run, and those that a user may want to change.
_REFUSED = ("label_smoothing_factor", "optim", "seed")
_SAID = (
    "max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm",
    "bf16", "fp16", "tf32", "dataloader_drop_last", "on_bad_image", "logging_strategy", "logging_steps",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", *_WATCHING,
)  # fmt: skip
_OF_THE_OPTIMIZER = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args",
)  # fmt: skip
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "contrastive_batch_size", "world_size")
_BY_MEASUREMENT = ("reduce_lr_on_plateau", "greedy")  # schedules that are no function of the step
_HYPERPARAMETERS = {"initial_lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps"}
_SET_BACK = (
    "Set it back, or start a new run from these weights: load the model from that folder and train without "
    "`resume_from_checkpoint`."
)


@dataclass(frozen=True)
class Change:
    """One thing that is another since a run was resumed.

    Attributes:
        step: Optimizer step of the checkpoint.
        name: What it is, mostly an argument.
        old: In the checkpoint.
        new: Asked for.
        note: What becomes of it.
        applied: Whether the rest of the run goes by the new one.
    """

    step: int
    name: str
    old: Any
    new: Any
    note: str = ""
    applied: bool = True

    def __str__(self) -> str:
        done = "applied" if self.applied else "not applied"
        return f"{_shown(self.name, self.old, self.new)}: {done}{self.note and f', {self.note}'}."


@dataclass(frozen=True)
class Epochs:
    """Where the epochs of a run lie among its steps; another batch, from the end of an epoch on, changes that.

    Attributes:
        steps: Optimizer steps of an epoch.
        first_step: Step from which this holds; 0: from the start.
        first_epoch: Epochs that were finished there.
    """

    steps: int
    first_step: int = 0
    first_epoch: int = 0

    def position(self, step: int) -> tuple[int, int]:
        """Finished epochs, and the steps of the one that is not, after ``step`` steps."""
        epochs, rest = divmod(step - self.first_step, self.steps)
        return self.first_epoch + epochs, rest

    def last_epoch(self, max_steps: int) -> int:
        """The number of epochs, the last one begun, that ``max_steps`` steps take."""
        return self.first_epoch + math.ceil((max_steps - self.first_step) / self.steps)

    def last_step(self, num_train_epochs: float) -> int:
        """The step at which ``num_train_epochs`` epochs end."""
        return self.first_step + math.ceil((num_train_epochs - self.first_epoch) * self.steps)


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of its run.

    Attributes:
        folder: Of the checkpoint.
        step: Optimizer steps that are done.
        facts: As :func:`run_facts` gave them; ``None``: it was saved by version 0.1, which wrote none.
        waited: Evaluations without progress, as early stopping counts them.
    """

    folder: Path
    step: int
    facts: dict[str, Any] | None
    waited: int = 0

    @property
    def epochs(self) -> Epochs | None:
        """Where the epochs lie, if that is known."""
        return None if self.facts is None or self.facts["epochs"] is None else Epochs(**self.facts["epochs"])

    @property
    def changes(self) -> list[Change]:
        """What was changed at earlier resumptions of the run."""
        return [] if self.facts is None else [Change(**change) for change in self.facts["changes"]]


def run_facts(
    args: CaRotTrainingArguments, suite: Any, train: Any, student: Any, link: str, transform: str | None = None
) -> dict[str, Any]:
    """Say what a run is, by the arguments and the model of this moment, in values that JSON keeps.

    Args:
        args: Of the run.
        suite: Its suite.
        train: The set that is trained on, which may be another one than the suite's; ``None``: none.
        student: Unwrapped.
        link: From logits to probabilities.
        transform: What varies the training images in place of ``augment``, in words; ``None``: nothing.
    """
    ours = _names(CaRotTrainingArguments)
    method = [name for name in (*ours, *_REFUSED) if name not in (*_OF_EVALUATION, *_ELSEWHERE)]
    own = [name for name in _names(type(args)) if name not in ours and not SECRET.search(name)]
    at_once = args.per_device_train_batch_size * args.world_size
    contrastive = args.objective == "contrastive"
    parameters, known = list(student.parameters()), versions()
    facts = {
        "format": _FORMAT,
        "suite": {
            "class_names": suite.class_names,
            "templates": suite.templates,
            "content_hash": suite.content_hash,
            "training_set": None if train is None else sha256_of_facts(train.facts),
            "transform": transform,
        },
        "model": {
            "class": type(base_model(student)).__name__,
            "link": link,
            **adapter_facts(student),
            "parameters": sum(value.numel() for value in parameters),
            "trained parameters": sum(value.numel() for value in parameters if value.requires_grad),
        },
        "method": {name: getattr(args, name) for name in method},
        "options": {name: getattr(args, name, None) for name in (*_SAID, *own)},
        "optimizer": {name: getattr(args, name, None) for name in _OF_THE_OPTIMIZER},
        "about": {  # for readers: nothing is compared with it
            "suite": suite.name,
            **{name: getattr(args, name) for name in _BATCH},
        },
        "best": args.metric_for_best_model,
        "processes": args.world_size,
        "order": {
            "samples a step": at_once * args.gradient_accumulation_steps,
            "pairs in the loss": (args.contrastive_batch_size or at_once) if contrastive else None,
            "data_seed": args.order_seed,
            "train_sampling_strategy": args.train_sampling_strategy,
        },
        "versions": {name: known[name] for name in ("carot_hf", "torch", "transformers", "accelerate")},
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=_plain))
    return plain


def write_run(
    checkpoint: str | Path, facts: Mapping[str, Any], epochs: Epochs | None, changes: Iterable[Change]
) -> None:
    """Write what the run is into a checkpoint, before its manifest."""
    written = {**facts, "epochs": epochs and asdict(epochs), "changes": [asdict(change) for change in changes]}
    write_whole(Path(checkpoint, RUN_NAME), json.dumps(written, indent=1))


def read_run(checkpoint: str | Path) -> SavedRun:
    """Read what a checkpoint says of its run; its files are sound (:mod:`carot_hf.run.checkpoint_files`)."""
    folder = Path(checkpoint)
    state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    path = folder / RUN_NAME
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return SavedRun(folder, int(state["global_step"]), facts, waited(state.get("stateful_callbacks")))


def check_resumed(
    saved: SavedRun, facts: Mapping[str, Any], *, ignore_data_skip: bool = False, deepspeed: bool = False
) -> list[Change]:
    """Compare a checkpoint with the run that is to go on from it.

    Args:
        saved: The checkpoint.
        facts: Of the run, from :func:`run_facts`.
        ignore_data_skip: The argument of that name.
        deepspeed: Whether DeepSpeed restores the optimizer.
    Returns:
        What is another and may be.
    Raises:
        ValueError: If it would be another run, or if samples of an epoch would be repeated.
    """
    if saved.facts is None:
        return []
    old = saved.facts
    if old["format"] != _FORMAT:
        raise ValueError(
            f"Expected {RUN_NAME} of format {_FORMAT} in {saved.folder}, got {old['format']}. Resume with the version "
            "of carot_hf that wrote it."
        )
    if others := differences(saved, facts):
        raise ValueError(
            f"Expected the run that was saved in {saved.folder}, got another one: {', '.join(others)}. {_SET_BACK}"
        )
    return [
        *_order_changes(saved, facts["order"]),
        *_skipped_changes(saved, ignore_data_skip),
        *_option_changes(saved, facts, deepspeed),
    ]


def differences(saved: SavedRun, facts: Mapping[str, Any], unnamed: Iterable[str] = ()) -> list[str]:
    """Return in what a run is another one than that of a checkpoint, so that it cannot go on from it.

    Args:
        saved: The checkpoint; of version 0.1 it is not known.
        facts: Of the run.
        unnamed: Numbers of steps that are not compared: nobody has named them, and the checkpoint's will be taken.
    """
    if saved.facts is None:
        return []
    old = saved.facts
    if old["format"] != _FORMAT:
        return [f"`format` {old['format']} -> {_FORMAT}"]
    others = [
        _shown(*difference)
        for part in ("suite", "model", "method")
        for difference in _differences(old[part], facts[part])
        if difference[0] not in unnamed
    ]
    types = [run["options"].get("lr_scheduler_type") for run in (old, facts)]
    if types[0] != types[1] and set(types) & set(_BY_MEASUREMENT):
        others.append(f"`lr_scheduler_type` {types[0]} -> {types[1]}")
    if old.get("best") and facts["best"] and old["best"] != facts["best"]:
        others.append(f"`metric_for_best_model` {old['best']} -> {facts['best']}")
    return others


def continued(saved: SavedRun, steps: int) -> Epochs:
    """Lay the epochs of a run that goes on.

    Args:
        saved: The checkpoint.
        steps: Optimizer steps of an epoch, from now on.
    Raises:
        ValueError: If that is another number than before, in the middle of an epoch.
    """
    before = saved.epochs
    if before is None:
        return Epochs(steps)
    if before.steps == steps:
        return before
    epoch, rest = before.position(saved.step)
    if rest:
        raise _in_the_middle(saved, [_shown("steps an epoch", before.steps, steps)])
    return Epochs(steps, saved.step, epoch)


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate (before any schedule), weight decay, betas and epsilon of each group of an optimizer."""
    return [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups]


def apply_hyperparameters(
    optimizer: Optimizer, scheduler: Any, wanted: list[dict[str, Any]], step: int
) -> list[Change]:
    """Give an optimizer whose state was loaded the hyper-parameters that were asked for, and its schedule as well.

    The states of torch hold the learning rate and the weight decay of their own time, and the learning rate of the next
    step, which is that of the old schedule.

    Args:
        optimizer: With the loaded state.
        scheduler: The same. Only a ``LambdaLR``, as ``Trainer`` makes them, can be moved to another learning rate.
        wanted: As :func:`hyperparameters` gave them before.
        step: Of the checkpoint.
    Returns:
        What was changed.
    """
    movable = isinstance(scheduler, LambdaLR)
    found: dict[str, Change] = {}
    for group, options in zip(optimizer.param_groups, wanted, strict=True):
        for name, value in options.items():
            before = group.get(name)
            if _value(before) == _value(value):
                continue
            applied = movable or name != "initial_lr"
            title = _HYPERPARAMETERS[name]
            found.setdefault(title, Change(step, title, _value(before), _value(value), applied=applied))
            if applied:
                _put(group, name, value)
    if movable:
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        shapes = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [base * shape(scheduler.last_epoch) for base, shape in shapes]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            _put(group, "lr", rate)
        scheduler._last_lr = rates
    return list(found.values())


def used_arguments(arguments: Mapping[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    """The arguments by which a run really went: those that were asked for too late keep their old values."""
    late = {change.name: change.old for change in changes if not change.applied}
    return {name: late.get(name, value) for name, value in arguments.items()}


def _order_changes(saved: SavedRun, order: Mapping[str, Any]) -> list[Change]:
    found = [] if saved.facts is None else _differences(saved.facts["order"], order)
    if found and (saved.epochs is None or saved.epochs.position(saved.step)[1]):
        raise _in_the_middle(saved, [_shown(*difference) for difference in found])
    return [Change(saved.step, name, old, new, "from the start of an epoch on") for name, old, new in found]


def _in_the_middle(saved: SavedRun, changes: list[str]) -> ValueError:
    where = "an epoch"
    if saved.epochs is not None:
        epoch, rest = saved.epochs.position(saved.step)
        where = f"epoch {epoch + 1}, after {rest} of its {saved.epochs.steps} steps"
    return ValueError(
        f"Expected the batch and the order of the samples that {saved.folder} was saved with, for it lies in the "
        f"middle of {where}; got {', '.join(changes)}. Samples of the epoch would be seen twice or never: set it back, "
        "or resume from a checkpoint at the end of an epoch."
    )


def _skipped_changes(saved: SavedRun, ignore_data_skip: bool) -> list[Change]:
    rest = 0 if saved.epochs is None else saved.epochs.position(saved.step)[1]
    if not ignore_data_skip or not rest:
        return []
    note = f"the epoch begins anew, and samples of its {rest} finished steps are seen twice"
    return [Change(saved.step, "ignore_data_skip", False, True, note)]


def _option_changes(saved: SavedRun, facts: Mapping[str, Any], deepspeed: bool) -> list[Change]:
    old: Any = saved.facts
    step, changes = saved.step, []
    by_measurement = facts["options"]["lr_scheduler_type"] in _BY_MEASUREMENT
    by_steps = min(old["options"]["max_steps"], facts["options"]["max_steps"]) > 0
    for name, before, after in _differences(old["options"], facts["options"]):
        if name == "num_train_epochs" and by_steps:
            continue  # `max_steps` goes before it
        schedule = name in ("max_steps", "num_train_epochs", "warmup_steps") or name.startswith("lr_scheduler")
        if schedule and name != "lr_scheduler_type" and by_measurement:
            lost = name in ("lr_scheduler_kwargs", "warmup_steps")
            changes.append(Change(step, name, before, after, "the schedule's state goes on" * lost, not lost))
        else:
            note = "the learning rate follows the new schedule from the next step on" if schedule else ""
            changes.append(Change(step, name, before, after, note))
    kept = _OF_THE_OPTIMIZER if deepspeed else ("learning_rate",) if by_measurement else ()
    reason = "DeepSpeed restores its own" if deepspeed else "the schedule's state goes on"
    for name, before, after in _differences(old["optimizer"], facts["optimizer"]):
        if name in kept:
            changes.append(Change(step, name, before, after, reason, applied=False))
    if old["processes"] != facts["processes"]:
        note = "the same samples in each step, equal up to rounding"
        changes.append(Change(step, "processes", old["processes"], facts["processes"], note))
    for name, before, after in _differences(old["versions"], facts["versions"]):
        changes.append(Change(step, f"version of {name}", before, after, "equal up to rounding at best"))
    return changes


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two mappings both know and differ in: a version that knew a name less says nothing of it."""
    return [(name, old[name], new[name]) for name in old if name in new and old[name] != new[name]]


def _names(kind: type) -> list[str]:
    """Names of the arguments that a class adds to those of ``TrainingArguments``."""
    stock = {item.name for item in fields(TrainingArguments)}
    return [item.name for item in fields(kind) if item.name not in stock]  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else str(value)


def _value(value: Any) -> Any:
    """A hyper-parameter as JSON keeps it; torch may hold learning rates in tensors."""
    if isinstance(value, Tensor):
        return value.item()
    return [_value(item) for item in value] if isinstance(value, list | tuple) else value


def _put(group: dict[str, Any], name: str, value: Any) -> None:
    """Set a hyper-parameter; a tensor is filled, for a compiled step holds on to it."""
    if isinstance(group.get(name), Tensor):
        group[name].fill_(_value(value))
    else:
        group[name] = value


def _shown(name: str, old: Any, new: Any) -> str:
    """A difference as a message shows it; of long lists only where they part."""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > 3:
        at = next((i for i, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), None)
        if at is None:
            return f"{len(old)} `{name}` -> {len(new)}"
        return f"`{name}` number {at} {old[at]!r} -> {new[at]!r}"
    return f"`{name}` {old} -> {new}"
