"""Images a second on one core, from JPEG bytes to a training batch, beside what people use instead.

    pip install torchvision                                             # optional: its rows are left out without it
    OMP_NUM_THREADS=1 python benchmarks/input_pipeline.py               # about a minute, 1 core
    OMP_NUM_THREADS=1 python benchmarks/input_pipeline.py --quick       # seconds; too few for the target to mean much

Prints a Markdown table: one process, one thread, the same JPEGs for all, made beforehand. All take turns in each
repeat, so that a busy machine slows all of them; a row is the median. Ours gives uint8 batches, which are normalised on
the device: that step is timed by itself here, on the CPU, and the target is given with and without it. transformers'
processor resizes and crops the centre, torchvision and ours crop at random. The captions come from the tokenizer of
carot_hf/suites/digits_clip in transformers' rows, from our table of tokens in ours, and torchvision's row has none. To
be expected: the table in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from PIL import Image

CLIP = Path(__file__).resolve().parent.parent / "carot_hf" / "suites" / "digits_clip"
SIDE = 224
FACTOR = 2.0  # how much faster than transformers' processor ours should be
Batch = dict[str, Any]


def make_photo(width: int, height: int, seed: int) -> Image.Image:
    """Noise that is strong in coarse structures and weak in fine ones, as photographs are."""
    generator = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 115.0)
    for columns, strength in ((6, 45.0), (25, 25.0), (100, 14.0)):
        noise = generator.normal(0, strength, (3, max(2, columns * height // width), columns)).astype(np.float32)
        layers = [
            np.asarray(Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC)) for layer in noise
        ]
        pixels += np.stack(layers, axis=-1)
    pixels += generator.normal(0, 4, (height, width, 1))  # grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_jpegs(width: int, height: int, count: int) -> list[bytes]:
    """Encode so many photographs of a size, quality 90."""
    files = []
    for seed in range(count):
        buffer = io.BytesIO()
        make_photo(width, height, seed).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def median_times(calls: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, and the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def contestants(files: list[bytes]) -> tuple[dict[str, Callable[[int], Any]], list[str]]:
    """Who makes a batch of all files, by name, ours first; and what is not installed."""
    from transformers import CLIPProcessor, CLIPTokenizer

    from carot_hf import ShiftSet, load_suite
    from carot_hf.data.batches import CaRotCollator, DrawnSet, ReadSet
    from carot_hf.data.captions import CaptionTable, fill_template
    from carot_hf.data.transforms import ImageTransform, normalize_pixels

    suite = load_suite("digits")
    tokenizer = CLIPTokenizer.from_pretrained(CLIP)
    classes, templates = suite.class_names, suite.templates
    labels = [index % len(classes) for index in range(len(files))]
    rows = [{"image": {"bytes": data, "path": None}, "label": label} for data, label in zip(files, labels, strict=True)]
    processors = {name: CLIPProcessor(kind(), tokenizer) for name, kind in image_processors().items()}
    transform = ImageTransform.from_processor(processors["PIL"])
    table = CaptionTable(tokenizer, classes, templates, 77)
    readable = ReadSet(
        ShiftSet(rows, name="train", num_classes=len(classes)), skip=False, min_size=transform.train_size
    )
    drawn, collator = DrawnSet(readable), CaRotCollator(transform, table, seed=0)

    def ours(turn: int) -> Batch:
        return collator([drawn[turn * len(rows) + index] for index in range(len(rows))])

    fixed = ours(0)["pixel_values"]

    def normalise(turn: int) -> torch.Tensor:
        return normalize_pixels(fixed, transform.mean, transform.std)

    def stock(processor: Any) -> Callable[[int], Batch]:
        def call(turn: int) -> Batch:
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
            chosen = np.random.default_rng(turn).integers(len(templates), size=len(files))
            captions = [fill_template(templates[k], classes[i]) for k, i in zip(chosen, labels, strict=True)]
            return dict(processor(text=captions, images=images, padding=True, return_tensors="pt"))

        return call

    check_agreement(files, transform, stock(processors["PIL"])(0)["pixel_values"])
    calls: dict[str, Callable[[int], Any]] = {"carot_hf, to uint8": ours, "carot_hf, normalisation": normalise}
    calls |= {f"CLIPProcessor, {name} images": stock(processor) for name, processor in processors.items()}
    try:
        transforms = importlib.import_module("torchvision.transforms")
    except Exception as error:  # noqa: BLE001 - a broken install must not end the run
        return calls, [f"torchvision ({type(error).__name__}): `pip install torchvision`"]
    composed = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIDE, scale=transform.scale, ratio=transform.ratio, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.ToTensor(),
            transforms.Normalize(transform.mean, transform.std),
        ]
    )

    def peer(turn: int) -> torch.Tensor:
        return torch.stack([composed(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])

    return {**calls, "torchvision transforms, no captions": peer}, []


def image_processors() -> dict[str, Any]:
    """The image processors of CLIP that this installation has, by their backend."""
    import transformers

    named = {}
    for name in ("CLIPImageProcessorPil", "CLIPImageProcessor"):
        kind = getattr(transformers, name, None)
        if kind is not None:
            named["torchvision" if "torchvision" in str(getattr(kind(), "backend", "")) else "PIL"] = kind
    return named


def check_agreement(files: list[bytes], transform: Any, expected: torch.Tensor) -> None:
    """Raise unless our evaluation transform gives the pixels of transformers' processor: all do the same work."""
    from carot_hf.data.images import read_image
    from carot_hf.data.transforms import normalize_pixels

    pixels = torch.stack([transform.evaluate(read_image(data)) for data in files])
    difference = float((normalize_pixels(pixels, transform.mean, transform.std) - expected).abs().max())
    if difference > 1e-5:
        raise RuntimeError(
            f"Expected the pixels of CLIPImageProcessor within 1e-5, got a difference of {difference:g}."
        )


