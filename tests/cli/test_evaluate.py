"""``carot_hf evaluate``: figures of each class on the screen and in files, of what the checkpoint answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from csv_files import csv_rows
from sklearn.metrics import precision_recall_fscore_support
from toys import TEMPLATES, Noise, tiny_clip, tiny_processor

from carot_hf import Evaluator, ShiftSet, ShiftSuite
from carot_hf.cli.main import main
from carot_hf.cli.models import save
from carot_hf.ece.binning import calibration_bins
from carot_hf.evaluation.per_image_file import read_per_image

NAMES = [f"class {number}" for number in range(12)]
GROUPS = [[3], [0, 11], [5]]
FILES = ["confusion.png", "metrics.json", "per_class.csv", "per_image.safetensors", "reliability.png"]


def a_set(name, size, seed, classes=12, columns=None):
    data = Noise(size, seed, classes)
    return ShiftSet(data, name=name, num_classes=12, labels=data.labels, columns=columns)


@pytest.fixture(scope="module")
def suite():
    """Twelve classes, and a shifted set whose three labels stand for some of them."""
    return ShiftSuite(
        name="twelve",
        class_names=NAMES,
        templates=TEMPLATES,
        train=a_set("train", 36, 0),
        validation=a_set("validation", 24, 1),
        test=a_set("home", 60, 2),
        shifts={"part": a_set("part", 15, 3, 3, GROUPS)},
    )


@pytest.fixture
def known_suites(suite, monkeypatch):
    monkeypatch.setattr("carot_hf.suites.load.load_suite", lambda name: suite)


@pytest.fixture(scope="module", params=["temperature", "density"])
def checkpoint(request, tmp_path_factory, suite):
    folder, processor = tmp_path_factory.mktemp(request.param), tiny_processor()
    evaluator = Evaluator(tiny_clip(processor.tokenizer, logit_scale_init_value=3.5), processor, suite)
    evaluator.calibrate(request.param)
    save(folder, evaluator.model, processor, evaluator.calibrator)
    return folder, "dts" if request.param == "density" else ""


@pytest.mark.usefixtures("known_suites")
def test_figures_of_each_class(checkpoint, tmp_path, capsys):
    folder, ending = checkpoint
    place = tmp_path / "ev"
    words = ["evaluate", str(folder), "--suite", "twelve", "--device", "cpu", "--output_dir", str(place)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in place.iterdir()) == FILES
    metrics = json.loads((place / "metrics.json").read_text())
    assert (metrics["answers"], metrics["suite"]) == (ending, "twelve")
    rows, own = read_per_image(place / "per_image.safetensors")
    assert own == ending
    for name, part in rows.items():
        key = f"ece_{ending}" if ending else "ece"
        assert calibration_bins(*part.at(ending)).ece == pytest.approx(metrics["metrics"][name][key], abs=1e-7)
        assert part.hits.mean() == pytest.approx(metrics["metrics"][name]["accuracy"])
    table = csv_rows(place / "per_class.csv")
    by_set = {name: [row for row in table if row["set"] == name] for name in ("validation", "home", "part")}
    assert [row["class"] for row in by_set["home"]] == NAMES
    assert [row["class"] for row in by_set["part"]] == ["class 3", "class 0 / class 11", "class 5"]
    for name, part in rows.items():
        labels = range(len(by_set[name]))
        precision, recall, _, support = precision_recall_fscore_support(
            part.labels, part.predicted, labels=labels, zero_division=np.nan
        )
        assert [int(row["n"]) for row in by_set[name]] == support.tolist()
        for column, expected in (("recall", recall), ("precision", precision)):
            found = [float(row[column] or "nan") for row in by_set[name]]
            assert found == pytest.approx(expected, abs=5.1e-5, nan_ok=True)
        for label in labels:
            own = part.labels == label
            gap = part.confidences[ending][own].mean() - part.hits[own].mean()
            assert float(by_set[name][label]["gap"]) == pytest.approx(gap, abs=6e-5)
    assert "The 10 of 12 classes of home, the lowest recall first:" in printed
    shown = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| class ")]
    worst = sorted(by_set["home"], key=lambda row: float(row["recall"]))[:10]
    assert shown[1:] == [row["class"] for row in worst]


@pytest.mark.usefixtures("known_suites")
def test_nothing_is_overwritten(checkpoint, tmp_path, capsys, refused):
    words = ["evaluate", str(checkpoint[0]), "--suite", "twelve", "--device", "cpu", "--sets", "part"]
    assert main(words) == 0
    assert "classes of" not in capsys.readouterr().out, "no test set was measured"
    for name in FILES:
        place = tmp_path / name
        place.mkdir()
        (place / name).write_text("mine")
        said = refused(*words, "--output_dir", place)
        assert said.endswith(f"{place}, with {name}. Add --overwrite_output_dir.")
        assert (place / name).read_text() == "mine"
    assert main([*words, "--output_dir", str(place), "--overwrite_output_dir"]) == 0
    assert (place / "reliability.png").read_bytes() != b"mine"
