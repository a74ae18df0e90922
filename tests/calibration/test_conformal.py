"""Conformal sets: by hand, against slow loops in fractions, the figures of TorchCP, coverage by simulation."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from carot_hf.calibration import conformal
from carot_hf.calibration.conformal import ConformalSets, fit_conformal

SCORES = ("lac", "aps")


def counts(seed, rows, n_classes=5, total=20):
    """Rows of whole numbers that sum to ``total``, with ties and zeros, and labels drawn from other chances."""
    generator = np.random.default_rng(seed)
    parts = generator.multinomial(total, generator.dirichlet(np.full(n_classes, 0.6), rows))
    chances = parts / total * 0.7 + 0.3 / n_classes
    return parts, (chances.cumsum(axis=1) > generator.random((rows, 1))).argmax(axis=1)


def slow_scores(row, score):
    """The score of each class, in fractions."""
    if score == "lac":
        return [1 - p for p in row]
    ranked = sorted(range(len(row)), key=lambda k: (-row[k], k))
    return [sum(row[k] for k in ranked[: ranked.index(own) + 1]) for own in range(len(row))]


def slow_fit(rows, labels, alpha, score):
    scores = sorted(slow_scores(row, score)[label] for row, label in zip(rows, labels, strict=True))
    return scores[math.ceil((len(rows) + 1) * (1 - alpha)) - 1]


def slow_sets(rows, threshold, score):
    found = []
    for row in rows:
        inside = [own <= threshold for own in slow_scores(row, score)]
        if score == "aps":
            inside[row.index(max(row))] = True
        found.append(inside)
    return found


def test_lac_by_hand():
    """9 rows, alpha .1: the 9th smallest score, the largest."""
    right = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.3, 0.25])
    rows = np.stack([right, 1 - right], axis=1)
    found = fit_conformal(rows, np.zeros(9, int))
    assert found == ConformalSets(threshold=0.75, alpha=0.1, score="lac", n=9, n_classes=2)
    assert found.sets(np.array([[0.25, 0.75], [0.2, 0.8]])).tolist() == [[True, True], [False, True]]
    half = fit_conformal(rows, np.zeros(9, int), alpha=0.5)
    assert half.threshold == 0.5  # the 5th
    assert half.sets(np.array([[0.5, 0.5], [0.4, 0.6]])).tolist() == [[True, True], [False, True]]


def test_lac_sets_may_be_empty_and_those_of_aps_are_not():
    rows, labels = np.array([[0.8, 0.1, 0.1]] * 4), np.zeros(4, int)
    even = np.array([[0.3, 0.4, 0.3]])
    assert fit_conformal(rows, labels, alpha=0.25).sets(even).tolist() == [[False, False, False]]
    sets = fit_conformal(rows, labels, alpha=0.25, score="aps")
    assert sets.threshold == 0.8
    assert sets.sets(even).tolist() == [[True, True, False]]  # .4, .7, 1
    assert sets.sets(np.array([[0.05, 0.05, 0.9]])).tolist() == [[False, False, True]]  # .9 is above it, but the first


def test_aps_by_hand():
    """Ranked 1, 0, 2: the scores are .3 + .5, .5, 1; equal ones in the order of the classes."""
    rows = np.array([[0.3, 0.5, 0.2]] * 3)
    for label, score in enumerate((0.8, 0.5, 1.0)):
        assert fit_conformal(rows, np.full(3, label), alpha=0.5, score="aps").threshold == score
    even = np.full((3, 4), 0.25)
    for label in range(4):
        sets = fit_conformal(even, np.full(3, label), alpha=0.5, score="aps")
        assert sets.threshold == (label + 1) / 4
        assert sets.sets(even).tolist() == [[k <= label for k in range(4)]] * 3


@pytest.mark.parametrize(
    ("fitted", "met"), [((0.85, 0.1, 0.05), (0.9, 0.05, 0.05)), ((0.55, 0.3, 0.15), (0.7, 0.15, 0.15))]
)
def test_rounding_leaves_out_no_class_that_was_scored_equal(fitted, met):
    """In floats .85 + .1 is less than .9 + .05, and .55 + .3 than .7 + .15."""
    sets = fit_conformal(np.array([fitted] * 9), np.ones(9, int), score="aps")
    assert sets.sets(np.array([met])).tolist() == [[True, True, False]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("alpha", ["0.05", "0.1", "0.25", "0.3", "0.5", "0.99"])
@pytest.mark.parametrize("total", [10, 16, 30])
def test_threshold_and_sets_agree_with_slow_loops(score, alpha, total):
    """In tenths and thirtieths floats are rounded, fractions are not: no class is lost by it."""
    parts, labels = counts(0, 75, total=total)
    exact = [[Fraction(int(part), total) for part in row] for row in parts]
    limit = slow_fit(exact[:45], labels[:45], Fraction(alpha), score)
    found = fit_conformal((parts / total)[:45], labels[:45], alpha=float(alpha), score=score)
    assert found.threshold == pytest.approx(float(limit), abs=1e-11)
    assert found.sets(parts / total).tolist() == slow_sets(exact, limit, score)


@pytest.mark.parametrize("alpha", [0.01, 0.02, 0.05, 0.1, 1 - 0.9, 0.15, 0.2, 0.3, 1 / 3, 0.35, 0.5, 0.7, 0.9])
def test_ranks_are_exact_and_too_few_rows_are_refused(alpha):
    share = Fraction(alpha).limit_denominator(1000)
    least = next(n for n in range(1, 1000) if math.ceil((n + 1) * (1 - share)) <= n)
    for n in sorted({least, least + 1, 9, 19, 99, 199} - set(range(least))):
        right = 1 - np.arange(1, n + 1) / (2 * n)  # scores 1, 2 ... n over 2n
        sets = fit_conformal(np.stack([right, 1 - right], axis=1), np.zeros(n, int), alpha=alpha)
        assert sets.threshold * 2 * n == pytest.approx(math.ceil((n + 1) * (1 - share)))
    for n in {1, least - 1} - {0, least}:
        with pytest.raises(ValueError, match=rf"Expected at least {least} rows for alpha=.*, got {n}\. With fewer"):
            fit_conformal(np.full((n, 2), 0.5), np.zeros(n, int), alpha=alpha)


@pytest.mark.parametrize(
    ("score", "alpha", "threshold", "size", "coverage"),
    [
        ("lac", 0.1, 0.8914931902, 2.885, 0.905),
        ("lac", 0.23, 0.815795147, 2.22, 0.81),
        ("aps", 0.1, 0.9773445383, 3.34, 0.935),
        ("aps", 0.23, 0.8932947615, 2.29, 0.785),
    ],
)
def test_sets_agree_with_torchcp(score, alpha, threshold, size, coverage):
    """TorchCP 1.2.1: its LAC, its APS with randomized=False, the first class added, and its threshold."""
    probabilities, labels = even_rows()
    sets = fit_conformal(probabilities[:200], labels[:200], alpha=alpha, score=score)
    assert sets.threshold == pytest.approx(threshold, abs=1e-9)
    assert sets.measure(probabilities[200:], labels[200:]) == pytest.approx({"coverage": coverage, "mean_size": size})


def even_rows(rows=400, n_classes=6):
    """Probabilities and labels that no generator has to draw."""
    steps = np.arange(1, rows + 1)[:, None]
    weights = (steps * np.sqrt([2, 3, 5, 7, 11, 13])[:n_classes] % 1) ** 3
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) > steps * 0.6180339887498949 % 1).argmax(axis=1)
    return probabilities, labels


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("n", "alpha"), [(50, 0.1), (39, 0.2)])
def test_coverage_of_exchangeable_rows(score, n, alpha):
    """Over 600 fits; of LAC, which has no ties here, it is rank / (n + 1)."""
    generator = np.random.default_rng(0)
    trials, away, n_classes = 600, 50, 6
    probabilities = generator.dirichlet(np.full(n_classes, 0.7), (trials, n + away))
    chances = (probabilities**0.4).cumsum(axis=2)  # the model is too sure
    labels = (chances > generator.random((trials, n + away, 1)) * chances[:, :, -1:]).argmax(axis=2)
    found = []
    for rows, targets in zip(probabilities, labels, strict=True):
        sets = fit_conformal(rows[:n], targets[:n], alpha=alpha, score=score)
        found.append(sets.measure(rows[n:], targets[n:])["coverage"])
    noise = 4 * np.std(found) / math.sqrt(trials)
    assert np.mean(found) >= 1 - alpha - noise
    if score == "lac":
        assert np.mean(found) <= 1 - alpha + 1 / (n + 1) + noise
        assert np.mean(found) == pytest.approx(math.ceil(round((n + 1) * (1 - alpha), 9)) / (n + 1), abs=noise)


@pytest.mark.parametrize("score", SCORES)
def test_the_rows_of_the_fit_are_covered_up_to_the_rank(score):
    """Rounding leaves out no class that was scored equal: float32 rows, and classes at the end of a row."""
    generator = np.random.default_rng(0)
    logits = torch.tensor(generator.normal(0, 4, (300, 40)), dtype=torch.float32)
    rows = logits.softmax(-1)
    for alpha in (0.02, 0.1, 0.4):
        labels = torch.tensor(generator.integers(0, 40, 300))
        sets = fit_conformal(rows, labels, alpha=alpha, score=score)
        assert sets.measure(rows, labels)["coverage"] >= math.ceil(round(301 * (1 - alpha), 9)) / 300
    last = rows.argmin(dim=1)
    sets = fit_conformal(rows[:150], last[:150], alpha=0.3, score="aps")
    assert sets.threshold == 1.0
    assert sets.sets(rows).all()


def test_measure_by_hand():
    sets = ConformalSets(threshold=0.6, alpha=0.1, score="lac", n=20, n_classes=3)
    rows = np.array([[0.5, 0.4, 0.1], [0.8, 0.1, 0.1], [0.34, 0.33, 0.33]])
    assert sets.sets(rows).sum(axis=1).tolist() == [2, 1, 0]
    assert sets.measure(rows, [1, 1, 0]) == {"coverage": pytest.approx(1 / 3), "mean_size": 1.0}


@pytest.mark.parametrize("score", SCORES)
def test_order_kind_and_blocks_do_not_matter(score, monkeypatch):
    parts, labels = counts(1, 90, n_classes=8, total=32)
    probabilities = parts / 32  # the same number in every dtype
    expected = fit_conformal(probabilities, labels, score=score)
    sets = expected.sets(probabilities)
    assert sets.dtype == bool
    assert sets.shape == (90, 8)
    order = np.random.default_rng(0).permutation(90)
    assert fit_conformal(probabilities[order], labels[order], score=score) == expected
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = torch.tensor(probabilities, dtype=dtype, requires_grad=True)
        assert fit_conformal(rows, torch.tensor(labels), score=score) == expected
        assert (expected.sets(rows) == sets).all()
    assert fit_conformal(probabilities.astype(np.float16), labels.astype(np.uint8), score=score) == expected
    monkeypatch.setattr(conformal, "_BLOCK_VALUES", 50)
    assert fit_conformal(probabilities, labels, score=score) == expected
    fine, targets = even_rows()
    in_blocks = fit_conformal(fine, targets, score=score)
    monkeypatch.undo()
    assert in_blocks == fit_conformal(fine, targets, score=score)
    monkeypatch.setattr(conformal, "_BLOCK_VALUES", 50)
    assert (expected.sets(probabilities) == sets).all()
    assert (expected.sets(probabilities[order]) == sets[order]).all()


def test_lac_does_not_depend_on_the_order_of_the_classes():
    """That of APS does only where two are equal."""
    probabilities, labels = even_rows()
    order = np.array([3, 0, 5, 1, 4, 2])
    for score in SCORES:
        found = fit_conformal(probabilities, labels, score=score)
        turned = fit_conformal(probabilities[:, order], np.argsort(order)[labels], score=score)
        assert turned == found
        assert (turned.sets(probabilities[:, order]) == found.sets(probabilities)[:, order]).all()


def test_rounded_rows_of_half_precision_are_taken():
    rows = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    labels = torch.arange(40)
    for dtype in (torch.float16, torch.bfloat16):
        for score in SCORES:
            sets = fit_conformal(rows.to(dtype), labels, score=score)
            assert sets.threshold == pytest.approx(fit_conformal(rows, labels, score=score).threshold, abs=0.01)


@pytest.mark.parametrize("score", SCORES)
def test_a_sigmoid_of_each_class(score):
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).sigmoid()
    labels = rows.argsort(dim=1)[torch.arange(60), torch.arange(60) % 5]
    sets = fit_conformal(rows, labels, score=score, check_sums=False)
    assert sets.measure(rows, labels)["coverage"] >= 0.9
    exact = [[Fraction(p) for p in row] for row in rows.double().tolist()]
    limit = slow_fit(exact, labels.tolist(), Fraction(1, 10), score)
    assert sets.threshold == pytest.approx(float(limit), abs=1e-11)
    with pytest.raises(ValueError, match="to sum to 1"):
        fit_conformal(rows, labels, score=score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("threshold", [0.1 + 0.2, 0.0, math.inf])
def test_it_survives_json(score, threshold):
    sets = ConformalSets(threshold=threshold, alpha=0.05, score=score, n=70, n_classes=3, check_sums=False)
    text = json.dumps(sets.to_dict(), allow_nan=False)
    assert ConformalSets.from_dict(json.loads(text)) == sets
    if threshold == math.inf:
        assert sets.sets(np.array([[1.0, 0.0, 0.0]])).all()


GOOD = np.tile([0.5, 0.3, 0.2], (20, 1))
NAN, HIGH, LOW, SHORT = (GOOD.copy() for _ in range(4))
NAN[3, 1], HIGH[4, 2], LOW[5, 0], SHORT[6, 1] = math.nan, 1.2, -0.1, 0.2
LABELS = np.arange(20) % 3


@pytest.mark.parametrize(
    ("rows", "labels", "options", "said"),
    [
        (GOOD, LABELS, {"alpha": 0.0}, "`alpha` between 0 and 1, got 0.0"),
        (GOOD, LABELS, {"alpha": 1.0}, "`alpha` between 0 and 1, got 1.0"),
        (GOOD, LABELS, {"alpha": math.nan}, "`alpha` between 0 and 1, got nan"),
        (GOOD, LABELS, {"score": "raps"}, "`score` to be one of ('lac', 'aps'), got 'raps'"),
        (GOOD[:8], LABELS[:8], {}, "at least 9 rows for alpha=0.1, got 8"),
        (GOOD, LABELS, {"alpha": 1e-10}, "at least 9999999999 rows for alpha=1e-10, got 20"),
        (GOOD[0], LABELS[:1], {}, "`probabilities` of a float dtype and shape (N, K)"),
        (GOOD[:, :1], LABELS, {"check_sums": False}, "N >= 1 and K >= 2, got float64 of shape (20, 1)"),
        (GOOD[:0], LABELS[:0], {}, "N >= 1 and K >= 2, got float64 of shape (0, 3)"),
        (GOOD.astype(int), LABELS, {}, "`probabilities` of a float dtype"),
        (NAN, LABELS, {}, "finite `probabilities` in [0, 1], got nan in row 3, column 1"),
        (HIGH, LABELS, {}, "`probabilities` in [0, 1], got 1.2 in row 4, column 2"),
        (LOW, LABELS, {"check_sums": False}, "`probabilities` in [0, 1], got -0.1 in row 5, column 0"),
        (SHORT, LABELS, {}, "`probabilities` of a row to sum to 1 (within 0.001), got 0.9 in row 6"),
        (GOOD, LABELS[:19], {}, "`labels` of shape (20,), got (19,)"),
        (GOOD, LABELS[:, None], {}, "`labels` of shape (20,), got (20, 1)"),
        (GOOD, LABELS + 0.5, {}, "`labels` of an integer dtype, got float64"),
        (GOOD, LABELS - 1, {}, "`labels` in [0, 3), got -1 in row 0"),
        (GOOD, LABELS + 1, {}, "`labels` in [0, 3), got 3 in row 2"),
    ],
)
def test_what_is_refused(rows, labels, options, said, monkeypatch):
    monkeypatch.setattr(conformal, "_BLOCK_VALUES", 6)
    with pytest.raises(ValueError, match=r"^Expected .*\.$") as error:
        fit_conformal(rows, labels, **options)
    assert said in str(error.value)


def test_what_sets_refuse():
    sets = fit_conformal(GOOD, LABELS)
    with pytest.raises(ValueError, match="of 3 classes, as in the fit, got 4"):
        sets.sets(np.full((2, 4), 0.25))
    with pytest.raises(ValueError, match="to sum to 1"):
        sets.sets(SHORT)
    with pytest.raises(ValueError, match="finite `probabilities`"):
        sets.sets(NAN)
    with pytest.raises(ValueError, match=r"`labels` of shape \(20,\), got \(3,\)"):
        sets.measure(GOOD, [0, 1, 2])
    with pytest.raises(ValueError, match="`threshold` of at least 0, got nan"):
        ConformalSets(threshold=math.nan, alpha=0.1, score="lac", n=20, n_classes=3)
    with pytest.raises(ValueError, match="Expected `score`"):
        ConformalSets.from_dict({**sets.to_dict(), "score": "raps"})
