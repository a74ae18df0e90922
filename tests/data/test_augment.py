"""What varies training images: each change against a formula, its draws against their distributions and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import processor_of
from PIL import Image
from runs import assert_equal_runs, run
from torch.utils.data import DataLoader
from toys import CLASSES, TEMPLATES, tiny_processor
from transformers import CLIPImageProcessor

from carot_hf.data.augment import AUGMENTATIONS, Augmentation, Changes, augmented, changed, described, drawn_changes
from carot_hf.data.batches import CaRotCollator, DrawnSet
from carot_hf.data.captions import CaptionTable
from carot_hf.data.transforms import ImageTransform, image_transform, random_box

VARIED = ("light", "strong")
NOTHING = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "grey": False, "blur": 0.0}


def photo(width, height, seed=0):
    """Smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    grain = rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def transform_of(side=32):
    return ImageTransform.from_processor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    )


def luma(pixels):
    """``(h, w)`` of ``(h, w, 3)``: ITU-R 601, as PIL and torchvision have it."""
    return pixels @ np.array([0.299, 0.587, 0.114])


def towards(pixels, other, factor):
    """Factor 0 is the other, 1 the pixels; cut off at both ends."""
    return np.clip(other + factor * (pixels - other), 0, 255)


# ---- each change is its formula ----


@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.17, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_the_formula(name, factor):
    image = photo(60, 44)
    pixels = np.asarray(image).astype(float)
    other = {
        "brightness": np.zeros_like(pixels),
        "contrast": np.full_like(pixels, luma(pixels).mean()),
        "saturation": np.repeat(luma(pixels)[..., None], 3, axis=2),
    }[name]
    result = np.asarray(changed(image, Changes(**{**NOTHING, name: factor}))).astype(float)
    assert np.abs(result - towards(pixels, other, factor)).max() < 1.5  # PIL cuts off, and rounds the grey
    assert factor == 1.0 or np.abs(result - pixels).mean() > 4


def test_a_picture_of_one_colour_by_hand():
    """(200, 100, 50) has the grey 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2."""
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    for changes, expected in (
        ({"brightness": 0.5}, (100, 50, 25)),
        ({"brightness": 1.4}, (255, 140, 70)),
        ({"contrast": 0.5}, (162, 112, 87)),  # half way to the mean grey, which is that of every pixel here
        ({"saturation": 0.5}, (162, 112, 87)),
        ({"grey": True}, (124, 124, 124)),
        ({"brightness": 0.5, "grey": True}, (62, 62, 62)),
        ({"blur": 0.3}, (200, 100, 50)),
        ({"brightness": 1.5, "contrast": 0.5}, (214, 161, 124)),  # 300 is cut off at 255 first
        ({"contrast": 0.5, "saturation": 0.5}, (143, 118, 106)),
        ({}, (200, 100, 50)),
    ):
        found = changed(image, Changes(**{**NOTHING, **changes})).getpixel((2, 2))
        assert found == pytest.approx(expected, abs=1), changes


def test_grey_is_the_formula():
    image = photo(60, 44)
    result = np.asarray(changed(image, Changes(**{**NOTHING, "grey": True}))).astype(float)
    assert np.abs(result - luma(np.asarray(image).astype(float))[..., None]).max() < 1


@pytest.mark.parametrize("share", [0.1 / 224, 0.01, 2 / 224, 0.04])
def test_blur_is_a_gaussian_of_a_share_of_the_shorter_side(share):
    width, height = 120, 90
    image = photo(width, height)
    result = np.asarray(changed(image, Changes(**{**NOTHING, "blur": share}))).astype(float)
    deviation = share * height
    reach = np.arange(-20, 21)
    kernel = np.exp(-(reach**2) / (2 * deviation**2))
    kernel /= kernel.sum()
    pixels = np.pad(np.asarray(image).astype(float), ((20, 20), (20, 20), (0, 0)), mode="edge")
    down = sum(weight * pixels[i : i + height] for i, weight in enumerate(kernel))
    expected = sum(weight * down[:, i : i + width] for i, weight in enumerate(kernel))
    assert np.abs(result - expected).mean() < 0.6  # PIL's is made of boxes
    assert deviation < 0.5 or np.abs(result - np.asarray(image)).mean() > 1


