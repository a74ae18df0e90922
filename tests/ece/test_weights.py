"""Weighted rows and rows that are left out: a row of weight 2 is that row twice, one of weight 0 is not there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from carot_hf import calibration_metrics
from carot_hf.calibration.rows import LogitRows
from carot_hf.ece.binning import BinSums, calibration_bins
from carot_hf.ece.ece import ECE

UNCERTAINTY = {"ece_debiased", "n", "ece_low", "ece_high", "ece_floor", "p_value"}


def sample(rows, classes, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (rows, classes))
    labels = np.where(generator.random(rows) < 0.6, logits.argmax(1), generator.integers(0, classes, rows))
    return logits, labels, generator.integers(0, 4, rows)


def close(found, expected, leave_out=()):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name not in leave_out:
            assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("options", [{}, {"strategy": "quantile", "n_bins": 6}, {"classwise": True, "n_bins": 5}])
def test_the_metric_of_weighted_rows_is_that_of_repeated_rows(classes, options):
    logits, labels, weights = sample(300, classes)
    repeated = np.repeat(np.arange(300), weights)
    found = ECE(from_logits=True, **options).compute(predictions=logits, references=labels, sample_weight=weights)
    expected = ECE(from_logits=True, **options).compute(predictions=logits[repeated], references=labels[repeated])
    close(found, expected, UNCERTAINTY)
    assert (found["n"], expected["n"]) == (int((weights > 0).sum()), int(weights.sum()))


@pytest.mark.parametrize("mode", ["top_label", "positive"])
def test_single_numbers_with_weights(mode):
    generator = np.random.default_rng(3)
    chances, hits, weights = generator.random(200), generator.integers(0, 2, 200), generator.integers(0, 3, 200)
    repeated = np.repeat(np.arange(200), weights)
    found = ECE(mode=mode).compute(predictions=chances, references=hits, sample_weight=weights)
    close(found, ECE(mode=mode).compute(predictions=chances[repeated], references=hits[repeated]), UNCERTAINTY)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [2, 9])
def test_calibration_metrics_of_weighted_rows_are_those_of_repeated_rows(link, classes):
    logits, labels, weights = sample(400, classes, seed=1)
    options = {"temperature": 1.7, "link": link, "n_bins": 12}
    repeated = np.repeat(np.arange(400), weights)
    found = calibration_metrics(logits, labels, sample_weight=weights, **options)
    expected = calibration_metrics(logits[repeated], labels[repeated], **options)
    close(found, expected, {"ece_batch_mean"})
    tensors = calibration_metrics(
        torch.tensor(logits), torch.tensor(labels), sample_weight=torch.tensor(weights), **options
    )
    close(tensors, found)


def test_the_mean_over_batches_by_hand():
    """Batches are of 512 rows as they come; each counts with its weight."""
    logits, labels, _ = sample(700, 3, seed=2)
    weights = np.random.default_rng(5).uniform(0.1, 3, 700)
    parts = [
        (calibration_metrics(logits[at], labels[at], sample_weight=weights[at])["ece"], weights[at].sum())
        for at in (slice(0, 512), slice(512, 700))
    ]
    expected = sum(ece * mass for ece, mass in parts) / weights.sum()
    found = calibration_metrics(logits, labels, sample_weight=weights)["ece_batch_mean"]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weight", [1, 1.0, np.float32(1)])
def test_weights_of_one_change_no_bit(weight):
    logits, labels, _ = sample(257, 5)
    ones = np.full(257, weight)
    assert calibration_metrics(logits, labels, sample_weight=ones) == calibration_metrics(logits, labels)
    options = {"from_logits": True, "n_bootstrap": 20, "bins": True, "classwise": True}
    plain = ECE(**options).compute(predictions=logits, references=labels)
    assert str(ECE(**options).compute(predictions=logits, references=labels, sample_weight=ones)) == str(plain)


def test_only_the_ratio_of_weights_counts():
    logits, labels, _ = sample(200, 4)
    weights = np.random.default_rng(0).uniform(0, 5, 200)
    options = {"from_logits": True, "n_bootstrap": 30}
    first = ECE(**options).compute(predictions=logits, references=labels, sample_weight=weights)
    close(ECE(**options).compute(predictions=logits, references=labels, sample_weight=1000 * weights), first)


def test_two_rows_by_hand():
    """Confidence .8 right with weight 3, .6 wrong with weight 1: ece (3 * .2 + 1 * .6) / 4 = .3."""
    result = ECE(mode="top_label", bins=True).compute(
        predictions=[0.8, 0.6], references=[1, 0], sample_weight=[3.0, 1.0]
    )
    assert result["ece"] == pytest.approx(0.3, abs=1e-12)
    assert (result["accuracy"], result["avg_confidence"]) == pytest.approx((0.75, 0.75), abs=1e-12)
    assert result["rmsce"] == pytest.approx(math.sqrt((3 * 0.04 + 0.36) / 4), abs=1e-12)
    assert result["bins"]["weight"] == [0, 0, 0, 0, 0, 1, 0, 3, 0, 0]
    assert result["bins"]["effective"] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 0]
    assert result["n"] == 2


@pytest.mark.parametrize("seed", range(3))
def test_batches_with_weights_are_one_call(seed):
    logits, labels, weights = sample(300, 4, seed)
    whole = ECE(from_logits=True, classwise=True).compute(predictions=logits, references=labels, sample_weight=weights)
    metric = ECE(from_logits=True, classwise=True)
    metric.add_batch(predictions=logits[:50], references=labels[:50], sample_weight=weights[:50])
    for row in range(50, 60):
        metric.add(prediction=logits[row], reference=labels[row], sample_weight=float(weights[row]))
    ones = np.flatnonzero(weights[60:] == 1) + 60
    others = np.setdiff1d(np.arange(60, 300), ones)
    metric.add_batch(predictions=logits[ones], references=labels[ones])
    metric.add_batch(predictions=logits[others], references=labels[others], sample_weight=weights[others])
    close(metric.compute(), whole)


def test_sums_of_weighted_rows():
    generator = np.random.default_rng(1)
    values, hits, weights = generator.random(5000), generator.random(5000) < 0.5, generator.uniform(0.1, 2, 5000)
    sums = BinSums(10, np.float64)
    sums.add(values[:2000], hits[:2000], weights[:2000])
    sums.add(values[2000:], hits[2000:], weights[2000:])
    expected = calibration_bins(values, hits, sample_weight=weights)
    assert sums.bins().ece == pytest.approx(expected.ece, abs=1e-12)
    assert sums.bins().effective == pytest.approx(expected.effective)
    quantile = calibration_bins(values, hits, 10, "quantile", sample_weight=weights)
    assert sums.adaptive_ece() == pytest.approx(quantile.ece, abs=2e-3)


# ---- rows that are left out ----


@pytest.mark.parametrize("ignored", [-100, 2])
def test_rows_to_ignore_are_left_out(ignored):
    logits, labels, weights = sample(200, 4)
    labels = np.where(np.arange(200) % 5 == 0, ignored, labels)
    kept = labels != ignored
    options = {"from_logits": True, "classwise": True}
    found = ECE(**options, ignore_index=ignored).compute(predictions=logits, references=labels)
    assert found == ECE(**options).compute(predictions=logits[kept], references=labels[kept])
    assert found == ECE(**options).compute(predictions=logits, references=labels, ignore_index=ignored)
    ours = calibration_metrics(logits, labels, ignore_index=ignored, sample_weight=weights)
    close(ours, calibration_metrics(logits[kept], labels[kept], sample_weight=weights[kept]))


def test_rows_to_ignore_may_hold_anything():
    logits, labels, _ = sample(50, 3)
    logits[7], labels[7] = np.nan, -100
    expected = ECE(from_logits=True).compute(predictions=np.delete(logits, 7, 0), references=np.delete(labels, 7))
    assert ECE(from_logits=True, ignore_index=-100).compute(predictions=logits, references=labels) == expected
    assert calibration_metrics(logits, labels, ignore_index=-100)["ece"] == pytest.approx(expected["ece"], abs=1e-12)


def test_a_batch_of_ignored_rows_adds_nothing():
    metric = ECE(mode="top_label", ignore_index=-100)
    metric.add_batch(predictions=[0.5], references=[-100])
    assert len(metric) == 0
    metric.add(prediction=0.7, reference=1)
    metric.add(prediction=0.7, reference=-100)
    assert metric.compute()["n"] == 1


def test_logits_that_are_computed_are_read_in_parts():
    logits, labels, weights = sample(9000, 50)
    reads = []

    class Lazy(LogitRows):
        shape, dtype, device = (9000, 50), torch.float64, torch.device("cpu")

        def __getitem__(self, rows):
            part = torch.from_numpy(logits)[rows]
            reads.append(len(part))
            return part

    found = calibration_metrics(Lazy(), labels, sample_weight=weights)
    close(found, calibration_metrics(logits, labels, sample_weight=weights))
    assert max(reads) < 6000


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1, -1], r"finite `sample_weight` of at least 0, got -1\.0 in row 2"),
        ([1, math.nan, 1], r"got nan in row 1"),
        ([1, 1], r"`sample_weight` of shape \(3,\), got \(2,\)"),
        ([0, 0, 0], r"a `sample_weight` above 0, got 0 for all rows"),
        (["a", "b", "c"], r"numbers as `sample_weight`"),
    ],
)
def test_weights_that_are_refused(weights, message):
    rows = np.log([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    with pytest.raises(ValueError, match=message):
        ECE(from_logits=True).compute(predictions=rows, references=[0, 1, 0], sample_weight=weights)
    with pytest.raises(ValueError, match=message):
        calibration_metrics(rows, np.array([0, 1, 0]), sample_weight=weights)


def test_one_hot_rows_are_refused_before_any_is_ignored():
    with pytest.raises(ValueError, match="got one-hot rows"):
        calibration_metrics(np.log([[0.6, 0.4], [0.5, 0.5]]), np.eye(2, dtype=int), ignore_index=1)


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match=r"other than `ignore_index` 1 and a `sample_weight` above 0, got none"):
        ECE(from_logits=True).compute(predictions=np.log([[0.6, 0.4]]), references=[1], ignore_index=1)
    with pytest.raises(ValueError, match="got none"):
        calibration_metrics(np.log([[0.6, 0.4]]), np.array([1]), ignore_index=1)
    for ignored in (True, 1.5, "x"):
        with pytest.raises(ValueError, match="Expected `ignore_index` to be a whole number"):
            ECE(ignore_index=ignored)


def test_the_interval_of_weighted_rows_takes_them_as_rows():
    """Twice the weight for all changes nothing; a heavy row widens it."""
    logits, labels, _ = sample(400, 3)
    draws = {"from_logits": True, "n_bootstrap": 400}
    plain = ECE(**draws).compute(predictions=logits, references=labels)
    twice = ECE(**draws).compute(predictions=logits, references=labels, sample_weight=np.full(400, 2.0))
    for name in ("ece_low", "ece_high", "ece_debiased"):
        assert twice[name] == pytest.approx(plain[name], abs=1e-12)
    heavy = np.where(np.arange(400) % 20 == 0, 50.0, 1.0)
    wide = ECE(**draws).compute(predictions=logits, references=labels, sample_weight=heavy)
    assert wide["ece_high"] - wide["ece_low"] > 1.5 * (plain["ece_high"] - plain["ece_low"])
    assert wide["ece_low"] <= wide["ece"] <= wide["ece_high"]
