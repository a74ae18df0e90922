"""Which sets an evaluation during training measures, and what needs others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toys import noise_set
from transformers import TrainerCallback
from transformers import trainer as module
from transformers.trainer_utils import BestRun

EVERY = {"validation", "home", "far", "part", "id", "ood"}
WATCHED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}


class Sets(TrainerCallback):
    """Of each evaluation the sets that have an accuracy."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        found = {key for key in metrics if key.startswith("eval_") and key.endswith("_accuracy")}
        self.seen.append({key[5:-9] for key in found if not key.endswith("top5_accuracy")})


@pytest.mark.parametrize(("chosen", "sets"), [({}, {"validation"}), ({"eval_sets": "all"}, EVERY)])
def test_an_evaluation_during_training_measures_what_was_asked_for(make_trainer, chosen, sets):
    watch = Sets()
    trainer = make_trainer(**WATCHED, **chosen, eval_on_start=True, trainer={"callbacks": [watch]})
    trainer.train()
    assert watch.seen == [sets, sets]
    during = [entry for entry in trainer.state.log_history if "eval_validation_nll" in entry][-1]
    assert ("eval_temperature" in during, "eval_ood_ece_ts" in during) == (True, sets == EVERY)
    metrics = trainer.evaluate()
    assert watch.seen[-1] == EVERY  # afterwards all, and what was measured before is the same
    for name in ("eval_validation_nll", "eval_validation_ece", "eval_temperature"):
        assert metrics[name] == during[name]


def test_fewer_images_are_embedded(make_trainer, suite):
    seen = []

    class Count(TrainerCallback):
        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            seen.append(len(eval_dataloader.dataset))

    make_trainer(**WATCHED, trainer={"callbacks": [Count()]}).train()
    assert set(seen) == {len(suite.validation)} == {15}


def test_explicit_sets_are_measured_as_they_are(make_trainer, suite):
    """Also from within a training, by somebody's callback; and sets passed to the trainer are the user's choice."""
    found = []

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(trainer.evaluate({"far": suite.shifts["far"]}, metric_key_prefix="own"))
            found.append(trainer.evaluate("home", metric_key_prefix="own"))

    trainer = make_trainer(max_steps=1, trainer={"callbacks": [Ask()]})
    trainer.train()
    assert ["own_far_nll" in found[0], "own_home_nll" in found[1]] == [True, True]
    watch, extra = Sets(), noise_set("extra", 9, 7)
    passed = {"validation": suite.validation, "extra": extra}
    make_trainer(**WATCHED, trainer={"eval_dataset": passed, "callbacks": [watch]}).train()
    assert watch.seen == [{"validation", "extra"}]
    watch.seen.clear()
    options = {"metric_for_best_model": "eval_extra_nll", "greater_is_better": False}
    trained = make_trainer(**WATCHED, **options, trainer={"eval_dataset": passed, "callbacks": [watch]})
    trained.train()
    assert trained.state.best_metric == trained.state.log_history[-2]["eval_extra_nll"]


def test_after_a_training_that_failed_all_sets_are_measured_again(make_trainer):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ArithmeticError("mine")

    trainer = make_trainer(trainer={"callbacks": [Fail()]})
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert "eval_ood_nll" in trainer.evaluate()


@pytest.mark.parametrize("metric", ["eval_id_accuracy", "home_nll", "eval_id_ece_ts"])
def test_a_metric_that_would_not_be_there_is_refused(make_trainer, metric):
    message = f"Expected `metric_for_best_model` of the set 'validation' .*got '{metric}'. Pass `eval_sets` 'all'"
    with pytest.raises(ValueError, match=message):
        make_trainer(**WATCHED, metric_for_best_model=metric)
    make_trainer(**WATCHED, metric_for_best_model=metric, eval_sets="all").train()
    make_trainer(metric_for_best_model=metric)  # no evaluation during training: a search asks for it afterwards


def test_a_suite_without_a_validation_set_is_refused_with_the_cure(make_trainer, suite):
    with pytest.raises(ValueError, match=r"Expected a validation set .*Add it: `validation: 0.1`"):
        make_trainer(suite=replace(suite, validation=None), **WATCHED)
    trainer = make_trainer(**WATCHED)
    trainer.suite = replace(suite, validation=None)
    trainer.eval_dataset = trainer.suite.evaluation_sets
    with pytest.raises(ValueError, match="Expected a validation set to measure during training"):
        trainer.train()


def test_other_words_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"Expected `eval_sets` to be one of .'validation', 'all'., got 'none'"):
        make_trainer(eval_sets="none")


def test_a_search_says_what_its_objective_misses(make_trainer, monkeypatch):
    class Backend:
        default_hp_space = staticmethod(lambda trial: {})

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            trainer.is_in_train = True  # as in a trial that evaluates during training
            return BestRun("0", trainer.compute_objective(trainer.evaluate()), {})

    monkeypatch.setitem(module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, module.HPSearchBackend.OPTUNA, Backend)

    def search(objective, **options):
        trainer = make_trainer(**options)
        trainer.model_init = lambda: None
        return trainer.hyperparameter_search(backend="optuna", compute_objective=objective).objective

    assert search(None) == search(lambda metrics: metrics["eval_validation_nll"])
    with pytest.raises(ValueError, match=r"asks for 'eval_home_nll'. Pass `eval_sets` 'all'"):
        search(lambda metrics: metrics["eval_home_nll"])
    assert search(lambda metrics: metrics["eval_home_nll"], eval_sets="all") > 0
    with pytest.raises(KeyError, match="mine"):
        search(lambda metrics: metrics["mine"])


def test_a_resumed_run_may_measure_others_and_says_so(make_trainer, tmp_path, caplog):
    options = {**WATCHED, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**options).train()
    watch = Sets()
    resumed = make_trainer(**{**options, "max_steps": 4}, eval_sets="all", trainer={"callbacks": [watch]})
    resumed.train(resume_from_checkpoint=True)
    assert watch.seen == [EVERY]
    assert "Resumed after step 2 with `eval_sets` validation -> all: applied." in caplog.text
