"""What is in the files of a checkpoint, looked through before any of it is loaded: a sentence about what is wrong.

A manifest tells damage. These tell a file that agrees with its manifest, and is none that a run can go on from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from ..basics.escape import shortened
from .checkpoint import step_of
from .early_stopping import waited

STATE_NAME = "trainer_state.json"
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "latest")  # the last of DeepSpeed
_MOST_STEPS = 10**9
_RUN_PARTS = ("suite", "model", "method", "options", "optimizer", "order", "versions", "about")


def state_flaw(folder: str | Path) -> str | None:
    """Return what is wrong with the state of ``Trainer`` in a checkpoint, ``None`` if nothing is."""
    state, flaw = _object(Path(folder, STATE_NAME))
    if flaw is not None:
        return flaw
    known = {item.name for item in fields(TrainerState)}
    if unknown := sorted(state.keys() - known):
        return f"{STATE_NAME} has the field {unknown[0]!r}, which the installed transformers does not know"
    step: Any = state.get("global_step")
    most: Any = state.get("max_steps")
    wanted = step_of(folder)
    if not _whole(step) or not 0 <= step < _MOST_STEPS:
        return f"{STATE_NAME} has {shortened(step)} as `global_step` in place of a number of steps"
    if wanted is not None and step != wanted:
        return f"{STATE_NAME} has {step} as `global_step` in the folder of step {wanted}"
    if not _whole(most) or not step <= most:
        return f"{STATE_NAME} has {shortened(most)} as `max_steps` after {step} steps"
    for name in ("epoch", "num_train_epochs"):
        if not _finite(state.get(name)) or state[name] < 0:
            return f"{STATE_NAME} has {shortened(state.get(name))} as `{name}` in place of a number of epochs"
    kinds: dict[str, type] = {"best_model_checkpoint": str, "log_history": list, "stateful_callbacks": dict}
    for name, kind in kinds.items():
        if state.get(name) is not None and not isinstance(state[name], kind):
            return f"{STATE_NAME} has {shortened(state[name])} as `{name}` in place of a {kind.__name__}"
    if not all(isinstance(entry, dict) for entry in state.get("log_history") or []):
        return f"{STATE_NAME} has entries in `log_history` that are no mappings"
    if not _whole(count := waited(state.get("stateful_callbacks"))) or count < 0:
        return f"{STATE_NAME} has {shortened(count)} in place of a number of evaluations without progress"
    best = state.get("best_metric")
    if best is not None and not (_whole(best) or isinstance(best, float)):
        return f"{STATE_NAME} has {shortened(best)} as `best_metric` in place of a number"
    return None


def run_flaw(path: str | Path) -> str | None:
    """Return what is wrong with what a checkpoint says of its run; nothing of version 0.1, which says nothing."""
    file = Path(path)
    if not file.exists():
        return None
    run, flaw = _object(file)
    if flaw is not None:
        return flaw
    if not _whole(run.get("format")):
        return f"{file.name} has {shortened(run.get('format'))} as `format` in place of a number"
    for name in _RUN_PARTS:
        if not isinstance(run.get(name), dict):
            return f"{file.name} has {shortened(run.get(name))} as `{name}` in place of a mapping"
    epochs, changes = run.get("epochs"), run.get("changes")
    numbers = ("steps", "first_step", "first_epoch")
    if epochs is not None and not (
        isinstance(epochs, dict)
        and epochs.keys() == set(numbers)
        and all(_whole(epochs[name]) and epochs[name] >= (name == "steps") for name in numbers)
    ):
        return f"{file.name} has {shortened(epochs)} as `epochs` in place of {', '.join(numbers)}"
    entries = {"step", "name", "old", "new", "note", "applied"}
    if not isinstance(changes, list) or not all(
        isinstance(change, dict) and change.keys() == entries and isinstance(change["name"], str)
        and isinstance(change["note"], str) and _whole(change["step"])
        for change in changes
    ):  # fmt: skip
        return f"{file.name} has {shortened(changes)} as `changes` in place of a list of what was changed"
    if not _whole(run.get("processes")) or not _finite(run["options"].get("max_steps")):
        return f"{file.name} has {shortened(run.get('processes'))} as `processes` or no `options.max_steps`"
    for name in ("warmup_steps", "logging_steps", "teacher_update_every"):
        value = {**run["options"], **run["method"]}.get(name, 0)
        if not _finite(value) or value < 0:
            return f"{file.name} has {shortened(value)} as `{name}` in place of a number"
    return None


def optimizer_flaw(folder: str | Path, trained: int) -> str | None:
    """Return what is wrong with the optimizer, its schedule and the random states of a checkpoint.

    They are pickles, and are read as ``Trainer`` will read them: those that need code are refused.

    Args:
        folder: The checkpoint.
        trained: Parameters (tensors) that the run trains.
    """
    place = Path(folder)
    if not any((place / name).exists() for name in _OPTIMIZERS):
        return "it has no optimizer.pt: it was saved with `save_only_model`"
    if not (place / _OPTIMIZERS[0]).is_file():  # of DeepSpeed, which reads its own
        return None
    if not (place / "scheduler.pt").is_file():
        return "it has no scheduler.pt"
    for path in [place / "optimizer.pt", place / "scheduler.pt", *sorted(place.glob("rng_state*.pth"))]:
        found, flaw = _plain_pickle(path)
        if flaw is not None:
            return flaw
        if not isinstance(found, dict):
            return f"{path.name} holds a {type(found).__name__} in place of a mapping"
        if path.name == "optimizer.pt" and (flaw := _moments_flaw(found, trained)) is not None:
            return f"{path.name} {flaw}"
    return None


def _object(path: Path) -> tuple[dict[str, Any], str | None]:
    """A JSON object, or what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path.name} cannot be read ({type(error).__name__})"
    return (found, None) if isinstance(found, dict) else ({}, f"{path.name} holds {shortened(found)}, no mapping")


def _plain_pickle(path: Path) -> tuple[Any, str | None]:
    """What is in a file of `torch.save`, mapped and not copied; or what is wrong with it."""
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), None
    except Exception as error:  # noqa: BLE001  # torch's own words suggest to run the code that is in the file
        code = "needs code to be read" if type(error).__name__ == "UnpicklingError" else "cannot be read"
        return None, f"{path.name} {code} ({type(error).__name__})"


def _moments_flaw(state: Mapping[str, Any], trained: int) -> str | None:
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(moments, dict):
        return "has no `param_groups` and `state`"
    sizes = [
        len(group["params"]) for group in groups if isinstance(group, dict) and isinstance(group.get("params"), list)
    ]
    if len(sizes) != len(groups) or sum(sizes) != trained:
        return f"is of {sum(sizes)} parameters in place of {trained}"
    for index, values in moments.items():
        if not isinstance(values, dict):
            return f"has a {type(values).__name__} for parameter {shortened(index)}"
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return f"has nan or inf in `{shortened(name)}` of parameter {shortened(index)}"
    return None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
