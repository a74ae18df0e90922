"""What a suite looks like before anything is trained: some of its images, its captions, how its labels were matched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..basics.escape import printable
from .captions import fill_template
from .images import BadImageError
from .labels import shown
from .shift_set import ShiftSet
from .suite import ShiftSuite

_SEED = 0
_CODE = re.compile(r"[A-Za-z]?\d+")  # 7, n01440764
_CHUNK = 16  # items that a process reads at a time
MOST_BAD = 20  # images of a set that could not be decoded after which no further one is looked for


class Bad(NamedTuple):
    """An image that cannot be decoded: its number in the set, its file if it has one, and why."""

    row: int
    file: str | None
    reason: str

    def __str__(self) -> str:
        file = "" if self.file is None else f" ({self.file})"
        return printable(f"index {self.row}{file}: {' '.join(self.reason.split())}")


class Draw(NamedTuple):
    """Some items of a set, by class, and the images among them that cannot be decoded."""

    items: list[dict[str, Any]]
    bad: list[Bad]


def sets_of(suite: ShiftSuite) -> list[ShiftSet]:
    """Return all sets in the order of a :class:`~carot_hf.data.survey.Survey`."""
    trained: list[ShiftSet | None] = [suite.train]
    return [data for data in (*trained, *suite.evaluation_sets.values()) if data is not None]


def spread(size: int, count: int) -> list[int]:
    """Return so many whole numbers in ``[0, size)``, ascending and as evenly as can be; some twice if there are few."""
    return [place * size // count for place in range(count)]


def draw(data: ShiftSet, count: int) -> Draw:
    """Read some items, spread over the classes that the set has; the same ones in every call.

    In the place of an image that cannot be decoded comes the next one of its class, or of another one. Of a set that is
    smaller than ``count`` all are read.

    Raises:
        ValueError: If a label is none.
    """
    queues = _queues(data)
    found: list[tuple[int, dict[str, Any]]] = []
    bad: list[Bad] = []
    for place in spread(len(queues), count):
        for queue, rows in [*enumerate(queues[place:], place), *enumerate(queues[:place])]:
            item = None
            while rows and item is None and len(bad) < MOST_BAD:
                row = rows.pop()
                if isinstance(read := _read(data, row), Bad):
                    bad.append(read)
                else:
                    item = read
            if item is not None:
                found.append((queue, item))
                break
    return Draw([item for _, item in sorted(found, key=lambda pair: pair[0])], bad)


def unreadable(data: ShiftSet, workers: int = 0) -> Iterator[Bad | None]:
    """Read every item, and yield for each one ``None``, or what is wrong with its image, in the order of the set.

    Args:
        data: The set.
        workers: Processes that read; 0: this one does. An error that is no image's is raised as this one raises it.
    """
    workers = workers if len(data) > _CHUNK else 0
    loader = DataLoader(_Looked(data), batch_size=_CHUNK, num_workers=workers, collate_fn=list)
    done = 0
    try:
        for part in loader:
            done += len(part)
            yield from part
    except (OSError, RuntimeError, TypeError, ValueError):
        if not workers:
            raise
        looked = _Looked(data)  # torch puts the traceback of another process into the error
        yield from (looked[row] for row in range(done, len(data)))


def example_captions(suite: ShiftSuite, count: int) -> list[str]:
    """Return captions of the training, spread over the classes: of the images' own, else templates with class names."""
    train: ShiftSet | None = suite.train
    if train is not None and (own := train.captions) is not None:
        labels = train.labels
        order = np.arange(len(own)) if labels is None else np.argsort(labels, kind="stable")
        captions = [own[order[place]] for place in spread(len(own), count)]
        return list(dict.fromkeys(text if isinstance(text, str) else text[0] for text in captions))
    places = enumerate(spread(len(suite.class_names), count))
    pairs = [(suite.templates[number % len(suite.templates)], suite.class_names[place]) for number, place in places]
    return list(dict.fromkeys(fill_template(*pair) for pair in pairs))


def label_title(data: ShiftSet, item: dict[str, Any], class_names: Sequence[str]) -> tuple[str, str]:
    """Return what an item shows, in words, and in ASCII letters alone: a class, the classes of its label, a caption."""
    if "label" in item:
        label = int(item["label"])
        if "right" in item:
            return printable(" / ".join(class_names[right] for right in item["right"])), f"class {label}"
        if data.columns is None:
            return printable(class_names[label]), f"class {label}"
        return printable(" / ".join(class_names[place] for place in data.columns[label])), f"label {label}"
    caption = item.get("caption", "")
    return printable(caption if isinstance(caption, str) else caption[0]), "caption"


def matching(data: ShiftSet, class_names: Sequence[str]) -> str:
    """Say how the labels of a set became classes, as far as the set knows it."""
    if data.label_column is None:
        return "no labels"
    if data.columns is not None:
        groups = ["/".join(class_names[place] for place in group) for group in data.columns]
        return printable(f"labels of its own, which stand for the classes {shown(groups)}")
    if data.right is not None:
        return "several right ones an image, by number"
    if data.labels is None:
        return "known by reading the images only"
    if data.has_names:
        return "by name"
    return f"by position: 0 is {printable(class_names[0])!r}, 1 is {printable(class_names[1])!r}, ..."


def doubtful_names(class_names: Sequence[str]) -> list[str]:
    """Say which class names make odd captions, a sentence for each reason."""
    reasons = {
        "are numbers or codes, not words": [name for name in class_names if _CODE.fullmatch(name.strip())],
        "have '_' where a caption has a space": [name for name in class_names if "_" in name],
    }
    return [
        f"Class names {printable(shown(names))} {reason}: write in `class_names` what captions are to say. Labels are "
        "found all the same: case, '_' and spaces do not count, and `label_names` says the rest."
        for reason, names in reasons.items()
        if names
    ]


class _Looked(Dataset[Bad | None]):
    """What is wrong with each image of a set."""

    def __init__(self, data: ShiftSet) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> Bad | None:
        read = _read(self._data, row)
        return read if isinstance(read, Bad) else None


def _queues(data: ShiftSet) -> list[list[int]]:
    """Rows by class, of those that there are, in an order of their own; one list if the labels are not known."""
    labels = np.zeros(len(data), dtype=np.int64) if data.labels is None else data.labels
    return [
        np.random.default_rng((_SEED, label)).permutation(np.flatnonzero(labels == label)).tolist()
        for label in np.unique(labels).tolist()
    ]


def _read(data: ShiftSet, row: int) -> dict[str, Any] | Bad:
    try:
        item = data[row]
        return item if data.right is None else {**item, "right": np.unique(data.right.labels[row]).tolist()}
    except BadImageError as error:
        return Bad(row, _file_of(data, row), str(error.__cause__ or error))


def _file_of(data: ShiftSet, row: int) -> str | None:
    """The file that an image lies in, if that is known."""
    column = data.encoded_column()
    value = column[row] if len(column) else None
    value = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
    return value if isinstance(value, str) else None
