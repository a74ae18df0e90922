"""Every layout of the ImageNet family in small: what is opened, which labels come out, what is refused."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError
from layouts import content, folders, parquet, tars

from carot_hf.data.columns import image_column, label_column
from carot_hf.data.labels import LabelTable
from carot_hf.data.stream import shard_rows
from carot_hf.suites.imagenet.sets import SETS, wnids
from carot_hf.suites.rows import check_labels, hold_out, local_files, open_source
from carot_hf.suites.splits import as_set

LABELS = np.array([0, 3, 1, 2, 2, 1, 3, 0, 1])


def opened(folder, split, *, names=(), classes=4, **options):
    return as_set(open_source(folder, split).rows, name="far", num_classes=classes, label_names=names, **options)


# ---- layouts ----


@pytest.mark.parametrize(("image", "files"), [("jpg", 1), ("webp", 3), ("png", 2)])
def test_tars_beside_a_text_file(tmp_path, image, files):
    """One tar plus nshards.txt: left to itself, `datasets` loads the one line of the text file."""
    tars(tmp_path / "wds" / "test", LABELS, files=files, image=image)
    data = opened(tmp_path / "wds", "test")
    assert content(data) == [(label, label, row) for row, label in enumerate(LABELS)]
    assert data.labels.tolist() == LABELS.tolist()


def test_the_trap_that_tars_beside_a_text_file_are(tmp_path):
    tars(tmp_path / "wds" / "test", LABELS)
    trapped = datasets.load_dataset(str(tmp_path / "wds"), split="test")
    assert trapped.column_names == ["text"]


def test_parquet_files_of_a_split(tmp_path):
    parquet(tmp_path / "plain", "train", LABELS, files=2)
    parquet(tmp_path / "plain", "validation", LABELS[::-1])
    feature = datasets.ClassLabel(names=["tench, Tinca tinca", "goldfish", "shark", "ray"])
    parquet(tmp_path / "named", "train", LABELS, feature=feature)
    assert content(opened(tmp_path / "plain", "train")) == [(label, label, row) for row, label in enumerate(LABELS)]
    assert opened(tmp_path / "plain", "validation").labels.tolist() == LABELS[::-1].tolist()
    assert opened(tmp_path / "named", "train").labels.tolist() == LABELS.tolist()


def test_a_class_label_of_unpadded_numbers_gives_the_numbers(tmp_path):
    """Names in the order of a sorted listing: "10" stands at place 2 and means 10."""
    names = sorted(str(number) for number in range(12))
    assert names[2] == "10"
    parquet(tmp_path, "test", np.arange(12), feature=datasets.ClassLabel(names=names))
    data = opened(tmp_path, "test", classes=12)
    assert data.labels.tolist() == [int(name) for name in names]


def test_a_class_label_of_wnids_is_looked_up(tmp_path):
    chosen = [wnids()[index] for index in (7, 2, 5)]
    parquet(tmp_path, "test", np.array([0, 1, 2, 0]), feature=datasets.ClassLabel(names=chosen))
    assert opened(tmp_path, "test", names=wnids(), classes=1000).labels.tolist() == [7, 2, 5, 7]


def test_a_class_label_of_other_names_has_as_many(tmp_path):
    """Three of five names are in use: their numbers were taken for the first three classes."""
    parquet(
        tmp_path, "test", np.array([0, 1, 2]), feature=datasets.ClassLabel(names=["ant", "bee", "cat", "dog", "eel"])
    )
    message = r"'far', .* to be called as the 3 classes \['cat', 'dog', 'eel'\], in any order, got \['ant', .*'eel'\]"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, "test", names=["cat", "dog", "eel"], classes=3)
    assert opened(tmp_path, "test", columns=[[0], [1], [2], [0], [1]], classes=3).labels.tolist() == [0, 1, 2]


def test_folders_with_unpadded_numbers(tmp_path):
    """ImageNet-V2's folders 0 ... 999: a sorted listing has 0, 1, 10, 11, 2, ..."""
    labels = np.arange(12)
    folders(tmp_path / "v2", labels, [str(label) for label in labels])
    data = opened(tmp_path / "v2", "test", classes=12)
    assert sorted(content(data)) == [(label, label, row) for row, label in enumerate(labels)]
    assert [path.parent.name for path in local_files(tmp_path / "v2", "test")[1]][:3] == ["0", "1", "10"]


