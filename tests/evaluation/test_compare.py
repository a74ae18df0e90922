"""Two models on the same images: differences by hand, intervals by a slow loop and by coverage, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from toys import tiny_clip

from carot_hf import Evaluation, Evaluator, compare
from carot_hf.ece.binning import calibration_bins


def evaluation(confidences, hits, name="far", n_bins=10):
    confidences, hits = np.asarray(confidences, float), np.asarray(hits, bool)
    bins = {name: calibration_bins(confidences, hits, n_bins)}
    return Evaluation({}, bins, {}, {}, {name: len(hits)}, rows={name: (confidences, hits)})


def test_a_model_against_itself(suite, processor):
    found = Evaluator(tiny_clip(processor.tokenizer), processor, suite, batch_size=8).evaluate()
    compared = compare(found, found, n_bootstrap=50).differences
    assert compared.keys() == {"validation", "home", "far", "part"}
    assert all(interval == (0.0, 0.0, 0.0) for part in compared.values() for interval in part.values())
    assert "far" in compare(found, found, n_bootstrap=5).table()


def test_differences_and_intervals_of_a_slow_loop():
    rng = np.random.default_rng(3)
    a = evaluation(rng.random(60), rng.random(60) < 0.8)
    b = evaluation(rng.random(60), rng.random(60) < 0.5)
    found = compare(a, b, n_bootstrap=200, seed=5).differences["far"]
    (conf_a, hits_a), (conf_b, hits_b) = a.rows["far"], b.rows["far"]
    draw, drawn = np.random.default_rng(5), []
    for _ in range(200):
        rows = draw.integers(0, 60, 60)
        ece = [calibration_bins(conf[rows], hits[rows]).ece for conf, hits in ((conf_a, hits_a), (conf_b, hits_b))]
        drawn.append((hits_a[rows].mean() - hits_b[rows].mean(), ece[0] - ece[1]))
    measured = {"accuracy": hits_a.mean() - hits_b.mean(), "ece": a.bins["far"].ece - b.bins["far"].ece}
    for row, metric in enumerate(("accuracy", "ece")):
        low, high = np.quantile(np.array(drawn)[:, row], (0.025, 0.975))
        expected = (measured[metric], 2 * measured[metric] - high, 2 * measured[metric] - low)
        assert found[metric] == pytest.approx(expected, abs=1e-12)
    assert compare(a, b, n_bootstrap=200, seed=5).differences == compare(a, b, n_bootstrap=200, seed=5).differences


def test_the_true_difference_is_inside_as_often_as_said():
    """Two models that share which images are hard: accuracy .7 and .8 of the same images; 95 %, within noise of 200."""
    rng, inside = np.random.default_rng(0), 0
    for sample in range(200):
        hard = rng.random(300)
        a, b = (evaluation(np.full(300, level), hard < level) for level in (0.7, 0.8))
        _, low, high = compare(a, b, n_bootstrap=200, seed=sample).differences["far"]["accuracy"]
        inside += low <= -0.1 <= high
    assert inside >= 178


def test_what_is_refused():
    a = evaluation([0.5, 0.6], [1, 0])
    with pytest.raises(ValueError, match=r"evaluations with a set in common, got .*far.* and .*home"):
        compare(a, evaluation([0.5], [1], name="home"))
    with pytest.raises(ValueError, match="the same images in set 'far' of both evaluations, got 2 and 1"):
        compare(a, evaluation([0.5], [1]))
    with pytest.raises(ValueError, match="`n_bootstrap` of at least 1, got 0"):
        compare(a, a, n_bootstrap=0)
    assert compare(a, dataclasses.replace(a)).differences["far"]["ece"][0] == 0.0
