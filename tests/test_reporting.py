"""Diagrams of a final evaluation: on disk beside the metrics, and in TensorBoard's event files."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from carot_hf import plots, reporting
from carot_hf.ece.binning import calibration_bins

SETS = ["far", "home", "part", "validation"]


@pytest.fixture
def drawn(monkeypatch):
    """Tables that were drawn, as {row: {column: table}}, one dict a grid."""
    grids = []
    whole = plots.reliability_grid
    monkeypatch.setattr(reporting, "reliability_grid", lambda tables, **kw: grids.append(tables) or whole(tables, **kw))
    return grids


def test_a_final_evaluation_leaves_diagrams_beside_the_metrics(make_trainer, drawn):
    trainer = make_trainer(reliability_diagrams=True, eval_strategy="steps", eval_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert not list(folder.glob("*.png"))  # evaluations during training draw nothing
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    assert {path.name for path in folder.glob("eval_*")} == {"eval_reliability.png", "eval_results.json"}
    with Image.open(folder / "eval_reliability.png") as image:
        image.load()
        assert min(image.size) > 400
    (grid,) = drawn
    assert sorted(grid) == SETS
    scaled = f"T = {metrics['eval_temperature']:.3f}"
    for name, cells in grid.items():
        assert list(cells) == (["as trained"] if name == "validation" else ["as trained", scaled])
        assert cells["as trained"].ece == pytest.approx(metrics[f"eval_{name}_ece"], abs=1e-12)
        if name != "validation":
            assert cells[scaled].ece == pytest.approx(metrics[f"eval_{name}_ece_ts"], abs=1e-12)
    trainer.evaluate(teacher=True)
    assert (folder / "eval_teacher_reliability.png").is_file()


def test_single_sets_and_other_prefixes_have_their_own_file(make_trainer, suite, drawn):
    trainer = make_trainer(reliability_diagrams=True)
    trainer.evaluate(suite.test, metric_key_prefix="again")
    assert (Path(trainer.args.output_dir) / "again_reliability.png").is_file()
    assert [list(cells) for cells in drawn[0].values()] == [["as trained"]]


def test_the_option_switches_it_off(make_trainer, drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(report_to="tensorboard")
    trainer.evaluate()
    assert not drawn
    assert not list(Path(trainer.args.output_dir).glob("*.png"))


def test_tensorboard_gets_each_diagram(make_trainer, suite):
    trainer = make_trainer(reliability_diagrams=True, report_to="tensorboard", max_steps=3)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # closes the writer
    images, scalars = {}, {}
    for file in Path(trainer.args.output_dir).rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
        images |= {tag: events.Images(tag) for tag in events.Tags()["images"]}
        scalars |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    expected = {f"eval/{name}_reliability" for name in SETS}
    expected |= {f"eval/{name}_reliability_ts" for name in SETS if name != "validation"}
    assert images.keys() == expected
    assert {image.step for shown in images.values() for image in shown} == {3}
    assert all(image.height > 300 and image.width > 300 for shown in images.values() for image in shown)
    assert scalars["eval/home_ece"][-1].value == pytest.approx(metrics["eval_home_ece"], abs=1e-6)


def test_pixels_are_those_of_the_figure():
    table = calibration_bins(np.array([0.15, 0.95, 0.95, 0.95]), np.array([0, 1, 1, 0]))
    pixels = reporting._pixels(plots.reliability_diagram(table))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (640, 480, 3)
    assert (pixels == 255).mean() > 0.3  # paper
    assert (pixels < 60).any()  # ink


def test_without_matplotlib_the_numbers_still_come(make_trainer, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: None)
    trainer = make_trainer(reliability_diagrams=True)
    with caplog.at_level(logging.INFO, "carot_hf.reporting"):
        assert 0 <= trainer.evaluate()["eval_home_ece"] <= 1
    assert "pip install carot_hf[plot]" in caplog.text
    assert not list(Path(trainer.args.output_dir).glob("*.png"))
