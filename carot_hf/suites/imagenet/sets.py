"""The ImageNet family as data: what its sets are called on the Hub, how many rows they have, what a label means.

Facts, no loading. The long tables lie in ``imagenet.json`` and are read when they are first asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

NUM_CLASSES = 1000


@dataclass(frozen=True)
class SetFacts:
    """What is known of a set before it is loaded.

    Attributes:
        name: Name of the set, also in metrics.
        hub_id: Data set on the Hub.
        layout: ``"parquet"``: the repository's own splits, read by name. ``"webdataset"``: tar files in one folder a
            split; they must be named (``data_files``), and their rows are sorted by class.
        rows: Rows of each split that has labels, by the split's name on the Hub; ``None``: other versions have others.
        num_labels: Labels are ``0 .. num_labels - 1``, and each of them occurs in every split whose rows are known.
        gated: The Hub asks to accept the terms of the set and to log in.
        crop_border: Pixels to cut off on each side before anything else. ObjectNet's images carry a red border of 1 px.
        test_only: The terms of the set forbid to train, tune or select on it.
        exif: Whether images are turned by their EXIF orientation. False throughout: the published numbers are of the
            pixels as they are stored.
        shifted: It may be one of a suite's shifts.
        several_right: Its labels are lists; an answer is right if it is one of them.
    """

    name: str
    hub_id: str
    layout: Literal["parquet", "webdataset"]
    rows: Mapping[str, int | None] = field(hash=False)
    num_labels: int = NUM_CLASSES
    gated: bool = False
    crop_border: int = 0
    test_only: bool = False
    exif: bool = False
    shifted: bool = True
    several_right: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Names on the Hub of the splits that have labels."""
        return tuple(self.rows)

    def columns(self) -> list[list[int]] | None:
        """Return for each label the ImageNet classes that it stands for; ``None``: all 1000, one to one.

        The logit of a label is the maximum over its classes, before the softmax (``ShiftSet.select``).
        """
        table = _tables().get(self.name)
        if table is None:
            return None
        return [list(group) for group in table.values()] if isinstance(table, dict) else [[index] for index in table]

    def label_names(self) -> tuple[str, ...]:
        """Return the names that the set's source gives its labels, in order: wnids, or folder names for ObjectNet.

        For data with names instead of numbers (a column of wnids, folders): a label is the position of its name here.
        These are not class names for captions.
        """
        table = _tables().get(self.name)
        if isinstance(table, dict):
            return tuple(table)
        return wnids() if table is None else tuple(wnids()[index] for index in table)


def wnids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1000 classes, ascending: class ``i`` is the ``i``-th."""
    return tuple(_tables()["wnids"])


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("imagenet.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


# The in-distribution set, the shifted sets of the published tables, and a small stand-in for the first. One of your
# own is a row more, from outside as well: SETS["mine"] = SetFacts("mine", "me/mine", "webdataset", {"test": 1000}).
SETS: dict[str, SetFacts] = {
    facts.name: facts
    for facts in (
        SetFacts(
            "imagenet",
            "ILSVRC/imagenet-1k",
            "parquet",
            {"train": 1_281_167, "validation": 50_000},  # its test split has no labels (-1)
            gated=True,
            shifted=False,
        ),
        # matched-frequency; of the three variants the one with published numbers
        SetFacts("v2", "clip-benchmark/wds_imagenetv2", "webdataset", {"test": 10_000}),
        SetFacts("r", "clip-benchmark/wds_imagenet-r", "webdataset", {"test": 30_000}, num_labels=200),
        SetFacts("a", "clip-benchmark/wds_imagenet-a", "webdataset", {"test": 7_500}, num_labels=200),
        SetFacts("sketch", "clip-benchmark/wds_imagenet_sketch", "webdataset", {"test": 50_889}),
        SetFacts(
            "objectnet",
            "clip-benchmark/wds_objectnet",
            "webdataset",
            {"test": 18_574},
            num_labels=113,
            crop_border=2,
            test_only=True,
        ),
        # Columns (image, list of labels, origin, english_label), split and scoring as in the card and the authors'
        # benchmark script; of the rows the card has said 13,925, 11,350 and 10,980. Not among the published tables.
        # Some of its images are ObjectNet's, whose terms it has here.
        SetFacts("hard", "taesiri/imagenet-hard", "parquet", {"validation": None}, test_only=True, several_right=True),
        # 100 classes; train and validation come from ImageNet's training set, test from its validation set
        SetFacts(
            "mini-imagenet",
            "timm/mini-imagenet",
            "parquet",
            {"train": 50_000, "validation": 10_000, "test": 5_000},
            num_labels=100,
            shifted=False,
        ),
    )
}
SHIFTS = ("v2", "r", "a", "sketch", "objectnet")
