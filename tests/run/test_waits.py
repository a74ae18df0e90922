"""What a GPU would be waited for in a training step: each number that Python reads from a device."""

from __future__ import annotations

import traceback

import pytest
import torch
from runs import logged
from torch.utils._python_dispatch import TorchDispatchMode
from toys import tiny_clip
from transformers import TrainerCallback

from carot_hf import CaRotTrainer
from carot_hf.basics.precision import not_finite

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim")


class Reads(TorchDispatchMode, TrainerCallback):
    """Notes each read of a number, from the second step on, by the step that it is in."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in READS:
            stack = traceback.extract_stack()
            if not any("F.one_hot(" in (frame.line or "") for frame in stack):  # it looks at the range on a CPU alone
                self.steps[-1].append(stack[-4:-1])
        return function(*args, **(kwargs or {}))

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.__enter__()
        self.steps.append([])

    def on_train_end(self, args, state, control, **kwargs):
        self.__exit__(None, None, None)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "carot"},
        {"preset": "carot", "gradient_accumulation_steps": 3},
        {"preset": "carot", "contrastive_batch_size": 12},
        {"preset": "carot", "same_class": "positive", "label_smoothing_factor": 0.1},
        {"preset": "tracer"},
        {"preset": "carot-2024"},
        {"preset": "ft-ls"},
        {"preset": "dive", "l2_sp_weight": 0.1},
        {"preset": "lipsum", "context_distillation_weight": 1.0},
    ],
)
def test_a_step_asks_the_device_once(make_trainer, options):
    """For whether the loss is finite; the loader's own tensors are made by a worker, on its CPU."""
    reads = Reads()
    trainer = make_trainer(
        **options, max_steps=4, logging_steps=100, optim="sgd", dataloader_num_workers=1, teacher_update_every=2,
        trainer={"callbacks": [reads]},
    )  # fmt: skip
    trainer.train()
    assert len(reads.steps) == 4
    reads.steps = reads.steps[1:3]  # the mode is on from the second step on; the fourth goes on to the end of the run
    assert [len(step) for step in reads.steps] == [1, 1], reads.steps


def test_the_gradient_norm_is_computed_where_it_is_logged(make_trainer, processor, monkeypatch):
    """And is what it was: against a run that computes it in each step."""
    runs, norms = [], []
    for every in (False, True):
        options = {"max_steps": 7, "logging_steps": 3, "logging_first_step": True}
        trainer = make_trainer(tiny_clip(processor.tokenizer), **options)
        if every:
            monkeypatch.setattr(
                CaRotTrainer, "_get_grad_norm", super(CaRotTrainer.__mro__[1], trainer)._get_grad_norm.__func__
            )
        computed = []
        clip = trainer.accelerator.clip_grad_norm_
        monkeypatch.setattr(
            trainer.accelerator,
            "clip_grad_norm_",
            lambda *args, clip=clip, computed=computed: [computed.append(1), clip(*args)][1],
        )
        trainer.train()
        runs.append([(entry["step"], entry["grad_norm"]) for entry in logged(trainer)])
        norms.append(len(computed))
    assert runs[0] == runs[1]
    assert [step for step, _ in runs[0]] == [1, 3, 6]
    assert norms == [3, 7]


def test_a_micro_batch_that_is_not_finite_stops_the_step(make_trainer):
    """Any of them, before the optimizer moves a weight."""
    trainer = make_trainer(gradient_accumulation_steps=3, max_steps=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    losses, calls = trainer.compute_loss, []

    def spoilt(*args, **kwargs):
        calls.append(1)
        return losses(*args, **kwargs) * (float("nan") if len(calls) == 2 else 1.0)

    trainer.compute_loss = spoilt
    with pytest.raises(RuntimeError, match=r"Expected a finite loss at step 1, got nan"):
        trainer.train()
    assert len(calls) == 3
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_first_weight_that_is_not_finite_is_named(model):
    assert not_finite(model) is None
    names = [name for name, _ in model.named_parameters()]
    for name in (names[-1], names[3]):
        dict(model.named_parameters())[name].data.view(-1)[-1] = float("inf")
        assert not_finite(model) == name
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("whole", torch.tensor(3))
    assert not_finite(model) == names[3]
