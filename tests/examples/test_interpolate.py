"""The WiSE-FT script: rows against direct evaluation, both model kinds, baked ends, the saved model, its files."""

from __future__ import annotations

import inspect
import json
import math
import re

import pytest
import torch
from csv_files import csv_rows
from tolerances import float32_bound
from transformers import CLIPModel, CLIPProcessor

from carot_hf import Evaluator, bake_temperature, evaluate_vrf, fit_vrf
from carot_hf.calibration.vrf import K_SHARE
from carot_hf.cli import data_options, interpolate
from carot_hf.evaluation.home import METHODS
from carot_hf.models.classifier import CLIPClassifier
from carot_hf.models.merging import SWEEP
from carot_hf.models.merging import interpolate as merge
from carot_hf.models.model_stock import model_stock


@pytest.fixture
def ends(tmp_path, model, processor, make_trainer, suite, monkeypatch):
    """Folders of a zero-shot and of a fine-tuned end, baked with T = 2, and the unbaked fine-tuned end itself."""
    monkeypatch.setattr("carot_hf.suites.load.load_suite", lambda name, **options: suite)
    model.save_pretrained(tmp_path / "zero_shot")
    trained = make_trainer(model, preset="flyp", learning_rate=2e-3, max_steps=6)
    trained.train()
    fine_tuned = trained.model
    bake_temperature(fine_tuned, 2.0)
    fine_tuned.save_pretrained(tmp_path / "fine_tuned")
    processor.save_pretrained(tmp_path / "fine_tuned")
    fine_tuned.logit_scale.data += math.log(2.0)
    del fine_tuned.config.calibration
    return tmp_path / "zero_shot", tmp_path / "fine_tuned", fine_tuned


def run(folders, output_dir, *flags):
    zero_shot, fine_tuned = (str(folder) for folder in folders)
    command = ["--zero_shot", zero_shot, "--fine_tuned", fine_tuned, "--output_dir", str(output_dir), "--use_cpu"]
    return interpolate.main([*command, *flags])


def direct(make_trainer, model, **arguments):
    metrics = make_trainer(model, distillation_weight=0.0, **arguments).evaluate()
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second", "epoch"))}


def test_rows_files_and_saved_model(ends, make_trainer, tmp_path, capsys):
    capsys.readouterr()
    rows = run(ends[:2], tmp_path / "wise", "--alphas", "0", "0.3", "1", "--alpha", "0.3", "--save")
    output = capsys.readouterr().out
    zero_shot = CLIPModel.from_pretrained(ends[0])
    for row, model in zip(rows, (zero_shot, merge(zero_shot, ends[2], 0.3), ends[2]), strict=True):
        for name, value in direct(make_trainer, model).items():
            assert row[name] == pytest.approx(value, abs=float32_bound(14.3, 12), nan_ok=True), name
    temperatures = [row["eval_temperature"] for row in rows]
    assert len(set(temperatures)) == 3  # fitted anew for each
    assert all(0.5 < temperature < 10 for temperature in temperatures[1:])  # and not stuck at a bound
    assert f"{ends[1]} is calibrated: its temperature is taken out" in output
    lines = [line.split("|") for line in output.splitlines() if line.startswith("| alpha")]
    assert [line[1].strip() for line in lines] == ["alpha 0", "alpha 0.3", "alpha 1"]
    assert [float(line[-2]) for line in lines] == pytest.approx(temperatures, abs=5e-4)
    assert "eval_runtime" not in output
    (header,) = (line for line in output.splitlines() if "home acc" in line)
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        *("home acc", "shifted acc", "home ECE", "shifted ECE", "home ECE, T", "shifted ECE, T", "T"),
    ]
    assert ("shifted ECE, perturbed", "eval_ood_ece_pts") in interpolate.TABLE
    assert not re.search(r"\b(?:ID|OOD)\b", output)

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    report = json.loads((tmp_path / "wise" / "sweep.json").read_text(), parse_constant=refuse)
    assert [row["alpha"] for row in report["rows"]] == [0.0, 0.3, 1.0]
    assert report["rows"][1]["eval_validation_nll"] == rows[1]["eval_validation_nll"]
    table = csv_rows(tmp_path / "wise" / "sweep.csv")
    assert list(table[0]) == ["alpha", *(key for _, key in interpolate.TABLE)]
    assert [float(row["eval_ood_ece_ts"]) for row in table] == [row["eval_ood_ece_ts"] for row in rows]
    saved = tmp_path / "wise" / "model"
    model = CLIPModel.from_pretrained(saved)
    assert model.config.calibration["temperature"] == pytest.approx(temperatures[1], rel=1e-6)
    merged = merge(zero_shot, ends[2], 0.3)
    assert torch.equal(model.visual_projection.weight, merged.visual_projection.weight)
    assert model.logit_scale.item() == pytest.approx(merged.logit_scale.item() - math.log(temperatures[1]), abs=1e-5)
    assert CLIPProcessor.from_pretrained(saved).tokenizer("one").input_ids
    assert not list((tmp_path / "wise").glob("*.png"))


