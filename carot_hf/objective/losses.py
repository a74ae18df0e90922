"""The training objectives, as pure functions of logits, embeddings and weights.

Every function works in at least float32 with autocast off, whatever the caller's context, and returns a 0-dimensional
tensor. Rows are the samples of this device; columns may have been gathered from all devices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.precision import at_least_float32, wide_dtype

SAME_CLASS = ("negative", "positive", "ignore")
_ROOT_EPS = 1e-12


def contrastive_loss(
    logits_per_image: Tensor,
    logits_per_text: Tensor,
    targets: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore: Tensor | None = None,
) -> Tensor:
    r"""CLIP's contrastive loss: mean of the image-to-text and the text-to-image cross-entropies.

    .. math:: L_{con} = \tfrac12 \big[ \tfrac1b \sum_i -\log p_{ii} + \tfrac1b \sum_i -\log q_{ii} \big]

    With smoothing, each target row :math:`y` becomes :math:`(1-\epsilon) y + \epsilon / B` in both directions; ``B`` is
    the number of columns that are not ignored.

    Args:
        logits_per_image: ``(b, B)`` float, rows are images, columns texts, before the softmax.
        logits_per_text: ``(b, B)`` float, rows are texts, columns images.
        targets: ``(b,)`` int64 columns of the matching pair, or ``(b, B)`` float rows that sum to 1. ``None``: the
            diagonal.
        label_smoothing: epsilon of the paper, in ``[0, 1)``.
        ignore: ``(b, B)`` bool, columns left out of the softmax and of the smoothing. Targets there must be 0.
    Returns:
        The loss in nats, 0-dimensional.
    Raises:
        ValueError: If a shape or a range above does not hold.
    Source:
        CaRot (NeurIPS 2023 workshop) Eq. 1 and section 2.3, up to the common factor 1/(2B); FLYP (arXiv 2212.00638).
    """
    check_pair(logits_per_image, logits_per_text)
    check_smoothing(label_smoothing)
    rows = target_rows(logits_per_image, targets, ignore)
    with torch.autocast(logits_per_image.device.type, enabled=False):
        if label_smoothing:
            kept = torch.ones_like(rows) if ignore is None else (~ignore).to(rows.dtype)
            rows = (1 - label_smoothing) * rows + label_smoothing * kept / kept.sum(dim=-1, keepdim=True)
        image_to_text = _soft_cross_entropy(logits_per_image, rows, ignore)
        text_to_image = _soft_cross_entropy(logits_per_text, rows, ignore)
        return (image_to_text + text_to_image) / 2


def cross_entropy_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy of a linear head, the loss of plain fine-tuning (FT).

    With smoothing the target is :math:`(1-\epsilon)` of the label and :math:`\epsilon / K` of every class.

    Args:
        logits: ``(b, K)`` float, before the softmax.
        labels: ``(b,)`` int64 class indices in ``[0, K)``.
        label_smoothing: epsilon, in ``[0, 1)``.
    Returns:
        The loss in nats, 0-dimensional: the mean over the rows.
    Raises:
        ValueError: If a shape or a range above does not hold.
    Source:
        CaRot (NeurIPS 2023 workshop) A.1; WiSE-FT (arXiv 2109.01903); Szegedy et al. 2016 for the smoothing.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Expected `logits` of shape (rows, classes) and `labels` of shape (rows,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}. Pass one class index a row."
        )
    check_smoothing(label_smoothing)
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=label_smoothing)


def same_class_targets(
    labels: Tensor,
    all_labels: Tensor,
    columns: Tensor,
    mode: str,
    *,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    r"""What the loss of pairs is to make of other samples of the same class in the batch.

    With ``"negative"`` they count as wrong answers, as in all published codes; the loss then has a floor of
    :math:`E[\ln(1 + X)]` nats with :math:`X` other samples of the class: 0.32 at 512 samples of 1,000 classes, 3.95 at
    512 of 10.

    Args:
        labels: ``(b,)`` int64, classes of this device's samples.
        all_labels: ``(B,)`` int64, classes of the columns.
        columns: ``(b,)`` int64, the column of each sample's own pair.
        mode: ``"negative"``; ``"positive"``: the target is uniform over the columns of the class; ``"ignore"``: those
            columns, but for the own pair, are left out of the softmax and of the smoothing.
        shared: The columns of a class share a target of 1, as a softmax needs it; ``False``: each has 1, for the
            sigmoid loss.
        dtype: Of the targets.
    Returns:
        ``targets`` and ``ignore`` of `contrastive_loss`, or of :func:`~carot_hf.objective.sigmoid.sigmoid_loss`.
    Raises:
        ValueError: If the mode is unknown.
    """
    if mode not in SAME_CLASS:
        raise ValueError(f"Expected `same_class` to be one of {SAME_CLASS}, got {mode!r}. 'negative' is as published.")
    if mode == "negative":
        return columns, None
    same = labels[:, None] == all_labels  # (b, B)
    if mode == "positive":
        return same.to(dtype) / (same.sum(dim=-1, keepdim=True) if shared else 1), None
    return columns, same.scatter(1, columns[:, None], False)


def distillation_loss(
    student_logits_per_image: Tensor,
    student_logits_per_text: Tensor,
    teacher_logits_per_image: Tensor,
    teacher_logits_per_text: Tensor,
) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher's in-batch distributions to the student's, mean of both directions.

    .. math:: L_{kd} = \tfrac12 \big[ \tfrac1b \sum_i KL(p^t_i \| p_i) + \tfrac1b \sum_i KL(q^t_i \| q_i) \big]

    It is 0 where the student equals the teacher and sends no gradient to the teacher. With the means and halves used
    here the workshop paper's weight stays 0.75. The code of CaRot-2024 halves the contrastive term but *sums* the two
    directions of the distillation with weight 1.5: in this convention that is a weight of 3.0.

    Args:
        student_logits_per_image: ``(b, B)`` float, with the student's own ``logit_scale``.
        student_logits_per_text: ``(b, B)`` float.
        teacher_logits_per_image: ``(b, B)`` float, with the teacher's own ``logit_scale``.
        teacher_logits_per_text: ``(b, B)`` float.
    Returns:
        The divergence in nats, 0-dimensional, >= 0.
    Raises:
        ValueError: If the four shapes differ.
    Source:
        CaRot (NeurIPS 2023 workshop) Eq. 2, up to the common factor 1/(2B).
    """
    check_pair(student_logits_per_image, student_logits_per_text)
    check_pair(student_logits_per_image, teacher_logits_per_image, "teacher_logits_per_image")
    check_pair(student_logits_per_image, teacher_logits_per_text, "teacher_logits_per_text")
    with torch.autocast(student_logits_per_image.device.type, enabled=False):
        image_to_text = _kl_divergence(teacher_logits_per_image, student_logits_per_image)
        text_to_image = _kl_divergence(teacher_logits_per_text, student_logits_per_text)
        return (image_to_text + text_to_image) / 2


