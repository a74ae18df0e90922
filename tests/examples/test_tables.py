"""The report: intervals against scipy, verdicts, the page, and cells that survive an interruption."""

from __future__ import annotations

import argparse
import json
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from csv_files import csv_rows
from layouts import folders
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy import stats

from carot_hf import load_suite
from carot_hf.basics.manifest import write_manifest
from carot_hf.cli import published
from carot_hf.cli import report as tables
from carot_hf.cli import tables as reproduce_tables
from carot_hf.cli.tables import Cell, Runner
from carot_hf.ece.binning import calibration_bins
from carot_hf.evaluation.pareto import front, pareto
from carot_hf.evaluation.plots import id_ood_scatter


def test_intervals_are_students():
    values = [0.81, 0.83, 0.80, 0.86, 0.84]
    mean, half = tables.mean_and_half_width(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-12)
    assert np.isnan(tables.mean_and_half_width([0.5])[1])
    assert tables.number([0.5]) == "0.500"
    assert tables.number([0.4, 0.6]) == f"0.500 ± {12.706204736 * np.std([0.4, 0.6], ddof=1) / np.sqrt(2):.3f}"


def rows(accuracies, eces=None):
    eces = accuracies if eces is None else eces
    return [
        {"eval_ood_accuracy": a, "eval_ood_ece": e, "eval_ood_ece_ts": e} for a, e in zip(accuracies, eces, strict=True)
    ]


def verdicts(ours, theirs):
    return [line.split("|")[-2].strip() for line in tables.paired(ours, theirs).splitlines()[2:]]


def test_the_paired_verdict_follows_the_interval():
    """Differences of .1 with little spread decide; the same mean with a large spread does not."""
    theirs = rows([0.5, 0.6, 0.7], [0.10, 0.10, 0.10])
    ours = rows([0.6, 0.7, 0.801], [0.2, 0.2, 0.201])
    assert "+0.100 ± 0.001" in tables.paired(ours, theirs).splitlines()[2]
    assert verdicts(ours, theirs)[:2] == ["CaRot is better", "FLYP is better"]  # more accurate; a larger error
    assert verdicts(rows([0.9, 0.6, 0.6], [0.1, 0.2, 0.0]), theirs)[0] == "undecided"
    assert verdicts(theirs[:1], theirs[:1])[0] == "one seed: undecided"


def fake_results(suite, seeds):
    rng = np.random.default_rng(0)
    names = [suite.test.name, *suite.shifts]
    keys = {*tables.COLUMNS.values(), *tables.SHIFT_COLUMNS.values(), "eval_validation_nll", "eval_runtime"}
    ends = ("", "_ts", "_pts", "_dts", "_oracle")
    keys = sorted(keys | {f"eval_{name}_ece{end}" for name in names for end in ends})

    def run():
        bins = {
            name: calibration_bins(rng.random(200), rng.random(200) < 0.7).to_dict() for name in [*names, "validation"]
        }
        return {
            "metrics": {key: float(rng.random()) for key in keys},
            "training": {"seconds": float(rng.uniform(50, 150)), "steps": 100},
            "bins": bins,
            "bins_ts": {name: bins[name] for name in names},
        }

    runs = {"zero-shot": [run()]}
    runs |= {name: [run() for _ in seeds] for name in reproduce_tables.TRAINED}
    merged = ("wise-ft", "wise-ft-ls", "wise-carot")
    sweeps = {
        name: [[{"alpha": alpha, **run()["metrics"]} for alpha in (0.0, 0.5, 1.0)] for _ in seeds] for name in merged
    }
    sweeps["model-stock"] = [[run()["metrics"]] for _ in seeds]
    mixed = [key for key in keys if not key.endswith(("_pts", "_dts", "_oracle"))]
    sweeps["vrf"] = [[{key: float(rng.random()) for key in mixed}] for _ in seeds]
    return runs, sweeps


