"""METRICS: one row for each metric of a set, all of them computed in one reading of its logits.

A metric of one's own is a row more, from outside as well::

    METRICS["wrong"] = Metric("wrong", "lower", lambda seen: 1.0 - seen.bins.avg_accuracy)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ece.binning import CalibrationBins, calibration_bins, check_n_bins, classwise_sums
from ..ece.inputs import check_temperature, looks_like_probabilities
from .f1 import macro_f1
from .links import Chunk, Scaled, at_scaling, check_link, chunk_of
from .rows import (
    Logits,
    check_finite,
    check_row_temperature,
    checked_shapes,
    empty_like_rows,
    kept_rows,
    row_chunks,
    warn_of_probabilities,
)
from .selective import augrc, aurc, smooth_ece

PUBLISHED_BATCH = 512  # rows of one batch where published figures are means of per-batch ECE
TOP5, NLL, CLASSWISE, BRIER = "top5", "nll", "classwise", "brier"  # sums over the rows
# "temperature" and, for a sigmoid, "bias"; then "row_temperature", ``(N,)``, may divide each row by one of its own.
Scaling = Mapping[str, Any]


@dataclass(eq=False)
class Seen:
    """What one reading of a set leaves at one temperature: from this every metric is computed.

    Attributes:
        confidences: ``(N,)`` largest probability of each row.
        correct: ``(N,)`` bool.
        predicted: ``(N,)`` int32, the likeliest class of each row; ``labels`` ``(N,)`` int32, the right one.
        n_bins: Confidence bins.
        n_classes: ``K``.
        mass: Rows, or the sum of their weights.
        weights: ``(N,)`` or None: 1 each.
        sums: By name, of those that a metric needs: ``top5``, ``nll``, ``brier`` over the rows, and ``classwise``
            ``(K, n_bins)``, as :func:`~carot_hf.ece.binning.classwise_sums` returns it.
        groups: ``(N,)`` number of the group of each row, -1: of none; ``None``: there are no groups.
    """

    confidences: NDArray[Any]
    correct: NDArray[np.bool_]
    predicted: NDArray[np.int32]
    labels: NDArray[np.int32]
    n_bins: int
    n_classes: int
    mass: float
    weights: NDArray[np.float64] | None = None
    sums: dict[str, Any] = field(default_factory=dict)
    groups: NDArray[np.int32] | None = None

    @cached_property
    def bins(self) -> CalibrationBins:
        """The table of uniform confidence bins."""
        return calibration_bins(self.confidences, self.correct, self.n_bins, sample_weight=self.weights)

    @cached_property
    def group_bins(self) -> dict[int, CalibrationBins]:
        """By the number of a group that has rows, its table of uniform confidence bins."""
        if self.groups is None:
            return {}
        parts = {int(group): self.groups == group for group in np.unique(self.groups[self.groups >= 0])}
        return {
            group: calibration_bins(self.confidences[part], self.correct[part], self.n_bins)
            for group, part in parts.items()
        }

    def metrics(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Compute metrics by name; None: all that there are of it."""
        known = METRICS | GROUP_METRICS
        wanted = [*METRICS, *(() if self.groups is None else GROUP_METRICS)] if names is None else list(names)
        return {name: known[name].compute(self) for name in wanted}


@dataclass(frozen=True)
class Metric:
    """One metric of a set.

    Attributes:
        name: As in ``eval_<set>_<name>``.
        direction: "higher" or "lower" is better; "signed": best at 0.
        compute: From what was seen of the set to a Python float, a fraction and no percent.
        needs: Sums over the rows, of those that `Seen` names.
        scaled: Reported with a fitted temperature as well, under ``<name>_ts``.
    """

    name: str
    direction: str
    compute: Callable[[Seen], float]
    needs: tuple[str, ...] = ()
    scaled: bool = False


def _adaptive(seen: Seen) -> float:
    return calibration_bins(
        seen.confidences, seen.correct, seen.n_bins, strategy="quantile", sample_weight=seen.weights
    ).ece


