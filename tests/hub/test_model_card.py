"""The card: valid metadata, a result for each set and metric as the published weights give it, and no secret."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from toys import ROOT

from carot_hf import (
    CaRotTrainingArguments,
    bake_temperature,
    calibration_metrics,
    interpolate,
    unbake_temperature,
)
from carot_hf.hub.card import command_line
from carot_hf.presets import PRESETS
from carot_hf.run.method import teacher_words


def card_of(trainer, **options):
    trainer.create_model_card(model_name="tester/tiny", **options)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def results_of(card):
    return {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results or []}


def rows_of(card):
    """Cells of the table of results by set."""
    lines = card.text.split("## Results")[1].split("##")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    titles = rows[0]
    assert all(len(row) == len(titles) for row in rows)
    return {row[0] or row[1]: dict(zip(titles, row, strict=True)) for row in rows[1:]}


@pytest.fixture
def drawn(monkeypatch):
    """Diagrams are written as the text of their tables: drawing takes a second."""

    def write(path, *tables):
        path.parent.mkdir(exist_ok=True)
        path.write_text(repr(tables))

    monkeypatch.setattr("carot_hf.evaluation.diagrams.write_diagrams", write)


def number(cell):
    """A figure without its interval."""
    return float(cell.split(" (")[0])


def published(trainer, data):
    """Accuracy, ECE and NLL of a set from the weights as they are, by way of `predict`."""
    output = trainer.predict(data)
    return calibration_metrics(torch.tensor(output.predictions), torch.tensor(output.label_ids))


@pytest.mark.parametrize("order", ["evaluate calibrate", "calibrate evaluate", "evaluate", "evaluate calibrate unbake"])
@pytest.mark.parametrize("preset", ["carot", "ft"])
def test_results_are_those_of_the_weights_in_whatever_order(make_trainer, suite, preset, order):
    """And the table has both columns: with T taken out, and with T."""
    trainer = make_trainer(preset=preset, teacher_update_every=2 if preset == "carot" else 0)
    trainer.train()
    for step in order.split():
        {
            "evaluate": trainer.evaluate,
            "calibrate": trainer.calibrate,
            "unbake": lambda: unbake_temperature(trainer.model),
        }[step]()
    card = card_of(trainer)
    results, rows = results_of(card), rows_of(card)
    metrics = ("accuracy", "ece", "nll")
    assert results.keys() == {(name, metric) for name in ("home", "far", "part") for metric in metrics}
    baked = getattr(trainer.model.config, "calibration", None) is not None
    columns = " with T" if baked else " without T"
    for name, data in {"home": suite.test, **suite.shifts}.items():
        expected = published(trainer, data)
        for metric in metrics:
            assert results[name, metric] == pytest.approx(expected[metric], abs=2e-6), (name, metric)
            title = "accuracy" if metric == "accuracy" else metric.upper() + columns
            assert number(rows[name][title]) == pytest.approx(expected[metric], abs=6e-5)
            assert ("(0." in rows[name][title]) == (metric != "nll"), "an interval"
    means = [sum(number(rows[name][title]) for name in suite.shifts) / 2 for title in ("ECE without T", "NLL with T")]
    assert [number(rows["mean of shifted"][title]) for title in ("ECE without T", "NLL with T")] == pytest.approx(
        means, abs=1e-4
    )
    if baked:
        unbake_temperature(trainer.model)
        for name, data in suite.shifts.items():
            expected = published(trainer, data)
            assert number(rows[name]["ECE without T"]) == pytest.approx(expected["ece"], abs=6e-5)
            assert number(rows[name]["NLL without T"]) == pytest.approx(expected["nll"], abs=6e-5)
    else:
        assert "**it is not in these weights**" in card.text
        assert "**No temperature is in the weights**" in card.text


def test_what_the_metadata_and_the_text_say(make_trainer):
    trainer = make_trainer(reliability_diagrams=True)
    trainer.train()
    trainer.evaluate()
    record = trainer.calibrate()
    card = card_of(trainer, dataset="tester/noise", finetuned_from="openai/clip", tags="mine", license="mit")
    assert f"T = {record['temperature']:.4f}, fitted on the split `validation` (15 images" in card.text
    data = card.data
    assert (data.pipeline_tag, data.library_name) == ("zero-shot-image-classification", "transformers")
    assert (data.base_model, data.datasets, data.license) == ("openai/clip", ["tester/noise"], "mit")
    assert {"carot_hf", "calibration", "mine"} <= set(data.tags)
    assert {result.task_type for result in data.eval_results} == {"zero-shot-image-classification"}
    again = ModelCard(f"---\n{data.to_yaml()}\n---\n", ignore_metadata_errors=False)
    assert again.data.to_dict() == data.to_dict()
    assert f"Suite `noise`, sha256 `{trainer.suite.content_hash}`" in card.text
    assert {result.dataset_revision for result in data.eval_results} == {None}, "a hash is no commit"
    assert "![Reliability diagrams of each set](eval_reliability.png)" in card.text
    for template in trainer.suite.templates:
        assert template in card.text.splitlines()
    assert "`openai/clip`, fine-tuned on the suite `noise` (4 classes) by carot_hf." in card.text
    assert re.search(r"\| `learning_rate` +\| `0.01` +\|", card.text)
    assert re.search(r"4 steps; seed 42; carot_hf \S+, torch \S+, transformers", card.text)


def made_of(card):
    """The rows of the first table of a card."""
    lines = [line.split(" | ") for line in card.text.split("## Results")[0].splitlines() if line.startswith("| ")]
    return {line[0].strip("| "): line[1].rstrip("| ") for line in lines[1:]}


def test_the_card_of_a_preset_names_loss_and_teacher_though_all_are_defaults(make_trainer):
    """A card of CaRot said "contrastive loss": the weight of its distillation is the default and stood nowhere."""
    trainer = make_trainer(learning_rate=1e-5)
    assert "distillation_weight" not in trainer.args.changed()
    assert made_of(card_of(trainer)) == {
        "base model": "not known",
        "licence": "not known; see that of the base model",
    }, "nothing was trained"
    trainer.train()
    assert made_of(card_of(trainer, license="mit", dataset=["tester/noise", "my photos"])) == {
        "base model": "not known",
        "licence": "mit",
        "data sets": "`tester/noise`, `my photos`",
        "method": "the loss of the preset `carot`",
        "loss": r"contrastive \(softmax\) + 0.75 x distillation",
        "teacher": r"moving average of the weights; moves every 2 steps; momentum \(weight of the old "
        r"teacher\) from 0.05 to 0.9 over the first 20 % of the steps, then constant",
    }
    trainer.args.distillation_weight = 0.5
    assert made_of(card_of(trainer))["method"] == "a loss of no preset"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distillation_weight": 0.0}, None),
        ({"teacher": "frozen"}, "the model as it was before the first step; it never moves"),
        ({"teacher_update_every": 0}, "the model as it was before the first step; it never moves"),
        ({"teacher": "beta", "teacher_update_every": 1}, "Beta(0.5, 0.5); moves every step"),
        ({"teacher_momentum_ramp": 0.0}, "moves every 500 steps; momentum (weight of the old teacher) 0.9"),
        ({"teacher_momentum_start": 0.9}, "moves every 500 steps; momentum (weight of the old teacher) 0.9"),
    ],
)
def test_the_schedule_of_the_teacher_in_words(tmp_path, options, words):
    said = teacher_words(CaRotTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options))
    assert said == words if words is None else said.endswith(words)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_told_by_its_loss(tmp_path, name):
    """Whatever learning rate, smoothing and interval a suite recommends."""
    options = {"output_dir": str(tmp_path), "use_cpu": True, "learning_rate": 1e-3, "teacher_update_every": 7}
    assert CaRotTrainingArguments.from_preset(name, **options).loss_preset == name
    if name.endswith("-ls"):
        assert CaRotTrainingArguments.from_preset(name, label_smoothing_factor=0.02, **options).loss_preset == name
    pairs = PRESETS[name].arguments.get("objective") != "cross_entropy"
    weight = {"orthogonality_weight": 0.01} if pairs else {"energy_gap_weight": 0.5}
    other = CaRotTrainingArguments.from_preset(name, **weight, **options)
    assert other.loss_preset is None


@pytest.mark.parametrize(
    ("start", "shown"),
    [("openai/clip", "openai/clip"), ("/gone/model", None), ("../gone", None), ("a/b/c", None), ("here", None)],
)
def test_only_what_may_be_an_id_of_the_hub_is_given_as_the_base_model(
    make_trainer, monkeypatch, tmp_path, start, shown
):
    """A folder that is there, or a path that was: the Hub would look for a model of that name."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    trainer = make_trainer()
    trainer.model.config._name_or_path = start
    card = card_of(trainer, dataset=["tester/noise", "my photos"])
    assert card.data.base_model == shown
    assert made_of(card)["base model"] == (f"`{shown}`" if shown else "not known")
    assert card.data.datasets == ["tester/noise"]


