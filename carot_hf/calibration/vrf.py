"""VRF: a zero-shot and a fine-tuned model mixed image by image, by how near it is to where zero-shot failed.

After Zhu et al. 2024 (arXiv 2411.06966), read off their code (BeierZhu/VRF, src/knn_distance.py and src/main.py): all
embeddings have length 1 and distances are squared, so ``a`` = 1.5 is that of vectors with a cosine of 0.25, and the
fine-tuned model nearly always counts more. There ``a`` and ``b`` are fixed; the paper, by summaries of it, searched
them by the accuracy on the validation set at home, over a grid that the code does not show: that of `fit_vrf` is ours.

Two things differ. Their temperatures make the mean confidence equal the accuracy on those of ImageNet's validation
images on which the result is reported, too; ours are fitted to held-out images. Their ``k`` is ``round(1000 * share of
the failures in the training set)``, which is more than there are where the training set has fewer than 1000 images;
ours is a fixed share of the failures, and the same on ImageNet.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..basics.precision import at_least_float32
from ..ece.inputs import check_temperature
from .metrics import top_label
from .nearest import checked_embeddings, checked_k, squared_distance
from .rows import Logits, checked_rows, chunk_rows
from .temperature import fit_temperature

A, B = 1.5, 0.6  # published, CLIP ViT-B/16 on ImageNet
K_SHARE = 1000 / 1_281_167  # of the failures: so k is the published round(1000 * share of the failures) on ImageNet
GRID_A = tuple(step / 10 for step in range(1, 21))
GRID_B = tuple(step / 10 for step in range(1, 11))


@dataclass(frozen=True, eq=False)
class VRF:
    r"""Mixes the probabilities of a zero-shot and a fine-tuned model; `fit_vrf` makes one.

    .. math:: p(x) = (1 - w) \, \mathrm{softmax}(z_0 / T_0) + w \, \mathrm{softmax}(z_1 / T_1), \qquad
        w(x) = \frac{1}{1 + e^{(d(x) - a) / b}}

    with :math:`d(x)` the squared distance from the ``k``-th nearest of the failures, of embeddings of length 1 of the
    fine-tuned model: near to where it is right and zero-shot is wrong, the fine-tuned model counts more.

    Attributes:
        failures: ``(M, D)`` embeddings of length 1, of training images that the fine-tuned model has right and the
            zero-shot model wrong.
        k: Which of them counts, the nearest being 1.
        a: Squared distance at which both models count the same.
        b: How gently the weight falls there; > 0.
        zero_shot_temperature: :math:`T_0`, fitted at home.
        fine_tuned_temperature: :math:`T_1`, fitted at home.
    """

    failures: Tensor
    k: int
    a: float = A
    b: float = B
    zero_shot_temperature: float = 1.0
    fine_tuned_temperature: float = 1.0

    def __post_init__(self) -> None:
        checked_k(self.k, len(self.failures), "the images where zero-shot failed")
        for temperature in (self.zero_shot_temperature, self.fine_tuned_temperature):
            check_temperature(temperature)
        if not math.isfinite(self.a) or not 0 < self.b < math.inf:
            raise ValueError(
                f"Expected a finite `a` and a finite `b` above 0, got {self.a} and {self.b}. Correct them."
            )

    def distance(self, embeds: Tensor | NDArray[Any]) -> Tensor:
        """Return the squared distance of each image from the ``k``-th nearest failure, ``(N,)`` in [0, 4].

        Args:
            embeds: ``(N, D)`` float, of the fine-tuned model; only their direction counts.
        Raises:
            ValueError: If they are of another size than those of the failures, or not finite.
        """
        rows = checked_embeddings(embeds, "embeds", self.failures.shape[1])
        return squared_distance(rows, self.failures, self.k)

    def weights(self, embeds: Tensor | NDArray[Any]) -> Tensor:
        """Return the weight of the fine-tuned model, ``(N,)`` in [0, 1].

        Args:
            embeds: As for `distance`, with the same errors.
        """
        return torch.sigmoid((self.a - self.distance(embeds)) / self.b)

    def probabilities(
        self,
        zero_shot_logits: Tensor | NDArray[Any],
        fine_tuned_logits: Tensor | NDArray[Any],
        embeds: Tensor | NDArray[Any],
    ) -> Tensor:
        """Return the mixed probabilities, ``(N, K)``, at least float32.

        Args:
            zero_shot_logits: ``(N, K)`` float, before the softmax, as the zero-shot model gives them.
            fine_tuned_logits: ``(N, K)`` float, those of the fine-tuned model, of the same classes.
            embeds: As for `distance`.
        Raises:
            ValueError: As `distance`, or if the shapes do not fit each other.
        """
        zero_shot, fine_tuned = (torch.as_tensor(part) for part in (zero_shot_logits, fine_tuned_logits))
        if zero_shot.shape != fine_tuned.shape or zero_shot.dim() != 2 or len(zero_shot) != len(embeds):
            raise ValueError(
                f"Expected logits of two models of one shape, ({len(embeds)}, K) as `embeds` has rows, got "
                f"{tuple(zero_shot.shape)} and {tuple(fine_tuned.shape)}. Pass both of the same images and classes."
            )
        return self.log_mixture(zero_shot, fine_tuned, self.distance(embeds)).exp()

    def log_mixture(self, zero_shot: Tensor, fine_tuned: Tensor, distances: Tensor) -> Tensor:
        """Return the logarithm of the mixed probabilities, ``(n, K)``: logits of temperature 1.

        Args:
            zero_shot: ``(n, K)`` logits.
            fine_tuned: ``(n, K)`` logits.
            distances: ``(n,)``, of `distance`.
        """
        return _log_mixture(*_log_both(self, zero_shot, fine_tuned), (self.a - distances) / self.b)


def failures(zero_shot_logits: Logits, fine_tuned_logits: Logits, labels: Tensor | NDArray[Any]) -> NDArray[np.bool_]:
    """Return which training images the fine-tuned model has right and the zero-shot model wrong: ``(N,)``.

    Args:
        zero_shot_logits: ``(N, K)`` float.
        fine_tuned_logits: ``(N, K)`` float.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
    Raises:
        ValueError: If a shape or range above does not hold.
    """
    found: NDArray[np.bool_] = top_label(fine_tuned_logits, labels)[1] & ~top_label(zero_shot_logits, labels)[1]
    return found


def fit_vrf(
    zero_shot_logits: Tensor | NDArray[Any],
    fine_tuned_logits: Tensor | NDArray[Any],
    embeds: Tensor | NDArray[Any],
    labels: Tensor | NDArray[Any],
    failed: Tensor | NDArray[Any],
    *,
    k: int | None = None,
    a: float = A,
    b: float = B,
    choose: bool = False,
    criterion: str = "nll",
    bounds: tuple[float, float] = (0.5, 10.0),
) -> VRF:
    r"""Fit the temperatures of two models, and how an image's nearness to failures of the first weighs them.

    Args:
        zero_shot_logits: ``(N, K)`` float, before the softmax, of images held out of training, at home.
        fine_tuned_logits: ``(N, K)`` float, of the same images.
        embeds: ``(N, D)`` float, their embeddings by the fine-tuned model.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        failed: ``(M, D)`` float, embeddings by the fine-tuned model of the training images of `failures`, or of those
            in a part of the training set that was drawn by chance.
        k: Which nearest failure counts; ``None``: 0.078 % of them, as published for ImageNet, and at least 1.
        a: Squared distance at which both models count the same.
        b: How gently the weight falls there.
        choose: Choose ``a`` of 0.1, 0.2 ... 2 and ``b`` of 0.1, 0.2 ... 1 in place of these: the pair of the highest
            accuracy on the held-out images, among equals that of the lowest NLL.
        criterion: What the temperatures minimise: "nll" or "ece".
        bounds: Lowest and highest temperature.
    Raises:
        ValueError: If a shape or range above does not hold, there is no failure, or ``k`` is larger than their number.
    Source:
        Zhu et al. 2024, "Robust fine-tuning of zero-shot models via variance reduction" (arXiv 2411.06966): VRF, with
        temperatures of held-out images, and ``k`` as a share of the failures also of smaller training sets than theirs.
    """
    zero_shot, targets = checked_rows(zero_shot_logits, labels)
    fine_tuned, _ = checked_rows(fine_tuned_logits, labels)
    if tuple(zero_shot.shape) != tuple(fine_tuned.shape):
        raise ValueError(
            f"Expected logits of both models of one shape, got {tuple(zero_shot.shape)} and {tuple(fine_tuned.shape)}. "
            "Pass both of the same images and classes."
        )
    if len(failed) < 1:
        raise ValueError(
            "Expected training images that the fine-tuned model has right and the zero-shot model wrong, got none. "
            "Where zero-shot never fails alone there is nothing to mix by: use one of the models."
        )
    near = F.normalize(checked_embeddings(failed, "failed"), dim=1)
    points = checked_embeddings(embeds, "embeds", near.shape[1])
    if len(points) != len(zero_shot):
        raise ValueError(f"Expected `embeds` of {len(zero_shot)} rows, one for each of the logits, got {len(points)}.")
    options: dict[str, Any] = {"criterion": criterion, "bounds": bounds, "warn": False}
    temperatures = [fit_temperature(part, targets, **options) for part in (zero_shot, fine_tuned)]
    made = VRF(near, max(1, round(K_SHARE * len(near))) if k is None else k, a, b, *temperatures)
    return _chosen(made, zero_shot, fine_tuned, points, targets) if choose else made


def _chosen(made: VRF, zero_shot: Any, fine_tuned: Any, embeds: Tensor, targets: Tensor) -> VRF:
    """The same with the best pair of the grid."""
    grid = list(itertools.product(GRID_A, GRID_B))
    hits, nll = [0] * len(grid), [0.0] * len(grid)
    distances, step = made.distance(embeds), chunk_rows(zero_shot.shape[1])
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        labels, both = targets[rows], _log_both(made, zero_shot[rows], fine_tuned[rows])
        for number, (a, b) in enumerate(grid):
            mixed = _log_mixture(*both, (a - distances[rows]) / b)
            hits[number] += int((mixed.argmax(dim=1) == labels).sum())
            nll[number] -= float(mixed.gather(1, labels[:, None]).sum())
    a, b = grid[max(range(len(grid)), key=lambda number: (hits[number], -nll[number]))]
    return replace(made, a=a, b=b)


def _log_both(made: VRF, zero_shot: Tensor, fine_tuned: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of both models' probabilities, each at its own temperature, at least float32."""
    return (
        F.log_softmax(at_least_float32(zero_shot) / made.zero_shot_temperature, dim=1),
        F.log_softmax(at_least_float32(fine_tuned) / made.fine_tuned_temperature, dim=1),
    )


def _log_mixture(zero_shot: Tensor, fine_tuned: Tensor, slope: Tensor) -> Tensor:
    """From logarithms of probabilities ``(n, K)``, and of the odds ``(n,)`` of the second; nothing overflows."""
    slope = slope.to(fine_tuned)[:, None]
    return torch.logaddexp(F.logsigmoid(-slope) + zero_shot, F.logsigmoid(slope) + fine_tuned)
