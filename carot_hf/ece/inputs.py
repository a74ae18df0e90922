"""Options of the metric and checks of its inputs: each error says what was expected, what came and what to do.

numpy only: tensors are known by their ``detach`` method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binning import STRATEGIES, check_n_bins

MODES = ("top_label", "positive")
ROW_OPTIONS = ("mode", "from_logits", "temperature", "check_sums", "classwise", "ignore_index")
FLOATS = ("bfloat16", "float16", "float32", "float64")
_VALUE_TOLERANCE = {"float16": 2.0**-9, "bfloat16": 2.0**-6}  # 2 eps; 1e-6 for the finer ones
PROBABLE = 1e-3  # by which the sum of a row of probabilities may differ from 1
AS_LOGITS = (
    "Every row is in [0, 1] and sums to 1: these look like probabilities, but are taken for logits, of which a "
    "softmax is made. "
)
_SUM_TOLERANCE = {"float16": 5e-3, "bfloat16": 2e-2}  # 1e-3 for the finer ones


@dataclass(frozen=True)
class Options:
    """What `ECE` may be told; its docstring describes each field. Checked here, before any row is read."""

    n_bins: int = 10
    strategy: str = "uniform"
    mode: str | None = None
    from_logits: bool = False
    temperature: float | None = None
    bins: bool = False
    classwise: bool = False
    check_sums: bool = True
    n_bootstrap: int = 0
    confidence_level: float = 0.95
    seed: int = 0
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        check_n_bins(self.n_bins)
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"Expected `strategy` to be one of {STRATEGIES}, got {self.strategy!r}. Pass one of these names."
            )
        if self.mode not in (None, *MODES):
            raise ValueError(f"Expected `mode` to be None or one of {MODES}, got {self.mode!r}. Pass one of these.")
        if self.temperature is not None and not self.from_logits:
            raise ValueError(
                f"Expected no `temperature` with probabilities, got {self.temperature}. It divides logits: "
                "pass the logits and from_logits=True."
            )
        if self.temperature is not None:
            check_temperature(self.temperature)
        if isinstance(self.n_bootstrap, bool) or not isinstance(self.n_bootstrap, (int, np.integer)):
            raise ValueError(f"Expected `n_bootstrap` to be an integer, got {self.n_bootstrap!r}. Pass e.g. 1000.")
        if self.n_bootstrap < 0:
            raise ValueError(f"Expected `n_bootstrap` of at least 0, got {self.n_bootstrap}. Pass e.g. 1000.")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, (int, np.integer, type(None))):
            raise ValueError(
                f"Expected `ignore_index` to be a whole number or None, got {self.ignore_index!r}. Pass the label of "
                "the rows to leave out, e.g. -100."
            )
        if not 0.0 < self.confidence_level < 1.0:
            raise ValueError(
                f"Expected `confidence_level` between 0 and 1, got {self.confidence_level}. Pass a fraction, e.g. 0.95."
            )


def check_temperature(temperature: float) -> None:
    """Raise a ValueError if a temperature is not finite or not above 0."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"Expected a finite `temperature` above 0, got {temperature}. It divides the logits; 1.0 leaves them as is."
        )


def check_probabilities(block: NDArray[Any], start: int, name: str, check_sums: bool) -> NDArray[np.int64]:
    """Check the rows, clip rounding outside [0, 1] in place; return the first argmax."""
    cure = "This looks like logits: pass from_logits=True, or apply a softmax first."
    outside = check_range(block, name, start, cure=cure)
    if check_sums:
        sums = block.sum(axis=1, dtype=np.float64)
        tolerance = _SUM_TOLERANCE.get(name, 1e-3)
        off = np.abs(sums - 1.0) > tolerance
        if off.any():
            row = int(np.argmax(off))
            raise ValueError(
                f"Expected the probabilities of a row to sum to 1 (within {tolerance:g} for {name}), got "
                f"{sums[row]:.6g} in row {start + row}. Pass from_logits=True if these are logits, divide each row by "
                "its sum if they are weights, or pass check_sums=False to take them as they are."
            )
    top: NDArray[np.int64] = block.argmax(axis=1)
    if outside:
        np.clip(block, 0, 1, out=block)
    return top


