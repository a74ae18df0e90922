"""Pushing end to end to a Hub on the loopback address: byte-identical files, retries, refusals, use without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from hub_server import GOOD_TOKEN, Hub
from safetensors.numpy import load as load_tensors

PUSH = """
import sys
sys.path.insert(0, {tests!r})
from conftest import noise_suite, tiny_clip, tiny_processor
from carot_hf import CaRotTrainer, CaRotTrainingArguments

processor = tiny_processor()
args = CaRotTrainingArguments.from_preset(
    "carot", output_dir={out!r}, max_steps=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=1,
    report_to="none", disable_tqdm=True, use_cpu=True, push_to_hub={early!r}, hub_model_id="tester/tiny",
)
trainer = CaRotTrainer(model=tiny_clip(processor.tokenizer), args=args, suite=noise_suite(), processing_class=processor)
trainer.train()
print("trained", flush=True)
trainer.evaluate()
trainer.calibrate()
trainer.push_to_hub()
"""
USE = """
import json, sys
import numpy as np
from PIL import Image
from transformers import pipeline

image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8))
labels = ["zero", "one", "two", "three"]
classify = pipeline("zero-shot-image-classification", model={model!r})
scores = classify(image, candidate_labels=labels, hypothesis_template="the number {{}}")
assert "carot_hf" not in sys.modules
print(json.dumps({{row["label"]: row["score"] for row in scores}}))
"""


def run(tmp_path, code, hub, token=GOOD_TOKEN):
    (tmp_path / "script.py").write_text(code)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, str(tmp_path / "script.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def push(tmp_path, hub, early=True, **options):
    code = PUSH.format(tests=str(ROOT / "tests"), out=str(tmp_path / "out"), early=early)
    return run(tmp_path, code, hub, **options)


def test_a_push_arrives_whole_and_works_without_us(tmp_path):
    """Two uploads of large files are refused at first; huggingface_hub tries again and nothing is missing."""
    with Hub(failures=2) as hub:
        result = push(tmp_path, hub)
        assert result.returncode == 0, result.stderr[-3000:]
        assert hub.failed == 2
        assert len(hub.commits) == 1, hub.commits  # nothing is published while it trains
        assert len(hub.validated[0]["model-index"][0]["results"]) == 2, hub.validated  # one for each test set
        files = hub.repos["tester/tiny"]
        out = tmp_path / "out"
        own = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert files.keys() - {".gitattributes"} == {name for name in own if not name.startswith("checkpoint-")}
        for name, content in files.items():
            assert content == (out / name).read_bytes(), name
        assert {"README.md", "model.safetensors", "config.json", "eval_reliability.png"} <= files.keys()
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl")) or "teacher" in name]
        assert GOOD_TOKEN.encode() not in b"".join(files.values())
        temperature = json.loads(files["config.json"])["calibration"]["temperature"]
        scale = load_tensors(files["model.safetensors"])["logit_scale"]
        assert f"T = {temperature:.4f}" in files["README.md"].decode()
        remote = run(tmp_path, USE.format(model="tester/tiny"), hub)
        local = run(tmp_path, USE.format(model=str(out)), hub)
    assert remote.returncode == local.returncode == 0, remote.stderr[-3000:] + local.stderr[-2000:]
    assert json.loads(remote.stdout) == pytest.approx(json.loads(local.stdout), abs=1e-7)
    assert scale.dtype == "float32"


def test_a_refused_token_is_an_error_before_the_training(tmp_path):
    with Hub() as hub:
        result = push(tmp_path, hub, token="hf_bad")
    assert result.returncode == 1
    assert "Expected to create or open 'tester/tiny' on the Hub, got: " in result.stderr
    assert "hf auth login" in result.stderr
    assert "trained" not in result.stdout
    assert "hf_bad" not in result.stdout + result.stderr


@pytest.mark.slow
def test_an_upload_that_fails_for_good_loses_nothing(tmp_path):
    with Hub(failures=100) as hub:
        result = push(tmp_path, hub, early=False)
    assert result.returncode == 1
    assert "RuntimeError: Expected to push to 'tester/tiny', got: " in result.stderr
    assert (tmp_path / "out" / "README.md").is_file()
    assert "calibration" in json.loads((tmp_path / "out" / "config.json").read_text())
