"""The example scripts: precedence of options, errors before anything is loaded, the tables they print."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from toys import ROOT, noise_set

from carot_hf.basics.manifest import write_manifest
from carot_hf.cli import demo, train_options, training
from carot_hf.cli.main import script
from carot_hf.evaluation.evaluation import Reported


def parse(tmp_path, *flags):
    arguments = ["--suite", "digits", "--use_cpu", "--output_dir", str(tmp_path), *flags]
    return train_options.parse(arguments)[1]


def test_command_line_goes_before_suite_before_preset(tmp_path):
    args = parse(tmp_path, "--preset", "flyp-ls")
    assert (args.label_smoothing_factor, args.distillation_weight) == (0.1, 0.0)  # preset
    assert (args.learning_rate, args.per_device_train_batch_size, args.teacher_update_every) == (5e-4, 128, 4)  # suite
    assert args.weight_decay == 0.1  # default
    args = parse(tmp_path, "--preset", "flyp-ls", "--learning_rate", "1e-3", "--label_smoothing_factor", "0.05")
    assert (args.learning_rate, args.label_smoothing_factor) == (1e-3, 0.05)


def test_the_suite_recommends_about_200_steps_and_a_fiftieth_for_the_teacher(tmp_path):
    args = parse(tmp_path)
    steps = int(args.num_train_epochs) * (800 // args.per_device_train_batch_size)
    assert 190 <= steps <= 210
    assert args.teacher_update_every == round(steps / 50)
    assert args.save_steps < steps / 3  # an interrupted run has something to go on from


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "imagenet", "--data_root", "nowhere"], "Expected a folder of local copies as `root`, got nowhere"),
        (["--suite", "digits", "--streaming"], "Expected no options for the suite 'digits', got ['streaming']"),
        (["--suite", "none.yaml"], "Expected a YAML file, found none at none.yaml"),
        (["--suite", "digits", "--teacher_momentum_end", "1.2"], "`teacher_momentum_end` in [0, 1], got 1.2"),
        (["--suite", "digits", "--preset", "clip"], "invalid choice: 'clip'"),
        (["--suite", "digits", "--no_such_flag"], "--no_such_flag"),
    ],
)
def test_bad_options_end_with_one_line_before_anything_is_loaded(tmp_path, flags, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune_imagenet.py", "--use_cpu", "--output_dir", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as ended:
        script("train")
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert "Loading weights" not in said


def test_the_script_itself_ends_with_one_line(tmp_path):
    script = str(ROOT / "examples" / "finetune_imagenet.py")
    command = [sys.executable, script, "--use_cpu", "--output_dir", str(tmp_path), "--suite", "none.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "Expected a YAML file, found none at none.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_with_an_interrupted_save_alone_can_be_started_anew(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-4").mkdir()

    class Reached(Exception):
        pass

    def stop(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(training, "processor_of", stop)
    monkeypatch.setattr(training, "model_of", stop)
    command = ["--suite", "digits", "--use_cpu", "--output_dir", str(tmp_path)]
    with pytest.raises(Reached):
        training.main(command)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    write_manifest(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="Add --resume_from_checkpoint"):
        training.main(command)


def test_the_demo_empties_no_folder_but_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="choose another one"):
        demo.main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "thesis.txt").exists()


def test_table_has_a_row_a_set(suite):
    metrics = {f"eval_{name}_{key}": 0.5 for name in ("home", "far", "part", "ood") for key in ("accuracy", "ece")}
    metrics["eval_far_ece_ts"] = 0.25
    measured = Reported(intervals={"far": {"ece": (0.4, 0.6)}}, marks={"part": "kind seen"})
    lines = training.table(suite, metrics, measured).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "home",
        "far",
        "part (kind seen)",
        "mean of shifts",
    ]
    assert [cell.strip() for cell in lines[3].split("|")[2:5]] == ["0.500", "0.500 (0.400 to 0.600)", "0.250"]


def test_the_test_set_of_the_training_is_called_home(suite):
    suite = dataclasses.replace(suite, test=noise_set("uci", 19, 2))
    metrics = dict.fromkeys(["eval_uci_accuracy", "eval_ood_accuracy"], 0.5)
    lines = training.table(suite, metrics, Reported()).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["uci (home)", "far", "part", "mean of shifts"]


def test_the_demo_speaks_of_home_and_shifted(tmp_path, monkeypatch, capsys):
    """How metrics.json calls them is said once."""
    results = {"zero-shot": [dict.fromkeys([key for _, key in demo.COLUMNS], 0.5)]}
    monkeypatch.setattr(demo, "run_methods", lambda place, seeds: (results, {}))
    monkeypatch.setattr(demo, "draw", lambda *args: None)
    demo.main(["--output_dir", str(tmp_path / "demo")])
    said = capsys.readouterr().out
    header = [cell.strip() for line in said.splitlines() if "method" in line for cell in line.split("|")[2:-1]]
    assert header == [
        *("home acc", "shifted acc", "home ECE", "shifted ECE"),
        *("home ECE, T", "shifted ECE, T", "home ECE, density", "shifted ECE, density"),
    ]
    assert (said.count("`id`"), said.count("`ood`")) == (1, 1)
    assert not re.search(r"\b(?:ID|OOD)\b|in.distribution", said)


def test_comparison_shows_mean_and_range():
    runs = [dict.fromkeys([key for _, key in demo.COLUMNS], value) for value in (0.1, 0.2, 0.6)]
    text = demo.comparison({"zero-shot": runs[:1], "carot": runs})
    cells = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines()}
    assert cells["zero-shot"] == "0.100"
    assert cells["carot"] == "0.300 (0.100-0.600)"


@pytest.mark.parametrize("flags", [["--model_name_or_path", "no/such/model"], ["--learning_rate", "fast"]])
def test_checkpoints_are_not_deleted_before_all_is_in_order(tmp_path, monkeypatch, flags):
    """--overwrite_output_dir deleted them first, and then there was no such model."""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/weights").write_text("mine")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    write_manifest(tmp_path / "checkpoint-4")
    options = ["--suite", "digits", "--use_cpu", "--output_dir", str(tmp_path), "--overwrite_output_dir", *flags]
    with pytest.raises((OSError, ValueError)):
        training.main(options)
    assert (tmp_path / "checkpoint-4/weights").read_text() == "mine"


def test_checkpoints_of_an_earlier_run_are_deleted_when_one_says_so(tmp_path, capsys):
    (tmp_path / "checkpoint-400").mkdir()
    (tmp_path / "checkpoint-400" / "trainer_state.json").write_text("{}")
    write_manifest(tmp_path / "checkpoint-400")
    options = ["--suite", "digits", "--use_cpu", "--output_dir", str(tmp_path), "--zero_shot", "--report_to", "none"]
    with pytest.raises(ValueError, match=r"--overwrite_output_dir to delete them"):
        training.main(options)
    training.main([*options, "--overwrite_output_dir"])
    assert f"Deleting {tmp_path / 'checkpoint-400'}, of an earlier run" in capsys.readouterr().out
    assert not (tmp_path / "checkpoint-400").exists()
