"""Perturbed copies of images: each kind against a slow reference, and the same wherever and in whatever order made."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from toys import ROOT

from carot_hf.data.images import BadImageError, read_image
from carot_hf.data.perturbations import (
    PERTURBATIONS,
    SEEN_CORRUPTIONS,
    all_perturbations,
    kind_seen,
    perturbed,
)
from carot_hf.suites.imagenet.corruptions import corruption_names

ALL = all_perturbations()
IDS = [f"{name}-{severity}" for name, severity in ALL]
SEVERITIES = range(5)
SEED, INDEX = 3, 7
DRAWN = ("noise", "rotation", "move")


def picture(width, height, seed=0, cells=4):
    """Smooth colours."""
    shades = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    return Image.fromarray(shades).resize((width, height), Image.Resampling.BICUBIC)


def speckled(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


def distance(first, second):
    return float(np.abs(pixels(first) - pixels(second)).mean())


def made(image, name, severity, seed=SEED, index=INDEX):
    return perturbed(image, name, severity, seed=seed, index=index)


def generator_of(name, severity, seed=SEED, index=INDEX):
    """Written anew: SHA-256 of sorted JSON, as a whole number, into PCG64."""
    text = json.dumps({"index": index, "name": name, "seed": seed, "severity": severity}, separators=(",", ":"))
    return np.random.Generator(np.random.PCG64(int(hashlib.sha256(text.encode()).hexdigest(), 16)))


def half_up(number):
    return math.floor(number + 0.5)


# ---- the family ----


def test_the_family():
    """Written out, for these numbers are those of published results."""
    assert dict(PERTURBATIONS) == {
        "noise": (0.05, 0.1, 0.2, 0.3, 0.4),
        "blur": (1 / 64, 1 / 32, 3 / 64, 5 / 64, 7 / 64),
        "rotation": (10, 20, 30, 45, 60),
        "contrast": (0.7, 0.5, 0.35, 0.2, 0.1),
        "pixelate": (0.7, 0.5, 0.4, 0.3, 0.2),
        "move": (0.1, 0.2, 0.3, 0.4, 0.5),
    }
    assert len(ALL) == len(set(ALL)) == 30
    assert ALL[:6] == [("noise", 0), ("noise", 1), ("noise", 2), ("noise", 3), ("noise", 4), ("blur", 0)]
    assert ALL[-1] == ("move", 4)
    with pytest.raises(TypeError):
        PERTURBATIONS["noise"] = (1.0,)


def test_what_a_caller_changes_is_his_own():
    all_perturbations().clear()
    assert all_perturbations() == ALL


def test_kinds_seen():
    names = corruption_names(extra=True)
    assert set(names) >= SEEN_CORRUPTIONS
    unseen = {"snow", "frost", "fog", "brightness", "elastic_transform", "jpeg_compression", "spatter", "saturate"}
    assert {name for name in names if not kind_seen(name)} == unseen
    for word in ("noise", "blur"):
        assert {name for name in names if word in name} == {name for name in SEEN_CORRUPTIONS if word in name}
    assert not kind_seen("sketch")


# ---- each kind against a reference ----


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise(severity):
    image = speckled(6, 5)
    drawn = generator_of("noise", severity)
    sigma = np.float32((0.05, 0.1, 0.2, 0.3, 0.4)[severity] * 255)
    expected = np.empty((5, 6, 3), int)
    for row in range(5):
        for column in range(6):
            for channel in range(3):
                value = drawn.standard_normal(dtype=np.float32) * sigma
                value += np.float32(image.getpixel((column, row))[channel])
                expected[row, column, channel] = round(float(min(max(value, 0), 255)))
    np.testing.assert_array_equal(pixels(made(image, "noise", severity)), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_its_spread(severity):
    """Grey of 128 and sigmas that are hardly clipped; sigma = 102 is, at 1.25 sigma."""
    sigma = (12.75, 25.5, 51.0, 76.5, 102.0)[severity]
    noise = pixels(made(Image.new("RGB", (150, 150), (128, 128, 128)), "noise", severity)) - 128
    reference = np.random.default_rng(1).normal(0, sigma, 10**6).clip(-128, 127)
    assert noise.mean() == pytest.approx(0, abs=0.02 * sigma)
    assert noise.std() == pytest.approx(reference.std(), rel=0.01)
    flat = noise.reshape(-1, 3)
    assert abs(np.corrcoef(flat.T)[np.triu_indices(3, 1)]).max() < 0.03  # a draw of its own for each channel


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur(severity):
    """A true Gaussian, whose edge pixels go on for ever; PIL's is three box filters."""
    image = speckled(96, 64)
    sigma = (1, 2, 3, 5, 7)[severity]  # the shorter side is 64
    reach = 5 * sigma
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    values = np.pad(pixels(image).astype(float), ((reach, reach), (reach, reach), (0, 0)), "edge")
    for axis in (0, 1):
        values = np.apply_along_axis(np.convolve, axis, values, kernel / kernel.sum(), "valid")
    found = pixels(made(image, "blur", severity))
    assert np.abs(found - values).mean() < 1.5
    wrong = pixels(made(image, "blur", severity - 1 if severity else 1))
    assert np.abs(wrong - values).mean() > 2 * np.abs(found - values).mean()


