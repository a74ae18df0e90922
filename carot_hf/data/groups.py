"""Groups of the images of a set, of which the worst one is looked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..basics.content_hash import sha256_of_array


class Groups:
    """Which group each image of a set is of.

    Args:
        names: ``G`` names of the groups.
        codes: ``(n,)`` whole numbers in ``[0, G)``, in the order of the images; -1: of none.
    Attributes:
        names: As a tuple.
        codes: As int32.
    Raises:
        ValueError: If a name occurs twice or a number is out of range.
    """

    def __init__(self, names: Sequence[str], codes: Sequence[int] | NDArray[np.integer]) -> None:
        self.names, numbers = tuple(names), np.asarray(codes)
        if len(set(self.names)) < len(self.names) or not self.names:
            raise ValueError(f"Expected distinct names of groups, at least one, got {list(names)}. Correct them.")
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise ValueError(
                f"Expected one whole number for each image as groups, got {numbers.dtype} of shape {numbers.shape}. "
                "Pass the number of its group, -1 for an image of none."
            )
        if len(numbers) and (numbers.min() < -1 or numbers.max() >= len(self.names)):
            raise ValueError(
                f"Expected groups in [-1, {len(self.names)}), got {numbers.min()} to {numbers.max()}. Name all groups."
            )
        self.codes = numbers.astype(np.int32)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def facts(self) -> dict[str, Any]:
        """What they are, for :attr:`ShiftSuite.content_hash`."""
        return {"names": list(self.names), "codes": sha256_of_array(self.codes, "<i4")}

    def of(self, rows: NDArray[np.int64]) -> Groups:
        """Return those of some of the images."""
        return Groups(self.names, self.codes[rows])


def groups_of(data: Any, rows: Any) -> NDArray[np.int32] | None:
    """Return the ``(n,)`` groups of the images of a set, of which ``rows`` were read; ``None``: it has none.

    Raises:
        ValueError: If there is another number of groups than of rows.
    """
    groups: Groups | None = data.groups
    if groups is not None and len(groups) != len(rows):
        raise ValueError(
            f"Expected a group for each of the {len(rows):,} images of set '{data.name}', got {len(groups):,}. Set "
            "`groups` anew after rows were taken away."
        )
    return None if groups is None else groups.codes
