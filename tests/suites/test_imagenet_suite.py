"""The ImageNet suite from small local copies in the layouts of the Hub."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from dataset_hub import DatasetHub
from layouts import content, folders, parquet, picture, tars
from toys import ROOT, SUPPORT
from transformers import CLIPModel

import carot_hf.data.shift_set
import carot_hf.evaluation.evaluator
from carot_hf import load_suite
from carot_hf.calibration.metrics import METRICS
from carot_hf.cli import training
from carot_hf.suites.imagenet.sets import SETS, wnids

TRAIN = np.repeat([0, 1, 2, 134, 517, 999], 10)
NAMES = [f"name {index}" for index in range(1000)]
ROWS = {"v2": 14, "r": 15, "a": 16, "sketch": 17, "objectnet": 18}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Each set under the id, the last part of the id, or the name; ClassLabel, numbers, wnids."""
    folder = tmp_path_factory.mktemp("root")
    label = datasets.ClassLabel(names=[f"{name}, synonym {name}" for name in NAMES])
    parquet(folder / "ILSVRC/imagenet-1k", "train", TRAIN, files=3, feature=label)
    parquet(folder / "ILSVRC/imagenet-1k", "validation", np.array([0, 134, 999, 7, 8]), feature=label)
    tars(folder / "clip-benchmark/wds_imagenetv2" / "test", np.arange(ROWS["v2"]) * 70, files=2, image="webp")
    tars(folder / "wds_imagenet-r" / "test", np.arange(ROWS["r"]) * 13)
    tars(folder / "a" / "test", np.arange(ROWS["a"]) * 12, column="wnid", names=SETS["a"].label_names())
    folders(folder / "sketch", np.arange(ROWS["sketch"]) * 58, wnids())
    tars(folder / "wds_objectnet" / "test", np.arange(ROWS["objectnet"]) * 6, image="png")
    (folder / "clip-benchmark/wds_imagenetv2/classnames.txt").write_text("\n".join(f"open {name}" for name in NAMES))
    (folder / "clip-benchmark/wds_imagenetv2/zeroshot_classification_templates.txt").write_text(
        "a photo of a {c}.\na sketch of a {c}."
    )
    return folder


def load(root, **options):
    return load_suite("imagenet", root=root, check_counts=False, **options)


def rows_of(data):
    return {row for _, _, row in content(data)}


def test_every_set_has_its_rows_labels_and_columns(root):
    suite = load(root)
    assert {name: len(data) for name, data in suite.shifts.items()} == ROWS
    assert suite.test.name == "imagenet"
    assert content(suite.test) == [(0, 0, 0), (134, 134, 1), (999, 999, 2), (7, 7, 3), (8, 8, 4)]
    for name, step in (("v2", 70), ("r", 13), ("a", 12), ("sketch", 58), ("objectnet", 6)):
        data = suite.shifts[name]
        found = sorted(content(data))
        assert [row[:1] for row in found] == [(step * index,) for index in range(ROWS[name])]
        assert all(label == painted for label, painted, _ in found)
        assert data.columns == SETS[name].columns()
        assert (data.exif, data.crop_border) == (False, 2 if name == "objectnet" else 0)
    assert suite.shifts["objectnet"][0]["image"].size == (8, 6)  # 12 x 10 without 2 at each side


def test_two_percent_are_held_out_the_same_of_every_class(root):
    suite, again, other = load(root), load(root), load(root, seed=1)
    assert Counter(suite.validation.labels.tolist()) == dict.fromkeys([0, 1, 2, 134, 517, 999], 1)
    assert len(suite.train) == 54
    rows = sorted(content(suite.train) + content(suite.validation))
    assert rows == sorted((label, label, row) for row, label in enumerate(TRAIN))
    assert content(again.validation) == content(suite.validation) != content(other.validation)


