"""Seconds of a training step beside the trainers that people use instead, from the JPEGs and without decoding.

    pip install --no-deps sentence-transformers open_clip_torch trl       # optional: what is not there is left out
    MALLOC_ARENA_MAX=1 OMP_NUM_THREADS=1 python benchmarks/peers.py       # half an hour on an idle core, 12 GB
    OMP_NUM_THREADS=1 python benchmarks/peers.py --quick                  # does it run at all?

A CLIP of random weights (vision 6 x 384 at 224 pixels, patches of 16; text 4 x 256), 32 pairs a step, captions of 6 to
11 tokens, JPEGs of 500 x 375, one thread, decoding in the process that trains. All contestants live side by side in one
process, from the same weights, and take turns step by step, forwards and backwards, so that a machine that slows down
does so for all: only the ratios count. Seconds are those of the processor, so that what other jobs take is left out.
Two kinds of data: captions that are all distinct, and 10 classes in 3 templates, of which a batch has some twice.
Without decoding all get the same batch, made by each one's own collator, and the run stops unless the contrastive
losses of the first step agree. Peak memory is that of a process that does nothing else, beyond libraries and data.
Last, the copy of the weights that follows the model: TRL's callback beside our teacher, a step of each. Who is compared
how is in contestants.py.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contestants
import steps
import torch
from contestants import CONTESTANTS, FLYP, PACKAGES, Task, make_task, present
from train_step import Paused

from carot_hf import Teacher
from carot_hf.basics.escape import table
from carot_hf.teacher.callback import TeacherCallback

FULL = {"depth": 6, "vision": 384, "text": 256, "image": 224, "text_depth": 4}
LEAD = {"sentence-transformers": 1.05}  # with few classes, end to end; all others: 1
EQUAL = 1e-4  # losses of one batch


def measure(task: Task, rounds: int, names: list[str]) -> dict[str, list[float]]:
    """Seconds of the processor of each contestant's steps, but for the first."""
    runs = {name: CONTESTANTS[name][0](task) for name in names}
    seconds, _ = steps.turns(runs, rounds, time.process_time)
    first = {}
    for name, run in runs.items():
        if isinstance(run, Paused):
            run()  # to its end
        first[name] = (run.result if isinstance(run, Paused) else run.losses)[0]
    if not task.decode:  # crops are drawn otherwise by each
        check_losses(first)
    return seconds


def check_losses(first: dict[str, float]) -> None:
    """Stop unless the first loss of all is the same; CaRot's is that of FLYP while teacher and student are equal."""
    if max(first.values()) - min(first.values()) > EQUAL:
        raise SystemExit(f"Expected equal losses of the first step, got {first}.")
    print(f"losses of the first step: {first}", file=sys.stderr)


def megabytes(name: str, task: dict[str, Any], pipe: Any) -> None:
    """Send the peak of two steps of a contestant."""
    torch.set_num_threads(1)
    made = make_task(**task)
    if (package := CONTESTANTS[name][1]) == "sentence_transformers":
        __import__(package)
    steps.forget_peak()
    before = steps.peak_megabytes()
    with redirect_stdout(sys.stderr):
        run = CONTESTANTS[name][0](made)
        run()
        run()
    pipe.send(steps.peak_megabytes() - before)
    os._exit(0)  # a trainer rests in its thread


def peaks(names: list[str], task: dict[str, Any]) -> dict[str, float]:
    """`megabytes` of each, in processes of their own."""
    context, found = multiprocessing.get_context("spawn"), {}
    for name in names:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=megabytes, args=(name, task, theirs))
        process.start()
        theirs.close()
        try:
            found[name] = ours.recv()
        except EOFError:
            raise SystemExit(f"Expected the memory of {name}, got a process that ended without it.") from None
        process.join()
    return found


