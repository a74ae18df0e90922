"""The interval of the ECE: by hand where that can be done, by how often it holds the true one elsewhere."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from toys import ROOT

from carot_hf.ece.binning import calibration_bins
from carot_hf.ece.ece import ECE
from carot_hf.ece.uncertainty import ece_interval

sys.path.insert(0, str(ROOT / "benchmarks"))
import interval_coverage as study


def test_an_ece_of_zero_is_in_its_interval():
    """It was 0.0 with [.028, .122]."""
    confidences, hits = np.full(100, 0.7), np.arange(100) % 10 < 7
    result = ECE(mode="top_label", n_bootstrap=1000).compute(predictions=confidences, references=hits)
    assert result["ece"] == pytest.approx(0.0, abs=1e-12)
    assert result["ece_low"] == 0.0
    # one bin of 100 rows: the gap at which a measured one within half a row of 0 has a chance of 2.5 %
    deviation, half_row = math.sqrt(0.7 * 0.3 / 100), 0.5 / 100

    def chance(gap):
        ends = ((half_row - gap) / deviation, (-half_row - gap) / deviation)
        return 0.5 * (math.erf(ends[0] / math.sqrt(2)) - math.erf(ends[1] / math.sqrt(2)))

    assert chance(result["ece_high"]) == pytest.approx(0.025, abs=0.006)
    assert result["ece_high"] == pytest.approx(0.0695, abs=0.004)


@pytest.mark.parametrize("seed", range(20))
def test_the_estimate_is_always_inside(seed):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(1, 200))
    confidences = generator.beta(*generator.uniform(0.3, 5, 2), size)
    hits = generator.random(size) < generator.uniform(0, 1) * confidences
    weights = None if seed % 2 else generator.uniform(0.1, 4, size)
    bins = calibration_bins(confidences, hits, int(generator.integers(1, 30)), sample_weight=weights)
    for draws, level in ((50, 0.95), (7, 0.01), (1, 0.5)):  # of few draws any share may reach
        found = ece_interval(
            confidences, hits, bins, n_bootstrap=draws, confidence_level=level, seed=seed, sample_weight=weights
        )
        assert 0 <= found["ece_low"] <= bins.ece <= found["ece_high"] <= 1


def test_it_narrows_with_the_square_root_of_the_rows():
    widths = []
    for size in (500, 8000):
        generator = np.random.default_rng(2)
        confidences = generator.uniform(0.5, 1, size)
        hits = generator.random(size) < confidences - 0.15
        bins = calibration_bins(confidences, hits)
        found = ece_interval(confidences, hits, bins, n_bootstrap=500)
        widths.append(found["ece_high"] - found["ece_low"])
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def covered(shape, kind, target, size, samples, peer=True):
    error = study.error_of(shape, kind, target)
    return np.array(list(study.coverage(shape, kind, error, target, size, samples, peer=peer))).mean(axis=0)


def test_it_holds_the_true_ece_where_percentiles_do_not():
    """True ECE .01, 300 rows: of 40 samples; a share of .95 gives fewer than 34 in 1 of 1,000 studies."""
    ours, percentiles, inside, _ = covered("high", "all", 0.01, 300, 40)
    assert ours >= 34 / 40
    assert percentiles <= 0.2
    assert inside == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["high", "flat", "sharp"])
@pytest.mark.parametrize("target", [0.0, 0.01, 0.05, 0.1])
@pytest.mark.parametrize("size", [300, 2000])
def test_coverage(shape, target, size):
    """At least 90 %: of 100 samples .935, the lowest of the study, gives fewer than 86 in 3 of 1,000 studies."""
    kinds = study.KINDS if target else study.KINDS[:1]
    for kind in kinds:
        if study.error_of(shape, kind, target) is None:
            continue
        ours, _, inside, _ = covered(shape, kind, target, size, 100, peer=False)
        assert ours >= 0.86, (shape, kind)
        assert inside == 1.0
