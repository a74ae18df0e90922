"""Pictures of a bin table: reliability diagram, confidence histogram, and a grid of diagrams.

Everything is drawn from `carot_hf.ece.binning.CalibrationBins`, the table that the metrics were read off, and nothing
is computed anew from rows. No pyplot: figures are returned, never shown or kept; save them with ``figure.savefig``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..ece.binning import CalibrationBins
from .intervals import accuracy_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVER, UNDER = "#D55E00", "#0072B2"  # Okabe and Ito: told apart by colour-blind readers
OVER_HATCH, UNDER_HATCH = "//", "\\\\"
BAR, OVER_FACE, UNDER_FACE = "#E8E8E8", "#F1BA8F", "#5E96BC"  # light, darker, darkest: told apart in grey print
_EDGE = "#555555"
_BARS: dict[str, Any] = {"align": "edge", "linewidth": 0.8}
_LINES = ["-", "--", ":", "-."]
MARKERS = "osD^vP*X<>h8pd"
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito
_INTERVAL = "95 % interval"
FEW, FADED = 10, 0.3  # bins of fewer rows are drawn with this opacity
_TICKS = (0, 0.5, 1)  # of a grid
_NUMBERED = 20  # bins whose rows are written above the bars


@dataclass(frozen=True)
class _Words:
    """What the axes and the sides of the diagonal are called."""

    confidence: str
    accuracy: str
    mean: str
    over: str
    under: str


CONFIDENCE = _Words("confidence", "accuracy", "mean confidence", "over-confident", "under-confident")
FORECAST = _Words(
    "probability of class 1", "share of class 1", "mean probability", "forecasts too high", "forecasts too low"
)


def reliability_diagram(
    bins: CalibrationBins | Mapping[str, Any],
    *,
    title: str | None = None,
    temperature: float | None = None,
    mode: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Accuracy against confidence, bin by bin, with the confidence histogram below.

    Grey bars, as wide as their bins, are accuracies. A hatched bar spans the gap from there to the mean confidence of
    the bin: orange and rising where over-confident, blue and falling where under-confident. Empty bins are blank; bins
    of equal mass begin at the smallest confidence and end at the largest. The error bars are 95 % intervals of the
    accuracies: a gap that ends within one may be chance alone. Bins of fewer than 10 rows are faded.

    Args:
        bins: The table of `calibration_bins`, its `to_dict`, or what the metric returned with ``bins=True``.
        title: Shown above.
        mode: ``"positive"``: the confidences are probabilities of class 1, which are too high or too low, and for
            accuracies there are shares of class 1. None: as the result of the metric says, else confidences.
        temperature: Only written into the box, if the confidences are those of scaled logits.
        ax: Draw the diagram here, without the histogram. By default a new figure gets both.

    Returns:
        The new figure, or that of ``ax``.

    Raises:
        ImportError: If matplotlib is missing.
    """
    table, words = _table(bins), _words(bins, mode)
    if ax is not None:
        figure = ax.figure.figure  # the root, also of a subfigure
        _draw_reliability(ax, table, words, title, temperature)
        ax.set_xlabel(words.confidence)
        return figure
    figure = new_figure((4.8, 6.4))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_reliability(top, table, words, title, temperature)
    _draw_histogram(bottom, table, words)
    bottom.set_box_aspect(1 / 3)  # as wide as the panel above
    return figure