def test_a_classifier_as_fine_tuned_end(ends, make_trainer, processor, tmp_path):
    """The zero-shot end gets the suite's head: alpha 0 has the metrics of the CLIPModel itself."""
    zero_shot = CLIPModel.from_pretrained(ends[0])
    trainer = make_trainer(zero_shot, preset="ft", max_steps=2, learning_rate=1e-2)
    trainer.train()
    fine_tuned = trainer.model
    assert isinstance(fine_tuned, CLIPClassifier)
    bake_temperature(fine_tuned, 2.0)
    fine_tuned.save_pretrained(tmp_path / "ft")
    processor.save_pretrained(tmp_path / "ft")
    for parameter in fine_tuned.head.parameters():
        parameter.data *= 2.0
    del fine_tuned.config.calibration
    rows = run((ends[0], tmp_path / "ft"), tmp_path / "wise", "--alphas", "0", "1", "--alpha", "1", "--save")
    for row, metrics in zip(
        rows,
        (
            direct(make_trainer, CLIPModel.from_pretrained(ends[0])),
            direct(make_trainer, fine_tuned, preset="ft"),
        ),
        strict=True,
    ):
        for name, value in metrics.items():
            assert row[name] == pytest.approx(value, abs=float32_bound(14.3, 12), nan_ok=True), name
    saved = CLIPClassifier.from_pretrained(tmp_path / "wise" / "model")
    temperature = saved.config.calibration["temperature"]
    torch.testing.assert_close(saved.head.weight * temperature, fine_tuned.head.weight, rtol=1e-5, atol=1e-6)


def test_model_stock_is_one_row_of_the_merged_model(ends, processor, make_trainer, tmp_path, capsys):
    """Of two ends, the second one trained further; measured, calibrated and saved as the library's merge is."""
    further = make_trainer(CLIPModel.from_pretrained(ends[0]), preset="flyp", learning_rate=1e-3, max_steps=9, seed=7)
    further.train()
    further.model.save_pretrained(tmp_path / "further")
    zero_shot = CLIPModel.from_pretrained(ends[0])
    merged = model_stock(zero_shot, [ends[2], CLIPModel.from_pretrained(tmp_path / "further")])
    command = ["--zero_shot", str(ends[0]), "--fine_tuned", str(ends[1]), str(tmp_path / "further"), "--use_cpu"]
    out = tmp_path / "stock"
    rows = interpolate.main([*command, "--method", "model_stock", "--save", "--output_dir", str(out)])
    assert "model_stock: T " in capsys.readouterr().out
    (row,) = rows
    assert "alpha" not in row
    for name, value in direct(make_trainer, merged).items():
        assert row[name] == pytest.approx(value, abs=float32_bound(14.3, 12), nan_ok=True), name
    assert json.loads((out / "sweep.json").read_text())["rows"][0]["eval_id_nll"] == row["eval_id_nll"]
    (line,) = csv_rows(out / "sweep.csv")
    assert list(line) == [key for _, key in interpolate.TABLE]
    saved = CLIPModel.from_pretrained(out / "model")
    assert saved.config.calibration["temperature"] == pytest.approx(row["eval_temperature"], rel=1e-6)
    for name, parameter in merged.named_parameters():
        if name != "logit_scale":  # the baked end was unbaked: off by a rounding
            torch.testing.assert_close(saved.get_parameter(name), parameter, rtol=0, atol=1e-6)


def test_vrf_is_one_row_of_the_mixed_probabilities(ends, suite, processor, tmp_path, capsys):
    """That of the library; the baked temperature of the end is taken out, and one fitted anew."""
    rows = run(ends[:2], tmp_path / "vrf", "--method", "vrf")
    output = capsys.readouterr().out
    pair = [Evaluator(end, processor, suite) for end in (CLIPModel.from_pretrained(ends[0]), ends[2])]
    found, vrf = evaluate_vrf(*pair)
    (row,) = rows
    assert row.keys() == found.flat().keys()
    for name, value in found.flat().items():
        assert row[name] == pytest.approx(value, abs=float32_bound(14.3, 12), nan_ok=True), name
    assert f"{len(vrf.failures)} training images that zero-shot alone has wrong" in output
    assert [line.split("|")[1].strip() for line in output.splitlines() if line.startswith("| vrf")] == ["vrf"]
    assert json.loads((tmp_path / "vrf" / "sweep.json").read_text())["rows"][0]["eval_ood_ece"] == row["eval_ood_ece"]
    assert not (tmp_path / "vrf" / "model").exists()
    assert f"k = {vrf.k}; a = 1.5, b = 0.6 (fixed)" in output


