"""How much of a run is spent waiting for its input."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..basics.escape import guarded

logger = guarded(logging.getLogger(__name__))

BOTTLENECK = 0.5


class InputWait:
    """Share of the time between two readings that went into `waiting`; warns once when it is most of the time.

    The first interval, in which workers start, does not count for the warning.
    """

    def __init__(self) -> None:
        self._waited, self._since = 0.0, time.perf_counter()
        self._readings, self._warned = 0, False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def read(self) -> float:
        """Return the share, in [0, 1], since the last call, and begin anew."""
        now = time.perf_counter()
        share = min(1.0, self._waited / max(now - self._since, 1e-9))
        self._waited, self._since = 0.0, now
        self._readings += 1
        if share > BOTTLENECK and self._readings > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "The input is the bottleneck, not the model: %.0f %% of the time goes into waiting for images. Raise "
                "`dataloader_num_workers`, or store smaller images.",
                100 * share,
            )
        return share
