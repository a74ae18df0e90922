"""The picture of a comparison: differences with their intervals, a row a set, a panel a metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..basics.whole_file import whole_file
from .plots import COLORS, MARKERS, new_figure
from .runs import Differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {"accuracy": "accuracy (higher is better)", "ece": "ECE (lower is better)"}


def forest(differences: Sequence[Differences]) -> Figure:
    """Draw the difference of each run to the first one, by set, with its 95 % interval.

    Args:
        differences: Of the further runs, all to the same first one. Marks differ in shape as well as in colour.
    Returns:
        A new figure.
    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no difference.
    """
    names = list(dict.fromkeys(name for part in differences for name in part.found))
    if not names:
        raise ValueError("Expected at least one difference, got none. Compare runs over the same images.")
    figure = new_figure((9.6, 1.6 + len(names) * (0.25 + 0.25 * len(differences))))
    axes, step = figure.subplots(1, 2, sharey=True), 0.8 / (1 + len(differences))
    for ax, (metric, label) in zip(axes, _PANELS.items(), strict=True):
        for i, part in enumerate(differences):
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            places = [names.index(name) + step * (i - (len(differences) - 1) / 2) for name in part.found]
            values = [found[metric] for found in part.found.values()]
            ax.hlines(places, [low for _, low, _ in values], [high for _, _, high in values], color=color)
            dots = [difference for difference, _, _ in values]
            ax.plot(dots, places, color=color, marker=marker, linestyle="none", label=part.run.replace("$", r"\$"))
        ax.axvline(0, color="black", linestyle="--", linewidth=1)
        ax.set(xlabel=f"difference of {label}", yticks=range(len(names)), yticklabels=names)
        ax.grid(alpha=0.3, axis="x")
    axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first set on top
    first = differences[0].first.replace("$", r"\$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"differences to {first}, with 95 % intervals")
    return figure


def write_forest(path: str | Path, differences: Sequence[Differences]) -> None:
    """Write the picture, whole or not at all; see `forest`."""
    figure = forest(differences)
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=100)
