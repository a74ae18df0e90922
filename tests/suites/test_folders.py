"""Folders of other people: which files count, which folder is a class, and which names a split."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from layouts import content, folders, parquet, put
from PIL import Image

from carot_hf import load_suite
from carot_hf.suites.folders import split_of, walk
from carot_hf.suites.rows import hold_out, local_files, open_source


def found(root, split):
    """Class and path of each image of a split."""
    files = local_files(root, split)
    return {(label, str(path.relative_to(root))) for label, path in zip(files.classes, files.files, strict=True)}


def write(path, **description):
    path.write_text(yaml.safe_dump(description, allow_unicode=True), encoding="utf-8")
    return path


# ---- what counts ----


def test_what_is_hidden_or_left_by_programs_does_not_count(tmp_path):
    put(tmp_path, "cat/1.png", "dog/2.png", "cat/._1.png", ".ipynb_checkpoints/3.png", "dog/.ipynb_checkpoints/4.png",
        "__MACOSX/cat/5.png", "cat/Thumbs.db", ".DS_Store")  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert found(tmp_path, "train") == {("cat", "cat/1.png"), ("dog", "dog/2.png")}


def test_links_to_folders_are_followed_once(tmp_path):
    put(tmp_path / "store", "1.png", "2.png")
    put(tmp_path / "data", "dog/3.png")
    (tmp_path / "data/cat").symlink_to(tmp_path / "store")
    (tmp_path / "data/dog/round").symlink_to(tmp_path / "data")
    assert {label for label, _ in found(tmp_path / "data", "train")} == {"cat", "dog"}
    assert len(walk(tmp_path / "data")) == 3


@pytest.mark.parametrize("suffix", ["jfif", "JPG", "jpe", "webp", "bmp", "tiff", "ppm", "gif", "jp2", "tga"])
def test_every_suffix_that_pillow_opens(tmp_path, suffix):
    form = {"jfif": "JPEG", "JPG": "JPEG", "jpe": "JPEG", "tiff": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (9, 9), "red").save(tmp_path / label / f"1.{suffix}", form)
    assert {label for label, _ in found(tmp_path, "train")} == {"a", "b"}


# ---- classes and splits ----


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Training", "train"), ("TRAIN", "train"), ("train-00001-of-2", "train"), ("my_train", "train"),
        ("Val", "validation"), ("dev", "validation"), ("valid_2", "validation"), ("eval", "test"), ("Testing", "test"),
        ("trains", None), ("train_test", None), ("restraint", None), ("cat", None),
    ],
)  # fmt: skip
def test_names_of_splits(name, split):
    assert split_of(name) == split


def test_classes_are_the_first_level(tmp_path):
    """``train/cat/a/1.png`` was of class ``a``."""
    put(tmp_path, "train/cat/a/1.png", "train/cat/b/2.png", "train/dog/3.png", "test/cat/4.png")
    assert found(tmp_path, "train") == {
        ("cat", "train/cat/a/1.png"), ("cat", "train/cat/b/2.png"), ("dog", "train/dog/3.png"),
    }  # fmt: skip
    assert found(tmp_path, "test") == {("cat", "test/cat/4.png")}
    put(tmp_path / "flat", "cat/a/1.png", "dog/2.png")
    assert {label for label, _ in found(tmp_path / "flat", "train")} == {"cat", "dog"}


def test_splits_in_any_spelling_are_told_apart(tmp_path):
    """``brain/Training`` and ``brain/Testing`` gave all 22 files to both."""
    put(tmp_path, *(f"Training/{label}/{row}.png" for label in "ab" for row in range(7)))
    put(tmp_path, *(f"Testing/{label}/{row}.png" for label in "ab" for row in range(4)))
    assert (len(found(tmp_path, "train")), len(found(tmp_path, "test"))) == (14, 8)
    assert {label for label, _ in found(tmp_path, "train")} == {"a", "b"}
    assert not found(tmp_path, "train") & found(tmp_path, "test")


def test_splits_below_the_classes(tmp_path):
    put(tmp_path, "cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png")
    assert found(tmp_path, "train") == {("cat", "cat/train/1.png"), ("dog", "dog/train/3.png")}
    assert found(tmp_path, "test") == {("cat", "cat/test/2.png"), ("dog", "dog/test/4.png")}


def test_splits_in_file_names(tmp_path):
    put(tmp_path, "cat/train_1.png", "cat/test_2.png", "dog/train_3.png", "dog/eval-4.png")
    assert found(tmp_path, "test") == {("cat", "cat/test_2.png"), ("dog", "dog/eval-4.png")}
    put(tmp_path, "dog/5.png")  # names none: then the others are names as any
    assert len(found(tmp_path, "test")) == 5
    assert not local_files(tmp_path, "test").named


def test_what_is_passed_over_is_said(tmp_path, caplog):
    put(tmp_path / "a", "cat/1.png", "dog/2.png", "3.png")
    assert len(found(tmp_path / "a", "train")) == 2
    assert "1 images that are in no folder of a class are passed over" in caplog.text
    for name in ("train", "test", "extra"):
        parquet(tmp_path / "b", name, np.array([0, 1]))
    assert [path.name for path in local_files(tmp_path / "b", "test").files] == ["test-00000-of-00001.parquet"]
    assert "files that name no split are passed over: ['extra-00000-of-00001.parquet']" in caplog.text


def test_a_class_may_be_called_train(tmp_path):
    put(tmp_path, "train/1.png", "plane/2.png", "car/3.png")
    assert {label for label, _ in found(tmp_path, "test")} == {"train", "plane", "car"}


def test_splits_beside_other_things(tmp_path, caplog):
    put(tmp_path, "train/cat/1.png", "train/dog/2.png", "sketch/cat/3.png")
    assert len(found(tmp_path, "train")) == 2
    assert "folders that name no split are passed over: ['sketch']" in caplog.text
    put(tmp_path, "loose/4.png")
    with pytest.raises(ValueError, match=r"got \['train'\] of splits beside \['loose', 'sketch'\] with images"):
        local_files(tmp_path, "train")


def test_images_without_classes_are_refused(tmp_path):
    put(tmp_path, "train/1.png", "test/2.png")
    with pytest.raises(ValueError, match=r"one folder of images for each class in .*, got images\. Sort them"):
        local_files(tmp_path, "train")


def test_a_split_that_is_not_there(tmp_path):
    put(tmp_path, "train/cat/1.png", "test/cat/2.png")
    with pytest.raises(ValueError, match=r"of split 'validation'.*which name the splits \['test', 'train'\]"):
        local_files(tmp_path, "validation")


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    parquet(tmp_path / "a [1] {b} *", "test", np.array([0, 1, 2]))
    opened = open_source(tmp_path / "a [1] {b} *", "test")
    assert opened.rows["label"][:] == [0, 1, 2]


# ---- two sets of one path ----


def test_two_sets_of_a_path_without_splits_are_refused(tmp_path):
    put(tmp_path / "brain", *(f"{label}/{row}.png" for label in "ab" for row in range(6)))
    path = write(tmp_path / "a.yaml", train={"path": "brain"}, validation=0.2, test={"path": "brain", "name": "home"})
    with pytest.raises(ValueError, match=r"a\.yaml: test: .*of `train`, got the same: 'brain', and nothing in it"):
        load_suite(path)
    path = write(
        tmp_path / "a.yaml", train={"path": "brain"}, validation=0.2, test={"path": "brain"}, allow_shared_files=True
    )
    assert len(load_suite(path).test) == 12


def test_images_of_the_training_set_in_the_test_set_are_refused_by_content(tmp_path):
    """Copies under other names, in another layout."""
    folders(tmp_path / "home", [0, 1, 0, 1, 0], ["a", "b"])
    folders(tmp_path / "far", [0, 1], ["a", "b"])
    put(tmp_path, "test/a/x.png", "test/b/y.png")
    (tmp_path / "test/a/x.png").write_bytes((tmp_path / "home/a/2.png").read_bytes())
    description = {"train": {"path": "home"}, "validation": {"path": "far"}, "test": {"path": "test", "name": "t"}}
    with pytest.raises(ValueError, match=r"got 1 of the 2 images of set 't' in the training set"):
        load_suite(write(tmp_path / "a.yaml", **description))
    suite = load_suite(write(tmp_path / "a.yaml", **description, allow_shared_files=True))
    assert suite.allow_shared


# ---- held-out shares ----


def test_a_share_is_stratified_and_leaves_something_in_both_parts():
    """100 : 4 gave half of the rare class away."""
    labels = np.array([0] * 100 + [1] * 4 + [2] * 2 + [3])
    kept, held = hold_out(labels, 0.2, 0)
    assert np.bincount(labels[held], minlength=4).tolist() == [20, 1, 1, 0]
    assert np.bincount(labels[kept], minlength=4).tolist() == [80, 3, 1, 1]
    assert np.bincount(labels[hold_out(labels, 0.9, 0)[0]], minlength=4).tolist() == [10, 1, 1, 1]
    assert np.bincount(labels[hold_out(labels, 0.2, 0, balanced=True)[1]]).tolist() == [5, 2, 1]


def test_balanced_classes_are_held_out_as_before():
    labels = np.arange(60) % 6
    assert hold_out(labels, 0.2, 0)[1].tolist() == hold_out(labels, 0.2, 0, balanced=True)[1].tolist()


def test_what_is_held_out_is_said(tmp_path, caplog):
    folders(tmp_path / "home", [0] * 20 + [1] * 2, ["a", "b"])
    folders(tmp_path / "test", [0, 1], ["a", "b"])
    load_suite(write(tmp_path / "a.yaml", train={"path": "home"}, validation=0.2, test={"path": "test"}))
    assert "5 of 22 images are held out for `validation`, 0.2 of each class but: 1 of 2 of 'b'." in caplog.text


def test_content_of_what_was_found(tmp_path):
    folders(tmp_path / "home", [0, 1, 0], ["a", "b"])
    folders(tmp_path / "test", [1, 0], ["a", "b"])
    suite = load_suite(
        write(tmp_path / "a.yaml", train={"path": "home"}, validation={"path": "test"}, test={"path": "home"},
              allow_shared_files=True)
    )  # fmt: skip
    assert sorted(content(suite.train)) == [(0, 0, 0), (0, 0, 2), (1, 1, 1)]
