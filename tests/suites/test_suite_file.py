"""A suite of one's own in a YAML file: the documented example, and what every mistake is answered with."""

from __future__ import annotations

import shutil

import datasets
import numpy as np
import pytest
import yaml
from layouts import content, folders, parquet, picture, tars
from toys import ROOT

from carot_hf import load_suite

EXAMPLE = ROOT / "examples" / "suites" / "pets.yaml"
HOME = np.array([0, 1, 2] * 10)


@pytest.fixture
def pets(tmp_path):
    """The example with data of three layouts beside it."""
    shutil.copy(EXAMPLE, tmp_path / "pets.yaml")
    parquet(tmp_path / "pets/home", "train", HOME, files=2)
    parquet(tmp_path / "pets/home", "test", HOME[:7])
    folders(tmp_path / "pets/sketch", [2, 0, 1], ["cat", "dog", "rabbit"])
    tars(tmp_path / "pets/zoo", [1, 0, 1, 1], column="label", names=["feline", "other"])
    return tmp_path / "pets.yaml"


def changed(pets, **keys):
    """The example with keys changed; None takes one out."""
    description = yaml.safe_load(pets.read_text())
    for path, value in keys.items():
        *outer, last = path.split("__")
        place = description
        for key in outer:
            place = place[key]
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    pets.write_text(yaml.safe_dump(description))
    return pets


def test_the_documented_example(pets, make_trainer):
    suite = load_suite(pets)
    assert (suite.name, suite.version, suite.class_names) == ("pets", "1.0", ["cat", "dog", "rabbit"])
    assert suite.templates == ["a photo of a {}.", "an image of a {}."]
    assert (len(suite.train), len(suite.validation), suite.test.name) == (24, 6, "home")
    assert np.bincount(suite.validation.labels).tolist() == [2, 2, 2]  # 20 % of 30 over three classes
    assert sorted(content(suite.train) + content(suite.validation)) == sorted((x, x, i) for i, x in enumerate(HOME))
    assert sorted(content(suite.shifts["sketch"])) == [(0, 0, 1), (1, 1, 2), (2, 2, 0)]
    assert content(suite.shifts["zoo"]) == [(1, 1, 0), (0, 0, 1), (1, 1, 2), (1, 1, 3)]
    assert suite.shifts["zoo"].columns == [[0], [1, 2]]
    assert suite.recommended == {"learning_rate": 1e-5, "per_device_train_batch_size": 8, "num_train_epochs": 2}
    trainer = make_trainer(suite=suite, max_steps=1)
    trainer.train()
    assert {"eval_home_ece", "eval_sketch_ece", "eval_zoo_ece"} < set(trainer.evaluate())


def test_a_stream_of_ones_own(pets):
    suite = load_suite(str(pets), streaming=True)
    assert type(suite.shifts["zoo"]).__name__ == "StreamedSet"
    assert [label for label, *_ in content(suite.shifts["zoo"])] == [1, 0, 1, 1]


def test_names_and_templates_may_stand_in_files_or_come_from_the_data(pets, tmp_path):
    (tmp_path / "names.txt").write_text("kitten\npuppy\nbunny\n")
    (tmp_path / "templates.txt").write_text("a {}\n\nthe {}\n")
    suite = load_suite(changed(pets, class_names="names.txt", templates="templates.txt", shifts=None))
    assert (suite.class_names, suite.templates) == (["kitten", "puppy", "bunny"], ["a {}", "the {}"])
    folders(tmp_path / "named/train", [1, 0, 1, 0], ["b", "a"])
    folders(tmp_path / "named/test", [1, 0], ["b", "a"])
    (tmp_path / "c.yaml").write_text(
        "train: {path: named, split: train}\nvalidation: 0.5\ntest: {path: named, split: test, name: home}\n"
    )
    suite = load_suite(tmp_path / "c.yaml")
    assert (suite.name, suite.class_names, suite.templates) == ("c", ["a", "b"], ["a photo of a {}."])
    assert suite.shifts == {}


def test_a_validation_set_of_its_own(pets):
    suite = load_suite(changed(pets, validation={"path": "pets/home", "split": "test"}))
    assert (len(suite.train), len(suite.validation)) == (30, 7)


