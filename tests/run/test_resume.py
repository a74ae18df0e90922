"""An interrupted run that goes on equals the unbroken one, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import assert_equal_runs, run
from safetensors.torch import load_file
from toys import ROOT, tiny_clip
from transformers import TrainerCallback

from carot_hf.basics.manifest import write_manifest
from carot_hf.run.checkpoint import check_checkpoint, checkpoint_folders, newest_complete_checkpoint, rotate_checkpoints


@pytest.mark.parametrize(
    ("step", "workers"),
    [(2, 0), (3, 0), (6, 0), (3, 2), *(pytest.param(*row, marks=pytest.mark.slow) for row in [(1, 0), (5, 0), (2, 2)])],
)
def test_resumed_equals_unbroken(make_trainer, tmp_path, step, workers):
    """Within an epoch (1, 2, 5), at its end (3, 6), on a teacher's step (2, 6) and between two of them (1, 3, 5)."""
    options = {"dataloader_num_workers": workers, "eval_strategy": "steps", "eval_steps": 2}
    whole = run(make_trainer, tmp_path / "whole", **options)
    assert len(whole.seen) == 16
    resumed = run(make_trainer, tmp_path / "again", resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **options)
    assert_equal_runs(whole, resumed)
    assert resumed._companions.moves.momentum == whole._companions.moves.momentum
    one, two = whole.evaluate(), resumed.evaluate()
    assert one["eval_ood_nll"] == two["eval_ood_nll"]


def test_each_epoch_has_an_order_crops_and_captions_of_its_own(make_trainer, tmp_path):
    whole = run(make_trainer, tmp_path / "whole", save_strategy="no")
    first, second = whole.seen[:6], whole.seen[6:12]
    labels = [torch.cat([batch["labels"] for batch in epoch]) for epoch in (first, second)]
    assert not torch.equal(*labels)
    rows = [
        {image.numpy().tobytes() for batch in epoch for image in batch["pixel_values"]} for epoch in (first, second)
    ]
    assert len(rows[0]) == len(rows[1]) == 24  # no sample twice
    assert len(rows[0] & rows[1]) < 8  # the images are small: now and then a crop comes again


def test_momentum_is_logged_after_a_resume_before_the_next_update(make_trainer, tmp_path):
    """Resumed at step 4, between the updates of steps 3 and 6: step 5 logs the momentum of step 3."""
    whole = run(make_trainer, tmp_path / "whole", teacher_update_every=3)
    resumed = run(
        make_trainer, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-4"), teacher_update_every=3
    )
    one, two = (
        {e["step"]: e["teacher_momentum"] for e in t.state.log_history if "teacher_momentum" in e and e["step"] > 4}
        for t in (whole, resumed)
    )
    assert one == two
    assert set(one) == {5, 6, 7, 8}


def test_checkpoint_holds_teacher_and_student_apart(make_trainer, tmp_path):
    run(make_trainer, tmp_path / "run", max_steps=3)
    folder = tmp_path / "run" / "checkpoint-3"
    teacher, student = load_file(folder / "teacher.safetensors"), load_file(folder / "model.safetensors")
    assert teacher.keys() == student.keys()
    assert not torch.equal(teacher["visual_projection.weight"], student["visual_projection.weight"])
    assert all(value.dtype == torch.float32 for name, value in teacher.items() if "position_ids" not in name)