# ---- what is drawn ----


@pytest.mark.parametrize("name", VARIED)
def test_changes_are_drawn_from_their_ranges(name):
    augmentation, draws = AUGMENTATIONS[name], 4000
    found = [drawn_changes(augmentation, np.random.default_rng((3, draw))) for draw in range(draws)]
    for part in ("brightness", "contrast", "saturation"):
        values = np.array([getattr(changes, part) for changes in found])
        low, high = 1 - augmentation.jitter, 1 + augmentation.jitter
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        error = (high - low) / math.sqrt(12 * draws)
        assert values.mean() == pytest.approx(1, abs=5 * error)
        assert np.median(values) == pytest.approx(1, abs=10 * error)
    for chance, there in (
        (augmentation.grey, [c.grey for c in found]),
        (augmentation.blur, [c.blur > 0 for c in found]),
    ):
        assert np.mean(there) == pytest.approx(chance, abs=5 * math.sqrt(chance * (1 - chance) / draws))
    blurs = [changes.blur for changes in found if changes.blur]
    assert not blurs or 0.1 / 224 <= min(blurs) <= max(blurs) <= 2 / 224
    assert len(blurs) == 0 or np.mean(blurs) == pytest.approx(1.05 / 224, rel=0.1)


@pytest.mark.parametrize(("name", "scale"), [("light", (0.6, 1.0)), ("strong", (0.35, 1.0))])
def test_the_sizes_of_crops_are_spread_over_their_range(name, scale):
    """A crop of a share a has a whole number of pixels; its shape limits the largest ones of an image that is wider."""
    assert AUGMENTATIONS[name].scale == scale
    areas, shapes = [], []
    for draw in range(3000):
        left, top, right, bottom = random_box(400, 400, np.random.default_rng((0, draw)), scale, (3 / 4, 4 / 3))
        areas.append((right - left) * (bottom - top) / 400**2)
        shapes.append((right - left) / (bottom - top))
    assert scale[0] - 0.005 <= min(areas) < scale[0] + 0.01
    assert 0.98 < max(areas) <= 1
    # a share a and a shape r fit a square when a <= min(r, 1 / r), else they are drawn anew: the density of a falls off
    edges = np.linspace(scale[0], 1, 2001)
    middle = (edges[1:] + edges[:-1]) / 2
    fits = np.minimum(1, np.log(1 / middle) / np.log(4 / 3))
    assert np.mean(areas) == pytest.approx(np.average(middle, weights=fits), abs=0.012)
    assert np.abs(np.log(shapes)).max() < np.log(4 / 3) + 0.01
    assert np.mean(np.log(shapes)) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("name", VARIED)
def test_an_image_is_its_crop_with_its_changes(name):
    """Built again from the parts: the box, the resize, the changes, from one generator in this order."""
    transform, image, augmentation = transform_of(), photo(90, 70), AUGMENTATIONS[name]
    for draw in range(20):
        generator = np.random.default_rng((5, draw))
        box = random_box(90, 70, generator, augmentation.scale, (3 / 4, 4 / 3))
        changes = drawn_changes(augmentation, generator)
        plain = image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        expected = np.asarray(changed(plain, changes)).transpose(2, 0, 1).astype(int)
        result = augmented(transform, name).train(image, np.random.default_rng((5, draw)))
        assert result.shape == (3, 32, 32)
        assert result.dtype == torch.uint8
        assert np.abs(result.numpy() - expected)[:, 1:-1, 1:-1].mean() < 1  # torch's resize is PIL's but for rounding


def test_the_default_is_the_published_crop_itself():
    transform = transform_of()
    assert augmented(transform, "crop") is transform
    assert AUGMENTATIONS["crop"] == Augmentation(scale=transform.scale) == Augmentation(scale=(0.9, 1.0))


def test_none_is_the_evaluation():
    transform, image = transform_of(), photo(90, 70)
    unvaried = augmented(transform, "none")
    generator = np.random.default_rng(0)
    before = generator.bit_generator.state
    assert torch.equal(unvaried.train(image, generator), transform.evaluate(image))
    assert generator.bit_generator.state == before
    assert unvaried.train_size is None


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_evaluation_stays(name):
    transform, image = transform_of(), photo(90, 70)
    assert torch.equal(augmented(transform, name).evaluate(image), transform.evaluate(image))


