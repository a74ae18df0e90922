"""Run parts of the Makefile one after the other and say how long each took: `make test-all`, `.ci/run`.

    python3 tests/parts.py demo test docs

Needs nothing but Python: the first part may make the environment. Stops at the first part that fails, with its status.
"""

from __future__ import annotations

import subprocess
import sys
import time


def main(parts: list[str]) -> int:
    """Run the parts; print a table at the end."""
    rows: list[tuple[str, str, float]] = []
    status = 0
    for part in parts:
        print(f"\n=== make {part}", flush=True)
        start = time.monotonic()
        status = subprocess.run(["make", "--no-print-directory", part], check=False).returncode
        rows.append((part, "green" if status == 0 else f"status {status}", time.monotonic() - start))
        if status:
            break
    print("\n| part | outcome | time |\n|---|---|---|")
    for part, outcome, seconds in [*rows, ("in all", "", sum(row[2] for row in rows))]:
        print(f"| {part} | {outcome} | {int(seconds) // 60}:{int(seconds) % 60:02d} |")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
