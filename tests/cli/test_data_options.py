"""The options that say what a suite is made of: every command that takes a suite takes them, and hands them on."""

from __future__ import annotations

import argparse
import dataclasses
import json

import datasets
import numpy as np
import pytest
from layouts import picture
from PIL import Image
from toys import CLASSES, ROOT, noise_suite, save_classifier, tiny_clip, tiny_processor

import carot_hf.cli.models
import carot_hf.cli.train_options
import carot_hf.suites.load
from carot_hf.cli import data_options, predict, tables
from carot_hf.cli.main import COMMANDS as ALL
from carot_hf.cli.main import main
from carot_hf.suites.benchmarks.table import benchmarks

GIVEN = ["--data_root", "copies", "--home", "photo", "--shifts", "sketch", "cartoon", "--partial"]
MEANT = {"root": "copies", "home": "photo", "shifts": ["sketch", "cartoon"], "check_counts": False}
SIZES = {"photo": 20, "art_painting": 3, "cartoon": 10, "sketch": 4}  # images a class of a small copy of PACS
COMMANDS = {
    "train": ["--suite", "pacs", "--use_cpu", "--output_dir", "out"],
    "evaluate": ["model", "--suite", "pacs"],
    "calibrate": ["model", "--suite", "pacs", "--output_dir", "out"],
    "predict": ["model", "photos", "--suite", "pacs"],
    "interpolate": ["--fine_tuned", "model", "--zero_shot", "start", "--suite", "pacs", "--output_dir", "out"],
    "export": ["model", "--suite", "pacs", "--output", "out"],
    "tables": ["--suite", "pacs", "--jobs", "1", "--output_dir", "out"],
    "suite": ["check", "pacs"],
}


