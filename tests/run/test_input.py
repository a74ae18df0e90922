"""Bad images and slow images in a real run; captions of one's own."""

from __future__ import annotations

import dataclasses
import io
import logging
import multiprocessing
import time

import datasets
import numpy as np
import pytest
from PIL import Image

from carot_hf import ShiftSet
from carot_hf.data.images import BadImageError
from carot_hf.run.input_wait import InputWait
from carot_hf.suites.splits import as_set


def rows(bad, size=12, *, captions=False):
    """PNGs of a seeded noise, some of them cut off."""
    images = []
    for index in range(size):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 18, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        data = buffer.getvalue()
        images.append({"bytes": data[: len(data) // 2] if index in bad else data, "path": f"{index}.png"})
    content = {"image": images, "label": [index % 4 for index in range(size)]}
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    if captions:
        content["text"], features["text"] = (
            [f"picture number {index}" for index in range(size)],
            datasets.Value("string"),
        )
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def bad_suite(suite, train=(), far=()):
    return dataclasses.replace(
        suite,
        train=ShiftSet(rows(train), name="train", num_classes=4),
        shifts={"far": ShiftSet(rows(far), name="far", num_classes=4)},
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_counted_and_listed(make_trainer, suite, caplog, workers):
    spoiled = bad_suite(suite, train={2, 3, 9}, far={0, 5})
    trainer = make_trainer(suite=spoiled, on_bad_image="skip", dataloader_num_workers=workers, max_steps=3)
    with caplog.at_level(logging.WARNING, logger="carot_hf"):
        trainer.train()
        listed = [record.getMessage() for record in caplog.records if "could not be decoded" in record.getMessage()]
        assert listed == [
            "3 images of set 'train' could not be decoded and were replaced by the next ones: indices 2, 3, 9."
        ]
        caplog.clear()
        metrics = trainer.evaluate()
        listed = [record.getMessage() for record in caplog.records if "could not be decoded" in record.getMessage()]
        assert listed == [
            "2 images of set 'far' could not be decoded and were replaced by the next ones: indices 0, 5."
        ]
    # the same as a set in which the next rows stand at these places
    order = [1, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]
    replaced = ShiftSet(rows(()).select(order), name="far", num_classes=4)
    plain = trainer.evaluate({"far": replaced})
    assert metrics["eval_far_nll"] == plain["eval_far_nll"]


def test_many_bad_images_are_listed_up_to_twenty(make_trainer, suite, caplog):
    far = ShiftSet(rows(range(30), 40), name="far", num_classes=4)
    trainer = make_trainer(suite=dataclasses.replace(suite, shifts={"far": far}), on_bad_image="skip")
    with caplog.at_level(logging.WARNING, logger="carot_hf"):
        trainer.evaluate("far")
    assert f"indices {', '.join(map(str, range(20)))}, ...." in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run_by_default(make_trainer, suite, workers):
    trainer = make_trainer(suite=bad_suite(suite, train={2}), dataloader_num_workers=workers, max_steps=3)
    with pytest.raises(BadImageError, match=r"in set 'train' at index 2 \(file 2\.png\)"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_of_a_stream(make_trainer, suite, caplog, workers, tmp_path):
    rows({1, 2, 11}).to_parquet(tmp_path / "far.parquet")
    stream = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "far.parquet"), split="train", streaming=True, cache_dir=str(tmp_path)
    ).cast_column("image", datasets.Image(decode=False))
    far = as_set(stream, name="far", num_classes=4)
    trainer = make_trainer(suite=dataclasses.replace(suite, shifts={"far": far}), dataloader_num_workers=workers)
    with pytest.raises(BadImageError, match=r"in set 'far' at row [12] \(file [12]\.png\)"):
        trainer.evaluate("far")
    trainer.args.on_bad_image = "skip"
    with caplog.at_level(logging.WARNING, logger="carot_hf"):
        metrics = trainer.evaluate("far")
    assert (
        "3 images of set 'far' could not be decoded and were replaced by the next ones: indices 1, 2, 11."
        in caplog.text
    )
    if workers == 0:  # with two the next row of the same reader stands in
        order = [0, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 10]
        labelled = rows(()).select(order)
        expected = trainer.evaluate({"far": ShiftSet(labelled, name="far", num_classes=4)})
        assert metrics["eval_far_nll"] == pytest.approx(expected["eval_far_nll"], abs=1e-12)


def test_workers_end_with_the_training(make_trainer):
    """They were left to the garbage collector, which closes their queues before it tells them to end."""
    before = set(multiprocessing.active_children())
    trainer = make_trainer(dataloader_num_workers=2, max_steps=2)
    trainer.train()
    assert set(multiprocessing.active_children()) <= before
    trainer.train()


def test_options_are_checked(make_trainer):
    with pytest.raises(ValueError, match=r"Expected `on_bad_image` to be one of \('raise', 'skip'\), got 'drop'"):
        make_trainer(on_bad_image="drop")
    assert make_trainer(dataloader_num_workers=2).args.dataloader_persistent_workers is True
    assert make_trainer().args.dataloader_persistent_workers is False


# ---- what is waited for ----


class Slow:
    def __init__(self, data, seconds):
        self.data, self.seconds = data, seconds

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return self.data.data[index]


def test_a_slow_input_is_named(make_trainer, suite, caplog):
    slow = ShiftSet(Slow(suite.train, 0.2), name="train", num_classes=4)  # 0.8 s a batch beside some 0.05 s of training
    trainer = make_trainer(suite=dataclasses.replace(suite, train=slow), max_steps=3)
    with caplog.at_level(logging.WARNING, logger="carot_hf"):
        trainer.train()
    shares = [entry["input_wait"] for entry in trainer.state.log_history if "input_wait" in entry]
    assert len(shares) == 3
    assert all(0.5 < share <= 1 for share in shares[1:])  # the first interval holds the start of the run
    assert caplog.text.count("The input is the bottleneck, not the model") == 1


def test_a_fast_input_is_not(make_trainer, caplog):
    trainer = make_trainer(max_steps=3)
    train_step, trainer.training_step = trainer.training_step, lambda *args: (time.sleep(0.3), train_step(*args))[1]
    with caplog.at_level(logging.WARNING, logger="carot_hf"):
        trainer.train()
    assert all(entry["input_wait"] < 0.5 for entry in trainer.state.log_history if "input_wait" in entry)
    assert "bottleneck" not in caplog.text


def test_shares_are_of_the_time_since_the_last_reading(monkeypatch, caplog):
    clock = iter([0.0, 1.0, 4.0, 4.0, 5.0, 5.0, 6.0, 9.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    wait = InputWait()  # at 0
    with caplog.at_level(logging.WARNING, logger="carot_hf"):
        with wait.waiting():  # 1 to 4
            pass
        assert wait.read() == 0.75  # at 4; the first reading never warns
        assert not caplog.records
        assert wait.read() == 0.0  # at 5
        with wait.waiting():  # 5 to 6
            pass
        assert wait.read() == 0.25  # at 9
    assert not caplog.records


# ---- captions ----


def test_captions_of_ones_own_are_trained_on(make_trainer, suite, processor):
    data = ShiftSet(rows((), captions=True), name="train", num_classes=4, label_column=None, caption_column="text")
    trainer = make_trainer(suite=dataclasses.replace(suite, train=data), preset="flyp", max_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    texts = {text.strip() for text in processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)}
    assert len(texts) == 4
    assert texts <= {f"picture number {index}" for index in range(12)}
    assert "labels" not in batch
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match=r"Expected labels in set 'train', got none\..*caption_column"):
        make_trainer(suite=dataclasses.replace(suite, train=data), preset="ft")


def test_long_captions_are_cut_at_the_context_and_keep_their_end(make_trainer, processor):
    trainer = make_trainer()
    tokens = trainer.captions.tokenize(["many words " * 100, "short"])
    assert tokens["input_ids"].shape == (2, 32)
    assert tokens["input_ids"][0, -1] == processor.tokenizer.eos_token_id
    assert (tokens["input_ids"][1] == processor.tokenizer.eos_token_id).nonzero()[0] < 31
    assert "attention_mask" not in tokens, "CLIP's text tower is causal: it never sees the padding"
