"""Predictions and labels as people have them: taken right, or refused with a cure that works when it is pasted."""

from __future__ import annotations

import math
import re
import warnings
from decimal import Decimal

import numpy as np
import pytest
import torch

from carot_hf import calibration_metrics
from carot_hf.calibration.temperature import fit_temperature
from carot_hf.ece.ece import ECE

ROWS = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.05, 0.9, 0.05]])
LABELS = np.array([0, 2, 2, 1])
BINARY, HITS = np.array([0.9, 0.2, 0.7, 0.4]), np.array([1, 0, 0, 1])


def compute(predictions, references, **options):
    return ECE(**options).compute(predictions=predictions, references=references)


def pasted(error, **names):
    """Run the code that a message puts between backticks; return what it gives by the name it is for."""
    found = {}
    for code in re.findall(r"`([^`]+)`", str(error.value)):
        for name in names:
            if code != name and name in code and not code.startswith("predictions of"):
                found.setdefault(name, eval(code, {"np": np, **names}))
    return found


# ---- shapes ----


def test_columns_of_one_are_taken_out_as_the_message_says():
    """``references.argmax(-1)`` gave ECE .65 for .30."""
    expected = compute(BINARY, HITS, mode="positive")["ece"]
    with pytest.raises(ValueError, match=r"`references` of shape \(4,\), got \(4, 1\)\. Pass the column") as error:
        compute(BINARY, HITS[:, None], mode="positive")
    cure = pasted(error, references=HITS[:, None])["references"]
    assert compute(BINARY, cure, mode="positive")["ece"] == expected
    with pytest.raises(ValueError, match=r"Pass the column") as error:
        compute(BINARY[:, None], HITS[:, None], mode="positive")
    cure = pasted(error, references=HITS[:, None], predictions=BINARY[:, None])
    assert compute(cure["predictions"], cure["references"], mode="positive")["ece"] == expected
    with pytest.raises(ValueError, match=r"`labels\[:, 0\]`"):
        calibration_metrics(np.log(ROWS), LABELS[:, None])


def test_one_hot_rows_are_those_that_sum_to_one():
    one_hot = np.eye(3)[LABELS]
    with pytest.raises(ValueError, match=r"got one-hot rows of shape \(4, 3\)") as error:
        compute(ROWS, one_hot)
    cure = pasted(error, references=one_hot)["references"]
    assert compute(ROWS, cure) == compute(ROWS, LABELS)
    several = one_hot.copy()
    several[1, 0] = 1
    for none_or_several in (several, np.zeros((4, 3), int)):
        with pytest.raises(ValueError, match=r"\(multi-label\).*measure each label k by itself, with `predic"):
            compute(ROWS, none_or_several)
        with pytest.raises(ValueError, match=r"\(multi-label\)"):
            calibration_metrics(np.log(ROWS), none_or_several)
    assert compute(ROWS[:, 1], several[:, 1], mode="positive")["n"] == 4
    with pytest.raises(ValueError, match=r"got \(4, 3\)\. Pass one class index for each row"):
        compute(ROWS, ROWS)


# ---- probabilities for logits ----


def test_probabilities_in_the_place_of_logits_are_warned_of():
    """They gave .3296 for 0.0."""
    sure = np.array([[0.0, 1.0, 0.0, 0.0]] * 4)
    labels = np.array([1, 1, 1, 1])
    with pytest.warns(UserWarning, match="look like probabilities, but are taken for logits"):
        assert compute(sure, labels, from_logits=True)["ece"] > 0.3
    assert compute(sure, labels)["ece"] == 0.0
    with pytest.warns(UserWarning, match=r"`probabilities\.log\(\)`"):
        calibration_metrics(ROWS, LABELS)
    with pytest.warns(UserWarning, match="look like probabilities"):
        fit_temperature(torch.tensor(ROWS), torch.tensor(LABELS))


@pytest.mark.parametrize("change", [lambda rows: rows + [[0.01, 0, 0]], np.log, lambda rows: 3 * rows])
def test_logits_are_not_warned_of(change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = change(ROWS)
        compute(rows, LABELS, from_logits=True)
        calibration_metrics(rows, LABELS)
        rows = np.concatenate([np.tile(ROWS, (40_000, 1)), change(ROWS)])  # all but the last chunk looks so
        compute(rows, np.tile(LABELS, 40_001), from_logits=True)


def test_the_logarithm_gives_the_probabilities_back():
    expected = compute(ROWS, LABELS)
    found = calibration_metrics(np.log(ROWS), LABELS)
    assert (found["ece"], found["nll"]) == pytest.approx((expected["ece"], expected["nll"]), abs=1e-12)


# ---- probabilities of class 1 ----


def test_forecasts_of_class_1_by_hand():
    result = compute(BINARY, HITS, mode="positive")
    assert result["positive_rate"] == result["accuracy"] == 0.5
    assert result["brier"] == pytest.approx((0.01 + 0.04 + 0.49 + 0.36) / 4, abs=1e-12)
    assert result["nll"] == pytest.approx(-np.log([0.9, 0.8, 0.3, 0.4]).mean(), abs=1e-12)
    metric = ECE(mode="positive")
    for chance, hit in zip(BINARY, HITS, strict=True):
        metric.add(prediction=chance, reference=hit)
    assert metric.compute() == pytest.approx(result)
    assert compute([1.0, 0.3], [0, 1], mode="positive")["nll"] == math.inf


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (["spam", "ham", "ham", "spam"], r"got names \('ham', 'spam'\)\. Pass `\[int\(label == 'spam'\)"),
        (np.array(["spam", "ham", "ham", "spam"], dtype=object), r"label == 'spam'"),
        ([1, -1, -1, 1], r"got -1 in row 1\. Pass `\[int\(label > 0\) for label in references\]`"),
    ],
)
def test_labels_of_other_kinds_have_a_cure_that_works(references, message):
    with pytest.raises(ValueError, match=message) as error:
        compute(BINARY, references, mode="positive")
    cure = pasted(error, references=list(references))["references"]
    assert cure == HITS.tolist()
    assert compute(BINARY, cure, mode="positive")["n"] == 4