def sampled(image, source, fill):
    """A loop: the value at ``source(x, y)`` of each pixel's centre, bilinear; the fill where that lies outside."""
    values, (width, height) = pixels(image), image.size
    result = np.empty_like(values)
    for row in range(height):
        for column in range(width):
            x, y = source(column + 0.5, row + 0.5)
            if not (0 <= x < width and 0 <= y < height):
                result[row, column] = fill
                continue
            left, top = math.floor(x - 0.5), math.floor(y - 0.5)
            right_part, low_part = x - 0.5 - left, y - 0.5 - top
            mixed = np.zeros(3)
            for over, down, weight in (
                (0, 0, (1 - right_part) * (1 - low_part)),
                (1, 0, right_part * (1 - low_part)),
                (0, 1, (1 - right_part) * low_part),
                (1, 1, right_part * low_part),
            ):
                mixed += weight * values[min(max(top + down, 0), height - 1), min(max(left + over, 0), width - 1)]
            result[row, column] = [half_up(value) for value in mixed]
    return result


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("index", [0, 1])
def test_rotation(severity, index):
    image = speckled(14, 9)
    most = (10, 20, 30, 45, 60)[severity]
    turn = math.radians(generator_of("rotation", severity, index=index).uniform(-most, most))

    def source(x, y):  # anti-clockwise as seen, with y downwards
        x, y = x - 7, y - 4.5
        return 7 + x * math.cos(turn) - y * math.sin(turn), 4.5 + x * math.sin(turn) + y * math.cos(turn)

    found = pixels(made(image, "rotation", severity, index=index))
    assert np.abs(found - sampled(image, source, image.getpixel((0, 0)))).max() <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("index", [0, 1])
def test_move(severity, index):
    image = speckled(14, 9)
    most = (0.1, 0.2, 0.3, 0.4, 0.5)[severity]
    right, down, growth = generator_of("move", severity, index=index).uniform(-most, most, 3)

    def source(x, y):  # a point of the image goes to centre + zoom * (point - centre) + shift
        return (x - 7 - 14 * right) / (1 + growth) + 7, (y - 4.5 - 9 * down) / (1 + growth) + 4.5

    found = pixels(made(image, "move", severity, index=index))
    assert np.abs(found - sampled(image, source, image.getpixel((0, 0)))).max() <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast(severity):
    image = speckled(7, 5)
    factor = (0.7, 0.5, 0.35, 0.2, 0.1)[severity]
    grey = [image.convert("L").getpixel((x, y)) for x in range(7) for y in range(5)]
    mean = sum(grey) / len(grey)
    found = made(image, "contrast", severity)
    for x in range(7):
        for y in range(5):
            assert found.getpixel((x, y)) == tuple(
                round(mean + factor * (value - mean)) for value in image.getpixel((x, y))
            )
    assert np.abs(pixels(found) - pixels(ImageEnhance.Contrast(image).enhance(factor))).max() <= 1  # it rounds the mean


