"""The card: valid metadata, a result for each set and metric as the weights give it, and no secret."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard

from carot_hf.model_card import command_line


def card_of(trainer, **options):
    trainer.create_model_card(model_name="tester/tiny", **options)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def test_results_are_those_of_the_weights(make_trainer):
    """Before the temperature is in: the plain errors; after: those with it, for the same weights are published."""
    trainer = make_trainer(reliability_diagrams=True)
    metrics = trainer.evaluate()
    for calibrated, ending in ((False, ""), (True, "_ts")):
        if calibrated:
            record = trainer.calibrate()
        card = card_of(trainer, dataset="tester/noise", finetuned_from="openai/clip", tags="mine", license="mit")
        results = {(result.dataset_name, result.metric_type): result for result in card.data.eval_results}
        assert len(results) == 3 * len(trainer.suite.evaluation_sets) - 3  # validation is not reported
        for (name, metric), result in results.items():
            key = f"eval_{name}_{metric}{'' if metric == 'accuracy' else ending}"
            assert result.metric_value == pytest.approx(metrics[key], abs=1e-6), key
            assert result.task_type == "zero-shot-image-classification"
        for name in trainer.suite.shifts:
            row = f"| {name} | shifted | {metrics[f'eval_{name}_accuracy']:.4f} | {metrics[f'eval_{name}_ece']:.4f} | "
            assert row + f"{metrics[f'eval_{name}_ece_ts']:.4f} |" in card.text
    assert f"T = {record['temperature']:.4f}, fitted on the split `validation` (15 images" in card.text
    data = card.data
    assert (data.pipeline_tag, data.library_name) == ("zero-shot-image-classification", "transformers")
    assert (data.base_model, data.datasets, data.license) == ("openai/clip", ["tester/noise"], "mit")
    assert {"carot_hf", "calibration", "mine"} <= set(data.tags)
    assert f"Suite `noise`, sha256 `{trainer.suite.content_hash}`" in card.text
    assert {result.dataset_revision for result in results.values()} == {trainer.suite.content_hash}
    assert "![Reliability diagrams of each set](eval_reliability.png)" in card.text
    for template in trainer.suite.templates:
        assert f"`{template}`" in card.text
    assert "| `learning_rate` | `0.01` |" in card.text
    assert re.search(r"Seed 42; carot_hf \S+, torch \S+, transformers", card.text)


def test_a_temperature_that_was_in_at_the_evaluation_is_not_counted_twice(make_trainer):
    trainer = make_trainer()
    trainer.calibrate()
    metrics = trainer.evaluate()
    trainer.suite.version = "2.1"
    card = card_of(trainer)
    assert f"Suite `noise` version 2.1, sha256 `{trainer.suite.content_hash}`" in card.text
    errors = {r.dataset_name: r.metric_value for r in card.data.eval_results if r.metric_type == "ece"}
    assert errors["far"] == pytest.approx(metrics["eval_far_ece"], abs=1e-6)
    assert "ECE, T in the weights" in card.text


def test_without_evaluation_or_temperature_it_says_so(make_trainer):
    trainer = make_trainer(preset="ft", teacher_update_every=0)
    card = card_of(trainer)
    assert card.data.eval_results is None
    assert card.data.pipeline_tag == "image-classification"
    assert "was not evaluated" in card.text
    assert "No temperature is in the weights" in card.text


def test_other_evaluations_leave_it_alone(make_trainer):
    trainer = make_trainer(max_steps=1)
    metrics = trainer.evaluate()
    trainer.train()
    trainer.evaluate("far")
    trainer.evaluate(teacher=True)
    assert trainer._latest[0]["far_ece"] == metrics["eval_far_ece"]


def test_the_command_holds_no_token_and_no_folder_of_the_machine():
    argv = ["/home/me/finetune.py", "--suite", "digits", "--hub_token", "hf_secret", "--bf16", "--other_token=hf_s"]
    assert command_line(argv) == "python finetune.py --suite digits --hub_token ... --bf16 --other_token=..."
    assert command_line(["/usr/lib/ipykernel_launcher", "-f", "x"]) is None
    assert command_line([]) is None
