"""The training log in the terminal: what its lines say, where they come from, and that what is logged stays."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers import trainer as stock

from carot_hf.basics.log_names import loss_terms
from carot_hf.objective.terms import TERMS
from carot_hf.run import log_for_people
from carot_hf.run.log_for_people import PrinterForPeople, ProgressForPeople
from carot_hf.run.log_lines import (
    Columns,
    Pace,
    duration,
    end_line,
    evaluation_lines,
    evaluation_rows,
    number,
    other_line,
    training_cells,
)

ENTRY = {
    "loss": 1.5, "grad_norm": 2.0, "learning_rate": 3e-6, "contrastive": 1.25, "distillation": 1 / 3,
    "teacher_momentum": 0.05, "teacher_half_life": 2.0, "input_wait": 0.01, "logit_multiplier": 20.0, "epoch": 1.5,
}  # fmt: skip


# ---- lines, worked by hand ----


def test_the_cells_of_a_step():
    assert training_cells(ENTRY, 12, 1200, 3725.0) == {
        "step": "   12/1,200", "epoch": "1.50", "left": "1:02:05", "loss": "1.5000", "contrastive": "1.2500",
        "distillation": "0.3333", "lr": "3.00e-06", "momentum": "0.0500",
    }  # fmt: skip
    assert training_cells({"loss": 1.0}, 1, 2, None) == {"step": "1/2", "left": "", "loss": "1.0000"}


def test_the_terms_are_what_nobody_else_logs(make_trainer):
    assert loss_terms(ENTRY) == ["contrastive", "distillation"]
    assert loss_terms({"eval_home_nll": 1.0, "epoch": 1.0}) == []
    for preset in ("carot-2024", "tracer", "ft"):
        trainer = make_trainer(preset=preset, max_steps=1)
        trainer.train()
        logged = loss_terms(trainer.state.log_history[0])
        assert set(logged) == {name for name, row in TERMS.items() if name in trainer.state.log_history[0]}
        assert logged


def test_columns_are_aligned_and_their_titles_come_again():
    columns = Columns()
    lines = [line for step in range(45) for line in columns.lines({"step": f"{step}", "loss": f"{step / 7:.4f}"})]
    titles = [at for at, line in enumerate(lines) if line == "step    loss"]
    assert titles == [0, 21, 42]
    assert {len(line) for line in lines} == {12}
    columns.interrupted()
    assert columns.lines({"step": "7", "loss": "1.0000"}) == ["step    loss", "   7  1.0000"]
    assert columns.lines({"step": "8", "loss": "1.0000"}) == ["   8  1.0000"]
    assert columns.lines({"step": "9", "loss": "1.0000", "new": "3"}) == ["step    loss  new", "   9  1.0000    3"]
    assert columns.lines({"step": "10", "loss": "2.0000"}) == ["  10  2.0000"]
    assert columns.lines({"step": "10", "loss": "1234567.0"})[0] == "step       loss  new"


def test_what_does_not_fit_is_left_out_from_the_right_and_named():
    columns = Columns(width=20)
    cells = {"step": "1/9", "loss": "1.0000", "contrastive": "1.0000", "lr": "1e-5"}
    assert columns.lines(cells) == [
        "step    loss", "  (no room for contrastive, lr)", " 1/9  1.0000",
    ]  # fmt: skip
    assert columns.lines(cells) == [" 1/9  1.0000"]
    assert Columns(width=1).lines({"step": "1/9", "loss": "1"})[-1] == " 1/9"
    assert max(map(len, Columns(width=30).lines({**cells, "x": "1"}))) <= 31  # the note may be longer than the line


def test_numbers_and_times():
    assert [number(v) for v in (1.23456, -0.5, 0.0, 0.00012, 123456.0, float("nan"), float("inf"))] == [
        "1.2346", "-0.5000", "0.0000", "1.20e-04", "1.23e+05", "nan", "inf",
    ]  # fmt: skip
    assert number("n\x1b") == r"n\x1b"  # somebody's own `trainer.log`
    assert [duration(v) for v in (0.2, 7, 59.7, 725, 11045, 86_400 * 2 + 3 * 3600)] == [
        "0:00", "0:07", "1:00", "12:05", "3:04:05", "2d 03h",
    ]  # fmt: skip


def test_the_pace_is_that_of_the_steps_alone():
    pace = Pace()
    pace.pause(5.0)  # e.g. of `eval_on_start`
    pace.step(100.0)  # the first one compiles, or skips what was seen
    assert pace.left(10) is None
    pace.step(102.0)
    pace.pause(162.0)  # an evaluation of a minute
    pace.step(164.0)
    pace.step(184.0)  # a step that waited for something: the median does not care
    pace.step(186.0)
    assert pace.left(10) == 20.0
    for now in range(60):
        pace.step(186.0 + 3 * (now + 1))
    assert pace.left(10) == 30.0  # the latest count


def metrics_of(prefix, rows):
    found = {f"{prefix}_{name}_{key}": value for name, row in rows.items() for key, value in row.items()}
    return {**found, f"{prefix}_temperature": 1.25, f"{prefix}_runtime": 2.04, "epoch": 2.0}


def test_an_evaluation_is_a_small_table():
    home = {"accuracy": 0.5, "top5_accuracy": 1.0, "ece": 0.125, "nll": 1.5, "ece_ts": 0.0625}
    away = {"accuracy": 0.25, "top5_accuracy": 0.5, "ece": 0.25, "nll": 12.75, "ece_ts": 0.03}
    held = {"accuracy": 0.75, "ece": 0.1, "nll": 1.0}
    mean = {key: (home[key] + away[key]) / 2 for key in home}
    rows = {"validation": held, "home": home, "far": away, "id": home, "ood": mean}
    lines = evaluation_lines(metrics_of("eval", rows), "eval", ["validation", "home", "far"], where=" after step 3")
    assert lines == [
        "evaluation after step 3: 2.0 s, temperature 1.250",
        "                accuracy     ece     nll  ece_ts",
        "validation         0.750   0.100   1.000",
        "home               0.500   0.125   1.500   0.062",
        "far                0.250   0.250  12.750   0.030",
        "mean of shifts     0.375   0.188   7.125   0.046",
    ]
    assert max(map(len, lines)) <= 100
    one = {name: row for name, row in rows.items() if name != "ood"} | {"ood": away}  # the mean over one shift is it
    assert "mean of shifts" not in "".join(evaluation_lines(metrics_of("eval", one), "eval", ["home", "far"]))
    further = evaluation_lines(
        metrics_of("eval_teacher", {"home": home | {"ece_pts": 0.1, "ece_dts": 0.2, "mine": 7.0}}),
        "eval_teacher", ["home"], also="mine",
    )  # fmt: skip
    assert further[0].startswith("evaluation of the teacher: ")
    assert further[1].split() == ["accuracy", "ece", "nll", "ece_ts", "ece_pts", "ece_dts", "mine"]
    assert further[2].split() == ["home", "0.500", "0.125", "1.500", "0.062", "0.100", "0.200", "7.000"]
    assert evaluation_lines({"eval_accuracy": 0.5, "eval_nll": 1.0}, "eval", [])[-1].split() == [
        "the",
        "set",
        "0.500",
        "1.000",
    ]


def test_names_are_read_whole_and_are_no_orders():
    metrics = {"eval_a_top5_accuracy": 0.5, "eval_a_top5_ece": 0.1, "eval_b_top5_accuracy": 0.9, "eval_b_accuracy": 0.2}
    rows = evaluation_rows(metrics, "eval", ["a_top5", "b"])
    assert rows == {"a_top5": {"accuracy": 0.5, "ece": 0.1}, "b": {"accuracy": 0.2}}
    evil, long = "\x1b[2J\u202e", "n" * 80
    lines = evaluation_lines({f"eval_{evil}_nll": 1.0, f"eval_{long}_nll": 2.0}, "eval", [evil, long])
    assert all(line.isprintable() for line in lines)
    assert lines[2].startswith(r"\x1b[2J\u202e ")
    assert lines[3] == f"{'n' * 15}...{'n' * 14}   2.000"
    assert all(line.isprintable() for line in Columns().lines(training_cells({"loss": 1.0, evil: 2.0}, 1, 2, None)))
    assert other_line({evil: 1.5, "b": evil, "epoch": 2.0}) == r"\x1b[2J\u202e 1.5000, b \x1b[2J\u202e"


def test_the_end_in_a_line():
    logs = {"train_runtime": 65.0, "train_steps_per_second": 2.5, "train_samples_per_second": 1280.0, "train_loss": 1.5}
    assert end_line(logs) == "trained    1:05, 2.5 steps a second, 1,280 samples a second, mean loss 1.5000"


# ---- in a training ----


WATCHED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}


def tail(text):
    """What was written from the first titles on, of the time that is left only that there is one."""
    return text[text.index("step  epoch") :].splitlines()


def test_a_training_writes_a_line_a_step_and_a_table_an_evaluation(make_trainer, capsys):
    trainer = make_trainer(**WATCHED, teacher_momentum_ramp=1.0)
    trainer.train()
    lines = tail(capsys.readouterr().out)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = [line.split() for line in lines if re.match(r" *\d/4 ", line)]
    assert len(steps) == len(logged) == 4
    for words, entry in zip(steps, logged, strict=True):
        numbers = [f"{entry[name]:.4f}" for name in ("loss", "contrastive", "distillation")]
        assert words[0] == f"{entry['step']}/4"
        assert words[1] == f"{entry['epoch']:.2f}"
        assert (words[2] == numbers[0]) == (entry["step"] == 1)  # no time is left where none is known yet
        assert words[-5 if "teacher_momentum" in entry else -4 :][:3] == numbers
        assert f"{entry['learning_rate']:.2e}" in words
    tables = [at for at, line in enumerate(lines) if line.startswith("evaluation after step")]
    assert [lines[at].split(",")[0] for at in tables] == ["evaluation after step 2", "evaluation after step 4"]
    measured = [entry for entry in trainer.state.log_history if "eval_validation_nll" in entry]
    for at, entry in zip(tables, measured, strict=True):
        row = [f"{entry[f'eval_validation_{name}']:.3f}" for name in ("accuracy", "ece", "nll")]
        assert lines[at + 2].split() == ["validation", *row]
    assert not [line for line in lines if "{" in line]


def test_what_is_logged_stays_as_it_is(make_trainer, monkeypatch, tmp_path):
    """The same keys reach log_history, trainer_state.json and trackers as with transformers' own callbacks."""

    class Tracker(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(copy.deepcopy(logs))

    found = {}
    for kind in ("ours", "theirs"):
        tracker = Tracker()
        options = {**WATCHED, "save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path / kind)}
        with monkeypatch.context() as patch:
            if kind == "theirs":
                patch.setattr("carot_hf.run.trainer.speak_to_people", lambda *_: None)
            trainer = make_trainer(**options)
        trainer.add_callback(tracker)  # behind the one that prints
        output = trainer.train()
        state = json.loads(Path(options["output_dir"], "checkpoint-4", "trainer_state.json").read_text())
        found[kind] = (
            [list(e) for e in trainer.state.log_history],
            [list(e) for e in state["log_history"]],
            tracker.seen,
        )
        assert output.metrics["train_loss"] == trainer.state.log_history[-1]["train_loss"]
    assert found["ours"][:2] == found["theirs"][:2]
    for mine, stocks in zip(found["ours"][2], found["theirs"][2], strict=True):
        assert mine.keys() - stocks.keys() <= {"total_flos"}  # transformers' printer takes it out for all behind it
        assert stocks.keys() <= mine.keys()


def test_bars_stay_and_other_callbacks_are_left_alone(make_trainer, monkeypatch, capsys):
    class Mine(ProgressCallback):
        pass

    class Notebook(TrainerCallback):
        """As transformers' own, which needs IPython."""

    printing = PrinterCallback | ProgressCallback | Notebook

    def kinds(**options):
        trainer = make_trainer(**options)
        return [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, printing)]

    assert kinds() == [PrinterForPeople]
    assert kinds(disable_tqdm=False) == [ProgressForPeople]
    own = PrinterCallback()
    assert kinds(trainer={"callbacks": [own]}) == [PrinterCallback, PrinterForPeople]
    for theirs in (Notebook, Mine):
        monkeypatch.setattr(stock, "DEFAULT_PROGRESS_CALLBACK", theirs)
        assert kinds(disable_tqdm=False) == [theirs]
    monkeypatch.undo()
    trainer = make_trainer()
    trainer.remove_callback(PrinterCallback)  # as users of transformers do
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, PrinterCallback)]
    capsys.readouterr()
    trainer = make_trainer(**WATCHED, disable_tqdm=False)
    trainer.train()
    written = capsys.readouterr()
    assert "evaluation after step 4, epoch 0.67" in written.out
    assert "4/4" in written.err  # the bar
    trainer.evaluate()
    assert capsys.readouterr().out == ""  # as transformers: lines come with a training only, where there are bars


