"""Benchmarks measured: means over domains, the worst group, from whole copies and streams, by the command line."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from csv_files import csv_rows
from layouts import table
from test_benchmark_suites import PACS, SIZES, domain_rows, waterbirds

from carot_hf import Evaluator, load_suite
from carot_hf.calibration.metrics import METRICS
from carot_hf.cli import calibrate, evaluate, training
from carot_hf.cli.models import save
from carot_hf.suites.benchmarks.table import benchmarks


@pytest.fixture
def pacs(tmp_path):
    labels, domains = domain_rows(SIZES, 7)
    names = datasets.ClassLabel(names=benchmarks()["pacs"].class_names)
    table(
        tmp_path / "copies/pacs", "train", labels, {"label": names, "domain": datasets.Value("string")}, domain=domains
    )
    return tmp_path / "copies"


@pytest.fixture
def saved(model, processor, tmp_path):
    save(tmp_path / "start", model, processor)
    return str(tmp_path / "start")


def test_ood_is_the_mean_over_the_domains_whatever_their_sizes(pacs, model, processor):
    suite = load_suite("pacs", root=pacs, check_counts=False)
    found = Evaluator(model, processor, suite).evaluate(n_bootstrap=0)
    away = [name for name in PACS if name != "photo"]
    assert len({found.sizes[name] for name in away}) == 3
    for key in METRICS.keys() - {"auroc"}:
        assert found.metrics["ood"][key] == pytest.approx(
            np.mean([found.metrics[name][key] for name in away]), abs=1e-12
        )
    by_size = np.average([found.metrics[name]["nll"] for name in away], weights=[found.sizes[name] for name in away])
    assert found.metrics["ood"]["nll"] != pytest.approx(by_size, abs=1e-9)
    assert found.metrics["id"] == found.metrics["photo"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_worst_group_of_waterbirds(tmp_path, model, processor, streaming):
    waterbirds(tmp_path / "copies")
    suite = load_suite("waterbirds", root=tmp_path / "copies", check_counts=False, streaming=streaming)
    found = Evaluator(model, processor, suite).evaluate(n_bootstrap=0)
    part, codes = found.per_image["waterbirds"], suite.test.groups.codes
    accuracy = [np.mean(part.hits[codes == group]) for group in range(4)]
    assert found.metrics["waterbirds"]["worst_group_accuracy"] == pytest.approx(min(accuracy))
    assert part.labels.tolist() == (codes // 2).tolist()  # groups are in the order of the rows
    assert {"worst_group_ece", "worst_group_ece_ts"} < set(found.metrics["waterbirds"])
    assert {"worst_group_ece", "worst_group_ece_ts", "macro_f1"} < {
        name.removeprefix("waterbirds_") for name in found.comparison.metrics if name.startswith("waterbirds_")
    }


def test_evaluate_writes_the_groups(tmp_path, saved, capsys):
    rows = waterbirds(tmp_path / "copies")
    words = ["--suite", "waterbirds", "--data_root", str(tmp_path / "copies"), "--partial"]
    evaluate.main([saved, *words, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "The groups of waterbirds, the lowest accuracy first (of few images the ECE is high by chance):" in printed
    lines = [line for line in csv_rows(tmp_path / "out/groups.csv") if line["set"] == "waterbirds"]
    codes = [2 * label + place for label, place in zip(*rows["test"], strict=True)]
    assert [int(line["n"]) for line in lines] == [codes.count(group) for group in range(4)]
    assert [line["group"] for line in lines] == list(load_suite(
        "waterbirds", root=tmp_path / "copies", check_counts=False).test.groups.names)  # fmt: skip
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]["waterbirds"]
    assert metrics["worst_group_accuracy"] == pytest.approx(min(float(line["accuracy"]) for line in lines), abs=1e-4)
    assert metrics["worst_group_ece"] == pytest.approx(max(float(line["ece"]) for line in lines), abs=1e-4)
    with pytest.raises(ValueError, match=r"Expected a new --output_dir"):
        evaluate.main([saved, *words, "--output_dir", str(tmp_path / "out")])


def test_a_suite_without_groups_has_no_file_of_them(pacs, saved, tmp_path):
    words = ["--suite", "pacs", "--data_root", str(pacs), "--partial", "--home", "sketch", "--shifts", "photo"]
    evaluate.main([saved, *words, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out/groups.csv").exists()
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]
    assert set(metrics) == {"validation", "sketch", "photo", "id", "ood"}
    assert not [key for own in metrics.values() for key in own if "group" in key]


def test_the_command_that_calibrate_ends_with_names_the_same_data(pacs, saved, tmp_path, capsys):
    words = ["--suite", "pacs", "--data_root", str(pacs), "--partial", "--held_out", "sketch"]
    calibrate.main([saved, *words, "--output_dir", str(tmp_path / "calibrated")])
    said = capsys.readouterr().out.split("carot_hf evaluate ")[1].split()
    options = evaluate.parse(said)
    assert (options.model, options.suite, options.held_out, options.partial) == (
        str(tmp_path / "calibrated"), "pacs", "sketch", True,
    )  # fmt: skip


@pytest.mark.parametrize("flags", [["--home", "cartoon"], ["--held_out", "sketch", "--streaming"]])
def test_a_training_on_a_benchmark(pacs, saved, tmp_path, flags):
    command = ["--suite", "pacs", "--data_root", str(pacs), "--partial", *flags, "--use_cpu", "--max_steps", "2"]
    command += ["--model_name_or_path", saved, "--per_device_train_batch_size", "4", "--report_to", "none"]
    report = training.main([*command, "--output_dir", str(tmp_path / "out"), "--reliability_diagrams", "False"])
    assert {"eval_ood_ece_ts", "eval_ood_macro_f1", "eval_sketch_accuracy"} < set(report["metrics"])
    saved_run = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (saved_run["suite"], saved_run["suite_version"]) == ("pacs", "1.0")
    assert saved_run["names"]["class_names"].startswith("the data set's ClassLabel")


def test_refusals_reach_the_command_line(pacs, saved, tmp_path):
    for words, message in (
        (["--home", "foto"], "one of the domains"),
        (["--home", "photo", "--held_out", "sketch"], "`home` or `held_out`, got both"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main([saved, "--suite", "pacs", "--data_root", str(pacs), *words])
    with pytest.raises(ValueError, match=r"for the suite 'digits', got \['home'\]"):
        evaluate.main([saved, "--suite", "digits", "--home", "photo"])
