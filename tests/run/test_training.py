"""CaRotTrainer: what it optimises, logs, clamps, decays and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import a_caption_each, first_batches, logged
from tolerances import EXACT, LOGGED
from toys import tiny_clip
from transformers import CLIPModel, TrainerCallback, TrainingArguments

from carot_hf import CaRotTrainer, CaRotTrainingArguments
from carot_hf.models.backbones import pair_inputs
from carot_hf.objective.losses import contrastive_loss, cross_norm_penalty, distillation_loss, orthogonality_penalty
from carot_hf.run.checks import check_launch
from carot_hf.teacher.average import ema_momentum


class Spy(TrainerCallback):
    """Keeps the gradients before each optimizer step and the logit scale after it."""

    def __init__(self):
        self.gradients, self.scales = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.scales.append(model.logit_scale.item())


def test_all_terms_are_logged_and_their_weighted_sum_is_the_loss(make_trainer):
    trainer = make_trainer(preset="carot-2024", label_smoothing_factor=0.1, max_steps=5)
    trainer.train()
    entries = logged(trainer)
    assert len(entries) == 5
    for step, entry in enumerate(entries, start=1):
        total = entry["contrastive"] + 3 * entry["distillation"] + 0.2 * entry["orthogonality"]
        assert entry["loss"] == pytest.approx(total + 0.05 * entry["cross_norm"], rel=1e-5)
        if step >= 2:
            assert entry["teacher_momentum"] == ema_momentum(step - step % 2, 5)
        else:
            assert "teacher_momentum" not in entry
    assert entries[-1]["logit_multiplier"] == pytest.approx(math.exp(trainer.model.logit_scale.item()), rel=1e-6)
    assert entries[0]["distillation"] == pytest.approx(0, abs=1e-6)  # the teacher starts as the student
    assert entries[-1]["distillation"] > 1e-4


def test_flyp_has_no_teacher_and_no_other_terms(make_trainer):
    trainer = make_trainer(preset="flyp")
    trainer.train()
    entry = logged(trainer)[0]
    assert trainer.teacher is None
    assert entry["loss"] == entry["contrastive"]
    assert not {"distillation", "orthogonality", "cross_norm", "teacher_momentum"} & entry.keys()


def test_terms_are_those_of_the_loss_functions(make_trainer, model):
    """Against transformers' own forward pass; the penalties and the teacher against direct calls."""
    trainer = make_trainer(model.double(), preset="carot-2024", label_smoothing_factor=0.1)
    with torch.no_grad():
        for parameter in trainer.teacher.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    (batch,) = first_batches(trainer, 1)
    terms, _ = trainer.loss_terms(trainer.model, batch)
    pairs = pair_inputs(a_caption_each(batch))
    student, teacher = trainer.model(**pairs), trainer.teacher.model(**pairs)
    logits = student.logits_per_image, student.logits_per_text
    expected = {
        "contrastive": contrastive_loss(*logits, label_smoothing=0.1),
        "distillation": distillation_loss(*logits, teacher.logits_per_image, teacher.logits_per_text),
        "orthogonality": orthogonality_penalty(trainer.model.visual_projection.weight),
        "cross_norm": cross_norm_penalty(trainer.model.visual_projection.weight, trainer.model.text_projection.weight),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=EXACT), name
    assert terms["distillation"] > 0.01


@pytest.mark.parametrize("with_labels", [True, False])
def test_accumulation_is_the_mean_over_micro_batches(make_trainer, model, with_labels):
    spy = Spy()
    trainer = make_trainer(model.double(), gradient_accumulation_steps=3, max_steps=1, trainer={"callbacks": [spy]})
    if not with_labels:
        collate = trainer.data_collator
        trainer.data_collator = lambda samples: {k: v for k, v in collate(samples).items() if k != "labels"}
    batches = first_batches(trainer, 3)
    assert all(("labels" in batch) == with_labels for batch in batches)
    losses = [trainer.compute_loss(trainer.model, batch) for batch in batches]
    mean = sum(losses) / 3
    mean.backward()
    expected = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.train()
    assert logged(trainer)[0]["loss"] == pytest.approx(mean.item(), rel=LOGGED)
    assert logged(trainer)[0]["contrastive"] == pytest.approx(mean.item(), rel=EXACT)  # the teacher is the student
    assert spy.gradients[0].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(spy.gradients[0][name], gradient, atol=EXACT, rtol=EXACT)


