"""Logits and labels as every function here takes them: checked, in chunks, and computed only when they are read.

Logits and labels may be torch tensors on any device or numpy arrays. Half precision is worked on as float32; rows
are taken in chunks, so 50,000 x 1000 needs little memory beyond the logits, and little at all with `LogitRows`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ece.binning import checked_weights, rows_that_count
from ..ece.inputs import AS_LOGITS, as_array, looks_like_probabilities, to_numpy, two_dimensional

_CHUNK_VALUES = 1 << 17  # logits worked on at a time: small enough for the cache of one core
LOWEST_EXPONENT = -80.0  # exp(-80) is 0 for every sum here and still a normal float32; denormals are slow


class LogitRows(ABC):
    """Logits that are computed when they are read, some rows at a time: a matrix that is never there as a whole.

    Attributes:
        shape: ``(N, K)``.
        dtype: Of the rows; a float dtype.
        device: Of the rows.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: slice) -> Tensor:
        """Return ``(n, K)``, the same values each time; the slice may have a step."""


Logits = Tensor | NDArray[Any] | LogitRows


def checked_rows(
    logits: Logits, labels: Tensor | NDArray[Any], *, warn: bool = False
) -> tuple[Tensor | LogitRows, Tensor]:
    """Return both as tensors on the device of the logits, shapes and values checked; reads all logits.

    Args:
        logits: See :func:`~carot_hf.calibration_metrics`.
        labels: See there.
        warn: Warn if all rows look like probabilities.
    """
    logits, labels = checked_shapes(logits, labels)
    probable = warn and len(logits) > 1
    for start, rows, _ in row_chunks(logits, labels):
        check_finite(rows, start)
        probable = probable and looks_like_probabilities(rows)
    if probable:
        warn_of_probabilities(3)
    return logits, labels


def warn_of_probabilities(above: int) -> None:
    """Warn that all rows look like probabilities, of so many calls above this function."""
    cure = "Pass logits: `probabilities.log()` gives these probabilities back."
    warnings.warn(AS_LOGITS + cure, stacklevel=above + 1)


def checked_shapes(logits: Logits, labels: Tensor | NDArray[Any]) -> tuple[Tensor | LogitRows, Tensor]:
    """Return both as tensors on the device of the logits, shapes and labels checked."""
    if not isinstance(logits, LogitRows):
        logits = _as_tensor(logits, "logits")
    labels = _as_tensor(labels, "labels")
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"Expected `logits` of a float dtype and shape (N, K) with N >= 1 and K >= 2, got {logits.dtype} of shape "
            f"{shape}. Pass one row of class scores, before the softmax, for each sample."
        )
    if tuple(labels.shape) != shape[:1]:
        two = labels.ndim == 2 and len(labels) == len(logits)
        got = two_dimensional(labels.cpu().numpy(), "labels") if two else f"{tuple(labels.shape)}. Pass class indices."
        raise ValueError(f"Expected `labels` of shape ({len(logits)},), got {got}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"Expected `labels` of an integer dtype, got {labels.dtype}. Pass class indices.")
    labels = labels.to(logits.device, torch.int64)
    check_range(labels, logits.shape[1], "the columns of `logits`")
    return logits, labels


def check_range(labels: Tensor, classes: int, of: str) -> None:
    """Raise a ValueError unless labels are in ``[0, classes)``, which are the numbers of ``of``."""
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"Expected `labels` in [0, {classes}), got {int(labels[row])} in row {row}. Leave out rows without a "
            f"class, and map labels to {of}."
        )


def check_finite(rows: Tensor, start: int) -> None:
    """Raise a ValueError if there is a nan or inf among rows of logits, the first of which is row ``start``."""
    if math.isfinite(rows.sum()):  # the sum shows a nan or inf at a fifth of the cost of `isfinite`
        return
    for row, column in (~rows.isfinite()).nonzero()[:1].tolist():
        raise ValueError(
            f"Expected finite `logits`, got {float(rows[row, column])} in row {start + row}, column {column}. "
            "Find out where the model diverged; to leave a class out, drop its column."
        )


