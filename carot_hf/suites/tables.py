"""Tables that say which file is which image: CSV, TSV, JSON lines, and the ``metadata`` of an ImageFolder.

Cells are text as they stand in the file: a class may be called "01", "NA" or "None". Numbers are made of them by
whoever reads the labels.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from ..data.columns import LABEL_COLUMNS, PATH_COLUMNS

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path, what: str) -> str:
    """Read a text file in UTF-8, or in the encoding that its byte-order mark says.

    Raises:
        ValueError: If it is in another one, or no regular file: to open a pipe would wait for ever.
    """
    if not path.is_file():
        raise ValueError(f"Expected {what} in a file, got {path}, which is no regular file. Correct the path.")
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"Expected {what} in UTF-8, or with a byte-order mark, in {path}, got {error}, in line {line}. Save it as "
            "UTF-8."
        ) from error


def read_tables(files: Sequence[Path], root: Path) -> datasets.Dataset:
    """Read tables of one kind and join their rows; relative paths of images become relative to ``root``.

    Raises:
        ValueError: If a file cannot be read, or two of them have other columns.
    """
    rows: dict[str, list[Any]] = {}
    for path in files:
        part = _read_json(path) if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else _read_csv(path)
        if rows and rows.keys() != part.keys():
            raise ValueError(
                f"Expected tables of the same columns, got {sorted(rows)} in {files[0]} and {sorted(part)} in {path}. "
                "Name one of them as the path of the set."
            )
        for name, values in part.items():
            if path.parent != root and name.lower() in PATH_COLUMNS:
                values = [_below(path.parent, root, value) for value in values]
            rows.setdefault(name, []).extend(values)
    if not rows or not next(iter(rows.values())):
        raise ValueError(f"Expected a table with rows in {files[0]}, got none. Check the file.")
    try:
        return datasets.Dataset.from_dict(rows)
    except (TypeError, ValueError, OverflowError) as error:  # of pyarrow: several kinds of value in one column
        raise ValueError(
            f"Expected columns of one kind of value each in {files[0]}, got {' '.join(str(error).split())}. Make them "
            "all texts, or all numbers."
        ) from error


def with_folders(rows: datasets.Dataset, image: str) -> datasets.Dataset:
    """Add the column ``label`` if there is none and every image lies in a folder of its class."""
    if any(name in rows.column_names for name in LABEL_COLUMNS):
        return rows
    parents = [Path(value).parts[:-1] if isinstance(value, str) else () for value in rows[image]]
    if not parents or not all(parents):
        return rows
    return rows.add_column("label", [parts[-1] for parts in parents])


def _below(folder: Path, root: Path, value: Any) -> Any:
    return str(folder.relative_to(root) / value) if isinstance(value, str) and not Path(value).is_absolute() else value


def _read_csv(path: Path) -> dict[str, list[Any]]:
    text = read_text(path, "a table")
    header = next((line for line in text.splitlines() if line.strip()), "")
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rows = []
    try:
        for row in reader:
            if row:
                rows.append(row)
                if len(row) != len(rows[0]):
                    raise ValueError(
                        f"Expected {len(rows[0])} cells in line {reader.line_num} of {path}, as in its header, got "
                        f"{len(row)}. Put cells that hold {separator!r} into quotes."
                    )
    except csv.Error as error:
        raise ValueError(f"Expected a table, got in line {reader.line_num} of {path}: {error}. Correct it.") from error
    if len(rows) < 2:
        raise ValueError(f"Expected a header and rows in {path}, got {len(rows)} lines. Check the file.")
    names = [name.strip() for name in rows[0]]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected distinct names of columns in {path}, got {names}. Rename one.")
    return {name: [row[place] for row in rows[1:]] for place, name in enumerate(names)}


def _read_json(path: Path) -> dict[str, list[Any]]:
    text = read_text(path, "JSON lines")
    items: list[Any] = []
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected a JSON list of objects in {path}, got {error}. Correct it.") from error
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    items.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"Expected a JSON object in line {number} of {path}, got {error}. Correct that line."
                    ) from error
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise ValueError(f"Expected an object in row {number} of {path}, got {item!r}. Give each row its columns.")
    names = list(dict.fromkeys(name for item in items for name in item))
    return {name: [item.get(name) for item in items] for name in names}
