"""Labels of other people's data are classes by name; where names do not match the set is refused with both lists."""

from __future__ import annotations

import dataclasses
import logging

import datasets
import numpy as np
import pytest
import torch
import yaml
from layouts import content, folders, parquet, picture
from PIL import Image
from toys import CLASSES, Noise, noise_set

from carot_hf import ShiftSet, ShiftSuite, load_suite
from carot_hf.data.labels import ClassNames, LabelTable, folded, not_a_label

TEXTILE = ["nominal", "local", "global"]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(labels, feature, name="label"):
    images = [{"bytes": picture(0, row), "path": None} for row in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), name: feature})
    return datasets.Dataset.from_dict({"image": images, name: labels}, features=features)


# ---- names ----


@pytest.mark.parametrize(
    ("name", "index"),
    [("nominal", 0), ("Local", 1), ("GLOBAL", 2), ("other", None), (" local ", 1), ("nom_inal", None)],
)
def test_exact_then_folded(name, index):
    assert ClassNames(TEXTILE).find(name) == index


def test_folding_is_of_case_underscores_spaces_and_forms_of_unicode():
    assert folded("Golden_Retriever") == folded("golden  retriever") == "golden retriever"
    assert folded("cafe\u0301") == folded("caf\u00e9")
    assert folded("a-b") != folded("a b")


def test_an_exact_name_goes_before_a_folded_one():
    names = ClassNames(["Polish", "polish"])
    assert (names.find("Polish"), names.find("polish"), names.find("POLISH")) == (0, 1, None)


def test_label_names_as_a_list_or_a_mapping():
    by_list = ClassNames(["fine fabric", "flaw"], ["good", "bad"])
    by_name = ClassNames(["fine fabric", "flaw"], {"good": "fine fabric", "ok": "Fine_Fabric", "bad": "flaw"})
    assert [by_list.find(name) for name in ("good", "bad", "flaw", "Good")] == [0, 1, 1, 0]
    assert [by_name.find(name) for name in ("good", "ok", "bad", "fine fabric")] == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("label_names", "message"),
    [
        (["good"], r"Expected 2 `label_names`, one for each class in order, got \['good'\]"),
        (["good", "good"], r"Expected distinct `label_names`, got 'good' more than once"),
        ({"good": "fine"}, r"to say for 'good' one of the class names \['fine fabric', 'flaw'\], got 'fine'"),
        ({"good": 0}, r"got 0\. Correct it"),
    ],
)
def test_label_names_that_name_no_class(label_names, message):
    with pytest.raises(ValueError, match=message):
        ClassNames(["fine fabric", "flaw"], label_names)


def test_a_class_label_in_another_order_is_mapped():
    table = LabelTable(["global", "local", "nominal"], TEXTILE, "'far'")
    assert [table(number) for number in range(3)] == [2, 1, 0]
    assert table.all([0, 0, 2, 1]).tolist() == [2, 2, 0, 1]
    assert not table.keeps_numbers
    assert LabelTable(TEXTILE, TEXTILE, "'far'").keeps_numbers


def test_names_of_nothing_are_refused_with_both_lists():
    with pytest.raises(ValueError, match=r"3 classes \['nominal', .*\].*got \['a', 'local'\], of which \['a'\]"):
        LabelTable(["a", "local"], TEXTILE, "'far'")
    with pytest.raises(ValueError, match=r"different classes, got \['Local', 'local'\], both for 'local'"):
        LabelTable(["Local", "local"], TEXTILE, "'far'")
    assert LabelTable(["a", "b"], TEXTILE, "'far'", published=True).all([1, 0]).tolist() == [1, 0]


# ---- in suites and trainers ----


