"""Accuracy without labels: by hand, against loops, and how often an interval holds the truth where nothing shifted."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from carot_hf.calibration.estimate import METHODS, estimate_accuracy, estimate_interval, share_beyond

HOME, HITS, AWAY = [0.9, 0.8, 0.6, 0.4], [1, 1, 0, 1], [0.95, 0.5, 0.3, 0.7]


def test_by_hand():
    """One error: the threshold is the confidence number 1 from below, counted from 0, .6."""
    assert estimate_accuracy(HOME, HITS, AWAY, method="atc") == 0.5
    assert estimate_accuracy(HOME, HITS, AWAY) == pytest.approx(0.6125, abs=1e-15)
    assert estimate_accuracy(HOME, HITS, [0.6], method="atc") == 1.0  # at the threshold is above it
    assert estimate_accuracy(HOME, HITS, [np.nextafter(0.6, 0)], method="atc") == 0.0
    assert estimate_accuracy(HOME, [1, 1, 1, 1], [0.4, 0.39], method="atc") == 0.5
    assert estimate_accuracy(HOME, [0, 0, 0, 1], [0.9, 0.8], method="atc") == 0.5
    assert estimate_accuracy(HOME, [0, 0, 0, 0], [1.0, 1.0], method="atc") == 0.0


def slow_atc(home, hits, away):
    errors = sum(not hit for hit in hits)
    if errors == len(hits):
        return 0.0
    threshold = sorted(home)[errors]
    return sum(confidence >= threshold for confidence in away) / len(away)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("decimals", [1, 15])
def test_atc_agrees_with_a_loop(seed, decimals):
    generator = np.random.default_rng(seed)
    home, away = generator.random(37).round(decimals), generator.random(51).round(decimals)
    hits = generator.random(37) < home
    assert estimate_accuracy(home, hits, away, method="atc") == slow_atc(home, hits, away)
    if decimals == 15:  # without ties it gives the accuracy of the validation rows themselves
        assert estimate_accuracy(home, hits, home, method="atc") == pytest.approx(hits.mean(), abs=1e-12)
    assert estimate_accuracy(home, hits, away) == pytest.approx(sum(away) / 51, abs=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_order_and_kind_of_the_rows_do_not_matter(method):
    generator = np.random.default_rng(0)
    home, away = generator.integers(0, 65, 40) / 64, generator.integers(0, 65, 30) / 64  # the same in every dtype
    hits = generator.random(40) < home
    expected = estimate_accuracy(home, hits, away, method=method)
    order = generator.permutation(40)
    assert estimate_accuracy(home[order], hits[order], away[::-1], method=method) == pytest.approx(expected, abs=1e-15)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for other in (torch.float16, torch.float64):
            tensors = torch.tensor(home, dtype=dtype), torch.tensor(hits), torch.tensor(away, dtype=other)
            assert estimate_accuracy(*tensors, method=method) == expected
    assert isinstance(expected, float)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_inside_its_interval(method, seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 30, 2)
    home, away = generator.random(sizes[0]), generator.random(sizes[1])
    hits = generator.random(sizes[0]) < home
    estimate = estimate_accuracy(home, hits, away, method=method)
    for draws, level in ((1, 0.95), (50, 0.01), (200, 0.95)):
        options = {"method": method, "n_bootstrap": draws, "confidence_level": level, "seed": seed}
        low, high = estimate_interval(home, hits, away, **options)
        assert 0 <= low <= estimate <= high <= 1
        assert (low, high) == estimate_interval(home, hits, away, **options)


def slow_interval(home, hits, away, method, draws):
    """Rows of both sets drawn with replacement, one draw after the other."""
    generator = np.random.default_rng(99)
    found = []
    for _ in range(draws):
        ours, theirs = generator.integers(0, len(home), len(home)), generator.integers(0, len(away), len(away))
        found.append(estimate_accuracy(home[ours], hits[ours], away[theirs], method=method))
    return np.quantile(found, (0.025, 0.975))


@pytest.mark.parametrize("method", METHODS)
def test_the_interval_is_that_of_both_sets_drawn_anew(method):
    generator = np.random.default_rng(4)
    home, away = generator.beta(4, 2, 120), generator.beta(3, 2, 200)
    hits = generator.random(120) < home
    found = estimate_interval(home, hits, away, method=method, n_bootstrap=3000)
    assert found == pytest.approx(tuple(slow_interval(home, hits, away, method, 3000)), abs=0.012)


@pytest.mark.parametrize("method", METHODS)
def test_without_shift_the_interval_holds_the_accuracy(method):
    """Of 120 samples; a share of .95 gives fewer than 106 in 1 of 1,000 studies."""
    held = 0
    for seed in range(120):
        generator = np.random.default_rng(seed)
        home, away = generator.beta(4, 2, 300), generator.beta(4, 2, 500)
        hits = generator.random(300) < home
        low, high = estimate_interval(home, hits, away, method=method, n_bootstrap=200, seed=seed)
        held += low <= 4 / 6 <= high  # the mean of the distribution
    assert held >= 106


def test_the_validation_rows_are_drawn_with_their_hits():
    """Where confidence tells right from wrong, the threshold lies between them in every draw."""
    home = np.linspace(0.01, 0.99, 99)[np.random.default_rng(0).permutation(99)]
    away = np.linspace(0, 1, 20_000)
    low, high = estimate_interval(home, home > 0.4, away, method="atc", n_bootstrap=300)
    assert 0.5 < low < 0.59 < high < 0.61


def test_the_interval_knows_of_both_sets():
    generator = np.random.default_rng(1)
    few, many = generator.beta(4, 2, 100), generator.beta(4, 2, 10_000)
    sure = partial(estimate_interval, method="atc", n_bootstrap=300)
    hits = {len(rows): generator.random(len(rows)) < rows for rows in (few, many)}
    widths = [np.ptp(sure(a, hits[len(a)], b)) for a, b in ((many, many), (few, many), (many, few), (few, few))]
    assert widths[0] < 0.03 < min(widths[1:3])
    assert widths[3] == pytest.approx(math.hypot(*widths[1:3]), rel=0.3)


def test_shares_beyond_a_quantile():
    home = np.arange(101)
    assert share_beyond(home, [98.9, 99.0, 99.1, 200.0]) == 0.5  # strictly above 99
    assert share_beyond(home, [50, 51, -3, 7], quantile=0.5) == 0.25
    assert share_beyond(home / 10, torch.tensor([5.25, 4.0], dtype=torch.bfloat16), 0.5) == 0.5
    assert share_beyond([0.1] * 7, [0.1] * 3, 0.9) == 0.0
    rows = np.random.default_rng(0).normal(size=(2, 20_000))
    assert share_beyond(*rows) == pytest.approx(0.01, abs=0.004)
    assert share_beyond(rows[0], rows[0]) == pytest.approx(0.01, abs=1e-9)


@pytest.mark.parametrize("function", [estimate_accuracy, partial(estimate_interval, n_bootstrap=2)])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (([], [], AWAY), "`validation_confidences` as numbers of shape (N,)"),
        ((HOME, HITS[:3], AWAY), "`validation_correct` of shape (4,), got (3,)"),
        ((HOME, [1, 1, 0, 3], AWAY), "`validation_correct` to hold booleans or 0/1, got 3 in row 3"),
        (([0.9, 0.8, 0.6, 1.4], HITS, AWAY), "`validation_confidences` in [0, 1], got 1.4 in row 3"),
        ((HOME, HITS, []), "`confidences` as numbers of shape (N,) with N >= 1"),
        ((HOME, HITS, [0.3, -0.2]), "`confidences` in [0, 1], got -0.2 in row 1"),
        ((HOME, HITS, [0.3, math.inf]), "finite `confidences`, got inf in row 1"),
    ],
)
def test_what_is_refused(function, rows, said):
    for method in METHODS:
        with pytest.raises(ValueError, match=r"^Expected .*\.$") as error:
            function(*rows, method=method)
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "doc"}, r"Expected `method` to be one of \('mean', 'atc'\), got 'doc'"),
        ({"n_bootstrap": 0}, "Expected `n_bootstrap` to be an integer of at least 1, got 0"),
        ({"n_bootstrap": 2.5}, "Expected `n_bootstrap` to be an integer"),
        ({"n_bootstrap": True}, "Expected `n_bootstrap` to be an integer"),
        ({"confidence_level": 95}, "Expected `confidence_level` between 0 and 1, got 95"),
    ],
)
def test_options(options, said):
    with pytest.raises(ValueError, match=said):
        estimate_interval(HOME, HITS, AWAY, **options)


@pytest.mark.parametrize(
    ("home", "away", "quantile", "said"),
    [
        ([1.0], [1.0], 1.0, "Expected `quantile` between 0 and 1, got 1.0"),
        ([1.0], [1.0], 99, "Expected `quantile` between 0 and 1, got 99"),
        ([], [1.0], 0.9, "Expected `home` as numbers"),
        ([1.0], [[1.0]], 0.9, "Expected `away` as numbers"),
        ([math.nan], [1.0], 0.9, "Expected finite `home`, got nan in row 0"),
    ],
)
def test_what_a_share_refuses(home, away, quantile, said):
    with pytest.raises(ValueError, match=said):
        share_beyond(home, away, quantile)
