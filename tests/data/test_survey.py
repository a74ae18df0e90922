"""What is said of a suite and of a run before the first step: counts, shared images, figures like mistakes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import datasets
import numpy as np
import pytest
import torch
from layouts import picture
from toys import Noise, noise_set

from carot_hf import ShiftSet, ShiftSuite
from carot_hf.calibration.fit import fit_scaling, scaling_bounds
from carot_hf.data.survey import say_warnings, survey
from carot_hf.run.header import Plan, header, plan_warnings, shared_class_share
from carot_hf.training_args import CaRotTrainingArguments


def stored(pictures, labels, **options):
    rows = {"image": [{"bytes": data, "path": None} for data in pictures], "label": labels}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    return ShiftSet(rows, name="s", num_classes=2, **options)


def suite_of(train, validation, test, **options):
    return ShiftSuite(
        name="two",
        class_names=["cat", "dog"],
        templates=["a {}"],
        train=train,
        validation=validation,
        test=dataclasses.replace(test) if dataclasses.is_dataclass(test) else test,
        shifts={},
        **options,
    )


def pictures(*rows):
    return [picture(0, row) for row in rows]


# ---- counts ----


def test_the_table_of_images_a_class_and_set(suite):
    found = survey(suite)
    assert found.table().splitlines() == [
        "images  train  validation  home  far  part",
        "zero        7           4     5    5     ?",
        "one         7           4     5    4     ?",
        "two         6           4     5    4     ?",
        "three       6           3     4    4     ?",
        "all        26          15    19   17    11",
    ]
    assert found.warnings() == []


def test_many_classes_are_a_range():
    names = [f"c{index}" for index in range(50)]
    labels = np.repeat(np.arange(50), 2)[:-1]
    data = ShiftSet([0] * 99, name="s", num_classes=50, labels=labels)
    one = ShiftSuite(name="m", class_names=names, templates=["{}"], train=data, validation=data, test=data, shifts={})
    assert survey(dataclasses.replace(one, allow_shared=True)).table().splitlines()[1:] == [
        "a class, of 50    1-2         1-2  1-2",
        "all                99          99   99",
    ]


def test_missing_and_single_images_are_warned_of_once(caplog):
    suite = suite_of(stored(pictures(0, 1, 2), [0, 0, 1]), stored(pictures(3), [0]), stored(pictures(4, 5), [1, 0]))
    say_warnings(suite)
    say_warnings(suite)
    assert [record.getMessage() for record in caplog.records] == [
        "Set 'train' has one image of 'dog'.",
        "Set 'validation' has no image of 'dog'.",
    ]


# ---- shared images ----


def test_shared_images_are_found_by_content_in_any_store(tmp_path):
    path = tmp_path / "copy.png"
    path.write_bytes(picture(0, 1))
    files = datasets.Dataset.from_dict({"image": [str(path)], "label": [0]})
    files = files.cast_column("image", datasets.Image(decode=False))
    train, validation = stored(pictures(0, 1, 2), [0, 1, 0]), stored(pictures(2, 3), [0, 1])
    suite = suite_of(train, validation, ShiftSet(files, name="t", num_classes=2), allow_shared=True)
    found = survey(suite)
    assert dict(found.shared) == {("train", "validation"): 1, ("train", "t"): 1}
    assert "1 of the 2 images of set 'validation' are in 'train', too." in found.warnings()
    with pytest.raises(ValueError, match="got 1 of the 1 images of set 't' in the training set"):
        survey(suite_of(train, validation, ShiftSet(files, name="t", num_classes=2)))


def test_images_of_one_size_and_other_content_are_others():
    same_ends = [b"\x00" * 5000 + bytes([value]) + b"\x00" * 5000 for value in (1, 2, 3)]
    suite = suite_of(stored(same_ends[:1] * 2, [0, 1]), stored(same_ends[1:2], [0]), stored(same_ends[2:], [0]))
    assert dict(survey(suite).shared) == {}
    again = suite_of(stored(same_ends[:2], [0, 1]), stored(same_ends[1:2], [0]), stored(same_ends[2:], [0]))
    assert dict(survey(again).shared) == {("train", "validation"): 1}


def test_nothing_is_read_of_images_of_other_sizes(monkeypatch):
    """Sizes are those of the table's offsets, also of rows that were selected."""
    train, other, test = (
        stored([data + b"x" * size for data in pictures(0, 1, 2)], [0, 1, 0]) for size in (0, 900, 1800)
    )
    assert train.encoded_lengths() == [len(data) for data in pictures(0, 1, 2)]
    assert train.subset(np.array([2, 0]), "part").encoded_lengths() == [len(pictures(2)[0]), len(pictures(0)[0])]
    monkeypatch.setattr("carot_hf.data.survey._Contents._value", lambda self, row: pytest.fail("an image was read"))
    assert dict(survey(suite_of(train, other, test)).shared) == {}