@pytest.mark.parametrize(
    ("severity", "size", "blocks"),
    [
        *((0, (2, 2), (1, 1)), (1, (8, 6), (4, 3)), (2, (4, 4), (2, 2)), (3, (6, 3), (2, 1))),
        *((4, (10, 5), (2, 1)), (4, (20, 15), (4, 3))),
    ],
)
def test_pixelate(severity, size, blocks):
    """Sides that blocks divide: means of whole pixels, rounded along each row and then down."""
    image = speckled(*size)
    (width, height), found = size, pixels(made(image, "pixelate", severity))
    wide, high = width // blocks[0], height // blocks[1]
    for channel in range(3):
        for top in range(0, height, high):
            for left in range(0, width, wide):
                rows = [
                    half_up(sum(image.getpixel((left + x, top + y))[channel] for x in range(wide)) / wide)
                    for y in range(high)
                ]
                assert set(found[top : top + high, left : left + wide, channel].flat) == {half_up(sum(rows) / high)}


@pytest.mark.parametrize(("severity", "blocks"), [*enumerate([(70, 42), (50, 30), (40, 24), (30, 18), (20, 12)])])
def test_pixelate_keeps_a_share_of_each_side(severity, blocks):
    ramp = np.zeros((60, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100) * 2, np.arange(60)[:, None] * 4
    found = pixels(made(Image.fromarray(ramp), "pixelate", severity))
    assert (len(np.unique(found[..., 0])), len(np.unique(found[..., 1]))) == blocks


class Still:
    """A generator that draws nothing but the middle of a range."""

    def uniform(self, low, high, size=None):
        return (low + high) / 2 if size is None else np.full(size, (low + high) / 2)


@pytest.mark.parametrize("name", ["rotation", "move"])
@pytest.mark.parametrize("size", [(1, 1), (13, 8), (1, 30)])
def test_a_turn_or_move_of_nothing(name, size, monkeypatch):
    image = speckled(*size)
    monkeypatch.setattr("numpy.random.Generator", lambda bits: Still())
    for severity in SEVERITIES:
        assert distance(made(image, name, severity), image) == 0


@pytest.mark.parametrize("name", ["rotation", "move"])
def test_the_corner_fills(name):
    values = np.full((40, 40, 3), 200, np.uint8)
    values[0, 0] = (10, 20, 30)
    image = Image.fromarray(values)
    corners = {made(image, name, 4, index=index).getpixel(place) for index in range(20) for place in ((0, 39), (39, 0))}
    assert (10, 20, 30) in corners


@pytest.mark.parametrize(("name", "width"), [("rotation", 120.0), ("move", 1.0)])
def test_draws_fill_their_range(name, width):
    drawn = [generator_of(name, 4, index=index).uniform(-width / 2, width / 2) for index in range(400)]
    assert min(drawn) < -0.48 * width
    assert max(drawn) > 0.48 * width
    assert np.mean(drawn) == pytest.approx(0, abs=4 * width / math.sqrt(12 * 400))


# ---- the same everywhere ----

SCRIPT = """
import hashlib, sys
import numpy as np
from PIL import Image
from carot_hf.data.perturbations import all_perturbations, perturbed
image = Image.fromarray(np.arange(9 * 12 * 3, dtype=np.uint8).reshape(9, 12, 3))
np.random.seed(int(sys.argv[1]))
for name, severity in all_perturbations():
    print(name, severity, hashlib.sha256(perturbed(image, name, severity, seed=3, index=7).tobytes()).hexdigest())
"""


def test_the_same_in_every_process():
    image = Image.fromarray(np.arange(9 * 12 * 3, dtype=np.uint8).reshape(9, 12, 3))
    here = [f"{name} {level} {hashlib.sha256(made(image, name, level).tobytes()).hexdigest()}" for name, level in ALL]
    for salt in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, salt], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert run.stdout.splitlines() == here


