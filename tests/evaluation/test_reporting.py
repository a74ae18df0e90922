"""What an evaluation leaves: diagrams on disk, and what TensorBoard and W&B have really recorded.

That of trackio is in ``tests/space``: with pandas 3 and datasets 5 pip finds it no version but the oldest.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reported import DIAGRAMS, REPORTED, SETS, check_scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from carot_hf.ece.binning import calibration_bins
from carot_hf.evaluation import diagrams as reporting
from carot_hf.evaluation import plots


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
    assert [path.name for path in folder.glob("*.png")] == ["learning_curves.png"]  # no diagram during training
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


def wandb_history(file):
    """Rows of an offline run, once all of it is on the disk: another process writes it, and ends when it likes."""
    from google.protobuf.message import DecodeError

    for _ in range(200):
        try:
            rows, ended = wandb_rows(file)
        except DecodeError:  # of a record that is being written
            ended = False
        if ended:
            return rows
        time.sleep(0.1)
    raise AssertionError(f"{file} was not finished within 20 seconds")


def wandb_rows(file):
    """Rows, and whether the run's end is among its records.

    LevelDB's log format (blocks of 32 KiB, records in parts) around protobuf.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, rows, whole, at, ended = file.read_bytes(), [], b"", 7, False
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            record, whole = Record.FromString(whole), b""
            ended |= record.HasField("exit")
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows, ended


@pytest.mark.slow
def test_wandb_gets_terms_metrics_and_diagrams_offline(make_trainer, tmp_path, monkeypatch):
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        **{f"WANDB_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT")},
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    try:
        trainer = make_trainer(**REPORTED, report_to="wandb", run_name="mine")
        trainer.train()
        metrics = trainer.evaluate()
    finally:
        wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = wandb_history(file)
    recorded = {tag: [row[tag] for row in rows if tag in row] for row in rows for tag in row}
    check_scalars(trainer, metrics, recorded)
    images = {tag.removesuffix("/path"): paths for tag, paths in recorded.items() if tag.endswith("/path")}
    assert images.keys() == DIAGRAMS
    assert {row["train/global_step"] for row in rows if any(tag.endswith("/path") for tag in row)} == {3}
    for (path,) in images.values():
        with Image.open(file.parent / "files" / path) as image:
            image.load()
            assert image.size == (480, 640)
    assert len({recorded[f"{tag}/sha256"][0] for tag in DIAGRAMS}) == len(DIAGRAMS)


def test_another_reporter_gets_images_by_a_method(make_trainer):
    class Mine(TrainerCallback):
        def log_images(self, images, step):
            seen.append((images, step))

    class Other(TrainerCallback):
        pass

    seen = []
    trainer = make_trainer(reliability_diagrams=True, trainer={"callbacks": [Other(), Mine()]})
    trainer.evaluate()
    assert {tag for images, _ in seen for tag in images} == DIAGRAMS
    for images, step in seen:
        assert step == 0
        assert all(pixels.dtype == np.uint8 and pixels.shape == (640, 480, 3) for pixels in images.values())


def test_packages_of_reporters_are_imported_only_for_their_callbacks(monkeypatch):
    """By the name of a class that the callback is, or descends from; without one nothing is drawn, either."""
    logged = []

    class Package:
        Image = staticmethod(lambda pixels: pixels.shape)
        log = staticmethod(lambda row: logged.append(row))

    imported = []
    monkeypatch.setattr(reporting, "import_module", lambda name: imported.append(name) or Package)
    bins = calibration_bins(np.array([0.15, 0.95]), np.array([0, 1]))
    tables = reporting.diagram_tables({"home": bins}, {"home": bins}, 1.5)
    drawn = []
    whole = reporting.reliability_diagram
    monkeypatch.setattr(reporting, "reliability_diagram", lambda *args, **kw: drawn.append(kw) or whole(*args, **kw))
    reporting.send_diagrams([object(), TrainerCallback()], tables, prefix="eval", step=7)
    assert not imported
    assert not drawn
    heir = type("Mine", (type("WandbCallback", (TrainerCallback,), {}),), {})
    reporting.send_diagrams([heir(), type("TrackioCallback", (), {})()], tables, prefix="eval", step=7)
    assert imported == ["wandb", "trackio"]
    tags = dict.fromkeys(("eval/home_reliability", "eval/home_reliability_ts"), (640, 480, 3))
    assert logged == [{**tags, "train/global_step": 7}] * 2
    assert [shown["title"] for shown in drawn] == ["home, as trained", "home, T = 1.500"]
    assert reporting._PACKAGES.keys() == {"WandbCallback", "TrackioCallback"}
    from transformers.integrations import TrackioCallback, WandbCallback  # the names that transformers gives them

    assert {WandbCallback.__name__, TrackioCallback.__name__} == reporting._PACKAGES.keys()


def test_reporting_needs_no_reporter():
    code = """
import sys, carot_hf.evaluation.diagrams
print([m for m in ('wandb', 'trackio', 'tensorboard') if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_tensorboard_gets_each_diagram(make_trainer, suite):
    trainer = make_trainer(**REPORTED, report_to="tensorboard")
    trainer.train()
    metrics = trainer.evaluate()
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # closes the writer
    images, scalars = {}, {}
    for file in Path(trainer.args.output_dir).rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
        images |= {tag: events.Images(tag) for tag in events.Tags()["images"]}
        scalars |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert images.keys() == DIAGRAMS
    assert {image.step for shown in images.values() for image in shown} == {3}
    assert all(image.height > 300 and image.width > 300 for shown in images.values() for image in shown)
    check_scalars(trainer, metrics, {tag: [event.value for event in events] for tag, events in scalars.items()})


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
    with caplog.at_level(logging.INFO, "carot_hf.evaluation.diagrams"):
        assert 0 <= trainer.evaluate()["eval_home_ece"] <= 1
    assert "pip install carot_hf[plot]" in caplog.text
    assert not list(Path(trainer.args.output_dir).glob("*.png"))
