"""The command line: what it says, what it writes, how it goes on, and what it refuses, without a traceback."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from csv_files import csv_rows
from PIL import Image
from reference_layouts import reference_clip
from safetensors.torch import save_file
from toys import CLASSES, ROOT, noise_suite, save_classifier, tiny_clip, tiny_processor
from transformers import CLIPModel, CLIPProcessor

import carot_hf.cli.predict
from carot_hf import Evaluator
from carot_hf.cli.main import COMMANDS, main
from carot_hf.cli.models import load, save
from carot_hf.data.shift_set import ShiftSet
from carot_hf.evaluation.predictor import Predictor
from carot_hf.models.convert import load_clip_checkpoint

DIGITS = str(ROOT / "carot_hf" / "suites" / "digits_clip")


@pytest.fixture(scope="module")
def suite():
    return noise_suite()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, suite):
    """A model that was calibrated by density, with its processor and its calibrator."""
    folder, processor = tmp_path_factory.mktemp("model"), tiny_processor()
    evaluator = Evaluator(tiny_clip(processor.tokenizer, logit_scale_init_value=3.5), processor, suite)
    evaluator.calibrate("density")
    save(folder, evaluator.model, processor, evaluator.calibrator)
    return folder, evaluator


@pytest.fixture
def pictures(tmp_path):
    """Ten images in two folders, and one that is none."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for index in range(10):
        place = folder / ("b" if index < 3 else "a") / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 18, 3), dtype=np.uint8)).save(place)
    (folder / "a" / "none.png").write_bytes(b"no image")
    return folder


def predict(model, images, output):
    return ["predict", str(model), str(images), "--device", "cpu", "--output_file", str(output)]


def test_help_is_there_at_once_and_names_each_command():
    start = time.monotonic()
    said = subprocess.run([sys.executable, "-m", "carot_hf", "--help"], capture_output=True, text=True, timeout=600)
    assert said.returncode == 0
    assert all(f"  {name}" in said.stdout for name in COMMANDS)
    code = "import sys; sys.argv[1:] = ['predict', '--help']; import carot_hf.__main__"
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=600)
    assert said.stdout.splitlines()[-1] == "False", f"{time.monotonic() - start:.1f} s"
    assert len(said.stdout.splitlines()) < 50, "more than a screen"


def test_a_word_that_is_none_gets_the_nearest(capsys):
    assert main(["evalute"]) == 2
    assert "got 'evalute'. Did you mean evaluate?" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"{carot_hf.__version__}\n")