def feature_distillation_loss(
    image_embeds: Tensor, text_embeds: Tensor, teacher_image_embeds: Tensor, teacher_text_embeds: Tensor
) -> Tensor:
    r"""Squared distance between the student's and the teacher's normalised embeddings, mean over the batch.

    .. math:: L_{fd} = \tfrac1b \sum_i \big( \|f_i - f^t_i\|^2 + \|g_i - g^t_i\|^2 \big)

    Args:
        image_embeds: ``(b, D)`` float, L2-normalised.
        text_embeds: ``(b, D)`` float, L2-normalised.
        teacher_image_embeds: ``(b, D)`` float, L2-normalised; no gradient flows to it.
        teacher_text_embeds: ``(b, D)`` float, L2-normalised; no gradient flows to it.
    Returns:
        The loss, dimensionless, 0-dimensional, in ``[0, 8]``.
    Raises:
        ValueError: If the four shapes differ.
    Source:
        TRACER (arXiv 2605.29380), feature distillation.
    """
    for name, embeds in (
        ("text_embeds", text_embeds),
        ("teacher_image_embeds", teacher_image_embeds),
        ("teacher_text_embeds", teacher_text_embeds),
    ):
        check_pair(image_embeds, embeds, name, first="image_embeds")
    with torch.autocast(image_embeds.device.type, enabled=False):
        image = at_least_float32(image_embeds) - at_least_float32(teacher_image_embeds.detach())
        text = at_least_float32(text_embeds) - at_least_float32(teacher_text_embeds.detach())
        return (image.square().sum(dim=-1) + text.square().sum(dim=-1)).mean()


def orthogonality_penalty(weight: Tensor, *, squared: bool = False) -> Tensor:
    r"""How far the columns of the visual projection are from orthonormal: :math:`\| W_v^T W_v - I \|_F`.

    :math:`W_v` is the projection seen as ``(width, embed)``, i.e. ``weight.T``; the identity is ``(embed, embed)``.

    Args:
        weight: ``(embed, width)`` float, as ``CLIPModel.visual_projection.weight``.
        squared: Return the squared norm. The published code uses the norm itself.
    Returns:
        The penalty, 0-dimensional; 1e-12 is added under the root so that its gradient exists at 0.
    Raises:
        ValueError: If ``weight`` is not a matrix.
    Source:
        CaRot (NeurIPS 2024), orthogonality constraint.
    """
    _check_matrix("weight", weight)
    with torch.autocast(weight.device.type, enabled=False):
        projection = at_least_float32(weight)
        gram = projection @ projection.T  # (embed, embed)
        total = (gram - torch.eye(len(gram), device=gram.device)).square().sum()
        return total if squared else torch.sqrt(total + _ROOT_EPS)


