"""Rows whose label is a list of right ones, as rows of one label and what is right beside them."""

from __future__ import annotations

from typing import Any

import datasets

from ...data.columns import label_column
from ...data.right_labels import RightLabels
from ...data.stream import shard_rows


def with_one_label(rows: Any, num_labels: int, name: str) -> tuple[Any, RightLabels]:
    """Return the rows with the smallest label of each image in the column of labels, and all that are right.

    Args:
        rows: A ``datasets.Dataset`` or ``IterableDataset``. A stream is read through once for its labels.
        num_labels: Labels are in ``[0, num_labels)``.
        name: Of the set, for errors.
    Raises:
        ValueError: As `RightLabels` does.
    """
    column = label_column(rows)
    features = datasets.Features({**rows.features, column: datasets.Value("int64")})
    if hasattr(rows, "__len__"):
        right = RightLabels(list(rows.with_format(None)[column]), num_labels, name)
        return rows.remove_columns(column).add_column(column, right.first), right
    alone = rows.select_columns([column])
    right = RightLabels(
        [row[column] for shard in range(rows.num_shards) for row in shard_rows(alone, shard)], num_labels, name
    )
    return rows.map(_smallest, input_columns=[column], features=features, fn_kwargs={"column": column}), right


def _smallest(labels: list[int] | int, column: str) -> dict[str, int]:
    return {column: min(labels) if isinstance(labels, list) else labels}
