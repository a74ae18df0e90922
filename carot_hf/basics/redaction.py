"""What of a run's options may be seen by others: no token, no password, no folder of the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

SECRET = re.compile("token|key|secret|password|credential", re.IGNORECASE)  # in names of options
HIDDEN = "..."
_ACCOUNT = re.compile(r"(?<=://)[^/\s@]*@")  # of a URL
_TOKEN = re.compile(r"hf_\w{20,}")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_PLACE = re.compile(  # of a file, where a text begins or goes on after a space, quote, bracket or equals sign
    r"(?:(?<=[\s'\"`(\[{=,])|^)(?:file://)?(?:~[\w.-]*/|/|(?:\.\.[\\/])+|[A-Za-z]:[\\/]|\\\\)[^\s'\"`)\]},]+"
)


def public(value: Any, name: str = "") -> Any:
    """Return a value without what is nobody else's business.

    Texts whose option is named like a secret, accounts in URLs and tokens of the Hub become ``...``; of a file or
    folder of the machine the last part of its path stays.

    Args:
        value: Of an option, as JSON has it; mappings and lists are gone through.
        name: Of the option.
    """
    if isinstance(value, Mapping):
        return {key: public(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item, name) for item in value]
    if SECRET.search(name) and not isinstance(value, bool | None) and value != "":
        return HIDDEN
    if not isinstance(value, str):
        return value
    if _PLACE.match(value) is not None:
        return _last(_ACCOUNT.sub(f"{HIDDEN}@", value))
    return public_text(value)


def public_text(text: str) -> str:
    """Return a text of several words in the same way."""
    hidden = _TOKEN.sub(HIDDEN, _ACCOUNT.sub(f"{HIDDEN}@", text))
    return _PLACE.sub(lambda found: _last(found[0]), hidden)


def public_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line in the same way."""
    shown, hidden = [], False
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if option:
            hidden = SECRET.search(option) is not None
        value = HIDDEN if hidden and value else _public_json(value) if value.startswith("{") else public(value)
        shown.append(f"{option}{equals}{value}")
    return shown


def _public_json(text: str) -> str:
    try:
        return json.dumps(public(json.loads(text)))
    except (ValueError, RecursionError):
        return public_text(text)


def _last(path: str) -> str:
    kind = PureWindowsPath if _WINDOWS.match(path) else PurePosixPath
    return f"{HIDDEN}/{kind(path).name}"
