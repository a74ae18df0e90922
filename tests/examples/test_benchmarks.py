"""The benchmarks run; that of the GPU also where neither datasets nor evaluate is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from toys import ROOT

pytestmark = pytest.mark.release
ABSENT = ("datasets", "evaluate")


def run(script, *options, python=(), **environment):
    command = [sys.executable, *python, str(ROOT / "benchmarks" / script), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT)


@pytest.fixture
def packages(tmp_path):
    """The installed packages without two of them, for an interpreter that looks nowhere else."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.suffix != ".pth" and path.name.partition("-")[0] not in ABSENT:
            (folder / path.name).symlink_to(path)
    return os.pathsep.join([str(folder), str(ROOT)])


def test_the_gpu_benchmark_needs_neither_datasets_nor_evaluate(packages):
    missing = run("../tests/conftest.py", python=("-S", "-c", "import datasets"), PYTHONPATH=packages)
    assert "No module named 'datasets'" in missing.stderr
    result = run("gpu.py", "--device", "cpu", "--quick", python=("-S",), PYTHONPATH=packages)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith(("| FLYP", "| CaRot"))]
    assert [row[1] for row in rows] == ["no", "yes"] * 3
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)


def test_a_gpu_that_is_not_there_is_named():
    result = run("gpu.py", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert "Expected a GPU" in result.stderr


def test_steps_are_compared_only_while_they_train_alike():
    """The script itself stops if the losses of the hand-written and of our steps differ."""
    result = run("train_step.py", "--quick", "--rounds", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("at least") + result.stdout.count("at most") == 4


@pytest.mark.parametrize("script", ["growth.py", "gradient_cache.py", "density.py", "evaluation.py"])
def test_it_runs(script):
    result = run(script, "--quick")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("\n|") >= 4
