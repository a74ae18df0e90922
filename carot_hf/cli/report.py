"""The report of `carot_hf tables`: tables with intervals, figures, and the page that puts them together."""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import t as student_t

from .. import __version__
from ..basics.escape import table
from ..basics.whole_file import whole_file, write_whole
from ..data.suite import ShiftSuite
from ..ece.binning import CalibrationBins
from ..evaluation.pareto import pareto
from ..evaluation.plots import ece_by_set, id_ood_scatter, reliability_grid
from . import demo
from .published import CAROT, CAROT_INTERVALS, LATER

Metrics = Mapping[str, float]
TITLES = {
    "zero-shot": "ZS",
    "ft": "FT",
    "ft-ls": "FT + LS",
    "wise-ft": "WiSE-FT",
    "wise-ft-ls": "WiSE-FT + LS",
    "flyp": "FLYP",
    "flyp-ls": "FLYP + LS",
    "carot": "CaRot",
    "lp-ft": "LP-FT",
    "wise-carot": "WiSE-CaRot",
    "carot-2024": "CaRot-2024",
    "tracer": "TRACER",
    "never": "CaRot, static teacher",
    "fd": "FD",
    "l2-sp": "L2-SP",
    "dive": "DiVE",
    "lipsum": "Lipsum-FT",
    "car-ft": "CAR-FT",
    "model-stock": "Model Stock of FT",
    "vrf": "VRF of FT",
}
COLUMNS = dict(demo.COLUMNS[:6])  # those of a density have a table of their own
SHIFT_COLUMNS = {
    f"{side}: {title}": f"eval_{name}_ece{ending}"
    for side, name in (("home", "id"), ("shifted", "ood"))
    for title, ending in demo.SERIES.items()
}
SHIFT_COLUMNS["shifted: oracle"] = "eval_ood_ece_oracle"
INTERVALS = {"every-1": "1", "carot": "default", "every-2x": "2 x default", "never": "never"}


