"""Class embeddings on the disk: what is read is what would be made, and anything else is made anew."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TEMPLATES, tiny_clip

from carot_hf.data.captions import CaptionTable, class_embeddings
from carot_hf.evaluation import kept_heads
from carot_hf.evaluation.evaluator import Evaluator
from carot_hf.evaluation.kept_heads import kept_class_embeddings

WORDS = ("a", "b", "c", "d", "e", "f", "g", "h")
NAMES = [f"{one} {two} {three}" for one in WORDS for two in WORDS for three in WORDS][:400]


@pytest.fixture
def table(processor):
    return CaptionTable(processor.tokenizer, NAMES, TEMPLATES, 32)


@pytest.fixture
def made(monkeypatch):
    """How often captions were embedded."""
    calls = []
    monkeypatch.setattr(kept_heads, "class_embeddings", lambda *args: [calls.append(1), class_embeddings(*args)][1])
    return calls


def test_what_is_read_is_what_was_made(model, table, made, tmp_path):
    assert table.lengths.numel() >= kept_heads.FEWEST
    expected = class_embeddings(model, table)
    first = kept_class_embeddings(model, table, tmp_path / "deep" / "folder")
    second = kept_class_embeddings(model, table, tmp_path / "deep" / "folder")
    assert len(made) == 1
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert len(list((tmp_path / "deep" / "folder").iterdir())) == 1


def test_whatever_changes_the_embeddings_makes_them_anew(model, table, processor, made, tmp_path):
    kept_class_embeddings(model, table, tmp_path)
    with torch.no_grad():
        model.text_model.encoder.layers[1].mlp.fc1.bias[3] += 1e-3
    changed = kept_class_embeddings(model, table, tmp_path)
    assert len(made) == 2
    assert torch.equal(changed, class_embeddings(model, table))
    others = [
        CaptionTable(processor.tokenizer, [*NAMES[1:], "z z z"], TEMPLATES, 32),
        CaptionTable(processor.tokenizer, NAMES, ["a drawing of a {}.", *TEMPLATES[1:]], 32),
        CaptionTable(processor.tokenizer, NAMES, TEMPLATES, 32, padded=True),
        CaptionTable(processor.tokenizer, NAMES, TEMPLATES, 32, masked=False),
    ]
    for number, other in enumerate(others, 3):
        found = kept_class_embeddings(model, other, tmp_path)
        assert len(made) == number
        torch.testing.assert_close(found, class_embeddings(model, other))
    with torch.no_grad():  # neither is seen by captions
        model.vision_model.embeddings.class_embedding += 1
        model.logit_scale += 1
    kept_class_embeddings(model, table, tmp_path)
    assert len(made) == len(others) + 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"none"),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: save_file({"other": torch.zeros(3)}, path),
        lambda path: save_file({"classes": load_file(path)["classes"][:-1]}, path),
        lambda path: save_file({"classes": load_file(path)["classes"] * 2}, path),
        lambda path: save_file({"classes": load_file(path)["classes"] * float("nan")}, path),
    ],
)
def test_a_file_that_is_none_is_made_anew(model, table, made, tmp_path, spoil):
    expected = kept_class_embeddings(model, table, tmp_path)
    (path,) = tmp_path.iterdir()
    spoil(path)
    assert torch.equal(kept_class_embeddings(model, table, tmp_path), expected)
    assert len(made) == 2
    assert torch.equal(load_file(path)["classes"], expected), "and is whole again"


def test_few_captions_and_a_place_that_cannot_be_written_leave_no_file(model, table, processor, tmp_path):
    few = CaptionTable(processor.tokenizer, NAMES[:300], TEMPLATES, 32)
    kept_class_embeddings(model, few, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("no folder")
    found = kept_class_embeddings(model, table, tmp_path / "file" / "below")
    assert torch.equal(found, class_embeddings(model, table))


def test_the_oldest_files_go(model, table, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_heads, "MOST_FILES", 2)
    (tmp_path / "mine.txt").write_text("kept")
    names = []
    for seed in range(3):
        network = tiny_clip(table._tokenizer, seed=seed)
        kept_class_embeddings(network, table, tmp_path)
        (new,) = {path.name for path in tmp_path.glob("*.safetensors")} - set(names)
        os.utime(tmp_path / new, (seed, seed))
        names.append(new)
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "mine.txt"}


def test_an_evaluator_takes_them_when_asked(model, processor, suite, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "carot_hf.evaluation.evaluator.kept_class_embeddings",
        lambda *args: [asked.append(args), class_embeddings(*args)][1],
    )
    plain = Evaluator(model, processor, suite).evaluate(["home"])
    assert not asked
    kept = Evaluator(model, processor, suite, keep_heads=True).evaluate(["home"])
    assert len(asked) == 1
    assert kept.metrics == plain.metrics