def brightness_set(order):
    """The noise, whose brightness follows the label, with a ClassLabel in another order."""
    noise = Noise(40, 9)
    numbers = [order.index(CLASSES[label]) for label in noise.labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
    images = [Image.fromarray(pixels) for pixels in noise.images]
    return datasets.Dataset.from_dict({"image": images, "label": numbers}, features=features)


def test_a_set_in_another_order_has_the_accuracy_of_the_right_one(suite, make_trainer, tmp_path):
    """Accuracy .161 where .62 is right, without a word."""
    trainer = make_trainer(suite=suite)
    order = ["three", "one", "zero", "two"]
    right = ShiftSet(Noise(40, 9), name="far", num_classes=4)
    expected = trainer.evaluate(right)
    found = trainer.evaluate(brightness_set(order))
    for key in ("eval_accuracy", "eval_nll", "eval_ece"):
        assert found[key] == pytest.approx(expected[key], abs=1e-6)
    predicted = trainer.predict(brightness_set(order))
    assert predicted.label_ids.tolist() == Noise(40, 9).labels.tolist()
    named = {"far": brightness_set(order), "near": brightness_set(CLASSES)}
    both = trainer.evaluate(named)
    assert both["eval_far_nll"] == pytest.approx(both["eval_near_nll"], abs=1e-6)


def test_a_transform_does_not_hide_the_order_of_the_data(suite, make_trainer):
    """What it returns is not ours to map, and was taken by position."""
    order = ["three", "one", "zero", "two"]
    trainer, data = make_trainer(suite=suite), brightness_set(order)
    with pytest.raises(ValueError, match=r"order of the classes \['zero', .*got data .*\['three', .*align_labels_with"):
        trainer.evaluate(data.with_transform(lambda batch: batch))
    ids = {name: index for index, name in enumerate(CLASSES)}
    aligned = data.align_labels_with_mapping(ids, "label").with_transform(lambda batch: batch)
    assert trainer.predict(aligned).label_ids.tolist() == Noise(40, 9).labels.tolist()
    others = rows([0, 1], datasets.ClassLabel(names=["cat", "dog"])).with_transform(lambda batch: batch)
    assert trainer.predict(others).label_ids.tolist() == [0, 1]  # it may have made classes of ours of them


def test_a_set_may_serve_two_suites():
    data = ShiftSet(rows([0, 1, 0], datasets.ClassLabel(names=["b", "a"])), name="s", num_classes=2)
    first = data.matched(ClassNames(["a", "b"]))
    second = first.matched(ClassNames(["b", "a"]))
    assert (first.labels.tolist(), second.labels.tolist()) == ([1, 0, 1], [0, 1, 0])
    assert [second[row]["label"] for row in range(3)] == [0, 1, 0]
    assert first.matched(ClassNames(["a", "b"])) is first


def test_imagefolder_of_datasets(suite, make_trainer, tmp_path):
    for row, label in enumerate(Noise(16, 9).labels):
        place = tmp_path / "noise" / f"{CLASSES[label].upper()}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(Noise(16, 9).images[row]).save(place / f"{row:02d}.png")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "noise"), split="train")
    assert loaded.features["label"].names == ["ONE", "THREE", "TWO", "ZERO"]
    trainer = make_trainer(suite=suite)
    assert trainer.predict(loaded).label_ids.tolist() == [1] * 4 + [3] * 4 + [2] * 4 + [0] * 4


def test_other_names_are_refused_by_evaluate_and_predict(suite, make_trainer):
    trainer = make_trainer(suite=suite)
    other = rows([0, 1], datasets.ClassLabel(names=["cat", "dog"]))
    for call in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"'(evaluation|prediction)'.*\['zero', .*got \['cat', 'dog'\].*`label_n"):
            call(other)
    with pytest.raises(ValueError, match=r"set 'far'.*got \['cat', 'dog'\]"):
        dataclasses.replace(suite, shifts={"far": other})


def test_numbers_without_names_are_said_with_their_counts(suite, make_trainer, caplog):
    trainer = make_trainer(suite=suite)
    numbers = rows([0, 1, 1, 3], datasets.Value("int64"))
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        trainer.evaluate({"mine": numbers})
        trainer.evaluate({"mine": numbers})
    said = [record.getMessage() for record in caplog.records if "without names" in record.getMessage()]
    assert said == [
        "Labels of set 'mine' are numbers without names, taken for the classes in order: 1 'zero', 2 'one', 0 'two', "
        "1 'three'."
    ]


def test_other_numbers_under_the_same_name_are_said_again(suite, make_trainer, caplog):
    trainer = make_trainer(suite=suite)
    logging.getLogger("transformers").propagate = True
    for labels in ([0, 1], [0, 1], [2, 3]):
        trainer.evaluate(rows(labels, datasets.Value("int64")))
    said = [record.getMessage() for record in caplog.records if "without names" in record.getMessage()]
    assert [line.split("order: ")[1] for line in said] == [
        "1 'zero', 1 'one', 0 'two', 0 'three'.", "0 'zero', 0 'one', 1 'two', 1 'three'.",
    ]  # fmt: skip


def test_sets_straight_into_a_suite():
    order = ["three", "two", "one", "zero"]
    train = rows([0, 1, 2, 3, 0], datasets.ClassLabel(names=order), name="labels")
    text = rows(["Zero", "one", "THREE"], datasets.Value("large_string"))
    suite = ShiftSuite(
        name="mine",
        class_names=list(CLASSES),
        templates=["a {}"],
        train=train,
        validation=text,
        test=rows([3, 1], datasets.Value("int64")),
        shifts={"far": noise_set("far", 4, 0), "pairs": [(Image.new("RGB", (2, 2)), torch.tensor(2))]},
    )
    assert suite.train.labels.tolist() == [3, 2, 1, 0, 3]
    assert [suite.train[row]["label"] for row in range(5)] == [3, 2, 1, 0, 3]
    assert (suite.validation.labels.tolist(), suite.validation[2]["label"]) == ([0, 1, 3], 3)
    assert suite.test.labels.tolist() == [3, 1]
    assert suite.shifts["pairs"][0]["label"] == 2
    assert suite.train.subset(np.array([1, 3]), "part")[1]["label"] == 0


