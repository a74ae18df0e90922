"""``carot_hf compare``: figures side by side, differences as of the library's `compare`, and what has none and why."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from csv_files import csv_rows
from toys import noise_suite, tiny_clip, tiny_processor

from carot_hf import Evaluator, compare
from carot_hf.cli.main import main
from carot_hf.cli.models import save
from carot_hf.ece.binning import calibration_bins
from carot_hf.evaluation import runs
from carot_hf.evaluation.per_image import PerImage
from carot_hf.evaluation.per_image_file import write_answers
from carot_hf.evaluation.runs import distinct_names, read_run

FACTS = {"classes": "a" * 64, "labels": "b" * 64, "read": "c" * 64}


def a_run(place, *, sets=("home", "far"), size=40, seed=0, shape="nested", ending="", rows=True, bins=10, **facts):
    """A run as `carot_hf evaluate` ("nested") or a training ("flat") leaves it."""
    place.mkdir(parents=True)
    rng, parts = np.random.default_rng(seed), {}
    for name in sets:
        labels = (np.arange(size) % 4).astype(np.int32)
        predicted = np.where(rng.random(size) < 0.7, labels, 3 - labels).astype(np.int32)
        confidences = rng.uniform(0.3, 1, size).astype(np.float32)
        parts[name] = PerImage({ending: confidences}, predicted, labels, {**FACTS, "n": size, **facts})
    tables = {name: calibration_bins(*part.at(ending), bins) for name, part in parts.items()}
    content = {"bins": {name: table.to_dict() for name, table in tables.items()}, "marks": {}}
    key = f"ece_{ending}" if ending else "ece"
    own = {name: {"accuracy": table.avg_accuracy, key: table.ece} for name, table in tables.items()}
    if shape == "nested":
        content |= {"metrics": own, "answers": ending}
    else:
        flat = {f"eval_{name}_{metric}": value for name, part in own.items() for metric, value in part.items()}
        method = {"ts": "temperature", "pts": "perturbed", "dts": "density"}[ending]
        content |= {"metrics": flat, "calibration": {"method": method}}
    text = json.dumps(content).replace("NaN", "null")
    (place / "metrics.json").write_text(text)
    if rows:
        write_answers(place, parts, ending)
    return parts


def test_two_models_measured_by_the_command(tmp_path, monkeypatch, capsys, refused):
    suite, processor = noise_suite(), tiny_processor()
    monkeypatch.setattr("carot_hf.suites.load.load_suite", lambda name: suite)
    found = []
    for seed, name in enumerate("ab"):
        model = tiny_clip(processor.tokenizer, seed, logit_scale_init_value=3.5)
        save(tmp_path / "models" / name, model, processor)
        evaluate = ["evaluate", str(tmp_path / "models" / name), "--suite", "noise", "--device", "cpu"]
        assert main([*evaluate, "--output_dir", str(tmp_path / name)]) == 0
        found.append(Evaluator(model, processor, suite, batch_size=64).evaluate(n_bootstrap=0))
    capsys.readouterr()
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--n_bootstrap", "200", "--seed", "3"]
    assert main([*words, "--output_dir", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    expected = compare(found[1], found[0], n_bootstrap=200, seed=3)
    assert f"b less a:\n{expected.table()}\n" in printed
    first = next(line for line in printed.splitlines() if line.startswith("| a "))
    shown = [float(cell) for cell in first.split("|")[2:-1]]
    names = ("validation", "home", "far")
    figures = [found[0].metrics[name][metric] for name in names for metric in ("accuracy", "ece")]
    assert shown == pytest.approx(figures, abs=6e-4)
    rows = csv_rows(tmp_path / "c" / "compare.csv")
    assert [(row["set"], row["metric"]) for row in rows] == [(n, m) for n in names for m in ("accuracy", "ece")]
    for row in rows:
        values = expected.differences[row["set"]][row["metric"]]
        assert [float(row[key]) for key in ("difference", "low", "high")] == pytest.approx(values, abs=1e-6)
        pair = [evaluation.metrics[row["set"]][row["metric"]] for evaluation in found]
        assert [float(row["first_value"]), float(row["value"])] == pytest.approx(pair, abs=1e-6)
        assert (row["run"], row["first"], row["why_not"]) == ("b", "a", "")
        assert int(row["images"]) == found[0].sizes[row["set"]]
    assert (tmp_path / "c" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "with compare.csv. Add --overwrite_output_dir." in refused(*words, "--output_dir", tmp_path / "c")
    assert main([*words, "--output_dir", str(tmp_path / "c"), "--overwrite_output_dir"]) == 0


def test_a_run_with_itself(tmp_path):
    a_run(tmp_path / "a")
    place = str(tmp_path / "a")
    assert main(["compare", place, place, f"{place}/metrics.json", "--output_dir", str(tmp_path / "c")]) == 0
    rows = csv_rows(tmp_path / "c" / "compare.csv")
    assert {row["run"] for row in rows} == {"a (2)", "a (3)"}
    assert {float(row[key]) for row in rows for key in ("difference", "low", "high")} == {0.0}


@pytest.mark.parametrize("ending", ["ts", "pts", "dts"])
def test_a_training_run_beside_an_evaluation(tmp_path, capsys, ending):
    a_run(tmp_path / "trained", shape="flat", ending=ending)
    parts = a_run(tmp_path / "measured", seed=0)
    assert main(["compare", str(tmp_path / "trained"), str(tmp_path / "measured")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[2:] == lines[3].split("|")[2:], "the same confidences under another ending"
    ece = calibration_bins(*parts["home"].at("")).ece
    assert lines[2].split("|")[3].strip() == f"{ece:.3f}"
    assert lines[-1].count("+0.000") == 6


def test_what_is_not_compared_and_why(tmp_path, capsys):
    a_run(tmp_path / "first")
    a_run(tmp_path / "content", content="e" * 64)
    a_run(tmp_path / "other", content="f" * 64)
    a_run(tmp_path / "small", size=39, labels="d" * 64)
    a_run(tmp_path / "classes", classes="d" * 64)
    a_run(tmp_path / "bare", rows=False)
    a_run(tmp_path / "sets", sets=("home", "near"))
    names = ["first", "small", "classes", "bare", "sets"]
    assert main(["compare", *(str(tmp_path / name) for name in names), "--n_bootstrap", "20"]) == 0
    printed = capsys.readouterr().out
    assert "not compared: home, far: another number of images (39 and 40)" in printed
    assert "not compared: home, far: other classes, or other names of them" in printed
    assert "not compared: home, far: bare has no per_image.safetensors" in printed
    assert "not compared: far: sets has no such set\nnot compared: near: first has no such set" in printed
    assert (
        main(["compare", str(tmp_path / "content"), str(tmp_path / "other"), "--output_dir", str(tmp_path / "c")]) == 0
    )
    assert "not compared: home, far: other images\n" in capsys.readouterr().out
    rows = csv_rows(tmp_path / "c" / "compare.csv")
    assert {(row["why_not"], row["difference"], row["images"]) for row in rows} == {("other images", "", "")}
    assert all(0 < float(row["value"]) < 1 for row in rows), "figures of its own are there"
    assert not (tmp_path / "c" / "compare.png").exists()


def test_an_ece_of_other_bins_is_not_shown_beside_these(tmp_path, capsys):
    parts = a_run(tmp_path / "a", bins=15)
    a_run(tmp_path / "b", bins=15, rows=False, seed=1)
    pair = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(pair) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[2].split("|")[3].strip() == f"{calibration_bins(*parts['home'].at(''), 10).ece:.3f}"
    assert lines[3].split("|")[3].strip() == ""
    assert "b: an ECE of 15 bins is left out; ask for --n_bins 15 to see it" in printed
    assert main([*pair, "--n_bins", "15"]) == 0
    printed = capsys.readouterr().out
    assert "left out" not in printed
    assert float(printed.splitlines()[3].split("|")[3]) > 0


def test_a_set_that_is_no_evidence_is_said(tmp_path, capsys):
    a_run(tmp_path / "a")
    content = json.loads((tmp_path / "a" / "metrics.json").read_text())
    (tmp_path / "a" / "metrics.json").write_text(json.dumps({**content, "marks": {"far": "target"}}))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert "a: far is no evidence for its calibration (target)" in capsys.readouterr().out


def test_names_are_as_short_as_they_can_be(tmp_path):
    def named(*places):
        return distinct_names([tmp_path / place for place in places])

    assert named("x/ev", "y/fv") == ["ev", "fv"]
    assert named("x/ev", "y/ev/metrics.json") == ["x/ev", "y/ev"]
    assert named("x/1.json", "x/2.json") == ["1.json", "2.json"]
    assert named("x/ev", "x/ev", "y/ev") == ["x/ev", "x/ev (2)", "y/ev"]
    assert named("a\x1b[2J", "b") == ["a\\x1b[2J", "b"]


def test_answers_of_another_evaluation_are_refused(tmp_path, refused):
    a_run(tmp_path / "a")
    parts = a_run(tmp_path / "b", seed=9)
    for ending in ("", "ts"):
        same = {name: PerImage({ending: part.confidences[""]}, part.predicted, part.labels, part.facts)
                for name, part in (parts if ending == "" else a_run(tmp_path / f"c{ending}")).items()}  # fmt: skip
        write_answers(tmp_path / "a", same, ending)
        assert "of the same evaluation as metrics.json beside it" in refused("compare", tmp_path / "a", tmp_path / "b")


HOSTILE = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "nothing": "{}",
    "no bins": '{"metrics": {}, "bins": {}}',
    "words": '{"metrics": {}, "bins": {"home": "x"}}',
    "one edge": '{"metrics": {}, "bins": {"home": {"edges": [0]}}}',
    "text": '{"metrics": {"home": {"accuracy": "\\u001b[2J"}}, "bins": {"home": {"edges": [0, 1]}}}',
    "nan": '{"metrics": {"home": {"accuracy": NaN}}, "bins": {"home": {"edges": [0, 1]}}}',
    "percent": '{"metrics": {"home": {"accuracy": 79.5}}, "bins": {"home": {"edges": [0, 1]}}}',
    "true": '{"metrics": {"eval_home_accuracy": true}, "bins": {"home": {"edges": [0, 1]}}}',
    "ending": '{"answers": ["x"], "metrics": {}, "bins": {"home": {"edges": [0, 1]}}}',
    "method": '{"calibration": {"method": {}}, "metrics": {}, "bins": {"home": {"edges": [0, 1]}}}',
    "marks": '{"marks": 1, "metrics": {}, "bins": {"home": {"edges": [0, 1]}}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_stranger_wrote_is_refused_in_a_line(tmp_path, capsys, kind):
    (tmp_path / "metrics.json").write_text(HOSTILE[kind])
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("carot_hf compare: Expected metrics.json of `carot_hf evaluate` or a training run at")
    assert said[0].isprintable()


def test_what_there_is_not(tmp_path, refused, monkeypatch):
    a_run(tmp_path / "a")
    assert "found none at" in refused("compare", tmp_path / "a", tmp_path / "gone")
    assert "Expected two runs or more" in refused("compare", tmp_path / "a")
    for option in (["--n_bins", "0"], ["--n_bootstrap", "0"]):
        assert "got 0" in refused("compare", tmp_path / "a", tmp_path / "a", *option)
    monkeypatch.setattr(runs, "LARGEST", 10)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_run(tmp_path / "a", "a")


def test_help_needs_no_torch():
    code = "import atexit, sys; atexit.register(lambda: print({'torch', 'numpy'} & sys.modules.keys()));"
    code += "sys.argv[1:] = ['compare', '--help']; import carot_hf.__main__"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert said.stdout.splitlines()[-1] == "set()"
    assert "carot_hf compare [-h]" in said.stdout
