"""From data sets to batches: the order of the samples, the collator.

Whatever is random about a sample (its crop, its template) is a function of the seed and of the number of the *draw*,
``epoch * len(dataset) + index``. Nothing depends on worker processes, prefetching, the number of devices or on
where a run was interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..basics.error_notes import note
from ..basics.escape import guarded
from .captions import CaptionTable
from .images import BadImageError
from .own_transform import WrongPixelsError
from .stream import StreamedSet, row_of
from .transforms import image_batch

logger = guarded(logging.getLogger(__name__))

_CAPTION = 1  # beside seed and number of the draw: crops and templates stay those of samples with one caption


class ReadSet(Dataset):  # type: ignore[type-arg]
    """The items of a set; one whose image cannot be decoded is an error, or replaced by the next that can be.

    An item that stands in for others has ``"replaced"``: pairs of set and index.

    Args:
        data: A ``ShiftSet``.
        skip: Replace in place of raising; never in a set whose images have several right labels.
        min_size: Width and height that are enough; see :func:`~carot_hf.data.images.read_image`.
    """

    def __init__(self, data: Any, *, skip: bool, min_size: tuple[int, int] | None = None) -> None:
        several = getattr(data, "right", None) is not None  # they are those of the rows: no other image stands in
        self.data, self.skip, self.min_size = data, skip and not several, min_size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        replaced: list[tuple[str, int]] = []
        reason: BadImageError | None = None
        for step in range(len(self.data)):
            place = (index + step) % len(self.data)
            try:
                item: dict[str, Any] = self.data.fetch(place, min_size=self.min_size)
            except BadImageError as error:
                if not self.skip:
                    raise
                reason = error
                replaced.append((self.data.name, place))
            else:
                return {**item, "replaced": replaced} if replaced else item
        raise BadImageError(
            f"Expected an image that can be decoded in set '{self.data.name}', got none. The last error: {reason}"
        ) from reason


class DrawnSet(Dataset):  # type: ignore[type-arg]
    """A training set seen through numbers of draws: item ``epoch * n + index`` is sample ``index`` plus that number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        return {**self.dataset[draw % len(self.dataset)], "draw": draw}


class DrawSampler(Sampler[int]):
    """Yield each sample of a :class:`DrawnSet` once, as numbers of draws, in an order fixed by seed and epoch.

    Args:
        size: Number of samples.
        seed: Seed of the order.
        epoch: Called when an epoch starts; returns its number.
        shuffle: ``False`` keeps the order of the data set.
        whole: Leave out what remains of an epoch when groups of so many samples are full.
    """

    def __init__(self, size: int, seed: int, epoch: Callable[[], int], *, shuffle: bool = True, whole: int = 1) -> None:
        self.size, self.seed, self.epoch, self.shuffle, self.whole = size, seed, epoch, shuffle, whole

    def __len__(self) -> int:
        return self.size - self.size % self.whole

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        order = np.random.default_rng((self.seed, epoch)).permutation(self.size) if self.shuffle else range(self.size)
        return (epoch * self.size + int(index) for index in order[: len(self)])


