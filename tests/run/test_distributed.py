"""Two processes with half a batch each equal one process with the whole batch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from launching import in_processes, launch
from tolerances import EXACT, LOGGED
from toys import SUPPORT

from carot_hf.calibration.metrics import scaled_metrics

TERMS = (
    "contrastive", "cross_entropy", "distillation", "feature_distillation", "orthogonality", "cross_norm", "sigmoid",
    "sigmoid_distillation",
)  # fmt: skip
STOPPED = """
import sys
sys.path.insert(0, {tests!r})
from launching import noise_trainer
from toys import Noise, noise_suite


class Spoiled(Noise):
    def __getitem__(self, index):
        return {{"image": b"", "label": 0}} if index == 30 else super().__getitem__(index)


noise_trainer({out!r}, "flyp", suite=noise_suite(Spoiled), max_steps=12, save_strategy="no").train()
"""


@pytest.mark.slow
def test_a_bad_image_on_one_process_ends_both(tmp_path):
    """It must not wait for the other one, which waits for its gradients."""
    result = in_processes(tmp_path, STOPPED.format(tests=SUPPORT, out=str(tmp_path / "run")))
    assert result.returncode != 0
    assert "in set 'train' at index 30, got no bytes" in result.stderr


# The search of a linear probe ends when a step gains less than 1e-11 nats, so within sqrt(2e-11 / l2) of the optimum;
# from starts that differ by rounding it may end a step earlier or later.
PROBED = math.sqrt(2e-11 / 0.01)


def assert_alike(one, two, exact=EXACT):
    """Weights, teacher, losses, loss terms and gradient norms of two runs of 20 steps, in float64."""
    for kind in ("student", "teacher"):
        for name, value in one[kind].items():
            assert value.dtype == torch.float64 or not value.is_floating_point()
            torch.testing.assert_close(two[kind][name], value, atol=exact, rtol=exact, msg=f"{kind} {name}")
    logs = [[entry for entry in run["log"] if "loss" in entry] for run in (one, two)]
    assert len(logs[0]) == 20
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"loss", "grad_norm", *TERMS}:
            bound = max(LOGGED, exact) if key == "loss" else exact
            assert a[key] == pytest.approx(b[key], abs=bound, rel=bound), (a["step"], key)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (
            "carot-2024",
            {"teacher_update_every": 2, "dataloader_drop_last": False, "gradient_accumulation_steps": 2},
        ),
        pytest.param("tracer", {"teacher_update_every": 2, "same_class": "ignore"}, marks=pytest.mark.slow),
        pytest.param("flyp", {"same_class": "positive", "dataloader_drop_last": False}, marks=pytest.mark.slow),
        pytest.param("lp-ft", {"dataloader_drop_last": False}, marks=pytest.mark.slow),
        pytest.param("dive", {"l2_sp_weight": 0.01, "dataloader_drop_last": False}, marks=pytest.mark.slow),
        pytest.param("lipsum", {"context_distillation_weight": 1.0}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_with_the_whole_batch(tmp_path, preset, options):
    """45 samples in batches of 8: where the last is not dropped, its 5 are split into 3 and 2."""
    one, two = launch(tmp_path, 1, 8, preset, options), launch(tmp_path, 2, 4, preset, options)
    assert (one["held"], two["held"]) == (0, 1)  # torch may hang where DDP lets go of a gloo group last
    exact = PROBED if preset == "lp-ft" else EXACT
    assert_alike(one, two, exact)
    for key, value in one["metrics"].items():
        if "second" not in key and "runtime" not in key:
            assert two["metrics"][key] == pytest.approx(value, abs=10 * exact, nan_ok=True), key
    assert json.dumps(one["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip", "chinese_clip"])
def test_two_processes_equal_one_for_other_families(tmp_path, family):
    """SigLIP's loss compares local images with all texts; its bias is reduced as the scale is."""
    options = {"teacher_update_every": 2, "dataloader_drop_last": False, "same_class": "positive"}
    one = launch(tmp_path, 1, 8, "carot", options, family=family)
    two = launch(tmp_path, 2, 4, "carot", options, family=family)
    assert_alike(one, two)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Saved by two and resumed by one, and the other way round: both end where the unbroken run of one ends."""
    options = {"teacher_update_every": 2}
    one = launch(tmp_path, 1, 8, "carot", options)
    two = launch(tmp_path, 2, 4, "carot", options)
    fewer = launch(tmp_path, 1, 8, "carot", options, resume=str(tmp_path / "2" / "checkpoint-5"))
    more = launch(tmp_path, 2, 4, "carot", options, resume=str(tmp_path / "1" / "checkpoint-5"))
    for name, run in (("unbroken, two", two), ("two, then one", fewer), ("one, then two", more)):
        assert [entry["step"] for entry in run["log"] if "loss" in entry] == list(range(1, 21)), name
        for kind in ("student", "teacher"):
            for key, value in one[kind].items():
                torch.testing.assert_close(run[kind][key], value, atol=EXACT, rtol=EXACT, msg=f"{name}: {kind} {key}")


BALANCED = """
import os, sys
sys.path.insert(0, {tests!r})
import numpy as np
import torch
from launching import noise_trainer
from runs import Recorder
from toys import CLASSES, Noise, noise_suite
from carot_hf import ShiftSet
from carot_hf.basics.processes import place

