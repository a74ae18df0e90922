"""Images with a name each, of files and of rows of tables, whose bytes are read when their turn has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Picture(NamedTuple):
    """An image, and what it is called.

    Attributes:
        name: A path, or ``table#row``.
        rows: A table that holds the image; ``None``: the name is the path of a file.
        row: Its number there.
        column: Of the images there.
    """

    name: str
    rows: Any = None
    row: int = 0
    column: str = ""

    @property
    def value(self) -> Any:
        """The image as it is stored, read now: bytes, or its path."""
        return self.name if self.rows is None else self.rows[self.row][self.column]


class PictureRows:
    """Pictures as the data of a ``ShiftSet`` without labels.

    Args:
        pictures: In their order; nothing is read before its row is asked for.
    """

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": self.pictures[row].value}
