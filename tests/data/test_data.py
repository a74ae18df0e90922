"""Images and transforms against PIL's and transformers' own; draws that depend on nothing but seed, epoch and index."""

from __future__ import annotations

import io
import logging
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, features
from runs import a_caption_each
from torch.utils.data import DataLoader
from toys import CLASSES, TEMPLATES
from transformers import CLIPImageProcessor

from carot_hf import ShiftSet
from carot_hf.data.batches import CaRotCollator, DrawnSet, DrawSampler, ReadSet, ShareSampler
from carot_hf.data.captions import CaptionTable
from carot_hf.data.images import BadImageError, read_image
from carot_hf.data.transforms import ImageTransform, normalize_pixels, random_box

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
        left, top, right, bottom = random_box(200, 150, generator, transform.scale, transform.ratio)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 150
        areas.append((right - left) * (bottom - top) / (200 * 150))
        assert 3 / 4 * 0.97 <= (right - left) / (bottom - top) <= 4 / 3 * 1.03
        corners.add((left, top))
    assert 0.89 <= min(areas) < 0.92
    assert 0.98 < max(areas) <= 1.0
    assert len(corners) > 50
    assert transform.train(picture(200, 150), generator).shape == (3, 32, 32)


def photo(width, height, seed=0):
    """Smooth colours with some grain."""
    coarse = picture(12, 9, seed).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(seed).normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(("size", "seed"), [((500, 375), 0), ((375, 500), 1), ((800, 320), 2)])
def test_training_crop_has_the_pixels_of_pil(size, seed, resample):
    transform = ImageTransform(224, (224, 224), (0.5,) * 3, (0.5,) * 3, resample=int(resample))
    image = photo(*size, seed)
    box = random_box(*size, np.random.default_rng(seed), transform.scale, transform.ratio)
    assert min(box[2] - box[0], box[3] - box[1]) > 224
    expected = np.asarray(image.crop(box).resize((224, 224), resample)).transpose(2, 0, 1).astype(int)
    result = transform.train(image, np.random.default_rng(seed))
    assert result.dtype == torch.uint8
    difference = np.abs(result.numpy() - expected)
    assert difference[:, 6:-6, 6:-6].max() <= 1  # at the edges PIL alone sees what lies outside of a box
    assert difference.max() <= 6
    assert difference.mean() < 0.05


def test_a_crop_that_enlarges_is_pils_and_so_is_each_where_torch_has_no_vector_code(monkeypatch):
    transform = ImageTransform(224, (224, 224), (0.5,) * 3, (0.5,) * 3)
    for size in ((100, 90), (300, 150), (500, 375)):
        if size == (500, 375):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        image = photo(*size)
        box = random_box(*size, np.random.default_rng(5), transform.scale, transform.ratio)
        expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)
        assert np.array_equal(transform.train(image, np.random.default_rng(5)).numpy(), expected)


def test_normalisation_is_the_formula_and_leaves_its_input():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    for given in (pixels, pixels.float()):
        before = given.clone()
        result = normalize_pixels(given, mean, std)
        for channel in range(3):
            expected = [(value / 255 - mean[channel]) / std[channel] for value in range(256)]
            assert result[0, channel].flatten().tolist() == pytest.approx(expected, abs=2e-6)
        assert torch.equal(given, before)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_an_image_that_the_caller_opened_keeps_its_size():
    """A lazy JPEG shrinks for good when it is decoded at a smaller scale."""
    with Image.open(io.BytesIO(encoded(photo(800, 600), "JPEG"))) as image:
        assert read_image(image, min_size=(100, 75)).size == (800, 600)
        assert image.size == (800, 600)


def test_the_photograph_of_a_phone_is_decoded_smaller_too():
    data = encoded(photo(800, 600), "MPO", save_all=True, append_images=[photo(80, 60)])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    small = read_image(data, min_size=(200, 150))
    assert small.size == (200, 150)
    expected = photo(800, 600).resize((200, 150), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean() < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "AVIF"])
