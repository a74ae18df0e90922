"""The families of models that can be fine-tuned, and all that differs between them.

Every one is a pair of towers with ``get_image_features``, ``get_text_features`` and a ``logit_scale``, as transformers
has them. What is supported with what is in docs/backbones.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_NAME

from ..basics.tensor_files import tensors_flaw
from ..objective.terms import penalties

TABLE = "docs/backbones.md"
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
TEXT_INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Backbone:
    """A family of models.

    Attributes:
        model_class: Name of the class in transformers.
        link: From logits to probabilities, in pre-training, in fine-tuning and in the stock pipeline: "softmax", or
            "sigmoid" with a ``logit_bias``.
        padded: The text tower reads the padding: captions are always as long as its context.
        causal: The text tower is causal and pools at the end marker: padding on the right is never seen, and needs no
            mask.
        projections: The embeddings are linear projections of the towers' outputs, which the penalties of CaRot-2024 and
            TRACER act on.
        classifier: :class:`~carot_hf.CLIPClassifier` can hold its image tower.
    """

    model_class: str
    link: str = "softmax"
    padded: bool = False
    causal: bool = False
    projections: bool = True
    classifier: bool = False


BACKBONES = {
    "clip": Backbone("CLIPModel", causal=True, classifier=True),
    "metaclip_2": Backbone("MetaClip2Model", causal=True),
    "chinese_clip": Backbone("ChineseCLIPModel"),
    "altclip": Backbone("AltCLIPModel"),
    "siglip": Backbone("SiglipModel", link="sigmoid", padded=True, projections=False),
    "siglip2": Backbone("Siglip2Model", link="sigmoid", padded=True, projections=False),
}


def backbone_of(model: Any) -> Backbone:
    """Return the family of a model.

    Raises:
        TypeError: If it is none of `BACKBONES`.
    """
    found = BACKBONES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if found is None or not isinstance(model, getattr(transformers, found.model_class)):
        names = ", ".join(kind.model_class for kind in BACKBONES.values())
        raise TypeError(
            f"Expected a transformers model of {names}, got {type(model).__name__}. Load the checkpoint with "
            f"AutoModel.from_pretrained(..., dtype=torch.float32); see {TABLE}."
        )
    return found


def is_backbone(model: Any) -> bool:
    """Whether a model is of one of the families."""
    try:
        backbone_of(model)
    except TypeError:
        return False
    return True


def check_method(model: Any, arguments: Any) -> None:
    """Refuse a method that the model's family cannot have.

    Args:
        model: Of one of the families.
        arguments: ``CaRotTrainingArguments``.
    Raises:
        ValueError: If the objective or a penalty needs what the family does not have.
    """
    family = backbone_of(model)
    if arguments.objective == "cross_entropy" and not family.classifier:
        raise ValueError(
            f"Expected a CLIPModel for the objective 'cross_entropy', got {type(model).__name__}. Its linear head is "
            f"CLIP's only: use a preset with the contrastive objective; see {TABLE}."
        )
    if arguments.lora_rank and family.model_class != "CLIPModel":
        raise ValueError(
            f"Expected a CLIPModel for `lora_rank` {arguments.lora_rank}, got {type(model).__name__}. Train it whole, "
            f"with `lora_rank` 0; see {TABLE}."
        )
    for name in penalties():
        if getattr(arguments, name) and not family.projections:
            raise ValueError(
                f"Expected `{name}` 0 for {type(model).__name__}, got {getattr(arguments, name)}. It has no linear "
                f"projections that the penalty could act on: use the preset 'carot', or set it to 0; see {TABLE}."
            )


def logit_head(model: Any) -> tuple[Tensor, ...]:
    """Return the parameters between similarities and logits: ``logit_scale`` and, for a sigmoid, ``logit_bias``."""
    shift = getattr(model, "logit_bias", None)
    return (model.logit_scale,) if shift is None else (model.logit_scale, shift)


def image_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the image tower takes of a batch."""
    return {name: batch[name] for name in IMAGE_INPUTS if name in batch}


