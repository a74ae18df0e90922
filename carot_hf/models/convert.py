"""Starting points from elsewhere: a plain ``state_dict`` in the layout of OpenAI's CLIP becomes a ``CLIPModel``.

OpenAI's CLIP, FLYP and open_clip share one naming (``visual.transformer.resblocks.0.attn.in_proj_weight`` ...), with
prefixes (``module.``, ``model.``, ``image_encoder.model.``) or, for the text tower of some open_clip models, ``text.``.
Every tensor finds its place or is refused by name; shapes give the config. Two facts are in no tensor:

- **The activation.** OpenAI's weights, and what was fine-tuned from them (FLYP's ``ViT-B/16``), need ``quick_gelu``.
  open_clip's own models, and FLYP's ``ViT-B-16`` and ``ViT-L-14``, need ``gelu`` unless the model's name ends in
  ``-quickgelu`` or its ``open_clip_config.json`` says ``"quick_gelu": true``. The wrong one gives no error, only a
  model that is worse.
- **The number of attention heads.** Width / 64 up to a width of 1024; wider towers differ (open_clip's ViT-H-14: 80 a
  head).

Files are read without running code: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import math
import os
import pickle  # nosec B403  # the name of an error only
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

ACTIVATIONS = ("quick_gelu", "gelu")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_FACTS = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's archives keep among the weights
_VOCABULARY, _END_OF_TEXT = 49408, 49407
_HEAD_WIDTH, _WIDEST = 64, 1024
_LAYER = {  # name of a resblock's tensor: name of the encoder layer's; the fused attention input is split below
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_FUSED = {"attn.in_proj_weight": "weight", "attn.in_proj_bias": "bias"}
_VISION = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_ANCHOR = "visual.conv1.weight"


def load_clip_checkpoint(
    path: str | os.PathLike[str],
    *,
    hidden_act: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    eos_token_id: int | None = None,
    ignore: Sequence[str] = (),
) -> CLIPModel:
    """Read a ``state_dict`` of OpenAI-CLIP, FLYP or open_clip from a file and make a ``CLIPModel`` of it.

    The options are those of :func:`clip_from_state_dict`. No code of the file is run: what needs it is refused, and
    that is so for the checkpoints that FLYP's scripts write (whole pickled modules) and for the TorchScript archives
    that OpenAI publishes. The error says how to write their weights to a plain file.

    Args:
        path: A ``.safetensors`` file, or one that ``torch.save`` wrote. The weights may stand alone or under
            "state_dict", "model_state_dict" or "model" of a training checkpoint, whose other entries are not used.
        hidden_act: "quick_gelu" or "gelu".
        vision_heads: Attention heads of the image tower.
        text_heads: Attention heads of the text tower.
        eos_token_id: Id of the end-of-text token.
        ignore: Beginnings of names to leave out.
    Returns:
        A float32 model on the CPU, in evaluation mode.
    Raises:
        ValueError: If there is no such file, it needs code, or :func:`clip_from_state_dict` refuses its content.
    """
    return clip_from_state_dict(
        _read(Path(path)),
        hidden_act=hidden_act,
        vision_heads=vision_heads,
        text_heads=text_heads,
        eos_token_id=eos_token_id,
        ignore=ignore,
    )


def clip_from_state_dict(
    state_dict: Mapping[str, Any],
    *,
    hidden_act: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    eos_token_id: int | None = None,
    ignore: Sequence[str] = (),
) -> CLIPModel:
    """Make a ``CLIPModel`` of a ``state_dict`` in the layout of OpenAI's CLIP, FLYP or open_clip.

    The model needs the processor of the same vocabulary and image size, for OpenAI's and open_clip's ViT-B/16 that of
    "openai/clip-vit-base-patch16".

    Args:
        state_dict: Tensors by name, or a checkpoint that holds them under "state_dict", "model_state_dict" or "model".
            A prefix that all names share is found by itself. Half precision becomes float32.
        hidden_act: "quick_gelu" for OpenAI's weights and those fine-tuned from them, "gelu" for open_clip's own unless
            their name or config says quickgelu. No tensor tells which, and the wrong one raises no error. It may be
            left out only where OpenAI's own numbers (``input_resolution`` ...) are still among the weights.
        vision_heads: Attention heads of the image tower. Default: width / 64, up to a width of 1024.
        text_heads: The same of the text tower.
        eos_token_id: Id of the end-of-text token, at whose first place the text tower pools. Default: 49407 for the
            standard vocabulary of 49,408, otherwise the last id. OpenAI's code pools at the largest id of each row,
            which is the same as long as that id is this token's.
        ignore: Beginnings of names to leave out, prefix included, e.g. ``("classification_head.",)`` of FLYP's
            classifiers, for which a ``CLIPModel`` has no place. Nothing else is left out.
    Returns:
        A float32 model on the CPU, in evaluation mode, sharing no memory with the tensors given.
    Raises:
        TypeError: If it is no mapping of names.
        ValueError: If a tensor is missing, left over or of the wrong shape (the first names are given), if the image
            tower is no vision transformer, or if an option is needed or out of range.
    """
    _check_options(hidden_act, vision_heads, text_heads, ignore)
    weights = _bare_weights(state_dict, tuple(ignore))
    facts = {name: int(weights.pop(name)) for name in _FACTS if name in weights}
    text = "text." if "text.token_embedding.weight" in weights else ""
    _check_mask(weights, f"{text}attn_mask")
    layers = _count_layers(weights, "visual."), _count_layers(weights, text)
    _check_names(weights, _expected_names(text, *layers))
    heads = vision_heads, text_heads
    config = _config(weights, text, layers, heads, _activation(hidden_act, facts), eos_token_id)
    _check_facts(facts, config)
    model = CLIPModel(config)
    converted = _converted(weights, text, layers)
    for name, parameter in model.named_parameters():
        if parameter.shape != converted[name].shape:
            raise ValueError(
                f"Expected `{name}` of shape {tuple(parameter.shape)} after conversion, got "
                f"{tuple(converted[name].shape)}. The shapes of this checkpoint do not fit each other."
            )
    model.load_state_dict(converted)  # copies, to float32
    return model.eval()


# ---- reading ----


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"Expected a file with a state_dict, got no such file: {path}. Correct the path.")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(str(path)))
        except SafetensorError as error:
            raise ValueError(f"Expected a safetensors file, got {path} ({error}). Fetch or save it again.") from error
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError(
                    f"Expected weights, got a TorchScript program in {path}; only weights are read here. Write them "
                    "out once, if you trust the file: torch.save(torch.jit.load(path, map_location='cpu')"
                    ".state_dict(), 'weights.pt')."
                )
    try:
        with warnings.catch_warnings():  # about pickle protocols, before the error that counts
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"Expected a file of plain tensors, got {path}, which is damaged or needs code to be read "
            f"({_first_line(error)}). If you trust it, write its weights out once in the program that "
            "made it (for FLYP: CLIPEncoder.load(path)): torch.save(model.state_dict(), 'weights.pt')."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"Expected a state_dict in {path}, got {type(content).__name__}. Save `model.state_dict()` there."
        )
    return content


def _bare_weights(state_dict: Mapping[str, Any], ignore: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors by name, without wrapper and common prefix and without what is to be left out."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"Expected a mapping of names to tensors, got {type(state_dict).__name__}. "
            "Pass `model.state_dict()`, or a file to `load_clip_checkpoint`."
        )
    wrapped = [key for key in _WRAPPERS if isinstance(state_dict.get(key), Mapping)]
    if len(wrapped) > 1:
        raise ValueError(f"Expected one state_dict, got several under {wrapped}. Pass the one you mean.")
    if wrapped:
        state_dict = state_dict[wrapped[0]]
    weights = {name: value for name, value in state_dict.items() if not str(name).startswith(ignore or ("\0",))}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"Expected tensors by name, got {type(value).__name__} as {name!r}. Pass `model.state_dict()`."
            )
    prefix = _prefix(weights)
    outside = [name for name in weights if not name.startswith(prefix)]
    if outside:
        raise _name_error(f"names that begin with `{prefix}`", outside)
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _prefix(weights: Mapping[str, Tensor]) -> str:
    """What stands before the names of OpenAI's CLIP."""
    if any(re.search(r"(^|\.)visual\.layer1\.", name) for name in weights):
        raise ValueError(
            "Expected a vision transformer, got a ResNet (`visual.layer1...`). CLIPModel has no ResNet; start from a "
            "ViT."
        )
    found = [name.removesuffix(_ANCHOR) for name in weights if re.search(r"(^|\.)visual\.conv1\.weight$", name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"Expected one model, got several with the prefixes {found}. Pass the tensors of one.")
    cure = "Pass the state_dict of OpenAI's CLIP, FLYP or an open_clip vision transformer."
    if any("vision_model.embeddings." in name for name in weights):
        cure = "These are names of transformers: load the folder with CLIPModel.from_pretrained."
    raise ValueError(f"Expected a tensor `{_ANCHOR}`, got {_first(list(weights)) or 'no tensor at all'}. {cure}")


# ---- names and shapes ----


def _count_layers(weights: Mapping[str, Tensor], tower: str) -> int:
    pattern = re.compile(rf"{re.escape(tower)}transformer\.resblocks\.(\d+)\.")
    found = [int(match[1]) for name in weights if (match := pattern.match(name))]
    return 1 + max(found, default=-1)


def _expected_names(text: str, vision_layers: int, text_layers: int) -> set[str]:
    names = {*_VISION, *(text + name for name in _TEXT), "visual.proj", f"{text}text_projection", "logit_scale"}
    for tower, layers in (("visual.", vision_layers), (text, text_layers)):
        for layer in range(max(layers, 1)):
            names.update(f"{tower}transformer.resblocks.{layer}.{name}" for name in [*_LAYER, *_FUSED])
    return names


def _check_names(weights: Mapping[str, Tensor], expected: set[str]) -> None:
    missing = sorted(expected - weights.keys())
    if missing:
        raise ValueError(
            f"Expected all tensors of a CLIP with two transformers, got none for {_first(missing)}. "
            "Pass the whole model; an image encoder alone is none."
        )
    left_over = [name for name in weights if name not in expected]
    if left_over:
        raise _name_error("only tensors that CLIPModel has a place for", left_over)
    for name, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(f"Expected floating weights, got {value.dtype} as `{name}`. Undo the quantization first.")


def _check_mask(weights: dict[str, Tensor], name: str) -> None:
    """Take out the causal mask that older open_clip versions saved, if it is one."""
    mask = weights.get(name)
    if mask is None:
        return
    if mask.ndim != 2 or not torch.equal(mask.float().cpu(), torch.full(mask.shape, -math.inf).triu(1)):
        raise ValueError(f"Expected `{name}` to be a causal mask, got another one. CLIPModel has no other mask.")
    del weights[name]


def _config(
    weights: Mapping[str, Tensor],
    text: str,
    layers: tuple[int, int],
    heads: tuple[int | None, int | None],
    hidden_act: str,
    eos_token_id: int | None,
) -> CLIPConfig:
    """The config that the shapes imply."""
    dimensions = {_ANCHOR: 4, "visual.positional_embedding": 2, "visual.proj": 2, f"{text}token_embedding.weight": 2}
    dimensions.update({f"{text}positional_embedding": 2, f"{text}text_projection": 2})
    for name, ndim in dimensions.items():
        if weights[name].ndim != ndim:
            raise ValueError(f"Expected `{name}` with {ndim} dimensions, got shape {tuple(weights[name].shape)}.")
    vision_width, channels, patch, patch_width = weights[_ANCHOR].shape
    side = math.isqrt(len(weights["visual.positional_embedding"]) - 1)
    if patch != patch_width or side * side != len(weights["visual.positional_embedding"]) - 1:
        raise ValueError(
            f"Expected square patches and images, got patches of {patch} x {patch_width} and "
            f"{len(weights['visual.positional_embedding'])} positions. CLIPModel knows no other shape."
        )
    vocabulary, text_width = weights[f"{text}token_embedding.weight"].shape
    if eos_token_id is None:
        eos_token_id = _END_OF_TEXT if vocabulary == _VOCABULARY else vocabulary - 1
    if not 0 < eos_token_id < vocabulary:
        raise ValueError(f"Expected `eos_token_id` in [1, {vocabulary}), got {eos_token_id}. It is a token's id.")
    shared = {"hidden_act": hidden_act, "layer_norm_eps": 1e-5, "projection_dim": weights["visual.proj"].shape[1]}

    def tower(prefix: str, width: int, depth: int, n_heads: int) -> dict[str, Any]:
        inner = len(weights[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"])
        sizes = {"hidden_size": width, "intermediate_size": inner}
        return {**shared, **sizes, "num_hidden_layers": depth, "num_attention_heads": n_heads}

    return CLIPConfig(
        text_config={
            **tower(text, text_width, layers[1], _heads("text_heads", heads[1], text_width)),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(weights[f"{text}positional_embedding"]),
            "bos_token_id": eos_token_id - 1,
            "eos_token_id": eos_token_id,
            "pad_token_id": eos_token_id,
        },
        vision_config={
            **tower("visual.", vision_width, layers[0], _heads("vision_heads", heads[0], vision_width)),
            "image_size": side * patch,
            "patch_size": patch,
            "num_channels": channels,
        },
        projection_dim=shared["projection_dim"],
    )


def _heads(option: str, given: int | None, width: int) -> int:
    if given is not None:
        if width % given:
            raise ValueError(f"Expected `{option}` to divide the width {width}, got {given}. Correct the number.")
        return given
    if width % _HEAD_WIDTH or width > _WIDEST:
        raise ValueError(
            f"Expected `{option}` for a tower of width {width}, got None. Only widths up to {_WIDEST} that are "
            f"multiples of {_HEAD_WIDTH} are known to have {_HEAD_WIDTH} a head; look it up where the model comes from."
        )
    return width // _HEAD_WIDTH


def _converted(weights: Mapping[str, Tensor], text: str, layers: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors under the names of transformers; not copied."""
    renamed = {new: weights[old] for old, new in _VISION.items()}
    renamed.update({new: weights[text + old] for old, new in _TEXT.items()})
    renamed["visual_projection.weight"] = weights["visual.proj"].T  # (embed, width)
    renamed["text_projection.weight"] = weights[f"{text}text_projection"].T  # (embed, width)
    scale = weights["logit_scale"]
    renamed["logit_scale"] = scale.reshape(()) if scale.numel() == 1 else scale
    for source, target, depth in (("visual.", "vision_model", layers[0]), (text, "text_model", layers[1])):
        for layer in range(depth):
            block = f"{source}transformer.resblocks.{layer}"
            into = f"{target}.encoder.layers.{layer}"
            renamed.update({f"{into}.{new}": weights[f"{block}.{old}"] for old, new in _LAYER.items()})
            for old, kind in _FUSED.items():
                parts = weights[f"{block}.{old}"].tensor_split(3)  # query, key and value below each other
                for role, part in zip("qkv", parts, strict=True):
                    renamed[f"{into}.self_attn.{role}_proj.{kind}"] = part
    return renamed


# ---- options ----


def _check_options(
    hidden_act: str | None, vision_heads: int | None, text_heads: int | None, ignore: Sequence[str]
) -> None:
    if hidden_act is not None and hidden_act not in ACTIVATIONS:
        raise ValueError(f"Expected `hidden_act` of {ACTIVATIONS}, got {hidden_act!r}. Correct the name.")
    for name, value in (("vision_heads", vision_heads), ("text_heads", text_heads)):
        if value is not None and value < 1:
            raise ValueError(f"Expected `{name}` >= 1, got {value}. Leave it out for width / {_HEAD_WIDTH}.")
    if isinstance(ignore, str) or "" in ignore:
        raise ValueError(f"Expected `ignore` as beginnings of names, got {ignore!r}. Pass e.g. ('head.',).")


def _activation(given: str | None, facts: Mapping[str, int]) -> str:
    if given is not None:
        return given
    if len(facts) == len(_FACTS):
        return "quick_gelu"
    raise ValueError(
        "Expected `hidden_act`, got None: no tensor tells the activation, and the wrong one gives a worse model "
        "without an error. Pass 'quick_gelu' for OpenAI's weights and what was fine-tuned from them, 'gelu' for "
        "open_clip's own unless their name or config says quickgelu."
    )


def _check_facts(facts: Mapping[str, int], config: CLIPConfig) -> None:
    implied = {
        "input_resolution": config.vision_config.image_size,
        "context_length": config.text_config.max_position_embeddings,
        "vocab_size": config.text_config.vocab_size,
    }
    for name, value in facts.items():
        if value != implied[name]:
            raise ValueError(
                f"Expected `{name}` {implied[name]}, as the shapes imply, got {value}. This is not the weights' own "
                "number; fetch the checkpoint again."
            )


def _name_error(expected: str, names: Sequence[str]) -> ValueError:
    cure = "To leave them out on purpose, name their beginnings in `ignore`."
    return ValueError(f"Expected {expected}, got {_first(names)} as well. {cure}")


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in list(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
