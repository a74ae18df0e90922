"""Every method of the tables: its loss against hand-derived formulas, its teacher, and what the trainer makes of it."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from runs import a_caption_each, assert_equal_runs, first_batches, logged, run
from sklearn.linear_model import LogisticRegression
from tolerances import EXACT, float32_bound
from toys import tiny_clip
from transformers import CLIPModel, CLIPProcessor, pipeline

from carot_hf import CaRotTrainer, CaRotTrainingArguments
from carot_hf.models.backbones import pair_inputs
from carot_hf.models.classifier import CLIPClassifier
from carot_hf.models.linear_probe import linear_probe
from carot_hf.objective.losses import (
    contrastive_loss,
    cross_entropy_loss,
    cross_norm_penalty,
    distillation_loss,
    feature_distillation_loss,
    orthogonality_penalty,
    same_class_targets,
)
from carot_hf.presets import PRESETS
from carot_hf.teacher.average import Teacher, beta_momentum, half_life

# ---- losses on fixed features: parity with the published arithmetic ----


@pytest.fixture
def features():
    """Embeddings of a student and a teacher, and their scales."""
    generator = torch.Generator().manual_seed(3)
    embeds = [F.normalize(torch.randn(6, 8, generator=generator, dtype=torch.float64), dim=-1) for _ in range(4)]
    return embeds, torch.tensor(2.3, dtype=torch.float64), torch.tensor(2.9, dtype=torch.float64)


def log_softmax_rows(matrix):
    return matrix - torch.logsumexp(matrix, dim=1, keepdim=True)


def test_flyp_is_the_mean_of_both_cross_entropies(features):
    (image, text, _, _), scale, _ = features
    similarity = scale.exp() * image @ text.T
    by_hand = -(log_softmax_rows(similarity).diagonal().mean() + log_softmax_rows(similarity.T).diagonal().mean()) / 2
    ours = contrastive_loss(similarity, similarity.T)
    assert ours.item() == pytest.approx(by_hand.item(), abs=EXACT)


def test_carot_2024_is_contrastive_plus_one_and_a_half_times_the_sum_of_soft_cross_entropies(features):
    """The published code has soft cross-entropy where we have KL: they differ by the teacher's entropy, a constant."""
    (image, text, image_t, text_t), scale, scale_t = features
    weights = PRESETS["carot-2024"].arguments
    gradients, values = [], []
    for published in (True, False):
        leaf = image.clone().requires_grad_()
        student = scale.exp() * leaf @ text.T
        teacher = scale_t.exp() * image_t @ text_t.T
        pairs = [(student, teacher), (student.T, teacher.T)]
        if published:
            loss = -sum(log_softmax_rows(s).diagonal().mean() for s, _ in pairs) / 2
            for s, t in pairs:
                target = log_softmax_rows(t).exp()
                loss = loss + 1.5 * -(target * log_softmax_rows(s)).sum(dim=1).mean()
                loss = loss - 1.5 * -(target * target.log()).sum(dim=1).mean()  # the teacher's entropy
        else:
            kd = distillation_loss(student, student.T, teacher, teacher.T)
            loss = contrastive_loss(student, student.T) + weights["distillation_weight"] * kd
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        values.append(loss.item())
    assert values[0] == pytest.approx(values[1], abs=EXACT)
    torch.testing.assert_close(gradients[0], gradients[1], atol=EXACT, rtol=0)


