"""Evaluation, prediction, calibration: against a plain loop with transformers' processor and a slow ECE."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import reference_calibration as reference
import torch
from PIL import Image
from tolerances import EXACT, float32_bound
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import SequentialSampler
from toys import tiny_clip
from transformers import CLIPModel, CLIPProcessor, EarlyStoppingCallback, TrainerCallback, pipeline

from carot_hf import ShiftSet, fit_temperature, unbake_temperature
from carot_hf.calibration.metrics import METRICS, scaled_metrics
from carot_hf.data.captions import class_embeddings
from carot_hf.evaluation.evaluation import comparison_table, with_aggregates
from carot_hf.evaluation.logits import SetLogits
from carot_hf.evaluation.measure import measure

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
              "load_best_model_at_end": True}  # fmt: skip
# exp(logit_scale) of the tiny model is 14.3, its embeddings have 12 values; pixels and pipelines are float32.
BOUND = float32_bound(14.3, 12)


@torch.no_grad()
def slow_probabilities(model, processor, suite, data, temperature=1.0):
    """One image at a time, each class in each template, with nothing of ours; maximum over mapped columns."""
    model = model.eval()
    head = []
    for name in suite.class_names:
        captions = [template.replace("{}", name) for template in suite.templates]
        tokens = processor.tokenizer(captions, padding=True, return_tensors="pt")
        rows = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output.double(), dim=-1)
        head.append(torch.nn.functional.normalize(rows.mean(dim=0), dim=-1))
    probabilities, labels = [], []
    for index in range(len(data)):
        pixels = processor.image_processor(data[index]["image"], return_tensors="pt")["pixel_values"]
        features = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output[0].double(), dim=-1)
        logits = torch.stack(head) @ features * model.logit_scale.double().exp() / temperature
        if data.columns is not None:
            logits = torch.stack([logits[columns].max() for columns in data.columns])
        probabilities.append(logits.softmax(dim=-1).tolist())
        labels.append(data[index]["label"])
    return probabilities, labels


def slow_metrics(probabilities, labels):
    n = len(labels)
    hits = [row.index(max(row)) == label for row, label in zip(probabilities, labels, strict=True)]
    ece = reference.ece([max(row) for row in probabilities], hits, reference.uniform_inner_edges(10))
    pairs = list(zip(probabilities, labels, strict=True))
    brier = sum((p - (k == label)) ** 2 for row, label in pairs for k, p in enumerate(row))
    nll = -sum(math.log(row[label]) for row, label in pairs)
    return {"accuracy": sum(hits) / n, "ece": ece, "nll": nll / n, "brier": brier / n}


def test_every_set_equals_a_plain_loop(make_trainer, suite, processor):
    """Sizes are no multiples of the batch of 8, and training drops its last batch: evaluation must not."""
    trainer = make_trainer()
    metrics = trainer.evaluate()
    eces = {}
    for name, data in suite.evaluation_sets.items():
        expected = slow_metrics(*slow_probabilities(trainer.model, processor, suite, data))
        eces[name] = expected["ece"]
        for key, value in expected.items():
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(value, abs=BOUND), (name, key)
        assert {key for key in metrics if key.startswith(f"eval_{name}_")} >= {f"eval_{name}_{key}" for key in METRICS}
    assert metrics["eval_id_ece"] == metrics["eval_home_ece"]
    assert metrics["eval_ood_ece"] == pytest.approx((eces["far"] + eces["part"]) / 2, abs=BOUND)
    assert metrics["eval_far_ece_batch_mean"] == pytest.approx(metrics["eval_far_ece"])  # 17 rows are one batch


def test_temperature_columns_equal_a_plain_loop(make_trainer, suite, processor):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    temperature = metrics["eval_temperature"]
    assert temperature != pytest.approx(1.0, abs=0.05)
    for name in ("home", "far", "part"):
        rows = slow_probabilities(trainer.model, processor, suite, suite.evaluation_sets[name], temperature)
        expected = slow_metrics(*rows)
        assert metrics[f"eval_{name}_ece_ts"] == pytest.approx(expected["ece"], abs=BOUND)
        assert metrics[f"eval_{name}_nll_ts"] == pytest.approx(expected["nll"], abs=BOUND)
    assert "eval_validation_ece_ts" not in metrics  # it was fitted there
    assert trainer.bins.keys() == set(suite.evaluation_sets)
    assert trainer.bins["far"].ece == pytest.approx(metrics["eval_far_ece"])
    assert trainer.bins_ts["far"].ece == pytest.approx(metrics["eval_far_ece_ts"])


def test_names_of_one_set_a_name_and_a_dict(make_trainer, suite):
    trainer = make_trainer()
    everything = trainer.evaluate()
    one = trainer.evaluate(suite.shifts["far"])
    assert one["eval_accuracy"] == everything["eval_far_accuracy"]
    assert one["eval_nll"] == pytest.approx(everything["eval_far_nll"], abs=BOUND)
    assert not any("ood" in key for key in one)
    named = trainer.evaluate("far")
    assert named["eval_far_ece"] == pytest.approx(everything["eval_far_ece"], abs=BOUND)
    assert not any(key.startswith("eval_ood") for key in named)  # one shift is not the mean of all
    two = trainer.evaluate({"x": suite.test, "y": suite.shifts["part"]}, metric_key_prefix="check")
    assert two["check_x_nll"] == pytest.approx(everything["eval_home_nll"], abs=BOUND)
    assert two["check_y_nll"] == pytest.approx(everything["eval_part_nll"], abs=BOUND)
    with pytest.raises(ValueError, match=r"the name of a set of \['far', 'home', 'part', 'validation'\], got 'near'"):
        trainer.evaluate("near")


def test_persistent_workers_do_not_hand_the_loader_of_another_set(make_trainer, suite):
    plain = make_trainer().evaluate()
    trainer = make_trainer(dataloader_num_workers=1, dataloader_persistent_workers=True)
    for name in ("far", "home"):
        nll = trainer.evaluate(suite.evaluation_sets[name])["eval_nll"]
        assert nll == pytest.approx(plain[f"eval_{name}_nll"], abs=BOUND)


def test_predict_returns_logits_of_the_sets_labels(make_trainer, suite, processor):
    trainer = make_trainer()
    output = trainer.predict(suite.shifts["part"])
    probabilities, labels = slow_probabilities(trainer.model, processor, suite, suite.shifts["part"])
    assert output.predictions.shape == (11, 2)
    np.testing.assert_allclose(
        torch.tensor(output.predictions).softmax(-1).numpy(), np.array(probabilities), atol=BOUND
    )
    assert output.label_ids.tolist() == labels
    assert output.metrics["test_accuracy"] == trainer.evaluate("part")["eval_part_accuracy"]


def test_predict_takes_images_without_labels(make_trainer):
    trainer = make_trainer()
    rows = [{"image": Image.new("L", (20, 18), 9 * i)} for i in range(5)]
    output = trainer.predict(rows)
    assert output.predictions.shape == (5, 4)
    assert output.label_ids is None
    assert "test_accuracy" not in output.metrics
    labelled = trainer.predict([{**row, "label": 0} for row in rows])
    np.testing.assert_array_equal(labelled.predictions, output.predictions)
    with pytest.raises(ValueError, match="Expected labels in every set, got none"):
        trainer.evaluate(rows)


def test_own_metrics_get_the_logits_of_each_set(make_trainer, suite):
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"first": np.float32(prediction.predictions[0].argmax()), "n": len(prediction.label_ids)}

    trainer = make_trainer(trainer={"compute_metrics": compute_metrics})
    metrics = trainer.evaluate()
    assert shapes == [(15, 4), (19, 4), (17, 4), (11, 2)]
    assert metrics["eval_far_n"] == 17
    assert metrics["eval_ood_n"] == 14
    assert type(metrics["eval_home_first"]) is float
    assert trainer.predict(suite.test).metrics["test_n"] == 19
    assert trainer.compute_metrics is compute_metrics


def test_the_head_is_built_once_an_evaluation(make_trainer, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "carot_hf.evaluation.evaluator.class_embeddings", lambda *a, **k: calls.append(1) or class_embeddings(*a, **k)
    )
    make_trainer().evaluate()
    assert len(calls) == 1


def test_evaluating_the_teacher_equals_evaluating_a_student_with_its_weights(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    student, teacher = trainer.evaluate(), trainer.evaluate(teacher=True)
    assert student["eval_far_nll"] != teacher["eval_teacher_far_nll"]
    other = make_trainer()
    other.model.load_state_dict(trainer.teacher.state_dict())
    assert other.evaluate()["eval_far_nll"] == pytest.approx(teacher["eval_teacher_far_nll"], abs=BOUND)
    assert trainer.evaluate()["eval_far_nll"] == student["eval_far_nll"]  # the student is back
    with pytest.raises(ValueError, match="Expected a teacher to evaluate, got none"):
        make_trainer(preset="flyp").evaluate(teacher=True)


class Watch(TrainerCallback):
    def __init__(self):
        self.calls = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.calls.append(metrics)


def test_callbacks_see_all_metrics_once(make_trainer):
    watch = Watch()
    trainer = make_trainer(trainer={"callbacks": [watch]})
    metrics = trainer.evaluate()
    assert len(watch.calls) == 1
    assert watch.calls[0].keys() == metrics.keys()
    assert sum("eval_ood_ece" in entry for entry in trainer.state.log_history) == 1


def test_early_stopping_sees_the_aggregates(make_trainer):
    watch = Watch()
    callbacks = [EarlyStoppingCallback(early_stopping_patience=2), watch]
    options = {**EVERY_STEP, "metric_for_best_model": "eval_id_accuracy", "eval_sets": "all"}
    trainer = make_trainer(learning_rate=0.0, max_steps=6, trainer={"callbacks": callbacks}, **options)
    trainer.train()
    assert trainer.state.global_step == 3  # the first sets the mark, two without progress
    assert len(watch.calls) == 3


def test_best_model_is_loaded_student_and_teacher(make_trainer):
    """The learning rate wrecks the model, so the best one on validation is an early one."""
    trainer = make_trainer(learning_rate=0.5, max_steps=5, teacher_update_every=1, **EVERY_STEP)
    trainer.train()
    scores = {e["step"]: e["eval_validation_nll"] for e in trainer.state.log_history if "eval_validation_nll" in e}
    best = min(scores, key=scores.get)
    assert best < 5
    folder = Path(trainer.args.output_dir) / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(folder)
    assert trainer.evaluate()["eval_validation_nll"] == pytest.approx(scores[best], abs=BOUND)
    kept = make_trainer()
    kept.parts.load(folder)
    for name, value in kept.teacher.state_dict().items():
        assert torch.equal(value, trainer.teacher.state_dict()[name]), name


@pytest.mark.parametrize("metric", ["eval_far_accuracy", "part_ece", "eval_teacher_far_nll"])
def test_selection_on_a_shift_is_refused(make_trainer, metric):
    with pytest.raises(ValueError, match=r"spoils them as tests; use 'eval_validation_nll'"):
        make_trainer(metric_for_best_model=metric)


@pytest.mark.parametrize(
    "metric", ["eval_loss", "eval_id_eceee", "eval_teacher_id_accuracy", "eval_validation_ece_ts", "eval_"]
)
def test_selection_by_a_metric_that_does_not_exist_is_refused(make_trainer, metric):
    with pytest.raises(ValueError, match="there is no evaluation loss"):
        make_trainer(metric_for_best_model=metric)


def test_every_metric_that_may_be_selected_exists(make_trainer):
    metrics = make_trainer().evaluate()
    assert {key.removeprefix("eval_home_") for key in metrics if key.startswith("eval_home_")} == {
        *METRICS,
        *(f"{name}_ts" for name in scaled_metrics()),
        *(f"{score}_{name}" for score in ("lac", "aps") for name in ("coverage", "size")),
    }


def test_evaluating_during_training_changes_nothing(make_trainer):
    plain = make_trainer()
    plain.train()
    watched = make_trainer(eval_strategy="steps", eval_steps=1)
    watched.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


# ---- calibration ----


@pytest.mark.parametrize("criterion", ["nll", "ece"])
def test_calibrate_fits_on_validation_and_bakes(make_trainer, suite, processor, criterion):
    model = tiny_clip(processor.tokenizer, logit_scale_init_value=3.5)
    trainer = make_trainer(model, max_steps=40, learning_rate=1e-3, logging_steps=50, calibration_criterion=criterion)
    trainer.train()
    with torch.no_grad():
        model.logit_scale += 2.0  # over-confident
    before = trainer.evaluate()
    record = trainer.calibrate()
    after = trainer.evaluate()
    assert record["temperature"] == pytest.approx(before["eval_temperature"], rel=1e-5)
    assert 0.5 < record["temperature"] < 10
    assert (record["split"], record["n"], record["criterion"]) == ("validation", 15, criterion)
    assert record["templates"] == suite.templates
    assert record["nll_before"] == pytest.approx(before["eval_validation_nll"], abs=BOUND)
    assert record["nll_after"] == pytest.approx(after["eval_validation_nll"], abs=BOUND)
    assert record[f"{criterion}_after"] < record[f"{criterion}_before"]
    for name in ("home", "far", "part", "id", "ood"):
        assert after[f"eval_{name}_ece"] == pytest.approx(before[f"eval_{name}_ece_ts"], abs=BOUND)
        assert after[f"eval_{name}_accuracy"] == before[f"eval_{name}_accuracy"]
    if criterion == "nll":
        assert after["eval_temperature"] == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(RuntimeError, match="unbake_temperature"):
        trainer.calibrate()
    unbake_temperature(trainer.model)
    assert trainer.calibrate()["temperature"] == pytest.approx(record["temperature"], rel=1e-6)


def test_training_on_drops_the_record_of_the_temperature(make_trainer):
    trainer = make_trainer()
    trainer.calibrate()
    trainer.train()
    assert getattr(trainer.model.config, "calibration", None) is None
    trainer.calibrate()


def test_saved_folder_gives_our_probabilities_in_the_stock_pipeline(make_trainer, suite):
    one = dataclasses.replace(suite, templates=["This is a photo of {}."])
    trainer = make_trainer(suite=one, max_steps=2)
    trainer.train()
    trainer.calibrate()
    trainer.save_model()
    folder = trainer.args.output_dir
    ours = torch.tensor(trainer.predict(suite.shifts["far"]).predictions).softmax(dim=-1)
    classify = pipeline("zero-shot-image-classification", model=folder, device="cpu")
    for index in range(len(suite.shifts["far"])):
        answer = classify(
            suite.shifts["far"][index]["image"],
            candidate_labels=suite.class_names,
            hypothesis_template="This is a photo of {}.",
        )
        theirs = {row["label"]: row["score"] for row in answer}
        for column, name in enumerate(suite.class_names):
            assert theirs[name] == pytest.approx(ours[index, column].item(), abs=BOUND)
    loaded = CLIPModel.from_pretrained(folder)
    assert loaded.config.calibration["temperature"] == trainer.model.config.calibration["temperature"]
    assert CLIPProcessor.from_pretrained(folder).tokenizer.vocab_size > 0


# ---- pure parts ----


def test_aggregates_are_unweighted_and_need_every_shift(suite):
    values = {"home": {"ece": 0.1}, "far": {"ece": 0.2, "own": 1.0}, "part": {"ece": 0.6}}
    result = with_aggregates(values, suite)
    assert result["id"] == {"ece": 0.1}
    assert result["ood"] == {"ece": pytest.approx(0.4)}
    assert "ood" not in with_aggregates({"far": {"ece": 0.2}}, suite)


def test_table_is_markdown():
    text = comparison_table({"a": {"x": 0.12345}, "bb": {"y": 1.0}}, [("X", "x"), ("Y", "y")])
    assert text.splitlines() == [
        "|    | X     | Y     |",
        "|----|-------|-------|",
        "| a  | 0.123 |       |",
        "| bb |       | 1.000 |",
    ]


def test_evaluation_order_is_the_sets_order(make_trainer, suite):
    loader = make_trainer().get_eval_dataloader(suite.test)
    assert isinstance(loader.batch_sampler.sampler, SequentialSampler)
    assert sum(len(batch["labels"]) for batch in loader) == 19


def test_plain_hub_like_data_can_be_evaluated(make_trainer, suite):
    trainer = make_trainer()
    rows = [{"image": Image.new("RGB", (20, 18), (9 * i, 0, 0)), "label": i % 4} for i in range(5)]
    assert 0 <= trainer.evaluate(rows)["eval_accuracy"] <= 1
    assert trainer.predict(rows).predictions.shape == (5, 4)


# ---- logits by rows ----


class LargestTensor(TorchDispatchMode):
    """Remembers the number of values of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return result


