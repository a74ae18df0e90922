"""Teacher and metric under a stock ``transformers.Trainer``: average, files, resuming, evaluation; and their page."""

from __future__ import annotations

import os
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from launching import in_processes
from safetensors import safe_open
from tolerances import EXACT, LOGGED
from torch import nn
from torch.nn.parallel import DataParallel
from toys import ROOT, SUPPORT
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import carot_hf
from carot_hf import Teacher, TeacherCallback
from carot_hf.ece.binning import calibration_bins
from carot_hf.teacher.file import load_teacher_file, save_teacher_file, student_mark

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
COMPILE = partial(torch.compile, backend="eager")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Nothing is written into the home of whoever runs the tests."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))


def sentences(count=48, seed=0):
    words = torch.randint(2, 12, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int(row[0] > row[1])} for row in words]


def bert(seed=0, kind=BertForSequenceClassification, **config):
    torch.manual_seed(seed)
    return kind(BertConfig(vocab_size=12, max_position_embeddings=8, num_labels=2, **SIZE, **config))


def momentum(step, total_steps):
    return 0.3 + 0.5 * step / total_steps


def make(folder, callbacks=(), model=None, *, teacher=None, callback=None, trainer=Trainer, metrics=None, **options):
    """A stock trainer of a tiny BERT with dropout, and its teacher, moved every second of eight steps."""
    model = bert() if model is None else model
    teacher = Teacher(model) if teacher is None else teacher
    settings = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    made = trainer(
        model=model,
        args=Arguments(**{**settings, **options}),
        train_dataset=sentences(),
        eval_dataset=sentences(20, seed=1),
        compute_metrics=metrics,
        callbacks=[*callbacks, TeacherCallback(teacher, momentum, 2, **(callback or {}))],
    )
    return made, teacher


def teacher_callback(trainer):
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, TeacherCallback))


def bits(module):
    return {
        name: value.clone()
        for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


class Snapshots(TrainerCallback):
    """The student's weights at the start and after each step, in float64."""

    def __init__(self):
        self.taken = []

    def take(self, model):
        self.taken.append({name: value.detach().double().clone() for name, value in model.named_parameters()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.take(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.take(model)


def slow_average(taken):
    expected = taken[0]
    for step in (2, 4, 6, 8):
        m = momentum(step, 8)
        expected = {name: m * value + (1 - m) * taken[step][name] for name, value in expected.items()}
    return expected


# ---- the average ----


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda model: model, {}),
        (lambda model: model, {"gradient_accumulation_steps": 3}),
        (lambda model: model.to(torch.bfloat16), {}),
        (lambda model: model, {"bf16": True}),
        (lambda model: model.bert.embeddings.requires_grad_(False) and model, {}),
        (lambda model: model, {"torch_compile": True, "torch_compile_backend": "eager"}),
        (COMPILE, {"remove_unused_columns": False}),
    ],
    ids=["plain", "accumulation", "bf16 weights", "bf16 autocast", "frozen", "torch_compile", "compiled before"],
)
def test_the_average_is_that_of_a_slow_loop(tmp_path, change, options):
    snapshots = Snapshots()
    model = change(bert())
    trainer, teacher = make(tmp_path, [snapshots], model, save_strategy="no", **options)
    trainer.train()
    assert len(snapshots.taken) == 9
    expected = slow_average(snapshots.taken)
    moved = 0
    for name, value in expected.items():
        found = dict(teacher.model.named_parameters())[name.removeprefix("_orig_mod.")]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), value, atol=1e-6, rtol=0, msg=name)
        moved += not torch.equal(value, snapshots.taken[0][name])
    assert moved > 10


