"""How far an image is from those of a bank, by the cosines of their embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    dtype = torch.float64 if embeds.dtype == torch.float64 else torch.float32
    best = torch.full((len(embeds), k), -torch.inf, dtype=dtype, device=embeds.device)
    for first in range(0, len(bank), _BLOCK):
        block = F.normalize(bank[first : first + _BLOCK].to(embeds.device, dtype), dim=1).T
        for start in range(0, len(embeds), _ROWS):
            rows = slice(start, start + _ROWS)
            cosines = F.normalize(embeds[rows].to(dtype), dim=1) @ block  # (n, m)
            nearest = cosines.topk(min(k, cosines.shape[1]), dim=1, sorted=False).values
            best[rows] = torch.cat([best[rows], nearest], dim=1).topk(k, dim=1).values
    return (_OFFSET - best.mean(dim=1).clamp(max=1.0)).log()


def near_density(embeds: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return the same for few images: ``(N,)``, with all cosines at once and nothing that depends on ``N``."""
    cosines = F.normalize(embeds, dim=1) @ F.normalize(bank.to(embeds.dtype), dim=1).T
    return (_OFFSET - cosines.topk(k, dim=1).values.mean(dim=1).clamp(max=1.0)).log()
