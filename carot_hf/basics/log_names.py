"""Which numbers of a training log are terms of the loss: those that nobody else logs beside a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What Trainer and ours log in the same entry; what is left are the terms, whose names a table of the method gives.
_OTHERS = {
    *("loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen"),
    *("teacher_momentum", "teacher_half_life", "input_wait", "logit_multiplier", "logit_bias"),
}


def loss_terms(entry: Mapping[str, Any]) -> list[str]:
    """Return the names of the terms of the loss in an entry of a log, in its order; none where it has no loss."""
    if "loss" not in entry:
        return []
    return [
        name
        for name, value in entry.items()
        if name not in _OTHERS and isinstance(value, int | float) and not name.startswith("train_tokens")
    ]