def test_metrics_and_temperature_never_hold_the_whole_matrix():
    """4,000 rows of 1,000 classes: the matrix has 4 million values; embeddings have 32,000, a chunk 131,072."""
    generator = torch.Generator().manual_seed(0)
    double = {"generator": generator, "dtype": torch.float64}
    embeds = torch.nn.functional.normalize(torch.randn(4000, 8, **double), dim=-1)
    head = (4 * torch.randn(1000, 8, **double), torch.randn(1000, **double))
    whole = embeds @ head[0].T + head[1]
    labels = torch.multinomial((whole / 2).softmax(1), 1, generator=generator)[:, 0]
    data = ShiftSet([0] * 4000, name="far", num_classes=1000)
    options = {"n_bins": 10, "link": "softmax", "scalings": {"ts": lambda: {"temperature": 1.7}}}
    expected = measure(whole, labels, **options).metrics
    fitted = {name: fit_temperature(whole, labels, criterion=name) for name in ("nll", "ece")}
    with LargestTensor() as largest:
        rows = SetLogits(embeds, head, data)
        measured = measure(rows, labels, **options)
        temperatures = {name: fit_temperature(rows, labels, criterion=name) for name in fitted}
    assert largest.values <= 131_072
    assert measured.metrics == pytest.approx(expected, rel=EXACT)
    assert temperatures == pytest.approx(fitted, rel=EXACT)
    assert measured.bins.n == measured.scaled_bins["ts"].n == 4000


def test_columns_are_taken_row_by_row_as_from_the_whole_matrix():
    generator = torch.Generator().manual_seed(1)
    embeds, weight = torch.randn(50, 4, generator=generator), torch.randn(6, 4, generator=generator)
    data = ShiftSet([0] * 50, name="far", num_classes=6, columns=[[1], [0, 5], [2, 3, 4]])
    rows = SetLogits(embeds, (weight, torch.arange(6.0)), data)
    whole = embeds @ weight.T + torch.arange(6.0)
    expected = torch.stack([whole[:, 1], whole[:, [0, 5]].amax(1), whole[:, 2:5].amax(1)], dim=1)
    assert rows.shape == (50, 3)
    torch.testing.assert_close(rows[10:20], expected[10:20])
