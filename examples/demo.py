"""Zero-shot, FLYP and CaRot side by side on the embedded suite: real images, no network, no GPU.

    python examples/demo.py                # what `make demo` runs: one seed, about two minutes on two cores
    python examples/demo.py --seeds 3      # means and ranges over three seeds

Each method is one run of finetune_imagenet.py. At the end one table and one picture compare them; every run leaves its
calibrated model, metrics.json and eval_reliability.png in its own folder. Digits demonstrate the method; they are no
evidence for ImageNet.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import finetune_imagenet
import torch

from carot_hf.basics.escape import table
from carot_hf.basics.whole_file import whole_file
from carot_hf.ece.binning import CalibrationBins
from carot_hf.evaluation.plots import ece_by_set, reliability_grid

METHODS = {
    "zero-shot": ["--zero_shot"],
    "flyp": ["--preset", "flyp"],
    "carot": ["--preset", "carot"],
}
MARK = ".carot_hf_demo"  # the folder is the demo's own and may be emptied
COLUMNS = [
    ("ID acc", "eval_id_accuracy"),
    ("OOD acc", "eval_ood_accuracy"),
    ("ID ECE", "eval_id_ece"),
    ("OOD ECE", "eval_ood_ece"),
    ("ID ECE, T", "eval_id_ece_ts"),
    ("OOD ECE, T", "eval_ood_ece_ts"),
    ("ID ECE, density", "eval_id_ece_dts"),
    ("OOD ECE, density", "eval_ood_ece_dts"),
]
SERIES = {"none": "", "home T": "_ts", "perturbed T": "_pts", "density": "_dts"}


def main(argv: Sequence[str]) -> None:
    """Run the methods, print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/demo"), help="made anew each time; default: out/demo"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 42, 43, ... for each trained method")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # the model is small: a second thread only gets in the way
    start = time.perf_counter()
    mark = options.output_dir / MARK
    if options.output_dir.exists() and any(options.output_dir.iterdir()) and not mark.exists():
        parser.error(f"expected a new folder or one of an earlier demo, got {options.output_dir}: choose another one")
    if options.output_dir.exists():
        shutil.rmtree(options.output_dir)
    options.output_dir.mkdir(parents=True)
    mark.touch()
    results: dict[str, list[dict[str, float]]] = {}
    pictures: dict[str, dict[str, CalibrationBins]] = {}
    for method, flags in METHODS.items():
        for seed in range(42, 42 + (1 if method == "zero-shot" else options.seeds)):
            folder = options.output_dir / (method if options.seeds == 1 else f"{method}-{seed}")
            print(f"\n=== {method}, seed {seed} ===", flush=True)
            arguments = ["--suite", "digits", *flags, "--output_dir", str(folder), "--seed", str(seed)]
            arguments += ["--calibration_method", "density"]
            report = finetune_imagenet.main([*arguments, "--use_cpu", "--logging_steps", "50"])
            results.setdefault(method, []).append(report["metrics"])
            tables = {name: CalibrationBins.from_dict(bins) for name, bins in report["bins"].items()}
            pictures.setdefault(method, {name: bins for name, bins in tables.items() if name != "validation"})
    with whole_file(options.output_dir / "reliability.png") as beside:
        reliability_grid(pictures, title="Without temperature scaling").savefig(beside, dpi=60)
    panels = {
        method: {
            title: {name: [run[f"eval_{name}_ece{end}"] for run in runs] for name in pictures[method]}
            for title, end in SERIES.items()
        }
        for method, runs in results.items()
    }
    with whole_file(options.output_dir / "ece_by_set.png") as beside:
        ece_by_set(panels).savefig(beside, dpi=80)
    print(f"\n=== {options.seeds} seed(s), {time.perf_counter() - start:.0f} s ===\n")
    print(comparison(results))
    print(
        "\nECE: expected calibration error, 10 bins, whole set (0 is calibrated). T: with the temperature that was"
        "\nfitted on the validation split; density: with one for each image, of home data alone, too. ID: UCI digits."
        "\nOOD: mean over the shifted sets. ECE by set, before and after, and reliability diagrams:"
    )
    for picture in [options.output_dir / "ece_by_set.png", *sorted(options.output_dir.glob("**/*reliability.png"))]:
        print(f"  {picture}")


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


if __name__ == "__main__":
    main(sys.argv[1:])
