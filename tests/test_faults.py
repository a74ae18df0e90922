"""Processes that are really lost: the run ends, in time, with a message that says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from carot_hf.distributed import lost_process

WORKER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from conftest import Noise, noise_suite, tiny_clip, tiny_processor
from torch.utils.data import get_worker_info
from carot_hf import CaRotTrainer, CaRotTrainingArguments


class Deadly(Noise):
    def __getitem__(self, index):
        if index == 30 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Lost(CaRotTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)


processor = tiny_processor()
suite = noise_suite(Deadly)
args = CaRotTrainingArguments.from_preset(
    "carot", **{options!r}, output_dir={out!r}, max_steps=12, per_device_train_batch_size=4, warmup_steps=0,
    save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
)
Lost(model=tiny_clip(processor.tokenizer), args=args, suite=suite, processing_class=processor).train()
"""


def script_of(tmp_path, **options):
    script = tmp_path / "worker.py"
    text = WORKER.format(tests=str(ROOT / "tests"), out=str(tmp_path / "run"), options=options)
    script.write_text(text)
    return script


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
def test_a_killed_worker_of_the_loader_ends_the_run(tmp_path, persistent):
    script = script_of(tmp_path, dataloader_num_workers=2, dataloader_persistent_workers=persistent)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: Expected the workers of the data loader to live")
    assert "Lower `dataloader_num_workers`" in last
    assert "checkpoint" in last


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other(tmp_path):
    """The connection breaks; nobody waits for the timeout of half an hour."""
    script = script_of(tmp_path, ddp_backend="gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in (0, 1):
        with (tmp_path / f"{rank}.log").open("w") as log:
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen([sys.executable, str(script)], env=own, stderr=log, stdout=log))
    try:
        ranks[0].wait(timeout=60)  # the start takes a part of it
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    errors = (tmp_path / "0.log").read_text()
    assert ranks[0].returncode not in (0, None)
    assert "Expected all processes to answer, but one was lost or is late by more than `ddp_timeout`" in errors
    assert f"The last checkpoint is {tmp_path / 'run' / 'checkpoint-2'}." in errors


def test_other_errors_are_left_alone():
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
