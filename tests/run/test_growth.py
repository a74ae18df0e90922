"""No tensor grows faster than it must: the loss has local rows x columns, an evaluation works in chunks."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from carot_hf import ShiftSet
from carot_hf.calibration.metrics import calibration_metrics
from carot_hf.calibration.temperature import fit_temperature
from carot_hf.evaluation.logits import SetLogits
from carot_hf.evaluation.measure import measure

ROWS, WORLD, WIDTH = 16, 16, 12


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns, backward passes included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf))])
        return result


@contextmanager
def many_processes():
    """The first of 16 processes, the others imagined: what it sends goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("same_class", ["negative", "positive", "ignore"])
def test_the_loss_has_local_rows_times_columns(make_trainer, monkeypatch, same_class):
    """A matrix of all pairs would have 16 times as many elements on each of 16 processes."""
    trainer = make_trainer(preset="tracer", same_class=same_class, label_smoothing_factor=0.1)
    monkeypatch.setattr(dist, "all_gather", lambda parts, sent: [part.copy_(sent) for part in parts])
    embeds = [F.normalize(torch.randn(ROWS, WIDTH), dim=-1).requires_grad_() for _ in range(2)]
    taught = [part.detach() for part in embeds]
    labels, head = torch.arange(ROWS) % 4, [trainer.model.logit_scale]
    with many_processes(), Largest() as largest:
        terms = trainer.method.pair_terms(tuple(embeds), head, labels, tuple(taught), head)
        sum(terms.values()).backward()
    assert set(terms) == {"contrastive", "distillation", "feature_distillation"}
    assert largest.elements == ROWS * ROWS * WORLD
    assert all(part.grad is not None for part in embeds)


def simulated(rows, classes):
    generator = torch.Generator().manual_seed(0)
    weight = F.normalize(torch.randn(classes, WIDTH, generator=generator), dim=-1)
    labels = torch.randint(classes, (rows,), generator=generator)
    embeds = F.normalize(weight[labels] + 0.3 * torch.randn(rows, WIDTH, generator=generator), dim=-1)
    return embeds, (30 * weight, torch.zeros(classes)), labels


def test_an_evaluation_works_in_chunks():
    """The logits of all rows are never there at once: those of four times as many rows need no larger tensor."""
    seen = {}
    for rows in (30_000, 120_000):
        embeds, head, labels = simulated(rows, 200)
        data = ShiftSet(range(rows), name="home", num_classes=200)
        logits = SetLogits(embeds, head, data)
        with Largest() as largest:
            scaling = partial(dict, temperature=fit_temperature(logits, labels))
            metrics = measure(logits, labels, n_bins=10, link="softmax", scalings={"ts": scaling}).metrics
        seen[rows] = largest.elements
        whole = calibration_metrics(F.linear(embeds, *head), labels, n_bins=10)
        assert metrics["ece"] == pytest.approx(whole["ece"], abs=1e-6)
    assert seen[120_000] <= max(seen[30_000], 12 * 120_000)
    assert seen[30_000] < 30_000 * 200 / 2