def test_missing_teacher_is_named(make_trainer, tmp_path):
    """The checkpoint of a run without a teacher, complete as such."""
    run(make_trainer, tmp_path / "run", max_steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "teacher.safetensors").unlink()
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match=r"complete checkpoint in .*checkpoint-2, but teacher\.safetensors is missing"):
        run(make_trainer, tmp_path / "run", resume=str(checkpoint))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("teacher.safetensors", Path.unlink, "teacher.safetensors is missing"),
        ("optimizer.pt", cut, r"optimizer.pt has [\d,]+ bytes in place of [\d,]+"),
        ("teacher.safetensors", flip, "teacher.safetensors has another checksum than when it was saved"),
        ("trainer_state.json", flip, "trainer_state.json has another checksum"),
        ("manifest.json", Path.unlink, "it has no manifest.json: its saving was interrupted"),
        ("manifest.json", cut, "its manifest.json cannot be read"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name_and_passed_over(make_trainer, tmp_path, caplog, name, harm, reason):
    run(make_trainer, tmp_path / "run", max_steps=3)
    newest = tmp_path / "run" / "checkpoint-3"
    check_checkpoint(newest)
    harm(newest / name)
    with pytest.raises(ValueError, match=f"Expected a complete checkpoint in .*checkpoint-3, but {reason}"):
        make_trainer(output_dir=str(tmp_path / "run")).train(resume_from_checkpoint=str(newest))
    assert newest_complete_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    assert re.search(f"Passing over .*checkpoint-3: {reason}", caplog.text)


def test_the_manifest_is_written_last_and_older_checkpoints_go_after_it(make_trainer, tmp_path, monkeypatch):
    """Stopped just before the manifest, the older checkpoint is still there, although only one is to be kept."""
    run(make_trainer, tmp_path / "run", max_steps=2, save_total_limit=1)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["checkpoint-2"]

    def stopped(checkpoint):
        assert {"model.safetensors", "teacher.safetensors", "optimizer.pt", "trainer_state.json"} <= {
            path.name for path in Path(checkpoint).iterdir()
        }
        raise KeyboardInterrupt

    monkeypatch.setattr("carot_hf.run.trainer.write_manifest", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(make_trainer, tmp_path / "run", max_steps=4, save_total_limit=1, resume=True)
    assert newest_complete_checkpoint(tmp_path / "run").endswith("checkpoint-2")


def test_the_newest_is_so_by_number_not_by_letter(make_trainer, tmp_path):
    run(make_trainer, tmp_path / "run", max_steps=2)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-10")
    assert newest_complete_checkpoint(tmp_path / "run").endswith("checkpoint-10")
    with pytest.raises(ValueError, match=r"Expected a complete checkpoint in .*empty, got none"):
        newest_complete_checkpoint(tmp_path / "empty")


class Terminator(TrainerCallback):
    """Sends SIGTERM in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_finishes_the_step_saves_and_exits_143(make_trainer, tmp_path):
    whole = run(make_trainer, tmp_path / "whole", save_strategy="no")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(make_trainer, tmp_path / "run", save_strategy="no", trainer={"callbacks": [Terminator(4)]})
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["checkpoint-5"]
    assert_equal_runs(whole, run(make_trainer, tmp_path / "run", resume=True, save_strategy="no"))


def test_resume_without_checkpoints_says_so(make_trainer):
    with pytest.raises(ValueError, match=r"got none\. Start without `resume_from_checkpoint`"):
        make_trainer().train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(tmp_path):
    """The example itself, SIGKILL at a moment of no one's choosing."""
    script = [sys.executable, str(ROOT / "examples" / "finetune_imagenet.py"), "--suite", "digits", "--use_cpu"]
    script += ["--max_steps", "12", "--save_steps", "2", "--logging_steps", "4", "--per_device_train_batch_size", "32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder, *flags):
        command = [*script, "--output_dir", str(folder), *flags]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start(tmp_path / "whole")
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output
    killed = start(tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()
    again = start(tmp_path / "killed")
    output, _ = again.communicate(timeout=600)
    assert again.returncode != 0
    assert "Add --resume_from_checkpoint to go on" in output
    again = start(tmp_path / "killed", "--resume_from_checkpoint")
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    for name in ("model.safetensors", "checkpoint-12/model.safetensors", "checkpoint-12/teacher.safetensors"):
        one, two = ((tmp_path / run / name).read_bytes() for run in ("whole", "killed"))
        assert one == two, name
    optimizers = [torch.load(tmp_path / run / "checkpoint-12" / "optimizer.pt") for run in ("whole", "killed")]
    for index, state in optimizers[0]["state"].items():
        assert all(torch.equal(value, optimizers[1]["state"][index][key]) for key, value in state.items())
    reports = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("whole", "killed")]
    metrics = [{k: v for k, v in r["metrics"].items() if "second" not in k and "runtime" not in k} for r in reports]
    assert metrics[0] == metrics[1]
    assert reports[0]["calibration"] == reports[1]["calibration"]


@pytest.mark.slow
def test_same_seed_same_run_other_seed_other_run(make_trainer, tmp_path, processor):
    one = run(make_trainer, tmp_path / "a", save_strategy="no")
    two = run(make_trainer, tmp_path / "b", save_strategy="no")
    assert_equal_runs(one, two)
    other = run(make_trainer, tmp_path / "c", save_strategy="no", seed=43, model=tiny_clip(processor.tokenizer))
    assert not torch.equal(one.seen[0]["pixel_values"], other.seen[0]["pixel_values"])


def test_data_seed_goes_before_seed(make_trainer, tmp_path):
    one = run(make_trainer, tmp_path / "a", save_strategy="no", seed=1, data_seed=5, max_steps=1)
    two = run(make_trainer, tmp_path / "b", save_strategy="no", seed=2, data_seed=5, max_steps=1)
    assert torch.equal(one.seen[0]["input_ids"], two.seen[0]["input_ids"])
    assert Path(tmp_path / "a").exists()


def test_older_checkpoints_go_by_their_step_not_by_the_time_of_their_files(make_trainer, tmp_path):
    """With an older one dated an hour ahead only that one was left."""
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    make_trainer(**{**options, "max_steps": 2}).train()
    ahead = time.time() + 3600
    for path in [tmp_path / "run/checkpoint-2", *(tmp_path / "run/checkpoint-2").iterdir()]:
        os.utime(path, (ahead, ahead))
    make_trainer(**{**options, "max_steps": 6}).train(resume_from_checkpoint=True)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["checkpoint-6"]


def complete(folder):
    folder.mkdir(parents=True)
    (folder / "weights").write_text(folder.name)
    write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    ("limit", "written", "best", "left"),
    [
        (1, 40, None, [40]),
        (2, 40, None, [30, 40]),
        (2, 40, 10, [10, 40]),
        (1, 40, 10, [10, 40]),
        (3, 40, 10, [10, 30, 40]),
        (1, 10, None, [10]),  # of a run that went on from an earlier step: what was just written stays
        (2, 10, None, [10, 40]),
        (None, 40, None, [10, 20, 30, 40]),
        (9, 40, None, [10, 20, 30, 40]),
    ],
)
def test_what_is_kept(tmp_path, limit, written, best, left):
    folders = {step: complete(tmp_path / f"checkpoint-{step}") for step in (10, 20, 30, 40)}
    unfinished = tmp_path / "checkpoint-50"
    unfinished.mkdir()
    rotate_checkpoints(tmp_path, limit, written=folders[written], best=folders.get(best))
    assert [int(folder.name.split("-")[1]) for folder in checkpoint_folders(tmp_path)] == [*left, 50]
