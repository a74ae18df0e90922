"""From the model that a user has to the one that is trained: one function, called for each model that will be."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..basics.escape import guarded
from ..basics.precision import not_finite
from ..calibration.record import calibration_record
from ..data.captions import CaptionTable, class_embeddings
from ..data.suite import ShiftSuite
from ..objective.terms import CONTEXTS, RANDOM_TEXTS, needed
from .backbones import TABLE, backbone_of, caption_options, check_method, has_text_dropout, is_backbone
from .classifier import CLIPClassifier, export_classifier
from .lora import add_lora, base_model, cast_frozen, check_adapters, is_adapted, merged, refuse_own_adapters

logger = guarded(logging.get_logger(__name__))

ARGUMENTS = ("objective", "freeze", "lora_rank", "lora_alpha", "float32_weights")  # that shape the model
FROZEN = {"vision": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained.

    Attributes:
        model: The model, a :class:`~carot_hf.CLIPClassifier` for the objective "cross_entropy".
        link: From logits to probabilities: "softmax" or "sigmoid".
        captions: The suite's captions as its text tower takes them.
        arguments: What `ARGUMENTS` were.
        clip: The model that a classifier was made of, where a term embeds texts with it; else ``None``.
    """

    model: Any
    link: str
    captions: CaptionTable
    arguments: Mapping[str, Any]
    clip: Any = None


def prepare_model(model: Any, args: Any, suite: ShiftSuite, processor: Any) -> Prepared:
    """Check a model, bring it to its dtype, align its markers, add LoRA or make the classifier, freeze a tower.

    Args:
        model: Of a family of :data:`~carot_hf.models.backbones.BACKBONES`, a ``peft.PeftModel`` of a ``CLIPModel``
            with LoRA, or a :class:`~carot_hf.CLIPClassifier` of the suite's classes. It may be changed in place.
        args: :class:`~carot_hf.CaRotTrainingArguments`.
        suite: Class names, templates, and where they come from, which the model's config then says.
        processor: The model's processor.
    Raises:
        TypeError: If the model is of no family that is known.
        ValueError: If model, arguments and suite do not fit each other, or a weight is not finite.
    """
    parts = model.modules()
    if any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts):
        raise TypeError(
            f"Expected a model that is not compiled, got a compiled {type(model).__name__}. Pass the model itself "
            "and set `torch_compile` True: student and teacher are then compiled alike."
        )
    link = "softmax"
    if is_adapted(model):
        check_adapters(model, args)
        cast_frozen(model, _training_dtype(model, args))
    else:
        refuse_own_adapters(model)
        if not isinstance(model, CLIPClassifier) or args.objective == "contrastive":
            link = backbone_of(model).link
            check_method(model, args)
        model.to(_training_dtype(model, args))
    network = base_model(model)
    if is_backbone(network):
        align_markers(network, processor)
    elif model.head.out_features != len(suite.class_names):
        raise ValueError(
            f"Expected a classifier of the {len(suite.class_names)} classes of suite '{suite.name}', got one of "
            f"{model.head.out_features}. Start from a CLIPModel, or from a classifier of this suite."
        )
    calibration_record(network)  # one that is none is refused here
    if (name := not_finite(model)) is not None:
        raise ValueError(
            f"Expected a start model of finite weights, got nan or inf in `{name}` of "
            f"{getattr(network.config, '_name_or_path', '') or type(network).__name__}. Load another checkpoint."
        )
    captions = captions_of(network, suite, processor)
    clip = None
    if model is network and args.lora_rank:
        model = add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    elif args.objective == "cross_entropy":
        clip = _with_texts(network) if needed(args, RANDOM_TEXTS, CONTEXTS) else None
        model = zero_shot_classifier(model, suite, captions) if is_backbone(network) else model
    _freeze(model, args.freeze)
    if suite.sources:  # saved with the model
        model.config.prompt_sources = dict(suite.sources)
    return Prepared(model, link, captions, {name: getattr(args, name) for name in ARGUMENTS}, clip)


def _with_texts(network: Any) -> Any:
    """A model that a term can embed texts with."""
    if not is_backbone(network):
        raise ValueError(
            f"Expected a CLIPModel to start from with `energy_gap_weight` or `context_distillation_weight`, got "
            f"{type(network).__name__}. They embed texts, and it has no text tower: start from the CLIPModel."
        )
    return network


