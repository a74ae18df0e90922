"""Every kind of table of images that people have: what is read, relative to what, and what is refused."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import yaml
from layouts import content, picture

from carot_hf import ShiftSet, load_suite
from carot_hf.suites.rows import open_source
from carot_hf.suites.splits import as_set
from carot_hf.suites.tables import read_text

NAMES = ["cat", "dog"]
LABELS = [0, 1, 1, 0, 1]


@pytest.fixture
def images(tmp_path):
    """Five images, red by class and green by row, beside which tables are put."""
    (tmp_path / "data/img").mkdir(parents=True)
    for row, label in enumerate(LABELS):
        (tmp_path / f"data/img/{row}.png").write_bytes(picture(label, row))
    return tmp_path / "data"


def opened(source, split="train", **options):
    found = open_source(source, split)
    return as_set(found.rows, name="mine", num_classes=2, label_names=NAMES, image_root=found.root, **options)


RIGHT = [(label, label, row) for row, label in enumerate(LABELS)]


def lines(separator=",", quote="", header=("file_name", "label")):
    rows = [header, *((f"img/{row}.png", NAMES[label]) for row, label in enumerate(LABELS))]
    return "\n".join(separator.join(f"{quote}{cell}{quote}" for cell in row) for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", lines()),
        ("a.csv", lines(";", '"')),
        ("a.csv", lines(", ")),
        ("a.tsv", lines("\t")),
        ("a.csv", lines(header=("path", "labels"))),
        ("a.csv", lines(header=("Image_Path", "label"))),
        ("a.jsonl", "\n".join(json.dumps({"image": f"img/{r}.png", "label": NAMES[x]}) for r, x in enumerate(LABELS))),
        ("a.json", json.dumps([{"image": f"img/{r}.png", "label": x} for r, x in enumerate(LABELS)])),
    ],
)
def test_tables_of_text(images, name, text):
    (images / name).write_text(text)
    assert content(opened(images / name)) == RIGHT


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(images, encoding):
    (images / "a.csv").write_bytes(lines().encode(encoding))
    assert content(opened(images / "a.csv")) == RIGHT
    (images / "b.csv").write_bytes("file_name,label\nimg/0.png,ca\xf1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"Expected a table in UTF-8, or with a byte-order mark, in .*b\.csv, got"):
        read_text(images / "b.csv", "a table")


def test_names_that_other_readers_take_for_nothing(images):
    """pandas reads NA, None and 01 as nothing and a number."""
    (images / "a.csv").write_text("file_name,label\nimg/0.png,NA\nimg/1.png,None\nimg/2.png,01\n")
    found = open_source(images / "a.csv", "train")
    data = as_set(found.rows, name="m", num_classes=3, label_names=["01", "NA", "None"], image_root=found.root)
    assert data.labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize("kind", ["path", "bytes", "dict", "image"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_of_columns(images, kind, suffix):
    values = {
        "path": [f"img/{row}.png" for row in range(5)],
        "bytes": [picture(label, row) for row, label in enumerate(LABELS)],
        "dict": [{"bytes": None, "path": f"img/{row}.png"} for row in range(5)],
        "image": [{"bytes": picture(label, row), "path": None} for row, label in enumerate(LABELS)],
    }[kind]
    feature = {
        "path": datasets.Value("large_string"),
        "bytes": datasets.Value("binary"),
        "dict": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "image": datasets.Image(),
    }[kind]
    features = datasets.Features({"image": feature, "label": datasets.Value("large_string")})
    rows = datasets.Dataset.from_dict({"image": values, "label": [NAMES[x] for x in LABELS]}, features=features)
    if suffix == "parquet":
        rows.to_parquet(images / "train.parquet")
        source = images / "train.parquet"
    else:
        rows.save_to_disk(images / "saved")
        source = next((images / "saved").glob("*.arrow"))
        source = source.rename(images / "train.arrow")
    assert content(opened(source)) == RIGHT


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("where", ["split", "root"])
def test_an_image_folder_with_metadata(images, name, where):
    """With the file beside the images of a split, or one for all."""
    splits = {"train": [0, 1, 2], "test": [3, 4]}
    written = {}
    for split, members in splits.items():
        (images / split).mkdir()
        for row in members:
            (images / f"img/{row}.png").rename(images / f"{split}/{row}.png")
        place = f"{split}/" if where == "root" else ""
        written[split] = [{"file_name": f"{place}{row}.png", "label": NAMES[LABELS[row]]} for row in members]
    (images / "img").rmdir()
    files = written if where == "split" else {"": [row for rows in written.values() for row in rows]}
    for split, rows in files.items():
        text = "\n".join(map(json.dumps, rows))
        if name.endswith("csv"):
            text = "file_name,label\n" + "\n".join(f"{row['file_name']},{row['label']}" for row in rows)
        (images / split / name).write_text(text)
    for split, members in splits.items():
        assert content(opened(images, split)) == [RIGHT[row] for row in members]
    assert not set(open_source(images, "train").files) & set(open_source(images, "test").files)


def test_metadata_with_captions_only_has_the_folders_as_labels(images):
    for row, label in enumerate(LABELS):
        (images / NAMES[label]).mkdir(exist_ok=True)
        (images / f"img/{row}.png").rename(images / f"{NAMES[label]}/{row}.png")
    (images / "img").rmdir()
    rows = [{"file_name": f"{NAMES[x]}/{r}.png", "text": [f"one {r}", f"two {r}"]} for r, x in enumerate(LABELS)]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = opened(images, caption_column="text")
    assert content(data) == RIGHT
    assert data[3]["caption"] == ["one 3", "two 3"]


def test_one_table_a_split_in_a_folder(images):
    text = lines().splitlines()
    (images / "train.csv").write_text("\n".join(text[:4]))
    (images / "val.csv").write_text("\n".join([text[0], *text[4:]]))
    assert content(opened(images, "train")) == RIGHT[:3]
    assert content(opened(images, "validation")) == RIGHT[3:]


def test_tables_beside_folders_of_splits_without_classes(images):
    for split, members in {"train": range(3), "test": range(3, 5)}.items():
        (images / f"{split}_images").mkdir()
        text = ["file_name,label"]
        for row in members:
            (images / f"img/{row}.png").rename(images / f"{split}_images/{row}.png")
            text.append(f"{split}_images/{row}.png,{NAMES[LABELS[row]]}")
        (images / f"{split}.csv").write_text("\n".join(text))
    assert content(opened(images, "train")) == RIGHT[:3]
    assert content(opened(images, "test")) == RIGHT[3:]


def test_a_table_beside_folders_of_classes_is_not_guessed(images):
    for name in NAMES:
        (images / name).mkdir()
        (images / name / "1.png").write_bytes(picture(0, 0))
    (images / "train.csv").write_text(lines())
    with pytest.raises(ValueError, match=r"got train\.csv beside folders such as 'cat'\. Name the table itself"):
        open_source(images, "train")
    assert len(open_source(images, "train", layout="folders").rows) == 7
    assert content(opened(images / "train.csv")) == RIGHT


def test_data_sets_that_were_saved_to_disk(images):
    feature = datasets.Features({"image": datasets.Image(), "labels": datasets.ClassLabel(names=["dog", "cat"])})
    parts = {}
    for split, members in {"training": [0, 1, 2], "test": [3, 4]}.items():
        values = [{"bytes": picture(LABELS[row], row), "path": None} for row in members]
        numbers = [1 - LABELS[row] for row in members]
        parts[split] = datasets.Dataset.from_dict({"image": values, "labels": numbers}, features=feature)
    datasets.DatasetDict(parts).save_to_disk(images / "saved")
    assert content(opened(images / "saved", "train")) == RIGHT[:3]
    assert content(opened(images / "saved", "test")) == RIGHT[3:]
    with pytest.raises(ValueError, match=r"Expected the split 'validation' in .*saved, got \['test', 'training'\]"):
        open_source(images / "saved", "validation")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\nimg/0.png,cat,x\n", r"Expected 2 cells in line 2 of .*a\.csv, as in its header, got 3"),
        ("file_name,label\n", "Expected a header and rows in .*a.csv, got 1 lines"),
        ("file_name,file_name\nx,y\n", r"distinct names of columns in .*got \['file_name', 'file_name'\]"),
        ("file_name,label\nimg/0.png,\n", r"to be numbers or names, got ''\. Fill it in\. \(row 0\)"),
        ("file_name,label\nimg/0.png,cow\n", r"one of 2 names \['cat', 'dog'\], got 'cow'.*\(row 0\)"),
        ("file_name,kind\nimg/0.png,cat\n", r"a label column called label.*\['file_name', 'kind'\]\. Name it with"),
        ("photo,label\nimg/0.png,cat\n", r"one column of images, got \[\] among \['label', 'photo'\]"),
        ("file_name,label\nimg/0.png,cat\nimg/9.png,dog\nimg/8.png,dog\n", r"2 of its 3 images.*row 1: .*img/9\.png"),
    ],
)
def test_tables_that_are_refused(images, text, message):
    (images / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        opened(images / "a.csv")


def test_json_lines_that_are_none(images):
    (images / "a.jsonl").write_text('{"image": "img/0.png", "label": "cat"}\n{"image": \n')
    with pytest.raises(ValueError, match=r"Expected a JSON object in line 2 of .*a\.jsonl"):
        open_source(images / "a.jsonl", "train")
    (images / "a.jsonl").write_text('["img/0.png", "cat"]\n')
    with pytest.raises(ValueError, match=r"Expected an object in row 1 of .*a\.jsonl, got 'img/0\.png'"):
        open_source(images / "a.jsonl", "train")


def test_a_table_in_yaml(images, tmp_path):
    (images / "all.csv").write_text(lines())
    (images / "test.jsonl").write_text(json.dumps({"image": "img/extra.png", "label": "dog"}))
    (images / "img/extra.png").write_bytes(picture(1, 7))
    description = {"train": {"path": "data/all.csv"}, "validation": 0.4, "test": {"path": "data/test.jsonl"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(description))
    suite = load_suite(tmp_path / "a.yaml")
    assert suite.class_names == NAMES
    assert sorted(content(suite.train) + content(suite.validation), key=lambda row: row[2]) == RIGHT
    assert content(suite.test) == [(1, 1, 7)]
    assert content(load_suite(tmp_path / "a.yaml", streaming=True).test) == [(1, 1, 7)]


# ---- captions ----


def captioned(captions):
    rows = {"image": [picture(0, row) for row in range(len(captions))], "text": captions}
    return datasets.Dataset.from_dict(rows)


@pytest.mark.parametrize("captions", [["a", None], ["a", "  "], ["a", ""], [["a"], []], [["a"], ["b", " "]]])
def test_missing_captions_are_refused_with_their_row(captions):
    with pytest.raises(ValueError, match=r"Expected a text in the column 'text' of set 's' at index 1, got"):
        ShiftSet(captioned(captions), name="s", num_classes=2, label_column=None, caption_column="text")


def test_of_several_captions_one_is_drawn_by_the_number_of_the_draw(processor):
    """The text of the list was trained on."""
    from carot_hf.data.batches import CaRotCollator, DrawnSet
    from carot_hf.data.captions import CaptionTable
    from carot_hf.data.transforms import image_transform

    given = [["zero", "one two three"], ["four five"], ["six", "seven", "eight"]]
    data = ShiftSet(captioned(given), name="s", num_classes=2, label_column=None, caption_column="text")
    table = CaptionTable(processor.tokenizer, ["x", "y"], ["a {}"], 32)
    calls = []
    tokenizer = processor.tokenizer.__class__.__call__

    def counted(self, *args, **kwargs):
        calls.append(args)
        return tokenizer(self, *args, **kwargs)

    assert table.remember([text for texts in given for text in texts]) == 0
    collator = CaRotCollator(image_transform(processor), table, 3)
    drawn = DrawnSet(data)
    seen = {0: set(), 1: set(), 2: set()}
    patched = pytest.MonkeyPatch()
    patched.setattr(processor.tokenizer.__class__, "__call__", counted)
    for draw in range(60):
        tokens = collator([drawn[draw]])["input_ids"][0].tolist()
        again = collator([drawn[draw], drawn[0]])["input_ids"][0].tolist()
        assert again[: len(tokens)] == tokens  # whatever else is in the batch
        seen[draw % 3].add(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    patched.undo()
    assert {row: sorted(texts) for row, texts in seen.items()} == {
        row: sorted(texts) for row, texts in enumerate(given)
    }
    assert not calls  # all of them were tokenised once


def test_captions_that_are_cut_are_said(processor):
    from carot_hf.data.captions import CaptionTable

    table = CaptionTable(processor.tokenizer, ["x", "y"], ["a {}"], 8)
    long = " ".join(["zero"] * 40)
    assert table.remember(["one", long, long, "two"]) == 1
    assert table.remember([]) == 0
    ids = table.tokenize([long, "one"])["input_ids"]
    assert ids.shape == (2, 8)
    assert ids[0, -1] == processor.tokenizer.eos_token_id


# ---- paths ----


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("data/trian", r"Did you mean data/train\?"),
        ("dtaa/train", r"Did you mean data/train\?"),
        ("./nothing", r"In .* there are \['a\.yaml', 'data'\]; correct the path"),
        ("data/train/deep/er", r"no such folder as .*data/train/deep"),
        ("labels.csv", r"no such folder as .*labels\.csv"),
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch, path, hint):
    (tmp_path / "data/train/cat").mkdir(parents=True)

    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("datasets.load_dataset", asked)
    description = {"train": {"path": path}, "validation": 0.5, "test": {"path": "x"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(ValueError, match=rf"a\.yaml: train\.path: expected data at .*{hint}"):
        load_suite(tmp_path / "a.yaml")


def test_ids_of_the_hub_are_asked_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    asked = []

    def fake(*args, **kwargs):
        asked.append(args[0])
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fake)
    for path in ("timm/mini-imagenet", "beans"):
        (tmp_path / "a.yaml").write_text(
            yaml.safe_dump({"train": {"path": path}, "validation": 0.5, "test": {"path": path}})
        )
        with pytest.raises(ValueError, match="from the Hub, got ConnectionError"):
            load_suite(tmp_path / "a.yaml")
    assert asked == ["timm/mini-imagenet", "beans"]


def test_paths_and_names_in_any_form_of_unicode(tmp_path):
    """A Mac writes file names decomposed, an editor composed."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for row, name in enumerate([decomposed, "th\u00e9", decomposed, "th\u00e9"]):
        place = tmp_path / decomposed / "train" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.png").write_bytes(picture(row % 2, row))
    (tmp_path / decomposed / "test" / "th\u00e9").mkdir(parents=True)
    (tmp_path / decomposed / "test" / "th\u00e9" / "9.png").write_bytes(picture(1, 9))
    description = {
        "class_names": [composed, "th\u00e9"],
        "train": {"path": composed},
        "validation": 0.5,
        "test": {"path": composed},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(description, allow_unicode=True), encoding="utf-8")
    suite = load_suite(tmp_path / "a.yaml")
    found = content(suite.train) + content(suite.validation)
    assert sorted(found, key=lambda row: row[2]) == [(0, 0, 0), (1, 1, 1), (0, 0, 2), (1, 1, 3)]
    assert np.all(suite.test.labels == 1)