def test_logged_terms_are_weighted_like_the_loss_when_the_last_group_is_short(make_trainer):
    """6 micro-batches an epoch in groups of 4 and 2: the loss is the mean of the two groups' means."""
    trainer = make_trainer(preset="flyp", gradient_accumulation_steps=4, logging_steps=2, max_steps=4)
    trainer.train()
    assert len(logged(trainer)) == 2
    for entry in logged(trainer):
        assert entry["contrastive"] == pytest.approx(entry["loss"], rel=1e-6)


def test_every_parameter_gets_a_gradient(make_trainer):
    """DDP runs with find_unused_parameters=False."""
    spy = Spy()
    make_trainer(max_steps=1, trainer={"callbacks": [spy]}).train()
    names = {n for n, _ in make_trainer().model.named_parameters()}
    assert spy.gradients[0].keys() == names


def test_bf16_autocast_keeps_losses_in_float32(make_trainer):
    trainer = make_trainer(bf16=True, preset="carot-2024")
    (batch,) = first_batches(trainer, 1)
    with trainer.accelerator.autocast():
        terms, _ = trainer.loss_terms(trainer.model, batch)
    assert all(term.dtype == torch.float32 for term in terms.values())
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in logged(trainer))
    assert all(p.dtype == torch.float32 for p in trainer.teacher.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_trained_and_calibrated_in_float32(make_trainer, processor, dtype):
    """At these rates a bf16 weight would not move, and a bf16 scale could not hold a temperature."""
    trainer = make_trainer(tiny_clip(processor.tokenizer).to(dtype), learning_rate=1e-5)
    before = trainer.teacher.model.visual_projection.weight.clone()
    trainer.train()
    after = trainer.teacher.model.visual_projection.weight
    assert {p.dtype for p in [*trainer.model.parameters(), *trainer.teacher.model.parameters()]} == {torch.float32}
    assert 0 < (before - after).abs().max() < 1e-4
    trainer.calibrate()


# ---- teacher in the loop ----


def test_teacher_follows_the_schedule(make_trainer):
    """Replay the student's weights after each step by hand."""
    snapshots = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            snapshots.append(model.visual_projection.weight.detach().clone())

    trainer = make_trainer(
        max_steps=7, teacher_update_every=3, teacher_momentum_ramp=1.0, trainer={"callbacks": [Keep()]}
    )
    expected = trainer.model.visual_projection.weight.detach().clone()
    trainer.train()
    for step in (3, 6):
        momentum = ema_momentum(step, 7, ramp=1.0)
        assert 0.05 < momentum < 0.9
        expected = momentum * expected + (1 - momentum) * snapshots[step - 1]
    torch.testing.assert_close(trainer.teacher.model.visual_projection.weight, expected)


def test_frozen_teacher_never_moves(make_trainer):
    trainer = make_trainer(teacher_update_every=0)
    before = {n: p.clone() for n, p in trainer.teacher.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(before[n], p) for n, p in trainer.teacher.model.named_parameters())


def test_a_second_run_starts_with_the_teacher_at_the_student(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.train()
    first = [entry for entry in logged(trainer) if entry["step"] == 1]
    assert first[-1]["distillation"] == pytest.approx(0, abs=1e-6)


# ---- weight decay, logit scale ----


def decayed(trainer):
    trainer.create_optimizer()
    groups = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    return {name for name, p in trainer.model.named_parameters() if groups[id(p)] > 0}


def test_weight_decay_spares_tensors_of_fewer_than_two_dimensions(make_trainer):
    trainer = make_trainer()
    names = decayed(trainer)
    assert names == {n for n, p in trainer.model.named_parameters() if p.dim() >= 2}
    assert "logit_scale" not in names
    assert "vision_model.embeddings.class_embedding" not in names
    assert "visual_projection.weight" in names


def test_parity_decays_everything_and_never_clamps(make_trainer, processor):
    spy = Spy()
    model = tiny_clip(processor.tokenizer, logit_scale_init_value=5.5)
    trainer = make_trainer(model, parity=True, trainer={"callbacks": [spy]})
    assert decayed(trainer) == {n for n, _ in trainer.model.named_parameters()}
    trainer.train()
    assert min(spy.scales) > math.log(100)


def test_logit_scale_never_exceeds_ln_100_in_training(make_trainer, processor):
    seen = []

    class Watched(CaRotTrainer):
        def loss_terms(self, model, inputs):
            seen.append(model.logit_scale.item())
            return super().loss_terms(model, inputs)

    spy = Spy()
    trainer = make_trainer(tiny_clip(processor.tokenizer, logit_scale_init_value=5.5), trainer={"callbacks": [spy]})
    trainer.__class__ = Watched
    trainer.train()
    assert len(seen) == 4
    assert max(seen + spy.scales) <= math.log(100) + 1e-6
    assert trainer.teacher.model.logit_scale.item() <= math.log(100) + 1e-6


def test_clamp_follows_the_option(make_trainer, processor):
    trainer = make_trainer(tiny_clip(processor.tokenizer, logit_scale_init_value=5.5), max_logit_multiplier=20)
    trainer.train()
    assert math.exp(trainer.model.logit_scale.item()) <= 20.0001
    trainer = make_trainer(tiny_clip(processor.tokenizer, logit_scale_init_value=5.5), max_logit_multiplier=0)
    trainer.train()
    assert trainer.model.logit_scale.item() > math.log(100)


# ---- faults ----


def test_nan_loss_stops_the_run_and_names_step_and_checkpoint(make_trainer, tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.visual_projection.weight.fill_(float("nan"))

    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=2, trainer={"callbacks": [Poison()]})
    with pytest.raises(RuntimeError, match=r"finite loss at step 4, got nan.*checkpoint-2"):
        trainer.train()
    kept = Path(trainer.args.output_dir) / "checkpoint-2"
    weights = CLIPModel.from_pretrained(kept).state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())
    resumed = make_trainer(max_steps=6, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(("save", "step"), [("steps", 2), ("no", 3)])
def test_broken_weights_are_never_saved_or_returned(make_trainer, save, step):
    """An update that blows up leaves a finite loss behind: the weights themselves are checked."""

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                with torch.no_grad():
                    model.text_projection.weight[0, 0] = float("inf")

    trainer = make_trainer(max_steps=step, save_strategy=save, save_steps=1, trainer={"callbacks": [Poison()]})
    kept = r"The last checkpoint is .*checkpoint-1\." if save == "steps" else "No checkpoint was kept yet"
    with pytest.raises(RuntimeError, match=rf"finite weights after step {step}, got nan or inf in `text_proj.*{kept}"):
        trainer.train()
    assert not (Path(trainer.args.output_dir) / f"checkpoint-{step}").exists()


def test_nan_loss_without_checkpoint_says_so(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"at step 1, got nan. No checkpoint was kept yet"):
        trainer.train()


def test_wrong_model_or_arguments_are_refused(suite, processor, model, tmp_path):
    args = CaRotTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=r"Expected a transformers model of CLIPModel, .*got Linear"):
        CaRotTrainer(model=torch.nn.Linear(2, 2), args=args, suite=suite, processing_class=processor)
    stock = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="from_preset"):
        CaRotTrainer(model=model, args=stock, suite=suite, processing_class=processor)
    with pytest.raises(ValueError, match="processor of the model, got None"):
        CaRotTrainer(model=model, args=args, suite=suite, processing_class=None)
    for option in ("compute_loss_func", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"no `{option}`"):
            CaRotTrainer(model=model, args=args, suite=suite, processing_class=processor, **{option: print})


