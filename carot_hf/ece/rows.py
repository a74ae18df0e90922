"""Rows of class scores reduced to a confidence and a hit each, and the buffer that keeps these over many batches.

Rows are worked on in chunks, so 50,000 x 1000 needs little memory beyond the input. Nothing is turned from logits
into probabilities unless ``from_logits`` says so. numpy only.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binning import BinSums, checked_weights, classwise_sums, rows_that_count
from .inputs import (
    AS_LOGITS,
    FLOATS,
    Options,
    as_array,
    check_finite,
    check_probabilities,
    check_range,
    check_shapes,
    checked_labels,
    dtype_name,
    looks_like_probabilities,
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
        nll: Sum of ``-ln p_y``, by weight.
        brier: Sum of ``sum_k (p_k - 1[y = k])^2``, by weight; of probabilities of class 1 of ``(p - y)^2``.
        n_classes: ``K``, or None for 1-D input; confidences leave ``nll`` and ``brier`` at 0.
        class_sums: ``(K, n_bins)`` as `classwise_sums` returns it, or None.
        weights: ``(n,)`` float64 weights above 0, or None: 1 each.
        mass: Sum of the weights.
    """

    confidences: NDArray[Any]
    correct: NDArray[np.bool_]
    nll: float = 0.0
    brier: float = 0.0
    n_classes: int | None = None
    class_sums: NDArray[np.float64] | None = None
    weights: NDArray[np.float64] | None = None
    mass: float = 0.0

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
    Attributes:
        totals: The sums beside the bins, without rows.
    """

    def __init__(self, first: ReducedRows, n_bins: int, limit: int | None) -> None:
        self._confidences, self._correct = first.confidences[:0], first.correct[:0]
        self._weights: NDArray[np.float64] | None = None  # from the first row on that does not weigh 1
        self._length, self._limit = 0, limit
        self._bins = BinSums(n_bins, first.confidences.dtype)
        sums = None if first.class_sums is None else np.zeros_like(first.class_sums)
        self.totals = ReducedRows(self._confidences, self._correct, n_classes=first.n_classes, class_sums=sums)
        self.append(first)

    def append(self, rows: ReducedRows) -> None:
        """Add rows of the same kind.

        Raises:
            ValueError: If the number of classes or the dtype differs from the rows before.
        """
        for name, expected, got in (
            ("number of classes", self.totals.n_classes, rows.n_classes),
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
        sums = self.totals.class_sums
        self.totals = replace(
            self.totals,
            nll=self.totals.nll + rows.nll,
            brier=self.totals.brier + rows.brier,
            mass=self.totals.mass + rows.mass,
            class_sums=None if sums is None or rows.class_sums is None else sums + rows.class_sums,
        )

    def __len__(self) -> int:
        return self._bins.n + self._length

    def folds(self, n_more: int = 0) -> bool:
        """Whether rows were turned into sums, or will be with so many more."""
        return self._bins.n > 0 or (self._limit is not None and len(self) + n_more > self._limit)

    def rows(self) -> ReducedRows:
        """All rows so far, as views; before they were folded."""
        kept = slice(self._length)
        weights = None if self._weights is None else self._weights[kept]
        return replace(self.totals, confidences=self._confidences[kept], correct=self._correct[kept], weights=weights)

    def bins(self) -> BinSums:
        """All rows so far as sums."""
        self._fold()
        return self._bins

    def _keep(self, rows: ReducedRows) -> None:
        end = self._length + rows.n
        if end > len(self._confidences):
            room = max(end, 2 * self._length, 1024)
            room = room if self._limit is None else max(end, min(room, self._limit))
            self._confidences = np.resize(self._confidences, room)
            self._correct = np.resize(self._correct, room)
            if self._weights is not None:
                self._weights = np.resize(self._weights, room)
        if rows.weights is not None and self._weights is None:
            self._weights = np.ones(len(self._confidences))
        if self._weights is not None:
            self._weights[self._length : end] = 1.0 if rows.weights is None else rows.weights
        self._confidences[self._length : end] = rows.confidences
        self._correct[self._length : end] = rows.correct
        self._length = end

    def _fold(self) -> None:
        if self._length:
            rows = self.rows()
            self._bins.add(rows.confidences, rows.correct, rows.weights)
            self._length = 0


def reduce_rows(predictions: Any, references: Any, options: Options, sample_weight: Any = None) -> ReducedRows:
    """Check predictions and references and reduce them to confidences, hits, and sums of NLL and Brier score.

    Args:
        predictions: ``(N, K)`` probabilities, or logits with ``options.from_logits``; or ``(N,)`` as
            ``options.mode`` says. numpy, torch on any device, or nested lists.
        references: ``(N,)`` class indices in ``[0, K)``; 0/1 hits or labels for 1-D predictions.
        options: The part in `ROW_OPTIONS` and, with ``classwise``, ``n_bins``.
        sample_weight: ``(N,)`` weights >= 0, of any sum above 0; None: 1 each. Rows of weight 0 are left out.

    Raises:
        ValueError: If a shape, dtype or value is not as above; the message names row, value and cure.
    """
    scores, labels = as_array(predictions, "predictions"), to_numpy(as_array(references, "references"))
    check_shapes(scores, labels, options)
    scores, labels, weights = _kept_rows(scores, labels, options, checked_weights(sample_weight, len(labels)))
    name = dtype_name(scores)
    if name not in FLOATS and not name.startswith(("int", "uint", "bool")):
        cure = (
            "`predictions.astype(float)`" if getattr(scores.dtype, "kind", "") in "US" else "float32 or float64 numbers"
        )
        raise ValueError(f"Expected `predictions` of a float dtype, got {name}. Pass {cure}.")
    if scores.ndim == 1:
        return _reduce_single(scores, labels, name, options, weights)
    return _reduce_full(scores, checked_labels(labels, scores.shape[1]), name, options, weights)


def _kept_rows(
    scores: Any, labels: NDArray[Any], options: Options, weights: NDArray[np.float64] | None
) -> tuple[Any, NDArray[Any], NDArray[np.float64] | None]:
    """The rows that count: neither of the label to ignore, nor of weight 0."""
    ignored = options.ignore_index if labels.dtype.kind in "biuf" else None
    rows = rows_that_count(labels, weights, ignored)
    if rows is None:
        return scores, labels, weights
    return scores[rows], labels[rows], None if weights is None else weights[rows]


def _reduce_single(
    scores: Any, labels: NDArray[Any], name: str, options: Options, weights: NDArray[np.float64] | None
) -> ReducedRows:
    values = to_numpy(scores)
    values = values.astype(np.float64) if name not in FLOATS else values.copy()
    check_range(values, name, 0, cure="Pass probabilities; a logit has to go through a softmax or sigmoid first.")
    _check_binary(labels, options)
    values, hits = np.clip(values, 0, 1), labels.astype(bool)
    mass = float(len(values)) if weights is None else float(weights.sum())
    if options.mode != "positive":
        return ReducedRows(values, hits, weights=weights, mass=mass)
    chances = values.astype(np.float64)
    with np.errstate(divide="ignore"):  # a label that was given the probability 0 has an infinite NLL
        nll = -np.log(np.where(hits, chances, 1.0 - chances))
    return ReducedRows(
        values, hits, nll=_total(nll, weights), brier=_total((chances - hits) ** 2, weights), weights=weights, mass=mass
    )


def _check_binary(labels: NDArray[Any], options: Options) -> None:
    """Raise unless labels of 1-D predictions are 0 and 1."""
    if labels.dtype.kind in "USO":
        found = sorted(set(labels.tolist()))
        raise ValueError(
            f"Expected `references` of 0 and 1 for 1-D `predictions`, got names ({', '.join(map(repr, found[:4]))}). "
            f"Pass `[int(label == {found[-1]!r}) for label in references]`, with the name whose probability is "
            "predicted."
        )
    binary = np.isin(labels, (0, 1))
    if binary.all():
        return
    row = int(np.argmin(binary))
    if np.isin(labels, (-1, 1)).all():
        cure = "Pass `[int(label > 0) for label in references]`."
    elif options.mode == "positive":
        cure = "Pass 1 for the rows of the class whose probability is predicted, and 0 for the others."
    else:
        cure = 'Pass `predicted == labels` for mode="top_label", or the binary labels for mode="positive".'
    raise ValueError(f"Expected `references` of 0 and 1 for 1-D `predictions`, got {labels[row]} in row {row}. {cure}")


def _total(values: NDArray[Any], weights: NDArray[np.float64] | None) -> float:
    """Sum by weight, in float64."""
    return float(values.sum(dtype=np.float64) if weights is None else weights @ values)


def _reduce_full(
    scores: Any, labels: NDArray[np.int64], name: str, options: Options, weights: NDArray[np.float64] | None
) -> ReducedRows:
    n_rows, n_classes = scores.shape
    work = np.dtype(np.float32 if name in ("bfloat16", "float16", "float32") else np.float64)
    kept = np.dtype(np.float16) if name == "float16" and not options.from_logits else work
    confidences, correct = np.empty(n_rows, kept), np.empty(n_rows, bool)
    class_sums = np.zeros((n_classes, options.n_bins)) if options.classwise else None
    nll = brier = 0.0
    probable = options.from_logits and n_rows > 1
    step = max(1, _CHUNK_VALUES // n_classes)
    for start in range(0, n_rows, step):
        at = slice(start, min(start + step, n_rows))
        block = np.array(to_numpy(scores[at]), dtype=work, order="C")  # a copy, so that it may be overwritten
        rows, targets = np.arange(len(block)), labels[at]
        own = None if weights is None else weights[at]
        if options.from_logits:
            probable = probable and looks_like_probabilities(block)
            top, label_nll = _softmax(
                block, targets, start, 1.0 if options.temperature is None else options.temperature
            )
        else:
            top = check_probabilities(block, start, name, options.check_sums)
            with np.errstate(divide="ignore"):  # p_y = 0 has an infinite NLL
                label_nll = -np.log(block[rows, targets], dtype=np.float64)
        confidences[at], correct[at] = block[rows, top], top == targets
        nll += _total(label_nll, own)
        if class_sums is not None:
            class_sums += classwise_sums(block.astype(kept, copy=False), targets, options.n_bins, own)
        block[rows, targets] -= 1.0
        squares = np.einsum("ij,ij->i", block, block)
        brier += _total(squares, own)
    if probable:
        warnings.warn(AS_LOGITS + "Leave from_logits out.", stacklevel=4)
    mass = float(n_rows) if weights is None else float(weights.sum())
    return ReducedRows(confidences, correct, nll, brier, n_classes, class_sums, weights, mass)


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