@pytest.mark.parametrize(
    ("flags", "options", "how"),
    [
        (["--k", "2", "--a", "-0.25", "--b", "0.2"], {"k": 2, "a": -0.25, "b": 0.2}, "fixed"),
        (["--choose"], {"choose": True}, "chosen on the validation set"),
        (["--choose", "--k", "2"], {"choose": True, "k": 2}, "chosen on the validation set"),
    ],
)
def test_vrf_is_weighed_as_was_asked_for(ends, suite, processor, tmp_path, capsys, flags, options, how):
    """By the library's own call; what was used is printed, and stands beside the metrics in sweep.json."""
    (row,) = run(ends[:2], tmp_path / "vrf", "--method", "vrf", *flags)
    output = capsys.readouterr().out
    zero_shot = CLIPModel.from_pretrained(ends[0])
    found, vrf = evaluate_vrf(*(Evaluator(end, processor, suite) for end in (zero_shot, ends[2])), **options)
    usual = evaluate_vrf(*(Evaluator(end, processor, suite) for end in (zero_shot, ends[2])))[0].flat()
    assert len(vrf.failures) > 1
    for name, value in found.flat().items():
        assert row[name] == pytest.approx(value, abs=float32_bound(14.3, 12), nan_ok=True), name
    assert abs(row["eval_home_fine_tuned_weight"] - usual["eval_home_fine_tuned_weight"]) > 1e-3, "another mixture"
    assert (
        f"{len(vrf.failures)} training images that zero-shot alone has wrong, k = {options.get('k', 1)}; a = " in output
    )
    assert f"a = {vrf.a:g}, b = {vrf.b:g} ({how})" in output
    kept = json.loads((tmp_path / "vrf" / "sweep.json").read_text())["vrf"]
    assert (kept["k"], kept["choose"]) == (options.get("k", 1), "choose" in options)
    assert (kept["a"], kept["b"]) == pytest.approx((options.get("a", vrf.a), options.get("b", vrf.b)), abs=0)
    assert kept["failures"] == len(vrf.failures)
    temperatures = vrf.zero_shot_temperature, vrf.fine_tuned_temperature
    assert (kept["zero_shot_temperature"], kept["fine_tuned_temperature"]) == pytest.approx(temperatures, rel=1e-5)


def test_other_methods_say_nothing_of_vrf(ends, tmp_path):
    run(ends[:2], tmp_path / "wise", "--alphas", "1")
    assert json.loads((tmp_path / "wise" / "sweep.json").read_text()).keys() == {"command", "rows"}


