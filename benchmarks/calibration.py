"""Time and memory of the calibration metric and the temperature fit, beside the libraries people use instead.

    pip install torchmetrics netcal uncertainty-calibration torch-uncertainty torchvision rich scikit-learn
    OMP_NUM_THREADS=1 python benchmarks/calibration.py           # some 8 minutes, 5 GB of memory, 1 core
    OMP_NUM_THREADS=1 python benchmarks/calibration.py --quick   # half a minute; too small for the targets to mean much

Prints a Markdown table: each row is the median of repeats in this one process, on one thread, the data made beforehand.
A library that is not installed gets a row that says so. Values that should agree are compared; a difference is an
error. To be expected: the table in benchmarks/README.md, every target met but that of the unchecked torchmetrics call.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

TRUE_TEMPERATURE = 3.0
MEGABYTE = 1e6
PEERS = {  # what to import: what to install
    "torchmetrics": "torchmetrics",
    "netcal": "netcal",
    "torch_uncertainty": "torch-uncertainty torchvision rich",
    "sklearn": "scikit-learn",
}
STOCK = '''
import datasets
import evaluate
import numpy as np


class StockECE(evaluate.Metric):
    """ECE as an ordinary metric of evaluate: rows pass through Arrow, `_compute` does the sum."""

    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        confidences, correct = predictions.max(axis=1), predictions.argmax(axis=1) == references
        index = np.searchsorted((np.arange(1, 10) / 10).astype(np.float32), confidences)
        gap = np.bincount(index, weights=confidences.astype(float), minlength=10)
        gap -= np.bincount(index, weights=correct, minlength=10)
        return {"ece": float(np.abs(gap).sum() / len(references))}
'''


class Table:
    """Rows of the result; printed as they come to stderr and in the end as Markdown to stdout."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def add(self, task: str, name: str, seconds: float | None, result: str, target: str = "") -> None:
        """Keep a row and show it."""
        shown = "" if seconds is None else f"{seconds * 1000:,.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
        self.rows.append((task, name, shown, result, target))
        print(" | ".join(self.rows[-1]), file=sys.stderr, flush=True)

    def add_missing(self, task: str, module: str, error: Exception) -> None:
        """Keep a row for a library that cannot be imported."""
        self.add(
            task, module, None, f"not installed ({type(error).__name__}): `pip install {PEERS[module]}`", "not run"
        )

    def markdown(self) -> str:
        """The whole table."""
        head = ("task", "who", "median time", "result", "target")
        lines = [head, tuple("---" for _ in head), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median_time(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of a call, and its last result; a call of under 0.2 s is made ten times as often."""
    seconds, result = [], None
    while len(seconds) < repeats * (1 if seconds and seconds[0] >= 0.2 else 10):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def alternating_times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[list[float], Any]]:
    """Sorted seconds and last result of each call; they take turns, so that all meet the same load."""
    found: dict[str, tuple[list[float], Any]] = {name: ([], None) for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            result = call()
            found[name] = sorted([*found[name][0], time.perf_counter() - start]), result
    return found


def middle_half(seconds: list[float]) -> str:
    """The quartiles of times."""
    low, high = np.quantile(seconds, [0.25, 0.75])
    return f"middle half {low:.2f} to {high:.2f} s"


def peak_numpy_memory(call: Callable[[], Any]) -> float:
    """Most MB that numpy and Python held at a time beyond what they held before; what torch takes is not seen."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / MEGABYTE


def target(ours: float, theirs: float, factor: float) -> str:
    """``theirs / ours`` against the factor that is wanted."""
    ratio = theirs / ours
    return f"{ratio:.1f} times faster, {'met' if ratio >= factor else 'MISSED'} (at least {factor:g})"


def check_close(name: str, ours: float, theirs: float, tolerance: float) -> None:
    """Raise unless the two values agree."""
    if not abs(ours - theirs) <= tolerance:
        raise RuntimeError(f"{name}: expected values within {tolerance:g} of each other, got {ours} and {theirs}.")


def make_logits(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits like those of CLIP, made overconfident by TRUE_TEMPERATURE; labels follow the calibrated ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    chosen = torch.randint(classes, (rows,), generator=generator)
    logits[torch.arange(rows), chosen] += 8 + 2 * torch.randn(rows, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits.mul_(TRUE_TEMPERATURE), labels


def whole_metric(table: Table, rows: int, classes: int, repeats: int, folder: Path) -> None:
    """From probabilities to the ECE: ours, then an ordinary metric of evaluate."""
    import evaluate

    import carot_hf

    task = f"ECE of {rows:,} x {classes} float32 through evaluate"
    logits, labels = (tensor.numpy() for tensor in make_logits(rows, classes))
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    metric = carot_hf.load_ece(cache_dir=str(folder / "cache"))

    def ours() -> float:
        return metric.compute(predictions=probabilities, references=labels)["ece"]

    seconds, value = median_time(ours, repeats)
    memory = peak_numpy_memory(ours)
    met = "met" if memory <= 100 else "MISSED"
    table.add(
        task, "carot_hf", seconds, f"{value:.6f}; {memory:.1f} MB beside the input (tracemalloc)", f"{met} (100 MB)"
    )
    (folder / "stock_ece").mkdir()
    (folder / "stock_ece" / "stock_ece.py").write_text(STOCK, encoding="utf-8")
    stock = evaluate.load(str(folder / "stock_ece"), cache_dir=str(folder / "cache"))
    theirs, other = median_time(
        lambda: stock.compute(predictions=probabilities, references=labels)["ece"], min(repeats, 3)
    )
    check_close(task, value, other, 1e-6)
    table.add(task, "evaluate, an ordinary metric", theirs, f"{other:.6f}", target(seconds, theirs, 20))


def binning(table: Table, rows: int, repeats: int) -> None:
    """Each peer gets the same rows in its own form, so that none pays for a conversion: float32 and 0/1."""
    from carot_hf.ece.binning import calibration_bins

    task = f"ECE of {rows:,} float32 confidences"
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.01, 0.999, rows).astype(np.float32)
    correct = generator.random(rows) < confidences
    ours, value = median_time(lambda: calibration_bins(confidences, correct).ece, repeats)
    table.add(task, "carot_hf, inputs checked", ours, f"{value:.6f}")
    try:
        functional = importlib.import_module("torchmetrics.functional.classification")
    except Exception as error:  # noqa: BLE001 - a broken install must not end the run
        table.add_missing(task, "torchmetrics", error)
    else:
        # Its binary metric of confidences and hits is the top-label error without the search for the top label.
        tensors = torch.from_numpy(confidences), torch.from_numpy(correct.astype(np.int64))
        for checked in (True, False):

            def call(checked: bool = checked) -> float:
                return float(functional.binary_calibration_error(*tensors, n_bins=10, validate_args=checked))

            theirs, other = median_time(call, repeats)
            check_close(f"{task}, torchmetrics", value, other, 1e-4)
            name = "torchmetrics, inputs checked" if checked else "torchmetrics, validate_args=False"
            table.add(task, name, theirs, f"{other:.6f}", target(ours, theirs, 5))
    try:
        metrics = importlib.import_module("netcal.metrics")
    except Exception as error:  # noqa: BLE001
        table.add_missing(task, "netcal", error)
    else:
        hits, ece = correct.astype(np.int64), metrics.ECE(10)
        theirs, other = median_time(lambda: float(ece.measure(confidences, hits)), repeats)
        check_close(f"{task}, netcal", value, other, 1e-4)
        table.add(task, "netcal", theirs, f"{other:.6f}", target(ours, theirs, 5))


def temperature(table: Table, rows: int, classes: int, repeats: int) -> None:
    """Our two fits and scikit-learn's by turns; then those of others beside our median."""
    from carot_hf import fit_temperature

    task = f"temperature of {rows:,} x {classes} float32 logits (true {TRUE_TEMPERATURE:g})"
    logits, labels = make_logits(rows, classes)
    calls: dict[str, Callable[[], Any]] = {
        "carot_hf, nll": lambda: fit_temperature(logits, labels),
        "carot_hf, ece": lambda: fit_temperature(logits, labels, criterion="ece"),
    }
    others = {
        "scikit-learn, CalibratedClassifierCV": ("sklearn", prepare_sklearn),
        "torch-uncertainty, TemperatureScaler": ("torch_uncertainty", prepare_torch_uncertainty),
        "netcal, TemperatureScaling": ("netcal", prepare_netcal),
    }
    peer, (module, prepare) = next(iter(others.items()))
    try:
        calls[peer] = prepare(logits, labels)
    except Exception as error:  # noqa: BLE001
        table.add_missing(task, module, error)
    found = alternating_times(calls, repeats)
    ours = statistics.median(found["carot_hf, nll"][0])
    for name, (times, fitted) in found.items():
        seconds, wanted = statistics.median(times), ""
        if name == "carot_hf, ece":
            wanted = f"{'met' if seconds <= 2 else 'MISSED'} (2 s)"
        elif name == peer:
            wanted = target(ours, seconds, 15)
        table.add(task, name, seconds, f"T = {fitted:.5f}; {middle_half(times)}", wanted)
    calls.clear()
    for name, (module, prepare) in list(others.items())[1:]:
        try:
            fit = prepare(logits, labels)
        except Exception as error:  # noqa: BLE001
            table.add_missing(task, module, error)
            continue
        try:
            theirs, other = median_time(fit, min(repeats, 3))  # minutes otherwise
        except Exception as error:  # noqa: BLE001 - a failure is a result too
            table.add(task, name, None, f"fails: {type(error).__name__}: {str(error)[:80]}", "no time to compare")
            continue
        table.add(task, name, theirs, f"T = {other:.5f}", target(ours, theirs, 10))
        del fit


def prepare_sklearn(logits: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    """A call that fits scikit-learn's calibrator on the logits and returns T."""
    base = importlib.import_module("sklearn.base")
    calibration = importlib.import_module("sklearn.calibration")
    frozen = importlib.import_module("sklearn.frozen")

    class Logits(base.ClassifierMixin, base.BaseEstimator):  # type: ignore[misc, name-defined]
        """A fitted classifier whose input is its output."""

        classes_ = np.arange(logits.shape[1])

        def fit(self, x: Any, y: Any) -> Any:
            return self

        def __sklearn_is_fitted__(self) -> bool:
            return True

        def decision_function(self, x: Any) -> Any:
            return x

        def predict(self, x: Any) -> Any:
            return x.argmax(axis=1)

    array, classes = logits.numpy(), labels.numpy()

    def fit() -> float:
        model = calibration.CalibratedClassifierCV(
            frozen.FrozenEstimator(Logits()), method="temperature", ensemble=False
        )
        model.fit(array, classes)
        return 1 / float(model.calibrated_classifiers_[0].calibrators[0].beta_)

    return fit


def prepare_torch_uncertainty(logits: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    """A call that fits torch-uncertainty's scaler and returns T."""
    scaler = importlib.import_module("torch_uncertainty.post_processing").TemperatureScaler

    def fit() -> float:
        model = scaler()  # its own defaults
        model.fit([(logits, labels)], progress=False)  # one batch, so that no loader takes time
        return float(model.temperature[0])

    return fit


def prepare_netcal(logits: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    """A call that fits netcal's scaling and returns T."""
    scaling = importlib.import_module("netcal.scaling")
    # It wants probabilities; those of float32 make it return 1.0, so it gets float64.
    probabilities, classes = logits.double().softmax(1).numpy(), labels.numpy()

    def fit() -> float:
        model = scaling.TemperatureScaling()
        model.fit(probabilities, classes, tensorboard=False)
        return 1 / float(np.asarray(model.temperature).squeeze())  # its weight multiplies

    return fit


def streaming(table: Table, rows: int, repeats: int) -> None:
    """Many small batches: time, and what is kept of the rows."""
    import carot_hf

    batch = 10_000
    task = f"{rows:,} rows by add_batch, {batch:,} at a time"
    generator = np.random.default_rng(0)
    confidences = generator.random(batch, dtype=np.float32)
    correct = generator.random(batch) < confidences
    metric = carot_hf.load_ece(mode="top_label")

    def fill() -> None:
        for _ in range(rows // batch):
            metric.add_batch(predictions=confidences, references=correct)

    def fill_and_compute() -> float:
        fill()
        return metric.compute()["ece"]

    seconds, value = median_time(fill_and_compute, repeats)
    tracemalloc.start()
    fill()
    held, peak = (size / MEGABYTE for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    metric.compute()
    single = metric.compute(predictions=confidences, references=correct)["ece"]
    check_close(task, value, single, 1e-9)  # the same batch again and again
    table.add(task, "carot_hf, with compute", seconds, f"{value:.6f}; keeps {held:.2f} MB, at most {peak:.2f} MB")


def versions() -> str:
    """One line on what was measured."""
    names = ["numpy", "torch", "evaluate", "datasets", "torchmetrics", "netcal", "torch-uncertainty", "scikit-learn"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return f"Python {platform.python_version()}, {', '.join(found)}; {platform.machine()}, 1 thread"


def main() -> None:
    """Parse the options, run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs and few repeats: does it run at all?")
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats of each call; 3 at most of slow ones (default 5)"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # those of the peers
    torch.set_num_threads(1)
    if torch.version.cuda is None:
        # torchvision of PyPI is built for CUDA; beside a CPU torch its import ends at the operators that it looks for
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes) -> Tensor")
    rows, classes, repeats = (2_000, 100, 1) if options.quick else (50_000, 1000, options.repeats)
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_MODULES_CACHE"] = str(Path(name) / "modules")
        whole_metric(table, rows, classes, repeats, Path(name))
        for count in (rows, 20 * rows):
            binning(table, count, repeats)
        temperature(table, rows, classes, repeats)
        streaming(table, 100 * rows, repeats)
    print(f"`python benchmarks/calibration.py{' --quick' if options.quick else ''}`, {versions()}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1 / 1024) / 1e9
    print(f"Peak memory of the process, most of it that of the other libraries: {peak:.1f} GB\n")
    print(table.markdown())


if __name__ == "__main__":
    main()
