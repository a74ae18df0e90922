"""VRF on the sets of a suite: slow loops over images, both ends, nothing learned of a shift, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import reference_calibration as reference
import torch
from tolerances import EXACT
from toys import noise_set, tiny_clip

from carot_hf import Evaluator, ShiftSet, evaluate_vrf
from carot_hf.calibration.metrics import METRICS
from carot_hf.calibration.temperature import fit_temperature

BOUNDS = (0.5, 500.0)  # the models know little, and are too sure of it


@pytest.fixture
def models(processor):
    return [tiny_clip(processor.tokenizer, seed).double() for seed in (0, 1)]


@pytest.fixture
def suite(suite, models, processor):
    """At home two thirds of the images are labelled as one of the models has them: each knows something."""
    known = [Evaluator(model, processor, suite) for model in models]

    def labelled(data):
        labels = data.labels.copy()
        for which, evaluator in enumerate(known):
            labels[which::3] = evaluator.predict(data)[0].argmax(dim=1).numpy()[which::3]
        rows = [{"image": data[index]["image"], "label": int(label)} for index, label in enumerate(labels)]
        return ShiftSet(rows, name=data.name, num_classes=data.num_classes, labels=labels)

    return dataclasses.replace(suite, train=labelled(suite.train), validation=labelled(suite.validation))


@pytest.fixture
def pair(suite, models, processor):
    """Evaluators of two random models."""
    return [Evaluator(model, processor, suite, batch_size=8, bounds=BOUNDS) for model in models]


def slow(pair, data, vrf):
    """Mixed probabilities and labels of a set, row by row; failures among the training images by a loop, too."""
    train = pair[0].suite.train
    logits = [[part.tolist() for part in evaluator.predict(train)] for evaluator in pair]
    embeds = pair[1].embed({"": train})[""][0].tolist()
    right = [[row.index(max(row)) == y for row, y in zip(*part, strict=True)] for part in logits]
    failed = [row for row, zero, fine in zip(embeds, *right, strict=True) if fine and not zero]
    assert 0 < len(failed) < len(embeds)
    temperatures = vrf.zero_shot_temperature, vrf.fine_tuned_temperature
    found = [evaluator.predict(data) for evaluator in pair]
    weights = [
        reference.vrf_weight(row, failed, vrf.k, vrf.a, vrf.b) for row in pair[1].embed({"": data})[""][0].tolist()
    ]
    triples = zip(found[0][0].tolist(), found[1][0].tolist(), weights, strict=True)
    return [reference.vrf(*triple, temperatures) for triple in triples], found[1][1].tolist(), weights


@pytest.mark.parametrize("choose", [False, True])
def test_figures_of_every_set_are_those_of_slow_loops(pair, suite, choose):
    """Also of the set whose labels are some of the classes: the maximum over their columns, before the softmax."""
    found, vrf = evaluate_vrf(*pair, choose=choose, n_bootstrap=50)
    assert ((vrf.a, vrf.b) == (1.5, 0.6)) is not choose
    assert set(found.metrics) == {"validation", "home", "far", "part", "id", "ood"}
    home = pair[0].predict(suite.validation), pair[1].predict(suite.validation)
    for own, rows in zip((vrf.zero_shot_temperature, vrf.fine_tuned_temperature), home, strict=True):
        assert own == pytest.approx(fit_temperature(*rows, bounds=BOUNDS), rel=1e-6)
        assert own not in BOUNDS
    for name, data in suite.evaluation_sets.items():
        probabilities, labels, weights = slow(pair, data, vrf)
        assert all(math.fsum(row) == pytest.approx(1, abs=EXACT) for row in probabilities)
        assert len(probabilities[0]) == (2 if name == "part" else 4)
        confidences = [max(row) for row in probabilities]
        hits = [row.index(max(row)) == y for row, y in zip(probabilities, labels, strict=True)]
        own = found.metrics[name]
        assert own["accuracy"] == pytest.approx(np.mean(hits), abs=EXACT)
        inner = reference.uniform_inner_edges(10)
        assert own["ece"] == pytest.approx(reference.ece(confidences, hits, inner), abs=EXACT)
        nll = -math.fsum(math.log(row[y]) for row, y in zip(probabilities, labels, strict=True)) / len(labels)
        assert own["nll"] == pytest.approx(nll, abs=EXACT)
        assert own["fine_tuned_weight"] == pytest.approx(np.mean(weights), abs=EXACT)
        assert METRICS.keys() <= own.keys()
        np.testing.assert_allclose(found.rows[name][0], confidences, rtol=0, atol=EXACT)
    shifts = [found.metrics[name] for name in suite.shifts]
    assert found.metrics["ood"]["ece"] == pytest.approx(np.mean([part["ece"] for part in shifts]))
    assert found.intervals["home"]["accuracy"][0] < found.metrics["home"]["accuracy"]


def test_one_more_temperature_is_fitted_at_home(pair, suite):
    found, vrf = evaluate_vrf(*pair, n_bootstrap=0)
    probabilities, labels, _ = slow(pair, suite.validation, vrf)
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    temperature = fit_temperature(logits, torch.tensor(labels), bounds=BOUNDS)
    assert found.flat()["eval_temperature"] == pytest.approx(temperature, rel=1e-6)
    assert "eval_validation_ece_ts" not in found.flat(), "it was fitted there"
    rows, labels, _ = slow(pair, suite.shifts["far"], vrf)
    scaled = [reference.softmax([math.log(value) for value in row], temperature) for row in rows]
    hits = [row.index(max(row)) == y for row, y in zip(scaled, labels, strict=True)]
    expected = reference.ece([max(row) for row in scaled], hits, reference.uniform_inner_edges(10))
    assert found.flat()["eval_far_ece_ts"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("a", "which"), [(1e6, 1), (-1e6, 0)])
def test_at_both_ends_the_figures_are_those_of_a_calibrated_model(pair, a, which):
    """Its own `_ts`, which every evaluation has: the path that is tested elsewhere."""
    found, _ = evaluate_vrf(*pair, a=a, n_bootstrap=0)
    alone = pair[which].evaluate(n_bootstrap=0)
    for name in ("validation", "home", "far", "part"):
        assert found.metrics[name]["accuracy"] == alone.metrics[name]["accuracy"]
        for metric in ("ece", "nll", "brier") if name != "validation" else ():
            assert found.metrics[name][metric] == pytest.approx(alone.metrics[name][f"{metric}_ts"], abs=1e-8)
        assert found.metrics[name]["fine_tuned_weight"] == which


def test_nothing_is_learned_of_a_shift_or_of_the_test_set(pair, suite):
    """Other images and other labels there: the same mixture."""
    _, vrf = evaluate_vrf(*pair, choose=True, n_bootstrap=0)
    others = {"far": noise_set("far", 13, 9), "part": noise_set("part", 12, 8, columns=[[1], [0, 3]])}
    changed = dataclasses.replace(suite, test=noise_set("home", 21, 7), shifts=others)
    again = [Evaluator(part.model, part.processor, changed, batch_size=8, bounds=BOUNDS) for part in pair]
    _, other = evaluate_vrf(*again, choose=True, n_bootstrap=0)
    for field in dataclasses.fields(vrf):
        mine, theirs = getattr(vrf, field.name), getattr(other, field.name)
        assert torch.equal(mine, theirs) if field.name == "failures" else mine == theirs, field.name


def test_the_models_stay_as_they_are(pair):
    before = [{name: value.clone() for name, value in part.model.state_dict().items()} for part in pair]
    evaluate_vrf(*pair, n_bootstrap=0)
    for part, old in zip(pair, before, strict=True):
        assert all(torch.equal(old[name], value) for name, value in part.model.state_dict().items())


def test_a_model_against_itself_has_no_failures(pair):
    with pytest.raises(ValueError, match="right and the zero-shot model wrong, got none"):
        evaluate_vrf(pair[0], pair[0], n_bootstrap=0)


def test_what_cannot_be_mixed_is_refused_before_any_work(pair, suite, monkeypatch):
    def evaluators(suite):
        return [Evaluator(part.model, part.processor, suite) for part in pair]

    monkeypatch.setattr(Evaluator, "embed", None)
    with pytest.raises(ValueError, match="two evaluators of one suite, got 'noise' and 'noise'"):
        evaluate_vrf(pair[0], evaluators(dataclasses.replace(suite))[1])
    for name, role in (("train", "training"), ("validation", "validation")):
        with pytest.raises(ValueError, match=f"Expected a {role} set"):
            evaluate_vrf(*evaluators(dataclasses.replace(suite, **{name: None})))
    monkeypatch.setattr("carot_hf.evaluation.vrf.can_be_bank", lambda train: False)
    with pytest.raises(ValueError, match="read by index, in which VRF looks for failures of zero-shot, got a stream"):
        evaluate_vrf(*pair)
    pair[1].link = "sigmoid"
    with pytest.raises(ValueError, match=r"with a softmax, got the links \['sigmoid', 'softmax'\]"):
        evaluate_vrf(*pair)
