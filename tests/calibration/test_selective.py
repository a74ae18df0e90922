"""Selective prediction and the smooth ECE: by hand, against slow loops, scikit-learn and the figures of relplot."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from carot_hf.calibration.selective import augrc, aurc, confidence_for_accuracy, smooth_ece
from carot_hf.ece.binning import calibration_bins


def sample(seed, size=60, decimals=1):
    """Rows with many ties."""
    generator = np.random.default_rng(seed)
    confidences = generator.random(size).round(decimals)
    return confidences, generator.random(size) < confidences**2


def curves(confidences, correct):
    """Both areas of rows in the order in which they are kept."""
    errors = risk = joint = 0
    for kept, hit in enumerate(correct, start=1):
        errors += not hit
        risk += errors / kept
        joint += errors / len(correct)
    return risk / len(correct), joint / len(correct)


def test_areas_by_hand():
    """Kept 1, 2, 3, 4 of .9 .8 .6 .4 with hits 1 1 0 1: 0, 0, 1, 1 errors."""
    confidences, hits = [0.4, 0.9, 0.6, 0.8], [1, 1, 0, 1]
    assert aurc(confidences, hits) == pytest.approx((1 / 3 + 1 / 4) / 4, abs=1e-15)
    assert augrc(confidences, hits) == pytest.approx((1 / 4 + 1 / 4) / 4, abs=1e-15)
    assert aurc([0.5, 0.5], [1, 0]) == pytest.approx(
        0.5
    )  # the error is the first of the two or not: 1/2 each, then 1/2
    assert augrc([0.5, 0.5], [1, 0]) == pytest.approx((0.25 + 0.5) / 2)


@pytest.mark.parametrize("seed", range(8))
def test_ties_are_the_mean_over_all_orders(seed):
    generator = np.random.default_rng(seed)
    confidences = generator.integers(1, 4, 7) / 4
    hits = generator.random(7) < 0.5
    found = []
    for order in itertools.permutations(range(7)):
        kept = list(order)
        if all(confidences[a] >= confidences[b] for a, b in itertools.pairwise(kept)):
            found.append(curves(confidences[kept], hits[kept]))
    expected = np.mean(found, axis=0)
    assert (aurc(confidences, hits), augrc(confidences, hits)) == pytest.approx(tuple(expected), abs=1e-14)


@pytest.mark.parametrize("function", [aurc, augrc, smooth_ece])
def test_weighted_rows_are_repeated_ones(function):
    confidences, hits = sample(3)
    weights = np.random.default_rng(0).integers(0, 4, len(hits))
    expected = function(np.repeat(confidences, weights), np.repeat(hits, weights))
    assert function(confidences, hits, weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_augrc_is_what_the_paper_says_of_auroc_and_accuracy(seed):
    confidences, hits = sample(seed)
    error = 1 - hits.mean()
    expected = (1 - roc_auc_score(hits, confidences)) * (1 - error) * error + error**2 / 2 + error / (2 * len(hits))
    assert augrc(confidences, hits) == pytest.approx(expected, abs=1e-14)
    assert augrc(confidences, hits) <= aurc(confidences, hits)


@pytest.mark.parametrize("area", [aurc, augrc])
def test_areas_at_the_ends(area):
    confidences = np.linspace(0.1, 0.9, 9)
    assert area(confidences, np.ones(9)) == 0.0
    assert area(confidences, np.zeros(9)) == pytest.approx(1.0 if area is aurc else 5 / 9)
    good = confidences > 0.35
    assert area(confidences, good) < area(np.full(9, 0.5), good) < area(1 - confidences, good)


@pytest.mark.parametrize("seed", range(5))
def test_the_confidence_for_an_accuracy_is_the_smallest_that_will_do(seed):
    confidences, hits = sample(seed, size=40)
    for accuracy in (0.0, 0.3, 0.5, 0.75, 0.9, 1.0):
        enough = [c for c in confidences if hits[confidences >= c].mean() >= accuracy]
        found = confidence_for_accuracy(confidences, hits, accuracy)
        assert found == (min(enough) if enough else None)
        assert found is None or isinstance(found, float)


def test_the_confidence_for_an_accuracy_by_hand():
    confidences, hits = [0.9, 0.8, 0.6, 0.4], [1, 1, 0, 1]
    assert confidence_for_accuracy(confidences, hits, 1.0) == 0.8
    assert confidence_for_accuracy(confidences, hits, 0.7) == 0.4  # 2/3 at .6, but 3/4 below it
    assert confidence_for_accuracy(confidences, hits, 0.76) == 0.8
    assert confidence_for_accuracy([0.9, 0.9], [1, 0], 0.6) is None
    assert confidence_for_accuracy(np.arange(10) / 10, np.arange(10) > 0, 0.9) == 0.0  # exactly 9 of 10


def slow_smooth_ece(confidences, correct, steps=2000):
    """The integral by trapezoids over sums of normal densities, each with its mirror images."""
    nodes = np.linspace(0, 1, steps + 1)

    def error(sigma):
        smoothed = np.zeros(steps + 1)
        for value, hit in zip(confidences, correct, strict=True):
            for mirror in (value, -value):
                for shift in (-4, -2, 0, 2, 4):
                    distances = (nodes - mirror - shift) / sigma
                    smoothed += (hit - value) * np.exp(-0.5 * distances**2) / (sigma * math.sqrt(2 * math.pi))
        return np.trapezoid(np.abs(smoothed), nodes) / len(confidences)

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return low


@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (0.3, 0.3)])
@pytest.mark.parametrize("power", [0.5, 2.5])
def test_smooth_ece_agrees_with_a_slow_loop(shape, power):
    generator = np.random.default_rng(0)
    confidences = generator.beta(*shape, 40)
    confidences[:4] = 0.0, 1.0, 1.0, 0.5  # at the mirrors, too
    hits = generator.random(40) < confidences**power
    assert smooth_ece(confidences, hits) == pytest.approx(slow_smooth_ece(confidences, hits), abs=1e-5)


@pytest.mark.parametrize(
    ("size", "shape", "power", "smooth"),
    [
        (50, 1, 0.6, 0.139806),
        (1000, 0.5, 1, 0.011563),
        (1000, 0.5, 1.5, 0.094406),
        (5000, 0.1, 3, 0.140085),
        (100_000, 1, 1, 0.000866),
    ],
)
def test_smooth_ece_agrees_with_relplot(size, shape, power, smooth):
    """`relplot.smECE` of relplot 1.0.3, which finds sigma to 1e-3 and integrates over 200 points."""
    steps = np.arange(size)
    confidences = ((steps + 0.5) / size) ** shape
    hits = steps * 0.6180339887498949 % 1 < confidences**power
    assert smooth_ece(confidences, hits) == pytest.approx(smooth, abs=5e-4)


@pytest.mark.parametrize(("confidence", "right"), [(0.9, 60), (0.2, 60), (1.0, 0), (0.0, 100), (0.37, 0)])
def test_smooth_ece_of_a_constant_forecast_is_its_gap(confidence, right):
    hits = np.arange(100) < right
    assert smooth_ece(np.full(100, confidence), hits) == pytest.approx(abs(confidence - right / 100), abs=1e-8)


def test_smooth_ece_is_zero_without_a_gap():
    assert smooth_ece(np.full(10, 0.7), np.arange(10) < 7) == 0.0
    assert smooth_ece([1.0, 0.0, 1.0], [1, 0, 1]) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_smooth_ece_lies_between_the_overall_gap_and_the_exact_bins(seed):
    confidences, hits = sample(seed)
    each = sum(abs((confidences - hits)[confidences == level].sum()) for level in np.unique(confidences)) / len(hits)
    found = smooth_ece(confidences, hits)
    assert abs(confidences.mean() - hits.mean()) - 1e-8 <= found <= each + 1e-8


def test_smooth_ece_falls_with_the_rows_if_calibrated():
    generator = np.random.default_rng(0)
    confidences = generator.beta(4, 2, 200_000)
    hits = generator.random(200_000) < confidences
    found = [smooth_ece(confidences[:size], hits[:size]) for size in (200, 200_000)]
    assert found[1] < 0.006 < found[0] < 0.1
    over = generator.random(200_000) < confidences - 0.1
    assert smooth_ece(confidences, over) == pytest.approx(calibration_bins(confidences, over).ece, abs=0.005)


def test_it_is_continuous_where_bins_are_not():
    hits = np.arange(1000) % 2 == 0
    confidences = np.where(hits, 0.5 + 1e-9, 0.5 - 1e-9)
    assert calibration_bins(confidences, hits).ece == pytest.approx(0.5)
    assert smooth_ece(confidences, hits) < 1e-4


FUNCTIONS = [aurc, augrc, smooth_ece, lambda c, h: confidence_for_accuracy(c, h, 0.6)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_order_and_kind_of_the_rows_do_not_matter(function):
    confidences, hits = sample(3, decimals=2)
    confidences = (np.round(confidences * 64) / 64).astype(np.float64)  # the same number in every dtype
    expected = function(confidences, hits)
    assert isinstance(expected, float)
    order = np.random.default_rng(1).permutation(len(hits))
    assert function(confidences[order], hits[order]) == pytest.approx(expected, abs=1e-8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert function(torch.tensor(confidences, dtype=dtype, requires_grad=True), torch.tensor(hits)) == expected
    assert function(confidences.astype(np.float16), hits.astype(float)) == expected
    assert function(confidences.tolist(), hits.astype(int).tolist()) == expected


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("confidences", "hits", "said"),
    [
        ([], [], "`confidences` as numbers of shape (N,) with N >= 1, got float64 of shape (0,)"),
        ([[0.5]], [1], "`confidences` as numbers of shape (N,) with N >= 1, got float64 of shape (1, 1)"),
        (["a"], [1], "`confidences` as numbers"),
        ([0.5, 0.5], [1], "`correct` of shape (2,), got (1,)"),
        ([0.5, 1.1], [1, 0], "`confidences` in [0, 1], got 1.1 in row 1"),
        ([-0.1, 0.5], [1, 0], "`confidences` in [0, 1], got -0.1 in row 0"),
        ([0.5, math.nan], [1, 0], "finite `confidences`, got nan in row 1"),
        ([0.5, 0.5], [1, 2], "`correct` to hold booleans or 0/1, got 2 in row 1"),
        ([0.5, 0.5], [1, math.nan], "finite `correct`, got nan in row 1"),
    ],
)
def test_what_is_refused(function, confidences, hits, said):
    with pytest.raises(ValueError, match=r"^Expected .*\.$") as error:
        function(confidences, hits)
    assert said in str(error.value)


@pytest.mark.parametrize("accuracy", [-0.1, 1.01, math.nan])
def test_an_accuracy_is_a_fraction(accuracy):
    with pytest.raises(ValueError, match=r"Expected `accuracy` in \[0, 1\]"):
        confidence_for_accuracy([0.5], [1], accuracy)


def test_rounding_above_one_is_none():
    assert aurc([1.0 + 5e-7, 1.0], [1, 0]) == aurc([1.0, 1.0], [1, 0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_million_rows_need_little_memory(function):
    generator = np.random.default_rng(0)
    confidences = generator.random(1_000_000)
    hits = generator.random(1_000_000) < confidences
    tracemalloc.start()
    try:
        function(confidences, hits)
        assert tracemalloc.get_traced_memory()[1] < 120e6
    finally:
        tracemalloc.stop()
