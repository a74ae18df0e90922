"""Figures of each group of a set: of how many images, how often right, how well calibrated. numpy only."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..basics.escape import markdown, printable, table
from ..data.groups import Groups
from ..ece.binning import calibration_bins

COLUMNS = ("set", "group", "n", "accuracy", "ece")


@dataclass(frozen=True)
class GroupFigures:
    """Figures of one group.

    Attributes:
        name: Of the group.
        n: Its images. The ECE of few is high by chance, whatever the model: it means nothing without this number.
        accuracy: nan of a group without images, as ``ece``.
        ece: Of its images alone.
    """

    name: str
    n: int
    accuracy: float
    ece: float


def group_figures(
    groups: Groups, confidences: NDArray[Any], hits: NDArray[np.bool_], n_bins: int
) -> list[GroupFigures]:
    """Compute the figures of each group, in their order.

    Args:
        groups: Of ``n`` images.
        confidences: ``(n,)`` probability of the predicted class.
        hits: ``(n,)``, whether it is right.
        n_bins: Confidence bins.
    """
    found = []
    for number, name in enumerate(groups.names):
        own = groups.codes == number
        if not own.any():
            found.append(GroupFigures(name, 0, math.nan, math.nan))
            continue
        bins = calibration_bins(confidences[own], hits[own], n_bins)
        found.append(GroupFigures(name, int(own.sum()), bins.avg_accuracy, bins.ece))
    return found


def groups_csv(sets: Mapping[str, list[GroupFigures]]) -> str:
    """Return a row for each group of each set, in the order of both; what there is none of is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, figures in sets.items():
        writer.writerows([name, printable(one.name), one.n, *map(_cell, (one.accuracy, one.ece))] for one in figures)
    return text.getvalue()


def groups_table(figures: list[GroupFigures]) -> str:
    """Return a Markdown table of groups, the lowest accuracy first."""
    there = sorted((one for one in figures if one.n), key=lambda one: one.accuracy)
    rows = [[markdown(one.name), f"{one.n:,}", f"{one.accuracy:.3f}", f"{one.ece:.3f}"] for one in there]
    return table([[*COLUMNS[1:]], *rows])


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
