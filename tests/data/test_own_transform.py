"""A transform of the user's: seeded by the number of the sample, checked, and for training images alone."""

from __future__ import annotations

import dataclasses
import random

import datasets
import numpy as np
import pytest
import torch
from families import processor_of
from PIL import Image
from runs import assert_equal_runs, first_batches, run
from toys import noise_set

from carot_hf.data.batches import DrawPlace
from carot_hf.data.own_transform import OwnTransform, name_of, seeded, training_transform
from carot_hf.data.transforms import ImageTransform, image_transform, normalize_pixels
from carot_hf.suites.splits import as_set

SIDE = 16  # of the tiny model


def pixels_of(image):
    return torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1)


class Flip:
    """As torchvision's v2 are: draws from the global generators, here from all three."""

    def __call__(self, image):
        pixels = pixels_of(image)
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        if random.random() < 0.5:
            pixels = pixels.flip(-2)
        return (pixels.float() / 255 - 0.5) * float(np.random.uniform(0.5, 1))  # noqa: NPY002

    def __repr__(self):
        return "Flip(p=0.5)"


def model_transform():
    return ImageTransform(SIDE, (SIDE, SIDE), (0.5,) * 3, (0.25,) * 3)


def states():
    return (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        np.random.get_state()[2],  # noqa: NPY002
    )


def assert_same_states(one, two):
    assert torch.equal(one[0], two[0])
    assert one[1:] == two[1:]


# ---- draws ----


