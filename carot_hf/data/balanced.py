"""Class-balanced epochs: as long as before, with every class in them as often as every other.

Each class goes round its own images, in an order of its own, and an epoch goes on where the last one stopped. So the
images of a rare class repeat within an epoch, evenly; those of a frequent one are left out of it, and come in the next
ones. All is a function of the labels, the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batches import DrawSampler
from .stream import StreamedSet

_ROUND = 2  # beside seed and class: the order of its images
_SPREAD = 3  # beside seed and epoch: which batch


class BalancedSampler(DrawSampler):
    """Yield numbers of draws of a :class:`~carot_hf.data.batches.DrawnSet`, of each class as many.

    The k-th time that an image comes it has the number ``k * n + index``: each time another crop and another caption.

    Args:
        labels: ``(n,)`` class of each image; classes without images do not count.
        seed: Seed of the order.
        epoch: Called when an epoch starts; returns its number.
        pairs: Samples of a batch; those of one image are spread over as many batches as there are.
        whole: Leave out what remains of an epoch when groups of so many samples are full.
    """

    def __init__(
        self, labels: NDArray[Any], seed: int, epoch: Callable[[], int], *, pairs: int, whole: int = 1
    ) -> None:
        super().__init__(len(labels), seed, epoch, whole=whole)
        self.pairs = pairs
        there, counts = np.unique(labels, return_counts=True)
        rows = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])  # of each class
        self._rounds = [
            np.random.default_rng((seed, label, _ROUND)).permutation(images)
            for label, images in zip(there.tolist(), rows, strict=True)
        ]

    def __iter__(self) -> Iterator[int]:
        epoch, rows = self.epoch(), self.size
        counts = np.array([len(images) for images in self._rounds])
        starts, ends = (drawn_before(len(self), len(counts), number) for number in (epoch, epoch + 1))
        found = []
        for images, start, end in zip(self._rounds, starts.tolist(), ends.tolist(), strict=True):
            rounds, places = np.divmod(np.arange(start, end), len(images))
            found.append(rounds * rows + images[places])
        generator = np.random.default_rng((self.seed, epoch, _SPREAD))
        return iter(spread(np.concatenate(found), rows, self.pairs, generator).tolist())


def drawn_before(size: int, classes: int, epoch: int) -> NDArray[np.int64]:
    r"""Count how often each class has been drawn before an epoch.

    An epoch of :math:`n` samples has :math:`\lfloor n / K \rfloor` of each of :math:`K` classes, and one more of
    :math:`n \bmod K` of them, which are the next ones in each epoch.

    Args:
        size: Samples of an epoch, :math:`n`.
        classes: :math:`K`.
        epoch: Its number, from 0.
    Returns:
        ``(K,)`` int64.
    """
    each, more = divmod(size, classes)
    return epoch * each + (epoch * more + classes - 1 - np.arange(classes)) // classes


def balanced_counts(counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Count how often each class comes in the first epoch.

    Args:
        counts: ``(K,)`` images of each class.
        size: Samples of an epoch.
    Returns:
        ``(K,)``; 0 of a class without images.
    """
    found = np.zeros_like(counts)
    there = counts > 0
    found[there] = drawn_before(size, int(there.sum()), 1)
    return found


def spread(draws: NDArray[np.int64], rows: int, pairs: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Order draws so that those of one image lie in as many batches as there are.

    The images are dealt out to the batches like cards, those of one image one after the other.

    Args:
        draws: ``(m,)`` numbers; ``draw % rows`` is the image.
        rows: Images of the set.
        pairs: Samples of a batch; what remains makes a last, smaller one.
        generator: Draws the order.
    Returns:
        ``(m,)``: the first ``pairs`` of them are the first batch.
    """
    batches, rest = divmod(len(draws), pairs)
    images = generator.permutation(rows)[draws % rows]  # in a new order, each as often as it comes
    dealt = np.concatenate([np.tile(np.arange(batches + 1), rest), np.tile(np.arange(batches), pairs - rest)])
    place = np.append(generator.permutation(batches), batches)[dealt]  # the smaller one stays the last
    by_image = draws[np.lexsort((draws, images))]
    return by_image[np.lexsort((generator.random(len(draws)), place))]


def balanced_labels(data: Any) -> NDArray[Any]:
    """Return the labels of a set whose classes can be balanced.

    Raises:
        ValueError: If it is a stream, has no labels, or only such as are known by reading.
    """
    cure = "Leave `class_balanced` out."
    if data.label_column is None:
        raise ValueError(
            f"Expected labels in set '{data.name}' for `class_balanced`, got captions alone. Name a `label_column`. "
            f"{cure}"
        )
    if isinstance(data, StreamedSet):
        raise ValueError(
            f"Expected a set with rows by number for `class_balanced`, got the stream '{data.name}'. Load it without "
            f"`streaming`. {cure}"
        )
    if data.labels is None:
        raise ValueError(
            f"Expected the labels of set '{data.name}' at once for `class_balanced`, got a set whose labels are known "
            f"only by reading its images. Pass them: ShiftSet(..., labels=[...]). {cure}"
        )
    found: NDArray[Any] = data.labels
    return found
