"""What to expect of a model on images without labels, from its confidences and from how far they are from home."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..calibration.density import DensityCalibrator
from ..calibration.estimate import METHODS, estimate_accuracy, estimate_interval, share_beyond
from ..calibration.metrics import Seen, read_set
from ..calibration.nearest import density
from ..calibration.rows import LogitRows

BEYOND = 0.99  # quantile of home


def estimated(
    home: tuple[LogitRows, Tensor, Tensor],
    away: tuple[LogitRows, Tensor],
    calibrator: DensityCalibrator | None,
    *,
    link: str,
    scaling: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Estimate the accuracy on unlabelled images.

    Args:
        home: Logits, embeddings and labels of held-out images.
        away: Logits and embeddings of the images without labels.
        calibrator: Divides the logits of both; ``None``: they are taken as they are.
        link: "softmax" or "sigmoid".
        scaling: Temperature and bias that are not in the weights yet; ``None``: none.
        seed: Of the intervals' draws.
    Returns:
        ``mean`` and ``atc`` (:func:`~carot_hf.estimate_accuracy`), each with ``_low`` and ``_high`` of the 95 %
        interval of the estimate; with a calibrator ``beyond``, the share of images that are farther from the bank than
        99 % of the held-out ones: .01 if they are alike.
    """

    def seen(logits: LogitRows, embeds: Tensor, labels: Tensor) -> Seen:
        further = {} if calibrator is None else {"row_temperature": calibrator.temperature(embeds)}
        return read_set(logits, labels, {"": ({**(scaling or {}), **further}, ())}, link=link)[0][""]

    ours = seen(*home)
    theirs = seen(*away, torch.zeros(len(away[0]), dtype=torch.int64))  # whatever is right: confidences alone count
    rows = ours.confidences, ours.correct, theirs.confidences
    found: dict[str, float] = {}
    for method in METHODS:
        low, high = estimate_interval(*rows, method=method, seed=seed)
        found |= {method: estimate_accuracy(*rows, method=method), f"{method}_low": low, f"{method}_high": high}
    if calibrator is not None:
        near, far = (density(embeds, calibrator.bank, calibrator.k) for embeds in (home[1], away[1]))
        found["beyond"] = share_beyond(near, far, BEYOND)
    return found
