"""Figures of each class of a set, and which classes are taken for which. numpy only."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..basics.escape import markdown, printable, table

COLUMNS = ("set", "class", "n", "recall", "precision", "gap")


@dataclass(frozen=True, eq=False)
class ClassFigures:
    """Figures of the ``K`` labels of a set, in their order.

    Attributes:
        names: Of the labels.
        count: ``(K,)`` int64, images of the class.
        recall: ``(K,)`` share of these that are recognised; nan of a class without images.
        precision: ``(K,)`` share of the images that are taken for the class and are of it; nan of one that is never
            predicted.
        gap: ``(K,)`` mean confidence less the recall, over the images of the class: above 0 the model is too sure of
            what it says of them, whatever class it takes them for; nan of a class without images.
    """

    names: Sequence[str]
    count: NDArray[np.int64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    gap: NDArray[np.float64]

    def worst(self, most: int | None = None) -> list[int]:
        """Return the classes with images by their recall, the lowest first, equal ones in their order.

        Args:
            most: So many; ``None``: all.
        """
        order = np.argsort(self.recall, kind="stable")  # nan comes last
        return [int(label) for label in order if self.count[label]][:most]

    def cells(self, label: int) -> list[str]:
        """Number, recall, precision and gap of a class; what there is none of is empty."""
        figures = (self.recall[label], self.precision[label], self.gap[label])
        return [str(int(self.count[label])), *("" if np.isnan(value) else f"{value:.4f}" for value in figures)]


def class_figures(
    labels: NDArray[np.int32],
    predicted: NDArray[np.int32],
    confidences: NDArray[np.floating],
    names: Sequence[str],
) -> ClassFigures:
    """Compute the figures of each class.

    Args:
        labels: ``(n,)`` in ``[0, K)``, as ``predicted``.
        predicted: ``(n,)``.
        confidences: ``(n,)`` probability of the predicted class.
        names: ``K`` names.
    """
    classes = len(names)
    count = np.bincount(labels, minlength=classes)
    taken = np.bincount(predicted, minlength=classes)
    right = np.bincount(labels[labels == predicted], minlength=classes)
    sure = np.bincount(labels, confidences.astype(np.float64), minlength=classes)
    with np.errstate(invalid="ignore"):
        return ClassFigures(names, count.astype(np.int64), right / count, right / taken, (sure - right) / count)


def most_confused(labels: NDArray[np.int32], predicted: NDArray[np.int32], classes: int, most: int) -> list[int]:
    """Return the classes with the most errors, in their order: images of them taken for others, and the reverse.

    Args:
        labels: ``(n,)`` in ``[0, K)``, as ``predicted``.
        predicted: ``(n,)``.
        classes: ``K``.
        most: So many; of equal ones the first.
    """
    wrong = labels != predicted
    errors = sum(np.bincount(part[wrong], minlength=classes) for part in (labels, predicted))
    return sorted(np.argsort(-np.asarray(errors), kind="stable")[:most].tolist())


def confusion_shares(
    labels: NDArray[np.int32], predicted: NDArray[np.int32], classes: int, shown: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Return how the images of each class (rows) are shared out among the classes that they are taken for.

    Args:
        labels: ``(n,)`` in ``[0, K)``, as ``predicted``.
        predicted: ``(n,)``.
        classes: ``K``.
        shown: ``m`` classes; ``None``: all.
    Returns:
        ``(m, m)`` shares of all images of the class of the row, nan where it has none. With some classes left out a row
        need not add up to 1.
    """
    chosen = np.arange(classes) if shown is None else np.asarray(shown)
    places = np.full(classes, -1, np.int64)
    places[chosen] = np.arange(len(chosen))
    row, column = places[labels], places[predicted]
    both = (row >= 0) & (column >= 0)
    counts = np.bincount(row[both] * len(chosen) + column[both], minlength=len(chosen) ** 2)
    with np.errstate(invalid="ignore"):
        return counts.reshape(len(chosen), -1) / np.bincount(labels, minlength=classes)[chosen, None]


def per_class_csv(sets: Mapping[str, ClassFigures]) -> str:
    """Return a row for each class of each set, in the order of both."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, figures in sets.items():
        for label, title in enumerate(figures.names):
            writer.writerow([name, printable(title), *figures.cells(label)])
    return text.getvalue()


def per_class_table(figures: ClassFigures, most: int | None = None) -> str:
    """Return a Markdown table of the classes with the lowest recall.

    Args:
        figures: Of a set.
        most: Rows; ``None``: all classes with images.
    """
    rows = [[*COLUMNS[1:]]]
    for label in figures.worst(most):
        count, *rest = figures.cells(label)
        rows.append(
            [markdown(figures.names[label]), f"{int(count):,}", *(cell and f"{float(cell):.3f}" for cell in rest)]
        )
    return table(rows)
