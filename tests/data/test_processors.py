"""Each option of an image processor acts, to the pixels of the processor itself, or is refused by its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from families import model_of, processor_of
from PIL import Image
from toys import tiny_clip, tiny_processor
from transformers import ChineseCLIPImageProcessor, CLIPImageProcessor, Siglip2ImageProcessor, SiglipImageProcessor

from carot_hf import CaRotTrainer, CaRotTrainingArguments
from carot_hf.data.batches import CaRotCollator
from carot_hf.data.transforms import ImageTransform, check_image_size, image_transform, normalize_pixels

CLIP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}}
SIGLIP = {"size": {"height": 16, "width": 16}}
SIGLIP2 = {"patch_size": 8, "max_num_patches": 6}


def with_pil(kind):
    """The class that resizes with PIL; without torchvision it is the class itself."""
    return getattr(transformers, f"{kind.__name__}Pil", kind)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(processor, image):
    """What the trainer hands to the model."""
    transform = image_transform(processor)
    assert isinstance(transform, ImageTransform)
    batch = CaRotCollator(transform, None, 0)([{"image": image}])
    return normalize_pixels(batch["pixel_values"], transform.mean, transform.std)


ACT = [
    {},
    {"size": 20},
    {"size": {"height": 22, "width": 18}},  # whatever the shape; it was taken for the short side if both are equal
    {"size": {"height": 20, "width": 20}},
    {"size": {"height": 16, "width": 16}},
    {"do_center_crop": False, "size": {"height": 12, "width": 16}},
    {"crop_size": 14},
    {"crop_size": {"height": 12, "width": 16}},
    *({"resample": number} for number in range(6)),
    {"rescale_factor": 1 / 127.5},  # these two were ignored
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    {"do_normalize": False},
    {"do_normalize": False, "rescale_factor": 0.01},
    {"image_mean": [0.1, 0.5, 0.7], "image_std": [0.2, 0.3, 0.9]},
    {"image_mean": 0.5, "image_std": 0.25},
    {"do_convert_rgb": False},
]


@pytest.mark.parametrize("kind", [CLIPImageProcessor, ChineseCLIPImageProcessor])
@pytest.mark.parametrize("options", ACT, ids=str)
def test_options_that_act(kind, options):
    processor = with_pil(kind)(**{**CLIP, **options})
    for size in ((50, 37), (31, 64), (20, 22)):
        expected = torch.as_tensor(np.stack(processor(picture(*size), return_tensors="np")["pixel_values"]))
        torch.testing.assert_close(pixels_of(processor, picture(*size)), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"height": 12, "width": 20}},
        {"do_center_crop": True, "crop_size": 10},
        {"resample": 2},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.5, 0.7]},
        {"do_convert_rgb": None},
    ],
    ids=str,
)
def test_options_of_siglips_that_act(options):
    test_options_that_act(SiglipImageProcessor, {**SIGLIP, "crop_size": None, **options})


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"max_num_patches": 9}, {"patch_size": 4}, {"resample": 3}, {"image_mean": [0.1, 0.5, 0.7]}),
        *({"rescale_factor": 1 / 127.5}, {"do_normalize": False}),
    ],
    ids=str,
)
def test_options_of_siglip2s_that_act(options):
    processor = Siglip2ImageProcessor(**{**SIGLIP2, **options})
    ours = CaRotCollator(image_transform(processor), None, 0)([{"image": picture(50, 37)}])
    theirs = processor(images=[picture(50, 37)], return_tensors="pt")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_rescale": False}, r"`do_rescale` True, got False\. Images are decoded to values from 0 to 255"),
        ({"do_resize": False}, r"`do_resize` True, got False"),
        ({"do_pad": True, "pad_size": 30}, "`do_pad` False, got True"),
        ({"rescale_factor": 0}, r"`rescale_factor` of the image processor as a number above 0, got 0\."),
        ({"rescale_factor": float("inf")}, "`rescale_factor` .*, got inf"),
        ({"rescale_factor": None}, "`rescale_factor` .*, got None"),
        ({"size": {"shortest_edge": 24, "longest_edge": 30}}, "`size` of shortest_edge, or of height and width, got"),
        ({"size": {"max_height": 24, "max_width": 30}}, "`size` {'max_height': 24, 'max_width': 30}"),
        ({"size": {"shortest_edge": 12}}, r"at least the crop, got `size` {'shortest_edge': 12} and a crop of 16 x 16"),
        ({"size": {"height": 20, "width": 12}}, "at least the crop, got `size` {'height': 20, 'width': 12}"),
        ({"do_center_crop": False}, r"crops the centre to `crop_size`, got CLIP.* with `do_center_crop` False"),
        ({"resample": None}, r"`resample` .* as one of PIL's filters, got None\."),
        ({"resample": 9}, r"`resample` .*, got 9\."),
        ({"image_mean": [0.5]}, r"`image_mean` of the image processor as three numbers, one a colour, got \(0\.5,\)"),
        ({"image_std": [0.5, 0.5]}, r"`image_std` .*, got \(0\.5, 0\.5\)"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"`image_std` .*, got \(0\.5, 0\.0, 0\.5\)"),
        ({"image_std": None}, "`image_std` .*, got None"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        image_transform(with_pil(CLIPImageProcessor)(**{**CLIP, **options}))


@pytest.mark.parametrize("option", ["do_rescale", "do_resize"])
def test_options_of_siglip2_that_are_refused(option):
    """Without a resize the first batch failed in the middle of a reshape."""
    with pytest.raises(ValueError, match=f"`{option}` True, got False"):
        image_transform(Siglip2ImageProcessor(**SIGLIP2, **{option: False}))


def test_a_class_that_does_more_than_its_options_say_is_refused():
    class Flipping(with_pil(CLIPImageProcessor)):
        def resize(self, image, *args, **kwargs):
            return super().resize(image, *args, **kwargs)[..., ::-1]

    image_transform(with_pil(CLIPImageProcessor)(**CLIP))
    with pytest.raises(ValueError, match=r"as its options say, got Flipping, which makes other pixels"):
        image_transform(Flipping(**CLIP))
    with pytest.raises(
        ValueError, match=r"got LevitImageProcessor\w*, which makes other pixels"
    ):  # resizes to 256 / 224
        image_transform(with_pil(transformers.LevitImageProcessor)(**CLIP, resample=3))


def test_a_run_takes_the_rescale_factor_of_its_processor(make_trainer):
    processor = tiny_processor()
    processor.image_processor.rescale_factor = 1 / 127.5
    trainer = make_trainer(processing_class=processor)
    image = trainer.suite.test[3]["image"]
    batch = trainer._prepare_inputs(trainer.data_collator([{"image": image, "label": 1}]))
    expected = torch.as_tensor(np.stack(processor.image_processor(image, return_tensors="np")["pixel_values"]))
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("part", "missing"), [("tokenizer", "image processor"), ("image_processor", "tokenizer")])
def test_half_a_processor_is_refused(make_trainer, processor, part, missing):
    """Other trainers take a tokenizer under this name."""
    model = tiny_clip(processor.tokenizer)
    with pytest.raises(TypeError, match=rf"and a tokenizer, got \w+, which has no {missing}\. Load it with Auto"):
        make_trainer(model, processing_class=getattr(processor, part))


# ---- the model's size ----


@pytest.mark.parametrize("crop", [{"height": 24, "width": 24}, {"height": 16, "width": 24}])
def test_another_size_than_the_models_is_refused_before_the_first_step(make_trainer, crop):
    processor = tiny_processor()
    processor.image_processor.size = {"shortest_edge": 24}
    processor.image_processor.crop_size = crop
    message = rf"images of 16 x 16 pixels, which CLIPModel takes, got one that gives {crop['height']} x 24\. Pass the"
    with pytest.raises(ValueError, match=message):
        make_trainer(processing_class=processor)
    with pytest.raises(ValueError, match=message):
        make_trainer(processing_class=processor, preset="ft")


def test_so_is_it_for_a_model_that_is_made_later(suite, tmp_path):
    processor = tiny_processor()
    model = tiny_clip(processor.tokenizer)
    args = CaRotTrainingArguments.from_preset("carot", output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = CaRotTrainer(args=args, suite=suite, processing_class=processor, model_init=lambda: model)
    model.config.vision_config.image_size = 32
    with pytest.raises(ValueError, match="images of 32 x 32 pixels"):
        trainer.call_model_init()


def test_sizes_of_other_families():
    for family in ("siglip", "chinese_clip", "altclip", "siglip2"):
        processor = processor_of(family)
        check_image_size(model_of(family, processor.tokenizer), image_transform(processor))
    model = model_of("siglip", processor_of("siglip").tokenizer)
    with pytest.raises(
        ValueError, match=r"images of 16 x 16 pixels, which SiglipModel takes, got one that gives 8 x 16"
    ):
        check_image_size(model, image_transform(SiglipImageProcessor(size={"height": 8, "width": 16})))
    model = model_of("siglip2", processor_of("siglip2").tokenizer)
    transform = image_transform(Siglip2ImageProcessor(patch_size=16, max_num_patches=6))
    with pytest.raises(ValueError, match=r"patches of 8 x 8 pixels, .*, got one that gives 16 x 16\..* `patch_size`"):
        check_image_size(model, transform)
    check_image_size(torch.nn.Linear(2, 2), transform)  # refused elsewhere, by what it is