def test_tracers_terms_and_weights(features):
    (image, text, image_t, text_t), scale, scale_t = features
    weights = PRESETS["tracer"].arguments
    squared = ((image - image_t) ** 2).sum() / 6 + ((text - text_t) ** 2).sum() / 6
    student, teacher = scale.exp() * image @ text.T, scale_t.exp() * image_t @ text_t.T
    kl = 0.0
    for s, t in ((student, teacher), (student.T, teacher.T)):
        log_p, log_q = log_softmax_rows(t), log_softmax_rows(s)
        kl += (log_p.exp() * (log_p - log_q)).sum().item() / 6 / 2
    expected = 0.9 * (squared.item() + 2 * kl)
    logits = [student, student.T, teacher, teacher.T]
    ours = weights["feature_distillation_weight"] * feature_distillation_loss(image, text, image_t, text_t)
    ours += weights["distillation_weight"] * distillation_loss(*logits)
    assert ours.item() == pytest.approx(expected, abs=EXACT)
    assert weights["cross_norm_weight"] == 0.05


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7])
def test_cross_entropy_of_the_head_equals_the_loop(epsilon):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([0, 6, 2, 2, 3])
    rows = reference.smoothed(np.eye(7)[labels].tolist(), epsilon)
    expected = reference.cross_entropy(logits.tolist(), rows)
    assert cross_entropy_loss(logits, labels, label_smoothing=epsilon).item() == pytest.approx(expected, abs=EXACT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    with pytest.raises(ValueError, match=r"`labels` of shape \(rows,\), got \(5, 7\) and \(4,\)"):
        cross_entropy_loss(logits, labels[:4])
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy_loss(logits, labels, label_smoothing=1.0)


# ---- same-class pairs ----


def test_same_class_targets_by_hand():
    labels, columns = torch.tensor([7, 7, 3]), torch.tensor([1, 2, 3])
    all_labels = torch.tensor([3, 7, 7, 3])
    targets, ignore = same_class_targets(labels, all_labels, columns, "negative")
    assert targets.tolist() == [1, 2, 3]
    assert ignore is None
    targets, ignore = same_class_targets(labels, all_labels, columns, "positive")
    assert targets.tolist() == [[0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5]]
    assert ignore is None
    targets, ignore = same_class_targets(labels, all_labels, columns, "ignore")
    assert targets.tolist() == [1, 2, 3]
    assert ignore.int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"same_class.*got 'keep'"):
        same_class_targets(labels, all_labels, columns, "keep")


@pytest.mark.parametrize(("batch", "classes", "floor"), [(512, 1000, 0.320), (512, 100, 1.73), (512, 10, 3.95)])
def test_perfect_features_reach_the_floor_of_same_class_negatives(batch, classes, floor):
    """Perfect features: the same for all samples of a class, orthogonal between classes."""
    generator = torch.Generator().manual_seed(0)
    losses = {"negative": [], "ignore": [], "positive": []}
    for _ in range(20 if classes == 1000 else 5):
        labels = torch.randint(classes, (batch,), generator=generator)
        logits = 100.0 * (labels[:, None] == labels)
        for mode, values in losses.items():
            targets, ignore = same_class_targets(labels, labels, torch.arange(batch), mode)
            values.append(contrastive_loss(logits, logits.T, targets, ignore=ignore).item())
    others = np.arange(batch)
    chances = [math.comb(batch - 1, k) * (1 / classes) ** k * (1 - 1 / classes) ** (batch - 1 - k) for k in others]
    assert np.dot(chances, np.log1p(others)) == pytest.approx(floor, abs=0.006)
    assert np.mean(losses["negative"]) == pytest.approx(floor, rel=0.03)
    assert max(losses["ignore"]) == pytest.approx(0, abs=1e-6)
    assert np.mean(losses["positive"]) == pytest.approx(np.mean(losses["negative"]), rel=1e-5)  # its entropy, no error


@pytest.mark.parametrize("mode", ["positive", "ignore"])
def test_trainer_builds_the_targets_from_the_labels_of_the_batch(model, make_trainer, mode):
    trainer = make_trainer(model.double(), preset="flyp", same_class=mode, per_device_train_batch_size=12)
    (batch,) = first_batches(trainer, 1)
    labels = batch["labels"].tolist()
    assert len(set(labels)) < len(labels)
    outputs = trainer.model(**pair_inputs(a_caption_each(batch)))
    same = [[float(a == b) for b in labels] for a in labels]
    mask = None
    if mode == "positive":
        targets = [[x / sum(row) for x in row] for row in same]
    else:
        targets = np.eye(12).tolist()
        mask = [[bool(x) and i != j for j, x in enumerate(row)] for i, row in enumerate(same)]
    expected = reference.contrastive(
        outputs.logits_per_image.tolist(), outputs.logits_per_text.tolist(), targets, 0.0, mask
    )
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, abs=EXACT)
    batch.pop("labels")
    with pytest.raises(ValueError, match=f"Expected `labels` in the batch for `same_class` '{mode}'"):
        trainer.compute_loss(trainer.model, batch)


