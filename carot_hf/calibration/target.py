"""Confidence that agrees with an estimated accuracy: for images of the place of use, which have no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .density import DensityCalibrator
from .links import check_link
from .metrics import read_set
from .rows import Logits

_CLOSE = 1e-7  # to the wished mean
_STEPS = 60
_FARTHEST = math.log(1e3)  # that the offset of a density, or a bias of a sigmoid, is looked for


def fit_to_accuracy(
    logits: Logits, accuracy: float, scaling: Mapping[str, float], *, link: str, bounds: tuple[float, float]
) -> dict[str, float]:
    """Fit what makes the mean confidence of images without labels their estimated accuracy.

    With a softmax it is the temperature, in which the mean confidence falls. With a sigmoid, where dividing may move
    confidences either way, it is the bias; the temperature stays that of home.

    Args:
        logits: ``(N, K)`` float, before the link.
        accuracy: That is estimated, in [0, 1]; see :func:`~carot_hf.estimate_accuracy`.
        scaling: "temperature" and, for the sigmoid, "bias" of home.
        link: "softmax" or "sigmoid".
        bounds: Lowest and highest temperature. If the accuracy is out of reach it is the nearer one.
    Returns:
        "temperature" and, for the sigmoid, "bias".
    """
    _check_accuracy(accuracy)
    if check_link(link).name == "sigmoid":

        def shifted(x: float) -> dict[str, float]:
            return {**scaling, "bias": scaling["bias"] + x}

        return shifted(_met(lambda x: mean_confidence(logits, shifted(x), link), accuracy, -_FARTHEST, _FARTHEST))
    found = _met(
        lambda x: mean_confidence(logits, {"temperature": math.exp(x)}, link), accuracy, *map(math.log, bounds)
    )
    return {"temperature": min(max(math.exp(found), bounds[0]), bounds[1])}


def offset_to_accuracy(
    calibrator: DensityCalibrator, logits: Logits, embeds: Tensor, accuracy: float
) -> DensityCalibrator:
    """Move the offset ``a`` of a calibrator so that the mean confidence of images without labels is their accuracy.

    Args:
        calibrator: Of a softmax.
        logits: ``(N, K)`` float, as the calibrator is to divide them.
        embeds: ``(N, D)`` of the same images.
        accuracy: That is estimated, in [0, 1].
    Raises:
        ValueError: If the calibrator is of a sigmoid: dividing moves its confidences either way.
    """
    _check_accuracy(accuracy)
    if calibrator.link != "softmax":
        raise ValueError(f"Expected a calibrator of the softmax, got one of the {calibrator.link}. Use the bias there.")
    divisors = replace(calibrator, a=0.0).temperature(embeds)

    def at_offset(x: float) -> float:
        return mean_confidence(logits, {"row_temperature": divisors * math.exp(x)}, calibrator.link)

    low, high = min(calibrator.a, 0.0) - _FARTHEST, max(calibrator.a, 0.0) + _FARTHEST
    return replace(calibrator, a=_met(at_offset, accuracy, low, high))


def mean_confidence(logits: Logits, scaling: Mapping[str, Any], link: str) -> float:
    """Return the mean of the largest probability of each row."""
    labels = torch.zeros(len(logits), dtype=torch.int64)  # no confidence depends on them
    seen = read_set(logits, labels, {"": (scaling, ())}, link=link)[0][""]
    return float(seen.confidences.mean(dtype="float64"))


def _met(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a monotone function has a value, by false position with halving (Illinois); or the nearer end."""
    ends = [low, high]
    gaps = [function(low) - wanted, function(high) - wanted]
    if gaps[0] * gaps[1] > 0:
        return ends[0] if abs(gaps[0]) < abs(gaps[1]) else ends[1]
    side = -1
    for step in range(_STEPS):
        if abs(ends[1] - ends[0]) <= 1e-9 or gaps[0] == gaps[1]:
            break
        middle = 0.5 * sum(ends) if step % 3 == 2 else (ends[0] * gaps[1] - ends[1] * gaps[0]) / (gaps[1] - gaps[0])
        gap = function(middle) - wanted
        if abs(gap) <= _CLOSE:
            return middle
        replaced = 0 if gap * gaps[0] > 0 else 1
        ends[replaced], gaps[replaced] = middle, gap
        if side == replaced:
            gaps[1 - replaced] /= 2
        side = replaced
    return ends[0] if abs(gaps[0]) < abs(gaps[1]) else ends[1]


def _check_accuracy(accuracy: float) -> None:
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"Expected `accuracy` in [0, 1], got {accuracy}. Pass a fraction, e.g. 0.8.")
