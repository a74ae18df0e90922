"""Confidence bins and the calibration errors that are read off them.

numpy only, and nothing else of this package: the file also runs alone in a Space on the Hub.
This is the one place where confidences are put into bins; metrics, plots and temperatures all call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

STRATEGIES = ("uniform", "quantile")
_CHUNK = 1 << 16  # rows summed at a time, for little memory, little rounding and the cache of one core
_FEW_EDGES = 32  # up to so many a comparison with each is faster than a search; twice as many fit into uint8
_CELL_FLOOR = 2.0**-24
_CELL_SHIFT = 14  # of a float32's 23 bits of mantissa, 9 count: 512 cells between powers of two
_FIRST_CELL = int(np.float32(_CELL_FLOOR).view(np.int32)) >> _CELL_SHIFT
_CELLS = (int(np.float32(0.5).view(np.int32)) >> _CELL_SHIFT) - _FIRST_CELL + 1  # from 2^-24 to 0.5


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """The table behind every calibration error: one row a bin, ``M`` bins.

    Attributes:
        edges: ``(M + 1,)``, from 0 to 1, in the dtype of the confidences. Bin ``b`` is ``(edges[b], edges[b + 1]]``;
            a confidence of 0 is in the first one.
        count: ``(M,)`` int64, rows in the bin.
        confidence: ``(M,)`` float64, mean confidence in the bin; nan where ``count`` is 0.
        accuracy: ``(M,)`` float64, share of right rows in the bin; nan where ``count`` is 0.
        weight: ``(M,)`` float64, sum of the weights of the rows in the bin, by which means are taken; None: each row
            weighs 1.
        effective: ``(M,)`` float64, :math:`(\\sum w)^2 / \\sum w^2` of the bin: so many rows of one weight say as much
            (Kish); None: ``count``.
        span: Smallest and largest confidence, of bins of equal mass; None: the edges say where rows may be.
    """

    edges: NDArray[Any]
    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    weight: NDArray[np.float64] | None = None
    effective: NDArray[np.float64] | None = None
    span: tuple[float, float] | None = None

    @property
    def mass(self) -> NDArray[Any]:
        """``(M,)`` weight of each bin: the rows in it unless they have weights."""
        return self.count if self.weight is None else self.weight

    @property
    def rows(self) -> NDArray[Any]:
        """``(M,)`` how many independent rows each bin is worth."""
        return self.count if self.effective is None else self.effective

    @property
    def gap(self) -> NDArray[np.float64]:
        """``(M,)`` confidence - accuracy: positive where over-confident, nan where empty."""
        return self.confidence - self.accuracy

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.count.sum())

    @property
    def n_bins(self) -> int:
        """Number of bins ``M``; with ties the quantile strategy makes fewer than were asked for."""
        return len(self.count)

    @property
    def avg_accuracy(self) -> float:
        """Share of right rows over all bins."""
        filled = self.count > 0
        if self.weight is not None:
            return float(self.weight[filled] @ self.accuracy[filled] / self.weight.sum())
        return float(np.rint(self.count[filled] * self.accuracy[filled]).sum() / self.n)

    @property
    def avg_confidence(self) -> float:
        """Mean confidence over all rows."""
        filled = self.count > 0
        return float(self.mass[filled] @ self.confidence[filled] / self.mass.sum())

    @property
    def overconfidence(self) -> float:
        """Mean confidence - accuracy over all rows, signed; its size never exceeds ``ece``."""
        return self.avg_confidence - self.avg_accuracy

    @property
    def ece(self) -> float:
        r"""Expected calibration error, :math:`\sum_b \frac{n_b}{n} |acc_b - conf_b|`, in [0, 1]."""
        filled = self.count > 0
        return float(self.mass[filled] @ np.abs(self.gap[filled]) / self.mass.sum())

    @property
    def rmsce(self) -> float:
        r"""Root mean square calibration error, :math:`\sqrt{\sum_b \frac{n_b}{n} (acc_b - conf_b)^2}`."""
        filled = self.count > 0
        return float(np.sqrt(self.mass[filled] @ self.gap[filled] ** 2 / self.mass.sum()))

    @property
    def mce(self) -> float:
        r"""Maximum calibration error, :math:`\max_b |acc_b - conf_b|` over the bins that hold a row."""
        return float(np.abs(self.gap[self.count > 0]).max())

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists under ``edges``, ``count``, ``confidence``, ``accuracy``, ``gap``; nan where a bin is empty.

        With weights also ``weight`` and ``effective``, of bins of equal mass ``span``.
        """
        table = {name: getattr(self, name).tolist() for name in ("edges", "count", "confidence", "accuracy", "gap")}
        if self.weight is not None and self.effective is not None:
            table |= {"weight": self.weight.tolist(), "effective": self.effective.tolist()}
        return table if self.span is None else {**table, "span": list(self.span)}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> CalibrationBins:
        """The inverse of `to_dict`; ``None`` is read as nan and other keys are ignored."""
        return cls(
            edges=np.asarray(table["edges"], dtype=np.float64),
            count=np.asarray(table["count"], dtype=np.int64),
            confidence=np.asarray(table["confidence"], dtype=np.float64),
            accuracy=np.asarray(table["accuracy"], dtype=np.float64),
            weight=np.asarray(table["weight"], dtype=np.float64) if "weight" in table else None,
            effective=np.asarray(table["effective"], dtype=np.float64) if "effective" in table else None,
            span=(float(table["span"][0]), float(table["span"][1])) if "span" in table else None,
        )


