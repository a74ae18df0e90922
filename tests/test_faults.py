"""Processes that are really killed, stopped or out of disk: the run ends, says why, and goes on to the same weights."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ROOT, Noise, noise_suite, tiny_clip, tiny_processor
from ports import reserved_port
from torch.utils.data import get_worker_info

import carot_hf.trainer
from carot_hf import CaRotTrainer, CaRotTrainingArguments
from carot_hf.checkpoints import newest_complete_checkpoint
from carot_hf.distributed import lost_process

SAVES = {  # moments of a checkpoint's saving, in their order: the function that starts then
    "teacher": (carot_hf.trainer, "save_teacher_file"),
    "model": (transformers.Trainer, "_save"),
    "optimizer": (transformers.Trainer, "_save_optimizer_and_scheduler"),
    "random state": (transformers.Trainer, "_save_rng_state"),
    "facts of the run": (carot_hf.trainer, "write_run"),
    "manifest": (carot_hf.trainer, "write_manifest"),
    "rename": (os, "replace"),
    "rotation": (carot_hf.trainer, "rotate_checkpoints"),
}


class Deadly(Noise):
    def __getitem__(self, index):
        if index == 30 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Faulty(CaRotTrainer):
    """Sends a signal to its own process in the fifth step."""

    fault = None
    rank = None

    def training_step(self, *args, **kwargs):
        print("step", self.state.global_step, flush=True)
        mine = self.rank in (None, os.environ.get("RANK"))
        if self.state.global_step == 4 and mine and self.fault is not None:
            os.kill(os.getpid(), self.fault)
        return super().training_step(*args, **kwargs)


def train(out, resume=None, data=Noise, trainer=CaRotTrainer, **options):
    """Train eight steps, saving every second one."""
    processor = tiny_processor()
    settings = {
        "output_dir": str(out),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "warmup_steps": 0,
        "learning_rate": 3e-3,
        "save_steps": 2,
        "teacher_update_every": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = CaRotTrainingArguments.from_preset("carot", **{**settings, **options})
    model = tiny_clip(processor.tokenizer)
    trainer(model=model, args=args, suite=noise_suite(data), processing_class=processor).train(
        resume_from_checkpoint=resume
    )


def at_second_call(moment, harm):
    """Do harm when the second checkpoint's saving comes to a moment."""
    owner, name = SAVES[moment]
    original, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        if moment != "rename" or pathlib.Path(args[1]).name == "manifest.json":  # other files are renamed, too
            calls.append(name)
            if len(calls) == 2:
                harm()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def kill_at(moment, out):
    at_second_call(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(out, save_total_limit=1)


def fill_disk_at(moment, out):
    at_second_call(moment, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    train(out)


def command(call):
    """A Python process that calls a function of this file."""
    code = f"import signal, sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from test_faults import *; {call}"
    return [sys.executable, "-c", code]


def finish(call):
    """Run such a process to its end: exit status and what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command(call), capture_output=True, text=True, timeout=100, env=environment)
    return result.returncode, result.stderr


def assert_same_end(run, unbroken):
    for name in ("model.safetensors", "teacher.safetensors"):
        assert (run / "checkpoint-8" / name).read_bytes() == (unbroken / "checkpoint-8" / name).read_bytes(), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("moment", SAVES)
def test_killed_while_saving(tmp_path, unbroken, moment):
    """Even where only one checkpoint is kept, there is a complete one; resumed, the run ends at the same bytes."""
    out = tmp_path / "run"
    status, log = finish(f"kill_at({moment!r}, {str(out)!r})")
    assert status == -signal.SIGKILL, log
    assert (out / "checkpoint-4").exists()
    complete = 4 if moment == "rotation" else 2  # after the manifest the new one counts, before it the old one
    assert newest_complete_checkpoint(out) == str(out / f"checkpoint-{complete}")
    train(out, resume=True)
    assert_same_end(out, unbroken)


@pytest.mark.slow
def test_killed_in_a_step(tmp_path, unbroken):
    out = tmp_path / "run"
    call = f"Faulty.fault = signal.SIGKILL; train({str(out)!r}, trainer=Faulty, save_steps=3)"
    status, log = finish(call)
    assert status == -signal.SIGKILL, log
    train(out, resume=True)
    assert_same_end(out, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["teacher", "model", "optimizer", "manifest"])
def test_a_full_disk_says_so_and_leaves_the_last_checkpoint(tmp_path, unbroken, moment):
    out = tmp_path / "run"
    status, log = finish(f"fill_disk_at({moment!r}, {str(out)!r})")
    assert status == 1, log
    last = log.strip().splitlines()[-1]
    assert last.startswith(f"OSError: Expected to save {out / 'checkpoint-4'}, got "), last
    assert last.endswith(f"The last checkpoint is {out / 'checkpoint-2'}. Make room, then resume."), last
    train(out, resume=True)
    assert_same_end(out, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
def test_a_killed_worker_of_the_loader_ends_the_run(tmp_path, persistent):
    out = tmp_path / "run"
    workers = f"dataloader_num_workers=2, dataloader_persistent_workers={persistent}"
    status, log = finish(f"train({str(out)!r}, data=Deadly, max_steps=12, {workers})")
    assert status == 1
    last = log.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: Expected the workers of the data loader to live")
    assert "Lower `dataloader_num_workers`" in last
    assert "checkpoint" in last


@pytest.fixture
def port():
    with reserved_port() as found:
        yield str(found)


def start_ranks(tmp_path, call, port):
    place = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in "01":
        with (tmp_path / f"{rank}.log").open("w") as log:
            own = {**place, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command(call), env=own, stdout=log, stderr=log))
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_lost_ends_the_other(tmp_path, fault, port):
    """One that is killed breaks the connection; one that hangs is given up after ``ddp_timeout``."""
    out = tmp_path / "run"
    options = "trainer=Faulty, save_steps=3, ddp_backend='gloo', ddp_timeout=15"
    ranks = start_ranks(
        tmp_path, f"Faulty.fault, Faulty.rank = signal.{fault}, '1'; train({str(out)!r}, {options})", port
    )
    try:
        ranks[0].wait(timeout=300)  # the start takes a part of it, on a busy machine a large one
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    errors = (tmp_path / "0.log").read_text()
    assert ranks[0].returncode not in (0, None)
    assert "Expected all processes to answer, but one was lost or is late by more than `ddp_timeout`" in errors
    assert f"The last checkpoint is {out / 'checkpoint-3'}." in errors


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_ends_all(tmp_path):
    out = tmp_path / "run"
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom test_faults import *\n"
        f"train({str(out)!r}, trainer=Faulty, max_steps=10_000, save_steps=5_000, ddp_backend='gloo')\n"
    )
    log = tmp_path / "log.txt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    with log.open("w") as file:
        process = subprocess.Popen(torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    try:
        while "step 3" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.terminate()
        assert process.wait() != 0
    finally:
        process.kill()
    saved = newest_complete_checkpoint(out)
    state = json.loads((pathlib.Path(saved) / "trainer_state.json").read_text())
    assert 3 < state["global_step"] < 5_000
    assert f"Stopped by SIGTERM after step {state['global_step']}, which is saved." in log.read_text()


def test_other_errors_are_left_alone():
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
