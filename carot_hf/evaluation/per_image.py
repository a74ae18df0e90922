"""PerImage: what a model says of each image of a set, and what tells these images from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..basics.content_hash import sha256_of_array, sha256_of_facts
from ..data.shift_set import ShiftSet
from ..data.stored import rows_mark
from .home import METHODS

WHY = {  # what two sets may differ in, in the order in which it is looked at
    "classes": "other classes, or other names of them",
    "n": "another number of images",
    "labels": "other labels, or another order",
    "read": "images cropped or turned in another way",
    "content": "other images",
    "rows": "other images, by the names or sizes of their files",
}


@dataclass(frozen=True, eq=False)
class PerImage:
    """What a model says of each image of a set.

    Attributes:
        confidences: By ending ("": as the logits are, "ts", "pts", "dts") the ``(n,)`` probabilities of the class that
            is predicted.
        predicted: ``(n,)`` int32; no temperature changes it.
        labels: ``(n,)`` int32, in the set's own labels, as ``predicted``.
        facts: Of `facts_of_images`; empty: not known.
    """

    confidences: Mapping[str, NDArray[Any]]
    predicted: NDArray[np.int32]
    labels: NDArray[np.int32]
    facts: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def hits(self) -> NDArray[np.bool_]:
        """``(n,)``, whether the class is right."""
        return np.equal(self.predicted, self.labels)

    def at(self, ending: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return confidences and hits at a scaling."""
        return self.confidences[ending], self.hits


def ending_of(method: str) -> str:
    """Return the ending of what a checkpoint answers after a calibration by a method; "" of none: "".

    Raises:
        ValueError: If there is no such method, or none that an evaluation measures before it.
    """
    if method not in ("", *METHODS):
        raise ValueError(f"Expected the method to be one of {(*METHODS,)}, got {method!r}. Evaluate the saved model.")
    return METHODS.get(method, "")


def label_names(data: ShiftSet, class_names: Sequence[str]) -> list[str]:
    """Return what the labels of a set are called: each by the classes that it stands for."""
    groups = [[label] for label in range(data.num_classes)] if data.columns is None else data.columns
    return [" / ".join(class_names[column] for column in group) for group in groups]


def facts_of_images(data: ShiftSet, labels: NDArray[Any], class_names: Sequence[str]) -> dict[str, str | int]:
    """Return what tells the images of a set, in their order, from others, as texts and numbers; no image is read.

    Args:
        data: The set.
        labels: ``(n,)`` as they were read.
        class_names: Of the suite.
    """
    facts: dict[str, str | int] = {
        "classes": sha256_of_facts({"names": list(class_names), "columns": data.columns}),
        "n": len(labels),
        "labels": sha256_of_array(labels if data.right is None else data.right.labels, "<i8"),
        "read": sha256_of_facts({"exif": data.exif, "crop_border": data.crop_border}),
    }
    if data.content is not None:
        facts["content"] = sha256_of_facts({"content": data.content})
    mark = rows_mark(data)
    return facts if mark is None else {**facts, "rows": mark}


def difference_of(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Say why two sets do not have the same images; ``None``: nothing speaks against it.

    Args:
        ours: Of `facts_of_images`.
        theirs: The same of the other one.
    """
    for name, why in WHY.items():
        pair = ours.get(name), theirs.get(name)
        if None in pair or (name == "rows" and _kind(pair[0]) != _kind(pair[1])):
            continue  # what one of them does not say tells them not apart
        if pair[0] != pair[1]:
            return f"{why} ({pair[0]:,} and {pair[1]:,})" if name == "n" else why
    return None


def _kind(mark: Any) -> str:
    """Of what a mark of rows is: names or sizes."""
    return str(mark).split(":")[0]
