"""What `peers.py` measures: our trainer and what people train CLIP with instead, on the same model and the same images.

Each contestant is a function of a `Task` that returns its steps. Where a library has a trainer, it is the library's own
trainer, collator and decoding of images; options that cost time and change nothing else are alike: no clipping of
gradients, a constant learning rate, a log entry a step, no evaluation, no checkpoints.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import input_pipeline
import numpy as np
import steps
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from train_step import Bare, Paused
from transformers import CLIPModel, Trainer, TrainingArguments

from carot_hf import CaRotTrainer, CaRotTrainingArguments, ShiftSet, ShiftSuite
from carot_hf.data.captions import CaptionTable, fill_template
from carot_hf.models.backbones import caption_options

TEMPLATES = ["a {}.", "photo of {}.", "a photo of {}."]  # 4 to 6 tokens without the name, which has 2 to 5
LETTERS = "bcdefghjklmnpqrstvwx"  # a token each
AT_ONCE = 8  # embedded, of the gradient caches
RATE, DECAY = 1e-5, 0.1
Batch = dict[str, Any]


@dataclass
class Task:
    """What all contestants do.

    Attributes:
        size: Of the model, as `steps.clip` takes it.
        batch_size: Pairs a step.
        count: Steps of each contestant.
        names: Of the classes.
        files: JPEGs of the samples.
        labels: Their classes.
        captions: Their captions.
        decode: End to end: from the files. Otherwise one batch, made beforehand by each one's own collator.
    """

    size: dict[str, int]
    batch_size: int
    count: int
    names: list[str]
    files: list[bytes]
    labels: list[int]
    captions: list[str]
    decode: bool

    def __post_init__(self) -> None:
        self.processor = steps.processor(self.size["image"])
        self.weights = steps.clip(self.processor, **self.size).state_dict()
        side = self.size["image"]
        draws = np.random.default_rng(0).integers(0, 256, (self.batch_size, side, side, 3), dtype=np.uint8)
        self.pictures = [Image.fromarray(pixels) for pixels in draws]  # of a batch that needs no decoding, nor resizing

    def model(self) -> CLIPModel:
        """A model with the weights of all."""
        model = steps.clip(self.processor, **self.size)
        model.load_state_dict(self.weights)
        return model

    def dataset(self) -> Any:
        """The samples as `datasets` has them: it decodes."""
        rows = {"image": [{"bytes": file, "path": None} for file in self.files], "text": self.captions}
        return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())

    @property
    def fixed(self) -> list[dict[str, Any]]:
        """The rows of the one batch."""
        return [{"image": image, "text": text} for image, text in zip(self.pictures, self.captions, strict=False)]

    def collator(self, collate: Callable[[list[dict[str, Any]]], Batch]) -> Callable[[list[dict[str, Any]]], Batch]:
        """A collator, or what it makes of the one batch."""
        if self.decode:
            return collate
        batch = collate(self.fixed)
        return lambda rows: dict(batch)

    def rows(self) -> Any:
        """What a trainer of others is given to fetch from."""
        return self.dataset() if self.decode else _Nothing(len(self.files))


class _Nothing(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of no content, for a collator that knows its batch."""

    column_names = ("image", "text")

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": None, "text": None}


def make_task(size: dict[str, int], batch_size: int, count: int, *, few: bool, decode: bool, photo: Any) -> Task:
    """Make the data of a task.

    Args:
        size: Of the model.
        batch_size: Pairs a step.
        count: Steps.
        few: 10 classes; otherwise each sample is of its own, and the captions of a batch are all distinct.
        decode: As in `Task`.
        photo: Width, height and number of the JPEGs, which repeat.
    """
    samples = batch_size * (count + 2)
    classes = 10 if few else samples
    made = input_pipeline.make_jpegs(*photo)
    names = [_name(index) for index in range(classes)]
    labels = [index % classes for index in range(samples)]
    draws = np.random.default_rng(1).integers(0, len(TEMPLATES), samples).tolist()
    captions = [fill_template(TEMPLATES[draw], names[label]) for label, draw in zip(labels, draws, strict=True)]
    return Task(size, batch_size, count, names, [made[i % len(made)] for i in range(samples)], labels, captions, decode)


def _name(index: int) -> str:
    """A name of two to five tokens, no two alike."""
    number, letters = index // 4, []
    for _ in range(2 + index % 4):
        number, digit = divmod(number, len(LETTERS))
        letters.append(LETTERS[digit])
    return " ".join(letters)


# ---- ours ----


