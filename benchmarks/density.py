"""What a temperature for each image costs: the search in the bank against a plain one, and a picture through ONNX.

    OMP_NUM_THREADS=1 python benchmarks/density.py            # some 3 minutes, 1 core, 6 GB of memory
    OMP_NUM_THREADS=1 python benchmarks/density.py --quick    # does it run at all?

Ours and the plain search (all cosines of a part of the rows, then the largest) run in turn in processes of their own.
The classifier is a ViT-B/16 with random weights and 1,000 classes, with and without a bank, in turn, one picture a run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import steps
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig

from carot_hf import CLIPClassifier, DensityCalibrator, export_onnx
from carot_hf.basics.escape import table
from carot_hf.calibration.nearest import density
from carot_hf.models.classifier import CLIPClassifierConfig

K, WIDTH = 10, 512


def plain(embeds: Tensor, bank: Tensor, k: int) -> Tensor:
    """The search as one would write it down: 1,000 rows against the whole bank."""
    rows = F.normalize(bank.float(), dim=1)
    parts = [(F.normalize(part, dim=1) @ rows.T).topk(k, dim=1).values.mean(dim=1) for part in embeds.split(1000)]
    return (1.0001 - torch.cat(parts).clamp(max=1.0)).log()


def search(who: Callable[..., Tensor], rows: int, size: int, pipe: Any) -> None:
    """Seconds, and megabytes beside the inputs."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(size, WIDTH, generator=generator).half()
    embeds = torch.randn(rows, WIDTH, generator=generator)
    who(embeds[:64], bank[:64], K)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = who(embeds, bank, K)
    seconds = time.perf_counter() - start
    pipe.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, float(found.sum())))


def searched(who: Callable[..., Tensor], rows: int, size: int) -> tuple[float, float, float]:
    """`search` in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=search, args=(who, rows, size, theirs))
    process.start()
    result: tuple[float, float, float] = ours.recv()
    process.join()
    return result


def sessions(layers: int, size: int, classes: int) -> list[Any]:
    """The classifier without and with a bank, in onnxruntime with one thread."""
    import onnxruntime

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=layers, patch_size=16
    )
    model = CLIPClassifier(CLIPClassifierConfig(vision_config=vision, projection_dim=WIDTH, num_labels=classes)).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("without", "with"):
            if name == "with":
                bank = F.normalize(torch.randn(size, WIDTH), dim=1).half()
                model.attach_density(DensityCalibrator(bank, K, -1.0, 0.5, 0.1, 0.2))
            path = export_onnx(model, CLIPImageProcessor(), f"{folder}/{name}.onnx", check=False)
            made.append(onnxruntime.InferenceSession(str(path), options))
    return made


def pictures(made: list[Any], rounds: int) -> list[float]:
    """Median seconds of a picture, in turn."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    times: list[list[float]] = [[] for _ in made]
    for _ in range(rounds):
        for session, own in zip(made, times, strict=True):
            start = time.perf_counter()
            session.run(None, {"pixel_values": pixels})
            own.append(time.perf_counter() - start)
    return [statistics.median(own[2:]) for own in times]


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, a bank of 500 images and a shallow model")
    options = parser.parse_args()
    rows, size, layers, rounds = (500, 500, 1, 6) if options.quick else (50_000, 20_000, 12, 40)
    print(f"`python benchmarks/density.py{' --quick' if options.quick else ''}`, {steps.versions()}, 1 thread\n")
    ours, theirs = searched(density, rows, size), searched(plain, rows, size)
    if abs(ours[2] - theirs[2]) > 1e-4 * abs(theirs[2]):
        sys.exit(f"Expected equal sums, got {ours[2]} and {theirs[2]}.")
    cells = [[title, f"{seconds:.1f}", f"{memory:.0f}"] for title, (seconds, memory, _) in
             (("carot_hf", ours), ("1,000 rows at a time", theirs))]  # fmt: skip
    print(table([[f"{rows:,} images in a bank of {size:,}", "seconds", "MB beside the inputs"], *cells]))
    bare, full = pictures(sessions(layers, size, 1000), rounds)
    print(f"\nA picture through ONNX: {1e3 * bare:.1f} ms without, {1e3 * full:.1f} ms with the bank, "
          f"{full / bare - 1:+.1%} (wished for: under 3 %)")  # fmt: skip


if __name__ == "__main__":
    main()