def test_the_same_in_any_order_and_thread():
    images = [*(speckled(20, 15, seed) for seed in range(4)), picture(16, 16).convert("L")]
    tasks = [(number, name, severity) for number in range(5) for name, severity in ALL]

    def one(task):
        number, name, severity = task
        return made(images[number], name, severity, index=number).tobytes()

    expected = {task: one(task) for task in tasks}
    assert {task: one(task) for task in reversed(tasks)} == expected
    shuffled = [tasks[place] for place in np.random.default_rng(0).permutation(len(tasks))]
    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(shuffled, pool.map(one, shuffled), strict=True)) == expected


def test_global_generators_stay_as_they_are():
    before = (np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())  # noqa: NPY002
    for name, severity in ALL:
        made(speckled(5, 5), name, severity)
    assert (np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()) == before  # noqa: NPY002


@pytest.mark.parametrize("name", DRAWN)
def test_other_draws(name):
    """Of another seed, index, or severity, and not the same for seed and index exchanged."""
    image = speckled(30, 20)
    cases = [(severity, seed, index) for severity in SEVERITIES for seed in range(4) for index in range(4)]
    results = {made(image, name, severity, seed, index).tobytes() for severity, seed, index in cases}
    assert len(results) == len(cases)


@pytest.mark.parametrize("name", [name for name in PERTURBATIONS if name not in DRAWN])
def test_kinds_without_a_draw(name):
    image = speckled(30, 20)
    results = [{made(image, name, severity, seed, 2 * seed).tobytes() for seed in range(3)} for severity in SEVERITIES]
    assert [len(found) for found in results] == [1] * 5
    assert len(set.union(*results)) == 5


def test_noise_of_another_severity_is_another_draw():
    image = Image.new("RGB", (100, 100), (128, 128, 128))
    first, second = (pixels(made(image, "noise", severity)).ravel() - 128 for severity in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_whole_numbers_of_numpy():
    image = speckled(9, 9)
    for name, severity in ALL:
        found = perturbed(image, name, np.int64(severity), seed=np.uint8(SEED), index=np.int32(INDEX))
        assert found.tobytes() == made(image, name, severity).tobytes()


# ---- any image ----

MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I;16",
    "I",
    "F",
    "RGBa",
)
SIZES = [(1, 1), (1, 2), (1, 50), (50, 1), (2, 2), (3, 700), (2000, 1), (17, 11)]


def of_mode(mode, size):
    image = picture(*size, seed=1)
    grey = np.asarray(image.convert("L"))
    if mode == "P":
        result = image.quantize(8)
        result.info["transparency"] = 0
        return result
    if mode == "LAB":
        return Image.frombytes("LAB", size, image.tobytes())
    if mode in ("I;16", "I", "F"):
        values = {"I;16": grey.astype(np.uint16) * 257, "I": grey.astype(np.int32), "F": grey / np.float32(255)}
        return Image.fromarray(values[mode])
    between = {"PA": image.quantize(8), "RGBa": image.convert("RGBA")}
    return between.get(mode, image).convert(mode)


@pytest.mark.parametrize(("name", "severity"), ALL, ids=IDS)
def test_every_mode(name, severity):
    for mode in MODES:
        image = of_mode(mode, (12, 9))
        assert image.mode == mode
        before = (image.tobytes(), image.getpalette() if mode in ("P", "PA") else None, dict(image.info))
        found = made(image, name, severity)
        assert (found.mode, found.size, found.info) == ("RGB", (12, 9), {})
        assert (image.tobytes(), image.getpalette() if mode in ("P", "PA") else None, dict(image.info)) == before
        assert image.mode == mode
        assert found.tobytes() == made(read_image(image), name, severity).tobytes()  # converted as for evaluation


@pytest.mark.parametrize(("name", "severity"), ALL, ids=IDS)
def test_every_size(name, severity):
    for size in SIZES:
        image = speckled(*size)
        before = image.tobytes()
        for index in range(3):
            found = made(image, name, severity, index=index)
            assert (found.mode, found.size) == ("RGB", size)
            found.putpixel((0, 0), (1, 2, 3))  # the result is no view of the image
            assert image.tobytes() == before


def test_what_else_a_set_holds(tmp_path):
    image = speckled(12, 9)
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        values = [np.asarray(image), (tmp_path / "a.png").read_bytes(), tmp_path / "a.png", opened]
        for value in values:
            for name, severity in ALL:
                assert made(value, name, severity).tobytes() == made(image, name, severity).tobytes()


