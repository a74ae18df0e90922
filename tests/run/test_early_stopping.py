"""Early stopping by arguments: when it stops, what it says, and that a resumed run stops where an unbroken one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from carot_hf import CaRotTrainingArguments
from carot_hf.basics.manifest import write_manifest
from carot_hf.run.early_stopping import EarlyStopping

# With a learning rate of 0 nothing becomes better: the first evaluation sets the mark, the others are counted.
EVERY_STEP = {"learning_rate": 0.0, "max_steps": 9, "eval_strategy": "steps", "eval_steps": 1}
SAVED = {**EVERY_STEP, "save_strategy": "steps", "save_steps": 1}


def test_it_stops_after_as_many_evaluations_without_progress_and_says_so(make_trainer, capsys):
    trainer = make_trainer(**EVERY_STEP, early_stopping_patience=3)
    trainer.train()
    assert trainer.args.metric_for_best_model == "eval_validation_nll"
    assert trainer.state.global_step == 4
    value = next(e["eval_validation_nll"] for e in trainer.state.log_history if "eval_validation_nll" in e)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped")]
    assert line == (
        f"stopped    early at step 4 of 9: eval_validation_nll {value:.4f}, best {value:.4f} at step 1, patience 3"
    )


def test_progress_is_waited_for_as_transformers_own_callback_does(make_trainer):
    """The learning rate wrecks the model sooner or later; with a metric of which more is better, and a threshold."""
    for options in (
        {"metric_for_best_model": "eval_validation_accuracy"},
        {"early_stopping_threshold": 0.01},
        {"metric_for_best_model": "validation_ece", "early_stopping_threshold": 0.05},
    ):
        shared = {**EVERY_STEP, "learning_rate": 0.05, "max_steps": 12, **options}
        ours = make_trainer(**shared, early_stopping_patience=2)
        ours.train()
        threshold = shared.pop("early_stopping_threshold", 0.0)
        shared.setdefault("metric_for_best_model", "eval_validation_nll")
        stock = make_trainer(**shared, trainer={"callbacks": [EarlyStoppingCallback(2, threshold)]})
        stock.train()
        assert ours.state.global_step == stock.state.global_step < 12


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_stops_where_the_unbroken_one_does(make_trainer, tmp_path, step):
    options = {**SAVED, "learning_rate": 0.5, "early_stopping_patience": 3, "max_steps": 12}
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
    whole.train()
    stop = whole.state.global_step
    assert 4 <= stop < 12
    start = stop - 4 + step  # after it the count is 0, 1 or 2 of 3
    again = make_trainer(**options, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{start}"))
    assert again.state.global_step == stop
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert again.state.best_metric == whole.state.best_metric


def test_eval_on_start_of_a_resumed_run_does_not_count(make_trainer):
    options = {**SAVED, "early_stopping_patience": 3, "eval_on_start": True}
    make_trainer(**{**options, "max_steps": 2}).train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_run_that_stopped_has_nothing_left_to_train_until_it_may_wait_longer(make_trainer, caplog):
    make_trainer(**SAVED, early_stopping_patience=2).train()
    again = make_trainer(**SAVED, early_stopping_patience=2)
    before = {name: value.clone() for name, value in again.model.state_dict().items()}
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in before.items())
    assert "Nothing is left to train" in caplog.text
    assert "after 2 evaluations without progress" in caplog.text
    longer = make_trainer(**SAVED, early_stopping_patience=4)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 5
    assert "Resumed after step 3 with `early_stopping_patience` 2 -> 4: applied." in caplog.text
    off = make_trainer(**SAVED)
    off.train(resume_from_checkpoint=True)
    assert off.state.global_step == 9


def test_a_checkpoint_of_a_run_without_it_can_be_gone_on_from(make_trainer):
    """Transformers' own callback ends the next saving in a KeyError."""
    make_trainer(**{**SAVED, "max_steps": 2}, metric_for_best_model="eval_validation_nll").train()
    resumed = make_trainer(**SAVED, early_stopping_patience=2, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4  # the mark came with the checkpoint, the count began anew


def test_only_evaluations_of_the_training_count(make_trainer):
    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.evaluate("home")

    trainer = make_trainer(**EVERY_STEP, early_stopping_patience=3, trainer={"callbacks": [Ask()]})
    for _ in range(2):  # a second training begins to count anew
        for _ in range(4):
            trainer.evaluate()
        trainer.train()
        assert trainer.state.global_step == 4


def test_it_comes_and_goes_with_the_argument(make_trainer):
    trainer = make_trainer(**EVERY_STEP)
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    trainer.args.early_stopping_patience = 2  # as a search sets it
    trainer.train()
    assert trainer.state.global_step == 3
    trainer.args.early_stopping_patience = 0
    trainer.train()
    assert trainer.state.global_step == 9


def test_what_misses_or_is_there_twice_is_refused(make_trainer, tmp_path):
    def arguments(**options):
        return CaRotTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)

    with pytest.raises(ValueError, match=r"`eval_strategy` 'epoch' or 'steps' with .*add --eval_strategy epoch"):
        arguments(early_stopping_patience=2)
    with pytest.raises(ValueError, match=r"`early_stopping_patience` above 0 with `early_stopping_threshold` 0\.1"):
        arguments(early_stopping_threshold=0.1)
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match=r"Expected `early_stopping_patience` a whole number >= 0"):
            arguments(early_stopping_patience=wrong, eval_strategy="epoch")
    with pytest.raises(ValueError, match=r"Expected `early_stopping_threshold` >= 0"):
        arguments(early_stopping_patience=1, early_stopping_threshold=-1.0, eval_strategy="epoch")
    for own in (EarlyStoppingCallback(2), EarlyStoppingCallback):
        with pytest.raises(ValueError, match="Expected one callback that stops early, got `early_stopping_patience` 2"):
            make_trainer(**EVERY_STEP, early_stopping_patience=2, trainer={"callbacks": [own]})
    later = make_trainer(**EVERY_STEP, early_stopping_patience=2)
    later.add_callback(EarlyStoppingCallback(2))
    with pytest.raises(ValueError, match="Leave one of them out"):
        later.train()


@pytest.mark.parametrize("count", ["two", -1, 1.5, True])
def test_a_count_that_is_none_is_found_before_anything_is_loaded(make_trainer, count):
    options = {**SAVED, "early_stopping_patience": 3}
    make_trainer(**{**options, "max_steps": 2}).train()
    checkpoint = Path(make_trainer(**options).args.output_dir, "checkpoint-2")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    attributes = state["stateful_callbacks"][EarlyStopping.__name__]["attributes"]
    assert attributes == {"early_stopping_patience_counter": 1}
    attributes["early_stopping_patience_counter"] = count
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match="in place of a number of evaluations without progress"):
        make_trainer(**options).train(resume_from_checkpoint=str(checkpoint))
