"""A hash by which a set of images is known again, with labels or without."""

from __future__ import annotations

import hashlib

import numpy as np

from .shift_set import ShiftSet
from .stream import StreamedSet

_IMAGES = 64


def sample_hash(data: ShiftSet) -> str:
    """Hash the number of images and 64 of them, evenly spaced, as they are decoded; labels and names do not count.

    The same images in another order, or some of them, give another hash.

    Returns:
        64 hexadecimal digits.
    Raises:
        ValueError: If the set can be read in order only.
    """
    if isinstance(data, StreamedSet):
        raise ValueError(
            f"Expected a set that can be read by index, got the stream '{data.name}'. Load it without `streaming`."
        )
    found = hashlib.sha256(str(len(data)).encode())
    for row in np.linspace(0, len(data) - 1, min(_IMAGES, len(data))).round().astype(int).tolist():
        image = data.fetch(row)["image"]
        found.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return found.hexdigest()
