"""What home data teach: perturbed copies, their weights, three methods beside each other, and where they go."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import model_of, processor_of
from PIL import Image
from toys import Noise, noise_set, tiny_clip
from transformers import AutoModelForImageClassification, CLIPModel
from transformers import pipeline as stock_pipeline

import carot_hf
from carot_hf import (
    CalibratedZeroShotPipeline,
    DensityCalibrator,
    Evaluator,
    calibration_metrics,
    export_onnx,
    fit_density,
    fit_temperature,
    unbake_temperature,
)
from carot_hf.calibration.density_file import BANK_NAME, NUMBERS_NAME
from carot_hf.data.perturbations import all_perturbations, perturbed
from carot_hf.data.perturbed_set import bank_of, class_balanced, drawn_rows, is_seen, perturbed_sets
from carot_hf.data.shift_set import ShiftSet
from carot_hf.evaluation.home import home_rows

# All images look alike to a random model: 1.0001 less a cosine of .9999 loses three digits of a float32.
NEAR = 5e-5


class Counted(Noise):
    """Counts how often an image is read."""

    def __init__(self, size, seed):
        super().__init__(size, seed)
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.fixture
def counted(suite):
    """The suite with sets that count."""

    def make(data, name):
        return ShiftSet(data, name=name, num_classes=4, labels=data.labels)

    held, train, far = Counted(15, 1), Counted(26, 0), Counted(17, 3)
    sets = {"validation": make(held, "validation"), "train": make(train, "train"), "shifts": {"far": make(far, "far")}}
    return dataclasses.replace(suite, **sets), held, train, far


def embedded(model, processor, images):
    inputs = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        return F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)


def test_everything_against_a_slow_loop(counted, processor):
    """Perturbed copies, which are kept, weights, both fits and the metrics, from images on, by other code."""
    suite, held, _, _ = counted
    model = tiny_clip(processor.tokenizer)
    evaluator = Evaluator(model, processor, suite, batch_size=8, method="density")
    found = evaluator.evaluate()
    weight, _ = evaluator.head()

    labels = torch.from_numpy(held.labels)
    plain = [held.images[index] for index in range(15)]
    images = [Image.fromarray(pixels).resize((16, 18), Image.Resampling.BICUBIC, reducing_gap=3.0) for pixels in plain]
    clean = embedded(model, processor, [Image.fromarray(pixels) for pixels in plain])
    parts, weights = [clean], [torch.full((15,), 1 / 4 / 15)]
    accuracy = float(((clean @ weight.T).argmax(1) == labels).float().mean())
    for name, severity in all_perturbations():
        copies = [perturbed(image, name, severity, seed=0, index=index) for index, image in enumerate(images)]
        embeds = embedded(model, processor, copies)
        if float(((embeds @ weight.T).argmax(1) == labels).float().mean()) >= accuracy / 2:
            parts.append(embeds)
    weights += [torch.full((15,), 3 / 4 / 15 / (len(parts) - 1))] * (len(parts) - 1)
    embeds, shares, targets = torch.cat(parts), torch.cat(weights), labels.repeat(len(parts))
    logits = embeds @ weight.T
    home = fit_temperature(clean @ weight.T, labels)
    perturbed_t = fit_temperature(logits, targets, sample_weight=shares)
    bank = embedded(model, processor, [suite.train[index]["image"] for index in range(26)])
    by = fit_density(logits, embeds, targets, bank, sample_weight=shares, start=home)

    assert found.scaling["temperature"] == pytest.approx(home, rel=1e-4)
    far = embedded(model, processor, [suite.shifts["far"][index]["image"] for index in range(17)])
    answers = torch.from_numpy(suite.shifts["far"].labels)
    for ending, temperatures in (("pts", torch.full((17,), perturbed_t)), ("dts", by.temperature(far))):
        expected = calibration_metrics((far @ weight.T) / temperatures[:, None], answers)
        for metric in ("ece", "nll"):
            assert found.metrics["far"][f"{metric}_{ending}"] == pytest.approx(expected[metric], abs=1e-4), ending
        assert getattr(found, f"bins_{ending}")["far"].ece == found.metrics["far"][f"ece_{ending}"]
    assert found.bins_dts.keys() == found.bins_pts.keys() == {"home", "far"}
    assert len({id(tables["far"]) for tables in (found.bins_ts, found.bins_pts, found.bins_dts)}) == 3
    assert json.loads(found.to_json())["bins_dts"].keys() == {"home", "far"}


def test_each_image_is_embedded_once(counted, processor):
    suite, held, train, far = counted
    evaluator = Evaluator(tiny_clip(processor.tokenizer), processor, suite, batch_size=8, method="density")
    evaluator.evaluate()
    assert (held.reads, train.reads, far.reads) == (15 + 30 * 15, 26, 17)
    evaluator.calibrate()
    assert (held.reads, train.reads, far.reads) == (15 + 30 * 15, 26, 17)
    with torch.no_grad():
        evaluator.model.visual_projection.weight.mul_(0.5)
    unbake_temperature(evaluator.model)
    evaluator.calibrate()
    assert (held.reads, train.reads) == (2 * (15 + 30 * 15), 52)


def test_the_plain_method_reads_nothing_more(counted, processor):
    suite, held, train, _ = counted
    evaluator = Evaluator(tiny_clip(processor.tokenizer), processor, suite, batch_size=8)
    metrics = evaluator.evaluate().metrics["far"]
    evaluator.calibrate()
    assert (held.reads, train.reads) == (15, 0)
    assert not [name for name in metrics if name.endswith(("_pts", "_dts"))]


def test_weights_and_what_is_kept():
    """Copies that are recognised half as often are kept, others not; a quarter of the weight is of the clean ones."""
    head = (10 * torch.eye(3), torch.zeros(3))
    labels = torch.tensor([0, 1, 2, 0])
    right = torch.eye(3)[labels]
    half = torch.eye(3)[torch.tensor([0, 1, 0, 1])]
    wrong = torch.eye(3)[torch.tensor([0, 2, 0, 1])]
    data = ShiftSet([0] * 4, name="validation", num_classes=3)
    found = home_rows((right, labels), {"a": (half, labels), "b": (wrong, labels), "c": (right, labels)}, head, data)
    assert found.kept == {"a": 0.5, "c": 1.0}
    assert found.weights.tolist() == pytest.approx([1 / 16] * 4 + [3 / 32] * 8)
    assert len(found.embeds) == len(found.labels) == 12
    alone = home_rows((right, labels), {"b": (wrong, labels)}, head, data)
    assert alone.kept == {}
    assert alone.weights.tolist() == [0.25] * 4


def test_rows_that_stand_for_a_large_set():
    labels = np.array([0] * 50 + [1] * 5 + [2] * 45)
    rows = class_balanced(labels, 35)
    assert np.bincount(labels[rows]).tolist() == [15, 5, 15]
    assert rows.tolist() == sorted({*rows.tolist()})
    assert np.array_equal(rows, class_balanced(labels, 35))
    assert len(class_balanced(labels, 1000)) == 100
    data = noise_set("validation", 20, 0)
    assert drawn_rows(data, 20) is None
    assert np.bincount(data.labels[drawn_rows(data, 8)]).tolist() == [2, 2, 2, 2]


def test_copies_are_read_as_the_images_are(suite):
    sets = perturbed_sets(suite.validation, side=16)
    assert len(sets) == 30
    noise = sets["noise 0.2"]
    small = suite.validation[3]["image"].resize((16, 18), Image.Resampling.BICUBIC, reducing_gap=3.0)
    expected = perturbed(small, "noise", 2, seed=0, index=3)
    assert noise[3]["image"].tobytes() == expected.tobytes()
    assert noise[3]["label"] == suite.validation[3]["label"]
    whole = perturbed_sets(suite.validation, side=300)["noise 0.2"][3]["image"]
    assert whole.size == suite.validation[3]["image"].size


def test_corruptions_of_a_kind_that_was_seen_stay_out_of_the_mean(suite, processor):
    shifts = {"c-gaussian_noise-3": suite.shifts["far"], "c-fog-1": suite.shifts["part"]}
    other = dataclasses.replace(suite, shifts=shifts)
    model = tiny_clip(processor.tokenizer)
    plain = Evaluator(model, processor, other, batch_size=8).evaluate().metrics
    found = Evaluator(model, processor, other, batch_size=8, method="perturbed").evaluate().metrics
    fog, noise = found["c-fog-1"]["ece"], found["c-gaussian_noise-3"]["ece"]
    assert found["ood"]["ece"] == fog
    assert plain["ood"]["ece"] == pytest.approx((fog + noise) / 2)
    assert [is_seen(name) for name in ("c-contrast-5", "c-fog-5", "far", "c-x")] == [True, False, False, False]


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("method", ["temperature", "perturbed", "density"])
def test_calibrated_and_evaluated_again(suite, processor, family, method):
    """What is baked is what the evaluation has measured; the calibrator is of the logits as they are then."""
    if family == "siglip":
        processor = processor_of(family)
    model = tiny_clip(processor.tokenizer) if family == "clip" else model_of(family, processor.tokenizer)
    evaluator = Evaluator(model, processor, suite, batch_size=8, method="density", bounds=(1e-3, 1e5))
    before = evaluator.evaluate()
    record = evaluator.calibrate(method)
    after = evaluator.evaluate()
    assert record["method"] == method
    assert ("kept" in record) == (method != "temperature")
    ending = "pts" if method == "perturbed" else "ts"
    for name in ("home", "far"):
        for metric in ("ece", "nll"):
            was = before.metrics[name]
            assert after.metrics[name][metric] == pytest.approx(was[f"{metric}_{ending}"], abs=1e-4)
            assert after.metrics[name][f"{metric}_pts"] == pytest.approx(was[f"{metric}_pts"], abs=1e-4)
        assert after.metrics[name]["accuracy"] == before.metrics[name]["accuracy"]
    if method == "density":
        given = evaluator.evaluate(["far"], calibrator=evaluator.calibrator).metrics["far"]
        assert given["nll_dts"] == pytest.approx(before.metrics["far"]["nll_dts"], abs=1e-4)
    else:
        assert evaluator.calibrator is None


def trained(make_trainer, **options):
    trainer = make_trainer(calibration_method="density", **options)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.calibrate()
    return trainer, metrics


def served(classify, images, suite, **options):
    """Probabilities in the order of the classes."""
    answers = classify(images, **options)
    scores = [{row["label"]: row["score"] for row in answer} for answer in answers]
    return torch.tensor([[answer[name] for name in suite.class_names] for answer in scores])


@pytest.mark.parametrize("preset", ["carot", pytest.param("ft", marks=pytest.mark.slow)])
def test_saved_served_and_exported(make_trainer, suite, processor, preset, tmp_path):
    """Pipeline, classifier and ONNX give softmax(logits / T(x)); the stock zero-shot pipeline gives softmax(logits)."""
    teacher = {"teacher_update_every": 2 if preset == "carot" else 0}
    trainer, metrics = trained(make_trainer, preset=preset, **teacher)
    assert {"eval_far_ece_ts", "eval_far_ece_pts", "eval_far_ece_dts", "eval_ood_nll_dts"} <= metrics.keys()
    folder = tmp_path / "run"
    trainer.save_model()
    assert {NUMBERS_NAME, BANK_NAME} <= {path.name for path in folder.iterdir()}
    assert {NUMBERS_NAME, BANK_NAME} <= set(trainer.saved_files)
    images = [suite.shifts["far"][index]["image"] for index in range(5)]
    logits = torch.from_numpy(trainer.predict(suite.shifts["far"]).predictions)[:5]
    embeds = embedded(trainer.model, processor, images)
    expected = (logits / trainer.calibrator.temperature(embeds)[:, None]).softmax(1)
    classify, stock = carot_hf.pipeline(folder), stock_pipeline
    options = {"top_k": 4}
    if preset == "carot":
        assert isinstance(classify, CalibratedZeroShotPipeline)
        options = {"candidate_labels": suite.class_names, "hypothesis_template": suite.templates[0]}
        one = dataclasses.replace(suite, templates=suite.templates[:1])  # the pipeline knows one caption
        network = CLIPModel.from_pretrained(folder)
        head = Evaluator(network, processor, one).head()
        logits = embeds @ head[0].T
        expected = (logits / trainer.calibrator.temperature(embeds)[:, None]).softmax(1)
        plain = stock("zero-shot-image-classification", model=str(folder))
        torch.testing.assert_close(served(plain, images, suite, **options), logits.softmax(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(served(classify, images, suite, **options), expected, atol=NEAR, rtol=0)
    batched = served(classify, images, suite, batch_size=2, **options)
    torch.testing.assert_close(batched, expected, atol=NEAR, rtol=0)

    classifier = trainer.export_classifier()
    logits = torch.from_numpy(trainer.predict(suite.shifts["far"]).predictions)[:5]
    expected = (logits / trainer.calibrator.temperature(embeds)[:, None]).softmax(1)
    classifier.save_pretrained(tmp_path / "classifier")
    processor.save_pretrained(tmp_path / "classifier")
    again = stock("image-classification", model=str(tmp_path / "classifier"))
    torch.testing.assert_close(served(again, images, suite, top_k=4), expected, atol=NEAR, rtol=0)
    half = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier", dtype=torch.bfloat16)
    assert half.density_bank.dtype == torch.float32
    import onnxruntime

    file = export_onnx(classifier, processor, tmp_path / "model.onnx")
    pixels = processor(images=images, return_tensors="np")["pixel_values"]
    found = onnxruntime.InferenceSession(str(file)).run(["probabilities"], {"pixel_values": pixels})[0]
    assert np.abs(found - expected.numpy()).max() < NEAR
    unbake_temperature(classifier)
    assert classifier.density is None


def test_a_calibrator_of_another_model_is_refused(make_trainer, tmp_path):
    trainer, _ = trained(make_trainer)
    trainer.save_model()
    model = CLIPModel.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        model.visual_projection.weight.mul_(1.001)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="of this model's image tower, got one of other weights"):
        carot_hf.pipeline(tmp_path / "run")
    (tmp_path / "run" / NUMBERS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="found no calibrator"):
        carot_hf.pipeline(tmp_path / "run")
    with pytest.raises(ValueError, match="a bank of 12 numbers an image"):
        trainer.export_classifier().attach_density(DensityCalibrator(torch.ones(3, 5).half(), 1, 0.0, 1.0, 0.0, 0.0))


def test_weights_that_changed_since_are_refused(make_trainer, tmp_path):
    """A calibrator that was fitted on other weights is saved with their checksum, not with that of these."""
    trainer, _ = trained(make_trainer)
    with torch.no_grad():
        trainer.model.visual_projection.weight.mul_(1.001)
    trainer.save_model()
    with pytest.raises(ValueError, match="of this model's image tower, got one of other weights"):
        carot_hf.pipeline(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
def test_adapters_are_merged_and_calibrated(make_trainer, suite, tmp_path):
    trainer, _ = trained(make_trainer, lora_rank=2)
    trainer.save_model()
    classify = carot_hf.pipeline(tmp_path / "run")
    image = suite.shifts["far"][0]["image"]
    assert isinstance(classify, CalibratedZeroShotPipeline)
    assert sum(row["score"] for row in classify(image, candidate_labels=suite.class_names)) == pytest.approx(
        1, abs=1e-5
    )
    assert trainer.export_classifier().density is not None


def test_a_classifier_with_a_bank_is_not_calibrated_on_top(make_trainer, suite, processor):
    trainer, _ = trained(make_trainer)
    classifier = trainer.export_classifier()
    with pytest.raises(RuntimeError, match="without a baked temperature"):
        Evaluator(classifier, processor, suite, batch_size=8).calibrate()
    given = Evaluator(classifier, processor, suite, batch_size=8).evaluate().metrics["far"]
    assert given["nll_dts"] == pytest.approx(trainer.evaluate()["eval_far_nll_dts"], abs=1e-3)
    del classifier.config.calibration
    with pytest.raises(RuntimeError, match="without a density calibrator"):
        Evaluator(classifier, processor, suite, batch_size=8).calibrate()


def test_a_further_training_takes_it_back(make_trainer, tmp_path):
    """The next model that is saved there is not calibrated by the bank of the one before."""
    trainer, _ = trained(make_trainer)
    trainer.save_model()
    trainer.train()
    assert trainer.calibrator is None
    trainer.save_model()
    assert not {NUMBERS_NAME, BANK_NAME} & {path.name for path in (tmp_path / "run").iterdir()}


def test_without_a_training_set_that_has_an_index(suite, processor):
    with pytest.raises(ValueError, match="a training set that can be read by index for the method 'density', got none"):
        bank_of(None)
    with pytest.raises(ValueError, match="the calibration method to be one of"):
        Evaluator(tiny_clip(processor.tokenizer), processor, suite, method="dense")


def test_the_argument_is_checked_before_a_model_loads(make_trainer):
    with pytest.raises(ValueError, match="`calibration_method` 'temperature', 'perturbed' or 'density'"):
        make_trainer(calibration_method="dense")


def test_logits_of_large_sets_are_read_in_parts(monkeypatch, suite, processor):
    """The same fit, without a matrix of all rows."""
    model = tiny_clip(processor.tokenizer)
    whole = Evaluator(model, processor, suite, batch_size=8, method="density").evaluate()
    monkeypatch.setattr("carot_hf.evaluation.home._WHOLE", 10)
    parts = Evaluator(model, processor, suite, batch_size=8, method="density").evaluate()
    for name in ("nll_pts", "nll_dts"):
        assert parts.metrics["far"][name] == pytest.approx(whole.metrics["far"][name], rel=1e-5)


@pytest.mark.parametrize("method", ["temperature", "density"])
def test_accuracy_is_estimated_without_labels(make_trainer, suite, method):
    """From the calibrated confidences, by hand; the labels of the images are not read."""
    trainer = make_trainer(calibration_method=method)
    trainer.train()
    trainer.calibrate()
    sets = {"far": suite.shifts["far"], "held": suite.validation}
    logits = {name: torch.from_numpy(trainer.predict(data).predictions) for name, data in sets.items()}
    if method == "density":
        for name, data in sets.items():
            embeds = trainer.evaluator.embed({"": data})[""][0]
            logits[name] = logits[name] / trainer.calibrator.temperature(embeds)[:, None]
    sure = {name: part.softmax(1).amax(1).numpy() for name, part in logits.items()}
    right = logits["held"].argmax(1).numpy() == suite.validation.labels
    found = trainer.estimate([{"image": sets["far"][index]["image"]} for index in range(17)])
    assert found["mean"] == pytest.approx(float(sure["far"].mean()), abs=1e-5)
    threshold = np.sort(sure["held"])[(~right).sum()]
    assert found["atc"] == pytest.approx(float((sure["far"] >= threshold).mean()), abs=1 / 17 + 1e-6)
    for name in ("mean", "atc"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert ("beyond" in found) == (method == "density")
    assert 0.0 <= found.get("beyond", 0.0) <= 1.0
