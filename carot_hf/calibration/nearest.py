"""How far an image is from those of a bank, by the cosines of their embeddings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.precision import at_least_float32

_OFFSET = 1.0001  # above the largest cosine there is
_ROWS, _BLOCK = 512, 4096  # embeddings, and images of the bank, worked on at a time


def density(embeds: Tensor, bank: Tensor, k: int) -> Tensor:
    r"""How far images are from the bank: :math:`d(x) = \ln(1.0001 - c)`, ``c`` the mean of the ``k`` largest cosines.

    It is high where the bank is thin. The order of the bank does not matter. Memory beside the inputs: some 40 MB.

    Args:
        embeds: ``(N, D)`` float; only directions count.
        bank: ``(M, D)`` float, ``M >= k``; likewise.
        k: Nearest images that count.
    Returns:
        ``(N,)``, float64 of float64 embeddings, otherwise float32, on their device.
    """
    return (_OFFSET - _largest_cosines(embeds, bank, k).mean(dim=1).clamp(max=1.0)).log()


def squared_distance(embeds: Tensor, bank: Tensor, k: int) -> Tensor:
    """How far images are from the ``k``-th nearest of the bank: ``(N,)`` squared Euclidean distances in [0, 4].

    Args:
        embeds: ``(N, D)`` float; only directions count, so that all lengths are 1.
        bank: ``(M, D)`` float, ``M >= k``; likewise.
        k: Which one of the bank counts.
    Returns:
        As `density`.
    """
    return 2 - 2 * _largest_cosines(embeds, bank, k)[:, -1].clamp(-1.0, 1.0)


def _largest_cosines(embeds: Tensor, bank: Tensor, k: int) -> Tensor:
    """``(N, k)``, the largest first."""
    dtype = torch.float64 if embeds.dtype == torch.float64 else torch.float32
    best = torch.full((len(embeds), k), -torch.inf, dtype=dtype, device=embeds.device)
    for first in range(0, len(bank), _BLOCK):
        block = F.normalize(bank[first : first + _BLOCK].to(embeds.device, dtype), dim=1).T
        for start in range(0, len(embeds), _ROWS):
            rows = slice(start, start + _ROWS)
            cosines = F.normalize(embeds[rows].to(dtype), dim=1) @ block  # (n, m)
            nearest = cosines.topk(min(k, cosines.shape[1]), dim=1, sorted=False).values
            best[rows] = torch.cat([best[rows], nearest], dim=1).topk(k, dim=1).values
    return best


def near_density(embeds: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return the same for few images: ``(N,)``, with all cosines at once and nothing that depends on ``N``."""
    cosines = F.normalize(embeds, dim=1) @ F.normalize(bank.to(embeds.dtype), dim=1).T
    return (_OFFSET - cosines.topk(k, dim=1).values.mean(dim=1).clamp(max=1.0)).log()


def checked_embeddings(values: Any, name: str, size: int | None = None) -> Tensor:
    """Return a finite matrix of at least float32 without gradient, or raise a ValueError."""
    rows = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if rows.dim() != 2 or len(rows) < 1 or not rows.is_floating_point():
        raise ValueError(
            f"Expected `{name}` of a float dtype and shape (N, D) with N >= 1, got {rows.dtype} of shape "
            f"{tuple(rows.shape)}. Pass one image embedding a row."
        )
    if size is not None and rows.shape[1] != size:
        raise ValueError(
            f"Expected `{name}` of {size} numbers a row, as in the bank, got {rows.shape[1]}. Pass embeddings of the "
            "model that the bank was made with."
        )
    if not math.isfinite(rows.sum()) and not bool(rows.isfinite().all()):
        raise ValueError(f"Expected finite `{name}`, got nan or inf. Find out where the model diverged.")
    return at_least_float32(rows)


def checked_k(k: Any, most: int, of: str) -> int:
    """Return a number of neighbours, or raise a ValueError unless it is a whole number from 1 to ``most``."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= most:
        raise ValueError(
            f"Expected `k` as a whole number from 1 to {most}, {of}, got {k!r}. Lower it, or pass more images."
        )
    return int(k)
