"""What each method costs: seconds of a training step and peak memory, beside FLYP.

    MALLOC_ARENA_MAX=1 OMP_NUM_THREADS=1 python benchmarks/methods.py          # some ten minutes, one core, 6 GB
    OMP_NUM_THREADS=1 python benchmarks/methods.py --quick                     # does it run at all?

A CLIP of random weights (vision 6 x 384 at 224 pixels, text 4 x 256), one batch of 16 pairs of 10 classes in 3
templates, without decoding, one thread. The methods live side by side in one process and take turns step by step; only
the ratios count. Seconds are those of the processor. Peak memory is that of a process that does nothing else, beyond
libraries and data. "every step": the teacher moves each step; CaRot's moves every 500.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import redirect_stdout

import contestants
import peers
import steps
import torch

from carot_hf.basics.escape import table
from carot_hf.presets import PRESETS

EVERY_STEP = ("tracer", "fd")
NAMES = [name for name in PRESETS if not name.endswith("-ls") and name != "lp-ft"]  # whose steps are those of others
for _name in NAMES:  # as contestants of `peers`, whose tools these are; in its processes, too
    contestants.CONTESTANTS[_name] = (contestants.ours(_name, every=1 if _name in EVERY_STEP else 500), None, _name)


def main() -> None:
    """Measure in rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--rounds", type=int, help="steps of each one that count; default: 6")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 6)
    size, batch_size = (steps.TINY_SIZE, 16) if options.quick else (peers.FULL, 16)
    torch.set_num_threads(1)
    task = {"size": size, "batch_size": batch_size, "count": rounds + 1, "photo": (64, 48, 4), "few": True}
    made = contestants.make_task(**task, decode=False)
    with redirect_stdout(sys.stderr):
        runs = {name: contestants.CONTESTANTS[name][0](made) for name in NAMES}
        seconds, _ = steps.turns(runs, rounds, time.process_time)
    memory = peers.peaks(NAMES, {**task, "decode": False})
    print(f"`python benchmarks/methods.py`, {rounds} rounds, {contestants.versions()}, 1 thread\n")
    rows = [["method", "median s", "time / FLYP", "middle half", "peak MB", "memory / FLYP"]]
    for name in NAMES:
        value, low, high = peers.middle(seconds[name], seconds["flyp"])
        own = [f"{statistics.median(seconds[name]):.3f}", f"{value:.3f}", f"{low:.3f} to {high:.3f}"]
        rows.append([name, *own, f"{memory[name]:,.0f}", f"{memory[name] / memory['flyp']:.3f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
