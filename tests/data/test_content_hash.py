"""What a suite's hash covers: nothing that counts can change without it, nothing else changes it; digits is pinned."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from toys import CLASSES, Noise, noise_set

from carot_hf import ShiftSet, load_suite
from carot_hf.basics.content_hash import sha256_of_array, sha256_of_facts
from carot_hf.suites import digits

DIGITS = {"1.0": "80169166ea0cdbb5811265fcf04ac76aab4ede4f57bb424fef4e188d126a6d2e"}


# ---- the functions, against hashes made by hand ----


def test_an_array_is_its_shape_and_its_bytes_little_endian():
    by_hand = hashlib.sha256(b"(2,)" + (3).to_bytes(8, "little") + (258).to_bytes(8, "little")).hexdigest()
    for values in ([3, 258], np.array([3, 258], ">i4"), np.array([3, 0, 258, 0])[::2]):
        assert sha256_of_array(values, "<i8") == by_hand
    assert sha256_of_array([[3, 258]], "<i8") != by_hand
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert sha256_of_array(pixels.T, "u1") == hashlib.sha256(b"(3, 2)" + bytes([0, 3, 1, 4, 2, 5])).hexdigest()
    with pytest.raises(TypeError, match="Cannot cast"):
        sha256_of_array([0.5], "<i8")


def test_facts_are_canonical_json():
    text = '{"a":[1,null,true],"b":"\\u00e9"}'
    assert sha256_of_facts({"b": "é", "a": [1, None, True]}) == hashlib.sha256(text.encode()).hexdigest()


# ---- suites ----


def changed_labels(data, **options):
    """The same set with the last two labels in the other order, or other options."""
    labels = data.labels.copy()
    labels[-2:] = labels[-1:-3:-1]
    options = {"labels": labels, "columns": data.columns, **data.reading, **options}
    return ShiftSet(data.data, name=data.name, num_classes=data.num_classes, **options)


def same_labels(data, **options):
    return changed_labels(data, **{"labels": data.labels, **options})


CHANGES = {
    "class name": lambda s: {"class_names": ["zero", "one", "two", "Three"]},
    "class order": lambda s: {"class_names": ["one", "zero", "two", "three"]},
    "template": lambda s: {"templates": [*s.templates[:-1], "a picture of {}"]},
    "template order": lambda s: {"templates": s.templates[::-1]},
    "one template less": lambda s: {"templates": s.templates[:-1]},
    "label of train": lambda s: {"train": changed_labels(s.train)},
    "label of validation": lambda s: {"validation": changed_labels(s.validation)},
    "label of test": lambda s: {"test": changed_labels(s.test)},
    "label of a shift": lambda s: {"shifts": {**s.shifts, "part": changed_labels(s.shifts["part"])}},
    "labels not known": lambda s: {"train": same_labels(s.train, labels=None)},
    "size": lambda s: {"train": noise_set("train", 25, 0)},
    "column map": lambda s: {"shifts": {**s.shifts, "part": noise_set("part", 11, 4, columns=[[2], [0, 1]])}},
    "no column map": lambda s: {"shifts": {**s.shifts, "part": same_labels(s.shifts["part"], columns=None)}},
    "name of the test set": lambda s: {"test": noise_set("elsewhere", 19, 2)},
    "name of a shift": lambda s: {"shifts": {"farther": s.shifts["far"], "part": s.shifts["part"]}},
    "one shift less": lambda s: {"shifts": {"far": s.shifts["far"]}},
    "sets exchanged": lambda s: {"train": s.validation, "validation": s.train},
    "exif": lambda s: {"test": same_labels(s.test, exif=False)},
    "crop": lambda s: {"test": same_labels(s.test, crop_border=1)},
    "captions": lambda s: {"train": same_labels(s.train, caption_column="text")},
    "content": lambda s: {"test": same_labels(s.test, content="owner/name@0123")},
    "data sets on the Hub": lambda s: {"datasets": ["owner/name"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_counts_changes_the_hash(suite, change):
    assert dataclasses.replace(suite, **CHANGES[change](suite)).content_hash != suite.content_hash


def test_what_does_not_count_leaves_it(suite):
    same = dataclasses.replace(
        suite,
        name="other",
        version="7",
        recommended={"learning_rate": 1.0},
        sources={"class_names": "here"},
        train=same_labels(suite.train, image_column="image"),
        shifts=dict(reversed(suite.shifts.items())),
        templates=tuple(suite.templates),
    )
    assert same.content_hash == suite.content_hash


def test_no_image_is_read(suite):
    class Blind(Noise):
        def __getitem__(self, index):
            raise AssertionError("an image was read")

    data = Blind(26, 0)
    blind = ShiftSet(data, name="train", num_classes=len(CLASSES), labels=data.labels)
    assert dataclasses.replace(suite, train=blind).content_hash == suite.content_hash


def test_it_is_the_hash_of_this_text(suite):
    """The whole of it by hand: whoever changes what is hashed sees it here, and gives every suite a new version."""

    def facts(data):
        labels = b"".join(int(label).to_bytes(8, "little") for label in data.labels)
        return {
            "name": data.name, "size": len(data), "columns": data.columns, "captions": False, "exif": True,
            "crop_border": 0, "content": None,
            "labels": hashlib.sha256(f"({len(data)},)".encode() + labels).hexdigest(),
        }  # fmt: skip

    text = json.dumps(
        {
            "class_names": CLASSES,
            "templates": suite.templates,
            "datasets": [],
            "splits": {"train": facts(suite.train), "validation": facts(suite.validation), "test": facts(suite.test)},
            "shifts": {name: facts(data) for name, data in suite.shifts.items()},
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    assert suite.content_hash == hashlib.sha256(text.encode()).hexdigest()


# ---- digits ----


@pytest.fixture(scope="module")
def splits():
    return {"home": digits.fine_tuning_splits(), "shifts": digits.shift_splits()}


@pytest.fixture
def digits_hash(splits, monkeypatch):
    """The hash of the embedded suite with some of its splits replaced."""

    def hashed(**replaced):
        for build, part in (("fine_tuning_splits", "home"), ("shift_splits", "shifts")):
            parts = {name: replaced.get(name, split) for name, split in splits[part].items()}
            monkeypatch.setattr(digits, build, lambda parts=parts: parts)
        return load_suite("digits").content_hash

    return hashed


def test_digits_are_those_of_their_version(digits_hash):
    assert load_suite("digits").version == digits.VERSION
    assert digits_hash() == DIGITS[digits.VERSION], (
        "The embedded digits changed: pixels (has Pillow, matplotlib's fonts or a data set changed?), labels, class "
        "names or templates. Figures no longer compare: undo it, or raise digits.VERSION and enter the new hash here."
    )


@pytest.mark.parametrize("name", ["train", "validation", "test", "mnist", "print", "outline", "thick", "clutter"])
def test_a_pixel_of_the_digits_counts(digits_hash, splits, name):
    split = {**splits["home"], **splits["shifts"]}[name]
    images = split.images.copy()
    images[-1, 31, 31] ^= 1
    assert digits_hash(**{name: dataclasses.replace(split, images=images)}) != DIGITS[digits.VERSION]