def test_training_set_smaller_than_a_batch_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"one whole batch of 32 samples in set 'train', got 26\. Lower"):
        make_trainer(per_device_train_batch_size=32).train()
    trainer = make_trainer(per_device_train_batch_size=32, dataloader_drop_last=False, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_in_training_names_set_and_index(make_trainer, suite, workers):
    rows = [{"image": Image.new("RGB", (9, 9)), "label": 0}] * 5 + [{"image": None, "label": 0}] * 3
    trainer = make_trainer(trainer={"train_dataset": rows}, dataloader_num_workers=workers)
    with pytest.raises(ValueError, match=r"decoded in set 'train' at index [567], got"):
        trainer.train()


def test_a_training_set_of_ones_own_is_checked_like_the_suites(make_trainer):
    image = Image.new("L", (9, 9))

    def train_on(rows):
        make_trainer(trainer={"train_dataset": rows}).train()

    train_on([{"image": image, "label": i % 4} for i in range(8)])  # grey images become RGB
    with pytest.raises(ValueError, match=r"labels in \[0, 4\) in set 'train', got -1 at index [0-7]"):
        train_on([{"image": image, "label": -1}] * 8)
    with pytest.raises(ValueError, match="at least one sample in set 'train'"):
        train_on([])
    with pytest.raises(ValueError, match="Expected labels in set 'train', got none"):
        train_on([{"image": image}] * 8)
    with pytest.raises(ValueError, match="a data set with a length for 'train', got list_iterator"):
        train_on(iter([{"image": image, "label": 0}] * 8))


def test_processes_that_do_not_know_of_each_other_are_refused(make_trainer, monkeypatch):
    """torchrun on a machine without accelerators and without --use_cpu: two ranks, each of which is its own world."""
    args = make_trainer().args
    check_launch(args)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"Expected 2 processes that train together, got 1 .* add `--use_cpu`"):
        check_launch(args)


