"""Evaluation: what one evaluation of a model on sets of a suite found. Numbers and tables; knows no model."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..basics.escape import printable, table, with_interval
from ..calibration.selective import confidence_for_accuracy
from ..data.suite import ShiftSuite
from ..ece.binning import CalibrationBins
from .per_image import PerImage

Metrics = dict[str, float]
Intervals = Mapping[str, tuple[float, float]]
Rows = tuple[NDArray[Any], NDArray[np.bool_]]  # (n,) confidences and (n,) hits
COLUMNS = (
    ("accuracy", "accuracy"),
    ("ECE", "ece"),
    ("ECE after T", "ece_ts"),
    ("perturbed T", "ece_pts"),
    ("density T", "ece_dts"),
)


@dataclass(frozen=True)
class Reported:
    """One model on all sets of a suite, without and with a temperature: what a card reports.

    Attributes:
        model: That was measured; ``None``: none was yet.
        metrics: ``<set>_<metric>`` without any temperature; ``<set>_ece_ts`` and ``<set>_nll_ts`` with it.
        temperature: The one fitted by the evaluation, or the one that was in the weights already.
        bins: Tables by set, without temperature.
        bins_ts: Tables by set with it; the split it was fitted on has none.
        intervals: By set 95 % intervals of "accuracy", "ece" and ``ece_<ending>``.
        marks: Sets that are no evidence, and why.
    """

    model: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    temperature: float | None = None
    bins: Mapping[str, CalibrationBins] = field(default_factory=dict)
    bins_ts: Mapping[str, CalibrationBins] = field(default_factory=dict)
    intervals: Mapping[str, Intervals] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        metrics: By set the metrics of :data:`~carot_hf.calibration.metrics.METRICS`, with a temperature also
            ``<metric>_ts``; ``id`` is the test set, ``ood`` the unweighted mean over the shifted sets.
        bins: Bin tables by set.
        bins_ts: Those with the temperature; the split that it was fitted on has none.
        bins_pts: Those with the one that has seen perturbed copies, too, where that was asked for.
        bins_dts: Those with a temperature for each image, where that was asked for.
        rows: By set confidence and hit of each image, as the logits are; for :func:`~carot_hf.compare`.
        scaling: What was fitted on the validation split or given: "temperature" and, for SigLIP, "bias"; empty: none.
        sizes: Rows by set.
        comparison: The same without any temperature beside it with one, also where one is in the weights.
        intervals: By set and metric ("accuracy", "ece", ``ece_<ending>``) lowest and highest value of a 95 % interval.
        marks: Sets that are no evidence for a calibration that has seen their like, and why; they stay out of ``ood``.
        per_image: By set what is said of each image, at each scaling, too, and what tells these images from others.
    """

    metrics: Mapping[str, Metrics]
    bins: Mapping[str, CalibrationBins]
    bins_ts: Mapping[str, CalibrationBins]
    scaling: Mapping[str, float]
    sizes: Mapping[str, int]
    comparison: Reported = field(default_factory=Reported)
    intervals: Mapping[str, Intervals] = field(default_factory=dict)
    bins_pts: Mapping[str, CalibrationBins] = field(default_factory=dict)
    bins_dts: Mapping[str, CalibrationBins] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)
    per_image: Mapping[str, PerImage] = field(default_factory=dict)

    def flat(self, prefix: str = "eval") -> dict[str, float]:
        """Return one dict of ``<prefix>_<set>_<metric>``, with ``<prefix>_temperature``."""
        return {
            **flat_names(self.metrics, prefix),
            **{f"{prefix}_{name}": value for name, value in self.scaling.items()},
        }

    def table(self, columns: Iterable[tuple[str, str]] = COLUMNS) -> str:
        """Return a Markdown table with a row for each set, with the 95 % intervals that there are.

        Args:
            columns: Pairs of title and metric.
        """
        titles = {name: f"{name} ({self.marks[name]})" if name in self.marks else name for name in self.metrics}
        intervals = {titles[name]: own for name, own in self.intervals.items() if name in titles}
        return comparison_table({titles[name]: own for name, own in self.metrics.items()}, columns, intervals)

    def confidence_for_accuracy(self, accuracy: float, name: str = "validation") -> float | None:
        """The confidence from which on the rows of a set are right that often, as the logits are.

        Args:
            accuracy: The wished share of right rows.
            name: Of the set; what held there is no promise elsewhere.
        Returns:
            ``None`` if there is no such confidence; see :func:`~carot_hf.confidence_for_accuracy`.
        Raises:
            KeyError: If the set was not measured.
        """
        return confidence_for_accuracy(*self.rows[name], accuracy)

    def to_json(self) -> str:
        """Return all of it but the comparison and the images as JSON; nan, e.g. an AUROC without errors, as null."""
        content = {
            "metrics": self.metrics,
            "scaling": self.scaling,
            "sizes": self.sizes,
            **{
                kind: {name: table.to_dict() for name, table in getattr(self, kind).items()}
                for kind in ("bins", "bins_ts", "bins_pts", "bins_dts")
            },
            "intervals": self.intervals,
            "marks": self.marks,
        }
        return json.dumps(_without_nan(content), indent=2, allow_nan=False)


def with_aggregates(
    metrics: Mapping[str, Metrics], suite: ShiftSuite, left_out: Collection[str] = ()
) -> dict[str, Metrics]:
    """Add ``id`` (the test set) and ``ood`` (unweighted mean over the shifted sets) to metrics by set.

    ``ood`` needs every shifted set of the suite: a mean over some of them is no substitute. Sets that are no evidence
    (``left_out``) stay out of the mean; where all are such there is none.
    """
    shifts = [name for name in suite.shifts if name not in left_out]
    result = dict(metrics)
    if suite.test.name in metrics:
        result["id"] = dict(metrics[suite.test.name])
    if shifts and all(name in metrics for name in suite.shifts):
        shifted = [metrics[name] for name in shifts]
        common = [key for key in shifted[0] if all(_is_number(values.get(key)) for values in shifted)]
        result["ood"] = {key: float(np.mean([values[key] for values in shifted])) for key in common}
    return result


def flat_names(metrics: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    """Turn metrics by set into one dict of ``<prefix>_<set>_<metric>``."""
    return {f"{prefix}_{name}_{key}": value for name, values in metrics.items() for key, value in values.items()}


def comparison_table(
    rows: Mapping[str, Mapping[str, float]],
    columns: Iterable[tuple[str, str]],
    intervals: Mapping[str, Intervals] | None = None,
) -> str:
    """Lay metrics out as a Markdown table.

    Args:
        rows: Metrics by name, by row title.
        columns: Pairs of column title and metric name; those that no row has are left out.
        intervals: By row title and metric, put behind the number.
    """
    columns = [pair for pair in columns if any(pair[1] in values for values in rows.values())]
    cells = [["", *(title for title, _ in columns)]]
    for title, values in rows.items():
        own = (intervals or {}).get(title, {})
        numbers = [f"{values[key]:.3f}{with_interval(own.get(key))}" if key in values else "" for _, key in columns]
        cells.append([printable(title).replace("|", "\\|"), *numbers])
    return table(cells)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
