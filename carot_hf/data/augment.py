"""How training images vary: a random crop and, if asked for, colours. All of it is drawn by the number of the sample.

Nothing is flipped: a mirrored digit or text is another one or none, and captions name left and right. Who wants flips
passes a ``transform`` to the trainer (:mod:`carot_hf.data.own_transform`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from .transforms import ImageTransform, PatchTransform, random_box, to_tensor

_BLUR = (0.1 / 224, 2 / 224)  # standard deviation, as a share of the shorter side


@dataclass(frozen=True)
class Augmentation:
    """From what the changes of a training image are drawn.

    Attributes:
        scale: Range of the area of the crop, as a share of the image.
        jitter: Brightness, contrast and saturation are multiplied by factors between 1 minus and 1 plus this.
        grey: Chance that the colours are taken away.
        blur: Chance of a Gaussian blur.
    """

    scale: tuple[float, float]
    jitter: float = 0.0
    grey: float = 0.0
    blur: float = 0.0

    def __str__(self) -> str:
        parts = [f"crops of {self.scale[0]:.0%} to {self.scale[1]:.0%} of the area"]
        if self.jitter:
            parts.append(f"brightness, contrast and saturation x {1 - self.jitter:g} to {1 + self.jitter:g}")
        chances = {"grey": self.grey, "blurred": self.blur}
        parts += [f"{chance:.0%} {name}" for name, chance in chances.items() if chance]
        return ", ".join(parts)


# "none" is the evaluation's transform; "crop" FLYP's and CaRot's, as open_clip has it.
AUGMENTATIONS: Mapping[str, Augmentation | None] = MappingProxyType(
    {
        "none": None,
        "crop": Augmentation(scale=(0.9, 1.0)),
        "light": Augmentation(scale=(0.6, 1.0), jitter=0.2),
        "strong": Augmentation(scale=(0.35, 1.0), jitter=0.4, grey=0.1, blur=0.1),
    }
)
PUBLISHED = "crop"


@dataclass(frozen=True)
class Changes:
    """What is done to the colours of one image, in this order.

    Attributes:
        brightness: Factor of all values.
        contrast: Factor of the distance to the mean grey of the image.
        saturation: Factor of the distance to the grey of the pixel.
        grey: Whether each pixel becomes its grey.
        blur: Standard deviation of a Gaussian blur, as a share of the shorter side; 0: none.
    """

    brightness: float
    contrast: float
    saturation: float
    grey: bool
    blur: float


def drawn_changes(augmentation: Augmentation, generator: np.random.Generator) -> Changes:
    """Draw the changes of one image; always six numbers, whatever they say."""
    jitter = augmentation.jitter
    brightness, contrast, saturation = generator.uniform(1 - jitter, 1 + jitter, 3).tolist()
    grey, blur = (generator.random(2) < (augmentation.grey, augmentation.blur)).tolist()
    deviation = float(generator.uniform(*_BLUR))
    return Changes(brightness, contrast, saturation, grey, deviation if blur else 0.0)


def changed(image: Image.Image, changes: Changes) -> Image.Image:
    """Return an RGB image with its colours changed, of the same size."""
    image = ImageEnhance.Brightness(image).enhance(changes.brightness)
    image = ImageEnhance.Contrast(image).enhance(changes.contrast)
    image = ImageEnhance.Color(image).enhance(changes.saturation)
    if changes.grey:
        image = image.convert("L").convert("RGB")
    if changes.blur:
        image = image.filter(ImageFilter.GaussianBlur(changes.blur * min(image.size)))
    return image


class Unvaried:
    """A model's transform whose training images are those of the evaluation."""

    train_size = None  # images are decoded at full size, as in evaluation

    def __init__(self, transform: ImageTransform | PatchTransform) -> None:
        self.evaluate = transform.evaluate

    def train(self, image: Image.Image, generator: np.random.Generator) -> Any:
        """As `evaluate`; nothing is drawn."""
        return self.evaluate(image)


class Varied:
    """A model's transform whose training images have changed colours, beside their crop.

    The colours change after the crop, and after the resize where the model takes images of one size.
    """

    def __init__(self, transform: ImageTransform | PatchTransform, augmentation: Augmentation) -> None:
        self.evaluate, self._augmentation = transform.evaluate, augmentation
        self._transform = replace(transform, scale=augmentation.scale)
        self.train_size = self._transform.train_size

    def train(self, image: Image.Image, generator: np.random.Generator) -> Any:
        """Crop at random, then change the colours: what the transform gives, of an image of its own."""
        inner = self._transform
        if isinstance(inner, PatchTransform):
            box = random_box(image.width, image.height, generator, inner.scale, inner.ratio)
            return inner.evaluate(changed(image.crop(box), drawn_changes(self._augmentation, generator)))
        cropped = _as_image(inner.train(image, generator))
        return to_tensor(changed(cropped, drawn_changes(self._augmentation, generator)))


def augmented(transform: ImageTransform | PatchTransform, name: str) -> Any:
    """Return a model's transform, whose way is "crop", with training images that vary in another of `AUGMENTATIONS`."""
    augmentation = AUGMENTATIONS[name]
    if name == PUBLISHED:
        return transform
    return Unvaried(transform) if augmentation is None else Varied(transform, augmentation)


def described(name: str) -> str:
    """Say in words how training images vary."""
    augmentation = AUGMENTATIONS[name]
    return f"{name}: {'training images are resized as in evaluation' if augmentation is None else augmentation}"


def _as_image(pixels: Tensor) -> Image.Image:
    """An image of ``(3, h, w)`` uint8."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
