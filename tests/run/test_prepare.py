"""What is decided about a run is decided when it begins, for the model and the arguments of that moment."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import EXACT
from toys import CLASSES, noise_set, tiny_clip
from transformers.trainer_utils import HPSearchBackend

from carot_hf import CaRotTrainer, bake_temperature
from carot_hf.models.prepare import FROZEN
from carot_hf.teacher.file import TEACHER_NAME


def with_model_init(make_trainer, processor, suite, init=None, preset="carot", **arguments):
    """A trainer that makes its models itself; the tiny model is random, but the same each time."""
    args = make_trainer(preset=preset, **arguments).args
    init = init or (lambda: tiny_clip(processor.tokenizer))
    return CaRotTrainer(args=args, model_init=init, suite=suite, processing_class=processor)


def weights(model, tower):
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.startswith(FROZEN[tower])}


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_freeze_holds_for_models_of_model_init(make_trainer, processor, suite, tower):
    trainer = with_model_init(make_trainer, processor, suite, freeze=tower)
    trainer.train()
    before, after = weights(tiny_clip(processor.tokenizer), tower), weights(trainer.model, tower)
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    other = {"vision": "text", "text": "vision"}[tower]
    moved = weights(tiny_clip(processor.tokenizer), other)
    assert not all(torch.equal(value, moved[name]) for name, value in weights(trainer.model, other).items())


def test_the_linear_probe_is_fitted_on_the_model_that_is_trained(make_trainer, processor, suite):
    """With a learning rate of 0 what is left is the probe's head, with `model_init` as without."""
    options = {"preset": "lp-ft", "learning_rate": 0.0, "max_steps": 1}
    plain = make_trainer(**options)
    start = plain.model.head.weight.detach().clone()
    plain.train()
    assert not torch.equal(plain.model.head.weight, start)
    made = with_model_init(make_trainer, processor, suite, **options)
    made.train()
    assert torch.equal(made.model.head.weight, plain.model.head.weight)
    assert torch.equal(made.model.head.bias, plain.model.head.bias)


def test_sources_of_the_prompts_are_in_the_config_of_each_model(make_trainer, processor, suite):
    suite.sources.update(class_names="a list", templates="another")
    for preset in ("carot", "ft"):
        trainer = with_model_init(make_trainer, processor, suite, preset=preset, max_steps=1)
        trainer.train()
        assert trainer.model.config.prompt_sources == {"class_names": "a list", "templates": "another"}


def test_a_calibrated_model_of_model_init_loses_the_record(make_trainer, processor, suite):
    def calibrated():
        model = tiny_clip(processor.tokenizer)
        bake_temperature(model, 2.0)
        return model

    trainer = with_model_init(make_trainer, processor, suite, init=calibrated, max_steps=1)
    assert trainer.model.config.calibration["temperature"] == 2.0
    trainer.train()
    assert getattr(trainer.model.config, "calibration", None) is None
    trainer.calibrate()


def test_an_optimizer_of_parameters_that_were_replaced_is_refused(make_trainer, model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="Expected an optimizer of the parameters that are trained, got one with"):
        make_trainer(model, preset="ft", trainer={"optimizers": (optimizer, None)})


def test_an_optimizer_of_the_model_trains_it_and_says_what_it_leaves_out(make_trainer, model, caplog):
    optimizer = torch.optim.AdamW(model.vision_model.parameters(), lr=1e-2)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model, trainer={"optimizers": (optimizer, None)})
    count = len(list(model.parameters()))
    left_out = count - len(list(model.vision_model.parameters()))
    assert f"{left_out} of {count} trained parameters are not in the optimizer: they stay." in caplog.text
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("vision_model") for name in moved)


