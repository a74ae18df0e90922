"""Sets and suites: columns, bad samples, bad descriptions, the embedded suite."""

from __future__ import annotations

import dataclasses
import io

import datasets
import pytest
import torch
from conftest import CLASSES, Noise, noise_set
from PIL import Image

from carot_hf import ShiftSet, load_suite


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def hub_like(images, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = [{"bytes": data, "path": None} for data in images]
    return datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)


def test_items_are_rgb_images_with_integer_labels():
    noise = Noise(4, 0)
    grey = noise[1]["image"].convert("L")
    data = hub_like([png(noise[0]["image"]), png(grey)], [0, 3])
    items = ShiftSet(data, name="s", num_classes=4)
    assert items.labels.tolist() == [0, 3]
    assert [item["label"] for item in items] == [0, 3]
    assert all(item["image"].mode == "RGB" for item in items)
    assert items[0]["image"].tobytes() == noise[0]["image"].tobytes()


def test_an_image_that_cannot_be_decoded_names_set_and_index():
    good = png(Noise(1, 0)[0]["image"])
    for broken in (b"", b"not an image", good[:60]):
        items = ShiftSet(hub_like([good, broken], [0, 1]), name="sketch", num_classes=4)
        assert items[0]["label"] == 0
        with pytest.raises(ValueError, match=r"decoded in set 'sketch' at index 1, got .*Replace or drop"):
            items[1]


def test_a_bad_image_stops_an_evaluation_with_its_name(make_trainer, suite):
    good = png(Noise(1, 0)[0]["image"])
    broken = ShiftSet(hub_like([good, good[:60]], [0, 1]), name="far", num_classes=4)
    trainer = make_trainer(suite=dataclasses.replace(suite, shifts={"far": broken}))
    with pytest.raises(ValueError, match="in set 'far' at index 1"):
        trainer.evaluate()


def test_labels_out_of_range_are_refused_at_once_or_when_read():
    good = png(Noise(1, 0)[0]["image"])
    with pytest.raises(ValueError, match=r"labels in \[0, 2\) in set 's', got 3 at index 1"):
        ShiftSet(hub_like([good, good], [0, 3]), name="s", num_classes=2)
    with pytest.raises(ValueError, match="got None at index 1"):
        ShiftSet(hub_like([good, good], [0, None]), name="s", num_classes=2)
    lazy = ShiftSet([{"image": Image.new("RGB", (2, 2)), "label": 5}], name="s", num_classes=2)
    with pytest.raises(ValueError, match="got 5 at index 0"):
        lazy[0]
    for label in (0.5, -1):
        with pytest.raises(ValueError, match=rf"got {label} at index 0"):
            ShiftSet([{"image": Image.new("RGB", (2, 2)), "label": label}], name="s", num_classes=2)[0]


def test_empty_sets_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match="at least one sample in set 's'"):
        ShiftSet([], name="s", num_classes=2)
    with pytest.raises(ValueError, match=r"key 'image' in set 's' at index 0, got the keys \['img'"):
        ShiftSet([{"img": 1, "label": 0}], name="s", num_classes=2)[0]
    with pytest.raises(ValueError, match=r"key 'label' in set 's' at index 0"):
        ShiftSet([{"image": Image.new("RGB", (2, 2))}], name="s", num_classes=2)[0]


def test_columns_take_the_maximum_before_the_softmax():
    logits = torch.tensor([[1.0, 5.0, 2.0, 3.0], [4.0, 0.0, -1.0, 7.0]])
    many = noise_set("s", 3, 0, columns=[[2], [0, 3]])
    assert many.num_labels == 2
    assert many.select(logits).tolist() == [[2.0, 3.0], [-1.0, 7.0]]
    subset = noise_set("s", 3, 0, columns=[[3], [1]])
    assert subset.select(logits).tolist() == [[3.0, 5.0], [7.0, 0.0]]
    assert noise_set("s", 3, 0).select(logits) is logits


@pytest.mark.parametrize("columns", [[[0], []], [[0], [4]], [[-1]]])
def test_bad_columns_are_refused(columns):
    with pytest.raises(ValueError, match=r"a list of training classes in \[0, 4\)"):
        noise_set("s", 3, 0, columns=columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["zero", "one"]}, r"Expected 4 class names .*, got 2"),
        ({"templates": ["a digit"]}, r"Expected `\{\}`"),
        ({"templates": []}, "at least one"),
        ({"shifts": {"ood": noise_set("ood", 3, 0)}}, "got 'ood'"),
        ({"shifts": {"a b": noise_set("x", 3, 0)}}, "got 'a b'"),
        ({"shifts": {"home": noise_set("x", 3, 0)}}, "distinct set names"),
        ({"test": noise_set("id", 3, 0)}, "got 'id'"),
        ({"train": noise_set("train", 3, 0, columns=[[0], [1]])}, "labelled with the training classes"),
    ],
)
def test_bad_suites_are_refused(suite, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(suite, **changes)


def test_unknown_suites_are_refused():
    with pytest.raises(ValueError, match=r"Expected 'digits', 'imagenet' or a file \.yaml, got 'cifar'"):
        load_suite("cifar")
    with pytest.raises(ValueError, match=r"Expected options out of \['check_counts', .* 'imagenet', got \['shift'\]"):
        load_suite("imagenet", shift=["r"])
    with pytest.raises(ValueError, match="no options for the suite 'digits'"):
        load_suite("digits", root="x")


def test_digits_suite_has_the_promised_roles():
    suite = load_suite("digits")
    sizes = {name: len(data) for name, data in suite.evaluation_sets.items()}
    assert len(suite.train) == 800
    assert (sizes["validation"], sizes["uci"], sizes["mnist"]) == (200, 797, 2000)
    assert len(suite.shifts) >= 3
    assert len(suite.class_names) == 10
    item = suite.shifts["mnist"][5]
    assert (item["image"].size, item["image"].mode) == ((32, 32), "RGB")
    assert set(suite.recommended) >= {"learning_rate", "per_device_train_batch_size", "teacher_update_every"}