def averages(size: dict[str, int], rounds: int) -> list[list[str]]:
    """Rows of a table: a step of TRL's callback and of ours, in turn, on the same model."""
    model = steps.clip(steps.processor(size["image"]), **size)
    teacher = Teacher(model)
    state = SimpleNamespace(global_step=1, max_steps=1000)
    args: Any = SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=0.1)
    calls: dict[str, Any] = {"our teacher": TeacherCallback(teacher, update_every=1)}
    if present("trl"):
        from trl.trainer.callbacks import SyncRefModelCallback

        copied = steps.clip(steps.processor(size["image"]), **size)
        calls["TRL's SyncRefModelCallback"] = SyncRefModelCallback(ref_model=copied, accelerator=None)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            start = time.process_time()
            calls[name].on_step_end(args, state, None, model=model)
            times[name] += [time.process_time() - start] if number else []
    rows = [["a copy of the weights follows, each step", "median ms", "time / ours", "middle half"]]
    for name, own in times.items():
        value, low, high = middle(own, times["our teacher"])
        rows.append([name, f"{1e3 * statistics.median(own):.2f}", f"{value:.3f}", f"{low:.3f} to {high:.3f}"])
    return rows


def middle(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median of the ratios of the rounds, and the middle half of them."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    value = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (value, value, value)
    return value, low, high


def laid_out(seconds: dict[str, list[float]], lead: dict[str, float]) -> str:
    """The table of a situation."""
    rows = [["a step", "median s", "time / FLYP, ours", "middle half", "verdict"]]
    for name, own in seconds.items():
        value, low, high = middle(own, seconds[FLYP])
        like, said = CONTESTANTS[name][2], ""
        row = [name, f"{statistics.median(own):.3f}", f"{value:.3f}", f"{low:.3f} to {high:.3f}"]
        if like != name:
            beside = ""
            if like != FLYP:
                value, low, high = middle(own, seconds[like])
                beside = f"{value:.3f} ({low:.3f} to {high:.3f}) times our cache: "
            least = lead.get(name, 1.0)
            said = beside + ("ours is ahead" if low > 1 else "ours is BEHIND" if high < 1 else "not told apart")
            if least > 1:
                said += f"; at least {least}: {'met' if value >= least else 'MISSED'}"
        rows.append([*row, said])
    return table(rows)


def main() -> None:
    """Measure all situations and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, tiny images, one round")
    parser.add_argument("--rounds", type=int, help="steps of each one that count; default: 8")
    parser.add_argument("--only", choices=["end-to-end", "without-decoding"], help="one half of it")
    parser.add_argument("--captions", choices=["distinct", "few"], help="one kind of data")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 8)
    size, batch_size = (steps.TINY_SIZE, 16) if options.quick else (FULL, 32)
    photo = (64, 48, 4) if options.quick else (500, 375, 64)
    torch.set_num_threads(1)
    absent = [name for package, name in PACKAGES.items() if not present(package)]
    names = [name for name, (_, package, _) in CONTESTANTS.items() if present(package)]
    print(
        f"`python benchmarks/peers.py {' '.join(sys.argv[1:])}`, {contestants.versions()}, {rounds} rounds, 1 thread\n"
    )
    if absent:
        print(f"Not installed, and left out: {', '.join(absent)}. pip install --no-deps {' '.join(absent)}\n")
    task: dict[str, Any] = {"size": size, "batch_size": batch_size, "count": rounds + 1, "photo": photo}
    for decode, few in itertools.product((False, True), (False, True)):
        if options.only not in (None, "end-to-end" if decode else "without-decoding"):
            continue
        if options.captions not in (None, "few" if few else "distinct"):
            continue
        with redirect_stdout(sys.stderr):  # what trainers say
            seconds = measure(make_task(**task, few=few, decode=decode), rounds, names)
        gc.collect()
        title = "From the JPEGs" if decode else "Without decoding"
        print(f"{title}, {'10 classes x 3 templates' if few else 'captions all distinct'}:\n")
        print(laid_out(seconds, LEAD if few and decode else {}) + "\n", flush=True)
    print(table(averages(size, 3 if options.quick else 25)), flush=True)
    if options.only != "without-decoding":
        rows = [[name, f"{value:,.0f}"] for name, value in peaks(names, {**task, "few": False, "decode": True}).items()]
        print("\n" + table([["two steps from the JPEGs, captions all distinct", "peak MB"], *rows]))


if __name__ == "__main__":
    main()