def test_names_of_classes_have_a_cure_that_works():
    names = ["cat", "dog", "cow"]
    references = [names[label] for label in LABELS]
    with pytest.raises(ValueError, match=r"got names \('cat' in row 0\)") as error:
        compute(ROWS, references)
    (code,) = re.findall(r"`(\[names[^`]+)`", str(error.value))
    assert compute(ROWS, eval(code, {"names": names, "references": references})) == compute(ROWS, LABELS)


# ---- arrays ----


@pytest.mark.parametrize(
    "convert",
    [
        lambda rows: rows.tolist(),
        lambda rows: rows.astype(object),
        lambda rows: [[Decimal(repr(value)) for value in row] for row in rows.tolist()],
        lambda rows: rows.astype(np.longdouble),
        lambda rows: np.ma.masked_array(rows, mask=False),
        lambda rows: np.asfortranarray(rows),
        lambda rows: rows[::-1][::-1],
        torch.from_numpy,
        lambda rows: [torch.tensor(row) for row in rows],
        lambda rows: tuple(map(tuple, rows)),
    ],
)
def test_rows_of_every_kind(convert):
    expected = compute(ROWS, LABELS)
    assert compute(convert(ROWS), LABELS) == pytest.approx(expected, abs=1e-9)
    logits = np.log(ROWS)
    expected = calibration_metrics(logits, LABELS)
    assert calibration_metrics(convert(logits), LABELS) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "convert",
    [
        lambda labels: labels.tolist(),
        lambda labels: labels.astype(object),
        lambda labels: labels.astype(np.uint8),
        lambda labels: np.ma.masked_array(labels, mask=False),
        torch.from_numpy,
    ],
)
def test_labels_of_every_kind(convert):
    assert compute(ROWS, convert(LABELS)) == compute(ROWS, LABELS)
    assert calibration_metrics(np.log(ROWS), convert(LABELS)) == calibration_metrics(np.log(ROWS), LABELS)


def test_bfloat16_of_any_library():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rows = ROWS.astype(ml_dtypes.bfloat16)
    theirs = compute(torch.tensor(ROWS).bfloat16(), LABELS)
    assert compute(rows, LABELS) == theirs
    logits = np.log(ROWS).astype(ml_dtypes.bfloat16)
    assert calibration_metrics(logits, LABELS) == calibration_metrics(torch.tensor(np.log(ROWS)).bfloat16(), LABELS)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[0.5, 0.5], [1.0]], [0, 1], r"(rows of one length|numbers in rows of one length).*(inhomogeneous|list of 2)"),
        (np.array([[0.5, 0.5], [1.0]], dtype=object), [0, 1], r"in rows of one length, got a list of 2 in row 0"),
        ([[0.5, None], [1.0, 0.0]], [0, 1], r"got nothing \(None\) in row 0"),
        (ROWS.astype(str), LABELS, r"got <U\d+\. Pass `predictions\.astype\(float\)`"),
        (ROWS, np.ma.masked_array(LABELS, mask=[0, 1, 0, 0]), r"`references` without masked values, got one in row 1"),
        (np.ma.masked_array(ROWS, mask=ROWS > 0.85), LABELS, r"`predictions` without masked values, got one in row 3"),
        (ROWS.astype(complex), LABELS, r"float dtype, got complex128"),
        (ROWS, [0, 1, None, 2], r"`references` as numbers.*got nothing \(None\) in row 2"),
        (ROWS, [0, 1, [2], 2], r"rows of one length"),
        (ROWS, np.array(["2020-01-01"] * 4, "datetime64[D]"), r"integer dtype, got datetime64"),
    ],
)
def test_what_is_refused_in_our_words(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        compute(predictions, references)
    with pytest.raises(ValueError, match=r"Expected .*`(logits|labels)"):
        calibration_metrics(predictions, references)


def test_text_is_taken_as_the_cure_says():
    texts = ROWS.astype(str)
    with pytest.raises(ValueError, match="Pass `pred") as error:
        compute(texts, LABELS)
    assert compute(pasted(error, predictions=texts)["predictions"], LABELS) == compute(ROWS, LABELS)
