"""What is asked for acts, or is refused by name: arguments, metrics that choose, subclasses, modes."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import ROOT, noise_set, tiny_clip, tiny_processor
from transformers import EarlyStoppingCallback
from transformers import trainer as module
from transformers.trainer_utils import BestRun

from carot_hf import CaRotTrainer, CaRotTrainingArguments, CLIPClassifier, Teacher, TeacherCallback, export_classifier
from carot_hf.calibration.metrics import METRICS, calibration_metrics, scaled_metrics
from carot_hf.calibration.names import greater_is_better, parse_metric, set_of
from carot_hf.data.captions import class_embeddings
from carot_hf.data.groups import Groups


def make(tmp_path, preset="carot", **options):
    return CaRotTrainingArguments.from_preset(preset, output_dir=str(tmp_path), use_cpu=True, **options)


# ---- subclasses of users ----


class Plain(CaRotTrainingArguments):
    pass


@dataclasses.dataclass(repr=False)
class Longer(CaRotTrainingArguments):
    note: str = "none"
    tags: list[str] = dataclasses.field(default_factory=list)
    wandb_api_key: str = ""
    teacher_beta: float = 0.25


def test_arguments_of_a_subclass_say_what_changed(tmp_path):
    expected = make(tmp_path, seed=7, same_class="ignore").changed()
    assert {"seed": 7, "same_class": "ignore"}.items() <= expected.items()
    options = {"output_dir": str(tmp_path), "use_cpu": True, "seed": 7, "same_class": "ignore"}
    for kind, more in ((Plain, {}), (Longer, {"teacher_beta": 0.25})):
        assert kind.from_preset("carot", **options).changed() == expected | more
    assert Plain.from_preset("carot", **options, resume_from_checkpoint="/home/me/run").changed() == expected
    longer = Longer.from_preset("carot", **options, note="x", tags=["a"], wandb_api_key="secret")
    assert longer.changed() == expected | {"note": "x", "tags": ["a"], "teacher_beta": 0.25}


def test_subclasses_of_trainer_callback_teacher_and_classifier_work(make_trainer, model, suite, processor, tmp_path):
    class Mine(CaRotTrainer):
        def compute_loss(self, *args, **kwargs):
            calls.append(1)
            return super().compute_loss(*args, **kwargs)

    class MyTeacher(Teacher):
        pass

    class MyCallback(TeacherCallback):
        def on_step_end(self, *args, **kwargs):
            calls.append(2)
            super().on_step_end(*args, **kwargs)

    class MyClassifier(CLIPClassifier):
        pass

    calls = []
    args = Longer.from_preset("carot", **{**make_trainer().args.to_dict(), "distillation_weight": 0.75, "note": "x"})
    second = MyTeacher(model)
    callback = MyCallback(second, lambda step, total: 0.5, 1, save_as="second.safetensors")
    trainer = Mine(model=model, args=args, suite=suite, processing_class=processor, callbacks=[callback])
    trainer.train()
    assert calls.count(1) == calls.count(2) == 4
    assert not torch.equal(second.model.logit_scale, model.logit_scale)
    made = MyClassifier.from_clip(model.eval(), class_embeddings(model, trainer.captions))
    made.save_pretrained(tmp_path / "made")
    assert type(MyClassifier.from_pretrained(tmp_path / "made")) is MyClassifier


# ---- the mode that a model was left in ----


def dropping():
    """Text dropout that acts in training mode."""
    model = tiny_clip(tiny_processor().tokenizer)
    for layer in model.text_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    return model


def test_exports_do_not_depend_on_the_mode_the_model_was_left_in(make_trainer):
    trainer = make_trainer(dropping())
    trainer.model.eval()
    expected = trainer.export_classifier()
    trainer.model.train()
    for _ in range(2):
        made = trainer.export_classifier()
        assert torch.equal(made.head.weight, expected.head.weight)
        assert not any(module.training for module in made.modules())
    assert all(module.training for module in trainer.model.modules())
    embeds = class_embeddings(trainer.model, trainer.captions)
    assert torch.equal(export_classifier(trainer.model, embeds).head.weight, expected.head.weight)
    part = trainer.model.text_model.eval()  # modes are put back one by one
    class_embeddings(trainer.model, trainer.captions)
    assert not part.training
    assert trainer.model.vision_model.training


@pytest.mark.parametrize("preset", ["carot", "ft", "lp-ft"])
def test_nothing_that_evaluates_depends_on_the_mode(make_trainer, preset):
    found = []
    for mode in (False, True):
        start = dropping().train(mode)
        trainer = make_trainer(start, preset=preset, max_steps=1, learning_rate=0.0)
        trainer.model.train(mode)
        metrics = {k: v for k, v in trainer.evaluate().items() if "second" not in k and "runtime" not in k}
        trainer.model.train(mode)
        predictions = trainer.predict(trainer.suite.test).predictions
        trainer.model.train(mode)
        trainer.train()
        trainer.model.train(mode)
        found.append((metrics, predictions.tolist(), trainer.calibrate()))
        if preset != "carot":
            trainer.model.train()
            assert not trainer.export_classifier().training
    assert repr(found[0]) == repr(found[1])


# ---- metrics that choose a model ----


def test_each_metric_has_a_direction():
    logits, labels = 2 * torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    assert set(METRICS) == set(calibration_metrics(logits, labels))
    higher = {name for name in METRICS if name != "overconfidence" and greater_is_better(f"eval_id_{name}")}
    assert higher == {"accuracy", "top5_accuracy", "auroc", "macro_f1"}
    assert greater_is_better("eval_id_worst_group_accuracy")
    assert not greater_is_better("eval_id_worst_group_ece")
    assert not any(greater_is_better(f"eval_id_{name}_ts") for name in scaled_metrics())
    assert greater_is_better("eval_my_own")
    assert not greater_is_better("eval_my_loss")


def test_the_worst_group_may_choose_the_model_where_there_are_groups(make_trainer, suite):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"metric_for_best_model": "eval_validation_worst_group_accuracy", "load_best_model_at_end": True}
    with pytest.raises(ValueError, match="got 'eval_validation_worst_group_accuracy'"):
        make_trainer(**options)
    suite.validation.groups = Groups(["odd", "even"], [index % 2 for index in range(len(suite.validation))])
    trainer = make_trainer(**options)
    trainer.train()
    found = [e["eval_validation_worst_group_accuracy"] for e in trainer.state.log_history if "eval_runtime" in e]
    assert len(found) == 2
    assert trainer.state.best_metric == max(found)


@pytest.mark.parametrize("name", ["eval_validation_overconfidence", "eval_id_overconfidence", "overconfidence"])
def test_a_signed_metric_chooses_no_model(tmp_path, name):
    for greater in (None, True, False):
        with pytest.raises(ValueError, match=r"which is signed and best at 0\. Use 'eval_validation_nll'"):
            make(tmp_path, metric_for_best_model=name, greater_is_better=greater)


def renamed(suite, test, shift):
    data = suite.shifts["far"]
    data.name = shift
    return dataclasses.replace(suite, test=noise_set(test, 19, 2), shifts={shift: data})


@pytest.mark.parametrize(("test", "shift"), [("pets_home", "pets"), ("ood_x", "far"), ("id_x", "x")])
def test_names_of_sets_are_matched_whole(make_trainer, suite, test, shift):
    own = renamed(suite, test, shift)
    for metric in (f"eval_{test}_ece", f"{test}_nll_ts", "eval_id_ece"):
        assert make_trainer(suite=own, metric_for_best_model=metric).args.greater_is_better is False
    for metric in (f"eval_{shift}_ece", f"{shift}_accuracy", f"eval_{shift}_nll_ts", f"teacher_{shift}_ece", "ood_ece"):
        with pytest.raises(ValueError, match="of the in-distribution or the validation set, got"):
            make_trainer(suite=own, metric_for_best_model=metric)
    with pytest.raises(ValueError, match="Choosing a model by shifted test sets"):  # one of their own metrics
        make_trainer(
            suite=own, metric_for_best_model=f"eval_{shift}_mine", trainer={"compute_metrics": lambda _: {"mine": 1}}
        )
    make_trainer(
        suite=own, metric_for_best_model=f"eval_{test}_mine", trainer={"compute_metrics": lambda _: {"mine": 1}}
    )


def test_two_sets_whose_metrics_would_have_one_name_are_refused(suite):
    with pytest.raises(ValueError, match="one name for each metric, got 'pets_top5_accuracy' for two"):
        renamed(suite, "pets", "pets_top5")
    assert renamed(suite, "pets", "pets_home").shifts


def test_names_are_parsed_whole():
    assert parse_metric("eval_pets_home_ece", ["pets", "pets_home"]) == [("pets_home", "ece")]
    assert parse_metric("eval_pets_ece_batch_mean", ["pets", "pets_ece"]) == [("pets", "ece_batch_mean")]
    assert parse_metric("eval_pets_ecex", ["pets"]) == []
    assert set_of("eval_pets_home_mine", ["pets", "pets_home"]) == "pets_home"
    assert set_of("eval_petshome_mine", ["pets"]) is None


def test_a_choice_by_the_test_set_is_said_and_stands_in_the_card(make_trainer, caplog):
    both = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    both["eval_sets"] = "all"
    cards = {}
    for metric in ("eval_id_nll", "eval_home_nll", "eval_validation_nll"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer(**both, load_best_model_at_end=True, metric_for_best_model=metric)
        said = (
            f"`metric_for_best_model` {metric} chooses the model by the test set 'home', which is reported"
            in caplog.text
        )
        assert said == (metric != "eval_validation_nll")
        trainer.create_model_card()
        assert "were chosen by" not in Path(trainer.args.output_dir, "README.md").read_text()  # nothing was yet
        trainer.train()
        trainer.evaluate()
        trainer.create_model_card()
        cards[metric] = Path(trainer.args.output_dir, "README.md").read_text()
        assert (f"**These weights were chosen by `{metric}`**" in cards[metric]) == said


def test_a_search_is_for_the_metric_that_chooses_and_sees_no_shift(make_trainer, monkeypatch):
    class Backend:
        default_hp_space = staticmethod(lambda trial: {})

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            metrics = trainer.evaluate()
            return BestRun("0", trainer.compute_objective(metrics), {"direction": direction, "metrics": metrics})

    monkeypatch.setitem(module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, module.HPSearchBackend.OPTUNA, Backend)
    seen = []
    for metric, direction in (
        (None, "minimize"),
        ("validation_nll", "minimize"),
        ("eval_validation_accuracy", "maximize"),
    ):
        trainer = make_trainer(metric_for_best_model=metric)
        trainer.model_init = lambda: None
        best = trainer.hyperparameter_search(backend="optuna")
        name = f"eval_{(metric or 'validation_nll').removeprefix('eval_')}"
        assert best.objective == best.hyperparameters["metrics"][name]
        assert best.hyperparameters["direction"] == direction
        other = {"minimize": "maximize", "maximize": "minimize"}[direction]
        with pytest.raises(ValueError, match=f"Expected `direction` '{direction}' for"):
            trainer.hyperparameter_search(backend="optuna", direction=other)
    best = trainer.hyperparameter_search(
        backend="optuna", compute_objective=lambda metrics: seen.append(metrics) or 1.0, direction="maximize"
    )
    assert {"eval_home_nll", "eval_id_nll", "eval_validation_nll", "eval_temperature"} <= seen[0].keys()
    assert not [name for name in seen[0] if "_far_" in name or "_part_" in name or "_ood_" in name]


def test_a_search_of_optuna_goes_through_all_its_trials(make_trainer, suite, processor):
    """The second trial ended in an AttributeError; with and without a teacher."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    arguments = make_trainer(eval_strategy="steps", eval_steps=2, max_steps=2).args
    searching = CaRotTrainer(
        None, arguments, suite=suite, processing_class=processor, model_init=lambda: tiny_clip(processor.tokenizer)
    )
    space = {"distillation_weight": [0.0, 1.0]}
    best = searching.hyperparameter_search(
        lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        backend="optuna",
        n_trials=2,
        sampler=optuna.samplers.GridSampler(space, seed=0),
    )
    assert best.hyperparameters.keys() == space.keys()
    found = {}
    for weight in space["distillation_weight"]:
        single = make_trainer(max_steps=2, distillation_weight=weight)
        single.train()
        found[weight] = single.evaluate()["eval_validation_nll"]
    assert best.objective == pytest.approx(min(found.values()), abs=1e-6)
    assert found[best.hyperparameters["distillation_weight"]] == min(found.values())


