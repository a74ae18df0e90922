"""The metric of evaluate: published values, slow loops, all kinds of input, good and bad, and loading from anywhere."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tracemalloc

import datasets
import numpy as np
import pytest
import reference_calibration as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ROOT

from carot_hf import calibration_metrics, load_ece
from carot_hf.ece.binning import calibration_bins
from carot_hf.ece.ece import ECE
from carot_hf.ece.uncertainty import debiased_ece

SIX_ROWS = [[0.31, 0.32, 0.27], [0.37, 0.33, 0.30], [0.30, 0.31, 0.39], [0.61, 0.38, 0.01], [0.10, 0.65, 0.25]]
SIX_ROWS += [[0.91, 0.05, 0.04]]
EIGHT, EIGHT_LABELS = [0.51, 0.45, 0.39, 0.66, 0.68, 0.29, 0.81, 0.85], [0, 0, 0, 1, 0, 1, 1, 1]
FOUR_ROWS = [[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]]
ROWS, LABELS = [[0.6, 0.4], [0.3, 0.7], [0.8, 0.2]], [0, 1, 1]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Nothing is written into the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))
        yield


def compute(predictions, references, **options):
    return ECE().compute(predictions=predictions, references=references, **options)


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def sample(n=300, classes=5, seed=0, scale=2.0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, classes)) * scale
    return logits, np.array([generator.choice(classes, p=p) for p in softmax(logits / 1.5)])


# ---- values ----


@pytest.mark.parametrize(
    ("rows", "labels", "n_bins", "ece"),
    [
        ([[1 - p, p] for p in EIGHT], EIGHT_LABELS, 10, 0.145),
        ([[0.3, 0.7], [0.9, 0.1], [0.4, 0.6]], [1, 0, 0], 3, 1 / 3),
        (FOUR_ROWS, [0, 1, 2, 0], 3, 0.2),
        ([[0.6, 0.2, 0.2]] * 10, [0] * 6 + [1] * 2 + [2] * 2, 10, 0.0),
        ([[0.6, 0.2, 0.2], [0.0, 0.95, 0.05], [0.7, 0.1, 0.2]], [0, 1, 2], 10, 0.3833333333333333),
    ],
)
def test_published_rows(rows, labels, n_bins, ece):
    assert compute(rows, labels, n_bins=n_bins)["ece"] == pytest.approx(ece, abs=1e-12)


def test_a_published_example_whose_first_row_sums_to_nine_tenths():
    labels = [1, 0, 0, 1, 0, 0]
    assert compute(SIX_ROWS, labels, check_sums=False)["ece"] == pytest.approx(0.3783333333333333, abs=1e-12)
    with pytest.raises(ValueError, match=r"got 0\.9 in row 0.*check_sums=False"):
        compute(SIX_ROWS, labels)


@pytest.mark.parametrize(
    ("positive", "labels", "n_bins", "ece"),
    [(EIGHT, EIGHT_LABELS, 10, 0.3425), ([1, 1, 1, 1, 0], [0, 0, 1, 1, 1], 2, 0.6), ([0.95, 1.0], [1, 0], 10, 0.475)],
)
def test_published_probabilities_of_class_1(positive, labels, n_bins, ece):
    assert compute(positive, labels, n_bins=n_bins, mode="positive")["ece"] == pytest.approx(ece, abs=1e-12)


def test_all_numbers_of_a_table_worked_by_hand():
    result = compute(FOUR_ROWS, [0, 1, 2, 0], n_bins=3, bins=True, classwise=True)
    table = result.pop("bins")
    p_label = [0.25, 0.05, 0.6, 0.9]
    brier = [0.75**2 + 0.2**2 + 0.55**2, 0.55**2 + 0.95**2 + 0.4**2, 0.1**2 + 0.3**2 + 0.4**2, 0.1**2 + 2 * 0.05**2]
    s = math.sqrt(1 / 3 * 2 / 3 / 3)  # of the bin with 3 rows; the other one has no noise
    z = 0.7 / 3 / s
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(z**2) / 2) + 0.7 / 3 * (1 - 2 * 0.5 * math.erfc(z / math.sqrt(2)))
    classwise = [  # sums of 1[y = k] - p_k in the bins (0, 1/3], (1/3, 2/3], (2/3, 1]
        abs(1 - 0.35) + abs(0 - 0.55) + abs(1 - 0.9),
        abs(1 - 0.6),
        abs(0 - 0.05) + abs(1 - 1.55),
    ]
    assert result == pytest.approx(
        {
            "ece": 0.2,
            "mce": 0.7 / 3,
            "rmsce": 0.20816659994661327,
            "ece_debiased": 0.2 - 3 / 4 * (folded - 0.7 / 3),
            "adaptive_ece": 0.15 + 0.2 * 0 + abs(0.55 + 0.55 - 0) / 4 + 0.4 / 4 + 0.1 / 4 - 0.15,
            "accuracy": 0.5,
            "avg_confidence": 0.6625 - 0.0125,
            "overconfidence": 0.15,
            "n": 4,
            "n_bins": 3,
            "nll": -sum(map(math.log, p_label)) / 4,
            "brier": sum(brier) / 4,
            "classwise_ece": sum(classwise) / 12,
        },
        abs=1e-12,
    )
    assert {type(value) for value in result.values()} == {float, int}
    assert (table["count"], table["edges"]) == ([0, 3, 1], [0, 1 / 3, 2 / 3, 1])
    assert table["confidence"] == pytest.approx([math.nan, 1.7 / 3, 0.9], nan_ok=True)
    assert table["accuracy"] == pytest.approx([math.nan, 1 / 3, 1], nan_ok=True)
    assert table["gap"] == pytest.approx([math.nan, 0.7 / 3, -0.1], nan_ok=True)
    json.dumps(table)


def test_keys_follow_the_input_and_the_request():
    always = {"ece", "mce", "rmsce", "ece_debiased", "adaptive_ece", "accuracy", "avg_confidence", "overconfidence"}
    always |= {"n", "n_bins"}
    assert set(compute([0.4, 0.9], [1, 1], mode="top_label")) == always
    assert set(compute([0.4, 0.9], [1, 1], mode="positive")) == always | {"nll", "brier", "positive_rate"}
    assert set(compute(ROWS, LABELS)) == always | {"nll", "brier"}
    drawn = {"ece_low", "ece_high", "ece_floor", "p_value"}
    requested = compute(ROWS, LABELS, bins=True, classwise=True, n_bootstrap=5)
    assert set(requested) == always | {"nll", "brier", "bins", "classwise_ece"} | drawn


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_agrees_with_calibration_metrics_and_slow_loops(classes, temperature):
    logits, labels = sample(200, classes)
    options = {"n_bins": 7, "temperature": temperature}
    ours = compute(logits, labels, from_logits=True, classwise=True, **options)
    theirs = calibration_metrics(logits, labels, **options)
    shared = ours.keys() & theirs.keys()
    assert shared >= {"accuracy", "ece", "mce", "nll", "brier", "adaptive_ece", "classwise_ece", "overconfidence"}
    slow = reference.metrics(logits, labels, 7, temperature)
    for name in shared:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-12), name
        assert ours[name] == pytest.approx(slow[name], abs=1e-12), name
    probabilities = compute(softmax(logits / temperature), labels, n_bins=7, classwise=True)
    assert probabilities == pytest.approx(ours, abs=1e-12)


def test_more_rows_than_one_chunk_holds():
    logits, labels = sample(700, 400)
    slow = calibration_metrics(logits, labels)
    for result in (
        compute(logits, labels, from_logits=True, classwise=True),
        compute(softmax(logits), labels, classwise=True),
    ):
        for name in result.keys() & slow.keys():
            assert result[name] == pytest.approx(slow[name], abs=1e-12), name


def test_edges_hold_in_each_dtype():
    """Tenths as confidences, each alone in the bin that it ends: the value is that of exact arithmetic."""
    hits = [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    exact = sum(abs(i / 10 - hit) for i, hit in enumerate(hits, 1)) / 10
    for dtype in (np.float64, np.float32, np.float16):
        values = np.arange(1, 11).astype(np.float64) / 10
        result = compute(values.astype(dtype), hits, mode="top_label", bins=True)
        assert result["bins"]["count"] == [1] * 10
        assert result["ece"] == pytest.approx(exact, abs=1e-3)
        rows = np.array([[0.6, 0.4], [0.3, 0.7]]).astype(dtype)  # float16 has .60010 and .70020, and edges to match
        assert compute(rows, [0, 1], bins=True)["bins"]["count"] == [0] * 5 + [1, 1] + [0] * 3


def test_the_first_of_equal_classes_is_predicted():
    assert compute([[0.4, 0.4, 0.2]], [0])["accuracy"] == 1
    assert compute([[0.4, 0.4, 0.2]], [1])["accuracy"] == 0
    near = np.linspace(1.91, 1.99, 50, dtype=np.float32)
    logits = np.stack([near, np.nextafter(near, np.float32(2))], axis=1)
    scaled = logits / np.float32(1.9)
    assert (scaled[:, 0] == scaled[:, 1]).any()  # dividing makes some of them equal
    assert compute(logits, [1] * 50, from_logits=True, temperature=1.9)["accuracy"] == 1


def test_rows_without_a_chance_and_rows_far_apart():
    assert compute([[1.0, 0.0]], [1])["nll"] == math.inf
    far = compute(np.array([[0.0, 3e38, -3e38]], np.float32), [0], from_logits=True)
    assert far["avg_confidence"] == 1
    assert far["nll"] == pytest.approx(3e38)


def test_quantile_bins_keep_ties_together():
    result = compute([0.5] * 6 + [0.8] * 2, [1, 0, 1, 0, 1, 1, 1, 0], mode="top_label", strategy="quantile", n_bins=4)
    assert result["n_bins"] == 2
    assert result["ece"] == pytest.approx(6 / 8 * abs(0.5 - 4 / 6) + 2 / 8 * 0.3)
    assert result["adaptive_ece"] == result["ece"]


# ---- inputs ----


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("from_logits", [True, False])
def test_every_dtype_in_numpy_and_torch(dtype, from_logits):
    logits, labels = sample(150, 6)
    tenths = softmax(logits).max(axis=1) * 10
    away = np.abs(tenths - np.rint(tenths)) > 0.05  # from the edges, which go with the dtype
    logits, labels = logits[away], labels[away]
    tensor = torch.tensor(logits if from_logits else softmax(logits), dtype=getattr(torch, dtype))
    exact = compute(tensor.double().numpy(), labels, from_logits=from_logits, check_sums=False)
    result = compute(tensor, torch.tensor(labels), from_logits=from_logits)
    assert result == pytest.approx(exact, rel=1e-5, abs=1e-6)
    if dtype != "bfloat16":
        assert compute(tensor.numpy(), labels.astype(np.int32), from_logits=from_logits) == result


def test_lists_graphs_layouts_and_lists_of_tensors():
    logits, labels = sample(40, 3)
    expected = compute(logits, labels, from_logits=True)
    tensor = torch.tensor(logits, requires_grad=True)
    untouched = logits.copy()
    for rows, targets in (
        (logits.tolist(), labels.tolist()),
        (tensor, torch.tensor(labels, dtype=torch.int16)),
        (list(tensor), list(torch.tensor(labels))),
        (np.asfortranarray(logits), tuple(labels.tolist())),
        (np.repeat(logits, 2, axis=0)[::2], np.repeat(labels, 2)[::2].astype(np.uint8)),
    ):
        assert compute(rows, targets, from_logits=True) == expected
    np.testing.assert_array_equal(logits, untouched)
    assert compute([torch.tensor([0.5, 0.5]).bfloat16()], [0])["accuracy"] == 1


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_tensors_of_any_device(device):
    logits, labels = sample(40, 3)
    there = torch.tensor(logits, device=device), torch.tensor(labels, device=device)
    assert compute(*there, from_logits=True) == compute(logits, labels, from_logits=True)


def test_the_two_meanings_of_one_dimension_differ_and_must_be_named():
    values, labels = [0.9, 0.6, 0.8, 0.7], [1, 0, 1, 1]
    with pytest.raises(ValueError, match=r'explicit `mode`.*"top_label".*"positive"'):
        compute(values, labels)
    rows = [[0.1, 0.9], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]]
    positive = [row[1] for row in rows]
    assert compute(positive, [1, 1, 1, 1], mode="positive")["ece"] == pytest.approx(0.35)
    hits = [True, True, True, False]
    top = compute([max(row) for row in rows], hits, mode="top_label")
    full = compute(rows, [1, 1, 1, 1], mode="top_label")
    assert {**full, **top} == full
    assert full == compute(rows, [1, 1, 1, 1])


def test_whole_numbers_are_probabilities_too():
    assert compute([[1, 0], [0, 1]], [0, 1])["ece"] == 0
    assert compute([1, 0], [1.0, 0.0], mode="positive")["ece"] == 0


BAD_INPUTS = {
    "nan": ([[0.6, 0.4], [math.nan, 0.5]], [0, 1], {}, r"finite.*got nan in row 1, column 0.*diverged"),
    "inf": ([[0.6, 0.4], [0.1, math.inf]], [0, 1], {}, r"finite.*got inf in row 1, column 1"),
    "nan logit": ([[6, 4], [math.nan, 5]], [0, 1], {"from_logits": True}, r"finite.*got nan in row 1, column 0"),
    "inf logit": ([[6, 4], [-math.inf, 5]], [0, 1], {"from_logits": True}, r"got -inf in row 1, column 0"),
    "nan confidence": ([0.5, math.nan], [0, 1], {"mode": "top_label"}, r"finite.*got nan in row 1"),
    "logits": ([[0.6, 0.4], [3.5, -1.0]], [0, 1], {}, r"got 3\.5 in row 1, column 0.*logits: pass from_logits=True"),
    "negative": ([[0.6, 0.4], [-0.1, 1.1]], [0, 1], {}, r"got -0\.1 in row 1, column 0.*from_logits=True"),
    "logits in 1-D": ([0.5, 2.5], [0, 1], {"mode": "positive"}, r"got 2\.5 in row 1.*sigmoid"),
    "sum": ([[0.6, 0.4], [0.6, 0.41]], [0, 1], {}, r"sum to 1.*got 1\.01 in row 1.*check_sums=False"),
    "label too large": (ROWS, [0, 1, 2], {}, r"\[0, 2\), got 2 in row 2.*columns"),
    "label -100": (ROWS, [0, -100, 1], {}, r"\[0, 2\), got -100 in row 1.*Leave out"),
    "float labels": (ROWS, [0.0, 1.0, 1.0], {}, r"integer dtype, got float64 \(0\.0 in row 0\).*astype"),
    "broken label": (ROWS, [0, 1, 0.5], {}, r"integer dtype, got float64 \(0\.5 in row 2\).*astype"),
    "nan label": (ROWS, [0, math.nan, 1], {}, r"integer dtype, got float64 \(nan in row 1\)"),
    "words": (ROWS, ["a", "b", "c"], {}, r"integer dtype, got names \('a' in row 0\)\. Pass class indices: `\[names"),
    "one-hot": (ROWS, [[1, 0], [0, 1], [0, 1]], {}, r"one-hot rows of shape \(3, 2\).*argmax"),
    "lengths": (ROWS, [0, 1], {}, r"shape \(3,\), got \(2,\).*each row"),
    "rank of labels": (ROWS, [[0], [1], [1]], {}, r"shape \(3,\), got \(3, 1\)"),
    "rank": ([[ROWS]], [0], {}, r"\(N, K\) or \(N,\), got \(1, 1, 3, 2\)"),
    "a number": (0.5, 1, {"mode": "positive"}, r"\(N, K\) or \(N,\), got \(\)"),
    "ragged": ([[0.5, 0.5], [1.0]], [0, 0], {}, r"`predictions` with rows of one length"),
    "no rows": ([], [], {}, r"at least one row, got 0"),
    "no rows of K": (np.zeros((0, 3)), [], {}, r"at least one row, got 0"),
    "one class": ([[1.0], [1.0]], [0, 0], {}, r'K >= 2, got \(2, 1\).*mode="positive"'),
    "strings": ([["a", "b"]], [0], {}, r"float dtype, got <U1"),
    "complex": ([[1j, 0.5]], [0], {}, r"float dtype, got complex128"),
    "classes as hits": ([0.5, 0.6], [0, 3], {"mode": "top_label"}, r"0 and 1.*got 3 in row 1.*predicted == labels"),
    "positive in 2-D": (ROWS, LABELS, {"mode": "positive"}, r"shape \(N,\).*predictions\[:, 1\]"),
    "logits in a row": ([0.5], [1], {"mode": "positive", "from_logits": True}, r"\(N, K\) with from_logits=True"),
    "classwise in 1-D": ([0.5], [1], {"mode": "positive", "classwise": True}, r"with classwise=True"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_name_row_value_and_cure(name):
    predictions, references, options, message = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=message) as caught:
        compute(predictions, references, **options)
    assert str(caught.value).count(". ") >= 1  # expected and got, then the cure
    assert str(caught.value).startswith("Expected ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bins": 0}, "n_bins.*at least 1, got 0"),
        ({"n_bins": 2.5}, "n_bins.*got 2.5"),
        ({"strategy": "equal"}, "strategy.*got 'equal'"),
        ({"mode": "argmax"}, "mode.*got 'argmax'"),
        ({"temperature": 2.0}, "no `temperature` with probabilities, got 2.0"),
        ({"temperature": 0.0, "from_logits": True}, "above 0, got 0.0"),
        ({"temperature": -1.0, "from_logits": True}, "above 0, got -1.0"),
        ({"temperature": math.nan, "from_logits": True}, "above 0, got nan"),
        ({"n_bootstrap": -1}, "n_bootstrap.*got -1"),
        ({"n_bootstrap": True}, "n_bootstrap.*got True"),
        ({"confidence_level": 95}, "confidence_level.*got 95.*0.95"),
    ],
)
def test_bad_options_fail_in_compute_and_at_load(options, message):
    with pytest.raises(ValueError, match=message):
        compute(ROWS, LABELS, **options)
    with pytest.raises(ValueError, match=message):
        ECE(**options)


def test_misspelt_options_and_many_processes_are_refused():
    with pytest.raises(TypeError, match=r"from_logits.*got 'from_logit'.*spelling"):
        ECE(from_logit=True)
    with pytest.raises(ValueError, match=r"num_process.*got 2.*Gather"):
        ECE(num_process=2)
    with pytest.raises(ValueError, match="got no references"):
        ECE().compute(predictions=ROWS)
    with pytest.raises(ValueError, match="at least one row, got none"):
        ECE().compute()


def test_a_row_far_down_is_named_by_its_own_number():
    rows = np.full((70_000, 4), 0.25, np.float32)
    rows[66_001] = [0.3, 0.3, 0.3, 0.3]
    with pytest.raises(ValueError, match="in row 66001"):
        compute(rows, np.zeros(70_000, int))
    rows[66_001] = [2, 0, 0, 0]
    with pytest.raises(ValueError, match="in row 66001, column 0"):
        compute(rows, np.zeros(70_000, int))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-3), ("float32", 1e-3), ("float16", 5e-3), ("bfloat16", 2e-2)]
)
def test_how_far_row_sums_may_be_off(dtype, tolerance):
    """Eight classes of 1/8, and one of them moved by a little less or more than the tolerance."""
    for factor, fails in ((0.6, False), (1.6, True)):
        rows = torch.full((1, 8), 0.125, dtype=getattr(torch, dtype))
        rows[0, 0] += factor * tolerance
        if fails:
            with pytest.raises(ValueError, match=f"within {tolerance:g} for {dtype}"):
                compute(rows, [0])
        else:
            compute(rows, [0])


@pytest.mark.parametrize(
    ("dtype", "over"), [("float64", 1e-7), ("float32", 2.0**-23), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)]
)
def test_rounding_outside_the_unit_interval_is_clipped(dtype, over):
    rows = torch.tensor([[1.0 + over, -over / 64], [0.5, 0.5]], dtype=getattr(torch, dtype))
    assert float(rows[0, 0]) > 1
    result = compute(rows, [0, 0])
    assert result["avg_confidence"] == 0.75
    assert result["brier"] == 0.25
    assert result["nll"] == pytest.approx(math.log(2) / 2)
    assert compute(rows[:, 0], [1, 0], mode="top_label")["avg_confidence"] == 0.75
    assert compute([[1.0, -1e-9]], [1])["nll"] == math.inf  # not the logarithm of a negative number


# ---- what others get wrong ----


def test_confidence_1_is_in_the_last_bin():
    """9 right at .92 and 1 wrong at 1.0 share the bin (.9, 1]; an extra bin for 1.0 gives .172."""
    confidences, hits = [0.92] * 9 + [1.0], [1] * 9 + [0]
    result = compute(confidences, hits, mode="top_label", bins=True)
    assert result["ece"] == pytest.approx(abs(0.928 - 0.9), abs=1e-12)
    assert (result["n_bins"], len(result["bins"]["count"])) == (10, 10)
    apart = 0.9 * abs(0.92 - 1) + 0.1 * 1
    assert apart == pytest.approx(0.172)


def test_one_label_and_ties_are_no_obstacle():
    for strategy in ("uniform", "quantile"):
        assert compute([[0.7, 0.2, 0.1]] * 6, [0] * 6, strategy=strategy)["ece"] == pytest.approx(0.3)


# ---- how far to trust it ----


def test_debiased_ece_is_the_limit_of_resampling_it():
    """The published code draws accuracies at random and takes the mean; the closed form is where this goes."""
    logits, labels = sample(120, 3)
    bins = calibration_bins(softmax(logits).max(1), softmax(logits).argmax(1) == labels, 10)
    filled = bins.count > 0
    weights, accuracy = bins.count[filled] / bins.n, bins.accuracy[filled]
    deviation = np.sqrt(accuracy * (1 - accuracy) / bins.count[filled])
    draws = np.random.default_rng(0).normal(accuracy, deviation, (200_000, filled.sum()))
    mean = (np.abs(draws - bins.confidence[filled]) @ weights).mean()
    assert debiased_ece(bins) == pytest.approx(2 * bins.ece - mean, abs=2e-4)


def test_debiasing_removes_two_fifths_of_the_bias_of_a_calibrated_model():
    """Not more: the true gap is 0, and the estimate takes the spread around the measured one."""
    generator = np.random.default_rng(0)
    measured = []
    for _ in range(200):
        confidences = generator.uniform(0.3, 1, 400)
        result = compute(confidences, generator.random(400) < confidences, mode="top_label")
        measured.append((result["ece"], result["ece_debiased"]))
    plain, debiased = np.mean(measured, axis=0)
    assert plain > 0.03
    assert 0.5 * plain < debiased < 0.65 * plain


def test_floor_interval_and_p_value():
    generator = np.random.default_rng(1)
    confidences = generator.uniform(0.4, 1, 500)
    luck = generator.random(500)
    draws = {"mode": "top_label", "n_bootstrap": 400}
    good = compute(confidences, luck < confidences, **draws)
    bad = compute(confidences, luck < confidences - 0.2, **draws)
    # closed form of the floor: each bin's gap is normal, so the mean of its size is deviation * sqrt(2 / pi)
    bins = calibration_bins(confidences, luck < confidences)
    variance = [confidences[(confidences > lo) & (confidences <= lo + 0.1)] for lo in np.arange(10) / 10]
    floor = sum(math.sqrt((c * (1 - c)).sum() * 2 / math.pi) for c in variance) / bins.n
    assert good["ece_floor"] == pytest.approx(floor, rel=0.05)
    assert 0.025 < good["ece_floor"] < 0.045
    assert good["ece_floor"] == pytest.approx(bad["ece_floor"], abs=3e-3)
    assert good["p_value"] > 0.05
    assert bad["p_value"] == 1 / 401
    assert 0 == good["ece_low"] < good["ece"] < good["ece_high"] < 0.1
    assert bad["ece_floor"] < bad["ece_low"] < bad["ece"] < bad["ece_high"]
    assert bad["ece"] == pytest.approx(0.2, abs=0.05)
    narrow = compute(confidences, luck < confidences - 0.2, confidence_level=0.5, **draws)
    assert bad["ece_low"] < narrow["ece_low"] < narrow["ece_high"] < bad["ece_high"]


def test_interval_width_is_that_of_the_normal_approximation():
    """One bin: the ECE is the mean of 0.9 - hit, whose standard error is known."""
    hits = np.arange(1000) % 2
    result = compute(np.full(1000, 0.9), hits, mode="top_label", n_bins=1, n_bootstrap=4000)
    error = 1.959964 * math.sqrt(0.25 / 1000)
    assert result["ece_low"] == pytest.approx(0.4 - error, abs=0.003)
    assert result["ece_high"] == pytest.approx(0.4 + error, abs=0.003)


def test_draws_follow_the_seed_and_not_the_order_of_rows():
    logits, labels = sample(90, 4)
    options = {"from_logits": True, "n_bootstrap": 50}
    first = compute(logits, labels, **options)
    assert compute(logits, labels, **options) == first
    shuffled = compute(logits[::-1], labels[::-1], **options)
    for name in ("ece_low", "ece_high", "ece_floor", "p_value"):
        assert shuffled[name] == pytest.approx(first[name], abs=1e-12)
    assert compute(logits, labels, seed=1, **options)["ece_floor"] != first["ece_floor"]
    tied, hits = [0.6] * 30 + [0.7] * 30, np.arange(60) % 4 < 2
    drawn = [
        compute(tied, h, mode="top_label", n_bootstrap=50) for h in (hits, np.r_[hits[:30][::-1], hits[30:][::-1]])
    ]
    assert drawn[0] == pytest.approx(drawn[1], abs=1e-12)


def test_certain_and_right_is_perfect():
    result = compute([1.0, 1.0], [1, 1], mode="top_label", n_bootstrap=20)
    assert [result[name] for name in ("ece", "ece_low", "ece_high", "ece_floor", "p_value")] == [0, 0, 0, 0, 1]


# ---- streaming ----


def streamed(metric, rows, labels, step=50):
    for start in range(0, len(labels), step):
        metric.add_batch(predictions=rows[start : start + step], references=labels[start : start + step])
    return metric


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("options", [{}, {"classwise": True, "n_bins": 6}, {"from_logits": True, "temperature": 1.7}])
def test_streaming_equals_one_shot(options, dtype):
    logits, labels = sample(233, 5)
    rows = (logits if "from_logits" in options else softmax(logits)).astype(dtype)
    late = {"n_bootstrap": 20, "strategy": "quantile", "bins": True}
    expected = compute(rows, labels, **options, **late)
    metric = streamed(ECE(**options), rows[:220], labels[:220])
    assert len(metric) == 220
    for row, label in zip(torch.tensor(rows[220:228]), torch.tensor(labels[220:228]), strict=True):
        metric.add(prediction=row, reference=label)
    metric.add(prediction=rows[228], reference=labels[228])
    result = metric.compute(predictions=rows[229:], references=labels[229:], **late)
    table, expected_table = result.pop("bins"), expected.pop("bins")
    assert result == pytest.approx(expected, abs=1e-12)
    for name, column in expected_table.items():
        assert table[name] == pytest.approx(column, abs=1e-12, nan_ok=True)
    assert len(metric) == 0
    with pytest.raises(ValueError, match="at least one row"):
        metric.compute()


def test_options_given_at_load_hold_and_compute_overrides_them():
    logits, labels = sample(50, 3)
    metric = ECE(from_logits=True, temperature=2.0, n_bins=4)
    assert metric.compute(predictions=logits, references=labels) == compute(
        logits, labels, from_logits=True, temperature=2.0, n_bins=4
    )
    assert metric.compute(predictions=logits, references=labels, temperature=3.0)["n_bins"] == 4
    single = ECE(mode="positive")
    single.add(prediction=0.25, reference=1)
    single.add(prediction=torch.tensor(0.75, dtype=torch.float64), reference=torch.tensor(1))
    assert single.compute()["ece"] == 0.5


@pytest.mark.parametrize(
    ("options", "late"),
    [
        ({"from_logits": True}, {"temperature": 2.0}),
        ({"from_logits": True}, {"from_logits": False}),
        ({}, {"classwise": True}),
        ({}, {"check_sums": False}),
        ({}, {"mode": "top_label"}),
        ({"classwise": True}, {"n_bins": 5}),
    ],
)
def test_options_that_come_too_late_are_refused(options, late):
    metric = ECE(**options)
    logits = np.log(np.maximum(ROWS, 1e-9)) if "from_logits" in options else ROWS
    metric.add_batch(predictions=logits, references=LABELS)
    (name,) = late
    with pytest.raises(RuntimeError, match=f"`{name}` before the first row.*after 3 rows.*load"):
        metric.compute(**late)
    assert metric.compute(n_bins=10)["n"] == 3


def test_a_refused_batch_leaves_no_trace():
    metric = ECE()
    metric.add_batch(predictions=ROWS, references=LABELS)
    for predictions, references, message in (
        (ROWS, [0, 1, 7], "got 7 in row 2"),
        ([[0.5, 0.25, 0.25]], [0], "number of classes in all batches, 2, got 3"),
        (np.array(ROWS, np.float32), LABELS, "dtype in all batches, float64, got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.add_batch(predictions=predictions, references=references)
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=predictions, references=references)
    with pytest.raises(ValueError, match="n_bins"):
        metric.compute(n_bins=0)
    assert metric.compute() == compute(ROWS, LABELS)


def millions(options, n_batches=500):
    """Stream 10,000 rows at a time; return the metric, and what stood in memory: (at most halfway, at most)."""
    metric = ECE(mode="top_label", **options)
    confidences = np.sqrt(np.linspace(0, 1, 10_000, dtype=np.float32))
    tracemalloc.start()
    try:
        for i in range(n_batches):
            metric.add_batch(predictions=confidences, references=np.arange(10_000) % 3 == i % 3)
            if i == n_batches // 2:
                early = tracemalloc.get_traced_memory()[1]
        return metric, metric.compute(), confidences, (early, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_five_million_rows_are_streamed_in_constant_memory():
    """Each third of the batches has every third row right, so that exactly a third of all rows is."""
    _, result, confidences, (early, most) = millions({"n_bins": 15}, n_batches=501)
    assert most <= early + 1e5
    assert most < 25e6
    assert result["n"] == 5_010_000
    hits = np.zeros(10_000)
    for i in range(3):
        hits += 167 * (np.arange(10_000) % 3 == i)
    mean, total = math.fsum(confidences.tolist()) / 10_000, 0.0
    for low in range(15):
        inside = (confidences > np.float32(low / 15)) & (confidences <= np.float32((low + 1) / 15))
        inside |= (confidences == 0) & (low == 0)
        total += abs(501 * math.fsum(confidences[inside].tolist()) - math.fsum(hits[inside].tolist()))
    assert result["avg_confidence"] == pytest.approx(mean, abs=1e-14)
    assert result["accuracy"] == 1 / 3
    assert result["ece"] == pytest.approx(total / 5_010_000, abs=1e-13)


@pytest.mark.parametrize("rows_kept", [1, 37, 100, 232, 233])
def test_folded_rows_give_the_numbers_of_kept_ones(monkeypatch, rows_kept):
    logits, labels = sample(233, 5)
    expected = compute(logits, labels, from_logits=True, classwise=True, bins=True, n_bins=7)
    monkeypatch.setattr(sys.modules[ECE.__module__], "ROWS_KEPT", rows_kept)
    metric = streamed(ECE(from_logits=True, classwise=True, bins=True, n_bins=7), logits, labels)
    assert len(metric) == 233
    more = {} if rows_kept < 233 else {"predictions": logits[:10], "references": labels[:10]}
    for late in ({"strategy": "quantile"}, {"n_bootstrap": 5}):
        (name,) = late
        with pytest.raises(RuntimeError, match=rf"`{name}` .* more than {rows_kept} .* 2[34]3 rows .*load\("):
            metric.compute(**late, **more)
    result = metric.compute()
    table, expected_table = result.pop("bins"), expected.pop("bins")
    assert result == pytest.approx(expected, abs=1e-12)  # these confidences lie in cells of their own
    for name, column in expected_table.items():
        assert table[name] == pytest.approx(column, abs=1e-12, nan_ok=True)


def test_what_needs_the_rows_keeps_them_all(monkeypatch):
    logits, labels = sample(100, 3)
    monkeypatch.setattr(sys.modules[ECE.__module__], "ROWS_KEPT", 10)
    for options in ({"strategy": "quantile"}, {"n_bootstrap": 20}):
        metric = streamed(ECE(from_logits=True, **options), logits, labels, step=20)
        held = metric._buffer._confidences.nbytes + metric._buffer._correct.nbytes
        assert held <= 2 * 9 * 512 + 9 * 100
        assert metric.compute() == pytest.approx(compute(logits, labels, from_logits=True, **options), abs=1e-12)


# ---- properties ----


@st.composite
def weighted_rows(draw):
    """Probabilities with many ties and values on bin edges, and labels."""
    classes = draw(st.integers(2, 5))
    row = st.lists(st.integers(0, 10), min_size=classes, max_size=classes).filter(any)
    rows = draw(st.lists(row, min_size=1, max_size=30))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=len(rows), max_size=len(rows)))
    weights = np.array(rows, np.float64)
    return weights / weights.sum(axis=1, keepdims=True), np.array(labels)


def close(result, expected, but=()):
    keep = [name for name in expected if name not in but]
    return {name: result[name] for name in keep} == pytest.approx({name: expected[name] for name in keep}, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(weighted_rows(), st.integers(1, 20), st.sampled_from(["uniform", "quantile"]), st.randoms(use_true_random=False))
def test_invariances_and_the_chain(data, n_bins, strategy, random):
    rows, labels = data
    options = {"n_bins": n_bins, "strategy": strategy, "classwise": True}
    result = compute(rows, labels, **options)
    chain = [result["mce"], result["rmsce"], result["ece"], abs(result["overconfidence"])]
    assert all(larger >= smaller - 1e-12 for larger, smaller in itertools.pairwise(chain))
    assert result["overconfidence"] == pytest.approx(result["avg_confidence"] - result["accuracy"], abs=1e-12)
    if result["n_bins"] == 1:
        assert chain == pytest.approx([chain[0]] * 4, abs=1e-12)
    order = random.sample(range(len(rows)), len(rows))
    assert close(compute(rows[order], labels[order], **options), result)
    twice = compute(np.concatenate([rows, rows]), np.concatenate([labels, labels]), **options)
    assert close(twice, result, but=("n", "ece_debiased"))  # the bias does shrink with more rows
    names = random.sample(range(rows.shape[1]), rows.shape[1])
    ties = (rows == rows.max(axis=1, keepdims=True)).sum(axis=1) > 1
    if not ties.any():  # the first of equal classes depends on their order
        assert close(compute(rows[:, names], np.argsort(names)[labels], **options), result)


# ---- loading ----


LOADERS = {
    "by name in the repository root": (ROOT, "import evaluate; m = evaluate.load('carot_hf/ece', from_logits=True)"),
    "elsewhere": (None, "import carot_hf; m = carot_hf.load_ece(from_logits=True)"),
}
ANSWER = "print(m.compute(predictions=[[2.0, 0.0]], references=[0])['avg_confidence'])"


@pytest.fixture(scope="module", autouse=True)
def fresh_processes(tmp_path_factory):
    """Each way of loading in a process with empty caches and no network; started first, for imports take seconds."""
    started = {}
    for name, (folder, code) in LOADERS.items():
        own = tmp_path_factory.mktemp("fresh")
        caches = {"HF_HOME": str(own / "home"), "HF_MODULES_CACHE": str(own / "modules"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", f"{code}; {ANSWER}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder or own,
            env={**os.environ, **caches, "PYTHONPATH": "" if folder else str(ROOT)},
        )  # fmt: skip
        started[name] = (own, process)
    yield started
    for _, process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", LOADERS)
def test_loading_in_a_fresh_process(fresh_processes, name):
    own, process = fresh_processes[name]
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert float(printed) == pytest.approx(1 / (1 + math.exp(-2)))
    copied = {path.name for path in (own / "modules").rglob("*.py")}
    assert copied >= {"ece.py", "binning.py", "inputs.py", "rows.py", "uncertainty.py"}


def test_the_files_of_the_metric_need_no_torch():
    """They run in a Space; evaluate itself may import torch, so the files are read instead of run."""
    for path in (ROOT / "carot_hf" / "ece").glob("*.py"):
        assert "import torch" not in path.read_text(encoding="utf-8")


def test_load_ece_passes_options_and_documents_itself(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    metric = load_ece(n_bins=15, keep_in_memory=True)
    assert metric.compute(predictions=ROWS, references=LABELS)["n_bins"] == 15
    assert metric.name == "ece"
    assert set(metric.features[0]) == {"predictions", "references"}
    assert isinstance(metric.features[1]["predictions"], datasets.Value)
    assert "mode=" in metric.compute.__doc__
    assert "Guo" in metric.citation
    with pytest.raises(TypeError, match="spelling"):
        load_ece(bin=3)


def test_it_combines_with_other_metrics():
    import evaluate

    both = evaluate.combine([load_ece(), ECE(n_bins=2)])
    assert both.compute(predictions=ROWS, references=LABELS)["ece_0_n_bins"] == 10
