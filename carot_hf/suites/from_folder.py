"""A suite of one's own data in a folder: a folder each for the training set, the test set, and every shifted set."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..basics.escape import guarded
from ..basics.yaml_text import load_yaml
from ..data.images import is_image_name
from ..data.suite import ShiftSuite, check_set_names
from .folders import LEFT_BY_OTHERS, SPLITS, asked_split, images_in, split_of, walk
from .from_yaml import suite_from_description, suite_from_file
from .tables import METADATA, SUFFIXES, read_text

logger = guarded(logging.getLogger(__name__))

HELD_OUT = 0.1  # of each class of the training set, where there is no validation set
_SHOWN = 8  # names that a message lists
_TABLES = (".parquet", ".arrow", ".tar")
_SAVED = ("dataset_dict.json", "state.json")  # of `save_to_disk`
_LAYOUT = (
    "a folder test/ and, to train, train/, each with one folder of images a class (or a table); validation/ and any "
    "shifted sets beside them"
)


def suite_from_folder(path: str | Path, *, streaming: bool = False) -> ShiftSuite:
    """Load the suite that lies in a folder.

    ``train/``, ``validation/`` (val, valid, dev) and ``test/`` (testing, eval) are what they are called, in any case.
    Every other folder with images in folders of classes, with ``metadata.csv``, parquet, arrow or tars is a shifted set
    of its name. Each holds what a ``path`` of a YAML file may hold: one folder a class, or a table. Without
    ``validation/`` a tenth of each class of ``train/`` is held out; without ``train/`` the suite is evaluated only. The
    class names are the folders of ``train/``, or else of ``test/``. What begins with "." does not count.

    A YAML file of a suite in the folder says all of this instead: ``suite.yaml``, or the only one there is.

    Args:
        path: The folder.
        streaming: Read the test set and the shifts as streams.
    Raises:
        ValueError: If the folder has no test set, does not say which folder is what, or data cannot be read.
    """
    folder, where = Path(path).expanduser(), str(path)
    if not folder.is_dir():
        raise ValueError(f"Expected a folder with {_LAYOUT}, found none at {where}. Correct the path.")
    if (file := _yaml_in(folder, where)) is not None:
        logger.info("%s: the suite is read from %s.", where, file.name)
        return suite_from_file(file, streaming=streaming)
    description = describe(folder, where)
    return suite_from_description(
        description,
        where,
        folder,
        name=os.path.basename(os.path.abspath(folder)) or "suite",
        streaming=streaming,
        hint=f" Or say in {os.path.join(where, 'suite.yaml')} what folders cannot: `label_names`, `columns`, `split`, "
        "... A folder that is no set is passed over if its name begins with '.'.",
    )


def describe(folder: Path, where: str) -> dict[str, Any]:
    """Return what a YAML file would say of a folder, which errors call ``where``.

    Raises:
        ValueError: If it has no test set, or does not say which folder is what.
    """
    folders, files = _listed(folder, where)
    roles = _roles(folders, where)
    others = [name for name in folders if name not in roles.values()]
    if "test" not in roles:
        raise ValueError(_no_test_set(folder, where, roles, others, files))
    shifts = _shifts(folder, others, where)
    if data := [name for name in files if is_image_name(name) or name.lower().endswith((*SUFFIXES, *_TABLES))]:
        logger.warning("%s: files beside the folders of the sets are passed over: %s.", where, _some(data))
    entries: dict[str, Any] = {role: {"path": name} for role, name in roles.items()}
    if "train" in roles and "validation" not in roles:
        logger.info("%s: without a folder validation/, %g of each class of train/ is held out.", where, HELD_OUT)
        entries["validation"] = HELD_OUT
    return {**entries, "shifts": {name: {"path": place} for name, place in shifts.items()}}


def _yaml_in(folder: Path, where: str) -> Path | None:
    """The YAML file of the suite in a folder, if there is one.

    Raises:
        ValueError: If there are several.
    """
    found = sorted(path for path in _entries(folder, where) if path.suffix in (".yaml", ".yml") and path.is_file())
    named = [path for path in found if path.stem == "suite"]
    chosen = named or [path for path in found if not path.name.startswith(".") and _is_suite(path)]
    if len(chosen) > 1:
        raise ValueError(
            f"Expected one YAML file of a suite in {where}, got {_some([path.name for path in chosen])}. Name the file "
            f"in place of the folder: {chosen[0]}."
        )
    return chosen[0] if chosen else None


def _is_suite(path: Path) -> bool:
    """Whether a YAML file describes sets, and not something else."""
    try:
        content = load_yaml(read_text(path, "YAML"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    sets = [content.get(role) for role in ("train", "test")] if isinstance(content, Mapping) else []
    return any(isinstance(entry, Mapping) and "path" in entry for entry in sets)


def _entries(folder: Path, where: str) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ValueError(
            f"Expected a folder that can be read at {where}, got {error.strerror}. Change its permissions."
        ) from error


def _listed(folder: Path, where: str) -> tuple[list[str], list[str]]:
    """Names of folders and of files that count; links that lead back to the folder, or above it, do not."""
    real = os.path.realpath(folder)
    names: tuple[list[str], list[str]] = ([], [])
    for path in sorted(_entries(folder, where)):
        if path.name.startswith(".") or path.name in LEFT_BY_OTHERS:
            continue
        to = os.path.realpath(path)
        if path.is_dir() and os.path.join(real, "").startswith(os.path.join(to, "")):
            logger.warning("%s: %r leads back to the folder itself, or above it, and is passed over.", where, path.name)
        else:
            names[0 if path.is_dir() else 1].append(path.name)
    return names


def _roles(folders: Sequence[str], where: str) -> dict[str, str]:
    """Which folder is which split.

    Raises:
        ValueError: If two are the same one, or one may be a split or none.
    """
    roles: dict[str, str] = {}
    for name in folders:
        role, spoken = asked_split(name), split_of(name)
        if role in roles:
            raise ValueError(
                f"Expected one folder for the {role} set in {where}, got {roles[role]!r} and {name!r}. Keep one; give "
                f"the other a name that is none of {', '.join(SPLITS[role])}, and it is a shifted set."
            )
        if role in SPLITS:
            roles[role] = name
        elif spoken in ("train", "validation"):
            raise ValueError(
                f"Expected a folder for the {spoken} set in {where} that is called {' or '.join(SPLITS[spoken])}, got "
                f"{name!r}, which may be it, or a shifted set. Rename it."
            )
    return roles


def _shifts(folder: Path, others: Sequence[str], where: str) -> dict[str, str]:
    """The folders that are shifted sets, by the names of the sets.

    Raises:
        ValueError: If one cannot be called as it is.
    """
    shifts: dict[str, str] = {}
    passed_over = []
    for place in others:
        if not _is_set(folder / place):
            passed_over.append(place)
            continue
        name = re.sub(r"[\x00-\x7f]", lambda sign: sign[0] if re.match(r"[\w-]", sign[0]) else "_", place)
        name = re.sub("__+", "_", name).strip("_") if name != place else name
        try:
            check_set_names(["test", *shifts, name])
            if place.startswith("~"):
                raise ValueError("It would be read as somebody's home.")
        except ValueError as error:
            raise ValueError(
                f"Expected a folder whose name a set can have in {where}, got {place!r}. {error} Rename the folder; it "
                "is passed over if its name begins with '.'."
            ) from error
        if name != place:
            logger.info("%s: the set in %r is called %s.", where, place, name)
        shifts[name] = place
    if passed_over:
        logger.warning(
            "%s: folders without images in folders of classes, or metadata.csv, are passed over: %s.",
            where,
            _some(passed_over),
        )
    return shifts


def _is_set(folder: Path) -> bool:
    """Whether a folder holds images in folders of classes, or rows."""
    inside = walk(folder)
    if any(path.parent == folder and path.name in _SAVED for path in inside):
        return True
    if any(path.name.lower() in METADATA or path.suffix.lower() in _TABLES for path in inside):
        return True
    return any(path.parent != folder for path in images_in(inside))


def _no_test_set(
    folder: Path, where: str, roles: Mapping[str, str], others: Sequence[str], files: Sequence[str]
) -> str:
    """What is wrong with a folder without a test set, and what to do."""
    expected = f"Expected {_LAYOUT} in {where}"
    direct = [name for name in others if any(path.parent == folder / name for path in images_in(walk(folder / name)))]
    if roles:
        found = _some([*roles.values(), *others])
        return (
            f"Expected a test set in {where}: a folder {', '.join(SPLITS['test'])}; got the folders {found}. Name the "
            "folder of the test images test/, or move a part of the images that are not trained on there."
        )
    if direct:
        return (
            f"{expected}, got folders with images directly in them, as if each were a class: {_some(direct)}. Move "
            f"them into {os.path.join(where, 'train')}, and a part of their images, which is not trained on, into the "
            f"same folders in {os.path.join(where, 'test')}."
        )
    if len(others) == 1 and any(asked_split(path.name) in SPLITS for path in _entries(folder / others[0], others[0])):
        inner = os.path.join(where, others[0])
        return f"{expected}, got one folder, {others[0]!r}, which holds such folders. Did you mean {inner}?"
    if others or files:
        kinds = [f"the {kind} {_some(names)}" for kind, names in (("folders", others), ("files", files)) if names]
        return f"{expected}, got {' and '.join(kinds)}. Name the folders so, or describe them in a YAML file."
    return f"{expected}, got an empty folder. Correct the path."


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{', '.join(map(repr, names[:_SHOWN]))}{more}"
