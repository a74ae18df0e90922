"""Seconds of a training step: FLYP and CaRot, ours and hand-written in plain torch.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py            # some 30 minutes, 2 cores, 6 GB of memory
    OMP_NUM_THREADS=2 python benchmarks/train_step.py --quick    # does it run at all?

A ViT-B/16 and its text tower with random weights, one batch of 16 that all share, AdamW (fused) throughout. The
variants take turns in one process, each from the same weights; the losses of all must agree. `--rounds` says how often.
"as published" pads captions to 77 tokens. Our steps include all that a step of `Trainer` does: fetching the batch,
callbacks, logging, the check of the loss; what stands against them in "overhead" is the same step in a bare loop.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from typing import Any

import steps
import torch

Times = tuple[list[float], list[float]]


def variants(size: dict[str, int], batch_size: int, count: int) -> dict[str, Callable[[], Times]]:
    """The steps to measure by name; each call starts from the same weights and runs ``count`` of them."""
    processor = steps.processor(size["image"])
    pretrained = steps.clip(processor, **size).state_dict()
    batch = steps.make_batch(batch_size, processor, image=size["image"])
    images = processor.image_processor
    mean, std = (torch.tensor(part)[:, None, None] for part in (images.image_mean, images.image_std))
    ready = {**batch, "pixel_values": (batch["pixel_values"] / 255 - mean) / std}

    def fresh() -> Any:
        model = steps.clip(processor, **size)
        model.load_state_dict(pretrained)
        return model

    def bare(inputs: dict[str, Any], distillation: float = 0.0) -> Callable[[], Times]:
        return lambda: steps.timed(steps.hand_written(fresh(), inputs, distillation=distillation), count)

    def ours(preset: str) -> Callable[[], Times]:
        options = {"lr_scheduler_type": "constant", "parity": True, "teacher_update_every": 0}
        return lambda: steps.train(preset, fresh(), batch, processor, count, **options)

    return {
        "FLYP, hand-written, as published": bare(steps.padded(ready, processor)),
        "FLYP, ours": ours("flyp"),
        "CaRot, ours": ours("carot"),
        "CaRot, hand-written, as published": bare(steps.padded(ready, processor), steps.CAROT_WEIGHT),
        "FLYP, bare loop, captions trimmed": bare(ready),
        "CaRot, bare loop, captions trimmed": bare(ready, steps.CAROT_WEIGHT),
    }


def check_losses(losses: dict[str, list[float]]) -> None:
    """Stop if two variants of a method do not train alike."""
    for method in ("FLYP", "CaRot"):
        rows = [values for name, values in losses.items() if name.startswith(method)]
        for row in rows[1:]:
            if max(abs(a - b) for a, b in zip(row, rows[0], strict=True)) > 2e-3:
                raise SystemExit(f"Expected the variants of {method} to have the same losses, got {rows}.")


def main() -> None:
    """Measure in rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant runs")
    parser.add_argument("--steps", type=int, default=3, help="steps a round, the first of which does not count")
    options = parser.parse_args()
    size, batch_size = (steps.TINY_SIZE, 4) if options.quick else (steps.FULL_SIZE, 16)
    runs = variants(size, batch_size, options.steps)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        losses = {}
        for name, run in runs.items():
            times, losses[name] = run()
            seconds[name] += times
            gc.collect()
            print(f"round {number + 1}: {name}: {[round(value, 3) for value in times]}", file=sys.stderr, flush=True)
        check_losses(losses)
    median = {name: statistics.median(times) for name, times in seconds.items()}

    def ratio(above: str, below: str) -> float:
        """Median over the rounds of the ratio within a round: a machine that slows down counts for both."""
        count = options.steps - 1
        pairs = [
            statistics.median(seconds[above][i : i + count]) / statistics.median(seconds[below][i : i + count])
            for i in range(0, len(seconds[above]), count)
        ]
        return statistics.median(pairs)

    print(
        f"`python benchmarks/train_step.py`, batch {batch_size}, captions of {steps.SHORTEST} to "
        f"{steps.LONGEST} tokens, {options.rounds} rounds of {options.steps - 1} steps, {steps.versions()}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| step | median seconds |\n|---|---|")
    for name, value in median.items():
        print(f"| {name} | {value:.3f} |")
    published, flyp, carot, _, bare_flyp, bare_carot = runs
    print("\n| ratio | measured | target |\n|---|---|---|")
    for title, value, target, met in (
        ("FLYP as published / ours", ratio(published, flyp), "at least 1.12", ratio(published, flyp) >= 1.12),
        ("CaRot / FLYP, ours", ratio(carot, flyp), "at most 1.34", ratio(carot, flyp) <= 1.34),
        ("FLYP, ours / bare loop", ratio(flyp, bare_flyp), "at most 1.03", ratio(flyp, bare_flyp) <= 1.03),
        ("CaRot, ours / bare loop", ratio(carot, bare_carot), "at most 1.03", ratio(carot, bare_carot) <= 1.03),
    ):
        print(f"| {title} | {value:.3f} | {target}: {'met' if met else 'MISSED'} |")


if __name__ == "__main__":
    main()
