"""A dress rehearsal of the main job at full shape: real names, real tokens, ViT-B/16; few images, few steps.

1,000 classes under OpenAI's names, local copies in the layouts of the Hub, OpenAI's vocabulary and configuration with
its legacy end marker; only the weights are random. `make rehearsal` puts the files of open_clip_torch, which has names
and merges, into .venv-rehearsal.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layouts import folders, parquet, tars
from safetensors.torch import load_file
from tolerances import float32_bound
from toys import ROOT
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, pipeline

from carot_hf import load_suite
from carot_hf.run.checkpoint import is_complete
from carot_hf.suites.imagenet.sets import SETS, wnids

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FILES = ROOT / ".venv-rehearsal"
TEMPLATE = "itap of a {}."
CLASSES = (0, 134, 517, 610, 999, 657)  # 657 and 744 are both "missile"


def alphabet():
    """OpenAI's 256 letters for bytes, in the order of their ids: those that can be printed first."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + index) for index in range(len(others))]


@pytest.fixture(scope="module")
def tokenizer():
    """OpenAI's: 49,408 entries out of the file of merges."""
    with gzip.open(FILES / "open_clip" / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = alphabet()
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    assert len(entries) == len(set(entries)) == 49408
    made = CLIPTokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, merges=merges, model_max_length=77
    )
    assert made("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]  # as OpenAI's gives it
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """``root``, the copies; ``clip``, the start model."""
    folder = tmp_path_factory.mktemp("rehearsal")
    root = folder / "root"
    train = np.repeat(CLASSES, 3)
    parquet(root / "ILSVRC/imagenet-1k", "train", train, files=2)
    parquet(root / "ILSVRC/imagenet-1k", "validation", np.array([0, 134, 999]))
    v2 = root / "clip-benchmark/wds_imagenetv2"
    tars(v2 / "test", np.array([0, 744]), image="webp")
    tars(root / "clip-benchmark/wds_imagenet-r" / "test", np.array([3, 199]))
    tars(root / "clip-benchmark/wds_imagenet-a" / "test", np.array([0, 150]), column="wnid",
         names=SETS["a"].label_names())  # fmt: skip
    folders(root / "sketch", np.array([10, 999]), wnids())
    tars(root / "clip-benchmark/wds_objectnet" / "test", np.array([0, 112]), image="png")
    (v2 / "zeroshot_classification_templates.txt").write_text(
        TEMPLATE.replace("{}", "{c}")
    )  # one, for the time it takes
    legacy = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}  # as OpenAI's checkpoints have it
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=legacy, vision_config={**vision, "projection_dim": 512}))
    assert 149e6 < sum(value.numel() for value in model.parameters()) < 150e6
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100.0))
    model.save_pretrained(folder / "clip")
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder / "clip")
    return folder


def finetune(folder, output_dir, *options):
    """The main job, as the README has it."""
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "--num_processes", "1",
               ROOT / "examples" / "finetune_imagenet.py", "--data_root", folder / "root", "--partial",
               "--model_name_or_path", folder / "clip", "--output_dir", output_dir, "--max_steps", "3",
               "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8", "--teacher_update_every", "1",
               "--warmup_steps", "0", "--save_steps", "2", "--logging_steps", "1",
               "--dataloader_num_workers", "0", "--reliability_diagrams", "False", "--use_cpu", "--report_to", "none",
               *options]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FILES}", "HF_HOME": str(folder / "home")}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads((output_dir / "metrics.json").read_text())


@pytest.fixture(scope="module")
def whole(folder):
    """An unbroken run; its metrics."""
    return finetune(folder, folder / "whole")


def test_it_trains_evaluates_calibrates_and_saves(folder, whole):
    metrics = whole["metrics"]
    assert whole["names"] == {"class_names": "open_clip_torch 3.3.0", "templates": whole["names"]["templates"]}
    for name in ("imagenet", "v2", "r", "a", "sketch", "objectnet", "id", "ood", "validation"):
        assert 0 <= metrics[f"eval_{name}_accuracy"] <= 1
        assert math.isfinite(metrics[f"eval_{name}_nll"])
    for name, labels in (("v2", 1000), ("r", 200), ("objectnet", 113)):  # weights are random: near chance
        assert 0.3 * math.log(labels) < metrics[f"eval_{name}_nll_ts"] < 3 * math.log(labels), name
    assert whole["steps"] == 3
    assert whole["calibration"]["n"] == len(CLASSES)
    assert is_complete(folder / "whole" / "checkpoint-2")
    text = json.loads((folder / "whole" / "config.json").read_text())["text_config"]
    assert (text["eos_token_id"], text["bos_token_id"], text["vocab_size"]) == (49407, 49406, 49408)


def test_an_interrupted_run_ends_at_the_same_weights(folder, whole):
    """From the checkpoint of step 2, in a folder of its own, bit for bit."""
    again = folder / "again"
    again.mkdir()
    shutil.copytree(folder / "whole" / "checkpoint-2", again / "checkpoint-2")
    resumed = finetune(folder, again, "--resume_from_checkpoint")
    assert resumed["steps"] == 3
    assert resumed["calibration"] == whole["calibration"]
    weights, others = (load_file(folder / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


@torch.no_grad()
def test_the_stock_model_gives_the_probabilities_that_were_reported(folder, whole, monkeypatch):
    """Text pooled at the real end marker: the NLL of the test images by transformers alone, and its pipeline."""
    monkeypatch.syspath_prepend(str(FILES))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "home")
    suite = load_suite("imagenet", root=folder / "root", check_counts=False, shifts=[])
    assert [suite.class_names[index] for index in CLASSES] == [
        "tench", "crane bird", "construction crane", "T-shirt", "toilet paper", "missile",
    ]  # fmt: skip
    assert suite.templates == [TEMPLATE]
    model, processor = CLIPModel.from_pretrained(folder / "whole"), CLIPProcessor.from_pretrained(folder / "whole")
    captions = [TEMPLATE.replace("{}", name) for name in suite.class_names]
    parts = []
    for start in range(0, 1000, 125):
        tokens = processor.tokenizer(captions[start : start + 125], padding=True, return_tensors="pt")
        parts.append(F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1))
    images = [suite.test[index]["image"] for index in range(len(suite.test))]
    pixels = processor.image_processor(images=images, return_tensors="pt")
    embeds = F.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
    logits = model.logit_scale.exp() * embeds @ torch.cat(parts).T
    labels = torch.tensor([suite.test[index]["label"] for index in range(len(suite.test))])
    multiplier = model.logit_scale.exp().item()
    bound = 2 * float32_bound(multiplier, 512, operations=24)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(whole["metrics"]["eval_imagenet_nll_ts"], abs=bound)
    chosen = [suite.class_names[index] for index in CLASSES]
    answers = pipeline("zero-shot-image-classification", model=str(folder / "whole"), device="cpu")(
        images[0], candidate_labels=chosen, hypothesis_template=TEMPLATE
    )
    found = {answer["label"]: answer["score"] for answer in answers}
    expected = logits[0, list(CLASSES)].softmax(dim=0).tolist()
    assert [found[name] for name in chosen] == pytest.approx(expected, abs=bound)