def test_a_revision_is_asked_for_and_counts_as_content(pets, monkeypatch):
    asked = []
    labels = datasets.Dataset.from_dict({"image": [picture(1, 0)] * 6, "label": [0, 1, 2] * 2})
    rows = labels.cast_column("image", datasets.Image(decode=False))

    def fake(*args, **kwargs):
        asked.append((*args, kwargs.get("revision")))
        return rows

    monkeypatch.setattr("datasets.load_dataset", fake)
    hashes = set()
    for entry in ({}, {"revision": "abc"}, {"revision": "def"}):
        test = {"path": "owner/pets", "name": "home", **entry}
        sets = {"test": test, "train": {"path": "owner/pets", **entry}, "validation": 0.4, "allow_shared_files": True}
        suite = load_suite(changed(pets, **sets, shifts=None))
        assert {suite.train.content, suite.validation.content, suite.test.content} == {
            f"owner/pets@{entry['revision']}" if entry else None
        }
        hashes.add(suite.content_hash)
        pets.write_text(EXAMPLE.read_text())
    assert asked == [("owner/pets", revision) for revision in (None, None, "abc", "abc", "def", "def")]
    assert len(hashes) == 3


@pytest.mark.parametrize("labelled", [False, True])
def test_captions_of_ones_own(pets, tmp_path, labelled):
    images = [{"bytes": picture(0, row), "path": None} for row in range(4)]
    columns = {"image": images, "text": [f"pet {row}" for row in range(4)]} | (
        {"label": [0, 1, 2, 0]} if labelled else {}
    )
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    (tmp_path / "captions").mkdir()
    rows.to_parquet(tmp_path / "captions/train.parquet")
    validation = {"path": "pets/home", "split": "test"}
    suite = load_suite(changed(pets, train={"path": "captions", "caption_column": "text"}, validation=validation))
    item = suite.train[2]
    assert item["caption"] == "pet 2"
    assert item.get("label") == (2 if labelled else None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"temlates": ["{}"]},
            r"pets\.yaml: temlates: expected one of the keys name, .*Did you mean 'templates'\? Example: t",
        ),
        (
            {"train__spilt": "x"},
            r"pets\.yaml: train\.spilt: expected one of the keys path, split.*Did you mean 'split'",
        ),
        (
            {"shifts__zoo__colums": [[0]]},
            r"shifts\.zoo\.colums: .*Did you mean 'columns'\? Example: columns: \[\[0\], \[1, 2\]\]",
        ),
        ({"version": ["1.0"]}, r"version: expected text, got \['1\.0'\]\. Example: version: \"1\.0\""),
        (
            {"train": None},
            r"pets\.yaml: train: expected this key, got none, and `validation` is a share of it \(0\.2\)\. .* Ex",
        ),
        (
            {"validation": None},
            r"pets\.yaml: validation: expected this key beside `train`, got none\. .* Example: validation: 0\.1",
        ),
        ({"test": None}, r"pets\.yaml: test: expected this key, got none\. Example: test: \{path: data/test\}"),
        ({"shifts__zoo__path": None}, r"shifts\.zoo\.path: expected this key, got none\. Example: path: data/train"),
        ({"train": "pets/home"}, r"train: expected a mapping, got 'pets/home'\. Example: train: \{path"),
        (
            {"validation": True},
            r"validation: expected a mapping or a number, got True\. Example: validation: 0\.1",
        ),
        ({"validation": 1.5}, r"validation: expected a share of the training set in \(0, 1\), or a set, got 1\.5"),
        (
            {"class_names": ["cat", False, "no"]},
            r"class_names: expected a list of strings, got \[False\]\. YAML reads.*quote",
        ),
        (
            {"class_names": [0, 1, 2]},
            r"class_names: expected a list of strings, got \[0\]\. YAML reads some words as num",
        ),
        ({"class_names": ["cat", "", "rabbit"]}, r"class_names: expected a list of strings, got \[''\]"),
        ({"class_names": ["cat", None, "rabbit"]}, r"class_names: expected a list of strings, got \[None\]"),
        ({"class_names": 3}, r"class_names: expected a list or text, got 3\. Example"),
        ({"shifts": {True: {"path": "pets/zoo"}}}, r"shifts: expected names that are text, got True\. Quote it\. Ex"),
        ({"shifts__zoo__label_names": ["other"]}, r"Expected 2 `label_names` for 'zoo', .* got 1\. Name all"),
        ({"shifts__zoo__columns": None}, r"Expected 3 `label_names` for 'zoo', .* got 2\..* pass `columns` too"),
        ({"shifts__zoo__label_names": None}, r"labels of 'zoo', .* to be numbers, got 'other'\. .* `label_names`"),
        ({"class_names": "nowhere.txt"}, r"class_names: expected a list or a file with one a line, found no file"),
        (
            {"class_names": None},
            r"class_names: expected a list of names, got none, and the training set has only numbers",
        ),
        ({"class_names": ["cat", "dog"]}, r"Expected labels in \[0, 2\) in set 'train', got 2 at index 2"),
        ({"templates": ["a pet"]}, r"Expected `\{\}` in every template, got 'a pet'"),
        ({"test__name": "ood"}, r"Expected distinct set names of letters.*got 'ood'"),
        ({"shifts__zoo__columns": [[0], [7]]}, r"Expected for label 1 of set 'zoo' .* in \[0, 3\), got \[7\]"),
        ({"test__label_column": "kind"}, r"Expected a column 'kind' in 'home', got \['image', 'label'\]"),
        ({"test__path": "clip-benchmark/none"}, r"Expected to load split 'test' of 'clip-benchmark/none' from the Hub"),
    ],
)
def test_mistakes_name_their_key_and_an_example(pets, keys, message):
    with pytest.raises(ValueError, match=message):
        load_suite(changed(pets, **keys))


