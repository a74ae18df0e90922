"""Sets of perturbed copies of held-out images, and the rows that stand for a large set."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .perturbations import PERTURBATIONS, all_perturbations, kind_seen, perturbed
from .shift_set import ShiftSet
from .stream import StreamedSet

MOST_IN_BANK = 20_000  # images
SEED = 0  # of what is drawn; all runs share the copies
_CORRUPTED = re.compile(r"c-([a-z_]+)-\d")  # as the suite of ImageNet calls a corrupted test set


class PerturbedRows:
    """Rows of a set with perturbed images; an item is a function of the image, the kind, the severity and its index.

    Images much larger than the model takes are brought down first: noise is drawn for each pixel, and would vanish.

    Args:
        data: The set.
        name: See :data:`~carot_hf.data.perturbations.PERTURBATIONS`.
        severity: 0 (mild) to 4 (strong).
        side: Short side in pixels that images are brought down to.
    """

    def __init__(self, data: ShiftSet, name: str, severity: int, *, side: int) -> None:
        self.data, self.name, self.severity, self.side = data, name, severity, side

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        item = self.data.fetch(index)
        image = _brought_down(item["image"], self.side)
        return {**item, "image": perturbed(image, self.name, self.severity, seed=SEED, index=index)}


def perturbed_sets(data: ShiftSet, *, side: int) -> dict[str, ShiftSet]:
    """Return a set of copies of held-out images for each kind and severity, by ``<kind> <severity>``."""
    return {
        f"{name} {PERTURBATIONS[name][severity]:.2g}": ShiftSet(
            PerturbedRows(data, name, severity, side=side),
            name=f"{data.name} ({name} {severity})",
            num_classes=data.num_classes,
            labels=data.labels,
        )
        for name, severity in all_perturbations()
    }


def class_balanced(labels: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Draw rows, of each class as many as of the others as far as there are, by its own rows alone; sorted.

    Args:
        labels: ``(N,)`` class indices.
        size: How many rows; all if there are fewer.
    """
    ranks, ties = np.empty(len(labels), dtype=np.int64), np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels).tolist():
        generator = np.random.default_rng((SEED, label))
        members = np.flatnonzero(labels == label)
        ranks[generator.permutation(members)] = np.arange(len(members))
        ties[members] = generator.integers(0, 2**62)  # which classes give one more, where not all can
    return np.sort(np.lexsort((ties, ranks))[:size])


def drawn_rows(data: ShiftSet, size: int) -> NDArray[np.int64] | None:
    """Draw the rows that stand for a set, class-balanced where its labels are known; ``None``: all are few enough."""
    if len(data) <= size:
        return None
    if data.labels is not None:
        return class_balanced(data.labels, size)
    return np.sort(np.random.default_rng(SEED).permutation(len(data))[:size])


def can_be_bank(train: ShiftSet | None) -> bool:
    """Whether there are images of the training that can be read by index."""
    return train is not None and not isinstance(train, StreamedSet)


def bank_of(train: ShiftSet | None) -> ShiftSet:
    """Return the images of the training that stand for all of them.

    Raises:
        ValueError: If there is none, or they can be read in order only.
    """
    if train is None or not can_be_bank(train):
        got, cure = ("none", "Add one to the suite") if train is None else ("a stream", "Load it without `streaming`")
        raise ValueError(
            f"Expected a training set that can be read by index for the method 'density', got {got}. {cure}, or use "
            "'perturbed'."
        )
    rows = drawn_rows(train, MOST_IN_BANK)
    return train if rows is None else train.subset(rows, train.name)


def is_seen(name: str) -> bool:
    """Whether a shifted set is corrupted in a way that a perturbation knows: no evidence for what was fitted on it."""
    found = _CORRUPTED.fullmatch(name)
    return found is not None and kind_seen(found[1])


def _brought_down(image: Image.Image, side: int) -> Image.Image:
    short = min(image.size)
    if short <= side:
        return image
    size = [max(1, round(length * side / short)) for length in image.size]
    return image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC, reducing_gap=3.0)
