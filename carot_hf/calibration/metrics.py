"""Accuracy and calibration of the logits of a whole data set."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..ece.binning import calibration_bins, check_n_bins, classwise_sums
from .rows import (
    LOWEST_EXPONENT,
    Logits,
    check_link,
    checked_rows,
    empty_like_rows,
    kept_rows,
    row_chunks,
    shift_rows,
)

PUBLISHED_BATCH = 512  # rows of one batch where published figures are means of per-batch ECE


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
        - ``overconfidence``: mean confidence - accuracy, signed.

    Raises:
        ValueError: If a shape or range above does not hold, or a logit is not finite.

    Source:
        Guo et al. 2017 (ECE, MCE, NLL); Kull et al. 2019 (class-wise ECE); Nixon et al. 2019 (adaptive ECE).
    """
    check_n_bins(n_bins)
    check_link(link, bias)
    logits, labels, weights = kept_rows(logits, labels, sample_weight, ignore_index)
    logits, labels = checked_rows(logits, labels, temperature, warn=True)
    n_rows, n_classes = logits.shape
    mass = float(n_rows) if weights is None else float(weights.sum())
    confidences, correct = empty_like_rows(logits), np.empty(n_rows, dtype=bool)
    nll = brier = top5 = 0.0
    class_sums = np.zeros((n_classes, n_bins))
    for start, rows, targets in row_chunks(logits, labels):
        at = slice(start, start + len(rows))
        own_weights = None if weights is None else weights[at]
        shifted, margins, hits = shift_rows(rows, targets)
        top5 += _total(_in_top5(rows, targets, hits), own_weights)
        if link == "softmax":
            exponentials = shifted.div_(temperature).clamp_(min=LOWEST_EXPONENT).exp_()
            totals = exponentials.sum(dim=1)
            nll += _total(totals.double().log() - margins.double() / temperature, own_weights)
            probabilities = exponentials.div_(totals[:, None]).cpu().numpy()
            confidences[at] = totals.reciprocal().cpu().numpy()
        else:
            scaled = rows / temperature + bias
            own = scaled.gather(1, targets[:, None])[:, 0]
            nll += _total(F.softplus(scaled).sum(dim=1, dtype=torch.float64) - own.double(), own_weights)
            confidences[at] = scaled.amax(dim=1).sigmoid().cpu().numpy()
            probabilities = scaled.sigmoid_().cpu().numpy()
        correct[at] = hits.cpu().numpy()
        label_index = targets.cpu().numpy()
        class_sums += classwise_sums(probabilities, label_index, n_bins, own_weights)
        probabilities[np.arange(len(label_index)), label_index] -= 1.0
        squares = np.einsum("ij,ij->i", probabilities, probabilities)
        brier += float(squares.sum(dtype=np.float64)) if own_weights is None else float(own_weights @ squares)
    bins = calibration_bins(confidences, correct, n_bins, sample_weight=weights)
    adaptive = calibration_bins(confidences, correct, n_bins, strategy="quantile", sample_weight=weights)
    return {
        "accuracy": bins.avg_accuracy,
        "top5_accuracy": top5 / mass,
        "ece": bins.ece,
        "ece_batch_mean": _batch_mean_ece(confidences, correct, n_bins, weights),
        "adaptive_ece": adaptive.ece,
        "classwise_ece": float(np.abs(class_sums).sum() / (mass * n_classes)),
        "mce": bins.mce,
        "nll": nll / mass,
        "brier": brier / mass,
        "auroc": _auroc(confidences, correct, weights),
        "overconfidence": bins.overconfidence,
    }


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
    logits, labels = checked_rows(logits, labels, temperature)
    confidences, correct = empty_like_rows(logits), np.empty(len(logits), dtype=bool)
    for start, rows, targets in row_chunks(logits, labels):
        at = slice(start, start + len(rows))
        shifted, _, hits = shift_rows(rows, targets)
        if link == "softmax":
            largest = shifted.div_(temperature).clamp_(min=LOWEST_EXPONENT).exp_().sum(dim=1).reciprocal()
        else:
            largest = (rows.amax(dim=1) / temperature + bias).sigmoid()
        confidences[at], correct[at] = largest.cpu().numpy(), hits.cpu().numpy()
    return confidences, correct


def _in_top5(rows: Tensor, targets: Tensor, hits: Tensor) -> Tensor:
    """``(n,)`` whether the label is among the first five classes by logit, equal logits in the order of the classes."""
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


def _batch_mean_ece(
    confidences: NDArray[Any], correct: NDArray[np.bool_], n_bins: int, weights: NDArray[np.float64] | None = None
) -> float:
    """Mean of the ECE of consecutive batches of 512 rows, by the weight of each."""
    total = 0.0
    for start in range(0, len(confidences), PUBLISHED_BATCH):
        batch = slice(start, start + PUBLISHED_BATCH)
        own = None if weights is None else weights[batch]
        bins = calibration_bins(confidences[batch], correct[batch], n_bins, sample_weight=own)
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