@pytest.mark.parametrize("metric", [None, "eval_validation_nll", "eval_validation_accuracy"])
def test_a_plateau_is_one_of_our_metric(make_trainer, metric):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": metric, "max_steps": 4}
    trainer = make_trainer(**options, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.args.metric_for_best_model == (metric or "eval_validation_nll")
    assert trainer.lr_scheduler.mode == ("max" if metric == "eval_validation_accuracy" else "min")
    with pytest.raises(ValueError, match="reduce_lr_on_plateau requires an eval strategy"):
        make_trainer(**options)
    other = {"max": "min", "min": "max"}[trainer.lr_scheduler.mode]
    with pytest.raises(ValueError, match=f"Expected `mode` '{trainer.lr_scheduler.mode}' in `lr_scheduler_kwargs`"):
        make_trainer(**options, eval_strategy="steps", lr_scheduler_kwargs={"mode": other})


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` False, got True.*Set `contrastive_batch_size`"),
        ({"include_for_metrics": ["inputs"]}, r"`include_for_metrics` \[\], got \['inputs'\]"),
        ({"prediction_loss_only": True}, "`prediction_loss_only` False"),
        ({"label_names": ["label"]}, "`label_names` None"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` False"),
        ({"enable_jit_checkpoint": True}, "`enable_jit_checkpoint` False"),
        ({"eval_use_gather_object": True}, "`eval_use_gather_object` False"),
        ({"dataloader_in_order": False}, "`dataloader_in_order` True"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches` of `accelerator_config` unset, got True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches` of `accelerator_config` unset"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` None"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` False"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` 'random'"),
        ({"per_device_train_batch_size": 1}, "two pairs or more in the contrastive loss, got 1"),
        ({"fp16": True}, "a GPU for `fp16`, got none. Use `bf16`"),
        ({"preset": "carot-2024", "freeze": "vision"}, "`orthogonality_weight` 0 with `freeze` 'vision'"),
        ({"preset": "carot-2024", "freeze": "text"}, "`cross_norm_weight` 0 with `freeze` 'text'"),
        ({"preset": "tracer", "freeze": "vision"}, "`cross_norm_weight` 0 with `freeze` 'vision'"),
    ],
)
def test_arguments_that_would_do_something_else_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"Expected.*{message}"):
        make(tmp_path, **options)


