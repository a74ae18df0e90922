"""A contact sheet: images of several sets in one picture, as a model is given them, each below its class's name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

MAX_PIXELS = 89_478_485  # of a sheet: PIL warns of a picture that has more
ACROSS = 8  # images beside each other; a set of more takes several lines
_NARROWEST = 112  # pixels that a title has at least
_GAP, _TITLE, _HEADING = 10, 22, 34  # pixels between images, above each of them, above each set
_TITLE_FONT, _HEADING_FONT = 15, 19  # pixels
_PAPER, _INK = (238, 238, 238), (16, 16, 16)  # what is white or black in an image keeps its border
_NO_CHARACTER = "\U0010fffe"  # that no font has: what is drawn for it is drawn for all that are missing
_CUT = "..."
_MAKER = "carot_hf suite check"


class Tile(NamedTuple):
    """An image of the sheet.

    Attributes:
        pixels: ``(size, size, 3)`` uint8, drawn as they are.
        title: Above it; of a long one the beginning.
        instead: What stands there if the font lacks characters of the title.
    """

    pixels: NDArray[np.uint8]
    title: str
    instead: str


class Row(NamedTuple):
    """The images of a set, below a heading."""

    heading: str
    tiles: Sequence[Tile]


def check_sheet(rows: int, images: int, size: int) -> None:
    """Refuse a sheet that would be too large, before anything is read for it.

    Args:
        rows: Sets.
        images: Of each.
        size: Height and width of an image, in pixels.
    Raises:
        ValueError: If it would have more than `MAX_PIXELS`.
    """
    width, height = _sheet_size([images] * rows, size)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"Expected a picture of at most {MAX_PIXELS:,} pixels, got one of {width:,} x {height:,} for {rows} sets "
            f"of {images} images of {size} x {size} pixels. Ask for fewer or smaller images."
        )


def contact_sheet(rows: Sequence[Row], size: int) -> Image.Image:
    """Draw the images of each set below its heading, each below its title; nothing is scaled.

    Args:
        rows: The sets.
        size: Height and width of every image, in pixels.
    Raises:
        ValueError: If an image has another size.
    """
    width, height = _sheet_size([len(row.tiles) for row in rows], size)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, top, cell = ImageDraw.Draw(sheet), _GAP, max(size, _NARROWEST)
    for row in rows:
        draw.text((_GAP, top), fitting(row.heading, width - 2 * _GAP, _HEADING_FONT), _INK, font(_HEADING_FONT))
        top += _HEADING
        for start in range(0, len(row.tiles), ACROSS):
            for column, tile in enumerate(row.tiles[start : start + ACROSS]):
                if tile.pixels.shape != (size, size, 3):
                    raise ValueError(
                        f"Expected images of shape ({size}, {size}, 3), got {tile.pixels.shape} in '{row.heading}'. "
                        "Resize and crop them all alike."
                    )
                left = _GAP + column * (cell + _GAP)
                title = tile.title if can_write(tile.title) else tile.instead
                draw.text((left, top), fitting(title, cell, _TITLE_FONT), _INK, font(_TITLE_FONT))
                sheet.paste(Image.fromarray(tile.pixels), (left, top + _TITLE))
            top += _TITLE + size + _GAP
    return sheet


def sheet_info(suite: str) -> PngInfo:
    """What a sheet says of itself in its file: who made it, and the name of the suite; `suite_of_sheet` reads it."""
    info = PngInfo()
    info.add_text("Software", _MAKER)
    info.add_itxt("Title", suite)
    return info


def suite_of_sheet(path: Path) -> str | None:
    """Return the name of the suite whose sheet a file is; ``None``: it is another file.

    Args:
        path: Of a file, whatever it holds; no pixel is decoded.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found, name = image.info.get("Software"), image.info.get("Title")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return str(name) if found == _MAKER and name is not None else None


def fitting(text: str, width: int, pixels: int) -> str:
    """Return a text, or as much of its beginning as fits with ``...`` behind it.

    Args:
        text: In one line.
        width: Room for it, in pixels.
        pixels: Size of the font.
    """
    if font(pixels).getlength(text) <= width:
        return text
    low, high = 0, len(text)  # characters that fit, that do not
    while high - low > 1:
        middle = (low + high) // 2
        fits = font(pixels).getlength(text[:middle].rstrip() + _CUT) <= width
        low, high = (middle, high) if fits else (low, middle)
    return text[:low].rstrip() + _CUT


def can_write(text: str) -> bool:
    """Whether the font has all characters of a text."""
    face = font(_TITLE_FONT)
    missing = bytes(face.getmask(_NO_CHARACTER))
    return all(bytes(face.getmask(character)) != missing for character in set(text))


@cache
def font(pixels: int) -> Any:
    """A font of this size: matplotlib's DejaVu Sans (Latin, Greek, Cyrillic and more), else PIL's own (ASCII)."""
    if importlib.util.find_spec("matplotlib") is not None:
        import matplotlib

        place = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
        if place.is_file():
            return ImageFont.truetype(str(place), pixels)
    return ImageFont.load_default(pixels)


def _sheet_size(counts: Sequence[int], size: int) -> tuple[int, int]:
    columns = max(1, min(ACROSS, max(counts, default=1)))
    width = _GAP + columns * (max(size, _NARROWEST) + _GAP)
    lines = sum(-(-count // ACROSS) for count in counts)
    return max(width, 4 * _NARROWEST), _GAP + len(counts) * _HEADING + lines * (_TITLE + size + _GAP)