def test_a_result_names_no_data_set_of_somebody_else(make_trainer):
    """A suite is no id of the Hub: none of the types may be read as one, and each set has its own."""
    trainer = make_trainer()
    trainer.evaluate()
    card = card_of(trainer)
    types = [result.dataset_type for result in card.data.eval_results]
    assert set(types) == {f"{name} of the suite noise" for name in ("home", "far", "part")}
    for name in types:
        with pytest.raises(HFValidationError):
            validate_repo_id(name)
    assert card.data.metrics == ["accuracy"]


def test_the_version_of_the_suite_is_named(make_trainer):
    trainer = make_trainer()
    trainer.suite.version = "2.1"
    assert f"Suite `noise` version 2.1, sha256 `{trainer.suite.content_hash}`" in card_of(trainer).text


def test_what_was_measured_before_a_training_is_not_of_the_trained_weights(make_trainer, drawn):
    trainer = make_trainer(max_steps=1, reliability_diagrams=True)
    trainer.evaluate()
    assert results_of(card_of(trainer))
    trainer.train()
    card = card_of(trainer)
    assert card.data.eval_results is None
    assert "**These weights were not evaluated**" in card.text
    assert "eval_reliability.png" not in card.text
    trainer.evaluate("far")
    trainer.evaluate(teacher=True)
    assert card_of(trainer).data.eval_results is None