def test_predictions_are_those_of_the_evaluator(checkpoint, pictures, tmp_path, capsys, suite):
    folder, evaluator = checkpoint
    output = tmp_path / "deep" / "p.csv"
    assert main(predict(folder, pictures, output)) == 0
    assert "p.csv: 10 images; 1 could not be decoded" in capsys.readouterr().out
    rows = csv_rows(output)
    files = sorted(pictures.rglob("?.png"))
    assert [row["image"] for row in rows] == [str(path) for path in files]
    assert Path(f"{output}.bad").read_text().splitlines() == [str(pictures / "a" / "none.png")]
    data = ShiftSet([{"image": str(p)} for p in files], name="p", num_classes=len(CLASSES), label_column=None)
    logits, _ = evaluator.predict(data)
    embeds = evaluator.embed({"": data})[""][0]
    expected = (logits / evaluator.calibrator.temperature(embeds)[:, None]).softmax(1)
    values, places = expected.topk(2)
    assert [float(row["confidence"]) for row in rows] == pytest.approx(values[:, 0].tolist(), abs=1e-4)
    assert [float(row["second_confidence"]) for row in rows] == pytest.approx(values[:, 1].tolist(), abs=1e-4)
    assert [row["label"] for row in rows] == [suite.class_names[k] for k in places[:, 0]]
    assert [float(row["distance"]) for row in rows] == pytest.approx(
        evaluator.calibrator.distance(embeds).tolist(), abs=2e-3
    )
    sets = evaluator.sets(data)
    found = [[name in row["set"].split("|") for name in suite.class_names] for row in rows]
    assert found == sets.tolist()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_interrupted_call_goes_on(checkpoint, pictures, tmp_path, monkeypatch, suffix):
    folder, _ = checkpoint
    monkeypatch.setattr(carot_hf.cli.predict, "_CHUNK", 4)
    words = ["predict", str(folder), str(pictures), "--device", "cpu", "--output_file"]
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    assert main([*words, str(whole)]) == 0
    calls, predict = [], Predictor.predict

    def stopped(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(Predictor, "predict", stopped)
    assert main([*words, str(cut)]) == 130
    with cut.open("a") as file:
        file.write('{"image": "ha' if suffix == "jsonl" else "pictures/a/9.png,cat,0.9")  # killed in a row
    assert main([*words, str(cut)]) == 0
    assert calls == [4, 4, 4, 3]
    assert cut.read_text() == whole.read_text()
    assert Path(f"{cut}.bad").read_text() == Path(f"{whole}.bad").read_text()
    assert main([*words, str(cut)]) == 2, "it is finished"
    assert main([*words, str(cut), "--overwrite"]) == 0


def test_rows_of_another_model_are_not_gone_on_with(checkpoint, pictures, tmp_path, monkeypatch, refused):
    folder, _ = checkpoint
    words = predict(folder, pictures, tmp_path / "p.csv")
    monkeypatch.setattr(Predictor, "predict", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(words) == 130
    assert "another model or other classes made it" in refused(*words, "--classes", "cat", "dog")


def test_a_calibrator_of_other_weights_is_refused(checkpoint, pictures, tmp_path, refused):
    folder, evaluator = checkpoint
    shutil.copytree(folder, tmp_path / "copy")
    other = copy.deepcopy(evaluator.model)
    other.visual_projection.weight.data.mul_(-1.0)
    other.save_pretrained(tmp_path / "copy")
    words = predict(tmp_path / "copy", pictures, tmp_path / "p.csv")
    assert "calibrator" in refused(*words)


def test_an_uncalibrated_model_needs_names(pictures, tmp_path, refused):
    processor = tiny_processor()
    save(tmp_path / "plain", tiny_clip(processor.tokenizer), processor)
    words = ["predict", str(tmp_path / "plain"), str(pictures), "--device", "cpu", "--output_file"]
    assert "Name a --suite, or --classes" in refused(*words, tmp_path / "p.csv")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    command = [*words, str(tmp_path / "q.csv"), "--classes", str(tmp_path / "names.txt"), "--templates", "{}"]
    assert main(command) == 0
    rows = csv_rows(tmp_path / "q.csv")
    assert {row["label"] for row in rows} <= set(CLASSES)
    assert {(row["set"], row["distance"]) for row in rows} == {("", "")}


@pytest.mark.parametrize("method", ["density", "target"])
def test_a_calibrated_copy_is_what_the_evaluator_makes(tmp_path, capsys, method):
    suite, copy = carot_hf.load_suite("digits"), tmp_path / "copy"
    (tmp_path / "pictures").mkdir()
    for row in range(40):
        suite.shifts["outline"][row]["image"].save(tmp_path / "pictures" / f"{row:02d}.png")
    words = ["calibrate", DIGITS, "--suite", "digits", "--output_dir", str(copy), "--method", method, "--device", "cpu"]
    words += ["--images", str(tmp_path / "pictures")] if method == "target" else []
    assert main(words) == 0
    assert "Saved to" in capsys.readouterr().out
    processor, model = CLIPProcessor.from_pretrained(DIGITS), CLIPModel.from_pretrained(DIGITS)
    evaluator = Evaluator(model, processor, suite, batch_size=64)
    images = [suite.shifts["outline"][row] for row in range(40)]
    target = ShiftSet(images, name="target", num_classes=10)
    expected = evaluator.calibrate(method, target if method == "target" else None)
    record = json.loads((copy / "config.json").read_text())["calibration"]
    assert record == json.loads(json.dumps(expected))
    assert json.loads((copy / "calibrator.json").read_text())["a"] == evaluator.calibrator.a
    assert main(words) == 2, "a model is there"
    if method == "density":  # what replaces it does not ask how it was made
        assert main([*words, "--overwrite_output_dir"]) == 0


def test_a_classifier_keeps_its_own_order_of_classes(pictures, tmp_path, refused, suite):
    """Its head knows classes by number: names in another order would be given to the wrong ones."""
    names = list(suite.class_names)
    save_classifier(tmp_path / "head", names)
    words = predict(tmp_path / "head", pictures, tmp_path / "p.csv")
    assert "knows them by number" in refused(*words, "--classes", *reversed(names))
    assert not (tmp_path / "p.csv").exists()
    assert main([*words, "--classes", *names]) == 0


def test_files_of_somebody_else_stay(checkpoint, pictures, tmp_path, capsys):
    words = predict(checkpoint[0], pictures, tmp_path / "p.csv")
    (tmp_path / "p.csv.json").write_text("[1]")
    assert main(words) == 2
    assert (tmp_path / "p.csv.json").read_text() == "[1]"
    (tmp_path / "p.csv.json").unlink()
    (tmp_path / "p.csv").write_text("mine")
    assert main([words[0], str(tmp_path / "gone" / "model"), *words[2:], "--overwrite"]) == 2
    assert (tmp_path / "p.csv").read_text() == "mine", "nothing is replaced before the model is there"
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "{model}", "{here}/gone"], "gone, which is not there"),
        (["predict", "{model}", "{here}"], "Expected images in the folder"),
        (["predict", "{here}/no/such/model", "{pictures}"], "Expected a folder with a model"),
        (
            ["evaluate", "nobody/none", "--suite", "digits"],
            "Expected a folder with a model, or an id on the Hub, got nobody/none: no folder",
        ),
        (
            ["train", "--suite", "digits", "--model_name_or_path", "none", "--output_dir", "{here}/o"],
            "got none: no folder",
        ),
        (["evaluate", "{model}", "--suite", "{here}/none.yaml"], "none.yaml"),
    ],
)
def test_what_is_wrong_is_one_line(checkpoint, pictures, tmp_path, refused, words, said):
    (tmp_path / "empty").mkdir()
    places = {"model": checkpoint[0], "pictures": pictures, "here": tmp_path / "empty"}
    assert said in refused(*(word.format(**places) for word in words))