_ROWS = (
    Metric("accuracy", "higher", lambda seen: seen.bins.avg_accuracy),
    Metric("top5_accuracy", "higher", lambda seen: seen.sums[TOP5] / seen.mass, (TOP5,)),
    Metric("ece", "lower", lambda seen: seen.bins.ece, scaled=True),
    Metric("ece_batch_mean", "lower", lambda seen: _batch_mean_ece(seen)),
    Metric("adaptive_ece", "lower", _adaptive),
    Metric(
        "classwise_ece",
        "lower",
        lambda seen: float(np.abs(seen.sums[CLASSWISE]).sum() / (seen.mass * seen.n_classes)),
        (CLASSWISE,),
    ),
    Metric("mce", "lower", lambda seen: seen.bins.mce),
    Metric("nll", "lower", lambda seen: seen.sums[NLL] / seen.mass, (NLL,), scaled=True),
    Metric("brier", "lower", lambda seen: seen.sums[BRIER] / seen.mass, (BRIER,), scaled=True),
    Metric("auroc", "higher", lambda seen: _auroc(seen.confidences, seen.correct, seen.weights)),
    Metric("augrc", "lower", lambda seen: augrc(seen.confidences, seen.correct, seen.weights), scaled=True),
    Metric("aurc", "lower", lambda seen: aurc(seen.confidences, seen.correct, seen.weights)),
    Metric("smooth_ece", "lower", lambda seen: smooth_ece(seen.confidences, seen.correct, seen.weights)),
    Metric("overconfidence", "signed", lambda seen: seen.bins.overconfidence),
    Metric("macro_f1", "higher", lambda seen: macro_f1(seen.labels, seen.predicted, seen.n_classes, seen.weights)),
)
METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}
# Of sets whose rows are in groups (Sagawa et al. 2020): the lowest accuracy and the highest ECE that a group has by
# itself. Of a group of few rows both say little, and the worst one is likely to be one: look at how many it has.
GROUP_METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric(
            "worst_group_accuracy",
            "higher",
            lambda seen: min((bins.avg_accuracy for bins in seen.group_bins.values()), default=math.nan),
        ),
        Metric(
            "worst_group_ece",
            "lower",
            lambda seen: max((bins.ece for bins in seen.group_bins.values()), default=math.nan),
            scaled=True,
        ),
    )
}


def scaled_metrics(groups: bool = False) -> list[str]:
    """Return the metrics that are reported with a fitted temperature as well.

    Args:
        groups: Of sets whose rows are in groups.
    """
    rows = METRICS | GROUP_METRICS if groups else METRICS
    return [row.name for row in rows.values() if row.scaled]


def read_set(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    scalings: Mapping[str, tuple[Scaling, Iterable[str] | None]],
    *,
    n_bins: int = 10,
    link: str = "softmax",
    sample_weight: Tensor | NDArray[Any] | None = None,
    ignore_index: int | None = None,
    also: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None,
    groups: NDArray[Any] | None = None,
) -> tuple[dict[str, Seen], bool]:
    """Read the logits of a set once, for the metrics at several temperatures.

    Args:
        logits: See `calibration_metrics`, as are the rest.
        labels: See there.
        scalings: By a name of yours a temperature (and bias) and the metrics that are wanted there; None: all.
        n_bins: See there.
        link: See there.
        sample_weight: See there.
        ignore_index: See there.
        also: By the name of a scaling, what is shown the probabilities and labels of each chunk.
        groups: See there.
    Returns:
        What was seen at each, and whether all rows look like probabilities.
    Raises:
        ValueError: As there.
    """
    check_n_bins(n_bins)
    for scaling, _ in scalings.values():
        _check_scaling(scaling, link, len(logits), sample_weight is not None or ignore_index is not None)
    kind = check_link(link)
    of = None if groups is None else _checked_groups(groups, len(logits), sample_weight, ignore_index)
    logits, labels, weights = kept_rows(logits, labels, sample_weight, ignore_index)
    logits, labels = checked_shapes(logits, labels)
    n_rows, n_classes = logits.shape
    mass = float(n_rows) if weights is None else float(weights.sum())
    same = np.empty(n_rows, bool), np.empty(n_rows, np.int32), labels.to(torch.int32).cpu().numpy()
    correct, predicted, _ = same
    seen = {name: Seen(empty_like_rows(logits), *same, n_bins, n_classes, mass, weights, {}, of) for name in scalings}
    needs = {name: _needs(METRICS if wanted is None else wanted) for name, (_, wanted) in scalings.items()}
    probable = n_rows > 1
    for start, rows, targets in row_chunks(logits, labels):
        check_finite(rows, start)
        probable = probable and looks_like_probabilities(rows)
        at, chunk = slice(start, start + len(rows)), chunk_of(rows, targets)
        own = None if weights is None else weights[at]
        correct[at], predicted[at] = chunk.hits.cpu().numpy(), chunk.predictions.cpu().numpy()
        for name, (scaling, _) in scalings.items():
            part, scale, shift = at_scaling(chunk, scaling, at)
            if not needs[name] and name not in (also or {}):
                seen[name].confidences[at] = kind.confidence(part, scale, shift).cpu().numpy()
                continue
            scaled = kind.scale(part, scale, shift)
            seen[name].confidences[at] = scaled.confidences.cpu().numpy()
            if also and name in also:
                also[name](scaled.probabilities, targets)
            _add(seen[name].sums, needs[name], part, scaled, n_bins, own)
    return seen, probable


