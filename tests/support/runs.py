"""Runs that go on, and how two of them are compared."""

from __future__ import annotations

import torch
from torch import nn

from carot_hf import CaRotTrainer
from carot_hf.models.backbones import TEXT_INPUTS, pair_inputs


class Recorder(CaRotTrainer):
    """Keeps every training batch it sees."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not hasattr(self, "seen"):
            self.seen = []
        self.seen.append({name: torch.as_tensor(value).clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, num_items_in_batch)


def run(make_trainer, output_dir, resume=None, **options):
    """26 samples in batches of 4 are 6 batches an epoch; 2 micro-batches a step; 8 steps reach the third epoch."""
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "teacher_update_every": 2,
        "teacher_momentum_ramp": 1.0,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "preset": "carot-2024",
        "label_smoothing_factor": 0.1,
    }
    trainer = make_trainer(**{**settings, **options})
    trainer.__class__ = Recorder
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_equal_runs(whole, resumed):
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, value in whole.teacher.state_dict().items():
        assert torch.equal(value, resumed.teacher.state_dict()[name]), f"teacher {name}"
    ours, theirs = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, state in ours.items():
        for key, value in state.items():
            assert torch.equal(value, theirs[index][key]), (index, key)
    assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
    seen = resumed.seen
    for batch, again in zip(whole.seen[-len(seen) :], seen, strict=True):
        assert batch.keys() == again.keys()
        assert all(torch.equal(batch[name], again[name]) for name in batch)


def assert_same(one, two, tolerance):
    for kind in ("student", "teacher"):
        a, b = ((run.model if kind == "student" else run.teacher.model).state_dict() for run in (one, two))
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, atol=tolerance, rtol=tolerance, msg=f"{kind} {name}")


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def first_batch(trainer):
    return pair_inputs(a_caption_each(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))))


def a_caption_each(batch):
    """The batch with the caption of each sample in its row, as models take it."""
    index = batch.get("caption_index")
    rest = {name: value for name, value in batch.items() if name not in ("caption_index", "caption_number")}
    return rest if index is None else {**rest, **{name: rest[name][index] for name in TEXT_INPUTS if name in rest}}


def logged(trainer, key="loss"):
    return [entry for entry in trainer.state.log_history if key in entry]


def first_batches(trainer, count):
    """The first batches that training will see, prepared as in training."""
    iterator = iter(trainer.get_train_dataloader())
    return [trainer._prepare_inputs(next(iterator)) for _ in range(count)]


class Net(nn.Module):
    """A parameter of each kind: trained, frozen, shared; an integer and a float buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.frozen = nn.Linear(4, 4)
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.tensor([7]))
        self.register_buffer("running", torch.tensor([0.5]))