def cross_norm_penalty(visual_weight: Tensor, text_weight: Tensor) -> Tensor:
    r"""Overlap of the two projections: :math:`\| W_v W_t^T \|_F` with both seen as ``(width, embed)``.

    Args:
        visual_weight: ``(embed, visual_width)`` float, as ``CLIPModel.visual_projection.weight``.
        text_weight: ``(embed, text_width)`` float, as ``CLIPModel.text_projection.weight``.
    Returns:
        The penalty, 0-dimensional; 1e-12 is added under the root.
    Raises:
        ValueError: If one is not a matrix or the embedding sizes differ.
    Source:
        CaRot (NeurIPS 2024), published code.
    """
    _check_matrix("visual_weight", visual_weight)
    _check_matrix("text_weight", text_weight)
    if len(visual_weight) != len(text_weight):
        raise ValueError(
            f"Expected the two projections to share the embedding size, got {tuple(visual_weight.shape)} and "
            f"{tuple(text_weight.shape)}. Pass `visual_projection.weight` and `text_projection.weight` of one model."
        )
    with torch.autocast(visual_weight.device.type, enabled=False):
        cross = at_least_float32(visual_weight).T @ at_least_float32(text_weight)  # (visual_width, text_width)
        return torch.sqrt(cross.square().sum() + _ROOT_EPS)


def similarity_logits(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    r"""Scaled similarities :math:`S_{ij} = e^s f_i \cdot g_j + b` in at least float32.

    Args:
        image_embeds: ``(n, D)`` float, L2-normalised rows.
        text_embeds: ``(m, D)`` float, L2-normalised rows.
        logit_scale: One value, the natural logarithm ``s`` of CLIP's multiplier.
        logit_bias: One value, SigLIP's ``b``; ``None``: CLIP has none.
    Returns:
        ``(n, m)`` logits.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        similarities = at_least_float32(image_embeds) @ at_least_float32(text_embeds).T
        logits = at_least_float32(logit_scale).exp() * similarities
        return logits if logit_bias is None else logits + at_least_float32(logit_bias)


def _soft_cross_entropy(logits: Tensor, target_rows: Tensor, ignore: Tensor | None) -> Tensor:
    logits = at_least_float32(logits)
    if ignore is not None:
        logits = logits.masked_fill(ignore, float("-inf"))
    log_probs = F.log_softmax(logits, dim=-1)  # (b, B)
    if ignore is not None:
        log_probs = log_probs.masked_fill(ignore, 0.0)  # 0 * -inf would be nan
    return -(target_rows * log_probs).sum(dim=-1).mean()


def _kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    teacher = F.log_softmax(at_least_float32(teacher_logits.detach()), dim=-1)
    student = F.log_softmax(at_least_float32(student_logits), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def target_rows(logits: Tensor, targets: Tensor | None, ignore: Tensor | None) -> Tensor:
    """Expand the targets into ``(b, B)`` rows, in at least float32, and check them."""
    rows, columns = logits.shape
    dtype = wide_dtype(logits.dtype)
    if ignore is not None and (ignore.shape != logits.shape or ignore.dtype != torch.bool):
        raise ValueError(
            f"Expected `ignore` as bool of shape {tuple(logits.shape)}, got {ignore.dtype} of {tuple(ignore.shape)}. "
            "Build it by comparing the labels of rows and columns."
        )
    if targets is None:
        if rows != columns:
            raise ValueError(
                f"Expected `targets` for logits of shape ({rows}, {columns}), got None. "
                "Pass the column of each row's own pair; only square logits have a diagonal to fall back on."
            )
        return torch.eye(rows, dtype=dtype, device=logits.device)
    if targets.dim() == 1:
        if len(targets) != rows:
            raise ValueError(
                f"Expected `targets` of shape ({rows},), got {tuple(targets.shape)}. Pass one column index a row."
            )
        return F.one_hot(targets, columns).to(dtype)
    if targets.shape != logits.shape:
        raise ValueError(
            f"Expected `targets` of shape ({rows},) or ({rows}, {columns}), got {tuple(targets.shape)}. "
            "Pass column indices, or one row of probabilities a sample."
        )
    return targets.to(dtype)


def check_pair(a: Tensor, b: Tensor, name: str = "logits_per_text", *, first: str = "logits_per_image") -> None:
    """Raise a ValueError unless both are matrices of one shape."""
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(
            f"Expected `{first}` and `{name}` of one shape (rows, columns), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}. Rows are this device's samples in both."
        )


def check_smoothing(label_smoothing: float) -> None:
    """Raise a ValueError unless epsilon is in ``[0, 1)``."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"Expected `label_smoothing` in [0, 1), got {label_smoothing}. It is the share of the target spread evenly."
        )


def _check_matrix(name: str, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(
            f"Expected `{name}` of shape (embed, width), got {tuple(weight.shape)}. Pass the weight of a projection."
        )
