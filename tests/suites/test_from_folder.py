"""A suite in a bare folder: the same as the YAML file that says it all, and what is refused in place of a guess."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from layouts import content, folders, parquet, picture, put, tars

from carot_hf import load_suite
from carot_hf.suites.from_folder import describe

NAMES = ["apple", "fig", "pear"]


@pytest.fixture
def fruit(tmp_path):
    """20 images of each class to train on, and less of the others."""
    root = tmp_path / "fruit"
    for name, labels in (("train", [0, 1, 2] * 20), ("test", [2, 0, 1, 1]), ("sketch", [1, 0, 2]), ("night", [0, 2])):
        folders(root / name, labels, NAMES)
    return root


def as_yaml(root, **description):
    """The YAML file beside a folder that says all of it."""
    path = root.parent / "said.yaml"
    path.write_text(yaml.safe_dump(description, allow_unicode=True), encoding="utf-8")
    return path


def sets_of(suite):
    named = {"train": suite.train, "validation": suite.validation, "test": suite.test, **suite.shifts}
    return {name: None if data is None else sorted(content(data)) for name, data in named.items()}


def assert_same(found, expected):
    assert found.content_hash == expected.content_hash
    assert (found.class_names, found.templates) == (expected.class_names, expected.templates)
    assert list(found.shifts) == list(expected.shifts)
    assert sets_of(found) == sets_of(expected)


# ---- the same as a YAML file ----


def test_it_is_the_suite_that_a_file_would_say(fruit):
    found = load_suite(fruit)
    expected = load_suite(
        as_yaml(
            fruit,
            train={"path": "fruit/train"},
            validation=0.1,
            test={"path": "fruit/test"},
            shifts={"night": {"path": "fruit/night"}, "sketch": {"path": "fruit/sketch"}},
        )
    )
    assert_same(found, expected)
    assert (found.name, found.class_names, found.templates) == ("fruit", NAMES, ["a photo of a {}."])
    assert np.bincount(found.validation.labels).tolist() == [2, 2, 2]  # a tenth of 20
    assert (len(found.train), found.test.name) == (54, "test")
    assert sets_of(found)["sketch"] == [(0, 0, 1), (1, 1, 0), (2, 2, 2)]


@pytest.mark.parametrize("held", ["validation", "val", "Valid", "DEV"])
@pytest.mark.parametrize(("train", "test"), [("train", "testing"), ("Training", "eval")])
def test_other_names_of_the_splits(fruit, held, train, test):
    folders(fruit / held, [1, 2, 0, 0, 1], NAMES)
    for old, new in (("train", train), ("test", test)):
        (fruit / old).rename(fruit / new)
    found = load_suite(fruit)
    entries = {"train": {"path": f"fruit/{train}"}, "validation": {"path": f"fruit/{held}"}}
    shifts = {name: {"path": f"fruit/{name}"} for name in ("night", "sketch")}
    assert_same(found, load_suite(as_yaml(fruit, **entries, test={"path": f"fruit/{test}"}, shifts=shifts)))
    assert (len(found.train), len(found.validation), len(found.test)) == (60, 5, 4)


@pytest.mark.parametrize("written", ["fruit", "fruit/", "./fruit", "{here}/fruit", "~/fruit", "other/../fruit//"])
def test_however_the_folder_is_named(fruit, monkeypatch, written):
    (fruit.parent / "other").mkdir()
    monkeypatch.chdir(fruit.parent)
    monkeypatch.setenv("HOME", str(fruit.parent))
    found = load_suite(written.format(here=fruit.parent))
    assert (found.name, len(found.train)) == ("fruit", 54)
    monkeypatch.chdir(fruit)
    assert load_suite(".").name == "fruit"


def test_the_embedded_suites_go_before_folders_of_their_names(fruit, monkeypatch):
    fruit.rename(fruit.parent / "digits")
    monkeypatch.chdir(fruit.parent)
    assert load_suite("digits").test.name == "uci"
    assert load_suite("digits/").class_names == NAMES
    (fruit.parent / "a.yaml").mkdir()
    with pytest.raises(ValueError, match=r"Expected a YAML file, found a folder at a\.yaml"):
        load_suite("a.yaml")


def test_sets_may_be_tables_or_files_of_any_kind(tmp_path):
    root = tmp_path / "mixed"
    folders(root / "train", [0, 1] * 5, NAMES)
    parquet(root / "test", "all", np.array([1, 0, 1]), feature=datasets.ClassLabel(names=NAMES[:2]))
    put(root / "table", "1.png", "2.png")
    (root / "table/metadata.csv").write_text("file_name,label\n1.png,fig\n2.png,apple\n")
    tars(root / "tar", [1, 1, 0], column="label", names=NAMES)
    saved = {"image": [{"bytes": picture(0, 7), "path": None}], "label": ["fig"]}
    datasets.Dataset.from_dict(saved).cast_column("image", datasets.Image()).save_to_disk(str(root / "saved"))
    suite = load_suite(root)
    shifts = {name: {"path": f"mixed/{name}"} for name in ("saved", "table", "tar")}
    entries = {"train": {"path": "mixed/train"}, "validation": 0.1, "test": {"path": "mixed/test"}}
    assert_same(suite, load_suite(as_yaml(root, **entries, shifts=shifts)))
    assert [row[0] for row in content(suite.shifts["table"])] == [1, 0]
    assert sorted(row[0] for row in content(suite.shifts["tar"])) == [0, 1, 1]
    assert suite.shifts["saved"].labels.tolist() == [1]
    streamed = load_suite(root, streaming=True)
    assert type(streamed.shifts["table"]).__name__ == "StreamedSet"
    with pytest.raises(ValueError, match=r"Expected options out of \['streaming'\] for the suite"):
        load_suite(root, root="x")


@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_training_set_the_names_are_the_test_sets(fruit, streaming):
    shutil.rmtree(fruit / "train")
    found = load_suite(fruit, streaming=streaming)
    shifts = {name: {"path": f"fruit/{name}"} for name in ("night", "sketch")}
    expected = load_suite(as_yaml(fruit, test={"path": "fruit/test"}, shifts=shifts), streaming=streaming)
    assert (found.train, found.validation, found.class_names) == (None, None, NAMES)
    assert list(found.evaluation_sets) == ["test", "night", "sketch"]
    assert found.content_hash == expected.content_hash
    if not streaming:
        assert_same(found, expected)
        named = {"class_names": ["pear", "fig", "apple"], "test": {"path": "fruit/test"}, "shifts": shifts}
        assert load_suite(as_yaml(fruit, **named)).shifts["night"].labels.tolist() == [2, 0]


def test_a_validation_set_without_a_training_set(fruit):
    (fruit / "train").rename(fruit / "val")
    shutil.rmtree(fruit / "test/fig")
    with pytest.raises(
        ValueError, match=r"fruit: validation: Expected labels of 'validation'.* got 'fig'.*suite\.yaml"
    ):
        load_suite(fruit)  # the classes are the test set's
    folders(fruit / "test", [1], NAMES)
    suite = load_suite(fruit)
    assert (suite.train, len(suite.validation)) == (None, 60)


# ---- a YAML file in the folder ----


SAID = "test: {path: sketch, name: said}\n"


@pytest.mark.parametrize("name", ["suite.yaml", "suite.yml", "mine.yaml", "other.yml"])
def test_a_file_in_the_folder_says_it(fruit, name, caplog):
    (fruit / name).write_text(SAID)
    (fruit / "data.yaml").write_text("train: ../train/images\nval: ../val/images\nnc: 3\nnames: [a, b, c]\n")
    (fruit / "broken.yaml").write_text("train: [")
    (fruit / ".hidden.yaml").write_text(SAID)
    with caplog.at_level(logging.INFO):
        suite = load_suite(fruit)
    assert (suite.test.name, suite.train) == ("said", None)
    assert f"the suite is read from {name}." in caplog.text


def test_two_files_are_refused_unless_one_is_the_suites(fruit):
    (fruit / "a.yaml").write_text(SAID)
    (fruit / "b.yml").write_text(SAID)
    with pytest.raises(ValueError, match=r"one YAML file of a suite in .*got 'a\.yaml', 'b\.yml'\. Name the file"):
        load_suite(fruit)
    (fruit / "suite.yaml").write_text("tests: {path: sketch}\n")
    with pytest.raises(ValueError, match=r"suite\.yaml: tests: expected one of the keys .*Did you mean 'test'"):
        load_suite(fruit)  # a slip in it is not passed over
    (fruit / "suite.yaml").write_text(SAID)
    assert load_suite(fruit).test.name == "said"
    (fruit / "suite.yml").write_text(SAID)
    with pytest.raises(ValueError, match=r"got 'suite\.yaml', 'suite\.yml'"):
        load_suite(fruit)


# ---- what is refused ----


def test_folders_of_classes_without_splits_are_refused(tmp_path):
    put(tmp_path / "fruit", "apple/1.jpg", "fig/2.jpg", "readme.txt")
    with pytest.raises(ValueError, match=r"Expected a folder test/ and, to train, .*directly in them, .*: 'apple', "
                       r"'fig'\. Move them into .*fruit/train, .*into the same folders in .*fruit/test"):  # fmt: skip
        load_suite(tmp_path / "fruit")


def test_an_empty_folder_and_one_of_other_things(tmp_path):
    (tmp_path / "empty/.git").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Expected a folder test/ .* in .*empty, got an empty folder"):
        load_suite(tmp_path / "empty")
    put(tmp_path / "loose", "1.png")
    (tmp_path / "loose/code").mkdir()
    with pytest.raises(ValueError, match=r"got the folders 'code' and the files '1\.png'\. Name .* in a YAML file"):
        load_suite(tmp_path / "loose")
    put(tmp_path / "twice", "fruit/train/a/1.png", "fruit/test/a/1.png")
    with pytest.raises(
        ValueError, match=r"one folder, 'fruit', which holds such folders\. Did you mean .*twice/fruit\?"
    ):
        load_suite(tmp_path / "twice")
    with pytest.raises(ValueError, match=r"Expected 'digits', 'imagenet', a file \.yaml, a folder or a .*none', "):
        load_suite(tmp_path / "none")


def test_a_suite_without_a_test_set_is_refused(fruit):
    (fruit / "test").rename(fruit / "val")
    with pytest.raises(ValueError, match=r"Expected a test set in .*: a folder test, testing, eval; got the folders "
                       r"'train', 'val', 'night', 'sketch'\. Name the folder of the test images test/"):  # fmt: skip
        load_suite(fruit)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eval", r"one folder for the test set in .*, got 'eval' and 'test'\. Keep one"),
        ("TRAINING", r"one folder for the train set in .*, got 'TRAINING' and 'train'\. Keep one"),
        ("train_set", r"called train or training, got 'train_set', which may be it, or a shifted set\. Rename it"),
        ("my dev", r"called validation or valid or val or dev, got 'my dev'"),
    ],
)
def test_two_folders_for_one_split_are_refused(fruit, name, said):
    folders(fruit / name, [0, 1], NAMES)
    with pytest.raises(ValueError, match=said):
        load_suite(fruit)


@pytest.mark.parametrize("name", ["id", "ood", "teacher", "teacher_sketch", "héron", "夜", "%%", "~root", "caf\udce9"])
def test_names_that_no_metric_can_have_are_refused(fruit, name):
    (fruit / "night").rename(fruit / name)
    with pytest.raises(
        ValueError, match=r"Expected a folder whose name a set can have in .*Rename the folder"
    ) as error:
        load_suite(fruit)
    assert repr(name) in str(error.value)


def test_names_are_made_fit_where_nothing_is_lost(fruit, caplog):
    for name in ("at  night 50%", "v1.2", "a__b-C"):
        folders(fruit / name, [0, 1], NAMES)
    with caplog.at_level(logging.INFO):
        suite = load_suite(fruit)
    assert set(suite.shifts) == {"night", "sketch", "at_night_50", "v1_2", "a__b-C"}
    assert "the set in 'at  night 50%' is called at_night_50." in caplog.text
    folders(fruit / "v1 2", [0, 1], NAMES)
    with pytest.raises(ValueError, match=r"name a set can have in .*, got 'v1\.2'\. Expected distinct set names"):
        load_suite(fruit)


def test_a_class_that_the_others_do_not_have(fruit):
    put(fruit, "sketch/plum/1.png")
    with pytest.raises(ValueError, match=r"fruit: shifts\.sketch: Expected labels of 'sketch'.* \['apple', 'fig', "
                       r"'pear'\], got 'plum'.* Or say in .*fruit/suite\.yaml what folders cannot"):  # fmt: skip
        load_suite(fruit)


def test_labels_are_matched_by_name(fruit):
    (fruit / "sketch/pear").rename(fruit / "sketch/PEAR")
    assert sets_of(load_suite(fruit))["sketch"] == [(0, 0, 1), (1, 1, 0), (2, 2, 2)]


def test_images_that_are_trained_on_are_no_test(fruit):
    shutil.copy(fruit / "train/apple/0.png", fruit / "test/apple/copy.png")
    with pytest.raises(ValueError, match=r"got [12] of the 5 images of set 'test' in the training set"):
        load_suite(fruit)


# ---- hostile layouts ----


def test_what_is_no_set_is_passed_over_and_said(fruit, caplog):
    put(fruit, "1.png", ".cache/a/1.png", "__MACOSX/a/2.png", "unsorted/3.png")
    (fruit / "README.md").write_text("fruit")
    (fruit / "labels.csv").write_text("a,b\n1,2\n")
    (fruit / "code").mkdir()
    (fruit / "code/table.csv").write_text("a,b\n1,2\n")
    assert set(load_suite(fruit).shifts) == {"night", "sketch"}
    assert "files beside the folders of the sets are passed over: '1.png', 'labels.csv'." in caplog.text
    assert "or metadata.csv, are passed over: 'code', 'unsorted'." in caplog.text


def test_links_in_a_circle(fruit, tmp_path, caplog):
    (fruit / "round").symlink_to(fruit)
    (fruit / "above").symlink_to(tmp_path)
    (fruit / "sketch/apple/round").symlink_to(fruit / "sketch")
    (fruit / "nowhere").symlink_to(tmp_path / "gone")
    (fruit / "itself").symlink_to(fruit / "itself")
    suite = load_suite(fruit)
    assert (set(suite.shifts), len(suite.shifts["sketch"])) == ({"night", "sketch"}, 3)
    assert "'round' leads back to the folder itself, or above it" in caplog.text
    assert "'above' leads back" in caplog.text


def test_a_set_may_be_a_link_but_not_to_another_set(fruit, tmp_path):
    folders(tmp_path / "store", [0, 1], NAMES)
    (fruit / "stored").symlink_to(tmp_path / "store")
    assert len(load_suite(fruit).shifts["stored"]) == 2
    (fruit / "again").symlink_to(fruit / "sketch")
    with pytest.raises(ValueError, match=r"shifts\.sketch: expected other files than those of `shifts\.again`"):
        load_suite(fruit)


def test_nested_splits_are_read_as_a_path_of_a_file(fruit):
    folders(fruit / "wild/test", [0, 1], NAMES)
    folders(fruit / "wild/train", [0, 1, 2], NAMES)
    assert len(load_suite(fruit).shifts["wild"]) == 2
    (fruit / "test").rename(fruit / "old")
    put(fruit, "test/train/apple/1.png")
    with pytest.raises(
        ValueError, match=r"fruit: test: Expected .*of split 'test' in .*which name the splits \['train'"
    ):
        load_suite(fruit)


def test_a_folder_that_cannot_be_read_is_refused(fruit, monkeypatch):
    """Its images were missing in silence. Whoever is root can read everything, so the refusal is made here."""
    closed = {str(fruit / "train/apple"), str(fruit / "sketch")}
    scan = os.scandir

    def guarded(path):
        if str(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    for name in ("sketch", "train/apple"):
        with pytest.raises(ValueError, match=rf"Expected a folder that can be read at .*{name}, got Permission denied"):
            load_suite(fruit)
        closed.discard(str(fruit / name))
    monkeypatch.setattr(Path, "iterdir", lambda path: guarded(str(path)))
    closed.add(str(fruit))
    with pytest.raises(ValueError, match=r"Expected a folder that can be read at .*fruit, got Permission denied\. Ch"):
        load_suite(fruit)


def test_an_empty_folder_of_a_split_is_not_taken_for_none(fruit):
    shutil.rmtree(fruit / "train")
    (fruit / "train").mkdir()
    with pytest.raises(ValueError, match=r"fruit: train: Expected .*of split 'train' in .*, got \[\]"):
        load_suite(fruit)


def test_names_of_classes_may_be_anything(tmp_path):
    names = ["50% off", "crème brûlée", "梨", "a'b\"c"]
    for name, labels in (("train", [0, 1, 2, 3] * 3), ("test", [3, 1, 0, 2])):
        folders(tmp_path / "odd" / name, labels, names)
    suite = load_suite(tmp_path / "odd")
    assert suite.class_names == sorted(names)
    assert sorted(suite.test.labels.tolist()) == [0, 1, 2, 3]


def test_the_description_is_that_of_a_file(fruit):
    folders(fruit / "dev", [0], NAMES)
    assert describe(fruit, "fruit") == {
        "train": {"path": "train"},
        "validation": {"path": "dev"},
        "test": {"path": "test"},
        "shifts": {"night": {"path": "night"}, "sketch": {"path": "sketch"}},
    }