def test_more_images_than_are_compared(suite, monkeypatch):
    monkeypatch.setattr("carot_hf.data.survey.MOST_IMAGES", 50)
    found = survey(suite)
    assert not found.compared
    assert found.table().splitlines()[-1] == "more than 50 images: those that sets share were not looked for"


def test_rows_of_one_object_are_shared(suite):
    data = Noise(20, 0)
    whole = ShiftSet(data, name="train", num_classes=4, labels=data.labels)
    parts = whole.subset(np.arange(10), "train"), whole.subset(np.arange(8, 14), "validation")
    mixed = dataclasses.replace(suite, train=parts[0], validation=parts[1])
    assert dict(survey(mixed).shared) == {("train", "validation"): 2}


def test_a_test_set_that_is_trained_on_stops_the_training(suite, make_trainer):
    leaky = dataclasses.replace(suite, test=suite.train)
    with pytest.raises(ValueError, match="got 26 of the 26 images of set 'train'"):
        make_trainer(suite=dataclasses.replace(leaky)).train()
    make_trainer(suite=dataclasses.replace(leaky, allow_shared=True)).train()


# ---- a short run ----


def arguments(tmp_path, **options):
    return CaRotTrainingArguments.from_preset("carot", output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(("steps", "expected"), [(198, 4), (4_999, 100), (5_000, 500), (25_030, 500), (10, 1)])
def test_constants_of_the_papers_are_shares_of_a_short_run(tmp_path, steps, expected):
    args = arguments(tmp_path)
    args.scale_constants(steps)
    assert (args.warmup_steps, args.teacher_update_every, args.logging_steps) == (expected,) * 3
    assert args.scale_constants(steps) == {}
    args.scale_constants(25_030)
    assert (args.warmup_steps, args.teacher_update_every, args.logging_steps) == (500,) * 3


@pytest.mark.parametrize("named", [500, 7])
def test_what_somebody_named_stays(tmp_path, named):
    args = arguments(tmp_path, teacher_update_every=named)
    assert args.scale_constants(100) == {"warmup_steps": 2, "logging_steps": 2}
    assert args.teacher_update_every == named
    args.warmup_steps = 11
    args.scale_constants(1000)
    assert (args.warmup_steps, args.logging_steps) == (11, 20)


def test_parity_keeps_the_numbers(tmp_path):
    args = arguments(tmp_path, parity=True)
    assert args.scale_constants(100) == {}
    assert args.warmup_steps == 500


def test_a_short_run_trains_with_its_shares_and_says_them(suite, make_trainer, capsys, tmp_path):
    options = {"max_steps": 100, "teacher_update_every": 500, "logging_steps": 500, "warmup_steps": 500}
    trainer = make_trainer(**{**options, "save_strategy": "steps", "save_steps": 60})
    named = trainer.args
    for name in ("warmup_steps", "teacher_update_every", "logging_steps"):
        named._unnamed[name] = 500.0  # as the command line leaves them
    trainer.train()
    said = capsys.readouterr().out
    assert "steps      100 in 16.6667 epochs, warm-up 2" in said
    assert "teacher    ema, moves 50 times, every 2 steps" in said
    assert "scaled     logging_steps 2, teacher_update_every 2, warmup_steps 2: this run's share of the papers'" in said
    assert "batch      1 process x 4, 4 pairs in the loss, on cpu" in said
    assert "method     contrastive (softmax) + 0.75 x distillation" in said
    assert "zero        7           4     5    5     ?" in said
    assert f"writes     {tmp_path / 'run'}: checkpoint-<step> every 60 steps" in said
    assert f"finished   100 steps; checkpoint-60, checkpoint-100 in {tmp_path / 'run'}" in said
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == list(range(2, 101, 2))
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}
    assert rates[2] == pytest.approx(5e-3)  # in the middle of 2 steps of warm-up; with 500 of them 2e-5
    run = json.loads((tmp_path / "run/checkpoint-60/run.json").read_text())
    assert (run["method"]["teacher_update_every"], run["options"]["warmup_steps"]) == (2, 2)
    before = trainer.model.state_dict()
    again = make_trainer(**{**options, "save_strategy": "no"})
    again.args._unnamed.update(dict.fromkeys(named._unnamed, 500.0))
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-60"))
    assert all((value == before[name]).all() for name, value in again.model.state_dict().items())


