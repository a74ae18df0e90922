"""The temperature of the least negative log-likelihood: one pass finds three derivatives, and few passes are made."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rows import LOWEST_EXPONENT, LogitRows, every_row, row_chunks

Derivatives = tuple[float, float, float]

_SAMPLE_ROWS = 2048  # a start from so many rows is some hundredths off
_ROUGH, _NEAR, _DONE = 0.01, 0.05, 2e-4  # steps after which a stage ends; each cubes what is left


def fit_nll(
    logits: Tensor | LogitRows, labels: Tensor, low: float, high: float, weights: NDArray[np.float64] | None = None
) -> float:
    r"""The temperature in ``[low, high]`` that minimises the mean NLL of ``softmax(logits / temperature)``.

    With many rows some of them give a start and all of them one step, in the precision of the rows; then float64
    decides. So a large set is read about twice.

    Args:
        logits: ``(N, K)``, checked.
        labels: ``(N,)`` int64.
        low: Lowest temperature.
        high: Highest temperature.
        weights: ``(N,)`` of the rows; None: 1 each.
    """
    left, right = -math.log(high), -math.log(low)
    own = None if weights is None else torch.from_numpy(weights).to(logits.device)
    u = min(max(0.0, left), right)
    step = len(logits) // _SAMPLE_ROWS
    if step > 3:
        some = None if own is None else own[::step]
        if some is None or bool(some.any()):
            part = every_row(logits, step), labels[::step]
            u = _root(lambda at: derivatives(*part, math.exp(at), some), u, left, right, _ROUGH)
        u = _root(lambda at: derivatives(logits, labels, math.exp(at), own), u, left, right, _NEAR)
    u = _root(lambda at: derivatives(logits, labels, math.exp(at), own, exact=True), u, left, right, _DONE)
    if u in (left, right):
        return high if u == left else low
    return min(max(math.exp(-u), low), high)


def derivatives(
    logits: Tensor | LogitRows, labels: Tensor, beta: float, weights: Tensor | None, *, exact: bool = False
) -> Derivatives:
    r"""Of the mean NLL at ``beta`` = 1 / T, in :math:`\ln \beta`: with :math:`s = \beta z` and :math:`p` its softmax
    the slope :math:`E_p[s] - s_y`, the variance of s, and its third central moment, each a mean over the rows.

    Args:
        logits: ``(N, K)``, checked.
        labels: ``(N,)`` int64.
        beta: What multiplies the logits.
        weights: ``(N,)`` float64 of the rows; None: 1 each.
        exact: Work in float64 throughout, not in the precision of the rows.
    """
    found = torch.empty((5, len(logits)), dtype=torch.float64, device=logits.device)
    room: list[Tensor] = []  # made once: the first chunk is the largest
    for start, rows, targets in row_chunks(logits, labels):
        if not room:
            room = [torch.empty_like(rows, dtype=torch.float64 if exact else rows.dtype) for _ in range(2)]
        scaled, products = (part[: len(rows)] for part in room)
        scaled.copy_(rows).sub_(rows.amax(dim=1, keepdim=True))
        at = found[:, start : start + len(rows)]
        at[0] = scaled.gather(1, targets[:, None])[:, 0]
        scaled.mul_(beta).clamp_(min=LOWEST_EXPONENT)
        at[1] = torch.exp(scaled, out=products).sum(dim=1)
        for k in (2, 3, 4):
            at[k] = products.mul_(scaled).sum(dim=1)
    first, second, third = found[2:] / found[1]
    parts = torch.stack([first - beta * found[0], second - first**2, third - 3 * first * second + 2 * first**3])
    slope, variance, skew = (parts.mean(dim=1) if weights is None else parts @ weights / weights.sum()).tolist()
    return slope, variance, skew


def _root(function: Callable[[float], Derivatives], u: float, left: float, right: float, small: float) -> float:
    """Where the slope is 0, up to the step after one that is ``small``; an end if it lies beyond it.

    Newton steps, near the root Halley's, kept inside a bracket that shrinks. The slope is negative left of the root.
    """
    last_step = right - left
    unseen = {left, right}  # ends of the bracket where the sign of the slope is not known yet
    for _ in range(100):
        slope, variance, skew = function(u)
        if slope == 0.0 or (u in unseen and (slope > 0.0) == (u == left)):
            break
        unseen.discard(u)
        left, right = (left, u) if slope > 0.0 else (u, right)
        end = left if slope > 0.0 else right
        step = _step(slope, variance, skew)
        if not left < u + step < right or abs(step) > 0.5 * last_step:
            step = (end if end in unseen else 0.5 * (left + right)) - u
        u, last_step = u + step, abs(step)
        if last_step < small:
            break
    return u


def _step(slope: float, variance: float, skew: float) -> float:
    """Towards the root of the slope, by its first two derivatives where these say enough, else by the variance."""
    if variance <= 0.0:
        return math.copysign(math.inf, -slope)
    newton = -slope / variance
    if abs(newton) > 0.25:
        return newton
    first, second = variance + slope, skew + 3 * variance + slope  # of the slope in ln beta: s itself grows with it
    bent = first - 0.5 * slope * second / first
    return -slope / bent if bent > 0.5 * variance else newton
