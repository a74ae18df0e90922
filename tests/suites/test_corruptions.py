"""Corruptions: the wrapper against a stand-in for the package, and against the package where it is installed."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from toys import Noise, noise_set

from carot_hf.suites.imagenet import corruptions
from carot_hf.suites.imagenet.corruptions import CorruptedSet, corruption_names, parse_name


@pytest.fixture
def package(monkeypatch):
    """A stand-in: the same signature, noise from the same generators, and a note of each call."""
    module = types.ModuleType("imagecorruptions")
    module.calls = []

    def corrupt(image, severity=1, corruption_name=None, corruption_number=-1, **own):
        module.calls.append((corruption_name, severity))
        if corruption_name == "brightness":
            return image
        if corruption_name in ("impulse_noise", "glass_blur"):
            generator = np.random.default_rng(own["seed"])
            return generator.integers(0, 256, image.shape).astype(np.uint8)
        if own:
            raise TypeError(f"unexpected keyword arguments {own}")
        if corruption_name == "fog":
            raise OSError("no fog today")
        return np.random.randint(0, 256, image.shape).astype(np.uint8)  # noqa: NPY002

    module.corrupt = corrupt
    module.corruption_dict = {"glass_blur": lambda x, severity=1, seed=None: x}
    monkeypatch.setitem(sys.modules, "imagecorruptions", module)
    return module


def pixels(data, index):
    return np.asarray(data[index]["image"])


def test_names():
    assert len(corruption_names()) == len(set(corruption_names())) == 15
    assert corruption_names(extra=True)[15:] == ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
    assert parse_name("c-gaussian_noise-3") == ("gaussian_noise", 3)
    for name in ("gaussian_noise-3", "c-gaussian_noise", "c-gaussian_noise-3-1", "c-gaussian_noise-x"):
        with pytest.raises(ValueError, match=r"c-<corruption>-<severity>"):
            parse_name(name)
    with pytest.raises(ValueError, match="got 'rain'"):
        parse_name("c-rain-3")
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4, 5\), got 6"):
        parse_name("c-fog-6")


def test_items_keep_what_they_have_and_are_224_wide(package):
    inner = noise_set("home", 5, 0)
    data = CorruptedSet(inner, "snow", 4)
    assert (data.name, len(data), data.labels.tolist()) == ("c-snow-4", 5, [0, 1, 2, 3, 0])
    assert [item["label"] for item in data] == [0, 1, 2, 3, 0]
    item = data[2]
    assert (item["image"].size, item["image"].mode, item.keys()) == ((224, 224), "RGB", {"image", "label"})
    assert set(package.calls) == {("snow", 4)}
    assert CorruptedSet(Noise(3, 0), "snow", 1).labels.tolist() == [0, 1, 2]
    assert CorruptedSet([{"image": Image.new("L", (9, 9))}], "snow", 1).labels is None


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((400, 300), (341, 256), (58, 16)),  # 256 * 4 / 3 = 341.3; half of 341 - 224 is 58.5, rounded to even
        ((300, 400), (256, 341), (16, 58)),
        ((100, 100), (256, 256), (16, 16)),
        ((64, 640), (256, 2560), (16, 1168)),
    ],
)
def test_the_centre_of_the_resized_image_is_corrupted(package, size, resized, corner):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    left, top = corner
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))[top : top + 224, left : left + 224]
    assert np.array_equal(pixels(CorruptedSet([{"image": image}], "brightness", 1), 0), expected)


@pytest.mark.parametrize("corruption", ["gaussian_noise", "impulse_noise", "glass_blur"])
def test_an_item_depends_on_seed_and_index_alone(package, corruption):
    image = Image.new("RGB", (8, 8))
    inner = [{"image": image}] * 4
    data = CorruptedSet(inner, corruption, 2)
    forward = [pixels(data, index) for index in range(4)]
    np.random.seed(1)  # noqa: NPY002
    backward = [pixels(data, index) for index in (3, 2, 1, 0)][::-1]
    assert np.array_equal(forward, backward)
    assert np.array_equal(pixels(data, -1), forward[3])
    others = [
        pixels(CorruptedSet(inner, corruption, 2, seed=1), 0),
        pixels(CorruptedSet(inner, corruption, 3), 0),
        pixels(CorruptedSet(inner, "shot_noise", 2), 0),
    ]
    different = {values.tobytes() for values in [*forward, *others]}
    assert len(different) == 7
    with pytest.raises(IndexError):
        data[4]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_images(package, workers):
    data = CorruptedSet(noise_set("home", 6, 0), "gaussian_noise", 5, seed=3)
    loaded = DataLoader(data, batch_size=None, num_workers=workers, collate_fn=lambda item: np.asarray(item["image"]))
    assert np.array_equal([np.asarray(image) for image in loaded], [pixels(data, index) for index in range(6)])


def test_numpys_generator_is_left_as_it_was(package):
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    inner = [{"image": Image.new("RGB", (8, 8))}]
    CorruptedSet(inner, "gaussian_noise", 1)[0]
    with pytest.raises(OSError, match="no fog today"):
        CorruptedSet(inner, "fog", 1)[0]
    assert np.array_equal(np.random.random(3), expected)  # noqa: NPY002


def test_bad_arguments_are_refused(package):
    for severity in (0, 6, -1, 2.5, True, "3"):
        with pytest.raises(ValueError, match=r"`severity` of \(1, 2, 3, 4, 5\), got"):
            CorruptedSet([], "fog", severity)
    with pytest.raises(ValueError, match=r"got 'rain'\. There are gaussian_noise, .*saturate"):
        CorruptedSet([], "rain", 3)
    with pytest.raises(ValueError, match="got -1"):
        CorruptedSet([], "fog", 3, seed=-1)


def test_a_missing_or_unseedable_package_is_named_at_once(package, monkeypatch):
    package.corruption_dict = {"glass_blur": lambda x, severity=1: x}
    with pytest.raises(ImportError, match=r"cannot be seeded\. Uninstall .*carot_hf\[corruptions\]"):
        CorruptedSet([], "fog", 3)
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ImportError, match=r"pip install carot_hf\[corruptions\]"):
        CorruptedSet([], "fog", 3)


def test_the_real_package_has_the_same_corruptions():
    real = pytest.importorskip("imagecorruptions")
    assert corruption_names() == real.get_corruption_names("common")
    assert corruption_names(extra=True) == real.get_corruption_names("all")


@pytest.mark.parametrize("corruption", corruption_names(extra=True))
def test_the_real_package_is_deterministic(corruption):
    real = pytest.importorskip("imagecorruptions")
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    inner = [{"image": Image.fromarray(coarse).resize((300, 260)), "label": 1}] * 2
    clean = np.asarray(corruptions._centre(inner[0]["image"]))
    data = CorruptedSet(inner, corruption, 3)
    first = pixels(data, 1)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(pixels(data, 1), first)
    assert not np.array_equal(first, clean)
    drawn = not np.array_equal(pixels(data, 0), first)
    fixed = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur")
    assert drawn == (corruption not in (*fixed, "saturate"))
    if not drawn:
        assert np.array_equal(first, real.corrupt(clean, severity=3, corruption_name=corruption))
