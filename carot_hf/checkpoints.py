"""Which checkpoint a run can be resumed from: one whose manifest, written last, agrees with its files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_BLOCK = 1 << 20  # bytes read at a time


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Return the folders ``checkpoint-<step>`` in a run's folder, by step, complete or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def write_manifest(checkpoint: str | Path) -> None:
    """Write down size and checksum of every file of a checkpoint; the last thing that its saving does."""
    folder = Path(checkpoint)
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in _files(folder)}
    partial = folder / f"{MANIFEST_NAME}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST_NAME)


def damage_of(checkpoint: str | Path, *, checksums: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, ``None`` if nothing is.

    Args:
        checkpoint: Its folder.
        checksums: Read all files, a second or two for a gigabyte; ``False``: compare sizes only.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}: its saving was interrupted"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST_NAME} cannot be read ({type(error).__name__})"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes in place of {facts['bytes']:,}"
        if checksums and _checksum(path) != facts["blake2b"]:
            return f"{name} has another checksum than when it was saved"
    return None


def is_complete(checkpoint: Path) -> bool:
    """Tell whether the saving of a checkpoint came to its end and its files have their sizes."""
    return damage_of(checkpoint, checksums=False) is None


def rotate_checkpoints(
    output_dir: str | Path, limit: int | None, *, written: str | Path, best: str | Path | None = None
) -> None:
    """Delete complete checkpoints of the lowest steps until no more than a limit are left.

    Steps are what a run knows; the times of files are of whoever copied them. What is not complete neither counts nor
    goes.

    Args:
        output_dir: The run's folder.
        limit: How many to keep; ``None`` or 0: all.
        written: The checkpoint just written, which stays.
        best: The best one, which stays, too.
    """
    if not limit or limit < 0:
        return
    kept = {Path(folder).resolve() for folder in (written, best) if folder is not None and Path(folder).is_dir()}
    others = [
        folder for folder in checkpoint_folders(output_dir) if folder.resolve() not in kept and is_complete(folder)
    ]
    for folder in others[: max(0, len(others) - max(0, limit - len(kept)))]:
        logger.info("Deleting %s: %d checkpoints are kept.", folder, limit)
        shutil.rmtree(folder)


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raise a ValueError if a checkpoint is incomplete or damaged."""
    damage = damage_of(checkpoint)
    if damage is not None:
        raise ValueError(
            f"Expected a complete checkpoint in {checkpoint}, but {damage}. Resume from another one, or with "
            "`--resume_from_checkpoint` alone from the newest that is complete."
        )


def newest_complete_checkpoint(output_dir: str | Path) -> str:
    """Return the newest checkpoint that is complete and undamaged; log those that are passed over.

    Raises:
        ValueError: If there is none.
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        damage = damage_of(folder)
        if damage is None:
            return str(folder)
        logger.warning("Passing over %s: %s.", folder, damage)
    raise ValueError(
        f"Expected a complete checkpoint in {output_dir}, got none. Start without `resume_from_checkpoint`, or name "
        "the folder of the run as `output_dir`."
    )


def _files(folder: Path) -> list[Path]:
    ours = {MANIFEST_NAME, f"{MANIFEST_NAME}.partial"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ours)


def _facts(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "blake2b": _checksum(path)}


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
