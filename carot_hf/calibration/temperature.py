"""The temperature that divides the logits of held-out rows best, and how sure one can be of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..basics.escape import guarded
from ..ece.binning import checked_weights
from .links import check_link
from .rows import LogitRows, Logits, checked_rows, row_chunks
from .temperature_ece import fit_ece
from .temperature_nll import fit_nll

logger = guarded(logging.getLogger(__name__))

CRITERIA = ("nll", "ece")
_HALF_CHI_SQUARED = 1.920729410347062


def fit_temperature(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    *,
    criterion: str = "nll",
    bounds: tuple[float, float] = (0.5, 10.0),
    warn: bool = True,
    sample_weight: Tensor | NDArray[Any] | None = None,
) -> float:
    r"""The temperature within ``bounds`` whose ``softmax(logits / temperature)`` is best calibrated.

    ``"nll"`` minimises :math:`\frac{1}{N} \sum_i [\ln \sum_k e^{\beta z_{ik}} - \beta z_{iy_i}]`, convex in
    :math:`\beta = 1/T`, by Newton steps in :math:`\ln \beta` kept inside a shrinking bracket; float64 decides.
    ``"ece"`` minimises the ECE over 10 uniform bins, which jumps and may have many minima: what it finds is no worse
    than each of 600 temperatures spread over ``bounds``, up to 1e-7, within which values are equal and the one
    nearest to the ``"nll"`` optimum is taken.

    Args:
        logits: ``(N, K)`` float, before the softmax, of rows held out of training. Not probabilities.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        criterion: ``"nll"`` or ``"ece"``.
        bounds: Lowest and highest temperature, ``0 < low < high``.
        warn: Log a warning if the optimum is at a bound.
        sample_weight: ``(N,)`` weights >= 0 of the rows, with ``"nll"`` only; None: 1 each.

    Returns:
        The temperature, dimensionless; divide logits by it.

    Raises:
        ValueError: If a shape or range above does not hold, a logit is not finite, or an option is unknown.

    Source:
        Guo et al. 2017, section 4.2 (NLL); CaRot (2023), appendix A.1 (ECE over [0.5, 10]).
    """
    if criterion not in CRITERIA:
        raise ValueError(f"Expected `criterion` to be one of {CRITERIA}, got {criterion!r}. Pass one of these names.")
    low, high = (float(bound) for bound in bounds)
    if not 0 < low < high < math.inf:
        raise ValueError(f"Expected `bounds` with 0 < low < high, got {bounds}. Pass e.g. `bounds=(0.5, 10.0)`.")
    if criterion == "ece" and sample_weight is not None:
        raise ValueError("Expected no `sample_weight` with the criterion 'ece', got some. Use 'nll'.")
    logits, labels = checked_rows(logits, labels, warn=True)
    temperature = fit_nll(logits, labels, low, high, checked_weights(sample_weight, len(logits)))
    if criterion == "ece":
        temperature = fit_ece(logits, labels, low, high, temperature)
    if warn:
        warn_at_bound(temperature, low, high)
    return temperature


def temperature_interval(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    *,
    link: str = "softmax",
    bounds: tuple[float, float] = (0.05, 20.0),
) -> tuple[float, float]:
    r"""The 95 % likelihood interval of the temperature: :math:`\{T: N (NLL(T) - \min NLL) \le 1.92\}`, within bounds.

    For few rows: each of some hundred looks at one temperature takes a pass. With the sigmoid the bias is the best one
    at each temperature, so that the interval is that of its profile likelihood.

    Args:
        logits: ``(N, K)`` float, before the link.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        link: ``"softmax"`` or ``"sigmoid"``.
        bounds: Lowest and highest temperature, ``0 < low < high``. An end that is a bound may lie farther out.
    Returns:
        Lowest and highest temperature.
    Raises:
        ValueError: If a shape or range above does not hold, or a logit is not finite.
    Source:
        Wilks 1938; 1.92 is half of the 95 % point of chi-squared with one degree of freedom.
    """
    check_link(link, 0.0)
    logits, labels = checked_rows(logits, labels)

    def rise(beta: float) -> float:
        """``N NLL`` at ``1 / T``, convex in it."""
        return len(logits) * _profile_nll(logits, labels, beta, link)

    lowest, highest = 1.0 / bounds[1], 1.0 / bounds[0]
    best = _golden(rise, lowest, highest)
    limit = rise(best) + _HALF_CHI_SQUARED
    ends = []
    for end in (lowest, highest):
        inside, outside = best, end
        if rise(end) > limit:
            for _ in range(50):
                middle = 0.5 * (inside + outside)
                inside, outside = (middle, outside) if rise(middle) <= limit else (inside, middle)
        ends.append(1.0 / outside)
    return ends[1], ends[0]


def warn_at_bound(temperature: float, low: float, high: float) -> None:
    """Log a warning if a fitted temperature is one of its bounds."""
    if temperature in (low, high):
        logger.warning(
            "The best temperature is at the bound %g of [%g, %g]: the optimum may lie outside. "
            "Check the logits, or pass wider `bounds`.",
            temperature,
            low,
            high,
        )


def _profile_nll(logits: Tensor | LogitRows, labels: Tensor, beta: float, link: str) -> float:
    """Mean NLL of the logits times ``beta``, with the sigmoid at the bias that is best there."""
    rows = torch.cat([part.double() for _, part, _ in row_chunks(logits, labels)]) * beta
    own = rows.gather(1, labels[:, None])[:, 0]
    if link == "softmax":
        return float((rows.logsumexp(dim=1) - own).mean())
    low, high = -float(rows.max()) - 40.0, -float(rows.min()) + 40.0  # the mean probability is 1 / K in between
    for _ in range(80):
        bias = 0.5 * (low + high)
        low, high = (low, bias) if float((rows + bias).sigmoid().sum()) > len(rows) else (bias, high)
    return float((F.softplus(rows + bias).sum(dim=1) - own - bias).mean())


def _golden(function: Callable[[float], float], low: float, high: float) -> float:
    """The minimum of a convex function between two numbers, by golden sections."""
    share = 0.5 * (math.sqrt(5.0) - 1.0)
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(60):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = function(right)
    return 0.5 * (low + high)
