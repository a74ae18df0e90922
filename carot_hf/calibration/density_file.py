"""The two files of a density calibrator beside a model: numbers as JSON, the bank as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..basics.escape import shortened
from ..basics.tensor_files import tensors_flaw
from ..basics.whole_file import whole_file, write_whole
from .links import LINKS

NUMBERS_NAME, BANK_NAME = "calibrator.json", "calibrator.safetensors"
_FORMAT = 1
_LARGEST = 1e6  # of a number in the file


def write_calibrator(folder: str | Path, bank: Tensor, numbers: Mapping[str, Any]) -> None:
    """Write both files, each whole or not at all; the numbers last.

    Args:
        folder: It is made if it is not there.
        bank: ``(M, D)`` float16.
        numbers: JSON values.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with whole_file(place / BANK_NAME) as beside:
        save_file({"bank": bank.cpu().contiguous()}, str(beside), {"format": "pt"})
    write_whole(place / NUMBERS_NAME, json.dumps({"format": _FORMAT, **numbers}, indent=2) + "\n")


def read_calibrator(
    name: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Read bank and numbers, which may be a stranger's: nothing of them is run.

    Args:
        name: A folder, or the id of a model on the Hub.
        revision: Of the repository.
        token: For a private one.
    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is none of a calibrator.
    """
    place = Path(name)
    if place.is_dir():
        files = [place / NUMBERS_NAME, place / BANK_NAME]
    else:
        files = [_downloaded(str(name), file, revision, token) for file in (NUMBERS_NAME, BANK_NAME)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected a calibrator in {name}, found no {file.name}. Make one with `calibrate('density')`, and "
                "save the model after it."
            )
    flaw = tensors_flaw(files[1], None)
    found = {} if flaw else load_file(files[1])
    if flaw or set(found) != {"bank"} or found["bank"].dim() != 2 or found["bank"].dtype != torch.float16:
        raise _damaged(name, flaw or f"{BANK_NAME} holds something else than a float16 matrix `bank`")
    return found["bank"], _numbers(name, files[0], len(found["bank"]))


def _downloaded(repo: str, file: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file, revision=revision, token=token))  # numbers only
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"Expected a calibrator in {repo}, found no {file}: {error}") from error


def _numbers(name: str | Path, file: Path, rows: int) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(name, f"{file.name} cannot be read ({type(error).__name__})") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise _damaged(name, f"{file.name} is of another format than {_FORMAT}")
    if flaw := numbers_flaw(found, rows):
        raise _damaged(name, flaw)
    link, tower = found.get("link"), found.get("tower")
    if link not in list(LINKS) or not isinstance(tower, str | None):
        raise _damaged(name, f"`link` is {shortened(link)} and `tower` {shortened(tower)}")
    return {key: found[key] for key in ("k", "mu", "sigma", "a", "b", "link", "tower")}


def numbers_flaw(numbers: Mapping[str, Any], rows: int) -> str | None:
    """Return what is wrong with the numbers of a calibrator with a bank of so many rows; ``None`` if nothing is."""
    for key in ("mu", "sigma", "a", "b"):
        value: Any = numbers.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
        if not number or (key == "sigma" and value < 0):
            return f"`{key}` is {shortened(value)}"
    k: Any = numbers.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= rows:
        return f"`k` is {shortened(k)} with {rows} rows in the bank"
    return None


def _damaged(name: str | Path, flaw: str) -> ValueError:
    return ValueError(f"Expected a calibrator in {name}, but {flaw}. Make it anew with `calibrate('density')`.")
