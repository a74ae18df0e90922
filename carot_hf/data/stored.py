"""How the rows of a table hold their images: by a path, or as bytes. Read off the table; no image is read."""

from __future__ import annotations

import hashlib
from pathlib import PurePath
from typing import Any

from .columns import facts_of
from .shift_set import ShiftSet


def stored_paths(rows: Any, column: str) -> tuple[list[str | None], list[bool]]:
    """Return of each row the path that is written there, and whether the bytes of the image are.

    Args:
        rows: A ``datasets.Dataset`` that leaves images encoded.
        column: Of the images: texts, bytes, or mappings of ``bytes`` and ``path``.
    """
    import pyarrow as pa  # of a datasets.Dataset; the rest of the package runs without it
    import pyarrow.compute as pc

    cells = rows.data.column(column)
    if rows._indices is not None:
        cells = cells.take(rows._indices.column(0))
    kind = cells.type
    fields = [kind.field(place).name for place in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    named = pc.struct_field(cells, "path") if "path" in fields else cells
    held = pc.struct_field(cells, "bytes") if "bytes" in fields else cells
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    paths = named.to_pylist() if any(is_(named.type) for is_ in texts) else [None] * len(cells)
    return paths, held.is_valid().to_pylist() if any(is_(held.type) for is_ in binaries) else [False] * len(cells)


def rows_mark(data: ShiftSet) -> str | None:
    """Return what tells the rows of a set from others without reading an image: ``names:`` or ``sizes:`` and a hash.

    The last parts of the paths in their order, so that a copy in another folder is the same; where rows name none the
    numbers of bytes. ``None``: the rows say neither, as those of a stream.
    """
    rows = data.stored_rows
    if data.image_column not in facts_of(rows, "features") or not hasattr(rows, "data"):
        return None
    paths, _ = stored_paths(rows, data.image_column)
    if any(path is not None for path in paths):
        return f"names:{_hash(None if path is None else PurePath(path).name for path in paths)}"
    sizes = data.encoded_lengths()
    return f"sizes:{_hash(sizes)}" if any(size is not None for size in sizes) else None


def _hash(values: Any) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(f"{value}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()
