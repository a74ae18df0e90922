"""Confidence bins against slow loops and scikit-learn; published examples and tables by hand are in test_ece.py."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference_calibration as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from carot_hf.ece import binning
from carot_hf.ece.binning import BinSums, CalibrationBins, _cell, calibration_bins, classwise_sums, uniform_edges

FLOATS = [np.float64, np.float32, np.float16]


def rows_of_a_set():
    """Confidences on and off a coarse grid, so that ties and edges are common, each with a hit."""
    exact = st.integers(0, 20).map(lambda i: i / 20)
    return st.lists(st.tuples(st.floats(0, 1) | exact, st.booleans()), min_size=1, max_size=60)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_confidence_on_an_edge_belongs_to_the_bin_that_ends_there(dtype):
    confidences = (np.arange(11) / 10).astype(dtype)
    bins = calibration_bins(confidences, np.ones(11))
    np.testing.assert_array_equal(bins.count, [2] + [1] * 9)  # 0 and .1 share the first
    np.testing.assert_array_equal(bins.edges, confidences)
    assert bins.edges.dtype == dtype
    assert bins.confidence.dtype == bins.accuracy.dtype == np.float64


def test_linspace_edges_would_move_three_tenths():
    assert np.linspace(0, 1, 11)[3] > 0.3 == uniform_edges(10)[3]


def test_sums_are_not_kept_in_float32():
    bins = calibration_bins(np.full(3_000_000, 0.1, np.float32), np.zeros(3_000_000, bool), 1)
    assert bins.ece == pytest.approx(float(np.float32(0.1)), abs=1e-11)


@given(rows_of_a_set(), st.integers(1, 25), st.sampled_from(["uniform", "quantile"]))
@settings(max_examples=200, deadline=None)
def test_bins_agree_with_a_slow_loop(rows, n_bins, strategy):
    confidences, correct = zip(*rows, strict=True)
    bins = calibration_bins(confidences, correct, n_bins, strategy)
    if strategy == "uniform":
        inner = reference.uniform_inner_edges(n_bins)
    else:
        inner = reference.quantile_inner_edges(confidences, n_bins)
        assert (bins.count > 0).all()
    np.testing.assert_array_equal(bins.edges, [0.0, *inner, 1.0])
    expected = reference.groups(confidences, correct, inner)
    np.testing.assert_array_equal(bins.count, [len(group) for group in expected])
    for b, group in enumerate(expected):
        if group:
            np.testing.assert_allclose([bins.confidence[b], bins.accuracy[b]], np.mean(group, axis=0), atol=1e-12)
        else:
            assert math.isnan(bins.confidence[b])
            assert math.isnan(bins.accuracy[b])
    assert bins.ece == pytest.approx(reference.ece(confidences, correct, inner), abs=1e-12)


@given(rows_of_a_set(), st.integers(1, 25), st.sampled_from(["uniform", "quantile"]))
@settings(max_examples=200, deadline=None)
def test_the_errors_are_ordered_and_bounded_below_by_the_overall_gap(rows, n_bins, strategy):
    confidences, correct = zip(*rows, strict=True)
    bins = calibration_bins(confidences, correct, n_bins, strategy)
    gap = abs(np.mean(confidences) - np.mean(correct))
    assert abs(bins.overconfidence) == pytest.approx(gap, abs=1e-12)
    assert 1 + 1e-12 >= bins.mce + 1e-12 >= bins.rmsce >= bins.ece - 1e-12 >= gap - 2e-12
    if n_bins == 1:
        assert [bins.mce, bins.rmsce, bins.ece] == pytest.approx([gap] * 3, abs=1e-12)


@given(rows_of_a_set(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_order_and_duplication_of_rows_change_nothing(rows, random):
    shuffled = rows * 2
    random.shuffle(shuffled)
    for strategy in ("uniform", "quantile"):
        bins, other = (calibration_bins(*zip(*r, strict=True), 7, strategy) for r in (rows, shuffled))
        np.testing.assert_array_equal(bins.edges, other.edges)
        assert other.ece == pytest.approx(bins.ece, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_means_agree_with_scikit_learn(dtype):
    generator = np.random.default_rng(0)
    confidences = generator.random(2000).astype(dtype)
    correct = generator.random(2000) < confidences**2
    bins = calibration_bins(confidences, correct, 15)
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=15)
    np.testing.assert_allclose(bins.accuracy, accuracy, atol=1e-12)
    np.testing.assert_allclose(bins.confidence, confidence, atol=1e-6)


def test_equal_mass_bins_without_ties_have_equal_counts():
    bins = calibration_bins(np.random.default_rng(1).random(1003), np.ones(1003), 10, strategy="quantile")
    assert set(bins.count) <= {100, 101}


def test_equal_mass_bins_never_split_ties():
    confidences = [0.2] * 3 + [0.5] * 90 + [1.0] * 7
    bins = calibration_bins(confidences, [1] * 100, 10, strategy="quantile")
    np.testing.assert_array_equal(bins.count, [93, 7])
    np.testing.assert_array_equal(bins.edges, [0, 0.5, 1])
    assert calibration_bins([0.4] * 5, [1] * 5, 10, strategy="quantile").n_bins == 1


def test_equal_mass_bins_may_start_with_a_heap_of_zeros():
    bins = calibration_bins([0.0, 0.0, 0.5, 0.7], [0] * 4, 4, strategy="quantile")
    np.testing.assert_array_equal(bins.edges, [0, 0, 0.5, 1])
    np.testing.assert_array_equal(bins.count, [2, 1, 1])


def test_rounding_outside_the_unit_interval_is_clipped():
    bins = calibration_bins(np.float32([1 + 1e-7, -1e-9]), [1, 0])
    assert bins.ece == 0.0
    assert calibration_bins(np.float16([1.001]), [1]).confidence[-1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], [1], 0), "`n_bins` to be an integer of at least 1, got 0"),
        (([0.5], [1], 2.0), "`n_bins`.*got 2.0"),
        (([0.5], [1], True), "`n_bins`.*got True"),
        (([0.5], [1], 10, "equal"), "`strategy` to be one of .*'uniform', 'quantile'.*got 'equal'"),
        (([], []), "at least one row, got 0"),
        (([0.5, 0.6], [1]), r"one shape \(N,\), got \(2,\) and \(1,\)"),
        (([[0.5]], [[1]]), r"one shape \(N,\), got \(1, 1\)"),
        (([0.5, 1.01], [1, 1]), r"`confidences` in \[0, 1\], got 1.01 in row 1.*softmax"),
        (([0.5, 0.4, -0.2], [1, 1, 1]), "got -0.2 in row 2"),
        (([0.5, math.nan], [1, 1]), "got nan in row 1"),
        ((["a"], [1]), "float dtype"),
        (([0.5, 0.5], [1, 2]), "booleans or 0/1, got .*2.* in row 1"),
        (([0.5, 0.5], [0.3, 1]), "booleans or 0/1, got .*0.3.* in row 0"),
        (([0.5], [math.nan]), "booleans or 0/1"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(arguments, message):
    with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
        calibration_bins(*arguments)


def test_a_table_survives_json_and_cannot_be_reassigned():
    bins = calibration_bins(np.float32([0.2, 0.7]), [0, 1], 5)
    table = json.loads(json.dumps(bins.to_dict()))
    assert set(table) == {"edges", "count", "confidence", "accuracy", "gap"}
    again = CalibrationBins.from_dict(table)
    for name in table:
        np.testing.assert_array_equal(getattr(again, name), getattr(bins, name))
    none_for_nan = {k: [None if v != v else v for v in column] for k, column in table.items()}
    assert CalibrationBins.from_dict(none_for_nan).ece == bins.ece
    with pytest.raises(AttributeError):
        bins.count = bins.count


@pytest.mark.parametrize(("n_bins", "classes"), [(10, 3), (1, 4), (7, 30), (50, 5)])
def test_classwise_sums_agree_with_a_slow_loop_and_add_up_over_chunks(n_bins, classes):
    generator = np.random.default_rng(n_bins)
    probabilities = generator.dirichlet(np.full(classes, 0.3), 60)
    probabilities[:5] = np.eye(classes)[generator.integers(0, classes, 5)]
    probabilities[5:20] = generator.integers(0, n_bins + 1, (15, classes)) / n_bins  # on the edges; sums do not matter
    labels = generator.integers(0, classes, 60)
    sums = classwise_sums(probabilities, labels, n_bins)
    for k in range(classes):
        rows = reference.groups(probabilities[:, k], labels == k, reference.uniform_inner_edges(n_bins))
        np.testing.assert_allclose(sums[k], [sum(hit - p for p, hit in group) for group in rows], atol=1e-12)
    parts = classwise_sums(probabilities[:17], labels[:17], n_bins) + classwise_sums(
        probabilities[17:], labels[17:], n_bins
    )
    np.testing.assert_allclose(parts, sums, atol=1e-12)


def test_binning_imports_numpy_only():
    tree = ast.parse(Path(binning.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert modules <= {"__future__", "collections.abc", "dataclasses", "typing", "numpy", "numpy.typing"}


# ---- sums of rows that are not kept ----

DRAWS = {
    "broad": lambda rng, n: rng.beta(5, 1, n),
    "near one": lambda rng, n: 1 - rng.beta(0.2, 5, n),
    "near zero": lambda rng, n: rng.beta(0.2, 5, n),
    "tied": lambda rng, n: rng.integers(0, 21, n) / 20,
    "constant": lambda rng, n: np.full(n, 0.7),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("draw", DRAWS)
def test_sums_over_parts_give_the_table_of_all_rows(draw, dtype):
    rng = np.random.default_rng(3)
    confidences = DRAWS[draw](rng, 150_000).astype(dtype)
    correct = rng.random(150_000) < confidences.astype(np.float64) ** 1.5
    expected = calibration_bins(confidences, correct, 12)
    sums = BinSums(12, dtype)
    for start in range(0, 150_000, 70_000):  # one part is longer than what is summed at a time
        sums.add(confidences[start : start + 70_000], correct[start : start + 70_000])
    table = sums.bins()
    assert sums.n == 150_000
    assert np.array_equal(table.edges, expected.edges)
    assert table.edges.dtype == expected.edges.dtype
    assert np.array_equal(table.count, expected.count)
    np.testing.assert_allclose(table.confidence, expected.confidence, rtol=0, atol=1e-11)
    np.testing.assert_allclose(table.accuracy, expected.accuracy, rtol=0, atol=1e-15)
    # bins of equal mass differ from the exact ones by at most the rows of a cell at each edge
    assert sums.adaptive_ece() == pytest.approx(calibration_bins(confidences, correct, 12, "quantile").ece, abs=2e-5)


def test_cells_rise_with_the_confidence_and_hold_it_closely():
    """Equal mass from cells equals equal mass from rows once no two rows share a cell, here down to 2^-24."""
    low = np.geomspace(2.0**-24, 0.5, 12_000)
    confidences = np.concatenate([low, 1 - low[:-1][::-1]])
    index = _cell(confidences)
    assert (np.diff(index) >= 0).all()
    assert index.min() == 0
    _, first = np.unique(index, return_index=True)
    last = np.append(first[1:], len(confidences)) - 1
    distance = np.minimum(confidences, 1 - confidences)
    spread = np.abs(distance[last] - distance[first]) / np.minimum(distance[last], distance[first])
    assert spread.max() <= 2.0**-9 + 1e-6
    assert _cell(np.array([0.0, 1e-30, 2.0**-25]))[[0, 1, 2]].tolist() == [0, 0, 0]
    assert _cell(np.array([1.0]))[0] == _cell(np.array([1 - 2.0**-26]))[0] == index.max()


def test_sums_check_their_rows():
    sums = BinSums(10, np.float64)
    with pytest.raises(ValueError, match=r"got 1.5 in row 1"):
        sums.add([0.5, 1.5], [1, 0])
    with pytest.raises(ValueError, match="n_bins"):
        BinSums(0, np.float64)
