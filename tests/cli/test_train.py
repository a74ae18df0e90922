"""carot_hf train: its options, from a YAML file, too; what a folder of few images needs; its help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image
from toys import CLIP

from carot_hf import CaRotTrainingArguments, load_suite
from carot_hf.cli import train_options
from carot_hf.cli.main import COMMANDS, _without_debug, main
from carot_hf.presets import PRESETS


@pytest.fixture
def fruit(tmp_path):
    """Two classes of noise, one bright and one dark, in train, test and a shift."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 6), ("sketch", 4)):
        for label, low in (("apple", 0), ("pear", 120)):
            place = tmp_path / "fruit" / name / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(low, low + 130, (32, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path / "fruit"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "suite: digits\nmodel: some/model\npreset: flyp\nlearning_rate: 1e-5\nbf16: true\nlogging_steps: 7\n"
        "report_to: [wandb]\nshifts: [v2, r]\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "resume_from_checkpoint: true\nmax_grad_norm:\nuse_cpu: true\n"
    )
    return path


def test_a_file_holds_a_run_and_the_command_line_goes_first(config):
    _, _, script, args = train_options.options_of(["--config", str(config), "--logging_steps", "3"])
    assert (script.suite, script.model_name_or_path, script.preset) == ("digits", "some/model", "flyp")
    assert (args.learning_rate, args.bf16, args.logging_steps) == (1e-5, True, 3)
    assert args.report_to == ["wandb"]
    assert args.resume_from_checkpoint == "latest", "as the option without a value"
    assert script.shifts == ["v2", "r"]
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.distillation_weight == 0.0, "the preset's"
    assert args.max_grad_norm == CaRotTrainingArguments.max_grad_norm, "an empty value says nothing"
    _, _, script, args = train_options.options_of([f"--config={config}", "--preset", "carot", "--bf16", "false"])
    assert (script.preset, args.bf16) == ("carot", False)


def test_the_suite_goes_behind_the_file(config):
    config.write_text("suite: digits\nnum_train_epochs: 2\nuse_cpu: true\n")
    _, args, suite = train_options.parse(["--config", str(config), "--output_dir", str(config.parent / "out")])
    assert args.num_train_epochs == 2
    assert args.per_device_train_batch_size == suite.recommended["per_device_train_batch_size"]


def test_a_file_may_hold_its_suite_too(fruit, tmp_path, monkeypatch):
    """Paths in it are relative to the file, wherever the command runs; the command line's suite goes first."""
    inner = "name: basket\ntrain: {path: train}\nvalidation: 0.2\ntest: {path: test, name: home}\n"
    inner += "shifts: {sketch: {path: sketch}}\nrecommended: {learning_rate: 0.5, num_train_epochs: 9}\n"
    (fruit / "alone.yaml").write_text(inner)
    run = fruit / "run.yaml"
    run.write_text(f"preset: flyp\nnum_train_epochs: 2\nuse_cpu: true\nsuite:\n{textwrap.indent(inner, '  ')}")
    monkeypatch.chdir(tmp_path)
    words = ["--config", "fruit/run.yaml", "--output_dir", str(tmp_path / "out")]
    script, args, suite = train_options.parse(words)
    alone = load_suite(fruit / "alone.yaml")
    assert (script.suite, script.preset) == ("fruit/run.yaml", "flyp")
    assert (args.learning_rate, args.num_train_epochs) == (0.5, 2), "the file goes before its suite"
    assert (suite.name, suite.class_names, list(suite.shifts)) == ("basket", ["apple", "pear"], ["sketch"])
    assert (suite.content_hash, suite.test.name) == (alone.content_hash, "home")
    assert load_suite("fruit/run.yaml").content_hash == alone.content_hash, "as other commands take it"
    assert train_options.parse([*words, "--suite", "digits"])[2].name == "digits"
    run.write_text(f"{run.read_text()}\ntest: {{path: sketch}}\n")
    with pytest.raises(ValueError, match=r"run.yaml: test: expected all of the suite under `suite`"):
        load_suite("fruit/run.yaml")


@pytest.mark.parametrize(
    ("name", "inner", "said"),
    [
        ("run.yaml", "{tset: {path: test}}", "run.yaml: suite: "),
        ("run.yaml", "{test: {path: none}}", "run.yaml: suite: test"),
        ("run.yaml", "{train: {path: train}, test: {path: test}}", "run.yaml: suite: validation: expected this key"),
        ("run.yaml", "{test: {path: test}}\ntest: {path: test}", "expected an option, got 'test'"),
        ("run.txt", "{test: {path: test}}", "Expected a file .yaml as --config with a suite in it"),
    ],
)
def test_a_suite_in_a_file_that_is_none(fruit, name, inner, said, refused):
    (fruit / name).write_text(f"suite: {inner}\nuse_cpu: true\noutput_dir: {fruit.parent / 'out'}\n")
    assert said in refused("train", "--config", fruit / name, lines=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lerning_rate: 1", "expected an option, got 'lerning_rate'. Did you mean learning_rate?"),
        ("- a\n- b", "Expected options and their values in"),
        ("a: [", "Expected YAML in"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("report_to: [wandb, trackio]", "Expected one value of report_to, got ['wandb', 'trackio']"),
        ("config: other.yaml", "expected an option, got 'config'"),
    ],
)
def test_files_that_hold_no_run(config, text, said, refused):
    config.write_text(text)
    assert said in refused("train", "--config", config, lines=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lerning_rate", "1"], "got '--lerning_rate'. Did you mean --learning_rate?"),
        (["--learning_rate=x"], "invalid float value: 'x'. `carot_hf train --help_all` shows all options."),
        (["--config", "none.yaml"], "Expected a YAML file as --config, got none.yaml, which is not there."),
    ],
)
def test_errors_are_one_line_and_the_status_is_2(words, said, refused):
    assert said in refused("train", *words, lines=1)
    with pytest.raises(ValueError, match=r"Expected|invalid"):
        main(["train", *words, "--debug"])


