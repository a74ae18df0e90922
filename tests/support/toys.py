"""A tiny random CLIP and a tiny suite of noise, also for scripts that run in a process of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from carot_hf import ShiftSet, ShiftSuite
from carot_hf.models.classifier import CLIPClassifier, CLIPClassifierConfig

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = str(ROOT / "tests" / "support")
CLIP = ROOT / "carot_hf" / "suites" / "digits_clip"
CLASSES = ["zero", "one", "two", "three"]
TEMPLATES = ["a photo of the digit {}", "the number {}", "an image of {}"]


class Noise:
    """Seeded noise images with labels in turn, as items; the mean brightness follows the label."""

    def __init__(self, size, seed, classes=4):
        generator = np.random.default_rng(seed)
        self.labels = np.arange(size) % classes
        noise = generator.integers(0, 160, (size, 20, 18, 3))
        self.images = (noise + 24 * self.labels[:, None, None, None]).astype(np.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": Image.fromarray(self.images[index]), "label": int(self.labels[index])}


def noise_set(name, size, seed, columns=None):
    data = Noise(size, seed, len(columns) if columns else len(CLASSES))
    return ShiftSet(data, name=name, num_classes=len(CLASSES), labels=data.labels, columns=columns)


def noise_suite(train=Noise):
    """A suite for scripts that run in a process of their own; ``train(size, seed)`` makes the training set."""
    return ShiftSuite(
        name="noise",
        class_names=list(CLASSES),
        templates=list(TEMPLATES),
        train=ShiftSet(train(48, 0), name="train", num_classes=len(CLASSES)),
        validation=noise_set("validation", 15, 1),
        test=noise_set("home", 19, 2),
        shifts={"far": noise_set("far", 17, 3)},
    )


def tiny_processor():
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPProcessor(image_processor=images, tokenizer=CLIPTokenizer.from_pretrained(CLIP))


def tiny_clip(tokenizer, seed=0, **config):
    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **tower,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 32,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            projection_dim=12,
            **config,
        )
    )


def save_classifier(folder, names):
    """Write a `CLIPClassifier` of random weights for these classes, and its processor."""
    processor = tiny_processor()
    towers = tiny_clip(processor.tokenizer).config
    config = CLIPClassifierConfig(
        vision_config=towers.vision_config, projection_dim=towers.projection_dim, id2label=dict(enumerate(names))
    )
    CLIPClassifier(config).save_pretrained(folder)
    processor.save_pretrained(folder)