def ours(preset: str, at_once: int | None = None, every: int = 500) -> Callable[[Task], Paused]:
    """Our trainer, with a gradient cache if told how many pairs to embed at once; the teacher moves ``every`` steps."""

    def make(task: Task) -> Paused:
        model = task.model()
        micro = at_once or task.batch_size
        own = [
            {"image": {"bytes": file, "path": None}, "label": label}
            for file, label in zip(task.files, task.labels, strict=True)
        ]
        train = ShiftSet(own, name="train", num_classes=len(task.names))
        validation, home = (
            ShiftSet(steps.Rows(8), name=name, num_classes=len(task.names)) for name in ("validation", "home")
        )
        suite = ShiftSuite("peers", task.names, TEMPLATES, train, validation, home, {})
        batches = None if task.decode else _ready(task, model, micro)

        def run(clock: Any) -> Any:
            with tempfile.TemporaryDirectory() as folder:
                arguments = CaRotTrainingArguments.from_preset(
                    preset,
                    **{**_arguments(task, folder, micro), "teacher_update_every": every},
                    contrastive_batch_size=task.batch_size if at_once else 0,
                )
                trainer = CaRotTrainer(
                    model=model,
                    args=arguments,
                    suite=suite,
                    processing_class=task.processor,
                    callbacks=[clock],
                    **({} if batches is None else {"data_collator": lambda rows: next(batches)}),
                )
                trainer.train()
            return _losses(trainer)

        return Paused(run)

    return make


def _ready(task: Task, model: CLIPModel, micro: int) -> Iterator[Batch]:
    """The one batch as our collator hands it over, in parts."""
    tokenizer = task.processor.tokenizer
    table = CaptionTable(tokenizer, task.names, TEMPLATES, **caption_options(model.config, tokenizer))
    filled = {
        fill_template(template, name): (label, number)
        for label, name in enumerate(task.names)
        for number, template in enumerate(TEMPLATES)
    }
    numbers = torch.tensor([filled[caption] for caption in task.captions[: task.batch_size]])
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in task.pictures])).permute(0, 3, 1, 2).contiguous()
    parts = [
        {"pixel_values": images, **table.lookup_once(*places.T), "labels": places[:, 0]}
        for images, places in zip(pixels.split(micro), numbers.split(micro), strict=True)
    ]
    return (dict(part) for part in itertools.cycle(parts))


def _arguments(task: Task, folder: str, micro: int) -> dict[str, Any]:
    """Of a trainer, ours and others'."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro,
        "max_steps": task.count,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": DECAY,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def _losses(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


# ---- others ----


def stock(padding: str) -> Callable[[Task], Paused]:
    """transformers' own Trainer, as its examples train CLIP: the model computes the loss."""

    def make(task: Task) -> Paused:
        lengths = {"max_length": steps.CONTEXT} if padding == "max_length" else {}

        def collate(rows: list[dict[str, Any]]) -> Batch:
            texts, images = [row["text"] for row in rows], [row["image"] for row in rows]
            made = task.processor(text=texts, images=images, padding=padding, return_tensors="pt", **lengths)
            return {**made, "return_loss": True}

        model, collator, rows = task.model(), task.collator(collate), task.rows()

        def run(clock: Any) -> Any:
            with tempfile.TemporaryDirectory() as folder:
                arguments = TrainingArguments(
                    **_arguments(task, folder, task.batch_size), remove_unused_columns=False, dataloader_drop_last=True
                )
                trainer = Trainer(
                    model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]
                )
                trainer.train()
            return _losses(trainer)

        return Paused(run)

    return make


def sentence(cached: bool) -> Callable[[Task], Paused]:
    """sentence-transformers, with its own loss in both directions; ``cached``: that with a gradient cache."""

    def make(task: Task) -> Paused:
        import sentence_transformers as st
        from sentence_transformers import losses
        from sentence_transformers.models import Transformer

        scale = math.exp(float(task.weights["logit_scale"]))
        options: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        with tempfile.TemporaryDirectory() as folder:
            task.model().save_pretrained(folder)
            task.processor.save_pretrained(folder)
            model = st.SentenceTransformer(modules=[Transformer(folder)], device="cpu")
        loss: Any
        if cached:
            loss = losses.CachedMultipleNegativesRankingLoss(model, scale, mini_batch_size=AT_ONCE, **options)
        else:
            loss = losses.MultipleNegativesRankingLoss(model, scale, **options)

        def run(clock: Any) -> Any:
            with tempfile.TemporaryDirectory() as folder:
                arguments = st.SentenceTransformerTrainingArguments(
                    **_arguments(task, folder, task.batch_size), dataloader_drop_last=True
                )
                rows = (
                    task.dataset() if task.decode else task.dataset().cast_column("image", datasets.Image(decode=False))
                )
                trainer = st.SentenceTransformerTrainer(
                    model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=[clock]
                )
                if not task.decode:
                    collator: Any = trainer.data_collator
                    ready = [collator.preprocess_fn([row[key] for row in task.fixed]) for key in ("image", "text")]
                    collator.preprocess_fn = lambda values, **_: dict(ready[isinstance(values[0], str)])
                trainer.train()
            return _losses(trainer)

        return Paused(run)

    return make


