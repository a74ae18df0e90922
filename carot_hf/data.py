"""From data sets to batches: image transforms, the order of the samples, the collator.

Whatever is random about a sample (its crop, its template) is a function of the seed and of the number of the *draw*,
``epoch * len(dataset) + index``. Nothing depends on worker processes, prefetching, the number of devices or on
where a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .images import BadImageError
from .prompts import CaptionTable

_TORCH_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's filters: torch's, with antialias


@dataclass(frozen=True)
class ImageTransform:
    """PIL image to uint8 tensor, for training (random resized crop) and for evaluation (resize, centre crop).

    Args:
        size: Short side after the resize of the evaluation, in pixels.
        crop: Height and width that the model takes, in pixels.
        mean: Mean of each colour channel, in [0, 1].
        std: Standard deviation of each colour channel.
        resample: PIL's filter; 3 is bicubic.
        scale: Range of the area of the training crop, as a share of the image.
        ratio: Range of the aspect ratio of the training crop.
    Source:
        FLYP and CaRot: scale (0.9, 1.0), bicubic, no flip. The evaluation equals the PIL backend of CLIPImageProcessor.
    """

    size: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @classmethod
    def from_processor(cls, processor: Any) -> ImageTransform:
        """Read sizes, filter, mean and standard deviation from a ``CLIPProcessor`` or its image processor.

        Raises:
            ValueError: If the processor does not resize the short side and crop the centre, as CLIP's does.
        """
        processor = getattr(processor, "image_processor", processor)
        size, crop = processor.size, processor.crop_size
        short = size.get("shortest_edge", size.get("height") if size.get("height") == size.get("width") else None)
        if short is None or not (processor.do_resize and processor.do_center_crop and processor.do_normalize):
            raise ValueError(
                "Expected an image processor that resizes the short side, crops the centre and normalises, got "
                f"{type(processor).__name__} with size={dict(size)}. Pass the CLIPProcessor of the checkpoint."
            )
        height, width = crop["height"], crop["width"]
        if short < max(height, width):
            raise ValueError(
                f"Expected a resize to at least the crop, got shortest_edge={short} and a crop of {height} x {width}. "
                "Correct the processor's `size` or `crop_size`."
            )
        return cls(
            size=short,
            crop=(height, width),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            resample=int(processor.resample),
        )

    def evaluate(self, image: Image.Image) -> Tensor:
        """Resize the short side and crop the centre: ``(3, height, width)`` uint8."""
        height, width = self.crop
        short, long = sorted(image.size)
        scaled = (self.size, int(self.size * long / short))
        target = scaled if image.width <= image.height else scaled[::-1]
        if target != image.size:
            image = image.resize(target, self.resample)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return _to_tensor(image.crop((left, top, left + width, top + height)))

    @property
    def train_size(self) -> tuple[int, int]:
        """Width and height of an image whose smallest random crop is as large as what the model takes."""
        share = math.sqrt(self.scale[0] * min(self.ratio[0], 1 / self.ratio[1]))
        height, width = (math.ceil(side / share) + 1 for side in self.crop)
        return width, height

    def train(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """Crop at random and resize: ``(3, height, width)`` uint8.

        A crop that shrinks is resized by torch where torch has vector code for it (x86 with AVX2), else by PIL. Both
        filter alike; on photographs about 1 in 100 values differs, nearly all of them by 1.
        """
        height, width = self.crop
        box = self._random_box(image.width, image.height, generator)
        shrinks = box[2] - box[0] >= width and box[3] - box[1] >= height
        if shrinks and self.resample in _TORCH_MODES and _has_vector_resize():
            pixels = _to_tensor(image.crop(box))[None]
            return F.interpolate(pixels, (height, width), mode=_TORCH_MODES[self.resample], antialias=True)[0]
        return _to_tensor(image.resize((width, height), self.resample, box=box))

    def _random_box(self, width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = (int(generator.integers(0, limit + 1)) for limit in (width - w, height - h))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))  # the largest centre crop within the allowed ratios
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def _has_vector_resize() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def normalize_pixels(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bring ``(b, 3, h, w)`` uint8 pixels to float32 ``(x / 255 - mean) / std`` on their device."""
    shape = (1, -1, 1, 1)
    mean_ = torch.tensor(mean, device=pixel_values.device).view(shape)
    std_ = torch.tensor(std, device=pixel_values.device).view(shape)
    return pixel_values.to(torch.float32, copy=True).div_(255).sub_(mean_).div_(std_)  # one array, not four


class ReadSet(Dataset):  # type: ignore[type-arg]
    """The items of a set; one whose image cannot be decoded is an error, or replaced by the next that can be.

    An item that stands in for others has ``"replaced"``: pairs of set and index.

    Args:
        data: A ``ShiftSet``.
        skip: Replace in place of raising.
        min_size: Width and height that are enough; see :func:`~carot_hf.images.read_image`.
    """

    def __init__(self, data: Any, *, skip: bool, min_size: tuple[int, int] | None = None) -> None:
        self.data, self.skip, self.min_size = data, skip, min_size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        replaced: list[tuple[str, int]] = []
        reason: BadImageError | None = None
        for step in range(len(self.data)):
            place = (index + step) % len(self.data)
            try:
                item: dict[str, Any] = self.data.read(place, min_size=self.min_size)
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
    """

    def __init__(self, sampler: DrawSampler, batch_size: int, rank: int, world: int) -> None:
        self.sampler, self.batch_size, self.rank, self.world = sampler, batch_size, rank, world

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size * self.world)
        return whole + (rest >= self.world)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, len(order), self.batch_size * self.world):
            batch = order[start : start + self.batch_size * self.world]
            if len(batch) >= self.world:
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
        transform: The image transform.
        captions: Tokens by class and template.
        seed: Seed of the crops and templates.
    """

    def __init__(self, transform: ImageTransform, captions: CaptionTable, seed: int) -> None:
        self.transform, self.captions, self.seed = transform, captions, seed

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``pixel_values`` ``(b, 3, h, w)`` uint8, ``labels`` ``(b,)`` int64 and, in training, the tokens.

        Samples without labels give a batch without them.
        """
        batch: dict[str, Any]
        if "draw" in samples[0]:
            batch = self._drawn(samples)
        else:
            batch = {"pixel_values": _stacked([self.transform.evaluate(sample["image"]) for sample in samples])}
        if "label" in samples[0]:
            batch["labels"] = torch.tensor([sample["label"] for sample in samples])
        return batch

    def _drawn(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Random crops, and each sample's own caption or a template with its class name."""
        pixels, templates = [], []
        for sample in samples:
            generator = np.random.default_rng((self.seed, sample["draw"]))
            templates.append(int(generator.integers(self.captions.n_templates)))
            pixels.append(self.transform.train(sample["image"], generator))
        if "caption" in samples[0]:
            tokens = self.captions.tokenize([sample["caption"] for sample in samples])
        else:
            labels = torch.tensor([sample["label"] for sample in samples])
            tokens = self.captions.lookup(labels, torch.tensor(templates))
        return {"pixel_values": _stacked(pixels), **tokens}


def _to_tensor(image: Image.Image) -> Tensor:
    """``(3, h, w)`` uint8, a view of ``(h, w, 3)``: channels last, as the image is."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """``(b, 3, h, w)`` of ``(3, h, w)``, in the memory format of the images: values are copied once, in order."""
    if images[0].is_contiguous():
        return torch.stack([*images])
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
