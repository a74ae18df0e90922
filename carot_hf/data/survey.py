"""What a suite holds before anything is trained: images a class and set, and images that sets have in common."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from ..basics.escape import guarded, printable
from .shift_set import ShiftSet
from .suite import ShiftSuite

logger = guarded(logging.getLogger(__name__))

_NAMED = 20  # classes that a warning names

MOST_IMAGES = 200_000  # in all sets of a suite: more are not compared
_CLASSES_SHOWN = 40
_TRAIN = "train"
_HEAD = 4096  # bytes at both ends that are compared before a whole file is read


@dataclass(frozen=True)
class Survey:
    """What is known of a suite without decoding an image.

    Attributes:
        classes: Names of the classes.
        counts: ``(K,)`` images a class by set, in the order of the suite; ``None``: labels are known by reading only,
            or are the set's own.
        sizes: Images by set.
        shared: Pairs of sets with the number of images of the second one that the first one has, too.
        compared: Whether the sets were searched for such images.
    """

    classes: tuple[str, ...]
    counts: Mapping[str, NDArray[np.int64] | None]
    sizes: Mapping[str, int]
    shared: Mapping[tuple[str, str], int]
    compared: bool

    def table(self) -> str:
        """Images a class and set, one class a line; of many classes the range."""
        known = [name for name, counts in self.counts.items() if counts is not None]
        rows = [["images", *self.sizes]]
        if len(self.classes) <= _CLASSES_SHOWN:
            for index, label in enumerate(self.classes):
                cells = [f"{self.counts[name][index]:,}" if name in known else "?" for name in self.sizes]  # type: ignore[index]
                rows.append([printable(label), *cells])
        else:
            cells = []
            for name in self.sizes:
                counts = self.counts[name]
                cells.append("?" if counts is None else f"{counts.min():,}-{counts.max():,}")
            rows.append([f"a class, of {len(self.classes):,}", *cells])
        rows.append(["all", *(f"{size:,}" for size in self.sizes.values())])
        note = "" if self.compared else f"\nmore than {MOST_IMAGES:,} images: those that sets share were not looked for"
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows
        ) + note  # fmt: skip

    def warnings(self) -> list[str]:
        """What of it is likely to be a mistake, one sentence each."""
        found = []
        for name, counts in self.counts.items():
            if counts is None:
                continue
            for number, what in ((0, "no image"), (1, "one image")):
                labels = [self.classes[index] for index in np.flatnonzero(counts == number).tolist()]
                if labels and (number == 0 or name == _TRAIN):
                    found.append(f"Set '{name}' has {what} of {_listed(labels)}.")
        for (first, second), count in self.shared.items():
            found.append(f"{count:,} of the {self.sizes[second]:,} images of set '{second}' are in '{first}', too.")
        return found


def survey(suite: ShiftSuite) -> Survey:
    """Count, and compare the images of all sets by their content; done once a suite.

    Raises:
        ValueError: If training and test set have images in common and the suite does not allow it.
    """
    known: Survey | None = suite.__dict__.get("_survey")
    if known is None:
        known = _survey(suite)
        suite.__dict__["_survey"] = known
    shared = known.shared.get((_TRAIN, _shown_name(suite.test.name)), 0)
    if shared and not suite.allow_shared:
        raise ValueError(
            f"Expected a test set of images that are not trained on, got {shared:,} of the {len(suite.test):,} images "
            f"of set '{suite.test.name}' in the training set. Take them out of one of them; to have it all the same, "
            "say `allow_shared_files: true` in the YAML file, or ShiftSuite(allow_shared=True)."
        )
    return known


def say_warnings(suite: ShiftSuite) -> None:
    """Log what is likely to be a mistake, once a suite."""
    found = survey(suite).warnings()
    if not suite.__dict__.get("_said"):
        for sentence in found:
            logger.warning("%s", sentence)
        suite.__dict__["_said"] = True


def _survey(suite: ShiftSuite) -> Survey:
    trained = {} if suite.train is None else {_TRAIN: suite.train}
    sets = {**trained, **{_shown_name(name): data for name, data in suite.evaluation_sets.items()}}
    sizes = {name: len(data) for name, data in sets.items()}
    compared = sum(sizes.values()) <= MOST_IMAGES
    return Survey(
        classes=tuple(suite.class_names),
        counts={name: _counts(data) for name, data in sets.items()},
        sizes=sizes,
        shared=_shared(sets) if compared else {},
        compared=compared,
    )


def _shown_name(name: str) -> str:
    """The name of a set that is evaluated, beside that of the training set."""
    return f"{name} (evaluated)" if name == _TRAIN else name


def _counts(data: ShiftSet) -> NDArray[np.int64] | None:
    if data.labels is None or data.columns is not None or data.right is not None:
        return None
    return np.bincount(data.labels, minlength=data.num_classes)


def _shared(sets: Mapping[str, ShiftSet]) -> dict[tuple[str, str], int]:
    """How many images of each set an earlier one has, too: same size, then same ends, then same bytes."""
    contents = {name: _Contents(data) for name, data in sets.items()}
    rows = {name: np.arange(len(found.sizes)) for name, found in contents.items()}
    keys: dict[str, list[Any]] = {name: found.sizes.tolist() for name, found in contents.items()}
    for deeper in (_Contents.ends, _Contents.whole):
        rows = _in_several(rows, keys)
        keys = {name: [deeper(contents[name], row) for row in chosen.tolist()] for name, chosen in rows.items()}
    result = {}
    names = list(sets)
    for place, second in enumerate(names):
        for first in names[:place]:
            common = set(keys[first])
            count = sum(key in common for key in keys[second]) or _same_rows(sets[first], sets[second])
            if count:
                result[first, second] = count
    return result


def _in_several(rows: Mapping[str, NDArray[Any]], keys: Mapping[str, list[Any]]) -> dict[str, NDArray[Any]]:
    """The rows whose key is one of another set's, too."""
    owners: dict[Any, set[str]] = {}
    for name, values in keys.items():
        for key in set(values):
            owners.setdefault(key, set()).add(name)
    return {
        name: chosen[[len(owners[key]) > 1 for key in keys[name]]] if len(chosen) else chosen
        for name, chosen in rows.items()
    }


