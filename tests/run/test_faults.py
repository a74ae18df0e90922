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
from contextlib import contextmanager

import pytest
import torch
import transformers
from launching import TORCHRUN, finished, noise_trainer
from ports import reserved_port
from safetensors.torch import load_file
from torch.utils.data import get_worker_info
from toys import ROOT, SUPPORT, Noise, noise_suite

import carot_hf.run.parts
import carot_hf.run.trainer
from carot_hf import CaRotTrainer
from carot_hf.basics.processes import lost_process
from carot_hf.run.checkpoint import newest_complete_checkpoint
from carot_hf.run.lock import locked

SAVES = {  # moments of a checkpoint's saving, in their order: the function that starts then
    "teacher": (carot_hf.run.parts, "save_teacher_file"),
    "model": (transformers.Trainer, "_save"),
    "optimizer": (transformers.Trainer, "_save_optimizer_and_scheduler"),
    "random state": (transformers.Trainer, "_save_rng_state"),
    "facts of the run": (carot_hf.run.trainer, "write_run"),
    "manifest": (carot_hf.run.trainer, "write_manifest"),
    "rename": (os, "replace"),
    "rotation": (carot_hf.run.trainer, "rotate_checkpoints"),
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
    settings = {"max_steps": 8, "warmup_steps": 0, "learning_rate": 3e-3, "save_steps": 2, "teacher_update_every": 1}
    made = noise_trainer(out, suite=noise_suite(data), kind=trainer, **{**settings, **options})
    made.train(resume_from_checkpoint=resume)


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
    code = (
        f"import signal, sys; sys.path[:0] = {[SUPPORT, str(ROOT / 'tests' / 'run'), str(ROOT / 'examples')]}; "
        f"from test_faults import *; {call}"
    )
    return [sys.executable, "-c", code]


def finish(call):
    """Run such a process to its end: exit status and what it said."""
    result = finished(command(call))
    return result.returncode, result.stderr


def refused_by_the_script(*options):
    """What the script says last, which ends with status 2."""
    script = [sys.executable, str(ROOT / "examples" / "finetune_imagenet.py"), "--suite", "digits", "--use_cpu"]
    result = finished([*script, *options])
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


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


@contextmanager
def started_ranks(tmp_path, call, port):
    """Two processes that call a function of this file; they live no longer than the block."""
    place = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in "01":
        with (tmp_path / f"{rank}.log").open("w") as log:
            own = {**place, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command(call), env=own, stdout=log, stderr=log))
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_lost_ends_the_other(tmp_path, fault, port):
    """One that is killed breaks the connection; one that hangs is given up after ``ddp_timeout``."""
    out = tmp_path / "run"
    options = "trainer=Faulty, save_steps=3, ddp_timeout=15"
    call = f"Faulty.fault, Faulty.rank = signal.{fault}, '1'; train({str(out)!r}, {options})"
    with started_ranks(tmp_path, call, port) as ranks:
        ranks[0].wait(timeout=300)  # the start takes a part of it, on a busy machine a large one
    errors = (tmp_path / "0.log").read_text()
    assert ranks[0].returncode not in (0, None)
    assert "Expected all processes to answer, but one was lost or is late by more than `ddp_timeout`" in errors
    assert f"The last checkpoint is {out / 'checkpoint-3'}." in errors


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_ends_all(tmp_path):
    out = tmp_path / "run"
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[SUPPORT, str(ROOT / 'tests' / 'run')]}\nfrom test_faults import *\n"
        f"train({str(out)!r}, trainer=Faulty, max_steps=10_000, save_steps=5_000)\n"
    )
    log = tmp_path / "log.txt"
    torchrun = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(script)]
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


# ---- the folder of a run ----


def slow_train(out):
    """A run that lives until it is killed, and says when it has begun."""
    train(out, trainer=Faulty, max_steps=100_000, save_steps=50_000)


