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
        text: The same of the text embeddings, ``(u, D)``.
        head: Gradients of the parameters that turn embeddings into logits, of their shapes.
    """

    loss: Tensor
    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    head: tuple[Tensor, ...]


def cache_gradients(
    embeds: Sequence[tuple[Tensor, Tensor]],
    head: Sequence[Tensor],
    loss_of: Callable[..., Tensor],
) -> CachedGradients:
    """Differentiate the loss of a whole batch with respect to its embeddings.

    Args:
        embeds: Image and text embeddings of each micro-batch, ``(b, D)`` and ``(u, D)``, without graph.
        head: The parameters that turn embeddings into logits: CLIP's ``logit_scale``, also SigLIP's ``logit_bias``.
        loss_of: From all image embeddings, all text embeddings and the head's parameters to the loss.
    """
    images, texts = (torch.cat(parts).detach().requires_grad_() for parts in zip(*embeds, strict=True))
    copies = [parameter.detach().clone().requires_grad_() for parameter in head]
    inputs = (images, texts, *copies)
    with torch.enable_grad():
        loss = loss_of(*inputs)
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
    image, text, *rest = (
        torch.zeros_like(value) if gradient is None else gradient for value, gradient in zip(inputs, found, strict=True)
    )
    rows, captions = ([len(part) for part in parts] for parts in zip(*embeds, strict=True))
    return CachedGradients(loss.detach(), image.split(rows), text.split(captions), tuple(rest))


def surrogate(
    cached: CachedGradients, index: int, image_embeds: Tensor, text_embeds: Tensor, head: Sequence[Tensor]
) -> Tensor:
    """A scalar whose gradient is this micro-batch's part of the whole batch's, ``1 / n`` of the head's included.

    Args:
        cached: Of the first pass, with ``n`` micro-batches.
        index: Of the micro-batch.
        image_embeds: ``(b, D)``, with a graph; the values of the first pass.
        text_embeds: The same of the texts, ``(u, D)``.
        head: The model's parameters in the order of the first pass.
    """
    part = (image_embeds * cached.image[index]).sum() + (text_embeds * cached.text[index]).sum()
    for parameter, gradient in zip(head, cached.head, strict=True):
        part = part + (parameter * gradient).sum() / len(cached.image)
    return part


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
