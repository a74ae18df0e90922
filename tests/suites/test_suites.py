"""Sets and suites: columns, bad samples, bad descriptions, the embedded suite."""

from __future__ import annotations

import dataclasses
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from toys import CLASSES, Noise, noise_set

from carot_hf import ShiftSet, ShiftSuite, load_suite
from carot_hf.data.batches import ReadSet
from carot_hf.suites.rows import hold_out
from carot_hf.suites.splits import split_off


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
    numbers = hub_like([good, good], [0, 3]).cast_column("label", datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"labels in \[0, 2\) in set 's', got 3 at index 1"):
        ShiftSet(numbers, name="s", num_classes=2)
    with pytest.raises(ValueError, match=r"got nothing \(null or NaN\).*in row 1"):
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


@pytest.mark.parametrize("columns", [[[0], []], [[0], [4]], [[-1]], [[0.5]], [["0"]], [0, 1], ["01"]])
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
        ({"shifts": {1: noise_set("x", 3, 0)}}, r"other than .*, got 1\. Metrics"),
        ({"shifts": {"teacher_home": noise_set("x", 3, 0)}}, r"and teacher_<set>, got 'teacher_home'"),
        ({"test": noise_set("teacher_validation", 3, 0)}, r"and teacher_<set>, got 'teacher_validation'"),
        ({"class_names": [0, 1, 2, 3]}, r"a text as the name of class 0, got 0\. Captions .* pass words"),
        ({"class_names": ["zero", True, "two", "three"]}, "the name of class 1, got True"),
        ({"class_names": ["zero", "one", None, "three"]}, "the name of class 2, got None"),
        ({"class_names": ["zero", "one", "two", " "]}, "the name of class 3, got ' '"),
        ({"class_names": "four"}, "Expected a list of class names, got 'four'"),
        ({"class_names": None}, "Expected a list of class names, got None"),
        ({"class_names": {"zero", "one", "two", "three"}}, "Expected a list of class names, got {"),
        ({"class_names": ["zero"]}, r"Expected at least two classes, got \['zero'\]"),
        ({"templates": [3]}, r"Expected `\{\}` in every template, got 3"),
        ({"train": noise_set("train", 1, 0)}, r"two classes among the labels of set 'train', got 0 for all of them"),
    ],
)
def test_bad_suites_are_refused(suite, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(suite, **changes)


def test_what_is_no_set_is_refused(suite):
    for data in ("data/far", 7, {"image": 1}, iter([])):
        with pytest.raises(TypeError, match=r"Expected a ShiftSet or rows as 'far', got .*\. Wrap the data in"):
            dataclasses.replace(suite, shifts={"far": data})


def test_one_image_a_class_is_enough_with_a_validation_set_of_its_own(suite):
    """The one-shot protocol."""
    assert len(dataclasses.replace(suite, train=noise_set("train", 4, 0)).train) == 4


def test_columns_of_numpy_are_columns(suite):
    """The hash of such a suite was a TypeError of json."""
    part = noise_set("part", 11, 4, columns=[np.array([2]), np.array([0])])
    plain = noise_set("part", 11, 4, columns=[[2], [0]])
    hashes = [dataclasses.replace(suite, shifts={"part": data}).content_hash for data in (part, plain)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "`num_classes` of set 's' as a whole number of at least 1, got 0"),
        ({"num_classes": True}, "`num_classes` .*, got True"),
        ({"num_classes": "4"}, "`num_classes` .*, got '4'"),
        ({"crop_border": -1}, "`crop_border` of set 's' as a whole number of at least 0, got -1"),
        ({"crop_border": 0.5}, r"`crop_border` .*, got 0\.5"),
    ],
)
def test_numbers_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        ShiftSet(Noise(4, 0), **{"name": "s", "num_classes": 4, **options})


@pytest.mark.parametrize("label", [torch.tensor(2), np.array(2), np.int8(2), 2.0, torch.tensor(2.0)])
def test_labels_of_every_kind(label):
    items = ShiftSet([{"image": Image.new("RGB", (2, 2)), "label": label}], name="s", num_classes=4)
    assert (items[0]["label"], type(items[0]["label"])) == (2, int)


