"""Two models on the same images: differences with intervals, by a bootstrap of the images that both have seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..basics.escape import markdown, table
from ..ece.binning import bin_index, uniform_edges
from .evaluation import Evaluation, Rows

_LEVEL = 0.95
Interval = tuple[float, float, float]  # difference, lowest, highest
_Sums = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], int]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        differences: By set and metric ("accuracy", "ece") the first model's less the second's, and the lowest and the
            highest value of its 95 % interval.
    """

    differences: Mapping[str, Mapping[str, Interval]]

    def table(self) -> str:
        """Return a Markdown table with a row for each set."""
        rows = [["", "accuracy", "95 %", "ECE", "95 %"]]
        for name, found in self.differences.items():
            cells = [cell for metric in ("accuracy", "ece") for cell in _cells(found[metric])]
            rows.append([markdown(name), *cells])
        return table(rows)


def compare(
    evaluation_a: Evaluation, evaluation_b: Evaluation, *, n_bootstrap: int = 2000, seed: int = 0
) -> Comparison:
    """Compare two evaluations of the same sets, image by image.

    Images are drawn with replacement, the same for both models, so that what is hard for both does not widen the
    interval. The interval of the difference is basic (twice the estimate less the quantiles), which takes off the bias
    that a resampled ECE has. It is one of the difference of measured values; those of models whose true ECE is near 0
    are all a little too large.

    Args:
        evaluation_a: Of :meth:`carot_hf.Evaluator.evaluate`.
        evaluation_b: Of the same sets by another model.
        n_bootstrap: Draws, >= 1.
        seed: Of the draws.
    Raises:
        ValueError: If they have no set in common, or a set has another number of rows in each.
    Source:
        Efron and Tibshirani 1993, chapter 13; Davison and Hinkley 1997, 2.4 (basic intervals).
    """
    names = [name for name in evaluation_a.rows if name in evaluation_b.rows]
    if not names:
        raise ValueError(
            f"Expected evaluations with a set in common, got {sorted(evaluation_a.rows)} and "
            f"{sorted(evaluation_b.rows)}. Evaluate both models on one suite."
        )
    if isinstance(n_bootstrap, bool) or n_bootstrap < 1:
        raise ValueError(f"Expected `n_bootstrap` of at least 1, got {n_bootstrap}. Pass e.g. 2000.")
    found = {}
    for name in names:
        a, b = evaluation_a.rows[name], evaluation_b.rows[name]
        if len(a[0]) != len(b[0]):
            raise ValueError(
                f"Expected the same images in set '{name}' of both evaluations, got {len(a[0])} and {len(b[0])}. "
                "Evaluate both models on one suite."
            )
        bins = tuple(evaluation.bins[name].n_bins for evaluation in (evaluation_a, evaluation_b))
        found[name] = _differences(a, b, bins, n_bootstrap, np.random.default_rng(seed))
    return Comparison(found)


def _differences(
    a: Rows, b: Rows, bins: tuple[int, ...], n_bootstrap: int, generator: np.random.Generator
) -> dict[str, Interval]:
    """Differences on one set."""
    size, parts = len(a[0]), (_sums(a, bins[0]), _sums(b, bins[1]))

    def difference(counts: NDArray[np.int64]) -> tuple[float, float]:
        ours, theirs = (_measured(part, counts) for part in parts)
        return ours[0] - theirs[0], ours[1] - theirs[1]

    drawn = np.empty((2, n_bootstrap))
    for draw in range(n_bootstrap):
        drawn[:, draw] = difference(np.bincount(generator.integers(0, size, size), minlength=size))
    found = {}
    for metric, value, row in zip(("accuracy", "ece"), difference(np.ones(size, np.int64)), drawn, strict=True):
        low, high = np.quantile(row, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)).tolist()
        found[metric] = (value, min(2 * value - high, value), max(2 * value - low, value))
    return found


def _sums(rows: Rows, n_bins: int) -> _Sums:
    """Bin of each row, its gap and its hit."""
    confidences, hits = rows
    index = bin_index(confidences, uniform_edges(n_bins, confidences.dtype)[1:-1]).astype(np.int64)
    return index, confidences.astype(np.float64) - hits, hits, n_bins


def _measured(part: _Sums, counts: NDArray[np.int64]) -> tuple[float, float]:
    """Accuracy and ECE of rows that count so often."""
    index, gaps, hits, n_bins = part
    total = counts.sum()
    return float(counts @ hits / total), float(np.abs(np.bincount(index, counts * gaps, n_bins)).sum() / total)


def _cells(interval: Interval) -> list[str]:
    difference, low, high = interval
    return [f"{difference:+.3f}", f"{low:+.3f} to {high:+.3f}"]