# ---- figures that look like mistakes ----


def plan(**options):
    defaults = {
        "model": "CLIPModel", "method": "contrastive", "table": "", "steps": 100, "epochs": 2.0, "first_step": 0,
        "warmup": 2, "teacher": "ema", "update_every": 2, "processes": 2, "batch": 8, "accumulation": 1, "pairs": 16,
        "shared": 0.1, "device": "cpu", "scaled": {}, "writes": [],
    }  # fmt: skip
    return Plan(**{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"update_every": 101}, "will never move: `teacher_update_every` is 101, the run has 100 steps. Set it to 2"),
        ({"warmup": 100}, "never reaches its peak: `warmup_steps` is 100, the run has 100 steps. Set it to 2"),
        ({"shared": 0.541}, "In a batch of 16 pairs 54 % share their class with another pair.*--same_class ignore"),
    ],
)
def test_what_looks_like_a_mistake_is_said_with_its_figure(options, sentence):
    import re

    assert plan_warnings(plan()) == []
    (said,) = plan_warnings(plan(**options))
    assert re.search(sentence, said)


def test_a_frozen_teacher_is_no_mistake():
    assert plan_warnings(plan(update_every=0)) == []
    assert "ema, never moves" in header(plan(update_every=0))
    assert "2 processes x 8, 16 pairs in the loss" in header(plan())


@pytest.mark.parametrize(
    ("counts", "pairs", "share"),
    [
        ([1, 1], 2, 0.0),  # two classes of one image
        ([2, 2], 2, 1 / 3),  # of three others one is of its class
        ([2, 2], 4, 1.0),
        ([3], 2, 1.0),
        ([1, 3], 2, 3 / 4 * 2 / 3),
        ([10, 10], 3, 1 - 10 / 19 * 9 / 18),
    ],
)
def test_the_share_of_pairs_that_share_their_class(counts, pairs, share):
    assert shared_class_share(np.array(counts), pairs) == pytest.approx(share, abs=1e-12)


def test_the_share_by_drawing():
    counts = np.array([40, 7, 3, 1])
    labels, generator = np.repeat(np.arange(4), counts), np.random.default_rng(0)
    found = []
    for _ in range(4000):
        drawn = generator.choice(labels, 6, replace=False)
        found.append(np.mean(np.bincount(drawn, minlength=4)[drawn] > 1))
    error = np.std(found) / math.sqrt(len(found))
    assert shared_class_share(counts, 6) == pytest.approx(np.mean(found), abs=4 * error)


def test_imagenet_is_not_warned_of():
    counts = np.full(1000, 1281)
    assert shared_class_share(counts, 512) == pytest.approx(1 - (1 - 1 / 1000) ** 511, abs=1e-3)
    assert shared_class_share(counts, 512) < 0.5


