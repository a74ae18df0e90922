"""Training arguments out of a file: names checked, values brought to the type that each argument has."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from .training_args import CaRotTrainingArguments
from .yaml_text import as_number

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def checked_arguments(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return training arguments with values of the right type.

    Args:
        given: From their names to what stands in a file, where ``1e-5`` may be text.
        where: File and key, for errors.
    Raises:
        ValueError: If there is no such argument, or a value is none of its type.
    """
    known = {item.name for item in fields(CaRotTrainingArguments) if item.init} - {"output_dir"}
    hints = get_type_hints(CaRotTrainingArguments)
    result = {}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Leave it out."
            raise ValueError(
                f"{where}.{name}: expected a training argument, got {name!r}. {hint} Example: learning_rate: 1e-5"
            )
        kinds = [kind for kind in (get_args(hints[name]) or (hints[name],)) if kind in (bool, int, float, str)]
        result[name] = _as_one_of(kinds, value, f"{where}.{name}") if kinds else value
    return result


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
    raise ValueError(f"{where}: expected {expected}, got {value!r}. Example: {where.rpartition('.')[2]}: {example}")
