"""Sets of a suite measured: each set's logits read once, by one process, for every temperature that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..basics.processes import place, said_by_all
from ..calibration.conformal import ConformalSets
from ..calibration.conformal_logits import Coverage
from ..calibration.density import DensityCalibrator
from ..calibration.metrics import Scaling, read_set, scaled_metrics
from ..calibration.rows import Logits
from ..data.suite import ShiftSuite
from ..ece.binning import CalibrationBins
from .evaluation import Evaluation, Metrics, Reported, flat_names, with_aggregates
from .intervals import intervals_of
from .per_image import PerImage

_KEPT = ("_pts", "_dts", "_coverage", "_size")


@dataclass
class Measured:
    """What was measured of one set.

    Attributes:
        metrics: As the logits are, with ``<metric>_<ending>`` at each scaling.
        bins: As the logits are.
        per_image: What is said of each row, as the logits are and at each scaling.
        scaled_bins: By the ending of a scaling.
        plain: With the temperature taken out that is in the weights.
        plain_bins: So, too.
        intervals: Of "accuracy" and "ece", and of ``ece_<ending>`` and "plain", where asked for.
    """

    metrics: Metrics
    bins: CalibrationBins
    per_image: PerImage
    scaled_bins: dict[str, CalibrationBins] = field(default_factory=dict)
    plain: Metrics | None = None
    plain_bins: CalibrationBins | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def measure(
    logits: Logits,
    labels: Tensor,
    *,
    n_bins: int,
    link: str,
    scalings: Mapping[str, Callable[[], Scaling]] | None = None,
    inverse: Scaling | None = None,
    n_bootstrap: int = 0,
    sets: Mapping[str, ConformalSets] | None = None,
    groups: NDArray[np.int32] | None = None,
) -> Measured:
    """Measure one set in one reading.

    Args:
        logits: Of the set.
        labels: ``(n,)`` int64.
        n_bins: Confidence bins.
        link: "softmax" or "sigmoid".
        scalings: By ending ("ts", ...), what makes a temperature (and bias, and temperatures of the rows) that was
            fitted on held-out data; adds ``<metric>_<ending>`` and ``scaled_bins``.
        inverse: What takes a temperature out that is in the weights; adds ``plain``.
        n_bootstrap: Draws of the intervals; 0: none.
        sets: Conformal sets by score, of the probabilities at the last scaling; adds ``<score>_coverage`` and
            ``<score>_size``.
        groups: ``(n,)`` group of each row; adds what :data:`~carot_hf.calibration.metrics.GROUP_METRICS` say.
    """
    wanted: dict[str, tuple[Scaling, list[str] | None]] = {"": ({}, None)}
    made = {ending: make() for ending, make in (scalings or {}).items()}
    wanted |= {ending: (scaling, scaled_metrics(groups is not None)) for ending, scaling in made.items()}
    if inverse is not None:
        wanted["plain"] = inverse, None
    coverage = Coverage(sets or {})
    also = {(list(made) or [""])[-1]: coverage.add} if sets else {}
    seen, _ = read_set(logits, labels, wanted, n_bins=n_bins, link=link, also=also, groups=groups)
    found = {name: seen[name].metrics(names) for name, (_, names) in wanted.items()}
    confidences = {ending: seen[ending].confidences for ending in ("", *made)}
    measured = Measured(found[""], seen[""].bins, PerImage(confidences, seen[""].predicted, seen[""].labels))
    for ending in made:
        measured.scaled_bins[ending] = seen[ending].bins
        measured.metrics |= {f"{name}_{ending}": value for name, value in found[ending].items()}
    if inverse is not None:
        measured.plain, measured.plain_bins = found["plain"], seen["plain"].bins
    if n_bootstrap:
        measured.intervals = intervals_of(seen[""], n_bootstrap)
        measured.intervals |= {f"ece_{end}": intervals_of(seen[end], n_bootstrap)["ece"] for end in wanted if end}
    measured.metrics |= coverage.metrics()
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


def given_scalings(calibrator: Any, own: DensityCalibrator | None = None) -> dict[str, Any]:
    """What somebody passed as a calibrator, by ending; ``None``: the one in the model, if there is one."""
    calibrator = own if calibrator is None else calibrator
    if calibrator is None:
        return {}
    if isinstance(calibrator, DensityCalibrator):
        return {"dts": calibrator}
    return {"ts": dict(calibrator) if isinstance(calibrator, Mapping) else {"temperature": float(calibrator)}}


def scaling_of(item: Any, home: Mapping[str, float] | None, embeds: Tensor, link: str) -> Mapping[str, Any]:
    """What a set's logits are divided by: a temperature and a bias, or with a density one for each row."""
    if not isinstance(item, DensityCalibrator):
        found: Mapping[str, Any] = item
        return found
    if item.link != link:
        raise ValueError(f"Expected a calibrator of the {link}, got one of the {item.link}. It is another model's.")
    return {**(home or {}), "row_temperature": item.temperature(embeds)}


