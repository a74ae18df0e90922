"""A suite of one's own data, described by a YAML file: `examples/suites/` has one with every key explained."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..basics.escape import guarded
from ..basics.yaml_text import load_yaml, short
from ..data.captions import check_class_names, check_distinct
from ..data.columns import found_label_column, image_column, is_text, label_column
from ..data.labels import ClassNames, LabelNames, not_a_label
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite
from ..data.survey import survey
from .keys import checked_keys
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


def suite_from_file(path: str | Path, *, streaming: bool = False) -> ShiftSuite:
    """Load the suite that a YAML file describes.

    One without `train` and `validation` is evaluated only; its class names are `class_names`, or those of the test set.

    Args:
        path: The file. Relative paths in it are relative to its folder. The suite may also be the value of a key
            ``suite``, beside the options of a run (``carot_hf train --config``).
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
    where, inner = str(path), suite_in(content)
    if inner is not None:
        if beside := sorted(content.keys() & _SUITE_KEYS.keys()):
            raise ValueError(
                f"{path}: {beside[0]}: expected all of the suite under `suite`, got this key beside it. Move it there."
            )
        where, content = f"{path}: suite", inner
    return suite_from_description(content, where, path.parent, name=path.stem, streaming=streaming)


def suite_in(content: Any) -> Mapping[str, Any] | None:
    """Return the suite that stands in a run's YAML file, beside its options; ``None``: it is named, or this is none."""
    inner = content.get("suite") if isinstance(content, Mapping) else None
    return inner if isinstance(inner, Mapping) else None


def suite_from_description(
    content: Any, where: str, base: Path, *, name: str, streaming: bool = False, hint: str = ""
) -> ShiftSuite:
    """Load the suite that a mapping describes, with the keys of a YAML file.

    Args:
        content: The mapping.
        where: What it stands in, for errors.
        base: Relative paths in it are relative to this folder.
        name: Of the suite, where the mapping says none.
        streaming: Read the test set and the shifts as streams.
        hint: Said at the end of an error about the rows of a set.
    Raises:
        ValueError: As `suite_from_file`.
    """
    description = checked_keys(content, where, "", _SUITE_KEYS, ("test",))
    recommended = checked_arguments(description.get("recommended", {}), f"{where}: recommended")
    _check_home(description, where)
    reader = _Reader(where, base, description, streaming, hint)
    train, held, test = None, None, None
    if "train" in description:
        train = reader.read("train", _TRAIN_KEYS)
    else:  # the class names are the test set's
        test = reader.read("test", _TEST_KEYS)
    if isinstance(description.get("validation"), dict):
        held = reader.read("validation", _SET_KEYS)
    elif train is not None:
        train, held = _held_out(train, description["validation"], f"{where}: validation", reader.class_names)
    shifts = _shifts(reader, description.get("shifts", {}), where)
    suite = ShiftSuite(
        name=description.get("name", name),
        class_names=reader.class_names,
        templates=_lines(description.get("templates", DEFAULT_TEMPLATES), where, base, "templates"),
        train=train,
        validation=held,
        test=reader.read("test", _TEST_KEYS) if test is None else test,
        shifts=shifts,
        recommended=recommended,
        version=description.get("version"),
        label_names=reader.label_names,
        allow_shared=description.get("allow_shared_files", False),
    )
    survey(suite)  # a training set that shares files with the test set is refused here
    return suite


def _check_home(description: Mapping[str, Any], where: str) -> None:
    """Refuse a training set without a validation set, and a share of no training set."""
    if "train" in description and "validation" not in description:
        raise ValueError(
            f"{where}: validation: expected this key beside `train`, got none. Temperatures are fitted and checkpoints "
            f"chosen on it. Example: {_SUITE_KEYS['validation'][1]}"
        )
    share = description.get("validation", {})
    if "train" not in description and not isinstance(share, dict):
        raise ValueError(
            f"{where}: train: expected this key, got none, and `validation` is a share of it ({share:g}). Leave both "
            f"out for a suite that is evaluated only. Example: {_SUITE_KEYS['train'][1]}"
        )


