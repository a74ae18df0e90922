"""Zero-shot evaluation: ours beside the plain loop that open_clip has, and by the size of the batch.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py            # some ten minutes, one core
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --quick    # does it run at all?

A CLIP of random weights (vision 6 x 384 at 224 pixels, text 4 x 256), JPEGs of 500 x 375, the same pixels for both. The
loop: a DataLoader, the image tower in inference mode, similarities to the head, top-1; the head class by class, as
open_clip makes it. Ours: `Evaluator.evaluate` without draws for intervals, with all its metrics, and a head of all
captions in large batches. Both take turns in one process; their accuracies must agree.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import steps
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from carot_hf import Evaluator, ShiftSet, ShiftSuite
from carot_hf.data.transforms import float_pixels, image_transform

SIZE = {"depth": 6, "vision": 384, "text": 256, "image": 224}
TEMPLATES = ["a photo of a {}.", "a drawing of a {}.", "a blurry photo of the {}.", "art of a {}."]


class Pictures:
    """JPEGs of smooth noise, decoded at each read."""

    def __init__(self, count: int, classes: int) -> None:
        rng = np.random.default_rng(0)
        self.files = []
        for _ in range(count):
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            stream = io.BytesIO()
            small.resize((500, 375), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
            self.files.append(stream.getvalue())
        self.labels = rng.integers(0, classes, count).tolist()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.open(io.BytesIO(self.files[index])).convert("RGB"), "label": self.labels[index]}


@torch.inference_mode()
def plain_head(model: Any, tokenizer: Any, names: list[str]) -> Tensor:
    """The class embeddings, class by class."""
    rows = []
    for name in names:
        tokens = tokenizer([template.format(name) for template in TEMPLATES], padding="max_length", max_length=77,
                           return_tensors="pt")  # fmt: skip
        embeds = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        rows.append(torch.nn.functional.normalize(embeds.mean(0), dim=0))
    return torch.stack(rows)


@torch.inference_mode()
def plain_loop(model: Any, transform: Any, pictures: Pictures, head: Tensor, batch_size: int) -> float:
    """Top-1 accuracy."""

    def collate(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack([transform.evaluate(sample["image"]) for sample in samples])
        return pixels, torch.tensor([sample["label"] for sample in samples])

    right = 0.0
    for pixels, labels in DataLoader(pictures, batch_size=batch_size, collate_fn=collate):  # type: ignore[arg-type]
        features = model.get_image_features(pixel_values=float_pixels(pixels, transform, torch.float32)).pooler_output
        logits = 100.0 * torch.nn.functional.normalize(features, dim=-1) @ head.T
        right += float((logits.argmax(1) == labels).sum())
    return right / len(pictures)


def row(name: str, seconds: list[float], count: int, peer: list[float]) -> str:
    """A line of the table: milliseconds a unit, and the ratio to the peer, with the middle half of the rounds."""
    ratios = [other / own for own, other in zip(seconds, peer, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    each = statistics.median(seconds) / count * 1e3
    return f"| {name} | {each:.2f} ms | {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} |"


def main() -> None:
    """Measure in rounds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few images")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size, count, classes = (steps.TINY_SIZE, 12, 4) if options.quick else (SIZE, 128, 100)
    sizes, same = ((4, 8), 8) if options.quick else ((8, 16, 32, 64, 128), 64)
    processor = steps.processor(size["image"])
    model = steps.clip(processor, **size).eval()
    transform, pictures = image_transform(processor), Pictures(count, classes)
    names = [f"thing number {index}" for index in range(classes)]
    data = ShiftSet(pictures, name="home", num_classes=classes, labels=np.array(pictures.labels))
    suite = ShiftSuite("noise", names, TEMPLATES, None, None, data, {})

    def ours(batch_size: int) -> Callable[[], float]:
        def run() -> float:
            evaluator = Evaluator(model, processor, suite, batch_size=batch_size)
            evaluator.embedder.progress = False
            return float(evaluator.evaluate(n_bootstrap=0).metrics["home"]["accuracy"])

        return run

    head = plain_head(model, processor.tokenizer, names)
    runs: dict[str, Callable[[], Any]] = {
        "plain loop, head and images": lambda: plain_loop(
            model, transform, pictures, plain_head(model, processor.tokenizer, names), same
        ),
        "plain loop, images": lambda: plain_loop(model, transform, pictures, head, same),
        **{f"ours, head and images, batches of {size}": ours(size) for size in sizes},
    }
    seconds, found = steps.turns(runs, options.rounds, time.process_time)
    if len(set(found.values())) > 1:
        raise SystemExit(f"Expected one accuracy, got {found}.")
    print(
        f"`python benchmarks/evaluation.py`, {count} images, {classes} classes x {len(TEMPLATES)} templates, batches "
        f"of {same} in the loops, {options.rounds} rounds, {steps.versions()}, {torch.get_num_threads()} threads\n"
    )
    print("| who | processor time an image | plain loop, head and images / it | middle half |\n|---|---|---|---|")
    for name, times in seconds.items():
        print(row(name, times, count, seconds["plain loop, head and images"]))


if __name__ == "__main__":
    main()
