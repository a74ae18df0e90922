"""Class embeddings that outlive the process: ImageNet's 80,000 captions take minutes on a CPU, the file milliseconds.

They lie in the cache of the Hub's libraries (``HF_HOME``), by a hash of all that they are made of.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..basics.escape import guarded
from ..basics.whole_file import whole_file
from ..data.captions import CaptionTable, class_embeddings

logger = guarded(logging.getLogger(__name__))

FEWEST = 1_000  # captions: fewer are embedded in a second
MOST_FILES = 32  # the oldest go
_NAME = "classes"


def kept_class_embeddings(model: Any, captions: CaptionTable, folder: str | Path | None = None) -> Tensor:
    """Return `class_embeddings`, from a file if they were made of the same before, into one if there are many captions.

    Args:
        model: A ``CLIPModel`` or one of its relatives.
        captions: The table of captions.
        folder: Of the files; ``None``: ``carot_hf/classes`` in the cache of the Hub's libraries. What cannot be read
            or written there is made anew.
    Returns:
        ``(K, D)`` in at least float32 on the model's device, rows of length 1.
    """
    if captions.lengths.numel() < FEWEST:
        return class_embeddings(model, captions)
    device = model.logit_scale.device
    place = Path(constants.HF_HOME, "carot_hf", "classes") if folder is None else Path(folder)
    path = place / f"{_hash_of(model, captions)}.safetensors"
    found = _read(path, len(captions.lengths))
    if found is not None:
        logger.info("The class embeddings of %d captions are read from %s.", captions.lengths.numel(), path)
        return found.to(device)
    made = class_embeddings(model, captions)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as beside:
            save_file({_NAME: made.cpu().contiguous()}, beside)
        for old in sorted(place.glob(f"{'[0-9a-f]' * 64}.safetensors"), key=os.path.getmtime)[:-MOST_FILES]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # no room, no permission, or another process does the same
        logger.info("The class embeddings are not kept: %s", error)
    return made


def _read(path: Path, classes: int) -> Tensor | None:
    """What a file holds, if it holds unit rows for so many classes."""
    try:
        found = load_file(path).get(_NAME) if path.is_file() else None
    except (OSError, SafetensorError):
        return None
    if found is None or found.dim() != 2 or len(found) != classes or not bool(torch.isfinite(found).all()):
        return None
    lengths = found.double().norm(dim=-1)
    return found if torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5) else None


def _hash_of(model: Any, captions: CaptionTable) -> str:
    """SHA-256 of the weights of the text side, the tokens, the device's kind and the libraries that compute."""
    # Of the first caption the shape says whether captions are padded, the names whether there is a mask.
    first = captions.lookup(torch.tensor([0]), torch.tensor([0]))
    tensors = {name: value for name, value in model.state_dict().items() if "text_" in name}
    versions = f"{torch.__version__} {transformers.__version__} {model.logit_scale.device.type}"
    said = hashlib.sha256(f"{type(model).__name__} {versions} {model.config.text_config}".encode())
    for name, value in {**tensors, "all": captions.input_ids, "lengths": captions.lengths, **first}.items():
        said.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        said.update(value.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return said.hexdigest()
