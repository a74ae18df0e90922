"""What sets a folder holds, by the names of its folders and files, for somebody who has no suite file yet.

Tried in this order, until something is found:

1. data files at the top (tables, parquet, arrow, tars, ``save_to_disk``): a file that names a split, or rows that do
2. folders at the top that name splits: ``train/``, ``val/``, ``test/``
3. one folder at the top that has splits in it: ``home/train/``, ``home/test/``
4. folders at the top with the same classes in each: ``home/cat``, ``sketch/cat``; which is trained on, nobody can tell
5. folders of classes at the top

Whatever else can be read as a set is a shift.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..basics.escape import printable
from ..data.columns import image_column, is_text, label_column
from ..data.labels import folded, not_a_label
from ..data.suite import RESERVED_NAMES
from .folders import SPLITS, asked_split, split_of, walk
from .rows import Opened, open_source
from .tables import SUFFIXES

_DATA = (*SUFFIXES, ".parquet", ".arrow", ".tar")
_MOST_NUMBERS = 100_000  # classes, where labels are numbers: more are something else
_ORDER = {
    "train": ("train", "validation", "test"),
    "validation": ("validation", "test", "train"),
    "test": ("test", "validation", "train"),
}
_ERRORS = (ValueError, TypeError, OSError)  # of data that are not as they look


class Part(NamedTuple):
    """A set that was found.

    Attributes:
        path: Its folder or file.
        split: To be named in the suite file; ``None``: it is all that is there.
        names: Of its labels: those of a ``ClassLabel`` in order, or texts, sorted; numbers from 0 as texts.
        counts: Images by name.
        numbered: The labels are numbers without names.
        tops: Folders and files at the top of the folder looked into that it was read from, its images included.
    """

    path: Path
    split: str | None
    names: tuple[str, ...]
    counts: Mapping[str, int]
    numbered: bool
    tops: frozenset[str]

    @property
    def size(self) -> int:
        """Images."""
        return sum(self.counts.values())


class Look(NamedTuple):
    """What a folder holds.

    Attributes:
        folder: That was looked into.
        splits: Sets called train, validation and test, as far as there are any, in this order.
        shifts: The other ones, by names that metrics may have.
        passed_over: Folders and files at the top that are no set, with the reason.
    """

    folder: Path
    splits: Mapping[str, Part]
    shifts: Mapping[str, Part]
    passed_over: Mapping[str, str]


def look_into(folder: str | Path) -> Look:
    """Find the sets of a folder; no image is decoded and nothing is written.

    Raises:
        ValueError: If it is no folder, is empty, or nothing in it can be read as a set.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        what = "a file" if place.exists() else "none"
        raise ValueError(f"Expected a folder of data, found {what} at {place}. Correct the path.")
    finder = _Finder(place)
    for look in (finder.top_files, finder.split_folders, finder.home_folder, finder.worlds, finder.whole):
        if not finder.splits and not finder.shifts:
            look()
    finder.rest()
    if not finder.splits and not finder.shifts:
        raise ValueError(_nothing(place, finder.reasons))
    splits = {name: finder.splits[name] for name in SPLITS if name in finder.splits}
    return Look(place, splits, _with_names(finder.shifts), finder.reasons)


class _Finder:
    """Opens what lies in a folder, each thing once, and sorts it into splits and shifts."""

    def __init__(self, folder: Path) -> None:
        self.splits: dict[str, Part] = {}
        self.shifts: dict[str, Part] = {}
        self.reasons: dict[str, str] = {}
        self._folder = folder
        self._known: dict[tuple[Path, str], Part | str] = {}  # a text says why it is none
        inside = [path.relative_to(folder).parts for path in walk(folder)]
        self._tops = sorted({parts[0] for parts in inside if len(parts) > 1})
        self._files = sorted(parts[0] for parts in inside if len(parts) == 1)

    def top_files(self) -> None:
        """Data files at the top."""
        if "dataset_dict.json" in self._files or "state.json" in self._files:
            self._whole(self._folder)
            return
        by_split: dict[str | None, list[str]] = {}
        for name in self._files:
            if Path(name).suffix.lower() in _DATA:
                by_split.setdefault(split_of(Path(name).stem), []).append(name)
        unnamed = by_split.pop(None, [])
        for split, names in by_split.items():
            place = self._folder / names[0] if len(names) == 1 else self._folder
            self._keep(self.splits, str(split), self._open(place, str(split)), names[0])
        if self.splits:
            for name in unnamed:
                self._keep(self.shifts, Path(name).stem, self._open(self._folder / name, "test"), name)
        elif unnamed:
            self._whole(self._folder / unnamed[0] if len(unnamed) == 1 else self._folder)
            if not self.splits:
                self._whole(self._folder)

    def split_folders(self) -> None:
        """Folders at the top that name splits: one that is called so, else the only one that has the word."""
        for split, called in SPLITS.items():
            words = [top for top in self._tops if split_of(top) == split]
            exact = sorted((top for top in words if top.lower() in called), key=lambda top: called.index(top.lower()))
            for top in exact[:1] or (words if len(words) == 1 else []):
                self._keep(self.splits, split, self._open(self._folder / top, split), top)

    def home_folder(self) -> None:
        """The first folder at the top that has a training split in it."""
        for top in self._tops:
            found = self._splits_of(self._folder / top)
            if "train" in found and not self.splits:
                self.splits = found

    def worlds(self) -> None:
        """Folders at the top that have classes in common: sets, of which nobody can tell which is trained on."""
        opened = {top: self._open(self._folder / top, "test") for top in self._tops}
        parts = {top: part for top, part in opened.items() if isinstance(part, Part)}
        owners = Counter(name for part in parts.values() for name in set(map(folded, part.names)))
        if len(parts) > 1 and all(any(owners[folded(name)] > 1 for name in part.names) for part in parts.values()):
            self.shifts = parts

    def whole(self) -> None:
        """Folders of classes at the top, and whatever else the folder as it is can be read as."""
        self._whole(self._folder)

    def rest(self) -> None:
        """What else lies at the top and can be read as a set: a split that is missing, by its name, or a shift."""
        found = (*self.splits.values(), *self.shifts.values())
        taken = {top for part in found for top in part.tops}
        if found:
            self.reasons.pop(".", None)
        for top in self._tops:
            if top in taken:
                self.reasons.pop(top, None)
                continue
            split = asked_split(top)
            sets, name = (self.splits, split) if split in SPLITS and split not in self.splits else (self.shifts, top)
            self._keep(sets, name, self._open(self._folder / top, split if split in SPLITS else "test"), top)

    def _whole(self, path: Path) -> None:
        """The splits that a folder or file names; of one that names none everything, to be trained on."""
        self.splits = self._splits_of(path)
        if not self.splits:
            top = "." if path == self._folder else path.name
            self._keep(self.splits, "train", self._open(path, "train"), top)

    def _splits_of(self, path: Path) -> dict[str, Part]:
        found = {split: self._part(path, split) for split in SPLITS}
        return {split: part for split, part in found.items() if isinstance(part, Part) and part.split is not None}

    def _keep(self, sets: dict[str, Part], name: str, part: Part | str, top: str) -> None:
        """Put a set among others, or keep why it is none."""
        if isinstance(part, Part):
            sets[name] = part
        else:
            self.reasons[top] = part

    def _open(self, path: Path, split: str) -> Part | str:
        """Open what is meant to be a split; if its files name others only, the nearest of these."""
        tried = [self._part(path, other) for other in _ORDER[split]]
        return next((part for part in tried if isinstance(part, Part)), tried[0])

    def _part(self, path: Path, split: str) -> Part | str:
        if (path, split) not in self._known:
            try:
                self._known[path, split] = _part_of(self._folder, path, split, open_source(path, split))
            except _ERRORS as error:
                self._known[path, split] = printable(" ".join(str(error).split()))
        return self._known[path, split]


