"""A day's work with the wheel alone, on photographs in a folder: each command is one line, each figure is done again.

What is said and written is compared with plain transformers on the saved models, and with sums by hand.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re

import pytest
import torch
from elsewhere import elsewhere
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.datasets import load_sample_images
from transformers import CLIPModel, CLIPProcessor

from carot_hf.basics.yaml_text import load_yaml

pytestmark = pytest.mark.package
CLASSES = ["flower", "temple"]
PLACES = ("train", "train", "train", "validation", "test", "dusk")  # of the tiles of a photograph, in turn
CAPTIONS = [f"a photo of a {name}." for name in CLASSES]
CLASSIFY = """
import json, sys
from carot_hf import CLIPClassifier  # makes the class known to transformers
from transformers import pipeline

classify = pipeline("image-classification", model="classifier")
print(json.dumps(classify(sys.argv[1:], top_k=2)))
"""
VARIABLES = ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME", "TORCH_HOME")


def photographs(root):
    """Cut the two photographs of scikit-learn into tiles of 200 to 280 pixels; those of dusk are dark and blurred."""
    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        places = [(left, top) for top in range(0, 181, 45) for left in range(0, 401, 40)]
        for number, (left, top) in enumerate(places):
            box = (left, top, left + 200 + 20 * (number % 3), top + 200 + 20 * (number % 2))
            tile, place = Image.fromarray(pixels).crop(box), PLACES[number % len(PLACES)]
            if place == "dusk":
                tile = ImageEnhance.Brightness(tile.filter(ImageFilter.GaussianBlur(2))).enhance(0.4)
            (root / place / name).mkdir(parents=True, exist_ok=True)
            tile.save(root / place / name / f"{number}.jpg", quality=92)


def listing(folder):
    """What lies in a folder, with sizes and times."""
    found = {path: path.lstat() for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items() if not path.is_dir()}


class Session:
    """The folder of the session, its commands, and what they said."""

    def __init__(self, folder, python):
        self.folder, self.python = folder, python
        self.package = next(python.parents[1].glob("lib/python3*/site-packages/carot_hf"))
        self.model, self.said = str(self.package / "suites" / "digits_clip"), {}
        self._command = str(python.with_name("carot_hf"))
        self.home, self.scratch = folder.parent / "home", folder.parent / "scratch"

    def run(self, line, **variables):
        """Run the words of a line; MODEL is the model in the wheel."""
        words = [self.model if word == "MODEL" else word for word in line.split()]
        unset = {name: str(self.home / ".cache" / name.lower()) for name in VARIABLES if name in os.environ}
        places = {"HOME": str(self.home), "TMPDIR": str(self.scratch), "HF_HUB_OFFLINE": "1", **unset}
        return elsewhere([self._command, *words], self.folder, **places, **variables)

    def work(self, line):
        """Run a line that must succeed; keep what it said under its first word."""
        result = self.run(line)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr
        self.said[line.split()[0]] = result.stdout
        return result.stdout

    def read(self, name):
        """A file of JSON."""
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module")
def session(python, tmp_path_factory):
    root = tmp_path_factory.mktemp("day")
    session = Session(root / "work", python)
    for folder in (session.folder, session.home, session.scratch):
        folder.mkdir()
    photographs(session.folder / "fruit")
    session.before = listing(session.package.parent)
    session.shown = session.work("suite check fruit")
    session.work("evaluate MODEL --suite fruit --output_dir ev")
    session.work("suite init fruit")
    session.work(
        "train --suite fruit --model_name_or_path MODEL --output_dir run --learning_rate 1e-3 --num_train_epochs 4 "
        "--use_cpu --report_to none"
    )
    session.work("predict run fruit/test --output_file p.csv")
    session.work("compare ev run")
    session.work("export run --output classifier")
    session.work("calibrate MODEL --suite fruit --output_dir calibrated")
    return session


def pictures(session, place):
    """The files of a set in the order of their names, and their labels."""
    files = sorted((session.folder / "fruit" / place).rglob("*.jpg"), key=str)
    return files, torch.tensor([CLASSES.index(path.parent.name) for path in files])


@torch.no_grad()
def plain_logits(folder, files):
    """``(N, 2)`` logits of a saved model as transformers alone gives them."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in files]
    inputs = processor(text=CAPTIONS, images=images, return_tensors="pt", padding=True)
    return model(**inputs).logits_per_image.double()


