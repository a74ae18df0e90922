"""How close two computations of one number are: the bounds of the tests, and where they come from (CONTRIBUTING.md).

Proofs that two paths are equal run in float64, with `EXACT`. Where a foreign library or a file format leaves float32
only, the bound follows from the arithmetic by `float32_bound`, and not from what one machine gave.
"""

from __future__ import annotations

import math

import numpy as np

# A network of two layers in float64 makes errors of some 1e-15, twenty steps of training some 1e-13.
EXACT = 1e-10
# Trainer adds the losses that it logs up in float32: each addition is off by at most half an eps of the sum.
LOGGED = 8 * float(np.finfo(np.float32).eps)


def float32_bound(multiplier: float = 1.0, size: int = 1, operations: int = 8) -> float:
    """Largest difference of two float32 computations of ``multiplier * cosine``, in any order of their sums.

    A sum of ``size`` products of parts of unit vectors is off by some ``eps sqrt(size)`` of its terms' length, 1; the
    layers before it do that ``operations`` times over. A softmax or a sigmoid of such logits, and the NLL, move by no
    more than the logits do.

    Args:
        multiplier: exp(logit_scale) divided by the temperature.
        size: Length of the vectors, ``D``.
        operations: Matrix products in a row, of the towers for instance.
    """
    return operations * float(np.finfo(np.float32).eps) * multiplier * math.sqrt(size)
