"""From a PIL image to what a model takes: random crops in training, the processor's own way in evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..basics.precision import wide_dtype

_LEVELS = 2.0  # of 255 by which the pixels of a processor may differ in the mean: torchvision's do by less than 1
_LONG = 32  # times as long as wide is an image of which the crop is cut out before it is resized
_SUPPORT = 3  # pixels to each side that the widest of PIL's filters (Lanczos) takes into account
_TORCH_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's filters: torch's, with antialias


@dataclass(frozen=True)
class ImageTransform:
    """PIL image to uint8 tensor, for training (random resized crop) and for evaluation (resize, centre crop).

    Args:
        size: Short side after the resize of the evaluation, in pixels, or height and width whatever the shape of the
            image; ``None``: those of ``crop`` (SigLIP, ChineseCLIP).
        crop: Height and width that the model takes, in pixels.
        mean: Of each colour channel, taken off pixels in [0, 1]; a processor's own ``rescale_factor`` is in it.
        std: What they are then divided by, likewise.
        resample: PIL's filter; 3 is bicubic.
        scale: Range of the area of the training crop, as a share of the image.
        ratio: Range of the aspect ratio of the training crop.
    Source:
        FLYP and CaRot: scale (0.9, 1.0), bicubic, no flip. The evaluation equals the PIL backend of transformers' image
        processor.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @classmethod
    def from_processor(cls, processor: Any) -> ImageTransform:
        """Read all options of a processor or of its image processor, and compare with what it makes of an image.

        Raises:
            ValueError: If an option is one that cannot act here; the message names it.
        """
        images = getattr(processor, "image_processor", processor)
        _check_flags(images)
        centred = bool(getattr(images, "do_center_crop", False))
        size, crop = _size_of(images), _sides_of(getattr(images, "crop_size", None)) if centred else None
        if crop is None and (centred or not isinstance(size, tuple)):
            option = "crop_size" if centred else "do_center_crop"
            raise ValueError(
                "Expected an image processor that resizes to a height and a width, or crops the centre to `crop_size`, "
                f"got {type(images).__name__} with `{option}` {getattr(images, option, None)}. Pass the processor of "
                "the checkpoint."
            )
        smallest = size if isinstance(size, tuple) else (size, size)
        height, width = smallest if crop is None else crop
        if height > smallest[0] or width > smallest[1]:
            raise ValueError(
                f"Expected a resize to at least the crop, got `size` {dict(images.size)} and a crop of {height} x "
                f"{width}. Correct the processor's `size` or `crop_size`."
            )
        mean, std = _normalisation_of(images)
        made = cls(
            size=None if size == (height, width) else size,
            crop=(height, width),
            mean=mean,
            std=std,
            resample=_filter_of(images),
        )
        _compare(images, made)
        return made

    def evaluate(self, image: Image.Image) -> Tensor:
        """Resize, and crop the centre unless the whole image is resized: ``(3, height, width)`` uint8.

        Of an image more than 32 times as long as it is wide, what the crop shows is cut out and then resized: the same
        pixels to within rounding, without a resized image of as many times the crop.
        """
        height, width = self.crop
        size = self.crop if self.size is None else self.size
        if isinstance(size, tuple):
            target = size[::-1]
        else:
            short, long = sorted(image.size)
            scaled = (size, int(size * long / short))
            target = scaled if image.width <= image.height else scaled[::-1]
        left, top = (target[0] - width) // 2, (target[1] - height) // 2
        box = (left, top, left + width, top + height)
        if not isinstance(size, tuple) and max(image.size) > _LONG * min(image.size):
            return to_tensor(_resized_part(image, target, box, self.resample))
        return to_tensor(_resized(image, target, self.resample).crop(box))

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
            pixels = to_tensor(image.crop(box))[None]
            return F.interpolate(pixels, (height, width), mode=_TORCH_MODES[self.resample], antialias=True)[0]
        return to_tensor(image.resize((width, height), self.resample, box=box))


