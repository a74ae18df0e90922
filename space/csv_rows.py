"""Predictions and labels out of a CSV as spreadsheets and data frames write it: index columns, quotes, decimal commas.

numpy only. What is left out, or taken for the label without being called so, is said in notes.
"""

from __future__ import annotations

import csv
import io
import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LABELS = ("label", "labels", "target", "targets", "y_true", "y", "reference", "references")
INDICES = ("", "index", "idx", "id", "row", "row_id", "sample_id", "image_id", "level_0")
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?")
MAX_CELLS = 5_000_000
_LARGEST_LABEL = 2**53  # up to which a float tells whole numbers apart
_FEW = 3  # rows from which on consecutive integers are an index


class CsvRows(NamedTuple):
    """What a file holds.

    Attributes:
        predictions: ``(N, K)`` float64, or ``(N,)`` of one column.
        labels: ``(N,)`` int64.
        notes: What was left out or guessed, a sentence each.
    """

    predictions: NDArray[np.float64]
    labels: NDArray[np.int64]
    notes: list[str]


def read_csv(text: str) -> CsvRows:
    """Read predictions and labels.

    The label is in the column called so (`LABELS`, in any case), else in the last one. Left out are columns called
    `INDICES`, those without a name, and a first column of consecutive integers.

    Args:
        text: Lines of cells, separated by ``,``, ``;``, tabs or spaces, with or without a header. Numbers have a
            point, or a comma where it separates no cells.
    Raises:
        ValueError: If there are no rows, a row has another width, a cell is no number, or a label is not whole; the
            message names the line.
    """
    lines = cells_of(text)
    if not lines:
        raise ValueError("Expected rows in the file, got none. Write the predictions, then the label, on each line.")
    width = len(lines[0][1])
    header = None if all(is_number(cell) for cell in lines[0][1]) else [name.strip().lower() for name in lines[0][1]]
    rows = lines if header is None else lines[1:]
    check_width(rows, width)
    notes: list[str] = []
    label = _label_column(header, width, notes)
    dropped = _index_columns(header, rows, label, notes)
    kept = [column for column in range(width) if column != label and column not in dropped]
    if not rows or not kept:
        raise ValueError(
            f"Expected at least one row of predictions and a label, got {len(rows)} rows of {width} columns, of which "
            f"{len(kept)} are predictions. Write the predictions, then the label, separated by commas."
        )
    values = np.array([[number_of(cells[column], line) for column in kept] for line, cells in rows])
    labels = np.array([label_of(cells[label], line) for line, cells in rows])
    return CsvRows(values[:, 0] if len(kept) == 1 else values, labels, notes)


def cells_of(text: str) -> list[tuple[int, list[str]]]:
    """The cells of each line that is not blank, with its number from 1; decimal commas have become points."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    separator = next((mark for mark in ";\t," if lines and mark in lines[0][1]), None)
    if separator is None:
        return [(number, line.split()) for number, line in lines]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    found, cells = [], 0
    try:
        for row in reader:
            cells += len(row)
            if cells > MAX_CELLS:
                raise ValueError(
                    f"Expected at most {MAX_CELLS:,} cells, got more, in line {reader.line_num}. Save them as .npz, or "
                    "measure them with carot_hf on your own machine."
                )
            if any(cell.strip() for cell in row):
                found.append((reader.line_num, [_pointed(cell.strip()) for cell in row]))
    except csv.Error as error:
        raise ValueError(
            f"Expected rows of cells, got in line {reader.line_num}: {error}. Close each quote, and save the file as "
            "text."
        ) from error
    return found


def check_width(rows: list[tuple[int, list[str]]], width: int) -> None:
    """Raise a ValueError at the first row that has another number of cells."""
    for number, cells in rows:
        if len(cells) != width:
            raise ValueError(
                f"Expected {width} columns in line {number}, as in the first row, got {len(cells)}. Give each row one "
                "number for each class."
            )


def is_number(cell: str) -> bool:
    """Whether a cell is a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def number_of(cell: str, line: int) -> float:
    """Read a number.

    Raises:
        ValueError: If it is none.
    """
    if not is_number(cell):
        raise ValueError(
            f"Expected a number in line {line}, got {cell[:40]!r}. Write numbers with a decimal point, separated by "
            "commas, tabs or spaces, or one JSON list."
        )
    return float(cell)


def label_of(cell: str, line: int) -> int:
    """Read a label.

    Raises:
        ValueError: If it is no whole number.
    """
    value = number_of(cell, line)
    if not value.is_integer() or abs(value) > _LARGEST_LABEL:
        raise ValueError(f"Expected a whole number as label in line {line}, got {cell[:40]!r}. Write class indices.")
    return int(value)


def _pointed(cell: str) -> str:
    return cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell) else cell


def _label_column(header: list[str] | None, width: int, notes: list[str]) -> int:
    """The column of the labels."""
    if header is None:
        return width - 1
    found = [column for column, name in enumerate(header) if name in LABELS]
    if len(found) > 1:
        names = [header[column] for column in found]
        raise ValueError(f"Expected one column of labels, got {names}. Keep one of them.")
    if not found:
        notes.append(f"The labels are taken from the last column, {header[-1]!r}.")
    return found[0] if found else width - 1


def _index_columns(
    header: list[str] | None, rows: list[tuple[int, list[str]]], label: int, notes: list[str]
) -> set[int]:
    """The columns that number or name the rows."""
    names = [] if header is None else header
    found = {
        column
        for column, name in enumerate(names)
        if column != label and (name in INDICES or name.startswith("unnamed:"))
    }
    if found:
        shown = [repr(names[column]) if names[column] else "the one without a name" for column in sorted(found)]
        notes.append(f"Left out, since they number the rows: {', '.join(shown)}.")
    first = [cells[0] for _, cells in rows]
    if 0 not in found and label != 0 and len(first) >= _FEW and all(is_number(cell) for cell in first):
        values = [float(cell) for cell in first]
        if values[0].is_integer() and all(after == before + 1 for before, after in pairwise(values)):
            found.add(0)
            notes.append(f"The first column, {first[0]}, {first[1]}, {first[2]} ..., is an index and left out.")
    return found
