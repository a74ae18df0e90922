"""Seconds of a training step: FLYP and CaRot, ours and hand-written in plain torch.

    MALLOC_ARENA_MAX=1 OMP_NUM_THREADS=1 python benchmarks/train_step.py               # a quarter of an hour, 13 GB
    MALLOC_ARENA_MAX=1 OMP_NUM_THREADS=1 python benchmarks/train_step.py --only few    # few captions, 6 GB
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --quick                          # does it run at all?

A ViT-B/16 and its text tower with random weights, one batch of 16 that all share, AdamW (fused) throughout. The
variants live side by side in one process, each from the same weights, and take turns step by step, forwards and
backwards, so that a machine that slows down does so for all; the losses of all must agree. "as published" pads captions
to 77 tokens. Our trainer gets the batch as our collator hands it over, without a mask, since CLIP's text tower never
sees the padding; the loops have one. "few captions": each one twice, which ours embeds once. Our steps include all that
a step of `Trainer` does: fetching the batch, callbacks, logging, the check of the loss; what stands against them in
"overhead" is the same step in a bare loop. One malloc arena, because our trainers rest in threads of their own: glibc
would hand their memory back to the system after each step, and that of the loops in the main thread not.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import steps
import torch

from carot_hf.basics.escape import table

PUBLISHED, FLYP, BARE_FLYP = "FLYP, hand-written, as published", "FLYP, ours", "FLYP, bare loop, captions trimmed"
CAROT, BARE_CAROT = "CaRot, ours", "CaRot, bare loop, captions trimmed"
FEW, BARE_FEW = "few captions, FLYP, ours", "few captions, FLYP, bare loop, captions trimmed"


class Paused(steps.Clock):
    """A run of our trainer, in a thread of its own that rests after each step until it is asked for the next."""

    def __init__(self, run: Callable[[steps.Clock], Any]) -> None:
        super().__init__("cpu")
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self.result: Any = None
        self.error: BaseException | None = None

    def _work(self, run: Callable[[steps.Clock], Any]) -> None:
        try:
            self.result = run(self)
        except BaseException as error:  # noqa: BLE001 - raised again by the one who asked
            self.error = error
        self._done.release()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Rest."""
        super().on_step_end()
        self._done.release()
        self._asked.acquire()

    def __call__(self) -> None:
        """Work until the end of the next step, or of the run."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._asked.release()
        self._done.acquire()
        if self.error is not None:
            raise self.error


class Bare:
    """A hand-written loop that keeps its losses."""

    def __init__(self, step: Callable[[], torch.Tensor]) -> None:
        self.step = step
        self.losses: list[float] = []

    def __call__(self) -> None:
        """Make a step."""
        self.losses.append(self.step().item())


def variants(size: dict[str, int], batch_size: int, count: int, only: str) -> dict[str, Callable[[], Bare | Paused]]:
    """What makes the steps to measure, by name, all from the same weights; of "methods" or of "few" captions."""
    processor = steps.processor(size["image"])
    pretrained = steps.clip(processor, **size).state_dict()
    batch = steps.make_batch(batch_size, processor, image=size["image"])
    few = steps.make_batch(batch_size, processor, image=size["image"], captions=batch_size // 2)
    images = processor.image_processor
    mean, std = (torch.tensor(part)[:, None, None] for part in (images.image_mean, images.image_std))
    pixels = (batch["pixel_values"] / 255 - mean) / std  # of both
    ready = {**batch, "pixel_values": pixels}

    def fresh() -> Any:
        model = steps.clip(processor, **size)
        model.load_state_dict(pretrained)
        return model

    def bare(inputs: dict[str, Any], distillation: float = 0.0) -> Bare:
        return Bare(steps.hand_written(fresh(), inputs, distillation=distillation))

    def ours(preset: str, whole: dict[str, Any] = batch) -> Paused:
        options = {"lr_scheduler_type": "constant", "parity": True, "teacher_update_every": 0}
        collated = steps.as_collated(whole)
        return Paused(lambda clock: steps.train(preset, fresh(), collated, processor, count, clock, **options))

    if only == "few":
        return {FEW: lambda: ours("flyp", few), BARE_FEW: lambda: bare({**few, "pixel_values": pixels})}
    return {
        PUBLISHED: lambda: bare(steps.padded(ready, processor)),
        FLYP: lambda: ours("flyp"),
        CAROT: lambda: ours("carot"),
        BARE_FLYP: lambda: bare(ready),
        BARE_CAROT: lambda: bare(ready, steps.CAROT_WEIGHT),
    }


def measure(runs: dict[str, Bare | Paused], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant's steps, but for the first; all losses of a method must agree."""
    seconds, _ = steps.turns(runs, rounds, time.perf_counter)
    losses = {}
    for name, run in runs.items():
        if isinstance(run, Paused):
            run()  # to its end
            losses[name] = run.result[1]
        else:
            losses[name] = run.losses[1:]
    check_losses(losses)
    return seconds