def test_options_that_do_not_go_together(capsys, refused):
    target = ["calibrate", "m", "--suite", "digits", "--output_dir", "o", "--method", "target"]
    for words in (["predict", "m", "i", "--output_file", "p.txt"], target, ["predict", "m", "i", "--estimate"]):
        assert main(words) == 2
    said = capsys.readouterr().err
    assert "carot_hf predict: Expected --suite with --estimate" in said
    assert len(said.splitlines()) == 3
    assert "got '--overwrit'. Did you mean --overwrite?" in refused("predict", "m", "i", "--overwrit")


def test_digits_are_evaluated_and_estimated(tmp_path, capsys):
    """The embedded model, which nobody calibrated, as it is."""
    command = ["evaluate", DIGITS, "--suite", "digits", "--sets", "uci", "--device", "cpu"]
    assert main([*command, "--output_dir", str(tmp_path / "ev")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "ev" / "metrics.json").read_text())
    assert found["metrics"]["uci"]["accuracy"] == pytest.approx(0.795, abs=0.005)
    assert "0.795 (" in printed
    assert (tmp_path / "ev" / "reliability.png").exists()
    assert [path.name for path in (tmp_path / "ev").glob("*.safetensors")] == ["per_image.safetensors"], "no model"
    assert main([*command, "--output_dir", str(tmp_path / "ev")]) == 2
    suite = carot_hf.load_suite("digits")
    (tmp_path / "pictures").mkdir()
    for row in range(20):
        suite.test[row]["image"].save(tmp_path / "pictures" / f"{row}.png")
    words = ["predict", DIGITS, str(tmp_path / "pictures"), "--suite", "digits", "--estimate", "--device", "cpu"]
    assert main([*words, "--output_file", str(tmp_path / "p.csv")]) == 0
    assert "Accuracy to expect of 20 images" in capsys.readouterr().out


def test_a_file_of_weights_is_a_checkpoint_where_its_processor_is_named(tmp_path, refused):
    path = tmp_path / "flyp.safetensors"
    plain = reference_clip()
    save_file({name: value.contiguous() for name, value in plain.state_dict().items()}, path)
    assert "Expected --processor with" in refused("evaluate", path, "--suite", "digits")
    assert "with a file of weights only" in refused("evaluate", DIGITS, "--suite", "digits", "--hidden_act", "gelu")
    options = SimpleNamespace(device="cpu", processor=DIGITS, hidden_act="gelu")
    loaded, expected = load(str(path), options), load_clip_checkpoint(path, hidden_act="gelu")
    assert loaded.model.config.vision_config.hidden_act == "gelu"
    assert loaded.calibrator is None
    assert loaded.processor.tokenizer.vocab_size == CLIPProcessor.from_pretrained(DIGITS).tokenizer.vocab_size
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
