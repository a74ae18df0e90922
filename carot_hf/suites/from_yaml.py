"""A suite of one's own data, described by a YAML file: `examples/suites/` has one with every key explained."""

from __future__ import annotations

import difflib
import logging
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..basics.escape import guarded
from ..basics.yaml_text import as_number, load_yaml, short
from ..data.captions import check_class_names, check_distinct
from ..data.columns import found_label_column, image_column, is_text, label_column
from ..data.labels import ClassNames, LabelNames, not_a_label
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite
from ..data.survey import survey
from .recommended import checked_arguments
from .rows import LAYOUTS, Opened, open_source, refuse_local_look
from .splits import as_set, split_off
from .tables import read_text

logger = guarded(logging.getLogger(__name__))

DEFAULT_TEMPLATES = ["a photo of a {}."]
HOLD_OUT_SEED = 0
_SHOWN = 10  # classes that a warning names

_NAMES = ((list, dict), "label_names: {n01: cat, n02: dog}")
_SET_KEYS = {
    "path": (str, "path: data/train"),
    "split": (str, "split: train"),
    "layout": (str, "layout: webdataset"),
    "image_column": (str, "image_column: image"),
    "label_column": (str, "label_column: label"),
    "label_names": _NAMES,
    "revision": (str, "revision: 0123456789abcdef0123456789abcdef01234567"),
}
_TEST_KEYS = {**_SET_KEYS, "name": (str, "name: home")}
_SHIFT_KEYS = {**_SET_KEYS, "columns": (list, "columns: [[0], [1, 2]]")}
_TRAIN_KEYS = {**_SET_KEYS, "caption_column": (str, "caption_column: text")}
_SUITE_KEYS = {
    "name": (str, "name: pets"),
    "version": (str, 'version: "1.0"'),
    "class_names": ((list, str), "class_names: [cat, dog]"),
    "label_names": _NAMES,
    "templates": ((list, str), 'templates: ["a photo of a {}."]'),
    "train": (dict, "train: {path: data/train}"),
    "validation": ((dict, float), "validation: 0.1"),
    "test": (dict, "test: {path: data/test}"),
    "shifts": (dict, "shifts: {sketch: {path: data/sketch}}"),
    "recommended": (dict, "recommended: {learning_rate: 1e-5}"),
    "allow_shared_files": (bool, "allow_shared_files: true"),
    "image_roots": (list, "image_roots: [/data/images]"),
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
    if not path.is_file():
        what = "a folder" if path.is_dir() else "something else" if path.exists() else "none"
        raise ValueError(f"Expected a YAML file, found {what} at {path}. Correct the path.")
    try:
        content = load_yaml(read_text(path, "YAML"))
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML in {path}, got {error}. Correct that line.") from error
    description = _checked(content, str(path), "", _SUITE_KEYS, _REQUIRED["suite"])
    recommended = checked_arguments(description.get("recommended", {}), f"{path}: recommended")
    reader = _Reader(path, description, streaming)
    train = reader.read("train", _TRAIN_KEYS)
    validation = description["validation"]
    if isinstance(validation, dict):
        held = reader.read("validation", _SET_KEYS)
    else:
        train, held = _held_out(train, validation, f"{path}: validation")
        _say_held_out(train, held, validation, reader.class_names)
    shifts = {}
    for name, value in description.get("shifts", {}).items():
        if not isinstance(name, str):
            raise ValueError(
                f"{path}: shifts: expected names that are text, got {name!r}. Quote it. Example: shifts: "
                f'{{"{name}": {{path: data/sketch}}}}'
            )
        _checked({"path": value} if value is None else value, str(path), f"shifts.{name}", _SHIFT_KEYS, ("path",))
        shifts[name] = reader.read(f"shifts.{name}", _SHIFT_KEYS)
    test = reader.read("test", _TEST_KEYS)
    suite = ShiftSuite(
        name=description.get("name", path.stem),
        class_names=reader.class_names,
        templates=_lines(description.get("templates", DEFAULT_TEMPLATES), path, "templates"),
        train=train,
        validation=held,
        test=test,
        shifts=shifts,
        recommended=recommended,
        version=description.get("version"),
        label_names=reader.label_names,
        allow_shared=description.get("allow_shared_files", False),
    )
    survey(suite)  # a training set that shares files with the test set is refused here
    return suite


class _Reader:
    """Opens the sets of one file; the class names come from the file, or else from the training set."""

    def __init__(self, path: Path, description: Mapping[str, Any], streaming: bool) -> None:
        self._path, self._description, self._streaming = path, description, streaming
        self._read: dict[str, str] = {}  # which set a file was read for
        self._roots = self._allowed(description.get("image_roots", []))
        self.label_names: LabelNames | None = description.get("label_names")
        names = description.get("class_names")
        if names is None and self.label_names is not None:
            given = self.label_names.values() if isinstance(self.label_names, Mapping) else self.label_names
            names = list(dict.fromkeys(given))
        self.class_names: list[str] = [] if names is None else _lines(names, path, "class_names")
        if self.class_names:
            self._fits("label_names", self.label_names)
            check_distinct(self.class_names)

    def read(self, key: str, keys: Mapping[str, Any]) -> ShiftSet:
        """Open the set under a key such as ``shifts.sketch``."""
        first, _, second = key.partition(".")
        content = self._description[first][second] if second else self._description[first]
        entry = _checked(content, str(self._path), key, keys, _REQUIRED["set"])
        name = entry.get("name", second or first)
        opened = self._open(key, entry, entry.get("split", first if not second else "test"))
        self._refuse_twice(key, entry, opened)
        rows, label = opened.rows, entry.get("label_column")
        if "caption_column" in entry and label is None and found_label_column(rows.features) is None:
            return self._captioned(opened, name, entry)
        if not self.class_names:
            self.class_names = _class_names_of(rows, label or label_column(rows), f"{self._path}: class_names")
            check_class_names(self.class_names)
        options = {"caption_column": entry["caption_column"]} if "caption_column" in entry else {}
        return as_set(
            rows,
            name=name,
            num_classes=len(self.class_names),
            label_names=self._names_for(key, entry),
            columns=entry.get("columns"),
            image=entry.get("image_column"),
            label=label,
            content=_content(entry),
            **self._places(opened),
            **options,
        )

    def _open(self, key: str, entry: Mapping[str, Any], split: str) -> Opened:
        words = re.split(r"[^a-z0-9]+", entry["path"].lower())
        if key in ("train", "validation") and "objectnet" in words:
            raise ValueError(
                f"{self._path}: {key}: expected data that may be trained and tuned on, got {entry['path']!r}. The "
                "terms of ObjectNet forbid it; use it under `shifts`. Example: path: data/train"
            )
        local = _there(self._path.parent, entry["path"])
        if local is None and Path(entry["path"]).exists():  # it would be read in place of a data set on the Hub
            raise ValueError(
                f"{self._path}: {key}.path: expected data at {(self._path.parent / entry['path']).resolve()}, found "
                f"none, but some at {Path(entry['path']).resolve()}. Paths are relative to the file's folder: correct "
                "it."
            )
        if local is None:
            try:
                refuse_local_look(entry["path"], self._path.parent)
            except ValueError as error:
                raise ValueError(f"{self._path}: {key}.path: {error}") from None
        layout = entry.get("layout")
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(
                f"{self._path}: {key}.layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}. Example: layout: "
                "webdataset"
            )
        return open_source(
            entry["path"] if local is None else local,
            split,
            layout=layout,
            streaming=self._streaming and key not in ("train", "validation"),
            revision=entry.get("revision"),
        )

    def _places(self, opened: Opened) -> dict[str, Any]:
        """Where the images of a set may be: its own folder, and those that the file allows."""
        places = opened.places
        if places["image_roots"] is not None:
            places["image_roots"] = places["image_roots"].and_more(self._roots)
        return places

    def _allowed(self, folders: list[Any]) -> list[Path]:
        """Further folders for images."""
        found = []
        for folder in folders:
            path = self._path.parent / Path(folder).expanduser() if isinstance(folder, str) and folder else None
            if path is None or not path.is_dir():
                raise ValueError(
                    f"{self._path}: image_roots: expected folders, got {short(folder)}. Paths are relative to the "
                    f"file's folder. Example: {_SUITE_KEYS['image_roots'][1]}"
                )
            logger.info("%s: tables may name images in %s, too.", self._path, path)
            found.append(path)
        return found

    def _refuse_twice(self, key: str, entry: Mapping[str, Any], opened: Opened) -> None:
        """Refuse files that another set has read: the same rows would be trained on and judged on."""
        before = next((self._read[file] for file in opened.files if file in self._read), None)
        self._read |= dict.fromkeys(opened.files, key)
        leaks = {before, key} == {"train", "test"}
        if before is None or (opened.named and not leaks) or self._description.get("allow_shared_files", False):
            return  # other sets that share files on purpose are warned of
        reason = "both are the same split of it" if opened.named else "nothing in it names a split"
        raise ValueError(
            f"{self._path}: {key}: expected other files than those of `{before}`, got the same: {entry['path']!r}, and "
            f"{reason}. Name a folder or file for each, folders such as train/ and test/ in it, or a share for "
            "`validation`; to judge on files that were seen on purpose, say `allow_shared_files: true`. Example: "
            "path: data/train"
        )

    def _names_for(self, key: str, entry: Mapping[str, Any]) -> Sequence[str] | ClassNames:
        """What the labels of a set may be called."""
        own, classes = entry.get("label_names"), len(self.class_names)
        labels = len(entry["columns"]) if "columns" in entry else classes
        if isinstance(own, list) and len(own) != labels:
            raise ValueError(
                f"{self._path}: {key}: Expected {labels} `label_names` for '{key.rpartition('.')[2]}', one for each of "
                f"its labels, got {len(own)}. Name all labels in order; for a set with labels of its own pass "
                "`columns` too."
            )
        if "columns" in entry:
            return [str(name) for name in own] if own is not None else ()
        return self._fits(f"{key}.label_names", self.label_names if own is None else own)

    def _fits(self, key: str, label_names: LabelNames | None) -> ClassNames:
        try:
            return ClassNames(self.class_names, label_names)
        except ValueError as error:
            raise ValueError(f"{self._path}: {key}: {error} Example: {_NAMES[1]}") from None

    def _captioned(self, opened: Opened, name: str, entry: Mapping[str, Any]) -> ShiftSet:
        """A set of images with captions and without labels."""
        if not self.class_names:
            raise ValueError(
                f"{self._path}: class_names: expected a list of names, got none, and the captions of the training set "
                "are no classes. Example: class_names: [cat, dog]"
            )
        image = entry.get("image_column") or image_column(opened.rows)
        return ShiftSet(
            opened.rows,
            name=name,
            num_classes=len(self.class_names),
            image_column=image,
            label_column=None,
            caption_column=entry["caption_column"],
            content=_content(entry),
            **self._places(opened),
        )


def _there(folder: Path, text: str) -> Path | None:
    """The path that a text means, relative to a folder, in whatever form of Unicode it was written; if it is there."""
    for form in (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)):
        path = (folder / Path(form).expanduser()).resolve()
        if path.exists():
            return path
    return None


