"""A run that pushes to a Hub on the loopback address, and a process that uses what arrived."""

from __future__ import annotations

import os
import subprocess
import sys

from hub_server import GOOD_TOKEN
from toys import ROOT, SUPPORT

PUSH = """
import json, os, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
sys.path.insert(0, {tests!r})
from launching import noise_trainer

trainer = noise_trainer(
    {out!r}, max_steps=2, save_strategy="steps", save_steps=1, push_to_hub={early!r}, hub_model_id="tester/tiny"
)
trainer.train()
print("trained", flush=True)
trainer.evaluate()
texts = ["the number " + name for name in ("zero", "one", "two", "three")]
pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
inputs = trainer.processing_class(text=texts, images=Image.fromarray(pixels), padding=True, return_tensors="pt")
if trainer.is_world_process_zero():
    with torch.no_grad():  # by the model before any temperature is in it
        logits = trainer.model.eval()(**inputs).logits_per_image[0]
        Path({out!r}, "../logits.json").write_text(json.dumps(logits.tolist()))
trainer.calibrate()
trainer.push_to_hub()
trainer.accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # a thread of gloo that asks for the interpreter's lock while it ends aborts the process
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


def run(tmp_path, code, hub, token=GOOD_TOKEN, processes=1):
    (tmp_path / "script.py").write_text(code)
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return start(tmp_path, [*launch, str(tmp_path / "script.py")], hub, token)


def start(tmp_path, command, hub, token=GOOD_TOKEN):
    """Run Python with huggingface_hub turned to the loopback Hub, and with the packages of this copy."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)


def push(tmp_path, hub, early=True, **options):
    code = PUSH.format(tests=SUPPORT, out=str(tmp_path / "out"), early=early)
    return run(tmp_path, code, hub, **options)
