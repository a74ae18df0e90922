"""The one temperature that is best for the shifts by their labels: a bound to compare with, and no method."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F

from ..calibration.fit import fit_scaling
from ..calibration.metrics import read_set
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite
from .evaluator import Evaluator


def oracle_metrics(evaluator: Evaluator, suite: ShiftSuite, left_out: Collection[str] = ()) -> dict[str, float]:
    """ECE with the one temperature that is best for all shifted sets, by their labels: a bound to compare with.

    It is fitted on what it is measured on, so it is no method. Each set weighs the same.

    Args:
        evaluator: Of a model without a temperature in its weights.
        suite: With shifts.
        left_out: Shifts that stay out of the mean, as of ``ood``.
    Returns:
        ``eval_<set>_ece_oracle`` of the test set and the shifts, ``eval_id_...`` and ``eval_ood_...``.
    """
    found = {data.name: _predicted(evaluator, data) for data in (suite.test, *suite.shifts.values())}
    counted = [name for name in suite.shifts if name not in left_out] or list(suite.shifts)
    shifted = [found[name] for name in counted]
    width = max(logits.shape[1] for logits, _ in shifted)  # classes that a set lacks have no chance in it
    rows = torch.cat([F.pad(logits, (0, width - logits.shape[1]), value=-1e4) for logits, _ in shifted])
    labels = torch.cat([part[1] for part in shifted])
    weights = torch.cat([torch.full((len(part[1]),), 1 / len(part[1])) for part in shifted])
    fitted = fit_scaling(rows, labels, link=evaluator.link, criterion="nll", warn=False, sample_weight=weights)
    seen = {name: read_set(*part, {"": (fitted, ["ece"])}, link=evaluator.link)[0][""] for name, part in found.items()}
    ece = {name: part.bins.ece for name, part in seen.items()}
    ece |= {"id": ece[suite.test.name], "ood": sum(ece[name] for name in counted) / len(counted)}
    return {f"eval_{name}_ece_oracle": value for name, value in ece.items()}


def _predicted(evaluator: Evaluator, data: ShiftSet) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = evaluator.predict(data)
    if labels is None:
        raise ValueError(
            f"Expected labels in set '{data.name}', got none: there is no best temperature to compare with."
        )
    return logits, labels
