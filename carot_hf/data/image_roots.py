"""Where images may lie that a table, and so perhaps a stranger, names by a path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


class ImageRoots:
    """Folders, which need not exist, in or below which images must lie, wherever links lead."""

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.folders = tuple(dict.fromkeys(os.path.realpath(folder) for folder in folders))
        self._real: dict[str, str] = {}  # of folders that were asked for

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if "\0" in path:
            return False
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):
            real = os.path.realpath(path)
        else:
            if folder not in self._real:
                self._real[folder] = os.path.realpath(folder)
            real = os.path.join(self._real[folder], name)
        return any(real.startswith(os.path.join(root, "")) for root in self.folders)

    def and_more(self, folders: Iterable[str | Path]) -> ImageRoots:
        """These and others."""
        return ImageRoots([*self.folders, *folders])

    def __str__(self) -> str:
        return " or ".join(self.folders)
