"""Zero-shot, FLYP and CaRot side by side on the embedded suite: real images, no network, no GPU.

    carot_hf demo                # what `make demo` runs: one seed, about two minutes on two cores
    carot_hf demo --seeds 3      # means and ranges over three seeds

Each method is one run of `carot_hf train`. At the end one table and one picture compare them; every run leaves its
calibrated model, metrics.json and eval_reliability.png in its own folder. Digits demonstrate the method; they are no
evidence for ImageNet.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..basics.escape import table
from ..basics.whole_file import whole_file
from .parser import Parser

if TYPE_CHECKING:
    from ..ece.binning import CalibrationBins

METHODS = {
    "zero-shot": ["--zero_shot"],
    "flyp": ["--preset", "flyp"],
    "carot": ["--preset", "carot"],
}
MARK = ".carot_hf_demo"  # the folder is the demo's own and may be emptied
COLUMNS = [
    ("home acc", "eval_id_accuracy"),
    ("shifted acc", "eval_ood_accuracy"),
    ("home ECE", "eval_id_ece"),
    ("shifted ECE", "eval_ood_ece"),
    ("home ECE, T", "eval_id_ece_ts"),
    ("shifted ECE, T", "eval_ood_ece_ts"),
    ("home ECE, density", "eval_id_ece_dts"),
    ("shifted ECE, density", "eval_ood_ece_dts"),
]
SERIES = {"none": "", "home T": "_ts", "perturbed T": "_pts", "density": "_dts"}  # to the names of an ECE their ending


def main(argv: Sequence[str]) -> None:
    """Run the methods, print the comparison."""
    options = parse(argv)
    start, place = time.perf_counter(), options.output_dir
    if place.exists() and any(place.iterdir()) and not (place / MARK).exists():
        raise ValueError(f"Expected a new folder or one of an earlier demo, got {place}: choose another one.")
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    (place / MARK).touch()
    results, pictures = run_methods(place, options.seeds)
    draw(place, results, pictures)
    print(f"\n=== {options.seeds} seed(s), {time.perf_counter() - start:.0f} s ===\n")
    print(comparison(results))
    print(
        "\nECE: expected calibration error, 10 bins, whole set (0 is calibrated). T: with the temperature that was"
        "\nfitted on the validation set; density: with one for each image, of home data alone, too. Home: UCI digits"
        "\n(`id` in metrics.json). Shifted: mean over the shifted sets (`ood`)."
        "\nECE by set, before and after, and reliability diagrams:"
    )
    for picture in [place / "ece_by_set.png", *sorted(place.glob("**/*reliability.png"))]:
        print(f"  {picture}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("demo", __doc__ or "")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/demo"), help="made anew each time; default: out/demo"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 42, 43, ... for each trained method; default: 1")
    return parser.read(argv)


def run_methods(
    place: Path, seeds: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, dict[str, CalibrationBins]]]:
    """Train each method with each seed; return its metrics, and the bin tables of its last run by set."""
    import torch

    from ..ece.binning import CalibrationBins
    from .training import main as train

    torch.set_num_threads(1)  # the model is small: a second thread only gets in the way
    results: dict[str, list[dict[str, float]]] = {}
    pictures: dict[str, dict[str, CalibrationBins]] = {}
    for method, flags in METHODS.items():
        for seed in range(42, 42 + (1 if method == "zero-shot" else seeds)):
            folder = place / (method if seeds == 1 else f"{method}-{seed}")
            print(f"\n=== {method}, seed {seed} ===", flush=True)
            words = ["--suite", "digits", *flags, "--output_dir", str(folder), "--seed", str(seed)]
            report = train([*words, "--calibration_method", "density", "--use_cpu", "--logging_steps", "50"])
            results.setdefault(method, []).append(report["metrics"])
            tables = {name: CalibrationBins.from_dict(bins) for name, bins in report["bins"].items()}
            pictures.setdefault(method, {name: bins for name, bins in tables.items() if name != "validation"})
    return results, pictures


def draw(
    place: Path, results: Mapping[str, Sequence[Mapping[str, float]]], pictures: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write both pictures."""
    from ..evaluation.plots import ece_by_set, reliability_grid

    with whole_file(place / "reliability.png") as beside:
        reliability_grid(pictures, title="Without temperature scaling").savefig(beside, dpi=60)
    panels = {method: eces_by_set(runs, pictures[method], SERIES) for method, runs in results.items()}
    with whole_file(place / "ece_by_set.png") as beside:
        ece_by_set(panels).savefig(beside, dpi=80)


def eces_by_set(
    runs: Sequence[Mapping[str, float]], sets: Collection[str], series: Mapping[str, str]
) -> dict[str, dict[str, list[float]]]:
    """ECE of each set, a value a run, by those of the calibrations that all of them have."""
    return {
        title: {name: [run[f"eval_{name}_ece{end}"] for run in runs] for name in sets}
        for title, end in series.items()
        if all(f"eval_{name}_ece{end}" in run for run in runs for name in sets)
    }


def comparison(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Lay out means over seeds, with the range where there are several."""
    rows = [["method", *(title for title, _ in COLUMNS)]]
    for method, runs in results.items():
        cells = []
        for _, key in COLUMNS:
            values = [run[key] for run in runs]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{spread}")
        rows.append([method, *cells])
    return table(rows)
