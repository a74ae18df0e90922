"""The logits of a set's labels, from embeddings of its images and a head, computed when they are read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.precision import at_least_float32
from ..calibration.rows import LogitRows
from ..data.shift_set import ShiftSet
from ..models.backbones import logit_head

Head = tuple[Tensor, Tensor]  # weight (K, D) and bias (K,) of the training classes


def head_of(model: Any, classes: Tensor | None = None) -> Head:
    """Weight ``(K, D)`` and bias ``(K,)`` that turn embeddings into logits, in at least float32.

    Args:
        model: A `CLIPClassifier`, or a model of a family that compares images with texts.
        classes: ``(K, D)`` embeddings of the classes, of such a model.
    """
    if classes is None:
        return _for_float64(at_least_float32(model.head.weight.detach()), at_least_float32(model.head.bias.detach()))
    scale, *shift = (at_least_float32(parameter.detach()) for parameter in logit_head(model))
    bias = shift[0].expand(len(classes)) if shift else torch.zeros(len(classes)).to(classes)
    return _for_float64(scale.exp() * classes, bias)


class SetLogits(LogitRows):
    """The logits of a set's labels: ``data.select(embeds @ weight.T + bias)``.

    Args:
        embeds: ``(N, D)`` float, image embeddings of length 1.
        head: Weight ``(K, D)`` and bias ``(K,)`` of the training classes. Rows are computed where it lies.
        data: The set; its columns say which training classes stand for a label.
    """

    def __init__(self, embeds: Tensor, head: Head, data: ShiftSet) -> None:
        self._embeds, self._head, self._data = embeds, head, data
        self.shape = len(embeds), data.num_labels
        self.dtype, self.device = embeds.dtype, head[0].device

    def __getitem__(self, rows: slice) -> Tensor:
        return self._data.select(F.linear(self._embeds[rows].to(self.device), *self._head))

    def whole(self) -> Tensor:
        """Return all rows as a matrix, where the head lies."""
        parts = [self[start : start + 4096] for start in range(0, len(self), 4096)]
        return torch.cat(parts) if parts else self[0:0]


def _for_float64(weight: Tensor, bias: Tensor) -> Head:
    """A head where sums in float64 can be taken."""
    # Workaround, torch 2.13: MPS has no float64, so there the CPU measures. Until: it has.
    return (weight.cpu(), bias.cpu()) if weight.device.type == "mps" else (weight, bias)
