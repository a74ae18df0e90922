"""What the benchmarks of training steps share: a CLIP of random weights, one batch, our trainer, hand-written loops."""

from __future__ import annotations

import copy
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, TrainerCallback

from carot_hf import CaRotTrainer, CaRotTrainingArguments, ShiftSet, ShiftSuite
from carot_hf.data.captions import CAPTION_INDEX

CLIP = Path(__file__).resolve().parent.parent / "carot_hf" / "suites" / "digits_clip"
CONTEXT = 77
SHORTEST, LONGEST = 7, 16  # tokens of a caption, markers included: what ImageNet's names give with CLIP's templates
FULL_SIZE = {"depth": 12, "vision": 768, "text": 512, "image": 224}  # ViT-B/16
TINY_SIZE = {"depth": 1, "vision": 64, "text": 64, "image": 32}
CAROT_WEIGHT = 0.75


def versions() -> str:
    """What a table must say about the software."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def peak_megabytes() -> float:
    """The most memory that this process has had since `forget_peak`; `ru_maxrss` begins with that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def forget_peak() -> None:
    """Let the peak be what is in use now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def processor(image: int) -> CLIPProcessor:
    """CLIP's processor for square images; the tokenizer is that of the demo."""
    images = CLIPImageProcessor(size={"shortest_edge": image}, crop_size={"height": image, "width": image})
    return CLIPProcessor(image_processor=images, tokenizer=CLIPTokenizer.from_pretrained(CLIP))


def clip(
    processor: CLIPProcessor, *, depth: int, vision: int, text: int, image: int, text_depth: int | None = None
) -> CLIPModel:
    """A CLIP of random weights, CLIP's vocabulary and the demo's markers; both towers of one depth unless said."""
    torch.manual_seed(0)
    markers = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    towers = {
        name: {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
        for name, width in (("text", text), ("vision", vision))
    }
    text_config = {**towers["text"], **markers, "num_hidden_layers": text_depth or depth, "vocab_size": 49408}
    vision_config = {**towers["vision"], "num_hidden_layers": depth, "image_size": image, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=text))


def make_batch(size: int, processor: CLIPProcessor, *, image: int, captions: int = 0) -> dict[str, Tensor]:
    """Random pixels, uint8 as our loader hands them over, and random captions, padded to the longest.

    Of so many captions, in turn, if `captions` is not 0; else all are distinct.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(SHORTEST, LONGEST, size).round().long()[:, None]
    places = torch.arange(LONGEST)
    tokenizer = processor.tokenizer
    taken = sorted({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id})
    ids = torch.randint(taken[-1] + 1, 49408, (size, len(places)), generator=generator)
    ids[:, 0] = tokenizer.bos_token_id
    ids = torch.where(places == lengths - 1, tokenizer.eos_token_id, ids)
    ids = torch.where(places >= lengths, tokenizer.pad_token_id, ids)
    if captions:
        rows = torch.arange(size) % captions
        ids, lengths = ids[rows], lengths[rows]
    pixels = torch.randint(0, 256, (size, 3, image, image), generator=generator, dtype=torch.uint8)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": (places < lengths).long()}


def as_collated(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as our collator hands it over for CLIP: no mask, since its text tower never sees the padding, and each
    distinct caption once."""
    once, index = batch["input_ids"].unique(dim=0, return_inverse=True)
    made = {"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"]}
    return made if len(once) == len(index) else {**made, "input_ids": once, CAPTION_INDEX: index}


def padded(batch: dict[str, Tensor], processor: CLIPProcessor) -> dict[str, Tensor]:
    """The batch with captions of 77 tokens, as published."""
    missing = CONTEXT - batch["input_ids"].shape[1]
    ids = F.pad(batch["input_ids"], (0, missing), value=processor.tokenizer.pad_token_id)
    return {**batch, "input_ids": ids, "attention_mask": F.pad(batch["attention_mask"], (0, missing))}


class Rows:
    """Names of samples; the batch is a fixed one."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.new("RGB", (8, 8)), "label": index % 2}


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.stamps: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time, once the device is done."""
        synchronize(self.device)
        self.stamps.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first, from the end of the one before: loader, callbacks and logging included."""
        return [later - earlier for earlier, later in itertools.pairwise(self.stamps)]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def train(
    preset: str,
    model: CLIPModel,
    batch: dict[str, Tensor],
    processor: CLIPProcessor,
    steps: int,
    clock: Clock | None = None,
    **options: Any,
) -> tuple[list[float], list[float]]:
    """Train with our trainer on one batch; seconds and losses of the steps after the first."""
    size = len(batch["pixel_values"])
    train, validation, home = (
        ShiftSet(Rows(64 * size), name=name, num_classes=2) for name in ("train", "validation", "home")
    )
    suite = ShiftSuite("synthetic", ["cat", "dog"], ["a photo of a {}."], train, validation, home, {})
    cpu = options.pop("device", "cpu") == "cpu"
    clock = clock or Clock("cpu" if cpu else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "per_device_train_batch_size": size,
            "max_steps": steps,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": cpu,
        }
        trainer = CaRotTrainer(
            model=model,
            args=CaRotTrainingArguments.from_preset(preset, **{**arguments, **options}),
            suite=suite,
            processing_class=processor,
            data_collator=lambda rows: batch,
            callbacks=[clock],
        )
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return clock.seconds, losses[1:]  # none if `logging_steps` is large


def hand_written(
    model: CLIPModel, inputs: dict[str, Tensor], *, distillation: float = 0.0, autocast: bool = False
) -> Callable[[], Tensor]:
    """A step of FLYP, or with ``distillation`` of CaRot, in plain torch, as in a short script: its loss."""
    device = model.device.type
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if distillation else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    model.train()

    def logits(network: CLIPModel) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            outputs = network(**inputs)
        similarities: Tensor = outputs.logits_per_image.float()
        return similarities

    def step() -> Tensor:
        ours = logits(model)
        targets = torch.arange(len(ours), device=ours.device)
        loss = (F.cross_entropy(ours, targets) + F.cross_entropy(ours.T, targets)) / 2
        if teacher is not None:
            with torch.no_grad():
                theirs = logits(teacher)
            for a, b in ((ours, theirs), (ours.T, theirs.T)):
                divergence = F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="batchmean", log_target=True)
                loss = loss + distillation / 2 * divergence
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def timed(step: Callable[[], Tensor], steps: int, device: str = "cpu") -> tuple[list[float], list[float]]:
    """Seconds and losses of all steps but the first."""
    seconds, losses = [], []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        loss = step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return seconds[1:], losses[1:]


def turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Let several take turns, forwards and backwards, so that a machine that slows down does so for all.

    Each round begins with another one, or who is first and last would follow itself each time, and nobody else would.

    Args:
        runs: By name.
        rounds: That count; one before them does not.
        clock: ``time.perf_counter``, or ``time.process_time`` where others work on the machine.
    Returns:
        Seconds by name and round, and what each returned last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    found = {}
    for number in range(rounds + 1):
        names = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        for name in names if number % 2 else names[::-1]:
            start, wall = clock(), time.perf_counter()
            found[name] = runs[name]()
            elapsed, waited = clock() - start, time.perf_counter() - wall
            if number:
                seconds[name].append(elapsed)
                print(f"round {number}: {name}: {elapsed:.3f} ({waited:.3f} waited)", file=sys.stderr, flush=True)
    return seconds, found
