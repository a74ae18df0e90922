"""How far the trained weights are from those that the run started from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..basics.precision import at_least_float32
from ..models.lora import Product, adapter_products, is_adapted


def squared_distance(student: Any, start: Any) -> Tensor:
    r"""Return :math:`\sum \|\theta - \theta_0\|^2` over what is trained, 0-dimensional, with a gradient.

    With LoRA the adapters count by their products, which are what is added to the weights:
    :math:`\|\tfrac{\alpha}{r} (B A - B_0 A_0)\|_F^2`.

    Args:
        student: Unwrapped.
        start: The same network before the first step.
    Source:
        L2-SP (Li et al. 2018, arXiv 1802.01483), Eq. 5 without its second part, which is for a new head, and without
        the factor 1/2.
    """
    device = next(student.parameters()).device.type
    before = dict(start.named_parameters())
    with torch.autocast(device, enabled=False):
        parts = []
        adapters: set[str] = set()
        if is_adapted(student):
            for own, old in zip(adapter_products(student), adapter_products(start), strict=True):
                adapters.update(own.names)
                parts.append(_product_distance(own, old))
        for name, value in student.named_parameters():
            if value.requires_grad and name not in adapters:
                parts.append((at_least_float32(value) - at_least_float32(before[name].detach())).square().sum())
        return torch.stack(parts).sum()


def _product_distance(own: Product, old: Product) -> Tensor:
    """``||s B A - s0 B0 A0||^2``, without the products, which are as large as the weights."""
    left = torch.cat([own.scale * at_least_float32(own.b), -old.scale * at_least_float32(old.b.detach())], dim=1)
    right = torch.cat([at_least_float32(own.a), at_least_float32(old.a.detach())])  # (2 r, in)
    return ((left.T @ left) * (right @ right.T)).sum()
