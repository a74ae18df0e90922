"""A checksum of a model's weights: what was computed from equal weights may be used again, from others never."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn


def tower_fingerprint(model: nn.Module) -> str:
    """Hash the parameters of the image tower and its projection, as float32: equal for a model and its classifier.

    Args:
        model: Of CLIP's kind; whatever belongs to texts, logits or a head does not count.
    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        if not name.startswith(("text_", "logit_", "head.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def fingerprint(model: nn.Module, leave_out: Sequence[str] = ()) -> str:
    """Hash names, shapes, dtypes and all values of the parameters and buffers.

    About a second for a gigabyte on a CPU.

    Args:
        model: Any model.
        leave_out: Names of tensors that do not count, such as ``"logit_scale"``.
    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in leave_out:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
