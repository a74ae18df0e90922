"""Which rows to trust: errors among the most confident ones, the confidence that holds an accuracy, the smooth ECE.

All in float64 and O(N log N). The checks of confidences and hits stand here for the files beside it, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..ece.binning import checked_weights
from ..ece.inputs import as_array, to_numpy

Values = Tensor | ArrayLike
_ROUNDING = 1e-6  # by which a probability may be outside [0, 1]
_CELLS = 1 << 14  # of the grid on [0, 1] that residuals are smoothed on: 6e-5 wide
_HALVINGS = 30


def aurc(confidences: Values, correct: Values, sample_weight: Values | None = None) -> float:
    r"""Area under the risk-coverage curve, :math:`\frac1N \sum_{k=1}^N E_k / k`, lower is better.

    :math:`E_k` is the number of errors among the ``k`` most confident rows. Rows of equal confidence count by the mean
    over all their orders: their errors are spread evenly.

    Args:
        confidences: ``(N,)`` numbers in [0, 1] of any dtype.
        correct: ``(N,)`` booleans or 0/1, whether the prediction of that row was right.
        sample_weight: ``(N,)`` weights >= 0: a row of weight 2 counts as two. None: 1 each.
    Returns:
        A fraction in [0, 1].
    Raises:
        ValueError: If there is no row, the lengths differ, or a value is out of range.
    Source:
        Geifman, Uziel and El-Yaniv 2019, "Bias-reduced uncertainty estimation for deep neural classifiers".
    """
    starts, rows, errors, rates = _blocks(confidences, correct, sample_weight)
    ends = torch.from_numpy(np.stack([starts + rows + 1, starts + 1]))
    harmonic = torch.special.digamma(ends).numpy()  # the sum of 1 / k over a block is the difference
    total = rates * rows + (errors - rates * starts) * (harmonic[0] - harmonic[1])
    return float(total.sum() / rows.sum())


def augrc(confidences: Values, correct: Values, sample_weight: Values | None = None) -> float:
    r"""Area under the generalised risk-coverage curve, :math:`\frac1N \sum_{k=1}^N E_k / N`, lower is better.

    The mean over the coverages of the share of all rows that is kept and wrong. Without the quotient ``k`` of `aurc`
    the first few rows do not outweigh the rest. With the error rate ``e`` it is
    :math:`(1 - AUROC)(1 - e) e + e^2 / 2 + e / (2N)`.

    Args:
        confidences: ``(N,)`` numbers in [0, 1] of any dtype.
        correct: ``(N,)`` booleans or 0/1, whether the prediction of that row was right.
        sample_weight: ``(N,)`` weights >= 0: a row of weight 2 counts as two. None: 1 each.
    Returns:
        A fraction in [0, (1 + 1 / N) / 2], at most `aurc`.
    Raises:
        ValueError: If there is no row, the lengths differ, or a value is out of range.
    Source:
        Traub et al. 2024, arXiv 2407.01032.
    """
    _, rows, errors, rates = _blocks(confidences, correct, sample_weight)
    return float((errors * rows + rates * rows * (rows + 1) / 2).sum() / rows.sum() ** 2)


def confidence_for_accuracy(confidences: Values, correct: Values, accuracy: float) -> float | None:
    """The smallest confidence ``c`` such that the rows with confidence >= ``c`` are right at least that often.

    It held on these rows; that it holds on others is no promise, least of all under shift.

    Args:
        confidences: ``(N,)`` numbers in [0, 1] of any dtype.
        correct: ``(N,)`` booleans or 0/1, whether the prediction of that row was right.
        accuracy: The wished share of right rows, in [0, 1].
    Returns:
        One of the confidences, or None if none will do.
    Raises:
        ValueError: If there is no row, the lengths differ, or a value is out of range.
    """
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"Expected `accuracy` in [0, 1], got {accuracy}. Pass a fraction, e.g. 0.95.")
    levels, rows, wrong = _steps(confidences, correct)
    enough = np.flatnonzero((rows - wrong) / rows >= accuracy)
    return float(levels[enough[-1]]) if len(enough) else None


def smooth_ece(confidences: Values, correct: Values, sample_weight: Values | None = None) -> float:
    r"""SmoothECE: a calibration error that has no bins, and is continuous in the confidences.

    The residuals are smoothed by a Gaussian reflected at 0 and 1, as wide as the error itself:

    .. math:: smECE_\sigma = \int_0^1 \Big| \frac1N \sum_i (y_i - f_i) K_\sigma(t, f_i) \Big| dt, \qquad
        smECE = \sigma^* \text{ with } smECE_{\sigma^*} = \sigma^*

    It does not rise with :math:`\sigma`, so that there is one solution. The reflected kernel is
    :math:`1 + 2 \sum_m e^{-(\pi m \sigma)^2 / 2} \cos(\pi m t) \cos(\pi m f)`: the residuals are put on a grid of
    16,384 cells, each shared between both ends of its cell, and smoothed by their cosine transform.

    Args:
        confidences: ``(N,)`` numbers in [0, 1] of any dtype.
        correct: ``(N,)`` booleans or 0/1, whether the prediction of that row was right.
        sample_weight: ``(N,)`` weights >= 0: a row of weight 2 counts as two. None: 1 each.
    Returns:
        A fraction in [0, 1].
    Raises:
        ValueError: If there is no row, the lengths differ, or a value is out of range.
    Source:
        Błasiok and Nakkiran 2023, arXiv 2309.12785.
    """
    values, hits = checked_hits(confidences, correct)
    weights = checked_weights(sample_weight, len(values))
    residuals = (hits - values) / len(values) if weights is None else weights * (hits - values) / weights.sum()
    cells = np.minimum((values * _CELLS).astype(np.int64), _CELLS - 1)
    upper = residuals * (values * _CELLS - cells)
    mass = np.bincount(cells, residuals - upper, _CELLS + 1) + np.bincount(cells + 1, upper, _CELLS + 1)
    mass[[0, -1]] *= 2  # meets its own mirror image
    spectrum = np.fft.rfft(np.concatenate([mass, mass[-2:0:-1]]))
    exponents = -0.5 * (np.pi * np.arange(_CELLS + 1)) ** 2

    def error(sigma: float) -> float:
        return 0.5 * float(np.abs(np.fft.irfft(spectrum * np.exp(exponents * sigma**2))).sum())

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return low


def checked_hits(
    confidences: Values, correct: Values, prefix: str = ""
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """``(N,)`` confidences as float64 clipped to [0, 1], and ``(N,)`` hits as booleans.

    Arguments and errors as of `aurc`, these with a ``prefix`` of the names.
    """
    values = in_unit_interval(column(confidences, f"{prefix}confidences"), f"{prefix}confidences")
    hits = column(correct, f"{prefix}correct")
    if hits.shape != values.shape:
        raise ValueError(
            f"Expected `{prefix}correct` of shape {values.shape}, got {hits.shape}. Pass one 0/1 for each confidence."
        )
    for row in np.flatnonzero((hits != 0) & (hits != 1))[:1]:
        raise ValueError(
            f"Expected `{prefix}correct` to hold booleans or 0/1, got {hits[row]:g} in row {row}. "
            "Pass `predictions == labels`."
        )
    return values, hits == 1


def column(values: Values, name: str) -> NDArray[np.float64]:
    """``(N,)`` finite numbers of any dtype, a tensor's or an array's, as float64; N >= 1.

    Raises:
        ValueError: If they are none.
    """
    array = to_numpy(as_array(values, name))
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"Expected `{name}` as numbers of shape (N,) with N >= 1, got {array.dtype} of shape {array.shape}. "
            "Pass one number for each row."
        )
    for row in np.flatnonzero(~np.isfinite(array))[:1]:
        raise ValueError(f"Expected finite `{name}`, got {array[row]} in row {row}. Find out where the model diverged.")
    return array.astype(np.float64, copy=False)


def in_unit_interval(values: NDArray[np.float64], name: str, start: int = 0) -> NDArray[np.float64]:
    """The same, rounding outside [0, 1] clipped; ``start`` is the number of the first row.

    Raises:
        ValueError: If a value is farther outside, or not finite.
    """
    for place in np.argwhere(~((values >= -_ROUNDING) & (values <= 1 + _ROUNDING)))[:1]:  # nan, too
        where = "".join(f", column {k}" for k in place[1:])
        raise ValueError(
            f"Expected finite `{name}` in [0, 1], got {values[tuple(place)]} in row {start + place[0]}{where}. "
            "Pass probabilities; logits have to go through a softmax or a sigmoid first."
        )
    return np.clip(values, 0.0, 1.0)


def _steps(
    confidences: Values, correct: Values, sample_weight: Values | None = None
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """Distinct confidences, descending, with the number of rows and of errors at each and above it."""
    values, hits = checked_hits(confidences, correct)
    weights = checked_weights(sample_weight, len(values))
    if weights is not None:
        values, hits, weights = values[weights > 0], hits[weights > 0], weights[weights > 0]
    levels, inverse = np.unique(values, return_inverse=True)
    rows = np.bincount(inverse, weights).astype(np.float64)
    wrong = np.bincount(inverse, ~hits if weights is None else weights * ~hits)
    return levels[::-1], np.cumsum(rows[::-1]), np.cumsum(wrong[::-1])


def _blocks(
    confidences: Values, correct: Values, sample_weight: Values | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Rows of equal confidence, descending: rows before, their number, errors before, and their share of errors."""
    _, rows, wrong = _steps(confidences, correct, sample_weight)
    starts, errors = np.append(0.0, rows[:-1]), np.append(0.0, wrong[:-1])
    return starts, rows - starts, errors, (wrong - errors) / (rows - starts)