@pytest.fixture
def written(monkeypatch):
    """Every word in the pictures that are saved."""
    found, save = [], Figure.savefig

    def savefig(figure, *args, **options):
        found.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.mark.parametrize("of_imagenet", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_page_holds_every_figure_that_was_measured(tmp_path, of_imagenet, written):
    suite, seeds = load_suite("digits"), [42, 43, 44]
    if of_imagenet:
        suite.name = "imagenet"
    runs, sweeps = fake_results(suite, seeds)
    page = tables.write_report(
        tmp_path,
        suite,
        runs=runs,
        sweeps=sweeps,
        smoothings={"ft-ls": {0.1: 0.3, 0.2: 0.25}, "flyp-ls": {0.1: 0.4, 0.2: 0.5}},
        seeds=seeds,
        interval=4,
        command="python examples/reproduce_tables.py --seeds 3",
        seconds=(1200.0, 60.0),
        quick=False,
    ).read_text()
    page = re.sub(" +[|]", " |", page)  # columns are aligned
    suite.name = "digits"
    for method, title in tables.TITLES.items():
        results = (
            [run["metrics"] for run in runs[method]] if method in runs else [s[len(s) // 2] for s in sweeps[method]]
        )
        cells = [tables.number([r[key] for r in results]) for key in tables.COLUMNS.values()]
        assert f"| {title} | {' | '.join(cells)} |" in page
    for method, title in tables.INTERVALS.items():
        cells = [tables.number([r["metrics"][key] for r in runs[method]]) for key in list(tables.COLUMNS.values())[:4]]
        assert f"| {title} | {' | '.join(cells)} |" in page
    assert "FT + LS 0.2 (validation NLL 0.1: 0.3000, 0.2: 0.2500), FLYP + LS 0.1 (" in page
    assert "default 4)" in page
    assert "Seeds 42, 43, 44" in page
    assert ("| CaRot | 0.8319 | 0.6197 |" in page) == of_imagenet
    assert ("not evidence for ImageNet" in page) == (not of_imagenet)
    for picture in re.findall(r"\((\w+\.png)\)", page):
        with Image.open(tmp_path / picture) as image:
            assert min(image.size) > 100
    table = csv_rows(tmp_path / "results.csv")
    assert len(table) == 1 + 3 * len(reproduce_tables.TRAINED) + 3 * len(reproduce_tables.MERGED)
    check_against_flyp(page, runs, sweeps)
    check_words(page, written, of_imagenet)
    assert ("| DiVE | 0.8250 | 0.6320 |" in page) == of_imagenet
    assert ("| L2-SP | 0.8287 | 0.5734 |" in page) == of_imagenet
    [line] = [line for line in page.split("## Does CaRot")[0].splitlines() if line.startswith("| VRF of FT |")][1:]
    density = list(tables.SHIFT_COLUMNS).index("home: density")
    assert line.split("|")[2 + density].strip() == "", "it was not measured, and the column stays"
    (cell,) = [row for row in table if (row["method"], row["seed"]) == ("tracer", "43")]
    assert float(cell["eval_ood_ece"]) == pytest.approx(runs["tracer"][1]["metrics"]["eval_ood_ece"], rel=1e-5)
    assert "eval_runtime" not in cell


def check_words(page, written, of_imagenet):
    """People read of home and shifted data; how metrics call them is said once, and columns of the CSV stay."""
    for text in (page, *written):
        assert not re.search(r"\b(?:ID|OOD|id|ood)\b|in.distribution", text.replace("`id`", "").replace("`ood`", "")), (
            text
        )
    assert {"accuracy at home", "accuracy under shift (mean)", "accuracy under shift (more is better)"} <= {*written}
    assert (page.count("`id`"), page.count("`ood`")) == (1, 1)
    assert "Home (`id` in results.csv): uci. Shifted (`ood` there): unweighted mean over mnist, print, outline" in page
    headers = {line for line in page.splitlines() if line.startswith("| |")}
    six = "| | home acc | shifted acc | home ECE | shifted ECE | home ECE, T | shifted ECE, T |"
    sides = "| | home: none | home: home T | home: perturbed T | home: density | shifted: none | shifted: home T |"
    ratios = "| | shifted: density / home T | shifted: density / oracle | home: density - home T |"
    later = {"| | home acc | shifted acc |"} if of_imagenet else set()
    rest = " shifted: perturbed T | shifted: density | shifted: oracle |"
    assert headers == {six, "| | home acc | shifted acc | home ECE | shifted ECE |", sides + rest, ratios, *later}
    assert "| minus FLYP | home acc | shifted acc | shifted ECE | shifted ECE, T | shifted: density |" in page
    for row in ("shifted acc", "shifted ECE", "shifted ECE, T"):
        assert re.search(rf"^\| {row} \| [+-]0", page, re.MULTILINE)


def check_against_flyp(page, runs, sweeps):
    """Each method's differences to FLYP, by scipy, and its seconds a step."""
    lines = {line.split("|")[1].strip(): line for line in page.split("## Each method beside FLYP")[1].splitlines()
             if line[:1] == "|"}  # fmt: skip
    flyp = [run["metrics"] for run in runs["flyp"]]
    for method, title in tables.TITLES.items():
        if method in ("flyp", "zero-shot"):  # one run, of no seed
            assert title not in lines
            continue
        own = [run["metrics"] for run in runs[method]] if method in runs else [s[len(s) // 2] for s in sweeps[method]]
        cells = [cell.strip() for cell in lines[title].split("|")[2:-1]]
        for cell, (key, better) in zip(
            cells,
            [("eval_id_accuracy", 1), ("eval_ood_accuracy", 1), ("eval_ood_ece", -1), ("eval_ood_ece_ts", -1)],
            strict=False,
        ):
            found = [a[key] - b[key] for a, b in zip(own, flyp, strict=True)]
            low, high = stats.ttest_1samp(found, 0).confidence_interval(0.95)
            mark = "" if low <= 0 <= high else " better" if np.mean(found) * better > 0 else " worse"
            assert cell == f"{np.mean(found):+.3f} ± {(high - low) / 2:.3f}{mark}"
        seconds = {name: min(run["training"]["seconds"] for run in runs[name]) for name in runs}
        assert cells[-1] == (f"{seconds[method] / seconds['flyp']:.2f}" if method in runs else "")


def test_the_front_holds_what_no_other_beats():
    points = {"a": (1.0, 0.5), "b": (2.0, 0.9), "c": (2.0, 0.8), "d": (3.0, 0.9), "e": (0.5, 0.1), "twin": (1.0, 0.5)}
    assert front(points) == ["e", "a", "twin", "b"]


def test_the_picture_of_what_is_traded_draws_what_it_is_given():
    names = [f"method {i}" for i in range(21)]
    panels = {
        "ECE": {name: ((i * 7) % 21 / 100, 0.5 + i / 100) for i, name in enumerate(names)},
        "seconds": {name: (1 + i / 10, 0.5 + i / 100) for i, name in enumerate(names[1:])},
    }
    figure = pareto(panels, "accuracy")
    for ax, points in zip(figure.axes, panels.values(), strict=True):
        drawn = {line.get_label(): line for line in ax.get_lines()}
        for name, point in points.items():
            assert (drawn[name].get_xdata()[0], drawn[name].get_ydata()[0]) == point
        edge = [line for line in ax.get_lines() if line.get_label() not in points]
        assert list(zip(*edge[0].get_data(), strict=True)) == [points[name] for name in front(points)]
    looks = [
        {name: (line.get_color(), line.get_marker()) for name in names for line in ax.get_lines()
         if line.get_label() == name} for ax in figure.axes
    ]  # fmt: skip
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == names
    assert len(set(looks[0].values())) == 21
    assert looks[1].items() <= looks[0].items()  # the same mark in both
    with pytest.raises(ValueError, match="Expected a point, got none"):
        pareto({"ECE": {}}, "accuracy")


def test_published_rows_are_rows_of_the_report():
    for rows in (published.CAROT, published.TRACER, published.DIVE):
        assert rows.keys() <= tables.TITLES.keys()
    assert published.CAROT_INTERVALS.keys() == tables.INTERVALS.keys()
    assert {*reproduce_tables.TRAINED, *reproduce_tables.MERGED, "zero-shot"} == {*tables.TITLES, *tables.INTERVALS}


def test_methods_are_chosen_with_what_they_are_made_of():
    parse = reproduce_tables.parse
    assert parse(["--methods", "vrf", "flyp", "--suite", "digits", "--jobs", "1"]).methods == ["ft", "flyp", "vrf"]
    assert parse(["--suite", "digits", "--jobs", "1"]).methods == [*reproduce_tables.TRAINED, *reproduce_tables.MERGED]
    options = parse(["--methods", "dive", "never", "--suite", "digits", "--jobs", "1", "--seeds", "2"])
    cells = reproduce_tables.plan([42, 43], {}, 4, options)
    assert list(cells) == ["zero-shot", "never", "dive"]
    assert [cell.name for cell in cells["dive"]] == ["dive-42", "dive-43"]
    assert "--preset dive --seed 43" in " ".join(cells["dive"][1].arguments)
    assert reproduce_tables.merge_plan(cells, [42, 43], Runner(Path("none"), 1), options) == {}
    with pytest.raises(ValueError, match="invalid choice: 'clip'"):
        parse(["--methods", "clip"])


CELL = """
import itertools, json, pathlib, sys, zlib
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--output_dir") + 1])
method = dict(itertools.pairwise(words)).get("--calibration_method", "temperature")
ends = {"temperature": ["_ts"], "perturbed": ["_ts", "_pts"], "density": ["_ts", "_pts", "_dts"]}[method]
names = ["id", "ood", "test", "art", "sketch"]
keys = [f"eval_{name}_ece{end}" for name in names for end in ["", *ends, *["_oracle"] * ("--oracle" in words)]]
keys += [*(f"eval_{name}_accuracy" for name in names), "eval_validation_nll"]
metrics = {key: zlib.crc32(f"{out.name} {key}".encode()) % 1000 / 1000 for key in keys}
(out / "seen.json").write_text(json.dumps(words))
if "--alphas" in words:
    alphas = words[words.index("--alphas") + 1 : words.index("--calibration_method")]
    (out / "sweep.json").write_text(json.dumps({"rows": [{"alpha": float(alpha), **metrics} for alpha in alphas]}))
elif "--method" in words:
    (out / "sweep.json").write_text(json.dumps({"rows": [metrics]}))
else:
    bins = json.loads((out.parents[2] / "bins.json").read_text())
    found = {"metrics": metrics, "bins": bins, "bins_ts": bins, "training": {"seconds": 3.0, "steps": 2}}
    (out / "metrics.json").write_text(json.dumps(found))
"""


def value_of(cell, key):
    return zlib.crc32(f"{cell} {key}".encode()) % 1000 / 1000


@pytest.mark.parametrize("streaming", [True, False])
def test_of_streams_the_report_is_made_without_a_density(tmp_path, monkeypatch, capsys, streaming):
    """The command with small scripts as cells: they measure what their --calibration_method says, and nothing else."""
    for place, labels in {"train": [0, 1] * 8, "test": [0, 1], "art": [1, 0], "sketch": [0, 1]}.items():
        folders(tmp_path / "data" / place, labels, ["cat", "dog"])
    (tmp_path / "cell.py").write_text(CELL)
    table = calibration_bins(np.linspace(0.1, 0.9, 50), np.arange(50) % 3 > 0).to_dict()
    (tmp_path / "bins.json").write_text(json.dumps(dict.fromkeys(["validation", "test", "art", "sketch"], table)))
    for name in ("TRAIN", "MERGE"):
        monkeypatch.setattr(reproduce_tables, name, (str(tmp_path / "cell.py"),))
    seeds = "1" if streaming else "2"
    words = [
        "--suite",
        str(tmp_path / "data"),
        "--seeds",
        seeds,
        "--jobs",
        "2",
        "--output_dir",
        str(tmp_path / "report"),
    ]
    place = reproduce_tables.main([*words, *["--streaming"] * streaming])
    assert f"Report: {place}" in capsys.readouterr().out
    cells = [json.loads(path.read_text()) for path in place.parent.glob("cells/*/seen.json")]
    assert len(cells) > 20
    assert all(("--streaming" in cell) is streaming for cell in cells)
    method = "perturbed" if streaming else "density"
    mixed = [cell for cell in cells if "vrf" in cell]
    assert len(mixed) == (0 if streaming else 2), "it looks for images in the training set"
    assert {cell[cell.index("--calibration_method") + 1] for cell in cells if cell not in mixed} == {method}
    section = place.read_text().split("## ECE where the data shift")[1].split("## Does CaRot")[0]
    assert ("density" in section) is not streaming
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    endings = {"none": "", "home T": "_ts", "perturbed T": "_pts", **({} if streaming else {"density": "_dts"})}
    keys = {f"{side}: {title}": f"eval_{name}_ece{end}" for side, name in (("home", "id"), ("shifted", "ood"))
            for title, end in endings.items()} | {"shifted: oracle": "eval_ood_ece_oracle"}  # fmt: skip
    assert lines[0] == ["", *keys]
    of = {line[0]: line[1:] for line in lines[: 2 + len(tables.TITLES)]}
    runs = ["carot-42"] if streaming else ["carot-42", "carot-43"]
    assert of["CaRot"] == [tables.number([value_of(run, key) for run in runs]) for key in keys.values()]
    assert ("VRF of FT" in of, "Model Stock of FT" in of) == ((False, False) if streaming else (True, True))
    if not streaming:
        assert of["Model Stock of FT"] == [f"{value_of('model-stock-ft-42-ft-43', key):.3f}" for key in keys.values()]
        [stock] = [cell for cell in cells if "model_stock" in cell]
        at = stock.index("--fine_tuned")
        assert stock[at + 1 : at + 3] == [str(place.parent / "cells" / name) for name in ("ft-42", "ft-43")]
        assert "no independent repeats" in place.read_text()
        homes = [tables.number([value_of(run, key) for run in ("vrf-ft-42", "vrf-ft-43")])
                 for key in ("eval_id_ece", "eval_id_ece_ts")]  # fmt: skip
        assert of["VRF of FT"][:4] == [*homes, "", ""], "what was not measured of it"
    for picture in re.findall(r"\((\w+\.png)\)", place.read_text()):
        with Image.open(place.parent / picture) as image:
            assert min(image.size) > 100


def test_model_stock_takes_each_seed_with_the_next():
    def pairs(count):
        return [(one.name, other.name) for one, other in reproduce_tables.seed_pairs(cells[:count])]

    cells = [Cell(name, (), ()) for name in "abc"]
    assert pairs(3) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert pairs(2) == [("a", "b")], "the other way round it is the same merge"
    assert pairs(1) == []


def test_the_interval_of_the_teacher_is_the_published_share_of_the_run():
    suite = load_suite("digits")
    assert reproduce_tables.teacher_interval(suite, argparse.Namespace(quick=False)) == 4  # 198 steps / 50.06
    assert reproduce_tables.teacher_interval(suite, argparse.Namespace(quick=True)) == 2
    imagenet = SimpleNamespace(train=range(1_281_167), recommended={})
    assert reproduce_tables.teacher_interval(imagenet, argparse.Namespace(quick=False)) == 500


@pytest.fixture
def script(tmp_path):
    """A script that fails while a file `broken` exists and counts its runs otherwise."""
    (tmp_path / "job.py").write_text(
        "import pathlib, sys\n"
        "here, out = pathlib.Path(__file__).parent, pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "(out / 'seen').open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "print('hello'); (here / 'broken').exists() and sys.exit(3)\n"
        "(out / 'metrics.json').write_text('{\"metrics\": 1}')\n"
    )
    return tmp_path


def test_finished_cells_are_not_run_again_and_failures_are_named(script, capsys):
    runner = Runner(script / "cells", 2)
    cells = [Cell(f"cell-{i}", (str(script / "job.py"),), ("--seed", str(i))) for i in range(3)]
    (script / "broken").touch()
    with pytest.raises(RuntimeError, match=r"job.py` to finish for 'cell-\d', got exit status 3.*log.txt"):
        runner.run(cells)
    (script / "broken").unlink()
    runner = Runner(script / "cells", 2)
    runner.run(cells)
    seconds = runner.seconds()
    assert seconds > 0
    before = [(runner.folder(cell) / "seen").read_text() for cell in cells]
    Runner(script / "cells", 2).run(cells)
    assert [(runner.folder(cell) / "seen").read_text() for cell in cells] == before
    assert "3 cells, 3 of them finished before" in capsys.readouterr().out
    assert runner.read(cells[0]) == {"metrics": 1}
    assert runner.seconds() == seconds
    assert "hello" in (runner.folder(cells[0]) / "log.txt").read_text()
    other = Cell("cell-1", (str(script / "job.py"),), ("--seed", "7"))
    with pytest.raises(ValueError, match=r"Expected the arguments .*cell-1 was begun, --seed 1, got --seed 7"):
        runner.run([other])


def test_an_interrupted_training_run_goes_on_from_its_checkpoint(script, monkeypatch):
    train = (str(script / "job.py"),)
    monkeypatch.setattr(reproduce_tables, "TRAIN", train)
    cell = Cell("run-42", train, ("--seed", "42"))
    runner = Runner(script / "cells", 1)
    checkpoint = runner.folder(cell) / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    write_manifest(checkpoint)
    runner.run([cell])
    assert "--resume_from_checkpoint" in (runner.folder(cell) / "seen").read_text()


@pytest.mark.parametrize(
    "argv", [["--methods", "vrf", "--streaming"], ["--methods", "ft", "model-stock", "--seeds", "1"]]
)
def test_a_row_that_was_asked_for_is_not_left_out_in_silence(argv):
    with pytest.raises(ValueError, match=rf"Expected .* for {'vrf' if 'vrf' in argv else 'model-stock'}"):
        reproduce_tables.parse([*argv, "--suite", "digits", "--jobs", "1"])


def test_a_suite_without_shifted_sets_is_refused_before_any_run(tmp_path):
    for row, name in enumerate(["train/cat", "train/cat", "train/dog", "train/dog", "test/cat", "test/dog"]):
        (tmp_path / "plain" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * row, 0, 0)).save(tmp_path / "plain" / name / f"{row}.png")
    argv = ["--suite", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "out"), "--seeds", "1", "--jobs", "1"]
    with pytest.raises(ValueError, match="Expected a suite with shifted sets for tables, got 'plain' with none"):
        reproduce_tables.main(argv)
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--jobs", "0"], ["--quick", "--suite", "imagenet"], ["--nothing"]])
def test_bad_options_end_before_anything_is_loaded(argv):
    with pytest.raises(ValueError, match=r"[Ee]xpected|invalid"):
        reproduce_tables.parse(argv)


def test_the_scatter_draws_what_it_is_given():
    points = {f"method {i}": (0.5 + i / 100, 0.4 + i / 50) for i in range(21)}
    curves = {"WiSE-FT": [(0.5, 0.6), (0.7, 0.65), (0.8, 0.5)]}
    figure = id_ood_scatter(points, curves, title="here")
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert set(lines) == {*points, "WiSE-FT, sweep"}
    for name, (home, shifted) in points.items():
        assert (lines[name].get_xdata()[0], lines[name].get_ydata()[0]) == (home, shifted)
    assert list(zip(*lines["WiSE-FT, sweep"].get_data(), strict=True)) == curves["WiSE-FT"]
    looks = [(lines[name].get_color(), lines[name].get_marker()) for name in points]
    assert len(set(looks)) == 21
    assert len({marker for _, marker in looks[:14]}) == 14  # told apart without colour
    assert ax.get_title() == "here"
    assert id_ood_scatter(points, ax=ax) is figure
    with pytest.raises(ValueError, match="at least one point"):
        id_ood_scatter({})
