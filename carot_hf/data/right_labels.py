"""Which labels of each image are right, of a set whose images have several."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..basics.content_hash import sha256_of_array
from .labels import label_in_range


class RightLabels:
    """The labels that are right for each image.

    Args:
        lists: For each image, in their order, a list of class indices, or one.
        num_labels: Labels are in ``[0, num_labels)``.
        name: Of the set, for errors.
    Attributes:
        labels: ``(n, m)`` int64, ascending, ``m`` the longest list; a shorter one repeats its smallest label.
    Raises:
        ValueError: If an image has none or one twice, or a label is no class index; the set and the index are named.
    """

    def __init__(self, lists: Sequence[Any], num_labels: int, name: str) -> None:
        rows = [_row(labels, num_labels, name, f"index {index}") for index, labels in enumerate(lists)]
        longest = max(map(len, rows), default=1)
        padded = [row[:1] * (longest - len(row)) + row for row in rows]
        self.labels: NDArray[np.int64] = np.array(padded, np.int64).reshape(len(rows), longest)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def first(self) -> NDArray[np.int64]:
        """``(n,)``, the smallest label of each image."""
        return self.labels[:, 0]

    @property
    def facts(self) -> str:
        """What they are, for :attr:`ShiftSuite.content_hash`."""
        return sha256_of_array(self.labels, "<i8")

    def of(self, rows: NDArray[np.int64]) -> RightLabels:
        """Return those of some of the images."""
        part = copy.copy(self)
        part.labels = self.labels[rows]
        return part

    def likeliest(self, logits: Tensor, start: int = 0) -> Tensor:
        """Return ``(n,)`` int64: of the right labels of each image the one that a model finds most likely.

        The prediction is among the right labels just when it is this one, and no temperature makes it another.

        Args:
            logits: ``(n, num_labels)``.
            start: Which image the first row is of.
        """
        right = torch.from_numpy(self.labels[start : start + len(logits)]).to(logits.device)
        return right.gather(1, logits.gather(1, right).argmax(dim=1, keepdim=True))[:, 0]


def _row(labels: Any, num_labels: int, name: str, where: str) -> list[int]:
    """One image's labels as whole numbers, ascending: of equal logits the smallest label is predicted."""
    found = list(labels) if isinstance(labels, list | tuple | np.ndarray) else [labels]
    whole = sorted(label_in_range(label, num_labels, name, where) for label in found)
    if not whole or len(set(whole)) < len(whole):
        raise ValueError(
            f"Expected at least one label in set '{name}' at {where}, none of them twice, got {labels}. Drop the "
            "image, or pass class indices (a one-hot row is none)."
        )
    return whole
