"""From embeddings of images to the metrics of a suite: pure functions between suites and calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..basics.escape import printable
from ..calibration.metrics import calibration_metrics, top_label
from ..calibration.names import SCALED
from ..calibration.rows import LogitRows
from ..calibration.sigmoid import fit_sigmoid
from ..calibration.temperature import fit_temperature
from ..data.suite import ShiftSet, ShiftSuite
from ..ece.binning import CalibrationBins, calibration_bins

Metrics = dict[str, float]
Head = tuple[Tensor, Tensor]  # weight (K, D) and bias (K,) of the training classes
Scaling = dict[str, float]  # "temperature" and, for the sigmoid, "bias"
BOUNDS = {"softmax": (0.5, 10.0), "sigmoid": (0.05, 20.0)}  # of the temperature


@dataclass(frozen=True)
class Comparison:
    """One model on all sets of a suite, without and with a temperature: what a card reports.

    Attributes:
        model: That was measured; ``None``: none was yet.
        metrics: ``<set>_<metric>`` without any temperature; ``<set>_ece_ts`` and ``<set>_nll_ts`` with it.
        temperature: The one fitted by the evaluation, or the one that was in the weights already.
        bins: Tables by set, without temperature.
        bins_ts: Tables by set with it; the split it was fitted on has none.
    """

    model: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    temperature: float | None = None
    bins: Mapping[str, CalibrationBins] = field(default_factory=dict)
    bins_ts: Mapping[str, CalibrationBins] = field(default_factory=dict)


class SetLogits(LogitRows):
    """The logits of a set's labels, from embeddings and a head: ``data.select(embeds @ weight.T + bias)``.

    Args:
        embeds: ``(N, D)`` float32, image embeddings of length 1.
        head: Weight ``(K, D)`` and bias ``(K,)`` of the training classes, float32.
        data: The set; its columns say which training classes stand for a label.
    """

    def __init__(self, embeds: Tensor, head: Head, data: ShiftSet) -> None:
        self._embeds, self._head, self._data = embeds, head, data
        self.shape = len(embeds), data.num_labels
        self.dtype, self.device = embeds.dtype, embeds.device

    def __getitem__(self, rows: slice) -> Tensor:
        return self._data.select(F.linear(self._embeds[rows], *self._head))


def scaling_bounds(bounds: Sequence[float] | None, link: str) -> tuple[float, float]:
    """Lowest and highest temperature to look for; ``None``: those that are usual for the link."""
    low, high = BOUNDS[link] if bounds is None else bounds
    return float(low), float(high)


def fit_scaling(
    logits: Tensor | LogitRows,
    labels: Tensor,
    *,
    link: str,
    criterion: str,
    bounds: Sequence[float] | None = None,
    warn: bool = True,
) -> Scaling:
    """Fit what calibrates the logits of a held-out set: a temperature and, for the sigmoid, a bias.

    Args:
        logits: ``(n, K)`` float, before the link.
        labels: ``(n,)`` int64.
        link: "softmax" or "sigmoid".
        criterion: "nll", or with the softmax "ece".
        bounds: Lowest and highest temperature; ``None``: see `scaling_bounds`.
        warn: Log a warning if the temperature is at one of them.
    Raises:
        ValueError: If the link is the sigmoid and the criterion not "nll".
    """
    between = scaling_bounds(bounds, link)
    if link == "softmax":
        return {"temperature": fit_temperature(logits, labels, criterion=criterion, bounds=between, warn=warn)}
    if criterion != "nll":
        raise ValueError(
            f"Expected `calibration_criterion` 'nll' for a model with SigLIP's sigmoid, got {criterion!r}. Scale and "
            "bias are fitted together, by their likelihood."
        )
    temperature, bias = fit_sigmoid(logits, labels, bounds=between, warn=warn)
    return {"temperature": temperature, "bias": bias}


def label_bins(
    logits: Tensor | LogitRows, labels: Tensor, *, n_bins: int, link: str = "softmax", scaling: Scaling | None = None
) -> CalibrationBins:
    """Put the top-label confidences of ``(n, K)`` logits, scaled, into ``n_bins`` bins of equal width."""
    return calibration_bins(*top_label(logits, labels, link=link, **(scaling or {})), n_bins=n_bins)


def set_metrics(
    logits: Tensor | LogitRows, labels: Tensor, *, n_bins: int, link: str = "softmax", scaling: Scaling | None = None
) -> Metrics:
    """Compute the metrics of one set.

    Args:
        logits: ``(n, K)`` float32, before the link.
        labels: ``(n,)`` int64.
        n_bins: Confidence bins.
        link: "softmax" or "sigmoid".
        scaling: Fitted on held-out data by `fit_scaling`; adds ``ece_ts`` and ``nll_ts``, measured with it.
    """
    metrics = calibration_metrics(logits, labels, n_bins=n_bins, link=link)
    if scaling is not None:
        divided: Any = scaling
        scaled = calibration_metrics(logits, labels, n_bins=n_bins, link=link, **divided)
        metrics.update({f"{name}_ts": scaled[name] for name in SCALED})
    return metrics


def with_aggregates(metrics: Mapping[str, Metrics], suite: ShiftSuite) -> dict[str, Metrics]:
    """Add ``id`` (the test set) and ``ood`` (unweighted mean over the shifted sets) to metrics by set.

    ``ood`` needs every shifted set of the suite: a mean over some of them is no substitute.
    """
    result = dict(metrics)
    if suite.test.name in metrics:
        result["id"] = dict(metrics[suite.test.name])
    if suite.shifts and all(name in metrics for name in suite.shifts):
        shifted = [metrics[name] for name in suite.shifts]
        common = [key for key in shifted[0] if all(_is_number(values.get(key)) for values in shifted)]
        result["ood"] = {key: float(np.mean([values[key] for values in shifted])) for key in common}
    return result


def flat_names(metrics: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    """Turn metrics by set into one dict of ``<prefix>_<set>_<metric>``."""
    return {f"{prefix}_{name}_{key}": value for name, values in metrics.items() for key, value in values.items()}


def comparison_table(rows: Mapping[str, Mapping[str, float]], columns: Iterable[tuple[str, str]]) -> str:
    """Lay metrics out as a Markdown table.

    Args:
        rows: Metrics by name, by row title.
        columns: Pairs of column title and metric name.
    """
    columns = list(columns)
    cells = [["", *(title for title, _ in columns)]]
    for title, values in rows.items():
        cells.append(
            [
                printable(title).replace("|", "\\|"),
                *(f"{values[key]:.3f}" if key in values else "" for _, key in columns),
            ]
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
