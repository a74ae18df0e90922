"""Commands that know nothing of the repository."""

from __future__ import annotations

import os
import subprocess


def elsewhere(command, folder, **variables):
    """Run a command where neither the working directory nor a variable leads to the repository."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