def measure(width: int, height: int, count: int, repeats: int) -> list[tuple[str, ...]]:
    """Rows of the table for JPEGs of one size."""
    files = make_jpegs(width, height, count)
    task = f"{width} x {height}, mean {sum(map(len, files)) / count / 1000:.0f} KB"
    calls, missing = contestants(files)
    seconds = median_times(calls, repeats)
    bare, extra = (seconds[name] for name in ("carot_hf, to uint8", "carot_hf, normalisation"))
    rows = []
    for name, value in seconds.items():
        verdict = ""
        if not name.startswith("carot_hf"):
            verdict = f"{value / bare:.2f} times ours; {value / (bare + extra):.2f} with our normalisation"
        if name == "CLIPProcessor, PIL images":
            verdict += f", {'met' if value / bare >= FACTOR else 'MISSED'} (at least {FACTOR:g})"
        rows.append((task, name, f"{1000 * value / count:.2f} ms", f"{count / value:,.0f}", verdict))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows + [(task, name, "not installed", "", "not run") for name in missing]


def versions() -> str:
    """One line on what was measured."""
    found = []
    for name in ("numpy", "pillow", "torch", "torchvision", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return f"Python {platform.python_version()}, {', '.join(found)}; {platform.machine()}, 1 thread"


def main() -> None:
    """Parse the options, run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images and repeats: does it run at all?")
    parser.add_argument("--repeats", type=int, default=9, help="rounds in which all take turns (default 9)")
    parser.add_argument("--batch_size", type=int, default=64, help="images a batch (default 64)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if torch.version.cuda is None:
        # torchvision of PyPI is built for CUDA; beside a CPU torch its import ends at the operators that it looks for
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes) -> Tensor")
    count, repeats = (4, 1) if options.quick else (options.batch_size, options.repeats)
    lines: list[tuple[str, ...]] = [("JPEGs", "who", "median time an image", "images a second and core", "target")]
    lines.append(tuple("---" for _ in lines[0]))
    for width, height in ((500, 375), (1600, 1200)):
        lines += measure(width, height, count, repeats)
    print(f"`python benchmarks/input_pipeline.py{' --quick' if options.quick else ''}`, {versions()}\n")
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