# ---- teachers ----


def test_share_of_the_pretrained_weights_under_tracers_teacher():
    share = np.prod([beta_momentum(step, 25030) for step in range(1, 26)])
    assert share == pytest.approx(0.147, abs=5e-4)


@pytest.mark.parametrize(("every", "beta"), [(1, 0.5), (3, 0.5), (7, 2.0), (5, 1.0)])
def test_beta_teacher_is_the_weighted_mean_of_the_snapshots(every, beta):
    """Weights are the density at the step of the snapshot, whatever the interval."""
    torch.manual_seed(0)
    student = torch.nn.Linear(3, 2, dtype=torch.float64)
    teacher, total = Teacher(student), 30
    steps = range(0, total + 1, every)
    taus = [(step + 0.5) / (total + 1) for step in steps]
    weights = [tau ** (beta - 1) * (1 - tau) ** (beta - 1) for tau in taus]
    snapshots = [student.weight.detach().double().clone()]
    for step in steps[1:]:
        with torch.no_grad():
            student.weight += torch.randn(2, 3, dtype=torch.float64)
        snapshots.append(student.weight.detach().double().clone())
        teacher.update(student, beta_momentum(step, total, update_every=every, beta=beta))
    expected = sum(w * s for w, s in zip(weights, snapshots, strict=True)) / sum(weights)
    torch.testing.assert_close(teacher.model.weight, expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "positive multiple of `update_every` = 1"),
        ({"step": 11}, "up to 10"),
        ({"step": 4, "update_every": 3}, "multiple of `update_every` = 3"),
        ({"step": 4, "beta": 0.0}, "`beta` > 0"),
    ],
)
def test_bad_beta_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        beta_momentum(total_steps=10, **options)


def test_half_life_of_the_paper():
    assert half_life(0.9, 500) == pytest.approx(3289, abs=1)
    assert 0.9 ** (half_life(0.9, 500) / 500) == pytest.approx(0.5)
    assert (half_life(0.0, 5), half_life(1.0, 5)) == (0.0, math.inf)


def test_half_life_is_logged(make_trainer):
    trainer = make_trainer(max_steps=4, teacher_update_every=2, teacher_momentum_ramp=0.0)
    trainer.train()
    assert logged(trainer, "teacher_half_life")[-1]["teacher_half_life"] == pytest.approx(half_life(0.9, 2))


@pytest.mark.parametrize("every", [1, 2])
def test_tracer_trains_with_its_teacher(make_trainer, every):
    trainer = make_trainer(preset="tracer", teacher_update_every=every, max_steps=4)
    trainer.train()
    for entry in logged(trainer):
        total = entry["contrastive"] + 0.9 * (entry["feature_distillation"] + 2 * entry["distillation"])
        assert entry["loss"] == pytest.approx(total + 0.05 * entry["cross_norm"], rel=1e-5)
        if "teacher_momentum" in entry:
            step = entry["step"] - entry["step"] % every
            assert entry["teacher_momentum"] == beta_momentum(step, 4, update_every=every)
    assert trainer._companions.moves.momentum == beta_momentum(4, 4, update_every=every)


def test_feature_distillation_alone_has_a_teacher_too(make_trainer):
    trainer = make_trainer(preset="flyp", feature_distillation_weight=1.0, teacher="frozen", max_steps=2)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert set(logged(trainer)[-1]) >= {"contrastive", "feature_distillation"}
    assert "distillation" not in logged(trainer)[-1]
    for name, value in trainer.teacher.state_dict().items():
        assert torch.equal(value, start[name]), name


