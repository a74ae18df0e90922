"""Conformal sets of logits that are read in chunks: fitted at a temperature, and what they hold elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .conformal import SCORE_NAMES, ConformalSets, check_score, label_scores, sets_of_scores
from .links import at_scaling, check_link, chunk_of
from .record import calibration_record, kept_sets
from .rows import Logits, checked_shapes, row_chunks


def fit_sets(
    logits: Logits, labels: Tensor, scaling: Mapping[str, Any], *, link: str, alpha: float
) -> dict[str, ConformalSets]:
    """Fit the thresholds of both scores.

    Args:
        logits: ``(n, K)`` float, before the link, of held-out rows. A temperature or a few numbers more may have been
            fitted on them; what that costs is far below ``1 / n``.
        labels: ``(n,)`` int64.
        scaling: "temperature", "bias" and "row_temperature"; empty: none.
        link: "softmax" or "sigmoid".
        alpha: Chance of a set without the right class.
    Returns:
        By score, "lac" and "aps".
    Raises:
        ValueError: As :func:`~carot_hf.fit_conformal`.
    """
    whole = link == "softmax"
    parts = {score: [np.empty(0)] for score in SCORE_NAMES}
    for rows, targets in _probabilities(logits, labels, scaling, link):
        for score, found in parts.items():
            found.append(label_scores(rows, targets, score=score, check_sums=whole))
    classes = int(logits.shape[1])
    return {
        score: sets_of_scores(np.concatenate(found), alpha, score, classes, check_sums=whole)
        for score, found in parts.items()
    }


class Coverage:
    """Coverage and mean size of sets, counted while logits are read.

    The rows may be of fewer classes than those of the fit: a threshold is one of probabilities, whatever their number.

    Args:
        sets: By score.
    """

    def __init__(self, sets: Mapping[str, ConformalSets]) -> None:
        self._sets, self._rows = sets, 0
        self._sums = {score: np.zeros(2) for score in sets}

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Count rows ``(n, K)`` and their labels ``(n,)``."""
        self._rows += len(labels)
        for score, made in self._sets.items():
            made = replace(made, n_classes=probabilities.shape[1])
            found = made.measure(probabilities.cpu(), labels.cpu())
            self._sums[score] += len(labels) * np.array([found["coverage"], found["mean_size"]])

    def metrics(self) -> dict[str, float]:
        """Return ``<score>_coverage`` and ``<score>_size``; see :meth:`~carot_hf.ConformalSets.measure`."""
        found = {score: (total / self._rows).tolist() for score, total in self._sums.items()}
        return {f"{score}_{name}": found[score][at] for score in found for at, name in enumerate(("coverage", "size"))}


def sets_of(made: ConformalSets, logits: Logits, scaling: Mapping[str, Any], *, link: str) -> NDArray[np.bool_]:
    """Return which classes are in the set of each row: ``(N, K)`` bool; arguments as of `fit_sets`."""
    labels = torch.zeros(len(logits), dtype=torch.int64)  # no set depends on them
    made = replace(made, n_classes=int(logits.shape[1]))
    return np.concatenate([made.sets(rows) for rows, _ in _probabilities(logits, labels, scaling, link)])


def conformal_of(model: Any, score: str) -> ConformalSets:
    """Return the conformal sets that the record of a model's calibration keeps.

    Raises:
        RuntimeError: If there are none.
        ValueError: If there is no such score, or the record is none of ours.
    """
    check_score(score)
    record = calibration_record(model)
    kept = {} if record is None else kept_sets(record)
    if score not in kept:
        why = "it is not calibrated" if record is None else "too few images were held out, or another version made it"
        raise RuntimeError(f"Expected a model with conformal sets, but {why}. Call `calibrate()` first.")
    return kept[score]


def _probabilities(
    logits: Logits, labels: Tensor, scaling: Mapping[str, Any], link: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield probabilities and labels of one chunk after the other, on the CPU."""
    kind = check_link(link)
    for start, rows, targets in row_chunks(*checked_shapes(logits, labels)):
        part, scale, shift = at_scaling(chunk_of(rows, targets), scaling, slice(start, start + len(rows)))
        yield kind.scale(part, scale, shift).probabilities.cpu(), targets.cpu()
