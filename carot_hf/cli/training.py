"""The job of ``carot_hf train``: fine-tune, judge under shift, calibrate, save."""

from __future__ import annotations

import json
import platform
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..basics.escape import printable
from ..basics.redaction import public
from ..basics.whole_file import write_whole
from ..calibration.record import unbake_temperature
from ..data.suite import ShiftSuite
from ..data.survey import say_warnings, survey
from ..evaluation.evaluation import COLUMNS, Reported, comparison_table
from ..evaluation.oracle import oracle_metrics
from ..evaluation.per_image_file import write_per_image
from ..hub.card import command_line
from ..run.checkpoint import checkpoint_folders
from ..run.header import FINISHED
from ..run.lock import locked
from ..trainer import CaRotTrainer
from .data_options import LOCAL_NAME, OF_THE_SUITE, start_model_of
from .models import model_of, processor_of
from .train_options import ScriptArguments, options_of, parse


def main(argv: list[str]) -> dict[str, Any]:
    """Run the job, alone in its folder; return what metrics.json holds."""
    early = options_of(argv)[3]
    with locked(early.output_dir) if early.process_index == 0 else nullcontext():
        return work(argv)


def work(argv: list[str]) -> dict[str, Any]:
    """Train, evaluate, calibrate, save, and push if that is wanted."""
    script, args, suite = parse(argv)
    output_dir = Path(args.output_dir)
    start_model = script.model_name_or_path or start_model_of(script.suite)
    model, processor = model_of(start_model), processor_of(start_model)
    if script.zero_shot and getattr(model.config, "calibration", None) is not None:
        print("The start model is calibrated: its temperature is taken out and fitted anew.")
        unbake_temperature(model)
    trainer = CaRotTrainer(model=model, args=args, suite=suite, processing_class=processor)
    if args.overwrite_output_dir and args.resume_from_checkpoint is None and trainer.is_world_process_zero():
        for folder in checkpoint_folders(output_dir):  # a later call would go on from them; all else is in order by now
            print(f"Deleting {printable(folder)}, of an earlier run", flush=True)
            shutil.rmtree(folder)
    if script.zero_shot and trainer.is_world_process_zero():
        print(survey(suite).table(), end="\n\n", flush=True)
        say_warnings(suite)
    start = time.perf_counter()
    if not script.zero_shot:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # whatever may come of the rest; nothing uncalibrated is pushed
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    measured = trainer.latest
    metrics |= oracle_metrics(trainer.evaluator, suite, measured.marks) if script.oracle else {}
    calibration = trainer.calibrate()
    method = "zero-shot" if script.zero_shot else script.preset
    if trainer.is_world_process_zero():
        print(f"\n{method} on {printable(script.suite)}, temperature {calibration['temperature']:.3f}\n")
        print(table(suite, metrics, measured), flush=True)
    if not args.push_to_hub:  # pushing saves
        trainer.save_model()
    report = report_of(argv, script, suite, trainer, start_model, metrics, calibration, seconds)
    if trainer.is_world_process_zero():
        write_per_image(output_dir, trainer.latest_rows, calibration["method"])
        write_whole(output_dir / "metrics.json", json.dumps(report, indent=2) + "\n")
        here = {"suite": script.suite, "start_model": script.model_name_or_path}
        write_whole(output_dir / LOCAL_NAME, json.dumps(here, indent=2) + "\n")
        written = [
            *FINISHED,
            "config.json",
            "calibrator.*",
            "eval_reliability.png",
            "learning_curves.png",
            "checkpoint-*",
        ]
        found = [path.name for name in written for path in sorted(output_dir.glob(name))]
        print(f"\nSaved to {printable(output_dir)}: {printable(', '.join(dict.fromkeys(found)))}")
    if args.push_to_hub:
        trainer.push_to_hub(finetuned_from=None if Path(start_model).exists() else start_model)
    trainer.accelerator.end_training()
    return report


def report_of(
    argv: list[str],
    script: ScriptArguments,
    suite: ShiftSuite,
    trainer: CaRotTrainer,
    start_model: str,
    metrics: dict[str, float],
    calibration: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return what metrics.json holds: it is published with the model, so no token and no place of this machine."""
    first = 0 if trainer.resumption.saved is None else trainer.resumption.saved.step
    report: dict[str, Any] = {
        "command": command_line(["carot_hf", "train", *argv]),
        "suite": public(script.suite),
        "suite_version": suite.version,
        "suite_sha256": suite.content_hash,
        "names": public(suite.sources),
        "method": "zero-shot" if script.zero_shot else script.preset,
        "start_model": public(script.model_name_or_path) or f"{OF_THE_SUITE} ({Path(start_model).name})",
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "training": {"seconds": seconds, "steps": trainer.state.global_step - first},  # of this call
        "versions": {
            "carot_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "calibration": calibration,
        "metrics": metrics,
        "intervals": trainer.latest.intervals,
        "marks": trainer.latest.marks,
        "bins": {name: bins.to_dict() for name, bins in trainer.bins.items()},
        "bins_ts": {name: bins.to_dict() for name, bins in trainer.bins_ts.items()},
        "bins_pts": {name: bins.to_dict() for name, bins in trainer.bins_pts.items()},
        "bins_dts": {name: bins.to_dict() for name, bins in trainer.bins_dts.items()},
    }
    found: dict[str, Any] = json.loads(json.dumps(report), parse_constant=lambda _: None)  # nan is no JSON
    return found


def table(suite: ShiftSuite, metrics: dict[str, float], measured: Reported) -> str:
    """One row a set: accuracy, ECE, and ECE after each calibration that was asked for, with 95 % intervals."""
    home: str = suite.test.name
    titles = {home: home if home == "home" else f"{home} (home)"}
    titles |= {name: f"{name} ({measured.marks[name]})" if name in measured.marks else name for name in suite.shifts}
    rows = {title: _of_set(metrics, name) for name, title in titles.items()}
    if suite.shifts:
        rows["mean of shifts"] = _of_set(metrics, "ood")
    intervals = {title: measured.intervals.get(name, {}) for name, title in titles.items()}
    return comparison_table(rows, COLUMNS, intervals)


def _of_set(metrics: dict[str, float], name: str) -> dict[str, float]:
    prefix = f"eval_{name}_"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
