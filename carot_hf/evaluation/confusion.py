"""The picture of which classes are taken for which: a confusion matrix for each set."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..basics.escape import printable
from ..basics.whole_file import whole_file
from .per_class import confusion_shares, most_confused
from .per_image import PerImage
from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL = 30  # classes that are drawn; of more the most confused ones are
SOME = 20
_NUMBERED = 12  # classes up to which the shares are written into the cells
_COLUMNS = 3
_EMPTY = "#D4D4D4"
_LONGEST = 22  # characters of a name


def confusion_figure(sets: Mapping[str, tuple[PerImage, Sequence[str]]]) -> Figure:
    """Draw the confusion matrix of each set: rows are the right classes, columns those that are predicted.

    Cells are shares of the images of the row; a row without images is grey. Of more than 30 classes the 20 with the
    most errors are drawn, as the title says.

    Args:
        sets: By name what was said of each image, and the names of its labels.
    Returns:
        A new figure.
    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no set.
    """
    if not sets:
        raise ValueError("Expected at least one set, got none. Pass {name: (per_image, names)}.")
    columns = min(_COLUMNS, len(sets))
    rows = -(-len(sets) // columns)
    widest = max(len(names) if len(names) <= ALL else SOME for _, names in sets.values())
    side = max(3.2, 0.24 * widest) + 1.3
    figure = new_figure((side * columns + 0.8, side * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(sets) :]:
        ax.set_axis_off()
    for ax, (name, (part, names)) in zip(axes.flat, sets.items(), strict=False):
        drawn = _draw(ax, name, part, names)
    figure.colorbar(drawn, ax=axes, label="share of the images of the class", shrink=0.6)
    return figure


def write_confusion(path: str | Path, sets: Mapping[str, tuple[PerImage, Sequence[str]]]) -> None:
    """Write the picture, whole or not at all; see `confusion_figure`."""
    figure = confusion_figure(sets)
    with whole_file(path) as beside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name in a script that the font does not have
        figure.savefig(beside, dpi=100)


def _draw(ax: Axes, name: str, part: PerImage, names: Sequence[str]) -> Any:
    """One matrix."""
    classes = len(names)
    some = classes > ALL
    shown = most_confused(part.labels, part.predicted, classes, SOME) if some else list(range(classes))
    shares = confusion_shares(part.labels, part.predicted, classes, shown)
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set_facecolor(_EMPTY)
    title = f"{name}: {len(shown)} most confused of {classes:,} classes" if some else name
    ax.set_title(title, fontsize="medium")
    ax.set(xlabel="predicted", ylabel="class")
    labels = [_plain(names[label]) for label in shown]
    ax.set_xticks(range(len(shown)), labels, rotation=90, fontsize="x-small")
    ax.set_yticks(range(len(shown)), labels, fontsize="x-small")
    if len(shown) <= _NUMBERED:
        for row, column in np.argwhere(shares >= 0.005):
            share = shares[row, column]
            color = "white" if share > 0.5 else "black"
            ax.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color=color)
    return image


def _plain(name: str) -> str:
    """A name of a stranger as matplotlib shows it as it is: no formula begins in it, and it is not too long."""
    text = printable(name)
    return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...").replace("$", r"\$")
