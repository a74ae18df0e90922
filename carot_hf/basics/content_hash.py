"""One hash for what a suite is: it goes into metrics and cards, so that figures of different data are not compared.

The same on every machine and with every version of Python, numpy and the libraries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def sha256_of_array(values: ArrayLike, dtype: str) -> str:
    """Hash the shape and the values of an array.

    Args:
        values: Integers.
        dtype: In which they are hashed, in C order, such as ``"<i8"``: one that holds them, whatever theirs is.
    Returns:
        64 hexadecimal digits.
    Raises:
        TypeError: If the values are of another kind.
    """
    array = np.asarray(values).astype(dtype, casting="same_kind")
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()


def sha256_of_facts(facts: Mapping[str, Any]) -> str:
    """Hash texts, integers, booleans, ``None`` and lists and mappings of these; the order of a mapping does not count.

    Returns:
        64 hexadecimal digits: the SHA-256 of JSON with sorted keys, without spaces, in ASCII.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
