"""Embeddings of the whole batch, on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..basics.processes import padded_rows, several, stacked_rows


def gather_rows(local: Tensor, *, with_grad: bool, counts: Sequence[int] | None = None) -> Tensor:
    """Stack the rows of all processes in the order of their ranks; one process gets its own rows back.

    Args:
        local: ``(b, ...)``, the same shape on every process, but for ``b`` if there are ``counts``.
        with_grad: Let gradients flow back to the process that a row came from. Together with a loss over the local
            rows and DDP's mean of gradients this is exactly the gradient of the whole batch.
        counts: ``b`` of each process, where they may differ; see :func:`row_counts`.
    Returns:
        ``(sum of all b, ...)``.
    """
    if not several():
        return local
    counts = [len(local)] * dist.get_world_size() if counts is None else counts
    if with_grad:
        gathered: Tensor = _GatherRows.apply(local, counts)  # type: ignore[no-untyped-call]
        return gathered
    return stacked_rows(local, counts)


def local_columns(rows: int, device: torch.device, counts: Sequence[int] | None = None) -> Tensor:
    """Return the columns, among all gathered ones, of this process's own ``rows`` samples: ``(rows,)`` int64."""
    rank = dist.get_rank() if several() else 0
    before = rank * rows if counts is None else sum(counts[:rank])
    return torch.arange(rows, device=device) + before


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward sums each row's gradient over all processes and hands it to the row's own process."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        return stacked_rows(local, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, longest = ctx.counts[dist.get_rank()], max(ctx.counts)
        parts = [padded_rows(part, longest) for part in grad.split(list(ctx.counts))]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own[:rows], None
