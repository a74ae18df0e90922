"""The picture at the top of the README: ECE before and after calibration, drawn from the table of a report.

python examples/draw_results.py docs/digits/results.csv docs/results.svg
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A row of the picture: what it is called, the method of the table, the ending of its metrics after calibration.
ROWS = (
    ("zero-shot + T", "zero-shot", "_ts"),
    ("FLYP + T", "flyp", "_ts"),
    ("CaRot + T", "carot", "_ts"),
    ("CaRot + density", "carot", "_dts"),
)
SIDES = {"id": "home: data like those of the training", "ood": "shifted: the mean of five other sets"}
WORSE, BETTER, BEFORE = "#D55E00", "#00785A", "#555555"
WIDTH = 688 / 96  # inches: the pixels that a README has on GitHub


def measured(path: Path) -> dict[str, list[tuple[str, float, float]]]:
    """Read rows ``(name, ECE before, ECE after)`` by side, means over the seeds, out of a report's results.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))

    def mean(method: str, column: str) -> float:
        return statistics.fmean(float(row[column]) for row in table if row["method"] == method)

    return {
        side: [
            (name, mean(method, f"eval_{side}_ece"), mean(method, f"eval_{side}_ece{end}"))
            for name, method, end in ROWS
        ]
        for side in SIDES
    }


def dumbbells(sides: Mapping[str, Sequence[tuple[str, float, float]]]) -> Figure:
    """One panel a side, one row a method: a ring before, a disc after (green: better, orange: worse), both numbers."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    panels = figure.subplots(1, len(sides), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (side, rows) in zip(panels, sides.items(), strict=True):
        for height, (name, before, after) in enumerate(rows):
            draw_row(ax, height, before, after, f"{side} {name}")
        ax.set_title(SIDES[side], fontsize=10.5)
        ax.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=10.5)
        ax.set_xticks([0, 0.04, 0.08, 0.12], ["0", ".04", ".08", ".12"])
        ax.grid(alpha=0.3, axis="x")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(len(ROWS) - 0.4, -0.6)
    panels[0].set_xlim(-0.024, 0.134)
    figure.supxlabel(
        "ECE, 0 is calibrated.   \N{WHITE CIRCLE} before,  \N{BLACK CIRCLE} after calibration", fontsize=10.5
    )
    return figure


def draw_row(ax: Axes, height: int, before: float, after: float, name: str) -> None:
    """Draw a dumbbell whose two marks carry the values as their ids."""
    color, outwards = (WORSE, 1) if after > before else (BETTER, -1)
    ax.plot([before, after], [height, height], color=color, linewidth=2.5, zorder=1)
    marks = (("before", before, BEFORE, "white", -outwards), ("after", after, color, color, outwards))
    for when, value, edge, face, direction in marks:
        (mark,) = ax.plot(value, height, "o", markersize=8, markeredgecolor=edge, markerfacecolor=face)
        mark.set_gid(f"{name} {when} {value:.6f}")
        ax.annotate(
            f"{value:.3f}".lstrip("0"),
            (value, height),
            xytext=(7 * direction, 0),
            textcoords="offset points",
            ha="left" if direction > 0 else "right",
            va="center",
            fontsize=9.5,
            color=edge,
        )


def main(arguments: Sequence[str]) -> None:
    """Draw the table that is named first into the SVG that is named second."""
    if len(arguments) != 2:
        raise SystemExit("Expected a results.csv and the SVG to write. " + str(__doc__).splitlines()[2])
    with matplotlib.rc_context({"svg.hashsalt": "carot_hf"}):  # the same ids each time
        figure = dumbbells(measured(Path(arguments[0])))
        figure.savefig(arguments[1], facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