def test_global_generators_are_seeded_and_put_back():
    before = states()
    drawn = []
    for seed in (5, 2**32 - 1, 5):
        with seeded(seed):
            drawn.append((torch.rand(3).tolist(), random.random(), np.random.rand()))  # noqa: NPY002
    assert drawn[0] == drawn[2] != drawn[1]
    assert_same_states(states(), before)
    with pytest.raises(ZeroDivisionError), seeded(1):
        _ = torch.rand(3) * random.random() * np.random.rand() / (1 // 0)  # noqa: NPY002
    assert_same_states(states(), before)
    expected = torch.Generator().manual_seed(5)
    assert drawn[0][0] == torch.rand(3, generator=expected).tolist()
    assert drawn[0][1] == random.Random(5).random()
    assert drawn[0][2] == np.random.RandomState(5).rand()


def test_an_image_is_a_function_of_the_generator_alone():
    transform, image = OwnTransform(Flip(), model_transform()), Image.effect_noise((30, 20), 80).convert("RGB")
    alone = {seed: transform.train(image, np.random.default_rng(seed)) for seed in range(40)}
    torch.rand(7), random.random()
    for seed in reversed(range(40)):
        assert torch.equal(transform.train(image, np.random.default_rng(seed)), alone[seed])
    assert len({value.numpy().tobytes() for value in alone.values()}) == 40
    assert transform.train_size is None
    assert torch.equal(transform.evaluate(image), model_transform().evaluate(image))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_unbroken(make_trainer, tmp_path, workers):
    options = {"dataloader_num_workers": workers, "trainer": {"transform": Flip()}}
    whole = run(make_trainer, tmp_path / "whole", **options)
    resumed = run(make_trainer, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert_equal_runs(whole, resumed)
    if workers:
        alone = run(make_trainer, tmp_path / "alone", save_strategy="no", trainer={"transform": Flip()})
        assert_equal_runs(whole, alone)


def stream_of(data, folder):
    """Rows of a set in two parquet files, read as a stream."""
    names = []
    for part in (0, 1):
        rows = [data.data[index] for index in range(part, len(data), 2)]
        content = {"image": [row["image"] for row in rows], "label": [row["label"] for row in rows]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        names.append(str(folder / f"part-{part}.parquet"))
        datasets.Dataset.from_dict(content, features=features).to_parquet(names[-1])
    rows = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True, cache_dir=str(folder))
    return as_set(rows.cast_column("image", datasets.Image(decode=False)), name="train", num_classes=4)


@pytest.mark.parametrize("varied", [{"augment": "strong"}, {"trainer": {"transform": Flip()}}])
def test_images_of_a_stream_repeat_by_row_and_epoch(make_trainer, suite, tmp_path, varied):
    """Whichever worker reads a row, and when: its pixels are those of its number, in the next epoch others."""
    train = stream_of(suite.train, tmp_path)
    streamed = dataclasses.replace(suite, train=train)
    trainer = make_trainer(suite=streamed, **varied)
    epochs = []
    for epoch in (0, 1):
        items = [{**item, "draw": epoch << 64 | row} for row, item in train.decoded(train.share(0, 1), skip=False)]
        drawn = [trainer.data_collator([item])["pixel_values"] for item in items]
        epochs.append(
            {trainer._prepare_inputs({"pixel_values": each})["pixel_values"].numpy().tobytes() for each in drawn}
        )
    assert len(epochs[0]) == len(epochs[1]) == 26
    assert not epochs[0] & epochs[1]
    for workers in (0, 2):
        reader = make_trainer(suite=streamed, dataloader_num_workers=workers, **varied)
        seen = [pixels for batch in first_batches(reader, 6) for pixels in batch["pixel_values"]]
        assert len(seen) == 24
        assert {pixels.numpy().tobytes() for pixels in seen} <= epochs[0]


# ---- what comes out ----


def test_whole_numbers_are_normalised_floats_are_taken_as_they_are(make_trainer):
    for function, normalised in ((pixels_of, True), (lambda image: pixels_of(image).float(), False)):
        trainer = make_trainer(trainer={"transform": function})
        (batch,) = first_batches(trainer, 1)
        item = {**trainer.training_set()[0], "draw": 0}
        (plain,) = trainer.data_collator([item])["pixel_values"]
        assert plain.dtype == (torch.uint8 if normalised else torch.float32)
        own = trainer._transform
        expected = normalize_pixels(pixels_of(item["image"])[None], own.mean, own.std)
        found = trainer._prepare_inputs({"pixel_values": plain[None]})["pixel_values"]
        assert torch.equal(found, expected if normalised else pixels_of(item["image"])[None].float())
        assert batch["pixel_values"].shape == (4, 3, SIDE, SIDE)


def test_evaluation_does_not_see_it(make_trainer):
    def refused(image):
        raise AssertionError("called in evaluation")

    one, two = make_trainer(trainer={"transform": refused}), make_trainer()
    assert one.evaluate()["eval_ood_nll"] == two.evaluate()["eval_ood_nll"]


class Tagged(torch.Tensor):
    """As torchvision's tv_tensors are."""


def test_a_tensor_of_a_subclass_becomes_a_plain_one():
    transform = OwnTransform(lambda image: pixels_of(image).as_subclass(Tagged), model_transform())
    assert type(transform.train(Image.new("RGB", (9, 9)), np.random.default_rng(0))) is torch.Tensor


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image: image, r"a tensor \(3, 16, 16\) of uint8 or float32 of `transform` for {}, got Image\. End it"),
        (lambda image: np.array(image), r"got ndarray\. End it with torchvision's v2\.ToImage\(\), or"),
        (lambda image: pixels_of(image)[:1], r"got one of shape \(1, 16, 16\)\. Crop or resize to 16 x 16 pixels"),
        (lambda image: pixels_of(image).permute(1, 2, 0), r"got one of shape \(16, 16, 3\)\. .*colours first"),
        (lambda image: pixels_of(image)[:, :8], r"got one of shape \(3, 8, 16\)\. "),
        (lambda image: pixels_of(image).double(), r"got one of torch\.float64\. Return uint8 pixels, .*or float32"),
        (lambda image: pixels_of(image).long(), r"got one of torch\.int64\. "),
        (lambda image: pixels_of(image).to("meta"), r"float32 on the CPU of .*got one on meta\. Leave it on the CPU"),
        (
            lambda image: pixels_of(image) / torch.zeros(1),
            r"finite pixels of `transform` for {}, got nan or inf\. Look",
        ),
    ],
)
def test_wrong_pixels_are_refused_with_set_and_index(make_trainer, function, message, workers):
    options = {"dataloader_num_workers": workers, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(trainer={"transform": function}, **options)
    with pytest.raises(ValueError, match=message.replace("{}", "set 'train' at index 0")):
        trainer.train()


def test_the_row_of_a_stream_is_named(make_trainer, suite, tmp_path):
    streamed = dataclasses.replace(suite, train=stream_of(suite.train, tmp_path))
    trainer = make_trainer(suite=streamed, trainer={"transform": lambda image: image})
    with pytest.raises(ValueError, match=r"`transform` for set 'train' at row \d+, got PngImageFile"):
        trainer.train()


def test_the_place_of_a_draw():
    assert DrawPlace("train", 26)(2 * 26 + 7) == "set 'train' at index 7"
    assert DrawPlace("train", None)(3 << 64 | 5 << 32 | 7) == f"set 'train' at row {5 * 2**32 + 7}"


def test_one_dtype_in_a_batch(make_trainer):
    def mixed(image):
        return pixels_of(image) if torch.rand(()) < 0.5 else pixels_of(image).float()

    with pytest.raises(ValueError, match=r"one dtype in a batch, got torch\.float32, torch\.uint8\. Let"):
        make_trainer(trainer={"transform": mixed}, max_steps=8).train()


def test_an_error_of_its_own_says_where(make_trainer):
    def broken(image):
        raise KeyError("mine")

    options = {"train_sampling_strategy": "sequential"}
    with pytest.raises(KeyError, match="mine") as raised:
        make_trainer(trainer={"transform": broken}, **options).train()
    assert raised.value.__notes__ == ["Raised by the transform of training images for set 'train' at index 0."]


# ---- what goes together ----


def test_it_takes_the_place_of_augment(make_trainer):
    with pytest.raises(ValueError, match=r"`augment` 'crop' with a `transform` of your own, .*, got 'none'\. Leave"):
        make_trainer(augment="none", trainer={"transform": Flip()})


def test_a_collator_of_ones_own_does_it_itself(make_trainer):
    with pytest.raises(ValueError, match=r"with a `data_collator` of your own, got a `transform`\. Leave"):
        make_trainer(trainer={"transform": Flip(), "data_collator": lambda samples: {}})


def test_it_must_be_a_callable(make_trainer):
    with pytest.raises(TypeError, match="Expected `transform` as a callable from a PIL image to a tensor, got str"):
        make_trainer(trainer={"transform": "flip"})


def test_models_of_patches_take_none():
    transform = image_transform(processor_of("siglip2"))
    with pytest.raises(ValueError, match=r"patches of images of any shape .*, got one\. Use `augment`"):
        training_transform(transform, "crop", Flip(), collates=True)


# ---- what a run says of it ----


def test_its_name_is_the_same_in_each_run():
    assert name_of(None) is None
    assert name_of(Flip()) == "Flip(p=0.5)"
    assert name_of(pixels_of) == "<function pixels_of>"
    assert name_of(lambda image: image).endswith("<lambda>>")


def test_it_is_said_and_another_one_is_another_run(make_trainer, tmp_path, capsys):
    run(make_trainer, tmp_path / "run", max_steps=2, trainer={"transform": Flip()})
    assert "augment    by a transform: Flip(p=0.5)" in capsys.readouterr().out
    resume = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"got another one: `transform` Flip\(p=0\.5\) -> None"):
        run(make_trainer, tmp_path / "run", resume=resume)
    with pytest.raises(ValueError, match=r"`transform` Flip\(p=0\.5\) -> <function pixels_of>"):
        run(make_trainer, tmp_path / "run", resume=resume, trainer={"transform": pixels_of})


def test_sets_that_are_passed_later_are_named(make_trainer):
    trainer = make_trainer(
        trainer={"transform": lambda image: image, "train_dataset": noise_set("mine", 8, 5)},
        train_sampling_strategy="sequential",
    )
    with pytest.raises(ValueError, match="for set 'mine' at index 0"):
        trainer.train()
