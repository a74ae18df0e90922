"""Rows of class scores reduced to a confidence and a hit each, and the buffer that keeps these over many batches.

Rows are worked on in chunks, so 50,000 x 1000 needs little memory beyond the input. Nothing is turned from logits
into probabilities unless ``from_logits`` says so. numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binning import BinSums, classwise_sums
from .inputs import (
    FLOATS,
    Options,
    as_array,
    check_finite,
    check_probabilities,
    check_range,
    check_shapes,
    checked_labels,
    dtype_name,
    to_numpy,
)

ROWS_KEPT = 1 << 20  # of the rows that are added; of more, sums over bins are kept unless an option needs the rows
_CHUNK_VALUES = 1 << 17  # scores worked on at a time: small enough for the cache of one core
_LOWEST_EXPONENT = -80.0  # exp(-80) is 0 for every sum here and still a normal float32; denormals are slow


@dataclass(frozen=True, eq=False)
class ReducedRows:
    """What is kept of ``n`` rows.

    Attributes:
        confidences: ``(n,)`` floats in [0, 1], in the dtype whose bin edges apply.
        correct: ``(n,)`` bool, whether the row was right (``mode="positive"``: whether it is of class 1).
        nll: Sum of ``-ln p_y``.
        brier: Sum of ``sum_k (p_k - 1[y = k])^2``.
        n_classes: ``K``, or None for 1-D input, which leaves ``nll`` and ``brier`` at 0.
        class_sums: ``(K, n_bins)`` as `classwise_sums` returns it, or None.
    """

    confidences: NDArray[Any]
    correct: NDArray[np.bool_]
    nll: float = 0.0
    brier: float = 0.0
    n_classes: int | None = None
    class_sums: NDArray[np.float64] | None = None

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.confidences)


class RowBuffer:
    """Rows of many batches: in growing arrays, and from a limit on as sums over bins, so that the memory is bounded.

    Args:
        first: The first rows.
        n_bins: Of the sums.
        limit: How many rows to keep before they are turned into sums; None: keep all, 5 bytes a row for float32.
    """

    def __init__(self, first: ReducedRows, n_bins: int, limit: int | None) -> None:
        self._confidences, self._correct = first.confidences[:0], first.correct[:0]
        self._length, self._limit = 0, limit
        self._bins = BinSums(n_bins, first.confidences.dtype)
        self._sums = replace(
            first,
            confidences=self._confidences,
            correct=self._correct,
            nll=0.0,
            brier=0.0,
            class_sums=None if first.class_sums is None else np.zeros_like(first.class_sums),
        )
        self.append(first)

    def append(self, rows: ReducedRows) -> None:
        """Add rows of the same kind.

        Raises:
            ValueError: If the number of classes or the dtype differs from the rows before.
        """
        for name, expected, got in (
            ("number of classes", self._sums.n_classes, rows.n_classes),
            ("dtype", self._confidences.dtype, rows.confidences.dtype),
        ):
            if expected != got:
                raise ValueError(
                    f"Expected `predictions` of the same {name} in all batches, {expected}, got {got}. "
                    "Use one metric object for each kind of input, or cast them all alike."
                )
        if self._limit is not None and self._length + rows.n > self._limit:
            self._fold()
        self._keep(rows)
        sums = self._sums.class_sums
        self._sums = replace(
            self._sums,
            nll=self._sums.nll + rows.nll,
            brier=self._sums.brier + rows.brier,
            class_sums=None if sums is None or rows.class_sums is None else sums + rows.class_sums,
        )

    def __len__(self) -> int:
        return self._bins.n + self._length

    def folds(self, n_more: int = 0) -> bool:
        """Whether rows were turned into sums, or will be with so many more."""
        return self._bins.n > 0 or (self._limit is not None and len(self) + n_more > self._limit)

    def rows(self) -> ReducedRows:
        """All rows so far, as views; before they were folded."""
        return replace(self._sums, confidences=self._confidences[: self._length], correct=self._correct[: self._length])

    def bins(self) -> BinSums:
        """All rows so far as sums."""
        self._fold()
        return self._bins

    def totals(self) -> ReducedRows:
        """The sums beside the bins, without rows."""
        return self._sums

    def _keep(self, rows: ReducedRows) -> None:
        end = self._length + rows.n
        if end > len(self._confidences):
            room = max(end, 2 * self._length, 1024)
            room = room if self._limit is None else max(end, min(room, self._limit))
            self._confidences = np.resize(self._confidences, room)
            self._correct = np.resize(self._correct, room)
        self._confidences[self._length : end] = rows.confidences
        self._correct[self._length : end] = rows.correct
        self._length = end

    def _fold(self) -> None:
        if self._length:
            self._bins.add(self._confidences[: self._length], self._correct[: self._length])
            self._length = 0


def reduce_rows(predictions: Any, references: Any, options: Options) -> ReducedRows:
    """Check predictions and references and reduce them to confidences, hits, and sums of NLL and Brier score.

    Args:
        predictions: ``(N, K)`` probabilities, or logits with ``options.from_logits``; or ``(N,)`` as
            ``options.mode`` says. numpy, torch on any device, or nested lists.
        references: ``(N,)`` class indices in ``[0, K)``; 0/1 hits or labels for 1-D predictions.
        options: The part in `ROW_OPTIONS` and, with ``classwise``, ``n_bins``.

    Raises:
        ValueError: If a shape, dtype or value is not as above; the message names row, value and cure.
    """
    scores, labels = as_array(predictions, "predictions"), to_numpy(as_array(references, "references"))
    check_shapes(scores, labels, options)
    name = dtype_name(scores)
    if name not in FLOATS and not name.startswith(("int", "uint", "bool")):
        raise ValueError(f"Expected `predictions` of a float dtype, got {name}. Pass float32 or float64 numbers.")
    if scores.ndim == 1:
        return _reduce_single(scores, labels, name)
    return _reduce_full(scores, checked_labels(labels, scores.shape[1]), name, options)


def _reduce_single(scores: Any, labels: NDArray[Any], name: str) -> ReducedRows:
    values = to_numpy(scores)
    values = values.astype(np.float64) if name not in FLOATS else values.copy()
    check_range(values, name, 0, cure="Pass probabilities; a logit has to go through a softmax or sigmoid first.")
    binary = np.isin(labels, (0, 1))
    if not binary.all():
        row = int(np.argmin(binary))
        raise ValueError(
            f"Expected `references` of 0 and 1 for 1-D `predictions`, got {labels[row]} in row {row}. "
            'Pass `predicted == labels` for mode="top_label", or the binary labels for mode="positive".'
        )
    return ReducedRows(np.clip(values, 0, 1), labels.astype(bool))


def _reduce_full(scores: Any, labels: NDArray[np.int64], name: str, options: Options) -> ReducedRows:
    n_rows, n_classes = scores.shape
    work = np.dtype(np.float32 if name in ("bfloat16", "float16", "float32") else np.float64)
    kept = np.dtype(np.float16) if name == "float16" and not options.from_logits else work
    confidences, correct = np.empty(n_rows, kept), np.empty(n_rows, bool)
    class_sums = np.zeros((n_classes, options.n_bins)) if options.classwise else None
    nll = brier = 0.0
    step = max(1, _CHUNK_VALUES // n_classes)
    for start in range(0, n_rows, step):
        at = slice(start, min(start + step, n_rows))
        block = np.array(to_numpy(scores[at]), dtype=work, order="C")  # a copy, so that it may be overwritten
        rows, targets = np.arange(len(block)), labels[at]
        if options.from_logits:
            top, label_nll = _softmax(
                block, targets, start, 1.0 if options.temperature is None else options.temperature
            )
        else:
            top = check_probabilities(block, start, name, options.check_sums)
            with np.errstate(divide="ignore"):  # p_y = 0 has an infinite NLL
                label_nll = -np.log(block[rows, targets], dtype=np.float64)
        confidences[at], correct[at] = block[rows, top], top == targets
        nll += float(label_nll.sum())
        if class_sums is not None:
            class_sums += classwise_sums(block.astype(kept, copy=False), targets, options.n_bins)
        block[rows, targets] -= 1.0
        brier += float(np.einsum("ij,ij->i", block, block).sum(dtype=np.float64))
    return ReducedRows(confidences, correct, nll, brier, n_classes, class_sums)


def _softmax(
    block: NDArray[Any], targets: NDArray[np.int64], start: int, temperature: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Overwrite logits by ``softmax(logits / temperature)``; return the first argmax and ``-ln p_y``."""
    rows = np.arange(len(block))
    with np.errstate(over="ignore", invalid="ignore"):
        finite = math.isfinite(block.sum())  # cheaper than `isfinite`; it may overflow with all values finite
    if not finite:
        check_finite(block, start)
    top = block.argmax(axis=1)  # of the unscaled logits: dividing may round two of them to one value
    with np.errstate(over="ignore"):
        block -= block[rows, top][:, None]
        margins = block[rows, targets].astype(np.float64) / temperature
        if temperature != 1.0:
            block /= temperature
    np.exp(np.maximum(block, _LOWEST_EXPONENT, out=block), out=block)
    totals = block.sum(axis=1, dtype=np.float64)
    block /= totals[:, None].astype(block.dtype)
    return top, np.log(totals) - margins
