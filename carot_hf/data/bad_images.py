"""Which images were replaced by others because they could not be decoded, until somebody says so."""

from __future__ import annotations

import logging
from typing import Any

from ..basics.escape import guarded
from ..basics.processes import said_by_all

logger = guarded(logging.getLogger(__name__))

_LISTED = 20  # indices that a warning names


class BadImages:
    """Sets and indices of replaced images, as batches pass by."""

    def __init__(self) -> None:
        self._found: dict[str, set[int]] = {}

    def note(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take ``"replaced"`` out of a batch and keep it."""
        for name, index in batch.get("replaced", ()):
            self._found.setdefault(name, set()).add(int(index))
        return {key: value for key, value in batch.items() if key != "replaced"}

    def take(self) -> dict[str, list[int]]:
        """Return the indices by set of this process, and forget them."""
        found, self._found = self._found, {}
        return {name: sorted(indices) for name, indices in found.items()}

    def report(self, *, gather: bool = True, first: bool = True) -> dict[str, list[int]]:
        """Log by set which images were replaced since the last report.

        Args:
            gather: Join those of all processes, which must all call this; ``False``: each process logs its own.
            first: This is the process that speaks.
        Returns:
            Indices by set (of a stream the numbers of its rows).
        """
        found = said_by_all(self._found) if gather else [self._found]
        self._found = {}
        merged = {name: sorted(set().union(*(part.get(name, ()) for part in found))) for part in found for name in part}
        if first or not gather:
            for name, indices in merged.items():
                logger.warning(
                    "%d images of set '%s' could not be decoded and were replaced by the next ones: indices %s%s.",
                    len(indices),
                    name,
                    ", ".join(map(str, indices[:_LISTED])),
                    ", ..." if len(indices) > _LISTED else "",
                )
        return merged
