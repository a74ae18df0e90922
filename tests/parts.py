"""Run parts of the Makefile and say how long each took: `make test-all`, `.ci/run`.

    python3 tests/parts.py demo test docs rehearsal+test-package

Needs nothing but Python: the first part may make the environment. Parts joined by "+" run at once, since each of them
keeps one core busy; what they print is shown when the last has ended. Stops at the first that fails, with its status.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

Row = tuple[str, int, float]  # name, status, seconds


def main(parts: list[str]) -> int:
    """Run the parts; print a table at the end."""
    rows: list[Row] = []
    begin = time.monotonic()
    for part in parts:
        together = part.split("+")
        rows += run_at_once(together) if together[1:] else [run(part)]
        if any(status for _, status, _ in rows):
            break
    print("\n| part | outcome | time |\n|---|---|---|")
    for name, status, seconds in rows:
        print(f"| {name} | {f'status {status}' if status else 'green'} | {clock(seconds)} |")
    print(f"| in all | | {clock(time.monotonic() - begin)} |")
    return next((status for _, status, _ in rows if status), 0)


def run(part: str) -> Row:
    """Run one part."""
    print(f"\n=== make {part}", flush=True)
    start = time.monotonic()
    status = subprocess.run(command(part), check=False).returncode
    return part, status, time.monotonic() - start


def run_at_once(parts: list[str]) -> list[Row]:
    """Run several parts at the same time, then show what they printed, one after the other."""
    print(f"\n=== make {', '.join(parts)}, at once", flush=True)
    start, ended = time.monotonic(), {}
    with ExitStack() as stack:
        files = {part: stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for part in parts}
        running = {
            part: subprocess.Popen(command(part), stdout=file, stderr=subprocess.STDOUT) for part, file in files.items()
        }
        while running:
            for part in [part for part, process in running.items() if process.poll() is not None]:
                ended[part] = (part, running.pop(part).returncode, time.monotonic() - start)
                print(f"{clock(ended[part][2])}: {part} has ended, status {ended[part][1]}", flush=True)
            time.sleep(0.2)
        for part, file in files.items():
            file.seek(0)
            print(f"\n=== make {part}\n{file.read()}", flush=True)
    return [ended[part] for part in parts]


def command(part: str) -> list[str]:
    """The command of a part."""
    return ["make", "--no-print-directory", part]


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