def test_a_teacher_is_saved_as_a_model_of_its_own(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    trainer.save_teacher(tmp_path / "teacher")
    loaded = CLIPModel.from_pretrained(tmp_path / "teacher")
    for name, value in trainer.teacher.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert CLIPProcessor.from_pretrained(tmp_path / "teacher").tokenizer is not None
    with pytest.raises(RuntimeError, match="Expected a teacher to save, got none"):
        make_trainer(preset="flyp").save_teacher(tmp_path / "none")


# ---- towers ----


@pytest.mark.parametrize(("tower", "names"), [("vision", ("vision", "visual")), ("text", ("text",))])
def test_a_frozen_tower_stays_as_it_is(make_trainer, tower, names):
    trainer = make_trainer(freeze=tower, max_steps=3)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, start[name]) == name.startswith(names), name


# ---- FT ----


def test_ft_starts_as_the_zero_shot_model(make_trainer, processor):
    zero_shot = make_trainer(tiny_clip(processor.tokenizer).double()).evaluate()
    trainer = make_trainer(tiny_clip(processor.tokenizer).double(), preset="ft")
    assert isinstance(trainer.model, CLIPClassifier)
    head = trainer.evaluate()
    for name, value in zero_shot.items():
        if name.endswith(("_nll", "_ece", "_accuracy", "_nll_ts")):
            assert head[name] == pytest.approx(value, abs=EXACT), name


@pytest.mark.parametrize("preset", ["ft", "ft-ls"])
def test_ft_minimises_the_cross_entropy_of_its_head(make_trainer, model, preset):
    trainer = make_trainer(model.double(), preset=preset, learning_rate=1e-2, max_steps=4)
    (batch,) = first_batches(trainer, 1)
    logits = trainer.model(pixel_values=batch["pixel_values"]).logits
    epsilon = 0.1 if preset == "ft-ls" else 0.0
    rows = reference.smoothed(np.eye(4)[batch["labels"]].tolist(), epsilon)
    expected = reference.cross_entropy(logits.tolist(), rows)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, abs=EXACT)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])]
    assert moved == [name for name, _ in trainer.model.named_parameters()]
    for entry in logged(trainer):
        assert entry["loss"] == pytest.approx(entry["cross_entropy"], rel=1e-6)
        assert "logit_multiplier" not in entry
    assert trainer.teacher is None


def test_lp_ft_starts_from_the_optimum_of_its_head(make_trainer, suite):
    trainer = make_trainer(preset="lp-ft", learning_rate=0.0, max_steps=1)
    tower = {name: value.clone() for name, value in trainer.model.state_dict().items() if not name.startswith("head")}
    embeds, labels = trainer.evaluator.embed({"train": suite.train})["train"]
    trainer.train()
    for name, value in tower.items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    head = trainer.model.head
    ours = F.softmax(F.linear(embeds, head.weight, head.bias), dim=-1).detach()
    strength = inspect.signature(linear_probe).parameters["l2"].default
    oracle = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000).fit(embeds, labels)
    np.testing.assert_allclose(ours, oracle.predict_proba(embeds), atol=1e-3)


def test_ft_is_calibrated_saved_and_served_by_the_stock_pipeline(make_trainer, suite, tmp_path):
    trainer = make_trainer(preset="ft", max_steps=3)
    trainer.train()
    record = trainer.calibrate()
    assert record["templates"] == suite.templates
    trainer.save_model(str(tmp_path / "ft"))
    images = [suite.test[i]["image"] for i in range(5)]
    expected = torch.softmax(torch.as_tensor(trainer.predict(suite.test).predictions[:5]), dim=-1)
    bound = float32_bound(trainer.model.head.weight.norm(dim=1).max().item(), 12)
    answers = pipeline("image-classification", model=str(tmp_path / "ft"))(images, top_k=4)
    for answer, row in zip(answers, expected, strict=True):
        for entry in answer:
            assert entry["score"] == pytest.approx(row[suite.class_names.index(entry["label"])].item(), abs=bound)


