"""The macro-averaged F1 score."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def macro_f1(
    labels: NDArray[Any], predicted: NDArray[Any], n_classes: int, weights: NDArray[np.float64] | None = None
) -> float:
    r"""Mean over the classes that have rows of :math:`2 t_k / (n_k + m_k)`.

    Of class k there are :math:`n_k` rows, :math:`m_k` are taken for it, :math:`t_k` rightly. A class without rows is
    left out of the mean; what is taken for it counts against the others all the same.

    Args:
        labels: ``(N,)`` class indices in ``[0, n_classes)``, as ``predicted``.
        predicted: ``(N,)``.
        n_classes: ``K``.
        weights: ``(N,)`` >= 0; None: 1 each.
    Returns:
        In [0, 1].
    Source:
        As the WILDS benchmark has it for iWildCam: scikit-learn's ``f1_score(average="macro", labels=<those that
        occur>)``.
    """
    right = labels == predicted
    own = np.ones(len(labels)) if weights is None else weights
    count = np.bincount(labels, own, minlength=n_classes)
    taken = np.bincount(predicted, own, minlength=n_classes)
    hits = np.bincount(labels[right], own[right], minlength=n_classes)
    there = count > 0
    return float(np.mean(2 * hits[there] / (count + taken)[there]))