@pytest.mark.parametrize(
    ("cores", "usable", "processes", "workers"),
    [(64, 64, 8, 8), (8, 8, 1, 8), (64, 64, 1, 16), (2, 2, 8, 1), (None, None, 1, 1), (64, 8, 8, 8), (64, 3, 1, 3)],
)
def test_workers_share_the_cores(root, monkeypatch, cores, usable, processes, workers):
    """Of 64 cores 8 processes have 8 each, whether or not each may use its own alone."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    if usable is None:  # not on Linux
        monkeypatch.delattr("os.sched_getaffinity")
    else:
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(usable)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert load(root, shifts=["r"]).recommended == {"dataloader_num_workers": workers}


def test_names_come_from_the_papers_protocol_first_then_from_the_class_label(root, caplog):
    suite = load(root)
    assert suite.class_names[3] == "open name 3"
    assert suite.templates == ["a photo of a {}.", "a sketch of a {}."]
    assert not caplog.records
    label = load(root, name_sources=["ClassLabel", "files"])
    assert label.class_names == NAMES  # the first synonym
    assert label.sources["class_names"] == "ClassLabel of ILSVRC/imagenet-1k"
    assert "WordNet's synonyms: figures do not compare with published ones" in caplog.text
    own = load(root, class_names=[f"my {name}" for name in NAMES], templates=["{}!"])
    assert (own.class_names[3], own.templates, own.sources["templates"]) == ("my name 3", ["{}!"], "user")


def test_incomplete_copies_are_refused_with_the_three_numbers(root):
    with pytest.raises(
        ValueError,
        match=r"Expected 1,281,167 rows, largest label 999 and 1000 distinct labels in 'train', got 60 rows, largest "
        r"label 999 and 6 distinct labels\..*`check_counts=False`",
    ):
        load_suite("imagenet", root=root)


def test_a_missing_copy_says_where_it_was_looked_for(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a local copy of 'imagenet' in one of \['.*imagenet-1k.*hf download ILSVRC"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="Expected a folder of local copies as `root`"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"Expected `shifts` as a list of distinct names out of \['v2', .*got \['x'\]"):
        load(root, shifts=["x"])


def test_objectnet_is_for_testing_only(root, make_trainer):
    suite = load(root)
    objectnet = suite.shifts["objectnet"]
    assert objectnet.test_only
    with pytest.raises(ValueError, match="whose terms forbid it"):
        make_trainer(suite=suite, trainer={"train_dataset": objectnet})
    with pytest.raises(ValueError, match=r"'eval_objectnet_accuracy'|shifted"):
        make_trainer(suite=suite, metric_for_best_model="eval_objectnet_accuracy")
    objectnet.columns = None
    with pytest.raises(ValueError, match=r"terms forbid it \(ObjectNet\)"):
        type(suite)(suite.name, suite.class_names, suite.templates, suite.train, objectnet, suite.test, {})


# ---- held out of a stream of the Hub ----


class ReuploadedHub:
    """Sixty images at a commit; each commit has them in another order. It may keep the commit to itself."""

    def __init__(self, monkeypatch):
        self.commit, self.silent, self.asked = "a" * 40, False, []
        monkeypatch.setattr("datasets.load_dataset", self.load)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda api, name: self.info())

    def info(self):
        if self.silent:
            raise ConnectionError("out of reach")
        return SimpleNamespace(sha=self.commit)

    def load(self, name, *, split, streaming, revision):
        self.asked.append((split, revision))
        order = np.random.default_rng(ord(self.commit[0])).permutation(60)
        images = [{"bytes": picture(int(TRAIN[row]), int(row)), "path": None} for row in order]
        rows = datasets.Dataset.from_dict({"image": images, "label": TRAIN[order]})
        return rows.cast_column("image", datasets.Image()).to_iterable_dataset(num_shards=4)

    def suite(self):
        """The rows that are held out, and those that are trained on."""
        suite = load_suite(
            "imagenet", streaming=True, shifts=[], check_counts=False, class_names=NAMES, templates=["a {}"]
        )
        return rows_of(suite.validation), rows_of(suite.train)


@pytest.fixture
def hub(monkeypatch):
    return ReuploadedHub(monkeypatch)


def test_what_is_held_out_of_a_stream_is_that_of_its_commit(hub, caplog):
    """After a re-upload the rows of the old commit were the validation set, and trained on under their new numbers."""
    whole = set(range(60))
    found = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        hub.commit = commit
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="carot_hf.suites.splits"):
            held, trained = hub.suite()
        assert (held | trained, held & trained, len(held)) == (whole, set(), 6)
        found.append((held, "Reading the stream" in caplog.text))
    assert hub.asked == [(split, letter * 40) for letter in "aba" for split in ("train", "validation")]
    assert found[0][0] == found[2][0] != found[1][0]
    assert [read for _, read in found] == [True, True, False]  # kept for the commit


READER = """
from carot_hf import load_suite
from layouts import content
names = [f"name {index}" for index in range(1000)]
suite = load_suite("imagenet", streaming=True, shifts=[], check_counts=False, class_names=names, templates=["a {}"])
held, trained = ({row for _, _, row in content(data)} for data in (suite.validation, suite.train))
print(len(held), len(held | trained), len(held & trained))
"""


@pytest.mark.slow
def test_so_it_is_over_http(tmp_path):
    """The clients of `datasets` and huggingface_hub themselves; the second commit has the files in another order."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    parquet(tmp_path / "copy", "train", np.random.default_rng(1).permutation(TRAIN), files=3)
    parquet(tmp_path / "copy", "validation", TRAIN[:1])
    paths = sorted((tmp_path / "copy").rglob("*.parquet"))
    names, data = [str(path.relative_to(tmp_path / "copy")) for path in paths], [path.read_bytes() for path in paths]
    with DatasetHub() as server:
        for commit, turned in (("a" * 40, data), ("b" * 40, [*data[1:3], data[0], data[3]])):
            server.commits[commit], server.newest = dict(zip(names, turned, strict=True)), commit
            result = subprocess.run(
                [sys.executable, "-c", READER], env={**environment, "HF_ENDPOINT": server.endpoint},
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr[-3000:]
            assert result.stdout.split() == ["6", "60", "0"]


def test_without_a_commit_nothing_is_reused(hub, caplog):
    hub.silent = True
    for commit in ("a", "b", "b"):
        hub.commit = commit
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="carot_hf.suites.splits"):
            held, trained = hub.suite()
        assert (held | trained, held & trained) == (set(range(60)), set())
        assert "revision of 'train' could not be learned: its validation set is read anew" in caplog.text
        assert "Reading the stream" in caplog.text
    assert {revision for _, revision in hub.asked} == {None}


