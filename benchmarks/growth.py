"""How cost grows: with the columns of the contrastive loss, with classes, templates and rows of an evaluation.

    OMP_NUM_THREADS=1 python benchmarks/growth.py            # some 5 minutes, 1 core, 4 GB of memory
    OMP_NUM_THREADS=1 python benchmarks/growth.py --quick    # does it run at all?

Each point runs in a process of its own, on random embeddings; printed are seconds and peak memory beyond the inputs, in
all and for a unit of work. Where the unit's cost stays flat, twice the work costs twice as much and no more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import steps
import torch
import torch.nn.functional as F
from torch import Tensor

from carot_hf.data.captions import CaptionTable, class_embeddings
from carot_hf.data.shift_set import ShiftSet
from carot_hf.evaluation.logits import SetLogits
from carot_hf.evaluation.measure import measure
from carot_hf.objective.losses import contrastive_loss, distillation_loss, similarity_logits

ROWS, WIDTH = 64, 512  # of one device, and of the embeddings
Work = Callable[[], Any]


def unit_rows(rows: int, width: int, seed: int = 0) -> Tensor:
    """Random rows of length 1."""
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def losses(columns: int) -> tuple[Work, int]:
    """CaRot's loss of 64 rows over all columns, forward and backward; unit: a column."""
    student = [unit_rows(columns, WIDTH, seed) for seed in range(2)]
    teacher = [part + 0.01 for part in student]
    scale, targets = torch.tensor(4.6), torch.arange(ROWS)

    def work() -> None:
        image, text = (part.clone().requires_grad_() for part in student)
        ours = similarity_logits(image[:ROWS], text, scale), similarity_logits(text[:ROWS], image, scale)
        with torch.no_grad():
            theirs = (
                similarity_logits(teacher[0][:ROWS], teacher[1], scale),
                similarity_logits(teacher[1][:ROWS], teacher[0], scale),
            )
        (contrastive_loss(*ours, targets, label_smoothing=0.1) + 0.75 * distillation_loss(*ours, *theirs)).backward()

    return work, columns


def evaluation(rows: int, classes: int) -> tuple[Work, int]:
    """All metrics of simulated embeddings, without and with a temperature; unit: a row and class."""
    width = 64
    weight = 100 * unit_rows(classes, width)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    embeds = F.normalize(weight[labels] / 100 + 0.2 * torch.randn(rows, width), dim=-1)
    data = ShiftSet(range(rows), name="rows", num_classes=classes)

    def work() -> None:
        logits = SetLogits(embeds, (weight, torch.zeros(classes)), data)
        measure(logits, labels, n_bins=10, link="softmax", scalings={"ts": lambda: {"temperature": 1.5}})

    return work, rows * classes


def head(classes: int, templates: int) -> tuple[Work, int]:
    """Tokenise the captions and embed the classes with a small text tower; unit: a caption."""
    processor = steps.processor(32)
    model = steps.clip(processor, **steps.TINY_SIZE).eval()
    names = [f"thing {number}" for number in range(classes)]
    texts = [f"photo {number} of a {{}}." for number in range(templates)]

    def work() -> None:
        class_embeddings(model, CaptionTable(processor, names, texts, steps.CONTEXT))

    return work, classes * templates


def measured(connection: Any, make: Callable[..., tuple[Work, int]], arguments: tuple[int, ...]) -> None:
    """Send seconds, MB beyond the inputs and units of one point."""
    torch.set_num_threads(1)
    work, units = make(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    repeats = 0 if seconds > 2 else 5
    times = [seconds]
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    connection.send((min(times), memory, units))


def main() -> None:
    """Measure all points and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smallest points of each series")
    options = parser.parse_args()
    series: dict[str, tuple[Callable[..., tuple[Work, int]], list[tuple[int, ...]]]] = {
        "columns of the loss, 64 rows": (losses, [(n,) for n in (64, 256, 1024, 4096)]),
        "classes, 5,000 rows": (evaluation, [(5000, n) for n in (10, 100, 1000, 21_000)]),
        "rows, 100 classes": (evaluation, [(n, 100) for n in (1000, 10_000, 100_000, 1_000_000)]),
        "classes, 2 templates": (head, [(n, 2) for n in (10, 100, 1000, 21_000)]),
        "templates, 100 classes": (head, [(100, n) for n in (1, 7, 80)]),
    }
    print(f"`python benchmarks/growth.py`, {steps.versions()}, 1 thread\n")
    print("| what grows | to | seconds | ns a unit | MB beyond the inputs | bytes a unit | unit |")
    print("|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for title, (make, points) in series.items():
        unit = str(make.__doc__).rpartition("unit: ")[2].rstrip(".")
        for arguments in points[:2] if options.quick else points:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measured, args=(sender, make, arguments))
            process.start()
            process.join()
            if process.exitcode or not receiver.poll():
                raise SystemExit(f"Expected a measurement of {title} at {arguments}, got status {process.exitcode}.")
            seconds, memory, units = receiver.recv()
            grown = arguments[1] if title.startswith(("classes, 5", "templates")) else arguments[0]
            print(
                f"| {title} | {grown:,} | {seconds:.4f} | {1e9 * seconds / units:,.1f} | {memory:,.0f} | "
                f"{1e6 * memory / units:,.1f} | {unit} |"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
