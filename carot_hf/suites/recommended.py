"""Options of the method out of a suite's file: names checked, values brought to the type that each argument has.

A suite may be a stranger's. It can say how to train; it cannot say what is written, kept, pushed, reported or resumed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments

from ..basics.yaml_text import as_number, short
from ..training_args import CaRotTrainingArguments

_NOT_OF_THE_METHOD = ("overwrite_output_dir", "on_bad_image", "reliability_diagrams")  # of ours
_STOCK = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("optim", "optim_args", "label_smoothing_factor", "num_train_epochs", "max_steps", "warmup_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "gradient_accumulation_steps", "bf16", "fp16"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
)
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def checked_arguments(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return options of the method with values of the right type.

    Args:
        given: From their names to what stands in a file, where ``1e-5`` may be text.
        where: File and key, for errors.
    Raises:
        ValueError: If there is no such argument, it is none of the method, or a value is none of its type.
    """
    known = {item.name for item in fields(CaRotTrainingArguments) if item.init}
    allowed = method_options()
    hints = get_type_hints(CaRotTrainingArguments)
    result = {}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Leave it out."
            raise ValueError(
                f"{where}.{name}: expected a training argument, got {name!r}. {hint} Example: learning_rate: 1e-5"
            )
        if name not in allowed:
            raise ValueError(
                f"{where}.{name}: expected an option of the method, which is all that a suite may set, got {name!r}. "
                "Set it yourself, on the command line or in the arguments. Example: learning_rate: 1e-5"
            )
        kinds = [kind for kind in (get_args(hints[name]) or (hints[name],)) if kind in (bool, int, float, str)]
        result[name] = _as_one_of(kinds, value, f"{where}.{name}") if kinds else value
    return result


def method_options() -> frozenset[str]:
    """Names of the arguments that a suite may recommend."""
    stock = {item.name for item in fields(TrainingArguments)}
    ours = {item.name for item in fields(CaRotTrainingArguments)} - stock - set(_NOT_OF_THE_METHOD)
    return frozenset(ours.union(_STOCK))


def _as_one_of(kinds: list[type], value: Any, where: str) -> Any:
    if value is None or (isinstance(value, bool) and bool in kinds):
        return value
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        text = str(value).strip()
        if isinstance(value, str) and str in kinds:
            return value
        if bool in kinds and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        number = as_number(text)
        if int in kinds and number is not None and number.is_integer():
            return int(number)
        if float in kinds and number is not None:
            return number
        if str in kinds:
            return text
    example = {bool: "true", int: "8", float: "0.1", str: "cosine"}[kinds[0]]
    expected = " or ".join({bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
                           for kind in kinds)  # fmt: skip
    if isinstance(value, list | dict) and str in kinds:  # some options of transformers take these, too
        return value
    raise ValueError(
        f"{where}: expected {expected}, got {short(value)}. Example: {where.rpartition('.')[2]}: {example}"
    )
