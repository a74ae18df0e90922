"""One split of a source as a set: its columns found, its labels as class indices, its size known."""

from __future__ import annotations

import logging
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from ..basics.escape import guarded
from ..data.columns import image_column, is_text, label_column
from ..data.labels import ClassNames, LabelTable
from ..data.shift_set import ShiftSet
from ..data.stream import StreamedSet, count_rows, shard_rows
from .rows import check_labels, hold_out

logger = guarded(logging.getLogger(__name__))

_SHOWN = 3  # missing files that an error names


def as_set(
    rows: Any,
    *,
    name: str,
    num_classes: int,
    label_names: Sequence[str] | ClassNames = (),
    columns: Sequence[Sequence[int]] | None = None,
    published: tuple[int, int] | None = None,
    in_order: bool = False,
    image: str | None = None,
    label: str | None = None,
    **options: Any,
) -> ShiftSet:
    """Make a set of the rows that `open_source` opened.

    Args:
        rows: A ``datasets.Dataset`` or ``IterableDataset``, images undecoded.
        name: Short name of the set.
        num_classes: Number of training classes.
        label_names: What the names in the label column may be, in the order of the set's labels, e.g. wnids; none: the
            labels are numbers, those of a ``ClassLabel`` its own.
        columns: For each label of the set the training classes it stands for; ``None``: all, one to one.
        published: Rows and labels that the set must have; ``None``: any.
        in_order: The order of the labels is published: numbers of a ``ClassLabel`` with other names stand.
        image: Column of the images; ``None``: the only one there is.
        label: Column of the labels; ``None``: ``label``, ``labels``, ``cls`` or ``wnid``.
        **options: Further options of `ShiftSet`.
    Returns:
        A `ShiftSet`, or a `StreamedSet` of a stream. The rows of a stream are counted unless they are published.
    Raises:
        ValueError: If a column is missing, or rows and labels are not as published.
    """
    image, label = image or image_column(rows), label or label_column(rows)
    captions = [options["caption_column"]] if options.get("caption_column") else []
    for column in (image, label, *captions):
        if column not in rows.features:
            raise ValueError(
                f"Expected a column {column!r} in '{name}', got {sorted(rows.features)}. Correct its name."
            )
    num_labels = num_classes if columns is None else len(columns)
    own = getattr(rows.features[label], "names", None)
    table = LabelTable(own, label_names, f"'{name}', column {label!r},", published=in_order)
    if own is not None and not table.looks_up and len(own) != num_labels:
        raise ValueError(
            f"Expected a ClassLabel of {num_labels} names in '{name}', one for each of its labels, got one of "
            f"{len(own)} ({own[:3]} ...), not all of them class names. Name all of them in `class_names` in order, or "
            "pass `columns`."
        )
    common = {"name": name, "num_classes": num_classes, "columns": columns, "image_column": image, **options}
    if not hasattr(rows, "__len__"):
        size = count_rows(rows.select_columns([label])) if published is None else published[0]
        return StreamedSet(rows.select_columns([image, label]), size=size, to_label=table, label_column=label, **common)
    _check_paths(rows, image, name, options.get("image_root"), options.get("image_roots"))
    values = list(rows.with_format(None)[label])
    labels = table.all(values)
    if published is not None:
        check_labels(name, labels, *published)
    made = ShiftSet(rows.select_columns([image, *captions]).add_column("label", labels), labels=labels, **common)
    made.read_by_name = table.finds_names(values)
    return made


def _check_paths(rows: Any, image: str, name: str, image_root: Any, image_roots: Any) -> None:
    """Look after the files that a table names, if it does, before anything is trained."""
    if image_root is not None and is_text(rows.features[image]):
        paths = list(rows.with_format(None)[image])
        _check_files(paths, image_root, name)
        places = ShiftSet(paths, name=name, num_classes=1, image_root=image_root, image_roots=image_roots)
        for row, path in enumerate(paths):
            places.located(path, f"index {row}")  # refuses what lies elsewhere


