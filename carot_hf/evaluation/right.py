"""The labels that a set's logits are held against, where an image has several right ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.rows import LogitRows, row_chunks
from ..data.shift_set import ShiftSet


def settled(logits: LogitRows, labels: Tensor, data: ShiftSet) -> Tensor:
    """Return the ``(n,)`` labels to measure with: of several right ones of an image the one that is most likely.

    So an answer is right if it is one of them, as ImageNet-Hard counts, and a conformal set holds the class if it holds
    one of them. NLL and Brier score are those of the most likely one.

    Args:
        logits: ``(n, labels)`` of the set.
        labels: ``(n,)`` as they were read.
        data: The set.
    Raises:
        ValueError: If a label that was read is none of the right ones, or there are right labels for another number of
            images.
    """
    if data.right is None:
        return labels
    if len(data.right) != len(logits):
        raise ValueError(
            f"Expected the right labels of each of the {len(logits):,} images of set '{data.name}', got "
            f"{len(data.right):,}. Set `right` anew after rows were taken away."
        )
    known = torch.from_numpy(data.right.labels) == labels.cpu()[:, None]
    if not bool(known.any(dim=1).all()):
        row = int((~known.any(dim=1)).nonzero()[0, 0])
        raise ValueError(
            f"Expected the label of each image of set '{data.name}' among its right ones, got {int(labels[row])} in "
            f"row {row}, where {data.right.labels[row].tolist()} are right. Set `right` in the order of the rows, with "
            "the numbers of the suite's classes."
        )
    found = [data.right.likeliest(rows, start) for start, rows, _ in row_chunks(logits, labels)]
    return torch.cat(found).to(labels.device)
