"""A run of 20 steps in one or several processes, or nodes, that leaves weights, teacher, log and metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from ports import reserved_port
from toys import SUPPORT

WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from toys import Noise, noise_suite, tiny_clip, tiny_processor
from families import model_of, processor_of
from carot_hf import CaRotTrainer, CaRotTrainingArguments
from carot_hf.basics import processes

processor = processor_of({family!r}) if {family!r} else tiny_processor()
model = model_of({family!r}, processor.tokenizer) if {family!r} else tiny_clip(processor.tokenizer)
model.double()  # a proof of equality
suite = noise_suite(lambda size, seed: Noise(45, seed))
args = CaRotTrainingArguments.from_preset(
    {preset!r}, **{options!r}, output_dir={out!r}, max_steps=20,
    per_device_train_batch_size={batch}, per_device_eval_batch_size=4,
    learning_rate=3e-3, warmup_steps=0, logging_steps=1, save_strategy="steps", save_steps=5, report_to="none",
    disable_tqdm=True, use_cpu=True, label_smoothing_factor=0.1, optim="sgd", max_grad_norm=0,
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
)
trainer = CaRotTrainer(model=model, args=args, suite=suite, processing_class=processor)
if {preset!r} == "carot-2024":  # an evaluation must not keep accelerate from wrapping the model afterwards
    trainer.evaluate()
trainer.train(resume_from_checkpoint={resume!r})
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    teacher = {{}} if trainer.teacher is None else trainer.teacher.state_dict()
    torch.save({{"student": trainer.model.state_dict(), "teacher": teacher,
                "log": trainer.state.log_history, "metrics": metrics, "held": len(processes._KEPT)}},
               {out!r} + "/result.pt")
trainer.accelerator.end_training()
os._exit(0)  # a thread of gloo that asks for the interpreter's lock while it ends aborts the process
"""


def launch(tmp_path, processes, batch, preset, options, resume=None, nodes=1, family=None):
    """Run the worker; with two nodes, from two launchers that know of each other by an address only.

    ``family`` is CLIP, or a name of `families.FAMILIES`.
    """
    out = tmp_path / f"{processes}{'-resumed' if resume else ''}{'-nodes' if nodes > 1 else ''}"
    out.mkdir()
    script = out / "worker.py"
    values = {"batch": batch, "preset": preset, "options": options, "resume": resume, "family": family}
    script.write_text(WORKER.format(tests=SUPPORT, out=str(out), **values))
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    ports = ExitStack()
    if nodes > 1:
        shared = [*torchrun, f"--nnodes={nodes}", f"--nproc_per_node={processes // nodes}", "--master_addr=127.0.0.1"]
        port = f"--master_port={ports.enter_context(reserved_port())}"
        commands = [[*shared, port, f"--node_rank={rank}", str(script)] for rank in range(nodes)]
    elif processes > 1:
        commands = [[*torchrun, "--standalone", f"--nproc_per_node={processes}", str(script)]]
    else:
        commands = [[sys.executable, str(script)]]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with ports, ThreadPoolExecutor() as pool:
        run = partial(subprocess.run, capture_output=True, text=True, env=environment, timeout=600)
        results = list(pool.map(run, commands))
    for result in results:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        assert "carot_hf/" not in result.stderr  # no warning points at our lines
    return torch.load(Path(out) / "result.pt", weights_only=False)
