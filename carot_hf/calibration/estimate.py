"""Accuracy on images without labels, from the confidences alone, and whether these images are like those at home."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .selective import Values, checked_hits, column, in_unit_interval

METHODS = ("mean", "atc")


def estimate_accuracy(
    validation_confidences: Values, validation_correct: Values, confidences: Values, *, method: str = "mean"
) -> float:
    r"""The accuracy to expect on rows whose labels are not known.

    ``"mean"``: their mean confidence, which is right if the confidence is calibrated there. ``"atc"``, average
    thresholded confidence: with ``e`` errors among the validation rows the threshold :math:`t` is the ``e``-th (from 0)
    of their confidences in ascending order, so that as many lie below it as are wrong; the estimate is the share of the
    new confidences :math:`\ge t`. Comparisons are in float64: pass both sets in one dtype.

    Args:
        validation_confidences: ``(n,)`` numbers in [0, 1] of any dtype, of rows held out of training.
        validation_correct: ``(n,)`` booleans or 0/1, whether the prediction of that row was right. ``"mean"`` checks
            the validation rows, but does not need them.
        confidences: ``(N,)`` numbers in [0, 1] of any dtype, of the rows without labels.
        method: ``"mean"`` or ``"atc"``.
    Returns:
        A fraction in [0, 1]; with ``"atc"`` 0 if all validation rows are wrong.
    Raises:
        ValueError: If there is no row, lengths differ, a value is out of range, or the method is unknown.
    Source:
        Garg et al., ICLR 2022, arXiv 2201.04234 ("atc").
    """
    ordered, wrong, values = _checked(validation_confidences, validation_correct, confidences, method)
    if method == "mean":
        return float(values.mean())
    return float((values >= _threshold(ordered, wrong, np.ones(len(ordered)))).mean())


def estimate_interval(
    validation_confidences: Values,
    validation_correct: Values,
    confidences: Values,
    *,
    method: str = "mean",
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence_level: float = 0.95,
) -> tuple[float, float]:
    """How far `estimate_accuracy` depends on which rows were drawn: a percentile bootstrap of both sets.

    It is an interval of the estimate, and no promise about the true accuracy: a shift that changes how often a
    confidence is right moves that one without moving the estimate.

    Args:
        validation_confidences: See `estimate_accuracy`, as are the next three.
        validation_correct: See there.
        confidences: See there.
        method: See there.
        n_bootstrap: Draws, each of all validation rows and of all new rows with replacement.
        seed: Of the draws.
        confidence_level: Share of the draws inside, between 0 and 1.
    Returns:
        Lower and upper end; the estimate is always between them.
    Raises:
        ValueError: As there, or if an option is out of range.
    Source:
        Efron and Tibshirani 1993, chapter 13.
    """
    if isinstance(n_bootstrap, bool) or not isinstance(n_bootstrap, (int, np.integer)) or n_bootstrap < 1:
        raise ValueError(f"Expected `n_bootstrap` to be an integer of at least 1, got {n_bootstrap!r}. Pass e.g. 1000.")
    if not 0.0 < confidence_level < 1.0:
        raise ValueError(
            f"Expected `confidence_level` between 0 and 1, got {confidence_level}. Pass a fraction, e.g. 0.95."
        )
    ordered, wrong, values = _checked(validation_confidences, validation_correct, confidences, method)
    estimate = estimate_accuracy(validation_confidences, validation_correct, confidences, method=method)
    generator = np.random.default_rng(seed)
    rows, size = len(ordered), len(values)

    def draw() -> float:
        if method == "mean":
            return float(values[generator.integers(0, size, size)].mean())
        counts = np.bincount(generator.integers(0, rows, rows), minlength=rows)
        above = float((values >= _threshold(ordered, wrong, counts)).mean())
        return float(generator.binomial(size, above)) / size  # as many of the drawn rows are above the threshold

    tail = 0.5 * (1.0 - confidence_level)
    low, high = np.quantile([draw() for _ in range(n_bootstrap)], (tail, 1.0 - tail))
    return min(float(low), estimate), max(float(high), estimate)


def share_beyond(home: Values, away: Values, quantile: float = 0.99) -> float:
    """The share of ``away`` that is strictly above a quantile of ``home``: ``1 - quantile`` if both are alike.

    Args:
        home: ``(n,)`` finite numbers of any dtype, e.g. distances of the validation images.
        away: ``(N,)`` finite numbers of any dtype, the same of other images.
        quantile: Between 0 and 1; between two numbers of ``home`` it is interpolated linearly.
    Returns:
        A fraction in [0, 1].
    Raises:
        ValueError: If a shape or range above does not hold.
    """
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"Expected `quantile` between 0 and 1, got {quantile}. Pass a fraction, e.g. 0.99.")
    limit = np.quantile(column(home, "home"), quantile)
    return float((column(away, "away") > limit).mean())


def _checked(
    validation_confidences: Values, validation_correct: Values, confidences: Values, method: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Validation confidences, ascending, with whether each was wrong; and the new confidences."""
    if method not in METHODS:
        raise ValueError(f"Expected `method` to be one of {METHODS}, got {method!r}. Pass one of these names.")
    known, hits = checked_hits(validation_confidences, validation_correct, "validation_")
    order = np.argsort(known)
    return known[order], ~hits[order], in_unit_interval(column(confidences, "confidences"), "confidences")


def _threshold(ordered: NDArray[np.float64], wrong: NDArray[np.bool_], counts: NDArray[Any]) -> float:
    """The threshold of ATC if each row were there so many times."""
    reached, errors = np.cumsum(counts), counts @ wrong
    return float(ordered[np.argmax(reached > errors)]) if errors < reached[-1] else math.inf
