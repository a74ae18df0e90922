"""Names of strangers, as they may stand in a terminal, a log and a Markdown page: nothing in them is an order."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

_JOINERS = "\u200c\u200d"  # of Persian and Indic words
_MARKS = re.compile(r"[\\`*\[\]|~#$!(){}&<@]|(?<!-)>|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")
_NAMES = re.compile(r"(`[\w .]+`)")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", ":": "&#58;", ".": "&#46;"}


def printable(text: Any) -> str:
    r"""Return a text in one line: control characters, marks of direction and such as ``\n``, ``\x1b``, ``\u202e``."""
    return "".join(
        character if character.isprintable() or character in _JOINERS else repr(character)[1:-1]
        for character in str(text)
    )


def printable_lines(text: str) -> str:
    """The same of a text of ours in several lines."""
    return "\n".join(map(printable, text.split("\n")))


def markdown(text: Any) -> str:
    """Return a text that Markdown and HTML show as it is: no emphasis, link, tag, cell or mention begins in it."""
    return _MARKS.sub(lambda mark: _ENTITIES.get(mark[0], f"\\{mark[0]}"), printable(text))


def sentence(text: Any) -> str:
    """The same of a sentence of ours, whose names in backticks stay so."""
    parts = _NAMES.split(printable(text))
    return "".join(part if number % 2 else markdown(part) for number, part in enumerate(parts))


def code(text: Any) -> str:
    """Return a text as a span of code, also in a cell of a table."""
    shown = printable(text).replace("|", "\\|")
    marks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{marks}{space}{shown}{space}{marks}"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Lay cells that are Markdown already out as a table, its columns aligned for those who read it as text.

    Args:
        rows: Of equal length; the first one holds the titles.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def with_interval(interval: tuple[float, float] | None, digits: int = 3) -> str:
    """An interval as it stands behind its number; empty if there is none."""
    return "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


class _Printable(logging.Filter):
    """Makes what is put into the sentences of a log printable; the sentences themselves are ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(arg if isinstance(arg, int | float) else printable(arg) for arg in record.args)
        return True


def guarded(logger: Any) -> Any:
    """Return a logger whose lines hold no control character of a name or a path."""
    if not any(isinstance(item, _Printable) for item in logger.filters):
        logger.addFilter(_Printable())
    return logger


def shortened(value: Any) -> str:
    """Write a value of a file out for a message: of long texts the start, of lists and mappings the kind."""
    text = value if isinstance(value, str) else type(value).__name__ if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
