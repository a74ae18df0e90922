"""What lies in a folder of data: files that count, splits that are named, classes.

Nothing is opened. A split is named by a folder or a file as `datasets` recognises it, in any case: train, training;
validation, valid, val, dev; test, testing, eval. Classes are the folders of the first level below the folder, or below
the folder of the split.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..basics.escape import guarded
from ..data.images import is_image_name

logger = guarded(logging.getLogger(__name__))

_SHOWN = 5  # names that a warning lists

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
LEFT_BY_OTHERS = {"__MACOSX", "$RECYCLE.BIN", "@eaDir", "System Volume Information", "lost+found"}


class Found(NamedTuple):
    """The files of a split.

    Attributes:
        layout: ``"folders"``, or that of the files.
        files: Sorted; of ``folders`` the images.
        classes: Of ``folders`` the class of each image.
        named: Whether the split was recognised; else these are all files there are.
    """

    layout: str
    files: list[Path]
    classes: list[str]
    named: bool


def walk(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted; links to folders are followed, each folder once.

    What is hidden does not count, nor what systems and programs leave behind.

    Raises:
        ValueError: If a folder cannot be read: its images would be missing in silence.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in LEFT_BY_OTHERS]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _refuse_unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise ValueError(
            f"Expected a folder that can be read at {error.filename}, got {error.strerror}. Change its permissions, or "
            "take it away."
        ) from error


def split_of(name: str) -> str | None:
    """Return the split that a name speaks of, ``None`` if of none or of several."""
    words = set(re.split(r"[\W\d_]+", name.lower()))
    found = [split for split, called in SPLITS.items() if words & set(called)]
    return found[0] if len(found) == 1 else None


def asked_split(split: str) -> str:
    """Return a split by its first name: ``val`` is ``validation``."""
    return next((name for name, called in SPLITS.items() if split.lower() in called), split.lower())


def files_of_split(folder: Path, files: Sequence[Path], split: str) -> tuple[list[Path], bool]:
    """Choose the files whose path below a folder names a split, and say whether any does.

    A path names one split at most, or the same rows would be trained on and judged on: that of the last part of it, the
    file's name first, which names one and no other.
    """
    asked = asked_split(split)

    def named(path: Path) -> str | None:
        for part in reversed(path.relative_to(folder).parts):
            if asked not in SPLITS and asked in re.split(r"[._-]", part.lower()):
                return asked
            if (found := split_of(part)) is not None:
                return found
        return None

    names = [named(path) for path in files]
    if not any(names):
        return list(files), False
    if nameless := [path.name for path, name in zip(files, names, strict=True) if name is None]:
        logger.warning("%s: files that name no split are passed over: %s.", folder, nameless[:_SHOWN])
    return [path for path, name in zip(files, names, strict=True) if name == asked], True


def images_of_split(folder: Path, images: Iterable[Path], split: str) -> Found | None:
    """Choose the images of a split and their classes; ``None`` if there are no folders of images.

    The split is named by the folder above those of the classes; else, if for every image, by a folder below that of
    its class, or by the file's name.

    Raises:
        ValueError: If it cannot be told which folders are splits and which are classes.
    """
    asked = asked_split(split)
    all_of_them = [path.relative_to(folder) for path in images]
    inner = [path for path in all_of_them if len(path.parts) > 1]
    if not inner:
        return None
    if loose := len(all_of_them) - len(inner):
        logger.warning("%s: %d images that are in no folder of a class are passed over.", folder, loose)
    direct = {path.parts[0] for path in inner if len(path.parts) == 2}
    deep = {path.parts[0] for path in inner if len(path.parts) > 2}
    tops = {path.parts[0]: _split_named(path.parts[0], asked) for path in inner}
    nested = {top for top in deep if tops[top] is not None}
    others = tops.keys() - nested
    if all(tops.values()) and direct - nested:
        raise ValueError(
            f"Expected one folder of images for each class in {folder / min(direct)}, got images. Sort them into "
            "folders by class, or describe them in a table: metadata.csv with file_name and label."
        )
    if nested and others & direct:
        raise ValueError(
            f"Expected folders of splits, or of classes, in {folder}, got {sorted(nested)} of splits beside "
            f"{sorted(others)} with images. Name the folder of each set as its path, e.g. {folder / min(nested)}."
        )
    if nested:
        if others:
            logger.warning("%s: folders that name no split are passed over: %s.", folder, sorted(others))
        chosen = [path for path in inner if path.parts[0] in nested and tops[path.parts[0]] == asked]
        stray = [path for path in chosen if len(path.parts) == 2]
        if stray:
            logger.warning("%s: %d images outside of the folders of classes are passed over.", folder, len(stray))
        chosen = [path for path in chosen if len(path.parts) > 2]
        return Found("folders", [folder / path for path in chosen], [path.parts[1] for path in chosen], True)
    below = [_last_split(path.parts[1:-1], asked) for path in inner]
    if not all(below):
        below = [_split_named(path.stem, asked) for path in inner]
    if all(below):
        inner = [path for path, name in zip(inner, below, strict=True) if name == asked]
    return Found("folders", [folder / path for path in inner], [path.parts[0] for path in inner], all(below))


def images_in(files: Iterable[Path]) -> list[Path]:
    """Keep the files that are images by their suffix."""
    return [path for path in files if is_image_name(path.name)]


def _split_named(name: str, asked: str) -> str | None:
    return asked if asked not in SPLITS and name.lower() == asked else split_of(name)


def _last_split(parts: Sequence[str], asked: str) -> str | None:
    return next((found for part in reversed(parts) if (found := _split_named(part, asked)) is not None), None)
