"""Sets of classes that hold the right one with a chosen chance, by split conformal prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ece.inputs import as_array, dtype_name, to_numpy
from .rows import check_range
from .selective import in_unit_interval

_BLOCK_VALUES = 1 << 20  # probabilities worked on at a time
_DECIMALS = 12  # of a cumulated probability: equal sums stay equal, whatever was added first
_SUM_TOLERANCE, _BFLOAT16_TOLERANCE = 1e-3, 2.0**-7


class TooFewRowsError(ValueError):
    """There are too few rows for an ``alpha``: every set would be all classes."""


@dataclass(frozen=True)
class ConformalSets:
    """Makes the set of classes of each row; `fit_conformal` returns one.

    Attributes:
        threshold: Classes of a score up to it are in the set; inf: all classes.
        alpha: The chance, on rows exchangeable with those of the fit, at most, that the right class is not in the set.
        score: ``"lac"`` or ``"aps"``.
        n: Rows it was fitted on.
        n_classes: ``K``.
        check_sums: Whether each row of probabilities must sum to 1.
    """

    threshold: float
    alpha: float
    score: str
    n: int
    n_classes: int
    check_sums: bool = True

    def __post_init__(self) -> None:
        checked_alpha(self.alpha)
        check_score(self.score)
        if not self.threshold >= 0.0:
            raise ValueError(f"Expected a `threshold` of at least 0, got {self.threshold}. Use `fit_conformal`.")
        if not self.n_classes >= 2:
            raise ValueError(f"Expected 2 classes or more, got {self.n_classes}. Use `fit_conformal`.")

    def sets(self, probabilities: Tensor | NDArray[Any]) -> NDArray[np.bool_]:
        """Which classes are in the set of each row.

        Args:
            probabilities: ``(N, K)`` of any float dtype, in [0, 1], as in the fit.
        Returns:
            ``(N, K)`` bool. With ``"lac"`` a row may be empty; with ``"aps"`` the class of the largest probability
            (the first among equals) is always in it.
        Raises:
            ValueError: If the shape, the number of classes or a range is another one.
        """
        rows = _matrix(probabilities, self.n_classes)
        found = np.empty(tuple(rows.shape), bool)
        for start, block in _blocks(rows, self.check_sums):
            inside = _SCORES[self.score](block, self.check_sums) <= self.threshold
            if self.score == "aps":
                inside[np.arange(len(block)), block.argmax(axis=1)] = True
            found[start : start + len(block)] = inside
        return found

    def measure(self, probabilities: Tensor | NDArray[Any], labels: Tensor | NDArray[Any]) -> dict[str, float]:
        """``coverage``, the share of rows whose set holds the label, and ``mean_size``, classes in a set.

        Under shift coverage can be far below ``1 - alpha``; that is what this is for.

        Args:
            probabilities: ``(N, K)``, see `sets`.
            labels: ``(N,)`` integer class indices in ``[0, K)``.
        Raises:
            ValueError: If a shape or range above does not hold.
        """
        found = self.sets(probabilities)
        targets = _checked_labels(labels, *found.shape)
        return {
            "coverage": float(found[np.arange(len(found)), targets].mean()),
            "mean_size": float(found.sum(axis=1).mean()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite threshold is None."""
        return asdict(self) | {"threshold": self.threshold if math.isfinite(self.threshold) else None}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ConformalSets:
        """The inverse of `to_dict`."""
        return cls(**{**record, "threshold": math.inf if record["threshold"] is None else record["threshold"]})


def fit_conformal(
    probabilities: Tensor | NDArray[Any],
    labels: Tensor | NDArray[Any],
    *,
    alpha: float = 0.1,
    score: str = "lac",
    check_sums: bool = True,
) -> ConformalSets:
    r"""The threshold with which sets of classes hold the right one with a chance of at least ``1 - alpha``.

    It is the :math:`\lceil (n + 1)(1 - \alpha) \rceil`-th smallest score of the labels. ``"lac"``: :math:`1 - p_y`,
    which gives the smallest sets in the mean. ``"aps"``: the sum of the probabilities of the classes ranked at or
    before ``y``, equal ones in the order of the classes and none at random; its sets grow where the model is less sure.
    The promise is for rows exchangeable with these, and not under shift. Without ties the chance is with ``"lac"`` at
    most :math:`1 - \alpha + 1 / (n + 1)`.

    Args:
        probabilities: ``(n, K)`` of any float dtype, in [0, 1], of rows that no parameter was fitted on; worked on as
            float64. With ``"aps"`` rows that must sum to 1 are divided by their sum, whose rounding is no score.
        labels: ``(n,)`` integer class indices in ``[0, K)``.
        alpha: Chance of a set without the right class, in (0, 1). At least :math:`1 / \alpha - 1` rows are needed.
        score: ``"lac"`` or ``"aps"``.
        check_sums: Refuse rows whose sum is not 1, within 1e-3 (of bfloat16 2^-7); False for a sigmoid of each class.
    Raises:
        ValueError: If a shape or range above does not hold, the score is unknown, or there are too few rows.
    Source:
        Sadinle, Lei and Wasserman 2019 (LAC); Romano, Sesia and Candès 2020 (APS); Angelopoulos and Bates 2021.
    """
    scores = label_scores(probabilities, labels, score=score, check_sums=check_sums)
    return sets_of_scores(scores, alpha, score, int(probabilities.shape[1]), check_sums=check_sums)


