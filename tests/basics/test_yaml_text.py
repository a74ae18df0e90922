"""YAML as people write it: what is coerced, what is refused, and that each message names file, key and an example."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
import yaml
from layouts import folders, parquet

from carot_hf import CaRotTrainingArguments, load_suite
from carot_hf.basics.yaml_text import load_yaml
from carot_hf.suites.recommended import checked_arguments


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    """Write a suite of two classes, with lines of one's own, in an encoding."""
    folders(tmp_path / "home/train", [0, 1] * 5, ["good", "bad"])
    folders(tmp_path / "home/test", [0, 1] * 2, ["good", "bad"])
    parquet(tmp_path / "far", "test", np.array([0, 1, 1]))

    def write(text="", *, validation="validation: 0.2", encoding="utf-8", newline="\n"):
        whole = f"train: {{path: home}}\n{validation}\ntest: {{path: home, name: home}}\n{textwrap.dedent(text)}"
        path = tmp_path / "mine.yaml"
        path.write_bytes(whole.replace("\n", newline).encode(encoding))
        return path

    return write


# ---- numbers and words ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E+3", 1e3), ("3e5", 3e5), ("1.5", 1.5), (".5", 0.5), ("-2.5e-3", -2.5e-3), ("7", 7),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("2019-01-02", "2019-01-02"),
        ("1e", "1e"), ("e5", "e5"), ("1-2", "1-2"), ("'1e-5'", "1e-5"), ("~", None), ("[1, a]", [1, "a"]),
    ],
)  # fmt: skip
def test_scalars(text, value):
    found = load_yaml(f"a: {text}")["a"]
    assert found == value
    assert isinstance(found, type(value))


def test_numbers_know_how_they_were_written():
    found = load_yaml("a: 1.10\nb: 007\n2019: x")
    assert (found["a"].text, found["b"].text, next(reversed(found)).text) == ("1.10", "007", "2019")


def test_a_key_given_twice_is_refused(write):
    with pytest.raises(ValueError, match=r"(?s)mine\.yaml, got 'far' is given.*line 5.*expected each key once.*line 6"):
        load_suite(write("shifts:\n  far: {path: far}\n  far: {path: home}\n"))
    with pytest.raises(yaml.YAMLError, match="expected a word or a number as a key"):
        load_yaml("? [1]\n: 2")
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        load_yaml("a: !!python/object/apply:os.getcwd []")


def test_texts_may_look_like_numbers(write):
    suite = load_suite(write("version: 1.10\nname: 2024\nshifts: {2019: {path: far, label_names: [good, bad]}}\n"))
    assert (suite.version, suite.name, list(suite.shifts)) == ("1.10", "2024", ["2019"])


@pytest.mark.parametrize("validation", ["validation: 0.2", 'validation: "0.2"', "validation: 2e-1", "validation: .2"])
def test_a_share_in_any_spelling(write, validation):
    assert len(load_suite(write(validation=validation)).validation) == 2


@pytest.mark.parametrize("validation", ["validation: 20%", "validation: 1", "validation: 0", "validation: -0.1"])
def test_shares_that_are_none(write, validation):
    with pytest.raises(ValueError, match=r"mine\.yaml: validation: expected .*Example: validation: 0\.1"):
        load_suite(write(validation=validation))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_any_encoding_with_a_mark(write, encoding, newline):
    text = "name: s\u00fc\u00df\n"
    if encoding == "utf-16-le":
        with pytest.raises(ValueError, match="Expected"):  # without a mark it is no UTF-8
            load_suite(write(text, encoding=encoding))
        return
    assert load_suite(write(text, encoding=encoding, newline=newline)).name == "s\u00fc\u00df"


# ---- label names ----


@pytest.mark.parametrize(
    "text",
    [
        "label_names: {good: fine fabric, bad: torn fabric}\n",
        "label_names: {bad: torn fabric, good: fine fabric}\nclass_names: [fine fabric, torn fabric]\n",
        "label_names: [good, bad]\nclass_names: [fine fabric, torn fabric]\n",
        "label_names: {Good: Fine_Fabric, BAD: torn fabric}\nclass_names: [fine fabric, torn fabric]\n",
    ],
)
def test_label_names_once_serve_all_sets(write, text):
    suite = load_suite(write(f"{text}shifts: {{near: {{path: home, split: test}}}}\n"))
    assert suite.class_names == ["fine fabric", "torn fabric"]
    for data in (suite.train, suite.validation, suite.test, suite.shifts["near"]):
        assert sorted(set(data.labels.tolist())) == [0, 1]
    painted = [suite.train[row]["image"].getpixel((5, 5))[0] for row in range(len(suite.train))]
    assert painted == suite.train.labels.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label_names: {good: fine}\nclass_names: [a, b]\n", r"label_names: Expected `label_names` to say for 'good'"),
        ("label_names: [good]\nclass_names: [a, b]\n", r"label_names: Expected 2 `label_names`.*Example: label_names:"),
        ("class_names: [a, b]\n", r"called as the 2 classes|one of 2 names \['a', 'b'\], got 'bad'"),
        ("class_names: [good, good]\n", r"a name of its own for each class, got 'good' for the classes 0 and 1"),
        ("layout: folders\n", r"mine\.yaml: layout: expected one of the keys"),
    ],
)
def test_label_names_that_are_refused(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_suite(write(text))


def test_a_layout_that_there_is_not(write, tmp_path):
    path = tmp_path / "b.yaml"
    path.write_text("train: {path: home, layout: zip}\nvalidation: 0.2\ntest: {path: home}\n")
    with pytest.raises(
        ValueError, match=r"train\.layout: expected one of parquet, .*, got 'zip'\. Example: layout: web"
    ):
        load_suite(path)


# ---- recommended ----


def test_recommended_arguments_become_what_they_are(write, tmp_path):
    """``learning_rate: 1e-5`` was text, and broke ``from_preset(**suite.recommended)``."""
    suite = load_suite(
        write("recommended: {learning_rate: 1e-5, per_device_train_batch_size: '8', bf16: no, num_train_epochs: 2,\n"
              "  lr_scheduler_type: linear, warmup_steps: 0.1, teacher_update_every: 50}\n")
    )  # fmt: skip
    assert suite.recommended == {
        "learning_rate": 1e-5, "per_device_train_batch_size": 8, "bf16": False, "num_train_epochs": 2.0,
        "lr_scheduler_type": "linear", "warmup_steps": 0.1, "teacher_update_every": 50,
    }  # fmt: skip
    args = CaRotTrainingArguments.from_preset("carot", output_dir=str(tmp_path), use_cpu=True, **suite.recommended)
    assert (args.learning_rate, args.per_device_train_batch_size, args.bf16) == (1e-5, 8, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rte": 1}, r"f\.yaml: recommended\.learning_rte: expected a training argument.*'learning_rate'"),
        ({"learning_rate": "fast"}, r"recommended\.learning_rate: expected a number, got 'fast'\. Example: learning_r"),
        ({"learning_rate": True}, r"expected a number, got True"),
        ({"per_device_train_batch_size": 8.5}, r"expected a whole number, got 8\.5\. Example: per_dev"),
        ({"bf16": "maybe"}, r"expected .*true or false.*, got 'maybe'"),
        ({"output_dir": "x"}, r"expected an option of the method, .*, got 'output_dir'"),
    ],
)
def test_recommended_arguments_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        checked_arguments(given, "f.yaml: recommended")