def end_with_full_disk(out, moment):
    """The whole script on a disk that is full from a moment on: weights are saved once, the rest comes after it."""
    import carot_hf.cli.training
    import carot_hf.evaluation.diagrams
    from carot_hf.cli.main import script

    places = {
        "picture": (carot_hf.evaluation.diagrams, "write_diagrams"),
        "second save": (carot_hf.CaRotTrainer, "calibrate"),
        "metrics": (carot_hf.cli.training, "write_whole"),
    }
    owner, name = places[moment]
    original = getattr(owner, name)

    def patched(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return original(*args, **kwargs)

    setattr(owner, name, patched)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    options = ["--suite", "digits", "--use_cpu", "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"]
    sys.argv = ["finetune_imagenet.py", *options, "--report_to", "none", "--output_dir", out]
    script("train")


@pytest.mark.slow
def test_rotation_goes_by_step_not_by_time(tmp_path):
    """An older checkpoint dated an hour ahead, an unfinished one of the same second, one that is to be kept."""
    out = tmp_path / "run"
    train(out, max_steps=4)
    ahead = time.time() + 3600
    for path in [out / "checkpoint-2", *(out / "checkpoint-2").iterdir()]:
        os.utime(path, (ahead, ahead))
    (out / "checkpoint-5").mkdir()
    (out / "checkpoint-5" / "model.safetensors").write_bytes(b"half of it")
    os.utime(out / "checkpoint-5", (ahead, ahead))
    status, log = finish(f"train({str(out)!r}, resume=True, save_total_limit=1)")
    assert status == 0, log
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-8"]
    assert newest_complete_checkpoint(out) == str(out / "checkpoint-8")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["picture", "second save", "metrics"])
def test_a_full_disk_at_the_end_loses_no_training(tmp_path, moment):
    """Without any checkpoint: what was trained is there, and each failure is one sentence."""
    out = tmp_path / "run"
    status, log = finish(f"end_with_full_disk({str(out)!r}, {moment!r})")
    assert status == 2, log
    weights = load_file(out / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not (out / "metrics.json").exists()
    assert not list(out.glob(".*partial*"))
    last = log.strip().splitlines()[-1]
    assert last.startswith("finetune_imagenet.py: Expected to write "), log
    assert "What was there before is as it was: make room" in last
    assert ("could not be written to" in log) == (moment == "picture")
    assert "Traceback" not in log


@pytest.mark.slow
def test_of_two_runs_in_a_folder_the_second_is_refused_until_the_first_is_gone(tmp_path, unbroken):
    """Refused by name while the first one lives; a killed one is taken over at once."""
    out = tmp_path / "run"
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        first = subprocess.Popen(command(f"slow_train({str(out)!r})"), stdout=file, stderr=file)
    try:
        while "step 1" not in log.read_text():
            assert first.poll() is None, log.read_text()
            time.sleep(0.1)
        before = sorted(out.rglob("*"))
        last = refused_by_the_script("--output_dir", str(out))
        assert f"of this run alone, got {out}, in which process {first.pid} on host" in last
        status, said = finish(f"train({str(out)!r}, overwrite_output_dir=True)")
        assert status == 1
        assert f"process {first.pid} on host" in said.strip().splitlines()[-1]
        assert sorted(out.rglob("*")) == before
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    status, said = finish(f"train({str(out)!r})")
    assert status == 0, said
    assert f"Taking over {out} from process {first.pid} on host" in said
    assert not (out / ".run.lock").exists()
    assert_same_end(out, unbroken)


@pytest.mark.slow
def test_of_two_ranks_both_are_told_that_a_folder_is_taken(tmp_path, port):
    out = tmp_path / "run"
    call = f"train({str(out)!r}, ddp_timeout=60)"
    with locked(out), started_ranks(tmp_path, call, port) as ranks:
        statuses = [process.wait(timeout=600) for process in ranks]
    assert statuses == [1, 1]
    for rank in "01":
        last = (tmp_path / f"{rank}.log").read_text().strip().splitlines()[-1]
        assert f"of this run alone, got {out}, in which process {os.getpid()} on host" in last


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
def test_an_output_dir_that_cannot_be_used_is_said_before_anything_is_loaded(tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    place = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "read-only": "/proc/self/run"}[kind]
    nowhere = str(tmp_path / "no-model")  # which nobody looks for
    last = refused_by_the_script("--model_name_or_path", nowhere, "--output_dir", str(place))
    assert last.startswith("finetune_imagenet.py: Expected a")
    assert "`output_dir`" in last
    assert (tmp_path / "file").read_text() == "mine"