def zero_shot_classifier(model: Any, suite: ShiftSuite, captions: CaptionTable) -> CLIPClassifier:
    """Return the image tower of a ``CLIPModel`` with the suite's zero-shot head."""
    classes = class_embeddings(model, captions)
    classifier: CLIPClassifier = CLIPClassifier.from_clip(model, classes, suite.class_names).to(model.dtype)
    return classifier


def classifier_of(model: Any, suite: ShiftSuite, captions: CaptionTable) -> CLIPClassifier:
    """Return a trained model as a classifier of the suite's classes, with its head and its temperature.

    Raises:
        TypeError: If it is no ``CLIPModel``.
    """
    network = merged(model)
    if isinstance(network, CLIPClassifier):
        twin: CLIPClassifier = copy.deepcopy(network).eval()
        return twin
    if not backbone_of(network).classifier:
        raise TypeError(
            f"Expected a CLIPModel to export as a classifier, got {type(network).__name__}. Use the model itself; "
            f"see {TABLE}."
        )
    with torch.no_grad():
        classes = class_embeddings(network, captions)
    return export_classifier(network, classes, suite.class_names)


def captions_of(model: Any, suite: ShiftSuite, processor: Any) -> CaptionTable:
    """Tokenise a suite's captions as a model's text tower takes them."""
    tokenizer, dropout = processor.tokenizer, has_text_dropout(model)
    if dropout:
        logger.info("The text tower has dropout: captions that samples share are embedded for each of them.")
    options = caption_options(model.config, tokenizer)
    return CaptionTable(tokenizer, suite.class_names, suite.templates, share=not dropout, **options)


def check_unchanged(prepared: Prepared, model: Any, args: Any) -> None:
    """Raise a ValueError if the model is another one than was prepared, or arguments that shape it have changed."""
    if model is not prepared.model:
        raise ValueError(
            f"Expected the {type(prepared.model).__name__} that the trainer was made with, got another "
            f"{type(model).__name__} as its `model`. Make a new trainer with it."
        )
    for name, before in prepared.arguments.items():
        if getattr(args, name) != before:
            raise ValueError(
                f"Expected `{name}` {before!r}, with which the model was prepared, got {getattr(args, name)!r}. Make a "
                "new trainer, or one with `model_init`, which prepares a model for each training."
            )


def _training_dtype(model: nn.Module, args: Any) -> torch.dtype:
    """The dtype of the weights in training: float32 or wider, unless asked otherwise."""
    half = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if not half:
        return next(model.parameters()).dtype
    if args.float32_weights:
        logger.info(
            "The model comes in half precision; it is trained and saved in float32. `bf16` is for speed, "
            "`float32_weights` False trains bfloat16 as it comes."
        )
        return torch.float32
    if torch.float16 in half:
        raise ValueError(
            "Expected bfloat16 with `float32_weights` False, got float16. Its gradients underflow: leave "
            "`float32_weights` True and set `fp16`, or load the checkpoint with `dtype=torch.bfloat16`."
        )
    if is_adapted(model) or args.lora_rank:
        logger.info("The network stays in bfloat16; adapters, teacher and the merged model are float32.")
    else:
        logger.info("The model is trained and saved in bfloat16, the teacher kept in float32.")
    return torch.bfloat16


def align_markers(model: Any, processor: Any) -> None:
    """Give the text tower the tokenizer's end marker, in the live model and in its config alike.

    OpenAI's checkpoints carry the legacy ``eos_token_id`` 2, under which the tower pools at the largest token id.
    """
    # Workaround, transformers 5.23: Trainer rewrites the id in the config only, so that a saved model with added tokens
    # would pool elsewhere than the trained one did. Until: it leaves the config alone, or the tower reads it each time.
    tokenizer = getattr(processor, "tokenizer", processor)
    config = model.config.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name, None) is not None:
            setattr(config, name, getattr(tokenizer, name))
    for module in model.text_model.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = config.eos_token_id


def _freeze(model: Any, tower: str | None) -> None:
    """Exempt a tower and its projection from training."""
    for name in FROZEN.get(tower or "", ()):
        if hasattr(model, name):
            getattr(model, name).requires_grad_(False)
