"""What a process may use of its machine."""

from __future__ import annotations

import os

import pytest

from carot_hf.basics.processes import usable_cores


@pytest.mark.parametrize(("usable", "cores"), [({3}, 1), ({0, 2, 5}, 3), (None, 8)])
def test_cores_are_those_that_the_process_may_use(monkeypatch, usable, cores):
    """Of a machine with eight; where the system does not say which, all of them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if usable is None:
        monkeypatch.delattr(os, "sched_getaffinity")
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: usable)
    assert usable_cores() == cores
