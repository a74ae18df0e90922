"""From a PIL image to what a model takes: random crops in training, the processor's own way in evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_TORCH_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's filters: torch's, with antialias


@dataclass(frozen=True)
class ImageTransform:
    """PIL image to uint8 tensor, for training (random resized crop) and for evaluation (resize, centre crop).

    Args:
        size: Short side after the resize of the evaluation, in pixels; ``None``: the whole image is resized to
            ``crop``, whatever its shape (SigLIP, ChineseCLIP).
        crop: Height and width that the model takes, in pixels.
        mean: Mean of each colour channel, in [0, 1].
        std: Standard deviation of each colour channel.
        resample: PIL's filter; 3 is bicubic.
        scale: Range of the area of the training crop, as a share of the image.
        ratio: Range of the aspect ratio of the training crop.
    Source:
        FLYP and CaRot: scale (0.9, 1.0), bicubic, no flip. The evaluation equals the PIL backend of transformers' image
        processor.
    """

    size: int | None
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @classmethod
    def from_processor(cls, processor: Any) -> ImageTransform:
        """Read sizes, filter, mean and standard deviation from a processor or its image processor.

        Raises:
            ValueError: If the processor does neither resize the short side and crop the centre, as CLIP's does, nor
                resize to a height and a width, as SigLIP's does.
        """
        processor = getattr(processor, "image_processor", processor)
        size, crop = processor.size or {}, getattr(processor, "crop_size", None) or {}
        square = size.get("height") if size.get("height") == size.get("width") else None
        short = size.get("shortest_edge", square)
        centred = bool(getattr(processor, "do_center_crop", False))
        whole = not centred and "height" in size and "width" in size
        if not (processor.do_resize and processor.do_normalize and (whole or (centred and short is not None))):
            raise ValueError(
                "Expected an image processor that normalises, and resizes the short side and crops the centre or "
                f"resizes to height and width, got {type(processor).__name__} with size={dict(size)} and "
                f"do_center_crop={centred}. Pass the processor of the checkpoint."
            )
        height, width = (crop if centred else size)["height"], (crop if centred else size)["width"]
        if centred and short < max(height, width):
            raise ValueError(
                f"Expected a resize to at least the crop, got shortest_edge={short} and a crop of {height} x {width}. "
                "Correct the processor's `size` or `crop_size`."
            )
        return cls(
            size=short if centred else None,
            crop=(height, width),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            resample=int(processor.resample),
        )

    def evaluate(self, image: Image.Image) -> Tensor:
        """Resize, and crop the centre unless the whole image is resized: ``(3, height, width)`` uint8."""
        height, width = self.crop
        if self.size is None:
            return _to_tensor(image if image.size == (width, height) else image.resize((width, height), self.resample))
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
        box = random_box(image.width, image.height, generator, self.scale, self.ratio)
        shrinks = box[2] - box[0] >= width and box[3] - box[1] >= height
        if shrinks and self.resample in _TORCH_MODES and _has_vector_resize():
            pixels = _to_tensor(image.crop(box))[None]
            return F.interpolate(pixels, (height, width), mode=_TORCH_MODES[self.resample], antialias=True)[0]
        return _to_tensor(image.resize((width, height), self.resample, box=box))


class PatchTransform:
    """PIL image to patches for a model that takes images of any shape (SigLIP 2 NaFlex), by its image processor.

    Training crops at random as `ImageTransform` does, with the shape that the crop has; what follows is the processor.

    Args:
        processor: A ``Siglip2Processor`` or its image processor.
        scale: Range of the area of the training crop, as a share of the image.
        ratio: Range of the aspect ratio of the training crop.
    """

    train_size = None  # how large an image must be decoded follows from its shape: at full size

    def __init__(
        self, processor: Any, scale: tuple[float, float] = (0.9, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        self._processor = getattr(processor, "image_processor", processor)
        self.scale, self.ratio = scale, ratio

    def evaluate(self, image: Image.Image) -> dict[str, Tensor]:
        """Resize to as many patches as the processor allows: what it returns, for one image."""
        batch = self._processor(images=[image], return_tensors="pt")
        return {name: values[0] for name, values in batch.items()}

    def train(self, image: Image.Image, generator: np.random.Generator) -> dict[str, Tensor]:
        """Crop at random, then as in evaluation."""
        return self.evaluate(image.crop(random_box(image.width, image.height, generator, self.scale, self.ratio)))


def image_transform(processor: Any) -> ImageTransform | PatchTransform:
    """Make the transform that a model's processor asks for."""
    images = getattr(processor, "image_processor", processor)
    return PatchTransform(images) if hasattr(images, "max_num_patches") else ImageTransform.from_processor(images)


def random_box(
    width: int,
    height: int,
    generator: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom of a crop, given the ranges of its share of the area and of its shape."""
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        shape = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(generator.integers(0, limit + 1)) for limit in (width - w, height - h))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))  # the largest centre crop within the allowed ratios
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _has_vector_resize() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def normalize_pixels(
    pixel_values: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Bring ``(b, 3, h, w)`` uint8 pixels to ``(x / 255 - mean) / std`` of a dtype, on their device."""
    shape = (1, -1, 1, 1)
    mean_ = torch.tensor(mean, dtype=dtype, device=pixel_values.device).view(shape)
    std_ = torch.tensor(std, dtype=dtype, device=pixel_values.device).view(shape)
    return pixel_values.to(dtype, copy=True).div_(255).sub_(mean_).div_(std_)  # one array, not four


def _to_tensor(image: Image.Image) -> Tensor:
    """``(3, h, w)`` uint8, a view of ``(h, w, 3)``: channels last, as the image is."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def image_batch(images: Sequence[Any]) -> dict[str, Tensor]:
    """Join what a transform made of some images."""
    if isinstance(images[0], Mapping):
        return {name: torch.stack([image[name] for image in images]) for name in images[0]}
    return {"pixel_values": _stacked(images)}


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """``(b, 3, h, w)`` of ``(3, h, w)``, in the memory format of the images: values are copied once, in order."""
    if images[0].is_contiguous():
        return torch.stack([*images])
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
