"""Pairs a second of training on one GPU, and the share of what the GPU can do at all.

    python benchmarks/gpu.py --output gpu.md                    # within ten minutes, unattended
    python benchmarks/gpu.py --device cpu --quick               # does it run at all?

A ViT-B/16 and its text tower with random weights, one batch of 512 synthetic pairs, bf16 autocast, our trainer as it
is: FLYP, CaRot, CaRot with the gradient cache; then what may make them faster or slower, one thing at a time. The
floating-point operations counted are those of the method (a student's forward and backward pass, the teacher's
forward); what the cache computes twice does not count. The ceiling is the rate of the best large bf16 matrix product
measured before the first run. Decoding of images is not in it: see benchmarks/input_pipeline.py. A run that fails is a
line of the table; what `--minutes` leaves no time for is one, too. The file is written anew after each line. No run
changes how float32 is multiplied but the one that says so; each line says what it was. Needs neither `datasets` nor
`evaluate`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import steps
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from carot_hf.basics.escape import table
from carot_hf.basics.whole_file import write_whole

GOALS, SHARE = {"H100": 2000, "H200": 2400}, 0.45  # pairs a second of CaRot, and share of the ceiling
# TRACER (arXiv 2605.29380), Table 4: one H100, turned into pairs a second.
PUBLISHED = {"FT": 1334, "TRACER": 970, "CaRot": 736}
WARM_UP, FEWEST = 5, 3  # steps that do not count, and those that must
COMPILING = 90.0  # seconds that a compiled run may need before its first step


@dataclass(frozen=True)
class Variant:
    """A run of our trainer.

    Attributes:
        title: Its name in the table.
        preset: The method.
        cached: With the gradient cache.
        compiled: With torch.compile.
        backend: Of the attention; ``None``: torch chooses.
        precision: ``torch.set_float32_matmul_precision``; "highest" is torch's default.
        channels_last: Memory format of images and image tower.
        options: Further arguments.
    """

    title: str
    preset: str = "carot"
    cached: bool = False
    compiled: bool = False
    backend: SDPBackend | None = None
    precision: str = "highest"
    channels_last: bool = False
    options: dict[str, Any] = field(default_factory=dict)


# What matters most comes first: time may run out.
VARIANTS = [
    Variant("FLYP", "flyp"),
    Variant("CaRot"),
    Variant("CaRot, gradient cache", cached=True),
    Variant("CaRot, compiled", compiled=True),
    Variant("FLYP, compiled", "flyp", compiled=True),
    Variant("CaRot, attention FLASH_ATTENTION", backend=SDPBackend.FLASH_ATTENTION),
    Variant("CaRot, attention CUDNN_ATTENTION", backend=SDPBackend.CUDNN_ATTENTION),
    Variant("CaRot, attention EFFICIENT_ATTENTION", backend=SDPBackend.EFFICIENT_ATTENTION),
    Variant("CaRot, attention MATH", backend=SDPBackend.MATH),
    Variant("CaRot, AdamW not fused", options={"optim": "adamw_torch"}),
    Variant("CaRot, channels last", channels_last=True),
    Variant("CaRot, float32", options={"bf16": False}),
    Variant("CaRot, float32 multiplied as tf32", precision="high", options={"bf16": False}),
    Variant("CaRot, gradient cache, compiled", cached=True, compiled=True),
]


class Deadline(steps.Clock):
    """Ends a run that takes too long, once enough steps are measured."""

    def __init__(self, device: str, end: float) -> None:
        super().__init__(device)
        self.end = end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time; stop when it is over."""
        super().on_step_end()
        if time.perf_counter() > self.end and len(self.stamps) >= WARM_UP + FEWEST:
            control.should_training_stop = True


