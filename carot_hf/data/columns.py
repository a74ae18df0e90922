"""Which column of a table holds the images, and which the labels; what stands in the others does not matter here."""

from __future__ import annotations

from typing import Any

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
        found = [name for name, kind in features.items() if name.lower() in PATH_COLUMNS and _may_be_images(kind)]
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


def _may_be_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} & feature.keys() != set()
    return is_text(feature) or getattr(feature, "dtype", None) in _BYTES
