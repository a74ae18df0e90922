"""Run: what `carot_hf evaluate` or a training run has left in its folder, for a comparison with others.

The files may be a stranger's: what does not fit is refused in a sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..basics.escape import printable, shortened
from ..ece.binning import calibration_bins
from .compare import Interval, compare
from .evaluation import Evaluation
from .home import METHODS
from .per_image import PerImage, difference_of, ending_of
from .per_image_file import ENDINGS, PER_IMAGE_NAME, read_per_image

METRICS_NAME = "metrics.json"
LARGEST = 1 << 26  # bytes of metrics.json
_CLOSE = 1e-4  # of what both files say of one set
_MOST_BINS = 10_000


@dataclass(frozen=True)
class SetFigures:
    """What metrics.json says of a set, as the saved checkpoint answers.

    Attributes:
        accuracy: A fraction, as ``ece``; ``None``: it is not there.
        ece: Of ``n_bins`` bins.
        n_bins: Bins.
        mark: Why the set is no evidence; ``None``: it is.
    """

    accuracy: float | None
    ece: float | None
    n_bins: int
    mark: str | None = None


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: In tables.
        figures: By set, in the order of the file.
        rows: What was said of each image, by set; ``None``: there is no such file.
        ending: Of the confidences that the checkpoint answers.
    """

    name: str
    figures: Mapping[str, SetFigures]
    rows: Mapping[str, PerImage] | None = None
    ending: str = ""

    def measured(self, name: str, n_bins: int) -> tuple[float | None, float | None]:
        """Accuracy and ECE of a set with so many bins; ``None``: they are not known."""
        if self.rows is not None and name in self.rows:
            bins = calibration_bins(*self.rows[name].at(self.ending), n_bins)
            return bins.avg_accuracy, bins.ece
        said = self.figures.get(name)
        return (None, None) if said is None else (said.accuracy, said.ece if said.n_bins == n_bins else None)


@dataclass(frozen=True)
class Differences:
    """One run less the first one.

    Attributes:
        run: Name of the one.
        first: Of the other.
        found: By set and metric ("accuracy", "ece") the difference and its 95 % interval.
        why: By set why there is none.
        sizes: Images by set.
    """

    run: str
    first: str
    found: Mapping[str, Mapping[str, Interval]]
    why: Mapping[str, str]
    sizes: Mapping[str, int] = field(default_factory=dict)


def read_runs(places: Sequence[Path]) -> list[Run]:
    """Read runs; each is called by the last part of its path, by more of them where these are the same.

    Args:
        places: Folders with metrics.json, or such files.
    Raises:
        ValueError: If there is none, or a file is not as it is written here.
    """
    return [read_run(place, name) for place, name in zip(places, distinct_names(places), strict=True)]


