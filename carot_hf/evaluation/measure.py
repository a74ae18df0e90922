"""Sets of a suite measured: each set's logits read once, by one process, for every temperature that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..basics.processes import place, said_by_all
from ..calibration.metrics import Scaling, Seen, read_set, scaled_metrics
from ..calibration.rows import Logits
from ..ece.binning import CalibrationBins
from .intervals import intervals_of

Metrics = dict[str, float]


@dataclass
class Measured:
    """What was measured of one set.

    Attributes:
        metrics: As the logits are, with ``<metric>_ts`` at the fitted temperature.
        bins: As the logits are.
        bins_ts: At the fitted temperature.
        plain: With the temperature taken out that is in the weights.
        plain_bins: So, too.
        intervals: By metric, where asked for.
    """

    metrics: Metrics
    bins: CalibrationBins
    bins_ts: CalibrationBins | None = None
    plain: Metrics | None = None
    plain_bins: CalibrationBins | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def measure(
    logits: Logits,
    labels: Tensor,
    *,
    n_bins: int,
    link: str,
    scaling: Scaling | None = None,
    inverse: Scaling | None = None,
    n_bootstrap: int = 0,
) -> Measured:
    """Measure one set in one reading.

    Args:
        logits: Of the set.
        labels: ``(n,)`` int64.
        n_bins: Confidence bins.
        link: "softmax" or "sigmoid".
        scaling: Temperature (and bias) that was fitted on held-out data; adds ``<metric>_ts`` and ``bins_ts``.
        inverse: What takes a temperature out that is in the weights; adds ``plain``.
        n_bootstrap: Resamples of the intervals; 0: none.
    """
    wanted: dict[str, tuple[Scaling, list[str] | None]] = {"": ({}, None)}
    if scaling is not None:
        wanted["ts"] = scaling, scaled_metrics()
    if inverse is not None:
        wanted["plain"] = inverse, None
    seen, _ = read_set(logits, labels, wanted, n_bins=n_bins, link=link)
    found = {name: _found(seen[name], names) for name, (_, names) in wanted.items()}
    metrics, bins = found[""]
    measured = Measured(dict(metrics), bins)
    if scaling is not None:
        scaled, measured.bins_ts = found["ts"]
        measured.metrics |= {f"{name}_ts": value for name, value in scaled.items()}
    if inverse is not None:
        measured.plain, measured.plain_bins = found["plain"]
    if n_bootstrap:
        measured.intervals = intervals_of(seen[""], n_bootstrap)
    return measured


def measure_all(
    sets: Mapping[str, tuple[Logits, Tensor]], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Measured]:
    """Measure sets, shared out among the processes; each gets all results.

    Args:
        sets: Logits and labels by name, the same in all processes.
        options: By name, the keywords of `measure`.
    Raises:
        ValueError: In all processes, if one of them raises it.
    """
    rank, world = place()
    own: dict[str, Measured | ValueError] = {}
    for name in list(sets)[rank::world]:
        try:
            own[name] = measure(*sets[name], **options[name])
        except ValueError as error:  # the others wait for an answer
            own[name] = error
    every: dict[str, Any] = {name: found for part in said_by_all(own) for name, found in part.items()}
    for found in every.values():
        if isinstance(found, ValueError):
            raise found
    return {name: every[name] for name in sets}


def _found(seen: Seen, names: list[str] | None) -> tuple[Metrics, CalibrationBins]:
    return seen.metrics(names), seen.bins