def test_model_init_makes_a_prepared_model_for_each_run(suite, processor, make_trainer):
    def legacy():
        model = tiny_clip(processor.tokenizer)
        model.text_model.eos_token_id = model.config.text_config.eos_token_id = 2
        return model

    args = make_trainer(max_steps=2).args
    trainer = CaRotTrainer(args=args, model_init=legacy, suite=suite, processing_class=processor)
    trainer.train()
    assert trainer.model.text_model.eos_token_id == processor.tokenizer.eos_token_id
    first = logged(trainer)[0]
    trainer.train()
    again = logged(trainer)[0]
    assert first["loss"] == again["loss"]
    assert again["distillation"] == pytest.approx(0, abs=1e-6)


def test_caption_beyond_the_context_is_refused_before_training(make_trainer, suite):
    suite.templates = ["a photo of " + "very " * 40 + "{}"]
    with pytest.raises(ValueError, match=r"at most 32 tokens .* got \d+ for 'a photo of very"):
        make_trainer(suite=suite)


def test_end_marker_is_the_tokenizers_in_model_and_config(make_trainer, processor):
    """A checkpoint with the legacy id 2 pools at the largest id; the trained and the saved model must pool alike."""
    legacy = tiny_clip(processor.tokenizer)
    legacy.config.text_config.eos_token_id = 2
    legacy.text_model.eos_token_id = 2
    trainer = make_trainer(legacy)
    assert trainer.model.text_model.eos_token_id == processor.tokenizer.eos_token_id
    trainer.save_model()
    saved = json.loads((Path(trainer.args.output_dir) / "config.json").read_text())
    assert saved["text_config"]["eos_token_id"] == processor.tokenizer.eos_token_id
    tokens = processor.tokenizer(["the number one"], return_tensors="pt")
    loaded = CLIPModel.from_pretrained(trainer.args.output_dir)
    torch.testing.assert_close(
        loaded.get_text_features(**tokens).pooler_output, trainer.model.get_text_features(**tokens).pooler_output
    )
