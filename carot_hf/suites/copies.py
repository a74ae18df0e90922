"""Where a data set of the Hub lies: in a folder of local copies, or on the Hub itself."""

from __future__ import annotations

from pathlib import Path


def checked_root(root: str | Path | None) -> Path | None:
    """Return the folder of local copies; ``None``: there is none, and data sets are read from the Hub.

    Raises:
        ValueError: If it is no folder.
    """
    folder = None if root is None else Path(root).expanduser()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"Expected a folder of local copies as `root`, got {folder}. Correct the path.")
    return folder


def places_of(root: Path, hub_id: str, name: str) -> list[Path]:
    """Where a copy may lie: ``<root>/<id on the Hub>``, ``<root>/<last part of it>`` or ``<root>/<name>``."""
    return [root / hub_id, root / hub_id.split("/")[-1], root / name]


def copy_of(root: Path | None, hub_id: str, name: str, *, cure: str = "") -> str | Path:
    """Return the local copy of a data set, or its id if there is no ``root`` of copies and it is read from the Hub.

    Raises:
        ValueError: If there is no copy in the folder.
    """
    # Workaround, datasets 5.2: `load_dataset("a/b")` reads a folder of that name before it asks the Hub. So does
    # this, with our own reader. Until: an id and a path are told apart.
    if root is None:
        return Path(hub_id) if Path(hub_id).exists() else hub_id
    candidates = places_of(root, hub_id, name)
    for path in candidates:
        if path.exists():
            return path
    raise ValueError(
        f"Expected a local copy of '{name}' in one of {[str(path) for path in candidates]}, found none. Make "
        f"one with `hf download {hub_id} --repo-type dataset --local-dir {candidates[0]}`{cure}."
    )
