"""A temperature for each image: the less of the training data lies near its embedding, the higher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..ece.binning import checked_weights
from ..ece.inputs import check_temperature
from .density_file import read_calibrator, write_calibrator
from .links import check_link
from .nearest import checked_embeddings, checked_k, density, near_density
from .rows import LogitRows, Logits, checked_rows, row_chunks

K = 10  # nearest images of the bank
_PENALTY = 1e-3  # of b^2
_STEPS = 100  # of Newton's method; 10 are usual
_SMALL = 1e-13  # decrement below which there is nothing left to gain
_FARTHEST = 2.0  # that a step may move the logarithm of a temperature


@dataclass(frozen=True, eq=False)
class DensityCalibrator:
    r"""Divides the logits of an image by :math:`T(x) = \exp(a + b (d(x) - \mu) / \sigma)`; `fit_density` makes one.

    Accuracy and the ranking of the classes never change.

    Attributes:
        bank: ``(M, D)`` float16, embeddings of length 1 of images of the training.
        k: How many of them count, the nearest ones.
        mu: Mean of ``d`` over the rows of the fit.
        sigma: Their standard deviation; 0: all are alike, and ``d`` plays no part.
        a: Logarithm of the temperature where ``d`` is ``mu``.
        b: By how much it rises with a standard deviation of ``d``.
        link: "softmax" or "sigmoid".
        tower: Checksum of the image tower that the embeddings come from; None: it is not known.
    """

    bank: Tensor
    k: int
    mu: float
    sigma: float
    a: float
    b: float
    link: str = "softmax"
    tower: str | None = None

    def temperature(self, embeds: Tensor | NDArray[Any]) -> Tensor:
        """Return ``T(x)`` of each image: ``(N,)``, at least float32, where the embeddings are.

        Args:
            embeds: ``(N, D)`` float, image embeddings; only their direction counts.
        Raises:
            ValueError: If they are of another size than those of the bank, or not finite.
        """
        return (self.a + self.b * self.distance(embeds)).exp()

    def distance(self, embeds: Tensor | NDArray[Any]) -> Tensor:
        """Return how far each image is from the bank, ``(N,)``, in standard deviations from the mean of the fit.

        Args:
            embeds: As for `temperature`, with the same errors.
        """
        rows = checked_embeddings(embeds, "embeds", self.bank.shape[1])
        return self.standardised(density(rows, self.bank, self.k))

    @property
    def numbers(self) -> dict[str, Any]:
        """``k``, ``mu``, ``sigma``, ``a`` and ``b``."""
        return {name: getattr(self, name) for name in ("k", "mu", "sigma", "a", "b")}

    def divisor(self, embeds: Tensor) -> Tensor:
        """Return the same ``(N, 1)`` for few rows, as one product that can be traced; both are of length 1 already."""
        return (self.a + self.b * self.standardised(near_density(embeds, self.bank, self.k))).exp()[:, None]

    def standardised(self, distances: Tensor) -> Tensor:
        """Return ``d`` in standard deviations from the mean of the fit."""
        return (distances - self.mu) / self.sigma if self.sigma > 0 else torch.zeros_like(distances)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``calibrator.json`` and ``calibrator.safetensors`` into a folder, beside the model."""
        write_calibrator(folder, self.bank, {**self.numbers, "link": self.link, "tower": self.tower})

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> DensityCalibrator:
        """Read what `save_pretrained` wrote, from a folder or a repository on the Hub.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If a file is none of a calibrator.
        """
        bank, numbers = read_calibrator(name, revision=revision, token=token)
        return cls(bank=bank, **numbers)

    def relative_to(self, temperature: float) -> DensityCalibrator:
        """Return the calibrator of logits that are divided by a temperature already."""
        check_temperature(temperature)
        return replace(self, a=self.a - math.log(temperature))


