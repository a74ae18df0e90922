"""Which column of a table holds the images, and which the labels; what stands in the others does not matter here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

LABEL_COLUMNS = ("label", "labels", "cls", "wnid")
PATH_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file", "img")  # where no column is of images
_TEXTS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")


def image_column(rows: Any) -> str:
    """Return the name of the one column of images.

    That is the only one with the feature ``Image``; if there is none, the only one of `PATH_COLUMNS` that holds paths,
    bytes, or both as a mapping.

    Raises:
        ValueError: If there is none, or more than one.
    """
    import datasets  # of rows with features; the rest of the package runs without it

    features = rows.features or {}
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        found = [name for name, kind in features.items() if name.lower() in PATH_COLUMNS and may_be_images(kind)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one column of images, got {found} among {sorted(features)}. Name it with `image_column`."
        )
    return found[0]


def label_column(rows: Any) -> str:
    """Return the first of ``label``, ``labels``, ``cls``, ``wnid`` that there is.

    Raises:
        ValueError: If there is none.
    """
    features = rows.features or {}
    if (found := found_label_column(features)) is not None:
        return found
    raise ValueError(
        f"Expected a label column called {', '.join(LABEL_COLUMNS)}, got {sorted(features)}. Name it with "
        "`label_column`."
    )


def found_label_column(names: Any) -> str | None:
    """Return the first of ``label``, ``labels``, ``cls``, ``wnid`` among some names, if there is one."""
    return next((name for name in LABEL_COLUMNS if name in names), None)


def is_text(feature: Any) -> bool:
    """Whether a column holds text, as any library writes it."""
    return getattr(feature, "dtype", None) in _TEXTS


def may_be_images(feature: Any) -> bool:
    """Whether a column without the feature ``Image`` may hold images: texts, bytes, or both in a mapping."""
    if isinstance(feature, dict):
        return {"bytes", "path"} & feature.keys() != set()
    return is_text(feature) or getattr(feature, "dtype", None) in _BYTES


def facts_of(data: Any, name: str) -> Mapping[str, Any]:
    """Return ``features`` or ``format`` of a ``datasets.Dataset``; empty of any other data, whatever it calls so."""
    found = getattr(data, name, None)
    return found if isinstance(found, Mapping) and hasattr(data, "cast_column") else {}


def column_of(data: Any, name: str) -> Any:
    """Return a column of a ``datasets.Dataset``, as plain values."""
    return list(data.with_format(None)[name])


def is_plain(labels: Any) -> bool:
    """Whether something is a list of numbers, or an array."""
    return hasattr(labels, "dtype") or all(isinstance(label, int | float) for label in labels)


def names_of(feature: Any) -> tuple[str, ...] | None:
    """Return the names of a ``ClassLabel``; ``None``: it is none."""
    names = getattr(feature, "names", None)
    return tuple(names) if isinstance(names, list | tuple) else None


def selected_rows(data: Any, rows: NDArray[np.int64]) -> Any:
    """Return some rows of any data set."""
    return data.select(rows) if hasattr(data, "select") else Subset(data, rows.tolist())


def undecoded(data: Any, image_column: str) -> Any:
    """Return a ``datasets.Dataset`` that leaves images encoded, which are decoded here; others as they are."""
    if facts_of(data, "format").get("type") is not None:  # of tensors, say
        data = data.with_format(None)
    feature: Any = facts_of(data, "features").get(image_column)
    if getattr(feature, "decode", False):
        return data.cast_column(image_column, type(feature)(decode=False))
    return data


def checked_columns(name: str, columns: Sequence[Sequence[int]], num_classes: int) -> list[list[int]]:
    """Return columns as plain integers, or raise a ValueError."""
    checked = []
    for label, group in enumerate(columns):
        whole = np.ndim(group) == 1 and all(isinstance(column, int | np.integer) for column in group)
        if not whole or len(group) == 0 or any(not 0 <= column < num_classes for column in group):
            raise ValueError(
                f"Expected for label {label} of set '{name}' a list of training classes in [0, {num_classes}), got "
                f"{group}. Give one non-empty list of class indices for each label."
            )
        checked.append([int(column) for column in group])
    return checked
