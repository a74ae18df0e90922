"""Images a second of training on one GPU, and the share of what the GPU can do at all.

    python benchmarks/gpu.py                          # some 6 minutes on an H200
    python benchmarks/gpu.py --device cpu --quick     # does it run at all?

A ViT-B/16 and its text tower with random weights, one batch of 512 synthetic images with captions, bf16 autocast, our
trainer as it is: FLYP, CaRot, CaRot with the gradient cache, each plain and compiled. The floating-point operations
counted are those of the method (a student's forward and backward pass, the teacher's forward); what the cache computes
twice does not count. The ceiling is the rate of the best large bf16 matrix product measured before the first run.
Decoding of images is not in it: see benchmarks/input_pipeline.py. Needs neither `datasets` nor `evaluate`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from typing import Any

import steps
import torch
from torch.utils.flop_counter import FlopCounterMode

IMAGES_A_SECOND, SHARE = 2400, 0.45  # targets for CaRot on an H200


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
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("Expected a GPU, got none that torch can use. Try `--device cpu --quick`.")
    return options


def main() -> None:
    """Measure and print the table."""
    options = parsed_options()
    count = options.steps or (8 if options.quick else 30)
    size, whole, at_once = (steps.TINY_SIZE, 16, 4) if options.quick else (steps.FULL_SIZE, 512, 128)
    processor = steps.processor(size["image"])
    batch = steps.make_batch(whole, processor, image=size["image"])
    forward, both = operations(steps.clip(processor, **size), batch)
    limit = ceiling(options.device, (256,) if options.quick else (4096, 8192, 16384), 0.2 if options.quick else 2.0)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    rows = []
    for title, preset, micro in (
        ("FLYP", "flyp", whole),
        ("CaRot", "carot", whole),
        (f"CaRot, gradient cache, {at_once} at once", "carot", at_once),
    ):
        for compiled in (False, True):
            # a fresh process of dynamo for each run, and no memory left from the one before
            torch._dynamo.reset()
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            part = {key: value[:micro] for key, value in batch.items()}
            cache = {} if micro == whole else {"contrastive_batch_size": whole}
            backend = {"torch_compile_backend": "eager"} if options.quick else {}
            seconds, _ = steps.train(
                preset,
                steps.clip(processor, **size),
                part,
                processor,
                count,
                device=options.device,
                bf16=True,
                torch_compile=compiled,
                logging_steps=10**6,
                teacher_update_every=500,
                **(backend if compiled else {}),
                **cache,
            )
            step = statistics.median(seconds[4:])
            work = both + (forward if preset == "carot" else 0)
            memory = torch.cuda.max_memory_allocated() / 1e9 if options.device == "cuda" else float("nan")
            rows.append((title, compiled, whole / step, work * whole / step / limit, memory))
            print(rows[-1], file=sys.stderr, flush=True)
    print(
        f"`python benchmarks/gpu.py{' --quick' if options.quick else ''}`, {name}, batch {whole}, bf16, "
        f"{steps.versions()}; {both / 1e9:.1f} GFLOP a pair in FLYP, {(both + forward) / 1e9:.1f} in CaRot; largest "
        f"matrix product {limit / 1e12:.2f} TFLOP/s\n"
    )
    print("| run | compiled | images a second | share of the ceiling | peak GB |\n|---|---|---|---|---|")
    for title, compiled, rate, share, memory in rows:
        print(f"| {title} | {'yes' if compiled else 'no'} | {rate:,.0f} | {share:.2f} | {memory:.1f} |")
    if not options.quick:
        _, _, rate, share, _ = max(rows[2:4], key=lambda row: row[2])
        met = "met" if rate >= IMAGES_A_SECOND and share >= SHARE else "MISSED"
        print(f"\nTarget for CaRot on an H200, {IMAGES_A_SECOND:,} images a second at {SHARE:.0%}: {met}")


if __name__ == "__main__":
    main()