def uniform_edges(n_bins: int, dtype: Any = np.float64) -> NDArray[Any]:
    """The ``n_bins + 1`` edges ``i / n_bins``, divided in float64 and then cast to ``dtype``.

    The cast makes a float32 0.3 equal to the edge 3/10, so that it stays in the bin that ends there.
    """
    return (np.arange(n_bins + 1) / n_bins).astype(dtype)


def calibration_bins(
    confidences: ArrayLike,
    correct: ArrayLike,
    n_bins: int = 10,
    strategy: str = "uniform",
    *,
    sample_weight: ArrayLike | None = None,
) -> CalibrationBins:
    """Put confidences into bins ``(lo, hi]`` and average confidence and hits in each.

    Args:
        confidences: ``(N,)`` floats in [0, 1]; rounding outside it is clipped (1e-6, or 2 eps of a coarser dtype).
        correct: ``(N,)`` booleans or 0/1, whether the prediction of that row was right.
        n_bins: How many bins to make.
        strategy: ``"uniform"``: equal widths. ``"quantile"``: equal counts as far as ties allow. Equal confidences
            always share a bin, so there may be fewer bins, and each of them holds a row.
        sample_weight: ``(N,)`` weights, >= 0, with a sum above 0; a row of weight 2 counts as two, one of weight 0 is
            left out.

    Returns:
        The bin table. Means are sums in float64, counts are integers; the centre of a bin is never used.

    Raises:
        ValueError: If there are no rows, the lengths differ, a value is out of range, or an option is unknown.

    Source:
        Guo et al. 2017, section 2 (ECE, MCE); Nguyen and O'Connor 2015 for the equal-mass bins.
    """
    check_n_bins(n_bins)
    if strategy not in STRATEGIES:
        raise ValueError(f"Expected `strategy` to be one of {STRATEGIES}, got {strategy!r}. Pass one of these names.")
    values, hits = _checked_rows(confidences, correct)
    weights = checked_weights(sample_weight, len(values))
    if weights is not None and not weights.all():
        values, hits, weights = values[weights > 0], hits[weights > 0], weights[weights > 0]
    uniform = strategy == "uniform"
    edges = uniform_edges(n_bins, values.dtype) if uniform else _quantile_edges(values, n_bins, weights)
    sums = np.zeros((5, len(edges) - 1))
    for start in range(0, len(values), _CHUNK):
        at = slice(start, start + _CHUNK)
        part = None if weights is None else weights[at]
        sums += _sums(bin_index(values[at], edges[1:-1]), values[at], hits[at], len(edges) - 1, part)
    span = None if uniform else (float(values.min()), float(values.max()))
    return _table(edges, sums, weighted=weights is not None, span=span)


