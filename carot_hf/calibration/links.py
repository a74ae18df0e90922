"""Links: from logits to probabilities, for one chunk of rows. What a softmax and SigLIP's sigmoid do differently."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import LOWEST_EXPONENT


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of logits with what every link needs of them.

    Attributes:
        rows: ``(n, K)`` float32 or float64.
        targets: ``(n,)`` int64.
        shifted: ``rows`` less the maximum of each.
        margins: ``(n,)``, ``shifted`` at the labels.
        predictions: ``(n,)`` int64, the argmax (the first among equals).
        hits: ``(n,)`` bool, whether that is the label.
    """

    rows: Tensor
    targets: Tensor
    shifted: Tensor
    margins: Tensor
    predictions: Tensor
    hits: Tensor

    def divided(self, temperature: float, bias: float, further: Tensor) -> Chunk:
        """Return the chunk at a temperature and a bias, divided by ``further`` ``(n,)`` then; the hits stay."""
        by = temperature * further
        rows = (self.rows / temperature + bias) / further[:, None]
        shifted, margins = self.shifted / by[:, None], self.margins / by
        return Chunk(rows, self.targets, shifted, margins, self.predictions, self.hits)


def at_scaling(chunk: Chunk, scaling: Mapping[str, Any], rows: slice) -> tuple[Chunk, float, float]:
    """Return a chunk, a temperature and a bias of a scaling: "temperature", "bias", and "row_temperature" of all rows.

    Args:
        chunk: Some rows.
        scaling: What is left out is 1, 0 and 1.
        rows: Which of all rows they are.
    """
    temperature, bias = scaling.get("temperature", 1.0), scaling.get("bias", 0.0)
    if (further := scaling.get("row_temperature")) is None:
        return chunk, temperature, bias
    return chunk.divided(temperature, bias, further[rows].to(chunk.rows)), 1.0, 0.0


def chunk_of(rows: Tensor, targets: Tensor) -> Chunk:
    """Return rows with what every link needs of them."""
    if rows.device.type == "cpu":
        # Workaround, torch 2.13: `max(dim=1)` takes 15 times as long as numpy's argmax. Until: it does not.
        indices = torch.from_numpy(rows.detach().numpy().argmax(axis=1))[:, None]  # the first index among equals
        maxima = rows.gather(1, indices)
    else:
        maxima, indices = rows.max(dim=1, keepdim=True)
    shifted, predictions = rows - maxima, indices[:, 0]
    margins = shifted.gather(1, targets[:, None])[:, 0]
    return Chunk(rows, targets, shifted, margins, predictions, predictions == targets)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A chunk at one temperature and bias.

    Attributes:
        confidences: ``(n,)``, the largest probability of each row.
        nll: ``(n,)`` float64, the negative log-likelihood of each label; of a sigmoid summed over the classes.
        probabilities: ``(n, K)``.
    """

    confidences: Tensor
    nll: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Link:
    """One way from logits to probabilities.

    Attributes:
        name: "softmax" or "sigmoid".
        scale: From a chunk, temperature and bias to all of `Scaled`.
        confidence: To the confidences alone.
        slope: From rows ``(n, K)``, labels and a multiplier of each row to the NLL of each, its first derivative in the
            logarithm of the multiplier, and the part of the second that is never negative; the rest is the first.
        bounds: Between which a temperature is looked for, where nobody says.
        sees_bias: Whether a bias that all classes share changes the probabilities.
    """

    name: str
    scale: Callable[[Chunk, float, float], Scaled]
    confidence: Callable[[Chunk, float, float], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    bounds: tuple[float, float]
    sees_bias: bool


def _softmax(chunk: Chunk, temperature: float, bias: float) -> Scaled:
    exponentials = (chunk.shifted / temperature).clamp_(min=LOWEST_EXPONENT).exp_()
    totals = exponentials.sum(dim=1)
    nll = totals.double().log() - chunk.margins.double() / temperature
    return Scaled(totals.reciprocal(), nll, exponentials.div_(totals[:, None]))


def _softmax_confidence(chunk: Chunk, temperature: float, bias: float) -> Tensor:
    return (chunk.shifted / temperature).clamp_(min=LOWEST_EXPONENT).exp_().sum(dim=1).reciprocal_()


def _sigmoid(chunk: Chunk, temperature: float, bias: float) -> Scaled:
    scaled = chunk.rows / temperature + bias
    own = scaled.gather(1, chunk.targets[:, None])[:, 0]
    nll = F.softplus(scaled).sum(dim=1, dtype=torch.float64) - own.double()
    return Scaled(scaled.amax(dim=1).sigmoid(), nll, scaled.sigmoid_())


def _sigmoid_confidence(chunk: Chunk, temperature: float, bias: float) -> Tensor:
    return (chunk.rows.amax(dim=1) / temperature + bias).sigmoid()


def _softmax_slope(rows: Tensor, targets: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scaled = (rows - rows.amax(dim=1, keepdim=True)) * multipliers[:, None]
    own, totals, shares = scaled.gather(1, targets[:, None])[:, 0], scaled.logsumexp(dim=1), scaled.softmax(dim=1)
    mean = (shares * scaled).sum(dim=1)
    return totals - own, mean - own, (shares * scaled * scaled).sum(dim=1) - mean * mean


def _sigmoid_slope(rows: Tensor, targets: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scaled = rows * multipliers[:, None]
    own, shares = scaled.gather(1, targets[:, None])[:, 0], scaled.sigmoid()
    nll = F.softplus(scaled).sum(dim=1) - own
    return nll, (shares * scaled).sum(dim=1) - own, (shares * (1 - shares) * scaled * scaled).sum(dim=1)


LINKS = {
    link.name: link
    for link in (
        Link("softmax", _softmax, _softmax_confidence, _softmax_slope, (0.5, 10.0), sees_bias=False),
        Link("sigmoid", _sigmoid, _sigmoid_confidence, _sigmoid_slope, (0.05, 20.0), sees_bias=True),
    )
}


def check_link(link: str, bias: float = 0.0) -> Link:
    """Return the link of a name.

    Raises:
        ValueError: If there is none, or the bias is none that it sees.
    """
    if link not in LINKS:
        raise ValueError(
            f"Expected `link` to be one of {tuple(LINKS)}, got {link!r}. CLIP's is 'softmax', SigLIP's 'sigmoid'."
        )
    if not math.isfinite(bias) or (bias and not LINKS[link].sees_bias):
        raise ValueError(
            f"Expected a finite `bias`, and 0 with the softmax, which does not see it; got {bias} with {link!r}. "
            "Leave it out."
        )
    return LINKS[link]