def _shifts(reader: _Reader, described: Mapping[Any, Any], where: str) -> dict[str, ShiftSet]:
    """The shifted sets by name."""
    shifts = {}
    for name, value in described.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{where}: shifts: expected names that are text, got {name!r}. Quote it. Example: shifts: "
                f'{{"{name}": {{path: data/sketch}}}}'
            )
        checked_keys({"path": value} if value is None else value, where, f"shifts.{name}", _SHIFT_KEYS, ("path",))
        shifts[name] = reader.read(f"shifts.{name}", _SHIFT_KEYS)
    return shifts


class _Reader:
    """Opens the sets of one description; the class names come from it, or else from the set that is read first."""

    def __init__(self, where: str, base: Path, description: Mapping[str, Any], streaming: bool, hint: str) -> None:
        self._where, self._base, self._description, self._streaming = where, base, description, streaming
        self._hint = hint
        self._read: dict[str, str] = {}  # which set a file was read for
        self._roots = self._allowed(description.get("image_roots", []))
        self.label_names: LabelNames | None = description.get("label_names")
        names = description.get("class_names")
        if names is None and self.label_names is not None:
            given = self.label_names.values() if isinstance(self.label_names, Mapping) else self.label_names
            names = list(dict.fromkeys(given))
        self.class_names: list[str] = [] if names is None else _lines(names, where, base, "class_names")
        if self.class_names:
            self._fits("label_names", self.label_names)
            check_distinct(self.class_names)

    def read(self, key: str, keys: Mapping[str, Any]) -> ShiftSet:
        """Open the set under a key such as ``shifts.sketch``."""
        first, _, second = key.partition(".")
        content = self._description[first][second] if second else self._description[first]
        entry = checked_keys(content, self._where, key, keys, ("path",))
        name = entry.get("name", second or first)
        opened = self._open(key, entry, entry.get("split", first if not second else "test"))
        self._refuse_twice(key, entry, opened)
        rows, label = opened.rows, entry.get("label_column")
        if "caption_column" in entry and label is None and found_label_column(rows.features) is None:
            return self._captioned(opened, name, entry)
        if not self.class_names:
            with self._told(key):
                label = label or label_column(rows)
            self.class_names = _class_names_of(
                rows, label, f"{self._where}: class_names", "training" if first == "train" else first
            )
            check_class_names(self.class_names)
        options = {"caption_column": entry["caption_column"]} if "caption_column" in entry else {}
        names = self._names_for(key, entry)
        with self._told(key):
            return as_set(
                rows,
                name=name,
                num_classes=len(self.class_names),
                label_names=names,
                columns=entry.get("columns"),
                image=entry.get("image_column"),
                label=label,
                content=_content(entry),
                **self._places(opened),
                **options,
            )

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """Say of which set an error about rows is."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self._where}: {key}: {error}{self._hint}") from error

    def _open(self, key: str, entry: Mapping[str, Any], split: str) -> Opened:
        words = re.split(r"[^a-z0-9]+", entry["path"].lower())
        if key in ("train", "validation") and "objectnet" in words:
            raise ValueError(
                f"{self._where}: {key}: expected data that may be trained and tuned on, got {entry['path']!r}. The "
                "terms of ObjectNet forbid it; use it under `shifts`. Example: path: data/train"
            )
        local = _there(self._base, entry["path"])
        if local is None and Path(entry["path"]).exists():  # it would be read in place of a data set on the Hub
            raise ValueError(
                f"{self._where}: {key}.path: expected data at {(self._base / entry['path']).resolve()}, found "
                f"none, but some at {Path(entry['path']).resolve()}. Paths are relative to the file's folder: correct "
                "it."
            )
        if local is None:
            try:
                refuse_local_look(entry["path"], self._base)
            except ValueError as error:
                raise ValueError(f"{self._where}: {key}.path: {error}") from None
        layout = entry.get("layout")
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(
                f"{self._where}: {key}.layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}. Example: layout: "
                "webdataset"
            )
        with self._told(key):
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
            path = self._base / Path(folder).expanduser() if isinstance(folder, str) and folder else None
            if path is None or not path.is_dir():
                raise ValueError(
                    f"{self._where}: image_roots: expected folders, got {short(folder)}. Paths are relative to the "
                    f"file's folder. Example: {_SUITE_KEYS['image_roots'][1]}"
                )
            logger.info("%s: tables may name images in %s, too.", self._where, path)
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
            f"{self._where}: {key}: expected other files than those of `{before}`, got the same: {entry['path']!r}, "
            f"and {reason}. Name a folder or file for each, folders such as train/ and test/ in it, or a share for "
            "`validation`; to judge on files that were seen on purpose, say `allow_shared_files: true`. Example: "
            "path: data/train"
        )

    def _names_for(self, key: str, entry: Mapping[str, Any]) -> Sequence[str] | ClassNames:
        """What the labels of a set may be called."""
        own, classes = entry.get("label_names"), len(self.class_names)
        labels = len(entry["columns"]) if "columns" in entry else classes
        if isinstance(own, list) and len(own) != labels:
            raise ValueError(
                f"{self._where}: {key}: Expected {labels} `label_names` for '{key.rpartition('.')[2]}', one for each "
                f"of its labels, got {len(own)}. Name all labels in order; for a set with labels of its own pass "
                "`columns` too."
            )
        if "columns" in entry:
            return [str(name) for name in own] if own is not None else ()
        return self._fits(f"{key}.label_names", self.label_names if own is None else own)

    def _fits(self, key: str, label_names: LabelNames | None) -> ClassNames:
        try:
            return ClassNames(self.class_names, label_names)
        except ValueError as error:
            raise ValueError(f"{self._where}: {key}: {error} Example: {_NAMES[1]}") from None

    def _captioned(self, opened: Opened, name: str, entry: Mapping[str, Any]) -> ShiftSet:
        """A set of images with captions and without labels."""
        if not self.class_names:
            raise ValueError(
                f"{self._where}: class_names: expected a list of names, got none, and the captions of the training set "
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


def _class_names_of(rows: Any, label: str, where: str, role: str) -> list[str]:
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
        f"{where}: expected a list of names, got none, and the {role} set has only numbers as labels. Example: "
        "class_names: [cat, dog]"
    )


def _held_out(train: ShiftSet, share: float, where: str, names: Sequence[str]) -> tuple[ShiftSet, ShiftSet]:
    """Hold a share out, of each class at least one and never the last, and say where that makes it another share."""
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"{where}: expected a share of the training set in (0, 1), or a set, got {share}. Example: validation: 0.1"
        )
    kept, held = split_off(train, share, HOLD_OUT_SEED)
    labels = [data.labels for data in (kept, held) if data.labels is not None]  # both have some
    parts = [np.bincount(own, minlength=len(names)).tolist() for own in labels]
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
    return kept, held


def _lines(value: list[Any] | str, where: str, base: Path, key: str) -> list[str]:
    """A list of strings; a string is the path of a file with one a line."""
    if isinstance(value, str):
        file = base / value
        if not file.is_file():
            raise ValueError(f"{where}: {key}: expected a list or a file with one a line, found no file {file}.")
        return [line.strip() for line in read_text(file, "names").splitlines() if line.strip()]
    wrong = [item for item in value if not isinstance(item, str) or not item.strip()]
    if wrong or not value:
        raise ValueError(
            f"{where}: {key}: expected a list of strings, got {short(wrong[:1] or value)}. YAML reads some words as "
            f"numbers or booleans; quote them. Example: {_SUITE_KEYS[key][1]}"
        )
    return list(value)