def test_folders_of_wnids_of_200_classes(tmp_path):
    names = SETS["a"].label_names()
    folders(tmp_path / "a", [0, 199, 57], names)
    data = opened(tmp_path / "a", "test", names=names, classes=1000, columns=SETS["a"].columns())
    assert sorted(content(data)) == [(0, 0, 0), (57, 57, 2), (199, 199, 1)]


def test_a_wnid_column_in_tars(tmp_path):
    tars(tmp_path / "test", [3, 0, 999], column="wnid", names=wnids())
    data = opened(tmp_path, "test", names=wnids(), classes=1000)
    assert content(data) == [(3, 3, 0), (0, 0, 1), (999, 999, 2)]


def test_folders_of_splits(tmp_path):
    folders(tmp_path / "train", [0, 1], ["cat", "dog"])
    folders(tmp_path / "val", [1], ["cat", "dog"])
    assert opened(tmp_path, "train", names=["cat", "dog"], classes=2).labels.tolist() == [0, 1]
    assert opened(tmp_path, "validation", names=["cat", "dog"], classes=2).labels.tolist() == [1]


def test_a_path_names_one_split(tmp_path):
    """The last word counts: a folder that names both says nothing, and one that names another is overruled."""
    names = ["train_test_split/train-0.tar", "train_test_split/test-0.tar", "test_images/train-1.tar", "val/0.tar",
             "train/x/valid_1.tar"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = {split: {str(path.relative_to(tmp_path)) for path in local_files(tmp_path, split)[1]}
             for split in ("train", "validation", "test", "val")}  # fmt: skip
    assert found["train"] == {names[0], names[2]}
    assert found["validation"] == found["val"] == {names[3], names[4]}
    assert found["test"] == {names[1]}


def test_what_was_saved_to_disk(tmp_path):
    parquet(tmp_path / "a", "test", LABELS)
    datasets.load_dataset("parquet", data_files=str(tmp_path / "a/data/*.parquet"), split="train").save_to_disk(
        tmp_path / "saved"
    )
    assert opened(tmp_path / "saved", "test").labels.tolist() == LABELS.tolist()


def test_a_stream_has_the_rows_of_the_table(tmp_path):
    tars(tmp_path / "wds" / "test", LABELS, files=3)
    parquet(tmp_path / "parquet", "test", LABELS, files=2)
    folders(tmp_path / "folders", LABELS, [str(label) for label in range(4)])
    for name in ("wds", "parquet", "folders"):
        rows = open_source(tmp_path / name, "test", streaming=True).rows
        data = as_set(rows, name="far", num_classes=4)
        assert len(data) == len(LABELS)
        assert sorted(content(data)) == sorted((label, label, row) for row, label in enumerate(LABELS))
        assert len({number for number, _ in data.share(0, 1)}) == len(LABELS)
        assert sum(1 for file in range(rows.num_shards) for _ in shard_rows(data.rows, file)) == len(LABELS)


# ---- columns and labels ----


def test_columns_are_found_by_kind_and_name(tmp_path):
    tars(tmp_path / "test", LABELS)
    rows = open_source(tmp_path, "test").rows
    assert (image_column(rows), label_column(rows)) == ("jpg", "cls")
    with pytest.raises(ValueError, match=r"Expected one column of images, got \[\] among \['__key__', .*image_column"):
        image_column(rows.remove_columns("jpg"))
    with pytest.raises(ValueError, match=r"Expected a label column called label, labels, cls, wnid, got .*jpg"):
        label_column(rows.remove_columns("cls"))
    two = rows.add_column("labels", np.zeros(len(rows), int))
    assert label_column(two) == "labels"
    with pytest.raises(ValueError, match=r"Expected a column 'kind' in 'far', got \["):
        as_set(rows, name="far", num_classes=4, label="kind")


def test_unknown_names_are_refused():
    table = LabelTable(None, ["cat", "dog"], "'far'")
    assert (table("dog"), table("7"), table(b"cat\n"), table(5)) == (1, 7, 0, 5)
    with pytest.raises(
        ValueError, match=r"labels of 'far' to be numbers or one of 2 names \['cat', 'dog'\], got 'cow'"
    ):
        table("cow")


def test_labels_that_are_no_whole_numbers_are_refused():
    table = LabelTable(None, ["cat", "dog"], "'far'")
    assert table.all(["dog", "cat", "dog"]).tolist() == [1, 0, 1]
    assert table.all([1.0, 0.0]).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"labels of 'far' to be whole numbers, got 1\.5"):
        table.all([0.0, 1.5])
    with pytest.raises(ValueError, match="labels of 'far' to be numbers or names, got"):
        table.all([0, None, 1])


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (np.arange(3).repeat(2), "6 rows, largest label 2 and 3 distinct labels"),
        (np.array([0, 1, 2, 2]), "4 rows, largest label 2 and 3 distinct labels"),
        (np.array([0, 1, 2, 4]), "4 rows, largest label 4 and 4 distinct labels"),
        (np.array([0, 1, 1, 3]), "4 rows, largest label 3 and 3 distinct labels"),
    ],
)
def test_counts_that_are_not_the_published_ones(labels, got):
    check_labels("far", np.array([3, 1, 0, 2]), 4, 4)
    with pytest.raises(ValueError, match=f"Expected 4 rows, largest label 3 and 4 distinct labels in 'far', got {got}"):
        check_labels("far", labels, 4, 4)