def _content(entry: Mapping[str, Any]) -> str | None:
    """What tells the images of a set from those of another revision."""
    return f"{entry['path']}@{entry['revision']}" if "revision" in entry else None


def _class_names_of(rows: Any, label: str, where: str) -> list[str]:
    """Class names as a data set has them: those of a ``ClassLabel``, or the sorted texts of the label column."""
    feature = rows.features.get(label)
    if hasattr(feature, "names"):
        return list(feature.names)
    if is_text(feature):
        values = list(rows.with_format(None)[label])
        for row, value in enumerate(values):
            if (reason := not_a_label(value)) is not None or not value.strip():
                raise ValueError(f"{where}: expected a label in each row, got {reason or repr(value)} in row {row}.")
        return sorted(set(values))
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


def _say_held_out(kept: ShiftSet, held: ShiftSet, share: float, names: Sequence[str]) -> None:
    """Say of which classes another share than asked was held out: of each class at least one, and never the last."""
    if kept.labels is None or held.labels is None:
        return
    parts = [
        np.bincount(data.labels, minlength=len(names)).tolist() for data in (kept, held) if data.labels is not None
    ]
    given = [(name, part, rest + part) for name, rest, part in zip(names, *parts, strict=True)]
    others = [f"{part} of {whole} of {name!r}" for name, part, whole in given if part != round(share * whole)]
    if others:
        logger.warning(
            "%d of %d images are held out for `validation`, %g of each class but: %s%s.",
            len(held),
            len(held) + len(kept),
            share,
            ", ".join(others[:_SHOWN]),
            ", ..." if len(others) > _SHOWN else "",
        )


