"""Fine-tune CLIP, judge it under shift, calibrate it and save it.

    accelerate launch examples/finetune_imagenet.py --suite digits --preset carot --output_dir out/carot

takes about a minute on two cores without a GPU and prints one row a set: accuracy, ECE, and ECE after the temperature
that was fitted on the validation split. Any flag of TrainingArguments works. What is given on the command line goes
before what the suite recommends, which goes before the preset. An interrupted run goes on, to the same weights bit for
bit, with the same command and --resume_from_checkpoint.

In the output folder (default: out/<preset>, out/zero_shot): the calibrated model and its processor (load them with
AutoModel.from_pretrained, or in the stock pipeline "zero-shot-image-classification"), metrics.json,
eval_reliability.png, local.json (places on this machine; never published), and checkpoint-<step> folders.
"""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from common import LOCAL_NAME, OF_THE_SUITE, SUITES, oracle_metrics, run, start_model_of, suite_options
from transformers import AutoModel, AutoProcessor, HfArgumentParser

import carot_hf
from carot_hf import CaRotTrainer, CaRotTrainingArguments, ShiftSuite, load_suite, unbake_temperature
from carot_hf.basics.escape import printable
from carot_hf.basics.redaction import public
from carot_hf.basics.whole_file import write_whole
from carot_hf.data.survey import say_warnings, survey
from carot_hf.evaluation.evaluation import COLUMNS, Reported, comparison_table
from carot_hf.evaluation.per_image_file import write_per_image
from carot_hf.hub.card import command_line
from carot_hf.presets import PRESETS, preset_arguments
from carot_hf.run.checkpoint import checkpoint_folders, is_complete
from carot_hf.run.header import FINISHED, refuse_finished
from carot_hf.run.lock import locked


@dataclass
class ScriptArguments:
    """What is trained on what."""

    suite: str = field(
        default="imagenet",
        metadata={"help": f"Data: {SUITES}."},
    )
    data_root: str | None = field(
        default=None, metadata={"help": "Folder of local copies of ImageNet and its shifts, in place of the Hub."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data as streams: nothing is downloaded in advance."}
    )
    shifts: list[str] | None = field(
        default=None,
        metadata={"help": "Shifted sets of imagenet: v2 r a sketch objectnet c-fog-3 ... Default: the first five."},
    )
    partial: bool = field(default=False, metadata={"help": "Take copies of ImageNet that are only a part of it."})
    preset: str = field(
        default="carot",
        metadata={
            "help": "Method: " + " ".join(f"[{name}] {preset.source}" for name, preset in PRESETS.items()),
            "choices": sorted(PRESETS),
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to start from: CLIP or a relative (docs/backbones.md). Default: the suite's own."
        },
    )
    oracle: bool = field(
        default=False,
        metadata={"help": "Measure the temperature that is best for the shifts by their labels, too: to compare with."},
    )
    zero_shot: bool = field(default=False, metadata={"help": "Do not train: evaluate and calibrate the start model."})


def options_of(argv: list[str]) -> tuple[HfArgumentParser, ScriptArguments, CaRotTrainingArguments]:
    """Read the command line without the suite; a bad option fails here, before anything is loaded."""
    script_parser = HfArgumentParser(ScriptArguments, add_help=False, allow_abbrev=False)
    script: ScriptArguments = script_parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)[0]
    parser = HfArgumentParser(
        (ScriptArguments, CaRotTrainingArguments), allow_abbrev=False, description=__doc__.split("\n")[0]
    )
    parser.set_defaults(output_dir=str(Path("out", "zero_shot" if script.zero_shot else script.preset)))
    parser.set_defaults(**preset_arguments(script.preset))
    early: CaRotTrainingArguments = parser.parse_args_into_dataclasses(argv)[1]
    return parser, script, early


def parse(argv: list[str]) -> tuple[ScriptArguments, CaRotTrainingArguments, ShiftSuite]:
    """Read the command line; the order of precedence is command line, suite, preset."""
    parser, script, early = options_of(argv)
    if early.resume_from_checkpoint is None and not early.overwrite_output_dir:
        refuse_finished(early.output_dir)
        refuse_checkpoints(early.output_dir)
    suite = load_suite(script.suite, **suite_options(script))
    parser.set_defaults(**suite.recommended)
    _, args = parser.parse_args_into_dataclasses(argv)
    return script, args, suite


def refuse_checkpoints(output_dir: str) -> None:
    """Raise a ValueError if there are checkpoints of an earlier run in a folder."""
    if any(is_complete(folder) for folder in checkpoint_folders(output_dir)):
        raise ValueError(
            f"Expected an `output_dir` without checkpoints, got {output_dir}. Add --resume_from_checkpoint to go on "
            "from them, --overwrite_output_dir to delete them, or choose another folder."
        )


def main(argv: list[str]) -> dict[str, Any]:
    """Run the job, alone in its folder; return what metrics.json holds."""
    early = options_of(argv)[2]
    with locked(early.output_dir) if early.process_index == 0 else nullcontext():
        return work(argv)


def work(argv: list[str]) -> dict[str, Any]:
    """Train, evaluate, calibrate, save, and push if that is wanted."""
    script, args, suite = parse(argv)
    output_dir = Path(args.output_dir)
    start_model = script.model_name_or_path or start_model_of(script.suite)
    processor = AutoProcessor.from_pretrained(start_model)  # nosec B615  # the user's choice; no code in it is run
    model = AutoModel.from_pretrained(start_model, dtype=torch.float32)  # nosec B615  # as above; safetensors
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
    if not script.zero_shot:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # whatever may come of the rest; nothing uncalibrated is pushed
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
    report = report_of(argv, script, suite, trainer, start_model, metrics, calibration)
    if trainer.is_world_process_zero():
        write_per_image(output_dir, trainer.latest_rows, calibration["method"])
        write_whole(output_dir / "metrics.json", json.dumps(report, indent=2) + "\n")
        here = {"suite": script.suite, "start_model": script.model_name_or_path}
        write_whole(output_dir / LOCAL_NAME, json.dumps(here, indent=2) + "\n")
        written = [*FINISHED, "config.json", "calibrator.*", "eval_reliability.png", "checkpoint-*"]
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
) -> dict[str, Any]:
    """Return what metrics.json holds: it is published with the model, so no token and no place of this machine."""
    report: dict[str, Any] = {
        "command": command_line(["finetune_imagenet.py", *argv]),
        "suite": public(script.suite),
        "suite_version": suite.version,
        "suite_sha256": suite.content_hash,
        "names": public(suite.sources),
        "method": "zero-shot" if script.zero_shot else script.preset,
        "start_model": public(script.model_name_or_path) or f"{OF_THE_SUITE} ({Path(start_model).name})",
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "versions": {
            "carot_hf": carot_hf.__version__,
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
    titles = {suite.test.name: f"{suite.test.name} (in distribution)"}
    titles |= {name: f"{name} ({measured.marks[name]})" if name in measured.marks else name for name in suite.shifts}
    rows = {title: _of_set(metrics, name) for name, title in titles.items()}
    if suite.shifts:
        rows["mean of shifts"] = _of_set(metrics, "ood")
    intervals = {title: measured.intervals.get(name, {}) for name, title in titles.items()}
    return comparison_table(rows, COLUMNS, intervals)


def _of_set(metrics: dict[str, float], name: str) -> dict[str, float]:
    prefix = f"eval_{name}_"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


if __name__ == "__main__":
    run(main)
