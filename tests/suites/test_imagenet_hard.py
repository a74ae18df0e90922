"""ImageNet-Hard: an answer is right if it is one of an image's labels; against slow loops, whole and as a stream."""

from __future__ import annotations

import dataclasses
import math

import datasets
import numpy as np
import pytest
import torch
from layouts import content, parquet, picture
from toys import tiny_clip

import carot_hf.suites.splits
from carot_hf import Evaluator, ShiftSet, evaluate_vrf, load_suite
from carot_hf.cli.evaluate import figures_of
from carot_hf.data.images import BadImageError
from carot_hf.data.right_labels import RightLabels
from carot_hf.data.samples import draw, label_title, matching
from carot_hf.data.survey import say_positions, survey
from carot_hf.evaluation.per_image import difference_of
from carot_hf.suites.imagenet.sets import SETS, SetFacts

ROWS, K = 24, 1000


@pytest.fixture
def models(processor):
    return [tiny_clip(processor.tokenizer, seed).double() for seed in (0, 1)]


def copies(folder, lists, files=2):
    """Small copies in the layout of the Hub: of ImageNet-1K, and ImageNet-Hard with these lists of labels."""
    place = folder / "ILSVRC/imagenet-1k"
    if not place.exists():
        parquet(place, "train", np.repeat([0, 1, 2], 4))
        parquet(place, "validation", np.array([0, 134, 999]))
    data = folder / "taesiri/imagenet-hard/data"
    data.mkdir(parents=True)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.Sequence(datasets.Value("int64")),
            "origin": datasets.Value("string"),
            "english_label": datasets.Sequence(datasets.Value("string")),
        }
    )
    for file, rows in enumerate(np.array_split(np.arange(len(lists)), files)):
        own = [lists[row] for row in rows]
        images = [{"bytes": picture(row * 37, row), "path": f"{row}.png"} for row in rows.tolist()]
        words = [[str(label) for label in labels] for labels in own]
        table = {"image": images, "label": own, "origin": ["imagenet"] * len(own), "english_label": words}
        made = datasets.Dataset.from_dict(table, features=features)
        made.to_parquet(data / f"validation-{file:05d}-of-{files:05d}.parquet")
    return folder


def load(root, **options):
    own = {"class_names": [f"name {index}" for index in range(K)], "templates": ["a photo of a {}."]}
    return load_suite("imagenet", root=root, shifts=["hard"], check_counts=False, **own, **options)


@pytest.fixture
def lists(tmp_path, models, processor):
    """Two thirds of the images have an answer of a model among their labels, on any place; some have one label."""
    first = copies(tmp_path / "first", [[row] for row in range(ROWS)])
    hard = load(first).shifts["hard"]
    answers = [Evaluator(model, processor, load(first)).predict(hard)[0].argmax(dim=1) for model in models]
    rng = np.random.default_rng(0)
    made = []
    for row in range(ROWS):
        labels = set(rng.integers(0, K, row % 4).tolist()) | ({int(answers[row % 3][row])} if row % 3 < 2 else {row})
        made.append(rng.permutation(sorted(labels)).tolist())
    return made


@pytest.fixture
def root(tmp_path, lists):
    return copies(tmp_path / "copies", lists)


def with_answers_at_home(suite, models, processor):
    """The suite with home images of which each model has some right, as a conformal fit and VRF need them."""
    hard = suite.shifts["hard"]
    answers = [Evaluator(model, processor, suite).predict(hard)[0].argmax(dim=1).tolist() for model in models]
    labels = [answers[row % 3][row] if row % 3 < 2 else row for row in range(ROWS)]
    rows = [{"image": hard[row]["image"], "label": label} for row, label in enumerate(labels)]
    sets = {name: ShiftSet(rows, name=name, num_classes=K, labels=labels) for name in ("train", "validation")}
    return dataclasses.replace(suite, **sets)


def softmax(row):
    parts = [math.exp(value - max(row)) for value in row]
    return [part / math.fsum(parts) for part in parts]