def test_exif_is_neither_applied_nor_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    speckled(12, 9).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
        for image in (opened, opened.copy()):
            for name, severity in ALL:
                found = made(image, name, severity)
                assert found.size == (12, 9)
                assert not found.getexif()


# ---- severities ----


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_stronger_is_farther(name):
    images = [picture(48, 40, seed) for seed in range(50)]
    means = [
        np.mean([distance(made(image, name, level, index=row), image) for row, image in enumerate(images)])
        for level in SEVERITIES
    ]
    assert means[0] > 0
    assert means == sorted(means)
    assert min(np.diff(means)) > 0.02 * means[-1]


@pytest.mark.parametrize("name", ["blur", "rotation", "contrast", "move"])
def test_twice_as_large_looks_alike(name):
    for seed in range(4):
        image = picture(120, 88, seed, cells=8)
        large = image.resize((240, 176), Image.Resampling.BICUBIC)
        for severity in SEVERITIES:
            small = made(image, name, severity, index=seed)
            shrunk = made(large, name, severity, index=seed).resize(image.size, Image.Resampling.BOX)
            assert distance(shrunk, small) < max(0.7, 0.1 * distance(image, small))


@pytest.mark.parametrize("name", ["noise", "pixelate"])
def test_noise_and_pixelate_are_of_pixels(name):
    """The limit that the docstring states: shrunk by 2 afterwards, an image twice as large shows less of them."""
    image = picture(60, 44, cells=12)
    large = image.resize((120, 88), Image.Resampling.BICUBIC)
    for severity in (0, 2, 4):
        effect = distance(made(image, name, severity), image)
        shrunk = made(large, name, severity).resize(image.size, Image.Resampling.BOX)
        assert distance(shrunk, large.resize(image.size, Image.Resampling.BOX)) < 0.7 * effect


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "fog"}, r"^Expected the name of a perturbation, got 'fog'\. There are noise, blur, .*, move\.$"),
        ({"severity": 5}, r"^Expected a `severity` from 0 to 4, got 5\. Write 0 for the mildest\.$"),
        ({"severity": -1}, r"^Expected a `severity` from 0 to 4, got -1\. "),
        ({"severity": True}, r"^Expected a `severity` from 0 to 4, got True\. "),
        ({"severity": 1.0}, r"^Expected a `severity` from 0 to 4, got 1\.0\. "),
        ({"index": -1}, r"^Expected `index` as a whole number of at least 0, got -1\. Correct it\.$"),
        ({"index": None}, r"^Expected `index` as a whole number of at least 0, got None\. "),
        ({"seed": -3}, r"^Expected `seed` as a whole number of at least 0, got -3\. "),
        ({"seed": "0"}, r"^Expected `seed` as a whole number of at least 0, got '0'\. "),
    ],
)
def test_options_that_are_wrong(change, message):
    options = {"name": "noise", "severity": 0, "seed": 0, "index": 0, **change}
    with pytest.raises(ValueError, match=message):
        perturbed(speckled(4, 4), **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 3)), r"^Expected an image of at least 1 x 1 pixels, got \(0, 3\)\. "),
        (Image.new("I", (3, 3), -5), r"^Expected an image that can be decoded, got grey values from -5 to -5, .*\. Re"),
        (Image.new("F", (3, 3), 7.0), r"^Expected an image that can be decoded, got float values .*\. Replace or drop"),
        (b"no image", r"^Expected an image that can be decoded, got UnidentifiedImageError"),
        (None, r"^Expected an image that can be decoded, got NoneType in place of an image\. "),
    ],
)
def test_images_that_are_none(image, message):
    with pytest.raises(BadImageError, match=message):
        made(image, "blur", 0)


@pytest.mark.parametrize("value", [torch.zeros(3, 4, 4), 7, np.zeros((2, 3, 4, 5), np.uint8)])
def test_what_is_no_image(value):
    with pytest.raises(
        TypeError, match=r"^Expected a PIL image, an array, bytes or a path, got .* in place of .*\. Pa"
    ):
        made(value, "blur", 0)