def test_debug_with_a_value_is_an_option_of_the_training(tmp_path):
    *_, args = train_options.options_of(["--debug", "underflow_overflow", "--use_cpu"])
    assert [option.value for option in args.debug] == ["underflow_overflow"]
    assert _without_debug(["--debug", "underflow_overflow", "-x"]) == (False, ["--debug", "underflow_overflow", "-x"])
    assert _without_debug(["a", "--debug"]) == (True, ["a"])
    assert _without_debug([]) == (False, [])


def test_the_help_fits_a_screen_and_is_true(capsys):
    """What it names exists, and all presets are named."""
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 50
    assert max(map(len, shown.splitlines())) <= 120
    known = train_options.parser_of()._option_string_actions
    named = set(re.findall(r"--[a-z0-9_]+", shown)) - {"--help_all"}
    assert named <= set(known), named - set(known)
    assert all(re.search(rf"[ ,]{name}\b", shown) for name in PRESETS)
    assert main(["train", "--help_all"]) == 0
    everything = capsys.readouterr().out
    assert all(f"--{item.name}" in everything for item in fields(CaRotTrainingArguments) if item.init)


def test_no_help_imports_torch():
    code = (
        "import sys, contextlib, io\nfrom carot_hf.cli.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "    print(name, len(said.getvalue().splitlines()), 'torch' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    found = [line.split() for line in said.stdout.splitlines()]
    assert [name for name, *_ in found] == list(COMMANDS)
    assert all(2 < int(lines) < 60 and torch == "False" for _, lines, torch in found), found


def test_a_folder_of_few_images_is_trained_evaluated_and_predicted(fruit, tmp_path, capsys):
    """Nothing but a folder and a model is named: 36 images make batches of 4."""
    run = tmp_path / "run"
    options = ["--num_train_epochs", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    words = ["--suite", str(fruit), "--model_name_or_path", str(CLIP), "--output_dir", str(run)]
    assert main(["train", *words, *options]) == 0
    printed = capsys.readouterr().out
    assert "Batches of 4, for fruit has 36 training images." in printed
    report = json.loads((run / "metrics.json").read_text())
    assert report["steps"] == 9
    assert report["command"].startswith("carot_hf train --suite ")
    assert str(tmp_path) not in (run / "metrics.json").read_text()
    assert main(["train", *words, *options]) == 2, "a finished run is not replaced"
    ev = tmp_path / "ev"
    assert main(["evaluate", str(CLIP), "--suite", str(fruit), "--output_dir", str(ev), "--device", "cpu"]) == 0
    output = tmp_path / "p.csv"
    assert main(["predict", str(run), str(fruit / "test"), "--output_file", str(output), "--device", "cpu"]) == 0
    rows = output.read_text().splitlines()
    assert len(rows) == 1 + 12
    assert {row.split(",")[1] for row in rows[1:]} <= {"apple", "pear"}
    capsys.readouterr()
    assert main(["compare", str(ev), str(run)]) == 0
    assert "test" in capsys.readouterr().out


def test_a_batch_that_somebody_named_stays(fruit, tmp_path):
    words = ["--suite", str(fruit), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert train_options.parse(words)[1].per_device_train_batch_size == 4
    for named in (["--per_device_train_batch_size", "9"], ["--per-device-train-batch-size=9"]):
        assert train_options.parse([*words, *named])[1].per_device_train_batch_size == 9
    assert train_options.parse([*words, "--contrastive_batch_size", "512"])[1].per_device_train_batch_size == 512