data = Noise(29, 0)
data.labels = np.repeat(np.arange(4), [19, 7, 2, 1])
suite = noise_suite()
suite.train = ShiftSet(data, name="train", num_classes=len(CLASSES), labels=data.labels)
trainer = noise_trainer(
    {out!r}, "flyp", suite=suite, kind=Recorder, class_balanced=True, max_steps=12, save_strategy="no",
    per_device_train_batch_size={batch},
)
trainer.train()
torch.save(trainer.seen, {out!r} + "/seen-" + str(place()[0]) + ".pt")
trainer.accelerator.end_training()
os._exit(0)  # as in launching.py
"""


def balanced(folder, processes, batch):
    """The batches that each process sees of 12 steps, four epochs of 3 batches of 8."""
    folder.mkdir()
    result = in_processes(folder, BALANCED.format(tests=SUPPORT, out=str(folder), batch=batch), processes)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"seen-{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_share_the_balanced_order_of_one(tmp_path):
    """Classes of 19, 7, 2 and 1 images: six of each class an epoch, and each batch of two is the one of one process."""
    [one] = balanced(tmp_path / "one", 1, 8)
    first, second = balanced(tmp_path / "two", 2, 4)
    assert len(one) == len(first) == len(second) == 12
    for whole, left, right in zip(one, first, second, strict=True):
        assert whole["pixel_values"].shape[0] == 8
        assert left["pixel_values"].shape[0] == right["pixel_values"].shape[0] == 4
        for key in ("pixel_values", "labels"):  # the captions may be padded to another length
            assert torch.equal(torch.cat([left[key], right[key]]), whole[key]), key
    for epoch in range(4):
        steps = [*first[3 * epoch : 3 * epoch + 3], *second[3 * epoch : 3 * epoch + 3]]
        assert torch.bincount(torch.cat([batch["labels"] for batch in steps])).tolist() == [6, 6, 6, 6]


@pytest.mark.slow
def test_two_processes_calibrate_as_one(tmp_path):
    """Perturbed copies and the bank are shared out, too: every metric of every method."""
    options = {"teacher_update_every": 2, "calibration_method": "density"}
    one, two = launch(tmp_path, 1, 8, "carot", options), launch(tmp_path, 2, 4, "carot", options)
    names = [name for name in one["metrics"] if name.endswith(("_ts", "_pts", "_dts"))]
    assert len(names) == len(scaled_metrics()) * 3 * 4  # three methods, of home, far and both means
    for name in names:
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-6), name


@pytest.mark.slow
def test_two_nodes_equal_one(tmp_path):
    """As in docs/how-to/several_gpus.md, over loopback: the same weights as two processes of one machine."""
    options = {"teacher_update_every": 2}
    one, two = (launch(tmp_path, 2, 4, "carot", options, nodes=nodes) for nodes in (1, 2))
    for kind in ("student", "teacher"):
        for key, value in one[kind].items():
            torch.testing.assert_close(two[kind][key], value, atol=EXACT, rtol=EXACT, msg=f"{kind} {key}")
    assert two["metrics"]["eval_id_accuracy"] == one["metrics"]["eval_id_accuracy"]


ASKED = """
import sys
from pathlib import Path

import torch.distributed as dist
from carot_hf.basics.processes import done_by_first, place

dist.init_process_group("gloo")
rank = place()[0]
assert done_by_first(lambda: f"of {rank}") == "of 0"


def refuse():
    raise ValueError("no room")


try:
    done_by_first(refuse)
except ValueError as error:
    Path(sys.argv[1], f"{rank}.txt").write_text(str(error))
dist.destroy_process_group()
"""


def test_what_the_first_process_is_refused_all_are(tmp_path):
    """With the error in the first alone the others would wait for its answer."""
    result = in_processes(tmp_path, ASKED, 2, str(tmp_path))
    assert result.returncode == 0, result.stderr[-4000:]
    # Lines of two processes on one pipe can run into each other, so each wrote a file.
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["no room", "no room"]