@dataclass(eq=False)
class PatchTransform:
    """PIL image to patches for a model that takes images of any shape (SigLIP 2 NaFlex), by its image processor.

    Training crops at random as `ImageTransform` does, with the shape that the crop has; what follows is the processor.

    Args:
        processor: A ``Siglip2Processor`` or its image processor.
        scale: Range of the area of the training crop, as a share of the image.
        ratio: Range of the aspect ratio of the training crop.
    Raises:
        ValueError: If an option is one that cannot act here; the message names it.
    """

    processor: Any
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    train_size = None  # how large an image must be decoded follows from its shape: at full size

    def __post_init__(self) -> None:
        self.processor = getattr(self.processor, "image_processor", self.processor)
        _check_flags(self.processor)

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return int(self.processor.patch_size)

    def evaluate(self, image: Image.Image) -> dict[str, Tensor]:
        """Resize to as many patches as the processor allows: what it returns, for one image."""
        batch = self.processor(images=[image], return_tensors="pt")
        return {name: values[0] for name, values in batch.items()}

    def train(self, image: Image.Image, generator: np.random.Generator) -> dict[str, Tensor]:
        """Crop at random, then as in evaluation."""
        return self.evaluate(image.crop(random_box(image.width, image.height, generator, self.scale, self.ratio)))


def image_transform(processor: Any) -> ImageTransform | PatchTransform:
    """Make the transform that a model's processor asks for."""
    images = getattr(processor, "image_processor", processor)
    return PatchTransform(images) if hasattr(images, "max_num_patches") else ImageTransform.from_processor(images)


def check_processor(processor: Any) -> None:
    """Refuse what is no processor of images and texts, such as a tokenizer or an image processor alone.

    Raises:
        TypeError: If it lacks either.
    """
    held = {name: getattr(processor, name, None) is not None for name in ("image_processor", "tokenizer")}
    if not all(held.values()):
        missing = "tokenizer" if held["image_processor"] or hasattr(processor, "image_mean") else "image processor"
        raise TypeError(
            f"Expected the processor of the model, with an image processor and a tokenizer, got "
            f"{type(processor).__name__}, which has no {missing}. Load it with AutoProcessor.from_pretrained(...)."
        )


def short_side(transform: ImageTransform) -> int:
    """Return the short side of an image when it is resized for the evaluation, in pixels."""
    size = transform.crop if transform.size is None else transform.size
    return size if isinstance(size, int) else min(size)


def check_image_size(model: Any, transform: ImageTransform | PatchTransform) -> None:
    """Refuse a processor that gives images of another size than a model with a ``vision_config`` takes.

    Raises:
        ValueError: If the sizes, or those of the patches, are not the same.
    """
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    takes: Any
    if isinstance(transform, PatchTransform):
        what, options, gives = "patches", "`patch_size`", (transform.patch_size, transform.patch_size)
        takes = getattr(vision, "patch_size", None)
    else:
        what, options, gives = "images", "`size` and `crop_size`", transform.crop
        takes = getattr(vision, "image_size", None)
    takes = (takes, takes) if isinstance(takes, int) else takes
    if takes is not None and tuple(takes) != gives:
        cure = f"or set its {options}"
        if isinstance(transform, ImageTransform) and _can_be_fitted(model, gives):
            cure = f"set its {options}, or fit the model: carot_hf.models.backbones.fit_image_size(model, {gives[0]})"
        raise ValueError(
            f"Expected a processor that gives {what} of {takes[0]} x {takes[1]} pixels, which {type(model).__name__} "
            f"takes, got one that gives {gives[0]} x {gives[1]}. Pass the processor of this checkpoint, {cure}."
        )


