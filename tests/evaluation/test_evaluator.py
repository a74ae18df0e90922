"""Evaluator and Evaluation: what a trainer measures, without one; each set's logits read once."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from families import model_of, processor_of
from scipy.stats import binomtest
from tolerances import EXACT
from toys import ROOT, Noise, noise_suite, tiny_clip

from carot_hf import CLIPClassifier, Evaluator, ShiftSet, calibration_metrics, unbake_temperature
from carot_hf.ece.binning import calibration_bins
from carot_hf.evaluation.intervals import accuracy_interval
from carot_hf.evaluation.logits import SetLogits
from carot_hf.evaluation.predictor import Predictor
from carot_hf.models.prepare import captions_of, zero_shot_classifier

TIMES = ("runtime", "per_second", "epoch")


@pytest.fixture
def evaluator(suite, processor):
    return Evaluator(tiny_clip(processor.tokenizer), processor, suite, batch_size=8)


def test_it_measures_what_a_trainer_measures(evaluator, make_trainer, processor):
    trainer = make_trainer(tiny_clip(processor.tokenizer))
    expected = {name: value for name, value in trainer.evaluate().items() if not name.endswith(TIMES)}
    found = evaluator.evaluate()
    assert found.flat() == expected
    assert found.bins.keys() == trainer.bins.keys()
    assert found.bins_ts.keys() == trainer.bins_ts.keys() == found.bins.keys() - {"validation"}
    assert found.sizes == {"validation": 15, "home": 19, "far": 17, "part": 11}
    assert evaluator.calibrate() == trainer.calibrate()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_row_depends_on_no_batch(suite, processor, evaluator, batch_size):
    other = Evaluator(tiny_clip(processor.tokenizer), processor, suite, batch_size=batch_size)
    found, expected = other.evaluate().metrics, evaluator.evaluate().metrics
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-6, nan_ok=True), name


def test_the_model_sees_batches_of_one_shape(evaluator, monkeypatch):
    """Kernels are chosen by shape: with another one a row would differ in its last bits by what stands beside it."""
    seen, original = [], evaluator.model.get_image_features

    def counted(**inputs):
        seen.append(len(inputs["pixel_values"]))
        return original(**inputs)

    monkeypatch.setattr(evaluator.model, "get_image_features", counted)
    together = evaluator.embed(evaluator.suite.evaluation_sets)["part"][0]
    alone = evaluator.embed({"part": evaluator.suite.shifts["part"]})["part"][0]
    assert set(seen) == {8}
    assert torch.equal(alone, together)


def test_the_logits_of_a_set_are_read_once(evaluator, monkeypatch):
    read, original = {}, SetLogits.__getitem__

    def counted(self, rows):
        found = original(self, rows)
        read[self._data.name] = read.get(self._data.name, 0) + len(found)
        return found

    monkeypatch.setattr(SetLogits, "__getitem__", counted)
    evaluator.evaluate(["home", "far", "part"])
    assert read == {"home": 19, "far": 17, "part": 11}
    read.clear()
    evaluator.evaluate()
    assert read == {"home": 19, "far": 17, "part": 11, "validation": 3 * 15}  # temperature, sets
    evaluator.calibrate()
    read.clear()
    evaluator.evaluate(["home", "far"])  # now without the temperature as well
    assert read == {"home": 19, "far": 17}


def test_a_calibrator_that_is_given_takes_the_place_of_the_fitted_one(evaluator, suite):
    found = evaluator.evaluate(calibrator=1.7)
    assert found.scaling == {"temperature": 1.7}
    logits, labels = evaluator.predict(suite.shifts["far"])
    expected = calibration_metrics(logits, labels, temperature=1.7)
    for name in ("ece", "nll"):
        assert found.metrics["far"][f"{name}_ts"] == pytest.approx(expected[name], abs=1e-6)
    assert evaluator.evaluate(["far"]).scaling == {}
    assert "ece_ts" not in evaluator.evaluate(["far"]).metrics["far"]


def test_logits_and_metrics_are_those_of_the_stock_model(suite, processor):
    model = tiny_clip(processor.tokenizer).double()
    evaluator = Evaluator(model, processor, suite)
    logits, labels = evaluator.predict(suite.test)
    images = [suite.test[index]["image"] for index in range(len(suite.test))]
    texts = [[template.format(name) for template in suite.templates] for name in suite.class_names]
    with torch.no_grad():
        pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"].double()
        image = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        rows = []
        for captions in texts:
            tokens = processor.tokenizer(captions, padding=True, return_tensors="pt")
            text = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            rows.append(torch.nn.functional.normalize(text.mean(dim=0), dim=-1))
        expected = model.logit_scale.exp() * image @ torch.stack(rows).T
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)  # pixels are float32
    found = evaluator.evaluate(["home"]).metrics["home"]
    assert found == pytest.approx(calibration_metrics(logits, labels), abs=EXACT)


def test_classifiers_and_sigmoids(suite, processor):
    model = tiny_clip(processor.tokenizer)
    classifier = zero_shot_classifier(model, suite, captions_of(model, suite, processor))
    assert isinstance(classifier, CLIPClassifier)
    found, expected = (Evaluator(one, processor, suite).evaluate().metrics["far"] for one in (classifier, model))
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
    sigmoid = processor_of("siglip2")
    evaluator = Evaluator(model_of("siglip2", sigmoid.tokenizer), sigmoid, suite)
    assert evaluator.link == "sigmoid"
    scaling = evaluator.evaluate().scaling
    assert set(scaling) == {"temperature", "bias"}
    record = evaluator.calibrate()
    assert {name: record[name] for name in scaling} == scaling


def test_a_calibrated_model_is_compared_with_itself_without_the_temperature(evaluator):
    before = evaluator.evaluate()
    evaluator.calibrate()
    after = evaluator.evaluate()
    assert after.metrics["far"]["nll"] == pytest.approx(before.metrics["far"]["nll_ts"], abs=1e-6)
    assert after.comparison.metrics["far_nll"] == pytest.approx(before.metrics["far"]["nll"], abs=1e-6)
    assert after.comparison.metrics["far_nll_ts"] == pytest.approx(before.metrics["far"]["nll_ts"], abs=1e-6)
    assert after.comparison.temperature == before.scaling["temperature"]
    with pytest.raises(RuntimeError, match="Expected a model without a baked temperature"):
        evaluator.calibrate()
    unbake_temperature(evaluator.model)
    assert evaluator.evaluate().metrics["far"]["nll"] == before.metrics["far"]["nll"]


def test_half_precision_is_measured_and_its_calibration_refused_before_any_work(suite, processor, monkeypatch):
    expected = Evaluator(tiny_clip(processor.tokenizer), processor, suite).evaluate(["far"]).metrics["far"]["nll"]
    evaluator = Evaluator(tiny_clip(processor.tokenizer).bfloat16(), processor, suite)
    assert evaluator.evaluate(["far"]).metrics["far"]["nll"] == pytest.approx(expected, rel=0.02)
    monkeypatch.setattr(evaluator.embedder, "embed", lambda *args: pytest.fail("images were embedded"))
    with pytest.raises(ValueError, match=r"Expected a float32 parameter .* got torch.bfloat16"):
        evaluator.calibrate()


def test_intervals_hold_what_was_measured(evaluator):
    found = evaluator.evaluate(n_bootstrap=200)
    assert found.intervals.keys() == {"validation", "home", "far", "part"}
    for name, intervals in found.intervals.items():
        for metric, (low, high) in intervals.items():
            assert 0 <= low <= found.metrics[name][metric] <= high <= 1, (name, metric)
    assert evaluator.evaluate(n_bootstrap=0).intervals == {}
    assert evaluator.evaluate().intervals.keys() == found.intervals.keys()


@pytest.mark.parametrize(("hits", "rows"), [(0, 10), (3, 10), (10, 10), (837, 1000)])
def test_the_interval_of_an_accuracy_is_wilsons(hits, rows):
    expected = binomtest(hits, rows).proportion_ci(method="wilson")
    assert accuracy_interval(hits, rows) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_what_it_says_as_json_and_as_a_table(evaluator):
    found = evaluator.evaluate(n_bootstrap=50)
    content = json.loads(found.to_json(), parse_constant=lambda text: pytest.fail(text))
    assert content["metrics"]["far"]["ece"] == found.metrics["far"]["ece"]
    assert content["scaling"] == found.scaling
    assert content["bins"]["far"]["count"] == np.asarray(found.bins["far"].count).tolist()
    lines = found.table().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["validation", "home", "far", "part", "id", "ood"]
    assert f"{found.metrics['far']['ece_ts']:.3f}" in lines[4]
    right = evaluator.evaluate({"one": ShiftSet(Noise(1, 0), name="one", num_classes=4)})
    assert math.isnan(right.metrics["one"]["auroc"])
    assert json.loads(right.to_json())["metrics"]["one"]["auroc"] is None


def test_bad_sets_are_refused(evaluator):
    with pytest.raises(ValueError, match=r"Expected the name of a set of \['far', .*\], got 'near'"):
        evaluator.evaluate(["far", "near"])
    rows = ShiftSet([{"image": Noise(1, 0)[0]["image"]}], name="bare", num_classes=4, label_column=None)
    with pytest.raises(ValueError, match=r"Expected labels in every set, got none in \['bare'\]"):
        evaluator.evaluate({"bare": rows})
    assert evaluator.predict(rows)[1] is None
    with pytest.raises(TypeError, match="Expected a transformers model"):
        Evaluator(torch.nn.Linear(2, 2), evaluator.processor, evaluator.suite)


def test_bins_are_those_of_the_confidences(evaluator, suite):
    logits, labels = evaluator.predict(suite.shifts["far"])
    confidences, predicted = logits.softmax(dim=1).max(dim=1)
    expected = calibration_bins(confidences.numpy(), (predicted == labels).numpy(), 10)
    found = evaluator.evaluate(["far"]).bins["far"]
    assert found.count.tolist() == expected.count.tolist()
    assert found.ece == pytest.approx(expected.ece, abs=1e-6)


def test_no_script_that_only_evaluates_makes_a_trainer():
    text = (ROOT / "carot_hf" / "cli" / "interpolate.py").read_text(encoding="utf-8")
    assert "CaRotTrainer" not in text
    assert "Evaluator" in text


def test_the_model_stays_as_it_is(processor):
    model = tiny_clip(processor.tokenizer).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Evaluator(model, processor, noise_suite()).evaluate()
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batches_are_those_of_the_device_unless_somebody_says_it(suite, processor):
    model = tiny_clip(processor.tokenizer)
    assert Evaluator(model, processor, suite).embedder.batch_size == 32
    assert Evaluator(model, processor, suite, batch_size=5).embedder.batch_size == 5
    sizes = [Predictor(model, processor, ["cat", "dog"], ["{}"], batch_size=n)._embedder.batch_size for n in (None, 6)]
    assert sizes == [32, 6]
    with pytest.raises(ValueError, match="batch_size"):
        Evaluator(model, processor, suite, batch_size=0).evaluate(["far"])
