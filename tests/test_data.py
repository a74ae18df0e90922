"""Transforms against transformers' own; draws that depend on nothing but seed, epoch and index."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import CLASSES, TEMPLATES
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor

from carot_hf.data import CaRotCollator, DrawnSet, DrawSampler, ImageTransform, normalize_pixels
from carot_hf.prompts import CaptionTable

try:  # without torchvision CLIPImageProcessor is this class itself
    from transformers import CLIPImageProcessorPil
except ImportError:
    CLIPImageProcessorPil = CLIPImageProcessor


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (37, 50), (224, 225), (500, 375), (33, 32), (20, 90), (8, 8)])
def test_evaluation_transform_equals_transformers(size):
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    ours = ImageTransform.from_processor(theirs)
    image = picture(*size)
    expected = torch.as_tensor(np.stack(theirs(image, return_tensors="np")["pixel_values"]))
    result = normalize_pixels(ours.evaluate(image)[None], ours.mean, ours.std)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=0)


def test_training_crop_is_between_its_bounds_and_resized_in_one_call():
    transform = ImageTransform(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
    generator = np.random.default_rng(0)
    areas, corners = [], set()
    for _ in range(300):
        left, top, right, bottom = transform._random_box(200, 150, generator)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 150
        areas.append((right - left) * (bottom - top) / (200 * 150))
        assert 3 / 4 * 0.97 <= (right - left) / (bottom - top) <= 4 / 3 * 1.03
        corners.add((left, top))
    assert 0.89 <= min(areas) < 0.92
    assert 0.98 < max(areas) <= 1.0
    assert len(corners) > 50
    assert transform.train(picture(200, 150), generator).shape == (3, 32, 32)


def test_training_crop_of_an_extreme_shape_falls_back_to_the_centre():
    transform = ImageTransform(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
    left, top, right, bottom = transform._random_box(400, 10, np.random.default_rng(0))
    assert (top, bottom) == (0, 10)
    assert right - left == round(10 * 4 / 3)
    assert abs((400 - right) - left) <= 1
    assert transform.train(picture(1, 1), np.random.default_rng(0)).shape == (3, 32, 32)


def test_unfit_processors_are_refused():
    with pytest.raises(ValueError, match="crops the centre and normalises"):
        ImageTransform.from_processor(CLIPImageProcessor(do_center_crop=False))
    with pytest.raises(ValueError, match="resize to at least the crop, got shortest_edge=16"):
        ImageTransform.from_processor(CLIPImageProcessor(size={"shortest_edge": 16}))


def test_sampler_yields_each_sample_once_an_epoch_in_an_order_of_its_own():
    epoch = 0
    sampler = DrawSampler(50, 7, lambda: epoch)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert first == list(sampler)
    assert first != sorted(first)
    epoch = 3
    later = list(sampler)
    assert sorted(later) == list(range(150, 200))
    assert [draw % 50 for draw in later] != first
    assert list(DrawSampler(50, 8, lambda: 0)) != first
    assert list(DrawSampler(5, 8, lambda: 2, shuffle=False)) == [10, 11, 12, 13, 14]


@pytest.fixture
def collator(processor):
    table = CaptionTable(processor, CLASSES, TEMPLATES, 32)
    return CaRotCollator(ImageTransform.from_processor(processor), table, seed=3)


def test_draws_do_not_depend_on_workers_batches_or_order(suite, collator):
    view = DrawnSet(suite.train)
    draws = [53, 2, 40, 1, 30, 29, 54, 7]
    alone = {draw: collator([view[draw]]) for draw in draws}
    for workers in (0, 2):
        loader = DataLoader(view, batch_size=4, sampler=draws, collate_fn=collator, num_workers=workers)
        batches = list(loader)
        assert len(batches) == 2
        for start, batch in zip((0, 4), batches, strict=True):
            for row, draw in enumerate(draws[start : start + 4]):
                single = alone[draw]
                length = int(single["attention_mask"].sum())
                assert torch.equal(batch["pixel_values"][row], single["pixel_values"][0])
                assert torch.equal(batch["input_ids"][row, :length], single["input_ids"][0, :length])
                assert batch["labels"][row] == suite.train[draw % 26]["label"]


def test_templates_are_drawn_evenly_and_anew_each_epoch(suite, collator, processor):
    view = DrawnSet(suite.train)
    captions = []
    for draw in range(26 * 40):
        item = {**view[draw], "image": Image.new("RGB", (4, 4))}
        tokens = collator([item])["input_ids"][0]
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        name = CLASSES[item["label"]]
        assert name in text
        captions.append(text.replace(name, "{}").strip())
    counts = {caption: captions.count(caption) for caption in set(captions)}
    assert len(counts) == len(TEMPLATES)
    assert all(abs(count - 26 * 40 / 3) < 5 * (26 * 40 * 2 / 9) ** 0.5 for count in counts.values())
    assert captions[:26] != captions[26:52]


def test_evaluation_batches_have_no_captions(suite, collator):
    batch = collator([suite.test[0], suite.test[1]])
    assert batch.keys() == {"pixel_values", "labels"}
    assert batch["pixel_values"].dtype == torch.uint8
    assert torch.equal(batch["pixel_values"][0], collator.transform.evaluate(suite.test[0]["image"]))


def test_large_crops_are_resized_as_pil_does_within_two_levels():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (40, 50, 3)).astype(np.uint8)).resize((500, 400), 3)
    transform = ImageTransform(size=224, crop=(224, 200), mean=(0.5,) * 3, std=(0.5,) * 3)
    box = transform._random_box(500, 400, np.random.default_rng(7))
    expected = np.asarray(image.resize((200, 224), 3, box=box)).transpose(2, 0, 1).astype(int)
    pixels = transform.train(image, np.random.default_rng(7))
    assert pixels.dtype == torch.uint8
    difference = np.abs(pixels.numpy().astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.03
    lanczos = dataclasses.replace(transform, resample=1)  # torch has no such filter
    expected = np.asarray(image.resize((200, 224), 1, box=box)).transpose(2, 0, 1)
    assert np.array_equal(lanczos.train(image, np.random.default_rng(7)).numpy(), expected)
