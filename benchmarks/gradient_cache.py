"""Memory and time of a contrastive batch: at once, and through the gradient cache.

    OMP_NUM_THREADS=1 python benchmarks/gradient_cache.py            # some 10 minutes, 1 core, 7 GB of memory
    OMP_NUM_THREADS=1 python benchmarks/gradient_cache.py --quick    # does it run at all?

Trains a CLIP of random weights (ViT-B/16's patches, half its width and depth) on random images with CaRot's loss, each
variant in a process of its own, and prints a Markdown table: peak memory beyond that of the loaded model, and seconds a
step. By the count of operations the time should be a quarter longer (a second forward of the student; the teacher's
runs once either way).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

CLIP = Path(__file__).resolve().parent.parent / "carot_hf" / "suites" / "digits_clip"


def peak() -> float:
    """Peak memory of the process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1024)


def run(batch: int, whole: int, steps: int, size: int) -> dict[str, float]:
    """Train some steps; peak memory beyond the start, and the median seconds of a step."""
    import statistics

    import numpy as np
    import torch
    from PIL import Image
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, TrainerCallback

    from carot_hf import CaRotTrainer, CaRotTrainingArguments, ShiftSet, ShiftSuite

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(CLIP)
    tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    markers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **markers}
    vision = {**tower, "image_size": size, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)

    class Rows:
        def __len__(self) -> int:
            return 4 * max(batch, whole)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": Image.fromarray(np.roll(noise, index, axis=0)), "label": index % 10}

    sets = [ShiftSet(Rows(), name=name, num_classes=10) for name in ("train", "validation", "home")]
    suite = ShiftSuite("noise", [f"class {i}" for i in range(10)], ["a photo of a {}."], *sets, {})
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        args = CaRotTrainingArguments.from_preset(
            "carot",
            output_dir=folder,
            per_device_train_batch_size=batch,
            contrastive_batch_size=whole,
            max_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            teacher_update_every=1,
        )
        processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
        trainer = CaRotTrainer(model=model, args=args, suite=suite, processing_class=processor, callbacks=[Clock()])
        before = peak()
        trainer.train()
    times = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    return {"memory": peak() - before, "seconds": statistics.median(times)}


def main() -> None:
    """Run all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small batch of small images")
    parser.add_argument("--variant", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(run(**options.variant)))
        return
    whole, size, steps = (16, 32, 3) if options.quick else (128, 224, 4)
    rows = []
    for batch in (whole, whole // 4, whole // 16):
        variant = {"batch": batch, "whole": 0 if batch == whole else whole, "steps": steps, "size": size}
        command = [sys.executable, __file__, "--variant", json.dumps(variant)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append((batch, json.loads(output.strip().splitlines()[-1])))
        print(rows[-1], file=sys.stderr, flush=True)
    import torch
    import transformers

    plain = rows[0][1]
    print(
        f"`python benchmarks/gradient_cache.py{' --quick' if options.quick else ''}`, batch {whole}, {size} x {size}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{platform.machine()}, 1 thread\n"
    )
    print("| embedded at once | peak memory beyond the model | | seconds a step | |\n|---|---|---|---|---|")
    for batch, row in rows:
        memory, seconds = row["memory"] / plain["memory"], row["seconds"] / plain["seconds"]
        print(f"| {batch} | {row['memory']:,.0f} MB | {memory:.2f} | {row['seconds']:.1f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