def _needs(names: Iterable[str]) -> set[str]:
    """Sums over the rows that metrics need."""
    known = METRICS | GROUP_METRICS
    return {need for name in names for need in known[name].needs}


def _checked_groups(groups: NDArray[Any], rows: int, sample_weight: Any, ignore_index: int | None) -> NDArray[np.int32]:
    """Groups as int32, or a ValueError."""
    if sample_weight is not None or ignore_index is not None:
        raise ValueError(
            "Expected no `sample_weight` and no `ignore_index` with `groups`, got some. Leave these rows out of all of "
            "them."
        )
    found = np.asarray(groups)
    if found.shape != (rows,) or found.dtype.kind not in "iu" or found.min(initial=0) < -1:
        raise ValueError(
            f"Expected `groups` as ({rows},) whole numbers from 0, or -1 for a row of none, got {found.dtype} of shape "
            f"{found.shape}{'' if found.size == 0 else f' from {found.min()}'}. Pass the number of each row's group."
        )
    return found.astype(np.int32)


def _check_scaling(scaling: Scaling, link: str, rows: int, weighted: bool) -> None:
    check_temperature(scaling.get("temperature", 1.0))
    check_link(link, scaling.get("bias", 0.0))
    if (own := scaling.get("row_temperature")) is not None:
        check_row_temperature(own, rows)
        if weighted:
            raise ValueError(
                "Expected no `sample_weight` and no `ignore_index` with a temperature for each row, got some. Leave "
                "these rows out of all of them."
            )


def _add(
    sums: dict[str, Any], needs: set[str], chunk: Chunk, scaled: Scaled, n_bins: int, own: NDArray[np.float64] | None
) -> None:
    """Add what is needed of a chunk; the probabilities are used up."""
    if TOP5 in needs:
        sums[TOP5] = sums.get(TOP5, 0.0) + _total(_in_top5(chunk), own)
    if NLL in needs:
        sums[NLL] = sums.get(NLL, 0.0) + _total(scaled.nll, own)
    if not {CLASSWISE, BRIER} & needs:
        return
    probabilities, label_index = scaled.probabilities.cpu().numpy(), chunk.targets.cpu().numpy()
    if CLASSWISE in needs:
        sums[CLASSWISE] = sums.get(CLASSWISE, 0.0) + classwise_sums(probabilities, label_index, n_bins, own)
    if BRIER in needs:
        probabilities[np.arange(len(label_index)), label_index] -= 1.0
        squares = np.einsum("ij,ij->i", probabilities, probabilities)
        total = float(squares.sum(dtype=np.float64)) if own is None else float(own @ squares)
        sums[BRIER] = sums.get(BRIER, 0.0) + total


def calibration_metrics(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    *,
    n_bins: int = 10,
    temperature: float = 1.0,
    bias: float = 0.0,
    link: str = "softmax",
    sample_weight: Tensor | NDArray[Any] | None = None,
    ignore_index: int | None = None,
    groups: NDArray[Any] | None = None,
) -> dict[str, float]:
    r"""Accuracy and calibration of ``softmax(logits / temperature)`` over a whole data set.

    Args:
        logits: ``(N, K)`` float, before the softmax. Not probabilities. A tensor, an array, or `LogitRows`.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        n_bins: Number of confidence bins of every ECE here.
        temperature: Divides the logits; > 0.
        bias: Is added to the divided logits; with the sigmoid only, for a softmax does not see it.
        link: From logits to probabilities: ``"softmax"``, or ``"sigmoid"`` of each logit (SigLIP).
        sample_weight: ``(N,)`` weights >= 0, by which every mean is taken: a row of weight 2 counts as two, one of
            weight 0 is left out. None: 1 each.
        ignore_index: Label of rows that are left out.
        groups: ``(N,)`` number of the group of each row, -1: of none. None: there are no groups.

    Returns:
        Python floats: fractions, never percent.

        - ``accuracy``; ``top5_accuracy`` (of the first min(5, K) classes). Equal logits rank by class index.
        - ``ece``, ``mce``: expected and maximum calibration error of the confidence, uniform bins.
        - ``ece_batch_mean``: mean of the ECE of consecutive batches of 512 rows, each weighted by its rows (so a
          last, partial batch counts less). Biased upward and dependent on the order of the rows; it is what the
          published CaRot and TRACER tables hold.
        - ``adaptive_ece``: ECE with bins of equal mass. ``classwise_ece``: mean over the classes of the ECE of
          :math:`p_k` as a forecast of class k.
        - ``nll``: mean of :math:`-\ln p_y`; with the sigmoid of the sum over the classes of
          :math:`-\ln p_k` for the label and :math:`-\ln(1 - p_k)` for the others. ``brier``: mean of
          :math:`\sum_k (p_k - 1[y = k])^2`, in [0, 2], or up to K with the sigmoid.
        - ``auroc``: chance that a right row has a higher confidence than a wrong one, ties counted half; nan when
          all rows are right or all are wrong, for then there is no such pair.
        - ``augrc``, ``aurc``: how many errors are among the most confident rows, and ``smooth_ece``, an ECE without
          bins; see :func:`~carot_hf.augrc`, :func:`~carot_hf.aurc`, :func:`~carot_hf.smooth_ece`.
        - ``overconfidence``: mean confidence - accuracy, signed.
        - ``macro_f1``: mean over the classes that have rows of their F1 score.
        - ``worst_group_accuracy``, ``worst_group_ece``, with ``groups``: lowest accuracy and highest ECE of a group
          that has rows, of its rows alone.

    Raises:
        ValueError: If a shape or range above does not hold, or a logit is not finite.

    Source:
        Guo et al. 2017 (ECE, MCE, NLL); Kull et al. 2019 (class-wise ECE); Nixon et al. 2019 (adaptive ECE).
    """
    scaling = {"temperature": temperature, "bias": bias}
    options: dict[str, Any] = {"sample_weight": sample_weight, "ignore_index": ignore_index, "groups": groups}
    seen, probable = read_set(logits, labels, {"": (scaling, None)}, n_bins=n_bins, link=link, **options)
    if probable:
        warn_of_probabilities(2)
    return seen[""].metrics()


