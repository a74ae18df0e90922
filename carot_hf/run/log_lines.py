"""The lines of a training log as people read them: aligned columns, a small table an evaluation, time that is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import Any

from ..basics.escape import printable
from ..basics.log_names import loss_terms
from ..calibration.names import HOME, SHIFTED, directions

WIDTH = 100  # of lines that no terminal shows
REPEAT = 20  # lines between two of the column titles
_SHOWN = ("accuracy", "ece", "nll", "ece_ts", "ece_pts", "ece_dts")
_GAP = "  "
_LONGEST = 32  # characters of a name


class Pace:
    """How long a step of a training takes, by the median of the latest ones.

    Evaluations, savings and the first step, which loads, compiles and skips what was seen, do not count.
    """

    def __init__(self, keep: int = 50) -> None:
        self._durations: deque[float] = deque(maxlen=keep)
        self._since: float | None = None

    def step(self, now: float) -> None:
        """A step has ended, at a time in seconds."""
        if self._since is not None:
            self._durations.append(now - self._since)
        self._since = now

    def pause(self, now: float) -> None:
        """Something that is no step has ended; before the first step it says nothing."""
        if self._since is not None:
            self._since = now

    def left(self, steps: int) -> float | None:
        """Seconds that so many steps will take; ``None``: not known yet."""
        return median(self._durations) * steps if self._durations else None


class Columns:
    """Lines under titles that come again every so many lines, after something else was written, and with a new column.

    Args:
        width: Most characters of a line; columns that do not fit are left out from the right, and a note says which.
    """

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width
        self._widths: dict[str, int] = {}
        self._since = REPEAT

    def interrupted(self) -> None:
        """Something else was written: the titles come again."""
        self._since = REPEAT

    def lines(self, cells: Mapping[str, str]) -> list[str]:
        """Return the line of some cells, below the titles where they are due.

        Args:
            cells: Texts by title; a title that was there before and is none now leaves its place blank.
        """
        grown = {title: max(len(title), len(text), self._widths.get(title, 0)) for title, text in cells.items()}
        if grown != {title: self._widths.get(title) for title in cells}:
            self._widths |= grown
            self._since = REPEAT
        shown, hidden = _fitting(self._widths, self.width)
        line = _GAP.join(cells.get(title, "").rjust(self._widths[title]) for title in shown).rstrip()
        if self._since < REPEAT:
            self._since += 1
            return [line]
        self._since = 1
        titles = _GAP.join(title.rjust(self._widths[title]) for title in shown)
        note = [f"{_GAP}(no room for {', '.join(hidden)})"] if hidden else []
        return [titles, *note, line]


def _fitting(widths: Mapping[str, int], most: int) -> tuple[list[str], list[str]]:
    """Titles that fit into a line, the first one always, and those that do not."""
    used, titles = -len(_GAP), list(widths)
    for at, title in enumerate(titles):
        used += len(_GAP) + widths[title]
        if used > most and at:
            return titles[:at], titles[at:]
    return titles, []


def training_cells(logs: Mapping[str, Any], step: int, steps: int, left: float | None) -> dict[str, str]:
    """Return the cells of an entry with a loss, by title, the most important first.

    Args:
        logs: The entry.
        step: Steps that are done.
        steps: In all.
        left: Seconds that the rest will take; ``None``: not known.
    """
    total = f"{steps:,}"
    cells = {"step": f"{step:>{len(total)},}/{total}"}
    if "epoch" in logs:
        cells["epoch"] = f"{logs['epoch']:.2f}"
    cells["left"] = "" if left is None else duration(left)
    cells |= {printable(name): number(logs[name]) for name in ("loss", *loss_terms(logs))}
    if "learning_rate" in logs:
        cells["lr"] = f"{logs['learning_rate']:.2e}"
    if "teacher_momentum" in logs:
        cells["momentum"] = f"{logs['teacher_momentum']:.4f}"
    return cells


def evaluation_lines(
    metrics: Mapping[str, Any], prefix: str, sets: Collection[str], *, also: str | None = None, where: str = ""
) -> list[str]:
    """Lay an evaluation out: a row a set and one for the mean of the shifts, columns for what is looked at first.

    Args:
        metrics: ``<prefix>_<set>_<metric>``, or of one set ``<prefix>_<metric>``.
        prefix: Of their names.
        sets: Names of the sets that were measured, as far as they are known.
        also: A further metric to show: the one that chooses the model.
        where: Said in the title.
    """
    rows = evaluation_rows(metrics, prefix, [*sets, HOME, SHIFTED], also)
    titles = [title for title in (*_SHOWN, *([] if also is None else [also])) if any(title in r for r in rows.values())]
    titles = list(dict.fromkeys(titles))
    names = {name: _named(name) for name in rows}
    first = max([len(text) for text in names.values()], default=0)
    widths = [max(len(title), 6) for title in titles]
    lines = [_title(metrics, prefix, where)]
    lines.append(" " * first + "".join(_GAP + title.rjust(width) for title, width in zip(titles, widths, strict=True)))
    for name, row in rows.items():
        cells = [(f"{row[title]:.3f}" if title in row else "") for title in titles]
        body = "".join(_GAP + cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{names[name]:<{first}}{body}".rstrip())
    return lines


def evaluation_rows(
    metrics: Mapping[str, Any], prefix: str, sets: Iterable[str], also: str | None = None
) -> dict[str, dict[str, float]]:
    """Return by set the metrics that are shown; a row that repeats another one, as "id" does the test set, is left out.

    Args:
        metrics: As in :func:`evaluation_lines`.
        prefix: As there.
        sets: Names by which a key is read first: "a_top5_accuracy" is the accuracy of "a_top5" if there is such a set.
        also: As there.
    """
    known, rows = set(sets), dict[str, dict[str, float]]()
    kinds = sorted({*directions(), *([] if also is None else [also])}, key=len, reverse=True)
    for key, value in metrics.items():
        bare = key.removeprefix(f"{prefix}_")
        found = [(bare[: -len(kind) - 1], kind) for kind in kinds if bare == kind or bare.endswith(f"_{kind}")]
        if not found or bare == key or not isinstance(value, int | float):
            continue
        name, kind = next((pair for pair in found if pair[0] in known), found[0])
        rows.setdefault(name, {})[kind] = value
    rows = {name: {kind: row[kind] for kind in row if kind in (*_SHOWN, also)} for name, row in rows.items()}
    kept = {name: row for name, row in rows.items() if row}
    for name in (HOME, SHIFTED):
        if name in kept and kept[name] in [row for other, row in kept.items() if other not in (HOME, SHIFTED)]:
            del kept[name]
    return kept


def end_line(logs: Mapping[str, Any]) -> str:
    """Return how long a training took, in a line."""
    parts = [duration(logs["train_runtime"])]
    for name, words in (("train_steps_per_second", "steps a second"), ("train_samples_per_second", "samples a second")):
        parts += [f"{logs[name]:,.4g} {words}"] if name in logs else []
    if "train_loss" in logs:
        parts.append(f"mean loss {number(logs['train_loss'])}")
    return f"{'trained':<11}{', '.join(parts)}"


def other_line(logs: Mapping[str, Any]) -> str:
    """Return an entry of somebody's own in a line."""
    return ", ".join(
        f"{printable(name)} {number(value) if isinstance(value, float) else printable(value)}"
        for name, value in logs.items()
        if name != "epoch" or len(logs) == 1
    )