def _check_files(paths: Sequence[Any], root: Path, name: str) -> None:
    """Refuse a table that names files which are not there."""
    missing = [row for row, path in enumerate(paths) if not (isinstance(path, str) and (root / path).is_file())]
    if missing:
        listed = ", ".join(f"row {row}: {root / str(paths[row])}" for row in missing[:_SHOWN])
        raise ValueError(
            f"Expected the images of '{name}' to be there, got none for {len(missing):,} of its {len(paths):,} images "
            f"({listed}{', ...' if len(missing) > _SHOWN else ''}). Relative paths are relative to the table's folder, "
            f"{root}: correct them, or drop these rows."
        )


def split_off(data: ShiftSet, share: float, seed: int, *, balanced: bool = False) -> tuple[ShiftSet, ShiftSet]:
    """Split a set into one to train on and a share of each class, ``validation``, as `hold_out` does.

    Raises:
        ValueError: If the labels are not known, or no class has two rows.
    """
    if data.labels is None:
        raise ValueError(f"Expected a set whose labels are known, got '{data.name}'. Pass a validation set instead.")
    kept, held = hold_out(data.labels, share, seed, balanced=balanced)
    return data.subset(kept, "train"), data.subset(held, "validation")


def hold_out_of_stream(data: StreamedSet, *, share: float, classes: int, seed: int, key: str | None) -> ShiftSet:
    """Take a class-balanced share out of a stream, in place, and return it as a set of its own.

    Files are read in an order drawn with the seed until each class has given ``round(share * rows / classes)`` rows,
    and these are kept in the cache of `datasets`, so it is done once. From shuffled files (ImageNet-1K's) about this
    share of the files is read; from files sorted by class all of them.

    Args:
        data: The stream to train on; the rows are left out of it and its length.
        share: Of all rows, in (0, 1).
        classes: Labels that the set has.
        seed: Of the order of the files.
        key: Says which rows these are, such as a commit: another one for every change. ``None``: it is not known, and
            nothing is reused.
    Raises:
        ValueError: If a class has fewer rows than it must give, or none would be left to train on.
    """
    image, label = data.image_column, str(data.label_column)
    quota = max(1, round(share * len(data) / classes))
    if len(data) < 2 * quota * classes:
        raise ValueError(
            f"Expected at least {2 * quota * classes} rows to hold {quota} of each of {classes} classes out of "
            f"'{data.name}', got {len(data)}. Load it without `streaming`, or pass a validation set of its own."
        )
    if key is None:
        logger.warning(
            "The revision of '%s' could not be learned: its validation set is read anew, now and in the next run.",
            data.name,
        )
        key = uuid.uuid4().hex
    numbers = {name: datasets.Value("int64") for name in ("label", "file", "position")}
    features = datasets.Features({"image": datasets.Image(decode=False), **numbers})
    fingerprint = Hasher.hash([key, quota, classes, seed, data.rows.num_shards, image, label])
    try:
        held = datasets.Dataset.from_generator(
            partial(_balanced_rows, data, quota, classes, seed), features=features, fingerprint=fingerprint
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ if isinstance(error.__cause__, ValueError) else error) from None
    left_out: dict[int, set[int]] = defaultdict(set)
    for file, position in zip(held["file"], held["position"], strict=True):
        left_out[file].add(position)
    data.leave_out(left_out)
    reading = {**data.reading, "image_column": "image", "label_column": "label"}
    return ShiftSet(held.select_columns(["image", "label"]), name="validation", num_classes=data.num_classes, **reading)


def _balanced_rows(data: StreamedSet, quota: int, classes: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield so many rows of each class, from files in an order drawn with the seed."""
    logger.info("Reading the stream of '%s' for %d rows of each of %d classes", data.name, quota, classes)
    image, label = data.image_column, str(data.label_column)
    taken: Counter[int] = Counter()
    full = 0
    for file in np.random.default_rng(seed).permutation(data.rows.num_shards).tolist():
        for position, item in enumerate(shard_rows(data.rows, file)):
            value = data.to_label(item[label])
            if taken[value] < quota:
                taken[value] += 1
                full += taken[value] == quota
                yield {"image": item[image], "label": value, "file": file, "position": position}
        if full == classes:
            return
    raise ValueError(
        f"Expected {quota} rows of each of {classes} classes to hold out of '{data.name}', got {full} classes with "
        "so many. Check the labels, or pass a smaller share."
    )
