"""Embeddings of the whole batch, on every device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(local: Tensor, *, with_grad: bool) -> Tensor:
    """Stack the rows of all processes in the order of their ranks; one process gets its own rows back.

    Args:
        local: ``(b, D)``, the same shape on every process.
        with_grad: Let gradients flow back to the process that a row came from. Together with a loss over the local
            rows and DDP's mean of gradients this is exactly the gradient of the whole batch.
    Returns:
        ``(world_size * b, D)``.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    if with_grad:
        gathered: Tensor = _GatherRows.apply(local)  # type: ignore[no-untyped-call]
        return gathered
    return _stacked(local)


def gather_uneven(local: Tensor) -> Tensor:
    """Stack the rows of all processes in the order of their ranks, however many each one has; without gradient.

    Args:
        local: ``(b, ...)``; ``b`` may differ between processes and be 0, the rest may not.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    size = _stacked(torch.tensor([len(local)], device=local.device))
    longest = int(size.max())
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local
    parts = _stacked(padded).split(longest) if longest else []
    return torch.cat([local[:0], *(part[:rows] for part, rows in zip(parts, size.tolist(), strict=bool(longest)))])


def local_columns(rows: int, device: torch.device) -> Tensor:
    """Return the columns, among all gathered ones, of this process's own ``rows`` samples: ``(rows,)`` int64."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return torch.arange(rows, device=device) + rank * rows


def lost_process(error: RuntimeError) -> str | None:
    """Say in a sentence or two which process an error tells the loss of, ``None`` if it is about something else.

    Knows what torch says of a data loader's worker, and gloo and NCCL of another rank, in torch 2.13.
    """
    text = str(error)
    if "DataLoader worker" in text:
        return (
            "Expected the workers of the data loader to live, but one ended, most often killed for want of memory. "
            "Lower `dataloader_num_workers`, then resume."
        )
    lost = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "remote process",
    )
    if isinstance(error, dist.DistError) or ("gloo" in text and any(part in text for part in lost)):
        return (
            "Expected all processes to answer, but one was lost or is late by more than `ddp_timeout` seconds. "
            "Look at the first error of the other processes, then resume."
        )
    return None


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward sums each row's gradient over all processes and hands it to the row's own process."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        return _stacked(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def _stacked(local: Tensor) -> Tensor:
    local = local.detach().contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts)
