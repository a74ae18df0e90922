"""A suite of one's own data, described by a YAML file: `examples/suites/` has one with every key explained."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .loading import LABEL_COLUMNS, image_column, label_column, open_rows
from .sets import ShiftSet, ShiftSuite
from .splits import as_set, split_off

DEFAULT_TEMPLATES = ["a photo of a {}."]
HOLD_OUT_SEED = 0

_SET_KEYS = {
    "path": (str, "path: data/train"),
    "split": (str, "split: train"),
    "layout": (str, "layout: webdataset"),
    "image_column": (str, "image_column: image"),
    "label_column": (str, "label_column: label"),
    "label_names": (list, "label_names: [cat, dog]"),
    "revision": (str, "revision: 0123456789abcdef0123456789abcdef01234567"),
}
_TEST_KEYS = {**_SET_KEYS, "name": (str, "name: home")}
_SHIFT_KEYS = {**_SET_KEYS, "columns": (list, "columns: [[0], [1, 2]]")}
_TRAIN_KEYS = {**_SET_KEYS, "caption_column": (str, "caption_column: text")}
_SUITE_KEYS = {
    "name": (str, "name: pets"),
    "version": (str, 'version: "1.0"'),
    "class_names": ((list, str), "class_names: [cat, dog]"),
    "templates": ((list, str), 'templates: ["a photo of a {}."]'),
    "train": (dict, "train: {path: data/train}"),
    "validation": ((dict, float), "validation: 0.1"),
    "test": (dict, "test: {path: data/test}"),
    "shifts": (dict, "shifts: {sketch: {path: data/sketch}}"),
    "recommended": (dict, "recommended: {learning_rate: 1.0e-5}"),
}
_REQUIRED = {"suite": ("train", "validation", "test"), "set": ("path",)}


def suite_from_file(path: str | Path, *, streaming: bool = False) -> ShiftSuite:
    """Load the suite that a YAML file describes.

    Args:
        path: The file. Relative paths in it are relative to its folder.
        streaming: Read the test set and the shifts as streams.
    Raises:
        ValueError: If a key is unknown, missing or of the wrong kind (the message names it, what is expected, and an
            example), or data are not as it says.
    """
    path = Path(path).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"Expected a YAML file, found none at {path}. Correct the path.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML in {path}, got {error}. Correct that line.") from error
    description = _checked(content, str(path), "", _SUITE_KEYS, _REQUIRED["suite"])
    reader = _Reader(path, description, streaming)
    train = reader.read("train", _TRAIN_KEYS)
    validation = description["validation"]
    if isinstance(validation, dict):
        held = reader.read("validation", _SET_KEYS)
    else:
        train, held = _held_out(train, validation, f"{path}: validation")
    shifts = {}
    for name, value in description.get("shifts", {}).items():
        if not isinstance(name, str):
            raise ValueError(
                f"{path}: shifts: expected names that are text, got {name!r}. YAML reads some words as numbers or "
                f'booleans; quote them. Example: shifts: {{"{name}": {{path: data/sketch}}}}'
            )
        _checked({"path": value} if value is None else value, str(path), f"shifts.{name}", _SHIFT_KEYS, ("path",))
        shifts[name] = reader.read(f"shifts.{name}", _SHIFT_KEYS)
    test = reader.read("test", _TEST_KEYS)
    return ShiftSuite(
        name=description.get("name", path.stem),
        class_names=reader.class_names,
        templates=_lines(description.get("templates", DEFAULT_TEMPLATES), path, "templates"),
        train=train,
        validation=held,
        test=test,
        shifts=shifts,
        recommended=dict(description.get("recommended", {})),
        version=description.get("version"),
    )


class _Reader:
    """Opens the sets of one file; the class names come from the file, or else from the training set."""

    def __init__(self, path: Path, description: Mapping[str, Any], streaming: bool) -> None:
        self._path, self._description, self._streaming = path, description, streaming
        names = description.get("class_names")
        self.class_names: list[str] = [] if names is None else _lines(names, path, "class_names")

    def read(self, key: str, keys: Mapping[str, Any]) -> ShiftSet:
        """Open the set under a key such as ``shifts.sketch``."""
        first, _, second = key.partition(".")
        content = self._description[first][second] if second else self._description[first]
        entry = _checked(content, str(self._path), key, keys, _REQUIRED["set"])
        name = entry.get("name", second or first)
        words = re.split(r"[^a-z0-9]+", entry["path"].lower())
        if first in ("train", "validation") and "objectnet" in words:
            raise ValueError(
                f"{self._path}: {key}: expected data that may be trained and tuned on, got {entry['path']!r}. The "
                "terms of ObjectNet forbid it; use it under `shifts`. Example: path: data/train"
            )
        local = (self._path.parent / Path(entry["path"]).expanduser()).resolve()
        if not local.exists() and Path(entry["path"]).exists():  # it would be read in place of a data set on the Hub
            raise ValueError(
                f"{self._path}: {key}.path: expected data at {local}, found none, but some at "
                f"{Path(entry['path']).resolve()}. Paths are relative to the file's folder: correct it."
            )
        stream = self._streaming and first not in ("train", "validation")
        rows = open_rows(
            local if local.exists() else entry["path"],
            entry.get("split", first if not second else "test"),
            layout=entry.get("layout"),
            streaming=stream,
            revision=entry.get("revision"),
        )
        label = entry.get("label_column")
        if "caption_column" in entry and label is None and not any(name in rows.features for name in LABEL_COLUMNS):
            return self._captioned(rows, name, entry)
        if not self.class_names:
            self.class_names = _names_of(rows, label or label_column(rows), f"{self._path}: class_names")
        options = {"caption_column": entry["caption_column"]} if "caption_column" in entry else {}
        options["content"] = _content(entry)
        return as_set(
            rows,
            name=name,
            num_classes=len(self.class_names),
            label_names=entry.get("label_names", () if "columns" in entry else self.class_names),
            columns=entry.get("columns"),
            image=entry.get("image_column"),
            label=label,
            **options,
        )

    def _captioned(self, rows: Any, name: str, entry: Mapping[str, Any]) -> ShiftSet:
        """A set of images with captions and without labels."""
        if not self.class_names:
            raise ValueError(
                f"{self._path}: class_names: expected a list of names, got none, and the captions of the training set "
                "are no classes. Example: class_names: [cat, dog]"
            )
        image = entry.get("image_column") or image_column(rows)
        return ShiftSet(
            rows,
            name=name,
            num_classes=len(self.class_names),
            image_column=image,
            label_column=None,
            caption_column=entry["caption_column"],
            content=_content(entry),
        )


def _content(entry: Mapping[str, Any]) -> str | None:
    """What tells the images of a set from those of another revision."""
    return f"{entry['path']}@{entry['revision']}" if "revision" in entry else None


def _names_of(rows: Any, label: str, where: str) -> list[str]:
    """Class names as a data set has them: those of a ``ClassLabel``, or the sorted texts of the label column."""
    feature = rows.features.get(label)
    if hasattr(feature, "names"):
        return list(feature.names)
    if getattr(feature, "dtype", None) == "string":
        return [str(name) for name in np.unique(rows.with_format(None)[label])]
    raise ValueError(
        f"{where}: expected a list of names, got none, and the training set has only numbers as labels. "
        "Example: class_names: [cat, dog]"
    )


def _held_out(train: ShiftSet, share: float, where: str) -> tuple[ShiftSet, ShiftSet]:
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"{where}: expected a share of the training set in (0, 1), or a set, got {share}. Example: validation: 0.1"
        )
    return split_off(train, share, HOLD_OUT_SEED)


def _lines(value: list[Any] | str, path: Path, key: str) -> list[str]:
    """A list of strings; a string is the path of a file with one a line."""
    if isinstance(value, str):
        file = path.parent / value
        if not file.is_file():
            raise ValueError(f"{path}: {key}: expected a list or a file with one a line, found no file {file}.")
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = [item for item in value if not isinstance(item, str) or not item.strip()]
    if wrong or not value:
        raise ValueError(
            f"{path}: {key}: expected a list of strings, got {wrong[:1] or value}. YAML reads some words as numbers or "
            f"booleans; quote them. Example: {_SUITE_KEYS[key][1]}"
        )
    return list(value)


def _checked(content: Any, file: str, key: str, keys: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """Return the mapping if its keys are known, of the right kind, and none is missing."""
    where = f"{file}: {key}" if key else file
    if not isinstance(content, dict):
        example = keys[required[0]][1]
        raise ValueError(f"{where}: expected a mapping of {', '.join(keys)}, got {content!r}. Example: {example}")
    for name, value in content.items():
        full = f"{file}: {key}.{name}" if key else f"{file}: {name}"
        if name not in keys:
            near = difflib.get_close_matches(str(name), keys, n=1)
            hint = f"Did you mean {near[0]!r}? Example: {keys[near[0]][1]}" if near else "Leave it out."
            raise ValueError(f"{full}: expected one of the keys {', '.join(keys)}, got {name!r}. {hint}")
        kinds, example = keys[name]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise ValueError(f"{full}: expected {expected}, got {value!r}. Example: {example}")
    for name in required:
        if name not in content:
            full = f"{file}: {key}.{name}" if key else f"{file}: {name}"
            raise ValueError(f"{full}: expected this key, got none. Example: {keys[name][1]}")
    return dict(content)


_KINDS = {str: "text", list: "a list", dict: "a mapping", float: "a number with a point"}