class BinSums:
    """Bins of rows that come in parts and are not kept: the memory does not depend on their number.

    The uniform bins are those of `calibration_bins`, sums in float64. Bins of equal mass are put together from some
    24,000 fixed cells of confidence: their edges are 0.2 % of ``min(c, 1 - c)`` coarser than those of the rows.

    Args:
        n_bins: How many bins to make.
        dtype: Of the confidences.
    """

    def __init__(self, n_bins: int, dtype: Any) -> None:
        check_n_bins(n_bins)
        self._edges = uniform_edges(n_bins, dtype)
        self._uniform, self._cells = np.zeros((5, n_bins)), np.zeros((5, 2 * _CELLS))
        self._weighted = False

    def add(self, confidences: ArrayLike, correct: ArrayLike, sample_weight: ArrayLike | None = None) -> None:
        """Add rows, checked as in `calibration_bins`."""
        all_values, all_hits = _checked_rows(confidences, correct)
        all_weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        self._weighted |= all_weights is not None
        for start in range(0, len(all_values), _CHUNK):
            at = slice(start, start + _CHUNK)
            values, hits, weights = all_values[at], all_hits[at], None if all_weights is None else all_weights[at]
            index = bin_index(values, self._edges[1:-1])
            self._uniform += _sums(index, values, hits, self._uniform.shape[1], weights)
            self._cells += _sums(_cell(values), values, hits, self._cells.shape[1], weights)

    @property
    def n(self) -> int:
        """Rows added."""
        return int(self._uniform[0].sum())

    def bins(self) -> CalibrationBins:
        """The table of uniform bins."""
        return _table(self._edges, self._uniform, weighted=self._weighted)

    def adaptive_ece(self) -> float:
        """ECE on bins of equal mass, as far as the cells allow."""
        cells = self._cells[:, self._cells[0] > 0]
        n_bins = self._uniform.shape[1]
        reached = np.cumsum(cells[1])
        ranks = np.arange(1, n_bins) * reached[-1] / n_bins
        last = np.unique(np.searchsorted(reached, ranks, side="left"))  # last cell of each bin but the last
        starts = np.concatenate([[0], last[last < cells.shape[1] - 1] + 1])
        _, mass, total, hit_count, _ = np.add.reduceat(cells, starts, axis=1)
        return float(np.abs(total - hit_count).sum() / mass.sum())


