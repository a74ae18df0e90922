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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Each compares results of matrix products of other shapes, in another order, or of another library.
TESTS = (
    "models/test_classifier.py", "models/test_model_stock.py", "objective/test_losses.py", "objective/test_sigmoid.py",
    "objective/test_start_losses.py", "calibration/test_calibration.py", "calibration/test_groups.py",
    "calibration/test_temperature.py", "data/test_prompts.py", "teacher/test_teacher.py", "ece/test_weights.py",
    "ece/test_foreign_rows.py", "ece/test_interval.py", "calibration/test_density.py", "calibration/test_vrf.py",
    "objective/test_methods.py::test_export_gives_the_probabilities_of_the_zero_shot_model",
    "objective/test_methods.py::test_ft_is_calibrated_saved_and_served_by_the_stock_pipeline",
    "run/test_training.py::test_terms_are_those_of_the_loss_functions",
    "run/test_training.py::test_accumulation_is_the_mean_over_micro_batches",
    "evaluation/test_evaluation.py::test_every_set_equals_a_plain_loop",
    "models/test_lora.py::test_merged_weights_are_the_closed_form",
    "models/test_lora.py::test_the_gradient_cache_equals_the_large_batch",
    "models/test_backbones.py::test_evaluation_is_what_the_stock_model_says",
    "models/test_backbones.py::test_captions_are_embedded_as_the_padded_ones_are",
    "objective/test_gradient_cache.py::test_the_parts_add_up_to_the_gradient_of_the_whole",
    "objective/test_gradient_cache.py::test_the_cache_trains_as_the_large_batch_does[carot-2024]",
    "objective/test_gradient_cache.py::test_the_cache_trains_as_the_large_batch_does[tracer]",
    "run/test_distinct_captions.py",
    "run/test_distributed.py::test_two_processes_equal_one_with_the_whole_batch",
)  # fmt: skip
MKL = ({}, {"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": "AVX2"})
ATEN = ({}, {"ATEN_CPU_CAPABILITY": "default"})
# All kernels with one thread; with two, each pair of a kernel of MKL or of torch and two threads is there once or more.
CHOICES = [{**mkl, **aten, "OMP_NUM_THREADS": "1"} for mkl, aten in itertools.product(MKL, ATEN)]
CHOICES += [{**mkl, **aten, "OMP_NUM_THREADS": "2"} for mkl, aten in zip(MKL, (*ATEN, {}), strict=True)]
OWN = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")


def run(chosen: dict[str, str]) -> tuple[str, bool, float, str]:
    """Run the tests with some variables: what they were, whether all passed, how long it took, what was printed."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN} | {
        "OMP_WAIT_POLICY": "passive"
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in TESTS]
    start = time.monotonic()
    result = subprocess.run(
        command, cwd=ROOT, env={**environment, **chosen}, check=False, capture_output=True, text=True
    )
    title = " ".join(f"{name}={value}" for name, value in chosen.items())
    return title, result.returncode == 0, time.monotonic() - start, result.stdout + result.stderr


def main() -> int:
    """Run all combinations, two at a time; print the table."""
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(run, CHOICES):
            rows.append(row)
            print(f"=== {row[0]}\n{row[3] if not row[1] else row[3].strip().splitlines()[-1]}", flush=True)
    print("\n| kernels and threads | tests | seconds |\n|---|---|---|")
    for title, green, seconds, _ in rows:
        print(f"| {title} | {'green' if green else 'RED'} | {seconds:.0f} |")
    return int(not all(row[1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