def slow(probabilities, lists):
    """Accuracy, ECE of ten bins, and the NLL of the likeliest right label, image by image."""
    hits = [row.index(max(row)) in labels for row, labels in zip(probabilities, lists, strict=True)]
    sure = [max(row) for row in probabilities]
    bins = [[] for _ in range(10)]
    for confidence, hit in zip(sure, hits, strict=True):
        bins[max(0, math.ceil(confidence * 10) - 1)].append((confidence, hit))
    ece = sum(abs(sum(hit - confidence for confidence, hit in part)) for part in bins) / len(sure)
    nll = -sum(math.log(max(row[y] for y in labels)) for row, labels in zip(probabilities, lists, strict=True))
    return sum(hits) / len(hits), ece, nll / len(hits), hits


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_is_right_if_it_is_one_of_the_labels(root, lists, models, processor, streaming):
    suite = load(root, streaming=streaming)
    hard = suite.shifts["hard"]
    assert (len(hard), hard.num_labels, hard.right.first.tolist()) == (ROWS, K, [min(labels) for labels in lists])
    for model in models:
        evaluator = Evaluator(model, processor, suite)
        found = evaluator.evaluate()
        assert evaluator.embed({"hard": hard})["hard"][1].tolist() == hard.right.first.tolist()
        whole = load(root).shifts["hard"]
        assert content(whole) == [(min(labels), row * 37, row) for row, labels in enumerate(lists)]
        logits, labels = evaluator.predict(hard)
        accuracy, ece, nll, hits = slow([softmax(row) for row in logits.tolist()], lists)
        assert 0 < accuracy < 1
        metrics = found.metrics["hard"]
        assert metrics["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert metrics["ece"] == pytest.approx(ece, abs=1e-6)
        assert metrics["nll"] == pytest.approx(nll, rel=1e-5)
        assert found.per_image["hard"].hits.tolist() == hits
        assert (logits.argmax(dim=1) == labels).tolist() == hits
        for key in ("accuracy_ts", "accuracy"):  # no temperature makes another label the likeliest
            assert found.metrics["ood"].get(key, accuracy) == pytest.approx(accuracy, abs=1e-12)


def test_sets_of_classes_hold_one_of_the_labels(root, lists, models, processor):
    suite = with_answers_at_home(load(root), models, processor)
    evaluator = Evaluator(models[0], processor, suite, alpha=0.5)
    evaluator.calibrate("temperature")
    found = evaluator.evaluate(n_bootstrap=0).metrics["hard"]
    for score in ("lac", "aps"):
        sets = evaluator.sets(suite.shifts["hard"], score)
        held = [any(row[label] for label in labels) for row, labels in zip(sets, lists, strict=True)]
        assert 0 < np.mean(held) < 1
        assert found[f"{score}_coverage"] == pytest.approx(np.mean(held))


def test_two_models_compare_on_the_same_images_and_not_on_other_labels(root, lists, models, processor, tmp_path):
    suite = load(root)
    parts = [Evaluator(model, processor, suite).evaluate(n_bootstrap=0).per_image["hard"] for model in models]
    assert parts[0].labels.tolist() != parts[1].labels.tolist()  # each has the likeliest for it
    assert difference_of(parts[0].facts, parts[1].facts) is None
    other = [*lists[:-1], [*lists[-1], 555]]
    changed = load(copies(tmp_path / "other", other))
    again = Evaluator(models[0], processor, changed).evaluate(n_bootstrap=0).per_image["hard"]
    assert difference_of(parts[0].facts, again.facts) == "other labels, or another order"
    assert changed.content_hash != suite.content_hash


def test_vrf_takes_the_likeliest_of_the_mixture(root, lists, models, processor):
    suite = with_answers_at_home(load(root), models, processor)
    pair = [Evaluator(model, processor, suite) for model in models]
    found, vrf = evaluate_vrf(*pair, n_bootstrap=0)
    hard = suite.shifts["hard"]
    parts = [evaluator.predict(hard)[0] for evaluator in pair]
    mixed = vrf.log_mixture(*parts, vrf.distance(pair[1].embed({"": hard})[""][0])).exp().tolist()
    accuracy, ece, nll, _ = slow(mixed, lists)
    assert found.metrics["hard"]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert found.metrics["hard"]["ece"] == pytest.approx(ece, abs=1e-6)
    assert found.metrics["hard"]["nll"] == pytest.approx(nll, rel=1e-5)


def test_likeliest_against_a_loop_ties_and_parts():
    rng = np.random.default_rng(1)
    lists = [rng.permutation(9)[: 1 + row % 5].tolist() for row in range(40)]
    right = RightLabels(lists, 9, "hard")
    logits = torch.from_numpy(rng.integers(0, 4, (40, 9)).astype(float))  # many ties
    found = right.likeliest(logits).tolist()
    for row, labels, label in zip(logits.tolist(), lists, found, strict=True):
        assert label in labels
        assert row[label] == max(row[y] for y in labels)
        assert (row.index(max(row)) in labels) == (row.index(max(row)) == label)
    assert right.likeliest(logits[7:20], 7).tolist() == found[7:20]
    rows = np.array([3, 30, 12])
    assert right.of(rows).labels.tolist() == right.labels[rows].tolist()
    assert len(right.of(rows)) == 3
    assert right.facts != right.of(rows).facts
    scaled = logits / torch.from_numpy(rng.uniform(0.1, 9, (40, 1)))
    assert right.likeliest(scaled).tolist() == found


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([], r"at least one label in set 'hard' at index 1, none of them twice, got \[\]"),
        ([3, 3], r"none of them twice, got \[3, 3\]"),
        ([0, 0, 1], "a one-hot row is none"),
        ([K], r"labels in \[0, 1000\) in set 'hard', got 1000 at index 1"),
        ([-1], "got -1 at index 1"),
        ([1.5], "got 1.5 at index 1"),
        ([True, 2], "got True at index 1"),
        (["cat"], "got cat at index 1"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(labels, said):
    with pytest.raises(ValueError, match=said):
        RightLabels([[0], labels], K, "hard")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_copy_with_a_label_that_is_none_is_refused_before_any_image(tmp_path, streaming):
    with pytest.raises(ValueError, match=r"labels in \[0, 1000\) in set 'hard', got 1000 at index 1"):
        load(copies(tmp_path / "wrong", [[0], [5, K]]), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_copy_with_one_label_an_image_is_read_too(tmp_path, streaming):
    root = copies(tmp_path / "plain", [[0]], files=1)
    for file in (root / "taesiri/imagenet-hard/data").iterdir():
        file.unlink()
    parquet(root / "taesiri/imagenet-hard", "validation", np.array([7, 3]))
    hard = load(root, streaming=streaming).shifts["hard"]
    assert hard.right.labels.tolist() == [[7], [3]]
    assert [label for label, *_ in content(hard)] == [7, 3]


def test_right_labels_of_other_rows_are_refused(root, models, processor):
    suite = load(root)
    hard = suite.shifts["hard"]
    part = hard.subset(np.array([5, 2]), "some")
    assert part.right.labels.tolist() == hard.right.labels[[5, 2]].tolist()
    part.right = hard.right
    with pytest.raises(ValueError, match="right labels of each of the 2 images of set 'some', got 24"):
        Evaluator(models[0], processor, suite).evaluate({"some": part})


@pytest.mark.parametrize("numbers", [[9] * 4, [1, 0, 0, 1]])
def test_right_labels_without_the_one_that_was_read_are_refused(models, processor, suite, numbers):
    """Such as those of a ClassLabel in another order than the suite's, which are matched by name."""
    rows = [{"image": suite.test[row]["image"], "label": row % 2} for row in range(4)]
    data = ShiftSet(rows, name="several", num_classes=4, labels=[0, 1, 0, 1])
    data.right = RightLabels([[number] for number in numbers], 10, "several")
    with pytest.raises(ValueError, match=r"label of each image of set 'several' among its right ones, got 0 in row 0"):
        Evaluator(models[0], processor, suite).evaluate({"several": data})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_trained_or_fitted_on_has_one_label_an_image(suite, split):
    data = getattr(suite, split)
    data.right = RightLabels(data.labels.tolist(), 4, split)
    with pytest.raises(ValueError, match=rf"one label an image in set '{split}', got several right ones"):
        dataclasses.replace(suite)


@pytest.mark.parametrize("streaming", [False, True])
def test_no_other_image_stands_in_for_a_broken_one(tmp_path, models, processor, streaming, monkeypatch):
    """Its labels would be held against answers to another image."""
    root = copies(tmp_path / "broken", [[row] for row in range(6)])
    suite = load(root, streaming=streaming)
    read = ShiftSet.decode

    def broken(self, item, where, **options):
        if self.name == "hard" and item["label"] == 2:
            raise BadImageError("Expected an image that can be decoded, got none.")
        return read(self, item, where, **options)

    monkeypatch.setattr(ShiftSet, "decode", broken)
    evaluator = Evaluator(models[0], processor, suite)
    evaluator.embedder.skip = True
    with pytest.raises(BadImageError, match="Expected an image that can be decoded"):
        evaluator.evaluate(["hard"], n_bootstrap=0)
    assert len(evaluator.evaluate(["imagenet"], n_bootstrap=0).per_image["imagenet"].hits) == 3


def test_what_is_said_of_the_set_is_said_of_all_its_labels(root, lists, caplog):
    suite = load(root)
    hard = suite.shifts["hard"]
    found = survey(suite)
    assert found.counts["hard"] is None
    assert not [warning for warning in found.warnings() if "hard" in warning]
    said = set()
    for data in (suite.test, hard):
        say_positions(data, suite.class_names, said)
    assert [record.getMessage().split("'")[1] for record in caplog.records] == ["imagenet"]
    assert matching(hard, suite.class_names) == "several right ones an image, by number"
    titles = {label_title(hard, item, suite.class_names)[0] for item in draw(hard, ROWS).items}
    assert titles == {" / ".join(f"name {label}" for label in sorted(labels)) for labels in lists}


def test_there_are_no_figures_by_class_where_a_class_is_the_models_choice(root, models, processor):
    suite = load(root)
    found = Evaluator(models[0], processor, suite).evaluate(n_bootstrap=0)
    assert set(figures_of(suite, found, "")) == {"validation", "imagenet"}


def test_a_stream_is_read_through_once_for_its_labels(root, monkeypatch):
    counted = []
    count = carot_hf.suites.splits.count_rows
    monkeypatch.setattr("carot_hf.suites.splits.count_rows", lambda rows: (counted.append(rows), count(rows))[1])
    suite = load(root, streaming=True)
    assert len(suite.shifts["hard"]) == ROWS
    assert len(counted) == 2  # training and test set of ImageNet: how many rows the shift has is known by then


def test_a_set_of_ones_own_with_two_splits_is_its_test_split(tmp_path, monkeypatch):
    monkeypatch.setitem(SETS, "mine", SetFacts("mine", "me/mine", "parquet", {"train": 5, "test": 3}))
    root = copies(tmp_path / "own", [[0]], files=1)
    parquet(root / "me/mine", "train", np.array([1, 1, 1, 1, 1]))
    parquet(root / "me/mine", "test", np.array([5, 6, 7]))
    own = {"class_names": [f"name {index}" for index in range(K)], "templates": ["a photo of a {}."]}
    suite = load_suite("imagenet", root=root, shifts=["mine"], check_counts=False, **own)
    assert suite.shifts["mine"].labels.tolist() == [5, 6, 7]


def test_the_word_alone_says_how_to_ask_for_it():
    with pytest.raises(ValueError, match=r"got 'imagenet-hard': it is a shifted set of ImageNet.*--shifts v2 .* hard"):
        load_suite("imagenet-hard")
