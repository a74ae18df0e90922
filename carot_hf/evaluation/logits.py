"""The logits of a set's labels, from embeddings of its images and a head, computed when they are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.rows import LogitRows
from ..data.shift_set import ShiftSet

Head = tuple[Tensor, Tensor]  # weight (K, D) and bias (K,) of the training classes


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
