"""Objectives that hold the student to the model it started from, as pure functions of embeddings.

Every function works in at least float32 with autocast off, sends no gradient to what comes from the start model, and
returns a 0-dimensional tensor, the mean over the rows of this device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.precision import at_least_float32
from .losses import check_pair, similarity_logits

MEAN_MOMENTUM = 0.99  # of the moving mean of difference vectors


def energy_gap_loss(
    image_embeds: Tensor, start_image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor
) -> Tensor:
    r"""Squared difference between the student's and the start model's energies of images and random texts (Lipsum-FT).

    .. math:: L_{gap} = \tfrac1b \sum_i \tfrac1{2M} \sum_m \big( e^{s_0} g_m \cdot f_i - e^{s_0} g_m \cdot f^0_i \big)^2

    Args:
        image_embeds: ``(b, D)`` float, L2-normalised, the student's :math:`f`.
        start_image_embeds: ``(b, D)`` float, L2-normalised, the start model's :math:`f^0` of the same images.
        text_embeds: ``(M, D)`` float, L2-normalised, the start model's :math:`g` of strings of random tokens.
        logit_scale: The start model's :math:`s_0`, the natural logarithm of its multiplier.
    Returns:
        The loss, dimensionless, 0-dimensional, >= 0; 0 where the student is the start model.
    Raises:
        ValueError: If the shapes do not fit.
    Source:
        Lipsum-FT (Nam et al., ICLR 2024, arXiv 2404.00860). Read in its published code: both towers' outputs of length
        1, both energies with the pretrained ``exp(logit_scale)``, 80 strings of 8 random tokens between the markers,
        drawn anew each step, weight 1.
    """
    check_pair(image_embeds, start_image_embeds, "start_image_embeds", first="image_embeds")
    _check_size(text_embeds, image_embeds)
    scale, texts = logit_scale.detach(), text_embeds.detach()
    student = similarity_logits(image_embeds, texts, scale)
    start = similarity_logits(start_image_embeds.detach(), texts, scale)
    return (student - start).square().mean(dim=-1).mean() / 2


def context_distillation_loss(
    image_embeds: Tensor, start_image_embeds: Tensor, context_embeds: Tensor, logit_scale: Tensor
) -> Tensor:
    r"""Divergence between the start model's and the student's distributions over context prompts (CAR-FT).

    .. math:: L_{ctx} = \tfrac1b \sum_i KL(r^0_i \| r_i), \qquad r_i = softmax_m(e^{s_0} c_m \cdot f_i)

    Args:
        image_embeds: ``(b, D)`` float, L2-normalised, the student's :math:`f`.
        start_image_embeds: ``(b, D)`` float, L2-normalised, the start model's :math:`f^0` of the same images.
        context_embeds: ``(M, D)`` float, L2-normalised, the contexts :math:`c` of `context_embeddings`.
        logit_scale: The start model's :math:`s_0`.
    Returns:
        The divergence in nats, 0-dimensional, >= 0; 0 where the student is the start model.
    Raises:
        ValueError: If the shapes do not fit.
    Source:
        CAR-FT (Mao et al., IJCV 2024, arXiv 2211.16175): the abstract says that the divergence between the context
        distributions of the original and the fine-tuned model is minimised. Its direction and the scale are not in what
        could be read: as in distillation, the start model's distribution is the target.
    """
    check_pair(image_embeds, start_image_embeds, "start_image_embeds", first="image_embeds")
    _check_size(context_embeds, image_embeds)
    scale, contexts = logit_scale.detach(), context_embeds.detach()
    student = F.log_softmax(similarity_logits(image_embeds, contexts, scale), dim=-1)
    start = F.log_softmax(similarity_logits(start_image_embeds.detach(), contexts, scale), dim=-1)
    return F.kl_div(student, start, reduction="batchmean", log_target=True)


def context_embeddings(captions: Tensor) -> Tensor:
    r"""Return the context prompts ``(M, D)``: of each template the normalised mean over the classes.

    Args:
        captions: ``(K, M, D)`` float, L2-normalised embeddings of each class in each template.
    Source:
        The context weights of CAR-FT as the code of Lipsum-FT (arXiv 2404.00860) makes them for its comparison.
    """
    return F.normalize(at_least_float32(captions).mean(dim=0), dim=-1)


def difference_vectors(
    image_embeds: Tensor, text_embeds: Tensor, start_image_embeds: Tensor, start_text_embeds: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how far images and texts have moved since the start, ``(b, D)`` each."""
    with torch.autocast(image_embeds.device.type, enabled=False):
        return (
            at_least_float32(image_embeds) - at_least_float32(start_image_embeds.detach()),
            at_least_float32(text_embeds) - at_least_float32(start_text_embeds.detach()),
        )


