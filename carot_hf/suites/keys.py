"""The keys of a mapping that somebody wrote: known, of the right kind, none missing."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..basics.yaml_text import as_number, short

_KINDS = {str: "text", list: "a list", dict: "a mapping", float: "a number", bool: "true or false"}


def checked_keys(content: Any, file: str, key: str, keys: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """Return the mapping if its keys are known, of the right kind, and none is missing.

    Args:
        content: The mapping.
        file: Where it stands, for errors.
        key: Of the mapping in it; "": it is all of it.
        keys: Those that are known: kind, or kinds, and an example.
        required: Those that must be there.
    Raises:
        ValueError: As said; it names the key, what is expected, and an example.
    """
    where = f"{file}: {key}" if key else file
    if not isinstance(content, dict):
        example = keys[required[0]][1]
        raise ValueError(f"{where}: expected a mapping of {', '.join(keys)}, got {short(content)}. Example: {example}")
    checked = {}
    for name, value in content.items():
        full = f"{file}: {key}.{name}" if key else f"{file}: {name}"
        if name not in keys:
            near = difflib.get_close_matches(str(name), keys, n=1)
            hint = f"Did you mean {near[0]!r}? Example: {keys[near[0]][1]}" if near else "Leave it out."
            line = getattr(content, "lines", {}).get(name)
            at = "" if line is None else f" in line {line}"
            raise ValueError(f"{full}: expected one of the keys {', '.join(keys)}, got {name!r}{at}. {hint}")
        kinds, example = keys[name]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        checked[name] = _as_kind(value, kinds)
        if checked[name] is None:
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise ValueError(f"{full}: expected {expected}, got {short(value)}. Example: {example}")
    for name in required:
        if name not in content:
            full = f"{file}: {key}.{name}" if key else f"{file}: {name}"
            raise ValueError(f"{full}: expected this key, got none. Example: {keys[name][1]}")
    return checked


def _as_kind(value: Any, kinds: tuple[type, ...]) -> Any:
    """A value as what is expected: a number in the place of text is the text that stands there; ``None`` if it is none.

    A person who writes ``validation: "0.1"`` or ``version: 2`` means what is expected.
    """
    if isinstance(value, bool):
        return value if bool in kinds else None
    if float in kinds and isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:  # a whole number beyond all floats
            return math.inf if value > 0 else -math.inf
    if float in kinds and isinstance(value, str) and (number := as_number(value)) is not None:
        return number
    if kinds == (str,) and isinstance(value, int | float):
        return value.text if hasattr(value, "text") else None
    if dict in kinds and isinstance(value, dict):
        return {getattr(name, "text", name): item for name, item in value.items()} if value else {}
    return value if isinstance(value, kinds) else None
