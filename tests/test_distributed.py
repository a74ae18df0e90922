"""Two processes with half a batch each equal one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

WORKER = """
import sys, json, os, dataclasses
sys.path.insert(0, {tests!r})
import torch
from conftest import ShiftSuite, noise_set, tiny_clip, CLASSES, TEMPLATES, CLIP
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer
from carot_hf import CaRotTrainer, CaRotTrainingArguments

images = CLIPImageProcessor(size={{"shortest_edge": 16}}, crop_size={{"height": 16, "width": 16}})
processor = CLIPProcessor(image_processor=images, tokenizer=CLIPTokenizer.from_pretrained(CLIP))
suite = ShiftSuite("noise", list(CLASSES), list(TEMPLATES), noise_set("train", 48, 0), noise_set("validation", 15, 1),
                   noise_set("home", 19, 2), {{"far": noise_set("far", 17, 3)}})
args = CaRotTrainingArguments.from_preset(
    "carot-2024", output_dir={out!r}, per_device_train_batch_size={batch}, per_device_eval_batch_size=4, max_steps=8,
    learning_rate=3e-3, warmup_steps=0, teacher_update_every=2, logging_steps=1, save_strategy="no", report_to="none",
    disable_tqdm=True, use_cpu=True, label_smoothing_factor=0.1, optim="sgd", max_grad_norm=0,
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
)
trainer = CaRotTrainer(model=tiny_clip(processor.tokenizer), args=args, suite=suite, processing_class=processor)
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    torch.save({{"student": trainer.model.state_dict(), "teacher": trainer.teacher.state_dict(),
                "log": trainer.state.log_history, "metrics": metrics}}, {out!r} + "/result.pt")
trainer.accelerator.end_training()
"""


def launch(tmp_path, processes, batch):
    out = tmp_path / str(processes)
    out.mkdir()
    script = out / "worker.py"
    script.write_text(WORKER.format(tests=str(ROOT / "tests"), out=str(out), batch=batch))
    command = [sys.executable, str(script)]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={processes}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "carot_hf/" not in result.stderr  # no warning points at our lines
    return torch.load(Path(out) / "result.pt", weights_only=False)


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    one, two = launch(tmp_path, 1, 8), launch(tmp_path, 2, 4)
    for kind in ("student", "teacher"):
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, atol=1e-5, rtol=1e-5, msg=f"{kind} {name}")
    logs = [[entry for entry in run["log"] if "loss" in entry] for run in (one, two)]
    assert len(logs[0]) == 8
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "contrastive", "distillation", "orthogonality", "cross_norm", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), (a["step"], key)
    for key, value in one["metrics"].items():
        if "second" not in key and "runtime" not in key:
            assert two["metrics"][key] == pytest.approx(value, abs=1e-4, nan_ok=True), key
    assert json.dumps(one["metrics"])
