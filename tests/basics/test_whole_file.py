"""Files of ours are there whole or not at all, and weights before all that could fail."""

from __future__ import annotations

import errno

import pytest
from safetensors.torch import load_file

from carot_hf.basics.whole_file import whole_file, write_whole
from carot_hf.cli import training
from carot_hf.cli.data_options import START_MODELS
from carot_hf.evaluation import diagrams as reporting


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "metrics.json"
    write_whole(path, "old")

    def tear():
        with whole_file(path) as beside:
            beside.write_text("half of")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        tear()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]
    with path.open() as reader:
        write_whole(path, "new \u00fc")
        assert reader.read() == "old"  # whoever reads has one or the other, never a part
    assert path.read_bytes() == "new \u00fc".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_the_suffix_stays_for_those_who_go_by_it(tmp_path):
    with whole_file(tmp_path / "a.png") as beside:
        assert (beside.suffix, beside.parent) == (".png", tmp_path)
        beside.write_bytes(b"x")
    assert (tmp_path / "a.png").read_bytes() == b"x"


def test_a_picture_that_cannot_be_written_loses_nothing(make_trainer, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("carot_hf.evaluation.diagrams.write_diagrams", full)
    import logging

    logging.getLogger("transformers").propagate = True
    trainer = make_trainer(reliability_diagrams=True)
    assert "eval_id_ece" in trainer.evaluate()
    (said,) = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert "eval_reliability.png: [Errno 28] No space left on device" in said


def test_the_script_keeps_the_weights_before_it_evaluates(tmp_path, monkeypatch):
    """With --save_strategy no an evaluation that failed lost the training."""

    def broken(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("carot_hf.CaRotTrainer.evaluate", broken)
    flags = [
        "--suite",
        "digits",
        "--use_cpu",
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
    ]
    with pytest.raises(OSError, match="No space"):
        training.main(flags)
    start = load_file(str(START_MODELS["digits"]) + "/model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == start.keys()
    assert any((value != start[name]).any() for name, value in saved.items())


def test_a_torn_picture_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "eval_reliability.png").write_bytes(b"old")

    def torn(tables):
        class Figure:
            def savefig(self, path, **kwargs):
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")

        return Figure()

    monkeypatch.setattr(reporting, "reliability_grid", torn)
    with pytest.raises(OSError, match="No space"):
        reporting.write_diagrams(tmp_path / "eval_reliability.png", {})
    assert (tmp_path / "eval_reliability.png").read_bytes() == b"old"