def confidence_histogram(
    bins: CalibrationBins | Mapping[str, Any],
    *,
    title: str | None = None,
    mode: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Share of the rows in each bin, with their number, and lines at the accuracy and the mean confidence of all rows.

    Args:
        bins: As for `reliability_diagram`.
        title: Shown above.
        ax: Draw here; by default in a new figure.

    Returns:
        The new figure, or that of ``ax``.

    Raises:
        ImportError: If matplotlib is missing.
    """
    ax = new_figure((4.8, 3.0)).subplots() if ax is None else ax
    _draw_histogram(ax, _table(bins), _words(bins, mode))
    if title is not None:
        ax.set_title(title)
    return ax.figure.figure


def reliability_grid(tables: Mapping[str, Mapping[str, CalibrationBins]], *, title: str | None = None) -> Figure:
    """Reliability diagrams side by side: a row for each data set, a column for each method.

    Many rows come in blocks beside each other, so that the picture is about as wide as it is high.

    Args:
        tables: ``{row: {column: bins}}``, e.g. ``{"ImageNet-R": {"CaRot": ..., "CaRot, T = 1.2": ...}}``. A cell that
            is missing stays blank; columns come in the order in which they are first met.
        title: Shown above.

    Returns:
        A new figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no cell.
    """
    columns = list(dict.fromkeys(column for row in tables.values() for column in row))
    if not columns:
        raise ValueError(f"Expected `tables` with at least one cell, got {tables}. Pass {{row: {{column: bins}}}}.")
    high, blocks = _grid_shape(len(tables), len(columns))
    width = blocks * len(columns)
    figure = new_figure((2.3 * width + 0.5 * blocks, 2.5 * high + 0.8))
    axes = figure.subplots(high, width, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()  # until it is drawn into
        ax.tick_params(labelleft=False, labelbottom=False)
        ax.set(xticks=_TICKS, yticks=_TICKS)
    titled: set[tuple[int, str]] = set()
    for number, (row, cells) in enumerate(tables.items()):
        block, i = divmod(number, high)
        own = axes[:, block * len(columns) : (block + 1) * len(columns)]
        for ax, column in zip(own[i], columns, strict=True):
            if column in cells:
                ax.set_axis_on()
                _draw_bars(ax, cells[column], CONFIDENCE)
                _write_box(ax, f"ECE {cells[column].ece:.3f}", size="small")
                if (block, column) not in titled:
                    ax.set_title(column)
                    titled.add((block, column))
            if i == high - 1 or number == len(tables) - 1:
                ax.set_xlabel("confidence")
                ax.tick_params(labelbottom=True)
        own[i, 0].set_ylabel(f"{row}\naccuracy")
        own[i, 0].tick_params(labelleft=True)
    handles = _handles([bins for cells in tables.values() for bins in cells.values()], CONFIDENCE)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(width, len(handles)), fontsize="small")
    if title is not None:
        figure.suptitle(title)
    return figure


def mark_of(index: int) -> tuple[str, str]:
    """Colour and shape of the mark of a method, by its number: no two of 98 have both alike, nor of 14 the shape."""
    row, place = divmod(index, len(MARKERS))
    return COLORS[(place + row) % len(COLORS)], MARKERS[place]


def id_ood_scatter(
    points: Mapping[str, tuple[float, float]],
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Accuracy under shift against accuracy at home: one mark a method, one line a sweep such as WiSE-FT's.

    Args:
        points: ``{method: (accuracy at home, accuracy under shift)}``, fractions. Marks differ in shape as
            well as in colour.
        curves: ``{name: [(at home, under shift), ...]}`` in the order of the sweep.
        title: Shown above.
        ax: Draw here; by default in a new figure.

    Returns:
        The new figure, or that of ``ax``.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no point.
    """
    if not points:
        raise ValueError("Expected at least one point, got none. Pass {method: (id_accuracy, ood_accuracy)}.")
    ax = new_figure((6.4, 4.8)).subplots() if ax is None else ax
    for line, (name, path) in zip(_LINES * len(curves or {}), (curves or {}).items(), strict=False):
        xs, ys = zip(*path, strict=True)
        label = f"{name}, sweep"
        ax.plot(xs, ys, color=_EDGE, linestyle=line, marker=".", markersize=4, zorder=1, label=label)
    for i, (name, (home, shifted)) in enumerate(points.items()):
        color, marker = mark_of(i)
        ax.plot([home], [shifted], color=color, marker=marker, linestyle="none", markersize=8, label=name)
    ax.set(xlabel="accuracy at home", ylabel="accuracy under shift (mean)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    if title is not None:
        ax.set_title(title)
    return ax.figure.figure


def ece_by_set(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], *, title: str | None = None
) -> Figure:
    """ECE of each set, before and after: one panel a model, one row a set, one mark a way to calibrate.

    Args:
        panels: ``{model: {way: {set: values}}}``, fractions; the values are those of several seeds, whose mean is
            marked and whose range is a line. Marks differ in shape as well as in colour.
        title: Shown above.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no panel.
    """
    if not panels:
        raise ValueError("Expected at least one panel, got none. Pass {model: {way: {set: [ece, ...]}}}.")
    figure = new_figure((3.2 * len(panels) + 1.4, 4.2))
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (model, ways) in zip(axes, panels.items(), strict=True):
        for i, (way, by_set) in enumerate(ways.items()):
            names, color = list(by_set), COLORS[i % len(COLORS)]
            heights = [place + 0.12 * (i - (len(ways) - 1) / 2) for place in range(len(names))]
            means = [float(np.mean(by_set[name])) for name in names]
            ax.hlines(heights, [min(by_set[n]) for n in names], [max(by_set[n]) for n in names], color=color)
            ax.plot(means, heights, color=color, marker=MARKERS[i % len(MARKERS)], linestyle="none", label=way)
        ax.set(title=model, xlabel="ECE", yticks=range(len(names)), yticklabels=names)
        ax.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    axes[0].set_xlim(left=0)  # once all is drawn: the panels share it
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    if title is not None:
        figure.suptitle(title)
    return figure


def accuracy_intervals(bins: CalibrationBins) -> NDArray[np.float64]:
    r"""Wilson's 95 % interval of the accuracy of each bin, ``(2, M)``: lowest and highest; nan where it is empty.

    It holds the mean confidence where :math:`|acc_b - conf_b| \le z \sqrt{conf_b (1 - conf_b) / n_b}`, that is where
    chance alone explains the gap of a calibrated bin: the root bounds the standard deviation of a mean of :math:`n_b`
    independent hits whose chances average :math:`conf_b`. Of weighted rows :math:`n_b` is the number that says as much.
    """
    ends = [
        accuracy_interval(accuracy * rows, rows) if rows > 0 else (np.nan, np.nan)
        for accuracy, rows in zip(bins.accuracy.tolist(), bins.rows.tolist(), strict=True)
    ]
    intervals: NDArray[np.float64] = np.array(ends).T
    return intervals


def _grid_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows of a grid, and blocks beside each other: the fewest with which it is hardly higher than wide."""
    for blocks in range(1, rows + 1):
        high = -(-rows // blocks)
        if high <= blocks * columns + 1:
            break
    return high, -(-rows // high)


def _draw_reliability(
    ax: Axes, bins: CalibrationBins, words: _Words, title: str | None, temperature: float | None
) -> None:
    """The whole upper panel: bars, legend and box."""
    _draw_bars(ax, bins, words)
    ax.set_ylabel(words.accuracy)
    ax.legend(handles=_handles([bins], words), loc="lower right", fontsize="small", framealpha=0.9)
    lines = {
        f"ECE ({bins.n_bins} bins)": f"{bins.ece:.4f}",
        words.accuracy: f"{bins.avg_accuracy:.4f}",
        words.mean: f"{bins.avg_confidence:.4f}",
        "N": f"{bins.n:,}",
    }
    if temperature is not None:
        lines["T"] = f"{temperature:.4g}"
    width = max(len(value) for value in lines.values())
    _write_box(ax, "\n".join(f"{name:16s} {value:>{width}s}" for name, value in lines.items()), size="x-small")
    if title is not None:
        ax.set_title(title)


def _draw_bars(ax: Axes, bins: CalibrationBins, words: _Words) -> None:
    """Accuracies with their intervals, gaps and diagonal on the unit square."""
    left, width, filled = *_places(bins), bins.count > 0
    faded = np.where(bins.rows < FEW, FADED, 1.0)
    for name, shown, heights, bottom, face, color, hatch in (
        (words.accuracy, filled, bins.accuracy, np.zeros(bins.n_bins), BAR, _EDGE, None),
        (words.over, filled & (bins.gap > 0), bins.gap, bins.accuracy, OVER_FACE, OVER, OVER_HATCH),
        (words.under, filled & (bins.gap < 0), bins.gap, bins.accuracy, UNDER_FACE, UNDER, UNDER_HATCH),
    ):
        if shown.any():
            ax.bar(
                left[shown],
                heights[shown],
                width[shown],
                bottom=bottom[shown],
                color=[(face, alpha) for alpha in faded[shown]],
                edgecolor=[(color, alpha) for alpha in faded[shown]],
                hatch=hatch,
                label=name,
                **_BARS,
            )
    low, high = accuracy_intervals(bins)
    # Workaround, matplotlib 3.8 and numpy 1.25: arrays of one error each make it warn; so lists. Until: 3.8 is no more.
    lengths = [np.maximum(side, 0)[filled].tolist() for side in (bins.accuracy - low, high - bins.accuracy)]
    ax.errorbar(
        (left + width / 2)[filled],
        bins.accuracy[filled],
        lengths,
        fmt="none",
        ecolor=[("black", alpha) for alpha in faded[filled]],
        elinewidth=1.2,
        label=_INTERVAL,
    )
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)


def _handles(tables: Sequence[CalibrationBins], words: _Words) -> list[Any]:
    """What the legend of diagrams shows: of what is drawn each kind once, never faded."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    line = Line2D([], [], color="black", marker="|", markersize=11, markeredgewidth=1.2, linestyle="none")
    line.set_label(_INTERVAL)
    kinds = [Patch(facecolor=BAR, edgecolor=_EDGE, label=words.accuracy), line]
    if any((bins.gap > 0).any() for bins in tables):
        kinds.append(Patch(facecolor=OVER_FACE, edgecolor=OVER, hatch=OVER_HATCH, label=words.over))
    if any((bins.gap < 0).any() for bins in tables):
        kinds.append(Patch(facecolor=UNDER_FACE, edgecolor=UNDER, hatch=UNDER_HATCH, label=words.under))
    if any(((bins.count > 0) & (bins.rows < FEW)).any() for bins in tables):
        kinds.append(Patch(facecolor=(BAR, FADED), edgecolor=(_EDGE, FADED), label=f"fewer than {FEW} rows"))
    return kinds


def _draw_histogram(ax: Axes, bins: CalibrationBins, words: _Words) -> None:
    """Shares of rows with the numbers of rows, and the two lines."""
    left, width = _places(bins)
    shares = bins.mass / bins.mass.sum()
    drawn = ax.bar(left, shares, width, color=BAR, edgecolor=_EDGE, label="rows", **_BARS)
    if bins.n_bins <= _NUMBERED:
        numbers = [f"{count:,}" if count else "" for count in bins.count.tolist()]
        ax.bar_label(drawn, numbers, fontsize="xx-small", rotation=90, padding=2)
        ax.margins(y=0.35)
    ax.axvline(bins.avg_accuracy, color="black", linewidth=1.5, label=words.accuracy)
    ax.axvline(bins.avg_confidence, color=OVER, linewidth=1.5, linestyle="--", label=words.mean)
    ylabel = "share of rows" if bins.weight is None else "share of weight"
    ax.set(xlim=(0, 1), xlabel=words.confidence, ylabel=ylabel)
    ax.legend(loc="upper left", fontsize="small", framealpha=0.9)


def _write_box(ax: Axes, text: str, *, size: str) -> None:
    """Text in the upper left corner, where a diagram has no bars unless it is under-confident."""
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": _EDGE, "alpha": 0.9}
    ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=size, family="monospace", bbox=box)


