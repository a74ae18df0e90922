"""A run of 20 steps in one or several processes, or nodes, that leaves weights, teacher, log and metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from ports import reserved_port
from toys import SUPPORT, noise_suite, tiny_clip, tiny_processor

from carot_hf import CaRotTrainer, CaRotTrainingArguments

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from launching import noise_trainer
from toys import Noise, noise_suite, tiny_clip, tiny_processor
from families import model_of, processor_of
from carot_hf.basics import processes

processor = processor_of({family!r}) if {family!r} else tiny_processor()
model = model_of({family!r}, processor.tokenizer) if {family!r} else tiny_clip(processor.tokenizer)
model.double()  # a proof of equality
trainer = noise_trainer(
    {out!r}, {preset!r}, **{options!r}, model=model, processor=processor, max_steps=20,
    suite=noise_suite(lambda size, seed: Noise(45, seed)), per_device_train_batch_size={batch},
    per_device_eval_batch_size=4, learning_rate=3e-3, warmup_steps=0, logging_steps=1, save_strategy="steps",
    save_steps=5, label_smoothing_factor=0.1, optim="sgd", max_grad_norm=0,
)
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


def noise_trainer(
    out, preset="carot", *, model=None, processor=None, suite=None, kind=CaRotTrainer, arguments=CaRotTrainingArguments,
    **options,
):  # fmt: skip
    """A trainer of the tiny model on the suite of noise, also for scripts that run in processes of their own."""
    processor = tiny_processor() if processor is None else processor
    settings = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
    }  # fmt: skip
    args = arguments.from_preset(preset, **{**settings, **options})
    model = tiny_clip(processor.tokenizer) if model is None else model
    return kind(model=model, args=args, suite=noise_suite() if suite is None else suite, processing_class=processor)


def finished(command):
    """Run a command to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def in_processes(folder, code, processes=2, *arguments):
    """Run a script of this code in so many processes that train together, or in one of its own."""
    script = folder / "worker.py"
    script.write_text(code)
    launcher = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    return finished([*launcher, str(script), *arguments])


def launch(tmp_path, processes, batch, preset, options, resume=None, nodes=1, family=None):
    """Run the worker; with two nodes, from two launchers that know of each other by an address only.

    ``family`` is CLIP, or a name of `families.FAMILIES`.
    """
    out = tmp_path / f"{processes}{'-resumed' if resume else ''}{'-nodes' if nodes > 1 else ''}"
    out.mkdir()
    values = {"batch": batch, "preset": preset, "options": options, "resume": resume, "family": family}
    code = WORKER.format(tests=SUPPORT, out=str(out), **values)
    if nodes == 1:
        results = [in_processes(out, code, processes)]
    else:
        script = out / "worker.py"
        script.write_text(code)
        shared = [*TORCHRUN, f"--nnodes={nodes}", f"--nproc_per_node={processes // nodes}", "--master_addr=127.0.0.1"]
        with reserved_port() as port, ThreadPoolExecutor() as pool:
            own = [[f"--master_port={port}", f"--node_rank={rank}", str(script)] for rank in range(nodes)]
            results = list(pool.map(finished, [[*shared, *rest] for rest in own]))
    for result in results:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        assert "carot_hf/" not in result.stderr  # no warning points at our lines
    return torch.load(Path(out) / "result.pt", weights_only=False)
