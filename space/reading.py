"""What people paste or upload, as arrays: text, JSON lists, CSV and NPZ; strangers' files, so sizes come first."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from csv_rows import cells_of, check_width, is_number, label_of, number_of, read_csv
from numpy.typing import NDArray

MAX_ROWS, MAX_VALUES = 1_000_000, 20_000_000  # of one request
_MAX_HEADER = 10_000  # bytes
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_size(shape: tuple[int, ...]) -> None:
    """Raise a ValueError if there are too many rows or values for one request."""
    if (shape[:1] and shape[0] > MAX_ROWS) or math.prod(shape) > MAX_VALUES:
        raise ValueError(
            f"Expected at most {MAX_ROWS:,} rows and {MAX_VALUES:,} values, got an array of shape {shape}. Measure it "
            "with carot_hf on your own machine, where nothing is limited."
        )


def parse_predictions(text: str) -> NDArray[Any]:
    """``(N, K)`` from a row a line or nested JSON lists; ``(N,)`` from one number a line or a flat JSON list.

    Raises:
        ValueError: If a cell is no number or a row is shorter or longer than the first; the message names the line.
    """
    if text.lstrip().startswith("["):
        return _from_json(text, "predictions")
    rows = _rows(_lines(text, "predictions"))
    return rows[:, 0] if rows.shape[1] == 1 else rows


def parse_labels(text: str) -> NDArray[Any]:
    """``(N,)`` integers from one line or many, or a JSON list.

    Raises:
        ValueError: If a label is no whole number; the message names the line.
    """
    if text.lstrip().startswith("["):
        return _from_json(text, "labels")
    found = [(number, cell) for number, cells in _lines(text, "labels") for cell in cells]
    return np.array([label_of(cell, number) for number, cell in found])


def parse_temperature(text: str | None) -> float | None:
    """A number, or None if there is no text.

    Raises:
        ValueError: If there is other text.
    """
    if text is None or not text.strip():
        return None
    if not is_number(text):
        raise ValueError(
            f"Expected `temperature` to be a number, got {text[:40]!r}. Write e.g. 1.5, or leave it empty."
        )
    return float(text)


def read_file(path: str) -> tuple[NDArray[Any], NDArray[Any], list[str]]:
    """Predictions and labels of a CSV or an NPZ, and what was left out of it; see `csv_rows`.

    Raises:
        ValueError: If the file is neither, or not as described; the message names the line.
    """
    if path.lower().endswith(".npz"):
        return *_read_npz(path), []
    if not path.lower().endswith(".csv"):
        raise ValueError(f"Expected a file .csv or .npz, got {Path(path).name!r}. Save it as one of these.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected a CSV in UTF-8, got {error}. Save it as text in UTF-8.") from error
    except OSError as error:
        raise ValueError(f"Expected a CSV, got {type(error).__name__}: {error}. Upload it once more.") from error
    return read_csv(text)


def _read_npz(path: str) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if missing := [name for name in ("predictions", "references") if name not in names]:
                raise ValueError(f"no {' and no '.join(missing)} among {names[:10]}")
            return _read_array(archive, "predictions.npy"), _read_array(archive, "references.npy")
    except Exception as error:  # whatever zipfile, its decompressors and numpy make of a damaged or a locked file
        raise ValueError(
            f"Expected an .npz with the arrays `predictions` and `references`, got {error or type(error).__name__}. "
            "Write it with `np.savez(path, predictions=..., references=...)`."
        ) from error


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array of numbers, whose header is looked at before there is room made for what it claims."""
    entry = archive.getinfo(name if name in archive.namelist() else name.removesuffix(".npy"))
    with archive.open(entry) as file:
        kind = np.lib.format.read_magic(file)
        if kind not in _HEADERS:
            raise ValueError(f"{name} in the format {kind}")
        try:
            shape, _, dtype = _HEADERS[kind](file, max_header_size=_MAX_HEADER)
        except ValueError as error:  # numpy's own words suggest to trust the file
            raise ValueError(f"{name} with a header that says no shape") from error
        if dtype.kind not in "biuf":
            raise ValueError(f"{name} of {dtype}, no numbers")
        check_size(shape)
        if math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"{name} of {entry.file_size:,} bytes, whose header claims the shape {shape}")
    with archive.open(entry) as file:
        found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False, max_header_size=_MAX_HEADER)
        return found


def _lines(text: str, what: str) -> list[tuple[int, list[str]]]:
    """The cells of each line that is not blank, with its number from 1."""
    if not text.strip():
        raise ValueError(f"Expected {what}, got none. Paste at least one row, click an example, or upload a file.")
    return cells_of(text)


def _rows(lines: list[tuple[int, list[str]]]) -> NDArray[np.float64]:
    """``(N, K)`` numbers of equally long rows."""
    check_width(lines, len(lines[0][1]))
    return np.array([[number_of(cell, number) for cell in cells] for number, cells in lines])


def _from_json(text: str, what: str) -> NDArray[Any]:
    try:
        values = np.array(json.loads(text))
    except (RecursionError, MemoryError) as error:
        raise ValueError(
            f"Expected a JSON list of {what}, got one nested too deeply. Paste one list of rows."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected a JSON list of {what}, got text that breaks off in line {error.lineno}, column {error.colno} "
            f"({error.msg}). Close every bracket and put commas between numbers, or paste plain rows."
        ) from error
    except ValueError as error:
        raise ValueError(f"Expected JSON rows of one length, got {error}. Give each row one number a class.") from error
    if values.dtype.kind not in "iuf":
        raise ValueError(
            f"Expected numbers only in the JSON list of {what}, got other values. Leave quotes and null out."
        )
    return values
