"""Losses, embeddings and heads are in at least float32: half precision is widened, float64 passes unrounded.

And whether weights are numbers at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if it is float64."""
    return tensor.to(wide_dtype(tensor.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer with a value that is not finite, ``None`` if there is none."""
    named = {name: value for name, value in [*model.named_parameters(), *model.named_buffers()] if value.numel()}
    named = {name: value for name, value in named.items() if value.is_floating_point()}
    finite = [torch.isfinite(value).all() for value in named.values()]
    if not finite:
        return None
    found = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()  # a device is asked once
    return next((name for name, fine in zip(named, found, strict=True) if not fine), None)
