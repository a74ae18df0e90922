"""How sure one can be of accuracy and ECE of a set: 95 % intervals."""

from __future__ import annotations

import math

from ..calibration.metrics import Seen
from ..ece.uncertainty import ece_bounds

_Z = 1.959963984540054  # 97.5 % point of the normal distribution


def intervals_of(seen: Seen, n_bootstrap: int) -> dict[str, tuple[float, float]]:
    """Return the intervals of "accuracy" and, by so many draws (see `ece_bounds`), "ece" of a set."""
    return {
        "accuracy": accuracy_interval(int(seen.correct.sum()), len(seen.correct)),
        "ece": ece_bounds(seen.confidences, seen.correct, seen.bins, n_bootstrap),
    }


def accuracy_interval(hits: float, rows: float) -> tuple[float, float]:
    r"""The 95 % interval of a share of hits.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4 n^2}}{1 + z^2 / n}

    Args:
        hits: Of the rows.
        rows: More than 0; of weighted ones the number that says as much.
    Source:
        Wilson 1927; Brown, Cai and DasGupta 2001.
    """
    share, square = hits / rows, _Z**2 / rows
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / rows + square / (4 * rows)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)