def _lines(value: list[Any] | str, path: Path, key: str) -> list[str]:
    """A list of strings; a string is the path of a file with one a line."""
    if isinstance(value, str):
        file = path.parent / value
        if not file.is_file():
            raise ValueError(f"{path}: {key}: expected a list or a file with one a line, found no file {file}.")
        return [line.strip() for line in read_text(file, "names").splitlines() if line.strip()]
    wrong = [item for item in value if not isinstance(item, str) or not item.strip()]
    if wrong or not value:
        raise ValueError(
            f"{path}: {key}: expected a list of strings, got {short(wrong[:1] or value)}. YAML reads some words as "
            f"numbers or booleans; quote them. Example: {_SUITE_KEYS[key][1]}"
        )
    return list(value)


def _checked(content: Any, file: str, key: str, keys: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """Return the mapping if its keys are known, of the right kind, and none is missing."""
    where = f"{file}: {key}" if key else file
    if not isinstance(content, dict):
        example = keys[required[0]][1]
        raise ValueError(f"{where}: expected a mapping of {', '.join(keys)}, got {short(content)}. Example: {example}")
    checked = {}
    for name, value in content.items():
        full = f"{file}: {key}.{name}" if key else f"{file}: {name}"
        if name not in keys:
            near = difflib.get_close_matches(str(name), keys, n=1)
            hint = f"Did you mean {near[0]!r}? Example: {keys[near[0]][1]}" if near else "Leave it out."
            line = getattr(content, "lines", {}).get(name)
            at = "" if line is None else f" in line {line}"
            raise ValueError(f"{full}: expected one of the keys {', '.join(keys)}, got {name!r}{at}. {hint}")
        kinds, example = keys[name]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        checked[name] = _as_kind(value, kinds)
        if checked[name] is None:
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise ValueError(f"{full}: expected {expected}, got {short(value)}. Example: {example}")
    for name in required:
        if name not in content:
            full = f"{file}: {key}.{name}" if key else f"{file}: {name}"
            raise ValueError(f"{full}: expected this key, got none. Example: {keys[name][1]}")
    return checked


def _as_kind(value: Any, kinds: tuple[type, ...]) -> Any:
    """A value as what is expected: a number in the place of text is the text that stands there; ``None`` if it is none.

    A person who writes ``validation: "0.1"`` or ``version: 2`` means what is expected.
    """
    if isinstance(value, bool):
        return value if bool in kinds else None
    if float in kinds and isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:  # a whole number beyond all floats
            return math.inf if value > 0 else -math.inf
    if float in kinds and isinstance(value, str) and (number := as_number(value)) is not None:
        return number
    if kinds == (str,) and isinstance(value, int | float):
        return value.text if hasattr(value, "text") else None
    if dict in kinds and isinstance(value, dict):
        return {getattr(name, "text", name): item for name, item in value.items()} if value else {}
    return value if isinstance(value, kinds) else None


_KINDS = {str: "text", list: "a list", dict: "a mapping", float: "a number", bool: "true or false"}