def _can_be_fitted(model: Any, size: tuple[int, int]) -> bool:
    """Whether :func:`~carot_hf.models.backbones.fit_image_size` takes a model of two towers and a size."""
    patch = getattr(model.config.vision_config, "patch_size", None)
    paired = getattr(model.config, "text_config", None) is not None
    return paired and isinstance(patch, int) and size[0] == size[1] and size[0] % patch == 0


def _check_flags(images: Any) -> None:
    """Refuse what no transform here does."""
    for option, wanted, cure in (
        ("do_resize", True, "Images come in any size: leave it True, and set `size`."),
        ("do_rescale", True, "Images are decoded to values from 0 to 255 here: leave it True, and set `rescale_factor` "
         "if the model takes another range than 0 to 1."),
        ("do_pad", False, "Images are resized and cropped to one size: leave it out, and set `size` and `crop_size`."),
    ):  # fmt: skip
        if bool(getattr(images, option, wanted)) is not wanted:
            raise ValueError(f"Expected an image processor with `{option}` {wanted}, got {not wanted}. {cure}")


def _sides_of(size: Any) -> tuple[int, int] | None:
    """Height and width, if a mapping of sizes has these."""
    given = dict(size or {})
    return (int(given["height"]), int(given["width"])) if {"height", "width"} <= given.keys() else None


def _size_of(images: Any) -> int | tuple[int, int]:
    """What ``size`` says: the short side, or height and width."""
    given = {name: side for name, side in dict(images.size or {}).items() if side is not None}
    if given.keys() == {"shortest_edge"}:
        return int(given["shortest_edge"])
    if given.keys() != {"height", "width"}:
        raise ValueError(
            "Expected an image processor with a `size` of shortest_edge, or of height and width, got "
            f"{type(images).__name__} with `size` {given}. Pass the processor of the checkpoint."
        )
    return int(given["height"]), int(given["width"])


def _filter_of(images: Any) -> int:
    """PIL's number of the filter that ``resample`` names."""
    try:
        return int(Image.Resampling(images.resample))
    except ValueError as error:
        raise ValueError(
            f"Expected `resample` of the image processor as one of PIL's filters, got {images.resample!r}. Set it to, "
            "for example, PIL.Image.Resampling.BICUBIC."
        ) from error


