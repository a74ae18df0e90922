"""A tiny random CLIP, a tiny suite of noise and the embedded one: nothing here needs a network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from carot_hf import CaRotTrainer, CaRotTrainingArguments, ShiftSet, ShiftSuite

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "examples" / "digits" / "clip"
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "space"))
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # a worker of a loop that ended in an error is waited for 5 s
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # models are small: one is fastest

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


@pytest.fixture
def suite():
    return ShiftSuite(
        name="noise",
        class_names=list(CLASSES),
        templates=list(TEMPLATES),
        train=noise_set("train", 26, 0),
        validation=noise_set("validation", 15, 1),
        test=noise_set("home", 19, 2),
        shifts={"far": noise_set("far", 17, 3), "part": noise_set("part", 11, 4, columns=[[2], [0, 3]])},
    )


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


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


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


@pytest.fixture
def model(processor):
    return tiny_clip(processor.tokenizer)


@pytest.fixture
def make_trainer(suite, processor, tmp_path):
    """Make a trainer of the tiny model on the tiny suite; keyword arguments go to the training arguments."""

    def make(model=None, *, suite=suite, processing_class=processor, trainer=None, preset="carot", **arguments):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_steps": 4,
            "teacher_update_every": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            "reliability_diagrams": False,
            "use_cpu": True,
        }
        args = CaRotTrainingArguments.from_preset(preset, **{**defaults, **arguments})
        model = tiny_clip(processing_class.tokenizer) if model is None else model
        return CaRotTrainer(model=model, args=args, suite=suite, processing_class=processing_class, **(trainer or {}))

    return make