def distinct_names(places: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart; what is there twice gets a number."""
    paths = [place.absolute() for place in places]
    parts = [(path.parent if path.name == METRICS_NAME else path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [printable("/".join(part[-length:])) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[row] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def read_run(place: Path, name: str) -> Run:
    """Read metrics.json of a folder, or the file itself, and what was said of each image if that lies beside it."""
    path = place / METRICS_NAME if place.is_dir() else place
    if not path.is_file():
        raise ValueError(f"Expected {METRICS_NAME} of `carot_hf evaluate` or a training run, found none at {path}.")
    if path.stat().st_size > LARGEST:
        raise _damaged(path, f"it has more than {LARGEST:,} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is no object")
    figures, ending = _figures(content, path)
    beside = path.with_name(PER_IMAGE_NAME)
    if path.name != METRICS_NAME or not beside.exists():
        return Run(name, figures, None, ending)
    rows, own = read_per_image(beside)
    run = Run(name, figures, rows, own)
    _check_same(run, ending, beside)
    return run


def differences(run: Run, first: Run, *, n_bins: int, n_bootstrap: int, seed: int) -> Differences:
    """Subtract the first run from another one, over the images that both have seen; see :func:`~carot_hf.compare`."""
    names = [*first.figures, *(name for name in run.figures if name not in first.figures)]
    why = {name: reason for name in names if (reason := _why_not(name, run, first)) is not None}
    found: dict[str, Mapping[str, Interval]] = {}
    for name in (name for name in names if name not in why):
        pair = [_evaluation(part, name, n_bins) for part in (run, first)]
        found |= compare(*pair, n_bootstrap=n_bootstrap, seed=seed).differences
    return Differences(run.name, first.name, found, why, {name: len((run.rows or {})[name].labels) for name in found})


def _evaluation(run: Run, name: str, n_bins: int) -> Evaluation:
    rows = (run.rows or {})[name].at(run.ending)
    return Evaluation({}, {name: calibration_bins(*rows, n_bins)}, {}, {}, {name: len(rows[1])}, rows={name: rows})


def _why_not(name: str, run: Run, first: Run) -> str | None:
    """Why a set of two runs cannot be compared image by image."""
    parts = []
    for one in (run, first):
        if name not in one.figures:
            return f"{one.name} has no such set"
        if one.rows is None:
            return f"{one.name} has no {PER_IMAGE_NAME}"
        if name not in one.rows:
            return f"{PER_IMAGE_NAME} of {one.name} has no such set: its calibration was fitted on it"
        parts.append(one.rows[name])
    return difference_of(parts[0].facts, parts[1].facts)


def _figures(content: Mapping[str, Any], path: Path) -> tuple[dict[str, SetFigures], str]:
    """Figures by set, and the ending of what the checkpoint answers: of an evaluation, or of a training run."""
    metrics, bins, marks = content.get("metrics"), content.get("bins"), content.get("marks", {})
    if not isinstance(metrics, dict) or not isinstance(bins, dict) or not isinstance(marks, dict) or not bins:
        raise _damaged(path, "it has no `metrics` and `bins` by set")
    calibration = content.get("calibration")
    if isinstance(calibration, dict):  # a training run: the temperature went into the weights after the evaluation
        method: Any = calibration.get("method", "temperature")
        if method not in [*METHODS]:
            raise _damaged(path, f"`method` of its calibration is {shortened(method)}")
        ending = ending_of(method)
    elif (ending := content.get("answers", "")) not in [*ENDINGS]:
        raise _damaged(path, f"`answers` is {shortened(ending)}")
    return {name: _of_set(metrics, name, table, ending, marks, path) for name, table in bins.items()}, ending


def _of_set(
    metrics: Mapping[str, Any], name: str, table: Any, ending: str, marks: Mapping[str, Any], path: Path
) -> SetFigures:
    own = metrics.get(name)
    if not isinstance(own, dict):  # flat
        prefix = f"eval_{name}_"
        own = {key: metrics.get(f"{prefix}{key}") for key in ("accuracy", f"ece_{ending}", "ece")}
    edges = table.get("edges") if isinstance(table, dict) else None
    if not isinstance(edges, list) or not 2 <= len(edges) <= _MOST_BINS:
        raise _damaged(path, f"`bins` of set '{shortened(name)}' is no table")
    found = []
    for key in ("accuracy", f"ece_{ending}" if ending else "ece"):
        value = own.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and 0 <= value <= 1):
            raise _damaged(path, f"`{key}` of set '{shortened(name)}' is {shortened(value)}")
        found.append(None if value is None else float(value))
    mark = marks.get(name)
    return SetFigures(found[0], found[1], len(edges) - 1, None if mark is None else printable(shortened(mark)))


def _check_same(run: Run, ending: str, beside: Path) -> None:
    """Raise a ValueError if the rows are of another evaluation than metrics.json."""
    for name, part in (run.rows or {}).items():
        said = run.figures.get(name)
        pair = () if said is None else zip(run.measured(name, said.n_bins), (said.accuracy, said.ece), strict=True)
        far = any(b is None or a is None or abs(a - b) > _CLOSE for a, b in pair)
        if said is None or far or run.ending != ending:
            raise ValueError(
                f"Expected {beside} of the same evaluation as {METRICS_NAME} beside it, got other figures of set "
                f"'{name}' ({len(part.labels):,} images). Run that evaluation again."
            )


def _damaged(path: Path, flaw: str) -> ValueError:
    return ValueError(
        f"Expected {METRICS_NAME} of `carot_hf evaluate` or a training run at {path}, but {flaw}. Write it anew."
    )