def test_damaged_files_give_an_image_or_the_one_error(form):
    if form == "AVIF" and "avif" not in features.get_supported():
        pytest.skip("Pillow without AVIF")
    data, refused = encoded(photo(40, 30), form), 0
    for seed in range(150):
        generator = np.random.default_rng(seed)
        damaged = bytearray(data)
        if seed % 3 == 0:
            damaged = damaged[: generator.integers(len(data))]
        else:  # somewhere, or in the header
            for place in generator.integers(len(data) if seed % 3 == 1 else min(len(data), 120), size=3):
                damaged[place] = generator.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                image = read_image(bytes(damaged), min_size=(10, 10), max_pixels=10_000_000)
            except BadImageError:
                refused += 1
            else:
                assert image.mode == "RGB"
    assert refused > 10


def test_a_set_without_a_readable_image_names_the_last_error():
    data = ReadSet(ShiftSet([{"image": b"", "label": 0}] * 3, name="far", num_classes=2), skip=True)
    with pytest.raises(BadImageError, match=r"in set 'far', got none\. The last error: .* at index 1, got no bytes"):
        data[2]


def test_replaced_images_are_counted_with_a_collator_of_ones_own(make_trainer, caplog):
    class OwnCollator:
        def __call__(self, samples):
            assert all(sample.keys() == {"image", "label"} for sample in samples)
            images = [
                torch.from_numpy(np.array(sample["image"].resize((16, 16)))).permute(2, 0, 1) for sample in samples
            ]
            return {"pixel_values": torch.stack(images), "labels": torch.tensor([s["label"] for s in samples])}

    items = [{"image": b"" if index in (1, 4) else picture(20, 18, index), "label": index % 4} for index in range(6)]
    trainer = make_trainer(trainer={"data_collator": OwnCollator()}, on_bad_image="skip")
    with caplog.at_level(logging.WARNING, logger="carot_hf"):
        trainer.evaluate({"odd": ShiftSet(items, name="odd", num_classes=4)})
    assert "2 images of set 'odd' could not be decoded and were replaced by the next ones: indices 1, 4." in caplog.text
    assert isinstance(trainer.data_collator, OwnCollator)


def test_training_crop_of_an_extreme_shape_falls_back_to_the_centre():
    transform = ImageTransform(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
    left, top, right, bottom = random_box(400, 10, np.random.default_rng(0), transform.scale, transform.ratio)
    assert (top, bottom) == (0, 10)
    assert right - left == round(10 * 4 / 3)
    assert abs((400 - right) - left) <= 1
    assert transform.train(picture(1, 1), np.random.default_rng(0)).shape == (3, 32, 32)


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
        for start, batch in zip((0, 4), map(a_caption_each, batches), strict=True):
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


@pytest.mark.parametrize(("size", "batches"), [(16, [8, 8]), (21, [8, 8, 5]), (17, [8, 8]), (18, [8, 8, 2]), (3, [3])])
def test_shares_of_two_processes_are_the_batches_of_one(size, batches):
    """Rows of rank 0, then of rank 1; no sample twice; a rest that does not reach every process is left out."""
    order = DrawSampler(size, seed=3, epoch=lambda: 2)
    ranks = [list(ShareSampler(order, 4, rank, 2)) for rank in (0, 1)]
    whole = [a + b for a, b in zip(*ranks, strict=True)]
    assert [len(batch) for batch in whole] == batches
    assert [len(share) for share in ranks[0]] == [math.ceil(rows / 2) for rows in batches]
    assert [draw for batch in whole for draw in batch] == list(order)[: sum(batches)]
    assert len(ShareSampler(order, 4, 1, 2)) == len(batches)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [8, 9, 10, 11])
def test_shares_of_an_uneven_end(size, drop_last):
    """What remains is shared out, or left out when that is asked for or it is less than one a process."""
    order = DrawSampler(size, 0, lambda: 0, shuffle=False)
    shares = [ShareSampler(order, 2, rank, 2, drop_last=drop_last) for rank in range(2)]
    batches = [list(share) for share in shares]
    expected = 2 + (size >= 10 and not drop_last)
    assert [len(share) for share in shares] == [len(found) for found in batches] == [expected] * 2
    assert [sorted(a + b) for a, b in zip(*batches, strict=True)][:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    taken = sorted(index for batch in batches[0] + batches[1] for index in batch)
    assert taken == list(range(8 if drop_last or size == 9 else size))
