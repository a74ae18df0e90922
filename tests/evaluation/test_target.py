"""Calibrated for images without labels: the confidence meets the estimate, and what was fitted on is no evidence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from families import model_of, processor_of
from toys import Noise, noise_set, tiny_clip

import carot_hf
from carot_hf import DensityCalibrator, Evaluator, calibration_metrics, estimate_accuracy, unbake_temperature
from carot_hf.calibration.metrics import top_label
from carot_hf.calibration.target import fit_to_accuracy, mean_confidence, offset_to_accuracy
from carot_hf.data.sample_hash import sample_hash
from carot_hf.data.shift_set import ShiftSet


def rows(seed=0, size=300, classes=5, dtype=torch.float64):
    return 3 * torch.randn(size, classes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unlabelled(data):
    """The same images as a set without labels."""
    images = [{"image": data[row]["image"]} for row in range(len(data))]
    return ShiftSet(images, name="target", num_classes=4, label_column=None)


@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.85, 0.97])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_mean_confidence_is_the_accuracy(accuracy, dtype):
    logits = rows(dtype=dtype)
    found = fit_to_accuracy(logits, accuracy, {"temperature": 1.0}, link="softmax", bounds=(0.01, 100.0))
    assert float((logits / found["temperature"]).softmax(1).amax(1).mean()) == pytest.approx(accuracy, abs=1e-6)
    home = {"temperature": 2.0, "bias": -1.5}
    found = fit_to_accuracy(logits, accuracy, home, link="sigmoid", bounds=(0.05, 20.0))
    assert found["temperature"] == 2.0
    assert float((logits / 2.0 + found["bias"]).sigmoid().amax(1).mean()) == pytest.approx(accuracy, abs=1e-6)


def test_what_is_out_of_reach_is_the_nearer_bound():
    logits = rows()
    bounds = (0.5, 10.0)
    assert fit_to_accuracy(logits, 1.0, {}, link="softmax", bounds=bounds) == {"temperature": 0.5}
    assert fit_to_accuracy(logits, 0.0, {}, link="softmax", bounds=bounds)["temperature"] == pytest.approx(10.0)
    with pytest.raises(ValueError, match=r"Expected `accuracy` in \[0, 1\], got 1.2"):
        fit_to_accuracy(logits, 1.2, {}, link="softmax", bounds=bounds)


def test_the_offset_of_a_density_alone_moves():
    logits, embeds = rows(), torch.nn.functional.normalize(rows(1, classes=8), dim=1)
    made = DensityCalibrator(embeds[:20].half(), 3, -1.0, 0.5, 0.1, 0.4)
    found = offset_to_accuracy(made, logits, embeds, 0.7)
    assert {**found.numbers, "a": 0.1} == made.numbers
    divided = logits / found.temperature(embeds)[:, None]
    assert float(divided.softmax(1).amax(1).mean()) == pytest.approx(0.7, abs=1e-6)
    assert mean_confidence(divided, {}, "softmax") == pytest.approx(0.7, abs=1e-6)
    with pytest.raises(ValueError, match="got one of the sigmoid"):
        offset_to_accuracy(dataclasses.replace(made, link="sigmoid"), logits, embeds, 0.7)


def test_calibrated_for_a_target(suite, processor):
    """Weights and calibrator both meet the estimate, which is that of the density's confidences by other code."""
    evaluator = Evaluator(tiny_clip(processor.tokenizer, logit_scale_init_value=3.5), processor, suite)
    twin = Evaluator(tiny_clip(processor.tokenizer, logit_scale_init_value=3.5), processor, suite)
    target = unlabelled(suite.shifts["far"])
    record = evaluator.calibrate("target", target)
    twin.calibrate("density")

    def confidences(of, data):
        logits, labels = of.predict(data)
        divisors = of.calibrator.temperature(of.embed({"": data})[""][0])[:, None]
        return top_label(logits / divisors, torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels)

    held = confidences(twin, suite.validation)
    expected = estimate_accuracy(*held, confidences(twin, target)[0], method="atc")
    assert record["target"] == {"hash": sample_hash(target), "n": 17, "accuracy": expected}
    assert record["method"] == "target"
    assert record["per_image"]
    low, high = record["bounds"]
    plain = float(evaluator.predict(target)[0].softmax(1).amax(1).mean())
    if low < record["temperature"] < high:
        assert plain == pytest.approx(expected, abs=1e-4)
    assert float(confidences(evaluator, target)[0].mean()) == pytest.approx(expected, abs=1e-4)
    found = evaluator.evaluate()
    logits, labels = evaluator.predict(suite.shifts["part"])
    divisors = evaluator.calibrator.temperature(evaluator.embed({"": suite.shifts["part"]})[""][0])[:, None]
    assert found.metrics["part"]["nll_dts"] == pytest.approx(
        calibration_metrics(logits / divisors, labels)["nll"], rel=1e-5
    )


def test_a_labelled_set_of_the_target_is_no_evidence(suite, processor):
    evaluator = Evaluator(tiny_clip(processor.tokenizer), processor, suite)
    before = evaluator.evaluate()
    assert before.marks == {}
    evaluator.calibrate("target", unlabelled(suite.shifts["far"]))
    found = evaluator.evaluate()
    assert found.marks == {"far": "target"}
    assert "far (target)" in found.table()
    assert found.metrics["ood"]["nll"] == found.metrics["part"]["nll"]
    assert found.comparison.marks == {"far": "target"}
    unbake_temperature(evaluator.model)
    again = evaluator.evaluate()
    assert again.marks == {}
    assert "nll_dts" not in again.metrics["part"], "the calibrator went with the temperature"


