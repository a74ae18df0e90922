"""CSV of predictions as people have them: what is a score, what is a label, and what numbers the rows."""

from __future__ import annotations

import numpy as np
import pytest
from csv_rows import read_csv

from carot_hf.ece.ece import ECE

ROWS = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.05, 0.9, 0.05]]
LABELS = [0, 2, 2, 1]


def lines(*, header=None, before=None, separator=",", quote="", comma=False, label_first=False):
    """The rows with what people put around them; ``before``: a column in front."""
    found = [] if header is None else [header]
    for row, (scores, label) in enumerate(zip(ROWS, LABELS, strict=True)):
        cells = [str(value).replace(".", ",") if comma else str(value) for value in scores]
        cells = [str(label), *cells] if label_first else [*cells, str(label)]
        found.append([*([] if before is None else [str(before(row))]), *cells])
    return "\n".join(separator.join(f"{quote}{cell}{quote}" for cell in line) for line in found)


@pytest.mark.parametrize(
    "text",
    [
        lines(),
        lines(header=["a", "b", "c", "label"]),
        lines(header=["a", "b", "c", "Labels"]),
        lines(header=["TARGET", "a", "b", "c"], label_first=True),
        lines(header=["y_true", "a", "b", "c"], label_first=True),
        lines(separator=";", comma=True),
        lines(separator="\t", comma=True, header=["a", "b", "c", "label"]),
        lines(quote='"'),
        lines(quote='"', comma=True),
        lines(separator=";", quote='"', comma=True, header=["a", "b", "c", "label"]),
        lines(separator=", "),
        lines(separator=" "),
        lines() + "\n\n",
    ],
)
def test_scores_and_labels(text):
    found = read_csv(text)
    assert found.predictions.tolist() == ROWS
    assert found.labels.tolist() == LABELS
    assert found.notes == []


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (lines(header=["", "a", "b", "c", "label"], before=lambda row: row), "the one without a name"),
        (lines(header=["Unnamed: 0", "a", "b", "c", "label"], before=lambda row: row), "'unnamed: 0'"),
        (lines(header=["id", "a", "b", "c", "label"], before=lambda row: 17 * row), "'id'"),
        (lines(header=["image_id", "a", "b", "c", "label"], before=lambda row: f"x{row}.png"), "'image_id'"),
        (lines(before=lambda row: row), "The first column, 0, 1, 2 ..., is an index and left out"),
        (lines(before=lambda row: row + 1), "The first column, 1, 2, 3 ..., is an index"),
        (lines(header=["n", "a", "b", "c", "label"], before=lambda row: row + 5), "The first column, 5, 6, 7"),
    ],
)
def test_what_numbers_the_rows_is_left_out_and_said(text, note):
    """An index column gave ECE .661 for .119 without a word."""
    found = read_csv(text)
    assert found.predictions.tolist() == ROWS
    assert found.labels.tolist() == LABELS
    assert len(found.notes) == 1
    assert note in found.notes[0]
    measured = ECE().compute(predictions=found.predictions, references=found.labels)["ece"]
    assert measured == ECE().compute(predictions=ROWS, references=LABELS)["ece"]


def test_a_label_that_is_not_called_so_is_said():
    found = read_csv(lines(header=["a", "b", "c", "truth"]))
    assert found.labels.tolist() == LABELS
    assert found.notes == ["The labels are taken from the last column, 'truth'."]


def test_one_column_of_scores():
    found = read_csv("confidence,label\n0.9,1\n0.8,0\n")
    assert found.predictions.tolist() == [0.9, 0.8]
    assert found.predictions.dtype == np.float64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected rows in the file, got none"),
        ("a,b,label\n", "at least one row of predictions and a label, got 0 rows of 3 columns"),
        ("label\n1\n", "got 1 rows of 1 columns"),
        ("0.5\n0.6\n", "got 2 rows of 1 columns, of which 0 are predictions"),
        ("a,label,target\n0.1,1,1\n", r"one column of labels, got \['label', 'target'\]"),
        ("0.5,0.5,0\n0.5,0\n", "Expected 3 columns in line 2, as in the first row, got 2"),
        ("a,b,label\n0.7,0.3,1\n0.4,0.6\n", "Expected 3 columns in line 3, as in the first row, got 2"),
        ("0.7,0.3,1\n0.4,0.6,dog\n", "Expected a number in line 2, got 'dog'"),
        ("a,label,b\n0.7,1,0.3\n0.4,0.5,0.6\n", "Expected a whole number as label in line 3, got '0.5'"),
        ("a,b,label\n0.5,x,0\n", "Expected a number in line 2, got 'x'"),
        ("0.5,0.5,0.5\n", "Expected a whole number as label in line 1, got '0.5'"),
    ],
)
def test_what_is_refused_names_its_line(text, message):
    with pytest.raises(ValueError, match=message):
        read_csv(text)
