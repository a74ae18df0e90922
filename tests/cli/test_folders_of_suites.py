"""The command line on a folder without a YAML file, with a test set and shifts alone."""

from __future__ import annotations

import json

import pytest
from toys import CLASSES, noise_suite, tiny_clip, tiny_processor

from carot_hf import Evaluator, load_suite
from carot_hf.cli.main import main
from carot_hf.cli.models import save


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, and the test set and the shift of the suite of noise as files; names of classes in another order."""
    root, processor, suite = tmp_path_factory.mktemp("places"), tiny_processor(), noise_suite()
    save(root / "model", tiny_clip(processor.tokenizer), processor)
    for name, data in (("test", suite.test), ("far", suite.shifts["far"])):
        for row in range(len(data)):
            place = root / "noise" / name / CLASSES[data[row]["label"]]
            place.mkdir(parents=True, exist_ok=True)
            data[row]["image"].save(place / f"{row}.png")
    return root


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_is_evaluated(places, tmp_path, capsys, slash):
    words = ["evaluate", str(places / "model"), "--suite", f"{places / 'noise'}{slash}", "--device", "cpu"]
    assert main([*words, "--output_dir", str(tmp_path / "ev")]) == 0
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:6]] == ["test", "far", "id", "ood"]
    assert "after T" not in table
    found = json.loads((tmp_path / "ev" / "metrics.json").read_text())
    assert found["sizes"] == {"test": 19, "far": 17}
    assert (found["scaling"], found["bins_ts"]) == ({}, {})
    processor = tiny_processor()
    expected = Evaluator(tiny_clip(processor.tokenizer), processor, _in_order_of_the_folders(), batch_size=64).evaluate(
        ["home", "far"]
    )
    for name, own in (("test", "home"), ("far", "far")):
        for key in ("accuracy", "ece", "nll"):
            assert found["metrics"][name][key] == pytest.approx(expected.metrics[own][key], abs=1e-6), (name, key)


def _in_order_of_the_folders():
    """The suite of noise with the captions that a folder has."""
    suite = noise_suite()
    suite.templates = ["a photo of a {}."]
    return suite


def test_what_needs_a_validation_set_says_so_before_a_model_is_there(places, tmp_path, refused):
    words = ["calibrate", str(tmp_path / "no" / "model"), "--suite", str(places / "noise")]
    error = refused(*words, "--output_dir", tmp_path / "copy")
    assert error.startswith("carot_hf calibrate: Expected a validation set to calibrate on, got a suite without one")
    assert "folder validation/" in error
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_of_classes_is_one_line(places, tmp_path, capsys):
    (tmp_path / "fruit").symlink_to(places / "noise" / "test")
    assert main(["evaluate", str(tmp_path / "no" / "model"), "--suite", str(tmp_path / "fruit")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("carot_hf evaluate: Expected a folder test/ and, to train, train/")
    assert load_suite(places / "noise").class_names == sorted(CLASSES)