# ---- files ----


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("step", [3, 4])
def test_resumed_equals_unbroken(tmp_path, step, options):
    """On a step of the teacher (4) and between two of them (3); bit for bit, teacher included."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    whole, teacher = make(tmp_path, model=bert().to(dtype), **options)
    whole.train()
    again, resumed = make(tmp_path, model=bert(seed=5).to(dtype), **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same(bits(again.model), bits(whole.model))
    assert_same(bits(resumed.model), bits(teacher.model))
    assert not torch.equal(resumed.model.classifier.weight, again.model.classifier.weight.float())


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    model = bert(kind=BertForMaskedLM, tie_word_embeddings=True)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    teacher, other = Teacher(model), Teacher(bert(3, BertForMaskedLM, tie_word_embeddings=True))
    save_teacher_file(teacher, tmp_path / "t.safetensors")
    with safe_open(str(tmp_path / "t.safetensors"), framework="pt") as file:
        assert len([name for name in file.keys() if tuple(file.get_slice(name).get_shape()) == (12, 16)]) == 1  # noqa: SIM118
    load_teacher_file(other, tmp_path / "t.safetensors")
    assert_same(bits(other.model), bits(teacher.model))
    assert other.model.cls.predictions.decoder.weight is other.model.bert.embeddings.word_embeddings.weight
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_views_of_one_storage_can_be_written(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(12.0).reshape(3, 4)
            self.register_buffer("whole", whole)
            self.register_buffer("part", whole[1:])
            self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
            self.weight = nn.Parameter(torch.ones(2))

    teacher, other = Teacher(Views()), Teacher(Views())
    other.model.whole.zero_()
    save_teacher_file(teacher, tmp_path / "t")
    load_teacher_file(other, tmp_path / "t")
    assert_same(bits(other.model), bits(teacher.model))


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    teacher = Teacher(bert())
    path = tmp_path / "t.safetensors"
    save_teacher_file(teacher, path)
    before = path.read_bytes()

    def half(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr("carot_hf.teacher.file.save_file", half)
    with pytest.raises(OSError, match="no space"):
        save_teacher_file(teacher, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_refused_and_nothing_moves(tmp_path):
    make(tmp_path)[0].train()
    (tmp_path / "checkpoint-4" / "teacher.safetensors").unlink()
    again, teacher = make(tmp_path)
    before = bits(teacher.model)
    with pytest.raises(ValueError, match=r"checkpoint-4/teacher.safetensors, got no such file.*resume_from"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(bits(teacher.model), before)


def test_the_teacher_of_another_run_is_refused_unless_it_is_named(tmp_path):
    """Both runs have a checkpoint-4; the one that is resumed is not in `output_dir`."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    make(mine, seed=1, logging_strategy="no")[0].train()
    whole, teacher = make(theirs, seed=2, logging_strategy="no")
    whole.train()
    start = str(theirs / "checkpoint-4")
    with pytest.raises(ValueError, match=r"saved with other weights of the student.*resume_from"):
        make(mine, seed=2, logging_strategy="no")[0].train(resume_from_checkpoint=start)
    again, resumed = make(mine, seed=2, logging_strategy="no", callback={"resume_from": start})
    again.train(resume_from_checkpoint=start)
    assert_same(bits(resumed.model), bits(teacher.model))
    with pytest.raises(ValueError, match="Expected a resumed run for `resume_from`"):
        again.train()