@pytest.mark.parametrize("caption", [None, "", "  ", 7, [], ["a photo", " "]])
def test_what_is_no_caption_is_refused(caption):
    """None was trained on as the word "None"."""
    item = {"image": Image.new("RGB", (2, 2)), "text": caption}
    items = ShiftSet([item], name="s", num_classes=4, label_column=None, caption_column="text")
    with pytest.raises(ValueError, match="Expected a text in the column 'text' of set 's' at index 0, got"):
        items[0]


# ---- what is said twice ----


def test_labels_and_data_have_one_size():
    with pytest.raises(ValueError, match=r"`labels` of shape \(4,\), one for each sample of set 's', got \(3,\)"):
        ShiftSet(Noise(4, 0), name="s", num_classes=4, labels=[0, 1, 2])
    with pytest.raises(ValueError, match=r"`labels` of shape \(4,\).*got \(4, 4\)\. Pass class indices"):
        ShiftSet(Noise(4, 0), name="s", num_classes=4, labels=torch.eye(4).numpy())


def test_labels_and_data_say_the_same():
    data = ShiftSet(Noise(4, 0), name="s", num_classes=4, labels=[0, 1, 3, 2])
    assert data[1]["label"] == 1
    for index in (2, -2):
        with pytest.raises(ValueError, match=rf"the label 3 that `labels` has of set 's' at index {index}, got 2"):
            data[index]


def test_the_names_of_the_data_are_as_many_as_its_labels():
    """Four names beside three labels: labels of another list, which were taken for the first."""
    data = hub_like([png(Noise(1, 0)[0]["image"])] * 2, [0, 3])
    with pytest.raises(
        ValueError, match=r"a ClassLabel of 3 names in set 's'.*, got one of 4 \(\['zero', 'one', 'two'\]"
    ):
        ShiftSet(data, name="s", num_classes=6, columns=[[0], [1], [2]])
    columns = [[1], [5], [0, 2], [3]]
    assert ShiftSet(data, name="s", num_classes=6, columns=columns)[1]["label"] == 3
    assert len(ShiftSet(data, name="s", num_classes=6, label_column=None)) == 2
    assert ShiftSet(data.cast_column("label", datasets.Value("int64")), name="s", num_classes=6)[1]["label"] == 3


def test_data_may_call_other_things_features_and_format():
    class Odd(Noise):
        features, format, column_names = 7, "png", None

    assert ShiftSet(Odd(4, 0), name="s", num_classes=4)[3]["label"] == 3


# ---- subclasses ----


class Dark(ShiftSet):
    """A set that reads its images in its own way, with an option and a fact of its own."""

    def __init__(self, data, *, factor=0.5, **options):
        super().__init__(data, **options)
        self.factor = factor

    @property
    def facts(self):
        return {**super().facts, "factor": self.factor}

    def decode(self, item, where, **options):
        item = super().decode(item, where, **options)
        return {**item, "image": item["image"].point(lambda value: int(value * self.factor))}


@dataclasses.dataclass
class DarkRecord(Dark):
    """The same as a dataclass with fields of its own."""

    rows: object
    factor: float = 0.5

    def __post_init__(self):
        super().__init__(self.rows, factor=self.factor, name="dark", num_classes=4, labels=self.rows.labels)


def dark(kind, factor=0.5):
    data = Noise(24, 0)
    if kind is DarkRecord:
        return DarkRecord(data, factor)
    return Dark(data, factor=factor, name="dark", num_classes=4, labels=data.labels)