def label_scores(
    probabilities: Tensor | NDArray[Any], labels: Tensor | NDArray[Any], *, score: str, check_sums: bool = True
) -> NDArray[np.float64]:
    """Return the score ``(n,)`` of each label; arguments and errors as of `fit_conformal`."""
    check_score(score)
    rows = _matrix(probabilities)
    targets = _checked_labels(labels, *rows.shape)
    scores = np.empty(len(rows))
    for start, block in _blocks(rows, check_sums):
        at = slice(start, start + len(block))
        scores[at] = _SCORES[score](block, check_sums)[np.arange(len(block)), targets[at]]
    return scores


def sets_of_scores(
    scores: NDArray[np.float64], alpha: float, score: str, n_classes: int, *, check_sums: bool = True
) -> ConformalSets:
    """Return what `fit_conformal` does, of the scores of all labels."""
    checked_alpha(alpha)
    check_score(score)
    n = len(scores)
    rank = _ceil((n + 1) * (1.0 - alpha))
    if rank > n:
        raise TooFewRowsError(
            f"Expected at least {_ceil(1.0 / alpha - 1.0)} rows for alpha={alpha}, got {n}. With fewer every set is "
            "all classes: pass more rows, or a larger `alpha`."
        )
    threshold = float(np.partition(scores, rank - 1)[rank - 1])
    return ConformalSets(threshold, float(alpha), score, n, n_classes, check_sums)


def _lac(block: NDArray[np.float64], whole: bool) -> NDArray[np.float64]:
    return 1.0 - block


def _aps(block: NDArray[np.float64], whole: bool) -> NDArray[np.float64]:
    """Sums of the probabilities ranked at or before each class; ``whole``: of rows that sum to 1."""
    order = np.argsort(-block, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(block, order, axis=1), axis=1)
    if whole:
        sums /= sums[:, -1:]
    scores = np.empty_like(sums)
    np.put_along_axis(scores, order, sums.round(_DECIMALS), axis=1)
    return scores


SCORE_NAMES = ("lac", "aps")
_SCORES: dict[str, Callable[[NDArray[np.float64], bool], NDArray[np.float64]]] = {"lac": _lac, "aps": _aps}


def _ceil(number: float) -> int:
    """Round up, but not what is above a whole number by rounding alone: 10 * (1 - 0.1) is 9."""
    return math.ceil(round(number, 9))


def checked_alpha(alpha: float) -> float:
    """Return a share of misses, or raise a ValueError."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"Expected `alpha` between 0 and 1, got {alpha}. Pass the share of misses, e.g. 0.1.")
    return alpha


def check_score(score: str) -> None:
    """Raise a ValueError unless there is such a score."""
    if score not in _SCORES:
        raise ValueError(f"Expected `score` to be one of {tuple(_SCORES)}, got {score!r}. Pass one of these names.")


def _matrix(probabilities: Any, n_classes: int | None = None) -> Any:
    """A tensor or an array of a float dtype and shape (N, K)."""
    rows = as_array(probabilities, "probabilities")
    shape = tuple(rows.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or to_numpy(rows[:1]).dtype.kind != "f":
        raise ValueError(
            f"Expected `probabilities` of a float dtype and shape (N, K) with N >= 1 and K >= 2, got {rows.dtype} of "
            f"shape {shape}. Pass one probability for each class of each row."
        )
    if n_classes not in (None, shape[1]):
        raise ValueError(
            f"Expected `probabilities` of {n_classes} classes, as in the fit, got {shape[1]}. Fit on the same classes."
        )
    return rows


def _checked_labels(labels: Any, n_rows: int, n_classes: int) -> NDArray[np.int64]:
    targets = to_numpy(as_array(labels, "labels"))
    if targets.shape != (n_rows,):
        raise ValueError(
            f"Expected `labels` of shape ({n_rows},), got {targets.shape}. Pass one class index for each row."
        )
    if targets.dtype.kind not in "iu":
        raise ValueError(f"Expected `labels` of an integer dtype, got {targets.dtype}. Pass class indices.")
    whole = targets.astype(np.int64, copy=False)
    check_range(torch.from_numpy(whole), n_classes, "the columns of `probabilities`")
    return whole


def _blocks(rows: Any, check_sums: bool) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """First row and checked probabilities of one block of rows after the other."""
    tolerance = _BFLOAT16_TOLERANCE if dtype_name(rows) == "bfloat16" else _SUM_TOLERANCE
    step = max(1, _BLOCK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        part = to_numpy(rows[start : start + step]).astype(np.float64, copy=False)
        block = in_unit_interval(part, "probabilities", start)
        sums = block.sum(axis=1)
        for row in np.flatnonzero(check_sums & (np.abs(sums - 1.0) > tolerance))[:1]:
            raise ValueError(
                f"Expected the `probabilities` of a row to sum to 1 (within {tolerance:g}), got {sums[row]:.6g} in row "
                f"{start + row}. Apply a softmax to logits, or pass check_sums=False for a sigmoid of each class."
            )
        yield start, block
