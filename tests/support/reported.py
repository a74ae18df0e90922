"""What a reporter must have recorded of a short run on the suite of the tests, whichever reporter it is."""

from __future__ import annotations

import pytest

SETS = ["far", "home", "part", "validation"]
DIAGRAMS = {f"eval/{name}_reliability" for name in SETS}
DIAGRAMS |= {f"eval/{name}_reliability_ts" for name in SETS if name != "validation"}

REPORTED = {"reliability_diagrams": True, "max_steps": 3, "preset": "carot-2024"}  # all terms of the loss


def check_scalars(trainer, metrics, recorded):
    """All that was logged is there, with its values: ``recorded`` are lists by tag."""
    terms = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(terms) == 3
    for name in ("loss", "contrastive", "distillation", "orthogonality", "teacher_momentum", "logit_multiplier"):
        expected = [entry[name] for entry in terms if name in entry]
        assert expected, name
        assert recorded[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name
    sets = [f"{name}_{metric}" for name in [*SETS, "id", "ood"] for metric in ("accuracy", "ece", "nll")]
    for name in [*sets, "home_ece_ts", "temperature"]:
        assert recorded[f"eval/{name}"][-1] == pytest.approx(metrics[f"eval_{name}"], rel=1e-6), name