def difference_vector_loss(
    image_embeds: Tensor, text_embeds: Tensor, start_image_embeds: Tensor, start_text_embeds: Tensor, mean: Tensor
) -> Tensor:
    r"""How unlike the moves of images and texts since the start are: to their moving mean, and to each other (DiVE).

    .. math:: L_{dv} = \tfrac1b \sum_i \big( \|u_i - m\|^2 + \|v_i - m\|^2 + \|u_i - v_i\|^2 \big),
        \qquad u_i = f_i - f^0_i, \quad v_i = g_i - g^0_i

    A move that is the same for all, with :math:`m` equal to it, costs nothing: relative positions are kept.

    Args:
        image_embeds: ``(b, D)`` float, L2-normalised, the student's :math:`f`.
        text_embeds: ``(b, D)`` float, L2-normalised, the student's :math:`g`.
        start_image_embeds: ``(b, D)`` float, L2-normalised, of the start model.
        start_text_embeds: ``(b, D)`` float, L2-normalised, of the start model.
        mean: ``(D,)`` float, :math:`m`, without gradient; see `moved_mean`.
    Returns:
        The loss, dimensionless, 0-dimensional, >= 0.
    Raises:
        ValueError: If the shapes do not fit.
    Source:
        DiVE (Suzuki et al., AAAI 2026, arXiv 2511.09973), its AVL + PVL; weight 1,000, momentum 0.99 and a mean that
        begins at 0 are read in notes on the paper, which has no public code. The paper takes the pairs of a reference
        set such as CC3M; here they are those of the training batch. Whether :math:`m` moves before or after it is used
        is not said: here after.
    """
    for name, embeds in (
        ("text_embeds", text_embeds),
        ("start_image_embeds", start_image_embeds),
        ("start_text_embeds", start_text_embeds),
    ):
        check_pair(image_embeds, embeds, name, first="image_embeds")
    _check_size(mean[None], image_embeds)
    image, text = difference_vectors(image_embeds, text_embeds, start_image_embeds, start_text_embeds)
    with torch.autocast(image_embeds.device.type, enabled=False):
        centre = at_least_float32(mean.detach())
        parts = (image - centre, text - centre, image - text)
        return torch.stack([part.square().sum(dim=-1).mean() for part in parts]).sum()


def moved_mean(mean: Tensor, batch_mean: Tensor, momentum: float = MEAN_MOMENTUM) -> Tensor:
    """Move the mean of difference vectors by those of a batch, images and texts alike.

    Args:
        mean: ``(D,)``, of the batches before; zeros at the start.
        batch_mean: ``(D,)``, of this batch.
        momentum: Weight of the former.
    """
    return torch.lerp(batch_mean.detach().to(mean.dtype), mean, momentum)


def _check_size(texts: Tensor, images: Tensor) -> None:
    if texts.dim() != 2 or texts.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"Expected rows of {tuple(images.shape[1:])} numbers beside `image_embeds`, got {tuple(texts.shape)}. "
            "Embed images and texts with one model."
        )
