"""The code moves, what it does stays: short runs of every method leave what they left before the move."""

from __future__ import annotations

import json
import sys

import pytest
from toys import ROOT

sys.path.insert(0, str(ROOT / "tests" / "golden"))
import golden_runs as runs

KNOWN = json.loads(runs.VALUES.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.RUNS)
def test_a_run_leaves_what_it_left_before(name, tmp_path):
    """Bit for bit on the processor of the record, closely elsewhere."""
    found = json.loads(json.dumps(runs.run(name, runs.RUNS[name], tmp_path)))
    assert not runs.differences(KNOWN["runs"][name], found, name, bits=KNOWN["probe"] == runs.probe())


def test_differences_are_found():
    run = KNOWN["runs"]["carot"]
    other = json.loads(json.dumps(run))
    assert not runs.differences(run, other, "carot", bits=True)
    other["log"][2]["loss"] += 1e-9
    file = next(iter(other["hashes"]))
    other["hashes"][file] = "0"
    del other["metrics"]["eval_ood_ece"]
    assert len(runs.differences(run, other, "carot", bits=True)) == 3
    assert len(runs.differences(run, other, "carot", bits=False)) == 1
    other["log"][2]["loss"] += 1
    assert len(runs.differences(run, other, "carot", bits=False)) == 2
