"""From what a model gives to embeddings of length 1, those of captions in the order of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.precision import at_least_float32
from ..data.captions import CAPTION_INDEX

Embeds = tuple[Tensor, Tensor]


def embeds_of(outputs: Any, inputs: Mapping[str, Any]) -> Embeds:
    """Return image and text embeddings of the samples of a batch, ``(b, D)`` in at least float32 each.

    Args:
        outputs: The model's, of the batch.
        inputs: The batch; where its captions are there once each, it says which one each sample has.
    """
    image, text = unit(outputs.image_embeds), unit(outputs.text_embeds)
    index = inputs.get(CAPTION_INDEX)
    return image, text if index is None else rows_at(index, text)


def rows_at(index: Tensor, rows: Tensor) -> Tensor:
    """Return the row ``(D,)`` of each sample out of ``(u, D)``."""
    return F.embedding(index, rows)  # the gradient of an index_select is summed in no fixed order on a GPU


def unit(embeds: Tensor) -> Tensor:
    """Bring embeddings ``(n, D)`` to length 1, in at least float32."""
    with torch.autocast(embeds.device.type, enabled=False):
        return F.normalize(at_least_float32(embeds), dim=-1)