def check_range(values: NDArray[Any], name: str, start: int, cure: str) -> bool:
    """Raise unless all values are in [0, 1] up to rounding; return whether some are outside it at all."""
    low, high = float(values.min()), float(values.max())
    tolerance = _VALUE_TOLERANCE.get(name, 1e-6)
    if low >= -tolerance and high <= 1.0 + tolerance:  # false for nan
        return low < 0.0 or high > 1.0
    check_finite(values, start)
    at = np.argwhere((values < -tolerance) | (values > 1.0 + tolerance))[0]
    raise ValueError(f"Expected `predictions` in [0, 1], got {values[tuple(at)]} in {_place(at, start)}. {cure}")


def check_finite(values: NDArray[Any], start: int) -> None:
    """Raise at the first nan or inf; ``start`` is the number of the first row."""
    for at in np.argwhere(~np.isfinite(values))[:1]:
        raise ValueError(
            f"Expected finite `predictions`, got {values[tuple(at)]} in {_place(at, start)}. "
            "Find out where the model diverged; to leave a class out, drop its column."
        )


def _place(at: NDArray[np.intp], start: int) -> str:
    return f"row {start + at[0]}" + (f", column {at[1]}" if len(at) == 2 else "")


def check_shapes(scores: Any, labels: NDArray[Any], options: Options) -> None:
    """Raise unless the shapes belong together and `options` says what they mean."""
    shape = tuple(scores.shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"Expected `predictions` of shape (N, K) or (N,), got {shape}. Flatten all but the classes.")
    if shape[0] == 0:
        raise ValueError("Expected at least one row, got 0. Pass the predictions of a non-empty set.")
    if labels.ndim == 2 and labels.shape[0] == shape[0]:
        raise ValueError(f"Expected `references` of shape ({shape[0]},), got {two_dimensional(labels, 'references')}")
    if labels.shape != shape[:1]:
        raise ValueError(
            f"Expected `references` of shape ({shape[0]},), got {labels.shape}. Pass one class index for each row."
        )
    if len(shape) == 1 and options.from_logits:
        raise ValueError(
            f"Expected logits of shape (N, K) with from_logits=True, got {shape}. "
            "For binary logits z pass the two columns 0 and z."
        )
    if len(shape) == 1 and options.mode is None:
        raise ValueError(
            f'Expected an explicit `mode` for `predictions` of shape {shape}, got None. Pass mode="top_label" for '
            'confidences with 0/1 hits, or mode="positive" for P(class 1) with 0/1 labels.'
        )
    if len(shape) == 1 and options.classwise:
        raise ValueError(f"Expected `predictions` of shape (N, K) with classwise=True, got {shape}. Pass full rows.")
    if len(shape) == 2 and options.mode == "positive":
        raise ValueError(
            f'Expected `predictions` of shape (N,) with mode="positive", got {shape}. '
            "Pass the column of class 1: `predictions[:, 1]`."
        )
    if len(shape) == 2 and shape[1] < 2:
        raise ValueError(
            f"Expected `predictions` of shape (N, K) with K >= 2, got {shape}. "
            'For P(class 1) pass `predictions[:, 0]` and mode="positive".'
        )


def two_dimensional(labels: NDArray[Any], name: str) -> str:
    """Say what labels of shape (N, M) are, and what to pass in their place."""
    if labels.shape[1] == 1:
        return (
            f"{labels.shape}. Pass the column: `{name}[:, 0]`, and `predictions[:, 0]` if they are of one column, too."
        )
    binary = labels.dtype.kind in "biuf" and bool(np.isin(labels, (0, 1)).all())
    if binary and bool((labels.sum(axis=1) == 1).all()):
        return f"one-hot rows of shape {labels.shape}. Pass class indices: `{name}.argmax(-1)`."
    if binary:
        return (
            f"rows of several or no labels (multi-label) of shape {labels.shape}. Each row is of one class here: "
            f'measure each label k by itself, with `predictions[:, k]`, `{name}[:, k]` and mode="positive".'
        )
    return f"{labels.shape}. Pass one class index for each row."


