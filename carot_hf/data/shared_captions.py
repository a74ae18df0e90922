"""The captions of one contrastive batch over its micro-batches: each distinct one is in one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .captions import CAPTION_INDEX, CAPTION_NUMBER, CaptionTable


def share_captions(
    batches: Sequence[Mapping[str, Any]], captions: CaptionTable
) -> tuple[list[Mapping[str, Any]], Tensor | None]:
    """Leave each distinct caption to one micro-batch.

    Where every caption of a micro-batch is in an earlier one, it keeps one of them, for a text tower takes no empty
    batch. Nothing is asked of a device.

    Args:
        batches: Of :meth:`~carot_hf.data.captions.CaptionTable.lookup_once`, of ``b`` samples each.
        captions: The table that they are of.
    Returns:
        Micro-batches whose tokens and ``caption_number`` are of their ``u`` captions, without ``caption_index``; and,
        for all samples in their order, which of all these captions each one has, ``(sum of b,)`` int64. As they came,
        and ``None``, where captions are not to be shared, or not of the table.
    """
    if not captions.shares or not all(isinstance(batch.get(CAPTION_NUMBER), np.ndarray) for batch in batches):
        return list(batches), None
    numbers = [batch[CAPTION_NUMBER] for batch in batches]
    places: dict[int, int] = {}  # of each caption among all rows that are kept
    shared: list[Mapping[str, Any]] = []
    count = 0
    for batch, own in zip(batches, numbers, strict=True):
        rows = np.unique(own) if CAPTION_INDEX in batch else own  # the captions in the order of the tokens
        kept = [row for row, number in enumerate(rows.tolist()) if number not in places] or [0]
        places |= {int(rows[row]): count + place for place, row in enumerate(kept)}
        count += len(kept)
        shared.append({**_rows_of(batch, kept, len(rows)), CAPTION_NUMBER: rows[kept]})
    whole = torch.tensor([places[number] for own in numbers for number in own.tolist()])
    return shared, whole.to(batches[0]["input_ids"].device, non_blocking=True)


def _rows_of(batch: Mapping[str, Any], kept: list[int], count: int) -> dict[str, Any]:
    """A batch with some of its captions, of which there are so many."""
    rest = {name: value for name, value in batch.items() if name != CAPTION_INDEX}
    if len(kept) < count:
        index = torch.tensor(kept).to(rest["input_ids"].device, non_blocking=True)
        rest |= {name: rest[name].index_select(0, index) for name in ("input_ids", "attention_mask") if name in rest}
    return rest
