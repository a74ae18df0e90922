"""Figures of each class and confusion: scikit-learn's, cases by hand, and what the pictures show."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from toys import CLASSES, noise_set

from carot_hf.data.shift_set import ShiftSet
from carot_hf.evaluation.confusion import confusion_figure, write_confusion
from carot_hf.evaluation.per_class import (
    class_figures,
    confusion_shares,
    most_confused,
    per_class_csv,
    per_class_table,
)
from carot_hf.evaluation.per_image import PerImage, label_names


def drawn(size=400, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size).astype(np.int32)
    predicted = np.where(rng.random(size) < 0.6, labels, rng.integers(0, classes, size)).astype(np.int32)
    return labels, predicted, rng.random(size).astype(np.float32)


def test_figures_are_those_of_sklearn():
    labels, predicted, confidences = drawn()
    found = class_figures(labels, predicted, confidences, list("abcdefg"))
    precision, recall, _, support = precision_recall_fscore_support(labels, predicted, labels=range(7))
    assert found.recall == pytest.approx(recall, abs=1e-12)
    assert found.precision == pytest.approx(precision, abs=1e-12)
    assert found.count.tolist() == support.tolist()
    for label in range(7):  # a slow loop
        own = labels == label
        mean = sum(map(float, confidences[own])) / own.sum()
        assert found.gap[label] == pytest.approx(mean - (predicted[own] == label).mean(), abs=1e-12)
    assert found.worst() == sorted(range(7), key=lambda label: recall[label])
    assert found.worst(3) == found.worst()[:3]


def test_confusion_is_that_of_sklearn():
    labels, predicted, _ = drawn()
    counts = confusion_matrix(labels, predicted, labels=range(7))
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert confusion_shares(labels, predicted, 7) == pytest.approx(shares, abs=1e-12)
    errors = [counts[k].sum() + counts[:, k].sum() - 2 * counts[k, k] for k in range(7)]
    chosen = sorted(sorted(range(7), key=lambda k: -errors[k])[:3])
    assert most_confused(labels, predicted, 7, 3) == chosen
    part = confusion_shares(labels, predicted, 7, chosen)
    assert part == pytest.approx(shares[np.ix_(chosen, chosen)], abs=1e-12), "shares of the whole row"


def test_a_class_without_images_and_one_that_is_never_predicted():
    """Three images of a, taken for a, a, c at .9, .5, .4; one of b, taken for a at .8; none of c."""
    labels, predicted = np.array([0, 0, 0, 1], np.int32), np.array([0, 0, 2, 0], np.int32)
    found = class_figures(labels, predicted, np.array([0.9, 0.5, 0.4, 0.8], np.float32), ["a", "b", "c"])
    assert found.recall[:2].tolist() == [2 / 3, 0.0]
    assert math.isnan(found.recall[2])
    assert found.precision[[0, 2]].tolist() == [2 / 3, 0.0]
    assert math.isnan(found.precision[1]), "it is never predicted"
    assert found.gap[:2] == pytest.approx([0.6 - 2 / 3, 0.8], abs=1e-7)
    assert math.isnan(found.gap[2])
    rows = list(csv.reader(io.StringIO(per_class_csv({"far": found}))))
    assert rows == [
        ["set", "class", "n", "recall", "precision", "gap"],
        ["far", "a", "3", "0.6667", "0.6667", "-0.0667"],
        ["far", "b", "1", "0.0000", "", "0.8000"],
        ["far", "c", "0", "", "0.0000", ""],
    ]
    assert found.worst() == [1, 0], "a class without images is none of them"
    assert [line.split("|")[1].strip() for line in per_class_table(found).splitlines()[2:]] == ["b", "a"]
    shares = confusion_shares(labels, predicted, 3)
    assert shares[:2].tolist() == [[2 / 3, 0, 1 / 3], [1, 0, 0]]
    assert np.isnan(shares[2]).all()


def test_many_classes_need_no_matrix():
    labels, predicted = np.array([0, 1_000_000, 5], np.int32), np.array([7, 1_000_000, 0], np.int32)
    assert most_confused(labels, predicted, 1_000_001, 2) == [0, 5]
    assert confusion_shares(labels, predicted, 1_000_001, [0, 7]).tolist()[0] == [0, 1]


def test_labels_of_their_own_are_called_by_the_classes_that_they_stand_for():
    assert label_names(noise_set("home", 8, 0), CLASSES) == CLASSES
    part = ShiftSet([{"image": None, "label": 0}], name="part", num_classes=4, columns=[[2], [0, 3]])
    assert label_names(part, CLASSES) == ["two", "zero / three"]


def test_names_of_strangers_stay_names():
    figures = class_figures(*drawn(20, 2), ["a\x1b[2J\nb", "c|d"])
    assert "\x1b" not in per_class_csv({"far": figures})
    assert len(per_class_csv({"far": figures}).splitlines()) == 3
    assert all(line.count(" | ") == 4 for line in per_class_table(figures).splitlines() if "---" not in line)


def parts_of(classes, sets=("home",), size=3000):
    names = [f"${number}^$" for number in range(classes)]  # as a formula it has an error
    return {
        name: (PerImage({"": confidences}, predicted, labels), names)
        for row, name in enumerate(sets)
        for labels, predicted, confidences in [drawn(size, classes, row)]
    }


def test_the_picture_shows_the_shares(tmp_path):
    sets = parts_of(5, ("home", "far", "near", "fog"))
    figure = confusion_figure(sets)
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == list(sets)
    for ax, (part, names) in zip(axes, sets.values(), strict=True):
        shares = confusion_shares(part.labels, part.predicted, 5)
        assert np.asarray(ax.images[0].get_array()) == pytest.approx(shares)
        assert [text.get_text().replace("\\", "") for text in ax.get_xticklabels()] == names
        assert {text.get_text() for text in ax.texts} == {f"{share:.2f}" for share in shares.flat if share >= 0.005}
    write_confusion(tmp_path / "c.png", sets)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one set"):
        confusion_figure({})


def test_of_many_classes_the_most_confused_are_drawn(tmp_path):
    (ax, *_) = confusion_figure(parts_of(30)).axes
    assert (ax.get_title(), len(ax.get_yticklabels())) == ("home", 30)
    sets = parts_of(31)
    (ax, *_) = confusion_figure(sets).axes
    part, names = sets["home"]
    assert ax.get_title() == "home: 20 most confused of 31 classes"
    chosen = most_confused(part.labels, part.predicted, 31, 20)
    assert [text.get_text().replace("\\", "") for text in ax.get_yticklabels()] == [names[k] for k in chosen]
    part = PerImage(part.confidences, part.predicted, part.labels)
    write_confusion(tmp_path / "c.png", {"home": (part, ["零" * 40] * 31)})  # no glyph, and long