def test_arguments_that_change_before_the_training_act(make_trainer):
    """As a hyperparameter search changes them: each was read in `__init__` and is read again."""
    trainer = make_trainer(preset="flyp", max_steps=4, seed=1)
    assert trainer.teacher is None
    trainer.args.distillation_weight, trainer.args.teacher_update_every, trainer.args.seed = 0.75, 3, 42
    trainer.args.max_logit_multiplier = 7.0
    trainer.train()
    fresh = make_trainer(max_steps=4, teacher_update_every=3, max_logit_multiplier=7.0)
    fresh.train()
    for name, value in fresh.teacher.state_dict().items():
        assert torch.equal(trainer.teacher.state_dict()[name], value), name
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    trainer.args.distillation_weight = 0.0
    trainer.train()
    assert trainer.teacher is None
    trainer.args.distillation_weight = -1.0
    with pytest.raises(ValueError, match="Expected `distillation_weight` >= 0"):
        trainer.train()


def test_arguments_that_shape_the_model_cannot_change_without_model_init(make_trainer):
    trainer = make_trainer()
    trainer.args.freeze = "text"
    with pytest.raises(ValueError, match="Expected `freeze` None, with which the model was prepared, got 'text'"):
        trainer.train()


def test_another_model_than_the_prepared_one_is_refused(make_trainer, model):
    trainer = make_trainer()
    trainer.model = model
    with pytest.raises(ValueError, match="Expected the CLIPModel that the trainer was made with, got another"):
        trainer.train()


def test_a_search_over_the_arguments_of_the_method_is_about_them(make_trainer, processor, suite, monkeypatch):
    """Trainer sets a trial's values after it has made the model; ours is made for them."""
    trainer = with_model_init(make_trainer, processor, suite, preset="flyp", contrastive_batch_size=8)
    trainer.hp_search_backend = HPSearchBackend.WANDB  # whose trials are dicts
    trainer.hp_name = None
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # knows packages that need not be installed
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: trainer.args.output_dir)  # else that of a W&B run
    trainer.train(trial={"learning_rate": 1e-3})
    assert trainer.teacher is None
    trial = {"distillation_weight": 0.75, "teacher_update_every": 1, "per_device_train_batch_size": 2, "freeze": "text"}
    trainer.train(trial=trial)
    assert trainer._companions.moves.update_every == 1
    assert trainer.args.gradient_accumulation_steps == 4
    before, after = weights(tiny_clip(processor.tokenizer), "text"), weights(trainer.model, "text")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.train(trial={"same_class": "ignore", "per_device_train_batch_size": 8})
    assert trainer.args.gradient_accumulation_steps == 1


def test_callbacks_that_are_added_later_see_the_teacher_after_its_update(make_trainer):
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.teacher.model.visual_projection.weight.detach().clone())

    seen = []
    trainer = make_trainer(teacher_update_every=1, teacher_momentum_start=0.0, teacher_momentum_end=0.0, max_steps=2)
    trainer.add_callback(Look())
    trainer.train()
    assert torch.equal(seen[-1], trainer.model.visual_projection.weight)