class _Contents:
    """The encoded images of a set, as bytes or files; nothing of a set that has none."""

    def __init__(self, data: ShiftSet) -> None:
        self._data = data
        self._column = data.encoded_column()
        self.sizes = np.fromiter(self._sizes(), dtype=np.int64) if len(self._column) else np.empty(0, dtype=np.int64)

    def ends(self, row: int) -> bytes:
        """Hash of the first and the last bytes."""
        value = self._value(row)
        if isinstance(value, bytes):
            return hashlib.blake2b(value[:_HEAD] + value[-_HEAD:]).digest()
        if self.sizes[row] < 0:
            return value.encode("utf-8", "surrogateescape")
        try:
            with Path(value).open("rb") as file:
                head = file.read(_HEAD)
                file.seek(max(0, self.sizes[row] - _HEAD))
                return hashlib.blake2b(head + file.read(_HEAD)).digest()
        except OSError:
            return value.encode("utf-8", "surrogateescape")

    def whole(self, row: int) -> bytes:
        """Hash of all bytes."""
        value = self._value(row)
        if isinstance(value, str):
            name = value.encode("utf-8", "surrogateescape")
            try:
                value = Path(value).read_bytes() if self.sizes[row] >= 0 else name
            except OSError:
                value = name
        return hashlib.blake2b(value).digest()

    def _value(self, row: int) -> bytes | str:
        return _encoded(self._data, self._column[row], f"index {row}")

    def _sizes(self) -> Iterator[int]:
        """Of each image in bytes, without reading what is stored in a table."""
        for row, length in enumerate(self._data.encoded_lengths()):
            if length is None:
                value = self._value(row)
                length = len(value) if isinstance(value, bytes) else _size_of(value)
            yield length


def _encoded(data: ShiftSet, value: Any, where: str) -> bytes | str:
    """Bytes, or a path."""
    value = data.located(value, where)
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value if isinstance(value, bytes) else str(value)


def _size_of(path: str) -> int:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # the second of a path with a zero byte
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def say_positions(data: ShiftSet, class_names: Sequence[str], said: set[tuple[Any, ...]]) -> None:
    """Say once how many rows each class is taken to have, where labels are numbers without names; ``said`` grows."""
    if data.labels is None or data.has_names or data.columns is not None or data.right is not None:
        return
    counts = np.bincount(data.labels, minlength=data.num_classes).tolist()
    if (data.name, *counts) in said:
        return
    said.add((data.name, *counts))
    named = [f"{count:,} {label!r}" for label, count in zip(class_names, counts, strict=True)]
    logger.warning(
        "Labels of set '%s' are numbers without names, taken for the classes in order: %s%s.",
        data.name,
        ", ".join(named[:_NAMED]),
        ", ..." if len(named) > _NAMED else "",
    )


def _same_rows(first: ShiftSet, second: ShiftSet) -> int:
    """How many rows two sets take from the same object in memory."""
    (base, rows), (other, others) = _base(first.data), _base(second.data)
    if base is not other:
        return 0
    return len(set(rows) & set(others))


def _base(data: Any) -> tuple[Any, Iterable[int]]:
    return (data.dataset, data.indices) if isinstance(data, Subset) else (data, range(len(data)))


def _listed(labels: list[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:5])
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5:,} more classes"
