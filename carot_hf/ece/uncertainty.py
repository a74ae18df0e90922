"""How far to trust a measured ECE: its bias, its spread, and what noise alone would give. numpy only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binning import CalibrationBins


def debiased_ece(bins: CalibrationBins) -> float:
    r"""ECE less its bias, the accuracy of each bin being taken as normal around the measured one.

    .. math:: 2 \, ECE - \sum_b \tfrac{n_b}{n} E|N(conf_b - acc_b, \, acc_b (1 - acc_b) / n_b)|

    The expectation is the mean of a folded normal, so nothing is drawn at random. A bin whose rows are all right
    or all wrong counts as free of noise. The result may fall below 0; clipping would make it biased again. For a
    perfectly calibrated model about 40 % of the bias goes: compare with ``ece_floor`` of `bootstrap_ece`.

    Source:
        Kumar, Liang and Ma 2019, "Verified Uncertainty Calibration"; its code for the L1 error resamples this.
    """
    bias = 0.0
    for count, gap, accuracy in zip(bins.count, bins.gap, bins.accuracy, strict=True):
        deviation = math.sqrt(accuracy * (1.0 - accuracy) / count) if count else 0.0
        if deviation > 0.0:
            z = gap / deviation
            folded = deviation * math.sqrt(2 / math.pi) * math.exp(-z * z / 2) + gap * math.erf(z / math.sqrt(2))
            bias += count / bins.n * (folded - abs(gap))
    return bins.ece - float(bias)


def bootstrap_ece(
    confidences: NDArray[Any],
    correct: NDArray[np.bool_],
    bins: CalibrationBins,
    *,
    n_bootstrap: int,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Percentile interval of the ECE, and the ECE that perfectly calibrated hits would have. The bins stay fixed.

    Args:
        confidences: ``(N,)`` floats in [0, 1], in any order.
        correct: ``(N,)`` bool.
        bins: The table made from both.
        n_bootstrap: Draws of each kind; > 0.
        confidence_level: Share of the draws inside the interval.
        seed: Seed of the draws; the order of the rows does not matter.

    Returns:
        ``ece_low``, ``ece_high``: quantiles of the ECE over resampled rows. As an ECE is never negative, they stay
        above 0 even for a perfect model: read them beside ``ece_floor``, the mean ECE over hits drawn with the
        given confidences as their chances, and ``p_value``, the share of these draws with at least the measured
        ECE (one is added to both counts).

    Source:
        Vaicenavicius et al. 2019, "Evaluating model calibration in classification" (the draws from the confidences).
    """
    generator = np.random.default_rng(seed)
    n = len(confidences)
    order = np.lexsort((correct, confidences))
    chances, hits = confidences[order].astype(np.float64), correct[order]
    filled = bins.count > 0
    starts = np.concatenate([[0], np.cumsum(bins.count)[:-1]])[filled]  # sorted rows: each bin is one slice
    excess = chances - hits
    expected = np.add.reduceat(chances, starts)
    resampled, simulated = np.empty(n_bootstrap), np.empty(n_bootstrap)
    for i in range(n_bootstrap):
        times = np.bincount(generator.integers(0, n, n), minlength=n)
        resampled[i] = np.abs(np.add.reduceat(times * excess, starts)).sum() / n
        lucky = np.add.reduceat(generator.random(n) < chances, starts, dtype=np.int64)
        simulated[i] = np.abs(expected - lucky).sum() / n
    low, high = np.quantile(resampled, [(1 - confidence_level) / 2, (1 + confidence_level) / 2])
    reached = int((simulated >= bins.ece - 1e-12).sum())  # equal sums may differ by rounding
    return {
        "ece_low": float(low),
        "ece_high": float(high),
        "ece_floor": float(simulated.mean()),
        "p_value": (1 + reached) / (1 + n_bootstrap),
    }