def fit_density(
    logits: Logits,
    embeds: Tensor | NDArray[Any],
    labels: Tensor | NDArray[Any],
    bank: Tensor | NDArray[Any],
    *,
    k: int = K,
    sample_weight: Tensor | NDArray[Any] | None = None,
    link: str = "softmax",
    start: float = 1.0,
) -> DensityCalibrator:
    r"""Fit a temperature that depends on how near an image is to those of the training.

    Minimises :math:`\sum_i w_i \, NLL(z_i / T(x_i), y_i) / \sum_i w_i + 10^{-3} b^2` over ``a`` and ``b`` by Newton
    steps in float64, from ``(ln start, 0)``. Rows of one density alone cannot tell ``b``: pass held-out images and
    perturbed copies of them (:mod:`carot_hf.data.perturbations`).

    Args:
        logits: ``(N, K)`` float, before the link, of rows held out of training.
        embeds: ``(N, D)`` float, the images' embeddings.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        bank: ``(M, D)`` float, embeddings of images of the training, none of them among the rows; kept in float16.
        k: How many of the bank count, the nearest ones; at most ``M``.
        sample_weight: ``(N,)`` weights >= 0; None: 1 each.
        link: ``"softmax"`` or ``"sigmoid"``, whose bias is in the logits already.
        start: Temperature to begin with.
    Raises:
        ValueError: If a shape or range above does not hold, or a number is not finite.
    Source:
        After Tomani et al., ICML 2023 (arXiv 2302.05118), in one layer, with the cosine of CLIP's own embeddings.
    """
    check_temperature(start)
    kept = F.normalize(checked_embeddings(bank, "bank"), dim=1).to(torch.float16)
    checked_k(k, len(kept), "the images of the bank")
    rows, targets = checked_rows(logits, labels)
    points = checked_embeddings(embeds, "embeds", kept.shape[1])
    if len(points) != len(rows):
        raise ValueError(f"Expected `embeds` of {len(rows)} rows, one for each of `logits`, got {len(points)}.")
    weights = checked_weights(sample_weight, len(rows))
    distances = density(points, kept, int(k)).double()
    mu, sigma = float(distances.mean()), float(distances.std(correction=0))
    if sigma <= 1e-9 * max(1.0, abs(mu)):
        sigma = 0.0
    made = DensityCalibrator(kept, int(k), mu, sigma, math.log(start), 0.0, link)
    shares = torch.ones(len(rows)) if weights is None else torch.from_numpy(weights)
    shares = (shares.double() / shares.sum()).to(rows.device)
    a, b = _fitted(rows, targets, made.standardised(distances).to(rows.device), shares, made)
    return replace(made, a=a, b=b)


def _fitted(
    rows: Tensor | LogitRows, targets: Tensor, points: Tensor, shares: Tensor, made: DensityCalibrator
) -> tuple[float, float]:
    """``a`` and ``b`` at the optimum."""
    slope = check_link(made.link).slope

    def derivatives(a: float, b: float) -> tuple[float, Tensor, Tensor, Tensor]:
        """Objective, gradient, curvature, and that part of it which is never negative."""
        sums = torch.zeros(4, 3, dtype=torch.float64)
        for start, part, labels in row_chunks(rows, targets):
            at = slice(start, start + len(part))
            x, w = points[at], shares[at]
            nll, first, second = slope(part.double(), labels, (-(a + b * x)).exp())
            whole = second + first  # of the logarithm of 1 / T
            powers = torch.stack([w, w * x, w * x * x])  # (3, n)
            sums += torch.stack([powers @ nll, -(powers @ first), powers @ whole, powers @ second]).cpu()
        value = float(sums[0, 0]) + _PENALTY * b * b
        gradient = sums[1, :2] + torch.tensor([0.0, 2 * _PENALTY * b])
        curvatures = [
            torch.stack([row[:2], row[1:]]) + torch.tensor([[0.0, 0.0], [0.0, 2 * _PENALTY]]) for row in sums[2:]
        ]
        return value, gradient, curvatures[0], curvatures[1]

    at = torch.tensor([made.a, made.b], dtype=torch.float64)
    value, gradient, curvature, positive = derivatives(*at.tolist())
    for _ in range(_STEPS):
        convex = float(curvature.det()) > 0 and float(curvature[0, 0]) > 0
        step = -torch.linalg.lstsq(curvature if convex else positive + 1e-12 * torch.eye(2), gradient[:, None])[0][:, 0]
        if -float(step @ gradient) <= _SMALL:  # below the rounding of the sums; one step more squares the error
            at = at + step
            break
        size = min(1.0, _FARTHEST / max(1e-300, float(step.abs().sum())))
        found = derivatives(*(at + size * step).tolist())
        while found[0] > value and size > 1e-12:
            size /= 2
            found = derivatives(*(at + size * step).tolist())
        if found[0] > value:
            break
        at, (value, gradient, curvature, positive) = at + size * step, found
    return float(at[0]), float(at[1])