def test_a_training_that_is_refused_forgets_nothing(make_trainer, drawn):
    trainer = make_trainer(max_steps=1)
    trainer.evaluate()
    before = results_of(card_of(trainer))
    assert before
    with pytest.raises(ValueError, match="there is no such folder"):
        trainer.train(resume_from_checkpoint="nowhere")
    assert results_of(card_of(trainer)) == before


def test_evaluations_of_one_set_or_of_the_teacher_change_neither_table_nor_picture(make_trainer, drawn):
    trainer = make_trainer(max_steps=1, reliability_diagrams=True)
    trainer.train()
    trainer.evaluate()
    picture = Path(trainer.args.output_dir, "eval_reliability.png")
    before, whole = card_of(trainer), picture.read_bytes()
    trainer.evaluate("far")
    assert picture.read_bytes() != whole
    trainer.evaluate(teacher=True)
    assert card_of(trainer).content == before.content
    assert picture.read_bytes() == whole


def test_another_model_or_another_temperature_is_not_the_one_that_was_measured(make_trainer):
    """A merge has no temperature, one set by hand no figures."""
    trainer = make_trainer()
    trainer.evaluate()
    bake_temperature(trainer.model, 3.0)
    card = card_of(trainer)
    assert {metric for _, metric in results_of(card)} == {"accuracy"}
    assert "T = 3.0000, set by hand: no split is known" in card.text
    assert "with the temperature that is in the weights were not measured" in card.text
    assert "NLL with T" not in card.text
    merged = interpolate(trainer.model, trainer.model, 0.5)
    trainer.model = merged
    card = card_of(trainer)
    assert card.data.eval_results is None
    assert "**No temperature is in the weights**" in card.text
    assert "as it was loaded: this run trained nothing" in card.text


def test_sets_that_the_temperature_makes_worse_are_named(make_trainer, suite):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    worse = [name for name in ("home", *suite.shifts) if metrics[f"eval_{name}_ece_ts"] > metrics[f"eval_{name}_ece"]]
    trainer.calibrate()
    card = card_of(trainer)
    trainer.latest.metrics["far_ece_ts"] = trainer.latest.metrics["far_ece"] + 0.1  # and one that surely is
    assert ("larger than without" in card.text) is bool(worse)
    named = re.search(r"larger than without\*\* on: (.+)\.", card_of(trainer).text)[1]
    assert named.split(", ") == [name for name in ("home", *suite.shifts) if name in {*worse, "far"}]


@pytest.mark.parametrize("method", ["temperature", "perturbed", "density", "target"])
def test_sets_and_figures_per_image_are_those_of_the_saved_method(make_trainer, suite, method):
    """The evaluation measured a density; only where that is what was saved does the card say so."""
    trainer = make_trainer(calibration_method="density")
    metrics = trainer.evaluate()
    assert metrics["eval_far_aps_coverage"] > 0
    images = [{"image": suite.shifts["far"][row]["image"]} for row in range(17)] if method == "target" else None
    record = trainer.calibrate(method, images=images)
    assert record["conformal"].keys() == {"lac", "aps"}, "there are sets that it might show"
    card = card_of(trainer)
    assert ("## Sets of classes" in card.text) is (method == "density")
    assert ("ECE per image" in card.text) is (method == "density")
    if method == "density":
        numbers = [metrics[f"eval_far_{key}"] for key in ("lac_coverage", "lac_size", "aps_coverage", "aps_size")]
        row = re.search(r"^\| far +\| ([\d.| ]+) \|$", card.text.split("## Sets of classes")[1], re.MULTILINE)
        assert [float(cell) for cell in row[1].split("|")] == pytest.approx(numbers, abs=1e-4)
    if method == "target":
        assert "It was fitted to 17 images without labels of the place of use" in card.text
        assert abs(record["temperature"] / metrics["eval_temperature"] - 1) > 0.01
        assert "with the temperature that is in the weights were not measured" in card.text
        assert {metric for _, metric in results_of(card)} == {"accuracy"}


