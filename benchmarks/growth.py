"""How cost grows: with the columns of the contrastive loss, with classes, templates and rows of an evaluation, with the
bank of a calibration by density, with the images of a prediction and of `suite check`.

    OMP_NUM_THREADS=1 python benchmarks/growth.py            # some 10 minutes, 1 core, 4 GB of memory; Linux
    OMP_NUM_THREADS=1 python benchmarks/growth.py --quick    # does it run at all?

Each point runs in a process of its own, on random embeddings, images and files; printed are seconds of the processor,
which other jobs do not change much, and peak memory beyond the inputs, in all and for a unit of work. Where the unit's
cost stays flat, twice the work costs twice as much and no more. `--only` names the series to run by a part of its name.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import steps
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from carot_hf.calibration.density import fit_density
from carot_hf.cli.suite import report
from carot_hf.data.captions import CaptionTable, class_embeddings
from carot_hf.data.pictures import Picture
from carot_hf.data.samples import sets_of
from carot_hf.data.shift_set import ShiftSet
from carot_hf.data.survey import survey
from carot_hf.evaluation.logits import SetLogits
from carot_hf.evaluation.measure import measure
from carot_hf.evaluation.predictor import Predictor
from carot_hf.objective.losses import contrastive_loss, distillation_loss, similarity_logits
from carot_hf.suites.load import load_suite

ROWS, WIDTH = 64, 512  # of one device, and of the embeddings
PART = 512  # pictures that the predictor is given at a time, as the command does
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


def by_density(size: int) -> tuple[Work, int]:
    """Fit a temperature for each of 2,000 rows by its distance from a bank; unit: an image of the bank."""
    bank, embeds, weight = unit_rows(size, WIDTH), unit_rows(2000, WIDTH, 1), unit_rows(100, WIDTH, 2)
    labels = torch.randint(100, (2000,), generator=torch.Generator().manual_seed(3))
    logits = 20 * (embeds + weight[labels]) @ weight.T

    def work() -> None:
        fit_density(logits, embeds, labels, bank)

    return work, size


def jpegs(count: int) -> list[bytes]:
    """Small pictures of noise."""
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(count):
        pixels = torch.randint(256, (48, 64, 3), generator=generator, dtype=torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, "JPEG")
        made.append(buffer.getvalue())
    return made


def prediction(count: int) -> tuple[Work, int]:
    """Say what pictures of a table show, a part at a time, by a small model and 10 classes; unit: a picture."""
    processor = steps.processor(32)
    model = steps.clip(processor, **steps.TINY_SIZE).eval()
    files = jpegs(64)
    rows = [{"image": {"bytes": files[index % 64], "path": None}} for index in range(count)]
    pictures = [Picture(f"table#{index}", rows, index, "image") for index in range(count)]
    predictor = Predictor(model, processor, [f"thing {number}" for number in range(10)], ["a {}."])

    def work() -> None:
        for start in range(0, count, PART):
            found, bad = predictor.predict(pictures[start : start + PART])
            if bad or not found:
                raise SystemExit(f"Expected predictions of all pictures, got {len(bad)} that could not be decoded.")

    return work, count


def checked(count: int) -> tuple[Work, int]:
    """Load a folder, survey and report it, as `suite check` does before the picture; unit: an image.

    Files of training and test set have the same few sizes, so that all are opened.
    """
    folder, made = Path(tempfile.mkdtemp()), jpegs(4)
    for part in ("train", "test"):
        for label in range(10):
            (folder / part / f"thing {label}").mkdir(parents=True)
    for index in range(count):
        part = "test" if index % 5 == 0 else "train"
        file = folder / part / f"thing {index // 5 % 10}" / f"{index}.jpg"
        file.write_bytes(made[index // 50 % 4] + index.to_bytes(4, "big"))  # a decoder reads no further than the end

    def work() -> None:
        suite = load_suite(str(folder))
        found = survey(suite)
        text = report(suite, dict(zip(found.sizes, sets_of(suite), strict=True)), found)
        if sum(found.sizes.values()) != count or "none found" not in text:
            raise SystemExit(f"Expected {count} images and no likely mistake, got {text}")

    return work, count


def measured(connection: Any, make: Callable[..., tuple[Work, int]], arguments: tuple[int, ...]) -> None:
    """Send seconds, MB beyond the inputs and units of one point."""
    torch.set_num_threads(1)
    work, units = make(*arguments)
    steps.forget_peak()
    before = steps.peak_megabytes()
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    memory = steps.peak_megabytes() - before
    repeats = 0 if seconds > 2 else 5
    times = [seconds]
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    connection.send((min(times), memory, units))


def point(title: str, make: Callable[..., tuple[Work, int]], arguments: tuple[int, ...]) -> tuple[float, float, int]:
    """`measured` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(sender, make, arguments))
    process.start()
    process.join()
    if process.exitcode or not receiver.poll():
        raise SystemExit(f"Expected a measurement of {title} at {arguments}, got status {process.exitcode}.")
    found: tuple[float, float, int] = receiver.recv()
    return found


def main() -> None:
    """Measure all points and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smallest points of each series")
    parser.add_argument("--only", default="", help="the series with this in their names")
    options = parser.parse_args()
    series: dict[str, tuple[Callable[..., tuple[Work, int]], list[tuple[int, ...]]]] = {
        "columns of the loss, 64 rows": (losses, [(n,) for n in (64, 256, 1024, 4096)]),
        "classes, 5,000 rows": (evaluation, [(5000, n) for n in (10, 100, 1000, 21_000)]),
        "rows, 100 classes": (evaluation, [(n, 100) for n in (1000, 10_000, 100_000, 1_000_000)]),
        "classes, 2 templates": (head, [(n, 2) for n in (10, 100, 1000, 21_000)]),
        "templates, 100 classes": (head, [(100, n) for n in (1, 7, 80)]),
        "bank of a calibration by density": (by_density, [(n,) for n in (1000, 4000, 16_000, 64_000)]),
        "pictures of a prediction": (prediction, [(n,) for n in (256, 1024, 4096, 16_384)]),
        "images that `suite check` looks through": (checked, [(n,) for n in (1000, 4000, 16_000, 32_000)]),
    }
    series = {title: points for title, points in series.items() if options.only in title}
    print(f"`python benchmarks/growth.py{' --quick' if options.quick else ''}`, {steps.versions()}, 1 thread\n")
    print("| what grows | to | seconds | ns a unit | MB beyond the inputs | bytes a unit | unit |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # of the processes, too
        for title, (make, points) in series.items():
            unit = str(make.__doc__).partition("unit: ")[2].partition(".")[0]
            for arguments in points[:2] if options.quick else points:
                seconds, memory, units = point(title, make, arguments)
                grown = arguments[1] if title.startswith(("classes, 5", "templates")) else arguments[0]
                print(
                    f"| {title} | {grown:,} | {seconds:.4f} | {1e9 * seconds / units:,.1f} | {memory:,.0f} | "
                    f"{1e6 * memory / units:,.1f} | {unit} |"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