class Reached(Exception):
    """Nobody catches it."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((20, 18, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """What `load_suite` is asked for; then the command ends. No model may be loaded before."""
    found = []

    def load_suite(name, **options):
        found.append((name, options))
        raise Reached

    def no_model(*args):
        raise AssertionError("a model was loaded")

    for module in (carot_hf.suites.load, carot_hf.cli.train_options):
        monkeypatch.setattr(module, "load_suite", load_suite)
    for name in ("load", "model_of", "processor_of"):
        monkeypatch.setattr(carot_hf.cli.models, name, no_model)
    return found


@pytest.fixture
def pacs(place):
    """PACS as it lies on the Hub, with few images."""
    pairs = [(label, name) for name, size in SIZES.items() for label in range(7) for _ in range(size)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=benchmarks()["pacs"].class_names)}
    kinds = datasets.Features({**kinds, "domain": datasets.Value("string")})
    images = [{"bytes": picture(label, row, of=name), "path": f"{row}.png"} for row, (label, name) in enumerate(pairs)]
    labels, domains = zip(*pairs, strict=True)
    rows = datasets.Dataset.from_dict({"image": images, "label": list(labels), "domain": list(domains)}, features=kinds)
    (place / "copies" / "pacs" / "data").mkdir(parents=True)
    rows.to_parquet(place / "copies" / "pacs" / "data" / "train-00000-of-00001.parquet")
    return place / "copies"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_hands_on_what_was_given_before_a_model_loads(asked, command):
    with pytest.raises(Reached):
        main([command, *COMMANDS[command], *GIVEN])
    assert asked == [("pacs", MEANT)]


@pytest.mark.parametrize("command", COMMANDS)
def test_streams_and_the_domain_that_is_held_out(asked, command, capsys):
    words = [command, *COMMANDS[command], "--held_out", "sketch", "--streaming"]
    if command == "suite":
        assert main(words) == 2
        assert asked == []
        assert capsys.readouterr().err.splitlines() == [
            "carot_hf suite: Expected no --streaming with check, which looks at images by their number: leave it out. "
            "`carot_hf suite --help` shows the options."
        ]
        return
    with pytest.raises(Reached):
        main(words)
    assert asked == [("pacs", {"held_out": "sketch", "streaming": True})]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_any_nothing_is_handed_on(asked, command):
    with pytest.raises(Reached):
        main([command, *COMMANDS[command]])
    assert asked == [("pacs", {})]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_what_a_suite_does_not_have_is_refused_in_the_same_line_by_all(command, refused, monkeypatch):
    def no_model(*args):
        raise AssertionError("a model was loaded")

    for name in ("load", "model_of"):
        monkeypatch.setattr(carot_hf.cli.models, name, no_model)
    words = [command, *COMMANDS[command], "--home", "photo"]
    for of, said in (
        ("digits", "Expected no options for the suite 'digits', got ['home']. Leave them out."),
        ("waterbirds", "Expected no `home` with 'waterbirds', which has no domains to choose from, got 'photo'."),
        ("imagenet", "for the suite 'imagenet', got ['home']. Leave them out."),
    ):
        assert said in refused(*(of if word == "pacs" else word for word in words))
    assert "Expected `home` or `held_out`, got both" in refused(*words, "--held_out", "sketch")


def test_train_has_the_same_options_in_a_dataclass():
    parser = argparse.ArgumentParser(add_help=False)
    data_options.add_suite_options(parser)
    fields = {field.name for field in dataclasses.fields(carot_hf.cli.train_options.ScriptArguments)}
    own = {"preset", "model_name_or_path", "oracle", "zero_shot"}  # what is trained, not on what
    assert {action.dest for action in parser._actions} == fields - own


def test_the_cells_of_the_tables_are_of_the_same_data():
    """--home and --held_out were not handed on: the page named one home, the runs were of another."""
    words = ["--suite", "pacs", "--jobs", "1", "--seeds", "2", "--methods", "wise-ft"]
    for part, meant in ((GIVEN, MEANT), (["--held_out", "sketch"], {"held_out": "sketch"})):
        options = tables.parse([*words, *part])
        cells = tables.plan([42, 43], {}, 4, options)
        merges = tables.merge_plan(cells, [42, 43], _Folders(), options)
        found = [cell for by_seed in [*cells.values(), *merges.values()] for cell in by_seed]
        assert [cell.name for cell in found] == ["zero-shot", "ft-42", "ft-43", "wise-ft-42", "wise-ft-43"]
        for cell in found:
            parser = argparse.ArgumentParser()
            data_options.add_suite_options(parser)
            assert data_options.suite_options(parser.parse_known_args(cell.arguments)[0]) == meant


class _Folders:
    def folder(self, cell):
        return cell.name


def test_a_report_that_was_begun_before_goes_on():
    """The words of a cell are compared with those of its first call, so their order stays."""
    words = ["--suite", "imagenet", "--data_root", "d", "--streaming", "--shifts", "v2", "r", "--partial"]
    options = tables.parse([*words[:2], *words[5:], *words[2:5], "--jobs", "1"])
    assert tables.train_cell("ft", "ft", 42, options).arguments[: len(words)] == tuple(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "m", "i", "--home", "photo"], "Expected --suite with --home, which says what a suite is made of"),
        (["predict", "m", "i", "--streaming"], "Expected --suite with --streaming, which says"),
        (["predict", "m", "i", "--shifts", "v2"], "Expected --suite with --shifts, which says"),
        (["export", "m", "--output", "o", "--partial"], "Expected --suite with --partial, which says"),
        (["export", "m", "--output", "o", "--device", "cuda"], "Expected no --device, or cpu, got cuda"),
        (["export", "m", "--output", "o", "--data_root", "d"], "Expected --suite with --data_root, which says"),
        (["predict", "m", "i", "--suite", "digits", "--classes", "a", "b"], "Expected --suite or --classes, got both"),
        (["predict", "m", "i", "--suite", "digits", "--templates", "{}"], "Expected --classes with --templates"),
        (["predict", "m", "i", "--templates", "{}"], "Expected --classes with --templates"),
        (["predict", "m", "i", "--batch_size", "0"], "expected a whole number above 0, got '0'"),
        (["evaluate", "m", "--suite", "digits", "--batch_size", "-3"], "expected a whole number above 0, got '-3'"),
        (["suite", "init", "photos", "--home", "photo"], "Expected known options, got '--home'"),
        (["compare", "a", "b", "--suite", "digits"], "Expected known options, got '--suite'"),
        (["demo", "--suite", "digits"], "Expected known options, got '--suite'"),
    ],
)
def test_what_would_be_ignored_is_one_line(asked, words, said, capsys):
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert asked == []


def test_a_benchmark_is_checked_with_the_home_and_the_shifts_that_are_trained_on(pacs, capsys, refused):
    """Of each class of cartoon a tenth and a fifth are held out: 7 train, 1 validation, 2 test; sketch is away."""
    words = ["suite", "check", "pacs", "--data_root", str(pacs), "--home", "cartoon", "--shifts", "sketch", "--partial"]
    assert main([*words, "--size", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Suite 'pacs', version 1.0: 7 classes, 4 sets, 98 images"
    table = [line.split() for line in lines[3:12]]
    assert table[0] == ["images", "train", "validation", "cartoon", "sketch"]
    assert table[-1] == ["all", "49", "7", "14", "28"]
    assert main([*words[:5], "--held_out", "photo", "--partial", "--overwrite", "--size", "16"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[3:12]]
    assert table[0] == ["images", "train", "validation", "home", "photo"]
    assert table[-1] == ["all", "70", "21", "28", "140"], "of 3, 10 and 4 images: 1, 1, 1 and then 1, 2, 1"
    assert "Expected 2,344 rows" in refused(*words[:-1], "--overwrite")  # those of cartoons, without --partial


def test_predictions_have_the_classes_of_a_copy_and_an_estimate_by_its_home(pacs, place, capsys, refused):
    processor = tiny_processor()
    carot_hf.cli.models.save(place / "model", tiny_clip(processor.tokenizer), processor)
    words = ["predict", "model", "photos", "--device", "cpu", "--data_root", str(pacs), "--suite", "pacs", "--partial"]
    assert main([*words, "--home", "photo", "--estimate"]) == 0
    assert "Accuracy to expect of 1 images" in capsys.readouterr().out
    made = json.loads((place / "predictions.csv.json").read_text())
    assert made["classes"] == benchmarks()["pacs"].class_names
    assert "Expected 1,670 rows" in refused(*words[:-1], "--overwrite"), "the published number of photos"


def test_captions_of_classes_have_the_default_they_had():
    assert predict.parse(["m", "i"]).templates == ["a photo of a {}."]
    assert predict.parse(["m", "i", "--classes", "a", "b", "--templates", "{}!"]).templates == ["{}!"]


def test_a_classifier_is_exported_with_a_suite_of_its_classes_only(place, refused, monkeypatch):
    """It knows its classes by number; another suite's were ignored."""
    suite = noise_suite()
    save_classifier(place / "head", CLASSES)
    monkeypatch.setattr(carot_hf.suites.load, "load_suite", lambda name: suite)
    assert main(["export", "head", "--suite", "noise", "--output", "one"]) == 0
    assert main(["export", "head", "--output", "two"]) == 0
    suite.class_names = list(reversed(CLASSES))
    error = refused("export", "head", "--suite", "noise", "--output", "three")
    assert "Expected the classes of the classifier in its order" in error
    assert (place / "one").exists()
    assert not (place / "three").exists()


def test_no_command_but_these_reads_a_suite():
    """Who loads a suite by what was typed hands the options on: found by their source."""
    sources = {name: (ROOT / "carot_hf" / "cli" / f"{name}.py").read_text(encoding="utf-8") for name in ALL}
    readers = {name for name, source in sources.items() if "load_suite(options.suite" in source}
    assert readers | {"train"} == set(COMMANDS)