def write_report(
    folder: Path,
    suite: ShiftSuite,
    *,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    sweeps: Mapping[str, Sequence[Sequence[Metrics]]],
    smoothings: Mapping[str, Mapping[float, float]],
    seeds: Sequence[int],
    interval: int,
    command: str,
    seconds: tuple[float, float],
    quick: bool,
) -> Path:
    """Write README.md, results.csv and the figures into `folder`; return the page.

    Args:
        folder: Made if missing.
        suite: What was trained and evaluated on.
        runs: What metrics.json holds, by method, one a seed.
        sweeps: Rows of sweep.json by merged method, one list a seed; each has the alpha 0.5, or is a single row.
        smoothings: Validation NLL by label smoothing, by method.
        seeds: Seeds, in the order of the runs.
        interval: Optimizer steps between updates of CaRot's teacher.
        command: What made the report.
        seconds: Of all cells together, and of this call.
        quick: Whether the runs were shortened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, list[Metrics]] = {
        method: [run["metrics"] for run in by_seed] for method, by_seed in runs.items()
    }
    for method, by_seed in sweeps.items():
        metrics[method] = [at_alpha(rows, 0.5) for rows in by_seed]
    costs = {name: step_seconds(by_seed) for name, by_seed in runs.items() if name != "zero-shot"}
    write_csv(folder / "results.csv", metrics, seeds)
    draw_figures(folder, suite, runs, metrics, {method: by_seed[0] for method, by_seed in sweeps.items()})
    draw_pareto(folder, metrics, costs)
    published = suite.name == "imagenet"
    parts = [
        f"# CaRot's tables and figures on `{suite.name}`",
        *introduction(suite, smoothings, seeds, command, seconds, quick),
        "## Table 1: methods",
        means(titled(metrics, TITLES), COLUMNS),
        *(text for name, text in FURTHER_TEXT.items() if name in metrics),
        *(published_table(CAROT, TITLES, list(COLUMNS)) if published else []),
        *intervals_table(metrics, interval, published=published),
        *under_shift(metrics),
        *(later_tables() if published else []),
        *(["## Does CaRot beat FLYP here?", paired(metrics["carot"], metrics["flyp"])] if "carot" in metrics else []),
        *against_flyp(metrics, costs),
        "## Figures",
        "First seed. Bars: accuracy in each bin of confidence; hatched: the gap to the mean confidence.",
        *(f"{title}\n\n![{title}]({name})" for name, title in FIGURES.items()),
    ]
    page = folder / "README.md"
    write_whole(page, "\n\n".join(parts) + "\n")
    return page


def titled(metrics: Mapping[str, Sequence[Metrics]], titles: Mapping[str, str]) -> dict[str, Sequence[Metrics]]:
    """The runs of those methods that there are, by title."""
    return {title: metrics[name] for name, title in titles.items() if name in metrics}


def intervals_table(metrics: Mapping[str, Sequence[Metrics]], interval: int, *, published: bool) -> list[str]:
    """Table 2, of the rows that were run; nothing if none was."""
    rows, columns = titled(metrics, INTERVALS), dict(list(COLUMNS.items())[:4])
    if not rows:
        return []
    title = f"## Table 2: steps between updates of the teacher (default {interval})"
    theirs = published_table(CAROT_INTERVALS, INTERVALS, list(columns)) if published else []
    return [title, means(rows, columns), *theirs]


def under_shift(metrics: Mapping[str, Sequence[Metrics]]) -> list[str]:
    """The section on calibration where the data shift; without density where nothing could keep a bank."""
    every = [run for name, by_seed in metrics.items() for run in by_seed if name != "vrf"]  # it is no single model
    measured = {title: key for title, key in SHIFT_COLUMNS.items() if all(key in run for run in every)}
    text = " ".join(part for name, part in SHIFT_TEXT.items() if f"shifted: {name}" in measured)
    parts = ["## ECE where the data shift", text, f"![{BY_SET}](ece_by_set.png)"]
    parts.append(means(titled(metrics, TITLES), measured))
    if "shifted: density" in measured:
        parts.append(ratios({TITLES[name]: metrics[name] for name in ("ft", "flyp", "carot") if name in metrics}))
    return parts


def step_seconds(runs: Sequence[Mapping[str, Any]]) -> float:
    """Seconds a step of the fastest seed, evaluations and checkpoints included: others waited for what ran beside."""
    return float(min(run["training"]["seconds"] / max(1, run["training"]["steps"]) for run in runs))


def against_flyp(metrics: Mapping[str, Sequence[Metrics]], costs: Mapping[str, float]) -> list[str]:
    """Each method minus FLYP, seed by seed: what wins at home, under shift and in ECE, and what it costs."""
    if "flyp" not in metrics:
        return []
    columns = {"home acc": 1, "shifted acc": 1, "shifted ECE": -1, "shifted ECE, T": -1, "shifted: density": -1}
    keys = {**COLUMNS, **SHIFT_COLUMNS}
    cells = [["minus FLYP", *columns, "step / FLYP's"]]
    for name, title in TITLES.items():
        if name == "flyp" or len(metrics.get(name, ())) != len(metrics["flyp"]):
            continue
        row = [title]
        for column, better in columns.items():
            pairs = list(zip(metrics[name], metrics["flyp"], strict=True))
            if any(keys[column] not in run for pair in pairs for run in pair):
                row.append("")
                continue
            differences = [a[keys[column]] - b[keys[column]] for a, b in pairs]
            mark = {1: " better", -1: " worse", 0: ""}[verdict(differences, better)]
            row.append(number(differences, sign="+") + mark)
        cells.append([*row, f"{costs[name] / costs['flyp']:.2f}" if name in costs else ""])
    return [
        "## Each method beside FLYP",
        "Differences seed by seed, with their 95 % interval; *better* and *worse* where it leaves out 0. No correction "
        "for the number of comparisons: of twenty, one is expected to be so by chance. Seconds a step are those of "
        "each one's fastest seed; runs share the machine, so only large ratios mean something.",
        table(cells),
        "![What is traded](pareto.png)",
    ]


def draw_pareto(folder: Path, metrics: Mapping[str, Sequence[Metrics]], costs: Mapping[str, float]) -> None:
    """Write the picture of what accuracy under shift costs in ECE and in time."""
    shifted = {name: mean(metrics[name], COLUMNS["shifted acc"]) for name in TITLES if name in metrics}
    eces = {TITLES[n]: (mean(metrics[n], COLUMNS["shifted ECE, T"]), accuracy) for n, accuracy in shifted.items()}
    points = {"ECE under shift, T of home": eces}
    if "flyp" in costs:
        points["seconds a step / FLYP's"] = {
            TITLES[n]: (costs[n] / costs["flyp"], accuracy) for n, accuracy in shifted.items() if n in costs
        }
    with whole_file(folder / "pareto.png") as beside:
        pareto(points, "accuracy under shift").savefig(beside, dpi=80)


def later_tables() -> list[str]:
    """Published figures of the methods since, a table a paper: the same method has others in each."""
    parts = ["## Published since"]
    for source, rows in LATER.items():
        parts += [f"{source}:", as_published(rows, TITLES, ["home acc", "shifted acc"])]
    return parts


def ratios(rows: Mapping[str, Sequence[Metrics]]) -> str:
    """What is left of the ECE under shift by density, by that of the temperature of home and of the oracle's."""
    cells = [["", "shifted: density / home T", "shifted: density / oracle", "home: density - home T"]]
    for title, runs in rows.items():
        ood = [[run[f"eval_ood_ece{end}"] for run in runs] for end in ("_dts", "_ts", "_oracle")]
        home = [run["eval_id_ece_dts"] - run["eval_id_ece_ts"] for run in runs]
        shares = [[a / b for a, b in zip(ood[0], other, strict=True)] for other in ood[1:]]
        cells.append([title, *(number(share, 2) for share in shares), number(home)])
    return table(cells)


