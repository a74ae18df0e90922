"""Make the small CLIP of the digits suite: a CLIPModel and its processor, in about three minutes on one CPU core.

    python examples/digits/make_clip.py                    # rebuilds carot_hf/suites/digits_clip, prints this table
    python examples/digits/make_clip.py --evaluate_only    # the table alone, of the folder as it is

It pretrains on MNIST digits and printed ones in varied renditions (`carot_hf.suites.digits.pretraining_split`) with
CLIP's contrastive loss, then divides its logits by one temperature fitted on digits held out of pre-training. Expect:

    set            n  accuracy     ECE
    UCI test     797     0.795   0.082
    mnist       2000     0.964   0.027
    print        960     0.982   0.048
    outline     2000     0.875   0.030
    thick       2000     0.953   0.028
    clutter     2000     0.952   0.034

On the same machine, with the same versions of the libraries, it makes the same files bit for bit.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    get_cosine_schedule_with_warmup,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from carot_hf.calibration.metrics import calibration_metrics
from carot_hf.calibration.temperature import fit_temperature
from carot_hf.suites.digits import (
    CLASS_NAMES,
    SIZE,
    TEMPLATES,
    Images,
    fine_tuning_splits,
    pretraining_split,
    shift_splits,
)

SEED = 0
EPOCHS = 30
RENDITIONS = 10  # of every digit; each epoch takes the next, and rendering takes a second
BATCH_SIZE = 64
LEARNING_RATE = 1.5e-3
HELD_OUT = 10  # every tenth digit is for the temperature
MEDIUM_TEMPLATE, MEDIUM_SHARE = "a {medium} digit {{}}", 0.25
MAX_LOGIT_MULTIPLIER = 100.0


def all_captions() -> list[str]:
    """Every caption that pre-training can draw, and so the corpus of the tokenizer."""
    templates = [*TEMPLATES, *(MEDIUM_TEMPLATE.format(medium=medium) for medium in ("handwritten", "printed"))]
    return [template.format(name) for template in templates for name in CLASS_NAMES]


def learn_merges(words: Counter[str], symbols: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair of neighbours until every word is one symbol.

    Equal counts are decided by the order of the symbols. The trainer of `tokenizers` leaves that to a hash map, and so
    its vocabulary differs from run to run.
    """
    order = {symbol: index for index, symbol in enumerate(symbols)}
    spelling = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words.elements() for pair in pairwise(spelling[word])):
        best = min(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]))
        merges.append(best)
        order.setdefault("".join(best), len(order))
        for parts in spelling.values():
            for start in range(len(parts) - 1, 0, -1):  # no pair of the captions overlaps itself, as "aaa" would
                if parts[start - 1 : start + 1] == [*best]:
                    parts[start - 1 : start + 1] = ["".join(best)]
    return merges


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Learn byte-pair merges for the captions; laid out as OpenAI's, so that any text can be tokenised.

    The vocabulary is all 256 bytes, each of them as the end of a word, the merges, and the two special tokens last.
    """
    backend = CLIPTokenizer().backend_tokenizer  # lends its normaliser and its splitting into words
    normalised = [backend.normalizer.normalize_str(caption) for caption in captions]
    words = Counter(word for text in normalised for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    letters = sorted(ByteLevel.alphabet())
    symbols = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = learn_merges(words, symbols)
    entries = [*dict.fromkeys([*symbols, *("".join(pair) for pair in merges)]), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, merges=merges, model_max_length=SIZE
    )


def build_processor() -> CLIPProcessor:
    """Wrap the tokenizer and an image processor that leaves 32 x 32 digits as they are but for the normalisation."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.3] * 3,
        image_std=[0.4] * 3,
    )
    return CLIPProcessor(image_processor, build_tokenizer(all_captions()))


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Make a CLIPModel of width 64, 3 vision and 2 text layers, with the tokenizer's own special ids."""
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 64}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=64))


def pixel_values(processor: CLIPProcessor, images: Images) -> Tensor:
    """Run the image processor: ``(N, 32, 32)`` uint8 -> ``(N, 3, 32, 32)`` float32."""
    rgb = np.repeat(images[..., None], 3, axis=-1)
    result: Tensor = processor.image_processor(list(rgb), return_tensors="pt")["pixel_values"]
    return result


def draw_captions(rng: np.random.Generator, labels: np.ndarray, media: np.ndarray) -> list[str]:
    """Caption each image: mostly a neutral template, sometimes one that names the medium."""
    named = rng.random(len(labels)) < MEDIUM_SHARE
    neutral = rng.integers(len(TEMPLATES), size=len(labels))
    return [
        (MEDIUM_TEMPLATE.format(medium=media[row]) if named[row] else TEMPLATES[neutral[row]]).format(
            CLASS_NAMES[label]
        )
        for row, label in enumerate(labels)
    ]