def test_what_is_held_out_of_a_local_copy_is_that_of_its_files(tmp_path):
    """Files that got each other's content, written in place with the times of before: only their sizes tell."""
    folder = tmp_path / "imagenet"
    parquet(folder, "train", np.random.default_rng(1).permutation(TRAIN), files=2)
    parquet(folder, "validation", TRAIN[:1])
    files = sorted((folder / "data").glob("train*"))
    contents = [file.read_bytes() for file in files]
    assert len(contents[0]) != len(contents[1])
    for given in (contents, contents[::-1]):
        for file, data in zip(files, given, strict=True):
            file.write_bytes(data)
            os.utime(file, ns=(10**18, 10**18))
        suite = load(tmp_path, streaming=True, shifts=[], class_names=NAMES, templates=["a {}"])
        held, trained = rows_of(suite.validation), rows_of(suite.train)
        assert (held | trained, held & trained) == (set(range(60)), set())


class Corrupter:
    """Stands in for the package: inverts, and takes a seed as the real one does."""

    corruption_dict = {"glass_blur": lambda image, severity, seed=None: image}  # noqa: RUF012

    @staticmethod
    def corrupt(image, severity, corruption_name, seed=None):
        return 255 - image


def test_corruptions_of_the_test_set(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", Corrupter)
    suite = load(root, shifts=["r", "c-fog-3"])
    assert list(suite.shifts) == ["r", "c-fog-3"]
    data = suite.shifts["c-fog-3"]
    assert data.labels.tolist() == suite.test.labels.tolist()
    item = data[1]
    assert (item["label"], item["image"].size) == (134, (224, 224))
    assert item["image"].getpixel((3, 3)) == (255 - 134, 255 - 1, 255)
    with pytest.raises(ValueError, match="not streamed with 'c-fog-3'"):
        load(root, shifts=["c-fog-3"], streaming=True)


# ---- evaluated ----


@pytest.fixture
def reads(monkeypatch):
    """How often an image was decoded, and the class head made."""
    count = Counter()
    decode, embeddings = carot_hf.data.shift_set.ShiftSet.decode, carot_hf.evaluation.evaluator.class_embeddings

    def counted_decode(self, *args, **kwargs):
        count[self.name] += 1
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(carot_hf.data.shift_set.ShiftSet, "decode", counted_decode)

    def counted_head(*args, **kwargs):
        count["head"] += 1
        return embeddings(*args, **kwargs)

    monkeypatch.setattr(carot_hf.evaluation.evaluator, "class_embeddings", counted_head)
    return count


def test_one_pass_a_set_and_one_head_and_streams_give_the_same_metrics(root, make_trainer, reads):
    suite = load(root)
    metrics = make_trainer(suite=suite).evaluate()
    expected = {"validation": len(suite.validation), "imagenet": 5, **ROWS, "head": 1}
    assert reads == expected
    streamed = load(root, streaming=True)
    assert not hasattr(streamed.train.rows, "__len__")
    trainer = make_trainer(suite=streamed)
    reads.clear()
    again = trainer.evaluate()
    assert {name: reads[name] for name in ROWS} == ROWS
    assert reads["head"] == 1
    sets = tuple(f"eval_{name}_" for name in (*ROWS, "imagenet"))
    keys = [key for key in metrics if key.startswith(sets) and not key.endswith("_ts")]
    assert len(keys) == 6 * len(METRICS)  # the temperature is another: other rows are held out
    assert [repr(again[key]) for key in keys] == [repr(metrics[key]) for key in keys]  # also of nan


def test_a_streamed_suite_trains_and_holds_rows_out(root, make_trainer):
    suite = load(root, streaming=True, shifts=["r"])
    assert (len(suite.train), len(suite.validation)) == (54, 6)
    assert rows_of(suite.train) == set(range(60)) - rows_of(suite.validation)
    trainer = make_trainer(suite=suite, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.save_model()
    saved = CLIPModel.from_pretrained(trainer.args.output_dir).config.prompt_sources
    assert saved == {"class_names": "files in wds_imagenetv2", "templates": "files in wds_imagenetv2"}
    assert torch.isfinite(trainer.model.logit_scale)


@pytest.mark.parametrize("flags", [[], ["--streaming", "--dataloader_num_workers", "2"]])
def test_the_main_job_on_local_copies(root, model, processor, tmp_path, flags):
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    command = ["--data_root", str(root), "--partial", "--shifts", "r", "objectnet", "--use_cpu", "--max_steps", "2"]
    command += ["--model_name_or_path", str(tmp_path / "start"), "--per_device_train_batch_size", "4", *flags]
    command += ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--reliability_diagrams", "False"]
    report = training.main(command)
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved["suite_version"] == "1.0"
    assert len(saved["suite_sha256"]) == 64
    assert saved["suite"] == "imagenet"
    assert saved["names"]["templates"] == "files in wds_imagenetv2"
    assert {"eval_r_ece", "eval_objectnet_ece_ts", "eval_imagenet_accuracy", "eval_ood_nll"} < set(report["metrics"])
    assert CLIPModel.from_pretrained(tmp_path / "out").config.calibration["n"] == 6
