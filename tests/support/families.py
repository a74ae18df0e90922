"""Tiny random models of every family, each with a processor of its own kind."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = "a photo of the digit number an image zero one two three . this is"
SIDE, PATCH = 16, 8
FAMILIES = ("metaclip_2", "chinese_clip", "altclip", "siglip", "siglip2")
SIGMOID = ("siglip", "siglip2")
CONTEXT = dict.fromkeys(FAMILIES, 12) | dict.fromkeys(SIGMOID, 64)  # the stock pipeline pads to 64 for SigLIP


def tokenizer_of(family):
    """Words as tokens, or letters; markers and defaults as the family's own tokenizer has them."""
    if family == "siglip2":  # pads on the left, and gives a mask, unless a checkpoint says otherwise
        letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ".", *"abcdefghijklmnopqrstuvwxyz"]
        return transformers.Siglip2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    names = {
        "chinese_clip": {"bos": "[CLS]", "pad": "[PAD]", "eos": "[SEP]", "unk": "[UNK]"},
        "siglip": {"pad": "</s>", "eos": "</s>", "unk": "<unk>"},
    }.get(family, {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"})
    vocabulary = {}
    for word in [*names.values(), *WORDS.split()]:
        vocabulary.setdefault(word, len(vocabulary))
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk"]))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [names[mark] for mark in ("bos", "eos") if mark in names]
    tokens.post_processor = processors.TemplateProcessing(
        single=f"{names['bos']} $A {names['eos']}" if "bos" in names else f"$A {names['eos']}",
        special_tokens=[(mark, vocabulary[mark]) for mark in marks],
    )
    special = {f"{mark}_token": text for mark, text in names.items()}
    inputs = ["input_ids"] if family == "siglip" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokens, model_input_names=inputs, **special)


def processor_of(family):
    size = {"height": SIDE, "width": SIDE}
    if family == "siglip2":
        images = transformers.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=6)
    elif family == "siglip":
        images = transformers.SiglipImageProcessor(size=size)
    elif family == "chinese_clip":
        images = transformers.ChineseCLIPImageProcessor(size=size, do_center_crop=False)
    else:
        images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    kind = {
        "siglip": transformers.SiglipProcessor,
        "siglip2": transformers.Siglip2Processor,
        "chinese_clip": transformers.ChineseCLIPProcessor,
        "altclip": transformers.AltCLIPProcessor,
    }.get(family, transformers.CLIPProcessor)
    return kind(image_processor=images, tokenizer=tokenizer_of(family))


def model_of(family, tokenizer, seed=0):
    torch.manual_seed(seed)
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = {**TOWER, **ids, "max_position_embeddings": CONTEXT[family]}
    if family in ("chinese_clip", "altclip"):  # BERT's would blur what is compared
        text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision = {**TOWER, "image_size": SIDE, "patch_size": PATCH}
    if family == "metaclip_2":
        model = transformers.MetaClip2Model(
            transformers.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=12)
        )
    elif family == "chinese_clip":
        model = transformers.ChineseCLIPModel(
            transformers.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        )
    elif family == "altclip":
        text["max_position_embeddings"] = CONTEXT[family] + tokenizer.pad_token_id + 1
        model = transformers.AltCLIPModel(
            transformers.AltCLIPConfig(text_config={**text, "project_dim": 14}, vision_config=vision, projection_dim=12)
        )
    elif family == "siglip":
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    else:
        patches = {**TOWER, "patch_size": PATCH, "num_patches": 4}
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=patches))
    if family in SIGMOID:  # as SigLIP starts its pre-training
        with torch.no_grad():
            model.logit_scale.fill_(torch.tensor(10.0).log())
            model.logit_bias.fill_(-4.0)
    return model.eval()
