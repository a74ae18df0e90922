"""Perturbed copies of validation images: 6 kinds at 5 severities, to fit one temperature that holds under shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ..basics.content_hash import sha256_of_facts
from .images import BadImageError, NotAnImageError, read_image

# What the numbers mean is said where they act, below. From mild to strong.
PERTURBATIONS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "noise": (0.05, 0.1, 0.2, 0.3, 0.4),
        "blur": (1 / 64, 2 / 64, 3 / 64, 5 / 64, 7 / 64),
        "rotation": (10.0, 20.0, 30.0, 45.0, 60.0),
        "contrast": (0.7, 0.5, 0.35, 0.2, 0.1),
        "pixelate": (0.7, 0.5, 0.4, 0.3, 0.2),
        "move": (0.1, 0.2, 0.3, 0.4, 0.5),
    }
)

# Corruptions of ImageNet-C of the same kind as a perturbation: no evidence for a temperature fitted on these.
SEEN_CORRUPTIONS = frozenset(
    (
        *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
        *("gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("contrast", "pixelate"),
    )
)


def all_perturbations() -> list[tuple[str, int]]:
    """Return all 30 pairs of name and severity, in the order of `PERTURBATIONS`, mild to strong."""
    return [(name, severity) for name, levels in PERTURBATIONS.items() for severity in range(len(levels))]


def kind_seen(corruption: str) -> bool:
    """Whether a corruption of ImageNet-C, such as ``"shot_noise"``, is of the same kind as a perturbation.

    A table marks such a set, and a mean over shifts leaves it out.
    """
    return corruption in SEEN_CORRUPTIONS


def perturbed(image: Any, name: str, severity: int, *, seed: int, index: int) -> Image.Image:
    """Return a perturbed copy of an image: a function of the arguments alone, in any order, thread or process.

    What is drawn does not depend on the image or its size. Blur, rotation, contrast and move look alike on an image
    twice as large. Noise is drawn for each pixel, and pixelate keeps a share of the pixels: an evaluation that shrinks
    the image afterwards shrinks their effect, so bring images to about the size the model takes first.

    Args:
        image: Of any size; whatever :func:`~carot_hf.data.images.read_image` takes, and converted as there. The
            orientation in its EXIF is neither applied nor kept; a ``ShiftSet`` has applied it.
        name: One of `PERTURBATIONS`.
        severity: 0 (mild) to 4 (strong).
        seed: Another seed draws other noise, angles and moves.
        index: Of the image in its set.
    Returns:
        A new image of mode RGB, as large as the image.
    Raises:
        ValueError: If there is no such name or severity, or seed or index is negative.
        BadImageError: A ``ValueError``, if the image cannot be decoded.
        TypeError: If what stands in the place of an image is none.
    Source:
        Tomani et al., CVPR 2021, "Post-hoc Uncertainty Calibration for Domain Drift Scenarios" (arXiv 2012.10988), who
        perturb with noise alone; the other kinds are ours.
    """
    if name not in PERTURBATIONS:
        raise ValueError(f"Expected the name of a perturbation, got {name!r}. There are {', '.join(PERTURBATIONS)}.")
    last = len(PERTURBATIONS[name]) - 1
    if not _is_whole(severity) or not 0 <= severity <= last:
        raise ValueError(f"Expected a `severity` from 0 to {last}, got {severity!r}. Write 0 for the mildest.")
    for option, number in (("seed", seed), ("index", index)):
        if not _is_whole(number) or number < 0:
            raise ValueError(f"Expected `{option}` as a whole number of at least 0, got {number!r}. Correct it.")
    facts = {"seed": int(seed), "index": int(index), "name": name, "severity": int(severity)}
    generator = np.random.Generator(np.random.PCG64(int(sha256_of_facts(facts), 16)))
    result = _PERTURB[name](_decoded(image), PERTURBATIONS[name][severity], generator)
    result.info = {}  # PIL's own functions keep it, with the EXIF
    return result


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _decoded(image: Any) -> Image.Image:
    """An RGB image of at least one pixel."""
    decoded: Image.Image = image
    try:
        if type(image) is not Image.Image or image.mode != "RGB":  # else it is decoded, as a ShiftSet gives it
            decoded = read_image(image, exif=False)
    except NotAnImageError as error:
        raise TypeError(
            f"Expected a PIL image, an array, bytes or a path, got {error}. Pass the image itself."
        ) from error
    except BadImageError as error:
        raise BadImageError(f"Expected an image that can be decoded, got {error}. Replace or drop it.") from error
    if 0 in decoded.size:
        raise BadImageError(f"Expected an image of at least 1 x 1 pixels, got {decoded.size}. Replace or drop it.")
    return decoded


def _noise(image: Image.Image, sigma: float, generator: np.random.Generator) -> Image.Image:
    """Add Gaussian noise to each value; ``sigma`` is a share of 255."""
    pixels = np.asarray(image)  # (h, w, 3) uint8
    values = generator.standard_normal(pixels.shape, np.float32)
    values *= sigma * 255
    values += pixels
    return Image.fromarray(np.rint(np.clip(values, 0, 255, out=values), out=values).astype(np.uint8))


def _blurred(image: Image.Image, share: float, generator: np.random.Generator) -> Image.Image:
    """Blur with a Gaussian whose standard deviation is a share of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))


def _rotated(image: Image.Image, most: float, generator: np.random.Generator) -> Image.Image:
    """Turn about the centre by up to so many degrees either way."""
    angle = float(generator.uniform(-most, most))
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0)))


def _contrast(image: Image.Image, factor: float, generator: np.random.Generator) -> Image.Image:
    """Bring each value this much closer to the mean grey of the image."""
    mean = float(np.asarray(image.convert("L")).mean())
    table = np.rint(mean + factor * (np.arange(256) - mean)).astype(int).tolist()
    return image.point(table * 3)


def _pixelated(image: Image.Image, share: float, generator: np.random.Generator) -> Image.Image:
    """Keep a share of the pixels of each side, and show them as blocks."""
    small = [max(1, round(share * side)) for side in image.size]
    return image.resize((small[0], small[1]), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def _moved(image: Image.Image, most: float, generator: np.random.Generator) -> Image.Image:
    """Shift by up to a share of each side, and enlarge or shrink about the centre by up to the same share."""
    right, down, growth = generator.uniform(-most, most, 3).tolist()
    width, height, zoom = image.width, image.height, 1 + growth
    left, top = width / 2 - (0.5 + right) * width / zoom, height / 2 - (0.5 + down) * height / zoom
    matrix = (1 / zoom, 0.0, left, 0.0, 1 / zoom, top)  # from a pixel of the result to where it came from
    fill = image.getpixel((0, 0))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)


_PERTURB: Mapping[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "noise": _noise,
    "blur": _blurred,
    "rotation": _rotated,
    "contrast": _contrast,
    "pixelate": _pixelated,
    "move": _moved,
}
