"""per_image.safetensors: what a checkpoint answers to each image, beside metrics.json, so that runs can be compared.

A stranger may have written it: what does not fit is refused by name before it is taken into memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..basics.escape import shortened
from ..basics.whole_file import whole_file
from .home import METHODS
from .per_image import WHY, PerImage, ending_of

PER_IMAGE_NAME = "per_image.safetensors"
ENDINGS = ("", *METHODS.values())
LARGEST = 1 << 30  # bytes of a file
_FORMAT = "1"
_NAME = re.compile(r"[A-Za-z0-9_\-]{1,200}")
_FACT = re.compile(r"(names:|sizes:)?[0-9a-f]{64}")
_PARTS = {"confidence": "F32", "hit": "BOOL", "predicted": "I32", "label": "I32"}
_FLAWS = (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError)


def write_per_image(folder: str | Path, sets: Mapping[str, PerImage], method: str = "") -> Path:
    """Write what a checkpoint answers to each image, whole or not at all.

    Args:
        folder: Beside metrics.json.
        sets: By name, of an evaluation; one without the confidences of the method, as the set that it was fitted on, is
            left out.
        method: By which the checkpoint was calibrated after this evaluation; "": the confidences are as its logits are.
    Returns:
        The file.
    Raises:
        OSError: If it cannot be written.
    """
    return write_answers(folder, sets, ending_of(method))


def write_answers(folder: str | Path, sets: Mapping[str, PerImage], ending: str) -> Path:
    """The same by the ending of the confidences."""
    kept = {name: part for name, part in sets.items() if ending in part.confidences}
    tensors: dict[str, NDArray[Any]] = {}
    for name, part in kept.items():
        tensors[f"{name}.confidence"] = np.ascontiguousarray(part.confidences[ending], np.float32)
        tensors[f"{name}.hit"] = np.ascontiguousarray(part.hits)
        tensors[f"{name}.predicted"] = np.ascontiguousarray(part.predicted, np.int32)
        tensors[f"{name}.label"] = np.ascontiguousarray(part.labels, np.int32)
    facts = json.dumps({name: dict(part.facts) for name, part in kept.items()})
    place = Path(folder, PER_IMAGE_NAME)
    with whole_file(place) as beside:
        save_file(tensors, str(beside), {"format": _FORMAT, "ending": ending, "facts": facts})
    return place


def read_per_image(path: str | Path) -> tuple[dict[str, PerImage], str]:
    """Read the file: its sets by name, and the ending of their confidences, which they have under this one alone.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is none of `write_per_image`.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"Expected {PER_IMAGE_NAME} at {file}, found no file. Run `carot_hf evaluate` again.")
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        with safe_open(str(file), framework="numpy") as opened:
            return _read(opened)
    except _FLAWS as error:
        known = isinstance(error, ValueError) and not isinstance(error, (json.JSONDecodeError, UnicodeError))
        flaw = str(error) if known else f"it cannot be read ({type(error).__name__})"
        raise ValueError(
            f"Expected {PER_IMAGE_NAME} of an evaluation at {file}, but {flaw}. Run `carot_hf evaluate` again."
        ) from error


def _read(opened: Any) -> tuple[dict[str, PerImage], str]:
    """All of an open file; a ValueError says what is wrong with it."""
    said = opened.metadata() or {}
    if said.get("format") != _FORMAT:
        raise ValueError(f"it is of another format than {_FORMAT}: {shortened(said.get('format'))}")
    ending = said.get("ending")
    if ending not in ENDINGS:
        raise ValueError(f"`ending` is {shortened(ending)}")
    facts = json.loads(said.get("facts", "null"))
    if not isinstance(facts, dict) or not all(_NAME.fullmatch(name) for name in facts):
        raise ValueError("`facts` are not by the names of sets")
    wanted = {f"{name}.{part}" for name in facts for part in _PARTS}
    if odd := sorted(set(opened.keys()) ^ wanted):
        raise ValueError(f"it lacks, or should not have, `{shortened(odd[0])}`")
    return {name: _set(opened, name, ending, facts[name]) for name in facts}, ending


def _set(opened: Any, name: str, ending: str, facts: Any) -> PerImage:
    """One set."""
    if not isinstance(facts, dict) or not set(facts) <= set(WHY):
        raise ValueError(f"`facts` of set '{name}' are others than {list(WHY)}")
    rows = facts.get("n")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"`n` of set '{name}' is {shortened(rows)}")
    for key, value in facts.items():
        if key != "n" and not (isinstance(value, str) and _FACT.fullmatch(value)):
            raise ValueError(f"`{key}` of set '{name}' is {shortened(value)}")
    for part, kind in _PARTS.items():
        tensor = opened.get_slice(f"{name}.{part}")
        if tensor.get_shape() != [rows] or tensor.get_dtype() != kind:
            raise ValueError(
                f"`{name}.{part}` is {shortened(tensor.get_dtype())} of shape {shortened(str(tensor.get_shape()))} in "
                f"place of {kind} of [{rows}]"
            )
    confidences, hits, predicted, labels = (opened.get_tensor(f"{name}.{part}") for part in _PARTS)
    if not bool(((confidences >= 0) & (confidences <= 1)).all()):  # False of nan, too
        raise ValueError(f"`{name}.confidence` has values outside of [0, 1]")
    for part, values in (("predicted", predicted), ("label", labels)):
        if int(values.min()) < 0:
            raise ValueError(f"`{name}.{part}` has values below 0")
    if not np.array_equal(hits, predicted == labels):
        raise ValueError(f"`{name}.hit` is not where `predicted` is `label`")
    return PerImage({ending: confidences}, predicted, labels, facts)
