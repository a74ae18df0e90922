"""What calibrates the logits of held-out rows, whatever the link: a temperature and, for a sigmoid, a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .links import check_link
from .rows import LogitRows
from .sigmoid import fit_sigmoid
from .temperature import fit_temperature


def scaling_bounds(bounds: Sequence[float] | None, link: str) -> tuple[float, float]:
    """Lowest and highest temperature to look for; ``None``: those that are usual for the link."""
    low, high = check_link(link).bounds if bounds is None else bounds
    return float(low), float(high)


def fit_scaling(
    logits: Tensor | LogitRows,
    labels: Tensor,
    *,
    link: str,
    criterion: str,
    bounds: Sequence[float] | None = None,
    warn: bool = True,
    sample_weight: Any = None,
) -> dict[str, float]:
    """Fit what calibrates the logits of a held-out set.

    Args:
        logits: ``(n, K)`` float, before the link.
        labels: ``(n,)`` int64.
        link: "softmax" or "sigmoid".
        criterion: "nll", or with the softmax "ece".
        bounds: Lowest and highest temperature; ``None``: see `scaling_bounds`.
        warn: Log a warning if the temperature is at one of them.
        sample_weight: ``(n,)`` weights of the rows, with "nll"; ``None``: 1 each.
    Returns:
        "temperature" and, for the sigmoid, "bias".
    Raises:
        ValueError: If the link is the sigmoid and the criterion not "nll".
    """
    options: dict[str, Any] = {"bounds": scaling_bounds(bounds, link), "warn": warn, "sample_weight": sample_weight}
    if link == "softmax":
        return {"temperature": fit_temperature(logits, labels, criterion=criterion, **options)}
    if criterion != "nll":
        raise ValueError(
            f"Expected `calibration_criterion` 'nll' for a model with SigLIP's sigmoid, got {criterion!r}. Scale and "
            "bias are fitted together, by their likelihood."
        )
    temperature, bias = fit_sigmoid(logits, labels, **options)
    return {"temperature": temperature, "bias": bias}
