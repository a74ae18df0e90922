"""What is traded for what: one mark a method, and those that no other one beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .plots import mark_of, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names that no other point beats: with less of the first and at least as much of the second, or so.

    Args:
        points: ``{name: (less is better, more is better)}``.
    Returns:
        In order of the first number.
    """

    def beaten(cost: float, gain: float) -> bool:
        return any(a <= cost and b >= gain and (a, b) != (cost, gain) for a, b in points.values())

    return sorted((name for name, point in points.items() if not beaten(*point)), key=lambda name: points[name])


def pareto(panels: Mapping[str, Mapping[str, tuple[float, float]]], gain: str) -> Figure:
    """Draw a panel for each cost, beside each other: its number to the right, the gain upwards.

    Args:
        panels: ``{what less of is better: {method: (cost, gain)}}``. A method has one mark in all panels; those of the
            front are joined by a line, and their names stand in bold in the legend of the first panel.
        gain: What more of is better.
    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no point.
    """
    if not any(panels.values()):
        raise ValueError("Expected a point, got none. Pass {cost: {method: (cost, gain)}}.")
    names: Sequence[str] = list(dict.fromkeys(name for points in panels.values() for name in points))
    figure = new_figure((4.4 * len(panels) + 2.2, 4.4))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    best = set(front(next(iter(panels.values()))))
    for ax, (cost, points) in zip(axes, panels.items(), strict=True):
        edge = [points[name] for name in front(points)]
        ax.plot(*zip(*edge, strict=True), color="0.6", linewidth=1, zorder=1)
        for index, name in enumerate(names):
            if name in points:
                color, marker = mark_of(index)
                ax.plot(*([value] for value in points[name]), color=color, marker=marker, linestyle="none", label=name)
        ax.set(xlabel=f"{cost} (less is better)")
        ax.grid(alpha=0.3)
    axes[0].set(ylabel=f"{gain} (more is better)")
    marks = {line.get_label(): line for ax in axes for line in ax.get_lines() if line.get_label() in names}
    shown = [marks[name] for name in names]  # of all panels: not every method has every cost
    legend = axes[-1].legend(handles=shown, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text() in best else "normal")
    return figure
