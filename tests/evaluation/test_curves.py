"""Learning curves: points by hand, the picture of a training, and whose file it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from PIL import Image

from carot_hf import learning_curves
from carot_hf.evaluation import curves
from carot_hf.evaluation.curves import curves_of, keep_curves

LOG = [
    {"eval_validation_accuracy": 0.1, "eval_validation_ece": 0.5, "epoch": 0, "step": 0},
    {"loss": 4.0, "learning_rate": 1e-3, "contrastive": 3.0, "epoch": 1.0, "step": 5},
    {"loss": 3.0, "learning_rate": 2e-3, "contrastive": 2.5, "distillation": 0.01, "teacher_momentum": 0.5, "step": 10,
     "grad_norm": 7.0, "input_wait": 0.1, "logit_multiplier": 14.0},
    {"eval_validation_accuracy": 0.6, "eval_validation_ece": 0.2, "eval_validation_adaptive_ece": 0.9,
     "eval_validation_top5_accuracy": 1.0, "eval_home_accuracy": 0.7, "eval_id_accuracy": 0.7, "eval_id_ece": 0.1,
     "eval_ood_accuracy": 0.4, "eval_ood_ece": 0.3, "step": 10},
    {"train_runtime": 1.0, "train_loss": 3.5, "step": 10},
]  # fmt: skip


def test_the_points_of_a_log():
    assert curves_of(LOG) == {
        "loss": {
            "loss": [(5, 4.0), (10, 3.0)], "contrastive": [(5, 3.0), (10, 2.5)], "distillation": [(10, 0.01)],
        },
        "accuracy": {"validation": [(0, 0.1), (10, 0.6)], "test set": [(10, 0.7)], "mean of shifts": [(10, 0.4)]},
        "ECE": {"validation": [(0, 0.5), (10, 0.2)], "test set": [(10, 0.1)], "mean of shifts": [(10, 0.3)]},
        "learning rate": {"learning rate": [(5, 1e-3), (10, 2e-3)]},
        "teacher momentum": {"teacher momentum": [(10, 0.5)]},
    }  # fmt: skip
    sorted_keys = json.loads(json.dumps(LOG, sort_keys=True))  # as in trainer_state.json
    assert [list(panel) for panel in curves_of(sorted_keys).values()] == [list(p) for p in curves_of(LOG).values()]


def test_sets_that_somebody_passed_are_drawn_by_their_names():
    entry = {"eval_mine_ece": 0.1, "eval_mine_adaptive_ece": 0.2, "eval_other_ece": 0.3, "eval_ood_ece": 0.2, "step": 1}
    assert list(curves_of([entry])["ECE"]) == ["mine", "mean of shifts", "other"]
    assert curves_of([{"eval_accuracy": 0.5, "eval_top5_accuracy": 0.9, "step": 1}]) == {
        "accuracy": {"evaluation": [(1, 0.5)]}
    }


def test_the_picture_has_these_points_and_one_axis_of_steps():
    figure = learning_curves(LOG, title="a $x^2$ \x1b[2J")
    axes = figure.axes
    assert [ax.get_ylabel() for ax in axes] == list(curves_of(LOG))
    for ax, panel in zip(axes, curves_of(LOG).values(), strict=True):
        drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.lines}
        assert drawn == panel
        assert all(line.get_marker() for line in ax.lines)
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines}
        assert len(looks) == len(ax.lines)
    assert len({ax.get_xlim() for ax in axes}) == 1
    assert [ax.get_yscale() for ax in axes] == ["log", *["linear"] * 4]  # 4 is more than 30 times 0.01
    assert figure.get_suptitle() == r"a \$x^2\$ \x1b[2J"
    near = [{"loss": 2.0, "term$": 1.0, "step": step} for step in range(40)]
    (ax,) = learning_curves(near).axes
    assert ax.get_yscale() == "linear"
    assert [(line.get_marker(), line.get_markevery()) for line in ax.lines] == [("o", 3), ("s", 3)], "14 marks of 40"
    assert ax.lines[1].get_label() == r"term\$"
    assert learning_curves([{"loss": math.nan, "step": 1}, {"loss": 1.0, "step": 2}]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("log", [[], [{"train_runtime": 1.0, "step": 3}], [{"loss": 1.0}]])
def test_a_log_of_nothing_is_refused(log, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a log with a loss or an evaluation .* got \d entries"):
        learning_curves(log)
    assert not keep_curves(tmp_path, log, goes_on=True)
    assert not list(tmp_path.iterdir())


# ---- in a run ----


DRAWN = {"reliability_diagrams": True, "eval_strategy": "steps", "eval_steps": 2}


def test_a_training_leaves_its_curves_and_a_resumed_one_those_of_the_whole_run(make_trainer, monkeypatch):
    logs = []
    whole = curves.learning_curves
    monkeypatch.setattr(curves, "learning_curves", lambda log: logs.append(list(log)) or whole(log))
    saved = {**DRAWN, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**{**saved, "max_steps": 2}).train()
    path = Path(make_trainer(**saved).args.output_dir, "learning_curves.png")
    first = path.read_bytes()
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 400
    assert np.ptp(pixels[..., :3]) > 0.9
    make_trainer(**saved).train(resume_from_checkpoint=True)
    assert path.read_bytes() != first
    assert [e["step"] for e in logs[-1] if "loss" in e] == [1, 2, 3, 4]
    assert [e["step"] for e in logs[-1] if "eval_validation_ece" in e] == [2, 4]


def test_a_file_of_others_stays(make_trainer, caplog):
    trainer = make_trainer(**DRAWN)
    path = Path(trainer.args.output_dir, "learning_curves.png")
    trainer.train()
    first = path.read_bytes()
    trainer.train()  # the same trainer goes on in its folder
    second = path.read_bytes()
    assert not caplog.messages or "learning curves" not in caplog.text
    another = make_trainer(**{**DRAWN, "max_steps": 3})
    another.train()
    assert path.read_bytes() == second
    assert "The learning curves are not drawn: " in caplog.text
    make_trainer(**{**DRAWN, "max_steps": 3}, overwrite_output_dir=True).train()
    assert path.read_bytes() not in (first, second)
    Image.new("RGB", (3, 3)).save(path)
    mine = path.read_bytes()
    for options in ({"overwrite_output_dir": True}, {}):
        make_trainer(**DRAWN, **options).train()
        assert path.read_bytes() == mine
    path.write_text("notes")
    make_trainer(**DRAWN, overwrite_output_dir=True).train()
    assert path.read_text() == "notes"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("In FT2Font: broken")])
def test_a_picture_that_fails_loses_nothing(make_trainer, monkeypatch, caplog, error):
    def fail(log):
        raise error

    monkeypatch.setattr(curves, "learning_curves", fail)
    trainer = make_trainer(**DRAWN)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "The learning curves could not be drawn into" in caplog.text
    trainer.save_model()
    names = {path.name for path in Path(trainer.args.output_dir).iterdir()}
    assert "model.safetensors" in names
    assert not {name for name in names if "curves" in name}


def test_the_option_switches_it_off_and_a_search_draws_none(make_trainer):
    trainer = make_trainer(**{**DRAWN, "reliability_diagrams": False})
    trainer.train()
    trainer.args.reliability_diagrams = True
    trainer.hp_search_backend = "optuna"  # as during the trials of a search
    trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("*.png"))
    trainer.hp_search_backend = None
    trainer.is_world_process_zero = lambda: False
    trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("*.png"))
