"""The manifest of a folder: names, sizes and checksums of its files, written last; without it the folder counts not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath

from .whole_file import write_whole

MANIFEST_NAME = "manifest.json"
_BLOCK = 1 << 20  # bytes read at a time


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