def looks_like_probabilities(rows: Any) -> bool:
    """Whether every row is in [0, 1] and sums to 1, as no logits do."""
    if float(rows.min()) < 0.0 or float(rows.max()) > 1.0:
        return False
    return float(abs(rows.sum(1) - 1.0).max()) <= PROBABLE


def checked_labels(labels: NDArray[Any], n_classes: int) -> NDArray[np.int64]:
    """Labels as int64, unless one is not an integer in ``[0, n_classes)``."""
    if labels.dtype.kind in "USO":
        raise ValueError(
            f"Expected `references` of an integer dtype, got names ({str(labels[0])!r} in row 0). Pass class indices: "
            "`[names.index(label) for label in references]`, with the names in the order of the columns of "
            "`predictions`."
        )
    if labels.dtype.kind not in "iu":
        whole = labels == np.rint(labels) if labels.dtype.kind == "f" else np.zeros(len(labels), bool)
        row = int(np.argmin(whole))
        raise ValueError(
            f"Expected `references` of an integer dtype, got {labels.dtype} ({labels[row]} in row {row}). "
            "Pass class indices, e.g. `references.astype(int)`."
        )
    outside = (labels < 0) | (labels >= n_classes)
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(
            f"Expected `references` in [0, {n_classes}), got {labels[row]} in row {row}. "
            "Leave out rows without a class, and map labels to the columns of `predictions`."
        )
    return labels.astype(np.int64, copy=False)


def as_array(values: Any, name: str) -> Any:
    """A tensor without its graph, or anything else as a numpy array of numbers or texts.

    Raises:
        ValueError: If rows have different lengths, values are masked, or there is something that is neither.
    """
    if hasattr(values, "detach"):
        return values.detach()
    if isinstance(values, np.ma.MaskedArray):
        return _unmasked(values, name)
    if isinstance(values, (list, tuple)) and any(hasattr(item, "detach") for item in values):
        values = [to_numpy(as_array(item, name)) for item in values]
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Expected `{name}` with rows of one length, got {error}. Pass an array or a list of equally long rows."
        ) from error
    if array.dtype.kind == "O":
        return _plain(array, name)
    if array.dtype.kind == "f" and array.dtype.itemsize > np.dtype(np.float64).itemsize:
        return array.astype(np.float64)  # long doubles
    return array


def _unmasked(values: Any, name: str) -> NDArray[Any]:
    mask = np.ma.getmaskarray(values)
    if mask.any():
        row = int(np.argwhere(mask)[0][0])
        raise ValueError(
            f"Expected `{name}` without masked values, got one in row {row}. Leave such rows out: take `.compressed()` "
            "of labels and the same rows of predictions, or give them a `sample_weight` of 0 and some value."
        )
    return np.asarray(values.data)


def _plain(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Numbers in Python objects as float64, or integers as int64; texts as they are."""
    items = array.ravel().tolist()
    if items and all(isinstance(item, str) for item in items):
        return array.astype(str)
    row_length = array.size // max(1, len(array))
    for place, item in enumerate(items):
        if hasattr(item, "__len__") or item is None:
            what = "nothing (None)" if item is None else f"a {type(item).__name__} of {len(item)}"
            raise ValueError(
                f"Expected `{name}` as numbers in rows of one length, got {what} in row {place // max(1, row_length)}. "
                "Pass an array or a list of equally long rows of numbers."
            )
    try:
        whole = all(isinstance(item, (int, np.integer)) for item in items)
        return array.astype(np.int64 if whole else np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"Expected `{name}` as numbers, got {error}. Convert them first.") from error


def to_numpy(values: Any) -> NDArray[Any]:
    """A numpy array, of shared memory where that is possible; bfloat16 becomes float32."""
    if hasattr(values, "detach"):
        values = values.cpu()
        values = values.float().numpy() if dtype_name(values) == "bfloat16" else values.numpy()
    array: NDArray[Any] = values.astype(np.float32) if dtype_name(values) == "bfloat16" else values
    return array


def dtype_name(values: Any) -> str:
    """``"float32"`` and so on, for numpy and torch alike."""
    return str(values.dtype).removeprefix("torch.")