def test_only_the_first_process_writes(make_trainer, capsys):
    for options in ({"disable_tqdm": True}, {"disable_tqdm": False}):
        trainer = make_trainer(**options)
        callback = next(
            c for c in trainer.callback_handler.callbacks if isinstance(c, PrinterForPeople | ProgressForPeople)
        )
        trainer.state.is_world_process_zero = False
        callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(ENTRY))
        assert capsys.readouterr().out == ""


def test_a_resumed_run_says_its_own_time(make_trainer, monkeypatch, capsys):
    """A step takes a second by this clock; the first one, which skips what was seen, 100."""

    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls):
            return cls.now

    class Tick(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            Clock.now += 100.0 if state.global_step == 4 else 1.0

        def on_evaluate(self, args, state, control, **kwargs):
            Clock.now += 50.0

    monkeypatch.setattr(log_for_people, "time", Clock)
    options = {**WATCHED, "max_steps": 65, "save_strategy": "steps", "save_steps": 4}
    make_trainer(**{**options, "max_steps": 4}, num_train_epochs=1).train()
    capsys.readouterr()
    resumed = make_trainer(**options, trainer={"callbacks": [Tick()]})
    resumed.train(resume_from_checkpoint=True)
    lines = [line.split() for line in tail(capsys.readouterr().out) if re.match(r" *\d+/65 ", line)]
    assert lines[0][0] == "5/65"
    assert [words[2] for words in lines[1:4]] == ["0:59", "0:58", "0:57"]
    assert lines[-1][2] == "0:00"


def test_the_width_is_that_of_the_terminal(monkeypatch):
    class Terminal:
        def __init__(self, tty):
            self.isatty = lambda: tty

    monkeypatch.setenv("COLUMNS", "61")
    monkeypatch.setattr(log_for_people.sys, "stdout", Terminal(False))
    assert log_for_people.terminal_width() == 100
    monkeypatch.setattr(log_for_people.sys, "stdout", Terminal(True))
    assert log_for_people.terminal_width() == 61


@pytest.mark.parametrize("name", ["eval_validation_mine", "validation_mine"])
def test_the_metric_that_chooses_is_shown(make_trainer, capsys, name):
    trainer = make_trainer(
        **WATCHED, metric_for_best_model=name, greater_is_better=True,
        trainer={"compute_metrics": lambda prediction: {"mine": 0.123}},
    )  # fmt: skip
    trainer.train()
    said = capsys.readouterr().out
    assert re.search(r"accuracy +ece +nll +mine\nvalidation .* 0\.123\n", said)