def test_one_pair_at_a_time_is_no_contrastive_batch_of_one(tmp_path):
    assert make(tmp_path, per_device_train_batch_size=1, contrastive_batch_size=4).gradient_accumulation_steps == 4
    assert make(tmp_path, preset="ft", per_device_train_batch_size=1).per_device_train_batch_size == 1
    assert make(tmp_path, preset="carot-2024", freeze="text", cross_norm_weight=0.0).freeze == "text"


def test_a_card_says_who_chose_only_where_something_did(make_trainer):
    """A metric that is only followed, with checkpoints of its best step, chooses nothing."""
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    for callbacks, chooses in (([], False), ([EarlyStoppingCallback(3)], True)):
        options = {**steps, "overwrite_output_dir": True, "eval_sets": "all", "metric_for_best_model": "eval_id_nll"}
        trainer = make_trainer(**options, trainer={"callbacks": callbacks})
        trainer.train()
        trainer.evaluate()
        trainer.create_model_card()
        card = Path(trainer.args.output_dir, "README.md").read_text()
        assert ("**These weights were chosen by `eval_id_nll`**" in card) == chooses


def test_a_last_batch_of_one_pair_is_refused(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=5, dataloader_drop_last=False)  # of 26 samples
    with pytest.raises(ValueError, match="two pairs or more in every batch, got a last one of 1 from the 26 samples"):
        trainer.train()
    make_trainer(preset="ft", per_device_train_batch_size=5, dataloader_drop_last=False, max_steps=1).train()
    cache = {"per_device_train_batch_size": 5, "contrastive_batch_size": 25}  # which leaves the last one out
    make_trainer(**cache, dataloader_drop_last=False, max_steps=1).train()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize("how", ["wrapped", "inside", "tower"])
def test_a_compiled_model_is_refused(make_trainer, model, how):
    if how == "inside":
        model.compile()
    elif how == "tower":
        model.vision_model = torch.compile(model.vision_model)
    else:
        model = torch.compile(model)
    with pytest.raises(TypeError, match=r"Expected a model that is not compiled, got a .*`torch_compile` True"):
        make_trainer(model)


@pytest.mark.parametrize(
    "command",
    [
        ["finetune_imagenet.py", "--suite", "digits", "--use_cpu", "--model_name_or_path", "no/such/model"],
        ["finetune_imagenet.py", "--suite", "digits", "--fp16"],
        ["interpolate.py", "--suite", "digits", "--fine_tuned", "no/such/model"],
        ["export_onnx.py", "--suite", "digits", "--model", "no/such/model", "--output", "x.onnx"],
    ],
)
@pytest.mark.slow
def test_scripts_end_with_a_line_on_what_the_user_can_mend(command, tmp_path):
    script, *options = command
    if script != "export_onnx.py":
        options += ["--output_dir", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{script}: ")
    assert "GPU for `fp16`" in last or "no/such/model" in last
    assert not (tmp_path / "out").exists()
