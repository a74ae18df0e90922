"""The calibration metric from anywhere: a working directory elsewhere, an installed wheel, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate


def load_ece(**options: Any) -> Any:
    """Load the metric in ``carot_hf/ece``; ``evaluate.load("carot_hf/ece")`` does so in the repository root only.

    Args:
        options: Those of the metric, such as ``from_logits=True`` or ``n_bins=15``, and of `evaluate.load`.

    Returns:
        An ``evaluate.Metric`` with ``compute``, ``add_batch`` and ``add``.
    """
    # Workaround, evaluate 0.4.6: a name is looked for in the working directory and on the Hub, never in an installed
    # package, so this passes the folder. Until: it looks there, too.
    return evaluate.load(str(Path(__file__).resolve().parent / "ece"), **options)
