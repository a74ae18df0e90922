"""A transform of the user's own for training images, such as one of torchvision's v2; its draws repeat by number.

Such transforms draw from the global generators of torch, Python and numpy. These are seeded with the draw around each
call and put back after it, so that the pixels do not depend on workers, on the order of the samples or on where a run
was interrupted, and the rest of the training draws what it would have drawn. A transform with a generator of its own
is not reached by that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..basics.escape import printable
from .augment import PUBLISHED, augmented
from .transforms import ImageTransform, PatchTransform

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class WrongPixelsError(ValueError):
    """What a transform has returned is not what the model takes."""

    def __init__(self, expected: str, got: str, cure: str) -> None:
        super().__init__(f"Expected {expected} of `transform`, got {got}. {cure}")
        self.parts = expected, got, cure

    def of(self, place: str) -> str:
        """The same with the sample that it is of."""
        expected, got, cure = self.parts
        return f"Expected {expected} of `transform` for {place}, got {got}. {cure}"


class OwnTransform:
    """Training images by a callable of the user's, evaluation by the model's transform.

    Args:
        function: From an RGB PIL image to ``(3, h, w)`` uint8, or float32 that is normalised already.
        transform: The model's.
    """

    train_size = None  # what the callable crops is not known: images are decoded at full size

    def __init__(self, function: Callable[[Image.Image], Tensor], transform: ImageTransform) -> None:
        self.evaluate, self._function, self._crop = transform.evaluate, function, transform.crop

    def train(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """Call it, with global generators that are seeded from another one.

        Raises:
            WrongPixelsError: If it returns anything but finite pixels of the model's size.
        """
        with seeded(int(generator.integers(2**32))):
            pixels = self._function(image)
        return self._checked(pixels)

    def _checked(self, pixels: Any) -> Tensor:
        shape = (3, *self._crop)
        expected = f"a tensor {shape} of uint8 or float32"
        if not isinstance(pixels, Tensor):
            cure = "End it with torchvision's v2.ToImage(), or torch.from_numpy(np.array(image)).permute(2, 0, 1)."
            raise WrongPixelsError(expected, type(pixels).__name__, cure)
        if tuple(pixels.shape) != shape:
            cure = f"Crop or resize to {shape[1]} x {shape[2]} pixels, which the model takes, with the colours first."
            raise WrongPixelsError(expected, f"one of shape {tuple(pixels.shape)}", cure)
        if pixels.dtype not in (torch.uint8, torch.float32):
            cure = "Return uint8 pixels, which are normalised as in evaluation, or float32 that is normalised already."
            raise WrongPixelsError(expected, f"one of {pixels.dtype}", cure)
        if pixels.device.type != "cpu":
            cure = "Leave it on the CPU: batches are moved together."
            raise WrongPixelsError(f"{expected} on the CPU", f"one on {pixels.device}", cure)
        if pixels.is_floating_point() and not bool(torch.isfinite(pixels).all()):
            cure = "Look for a division by zero, or a logarithm, in the transform."
            raise WrongPixelsError("finite pixels", "nan or inf", cure)
        return pixels.detach().as_subclass(Tensor)  # of torchvision's a plain one


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (on the CPU), Python and numpy, and put them back.

    Args:
        seed: In ``[0, 2**32)``.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  # what transforms draw from
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the accelerators, too
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def training_transform(transform: Any, augment: str, own: Any, *, collates: bool) -> Any:
    """Return the transform of a training: the model's, varied by name or by a callable.

    Args:
        transform: The model's, which evaluates.
        augment: The argument of that name.
        own: A callable of the user's; ``None``: there is none.
        collates: Whether the images go through our collator, and not through one of the user's.
    Raises:
        TypeError: If it cannot be called.
        ValueError: If these do not go together.
    """
    if own is not None and not callable(own):
        raise TypeError(
            f"Expected `transform` as a callable from a PIL image to a tensor, got {type(own).__name__}. Pass one, "
            "such as torchvision's v2.Compose([...])."
        )
    if own is not None and augment != PUBLISHED:
        raise ValueError(
            f"Expected `augment` '{PUBLISHED}' with a `transform` of your own, which takes its place, got '{augment}'. "
            "Leave one of them out."
        )
    if not collates and (own is not None or augment != PUBLISHED):
        given = f"`augment` '{augment}'" if own is None else "a `transform`"
        raise ValueError(
            f"Expected no `transform`, and `augment` '{PUBLISHED}', with a `data_collator` of your own, got {given}. "
            "Leave the collator out, or vary the images in it."
        )
    if own is None:
        return augmented(transform, augment)
    if isinstance(transform, PatchTransform):
        raise ValueError(
            "Expected no `transform` with a model that takes patches of images of any shape (SigLIP 2 NaFlex), got "
            "one. Use `augment`."
        )
    return OwnTransform(own, transform)


def name_of(own: Any) -> str | None:
    """Say what a callable is, the same in each process and run: its ``repr`` in one line, without addresses."""
    return None if own is None else printable(" ".join(_ADDRESS.sub("", repr(own)).split()))