def _places(bins: CalibrationBins) -> tuple[NDArray[Any], NDArray[Any]]:
    """Left ends and widths of the bars: of bins of equal mass no further than there are rows."""
    edges = bins.edges.astype(np.float64)
    if bins.span is not None:
        edges[0], edges[-1] = bins.span
    return edges[:-1], np.diff(edges)


def _table(bins: CalibrationBins | Mapping[str, Any]) -> CalibrationBins:
    if not isinstance(bins, Mapping):
        return bins
    table = bins.get("bins", bins)
    if "edges" not in table:
        raise ValueError(
            f"Expected a table of bins, or a result of the metric that has one, got the keys {sorted(bins)}. Compute "
            "it with bins=True."
        )
    return CalibrationBins.from_dict(table)


def _words(bins: CalibrationBins | Mapping[str, Any], mode: str | None) -> _Words:
    """What confidences are called: those of a predicted class, or probabilities of class 1."""
    if mode not in (None, "top_label", "positive"):
        raise ValueError(f"Expected `mode` to be None, 'top_label' or 'positive', got {mode!r}. Pass one of these.")
    found = isinstance(bins, Mapping) and "positive_rate" in bins
    return FORECAST if mode == "positive" or (mode is None and found) else CONFIDENCE


def new_figure(size: tuple[float, float]) -> Figure:
    """Make a figure of so many inches, of no window.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib for the plots, found none. Install it with `pip install carot_hf[plot]`."
        ) from error
    return Figure(figsize=size, layout="constrained")
