"""Embeddings of the whole batch, on every device."""

from __future__ import annotations

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
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(local.contiguous()))
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    return torch.cat(parts)


def local_columns(rows: int, device: torch.device) -> Tensor:
    """Return the columns, among all gathered ones, of this process's own ``rows`` samples: ``(rows,)`` int64."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return torch.arange(rows, device=device) + rank * rows
