"""SigLIP's likelihood: each pair of an image and a text matches or does not, on its own. Loss, distillation, fit.

Where CLIP's softmax asks which of the texts belongs to an image, the sigmoid asks of each one whether it does. Its
probabilities need not sum to 1, and they depend on the bias of the logits as well as on their scale.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .calibration import LogitRows, Logits, checked_rows, row_chunks, warn_at_bound
from .losses import check_pair, check_smoothing, target_rows
from .precision import at_least_float32

_STEPS = 200  # of Newton's method; 10 are usual
_SMALL = 1e-18  # decrement, relative to the objective, below which there is nothing left to gain
_FARTHEST = 8.0  # that a step may move a logit: farther off the curvature is another one


def sigmoid_loss(
    logits_per_image: Tensor,
    targets: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore: Tensor | None = None,
) -> Tensor:
    r"""SigLIP's loss: for each image the sum over the texts of the binary cross-entropies, and the mean of it.

    .. math:: L = \tfrac1b \sum_i \sum_j \big[ \ln(1 + e^{z_{ij}}) - y_{ij} z_{ij} \big]

    With smoothing, :math:`y` becomes :math:`(1-\epsilon) y + \epsilon / B`, the target row of the contrastive loss with
    smoothing; ``B`` is the number of columns that are not ignored. (No paper has it: the smoothing is ours.)

    Args:
        logits_per_image: ``(b, B)`` float, rows are images, columns texts, scale and bias applied.
        targets: ``(b,)`` int64 columns of the matching text, or ``(b, B)`` float in ``[0, 1]``. ``None``: the diagonal.
        label_smoothing: epsilon, in ``[0, 1)``.
        ignore: ``(b, B)`` bool, pairs that are left out.
    Returns:
        The loss in nats, 0-dimensional.
    Raises:
        ValueError: If a shape or a range above does not hold.
    Source:
        Zhai et al. 2023 (SigLIP, arXiv 2303.15343), section 3.2.
    """
    check_pair(logits_per_image, logits_per_image)
    check_smoothing(label_smoothing)
    rows = target_rows(logits_per_image, targets, ignore)
    with torch.autocast(logits_per_image.device.type, enabled=False):
        kept = torch.ones_like(rows) if ignore is None else (~ignore).to(rows.dtype)
        if label_smoothing:
            rows = (1 - label_smoothing) * rows + label_smoothing * kept / kept.sum(dim=-1, keepdim=True)
        logits = at_least_float32(logits_per_image)
        return ((F.softplus(logits) - rows * logits) * kept).sum(dim=-1).mean()


def sigmoid_distillation_loss(student_logits_per_image: Tensor, teacher_logits_per_image: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher's answer to the student's, summed over the texts of an image.

    .. math:: L_{kd} = \tfrac1b \sum_i \sum_j KL\big(\sigma(z^t_{ij}) \,\|\, \sigma(z_{ij})\big)

    of Bernoulli distributions. It relates to `sigmoid_loss` as CaRot's distillation does to the contrastive loss:
    sum over columns, mean over rows; so the weight lambda keeps its meaning. 0 where the student equals the teacher.

    Args:
        student_logits_per_image: ``(b, B)`` float, with the student's own scale and bias.
        teacher_logits_per_image: ``(b, B)`` float, with the teacher's own; no gradient flows to it.
    Returns:
        The divergence in nats, 0-dimensional, >= 0.
    Raises:
        ValueError: If the shapes differ.
    Source:
        CaRot (NeurIPS 2023 workshop) Eq. 2, with SigLIP's likelihood in place of CLIP's.
    """
    check_pair(student_logits_per_image, teacher_logits_per_image, "teacher_logits_per_image")
    with torch.autocast(student_logits_per_image.device.type, enabled=False):
        student = at_least_float32(student_logits_per_image)
        teacher = at_least_float32(teacher_logits_per_image.detach())
        yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
        no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        return (yes + no).sum(dim=-1).mean()


def fit_sigmoid(
    logits: Logits, labels: Tensor, *, bounds: tuple[float, float] = (0.05, 20.0), warn: bool = True
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
    center, spread, largest = _location(rows, targets)  # on standardised logits the two unknowns are of one size

    limits = (spread / high, spread / low)  # of the slope on standardised logits
    slope, bias = min(max(spread, limits[0]), limits[1]), center
    value, gradient, curvature = _derivatives(rows, targets, slope, bias, center, spread)
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
            found = _derivatives(rows, targets, *new, center, spread)
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
    logits: Tensor | LogitRows, labels: Tensor, slope: float, bias: float, center: float, spread: float
) -> tuple[float, tuple[float, float], tuple[float, float, float]]:
    """The objective at ``u = slope x + bias`` with ``x = (z - center) / spread``, its gradient and its curvature."""
    count = logits.shape[0]
    sums = torch.zeros(6, dtype=torch.float64)
    for _, rows, targets in row_chunks(logits, labels):
        x = (rows.double() - center) / spread
        u = slope * x + bias
        own = u.gather(1, targets[:, None])
        p = u.sigmoid()
        residual, weight = p.scatter_add(1, targets[:, None], -torch.ones_like(own)), p * (1 - p)
        sums += torch.stack(
            [
                F.softplus(u).sum() - own.sum(),
                (residual * x).sum(),
                residual.sum(),
                (weight * x * x).sum(),
                (weight * x).sum(),
                weight.sum(),
            ]
        ).cpu()
    value, first, second, *curvature = (sums / count).tolist()
    return value, (first, second), (curvature[0], curvature[1], max(curvature[2], 1e-300))