def test_label_names_of_a_suite_serve_python_too(suite, make_trainer):
    mine = dataclasses.replace(suite, label_names={"null": "zero", "eins": "one", "zwei": "two", "drei": "three"})
    data = rows([0, 1, 2], datasets.ClassLabel(names=["zwei", "drei", "null"]))
    assert make_trainer(suite=mine).predict(data).label_ids.tolist() == [2, 3, 0]


def test_a_suite_of_yaml_with_two_orders(tmp_path):
    """Train parquet [nominal, local, global], shift parquet [global, local, nominal]."""
    labels = np.array([0, 1, 2] * 4)
    parquet(tmp_path / "home", "train", labels, feature=datasets.ClassLabel(names=TEXTILE))
    parquet(tmp_path / "home", "test", labels[:5], feature=datasets.ClassLabel(names=TEXTILE))
    parquet(tmp_path / "far", "test", labels, feature=datasets.ClassLabel(names=TEXTILE[::-1]))
    path = tmp_path / "textile.yaml"
    description = {
        "train": {"path": "home"},
        "validation": 0.34,
        "test": {"path": "home", "name": "home"},
        "shifts": {"far": {"path": "far"}},
    }
    path.write_text(yaml.safe_dump(description))
    suite = load_suite(path)
    assert suite.class_names == TEXTILE
    assert suite.shifts["far"].labels.tolist() == [2, 1, 0] * 4
    streamed = load_suite(path, streaming=True).shifts["far"]
    assert [label for label, *_ in content(streamed)] == [2, 1, 0] * 4
    folders(tmp_path / "folders", [0, 1, 2], ["NOMINAL", "Local", "global"])
    description["shifts"]["far"]["path"] = "folders"
    path.write_text(yaml.safe_dump(description))
    assert sorted(load_suite(path).shifts["far"].labels.tolist()) == [0, 1, 2]


def test_true_and_false_are_names_like_any_other(tmp_path):
    """They were the classes 1 and 0, in silence."""
    data = rows([True, False, True], datasets.Value("bool"))
    with pytest.raises(ValueError, match=r"2 names \['good', 'flaw'\], got 'True'\. .*`label_names`.*\(row 0\)"):
        ShiftSet(data, name="s", num_classes=2).matched(ClassNames(["good", "flaw"]))
    names = ClassNames(["good", "flaw"], {"false": "good", "true": "flaw"})
    assert ShiftSet(data, name="s", num_classes=2).matched(names).labels.tolist() == [1, 0, 1]
    assert LabelTable(None, names, "'s'").all([True, 1, False, 0]).tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="got 'True'"):
        LabelTable(None, ["good", "flaw"], "'s'").all([1, True])


# ---- what is no label ----


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, None], r"nothing \(null or NaN\).*in row 1"),
        ([0.0, float("nan")], r"nothing \(null or NaN\).*in row 1"),
        ([[1, 0], [0, 1]], r"a one-hot row \(\[1, 0\]\).*argmax, in row 0"),
        ([[0], [1]], r"a one-hot row|a list"),
        ([0, [1, 2]], r"a list \(\[1, 2\]\).*in row 1"),
    ],
)
def test_what_is_no_label_is_refused_with_its_row(labels, reason):
    with pytest.raises(ValueError, match=reason):
        ShiftSet(Noise(2, 0), name="s", num_classes=2, labels=labels)


@pytest.mark.parametrize("label", [[1], torch.tensor([0, 1]), None, float("nan")])
def test_what_is_no_label_is_refused_when_it_is_read(label):
    items = [{"image": Image.new("RGB", (2, 2)), "label": label}]
    with pytest.raises(ValueError, match="Expected one label in set 's' at index 0, a class index or a name, got"):
        ShiftSet(items, name="s", num_classes=4)[0]


def test_what_is_wrong_is_said():
    assert not_a_label(3) is not_a_label("cat") is not_a_label(np.int64(2)) is None
    assert "one-hot" in not_a_label([0, 1, 0])
    assert "a list" in not_a_label([1, 1, 0])


def test_equal_class_names_are_refused_unless_they_are_published(suite):
    with pytest.raises(ValueError, match="got 'zero' for the classes 0 and 3"):
        dataclasses.replace(suite, class_names=["zero", "one", "two", "zero"])
    published = dataclasses.replace(
        suite, class_names=["zero", "one", "two", "zero"], sources={"class_names": "files of x"}
    )
    assert published.class_names.count("zero") == 2


@pytest.mark.parametrize(("first", "second"), [("a", "A"), ("a", " a"), ("a  b", "a b")])
def test_class_names_that_tokenise_alike_are_refused(suite, make_trainer, first, second):
    alike = dataclasses.replace(suite, class_names=[first, second, "two", "three"])
    with pytest.raises(ValueError, match=r"that the tokenizer tells apart, got .* \(classes 0 and 1\)"):
        make_trainer(suite=alike)