@pytest.mark.parametrize("name", VARIED)
def test_images_are_decoded_as_large_as_the_smallest_crop_needs(name):
    """A share s of the area in the shape 3 : 4 has a short side of sqrt(3 s / 4) of that of a square."""
    width, height = augmented(transform_of(), name).train_size
    share = math.sqrt(AUGMENTATIONS[name].scale[0] * 3 / 4)
    assert (width, height) == (math.ceil(32 / share) + 1,) * 2
    assert min(width, height) * share >= 32


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_loader_asks_for_images_of_that_size(make_trainer, name):
    trainer = make_trainer(augment=name)
    expected = augmented(trainer._transform, name).train_size
    assert trainer.get_train_dataloader().base_dataloader.dataset.dataset.min_size == expected


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_models_of_patches_take_them_too(name):
    transform, image = image_transform(processor_of("siglip2")), photo(90, 70)
    varied = augmented(transform, name)
    one, two = (varied.train(image, np.random.default_rng(7)) for _ in range(2))
    assert one.keys() == transform.evaluate(image).keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    same = torch.equal(one["pixel_values"], transform.evaluate(image)["pixel_values"])
    assert same == (name == "none")
    assert transform.scale == (0.9, 1.0)


def test_what_is_said_of_each():
    assert described("none") == "none: training images are resized as in evaluation"
    assert described("crop") == "crop: crops of 90% to 100% of the area"
    assert described("strong") == (
        "strong: crops of 35% to 100% of the area, brightness, contrast and saturation x 0.6 to 1.4, 10% grey, 10% "
        "blurred"
    )


# ---- by the number of the sample alone ----


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_draws_do_not_depend_on_workers_batches_or_order(suite, name):
    processor = tiny_processor()
    table = CaptionTable(processor, CLASSES, TEMPLATES, 32)
    collator = CaRotCollator(augmented(image_transform(processor), name), table, seed=3)
    view, draws = DrawnSet(suite.train), [53, 2, 40, 1, 30, 29, 54, 7]
    alone = [collator([view[draw]])["pixel_values"][0] for draw in draws]
    for workers in (0, 2):
        loader = DataLoader(view, batch_size=4, sampler=draws, collate_fn=collator, num_workers=workers)
        rows = [image for batch in loader for image in batch["pixel_values"]]
        assert all(torch.equal(row, image) for row, image in zip(rows, alone, strict=True))


@pytest.mark.parametrize(("name", "workers"), [("none", 0), ("light", 0), ("strong", 2)])
def test_resumed_equals_unbroken(make_trainer, tmp_path, name, workers):
    options = {"augment": name, "dataloader_num_workers": workers}
    whole = run(make_trainer, tmp_path / "whole", **options)
    resumed = run(make_trainer, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert_equal_runs(whole, resumed)
    plain = run(make_trainer, tmp_path / "plain", save_strategy="no", max_steps=1)
    assert torch.equal(whole.seen[0]["input_ids"], plain.seen[0]["input_ids"])  # order and captions stay
    assert not torch.equal(whole.seen[0]["pixel_values"], plain.seen[0]["pixel_values"])


def test_another_one_is_another_run(make_trainer, tmp_path):
    run(make_trainer, tmp_path / "run", max_steps=2, augment="light")
    with pytest.raises(ValueError, match="got another one: `augment` light -> strong"):
        run(make_trainer, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"), augment="strong")


def test_it_is_said_before_the_first_step(make_trainer, capsys):
    make_trainer(augment="light", max_steps=1).train()
    said = capsys.readouterr().out
    assert (
        "augment    light: crops of 60% to 100% of the area, brightness, contrast and saturation x 0.8 to 1.2" in said
    )
    make_trainer(max_steps=1, overwrite_output_dir=True).train()
    assert "augment" not in capsys.readouterr().out


def test_an_unknown_one_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"Expected `augment` to be one of \('none', 'crop', 'light', 'strong'\)"):
        make_trainer(augment="mild")


def test_a_collator_of_ones_own_does_it_itself(make_trainer):
    with pytest.raises(ValueError, match=r"with a `data_collator` of your own, got `augment` 'light'\. Leave"):
        make_trainer(augment="light", trainer={"data_collator": lambda samples: {}})