@pytest.mark.parametrize("kind", [Dark, DarkRecord])
def test_a_set_of_ones_own_class_stays_of_it(kind, suite, make_trainer):
    """What was split off one was a plain ShiftSet, which read the images in another way."""
    data = dark(kind)
    kept, held = split_off(data, 0.2, 0)
    assert (type(kept), type(held), kept.name, held.name) == (kind, kind, "train", "validation")
    assert (len(kept), len(held), held.factor) == (20, 4, 0.5)
    numbers = hold_out(data.labels, 0.2, 0)
    for part, rows in zip((kept, held), numbers, strict=True):
        for place, row in enumerate(rows):
            assert part[place]["label"] == data.labels[row] == part.labels[place]
            assert part[place]["image"].tobytes() == data[row]["image"].tobytes()
    assert len(data) == 24
    assert held.facts == {**held.facts, "factor": 0.5, "size": 4, "name": "validation"}
    changed = dataclasses.replace(suite, train=kept, validation=held)
    other = dataclasses.replace(changed, train=split_off(dark(kind, 0.4), 0.2, 0)[0])
    assert changed.content_hash != other.content_hash != suite.content_hash
    assert data.reading.keys() == held.reading.keys()
    assert torch.equal(held.select(torch.eye(4)), torch.eye(4))
    trainer = make_trainer(suite=changed, max_steps=1)
    trainer.train()
    assert "eval_validation_ece" in trainer.evaluate()


class Indexed(ShiftSet):
    """A set that changes what an index gives, and knows nothing of how the trainer reads."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "image": Image.new("RGB", item["image"].size, (10 * item["label"], 0, 0))}


def test_an_index_of_ones_own_is_what_the_trainer_reads(suite, make_trainer):
    """Whoever overrode `__getitem__` trained on other images than `suite.train[0]` showed."""
    data = Indexed(Noise(24, 0), name="train", num_classes=4)
    assert data[3]["image"].getpixel((0, 0)) == (30, 0, 0)
    assert ReadSet(data, skip=False, min_size=(4, 4))[3]["image"].getpixel((0, 0)) == (30, 0, 0)
    trainer = make_trainer(suite=dataclasses.replace(suite, train=data))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"][:, 0, 5, 5].tolist() == [10 * label for label in batch["labels"].tolist()]


def test_rows_of_a_data_set_with_a_transform_keep_it():
    rows = hub_like([png(Noise(4, 0)[index]["image"]) for index in range(4)], [0, 1, 2, 3])
    data = ShiftSet(
        rows.with_transform(lambda batch: {**batch, "image": [image.rotate(90) for image in batch["image"]]}),
        name="s", num_classes=4, labels=[0, 1, 2, 3],
    )  # fmt: skip
    part = data.subset(np.array([3, 1]), "part")
    assert [item["label"] for item in part] == part.labels.tolist() == [3, 1]
    assert part[0]["image"].tobytes() == data[3]["image"].tobytes()


class PlainSuite(ShiftSuite):
    """A subclass with a method and no more."""

    @property
    def sizes(self):
        return {name: len(data) for name, data in self.evaluation_sets.items()}


@dataclasses.dataclass
class DatedSuite(ShiftSuite):
    """A subclass with fields of its own, one of them without a default."""

    collected: str = dataclasses.field(kw_only=True)
    notes: list = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(("kind", "own"), [(PlainSuite, {}), (DatedSuite, {"collected": "2024", "notes": ["a"]})])
def test_a_suite_of_ones_own_class(kind, own, suite, make_trainer):
    fields = {field.name: getattr(suite, field.name) for field in dataclasses.fields(suite)}
    mine = kind(**fields, **own)
    assert mine.content_hash == suite.content_hash
    assert mine.evaluation_sets == suite.evaluation_sets
    changed = dataclasses.replace(mine, shifts={})
    assert (type(changed), list(changed.evaluation_sets)) == (kind, ["validation", "home"])
    assert {name: getattr(changed, name) for name in own} == own
    assert changed.content_hash == dataclasses.replace(suite, shifts={}).content_hash != suite.content_hash
    with pytest.raises(ValueError, match="Expected at least two classes"):
        dataclasses.replace(mine, class_names=["zero"])
    metrics = make_trainer(suite=mine).evaluate()
    assert metrics["eval_far_ece"] == make_trainer(suite=suite).evaluate()["eval_far_ece"]


def test_unknown_suites_are_refused():
    with pytest.raises(
        ValueError,
        match=r"Expected 'digits', 'imagenet', a file \.yaml, a folder or a benchmark out of pacs, .*, got 'cifar'",
    ):
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
