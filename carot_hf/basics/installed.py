"""Which versions of the packages that matter are installed."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Of the packages that matter, and of Python."""
    found = {}
    for name in ("carot_hf", "torch", "transformers", "datasets", "accelerate", "evaluate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "Python": platform.python_version()}
