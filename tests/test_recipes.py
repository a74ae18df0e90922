"""The recipes of CONTRIBUTING.md: a loss term, a metric and a set from outside, without a change of the package."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import datasets
import numpy as np
import pytest
import torch
from layouts import parquet, tars
from toys import ROOT, tiny_clip

from carot_hf import CaRotTrainer, CaRotTrainingArguments, Evaluator, calibration_metrics, load_suite
from carot_hf.calibration.metrics import METRICS, Metric
from carot_hf.objective.terms import PAIRS, TEACHER, TERMS, Term
from carot_hf.suites.imagenet.sets import SETS, SetFacts


@dataclass(repr=False)
class Arguments(CaRotTrainingArguments):
    spread_weight: float = field(default=0.0, metadata={"help": "Weight of the toy."})


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        return Arguments.from_preset(
            "flyp", output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
            report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", **options,
        )  # fmt: skip

    return make


def test_a_term(suite, processor, arguments, monkeypatch, capsys):
    """A row of the table: logged, weighed, refused, described, and a teacher made for it."""
    row = Term(
        "spread", "spread_weight", (PAIRS, TEACHER), lambda step: step.embeds[0].std() + 0 * step.taught[0].sum()
    )
    monkeypatch.setitem(TERMS, "spread", row)
    with pytest.raises(ValueError, match="got CaRotTrainingArguments without it: the term would be off in silence"):
        CaRotTrainingArguments(output_dir=str(suite.name))
    with pytest.raises(ValueError, match=r"`spread_weight` >= 0 and finite, got -1"):
        arguments(spread_weight=-1.0)
    assert not arguments().needs_teacher
    args = arguments(spread_weight=0.5)
    assert args.needs_teacher
    trainer = CaRotTrainer(tiny_clip(processor.tokenizer), args, suite=suite, processing_class=processor)
    assert trainer.teacher is not None
    trainer.train()
    assert "contrastive (softmax) + 0.5 x spread" in capsys.readouterr().out
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["contrastive"] + 0.5 * logged["spread"], rel=1e-5)
    assert logged["spread"] > 0


def test_a_metric(suite, processor, make_trainer, monkeypatch):
    """A row of the table: of each set, in the aggregates, with a temperature, for choosing a checkpoint."""
    monkeypatch.setitem(
        METRICS, "wrong", Metric("wrong", "lower", lambda seen: 1 - seen.bins.avg_accuracy, scaled=True)
    )
    logits, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
    found = calibration_metrics(logits, labels)
    assert found["wrong"] == pytest.approx(1 - found["accuracy"])
    model = tiny_clip(processor.tokenizer)
    metrics = Evaluator(model, processor, suite).evaluate().metrics
    for name in ("home", "far", "part", "id", "ood"):
        assert metrics[name]["wrong"] == metrics[name]["wrong_ts"] == pytest.approx(1 - metrics[name]["accuracy"])
    trainer = make_trainer(model, metric_for_best_model="eval_validation_wrong")
    assert trainer.args.greater_is_better is False
    assert trainer.evaluate()["eval_ood_wrong"] == metrics["ood"]["wrong"]


def test_a_set_of_the_imagenet_family(tmp_path, monkeypatch):
    """A row of the table: loaded by its name, from its id on the Hub or a local copy of it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(SETS, "toy", SetFacts("toy", "me/imagenet-toy", "webdataset", {"test": 12}))
    label = datasets.ClassLabel(names=[f"name {index}" for index in range(1000)])
    parquet(tmp_path / "imagenet", "train", np.repeat([0, 1], 10), feature=label)
    parquet(tmp_path / "imagenet", "validation", np.array([0, 1]), feature=label)
    tars(tmp_path / "imagenet-toy" / "test", np.arange(12))
    suite = load_suite(
        "imagenet", root=tmp_path, shifts=["toy"], check_counts=False, name_sources=["ClassLabel"], templates=["a {}."]
    )
    assert {name: len(data) for name, data in suite.shifts.items()} == {"toy": 12}
    assert [suite.shifts["toy"][index]["label"] for index in (0, 11)] == [0, 11]
    with pytest.raises(ValueError, match="toy"):
        load_suite("imagenet", root=tmp_path, shifts=["mini-imagenet"], check_counts=False)


def test_the_recipes_name_files_that_exist_and_no_more_than_three_each():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Recipes")[1].split("\n## ")[0]
    recipes = re.findall(r"^- \*\*(.+?)\*\*(.+?)(?=^- \*\*|\Z)", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in recipes] == [
        "A loss term.", "A set of the ImageNet family.", "A benchmark.", "A metric.", "A family of models.",
        "What a checkpoint holds.",
    ]  # fmt: skip
    for name, recipe in recipes:
        files = set(re.findall(r"`([\w/]+\.(?:py|json|yaml|md))`", recipe))
        assert 1 <= len([file for file in files if not file.startswith(("tests", "docs"))]) <= 3, name
        for file in files:
            assert (ROOT / file).is_file() or (ROOT / "carot_hf" / file).is_file(), file