def kept_rows(
    logits: Logits, labels: Any, sample_weight: Any, ignore_index: int | None
) -> tuple[Logits, Any, NDArray[np.float64] | None]:
    """The rows that count, and their weights; None: 1 each."""
    if sample_weight is None and ignore_index is None:
        return logits, labels, None
    labels = _as_tensor(labels, "labels")
    if labels.ndim != 1:
        return logits, labels, None  # to be refused
    weights = checked_weights(sample_weight, len(labels))
    rows = rows_that_count(labels.cpu().numpy(), weights, ignore_index)
    if rows is None:
        return logits, labels, weights
    whole = logits if isinstance(logits, LogitRows) else _as_tensor(logits, "logits")
    if tuple(labels.shape) != (len(whole),):
        return whole, labels, weights  # to be refused
    weights = None if weights is None else weights[rows]
    return _Rows(whole, rows), labels[torch.from_numpy(rows).to(labels.device)], weights


def row_chunks(logits: Tensor | LogitRows, labels: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield first row, logits as float32 or float64, and labels of one chunk after the other."""
    step = chunk_rows(logits.shape[1])
    for start in range(0, len(logits), step):
        rows = logits[start : start + step]
        yield start, rows if rows.dtype == torch.float64 else rows.float(), labels[start : start + step]


def chunk_rows(columns: int) -> int:
    """Return how many rows of so many columns `row_chunks` takes at a time."""
    return max(1, _CHUNK_VALUES // columns)


def empty_like_rows(logits: Tensor | LogitRows) -> NDArray[Any]:
    """Return room for a number a row, as precise as the logits are worked on."""
    return np.empty(len(logits), dtype=np.float64 if logits.dtype == torch.float64 else np.float32)


def every_row(logits: Tensor | LogitRows, step: int) -> Tensor | LogitRows:
    """Return each ``step``-th row of logits, without a copy."""
    if isinstance(logits, LogitRows):
        return _EveryRow(logits, step)
    return logits[::step]


def check_row_temperature(temperatures: Tensor, size: int) -> None:
    """Raise a ValueError unless there is a finite temperature above 0 for each row."""
    if tuple(temperatures.shape) != (size,) or not bool(((temperatures > 0) & temperatures.isfinite()).all()):
        raise ValueError(
            f"Expected finite temperatures above 0 of shape ({size},), got shape {tuple(temperatures.shape)}"
            f"{'' if temperatures.numel() == 0 else f' from {float(temperatures.min()):g}'}. Pass one for each row."
        )


class _Rows(LogitRows):
    """Some rows of others, read when they are asked for.

    Args:
        logits: All rows.
        rows: ``(n,)`` numbers of those that are kept, in order.
    """

    def __init__(self, logits: Tensor | LogitRows, rows: NDArray[np.int64]) -> None:
        self._logits, self._kept = logits, rows
        self.shape = len(rows), logits.shape[1]
        self.dtype, self.device = logits.dtype, logits.device

    def __getitem__(self, rows: slice) -> Tensor:
        kept = self._kept[rows]
        if len(kept) == 0:
            return self._logits[0:0]
        first = int(kept[0])
        block = self._logits[first : int(kept[-1]) + 1]
        return block[torch.from_numpy(kept - first).to(block.device)]


class _EveryRow(LogitRows):
    """Each n-th row of others; the rows between are not read."""

    def __init__(self, logits: LogitRows, step: int) -> None:
        self._logits, self._step = logits, step
        self.shape = -(-len(logits) // step), logits.shape[1]
        self.dtype, self.device = logits.dtype, logits.device

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(len(self))
        return self._logits[start * self._step : stop * self._step : step * self._step]


def _as_tensor(values: Any, name: str) -> Tensor:
    """A tensor without its graph, or one that shares memory with an array where torch allows it."""
    if isinstance(values, Tensor):
        return values.detach()
    array = to_numpy(as_array(values, name))
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"Expected `{name}` as numbers, got {array.dtype}. "
            + ("Pass class indices." if name == "labels" else "Pass one row of class scores for each sample.")
        )
    if array.dtype.kind == "u":
        array = array.astype(np.int64)
    return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
