"""What of a run's folder goes to the Hub: a list that is made, not what happens to lie there."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import huggingface_hub

from ..basics.whole_file import files_below

CARD_NAME = "README.md"
METRICS_NAME = "metrics.json"
_OF_A_MODEL = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
_OURS = ("teacher.safetensors", "start.safetensors", "beside_adapters.safetensors")  # in a checkpoint, beside the model


def published_files(folder: str | Path, names: Iterable[str]) -> list[str]:
    """Return those of the names that are files of a folder: regular ones, that no link leads to.

    Args:
        folder: Of the run.
        names: Relative to it.
    """
    place = Path(folder)
    found = dict.fromkeys(names)
    return [name for name in found if not _is_linked(place, name) and (place / name).is_file()]


def asked_files(folder: str | Path, names: Sequence[str]) -> list[str]:
    """Return what a user wants to publish beside the rest, of a folder all files in it.

    Raises:
        ValueError: If there is no such file, or it is a link or lies elsewhere.
    """
    place, found = Path(folder), []
    for name in names:
        path = place / name
        below = not PurePath(name).is_absolute() and ".." not in PurePath(name).parts and PurePath(name).parts
        if not below or _is_linked(place, name) or not (path.is_file() or path.is_dir()):
            raise ValueError(
                f"Expected files or folders in {folder} to publish beside the model, got {str(name)!r}, which is none "
                "of these or a link. Copy it there."
            )
        inside = [f"{PurePath(name).as_posix()}/{part}" for part in files_below(path)]
        found += published_files(place, inside) if path.is_dir() else [PurePath(name).as_posix()]
    return found


def copy_model(checkpoint: str | Path, folder: str | Path) -> None:
    """Copy the model of a checkpoint, without what is ours to go on with."""
    for pattern in _OF_A_MODEL:
        for path in sorted(Path(checkpoint).glob(pattern)):
            if path.name not in _OURS and path.is_file() and not path.is_symlink():
                shutil.copy(path, Path(folder, path.name))


def upload(folder: str | Path, names: Sequence[str], **options: Any) -> Any:
    """Send files of a folder to a repository on the Hub in one commit.

    Args:
        folder: Of the run.
        names: Of `published_files`.
        **options: As for ``HfApi.upload_folder``.
    """
    api = huggingface_hub.HfApi(library_name="carot_hf")
    return api.upload_folder(folder_path=folder, allow_patterns=[glob.escape(name) for name in names], **options)


def _is_linked(folder: Path, name: str) -> bool:
    """Whether a link is on the way from a folder to a file in it."""
    path = folder
    for part in PurePath(name).parts:
        path = path / part
        if path.is_symlink():
            return True
    return False