def check_losses(losses: dict[str, list[float]]) -> None:
    """Stop if two variants of a method do not train alike."""
    for method in ("FLYP", "CaRot", "few"):
        rows = [values for name, values in losses.items() if name.startswith(method)]
        for row in rows[1:]:  # none of "few" beside the methods
            if max(abs(a - b) for a, b in zip(row, rows[0], strict=True)) > 2e-3:
                raise SystemExit(f"Expected the variants of {method} to have the same losses, got {rows}.")


def main() -> None:
    """Measure in rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each variant that count")
    parser.add_argument("--only", choices=["methods", "few"], default="methods", help="distinct captions, or few")
    options = parser.parse_args()
    size, batch_size = (steps.TINY_SIZE, 4) if options.quick else (steps.FULL_SIZE, 16)
    runs = {name: make() for name, make in variants(size, batch_size, options.rounds + 1, options.only).items()}
    seconds = measure(runs, options.rounds)
    print(
        f"`python benchmarks/train_step.py --only {options.only}`, batch {batch_size}, captions of "
        f"{steps.SHORTEST} to {steps.LONGEST} tokens, {options.rounds} rounds, {steps.versions()}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| step | median seconds | fastest |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} |")
    print()
    print(targets(seconds))


def targets(seconds: dict[str, list[float]]) -> str:
    """The table of the ratios and what they should be; CaRot / FLYP is held against that of the bare loops."""
    pairs = {
        "FLYP as published / ours": (PUBLISHED, FLYP),
        "CaRot / FLYP, bare loops": (BARE_CAROT, BARE_FLYP),
        "CaRot / FLYP, ours": (CAROT, FLYP),
        "FLYP, ours / bare loop": (FLYP, BARE_FLYP),
        "CaRot, ours / bare loop": (CAROT, BARE_CAROT),
        "FLYP with few captions, ours / bare loop": (FEW, BARE_FEW),
    }
    ratios = {
        title: [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        for title, (above, below) in pairs.items()
        if above in seconds
    }
    medians = {title: statistics.median(values) for title, values in ratios.items()}
    allowed = min(1.34, medians.get("CaRot / FLYP, bare loops", 1.32) + 0.02)
    goals: dict[str, tuple[str, float]] = {
        "FLYP as published / ours": ("least", 1.25),
        "CaRot / FLYP, ours": ("most", allowed),
        "FLYP, ours / bare loop": ("most", 1.03),
        "CaRot, ours / bare loop": ("most", 1.02),
        "FLYP with few captions, ours / bare loop": ("most", 1.0),
    }
    rows = [["ratio", "median of the rounds", "middle half", "of the fastest", "target"]]
    for title, values in ratios.items():
        value = medians[title]
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (value, value, value)
        said = ""
        if title in goals:
            side, goal = goals[title]
            met = value >= goal if side == "least" else value <= goal
            said = f"at {side} {goal:.4g}: {'met' if met else 'MISSED'}"
        above, below = (min(seconds[name]) for name in pairs[title])
        rows.append([title, f"{value:.3f}", f"{low:.3f} to {high:.3f}", f"{above / below:.3f}", said])
    return table(rows)


if __name__ == "__main__":
    main()