def test_the_warnings_come_before_the_first_step(suite, make_trainer, caplog):
    trainer = make_trainer(teacher_update_every=50, warmup_steps=9)
    logging.getLogger("transformers").propagate = True
    trainer.train()
    said = [record.getMessage() for record in caplog.records]
    assert any("The teacher will never move: `teacher_update_every` is 50" in line for line in said)
    assert any("never reaches its peak: `warmup_steps` is 9, the run has 4 steps" in line for line in said)
    assert any("In a batch of 4 pairs 54 % share their class" in line for line in said)


# ---- nothing is overwritten ----


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.json", "README.md"])
def test_a_finished_model_is_not_trained_over(make_trainer, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"without a finished model, got .*run with {name}\..*--overwrite_output_dir"):
        make_trainer().train()
    assert (tmp_path / "run" / name).read_text() == "mine"
    make_trainer(overwrite_output_dir=True).train()


def test_a_save_elsewhere_is_no_leave_to_write_over_what_is_there(make_trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text("mine")
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="without a finished model"):
        trainer.train()


def test_a_training_set_that_was_passed_is_the_one_that_is_surveyed(suite, make_trainer, capsys):
    """Table, figures and the search for shared images were of the suite's own."""
    with pytest.raises(ValueError, match="got 19 of the 19 images of set 'home' in the training set"):
        make_trainer(suite=suite, trainer={"train_dataset": suite.test}).train()
    make_trainer(suite=suite, trainer={"train_dataset": noise_set("mine", 8, 5)}).train()
    assert "all         8" in capsys.readouterr().out


def test_a_trainer_may_go_on_with_what_it_wrote_itself(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    other = make_trainer()
    other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="without a finished model"):
        make_trainer().train()


# ---- a temperature at a bound ----


def test_a_temperature_at_a_bound_is_in_the_record_and_warned_of_once(suite, make_trainer, caplog):
    trainer = make_trainer(calibration_bounds=[2.0, 3.0])
    logging.getLogger("transformers").propagate = True
    caplog.clear()
    assert trainer.evaluate()["eval_temperature"] == 3.0  # an untrained model knows nothing
    trainer.evaluate()
    record = trainer.calibrate()
    assert (record["temperature"], record["bounds"], record["at_bound"]) == (3.0, [2.0, 3.0], True)
    said = [record.getMessage() for record in caplog.records if "at the bound" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("The best temperature is at the bound 3 of [2, 3]: the optimum may lie outside, and what")
    assert said[0].endswith("Look at the validation set, or set `calibration_bounds` wider.")


def test_wider_bounds_find_the_optimum():
    """Two classes with logits 0 and z, right in 3 of 4 rows: the best T is z / ln 3, here 20."""
    logits = torch.zeros(400, 2, dtype=torch.float64)
    logits[:, 1] = 20 * math.log(3)
    labels = (torch.arange(400) % 4 > 0).long()
    options = {"link": "softmax", "criterion": "nll", "warn": False}
    assert fit_scaling(logits, labels, **options) == {"temperature": 10.0}
    assert fit_scaling(logits, labels, bounds=[1, 50], **options)["temperature"] == pytest.approx(20.0, rel=1e-6)
    assert scaling_bounds(None, "sigmoid") == (0.05, 20.0)


@pytest.mark.parametrize("bounds", [[1.0], [2.0, 1.0], [0.0, 1.0], [1.0, float("inf")], [1.0, 2.0, 3.0]])
def test_bounds_that_are_none(tmp_path, bounds):
    with pytest.raises(ValueError, match="Expected `calibration_bounds` as a lowest and a highest temperature"):
        arguments(tmp_path, calibration_bounds=bounds)


def test_bounds_on_the_command_line():
    from transformers import HfArgumentParser

    parser = HfArgumentParser(CaRotTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--use_cpu", "--calibration_bounds", "0.1", "5"])
    assert args.calibration_bounds == [0.1, 5.0]
    assert args.unnamed() == {"warmup_steps", "teacher_update_every", "logging_steps"}
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--use_cpu", "--warmup_steps", "500"])
    assert args.unnamed() == {"teacher_update_every", "logging_steps"}