@dataclass
class Bench:
    """What all runs share.

    Attributes:
        device: "cuda" or "cpu".
        quick: A tiny model.
        count: Steps of a run.
        end: When the time is over, by ``time.perf_counter``.
    """

    device: str
    quick: bool
    count: int
    end: float

    def __post_init__(self) -> None:
        self.size = steps.TINY_SIZE if self.quick else steps.FULL_SIZE
        self.whole, self.at_once = (16, 4) if self.quick else (512, 128)
        self.processor = steps.processor(self.size["image"])
        self.batch = steps.as_collated(steps.make_batch(self.whole, self.processor, image=self.size["image"]))
        self.forward, self.both = operations(steps.clip(self.processor, **self.size), self.batch)
        sizes = (256,) if self.quick else (4096, 8192, 16384)
        self.limit = ceiling(self.device, sizes, 0.2 if self.quick else 2.0)

    def run(self, variant: Variant) -> list[str]:
        """The line of a variant in the table."""
        left = self.end - time.perf_counter()
        if left < (COMPILING if variant.compiled and not self.quick else 0):
            return [variant.title, "", "", "", "", "", "skipped: the time was over"]
        self._clean()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(variant.precision)
        try:
            return self._measured(variant)
        except Exception as error:  # noqa: BLE001 - one that fails is a line, and not the end
            reason = " ".join(str(error).split()) or type(error).__name__
            return [variant.title, torch.get_float32_matmul_precision(), *[""] * 4, f"failed: {short(reason)}"]
        finally:
            torch.set_float32_matmul_precision(before)

    def _measured(self, variant: Variant) -> list[str]:
        micro = self.at_once if variant.cached else self.whole
        model = steps.clip(self.processor, **self.size)
        part = {key: value[:micro] for key, value in self.batch.items()}
        if variant.channels_last:
            model = model.to(memory_format=torch.channels_last)
            part["pixel_values"] = part["pixel_values"].contiguous(memory_format=torch.channels_last)
        options: dict[str, Any] = {"bf16": True, "optim": "adamw_torch_fused", **variant.options}
        if variant.cached:
            options["contrastive_batch_size"] = self.whole
        if variant.compiled:
            options |= {"torch_compile": True, **({"torch_compile_backend": "eager"} if self.quick else {})}
        clock = Deadline(self.device, self.end)
        with nullcontext() if variant.backend is None else sdpa_kernel(variant.backend), redirect_stdout(sys.stderr):
            steps.train(
                variant.preset,
                model,
                part,
                self.processor,
                self.count,
                clock,
                device=self.device,
                logging_steps=10**6,
                teacher_update_every=500,
                **options,
            )
        seconds = clock.seconds[WARM_UP - 1 :]
        step = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4)
        work = self.both + (self.forward if variant.preset == "carot" else 0)
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if self.device == "cuda" else ""
        return [
            variant.title,
            torch.get_float32_matmul_precision(),
            f"{self.whole / step:,.0f}",
            f"{self.whole / high:,.0f} to {self.whole / low:,.0f}",
            f"{work * self.whole / step / self.limit:.3f}",
            memory,
            f"{len(seconds)} steps",
        ]

    def _clean(self) -> None:
        """A fresh dynamo for each run, and no memory left from the one before."""
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def text(self, rows: list[list[str]]) -> str:
        """All that is known so far, as Markdown."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        said = (
            f"`python benchmarks/gpu.py{' --quick' if self.quick else ''}`, {time.strftime('%Y-%m-%d')}, {name}, batch "
            f"{self.whole}, bf16 autocast where the line says nothing else, {steps.versions()}; {self.both / 1e9:.3g} "
            f"GFLOP a pair in FLYP, {(self.both + self.forward) / 1e9:.3g} in CaRot; largest bf16 matrix product "
            f"{self.limit / 1e12:.3g} TFLOP/s; the cache embeds {self.at_once} at once"
        )
        titles = ["run", "float32 products", "pairs a second", "middle half", "share of the ceiling", "peak GB", ""]
        figures = ", ".join(f"{method} {rate:,}" for method, rate in PUBLISHED.items())
        beside = f"Published, one H100, pairs a second (TRACER's Table 4): {figures}."
        return f"{said}\n\n{table([titles, *rows])}\n\n{beside}\n\n{verdict(rows, name, self.quick)}\n"


def verdict(rows: list[list[str]], device: str, quick: bool) -> str:
    """The goals, and whether the best run of CaRot reaches them."""
    goals = ", ".join(f"{rate:,} pairs a second on an {name}" for name, rate in GOALS.items())
    said = f"Goal for CaRot: at least {goals}, and {SHARE:.0%} of the measured ceiling: "
    rated = [row for row in rows if row[0].startswith("CaRot") and row[2]]
    if quick or not rated:
        return said + ("not judged, the model is tiny" if quick else "no run of CaRot was measured")
    best = max(rated, key=lambda row: float(row[2].replace(",", "")))
    rate, share = float(best[2].replace(",", "")), float(best[4])
    parts = [f"{share:.1%} of the ceiling, {'met' if share >= SHARE else 'MISSED'}"]
    for name, goal in GOALS.items():
        if name in device:
            parts.insert(0, f"{rate:,.0f} on this {name}, {'met' if rate >= goal else 'MISSED'}")
    if len(parts) == 1:
        parts.insert(0, f"{rate:,.0f} on a device without a goal of its own")
    return f"{said}{'; '.join(parts)} ({best[0]})"


def short(text: str, most: int = 120) -> str:
    """A text that fits into a cell."""
    text = text.replace("|", "/")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def ceiling(device: str, sizes: tuple[int, ...], seconds: float) -> float:
    """FLOP/s of the fastest of some square bf16 matrix products."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        rounds, end = 0, time.perf_counter() + seconds
        a @ b
        steps.synchronize(device)
        start = time.perf_counter()
        while time.perf_counter() < end:
            for _ in range(10 if device == "cuda" else 1):
                a @ b
                rounds += 1
            steps.synchronize(device)
        best = max(best, 2 * size**3 * rounds / (time.perf_counter() - start))
    return best