def evaluation_of(
    found: Mapping[str, Measured],
    suite: ShiftSuite,
    scaling: Mapping[str, float],
    marks: Mapping[str, str] | None = None,
    **further: Any,
) -> Evaluation:
    """Put together what was measured of sets of a suite; arguments as the fields of `Evaluation` of these names."""
    marks = marks or {}
    return Evaluation(
        metrics=with_aggregates({name: part.metrics for name, part in found.items()}, suite, marks),
        bins={name: part.bins for name, part in found.items()},
        bins_ts=_bins_at("ts", found),
        bins_pts=_bins_at("pts", found),
        bins_dts=_bins_at("dts", found),
        scaling=scaling,
        sizes={name: part.bins.n for name, part in found.items()},
        intervals=_intervals_by_set(found),
        rows={name: part.per_image.at("") for name, part in found.items()},
        marks=marks,
        **further,
    )


def compared(
    model: Any,
    found: Mapping[str, Measured],
    record: Mapping[str, Any] | None,
    scalings: Mapping[str, Any],
    suite: ShiftSuite,
    marks: Mapping[str, str],
) -> Reported:
    """Put the metrics without a temperature beside those with it; ``record``: of one that is in the weights already."""
    metrics: dict[str, Any] = {name: part.metrics for name, part in found.items()}
    bins: dict[str, Any] = {name: part.bins for name, part in found.items()}
    bins_ts = _bins_at("ts", found)
    temperature = (scalings.get("ts") or {}).get("temperature")
    intervals = _intervals_by_set(found)
    if record is not None:
        temperature = float(record["temperature"])
        bins_ts = {name: table for name, table in bins.items() if name != "validation"}
        bins = {name: part.plain_bins for name, part in found.items()}
        scaled = scaled_metrics(groups=True)
        metrics = {
            name: {
                **(part.plain or {}),
                **{f"{key}_ts": part.metrics[key] for key in scaled if key in part.metrics and name in bins_ts},
                **{key: value for key, value in part.metrics.items() if key.endswith(_KEPT)},
            }
            for name, part in found.items()
        }
        intervals = {
            name: {**own, "ece": own["ece_plain"], **({"ece_ts": own["ece"]} if name in bins_ts else {})}
            for name, own in intervals.items()
        }
    named = with_aggregates(metrics, suite, marks)
    flat = {name.removeprefix("_"): value for name, value in flat_names(named, "").items()}
    return Reported(model, flat, temperature, bins, bins_ts, intervals, marks)


def _bins_at(ending: str, found: Mapping[str, Measured]) -> dict[str, CalibrationBins]:
    """Bin tables by set at a scaling."""
    return {name: part.scaled_bins[ending] for name, part in found.items() if ending in part.scaled_bins}


def _intervals_by_set(found: Mapping[str, Measured]) -> dict[str, dict[str, tuple[float, float]]]:
    """The 95 % intervals by set and metric."""
    return {name: part.intervals for name, part in found.items() if part.intervals}
