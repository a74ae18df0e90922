"""SigLIP's likelihood: each pair of an image and a text matches or does not, on its own. Loss, distillation, fit.

Where CLIP's softmax asks which of the texts belongs to an image, the sigmoid asks of each one whether it does. Its
probabilities need not sum to 1, and they depend on the bias of the logits as well as on their scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.precision import at_least_float32
from .losses import check_pair, check_smoothing, target_rows


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
