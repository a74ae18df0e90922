"""Files of tensors, looked through before anything of them is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .escape import shortened


def tensors_flaw(path: str | Path, own: Mapping[str, Tensor] | None, extra: Iterable[str] = ()) -> str | None:
    """Return what is wrong with a file of tensors.

    Args:
        path: A safetensors file.
        own: The tensors that it is to be loaded into, by name; of those that share storage one name is enough.
            ``None``: only look whether all are finite.
        extra: Names that may be there, and are not read.
    """
    file = Path(path)
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        with safe_open(str(file), framework="pt") as opened:
            keys = set(opened.keys())
            if own is not None:
                twins = names_by_storage(own)
                if missing := [names[0] for names in twins if keys.isdisjoint(names)]:
                    return f"{file.name} lacks {len(missing)} of {len(twins)} tensors, e.g. `{missing[0]}`"
                if unknown := sorted(keys - own.keys() - set(extra)):
                    return f"{file.name} has `{shortened(unknown[0])}`, which the model does not know"
            for name in sorted(keys - set(extra)):
                tensor = opened.get_tensor(name)
                if own is not None and tensor.shape != own[name].shape:
                    return f"{file.name} has `{name}` of shape {_sizes(tensor)} in place of {_sizes(own[name])}"
                if own is not None and tensor.dtype != own[name].dtype:
                    return f"{file.name} has `{name}` in {tensor.dtype} in place of {own[name].dtype}"
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    return f"{file.name} has nan or inf in `{name}`"
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        return f"{file.name} cannot be read ({type(error).__name__})"
    return None


def names_by_storage(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of tensors, those together that are one tensor."""
    found: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), []).append(name)
    return list(found.values())


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