def classwise_sums(
    probabilities: NDArray[Any], labels: NDArray[Any], n_bins: int = 10, weights: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    r"""Sums of ``1[label = k] - p_k`` for each class and each uniform bin of ``p_k``; add them up over chunks of rows.

    Class-wise ECE is the mean over the classes of the ECE of ``p_k`` as a forecast of class ``k``,
    :math:`\frac{1}{K} \sum_k \sum_b \frac{n_{bk}}{n} |acc_{bk} - conf_{bk}|`, so
    ``abs(sums).sum() / (n * K)`` with the sums over all ``n`` rows, and the sum of the weights for ``n`` if they have
    some.

    Args:
        probabilities: ``(N, K)`` floats in [0, 1]; not checked here.
        labels: ``(N,)`` integers in ``[0, K)``; not checked here.
        n_bins: Number of uniform bins ``M``.
        weights: ``(N,)`` floats >= 0; None: 1 each.

    Returns:
        ``(K, M)`` float64.

    Source:
        Kull et al. 2019 (class-wise ECE); Nixon et al. 2019 (static calibration error).
    """
    n_classes = probabilities.shape[1]
    inner = uniform_edges(n_bins, probabilities.dtype)[1:-1]
    sums = np.zeros((n_classes, n_bins))
    own = np.searchsorted(inner, probabilities[np.arange(len(labels)), labels], side="left")
    np.add.at(sums, (labels, own), 1.0 if weights is None else weights)
    # A row has fewer than n_bins values above 1 / n_bins: find these few, and take the rest from the column sums.
    sums[:, 0] -= probabilities.sum(axis=0, dtype=np.float64) if weights is None else weights @ probabilities
    if n_bins > 1:
        row, column = np.divmod(np.flatnonzero(probabilities > inner[0]), n_classes)
        large = probabilities[row, column]
        cell = column * n_bins + np.searchsorted(inner, large, side="left")
        mass = large.astype(np.float64) if weights is None else weights[row] * large
        moved = np.bincount(cell, weights=mass, minlength=sums.size).reshape(sums.shape)
        sums[:, 0] += moved.sum(axis=1)
        sums -= moved
    return sums


def check_n_bins(n_bins: int) -> None:
    """Raise unless ``n_bins`` is an integer of at least 1."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, (int, np.integer)) or n_bins < 1:
        raise ValueError(f"Expected `n_bins` to be an integer of at least 1, got {n_bins!r}. Pass e.g. `n_bins=10`.")


class NothingCountsError(ValueError):
    """No row counts: all of them have the label to ignore, or no weight."""


def rows_that_count(
    labels: NDArray[Any], weights: NDArray[np.float64] | None, ignore_index: int | None
) -> NDArray[np.int64] | None:
    """Numbers of the rows with another label than the one to ignore and a weight above 0; None if these are all.

    Raises:
        NothingCountsError: If there is none.
    """
    counts = np.ones(len(labels), bool) if weights is None else weights > 0
    if ignore_index is not None:
        counts &= labels != ignore_index
    if counts.all():
        return None
    if not counts.any():
        raise NothingCountsError(
            f"Expected a row with a label other than `ignore_index` {ignore_index} and a `sample_weight` above 0, got "
            "none. There is nothing to measure."
        )
    return np.flatnonzero(counts)


def checked_weights(sample_weight: Any, size: int, name: str = "sample_weight") -> NDArray[np.float64] | None:
    """Weights as float64; None if they are all 1.

    Raises:
        ValueError: If there is not one for each row, one is negative or not finite, or all are 0.
    """
    if sample_weight is None:
        return None
    if hasattr(sample_weight, "detach"):
        sample_weight = sample_weight.detach().cpu()
    try:
        weights = np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected numbers as `{name}`, got {error}. Pass one weight for each row.") from error
    if weights.shape != (size,):
        raise ValueError(f"Expected `{name}` of shape ({size},), got {weights.shape}. Pass one weight for each row.")
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"Expected finite `{name}` of at least 0, got {weights[row]} in row {row}. Correct it.")
    if size and not weights.any():
        raise NothingCountsError(f"Expected a `{name}` above 0, got 0 for all rows. There is nothing to measure.")
    return None if (weights == 1.0).all() else weights


def _sums(
    index: NDArray[Any], values: NDArray[Any], hits: NDArray[np.bool_], size: int, weights: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """``(5, size)`` of each bin, float64, in which counts are exact.

    Rows, their weight, the sum of the confidences, the hits, and the squares of the weights.
    """
    wrong, right = np.bincount(2 * index + hits, minlength=2 * size).reshape(size, 2).T
    rows = wrong + right
    if weights is None:
        return np.stack([rows, rows, np.bincount(index, weights=values, minlength=size), right, rows])
    columns = (weights, weights * values, weights * hits, weights * weights)
    return np.stack([rows, *(np.bincount(index, weights=column, minlength=size) for column in columns)])


def bin_index(values: NDArray[Any], inner: NDArray[Any]) -> NDArray[Any]:
    """``(N,)`` number of inner edges below each value: the index of its bin ``(lo, hi]``; uint8 if there are few."""
    if len(inner) > _FEW_EDGES or values.dtype.itemsize < 4:  # float16 is slow to compare
        return np.searchsorted(inner, values, side="left")
    index = np.zeros(len(values), np.uint8)
    for edge in inner:
        index += (values > edge).view(np.uint8)
    return index


def _table(
    edges: NDArray[Any], sums: NDArray[np.float64], *, weighted: bool = False, span: tuple[float, float] | None = None
) -> CalibrationBins:
    rows, mass, confidence, hits, squares = sums
    some = np.where(rows > 0, mass, np.nan)  # nan, not 0, is the mean of nothing
    return CalibrationBins(
        edges=edges,
        count=rows.astype(np.int64),
        confidence=confidence / some,
        accuracy=hits / some,
        weight=mass if weighted else None,
        effective=np.divide(mass * mass, squares, out=np.zeros_like(mass), where=squares > 0) if weighted else None,
        span=span,
    )


def _cell(values: NDArray[Any]) -> NDArray[np.int64]:
    """Number of the cell of each confidence, rising with it: 512 an octave, down to 2^-24 from 0 and from 1."""
    high = values > 0.5
    distance = np.maximum(np.where(high, 1 - values, values), _CELL_FLOOR).astype(np.float32)
    cell = (distance.view(np.int32) >> _CELL_SHIFT).astype(np.int64) - _FIRST_CELL
    return np.where(high, 2 * _CELLS - 1 - cell, cell)


def _quantile_edges(values: NDArray[Any], n_bins: int, weights: NDArray[Any] | None = None) -> NDArray[Any]:
    """Inner edges are confidences of the rows at ranks ``ceil(i N / n_bins)``, each once, below the largest.

    With weights a row has as many ranks as it weighs.
    """
    if weights is None:
        ordered = np.sort(values)
        places = -(-np.arange(1, n_bins) * len(values) // n_bins) - 1
    else:
        order = np.argsort(values, kind="stable")
        ordered, reached = values[order], np.cumsum(weights[order])
        places = np.searchsorted(reached, np.arange(1, n_bins) * reached[-1] / n_bins, side="left")
    inner = np.unique(ordered[places])
    inner = inner[inner < ordered[-1]]
    return np.concatenate([np.zeros(1, values.dtype), inner, np.ones(1, values.dtype)])


def _checked_rows(confidences: ArrayLike, correct: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Confidences as floats clipped to [0, 1], and hits as booleans; copies only where something changes."""
    values, hits = np.asarray(confidences), np.asarray(correct)
    if values.ndim != 1 or values.shape != hits.shape:
        raise ValueError(
            f"Expected `confidences` and `correct` of one shape (N,), got {values.shape} and {hits.shape}. "
            "Pass one confidence and one 0/1 hit for each row."
        )
    if len(values) == 0:
        raise ValueError("Expected at least one row, got 0. Pass the confidences of a non-empty set.")
    if values.dtype.kind in "biu":
        values = values.astype(np.float64)
    if values.dtype.kind != "f":
        raise ValueError(f"Expected `confidences` of a float dtype, got {values.dtype}. Pass numbers in [0, 1].")
    tolerance = max(1e-6, 2 * float(np.finfo(values.dtype).eps))
    low, high = float(values.min()), float(values.max())
    if not (low >= -tolerance and high <= 1 + tolerance):  # also when a value is nan
        row = int(np.argmin((values >= -tolerance) & (values <= 1 + tolerance)))
        raise ValueError(
            f"Expected `confidences` in [0, 1], got {values[row]} in row {row}. "
            "Pass softmax probabilities; logits have to go through a softmax first."
        )
    if hits.dtype != bool and not (binary := np.isin(hits, (0, 1))).all():
        row = int(np.argmin(binary))
        raise ValueError(
            f"Expected `correct` to hold booleans or 0/1, got {hits[row]!r} in row {row}. Pass `predictions == labels`."
        )
    if low < 0 or high > 1:
        values = np.clip(values, 0, 1)
    return values, hits.astype(bool, copy=False)