def test_what_is_asked_for_is_checked_before_any_work(suite, processor, monkeypatch):
    evaluator = Evaluator(tiny_clip(processor.tokenizer), processor, suite)
    monkeypatch.setattr(evaluator, "embed", lambda *args: pytest.fail("images were embedded"))
    with pytest.raises(ValueError, match="Expected `images` with the method 'target' and with no other, got none"):
        evaluator.calibrate("target")
    with pytest.raises(ValueError, match="got some with 'density'"):
        evaluator.calibrate("density", suite.shifts["far"])
    with pytest.raises(ValueError, match="Expected the method to be one of"):
        evaluator.calibrate("platt")


def test_siglip_gets_a_bias(suite):
    processor = processor_of("siglip2")
    evaluator = Evaluator(model_of("siglip2", processor.tokenizer), processor, suite)
    record = evaluator.calibrate("target", unlabelled(suite.shifts["far"]))
    assert evaluator.calibrator is None
    assert "per_image" not in record
    logits, _ = evaluator.predict(suite.shifts["far"])
    assert float(logits.sigmoid().amax(1).mean()) == pytest.approx(record["target"]["accuracy"], abs=1e-4)


def test_saved_and_served(make_trainer, suite, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.evaluate()
    record = trainer.calibrate("target", images=[{"image": suite.shifts["far"][row]["image"]} for row in range(17)])
    assert record["target"]["hash"] == sample_hash(suite.shifts["far"])
    trainer.save_model(str(tmp_path / "saved"))
    classify = carot_hf.pipeline(tmp_path / "saved")
    assert classify.calibrator.numbers == pytest.approx(trainer.calibrator.numbers)
    assert trainer.evaluate()["eval_ood_nll"] == pytest.approx(trainer.evaluate()["eval_part_nll"])


def test_the_hash_knows_images_and_not_labels():
    data = noise_set("far", 17, 3)
    assert sample_hash(data) == sample_hash(unlabelled(data))
    assert sample_hash(data) != sample_hash(noise_set("far", 17, 4))
    assert sample_hash(data) != sample_hash(data.subset(np.arange(16), "far"))
    many = Noise(200, 0)
    one = ShiftSet(many, name="a", num_classes=4, labels=many.labels)
    assert len(sample_hash(one)) == 64


# ---- conformal sets ----


@pytest.mark.parametrize("method", ["temperature", "density"])
def test_sets_of_a_calibrated_model(suite, processor, method):
    """Thresholds of the record, coverage and size of the evaluation, and the sets, by a plain loop."""
    evaluator = Evaluator(tiny_clip(processor.tokenizer), processor, suite, method=method, alpha=0.2)
    found = evaluator.evaluate()
    record = evaluator.calibrate()

    def probabilities(data):
        logits, labels = evaluator.predict(data)
        if method == "density":
            logits = logits / evaluator.calibrator.temperature(evaluator.embed({"": data})[""][0])[:, None]
        return logits.double().softmax(1), labels

    held, labels = probabilities(suite.validation)
    scores = (1 - held[torch.arange(15), labels]).sort()[0]
    assert record["conformal"]["lac"]["threshold"] == pytest.approx(float(scores[13 - 1]), abs=1e-6)  # of 16 * .8
    far, answers = probabilities(suite.shifts["far"])
    inside = 1 - far <= record["conformal"]["lac"]["threshold"] + 1e-9
    assert (evaluator.sets(suite.shifts["far"], "lac") == inside.numpy()).all()
    coverage = float(inside[torch.arange(17), answers].double().mean())
    assert found.metrics["far"]["lac_coverage"] == pytest.approx(coverage, abs=1e-9)
    assert found.metrics["far"]["lac_size"] == pytest.approx(float(inside.sum(1).double().mean()), abs=1e-9)
    widest = evaluator.sets(unlabelled(suite.shifts["far"]))
    assert widest.any(1).all()
    assert found.metrics["far"]["aps_size"] == pytest.approx(widest.sum(1).mean(), abs=1e-9)


def test_sets_need_a_calibration_with_enough_rows(suite, processor, caplog):
    evaluator = Evaluator(tiny_clip(processor.tokenizer), processor, suite, alpha=0.05)
    with pytest.raises(RuntimeError, match=r"Expected a model with conformal sets, but it is not calibrated"):
        evaluator.sets(suite.shifts["far"])
    assert "lac_size" not in evaluator.evaluate().metrics["far"]
    assert caplog.text.count("Expected at least 19 rows for alpha=0.05, got 15") == 1
    evaluator.calibrate()
    with pytest.raises(RuntimeError, match="too few images were held out"):
        evaluator.sets(suite.shifts["far"])
    with pytest.raises(ValueError, match="Expected `score` to be one of"):
        evaluator.sets(suite.shifts["far"], "raps")
    with pytest.raises(ValueError, match="Expected `alpha` between 0 and 1, got 1"):
        Evaluator(tiny_clip(processor.tokenizer), processor, suite, alpha=1)