def test_export_gives_the_probabilities_of_the_zero_shot_model(make_trainer, model, suite, tmp_path):
    trainer = make_trainer(model.double(), max_steps=3)
    trainer.train()
    trainer.calibrate()
    classifier = trainer.export_classifier()
    classifier.save_pretrained(tmp_path)
    loaded = CLIPClassifier.from_pretrained(tmp_path)
    assert loaded.config.calibration["temperature"] == trainer.model.config.calibration["temperature"]
    batch = next(iter(trainer.get_eval_dataloader(suite.test)))
    with torch.no_grad():
        ours = loaded(pixel_values=trainer._prepare_inputs(batch)["pixel_values"]).logits.softmax(dim=-1)
    expected = torch.as_tensor(trainer.predict(suite.test).predictions[: len(ours)]).softmax(dim=-1)
    torch.testing.assert_close(ours, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("preset", ["ft", "lp-ft", "tracer"])
def test_an_interrupted_run_of_any_method_goes_on_bit_for_bit(make_trainer, tmp_path, preset):
    whole = run(make_trainer, tmp_path / "whole", preset=preset)
    resumed = run(make_trainer, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), preset=preset)
    if preset == "tracer":
        assert_equal_runs(whole, resumed)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mse"}, "`objective` to be one of"),
        ({"teacher": "student"}, "`teacher` to be one of"),
        ({"same_class": "maybe"}, "`same_class` to be one of"),
        ({"freeze": "head"}, "`freeze` to be one of"),
        ({"linear_probe": True}, "`linear_probe` False with the contrastive objective"),
        ({"objective": "cross_entropy"}, "`distillation_weight` 0 with the objective 'cross_entropy', got 0.75"),
        ({"objective": "cross_entropy", "distillation_weight": 0, "freeze": "text"}, "knows no pairs and no text"),
        ({"objective": "cross_entropy", "distillation_weight": 0, "same_class": "ignore"}, "knows no pairs"),
        ({"feature_distillation_weight": -1.0}, "`feature_distillation_weight` >= 0"),
        ({"teacher_beta": 0.0}, "`teacher_beta` > 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CaRotTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_models_that_do_not_fit_the_objective_are_refused(make_trainer, suite, processor):
    classifier = make_trainer(preset="ft").model
    with pytest.raises(TypeError, match=r"Expected a transformers model of CLIPModel, .*got CLIPClassifier"):
        make_trainer(classifier)
    other = CLIPClassifier.from_clip(tiny_clip(processor.tokenizer), F.normalize(torch.randn(3, 12), dim=-1))
    with pytest.raises(ValueError, match="classifier of the 4 classes of suite 'noise', got one of 3"):
        make_trainer(other, preset="ft")
    assert make_trainer(classifier, preset="ft").model is classifier


def test_every_preset_says_where_it_comes_from():
    first = {"ft", "ft-ls", "lp-ft", "flyp", "flyp-ls", "carot", "carot-2024", "tracer"}
    assert set(PRESETS) == first | {"static", "fd", "l2-sp", "dive", "lipsum", "car-ft"}
    for name, preset in PRESETS.items():
        assert len(preset.source) > 40, name
        args = CaRotTrainingArguments.from_preset(name, output_dir=str(Path("unused")), use_cpu=True)
        for key, value in preset.arguments.items():
            assert getattr(args, key) == value


def test_penalties_of_carot_2024_by_hand():
    weight, text = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    assert orthogonality_penalty(weight).item() == pytest.approx(8.0)
    assert cross_norm_penalty(weight, text).item() == pytest.approx(math.sqrt(9 + 36 + 0 + 1))
    assert isinstance(CaRotTrainer.save_teacher.__doc__, str)
