"""What a run that goes on may change: another run is refused by name, the rest is said and really applied."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.trainer
from runs import Recorder
from toys import CLASSES, TEMPLATES, noise_set, tiny_clip
from transformers import CLIPModel

import carot_hf.run.resumption
from carot_hf import CaRotTrainer, CaRotTrainingArguments
from carot_hf.basics.manifest import damage_of, write_manifest
from carot_hf.run.checkpoint import check_checkpoint
from carot_hf.run.resume import Epochs, SavedRun, apply_hyperparameters, continued, hyperparameters, read_run

PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_validation_nll"}
SAVE = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}  # 26 samples in batches of 4: 6 steps an epoch


@dataclass(repr=False)
class Own(CaRotTrainingArguments):
    extra_weight: float = 0.5
    service_key: str | None = None


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Where the run without options is kept, trained once."""
    return tmp_path_factory.mktemp("plain")


@pytest.fixture
def saved(make_trainer, plain, tmp_path):
    """Save a run and return the folder of one of its checkpoints."""

    def save(step=2, **options):
        if options:
            make_trainer(**{**SAVE, **options}).train()
        else:
            if not any(plain.iterdir()):
                make_trainer(**SAVE, output_dir=str(plain)).train()
            shutil.copytree(plain / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
        return str(tmp_path / "run" / f"checkpoint-{step}")

    return save


@pytest.fixture
def said(monkeypatch):
    """The warnings of a resumption, without that of the noise: four classes in batches of four."""
    lines = []

    def warning(text, *values):
        if "share their class" not in text % values:
            lines.append(text % values)

    monkeypatch.setattr(carot_hf.run.resumption.logger, "warning", warning)
    return lines


@pytest.fixture
def resumed(make_trainer):
    """Go on from a checkpoint; return the trainer, which keeps its batches."""

    def resume(checkpoint, **options):
        trainer = make_trainer(**{**SAVE, **options})
        trainer.__class__ = Recorder
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    return resume


def rates(trainer):
    return {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}


def as_version_0_1(checkpoint):
    Path(checkpoint, "run.json").unlink()
    write_manifest(checkpoint)
    return checkpoint


def reached(*args, **kwargs):
    raise AssertionError("data were read")


# ---- another run ----


def with_validation(suite):
    return replace(suite, validation=noise_set("validation", 14, 1))


def with_train(suite):
    return replace(suite, train=noise_set("train", 25, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distillation_weight": 0.5}, r"`distillation_weight` 0\.75 -> 0\.5"),
        ({"distillation_weight": 0.0}, r"`distillation_weight` 0\.75 -> 0\.0"),
        ({"teacher": "frozen"}, "`teacher` ema -> frozen"),
        ({"teacher_update_every": 1}, "`teacher_update_every` 2 -> 1"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor` 0\.0 -> 0\.1"),
        ({"same_class": "positive"}, "`same_class` negative -> positive"),
        ({"freeze": "text"}, r"`trained parameters` \d+ -> \d+, `freeze` None -> text"),
        ({"preset": "ft"}, "`class` CLIPModel -> CLIPClassifier, .*`objective` contrastive -> cross_entropy"),
        ({"max_logit_multiplier": 50.0}, r"`max_logit_multiplier` 100\.0 -> 50\.0"),
        ({"optim": "sgd"}, r"`optim` adamw_torch\w* -> sgd"),
        ({"seed": 7}, "`seed` 42 -> 7"),
        ({**PLATEAU, "eval_strategy": "steps"}, "`lr_scheduler_type` cosine -> reduce_lr_on_plateau"),
    ],
)
def test_what_would_be_another_run_is_refused_by_name(make_trainer, saved, monkeypatch, change, message):
    checkpoint = saved()
    again = make_trainer(**{**SAVE, **change})
    monkeypatch.setattr(again, "get_train_dataloader", reached)
    with pytest.raises(ValueError, match=rf"the run that was saved in .*checkpoint-2, got another one: {message}.*Set"):
        again.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda suite: replace(suite, class_names=[*CLASSES[:3], "four"]), "`class_names` number 3 'three' -> 'four'"),
        (lambda suite: replace(suite, templates=TEMPLATES[:2]), "`templates` .*`content_hash`"),
        (with_validation, "one: `content_hash` [0-9a-f]{64} -> [0-9a-f]{64}"),
        (with_train, "`content_hash` .*`training_set`"),
    ],
)
def test_another_suite_is_refused(resumed, suite, saved, change, message):
    checkpoint = saved()
    with pytest.raises(ValueError, match=message):
        resumed(checkpoint, suite=change(suite))


def test_the_suite_itself_may_be_called_otherwise(resumed, suite, saved, said):
    resumed(saved(), suite=replace(suite, name="other", version="2"))
    assert not said


def test_the_best_so_far_is_of_one_metric(make_trainer, saved):
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_validation_nll"}
    best["eval_sets"] = "all"
    checkpoint = saved(**best)
    with pytest.raises(ValueError, match="`metric_for_best_model` eval_validation_nll -> eval_id_accuracy"):
        make_trainer(**{**SAVE, **best, "metric_for_best_model": "eval_id_accuracy"}).train(checkpoint)


# ---- what may change ----


def test_a_checkpoint_says_what_its_run_is(suite, saved):
    facts = json.loads(Path(saved(), "run.json").read_text())
    assert facts["suite"]["content_hash"] == suite.content_hash
    assert (facts["suite"]["class_names"], facts["suite"]["templates"]) == (CLASSES, TEMPLATES)
    assert facts["about"] == {
        "suite": "noise",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "contrastive_batch_size": 0,
        "world_size": 1,
    }
    assert facts["optimizer"] | {"learning_rate": 0.01, "weight_decay": 0.1} == facts["optimizer"]
    assert facts["epochs"] == {"steps": 6, "first_step": 0, "first_epoch": 0}
    assert set(facts["versions"]) == {"carot_hf", "torch", "transformers", "accelerate"}
    assert {"objective", "teacher", "teacher_momentum_ramp", "freeze", "parity", "seed"} <= facts["method"].keys()
    assert not facts["method"].keys() & {"n_bins", "output_dir", "hub_token"}


def test_the_same_run_is_said_nothing_of(resumed, saved, said):
    resumed(saved())
    assert not said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, "`learning_rate` 0.01 -> 0.001: applied."),
        ({"max_steps": 6}, "`max_steps` 4 -> 6: applied, the learning rate follows"),
        ({"lr_scheduler_type": "linear"}, "`lr_scheduler_type` cosine -> linear: applied, the learning rate follows"),
        ({"warmup_steps": 3}, "`warmup_steps` 0 -> 3: applied, the learning rate follows"),
    ],
)
def test_another_learning_rate_or_length_is_said_and_applied(make_trainer, resumed, saved, said, change, message):
    """From the first step on the rates are those of a run that had the new argument from the start."""
    checkpoint = saved()
    fresh = make_trainer(**{**SAVE, "save_strategy": "no", **change})
    fresh.train()
    again = resumed(checkpoint, **change)
    (line,) = said
    assert line.startswith(f"Resumed after step 2 with {message}")
    assert {step: rate for step, rate in rates(fresh).items() if step > 2} == {
        step: rate for step, rate in rates(again).items() if step > 2
    }
    assert again.state.global_step == again.args.max_steps


def test_a_learning_rate_of_zero_moves_nothing(resumed, saved):
    """The rate of the very next step, too: Trainer's own is that of the checkpoint."""
    checkpoint = saved()
    again = resumed(checkpoint, learning_rate=0.0)
    before = CLIPModel.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in again.model.state_dict().items())


def test_another_weight_decay_and_betas_are_said_and_applied(resumed, saved, said):
    checkpoint = saved()
    again = resumed(checkpoint, weight_decay=0.5, adam_beta2=0.9)
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.5, 0.0]
    assert {tuple(group["betas"]) for group in again.optimizer.param_groups} == {(0.9, 0.9)}
    assert sorted(said) == [
        "Resumed after step 2 with `betas` [0.9, 0.999] -> [0.9, 0.9]: applied.",
        "Resumed after step 2 with `weight_decay` 0.1 -> 0.5: applied.",
    ]
    plain = resumed(checkpoint)
    ours, theirs = (trainer.model.visual_projection.weight for trainer in (again, plain))
    assert ours.norm() < theirs.norm()


def test_an_optimizer_of_the_user_keeps_its_own_rate(resumed, processor, saved, said):
    def own(rate):
        model = tiny_clip(processor.tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        return {"model": model, "trainer": {"optimizers": (optimizer, None)}}

    again = resumed(saved(**own(1e-2)), **own(4e-3))
    assert said == ["Resumed after step 2 with `learning_rate` 0.01 -> 0.004: applied."]
    assert rates(again)[3] == pytest.approx(4e-3 * 0.5)


def test_a_learning_rate_in_a_tensor_is_filled():
    """As a compiled optimizer wants it."""

    def make(rate, steps=0):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(rate), capturable=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        scheduler.last_epoch = steps
        return optimizer, scheduler

    old, (optimizer, scheduler) = make(0.5)[0], make(0.25, steps=3)
    wanted = hyperparameters(optimizer)
    optimizer.load_state_dict(old.state_dict())
    (change,) = apply_hyperparameters(optimizer, scheduler, wanted, 3)
    assert str(change) == "`learning_rate` 0.5 -> 0.25: applied."
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert optimizer.param_groups[0]["lr"].item() == 0.25 / 4
    json.dumps(asdict(change))


def test_what_a_schedule_by_measurement_keeps_is_said(resumed, saved, said):
    options = {**PLATEAU, "eval_strategy": "steps", "eval_steps": 1}
    again = resumed(saved(**options), **options, learning_rate=1e-3)
    assert said == [
        "Resumed after step 2 with `learning_rate` 0.01 -> 0.001: not applied, the schedule's state goes on."
    ]
    assert set(rates(again).values()) == {1e-2}
    again.create_model_card()
    card = Path(again.args.output_dir, "README.md").read_text()
    assert re.search(r"`learning_rate` +[|] `0.01`", card)
    assert "`learning_rate` 0.01 -> 0.001: not applied" in card


def test_other_steps_for_logs_and_checkpoints_are_those_asked_for(resumed, saved, said, tmp_path):
    again = resumed(saved(), save_steps=3, logging_steps=2, output_dir=str(tmp_path / "again"))
    assert sorted(path.name for path in (tmp_path / "again").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert sorted(step for step in rates(again) if step > 2) == [4]
    assert [line.split(" with ")[1] for line in said] == [
        "`logging_steps` 1 -> 2: applied.",
        "`save_steps` 1 -> 3: applied.",
    ]


def test_the_card_tells_what_was_used_and_from_when(resumed, saved, tmp_path):
    options = {"learning_rate": 1e-3, "output_dir": str(tmp_path / "again")}
    resumed(saved(), **options)
    third = resumed(str(tmp_path / "again" / "checkpoint-3"), **options, max_steps=5)
    third.create_model_card()
    card = (tmp_path / "again" / "README.md").read_text()
    assert "- After step 2 the run was resumed with `learning_rate` 0.01 -> 0.001: applied.\n" in card
    assert "- After step 3 the run was resumed with `max_steps` 4 -> 5: applied, the learning rate" in card
    assert re.search(r"`learning_rate` +[|] `0.001`", card)
    third.train()
    third.create_model_card()
    assert "was resumed" not in (tmp_path / "again" / "README.md").read_text()


def test_arguments_of_a_subclass_are_compared_as_well(suite, processor, tmp_path, said):
    def make(**options):
        common = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
        args = Own.from_preset("flyp", **common, **SAVE, **options)
        model = tiny_clip(processor.tokenizer)
        return CaRotTrainer(model=model, args=args, suite=suite, processing_class=processor)

    make(service_key="s3cret").train()
    assert "s3cret" not in (tmp_path / "checkpoint-2" / "run.json").read_text()
    make(extra_weight=0.25).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert said == ["Resumed after step 2 with `extra_weight` 0.5 -> 0.25: applied."]


def test_other_versions_are_said(resumed, saved, said):
    checkpoint = saved()
    facts = json.loads(Path(checkpoint, "run.json").read_text())
    facts["versions"]["torch"] = "1.0"
    Path(checkpoint, "run.json").write_text(json.dumps(facts))
    write_manifest(checkpoint)
    resumed(checkpoint)
    (line,) = said
    assert f"`version of torch` 1.0 -> {torch.__version__.split('+')[0]}" in line


# ---- the order of the samples ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 2}, "`samples a step` 4 -> 2, `pairs in the loss` 4 -> 2"),
        ({"gradient_accumulation_steps": 2}, "`samples a step` 4 -> 8"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "`pairs in the loss` 4 -> 2"),
        ({"data_seed": 5}, "`data_seed` 42 -> 5"),
        ({"train_sampling_strategy": "sequential"}, "`train_sampling_strategy` random -> sequential"),
        ({"dataloader_drop_last": False}, "`steps an epoch` 6 -> 7"),
    ],
)
def test_another_batch_or_order_is_refused_within_an_epoch(resumed, saved, change, message):
    checkpoint = saved()
    with pytest.raises(ValueError, match=f"in the middle of epoch 1, after 2 of its 6 steps; got {message}"):
        resumed(checkpoint, **change)


def test_the_same_pairs_through_the_gradient_cache_go_on_anywhere(resumed, saved, said):
    resumed(saved(), per_device_train_batch_size=2, contrastive_batch_size=4)
    assert not said


@pytest.mark.parametrize(
    "length", [{"max_steps": -1, "num_train_epochs": 3}, pytest.param({"max_steps": 19}, marks=pytest.mark.slow)]
)
def test_another_batch_from_the_end_of_an_epoch_on(resumed, saved, said, length):
    """6 steps of 4, then 13 of 2 an epoch; stopped and resumed once more within the second and the third epoch."""
    epochs = {"max_steps": -1, "num_train_epochs": 1} if length["max_steps"] < 0 else {"max_steps": 6}
    options = {**length, "per_device_train_batch_size": 2}
    whole = resumed(saved(6, **epochs), **options)
    last = 32 if length["max_steps"] < 0 else 19
    assert whole.state.global_step == last
    assert [line.split(" with ")[1].split(":")[0] for line in said][:2] == [
        "`samples a step` 4 -> 2",
        "`pairs in the loss` 4 -> 2",
    ]
    assert whole.state.epoch == (3.0 if last == 32 else 2.0)
    steps = [len(whole.seen)]
    for step in (10, 19, 21)[: 2 if last == 32 else 1]:
        again = resumed(f"{whole.args.output_dir}/checkpoint-{step}", **options)
        steps.append(len(again.seen))
        for one, other in zip(whole.seen[-len(again.seen) :], again.seen, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), name
    assert steps == ([26, 22, 13] if last == 32 else [13, 9])
    tail = whole.seen[:13]
    assert len({image.numpy().tobytes() for batch in tail for image in batch["pixel_values"]}) == 26  # none twice


def test_a_data_skip_that_is_left_out_is_said(resumed, saved, said):
    again = resumed(saved(), ignore_data_skip=True)
    assert said == [
        "Resumed after step 2 with `ignore_data_skip` False -> True: applied, the epoch begins anew, and samples of "
        "its 2 finished steps are seen twice."
    ]
    first = resumed(None, max_steps=1, save_strategy="no")
    assert torch.equal(first.seen[0]["labels"], again.seen[0]["labels"])


def test_epochs():
    epochs = Epochs(10, first_step=6, first_epoch=2)
    assert [epochs.position(step) for step in (6, 15, 16, 27)] == [(2, 0), (2, 9), (3, 0), (4, 1)]
    assert [epochs.last_epoch(step) for step in (6, 7, 16, 17)] == [2, 3, 3, 4]
    assert [epochs.last_step(count) for count in (2, 2.5, 3)] == [6, 11, 16]
    plain = Epochs(4)
    assert (plain.position(9), plain.last_epoch(9), plain.last_step(2.25)) == ((2, 1), 3, 9)
    saved = SavedRun(Path("x"), 26, {"epochs": {"steps": 10, "first_step": 6, "first_epoch": 2}, "changes": []})
    assert continued(saved, 10) == epochs
    assert continued(saved, 5) == Epochs(5, 26, 4)


# ---- checkpoints that are no good, or old ----


def test_a_finished_run_takes_no_further_step(resumed, saved, said):
    """Trainer takes one more, when an epoch is not at its end."""
    checkpoint = saved(4)
    again = resumed(checkpoint)
    assert again.state.global_step == 4
    before = CLIPModel.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in again.model.state_dict().items())
    assert said == [f"Nothing is left to train: {checkpoint} is at step 4 of 4."]


def test_a_checkpoint_without_an_optimizer_is_refused(resumed, saved):
    checkpoint = saved(save_only_model=True)
    check_checkpoint(checkpoint)
    for start in (checkpoint, True):
        with pytest.raises(ValueError, match=r"it has no optimizer\.pt: it was saved with `save_only_model`"):
            resumed(start)


def test_a_path_that_does_not_exist_says_so(resumed, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint in .*nowhere, but there is no such folder"):
        resumed(str(tmp_path / "nowhere"))


def test_a_checkpoint_of_version_0_1_is_resumed_with_one_warning(resumed, saved, said):
    checkpoint = as_version_0_1(saved())
    assert read_run(checkpoint).facts is None
    resumed(checkpoint)
    (line,) = said
    assert "of version 0.1 and does not say what its run was" in line


def test_a_lost_run_file_is_damage(resumed, saved):
    checkpoint = saved()
    Path(checkpoint, "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        resumed(checkpoint)


# ---- what is published while the run goes on ----


class Uploads:
    """Stands in for the Hub's client: notes what is wrong with a folder when it is taken; done when it is asked for."""

    def __init__(self, monkeypatch, done=True):
        self.taken, self.done, self.waiting, self.waited = [], done, [], []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: self)
        if not done:
            monkeypatch.setattr(transformers.trainer.PushInProgress, "wait_until_done", lambda _: self.finish())

        def init_hf_repo(trainer):
            trainer.hub_model_id, trainer.push_in_progress = "tester/tiny", None

        monkeypatch.setattr(CaRotTrainer, "init_hf_repo", init_hf_repo)

    def upload_folder(self, *, folder_path, allow_patterns, path_in_repo=None, **kwargs):
        folder = Path(folder_path)
        files = {path.name for path in folder.iterdir()} & set(allow_patterns)
        damage = damage_of(folder) if path_in_repo else None
        self.taken.append((folder.name, path_in_repo, files, damage))
        job = Future()
        if self.done:
            job.set_result(None)
        else:
            self.waiting.append((job, folder))
        return job

    def finish(self):
        """What is waited for ends; note whether its folders are there."""
        self.waited.append([folder.exists() for _, folder in self.waiting])
        for job, _ in self.waiting:
            job.set_result(None)
        self.waiting.clear()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_published_checkpoint_is_complete(make_trainer, monkeypatch, strategy):
    uploads = Uploads(monkeypatch)
    make_trainer(**{**SAVE, "max_steps": 2}, push_to_hub=True, hub_strategy=strategy).train()
    checkpoints = [taken for taken in uploads.taken if taken[1]]
    assert [name for name, *_ in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    where = ["last-checkpoint"] * 2 if strategy == "checkpoint" else ["checkpoint-1", "checkpoint-2"]
    assert [place for _, place, *_ in checkpoints] == where
    for _, _, files, damage in checkpoints:
        assert damage is None
        assert {"manifest.json", "run.json", "teacher.safetensors", "optimizer.pt"} <= files
    assert len(uploads.taken) == 4  # the model itself beside each


def test_no_checkpoint_goes_while_it_is_published(make_trainer, monkeypatch):
    """An older push is waited for before the rotation that may delete its folder."""
    uploads = Uploads(monkeypatch, done=False)
    trainer = make_trainer(**{**SAVE, "max_steps": 3}, save_total_limit=1, push_to_hub=True, hub_strategy="checkpoint")
    trainer.train()
    assert len([taken for taken in uploads.taken if taken[1]]) == 3
    assert uploads.waited == [[True, True]] * 3
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("always", [False, True])
def test_files_under_upload_are_not_written_anew(make_trainer, monkeypatch, always):
    """Where the Hub is slow a push is left out; with `hub_always_push` it waits for the one before."""
    uploads = Uploads(monkeypatch, done=False)
    written = []
    card = CaRotTrainer.create_model_card

    def noted(self, *args, **kwargs):
        written.append(len(uploads.waiting))
        card(self, *args, **kwargs)

    monkeypatch.setattr(CaRotTrainer, "create_model_card", noted)
    options = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": always}
    make_trainer(**{**SAVE, "max_steps": 3}, **options).train()
    assert written == ([0, 0, 0] if always else [0])
    assert len(uploads.taken) == len(written)


def test_a_push_that_fails_in_the_background_is_said(make_trainer, monkeypatch):
    """Trainer drops the errors of its pushes; once each."""
    uploads = Uploads(monkeypatch)

    def fail(**kwargs):
        uploads.taken.append(kwargs["folder_path"])
        job = Future()
        job.set_exception(OSError("no\nroom"))
        return job

    uploads.upload_folder = fail
    lines = []
    logger = carot_hf.hub.publisher.logger
    monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    make_trainer(**{**SAVE, "max_steps": 2}, push_to_hub=True, hub_strategy="checkpoint").train()
    assert len(uploads.taken) == 4
    failures = [line for line in lines if "in the background" in line]
    assert len(failures) == 4
    assert "Expected to push to 'tester/tiny' in the background, got: no room The training goes on" in failures[0]
