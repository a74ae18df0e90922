"""Streams: read once and whole by any number of readers, trained on in whole batches, measured as a table is."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from layouts import content, parquet, tars
from torch.utils.data import DataLoader
from toys import CLASSES, ROOT, SUPPORT, TEMPLATES

from carot_hf import ShiftSuite
from carot_hf.data.stream import StreamedDraws, StreamedRows
from carot_hf.suites.rows import open_source
from carot_hf.suites.splits import as_set, hold_out_of_stream

LABELS = np.random.default_rng(0).integers(0, 4, 41)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    parquet(folder / "home", "train", LABELS, files=5)
    parquet(folder / "home", "validation", LABELS[:13])
    parquet(folder / "home", "test", LABELS[5:28], files=3)
    tars(folder / "far" / "test", LABELS[2:39], files=4)
    tars(folder / "one" / "test", LABELS[7:20])
    return folder


def load(root, name, split, streaming):
    return as_set(open_source(root / name, split, streaming=streaming).rows, name=name, num_classes=4)


def make_suite(root, streaming):
    return ShiftSuite(
        name="copies",
        class_names=list(CLASSES),
        templates=list(TEMPLATES),
        train=load(root, "home", "train", streaming),
        validation=load(root, "home", "validation", False),
        test=load(root, "home", "test", streaming),
        shifts={name: load(root, name, "test", streaming) for name in ("far", "one")},
    )


# ---- readers ----


@pytest.mark.parametrize("readers", [1, 2, 4, 5, 11])
def test_readers_together_read_each_row_once(root, readers):
    """Four files: shared out whole among up to four readers, row by row among more."""
    data = load(root, "far", "test", True)
    numbers = [[number for number, _ in data.share(reader, readers)] for reader in range(readers)]
    together = sorted(number for part in numbers for number in part)
    assert together == sorted({*together})
    assert [Counter(number >> 32 for number in together)[file] for file in range(4)] == [10, 9, 9, 9]
    if readers <= 4:
        assert all(len({number >> 32 for number in part}) <= -(-4 // readers) for part in numbers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_reads_each_row_once(root, workers, world):
    data = load(root, "far", "test", True)
    read = []
    for rank in range(world):
        read += DataLoader(StreamedRows(data, rank, world), batch_size=None, num_workers=workers)
    assert len({item["row"] for item in read}) == len(read) == 37
    rows = sorted(item["image"].getpixel((0, 0))[1] for item in read)
    assert rows == list(range(37))


def draws(data, *, world=1, workers=0, epoch=0, batch=4, batches=5, seed=0, buffer=8):
    result = []
    for rank in range(world):
        source = StreamedDraws(
            data, batch_size=batch, batches=batches, rank=rank, world=world, seed=seed, buffer=buffer
        )
        source.set_epoch(epoch)
        result.append(list(DataLoader(source, batch_size=batch, num_workers=workers, collate_fn=list)))
    return result


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_training_gives_every_process_the_same_number_of_whole_batches(root, world, workers):
    data = load(root, "home", "train", True)
    per_process = draws(data, world=world, workers=workers, batches=10 // world)
    assert [[len(batch) for batch in batches] for batches in per_process] == [[4] * (10 // world)] * world
    seen = [item["draw"] for batches in per_process for batch in batches for item in batch]
    assert len(seen) == 40
    if world == 1 and workers == 0:
        assert len(set(seen)) == 40  # 40 of 41 rows, none twice


def test_the_order_is_drawn_anew_in_each_epoch_and_the_same_when_repeated(root):
    data = load(root, "home", "train", True)

    def order(**options):
        return [item["draw"] & (1 << 64) - 1 for batch in draws(data, batches=10, **options)[0] for item in batch]

    assert order() == order()
    assert order(epoch=1) != order()
    assert order(seed=1) != order()
    assert order() != sorted(order())
    epochs = [draws(data, epoch=epoch, batches=10)[0] for epoch in (0, 1)]
    numbers = [{item["draw"] for batch in batches for item in batch} for batches in epochs]
    assert not numbers[0] & numbers[1]  # a draw is of one epoch: its crop and template are new in the next


def test_a_reader_without_rows_is_an_error(tmp_path):
    tars(tmp_path / "test", np.array([0, 1, 2]))
    data = as_set(open_source(tmp_path, "test", streaming=True).rows, name="far", num_classes=4)
    with pytest.raises(ValueError, match=r"Expected rows of set 'far' for each of 4 readers, got none for reader 3"):
        draws(data, world=4, batch=1, batches=1)


def test_an_index_into_a_stream_is_refused(root):
    with pytest.raises(TypeError, match="'far' to be read by an index, but it is a stream"):
        load(root, "far", "test", True)[0]


# ---- holding out ----


def test_what_is_held_out_of_a_stream_is_not_trained_on(root):
    data = load(root, "home", "train", True)
    held = hold_out_of_stream(data, share=0.2, classes=4, seed=0, key="home")
    assert np.bincount(held.labels).tolist() == [2] * 4  # 20 % of 41 rows over four classes
    assert len(data) == 41 - 8
    assert sorted(row for *_, row in content(data) + content(held)) == list(range(41))
    assert all(label == painted for label, painted, _ in content(held))
    again = hold_out_of_stream(load(root, "home", "train", True), share=0.2, classes=4, seed=0, key="home")
    assert again.data[:] == held.data[:]
    other = hold_out_of_stream(load(root, "home", "train", True), share=0.2, classes=4, seed=1, key="home")
    assert other.data[:] != held.data[:]


def test_holding_out_needs_enough_rows_of_each_class(root):
    with pytest.raises(ValueError, match=r"Expected 2 rows of each of 5 classes to hold out of 'home', got 4 classes"):
        hold_out_of_stream(load(root, "home", "train", True), share=0.2, classes=5, seed=0, key="home")


def test_holding_out_leaves_rows_to_train_on(root):
    """One row of each class was all that there was, and the stream was empty."""
    with pytest.raises(
        ValueError, match=r"at least 82 rows to hold 1 of each of 41 classes out of 'home', got 41\. Load"
    ):
        hold_out_of_stream(load(root, "home", "train", True), share=0.02, classes=41, seed=0, key="home")
    with pytest.raises(TypeError, match="'home' to have rows by number, but it is a stream"):
        load(root, "home", "train", True).subset(np.arange(2), "part")


# ---- the trainer ----


def comparable(metrics):
    return {key: value for key, value in metrics.items() if "second" not in key and "runtime" not in key}


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_metrics_are_the_same_to_the_last_digit(root, make_trainer, expected, streaming, workers):
    trainer = make_trainer(suite=make_suite(root, streaming), dataloader_num_workers=workers)
    metrics = comparable(trainer.evaluate())
    assert set(metrics) > {"eval_home_ece", "eval_far_ece_ts", "eval_ood_accuracy", "eval_temperature"}
    assert metrics == expected.setdefault("metrics", metrics)


def test_a_stream_is_trained_on(root, make_trainer):
    suite = make_suite(root, True)
    trainer = make_trainer(
        suite=suite, max_steps=-1, num_train_epochs=2, preset="flyp", save_steps=6, save_strategy="steps"
    )
    trainer.train()
    assert trainer.state.global_step == 20  # 41 // 4 batches an epoch
    before = [value.clone() for value in trainer.model.parameters()]
    resumed = make_trainer(
        suite=suite, max_steps=-1, num_train_epochs=2, preset="flyp", save_steps=6, save_strategy="steps"
    )
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-12")
    for first, second in zip(before, resumed.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_stream_with_fewer_rows_than_promised_is_refused(root, make_trainer):
    suite = make_suite(root, True)
    short = as_set(open_source(root / "far", "test", streaming=True).rows, name="far", num_classes=4, published=(50, 4))
    trainer = make_trainer(suite=dataclasses.replace(suite, shifts={"far": short}))
    with pytest.raises(ValueError, match="Expected 50 rows in set 'far', read 37"):
        trainer.evaluate()


def test_a_bank_of_a_stream_is_refused_before_the_training(root, make_trainer):
    with pytest.raises(ValueError, match="read by index for the method 'density', got a stream"):
        make_trainer(suite=make_suite(root, True), calibration_method="density")


WORKER = """
import os
import sys, json
sys.path[:0] = {tests!r}
from pathlib import Path
import datasets
datasets.config.HF_DATASETS_CACHE = Path({out!r}) / "cache"
from toys import tiny_clip, tiny_processor
from carot_hf import CaRotTrainer, CaRotTrainingArguments
from test_streaming import make_suite
processor = tiny_processor()
args = CaRotTrainingArguments.from_preset(
    "carot", output_dir={out!r}, per_device_train_batch_size=4, per_device_eval_batch_size=8, max_steps=3,
    report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", dataloader_num_workers={workers},
    reliability_diagrams=False, ddp_backend="gloo")
trainer = CaRotTrainer(model=tiny_clip(processor.tokenizer), args=args, suite=make_suite(Path({root!r}), {streaming}),
                       processing_class=processor)
metrics = trainer.evaluate()
trainer.train()
if trainer.is_world_process_zero():
    Path({out!r}, "metrics.json").write_text(json.dumps(metrics))
trainer.accelerator.end_training()
os._exit(0)  # a thread that asks for the interpreter's lock while it ends aborts the process
"""


@pytest.mark.slow
@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (True, 0), (True, 2)])
def test_two_processes_find_the_same_metrics(root, make_trainer, tmp_path, streaming, workers):
    out = tmp_path / "two"
    out.mkdir()
    script = out / "worker.py"
    script.write_text(
        WORKER.format(
            tests=[SUPPORT, str(ROOT / "tests" / "suites")],
            out=str(out),
            root=str(root),
            streaming=streaming,
            workers=workers,
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    one = comparable(make_trainer(suite=make_suite(root, streaming)).evaluate())
    assert comparable(json.loads((out / "metrics.json").read_text())) == one