def share_right(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def rows(session, name="p.csv"):
    with (session.folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_the_suite_holds_is_shown(session):
    counts = {place: len(pictures(session, place)[0]) for place in ("train", "validation", "test", "dusk")}
    assert sum(counts.values()) == 110
    said = [line.split() for line in session.shown.splitlines()]
    assert ["images", *counts] in said
    assert ["all", *map(str, counts.values())] in said
    assert ["flower", *(str(count // 2) for count in counts.values())] in said
    with Image.open(session.folder / "suite.png") as sheet:
        assert sheet.size == (10 + 8 * (224 + 10), 10 + 4 * (34 + 22 + 224 + 10))  # eight images of each of four sets
        assert sum(map(bool, sheet.convert("L").histogram())) > 200, "there are photographs in it"


def test_the_suite_file_says_what_the_folder_says(session):
    written = load_yaml((session.folder / "fruit" / "suite.yaml").read_text())
    assert written["class_names"] == CLASSES
    assert {name: written[name]["path"] for name in ("train", "validation", "test")} == {
        name: name for name in ("train", "validation", "test")
    }
    assert written["shifts"] == {"dusk": {"path": "dusk"}}
    assert session.read("ev/metrics.json")["suite_sha256"] == session.read("run/metrics.json")["suite_sha256"]


def test_evaluate_gives_the_figures_of_plain_transformers(session):
    found = session.read("ev/metrics.json")["metrics"]
    for place in ("validation", "test", "dusk"):
        files, labels = pictures(session, place)
        logits = plain_logits(session.model, files)
        assert found[place]["accuracy"] == pytest.approx(share_right(logits, labels), abs=1e-9)
        nll = torch.nn.functional.cross_entropy(logits, labels).item()
        assert found[place]["nll"] == pytest.approx(nll, abs=1e-5)
        shown = re.search(rf"^\| {place} +\| ([\d.]+)", session.said["evaluate"], re.MULTILINE)
        assert float(shown[1]) == pytest.approx(found[place]["accuracy"], abs=6e-4)


def test_predictions_are_the_softmax_of_the_saved_model(session):
    files, _ = pictures(session, "test")
    chances, order = plain_logits(session.folder / "run", files).softmax(1).sort(1, descending=True)
    found = rows(session)
    assert [row["image"] for row in found] == [str(path.relative_to(session.folder)) for path in files]
    for row, (first, second), places in zip(found, chances.tolist(), order.tolist(), strict=True):
        assert [row["label"], row["second"]] == [CLASSES[place] for place in places]
        assert float(row["confidence"]) == pytest.approx(first, abs=1e-5)
        assert float(row["second_confidence"]) == pytest.approx(second, abs=1e-5)


def test_the_figures_of_the_training_are_those_of_the_predictions(session):
    """And it has learned: the start model does not know the two."""
    right = [row["label"] == row["image"].split("/")[2] for row in rows(session)]
    sure = [float(row["confidence"]) for row in rows(session)]
    metrics = session.read("run/metrics.json")["metrics"]
    assert metrics["eval_test_accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-9)
    gaps = [
        sum(ok - chance for ok, chance in zip(right, sure, strict=True) if math.ceil(10 * chance) == number)
        for number in range(1, 11)
    ]
    assert metrics["eval_test_ece_ts"] == pytest.approx(sum(map(abs, gaps)) / len(right), abs=1e-5)
    assert metrics["eval_test_accuracy"] > session.read("ev/metrics.json")["metrics"]["test"]["accuracy"] + 0.1


def test_compare_says_the_difference_of_the_two_metrics_json(session):
    before = session.read("ev/metrics.json")["metrics"]
    after = session.read("run/metrics.json")["metrics"]
    part = session.said["compare"].split("run less ev:")[1]
    for place in ("test", "dusk"):
        shown = re.search(rf"^\| {place} +\| ([+-][\d.]+)", part, re.MULTILINE)
        difference = after[f"eval_{place}_accuracy"] - before[place]["accuracy"]
        assert float(shown[1]) == pytest.approx(difference, abs=6e-4)


def test_the_exported_classifier_answers_as_the_predictions(session):
    """In the wheel's environment, by the pipeline of transformers."""
    files, _ = pictures(session, "test")
    (session.folder / "classify.py").write_text(CLASSIFY)
    result = elsewhere([str(session.python), "classify.py", *map(str, files)], session.folder, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    for row, answers in zip(rows(session), json.loads(result.stdout), strict=True):
        assert answers[0]["label"] == row["label"]
        assert answers[0]["score"] == pytest.approx(float(row["confidence"]), abs=1e-5)


def test_calibrate_finds_the_temperature_of_the_least_nll(session):
    files, labels = pictures(session, "validation")
    logits = plain_logits(session.model, files)
    saved = plain_logits(session.folder / "calibrated", files)
    temperature = session.read("calibrated/config.json")["calibration"]["temperature"]
    assert torch.allclose(saved * temperature, logits, atol=1e-4)
    grid = [0.5 * 20 ** (step / 2000) for step in range(2001)]  # 0.5 to 10
    scores = [torch.nn.functional.cross_entropy(logits / value, labels).item() for value in grid]
    assert temperature == pytest.approx(grid[scores.index(min(scores))], rel=2e-3)
    assert f"T = {temperature:.3f} by {len(files)} held-out images" in session.said["calibrate"]


def test_a_broken_picture_is_listed_and_the_others_are_answered(session):
    place = session.folder / "mixed"
    place.mkdir()
    for path in pictures(session, "test")[0][:3]:
        (place / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    (place / "broken.jpg").write_text("no picture")
    said = session.work("predict run mixed --output_file mixed.csv")
    assert "mixed.csv: 3 images; 1 could not be decoded" in said
    assert (session.folder / "mixed.csv.bad").read_text() == "mixed/broken.jpg\n"
    whole = {row["image"].removeprefix("fruit/test/").replace("/", "-"): row for row in rows(session)}
    found = {row["image"].removeprefix("mixed/"): row for row in rows(session, "mixed.csv")}
    assert len(found) == 3
    for name, row in found.items():
        assert row["label"] == whole[name]["label"]
        assert float(row["confidence"]) == pytest.approx(float(whole[name]["confidence"]), abs=1e-5)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("predict none/such/model fruit/test --output_file bad.csv", "none/such/model"),
        ("evaluate MODEL --suite vegetables", "vegetables"),
        ("evaluate MODEL --suite empty", "empty"),
        ("predict MODEL empty --output_file bad.csv", "Expected images in the folder empty"),
        ("predict MODEL fruit/test --output_fil bad.csv", "Did you mean --output_file?"),
        ("train --suite fruit --num_train_epoch 3 --output_dir bad", "Did you mean --num_train_epochs?"),
    ],
)
def test_what_the_user_can_mend_is_one_line_with_status_2(session, line, said):
    (session.folder / "empty").mkdir(exist_ok=True)
    result = session.run(line)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"carot_hf {line.split()[0]}: ")
    assert said in result.stderr
    assert not list(session.folder.glob("bad*"))


def test_help_needs_no_torch(session):
    result = session.run("--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "carot_hf.cli.main" in loaded
    assert not {"torch", "transformers", "datasets", "PIL", "numpy"} & loaded
    commands = re.findall(r"^  (\w+) ", result.stdout, re.MULTILINE)
    assert {"suite", "evaluate", "train", "predict", "export", "compare", "calibrate"} <= set(commands)


def test_nothing_is_written_outside_the_folder(session):
    """Last, after all commands: neither to the home, nor beside the package, nor left among temporary files."""
    assert listing(session.home) == {}
    assert listing(session.scratch) == {}
    assert listing(session.package.parent) == session.before
    made = {path.name for path in session.folder.iterdir()}
    assert made == {
        "fruit", "suite.png", "ev", "run", "p.csv", "p.csv.json", "classifier", "calibrated",
        "mixed", "mixed.csv", "mixed.csv.json", "mixed.csv.bad", "empty", "classify.py",
    }  # fmt: skip