def open_clip(task: Task) -> Bare:
    """A loop as in open_clip's `train_one_epoch`, with its `ClipLoss`, in float32; captions padded as it pads them."""
    folder = importlib.metadata.distribution("open_clip_torch").locate_file("open_clip")
    spec: Any = importlib.util.spec_from_file_location("_loss", Path(str(folder)) / "loss.py")
    module = importlib.util.module_from_spec(spec)  # the package as a whole needs torchvision
    spec.loader.exec_module(module)
    loss_of, model = module.ClipLoss(), task.model()
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    batches = _loop_batches(task)
    model.train()

    def step() -> Tensor:
        optimizer.zero_grad()
        inputs = next(batches)
        images = F.normalize(model.get_image_features(inputs["pixel_values"]).pooler_output, dim=-1)
        texts = F.normalize(model.get_text_features(inputs["input_ids"]).pooler_output, dim=-1)
        loss: Tensor = loss_of(images, texts, model.logit_scale.exp())
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    return Bare(step)


def _loop_batches(task: Task) -> Iterator[Batch]:
    """What open_clip's loader does, without torchvision: decode, crop at random, resize, normalise, tokenise."""
    images = task.processor.image_processor
    mean, std = (torch.tensor(part)[:, None, None] for part in (images.image_mean, images.image_std))
    generator, side = np.random.default_rng(0), task.size["image"]

    def pixels(image: Image.Image) -> Tensor:
        if task.decode:
            area, ratio = generator.uniform(0.9, 1.0), math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            width = min(image.width, round(math.sqrt(image.width * image.height * area * ratio)))
            height = min(image.height, round(math.sqrt(image.width * image.height * area / ratio)))
            left, top = generator.integers(image.width - width + 1), generator.integers(image.height - height + 1)
            box = (left, top, left + width, top + height)
            image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box)
        made: Tensor = (torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255) - mean) / std
        return made

    def batch(pictures: list[Image.Image], captions: list[str]) -> Batch:
        tokens = task.processor.tokenizer(captions, padding="max_length", max_length=steps.CONTEXT, return_tensors="pt")
        return {"pixel_values": torch.stack([pixels(image) for image in pictures]), "input_ids": tokens["input_ids"]}

    if not task.decode:
        yield from itertools.repeat(batch(task.pictures, task.captions[: task.batch_size]))
    for start in itertools.count(step=task.batch_size):
        chosen = [(start + row) % len(task.files) for row in range(task.batch_size)]
        yield batch([Image.open(io.BytesIO(task.files[i])) for i in chosen], [task.captions[i] for i in chosen])


# ---- who there is ----

Make = Callable[[Task], "Bare | Paused"]
FLYP, CAROT, CACHE = "FLYP, ours", "CaRot, ours", f"FLYP with a gradient cache of {AT_ONCE}, ours"
# Each one with the package it needs, the name of that on the index, and what of ours does the same.
CONTESTANTS: dict[str, tuple[Make, str | None, str]] = {
    FLYP: (ours("flyp"), None, FLYP),
    "sentence-transformers": (sentence(cached=False), "sentence_transformers", FLYP),
    "transformers' Trainer, captions trimmed": (stock("longest"), None, FLYP),
    "transformers' Trainer, captions padded to 77": (stock("max_length"), None, FLYP),
    "open_clip's loss in its loop": (open_clip, "open_clip", FLYP),
    CAROT: (ours("carot"), None, CAROT),
    CACHE: (ours("flyp", AT_ONCE), None, CACHE),
    f"sentence-transformers, cached, {AT_ONCE} at once": (sentence(cached=True), "sentence_transformers", CACHE),
}
PACKAGES = {"sentence_transformers": "sentence-transformers", "open_clip": "open_clip_torch", "trl": "trl"}


def present(package: str | None) -> bool:
    """Whether a package is installed; it is not imported."""
    return package is None or importlib.util.find_spec(package) is not None


def versions() -> str:
    """Of all that is measured."""
    there = [name for package, name in PACKAGES.items() if present(package)]
    return ", ".join([steps.versions(), *(f"{name} {importlib.metadata.version(name)}" for name in there)])
