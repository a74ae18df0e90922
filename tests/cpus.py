"""The numerical tests as other processors run them: `make test-cpus`.

    python tests/cpus.py

The variables choose the kernels of MKL and of torch, and how their sums are split: one machine is several. Two threads
stand for every number of them. Prints a row for each combination; ends with 1 if a test of any fails.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What is compared there is made by matrix products of different shapes, orders or libraries.
FILES = (
    "classifier", "losses", "sigmoid", "calibration", "gradient_cache", "methods", "prompts", "evaluation", "teacher",
)  # fmt: skip
PROCESSES = ("test_distributed.py::test_two_processes_equal_one_with_the_whole_batch",)
MKL = ({}, {"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": "AVX2"})
ATEN = ({}, {"ATEN_CPU_CAPABILITY": "default"})
THREADS = ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"})


def main() -> int:
    """Run all combinations, print the table."""
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in FILES]
    tests += [str(ROOT / "tests" / name) for name in PROCESSES]
    rows, failed = [], False
    for parts in itertools.product(MKL, ATEN, THREADS):
        chosen = {name: value for part in parts for name, value in part.items()}
        environment = {
            name: value for name, value in os.environ.items() if name not in ("MKL_CBWR", "ATEN_CPU_CAPABILITY")
        }
        title = " ".join(f"{name}={value}" for name, value in chosen.items())
        print(f"\n=== {title}", flush=True)
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests]
        result = subprocess.run(command, cwd=ROOT, env={**environment, **chosen}, check=False)
        failed |= result.returncode != 0
        rows.append((title, "green" if result.returncode == 0 else "RED", time.monotonic() - start))
    print("\n| kernels and threads | tests | seconds |\n|---|---|---|")
    for title, outcome, seconds in rows:
        print(f"| {title} | {outcome} | {seconds:.0f} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