def test_files_that_are_no_suite(tmp_path):
    with pytest.raises(ValueError, match="Expected a YAML file, found none at"):
        load_suite(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("train: [")
    with pytest.raises(ValueError, match=r"(?s)Expected YAML in .*a\.yaml, got .*line 1"):
        load_suite(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- train")
    with pytest.raises(ValueError, match=r"b\.yaml: expected a mapping of name, version, .*got \['train'\]"):
        load_suite(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("train: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        load_suite(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match=r"Expected options out of \['streaming'\] for the suite"):
        load_suite(tmp_path / "c.yaml", root="x")


def test_one_class_is_refused(pets, tmp_path):
    folders(tmp_path / "alone/train", [0] * 6, ["cat"])
    one = {"path": "alone", "split": "train"}
    with pytest.raises(
        ValueError, match=r"Expected at least two classes, got \['cat'\]\. There is nothing to tell apart"
    ):
        load_suite(changed(pets, class_names=None, train=one, shifts=None))


def test_classes_of_one_image_need_a_validation_set(pets, tmp_path):
    folders(tmp_path / "shot/train", [0, 1, 2], ["cat", "dog", "rabbit"])
    changed(pets, train={"path": "shot"})
    with pytest.raises(ValueError, match=r"two images to hold a validation set out of, got 3 images of 3 classes, one"):
        load_suite(pets)
    suite = load_suite(changed(pets, validation={"path": "pets/home", "split": "test"}))
    assert (len(suite.train), len(suite.validation)) == (3, 7)  # one shot


def test_names_of_a_label_column_that_is_called_otherwise(pets, tmp_path):
    (tmp_path / "named").mkdir()
    images = [{"bytes": picture(label, row), "path": None} for row, label in enumerate([0, 1] * 4)]
    features = {"image": datasets.Image(), "labels": datasets.ClassLabel(names=["cat", "dog"])}
    rows = datasets.Dataset.from_dict({"image": images, "labels": [0, 1] * 4}, datasets.Features(features))
    rows.to_parquet(tmp_path / "named/all.parquet")
    entries = {"train": {"path": "named"}, "test": {"path": "named"}, "allow_shared_files": True}
    suite = load_suite(changed(pets, class_names=None, shifts=None, **entries))
    assert suite.class_names == ["cat", "dog"]


def test_paths_are_relative_to_the_file_and_to_nothing_else(pets, tmp_path, monkeypatch):
    """A folder of that name where one stood was taken in silence."""
    (tmp_path / "elsewhere").mkdir()
    shutil.move(pets, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"train\.path: expected data at .*elsewhere/pets/home, found none, but some at "
    ):
        load_suite(tmp_path / "elsewhere/pets.yaml")


def test_a_name_that_only_holds_objectnets_is_another(pets, tmp_path):
    shutil.copytree(tmp_path / "pets/home", tmp_path / "notobjectnets")
    assert len(load_suite(changed(pets, train__path="notobjectnets")).train) == 24
    shutil.copytree(tmp_path / "pets/home", tmp_path / "ObjectNet-1.0/images")
    with pytest.raises(ValueError, match="terms of ObjectNet forbid it"):
        load_suite(changed(pets, train__path="ObjectNet-1.0/images"))


def test_objectnet_is_refused_as_training_data(pets, tmp_path):
    folders(tmp_path / "wds_objectnet", [0, 1, 2], ["cat", "dog", "rabbit"])
    with pytest.raises(ValueError, match=r"train: expected data that may be .*ObjectNet forbid"):
        load_suite(changed(pets, train__path="wds_objectnet"))