def pair_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what both towers take of a batch."""
    return {name: batch[name] for name in (*IMAGE_INPUTS, *TEXT_INPUTS) if name in batch}


def caption_options(config: Any, tokenizer: Any) -> dict[str, Any]:
    """Return how captions are tokenised for a model: the arguments of a ``CaptionTable`` after the templates.

    Args:
        config: The model's; one without a text tower (a classifier) takes the tokenizer's context.
        tokenizer: Its tokenizer. An ``attention_mask`` is given where the tokenizer gives one by default, as the stock
            pipeline has it, and the tower sees the padding.
    """
    text = getattr(config, "text_config", None)
    if text is None:
        return {"max_length": tokenizer.model_max_length}
    family = BACKBONES.get(config.model_type, Backbone(""))
    context = text.max_position_embeddings
    if config.model_type == "altclip":  # its positions start behind the padding's id
        context -= text.pad_token_id + 1
    masked = not family.causal and (not family.padded or "attention_mask" in tokenizer.model_input_names)
    return {"max_length": context, "padded": family.padded, "masked": masked, "vocab_size": text.vocab_size}


def has_text_dropout(model: Any) -> bool:
    """Whether the text tower, adapters included, draws what it drops for each row; without a text tower: no."""
    return any(
        name.endswith("dropout") and isinstance(rate, float) and rate > 0
        for part in getattr(model, "text_model", nn.Module()).modules()
        for name, rate in [*vars(part).items(), ("dropout", part.p if isinstance(part, nn.Dropout) else 0.0)]
    )


def load_renamed(model: Any, folder: str | Path) -> bool:
    """Load weights that transformers saves under other names than the model's own (AltCLIP); else do nothing.

    ``save_pretrained`` gives them the names of the published checkpoints; ``Trainer`` reads them back by the model's
    own names, and would leave out, with a warning only, all that it does not find.

    Args:
        model: A ``PreTrainedModel``, which is changed in place.
        folder: Of a checkpoint.
    Returns:
        Whether there were such names.
    """
    path = Path(folder) / SAFE_WEIGHTS_NAME
    if not isinstance(model, PreTrainedModel) or not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) <= set(model.state_dict()):
            return False
    saved: Any = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


def weights_flaw(model: Any, folder: str | Path) -> str | None:
    """Return what is wrong with the weights in a folder, before they are loaded; ``None`` if nothing is.

    Args:
        model: That they are for, perhaps under other names (AltCLIP).
        folder: Of a checkpoint.
    """
    own = model.state_dict()
    if isinstance(model, PreTrainedModel):
        own = revert_weight_conversion(model, own)
    return tensors_flaw(Path(folder) / SAFE_WEIGHTS_NAME, own)


def fit_image_size(model: Any, size: int | tuple[int, int]) -> Any:
    """Make a model one of images of another size: its table of positions is resized once, and for good.

    Logits are those of the model before, called with ``interpolate_pos_encoding=True`` on images of the new size. What
    is saved is an ordinary model of that size, which the stock pipeline takes with the processor of that size. Do it
    before the trainer is made; the temperature is fitted afterwards.

    Args:
        model: Of one of the families but ``Siglip2Model``; changed in place.
        size: Side of the images in pixels, or height and width, which must be the same.
    Returns:
        The model.
    Raises:
        TypeError: If the model is of another kind, or takes images of any size as it is.
        ValueError: If the sides differ, are not whole patches, or the model has a fitted temperature.
    """
    family = backbone_of(model)
    if family.model_class == "Siglip2Model":
        raise TypeError(
            "Expected a model with a table of positions for one size of images, got Siglip2Model, which takes any. Set "
            "`max_num_patches` of its image processor instead."
        )
    height, width = (size, size) if isinstance(size, int) else size
    vision = model.config.vision_config
    patch = vision.patch_size
    if height != width:
        raise ValueError(
            f"Expected a square size, got {height} x {width}. {type(model).__name__} keeps one number as its "
            "`image_size`: set the processor to square images."
        )
    if height < patch or height % patch:
        raise ValueError(
            f"Expected a size of whole patches of {patch} x {patch} pixels, got {height}. Take "
            f"{max(1, round(height / patch)) * patch}: pixels beyond the last patch would not be seen."
        )
    if getattr(model.config, "calibration", None) is not None:
        raise ValueError(
            "Expected a model without a fitted temperature, got one with `config.calibration`, which was fitted at "
            f"{vision.image_size} pixels. Call carot_hf.unbake_temperature(model) first, and fit it again afterwards."
        )
    if height == vision.image_size:
        return model
    embeddings = model.vision_model.embeddings
    old = embeddings.position_embedding
    before, after = vision.image_size // patch, height // patch
    first = old.num_embeddings - before**2  # 1: the class token's, which is no place in the image
    with torch.no_grad():
        weight = torch.cat([old.weight[:first], _resized_grid(old.weight[first:], before, after)])
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=not old.weight.requires_grad)
    embeddings.position_ids = torch.arange(len(weight), device=weight.device).expand(1, -1)
    embeddings.num_patches, embeddings.num_positions = after**2, len(weight)
    embeddings.image_size = vision.image_size = height
    return model


def _resized_grid(rows: Tensor, before: int, after: int) -> Tensor:
    """``(before ** 2, D)`` positions of a square grid, in rows, as ``(after ** 2, D)``: bicubic, as in transformers."""
    grid = rows.T.reshape(1, -1, before, before)
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T


def embedding_size(model: Any) -> int:
    """Return the length of an embedding."""
    projection = getattr(model, "visual_projection", None)
    return int(model.config.vision_config.hidden_size if projection is None else projection.out_features)