def operations(model: Any, batch: dict[str, Any]) -> tuple[int, int]:
    """FLOP of an image-caption pair: the forward pass, and forward and backward."""
    model.set_attn_implementation("eager")  # torch counts matrix products, not every fused attention
    inputs = {name: value[:2] for name, value in batch.items()}
    inputs["pixel_values"] = inputs["pixel_values"].float() / 255
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(**inputs)
    with FlopCounterMode(display=False) as both:
        model(**inputs).logits_per_image.sum().backward()
    model.zero_grad()
    return forward.get_total_flops() // 2, both.get_total_flops() // 2


def parsed_options() -> argparse.Namespace:
    """Read the command line; no GPU where one is asked for ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and batch")
    parser.add_argument("--steps", type=int, help="steps of each run, the first five of which do not count")
    parser.add_argument("--minutes", type=float, default=9.0, help="when they are over the rest is skipped; default: 9")
    parser.add_argument("--output", type=Path, help="a new Markdown file for the table, which is printed in any case")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("Expected a GPU, got none that torch can use. Try `--device cpu --quick`.")
    if options.steps is not None and options.steps < WARM_UP + FEWEST:
        raise SystemExit(f"Expected `--steps` of at least {WARM_UP + FEWEST}, got {options.steps}. Raise it.")
    if options.output is not None and options.output.exists():
        raise SystemExit(f"Expected a new file as `--output`, got {options.output}, which is there. Name another one.")
    return options


def main() -> None:
    """Measure, and write the table after each line."""
    start = time.perf_counter()
    options = parsed_options()
    count = options.steps or (WARM_UP + FEWEST if options.quick else 30)
    bench = Bench(options.device, options.quick, count, start + 60 * options.minutes)
    rows: list[list[str]] = []
    for variant in VARIANTS:
        rows.append(bench.run(variant))
        print(f"{time.perf_counter() - start:.0f} s: {' | '.join(rows[-1])}", file=sys.stderr, flush=True)
        if options.output is not None:
            write_whole(options.output, bench.text(rows))
    print(bench.text(rows), end="")


if __name__ == "__main__":
    main()
