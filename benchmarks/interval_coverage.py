"""How often the interval of the metric holds the true ECE, beside a percentile bootstrap of the same rows.

    python benchmarks/interval_coverage.py                 # 1,000 samples a cell, about 25 minutes on one core
    python benchmarks/interval_coverage.py --samples 100

The true ECE is that of the same ten bins: the sum over the bins of |E[confidence - hit; bin]|, computed from two
million confidences. Three shapes of confidences, three kinds of error: all confidences too high by as much, every
second bin too high and the others too low, and only those above .8 too high. Cells whose true ECE a shape cannot reach
are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from carot_hf.ece.binning import calibration_bins
from carot_hf.ece.uncertainty import ece_interval

SHAPES = {"high": (4.0, 1.2), "flat": (1.5, 1.5), "sharp": (8.0, 0.5)}  # of a beta distribution on [.1, 1]
KINDS = ("all", "alternating", "above .8")
TRUE = (0.0, 0.01, 0.05, 0.1)
SIZES = (300, 2_000)
DRAWS = 400
_LARGE = 2_000_000
_INNER = np.arange(1, 10) / 10


def confidences(shape: str, size: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw confidences."""
    drawn: NDArray[np.float64] = 0.1 + 0.9 * generator.beta(*SHAPES[shape], size)
    return drawn


def chances(values: NDArray[np.float64], kind: str, error: float) -> NDArray[np.float64]:
    """The chance of a hit at each confidence."""
    signs = {
        "all": np.full(len(values), -1.0),
        "alternating": np.where((values * 10).astype(int) % 2 == 0, 1.0, -1.0),
        "above .8": np.where(values > 0.8, -1.0, 0.0),
    }[kind]
    clipped: NDArray[np.float64] = np.clip(values + error * signs, 0, 1)
    return clipped


def true_ece(values: NDArray[np.float64], hits: NDArray[np.float64]) -> float:
    """The ECE of chances in place of hits."""
    index = np.searchsorted(_INNER, values, side="left")
    return float(np.abs(np.bincount(index, values - hits, 10)).sum() / len(values))


@cache
def error_of(shape: str, kind: str, target: float) -> float | None:
    """The error that gives a true ECE; None if none does."""
    values = confidences(shape, _LARGE, np.random.default_rng(99))
    low, high = 0.0, 0.8
    if true_ece(values, chances(values, kind, high)) < target:
        return None
    for _ in range(16):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if true_ece(values, chances(values, kind, middle)) < target else (low, middle)
    return high if target else 0.0


def percentiles(values: NDArray[np.float64], hits: NDArray[np.bool_], seed: int) -> tuple[float, float]:
    """The percentile bootstrap: quantiles of the ECE of resampled rows."""
    index = np.searchsorted(_INNER, values, side="left")
    excess, generator = values - hits, np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS):
        times = np.bincount(generator.integers(0, len(values), len(values)), minlength=len(values))
        drawn.append(np.abs(np.bincount(index, times * excess, 10)).sum() / len(values))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def coverage(
    shape: str, kind: str, error: float, truth: float, size: int, samples: int, *, peer: bool = True
) -> Iterator[tuple[bool, ...]]:
    """For each sample whether ours and the percentiles hold the truth, and whether each holds its estimate."""
    generator = np.random.default_rng(5)
    for sample in range(samples):
        values = confidences(shape, size, generator)
        hits = generator.random(size) < chances(values, kind, error)
        bins = calibration_bins(values, hits)
        ours = ece_interval(values, hits, bins, n_bootstrap=DRAWS, seed=sample)
        low, high = percentiles(values, hits, sample) if peer else (0.0, 0.0)
        yield (
            ours["ece_low"] <= truth <= ours["ece_high"],
            low <= truth <= high,
            ours["ece_low"] <= bins.ece <= ours["ece_high"],
            low <= bins.ece <= high,
        )


def main() -> None:
    """Print a row a cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="samples a cell")
    options = parser.parse_args()
    versions = f"numpy {np.__version__}, python {sys.version.split()[0]}"
    print(f"{options.samples} samples a cell, {DRAWS} draws, 95 %; {versions}\n")
    titles = ["holds it: ours", "percentiles", "holds its estimate: ours", "percentiles"]
    print(f"| confidences | error | true ECE | rows | {' | '.join(titles)} |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for shape in SHAPES:
        for kind in KINDS:
            for target in TRUE:
                error = error_of(shape, kind, target)
                if error is None or (target == 0 and kind != KINDS[0]):
                    continue
                for size in SIZES:
                    found = np.array(list(coverage(shape, kind, error, target, size, options.samples)))
                    cells = " | ".join(f"{share:.3f}" for share in found.mean(axis=0))
                    print(f"| {shape} | {kind} | {target:g} | {size:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
