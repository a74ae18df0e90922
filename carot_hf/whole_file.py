"""Files that are there whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path beside another one to write to; it takes the other's place when the block has ended well.

    On an error the file that was there stays as it was, and what was written goes.

    Args:
        path: Where the file is to be; its suffix is kept, since some writers go by it.
    """
    place = Path(path)
    beside = place.with_name(f".{place.stem}.partial{place.suffix}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")