@pytest.mark.parametrize("method", ["_load_from_checkpoint", "_load_best_model"])
def test_a_student_that_was_not_restored_is_refused(tmp_path, monkeypatch, method):
    """Trainer only warns when names have changed: of its own checkpoints of a ViT in transformers 5.23."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "score"}
    scores = iter([1.0, *[0.0] * 20])
    trainer, _ = make(tmp_path, metrics=lambda _: {"score": next(scores)}, **best, greater_is_better=True)
    monkeypatch.setattr(Trainer, method, lambda *args, **kwargs: None)
    if method == "_load_best_model":
        start = None
    else:
        trainer.train()
        start = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"saved with other weights of the student.*missing keys"):
        trainer.train(resume_from_checkpoint=start)


def test_the_mark_sees_every_parameter_and_no_wrapper():
    model = bert()
    mark = student_mark(model)
    assert mark == student_mark(bert()) == student_mark(DataParallel(model)) == student_mark(COMPILE(model))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(1e-6 + parameter.abs() * 1e-5)
        assert student_mark(model) != mark
        mark = student_mark(model)


def test_two_teachers_have_two_files_and_none_has_none(tmp_path):
    model = bert()
    slow = Teacher(model)
    second = TeacherCallback(slow, lambda step, total: 0.99, 1, save_as="slow.safetensors")
    trainer, fast = make(tmp_path, [second], model)
    trainer.train()
    again, resumed = make(
        tmp_path, [TeacherCallback(Teacher(model), lambda step, total: 0.99, 1, save_as="slow.safetensors")]
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(bits(teacher_callback(again).teacher.model), bits(slow.model))
    assert_same(bits(resumed.model), bits(fast.model))
    make(tmp_path / "none", callback={"save_as": None}, max_steps=1)[0].train()
    assert not list((tmp_path / "none").rglob("teacher*"))


def test_the_best_checkpoint_brings_its_teacher(tmp_path):
    """The third of four evaluations is best; also when only that checkpoint and the last are kept."""
    scores = iter([1.0, 2.0, 9.0, 3.0])
    trainer, teacher = make(
        tmp_path,
        metrics=lambda prediction: {"score": next(scores)},
        **{"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True},
    )
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    best = Teacher(bert())
    load_teacher_file(best, tmp_path / "checkpoint-6" / "teacher.safetensors", trainer.model)
    assert_same(bits(teacher.model), bits(best.model))
    unbroken, last = make(tmp_path / "last", save_strategy="no")
    unbroken.train()
    assert not torch.equal(last.model.classifier.weight, teacher.model.classifier.weight)


def test_a_search_resets_the_teacher_and_has_no_checkpoints(tmp_path):
    snapshots = Snapshots()
    trainer, teacher = make(tmp_path, [snapshots], save_strategy="no")
    trainer.model_init = lambda: bert(seed=9)
    trainer.train(trial={"learning_rate": 1e-3})
    assert not torch.equal(snapshots.taken[0]["classifier.weight"], bert().classifier.weight)
    for name, value in slow_average(snapshots.taken).items():
        torch.testing.assert_close(dict(teacher.model.named_parameters())[name].double(), value, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"got `save_strategy` 'steps'.*save_strategy='no'"):
        make(tmp_path)[0].train(trial={"learning_rate": 1e-3})


@pytest.mark.parametrize("name", ["fsdp", "environment", "zero"])
def test_sharding_is_refused(tmp_path, monkeypatch, name):
    trainer, _ = make(tmp_path)
    if name == "environment":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    elif name == "fsdp":
        trainer.args.fsdp = True
    else:
        trainer.args.hf_deepspeed_config = type("Zero", (), {"is_zero3": lambda self: True})()
    callback = teacher_callback(trainer)
    with pytest.raises(ValueError, match=r"got (FSDP|DeepSpeed ZeRO-3), which splits it"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


# ---- evaluation ----


class Odd(nn.Module):
    """bf16 and float32 parameters, tied ones, buffers of three kinds."""

    def __init__(self):
        super().__init__()
        self.low = nn.Linear(3, 3).to(torch.bfloat16)
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("hidden", torch.randn(2), persistent=False)
        self.low.bias.requires_grad_(False)


def moved_teacher(model):
    teacher = Teacher(model)
    for parameter in teacher.model.parameters():
        parameter.add_(torch.randn_like(parameter))
    for buffer in teacher.model.buffers():
        buffer.add_(3)
    return teacher


@pytest.mark.parametrize("wrap", [lambda model: model, DataParallel, COMPILE, lambda m: DataParallel(COMPILE(m))])
def test_the_swap_lends_the_average_and_restores_bit_for_bit(wrap):
    model = Odd()
    teacher = moved_teacher(model)
    before, average = bits(model), bits(teacher.model)
    identities = [id(parameter) for parameter in model.parameters()]
    wrapped = wrap(model)
    with teacher.swapped_into(wrapped) as lent:
        assert lent is wrapped
        assert_same(bits(model), {name: average[name].to(value.dtype) for name, value in before.items()})
        assert model.out.weight is model.embed.weight
    assert_same(bits(model), before)
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert_same(bits(teacher.model), average)


def test_the_swap_restores_after_an_exception_and_after_a_cast():
    model = Odd()
    teacher = moved_teacher(model)
    before = bits(model)

    def spoil():
        with teacher.swapped_into(model):
            model.low.weight.data.zero_()
            model.norm.num_batches_tracked += 1
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        spoil()
    assert_same(bits(model), before)
    with teacher.swapped_into(model):
        model.to(torch.float16)
    assert_same(bits(model), before)
    assert model.out.weight is model.embed.weight


def test_the_swap_refuses_another_model_and_leaves_it():
    other = bert()
    before = bits(other)
    with pytest.raises(ValueError, match="exists only in"), Teacher(Odd()).swapped_into(other):
        pass
    assert_same(bits(other), before)


@pytest.mark.parametrize("options", [{}, {"bf16_full_eval": True}])
def test_a_trainer_evaluates_the_average(tmp_path, options):
    trainer, teacher = make(tmp_path, max_steps=4, save_strategy="no")
    trainer.train()
    alone = Trainer(model=teacher.model, args=trainer.args, eval_dataset=trainer.eval_dataset)
    expected = alone.evaluate()["eval_loss"]
    before, own = bits(trainer.model), trainer.evaluate()["eval_loss"]
    trainer.args.bf16_full_eval = bool(options)
    with teacher.swapped_into(trainer.model):
        found = trainer.evaluate(metric_key_prefix="eval_teacher")["eval_teacher_loss"]
        if not options:
            trainer.save_model(str(tmp_path / "average"))
    assert found == (pytest.approx(expected, abs=1e-2) if options else expected)
    assert found != own
    assert_same(bits(trainer.model), before)
    if not options:
        saved = BertForSequenceClassification.from_pretrained(tmp_path / "average")
        assert_same(bits(saved), bits(teacher.model))


def test_ece_in_compute_metrics_is_that_of_our_bins(tmp_path):
    ece, seen = carot_hf.load_ece(from_logits=True), []

    def metrics(prediction):
        seen.append(prediction)
        return {"ece": ece.compute(predictions=prediction.predictions, references=prediction.label_ids)["ece"]}

    trainer, _ = make(tmp_path, metrics=metrics, per_device_eval_batch_size=3, max_steps=4, save_strategy="no")
    trainer.train()
    found = trainer.evaluate()["eval_ece"]
    logits = torch.from_numpy(seen[-1].predictions).double()
    assert logits.shape == (20, 2)
    confidence, choice = logits.softmax(-1).max(-1)
    correct = choice.numpy() == seen[-1].label_ids
    assert found == pytest.approx(calibration_bins(confidence.numpy(), correct, 10).ece, abs=1e-7)
    slow = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence.numpy() > low) & (confidence.numpy() <= low + 0.1)
        if inside.any():
            slow += inside.mean() * abs(correct[inside].mean() - confidence.numpy()[inside].mean())
    assert found == pytest.approx(slow, abs=1e-6)
    assert found > 0.01


# ---- the page ----


def test_the_page_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "teacher_for_any_trainer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), names)
    student, teacher = names["student_metrics"], names["teacher_metrics"]
    assert student["eval_accuracy"] > 0.5
    assert teacher["eval_teacher_accuracy"] > 0.5
    assert teacher["eval_teacher_ece"] != student["eval_ece"]
    assert {"eval_accuracy", "eval_ece", "eval_teacher_accuracy", "eval_teacher_ece"} <= names["final"].keys()
    assert names["both"].state.best_metric == names["final"]["eval_teacher_ece"]


# ---- several processes ----


def run_and_save(folder, resume=None):
    """Train in as many processes as there are, with the same batches in all; leave what came out, by rank."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer, teacher = make(
        folder,
        model=bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double(),
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=10 // processes,
        **{"optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.1, "average_tokens_across_devices": False},
        **{"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss"},
        ddp_backend="gloo" if processes > 1 else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    before = bits(trainer.model)
    with teacher.swapped_into(trainer.model_wrapped):
        loss = trainer.evaluate(metric_key_prefix="eval_teacher")["eval_teacher_loss"]
    assert_same(bits(trainer.model), before)
    found = {"teacher": teacher.state_dict(), "wrapped": type(trainer.model_wrapped).__name__, "loss": loss}
    torch.save(found, f"{folder}/result-{os.environ.get('RANK', '0')}.pt")
    trainer.accelerator.end_training()
    return trainer


WORKER = """
import os, sys
sys.path[:0] = {tests!r}
from test_any_trainer import run_and_save

# Kept: what torch does when DDP lets the last reference to a gloo group go may hang (`keep_group`).
trainer = run_and_save({folder!r}, {resume!r})
os._exit(0)  # all is saved: whatever threads are left need not be waited for
"""


def launch(folder, resume=None):
    folder.mkdir(exist_ok=True)
    places = [SUPPORT, str(ROOT / "tests" / "teacher")]
    result = in_processes(folder, WORKER.format(tests=places, folder=str(folder), resume=resume))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_follow_the_bare_model(tmp_path):
    """Under DDP: the average of one process with the whole batch, the same on both, and resumed exactly."""
    run_and_save(tmp_path)
    one = torch.load(tmp_path / "result-0.pt", weights_only=False)
    two = launch(tmp_path / "two")
    assert [rank["wrapped"] for rank in two] == ["DistributedDataParallel"] * 2
    for name, value in one["teacher"].items():
        torch.testing.assert_close(two[0]["teacher"][name], value, atol=EXACT, rtol=EXACT, msg=name)
        assert torch.equal(two[0]["teacher"][name], two[1]["teacher"][name]), name
    assert two[0]["loss"] == pytest.approx(one["loss"], rel=LOGGED)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "two" / "checkpoint-4", again / "checkpoint-4")
    for resumed in launch(again, str(again / "checkpoint-4")):
        assert_same(resumed["teacher"], two[0]["teacher"])