class ShareSampler(Sampler[list[int]]):
    """Yield a process's share of each batch; what remains at the end of an epoch is shared out as evenly as can be.

    No sample is repeated to fill a batch up: it would be a false negative of itself. Fewer remaining samples than
    processes are left out.

    Args:
        sampler: Yields the samples of an epoch, the same in each process.
        batch_size: Samples of a process in a whole batch.
        rank: Number of the process.
        world: Number of processes.
        drop_last: Leave out what remains.
    """

    def __init__(
        self, sampler: DrawSampler, batch_size: int, rank: int, world: int, *, drop_last: bool = False
    ) -> None:
        self.sampler, self.batch_size, self.rank, self.world = sampler, batch_size, rank, world
        self.drop_last = drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size * self.world)
        return whole + (rest >= self.world and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order, whole = list(self.sampler), self.batch_size * self.world
        for start in range(0, len(order), whole):
            batch = order[start : start + whole]
            if len(batch) >= (whole if self.drop_last else self.world):
                size, larger = divmod(len(batch), self.world)  # the first processes take one more
                begin = self.rank * size + min(self.rank, larger)
                yield batch[begin : begin + size + (self.rank < larger)]


class ReplacedCollator:
    """Put the pairs of set and index in the samples' ``"replaced"`` beside what another collator makes of the rest."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the other collator's batch, and ``"replaced"`` if there is such a pair."""
        rest = [{key: value for key, value in sample.items() if key != "replaced"} for sample in samples]
        replaced = [pair for sample in samples for pair in sample.get("replaced", ())]
        return {**self.collator(rest), **({"replaced": replaced} if replaced else {})}


class CaRotCollator:
    """Samples to a batch, inside the workers: uint8 pixels, labels and, in training, captions.

    A sample with a ``draw`` is a training sample: it is cropped at random and gets one template, drawn uniformly and
    filled with its class name. Without one it is resized and centre-cropped.

    Args:
        transform: The image transform, as it is or of :mod:`carot_hf.data.own_transform`.
        captions: Tokens by class and template.
        seed: Seed of the crops and templates.
        place: Says which sample a draw is of, for errors.
    """

    def __init__(
        self, transform: Any, captions: CaptionTable, seed: int, place: Callable[[int], str] = "draw {}".format
    ) -> None:
        self.transform, self.captions, self.seed, self.place = transform, captions, seed, place

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``pixel_values`` ``(b, 3, h, w)`` uint8, ``labels`` ``(b,)`` int64 and, in training, the tokens.

        Captions that several samples have are there once; ``caption_index`` then says which one each sample has.
        Of a `PatchTransform` the pixels are what the image processor gives, a batch of it. Samples without labels give
        a batch without them.
        """
        batch: dict[str, Any]
        if "draw" in samples[0]:
            batch = self._drawn(samples)
        else:
            batch = image_batch([self.transform.evaluate(sample["image"]) for sample in samples])
        if "label" in samples[0]:
            batch["labels"] = torch.tensor([sample["label"] for sample in samples])
        return batch

    def _caption(self, sample: Mapping[str, Any]) -> str:
        """A sample's own caption; of several one that is drawn by its number."""
        caption = sample["caption"]
        if isinstance(caption, str):
            return caption
        generator = np.random.default_rng((self.seed, sample["draw"], _CAPTION))
        return str(caption[int(generator.integers(len(caption)))])

    def _varied(self, sample: Mapping[str, Any], generator: np.random.Generator) -> Any:
        """A training image; an error of a transform of the user's says which sample it is of."""
        try:
            return self.transform.train(sample["image"], generator)
        except WrongPixelsError as error:
            raise ValueError(error.of(self.place(sample["draw"]))) from None
        except Exception as error:  # of the transform's own code, which is not ours to judge
            note(error, f"Raised by the transform of training images for {self.place(sample['draw'])}.")
            raise

    def _drawn(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Random crops, and each sample's own caption or a template with its class name."""
        pixels, templates = [], []
        for sample in samples:
            generator = np.random.default_rng((self.seed, sample["draw"]))
            templates.append(int(generator.integers(self.captions.n_templates)))
            pixels.append(self._varied(sample, generator))
        if "caption" in samples[0]:
            tokens = self.captions.tokenize_once([self._caption(sample) for sample in samples])
        else:
            labels = torch.tensor([sample["label"] for sample in samples])
            tokens = self.captions.lookup_once(labels, torch.tensor(templates))
        return {**image_batch(pixels), **tokens}


@dataclass(frozen=True)
class DrawPlace:
    """Says which sample of a set a draw is of.

    Attributes:
        name: Of the set.
        size: Of the set; ``None``: it is a stream.
    """

    name: str
    size: int | None

    def __call__(self, draw: int) -> str:
        """``set 'train' at index 7``; of a stream its row."""
        where = f"row {row_of(draw)}" if self.size is None else f"index {draw % self.size}"
        return f"set '{self.name}' at {where}"


def collator_of(transform: Any, captions: CaptionTable, seed: int, data: Any) -> CaRotCollator:
    """Make the collator of a training; the tokens of captions that a set brings are computed at once."""
    own = getattr(data, "captions", None) or []
    texts = [text for given in own for text in ([given] if isinstance(given, str) else given)]
    if texts and (cut := captions.remember(texts)):
        logger.warning("%d of %d captions are longer than the model's context, and are cut.", cut, len(texts))
    size = None if isinstance(data, StreamedSet) or not hasattr(data, "__len__") else len(data)
    return CaRotCollator(transform, captions, seed, DrawPlace(getattr(data, "name", "train"), size))