def _normalisation_of(images: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for pixels in [0, 1] that give what ``rescale_factor`` and the processor's own give.

    .. math:: (f x - m) / s = (x / 255 - m / (255 f)) / (s / (255 f))
    """
    factor = images.rescale_factor
    if not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ValueError(
            f"Expected `rescale_factor` of the image processor as a number above 0, got {factor!r}. Leave it out: the "
            "default brings pixels to 0 to 1."
        )
    options = {"image_mean": images.image_mean, "image_std": images.image_std}
    if not images.do_normalize:
        options = {"image_mean": 0.0, "image_std": 1.0}
    result = []
    for name, value in options.items():
        given = [value] * 3 if isinstance(value, int | float) else [] if value is None else value
        numbers = [float(number) for number in given]
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "image_std" and min(numbers) <= 0):
            raise ValueError(
                f"Expected `{name}` of the image processor as three numbers, one a colour, got {value!r}. Pass the "
                "processor of the checkpoint."
            )
        result.append(tuple(number / (255 * factor) for number in numbers))
    return result[0], result[1]


def _compare(images: Any, transform: ImageTransform) -> None:
    """Raise unless the processor itself gives these pixels: one of another class may do more than its options say."""
    size = transform.crop if transform.size is None else transform.size
    height, width = size if isinstance(size, tuple) else (size, size)
    down, right = np.mgrid[0 : height + height // 4 + 3, 0 : width + width // 2 + 5]
    shades = np.stack([255 * right / right.max(), 255 * down / down.max(), 127 + 0 * down], axis=-1)
    image = Image.fromarray(shades.astype(np.uint8))  # smooth: PIL and torchvision agree on it
    ours = normalize_pixels(transform.evaluate(image)[None], transform.mean, transform.std)
    theirs = torch.as_tensor(images(images=[image], return_tensors="pt")["pixel_values"]).cpu()
    same = theirs.shape == ours.shape
    if same:
        levels = 255 * (theirs - ours).abs() * torch.tensor(transform.std).view(3, 1, 1)
        same = bool(levels.mean() <= _LEVELS)
    if not same:
        raise ValueError(
            "Expected an image processor that resizes, crops the centre, rescales and normalises as its options say, "
            f"got {type(images).__name__}, which makes other pixels of an image. Pass one of CLIP's or SigLIP's kind."
        )


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
    mean_, std_ = _constants(tuple(mean), tuple(std), dtype, pixel_values.device)
    return pixel_values.to(dtype, copy=True).div_(255).sub_(mean_).div_(std_)  # one array, not four


@lru_cache(maxsize=8)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Numbers by channel on a device, ``(1, c, 1, 1)`` each: made anew for each batch they would be waited for."""
    with torch.inference_mode(False):
        made = [torch.tensor(part, dtype=dtype, device=device).view(1, -1, 1, 1) for part in (mean, std)]
    return made[0], made[1]


def _resized(image: Image.Image, target: tuple[int, int], resample: int) -> Image.Image:
    """Resize to a width and a height: in PIL's way, but for what is so thin that rows made longer would fill memory."""
    if target == image.size:
        return image
    if target[0] * image.height > _LONG * (image.width * image.height + target[0] * target[1]):
        image = image.resize((image.width, target[1]), resample)
    return image.resize(target, resample)


def _resized_part(
    image: Image.Image, target: tuple[int, int], box: tuple[int, int, int, int], resample: int
) -> Image.Image:
    """A part of an image that is resized to a width and a height, and no more than that part.

    ``box`` has left, top, right and bottom of the part in the resized image.
    """
    cut, inner = [], []
    for axis in (0, 1):
        scale = image.size[axis] / target[axis]  # pixels of the image a pixel of the result
        first, last = box[axis] * scale, box[axis + 2] * scale
        margin = _SUPPORT * max(1.0, scale) + 1  # beyond which the filter does not reach
        low = max(0, math.floor(first - margin))
        cut.append((low, min(image.size[axis], math.ceil(last + margin))))
        inner.append((first - low, last - low))
    (left, right), (top, bottom) = cut
    part = image.crop((left, top, right, bottom))
    (left_, right_), (top_, bottom_) = inner
    size = (box[2] - box[0], box[3] - box[1])
    return part.resize(size, resample, box=(left_, top_, min(right_, part.width), min(bottom_, part.height)))


def to_tensor(image: Image.Image) -> Tensor:
    """``(3, h, w)`` uint8, a view of ``(h, w, 3)``: channels last, as the image is."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def image_batch(images: Sequence[Any]) -> dict[str, Tensor]:
    """Join what a transform made of some images."""
    if isinstance(images[0], Mapping):
        return {name: torch.stack([image[name] for image in images]) for name in images[0]}
    return {"pixel_values": _stacked(images)}


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """``(b, 3, h, w)`` of ``(3, h, w)``, in the memory format of the images: values are copied once, in order."""
    if len(kinds := {image.dtype for image in images}) > 1:  # torch would make floats of pixels from 0 to 255
        raise ValueError(
            f"Expected images of one dtype in a batch, got {', '.join(sorted(map(str, kinds)))}. Let the transform "
            "return the same one of all images."
        )
    if images[0].is_contiguous():
        return torch.stack([*images])
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def float_pixels(pixels: Tensor, transform: Any, dtype: torch.dtype) -> Tensor:
    """Return the pixels of a batch as a model takes them: uint8 ones are normalised, others are as they should be.

    Args:
        pixels: Of a collator.
        transform: Of `image_transform`.
        dtype: Of the model; half precision is fed with float32.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    return normalize_pixels(pixels, transform.mean, transform.std, wide_dtype(dtype))
