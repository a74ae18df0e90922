"""Figures of groups and of classes: macro-F1, the worst group; by hand, and beside scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from carot_hf import calibration_metrics
from carot_hf.calibration.f1 import macro_f1
from carot_hf.calibration.metrics import GROUP_METRICS, METRICS, read_set, scaled_metrics
from carot_hf.data.groups import Groups, groups_of
from carot_hf.ece.binning import calibration_bins
from carot_hf.evaluation.measure import measure
from carot_hf.evaluation.per_group import group_figures, groups_csv, groups_table


def rows_with(confidences, hits):
    """Logits of two classes with these confidences, and labels that make these hits."""
    top = torch.tensor(confidences, dtype=torch.float64)
    logits = torch.stack([top.log(), (1 - top).log()], dim=1)
    return logits, torch.tensor([0 if hit else 1 for hit in hits])


# ---- macro-F1 ----


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighted", [False, True])
def test_macro_f1_is_scikit_learns_over_the_classes_that_occur(seed, weighted):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 7, 50), rng.integers(0, 9, 50)  # classes 7 and 8 have no rows
    labels[labels == 3] = 4
    weights = rng.random(50) if weighted else None
    expected = f1_score(labels, predicted, average="macro", labels=np.unique(labels), sample_weight=weights)
    assert macro_f1(labels, predicted, 9, weights) == pytest.approx(expected, abs=1e-12)
    logits = 3 * torch.nn.functional.one_hot(torch.tensor(predicted), 9).double()
    found = calibration_metrics(logits, torch.tensor(labels), sample_weight=weights)
    assert found["macro_f1"] == pytest.approx(expected, abs=1e-12)


def test_macro_f1_by_hand():
    """Class 0: 2 rows, 3 taken for it, 2 right: 4 / 5. Class 1: 2 rows, 1 taken for it, 1 right: 2 / 3."""
    assert macro_f1(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), 2) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert macro_f1(np.array([0, 0]), np.array([0, 2]), 3) == pytest.approx(2 / 3)  # 1 and 2 have no rows


# ---- the worst group ----


def test_the_worst_group_by_hand():
    """Group 0: 3 of 4 right at .75, ECE 0. Group 1: 1 of 2 right at .95, ECE .45. Group 3: right at .65, ECE .35."""
    logits, labels = rows_with([0.75] * 4 + [0.95] * 2 + [0.65], [1, 1, 1, 0, 1, 0, 1])
    groups = np.array([0, 0, 0, 0, 1, 1, 3])
    found = calibration_metrics(logits, labels, groups=groups)
    assert found["worst_group_accuracy"] == pytest.approx(0.5)
    assert found["worst_group_ece"] == pytest.approx(0.45)
    plain = calibration_metrics(logits, labels)
    assert {name: found[name] for name in plain} == plain
    assert set(found) - set(plain) == {*GROUP_METRICS}
    other = calibration_metrics(logits, labels, groups=np.array([0, 0, 0, 0, -1, -1, 3]))
    assert (other["worst_group_accuracy"], other["worst_group_ece"]) == (0.75, pytest.approx(0.35))
    none = calibration_metrics(logits, labels, groups=np.full(7, -1))
    assert math.isnan(none["worst_group_accuracy"])
    assert math.isnan(none["worst_group_ece"])


def test_the_worst_group_is_that_of_a_loop_over_the_groups():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 5, generator=generator, dtype=torch.float64) * 2
    labels, groups = torch.randint(0, 5, (300,), generator=generator), np.random.default_rng(0).integers(0, 6, 300)
    apart = [calibration_metrics(logits[groups == g], labels[groups == g], n_bins=7) for g in range(6)]
    found = calibration_metrics(logits, labels, n_bins=7, groups=groups)
    assert found["worst_group_accuracy"] == pytest.approx(min(one["accuracy"] for one in apart), abs=1e-12)
    assert found["worst_group_ece"] == pytest.approx(max(one["ece"] for one in apart), abs=1e-12)
    at = measure(logits, labels, n_bins=7, link="softmax", scalings={"ts": lambda: {"temperature": 3.0}}, groups=groups)
    scaled = [
        calibration_metrics(logits[groups == g], labels[groups == g], n_bins=7, temperature=3.0) for g in range(6)
    ]
    assert at.metrics["worst_group_ece_ts"] == pytest.approx(max(one["ece"] for one in scaled), abs=1e-12)
    assert "worst_group_accuracy_ts" not in at.metrics
    without = measure(logits, labels, n_bins=7, link="softmax", scalings={"ts": lambda: {"temperature": 3.0}})
    assert not [name for name in without.metrics if "group" in name]
    assert set(scaled_metrics(groups=True)) - set(scaled_metrics()) == {"worst_group_ece"}
    assert not METRICS.keys() & GROUP_METRICS.keys()


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([0, 1], {}, r"`groups` as \(3,\) whole numbers"),
        ([0.0, 1.0, 1.0], {}, r"got float64"),
        ([0, -2, 1], {}, r"got int64 of shape \(3,\) from -2"),
        ([0, 0, 1], {"ignore_index": 0}, "Expected no `sample_weight` and no `ignore_index` with `groups`"),
        ([0, 0, 1], {"sample_weight": np.ones(3)}, "Expected no `sample_weight`"),
    ],
)
def test_groups_that_are_none_are_refused(groups, options, message):
    with pytest.raises(ValueError, match=message):
        calibration_metrics(torch.eye(3), torch.arange(3), groups=np.array(groups), **options)
    with pytest.raises(ValueError, match=message):
        read_set(torch.eye(3), torch.arange(3), {"": ({}, None)}, groups=np.array(groups), **options)


def test_groups_of_a_set_are_named_and_in_range():
    groups = Groups(["land", "water"], [0, 1, -1])
    assert groups.of(np.array([1, 0])).codes.tolist() == [1, 0]
    assert groups.facts != Groups(["land", "water"], [0, 1, 0]).facts != Groups(["a", "b"], [0, 1, 0]).facts
    for names, codes, message in (
        (["a", "a"], [0], "distinct names"),
        (["a"], [1], r"in \[-1, 1\), got 1 to 1"),
        (["a"], [[0]], r"of shape \(1, 1\)"),
        ([], [], "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            Groups(names, codes)

    class Set:
        name, groups = "toy", Groups(["a"], [0, 0])

    with pytest.raises(ValueError, match="a group for each of the 3 images of set 'toy', got 2"):
        groups_of(Set, range(3))


def test_figures_of_each_group_are_said_with_their_number():
    confidences, hits = np.array([0.75] * 4 + [0.95] * 2 + [0.65]), np.array([1, 1, 1, 0, 1, 0, 1], bool)
    groups = Groups(["a", "b|c", "none", "d"], [0, 0, 0, 0, 1, 1, 3])
    figures = group_figures(groups, confidences, hits, 10)
    assert [(one.name, one.n) for one in figures] == [("a", 4), ("b|c", 2), ("none", 0), ("d", 1)]
    assert figures[1].ece == pytest.approx(calibration_bins(confidences[4:6], hits[4:6], 10).ece)
    assert groups_csv({"test": figures}) == (
        "set,group,n,accuracy,ece\ntest,a,4,0.7500,0.0000\ntest,b|c,2,0.5000,0.4500\ntest,none,0,,\ntest,d,1,1.0000,0.3500\n"
    )
    lines = groups_table(figures).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["b\\", "a", "d"]
