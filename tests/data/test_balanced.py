"""Class-balanced epochs: exact counts, every image in its turn, repeats in batches of their own, one order for all."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import Recorder, assert_equal_runs, run
from toys import CLASSES, Noise, noise_set

from carot_hf import ShiftSet
from carot_hf.data.balanced import BalancedSampler, balanced_counts, drawn_before, spread
from carot_hf.data.batches import ShareSampler
from carot_hf.run.header import Balance, shared_class_share
from carot_hf.suites.splits import as_set


def sampler(counts, *, epoch=0, pairs=4, whole=1, seed=0, mixed=True):
    labels = np.repeat(np.arange(len(counts)), counts)
    if mixed:
        labels = np.random.default_rng(9).permutation(labels)
    return BalancedSampler(labels, seed, lambda: epoch, pairs=pairs, whole=whole), labels


# ---- how often ----


def test_by_hand():
    """6 images of class 0, 1 of class 1: 7 samples an epoch, 4 of the one and 3 of the other, then the other way round.

    Class 0 goes round its images a to f: a b c d, then e f a. Class 1 has one image: three times, then four times.
    """
    orders = []
    for epoch in (0, 1):
        order, labels = sampler([6, 1], epoch=epoch, mixed=False)
        orders.append(list(order))
    assert [Counter(labels[draw % 7] for draw in draws) for draws in orders] == [{0: 4, 1: 3}, {0: 3, 1: 4}]
    assert sorted(draw for draw in orders[0] if draw % 7 == 6) == [6, 13, 20]  # k * 7 + 6
    assert sorted(draw for draw in orders[1] if draw % 7 == 6) == [27, 34, 41, 48]
    first, second = ([draw for draw in draws if draw % 7 < 6] for draws in orders)
    assert all(draw < 7 for draw in first)
    (again,) = [draw for draw in second if draw >= 7]  # the first of the second round
    assert again - 7 in first
    assert {draw for draw in second if draw < 7} == set(range(6)) - set(first)


@pytest.mark.parametrize("counts", [[10, 3, 1], [5, 5, 5], [1, 1, 9], [40, 7, 3, 1], [2, 0, 5], [7]])
@pytest.mark.parametrize("whole", [1, 4])
def test_counts_are_exact_in_each_epoch_and_even_over_all(counts, whole):
    there = [count for count in counts if count]
    size = sum(counts) - sum(counts) % whole
    total, draws = Counter(), []
    for epoch in range(2 * len(counts)):
        order, labels = sampler(counts, epoch=epoch, whole=whole)
        found = list(order)
        assert len(found) == len(order) == size
        of_classes = Counter(labels[draw % order.size] for draw in found)
        for label, count in enumerate(counts):
            expected = {size // len(there), math.ceil(size / len(there))} if count else {0}
            assert of_classes[label] in expected
        if epoch == 0:
            assert [of_classes[label] for label in range(len(counts))] == balanced_counts(
                np.array(counts), size
            ).tolist()
        total += of_classes
        draws += found
        assert max(total.values()) - min(total[label] for label, count in enumerate(counts) if count) <= 1
    assert len(set(draws)) == len(draws)  # no draw twice in a run: each time another crop
    images = Counter(draw % order.size for draw in draws)
    for label in range(len(counts)):
        times = [images[row] for row in np.flatnonzero(labels == label)]
        assert not times or max(times) - min(times) <= 1


def test_the_closed_form_is_the_sum_of_a_slow_loop():
    for size, classes in itertools.product((1, 5, 12, 13), (1, 2, 5, 7)):
        before, following = np.zeros(classes, int), 0
        for epoch in range(9):
            assert drawn_before(size, classes, epoch).tolist() == before.tolist()
            before += size // classes
            for _ in range(size % classes):
                before[following % classes] += 1
                following += 1


@pytest.mark.parametrize("counts", [[10, 3, 1], [40, 7, 3, 1], [25, 24]])
def test_every_image_is_seen_within_its_epochs(counts):
    """Of n_c images floor(n / K) or more an epoch: all in ceil(n_c / floor(n / K)) epochs, wherever one begins."""
    for begin, (label, count) in itertools.product(range(4), enumerate(counts)):
        epochs = math.ceil(count / (sum(counts) // len(counts)))
        seen = set()
        for epoch in range(begin, begin + epochs):
            order, labels = sampler(counts, epoch=epoch)
            seen |= {draw % order.size for draw in order}
        assert set(np.flatnonzero(labels == label)) <= seen
    # and a rare class's images come evenly in each epoch
    order, labels = sampler(counts, epoch=3)
    times = Counter(draw % order.size for draw in order)
    for label in range(len(counts)):
        found = [times[row] for row in np.flatnonzero(labels == label)]
        assert max(found) - min(found) <= 1


def test_the_order_is_of_seed_and_epoch_alone():
    one, other = (list(sampler([10, 3, 1], epoch=2, seed=seed)[0]) for seed in (5, 6))
    again = sampler([10, 3, 1], epoch=2, seed=5)[0]
    assert one == list(again) == list(again) != other
    assert one != list(sampler([10, 3, 1], epoch=3, seed=5)[0])
    places = [next(iter(sampler([10, 3, 1], epoch=epoch)[0])) % 14 for epoch in range(40)]
    assert len(set(places)) > 7  # which sample is the first


def test_which_images_take_turns_is_of_the_seed():
    """Of the 12 images of class 0 an epoch has 7; rows are in the order of their class."""
    chosen = []
    for seed in range(40):
        draws = sampler([12, 2], seed=seed, mixed=False)[0]
        chosen.append(frozenset(draw % 14 for draw in draws if draw % 14 < 12))
    assert {len(images) for images in chosen} == {7}
    assert len(set(chosen)) > 30
    times = Counter(image for images in chosen for image in images)
    assert all(abs(times[image] - 40 * 7 / 12) < 4.5 * math.sqrt(40 * 7 / 12 * 5 / 12) for image in range(12))


# ---- repeats ----


@pytest.mark.parametrize("pairs", [2, 4, 5, 8, 16, 40, 100])
@pytest.mark.parametrize("counts", [[40, 7, 3, 1], [10, 3, 1], [30, 10]])
def test_the_same_image_is_as_seldom_in_one_batch_as_can_be(counts, pairs):
    for epoch in range(3):
        order, _ = sampler(counts, epoch=epoch, pairs=pairs)
        draws = list(order)
        times = Counter(draw % order.size for draw in draws)
        full = len(draws) // pairs
        for start in range(0, len(draws), pairs):
            batch = Counter(draw % order.size for draw in draws[start : start + pairs])
            assert all(count <= math.ceil(times[image] / max(1, full)) for image, count in batch.items())


def test_the_repeats_of_an_image_are_no_nearer_than_by_chance():
    """Twice in 8 batches: next to each other in 7 of 28 cases. Dealt like cards alone, it would be in all."""
    near, epochs = 0, 1000
    draws = np.arange(32)  # 0 and 31 are the same image of 31
    for epoch in range(epochs):
        order = spread(draws, 31, 4, np.random.default_rng(epoch))
        one, two = np.flatnonzero(order % 31 == 0) // 4
        assert one != two
        near += abs(int(one) - int(two)) == 1
    assert sorted(order.tolist()) == draws.tolist()
    assert near / epochs == pytest.approx(1 / 4, abs=4.5 * math.sqrt(1 / 4 * 3 / 4 / epochs))


def test_without_repeats_the_batches_are_a_random_partition():
    """Each pair of 8 images shares a batch of 4 in 3 of 7 epochs."""
    together, epochs = np.zeros((8, 8)), 1500
    for epoch in range(epochs):
        order = spread(np.arange(8), 8, 4, np.random.default_rng(epoch))
        assert sorted(order.tolist()) == list(range(8))
        for batch in (order[:4], order[4:]):
            together[np.ix_(batch, batch)] += 1
    shares = together[np.triu_indices(8, 1)] / epochs
    assert np.abs(shares - 3 / 7).max() < 4.5 * math.sqrt(3 / 7 * 4 / 7 / epochs)


def test_two_processes_share_the_batches_of_one():
    order, _ = sampler([40, 7, 3, 1], pairs=8, whole=8)
    ranks = [list(ShareSampler(order, 4, rank, 2, drop_last=True)) for rank in (0, 1)]
    assert [draw for a, b in zip(*ranks, strict=True) for draw in a + b] == list(order)
    assert len(list(order)) == 48


# ---- in a run ----


class Uneven(Noise):
    """17 images of class 0, 6 of 1, 2 of 2 and 1 of 3."""

    def __init__(self, size, seed):
        super().__init__(size, seed)
        self.labels = np.repeat(np.arange(4), [17, 6, 2, 1])


@pytest.fixture
def uneven(suite):
    data = Uneven(26, 0)
    train = ShiftSet(data, name="train", num_classes=len(CLASSES), labels=data.labels)
    return dataclasses.replace(suite, train=train)


def test_a_run_sees_as_many_of_each_class(make_trainer, tmp_path, uneven):
    """24 of 26 samples fill the 6 batches of an epoch: 6 of each class."""
    whole = run(make_trainer, tmp_path / "whole", save_strategy="no", suite=uneven, class_balanced=True)
    assert len(whole.seen) == 16
    for epoch in (whole.seen[:6], whole.seen[6:12]):
        labels = torch.cat([batch["labels"] for batch in epoch])
        assert torch.bincount(labels).tolist() == [6, 6, 6, 6]
        pixels = {image.numpy().tobytes() for batch in epoch for image in batch["pixel_values"]}
        assert len(pixels) > 18  # the one image of class 3 comes six times, in other crops
    plain = run(make_trainer, tmp_path / "plain", save_strategy="no", suite=uneven, max_steps=3)
    assert torch.bincount(torch.cat([batch["labels"] for batch in plain.seen]))[0] > 12


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (3, 0), (4, 2)])
def test_resumed_equals_unbroken(make_trainer, tmp_path, uneven, step, workers):
    options = {"suite": uneven, "class_balanced": True, "dataloader_num_workers": workers}
    whole = run(make_trainer, tmp_path / "whole", **options)
    resumed = run(make_trainer, tmp_path / "again", resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **options)
    assert_equal_runs(whole, resumed)


def test_without_it_another_run(make_trainer, tmp_path, uneven):
    run(make_trainer, tmp_path / "run", max_steps=2, suite=uneven, class_balanced=True)
    with pytest.raises(ValueError, match="got another one: `class_balanced` True -> False"):
        run(make_trainer, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"), suite=uneven)


def test_the_cache_has_whole_batches_of_it(make_trainer, uneven):
    """24 of 26 samples are 3 batches of 8: the image that comes 6 times comes twice in each."""
    trainer = make_trainer(suite=uneven, class_balanced=True, contrastive_batch_size=8, max_steps=3)
    trainer.__class__ = Recorder
    trainer.train()
    labels = [batch["labels"] for batch in trainer.seen]
    assert torch.bincount(torch.cat(labels)).tolist() == [6, 6, 6, 6]
    for step in range(3):
        assert int((torch.cat(labels[2 * step : 2 * step + 2]) == 3).sum()) == 2
    sampler = trainer.get_train_dataloader().base_dataloader.batch_sampler
    for epoch, step in itertools.product(range(8), range(3)):  # the two of class 2 come three times: once in each
        trainer.state.epoch = epoch
        shares = list(sampler)
        rows = Counter(draw % 26 for share in shares[2 * step : 2 * step + 2] for draw in share)
        assert (rows[23], rows[24], rows[25]) == (1, 1, 2)


def test_a_rest_that_is_kept_is_counted(make_trainer, uneven):
    trainer = make_trainer(suite=uneven, class_balanced=True, dataloader_drop_last=False, max_steps=7)
    trainer.__class__ = Recorder
    trainer.train()
    assert [len(batch["labels"]) for batch in trainer.seen] == [4] * 6 + [2]
    assert sorted(torch.bincount(torch.cat([batch["labels"] for batch in trainer.seen])).tolist()) == [6, 6, 7, 7]


# ---- what is said ----


def test_the_header_and_the_warnings_are_of_balanced_counts(make_trainer, suite, uneven, capsys, caplog):
    make_trainer(suite=uneven, class_balanced=True, max_steps=1).train()
    assert "balanced   each of 4 classes 6 times an epoch, an image of them 0 to 6 times" in capsys.readouterr().out
    said = [record.getMessage() for record in caplog.records if "share their class" in record.getMessage()]
    share = shared_class_share(np.array([6, 6, 6, 6]), 4)
    assert said == [
        f"In a batch of 4 pairs {100 * share:.0f} % share their class with another pair, which the loss takes for a "
        "negative. `same_class` 'ignore' (--same_class ignore) leaves such pairs out."
    ] * (share > 0.5)
    assert f"{100 * share:.0f}" != f"{100 * shared_class_share(np.array([17, 6, 2, 1]), 4):.0f}"
    make_trainer(max_steps=1, overwrite_output_dir=True).train()
    assert "balanced" not in capsys.readouterr().out


def test_repeats_that_must_share_a_batch_are_warned_of(make_trainer, uneven, caplog):
    options = {"suite": uneven, "class_balanced": True, "max_steps": 1, "per_device_train_batch_size": 8}
    make_trainer(**options).train()
    assert "Of 'three' an image comes 2 times in one batch, of which the loss takes all but its own" in caplog.text
    caplog.clear()
    make_trainer(**options, same_class="ignore", overwrite_output_dir=True).train()
    make_trainer(**{**options, "per_device_train_batch_size": 4, "overwrite_output_dir": True}).train()
    assert "times in one batch" not in caplog.text


def test_what_an_epoch_holds_by_hand():
    """30 samples of 3 classes, 10 of each: the two of the rarest come 5 times, in 3 batches of 10."""
    made = Balance.of(np.array([20, 8, 2]), ["a", "b", "c"], 30, 10)
    assert (made.classes, made.each, made.least, made.most, made.together, made.named) == (3, "10", 0, 5, 2, "'c'")
    assert "10 or 11 times" in str(Balance.of(np.array([20, 8, 3]), ["a", "b", "c"], 31, 10))
    assert Balance.of(np.array([4, 0, 4]), ["a", "b", "c"], 8, 2).classes == 2
    assert "2 classes 4 times an epoch, an image of them once" in str(
        Balance.of(np.array([4, 0, 4]), ["a", "b", "c"], 8, 2)
    )


# ---- what is refused ----


def replaced(suite, train):
    return dataclasses.replace(suite, train=train)


def test_labels_that_are_known_by_reading_only_are_refused(make_trainer, suite):
    train = ShiftSet(Noise(26, 0), name="train", num_classes=4)
    with pytest.raises(
        ValueError, match=r"only by reading its images\. Pass them: ShiftSet\(\.\.\., labels=\[\.\.\.\]\)"
    ):
        make_trainer(suite=replaced(suite, train), class_balanced=True)
    passed = ShiftSet(Noise(26, 0), name="mine", num_classes=4)
    with pytest.raises(ValueError, match="Expected the labels of set 'mine' at once"):
        make_trainer(class_balanced=True, trainer={"train_dataset": passed})
    make_trainer(class_balanced=True, trainer={"train_dataset": noise_set("mine", 8, 5)})


def test_it_is_refused_before_the_model_is_looked_at(make_trainer, suite):
    train = ShiftSet(Noise(26, 0), name="train", num_classes=4)
    with pytest.raises(ValueError, match="only by reading its images"):
        make_trainer(torch.nn.Linear(1, 1), suite=replaced(suite, train), class_balanced=True)


def rows(**columns):
    features = {"image": datasets.Image(), **{name: kind for name, (kind, _) in columns.items()}}
    content = {name: values for name, (_, values) in columns.items()}
    images = [Image.new("RGB", (20, 18), (10 * index, 0, 0)) for index in range(8)]
    return datasets.Dataset.from_dict({"image": images, **content}, features=datasets.Features(features))


def test_captions_alone_are_refused(make_trainer, suite):
    data = rows(text=(datasets.Value("string"), [f"number {index}" for index in range(8)]))
    train = ShiftSet(data, name="train", num_classes=4, label_column=None, caption_column="text")
    with pytest.raises(ValueError, match=r"`class_balanced`, got captions alone\. Name a `label_column`"):
        make_trainer(suite=replaced(suite, train), preset="flyp", class_balanced=True)


def test_streams_are_refused(make_trainer, suite, tmp_path):
    rows(label=(datasets.Value("int64"), [0, 1, 2, 3] * 2)).to_parquet(tmp_path / "rows.parquet")
    stream = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", streaming=True, cache_dir=str(tmp_path)
    ).cast_column("image", datasets.Image(decode=False))
    train = as_set(stream, name="train", num_classes=4)
    with pytest.raises(ValueError, match=r"got the stream 'train'\. Load it without `streaming`\. Leave"):
        make_trainer(suite=replaced(suite, train), class_balanced=True)


def test_the_order_of_the_data_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"`train_sampling_strategy` 'random' with `class_balanced`, got 'sequential'"):
        make_trainer(class_balanced=True, train_sampling_strategy="sequential")
