"""How far to trust a measured ECE: its bias, an interval of the true one, and what noise alone gives. numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binning import CalibrationBins

_FARTHEST = 12.0  # standard deviations by which the gaps of a hypothesis go beyond the measured ones
_HALVINGS = 50


def debiased_ece(bins: CalibrationBins) -> float:
    r"""ECE less its bias, the accuracy of each bin being taken as normal around the measured one.

    .. math:: 2 \, ECE - \sum_b \tfrac{n_b}{n} E|N(conf_b - acc_b, \, acc_b (1 - acc_b) / n_b)|

    The expectation is the mean of a folded normal, so nothing is drawn at random. A bin whose rows are all right
    or all wrong counts as free of noise. The result may fall below 0; clipping would make it biased again. For a
    perfectly calibrated model about 40 % of the bias goes: compare with ``ece_floor`` of `ece_interval`. With weights
    :math:`n_b / n` is the share of the weight, and the noise that of ``bins.effective`` rows.

    Source:
        Kumar, Liang and Ma 2019, "Verified Uncertainty Calibration"; its code for the L1 error resamples this.
    """
    bias = 0.0
    shares = bins.mass / bins.mass.sum()
    for share, rows, gap, accuracy in zip(shares, bins.rows, bins.gap, bins.accuracy, strict=True):
        deviation = math.sqrt(max(0.0, accuracy * (1.0 - accuracy)) / rows) if rows else 0.0
        if deviation > 0.0:
            z = gap / deviation
            folded = deviation * math.sqrt(2 / math.pi) * math.exp(-z * z / 2) + gap * math.erf(z / math.sqrt(2))
            bias += share * (folded - abs(gap))
    return bins.ece - float(bias)


def ece_interval(
    confidences: NDArray[Any],
    correct: NDArray[np.bool_],
    bins: CalibrationBins,
    *,
    n_bootstrap: int,
    confidence_level: float = 0.95,
    seed: int = 0,
    sample_weight: NDArray[np.float64] | None = None,
) -> dict[str, float]:
    r"""An interval of the true ECE on these bins, and the ECE that perfectly calibrated hits would have.

    The measured ECE is too large in the mean, by what noise adds to each gap, so that quantiles of resampled values
    miss the true one. Here a test is inverted: a true ECE is in the interval if a model that has it would measure
    neither a larger nor a smaller ECE than was measured with less than half the remaining chance each. Its gaps are
    the measured ones brought nearer to 0, or further away, by a multiple of their standard deviation :math:`s_b`,

    .. math:: \gamma_b(t) = \operatorname{sign}(g_b) \max(|g_b| - t s_b, 0), \quad
              g_b = \tfrac1n \sum_{i \in b} (c_i - h_i), \quad
              s_b^2 = \max\Big(\tfrac1{n^2} \sum_{i \in b} c_i (1 - c_i),
                               \tfrac1{n^2} \sum_{i \in b} (c_i - h_i)^2 - \tfrac{g_b^2}n\Big),

    and it measures :math:`\sum_b |\gamma_b(t) + s_b Z_b|` with normal :math:`Z_b`, drawn once. Half a row is allowed
    for: hits are whole. The measured ECE is always inside; ``benchmarks/interval_coverage.py`` measures how often the
    true one is.

    Args:
        confidences: ``(N,)`` floats in [0, 1], in any order.
        correct: ``(N,)`` bool.
        bins: The table made from both.
        n_bootstrap: Draws of each kind, > 0.
        confidence_level: Of the interval, in (0, 1).
        seed: Of the draws; the order of the rows does not matter.
        sample_weight: ``(N,)`` weights > 0 that the table was made with. They are taken as fixed: rows are independent,
            and one of weight 2 is one row, not two.

    Returns:
        ``ece_low``, ``ece_high``: the interval, cut at 0 and 1. ``ece_floor``: the mean ECE of hits drawn with the
        confidences as chances. ``p_value``: the share of these with at least the measured ECE (1 added to both counts).

    Source:
        Vaicenavicius et al. 2019, "Evaluating model calibration in classification" (the draws from the confidences);
        Neyman 1937 (an interval by inverting a test).
    """
    chances, hits, weights, starts = _in_bins(confidences, correct, bins, sample_weight)
    generator = np.random.default_rng(seed)
    low, high = _bounds(chances, hits, weights, starts, bins.ece, confidence_level, n_bootstrap, generator)
    simulated = _calibrated(chances, None if sample_weight is None else weights, starts, n_bootstrap, generator)
    reached = int((simulated >= bins.ece - 1e-12).sum())  # equal sums may differ by rounding
    return {
        "ece_low": low,
        "ece_high": high,
        "ece_floor": float(simulated.mean()),
        "p_value": (1 + reached) / (1 + n_bootstrap),
    }


def ece_bounds(
    confidences: NDArray[Any], correct: NDArray[np.bool_], bins: CalibrationBins, n_draws: int
) -> tuple[float, float]:
    """Return ``ece_low`` and ``ece_high`` of `ece_interval` alone, at 95 % and seed 0, which take no draw a row."""
    parts = _in_bins(confidences, correct, bins, None)
    return _bounds(*parts, bins.ece, 0.95, n_draws, np.random.default_rng(0))


def _in_bins(
    confidences: NDArray[Any],
    correct: NDArray[np.bool_],
    bins: CalibrationBins,
    sample_weight: NDArray[np.float64] | None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64], NDArray[np.int64]]:
    """Rows in the order of their confidence, and where each bin that holds any begins."""
    weights = np.ones(len(confidences)) if sample_weight is None else sample_weight
    order = np.lexsort((weights, correct, confidences))
    starts = np.concatenate([[0], np.cumsum(bins.count)[:-1]])[bins.count > 0]  # sorted rows: each bin is one slice
    return confidences[order].astype(np.float64), correct[order], weights[order], starts


def _bounds(
    chances: NDArray[np.float64],
    hits: NDArray[np.bool_],
    weights: NDArray[np.float64],
    starts: NDArray[np.int64],
    measured: float,
    level: float,
    n_draws: int,
    generator: np.random.Generator,
) -> tuple[float, float]:
    """The interval, cut at 0 and 1, with the measured value inside."""
    gaps, noise = _gaps(chances, hits, weights, starts)
    normal, half_row = generator.standard_normal((n_draws, len(gaps))), 0.5 * float(weights.max() / weights.sum())
    low, high = _inverted(gaps, noise, half_row, normal, level)
    return max(0.0, min(low, measured)), min(1.0, max(high, measured))


def _calibrated(
    chances: NDArray[np.float64],
    weights: NDArray[np.float64] | None,
    starts: NDArray[np.int64],
    n_draws: int,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """ECE of hits drawn with the confidences as their chances; weights None: 1 each."""
    even = weights is None
    weights = np.ones(len(chances)) if weights is None else weights
    expected, total = np.add.reduceat(weights * chances, starts), float(weights.sum())
    simulated = np.empty(n_draws)
    for i in range(n_draws):
        right = generator.random(len(chances)) < chances
        lucky = np.add.reduceat(right, starts, dtype=np.int64) if even else np.add.reduceat(weights * right, starts)
        simulated[i] = np.abs(expected - lucky).sum() / total
    return simulated


def _gaps(
    chances: NDArray[np.float64], hits: NDArray[np.bool_], weights: NDArray[np.float64], starts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gap of each bin by its share of the weight, and the standard deviation of it."""
    total, excess = float(weights.sum()), weights * (chances - hits)
    gaps = np.add.reduceat(excess, starts) / total
    squares = np.add.reduceat(excess * excess, starts) / total**2 - gaps**2 * float(weights @ weights) / total**2
    binomial = np.add.reduceat(weights**2 * chances * (1 - chances), starts) / total**2
    return gaps, np.sqrt(np.maximum(binomial, squares))


