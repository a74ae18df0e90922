"""Where the time of a CaRot step goes, ours beside a bare loop, and the peak of memory of each.

    MALLOC_ARENA_MAX=1 OMP_NUM_THREADS=1 python benchmarks/step_profile.py            # some ten minutes, 6 GB
    OMP_NUM_THREADS=1 python benchmarks/step_profile.py --quick                       # does it run at all?

The steps of train_step.py, with torch's profiler on: seconds of a step in each kind of operation, the operations'
own time alone, the mean of the steps after the first. The loop and our trainer take turns. Peak memory is that of a
process that makes two steps and nothing else, beyond libraries and data; the fewer the better, 1.03 times the loop's at
most.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from contextlib import redirect_stdout
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import steps
import torch
import train_step
from torch.profiler import ProfilerActivity, profile

from carot_hf.basics.escape import table

ALL_THREADS = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # our trainer rests in one of its own
MOST = 1.03  # memory, times that of the loop
KINDS = {  # by what the names of operations begin with; the first that fits
    "products of matrices": (
        "aten::addmm",
        "aten::mm",
        "aten::bmm",
        "aten::convolution",
        "aten::mkldnn",
        "aten::_conv",
    ),
    "attention": ("aten::_scaled_dot", "aten::_flash"),
    "layer norm": ("aten::native_layer_norm",),
    "softmax and losses": ("aten::_log_softmax", "aten::_softmax", "aten::nll_loss", "aten::kl_div", "aten::logsumexp"),
    "optimizer": ("aten::_fused_adamw",),
    "gradient's norm, teacher, finite check": ("aten::_foreach", "aten::linalg_vector_norm", "aten::isfinite"),
    "activation": ("aten::sigmoid", "aten::gelu", "aten::silu"),
    "element by element, sums, copies": ("aten::",),
}
PAIRS = {
    "FLYP": (train_step.FLYP, train_step.BARE_FLYP),
    "CaRot": (train_step.CAROT, train_step.BARE_CAROT),
}


def kind_of(name: str) -> str:
    """What kind an operation is of."""
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "the rest")


def seconds_by_kind(run: Any) -> dict[str, float]:
    """Seconds of a step in each kind of operation, their own time alone."""
    with profile(activities=[ProfilerActivity.CPU], experimental_config=ALL_THREADS) as seen:
        run()
    found = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in seen.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return found


def profiled(makers: dict[str, Any], names: tuple[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Mean seconds of a step by kind of each of two that take turns; the first step of each does not count."""
    runs = {name: makers[name]() for name in names}
    sums: dict[str, dict[str, float]] = {name: dict.fromkeys([*KINDS, "the rest"], 0.0) for name in names}
    for name in names:
        runs[name]()
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            for kind, value in seconds_by_kind(runs[name]).items():
                sums[name][kind] += value / rounds
            print(f"round {number + 1}: {name}: {sum(sums[name].values()):.1f} s", file=sys.stderr, flush=True)
    for run in runs.values():
        if isinstance(run, train_step.Paused):
            run()  # to its end
    return sums


def megabytes(name: str, size: dict[str, int], batch_size: int, pipe: Any) -> None:
    """Send the peak of two steps."""
    torch.set_num_threads(1)
    make = train_step.variants(size, batch_size, 2, "methods")[name]
    steps.forget_peak()
    before = steps.peak_megabytes()
    with redirect_stdout(sys.stderr):
        run = make()
        run()
        run()
    pipe.send(steps.peak_megabytes() - before)
    os._exit(0)  # a trainer rests in its thread


def peak(name: str, size: dict[str, int], batch_size: int) -> float:
    """`megabytes` of a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=megabytes, args=(name, size, batch_size, theirs))
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    except EOFError:
        raise SystemExit(f"Expected the memory of {name}, got a process that ended without it.") from None
    finally:
        process.join()


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--rounds", type=int, default=4, help="steps of each that count")
    options = parser.parse_args()
    size, batch_size = (steps.TINY_SIZE, 4) if options.quick else (steps.FULL_SIZE, 16)
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        makers = train_step.variants(size, batch_size, options.rounds + 1, "methods")
        found = profiled(makers, PAIRS["CaRot"], options.rounds)
    ours, bare = (found[name] for name in PAIRS["CaRot"])
    whole = sum(bare.values())
    print(
        f"`python benchmarks/step_profile.py`, CaRot, batch {batch_size}, mean of {options.rounds} steps, "
        f"{steps.versions()}, 1 thread\n"
    )
    rows = [["seconds of a step in", "bare loop", "ours", "difference", "of the loop's step"]]
    for kind in [*bare, "all"]:
        a, b = (sum(part.values()) if kind == "all" else part[kind] for part in (bare, ours))
        rows.append([kind, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}", f"{(b - a) / whole:+.1%}"])
    print(table(rows) + "\n")
    rows = [["two steps", "bare loop, peak MB", "ours, peak MB", "ours / bare", ""]]
    for method, (own, other) in PAIRS.items():
        a, b = (peak(name, size, batch_size) for name in (other, own))
        rows.append(
            [
                method,
                f"{a:,.0f}",
                f"{b:,.0f}",
                f"{b / a:.3f}",
                f"at most {MOST}: {'met' if b <= MOST * a else 'MISSED'}",
            ]
        )
    print(table(rows))


if __name__ == "__main__":
    main()