def test_the_card_of_a_classifier_says_whose_class_it_is(make_trainer, tmp_path):
    trainer = make_trainer(preset="ft", teacher_update_every=0)
    card = card_of(trainer)
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "carot_hf"
    assert "transformers and carot_hf" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    assert "candidate_labels" not in code
    trainer.save_model(tmp_path / "saved")
    Image.new("RGB", (40, 30)).save(tmp_path / "image.jpg")
    here = re.sub(r'model=".*"', 'model="saved"', code)
    assert here != code
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{here}\nassert len(classify('image.jpg')) == 4"]  # nothing else is imported
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr


def test_odd_names_break_neither_metadata_nor_text(make_trainer, suite):
    names = ['it\'s a "quote": #1', "tick```tick", "pipe | é 数", "back\\slash"]
    odd = dataclasses.replace(suite, name="my: suite #2", class_names=names, templates=["a `{}`", "a ```{}``` | photo"])
    trainer = make_trainer(suite=odd)
    trainer.evaluate()
    trainer.evaluate()
    card = card_of(trainer)
    results = card.data.eval_results
    assert {result.dataset_type for result in results} == {
        f"{name} of the suite my: suite #2" for name in ("home", "far", "part")
    }
    metadata = yaml.safe_load(card.content.split("---\n")[1])
    assert [len(entry["metrics"]) for entry in metadata["model-index"][0]["results"]] == [3, 3, 3]
    code = re.search(r"^(````+)python\n(.*?)\n\1$", card.text, re.S | re.M)[2]
    scope = {}
    exec("\n".join(line for line in code.splitlines() if line.startswith(("labels", "template"))), scope)
    assert scope["labels"] == names
    assert scope["template"] == "a `{}`"
    assert "\na ```{}``` | photo\n" in card.text


def test_values_that_are_no_numbers_are_left_out(make_trainer):
    trainer = make_trainer()
    trainer.evaluate()
    trainer.latest.metrics["far_nll"] = math.nan
    assert ("far", "nll") not in results_of(card_of(trainer))


def test_the_command_holds_no_token_and_no_folder_of_the_machine():
    argv = ["/home/me/finetune.py", "--suite", "digits", "--hub_token", "hf_secret", "--bf16", "--other_token=hf_s"]
    assert command_line(argv) == "python finetune.py --suite digits --hub_token ... --bf16 --other_token=..."
    argv = ["x.py", "--hub-token", "s", "--data_root", "/home/me/data", "--output_dir=/home/me/out", "hf_" + "a" * 34]
    assert command_line(argv) == "python x.py --hub-token ... --data_root .../data --output_dir=.../out ..."
    assert command_line(["/usr/lib/ipykernel_launcher", "-f", "x"]) is None
    assert command_line([]) is None
    for ours in ("/usr/bin/carot_hf", "/usr/lib/carot_hf/__main__.py"):
        assert command_line([ours, "train", "--hub_token", "x"]) == "carot_hf train --hub_token ..."


def test_pickles_of_the_arguments_hold_no_token(make_trainer):
    args = make_trainer(hub_token="hf_secret").args
    assert b"hf_secret" not in pickle.dumps(args)
    assert args.hub_token == "hf_secret"


def test_an_uncalibrated_push_is_said(make_trainer, monkeypatch, caplog):
    trainer = make_trainer()
    trainer.hub_model_id, trainer.push_in_progress = "tester/tiny", None
    monkeypatch.setattr("carot_hf.hub.publisher.upload", lambda *a, **kw: "pushed")
    for name in ("transformers", "carot_hf"):
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.WARNING):
        assert trainer.push_to_hub() == "pushed"
    assert "An uncalibrated model is pushed" in caplog.text
    caplog.clear()
    trainer.calibrate()
    trainer.push_to_hub()
    assert "uncalibrated" not in caplog.text


@pytest.mark.parametrize("order", ["evaluate calibrate", "calibrate evaluate"])
def test_a_temperature_of_perturbed_copies_is_the_one_that_is_reported(make_trainer, suite, order):
    trainer = make_trainer(calibration_method="perturbed", calibration_bounds=[0.01, 1000.0])
    trainer.train()
    for step in order.split():
        getattr(trainer, step)()
    card = card_of(trainer)
    for name, data in {"home": suite.test, **suite.shifts}.items():
        expected = published(trainer, data)
        assert results_of(card)[name, "nll"] == pytest.approx(expected["nll"], abs=2e-5)
        assert float(rows_of(card)[name]["NLL with T"]) == pytest.approx(expected["nll"], abs=1e-4)
    assert "Perturbed copies of these images were among the rows of the fit." in card.text
