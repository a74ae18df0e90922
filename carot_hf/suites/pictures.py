"""Images that somebody names on a command line: files, folders of them, and tables, which may be a stranger's."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.columns import image_column, may_be_images, undecoded
from ..data.image_roots import ImageRoots
from ..data.pictures import Picture
from ..data.stored import stored_paths
from .folders import images_in, walk

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


def pictures_of(places: Iterable[Path], column: str | None = None) -> list[Picture]:
    """Return the images of places, those of a folder sorted, those of a table in its order, each name once.

    Args:
        places: Image files, folders, and tables by their suffix, of `TABLES`.
        column: Of the images in tables; ``None``: it is found by kind and name.
    Raises:
        ValueError: If a place is not there or has no image, or a table has no such column, or names a file elsewhere.
    """
    found: list[Picture] = []
    for place in places:
        if not place.exists():
            raise ValueError(f"Expected an image, a table or a folder of images, got {place}, which is not there.")
        if place.is_dir():
            files = images_in(walk(place))
            if not files:
                raise ValueError(f"Expected images in the folder {place}, found none.")
            found += [Picture(str(path)) for path in files]
        else:
            found += pictures_in(place, column) if is_table(place) else [Picture(str(place))]
    return list({picture.name: picture for picture in found}.values())


def is_table(place: Path) -> bool:
    """Whether a file is a table of images by its name."""
    return place.suffix.lower() in TABLES and not place.is_dir()


def pictures_in(table: Path, column: str | None = None) -> list[Picture]:
    """Return the images of a table in its order; of parquet nothing is read but where they are.

    One that a row names by a path is called by that path, from the folder of the table; one that is stored in its row
    ``<table>#<row>``, rows counted from 0. A row without an image is called so, too.

    Args:
        table: A file.
        column: Of the images; ``None``: the one that there is.
    Raises:
        ValueError: If it is no table, has no such column, or names a file that does not lie in or below its folder.
    """
    rows = _opened(table)
    name = _column(rows, table, column)
    rows = undecoded(rows, name).select_columns([name])
    roots, found = ImageRoots([table.parent]), []
    paths, held = stored_paths(rows, name)
    for row, (path, stored) in enumerate(zip(paths, held, strict=True)):
        if stored or not path:
            found.append(Picture(f"{table}#{row}", rows, row, name))
            continue
        place = str(table.parent / path)
        if place not in roots:
            raise ValueError(
                f"Expected images in or below {roots} in row {row} of {table}, got {path!r}, which lies or leads "
                "elsewhere. Copy it there, or name the file itself."
            )
        found.append(Picture(place))
    return found


def _opened(table: Path) -> Any:
    """The rows of a table."""
    import datasets  # of tables alone

    from .tables import read_tables

    if not table.is_file():
        raise ValueError(f"Expected a table in a file, got {table}, which is no regular file. Correct the path.")
    if table.suffix.lower() != ".parquet":
        return read_tables([table], table.parent)
    try:
        files = [glob.escape(str(table))]
        return datasets.load_dataset("parquet", data_files=files, split="train")  # nosec B615  # a local file
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"Expected a parquet table at {table}, got {type(error).__name__}: {reason}") from error


def _column(rows: Any, table: Path, column: str | None) -> str:
    """The column of the images."""
    import datasets

    if column is None:
        try:
            return image_column(rows)
        except ValueError as error:
            raise ValueError(
                f"{str(error).replace('`image_column`', '--image_column')} The table is {table}."
            ) from error
    features = rows.features or {}
    if column not in features:
        raise ValueError(f"Expected the column '{column}' in {table}, got {sorted(features)}. Correct --image_column.")
    if not isinstance(features[column], datasets.Image) and not may_be_images(features[column]):
        raise ValueError(
            f"Expected paths or encoded images in the column '{column}' of {table}, got {features[column]}. Correct "
            "--image_column."
        )
    return column