def _part_of(folder: Path, path: Path, split: str, opened: Opened) -> Part:
    rows = opened.rows
    if len(rows) == 0:
        raise ValueError(f"Expected rows of split '{split}' in {path}, got none.")
    image, label = image_column(rows), label_column(rows)
    values, feature = [_text(value) for value in rows.with_format(None)[label]], rows.features[label]
    for row, value in enumerate(values):
        if (reason := not_a_label(value)) is not None:
            raise ValueError(f"Expected a label in each row of {path}, got {reason} in row {row}.")
    names, numbered = _names_of(values, feature, path)
    own = hasattr(feature, "names")
    counts = Counter(names[value] if own else str(value) for value in values)
    files = [file.partition("#")[0] for file in opened.files]
    if is_text(rows.features[image]) and opened.root is not None:
        files += [str(opened.root / value) for value in rows.with_format(None)[image] if isinstance(value, str)]
    return Part(path, split if opened.named else None, names, counts, numbered, _tops(folder, files))


def _text(value: Any) -> Any:
    """A label; one that tars have as bytes is a text."""
    return value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else value


def _names_of(values: list[Any], feature: Any, path: Path) -> tuple[tuple[str, ...], bool]:
    """Names of labels, and whether these are numbers."""
    if hasattr(feature, "names"):
        if not all(0 <= value < len(feature.names) for value in values):
            raise ValueError(f"Expected a label in each row of {path}, got some that are none of its ClassLabel's.")
        return tuple(feature.names), False
    if all(isinstance(value, str | bool) for value in values):
        return tuple(sorted(set(map(str, values)))), False
    if all(isinstance(value, int) and 0 <= value < _MOST_NUMBERS for value in values):
        return tuple(map(str, range(max(values) + 1))), True
    raise ValueError(f"Expected labels in {path} that are names, or whole numbers from 0, got {values[:3]}.")


def _tops(folder: Path, files: list[str]) -> frozenset[str]:
    """The first parts of paths below a folder."""
    roots = {os.path.join(place(folder), "") for place in (os.path.abspath, os.path.realpath)}
    places = [os.path.abspath(file) for file in files]
    return frozenset(
        place[len(root) :].split(os.sep)[0] for root in roots for place in places if place.startswith(root)
    )


def _with_names(found: Mapping[str, Part]) -> dict[str, Part]:
    """Sets by names that metrics may have: letters, digits, ``_`` and ``-``, none of them taken."""
    named: dict[str, Part] = {}
    for text, part in found.items():
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "shift"
        taken = plain in (*RESERVED_NAMES, *SPLITS) or plain.startswith("teacher_")
        name = first = f"shift_{plain}" if taken else plain
        number = 2
        while name in named:
            name, number = f"{first}_{number}", number + 1
        named[name] = part
    return named


def _nothing(folder: Path, reasons: Mapping[str, str]) -> str:
    seen = sorted(printable(path.name) for path in folder.iterdir())
    told = {name: reason for name, reason in reasons.items() if name != "."} or (reasons if seen else {})
    why = "".join(f" {printable(name)}: {reason}" for name, reason in list(told.items())[:3])
    return (
        f"Expected data with images in {folder}, found none in {seen[:5]} ({len(seen)} files and folders). Looked for "
        "folders train, validation and test with a folder of images for each class, metadata.csv or another table with "
        f"a column of files and one of labels, parquet and arrow files, tars, and what save_to_disk wrote.{why}"
    )