def number(value: Any) -> str:
    """A number in four decimals, or in powers of ten where these would not do; what is none as its text."""
    if not isinstance(value, int | float):
        return printable(value)
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 or 1e5 <= abs(value) < float("inf") else f"{value:.4f}"


def duration(seconds: float) -> str:
    """``0:07``, ``12:05``, ``3:04:05`` (hours) or ``2d 03h``."""
    whole = round(seconds)
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}h"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _title(metrics: Mapping[str, Any], prefix: str, where: str) -> str:
    """What was evaluated, when, how long it took and which temperature came out."""
    of = {"eval": "evaluation", "eval_teacher": "evaluation of the teacher"}.get(prefix, f"evaluation '{prefix}'")
    facts = [f"{metrics[f'{prefix}_runtime']:.1f} s"] if f"{prefix}_runtime" in metrics else []
    facts += [f"temperature {metrics[f'{prefix}_temperature']:.3f}"] if f"{prefix}_temperature" in metrics else []
    return f"{printable(of)}{where}{': ' if facts else ''}{', '.join(facts)}"


def _named(name: str) -> str:
    """The name of a row as it is shown; of a long one both ends."""
    text = "mean of shifts" if name == SHIFTED else printable(name) or "the set"
    half = (_LONGEST - 3) // 2
    return text if len(text) <= _LONGEST else f"{text[: half + 1]}...{text[-half:]}"