def _inverted(
    gaps: NDArray[np.float64], noise: NDArray[np.float64], half_row: float, normal: NDArray[np.float64], level: float
) -> tuple[float, float]:
    """Smallest and largest ECE that would neither measure a larger nor a smaller one than the gaps' too seldom."""
    measured, rare = float(np.abs(gaps).sum()), (1.0 - level) / 2
    signs = np.where(gaps < 0, -1.0, 1.0)
    noisy = noise > 0
    farthest = float((np.abs(gaps[noisy]) / noise[noisy]).max(initial=0.0))  # there all gaps that noise explains are 0

    def true_gaps(t: float) -> NDArray[np.float64]:
        return signs * np.maximum(np.abs(gaps) - t * noise, 0.0)

    def draws(t: float) -> NDArray[np.float64]:
        drawn: NDArray[np.float64] = np.abs(true_gaps(t) + normal * noise).sum(axis=1)
        return drawn

    def reaches(t: float) -> bool:
        return bool((draws(t) >= measured - half_row).mean() >= rare)

    def stays(t: float) -> bool:
        return bool((draws(t) <= measured + half_row).mean() >= rare)

    low = farthest if reaches(farthest) else _border(reaches, -_FARTHEST, farthest)
    high = _border(lambda t: not stays(t), -_FARTHEST, farthest) if stays(farthest) else farthest
    return float(np.abs(true_gaps(low)).sum()), float(np.abs(true_gaps(high)).sum())


def _border(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where a property that holds at ``inside`` ceases to hold on the way to ``outside``."""
    for _ in range(_HALVINGS):
        middle = 0.5 * (inside + outside)
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside
