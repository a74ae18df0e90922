"""Sets that are read as a stream, without random access: for training and for evaluation.

Every row has a number that does not depend on who reads it, ``file << 32 | position in the file``. Files are shared
out among the processes and their workers; if there are fewer files than readers, the rows of each file are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from ..basics.escape import guarded
from .images import BadImageError
from .shift_set import ShiftSet

logger = guarded(logging.getLogger(__name__))

T = TypeVar("T")
_READ = 16  # rows taken from a stream at a time
_POSITION_BITS = 32
_EPOCH_BITS = 64
BUFFER = 2048  # rows, still encoded, among which the next one is drawn in training


def shard_rows(rows: Any, shard: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file of a stream, in order, whichever process asks.

    `IterableDataset.__iter__` would share them out among the workers of a ``DataLoader`` once more.
    """
    for batch in rows.shard(rows.num_shards, shard).iter(_READ):
        keys = list(batch)
        yield from (dict(zip(keys, values, strict=True)) for values in zip(*batch.values(), strict=True))


def row_of(draw: int) -> int:
    """Return the number of the row that a draw of `StreamedDraws` is of."""
    return draw & ((1 << _EPOCH_BITS) - 1)


def count_rows(rows: Any) -> int:
    """Count the rows of a stream by reading it."""
    logger.info("Counting the rows of a stream of %d files", rows.num_shards)
    return sum(sum(1 for _ in shard_rows(rows, shard)) for shard in range(rows.num_shards))


class StreamedSet(ShiftSet):
    """A set whose rows come from a ``datasets.IterableDataset``; its length is known, its items only in passing.

    Args:
        rows: The stream, images undecoded.
        name: As for `ShiftSet`, like all that follows but ``size``, ``to_label`` and ``left_out``.
        num_classes: See there.
        size: Rows.
        to_label: From what stands in the label column to the label.
        **options: Options of `ShiftSet`: ``columns``, ``image_column``, ``label_column``, ...
    """

    def __init__(
        self,
        rows: Any,
        *,
        name: str,
        num_classes: int,
        size: int,
        to_label: Callable[[Any], Any],
        **options: Any,
    ) -> None:
        super().__init__(range(size), name=name, num_classes=num_classes, **options)
        self.rows, self.to_label = rows, to_label
        self._left_out: dict[int, set[int]] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise TypeError(
            f"Expected set '{self.name}' to be read by an index, but it is a stream. Load it without `streaming`."
        )

    def subset(self, rows: NDArray[np.int64], name: str) -> ShiftSet:
        """Refuse: a row cannot be had by its number."""
        raise TypeError(f"Expected set '{self.name}' to have rows by number, but it is a stream. Load it whole.")

    def leave_out(self, positions: Mapping[int, set[int]]) -> None:
        """Make rows no part of this set, in place: positions by file."""
        self._left_out = {int(file): set(places) for file, places in positions.items()}
        self.data = range(len(self.data) - sum(len(places) for places in self._left_out.values()))

    def share(self, reader: int, readers: int, order: Sequence[int] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield number and undecoded item of the rows that fall to one reader of several.

        Args:
            reader: In ``[0, readers)``.
            readers: Together they read each row once.
            order: The files in the order in which they are read; ``None``: as they are.
        """
        files = range(self.rows.num_shards) if order is None else order
        by_file = readers <= len(files)
        for file in files[reader::readers] if by_file else files:
            left_out = self._left_out.get(int(file), set())
            for position, item in enumerate(shard_rows(self.rows, int(file))):
                if (by_file or position % readers == reader) and position not in left_out:
                    if self.label_column is not None:
                        item[self.label_column] = self.to_label(item[self.label_column])
                    yield int(file) << _POSITION_BITS | position, item

    def decoded(
        self, rows: Iterable[tuple[int, Any]], *, skip: bool, min_size: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Decode rows of `share`; one that cannot be decoded is an error, or replaced by the next that can be.

        Args:
            rows: Numbers and items.
            skip: Replace in place of raising; the last ones of all are replaced by the one before.
            min_size: See `decode`.
        """
        waiting: list[int] = []
        last: dict[str, Any] | None = None
        for row, item in rows:
            try:
                last = self.decode(item, f"row {row}", min_size=min_size)
            except BadImageError:
                if not skip:
                    raise
                waiting.append(row)
                continue
            yield from ((bad, {**last, "replaced": [(self.name, bad)]}) for bad in waiting)
            yield row, last
            waiting = []
        if waiting and last is None:
            raise BadImageError(f"Expected an image that can be decoded in set '{self.name}', got none. Replace them.")
        yield from ((bad, {**(last or {}), "replaced": [(self.name, bad)]}) for bad in waiting)


class StreamedRows(IterableDataset):  # type: ignore[type-arg]
    """The rows of a set once, for evaluation: ``{"row": number, "image": ..., "label": ...}``.

    Args:
        data: The set.
        rank: This process, in ``[0, world)``; its workers share what falls to it.
        world: Processes.
        skip: Replace images that cannot be decoded.
    """

    def __init__(self, data: StreamedSet, rank: int, world: int, *, skip: bool = False) -> None:
        self.data, self.rank, self.world = data, rank, world
        self.skip = skip and data.right is None  # as of a `ReadSet`

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row, item in self.data.decoded(self.data.share(*_reader(self.rank, self.world)), skip=self.skip):
            yield {**item, "row": row}


class StreamedDraws(IterableDataset):  # type: ignore[type-arg]
    """The rows of a set as training samples, the same number in each process and epoch.

    Files are read in an order drawn anew in each epoch; rows are drawn out of a buffer. A reader whose files are used
    up before the epoch ends begins them again; one whose files are not used up leaves the rest. The order depends on
    the number of processes and workers; the crop and the template of a row in an epoch do not.

    Args:
        data: The set.
        batch_size: Rows of a batch; a worker gives whole batches.
        batches: Of one process in an epoch.
        rank: This process, in ``[0, world)``.
        world: Processes.
        seed: Of the order.
        min_size: Width and height that the image is resized to at least; lets JPEGs be decoded smaller.
        buffer: Rows among which the next one is drawn.
        skip: Replace images that cannot be decoded.
    """

    def __init__(
        self,
        data: StreamedSet,
        *,
        batch_size: int,
        batches: int,
        rank: int,
        world: int,
        seed: int,
        min_size: tuple[int, int] | None = None,
        buffer: int = BUFFER,
        skip: bool = False,
    ) -> None:
        self.data, self.batch_size, self.batches = data, batch_size, batches
        self.rank, self.world, self.seed, self.min_size, self.buffer = rank, world, seed, min_size, buffer
        self.skip = skip
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay see it change

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; the loader calls it."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, (part, parts) = int(self._epoch), _reader(0, 1)  # among the workers of this process
        left = self.batch_size * (self.batches // parts + (part < self.batches % parts))
        reader, readers = _reader(self.rank, self.world)
        passes = 0
        while left:
            order = np.random.default_rng((self.seed, epoch, passes)).permutation(self.data.rows.num_shards)
            drawn = np.random.default_rng((self.seed, epoch, passes, reader))
            begun = left
            rows = _shuffled(self.data.share(reader, readers, order.tolist()), drawn, self.buffer)
            for row, item in self.data.decoded(rows, skip=self.skip, min_size=self.min_size):
                yield {**item, "draw": (epoch << _EPOCH_BITS) | row}
                left -= 1
                if not left:
                    return
            if left == begun:
                raise ValueError(
                    f"Expected rows of set '{self.data.name}' for each of {readers} readers, got none for reader "
                    f"{reader}. Use fewer processes or `dataloader_num_workers`."
                )
            passes += 1


class RowCollator:
    """The numbers of the rows beside the batch that another collator makes of them."""

    def __init__(self, collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return ``(b,)`` int64 and the batch."""
        rest = [{key: value for key, value in sample.items() if key != "row"} for sample in samples]
        return torch.tensor([sample["row"] for sample in samples]), self._collator(rest)


def _reader(rank: int, world: int) -> tuple[int, int]:
    """Number of this worker among those of all processes, and how many there are."""
    worker = get_worker_info()
    part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
    return rank * parts + part, world * parts


def _shuffled(items: Iterable[T], generator: np.random.Generator, size: int) -> Iterator[T]:
    """Yield the items in an order drawn out of a buffer of `size`."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(generator.integers(size))
        yield buffer[place]
        buffer[place] = item
    yield from (buffer[place] for place in generator.permutation(len(buffer)).tolist())