def test_the_help_says_the_defaults_of_the_library(capsys):
    with pytest.raises(SystemExit):
        interpolate.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for function in (fit_vrf, evaluate_vrf):
        own = inspect.signature(function).parameters
        assert [own[name].default for name in ("k", "choose")] == [None, False]
        for name in "ab":
            assert float(re.search(rf"--{name} X [^-]*default: ([\d.]+)", said)[1]) == own[name].default
    assert "--k N which nearest failure counts; default: 0.078 % of them" in said
    assert pytest.approx(0.078, abs=5e-4) == 100 * K_SHARE
    assert interpolate.parse(["--fine_tuned", "x", "--output_dir", "y", "--method", "vrf"]).vrf == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "b"], "xpected one --fine_tuned model for --method wise, got 2"),
        (["a", "--method", "model_stock"], "two or more --fine_tuned models for --method model_stock, got 1"),
        (["a", "b", "--method", "model_stock", "--alpha", "0.5"], "no --alphas and no --alpha with --method model_"),
        (["a", "b", "--method", "model_stock", "--alphas", "0"], "no --alphas and no --alpha with --method model_"),
        (["a", "b", "--method", "vrf"], "xpected one --fine_tuned model for --method vrf, got 2"),
        (["a", "--method", "vrf", "--alphas", "0"], "no --alphas and no --alpha with --method vrf"),
        (["a", "--k", "1"], "no --k with --method wise: add --method vrf, whose it is, or leave it out"),
        (["a", "--choose"], "no --choose with --method wise"),
        (["a", "b", "--method", "model_stock", "--a", "1.5"], "no --a with --method model_stock"),
        (["a", "--method", "wise", "--b", "0.6"], "no --b with --method wise"),
        (["a", "--method", "vrf", "--choose", "--a", "1"], "xpected --choose, or --a and --b, got both"),
        (["a", "--method", "vrf", "--choose", "--k", "1", "--b", "1"], "xpected --choose, or --a and --b, got both"),
        (["a", "--method", "vrf", "--k", "0"], "--k: expected a whole number above 0, got '0'"),
        (["a", "--method", "vrf", "--k", "1.5"], "--k: expected a whole number above 0, got '1.5'"),
        (["a", "--method", "vrf", "--a", "nan"], "--a: expected a finite number, got 'nan'"),
        (["a", "--method", "vrf", "--a", "far"], "--a: expected a finite number, got 'far'"),
        (["a", "--method", "vrf", "--b", "0"], "--b: expected a number above 0, got '0'"),
        (["a", "--method", "vrf", "--b", "inf"], "--b: expected a finite number, got 'inf'"),
        (["a", "--method", "vrf", "--save"], "no --save, --oracle and --calibration_method with --method vrf"),
        (["a", "--method", "vrf", "--oracle"], "no --save, --oracle and --calibration_method with --method vrf"),
        (["a", "--method", "vrf", "--calibration_method", "density"], "no --save, --oracle and --calibration_method"),
    ],
)
def test_what_does_not_fit_the_method_ends_before_anything_is_loaded(flags, message):
    with pytest.raises(ValueError, match=message):
        interpolate.parse(["--output_dir", "y", "--fine_tuned", *flags])


def test_runs_of_several_starts_ask_for_the_right_one(tmp_path):
    for name, start in (("a", "one"), ("b", "one"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"start_model": start, "suite": "my.yaml"}))
    folders = [str(tmp_path / name) for name in "abc"]
    assert interpolate.common_start(folders[:2]) == "one"
    with pytest.raises(ValueError, match=r"runs from one start model, got \['one', 'other'\].*--zero_shot"):
        interpolate.common_start(folders)


def test_the_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        interpolate.parse(["--help"])
    assert len(capsys.readouterr().out.splitlines()) < 50


def test_defaults_are_wise_ft():
    options = interpolate.parse(["--fine_tuned", "x", "--output_dir", "y"])
    assert options.alphas == pytest.approx([k / 10 for k in range(11)])
    assert tuple(options.alphas) == SWEEP, "the library's"
    assert tuple(METHODS) == data_options.METHODS, "the library's"
    assert (options.alpha, options.zero_shot) == (0.5, None)


@pytest.mark.parametrize(
    ("start", "suite", "expected"),
    [
        ("openai/clip-vit-base-patch32", "my.yaml", "openai/clip-vit-base-patch32"),
        ("the suite's (clip)", "digits", data_options.START_MODELS["digits"]),
        ("the suite's (clip-vit-base-patch16)", "imagenet", "openai/clip-vit-base-patch16"),
    ],
)
def test_the_start_model_is_the_one_of_the_run(tmp_path, start, suite, expected):
    """It was that of --suite, whatever the run had started from."""
    (tmp_path / "metrics.json").write_text(json.dumps({"start_model": start, "suite": suite}))
    assert interpolate.recorded_start(tmp_path) == expected


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_run_without_a_record_asks_for_its_start_model(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json to say which model the run started from.*--zero_shot"):
        interpolate.main(["--fine_tuned", str(tmp_path), "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["sweep.json", "model/model.safetensors"])
def test_an_earlier_sweep_is_not_written_over(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    flags = ["--fine_tuned", "x", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="without a finished model"):
        interpolate.main(flags)
    with pytest.raises(ValueError, match="to say which model the run started from"):
        interpolate.main([*flags, "--overwrite_output_dir"])


@pytest.mark.parametrize("flags", [["--alpha", "1.5"], ["--alphas", "0", "nan"]])
def test_weights_out_of_range_end_before_anything_is_loaded(flags):
    with pytest.raises(ValueError, match=r"expected a weight in \[0, 1\], got"):
        interpolate.parse(["--fine_tuned", "x", "--output_dir", "y", *flags])


def test_another_kind_of_model_is_refused(tmp_path, model):
    model.config.vision_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'clip_vision_model' in"):
        interpolate.load_end(str(tmp_path))