def image_embeds(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Embed and normalise images: ``(N, 3, 32, 32)`` -> ``(N, 64)``."""
    return functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def text_embeds(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Embed and normalise captions: ``(N, 64)``."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)


def batch_loss(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, captions: list[str]) -> Tensor:
    """Compute CLIP's contrastive loss; equal captions are embedded once, which saves a third of the time."""
    different = sorted(set(captions))
    columns = torch.tensor([different.index(caption) for caption in captions])
    texts = text_embeds(model, tokenizer, different)[columns]
    logits = model.logit_scale.exp() * image_embeds(model, pixels) @ texts.T
    diagonal = torch.arange(len(captions))
    return (functional.cross_entropy(logits, diagonal) + functional.cross_entropy(logits.T, diagonal)) / 2


def pretrain(model: CLIPModel, processor: CLIPProcessor) -> None:
    """Minimise the contrastive loss over the digits that are not held out, from epoch to epoch in other renditions."""
    rng = np.random.default_rng(SEED)
    splits = [pretraining_split(seed) for seed in range(RENDITIONS)]
    pixels = [pixel_values(processor, digits.images) for digits, _ in splits]
    digits, media = splits[0]
    rows = np.flatnonzero(np.arange(len(digits)) % HELD_OUT != 0)
    steps_per_epoch = len(rows) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    total_steps = EPOCHS * steps_per_epoch
    scheduler = get_cosine_schedule_with_warmup(optimizer, total_steps // 10, total_steps)
    model.train()
    for epoch in range(EPOCHS):
        order = rng.permutation(rows)
        losses = []
        for step in range(steps_per_epoch):
            batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            captions = draw_captions(rng, digits.labels[batch], media[batch])
            loss = batch_loss(model, processor.tokenizer, pixels[epoch % RENDITIONS][batch], captions)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(MAX_LOGIT_MULTIPLIER))
            losses.append(loss.item())
        print(f"epoch {epoch + 1:2d}/{EPOCHS}  contrastive loss {np.mean(losses):.3f}", flush=True)
    model.eval()


@torch.no_grad()
def zero_shot_logits(model: CLIPModel, processor: CLIPProcessor, images: Images) -> Tensor:
    """Score images against the class heads, averaged over the templates: ``(N, 10)`` logits."""
    heads = []
    for name in CLASS_NAMES:
        prompts = text_embeds(model, processor.tokenizer, [template.format(name) for template in TEMPLATES])
        heads.append(functional.normalize(prompts.mean(0), dim=-1))
    logits: Tensor = (
        model.logit_scale.exp() * image_embeds(model, pixel_values(processor, images)) @ torch.stack(heads).T
    )
    return logits


def calibrate(model: CLIPModel, processor: CLIPProcessor) -> float:
    """Divide the logits by the temperature of least NLL on held-out digits; returns the temperature.

    No `bake_temperature`, which leaves a record and refuses a second time: what is made here counts as pretrained.
    """
    splits = [pretraining_split(RENDITIONS + seed)[0] for seed in range(4)]
    images = np.concatenate([split.images[::HELD_OUT] for split in splits])
    labels = np.concatenate([split.labels[::HELD_OUT] for split in splits])
    lowest = model.logit_scale.exp().item() / MAX_LOGIT_MULTIPLIER  # below it the multiplier would exceed 100
    temperature = fit_temperature(zero_shot_logits(model, processor, images), labels, bounds=(lowest, 10.0))
    with torch.no_grad():
        model.logit_scale -= math.log(temperature)
    return temperature


def print_table(model: CLIPModel, processor: CLIPProcessor) -> None:
    """Print zero-shot accuracy and ECE (10 bins) of the UCI test set and of every shift."""
    print(f"{'set':<10}{'n':>6}{'accuracy':>10}{'ECE':>8}")
    for name, split in {"UCI test": fine_tuning_splits()["test"], **shift_splits()}.items():
        metrics = calibration_metrics(zero_shot_logits(model, processor, split.images), split.labels)
        print(f"{name:<10}{len(split):>6}{metrics['accuracy']:>10.3f}{metrics['ece']:>8.3f}")


def main() -> None:
    """Make, save and evaluate the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).resolve().parents[2] / "carot_hf" / "suites" / "digits_clip"
    )
    parser.add_argument("--evaluate_only", action="store_true", help="print the table of the folder as it is")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace the checkpoint that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if (arguments.output_dir / "model.safetensors").exists() and not (
        arguments.evaluate_only or arguments.overwrite_output_dir
    ):
        parser.error(f"expected a new folder, got {arguments.output_dir} with a model: add --overwrite_output_dir")
    if not arguments.evaluate_only:
        start = time.perf_counter()
        torch.manual_seed(SEED)
        processor = build_processor()
        model = build_model(processor.tokenizer)
        pretrain(model, processor)
        temperature = calibrate(model, processor)
        model.save_pretrained(arguments.output_dir)
        processor.save_pretrained(arguments.output_dir)
        print(f"temperature {temperature:.3f}, {model.num_parameters():,} parameters", end=", ")
        print(f"{time.perf_counter() - start:.0f} s -> {arguments.output_dir}")
    model = CLIPModel.from_pretrained(arguments.output_dir)  # nosec B615  # written above
    processor = CLIPProcessor.from_pretrained(arguments.output_dir)  # nosec B615  # written above
    print_table(model, processor)


if __name__ == "__main__":
    main()
