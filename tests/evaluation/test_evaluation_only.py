"""Suites that are only evaluated: measured as with all sets but for what a validation set is needed for."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from toys import noise_set, tiny_clip

from carot_hf import CaRotTrainer, CaRotTrainingArguments, Evaluator, ShiftSuite, calibration_metrics
from carot_hf.data.survey import say_warnings, survey

FITTED = ("_ts", "_pts", "_dts", "_coverage", "_size")


@pytest.fixture
def bare(suite):
    """The suite without what is trained and calibrated on."""
    return dataclasses.replace(suite, train=None, validation=None)


def evaluator_of(processor, suite, **options):
    return Evaluator(tiny_clip(processor.tokenizer), processor, suite, batch_size=8, **options)


def no_work(monkeypatch, evaluator):
    """Whatever embeds from now on fails the test."""

    def embeds(*args, **kwargs):
        raise AssertionError("an image was embedded")

    monkeypatch.setattr(evaluator.embedder, "embed", embeds)


@pytest.mark.parametrize("method", ["temperature", "perturbed", "density"])
def test_it_measures_what_it_measures_with_all_sets(suite, bare, processor, method):
    found = evaluator_of(processor, bare, method=method).evaluate()
    whole = evaluator_of(processor, suite, method=method).evaluate()
    names = ["home", "far", "part", "id", "ood"]
    assert list(found.metrics) == names
    for name in names:
        plain = {key: value for key, value in whole.metrics[name].items() if not key.endswith(FITTED)}
        assert found.metrics[name] == pytest.approx(plain, abs=0, nan_ok=True)
    assert (found.scaling, found.bins_ts, found.bins_pts, found.bins_dts) == ({}, {}, {}, {})
    assert found.comparison.temperature is None
    assert found.intervals["far"].keys() == {"accuracy", "ece"}
    header = found.table().splitlines()[0]
    assert "ECE" in header
    assert " T" not in header
    assert found.flat().keys() == {f"eval_{name}_{key}" for name in names for key in found.metrics[name]}


def test_its_figures_are_those_of_the_logits(bare, processor):
    evaluator = evaluator_of(processor, bare)
    found = evaluator.evaluate().metrics
    for name in ("home", "far"):
        expected = calibration_metrics(*evaluator.predict(bare.evaluation_sets[name]))
        assert found[name] == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert found["ood"]["accuracy"] == pytest.approx((found["far"]["accuracy"] + found["part"]["accuracy"]) / 2)


def test_a_calibrated_model_is_measured_with_what_is_in_it(suite, bare, processor):
    whole = evaluator_of(processor, suite)
    before = whole.evaluate().metrics["far"]
    whole.calibrate("density")
    other = Evaluator(whole.model, processor, bare, batch_size=8)
    found, expected = (one.evaluate(calibrator=whole.calibrator) for one in (other, whole))
    assert found.metrics["far"] == {
        key: value for key, value in expected.metrics["far"].items() if not key.endswith(("_coverage", "_size"))
    }
    assert {"nll_dts", "ece_dts"} < found.metrics["far"].keys()
    assert found.comparison.metrics["far_nll"] == pytest.approx(before["nll"], abs=1e-6)
    assert other.sets(bare.shifts["far"]).shape == (17, 4)  # by the record; no validation set is asked


def test_a_held_out_set_that_is_passed_is_fitted_on(suite, bare, processor):
    sets = {"validation": suite.validation, "far": suite.shifts["far"]}
    found, expected = (evaluator_of(processor, one).evaluate(sets) for one in (bare, suite))
    assert found.scaling == expected.scaling != {}
    assert found.metrics["far"] == expected.metrics["far"]
    with pytest.raises(ValueError, match="Expected a validation set to calibrate on, got a suite without one"):
        evaluator_of(processor, bare, method="perturbed").evaluate(sets)


# ---- what needs a set is refused before any work ----


@pytest.mark.parametrize("method", ["temperature", "perturbed", "density", "target"])
def test_nothing_is_calibrated_without_a_validation_set(suite, bare, processor, monkeypatch, method):
    evaluator = evaluator_of(processor, bare)
    no_work(monkeypatch, evaluator)
    images = suite.shifts["far"] if method == "target" else None
    said = r"Expected a validation set to calibrate on, got a suite without one.* Add it: `validation: 0\.1`"
    with pytest.raises(ValueError, match=said):
        evaluator.calibrate(method, images)
    with pytest.raises(ValueError, match=said):
        evaluator.estimate(suite.shifts["far"])
    assert getattr(evaluator.model.config, "calibration", None) is None


def test_a_density_needs_images_of_the_training(suite, processor, monkeypatch):
    untrained = dataclasses.replace(suite, train=None)
    evaluator = evaluator_of(processor, untrained, method="density")
    given = evaluator_of(processor, untrained, method="density", train=suite.train)
    expected = evaluator_of(processor, suite, method="density").evaluate()
    assert given.evaluate().metrics["far"] == expected.metrics["far"]
    no_work(monkeypatch, evaluator)
    said = r"that can be read by index for the method 'density', got none\. Add one to the suite, or use 'perturbed'"
    with pytest.raises(ValueError, match=said):
        evaluator.calibrate()
    with pytest.raises(ValueError, match=said):
        evaluator.evaluate()
    found = evaluator_of(processor, untrained)
    record = found.calibrate()
    assert record["temperature"] == expected.scaling["temperature"]


class Untouchable:
    """A model that nobody looks at."""

    def __getattr__(self, name):
        raise AssertionError(f"the model was asked for {name}")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (("train", "validation"), r"Expected a training set to train on, got .*a folder train/"),
        (("train",), r"Expected a training set to train on, got a suite without one.* Add it: `train` in the YAML"),
        (("validation",), r"Expected a validation set to fit a temperature .*, got .*Add it: `validation: 0\.1`"),
    ],
)
def test_a_trainer_refuses_before_it_looks_at_the_model(suite, processor, tmp_path, missing, said):
    args = CaRotTrainingArguments.from_preset("carot", output_dir=str(tmp_path / "run"), use_cpu=True)
    part = dataclasses.replace(suite, **dict.fromkeys(missing))
    with pytest.raises(ValueError, match=said):
        CaRotTrainer(model=Untouchable(), args=args, suite=part, processing_class=processor)
    with pytest.raises(ValueError, match=said):
        CaRotTrainer(model=Untouchable(), args=args, suite=part, processing_class=processor, train_dataset=None)
    assert not (tmp_path / "run").exists()


def test_a_training_set_of_its_own_stands_in(suite, make_trainer):
    trainer = make_trainer(
        suite=dataclasses.replace(suite, train=None), trainer={"train_dataset": suite.train}, max_steps=1
    )
    trainer.train()
    assert trainer.training_set() is suite.train
    assert "eval_far_ece_ts" in trainer.evaluate()


# ---- what is known of such a suite ----


def test_its_hash_says_that_the_sets_are_not_there(suite, bare):
    def facts(data):
        labels = b"".join(int(label).to_bytes(8, "little") for label in data.labels)
        shape = f"({len(data)},)".encode()
        return {"name": data.name, "size": len(data), "columns": data.columns, "captions": False, "exif": True,
                "crop_border": 0, "content": None, "labels": hashlib.sha256(shape + labels).hexdigest()}  # fmt: skip

    written = {
        "class_names": bare.class_names,
        "templates": bare.templates,
        "datasets": [],
        "splits": {"train": None, "validation": None, "test": facts(bare.test)},
        "shifts": {name: facts(data) for name, data in bare.shifts.items()},
    }
    text = json.dumps(written, sort_keys=True, separators=(",", ":"))
    assert bare.content_hash == hashlib.sha256(text.encode()).hexdigest()
    hashes = {dataclasses.replace(suite, **{role: None}).content_hash for role in ("train", "validation")}
    assert len(hashes | {suite.content_hash, bare.content_hash}) == 4


def test_its_survey(bare, caplog):
    assert survey(bare).table().splitlines()[:2] == ["images  home  far  part", "zero       5    5     ?"]
    shared = dataclasses.replace(bare, shifts={"far": bare.test})
    say_warnings(shared)
    assert "19 of the 19 images of set 'far' are in 'home', too." in caplog.text


def test_a_test_set_there_must_be(suite):
    with pytest.raises(TypeError, match=r"Expected a ShiftSet or rows as 'test', got NoneType"):
        dataclasses.replace(suite, test=None)
    with pytest.raises(ValueError, match=r"Expected 4 class names \(set 'home' has so many classes\), got 3"):
        dataclasses.replace(suite, train=None, validation=None, shifts={}, class_names=["a", "b", "c"])


def test_sets_that_are_there_are_still_checked(suite):
    with pytest.raises(ValueError, match=r"Expected set 'held' to be labelled with the training classes, got `col"):
        dataclasses.replace(suite, train=None, validation=noise_set("held", 5, 1, columns=[[0], [1, 2, 3]]))
    made = ShiftSuite("rows", suite.class_names, suite.templates, None, None, suite.test.data, {})
    assert np.array_equal([made.test[row]["label"] for row in range(19)], suite.test.labels)