def introduction(
    suite: ShiftSuite,
    smoothings: Mapping[str, Mapping[float, float]],
    seeds: Sequence[int],
    command: str,
    seconds: tuple[float, float],
    quick: bool,
) -> list[str]:
    """What the figures are of and how they were made, a paragraph each."""
    chosen = ", ".join(
        f"{TITLES[method]} {min(scores, key=scores.__getitem__):g} (validation NLL "
        + ", ".join(f"{eps:g}: {score:.4f}" for eps, score in scores.items())
        + ")"
        for method, scores in smoothings.items()
    )
    parts = []
    if suite.name == "digits":
        parts.append("A demonstration on small images of digits, not evidence for ImageNet. Nothing was tuned on it.")
    if quick:
        parts.append("**Quick**: shortened runs and a fixed label smoothing; for a look at the page, not its figures.")
    return [
        *parts,
        f"    {command}",
        f"Seeds {', '.join(map(str, seeds))}. Cells {seconds[0] / 60:.0f} min of computing in all, this call "
        f"{seconds[1] / 60:.0f} min. carot_hf {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}.",
        f"Home (`id` in results.csv): {suite.test.name}. Shifted (`ood` there): unweighted mean over "
        f"{', '.join(suite.shifts)}. ECE: 10 bins, whole set. "
        "T: with a temperature fitted on the validation set. Values are means over the seeds, ± half of a 95 % "
        f"interval (Student's t). Label smoothing by the validation NLL of the first seed: {chosen}.",
    ]


FURTHER_TEXT = {
    "model-stock": "Model Stock (Jang et al. 2024) merges the FT runs of two seeds, each with the next. Pairs that "
    "share a run are no independent repeats: its interval is too narrow.",
    "vrf": "VRF (Zhu et al. 2024) mixes the probabilities of ZS and FT, each at its temperature of home, image by "
    "image, with the published a = 1.5 and b = 0.6; its columns T are those at one more temperature of the mixture.",
}
SHIFT_TEXT = {
    "home T": "home T: fitted on the validation set.",
    "perturbed T": "perturbed T: on perturbed copies of it, too.",
    "density": "density: a temperature for each image, by how near it is to those of the training.",
    "oracle": "oracle: the one temperature that is best for the shifted sets, by their labels: a bound, and no method.",
}
BY_SET = "ECE by set: without a temperature, and with each of these"
FIGURES = {
    "figure1.png": "Figure 1: the home test set, without temperature scaling",
    "figure2.png": "Figure 2: a shifted set, without temperature scaling",
    "figure4.png": "Figure 4: all sets, without temperature scaling",
    "figure5.png": "Figure 5: all sets, with temperature scaling",
    "scatter.png": "Accuracy at home and under shift; the lines are WiSE-FT's, alpha 0 to 1, first seed",
}


def at_alpha(rows: Sequence[Metrics], alpha: float) -> Metrics:
    """The row of a sweep with this alpha, or the only one of a merge without any."""
    return next(row for row in rows if abs(row.get("alpha", alpha) - alpha) < 1e-9)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; nan for a single value.

    Source:
        Student's t with n - 1 degrees of freedom.
    """
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return mean, math.nan
    return mean, float(student_t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def mean(runs: Sequence[Metrics], key: str) -> float:
    """Mean of a metric over the seeds."""
    return mean_and_half_width([run[key] for run in runs])[0]


def verdict(differences: Sequence[float], better: int) -> int:
    """Say 1 where the interval of differences is on the better side of 0, -1 where on the other, 0 where on both."""
    mean, half = mean_and_half_width(differences)
    if math.isnan(half) or abs(mean) <= half:
        return 0
    return 1 if mean * better > 0 else -1


def number(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """``mean ± half width``."""
    mean, half = mean_and_half_width(values)
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def means(rows: Mapping[str, Sequence[Metrics]], columns: Mapping[str, str]) -> str:
    """Lay out a Markdown table of means and intervals; what was not measured is left empty."""
    cells = [
        [title, *("" if key not in runs[0] else number([run[key] for run in runs]) for key in columns.values())]
        for title, runs in rows.items()
    ]
    return table([["", *columns], *cells])


def published_table(
    published: Mapping[str, Sequence[float]], titles: Mapping[str, str], columns: Sequence[str]
) -> list[str]:
    """The paper's figures, in the same order."""
    return [
        "Published (CaRot 2023; its ECE is the mean over batches of 512, compare it with `ece_batch_mean` in "
        "results.csv):",
        as_published(published, titles, columns),
    ]