def top_label(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    temperature: float = 1.0,
    *,
    bias: float = 0.0,
    link: str = "softmax",
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Confidence and hit of each row, ready for `carot_hf.ece.binning.calibration_bins`.

    Args:
        logits: ``(N, K)`` float, before the softmax.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        temperature: Divides the logits; > 0.
        bias: Is added to the divided logits; with the sigmoid only.
        link: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        ``(N,)`` largest probability of ``logits / temperature + bias``, float64 for float64 logits and else float32,
        and ``(N,)`` bool, whether the argmax of the logits as given (first index among equals) is the label.

    Raises:
        ValueError: If a shape or range above does not hold, or a logit is not finite.
    """
    check_link(link, bias)
    seen, _ = read_set(logits, labels, {"": ({"temperature": temperature, "bias": bias}, ())}, link=link)
    return seen[""].confidences, seen[""].correct


def _in_top5(chunk: Chunk) -> Tensor:
    """``(n,)`` whether the label is among the first five classes by logit, equal logits in the order of the classes."""
    rows, targets, hits = chunk.rows, chunk.targets, chunk.hits
    label_logits = rows.gather(1, targets[:, None])
    larger = (rows > label_logits).sum(dim=1)
    near = (~hits & (larger < 5)).nonzero()[:, 0]  # only here can equal logits matter
    earlier = torch.arange(rows.shape[1], device=rows.device) < targets[near, None]
    equal = ((rows[near] == label_logits[near]) & earlier).sum(dim=1)
    found = hits.clone()
    found[near] = larger[near] + equal < 5
    return found


def _total(values: Tensor, weights: NDArray[np.float64] | None) -> float:
    """Sum by weight, in float64."""
    if weights is None:
        return float(values.sum())
    return float(values.double() @ torch.from_numpy(weights).to(values.device))


def _batch_mean_ece(seen: Seen) -> float:
    """Mean of the ECE of consecutive batches of 512 rows, by the weight of each."""
    confidences, correct, weights, total = seen.confidences, seen.correct, seen.weights, 0.0
    for start in range(0, len(confidences), PUBLISHED_BATCH):
        batch = slice(start, start + PUBLISHED_BATCH)
        own = None if weights is None else weights[batch]
        bins = calibration_bins(confidences[batch], correct[batch], seen.n_bins, sample_weight=own)
        total += bins.ece * float(bins.n if own is None else own.sum())
    return total / float(len(confidences) if weights is None else weights.sum())


def _auroc(confidences: NDArray[Any], correct: NDArray[np.bool_], weights: NDArray[np.float64] | None = None) -> float:
    """Mann-Whitney statistic over pairs of a right and a wrong row."""
    right, wrong = confidences[correct], np.sort(confidences[~correct])
    if len(right) == 0 or len(wrong) == 0:
        return math.nan
    if weights is not None:
        order = np.argsort(confidences[~correct], kind="stable")
        reached = np.concatenate([[0.0], np.cumsum(weights[~correct][order])])
        sides = [reached[np.searchsorted(wrong, right, side=side)] for side in ("left", "right")]  # type: ignore[arg-type]
        return float(weights[correct] @ (sides[0] + sides[1]) / (2 * weights[correct].sum() * reached[-1]))
    below = np.searchsorted(wrong, right, side="left").sum() + np.searchsorted(wrong, right, side="right").sum()
    return float(below / (2 * len(right) * len(wrong)))