def test_the_held_out_share_is_balanced_and_disjoint():
    labels = np.random.default_rng(0).integers(0, 10, 2000)
    kept, held = hold_out(labels, 0.02, seed=0)
    assert np.bincount(labels[held]).tolist() == [4] * 10  # 2 % of 2000 over ten classes
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(2000))
    assert np.array_equal(hold_out(labels, 0.02, seed=0)[1], held)
    assert not np.array_equal(hold_out(labels, 0.02, seed=1)[1], held)
    few = np.array([0] * 50 + [1])  # a class of one row keeps it
    assert set(few[hold_out(few, 0.2, seed=0)[1]]) == {0}


def test_holding_out_needs_a_class_with_two_images():
    with pytest.raises(
        ValueError, match=r"at least two images to hold .* got 5 images of 5 classes, one each\. Pass a"
    ):
        hold_out(np.arange(5), 0.2, seed=0)


# ---- what cannot be opened ----


def test_the_hub_is_asked_in_the_layout_of_the_set(monkeypatch):
    calls = []

    def fake(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"cls": [0]})

    monkeypatch.setattr("datasets.load_dataset", fake)
    open_source("clip-benchmark/wds_imagenet-r", "test", layout="webdataset")
    open_source("ILSVRC/imagenet-1k", "train", layout="parquet", streaming=True)
    open_source("clip-benchmark/wds_imagenet-r", "test", layout="webdataset", revision="abc")
    open_source("ILSVRC/imagenet-1k", "train", layout="parquet", revision="abc")
    files = {"test": "hf://datasets/clip-benchmark/wds_imagenet-r/test/*.tar"}
    pinned = {"test": "hf://datasets/clip-benchmark/wds_imagenet-r@abc/test/*.tar"}
    assert calls[0] == (("webdataset",), {"data_files": files, "split": "test", "streaming": False})
    assert calls[1] == (("ILSVRC/imagenet-1k",), {"split": "train", "streaming": True, "revision": None})
    assert calls[2] == (("webdataset",), {"data_files": pinned, "split": "test", "streaming": False})
    assert calls[3] == (("ILSVRC/imagenet-1k",), {"split": "train", "streaming": False, "revision": "abc"})


def test_a_gated_set_names_its_page_and_the_login(monkeypatch):
    def refused(*args, **kwargs):
        raise DatasetNotFoundError("Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset", refused)
    with pytest.raises(
        ValueError, match=r"gated dataset.*https://huggingface.co/datasets/ILSVRC/imagenet-1k and run `hf auth login`"
    ):
        open_source("ILSVRC/imagenet-1k", "train", layout="parquet")


def test_without_network_the_message_says_what_to_do():
    with pytest.raises(ValueError, match=r"split 'test' of 'clip-benchmark/wds_imagenet-r' from the Hub.*as `root`"):
        open_source("clip-benchmark/wds_imagenet-r", "test", layout="webdataset")


def test_folders_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="Expected no `revision` of a local copy, got 'abc'"):
        open_source(tmp_path, "test", revision="abc")
    with pytest.raises(ValueError, match=r"Expected parquet, arrow, CSV.*got \['notes\.txt'\] \.\.\. \(1 files\)"):
        open_source(tmp_path, "test")
    with pytest.raises(ValueError, match=r"Expected a \.parquet, .* or \.tar file or a folder, got .*notes\.txt"):
        open_source(tmp_path / "notes.txt", "test")
    parquet(tmp_path, "train", LABELS)
    with pytest.raises(ValueError, match="of split 'test' in"):
        open_source(tmp_path, "test")
