"""What is said beside an error of foreign code."""

from __future__ import annotations

import logging
import sys

from .escape import guarded

logger = guarded(logging.getLogger(__name__))


def note(error: Exception, text: str) -> None:
    """Let an error of foreign code say where it happened; it stays what it is."""
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        logger.error(text)
