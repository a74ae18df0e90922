"""The gradient of one large contrastive batch in the memory of a small one, by embedding it twice.

First all micro-batches are embedded without a graph, and the loss of the whole batch is differentiated with respect to
the embeddings. Then each micro-batch is embedded again, with a graph, and the gradients of its embeddings are sent
back through it. By the chain rule the sum over the micro-batches is the gradient of the whole batch.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CachedGradients:
    """What the first pass leaves for the second.

    Attributes:
        loss: Of the whole batch, a float32 scalar without graph.
        image: Gradients of the image embeddings by micro-batch, each ``(b, D)``.
        text: The same of the text embeddings.
        logit_scale: Gradient of the scale, of its shape.
    """

    loss: Tensor
    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    logit_scale: Tensor


def cache_gradients(
    embeds: Sequence[tuple[Tensor, Tensor]],
    logit_scale: Tensor,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> CachedGradients:
    """Differentiate the loss of a whole batch with respect to its embeddings.

    Args:
        embeds: Image and text embeddings of each micro-batch, ``(b, D)`` each, without graph.
        logit_scale: The scale that the loss uses.
        loss_of: From all image embeddings, all text embeddings and the scale to the loss.
    """
    images, texts = (torch.cat(parts).detach().requires_grad_() for parts in zip(*embeds, strict=True))
    scale = logit_scale.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(images, texts, scale)
        gradients = torch.autograd.grad(loss, (images, texts, scale), allow_unused=True)
    sizes = [len(image) for image, _ in embeds]
    by_batch = [
        (torch.zeros_like(whole) if gradient is None else gradient).split(sizes)
        for whole, gradient in zip((images, texts), gradients[:2], strict=True)
    ]
    last = torch.zeros_like(scale) if gradients[2] is None else gradients[2]
    return CachedGradients(loss.detach(), by_batch[0], by_batch[1], last)


def surrogate(cached: CachedGradients, index: int, image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
    """A scalar whose gradient is this micro-batch's part of the whole batch's, ``1 / n`` of the scale's included.

    Args:
        cached: Of the first pass, with ``n`` micro-batches.
        index: Of the micro-batch.
        image_embeds: ``(b, D)``, with a graph; the values of the first pass.
        text_embeds: The same of the texts.
        scale: The model's ``logit_scale``.
    """
    part = (image_embeds * cached.image[index]).sum() + (text_embeds * cached.text[index]).sum()
    return part + (scale * cached.logit_scale).sum() / len(cached.image)


class RandomState:
    """The states of torch's generators, so that a second pass drops out what the first one did.

    Args:
        device: Whose generator is kept beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put the generators back to where they were."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
