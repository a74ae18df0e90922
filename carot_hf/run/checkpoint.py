"""Which checkpoint a run can be resumed from: one whose manifest, written last, agrees with its files."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..basics.escape import guarded
from ..basics.whole_file import write_whole

logger = guarded(logging.getLogger(__name__))

MANIFEST_NAME = "manifest.json"
Flaw = Callable[[Path], str | None]
_BLOCK = 1 << 20  # bytes read at a time


def _none(folder: Path) -> None:
    return None


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Return the folders ``checkpoint-<step>`` in a run's folder, by step, complete or not."""
    found = [(step_of(path), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def step_of(checkpoint: str | Path) -> int | None:
    """Return the step that the name of a checkpoint's folder says, ``None`` if it says none."""
    found = re.fullmatch(r"checkpoint-([0-9]{1,18})", Path(checkpoint).name)
    return None if found is None else int(found[1])


def write_manifest(checkpoint: str | Path) -> None:
    """Write down size and checksum of every file of a checkpoint; the last thing that its saving does."""
    folder = Path(checkpoint)
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in _files(folder)}
    write_whole(folder / MANIFEST_NAME, json.dumps({"files": files}, indent=1))


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
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}: its saving was interrupted"
    except (OSError, ValueError, RecursionError) as error:
        return f"its {MANIFEST_NAME} cannot be read ({type(error).__name__})"
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        return f"its {MANIFEST_NAME} has no list of `files`"
    for name, facts in files.items():
        size, checksum = (facts.get("bytes"), facts.get("blake2b")) if isinstance(facts, dict) else (None, None)
        if not _is_below(name) or isinstance(size, bool) or not isinstance(size, int) or not isinstance(checksum, str):
            return f"its {MANIFEST_NAME} says nothing that can be of {name[:80]!r}"
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes in place of {size:,}"
            if checksums and _checksum(path) != checksum:
                return f"{name} has another checksum than when it was saved"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({type(error).__name__})"
    return None


def listed_files(checkpoint: str | Path) -> list[str]:
    """Return the files that the manifest of a complete checkpoint lists, and the manifest, by their names in it.

    Raises:
        ValueError: If it is incomplete.
    """
    folder = Path(checkpoint)
    if (damage := damage_of(folder, checksums=False)) is not None:
        raise ValueError(f"Expected a complete checkpoint in {folder} to publish, but {damage}.")
    listed: dict[str, object] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    return [*listed, MANIFEST_NAME]


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


def check_checkpoint(checkpoint: str | Path, flaw: Flaw = _none) -> None:
    """Raise a ValueError if a checkpoint is incomplete or damaged.

    Args:
        checkpoint: Its folder.
        flaw: Says what else may be wrong with a complete one, ``None`` if nothing is.
    """
    damage = damage_of(checkpoint) or flaw(Path(checkpoint))
    if damage is not None:
        raise ValueError(
            f"Expected a complete checkpoint in {checkpoint}, but {damage}. Resume from another one, or with "
            "`--resume_from_checkpoint` alone from the newest that is complete; or start a new run from these weights: "
            "load the model from that folder and train without `resume_from_checkpoint`."
        )


def newest_complete_checkpoint(output_dir: str | Path, flaw: Flaw = _none) -> str:
    """Return the newest checkpoint that is complete and undamaged; log those that are passed over.

    Args:
        output_dir: The run's folder.
        flaw: As for `check_checkpoint`.
    Raises:
        ValueError: If there is none.
    """
    found = []
    for folder in reversed(checkpoint_folders(output_dir)):
        damage = damage_of(folder) or flaw(folder)
        if damage is None:
            return str(folder)
        logger.warning("Passing over %s: %s.", folder, damage)
        found.append(f"{folder.name}: {damage}")
    raise ValueError(
        f"Expected a complete checkpoint in {output_dir}, got none{f' ({found[0]})' if found else ''}. Start without "
        "`resume_from_checkpoint`, or name the folder of the run as `output_dir`."
    )


def _is_below(name: str) -> bool:
    """Whether a name in a manifest is that of a file in its folder, or in one below."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _files(folder: Path) -> list[Path]:
    hidden = (".", MANIFEST_NAME)  # what was being written
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(hidden))


def _facts(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "blake2b": _checksum(path)}


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