def as_published(rows: Mapping[str, Sequence[float]], titles: Mapping[str, str], columns: Sequence[str]) -> str:
    """A table of figures with the digits of the papers."""
    return table([["", *columns], *([titles[name], *(f"{v:.4f}" for v in values)] for name, values in rows.items())])


def paired(ours: Sequence[Metrics], theirs: Sequence[Metrics]) -> str:
    """Differences seed by seed, with their interval, and what follows from it."""
    rows = [["CaRot - FLYP", "difference", "by seed", ""]]
    for title, better in (("shifted acc", 1), ("shifted ECE", -1), ("shifted ECE, T", -1)):
        key = COLUMNS[title]
        differences = [a[key] - b[key] for a, b in zip(ours, theirs, strict=True)]
        undecided = "undecided" if len(differences) > 1 else "one seed: undecided"
        said = {1: "CaRot is better", -1: "FLYP is better", 0: undecided}[verdict(differences, better)]
        rows.append([title, number(differences, sign="+"), ", ".join(f"{value:+.3f}" for value in differences), said])
    return table(rows)


def write_csv(path: Path, metrics: Mapping[str, Sequence[Metrics]], seeds: Sequence[int]) -> None:
    """One row a method and seed, one column a metric."""
    names = sorted({name for runs in metrics.values() for run in runs for name in run if name.startswith("eval_")})
    names = [name for name in names if not name.endswith(("_runtime", "_per_second"))]
    with whole_file(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *names])
        for method, runs in metrics.items():
            for seed, run in zip(seeds, runs, strict=False):
                shown = seed if len(runs) > 1 or method != "zero-shot" else ""
                values = [run.get(name) for name in names]
                writer.writerow([method, shown, *("" if value is None else f"{value:.6g}" for value in values)])


def draw_figures(
    folder: Path,
    suite: ShiftSuite,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, Sequence[Metrics]],
    sweeps: Mapping[str, Sequence[Metrics]],
) -> None:
    """Write the reliability grids and the scatter."""
    methods = [name for name in ("zero-shot", "ft", "flyp", "carot") if name in runs]
    sets = [suite.test.name, *suite.shifts]

    def grid(names: Sequence[str], key: str) -> dict[str, dict[str, CalibrationBins]]:
        return {
            name: {TITLES[method]: CalibrationBins.from_dict(runs[method][0][key][name]) for method in methods}
            for name in names
        }

    shifted = next((name for name in suite.shifts if name.endswith("-r")), next(iter(suite.shifts)))
    for name, tables in {
        "figure1.png": grid(sets[:1], "bins"),
        "figure2.png": grid([shifted], "bins"),
        "figure4.png": grid(sets, "bins"),
        "figure5.png": grid(sets, "bins_ts"),
    }.items():
        with whole_file(folder / name) as beside:
            reliability_grid(tables).savefig(beside, dpi=60)
    series = {**demo.SERIES, "oracle": "_oracle"}
    panels = {TITLES[method]: demo.eces_by_set(metrics[method], sets, series) for method in methods}
    with whole_file(folder / "ece_by_set.png") as beside:
        ece_by_set(panels).savefig(beside, dpi=80)
    points = {
        title: (mean(by_seed, "eval_id_accuracy"), mean(by_seed, "eval_ood_accuracy"))
        for title, by_seed in titled(metrics, TITLES).items()
    }
    curves = {
        TITLES.get(method, method): [(row["eval_id_accuracy"], row["eval_ood_accuracy"]) for row in rows]
        for method, rows in sweeps.items()
        if method in ("wise-ft", "wise-carot")
    }
    with whole_file(folder / "scatter.png") as beside:
        id_ood_scatter(points, curves).savefig(beside, dpi=80)