def test_a_frozen_tower_is_the_teachers_too(make_trainer, tmp_path):
    trainer = make_trainer(freeze="text", save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    student, teacher = dict(trainer.model.named_parameters()), dict(trainer.teacher.model.named_parameters())
    shared = [name for name in student if name.startswith(FROZEN["text"])]
    assert shared
    assert all(teacher[name] is student[name] for name in shared)
    assert all(value is not student[name] for name, value in teacher.items() if name not in shared)
    from safetensors import safe_open

    with safe_open(Path(trainer.args.output_dir, "checkpoint-2", TEACHER_NAME), "pt") as file:
        assert not set(shared) & set(file.keys())
    trainer.save_teacher(tmp_path / "teacher")
    saved = type(trainer.model).from_pretrained(tmp_path / "teacher")
    assert all(torch.equal(value, dict(saved.named_parameters())[name]) for name, value in teacher.items())


def test_a_half_precision_tower_that_is_frozen_is_not_shared(make_trainer, model):
    """The teacher works in float32; a tower in bfloat16 does not fit into it."""
    trainer = make_trainer(model.bfloat16(), freeze="text", float32_weights=False)
    trainer.train()
    assert trainer.model.dtype == torch.bfloat16
    assert {value.dtype for value in trainer.teacher.model.parameters()} == {torch.float32}


# ---- what an evaluation leaves for the calibration ----


class Counted:
    """Counts how many images and captions a model embeds."""

    def __init__(self, monkeypatch, model):
        self.images = self.captions = 0
        for name in ("get_image_features", "get_text_features"):
            monkeypatch.setattr(model, name, self.counting(name, getattr(model, name)))

    def counting(self, name, method):
        def call(*args, **kwargs):
            if "image" in name:
                self.images += len(kwargs["pixel_values"])
            else:
                self.captions += len(kwargs["input_ids"])
            return method(*args, **kwargs)

        return call


def test_a_calibration_after_an_evaluation_embeds_nothing_again(make_trainer, monkeypatch):
    alone = make_trainer().calibrate()
    trainer = make_trainer()
    counted = Counted(monkeypatch, trainer.model)
    trainer.evaluate()
    assert counted.captions == 4 * 3
    assert counted.images > 15
    counted.images = counted.captions = 0
    assert trainer.calibrate() == alone
    assert (counted.images, counted.captions) == (0, 0)
    trainer.predict(trainer.suite.test)
    assert counted.captions == 0  # the head is that of the same towers, whatever the temperature
    assert counted.images > 0


@pytest.mark.parametrize("part", ["vision_model", "text_model", "visual_projection", "text_projection"])
def test_weights_that_changed_are_never_calibrated_by_old_embeddings(make_trainer, part):
    trainer = make_trainer()
    trainer.evaluate()
    with torch.no_grad():
        parameter = next(getattr(trainer.model, part).parameters())
        parameter.data += torch.randn_like(parameter)  # torch counts no version of this
    fresh = make_trainer(trainer.model)
    assert trainer.evaluator.head()[0].equal(fresh.evaluator.head()[0])
    changed = trainer.calibrate()
    fresh.model.config.calibration = None
    trainer.model.logit_scale.data += np.log(changed["temperature"])
    assert fresh.calibrate()["nll_before"] == pytest.approx(changed["nll_before"], rel=1e-6)


@pytest.mark.parametrize("preset", ["carot", "ft"])
def test_training_and_other_sets_are_seen_by_a_calibration(make_trainer, suite, preset, monkeypatch):
    trainer = make_trainer(preset=preset, max_steps=2)
    trainer.evaluate()
    trainer.train()
    trained = make_trainer(preset=preset, max_steps=2)
    trained.train()
    record = trained.calibrate()
    assert trainer.calibrate() == record
    other = make_trainer(preset=preset)
    other.evaluate()
    suite.validation = noise_set("validation", 13, 9)
    assert other.calibrate()["n"] == 13


def test_every_picture_is_drawn_from_one_table(make_trainer, model, monkeypatch):
    """Calibrated or not: the file and the reporters show the same, under the same titles."""

    written, sent = [], []
    monkeypatch.setattr("carot_hf.evaluation.diagrams.write_diagrams", lambda path, tables: written.append(tables))
    monkeypatch.setattr("carot_hf.evaluation.trainer.send_diagrams", lambda callbacks, tables, **_: sent.append(tables))
    trainer = make_trainer(model.double(), reliability_diagrams=True)
    before = trainer.evaluate()
    temperature = trainer.calibrate()["temperature"]
    after = trainer.evaluate()
    assert written[0] is sent[0]
    assert written[1] is sent[1]
    titles = {"as trained", f"T = {temperature:.3f}"}
    for tables in written:
        assert tables["home"].keys() == titles
        assert tables["home"]["as trained"].ece == pytest.approx(before["eval_home_ece"], abs=EXACT)
        assert tables["home"][f"T = {temperature:.3f}"].ece == pytest.approx(after["eval_home_ece"], abs=EXACT)


def test_a_temperature_of_few_rows_is_said_with_its_interval(make_trainer, suite, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer().calibrate()
    assert "is fitted on 15 rows only: its 95 % interval is" in caplog.text
    assert "Hold out 50 rows or more" in caplog.text
    caplog.clear()
    suite.validation = noise_set("validation", 50, 1)
    with caplog.at_level(logging.WARNING):
        make_trainer().calibrate()
    assert "rows only" not in caplog.text
    assert len(CLASSES) == 4
