"""Images of any shape: the processor's own pixels, within a small multiple of the image's own memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from toys import ROOT
from transformers import CLIPImageProcessor, Siglip2ImageProcessor, SiglipImageProcessor

from carot_hf.data.images import read_image
from carot_hf.data.transforms import ImageTransform, PatchTransform, image_transform, normalize_pixels

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def with_pil(kind, **options):
    """A processor that resizes with PIL; without torchvision it is the class itself."""
    return getattr(transformers, f"{kind.__name__}Pil", kind)(**options, **HALF)


def smooth(width, height, seed=0):
    """Colours that change slowly, so that no filter overshoots the range from 0 to 255 between PIL's two passes."""
    coarse = np.random.default_rng(seed).integers(40, 216, (max(2, height // 8), max(2, width // 8), 3))
    return Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)


def levels(processor, image):
    """Pixels of the trainer and of the processor, from 0 to 255."""
    transform = image_transform(processor)
    ours = normalize_pixels(transform.evaluate(image)[None], transform.mean, transform.std)
    theirs = torch.as_tensor(np.stack(processor(image, return_tensors="np")["pixel_values"]))
    assert ours.shape == theirs.shape
    return [((pixels + 1) * 127.5).round().int() for pixels in (ours, theirs)]


@pytest.mark.parametrize("resample", [1, 2, 3, 5])
@pytest.mark.parametrize("crop", [(32, 32), (24, 16), (17, 31)])
@pytest.mark.parametrize("size", [(10, 320), (320, 10), (3, 96), (64, 2048), (2048, 64), (1, 32), (60, 45)])
def test_moderate_shapes_give_the_processors_pixels_bit_for_bit(size, crop, resample):
    """Up to 32 times as long as wide, on noise."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    options = {"size": {"shortest_edge": 32}, "crop_size": {"height": crop[0], "width": crop[1]}}
    ours, theirs = levels(with_pil(CLIPImageProcessor, resample=resample, **options), Image.fromarray(noise))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("resample", [1, 2, 3, 5])
@pytest.mark.parametrize("crop", [(32, 32), (24, 16), (17, 31)])
@pytest.mark.parametrize(
    "size", [(10, 321), (321, 10), (3, 97), (64, 2049), (2049, 64), (1, 33), (33, 1), (9, 2000), (2000, 9), (50, 8000)]
)
def test_long_shapes_are_cropped_first_and_give_the_processors_pixels_to_within_rounding(size, crop, resample):
    """Beyond 32 times; the whole is still small enough for the processor."""
    options = {"size": {"shortest_edge": 32}, "crop_size": {"height": crop[0], "width": crop[1]}}
    ours, theirs = levels(with_pil(CLIPImageProcessor, resample=resample, **options), smooth(*size))
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.25


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2), (1, 20000), (20000, 1), (40, 1000)])
def test_a_fixed_size_gives_the_processors_pixels_to_within_rounding(size):
    processor = with_pil(SiglipImageProcessor, size={"height": 32, "width": 32})
    ours, theirs = levels(processor, smooth(*size))
    assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("turned", [False, True])
def test_the_crop_is_the_middle_of_the_strip(turned):
    """20,000 x 1 at a short side of 224: the crop shows one pixel of the strip, the filter reaches two more a side."""
    pixels = np.full((1, 20000, 3), 255, np.uint8)
    pixels[:, 9996:10004] = (10, 20, 30)
    image = Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels)
    transform = ImageTransform(224, (224, 224), (0.5,) * 3, (0.5,) * 3)
    expected = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 224, 224)
    assert torch.equal(transform.evaluate(image), expected)


MEASURE = """
import io, json, os, resource, sys
import numpy as np
from PIL import Image
from transformers import Siglip2ImageProcessor
from carot_hf.data.images import read_image
from carot_hf.data.transforms import ImageTransform, PatchTransform

half = ((0.5,) * 3, (0.5,) * 3)
kinds = {
    "short": ImageTransform(224, (224, 224), *half),
    "fixed": ImageTransform(None, (224, 224), *half),
    "patches": PatchTransform(Siglip2ImageProcessor(patch_size=16, max_num_patches=256)),
}

def mebibytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)

def run(transform, size, way):
    exif = Image.Exif()
    exif[0x0112] = 6 if way == "turned" else 1
    file = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(file, "PNG", exif=exif)
    image = read_image(file.getvalue())
    if way == "train":
        return transform.train(image, np.random.default_rng(0))
    return transform.evaluate(image)

for transform in kinds.values():
    for way in ("evaluate", "train"):
        run(transform, (300, 260), way)  # what is loaded on first use
start = mebibytes()
if os.path.exists("/proc/self/statm"):  # a gibibyte more than there is now
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
for name, transform in kinds.items():
    for size in ((1, 20_000), (20_000, 1), (1, 200_000), (200_000, 1), (3, 200_000)):
        for way in ("evaluate", "train", "turned"):
            result = run(transform, size, way)
            if name != "patches":
                assert result.shape == (3, 224, 224)
                assert result.flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
print(json.dumps(mebibytes() - start))
"""


@pytest.mark.slow
def test_memory_of_a_strip_is_bounded():
    """The largest holds 2.4 MB in PIL's four bytes a pixel; 1 x 20,000 took 4 GB, 1 x 200,000 ended the process."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURE], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) < 100


def test_a_strip_trains_on_a_crop_of_an_allowed_shape():
    """No shape within 3/4 to 4/3 has 0.9 of the area: the largest centre crop, here one pixel."""
    pixels = np.zeros((20001, 1, 3), np.uint8)
    pixels[9997:10004] = (7, 8, 9)  # the filter reaches beyond the crop
    image = Image.fromarray(pixels)
    transform = ImageTransform(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
    assert transform.train(image, np.random.default_rng(3)).flatten(1).unique(dim=1).flatten().tolist() == [7, 8, 9]
    patches = PatchTransform(Siglip2ImageProcessor(patch_size=8, max_num_patches=6, **HALF))
    made = patches.train(image, np.random.default_rng(3))
    assert made["spatial_shapes"].tolist() == [2, 2]
    assert made["pixel_values"][:4].view(4, 64, 3).unique(dim=1).shape == (4, 1, 3)
    assert ((made["pixel_values"][0, :3] + 1) * 127.5).round().tolist() == [7, 8, 9]


def test_a_strip_turned_by_exif_is_the_strip_on_its_side():
    exif = Image.Exif()
    exif[0x0112] = 6
    strip, file = smooth(2000, 9), io.BytesIO()
    strip.save(file, "PNG", exif=exif)
    transform = ImageTransform(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
    image = read_image(file.getvalue())
    assert image.size == (9, 2000)
    difference = transform.evaluate(image).int() - transform.evaluate(strip.transpose(Image.Transpose.ROTATE_270)).int()
    assert difference.abs().max() == 0
