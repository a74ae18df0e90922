"""ImageNet-C, computed on the fly: a set under one corruption at one severity.

The corruptions are those of the package ``imagecorruptions-imaug``, a maintained descendant of the code that made the
published files (``pip install carot_hf[corruptions]``). As for those files, an image is first resized to a short side
of 256 px, cropped to the central 224 x 224 and then corrupted. Scores are close to those on the published files, not
equal: those were also saved as JPEG of quality 85, noise was drawn anew, and the package blurs motion without
ImageMagick and knows six frost pictures where the original code drew from five.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

# In the order of the paper; the last four are for tuning, and no part of ImageNet-C's mean.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)

# These two draw from generators of their own, which numpy's global seed does not reach; they take a seed instead.
_OWN_GENERATOR = ("impulse_noise", "glass_blur")
_SHORT_SIDE, _CROP = 256, 224  # px


def corruption_names(*, extra: bool = False) -> list[str]:
    """Return the names of the 15 corruptions of ImageNet-C, in the order of the paper; ``extra``: 4 more for tuning."""
    return [*CORRUPTIONS, *(EXTRA_CORRUPTIONS if extra else ())]


def parse_name(name: str) -> tuple[str, int]:
    """Split a name such as ``c-gaussian_noise-3`` into corruption and severity.

    Raises:
        ValueError: If it is not of this form, or there is no such corruption or severity.
    """
    match = re.fullmatch(r"c-(\w+)-(\d+)", name)
    if match is None:
        raise ValueError(
            f"Expected a name c-<corruption>-<severity>, got {name!r}. Write, for example, 'c-gaussian_noise-3'."
        )
    corruption, severity = match[1], int(match[2])
    _check(corruption, severity)
    return corruption, severity


class CorruptedSet:
    """The images of another set under one corruption, as items; everything else of an item stays as it is.

    An item is a function of the image, ``corruption``, ``severity``, ``seed`` and its index alone, in any order and in
    any worker process; numpy's global generator is left as it was. Not for several threads at once.

    Args:
        data: Anything with a length whose items are mappings with an RGB PIL image ``"image"``, e.g. a ``ShiftSet``.
        corruption: One of ``corruption_names(extra=True)``.
        severity: 1 (weak) to 5 (strong).
        seed: Another seed gives other noise.
    Attributes:
        name: ``c-<corruption>-<severity>``.
        labels: Those of ``data`` if it has them, otherwise ``None``.
    Raises:
        ValueError: If there is no such corruption or severity, or the seed is negative.
        ImportError: If the package of the corruptions is missing.
    Source:
        Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations".
    """

    def __init__(self, data: Any, corruption: str, severity: int, seed: int = 0) -> None:
        _check(corruption, severity)
        if seed < 0:
            raise ValueError(f"Expected a `seed` of at least 0, got {seed}. Choose another one.")
        _package()
        self.data, self.corruption, self.severity, self.seed = data, corruption, severity, seed
        self.name = f"c-{corruption}-{severity}"
        self.labels = getattr(data, "labels", None)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # -1 is the last one and has its seed; past the end: IndexError
        item = self.data[index]
        pixels = np.asarray(_centre(item["image"].convert("RGB")))  # (224, 224, 3) uint8
        number = corruption_names(extra=True).index(self.corruption)
        entropy = np.random.SeedSequence([self.seed, number, self.severity, index]).generate_state(4)
        own = {"seed": int(entropy[0])} if self.corruption in _OWN_GENERATOR else {}
        with _numpy_seeded(entropy):
            pixels = _package().corrupt(pixels, severity=self.severity, corruption_name=self.corruption, **own)
        return {**item, "image": Image.fromarray(pixels)}


def _check(corruption: str, severity: int) -> None:
    if corruption not in corruption_names(extra=True):
        raise ValueError(
            f"Expected a corruption of ImageNet-C, got {corruption!r}. "
            f"There are {', '.join(corruption_names(extra=True))}."
        )
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"Expected a `severity` of {SEVERITIES}, got {severity!r}. ImageNet-C has no others.")


def _centre(image: Image.Image) -> Image.Image:
    """Resize the short side to 256 px (bilinear) and cut out the central 224 x 224 px, as torchvision does."""
    width, height = image.size
    short = min(width, height)
    width, height = _SHORT_SIDE * width // short, _SHORT_SIDE * height // short
    left, top = round((width - _CROP) / 2), round((height - _CROP) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + _CROP, top + _CROP))


@contextmanager
def _numpy_seeded(entropy: np.ndarray) -> Iterator[None]:
    """Seed numpy's global generator, and put it back as it was."""
    # Workaround, imagecorruptions-imaug 1.1: it draws from the global generator. Until: its functions take a generator.
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(entropy)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _package() -> Any:
    cure = "Run `pip install carot_hf[corruptions]`."
    try:
        package = importlib.import_module("imagecorruptions")
    except ImportError as error:
        raise ImportError(f"Expected the package imagecorruptions-imaug, got: {error}. {cure}") from error
    if "seed" not in inspect.signature(package.corruption_dict["glass_blur"]).parameters:
        raise ImportError(
            "Expected the package imagecorruptions-imaug 1.1.5 or newer, got an `imagecorruptions` whose noise cannot "
            f"be seeded. Uninstall that one. {cure}"
        )
    return package
