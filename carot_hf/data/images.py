"""From what a data set holds, encoded or not, to an RGB image: decoded right, or refused with the reason."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import subprocess  # nosec B404  # for the name of an error
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # of EXIF
_EXIF_KEYS = ("exif", "Raw profile type exif", "Raw profile type APP1", "xmp", "XML:com.adobe.xmp")
MAX_PIXELS = 89_478_485  # PIL's own limit for a warning: 1 GiB / 4 / 3
MAX_BYTES = 8 * MAX_PIXELS  # that an image may take on its way to RGB, in whatever mode it is stored
_BYTES = {  # a pixel, in PIL and here together, by mode; measured
    **{"RGB": 4, "1": 5, "L": 5, "P": 9, "I": 14, "F": 16},
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), 10),
}
_OTHER_BYTES = 8  # of RGBA, CMYK, LA and the like
_TURNED_BYTES = 4  # more
_FILE_ERRORS = (  # what PIL raises of a damaged file, or of one that is too large for this machine
    *(OSError, SyntaxError, EOFError, Image.DecompressionBombError, MemoryError, zlib.error, struct.error),
)
_TOPS = (255, 1023, 4095, 16383, 65535)  # largest values of 8, 10, 12, 14 and 16 bits
_BLOCK = 2**20  # values that are scaled at once
_ON_THE_SIDE = (5, 6, 7, 8)  # width and height change places
FORMATS = (  # of which PIL makes pixels by itself; those without a mark of their own are tried last
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO"),
    *("BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "ICNS", "ICO", "IM", "IMT", "MCIDAS", "MSP"),
    *("PCX", "PIXAR", "PSD", "QOI", "SGI", "SUN", "XBM", "XPM", "XVTHUMB", "PCD", "SPIDER", "TGA"),
)


class BadImageError(ValueError):
    """An image that cannot be decoded; the text says why."""


class NotAnImageError(TypeError):
    """Something in the place of an image that no image can be made of, whatever it holds; the text says what."""


def read_image(
    value: Any, *, min_size: tuple[int, int] | None = None, exif: bool = True, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image.

    Alpha is dropped, as in transformers' pipelines. Of an animation the first frame is taken.

    Grey values of more than 8 bits are brought to 0 to 255, which PIL alone would cut off. What is white follows from
    the header where it tells (PGM; TIFF of 12 bits), else from the image: the smallest of 255, 1,023, 4,095, 16,383 and
    65,535 that no value exceeds, for cameras store 10, 12 or 14 bits in 16. A dark image in 16 bits, with nothing
    above a quarter of full scale, is thus made brighter. Of colours in 16 bits PIL keeps the high bytes: where none of
    these exceeds 16 the image is refused.

    Only `FORMATS` are decoded: no EPS or WMF, which PIL hands to other programs. Only regular files are opened.

    Args:
        value: A PIL image, a ``(h, w)`` or ``(h, w, 3)`` uint8 array, bytes, a path, or ``{"bytes": ..., "path": ...}``
            as an undecoded ``datasets.Image``.
        min_size: Width and height in pixels that are enough: a JPEG of more than twice as much is decoded at 1/2, 1/4
            or 1/8 and stays at least as large. Pixels then differ slightly.
        exif: Turn the image as its EXIF orientation says, as `datasets` does; published ImageNet figures are of pixels
            as they are stored.
        max_pixels: At most `MAX_PIXELS`. Larger images are refused by their header, before they are decoded; so are
            those that would take more than `MAX_BYTES` of memory.
    Returns:
        An image of mode RGB.
    Raises:
        BadImageError: If there is no image, it is damaged, or too large, for this machine's memory too.
        NotAnImageError: If the value is of another kind: then the code that made it is wrong, and no image.
    """
    if isinstance(value, np.ndarray):
        _check_array(value)
    try:
        with _strict(), _opened(value) as image:
            _check_size(image, max_pixels)
            orientation = image.getexif().get(_ORIENTATION, 1) if exif and _has_exif(image) else 1
            if orientation != 1:
                _check_size(image, max_pixels, _TURNED_BYTES)
            if min_size is not None and image.format in ("JPEG", "MPO") and image is not value:
                # not an image of the caller's, which would stay small
                image.draft("RGB", min_size[::-1] if orientation in _ON_THE_SIDE else min_size)
            layout = _layout(image)  # known until it is decoded
            if orientation != 1:
                image = ImageOps.exif_transpose(image)
            return _rgb(image, layout)
    except (BadImageError, NotAnImageError):
        raise
    except MemoryError as error:
        raise BadImageError("an image that needs more memory than there is; shrink it") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        pixels = "".join(re.findall(r"\((\d+) pixels\)", str(error)))
        raise BadImageError(f"an image of {int(pixels or 0):,} pixels, more than {MAX_PIXELS:,}; shrink it") from error
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise BadImageError(f"{type(error).__name__}: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed PIL reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of files that PIL makes pixels of, in small letters and with their dot: those of `FORMATS`.

    Left out is what PIL can only write or recognise, or hands to another program: ``.pdf``, ``.ps``, ``.eps``,
    ``.wmf``, ``.emf``, ``.mpg``, ``.h5``, ``.grib`` and the like.
    """
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, form in known.items() if form in FORMATS)


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file is an image by its name, in any case: `image_suffixes` has its suffix, and it is not hidden."""
    path = PurePath(name)
    return path.suffix.lower() in image_suffixes() and not path.name.startswith(".")


def is_decoding_error(error: BaseException) -> bool:
    """Whether an error that foreign code let through says that an image is damaged or missing: PIL raised it of a file.

    Any other error is one of that code.
    """
    if isinstance(error, BadImageError):
        return True
    modules, trace = [""], error.__traceback__
    while trace is not None:
        modules.append(str(trace.tb_frame.f_globals.get("__name__")).split(".")[0])
        trace = trace.tb_next
    if isinstance(error, subprocess.CalledProcessError):  # of a program that PIL has called
        return "PIL" in modules
    return isinstance(error, _FILE_ERRORS) and modules[-1] == "PIL"


def _has_exif(image: Image.Image) -> bool:
    """Whether there may be an orientation: asking for it costs as much as a third of the decoding."""
    return image.format in ("TIFF", "MPO") or any(key in image.info for key in _EXIF_KEYS)


@contextmanager
def _opened(value: Any) -> Iterator[Image.Image]:
    """An image that may be lazy; what was opened here is closed again."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, np.ndarray):
        yield Image.fromarray(value)
    elif isinstance(value, bytes | bytearray | memoryview):
        if len(value) == 0:
            raise BadImageError("no bytes")
        with Image.open(io.BytesIO(value), formats=_formats()) as image:
            yield image
    elif isinstance(value, str | os.PathLike):
        if not stat.S_ISREG(os.stat(value).st_mode):  # to open a pipe would wait for ever
            raise BadImageError(f"{os.fspath(value)}, which is no regular file")
        with Image.open(value, formats=_formats()) as image:
            yield image
    elif value is None:
        raise BadImageError("NoneType in place of an image")
    else:
        raise NotAnImageError(f"{type(value).__name__} in place of an image")


def _check_size(image: Image.Image, max_pixels: int, more: int = 0) -> None:
    """Raise if an image that is not decoded yet would take too much."""
    pixels, size = image.width * image.height, f"an image of {image.width:,} x {image.height:,} pixels"
    if pixels > max_pixels:
        raise BadImageError(f"{size}, more than {max_pixels:,}; shrink it")
    needed = pixels * (_BYTES.get(image.mode, _OTHER_BYTES) + more)
    if needed > MAX_BYTES:
        raise BadImageError(
            f"{size} of mode {image.mode}, which takes {needed:,} bytes to decode, more than {MAX_BYTES:,}; shrink it"
        )


def _check_array(value: NDArray[Any]) -> None:
    """Raise unless PIL makes an image of the array: grey values, or 8-bit colours in the last place."""
    if value.ndim != 2 and not (value.ndim == 3 and value.shape[2] in (3, 4) and value.dtype == np.uint8):
        raise NotAnImageError(
            f"an array of shape {value.shape} and {value.dtype} in place of one of shape (h, w, 3) and uint8"
        )


def _layout(image: Image.Image) -> tuple[str, int | None]:
    """How an image that is not yet decoded stores a pixel, in PIL's words, and what its PGM or PPM header calls white.

    Both are empty of an image that is decoded.
    """
    tiles = getattr(image, "tile", None)
    if not tiles:
        return "", None
    codec, arguments = tiles[0][0], tiles[0][3]
    raw = arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""
    return raw, int(arguments[1]) if codec in ("ppm", "ppm_plain") else None


def _rgb(image: Image.Image, layout: tuple[str, int | None]) -> Image.Image:
    raw, white = layout
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        grey = np.asarray(image)
        low, high = int(grey.min()), int(grey.max())
        if low < 0 or high > _TOPS[-1]:
            raise BadImageError(f"grey values from {low} to {high}, outside of 16 bits")
        top = next(top for top in _TOPS if high <= top)
        if white is not None and white < 65535:
            top = 65535  # PIL has scaled the values by the header
        elif raw == "I;12":
            top = 4095
        return Image.fromarray(_levels(grey, top)).convert("RGB")
    if image.mode == "F":
        grey = np.asarray(image)
        if not (grey.min() >= 0 and grey.max() <= 1):
            raise BadImageError(f"float values from {grey.min()} to {grey.max()}, outside of [0, 1]")
        image = Image.fromarray(np.rint(255 * grey).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # or PIL warns
    image.load()
    if white == 65535 or (";16" in raw and image.mode in ("L", "LA", "RGB", "RGBA")):
        _check_high_bytes(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_high_bytes(image: Image.Image) -> None:
    """Raise if the high bytes of 16-bit values, all that PIL keeps of them, are of 12 bits or less.

    An image that is black all over passes.
    """
    bands, extrema = image.getbands(), image.getextrema()  # of each band the smallest and the largest value
    ranges: Any = extrema if len(bands) > 1 else [extrema]
    colours = [high for band, (_, high) in zip(bands, ranges, strict=True) if band != "A"]
    brightest = int(max(colours))
    if 0 < brightest <= 16:  # 4,095 of 65,535 is 15.9 of 255, which PIL cuts off or rounds
        raise BadImageError(
            f"16-bit colours of which the brightest is {brightest} of 255, as if of 12 bits; save them with 8 bits each"
        )


def _levels(grey: NDArray[Any], top: int) -> NDArray[np.uint8]:
    """Whole grey values from 0 to ``top``, as 0 to 255; a block at a time, for the indices take 8 bytes a value."""
    table = np.rint(np.arange(top + 1) / (top / 255)).astype(np.uint8)
    values = grey.reshape(-1)
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _BLOCK):
        result[start : start + _BLOCK] = table[values[start : start + _BLOCK]]
    return result.reshape(grey.shape)


@contextmanager
def _strict() -> Iterator[None]:
    """PIL's warnings are ours to judge: odd metadata does not matter, but a picture that is too large does.

    That may be a picture in the picture: the header of an icon, which PIL decodes when it opens it, does not tell.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
