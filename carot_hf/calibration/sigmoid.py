"""What calibrates SigLIP's sigmoid: a temperature and a bias, by their likelihood."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..ece.binning import checked_weights
from .rows import LogitRows, Logits, checked_rows, row_chunks
from .temperature import warn_at_bound

_STEPS = 200  # of Newton's method; 10 are usual
_SMALL = 1e-18  # decrement, relative to the objective, below which there is nothing left to gain
_FARTHEST = 8.0  # that a step may move a logit: farther off the curvature is another one


def fit_sigmoid(
    logits: Logits,
    labels: Tensor,
    *,
    bounds: tuple[float, float] = (0.05, 20.0),
    warn: bool = True,
    sample_weight: Tensor | NDArray[Any] | None = None,
) -> tuple[float, float]:
    r"""The temperature T and the bias c with which :math:`\sigma(z / T + c)` is best calibrated.

    They minimise :math:`\frac1N \sum_i \sum_k [\ln(1 + e^{u_{ik}}) - 1[y_i = k] u_{ik}]` with
    :math:`u = z / T + c`: a logistic regression on all pairs of an image and a class, convex in :math:`(1/T, c)`, by
    Newton steps. Accuracy does not change.

    Args:
        logits: ``(N, K)`` float, before the sigmoid, of rows held out of training. A tensor, an array, or `LogitRows`.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        bounds: Lowest and highest temperature, ``0 < low < high``.
        warn: Log a warning if the optimum is at a bound.
        sample_weight: ``(N,)`` weights >= 0 of the rows; None: 1 each.
    Returns:
        The temperature, > 0, which divides the logits, and the bias, which is added then; both dimensionless.
    Raises:
        ValueError: If a shape or range above does not hold, or a logit is not finite.
    Source:
        Platt 1999 for scale and bias; one regression over all classes, as SigLIP has one scale and one bias.
    """
    low, high = (float(bound) for bound in bounds)
    if not 0 < low < high < math.inf:
        raise ValueError(f"Expected `bounds` with 0 < low < high, got {bounds}. Pass e.g. `bounds=(0.05, 20.0)`.")
    rows, targets = checked_rows(logits, labels)
    own = _shares(sample_weight, rows)
    center, spread, largest = _location(rows, targets)  # on standardised logits the two unknowns are of one size
    limits = (spread / high, spread / low)  # of the slope on standardised logits
    slope, bias = min(max(spread, limits[0]), limits[1]), center
    value, gradient, curvature = _derivatives(rows, targets, slope, bias, center, spread, own)
    for _ in range(_STEPS):
        along, across = _newton(gradient, curvature)
        for limit, sign in zip(limits, (1, -1), strict=True):
            if slope == limit and (sign * gradient[0] > 0 or sign * along < 0):  # stay at the bound
                along, across = 0.0, -gradient[1] / curvature[2]
        decrement = -(along * gradient[0] + across * gradient[1])
        if decrement <= _SMALL * max(1.0, value):
            break
        size = min(1.0, _FARTHEST / (abs(along) * largest + abs(across)))
        if along:
            size = min(size, ((limits[1] if along > 0 else limits[0]) - slope) / along)
        while True:
            new = min(max(slope + size * along, limits[0]), limits[1]), bias + size * across
            found = _derivatives(rows, targets, *new, center, spread, own)
            if found[0] < value or size < 1e-10:
                break
            size /= 2
        if found[0] >= value:  # what is left is below the rounding of the sums
            break
        (slope, bias), (value, gradient, curvature) = new, found
    temperature = min(max(spread / slope, low), high)
    if warn:
        warn_at_bound(temperature, low, high)
    return temperature, bias - slope * center / spread


def _shares(sample_weight: Any, rows: Tensor | LogitRows) -> Tensor | None:
    """``(N, 1)`` weights of mean 1; None: all are alike."""
    weights = checked_weights(sample_weight, len(rows))
    return None if weights is None else torch.from_numpy(weights / weights.mean()).to(rows.device)[:, None]


def _newton(gradient: tuple[float, float], curvature: tuple[float, float, float]) -> tuple[float, float]:
    """Newton's step; along the bias alone where the slope cannot be told, as when all logits are alike."""
    determinant = curvature[0] * curvature[2] - curvature[1] ** 2
    if determinant <= 1e-14 * curvature[0] * curvature[2]:
        return 0.0, -gradient[1] / curvature[2]
    return (
        -(curvature[2] * gradient[0] - curvature[1] * gradient[1]) / determinant,
        -(curvature[0] * gradient[1] - curvature[1] * gradient[0]) / determinant,
    )


def _location(logits: Tensor | LogitRows, labels: Tensor) -> tuple[float, float, float]:
    """Mean and standard deviation of all logits, 1 for a spread of 0, and how many of them the farthest is away."""
    count = logits.shape[0] * logits.shape[1]
    total = square = 0.0
    low, high = math.inf, -math.inf
    for _, rows, _ in row_chunks(logits, labels):
        values = rows.double()
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        total += float(values.sum())
        square += float(values.square().sum())
    mean = total / count
    variance = square / count - mean * mean
    spread = math.sqrt(variance) if variance > 1e-24 * max(1.0, mean * mean) else 1.0
    return mean, spread, max(high - mean, mean - low) / spread


def _derivatives(
    logits: Tensor | LogitRows,
    labels: Tensor,
    slope: float,
    bias: float,
    center: float,
    spread: float,
    weights: Tensor | None,
) -> tuple[float, tuple[float, float], tuple[float, float, float]]:
    """The objective at ``u = slope x + bias`` with ``x = (z - center) / spread``, its gradient and its curvature."""
    count = logits.shape[0]
    sums = torch.zeros(6, dtype=torch.float64)
    for start, rows, targets in row_chunks(logits, labels):
        x = (rows.double() - center) / spread
        u = slope * x + bias
        own = u.gather(1, targets[:, None])
        p = u.sigmoid()
        residual, weight, losses = p.scatter_add(1, targets[:, None], -torch.ones_like(own)), p * (1 - p), F.softplus(u)
        if weights is not None:
            by = weights[start : start + len(rows)]
            residual, weight, losses, own = residual * by, weight * by, losses * by, own * by
        sums += torch.stack(
            [
                losses.sum() - own.sum(),
                (residual * x).sum(),
                residual.sum(),
                (weight * x * x).sum(),
                (weight * x).sum(),
                weight.sum(),
            ]
        ).cpu()
    value, first, second, *curvature = (sums / count).tolist()
    return value, (first, second), (curvature[0], curvature[1], max(curvature[2], 1e-300))
