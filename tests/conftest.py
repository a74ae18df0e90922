"""A tiny random CLIP, a tiny suite of noise and the embedded one: nothing here needs a network."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from release import SIBLINGS
from toys import CLASSES, TEMPLATES, noise_set, tiny_clip, tiny_processor

from carot_hf import CaRotTrainer, CaRotTrainingArguments, ShiftSuite

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # a worker of a loop that ended in an error is waited for 5 s
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # models are small: one is fastest


def pytest_collection_modifyitems(items):
    """Mark what runs before a release alone."""
    for item in items:
        if item.nodeid.removeprefix("tests/") in SIBLINGS:
            item.add_marker(pytest.mark.release)


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_garbage_collector():
    """Each training ends in `gc.collect()`, which goes through all that was imported: 0.4 s and more."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


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
