"""LoRA on both towers of a ``CLIPModel``, by peft: made, checked, merged, and what a checkpoint needs beside adapters.

peft is imported only here and only when adapters are asked for. A ``PeftModel`` hands every attribute that it lacks
(``logit_scale``, ``config``, ``get_image_features`` ...) on to the network inside, so that the rest of the library
treats it as that network.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from ..basics.whole_file import whole_file
from ..objective.terms import penalties

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of both towers of CLIPModel
ADAPTERS_NAME = "adapter_model.safetensors"
BESIDE_NAME = "beside_adapters.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = "default"  # the one name that Trainer restores the best checkpoint of
_TRAINING = ("lora_dropout", "bias", "modules_to_save")
_SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_SEE = "see docs/backbones.md."


def is_adapted(model: Any) -> bool:
    """Tell whether a model is a ``peft.PeftModel``; peft is not imported for it."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def base_model(model: Any) -> Any:
    """Return the network inside of a ``PeftModel``, its layers still wrapped; any other model as it is."""
    return model.get_base_model() if is_adapted(model) else model


def add_lora(model: CLIPModel, rank: int, alpha: int | None, seed: int) -> Any:
    r"""Put LoRA on the linear layers of both towers: attention (q, k, v, out) and MLP, not the projections.

    .. math:: W x + \tfrac{\alpha}{r} B A x, \qquad B = 0 \text{ at the start}

    Args:
        model: Its layers are wrapped in place and frozen; the adapters are float32.
        rank: ``r``, >= 1.
        alpha: ``None``: ``2 r``.
        seed: Of ``A``, whatever the state of torch's generators, which stays as it is.
    Returns:
        The ``peft.PeftModel``.
    Source:
        Hu et al. 2021, "LoRA" (arXiv 2106.09685).
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=list(LINEAR_LAYERS))
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merged(model: Any) -> Any:
    """Return a copy of a ``PeftModel`` with its adapters in the weights, float32 or wider; other models as they are.

    Adding and subtracting would leave rounding in the weights, a copy leaves the model bit for bit as it is.
    """
    if not is_adapted(model):
        return model
    whole = copy.deepcopy(model)
    return whole.to(torch.promote_types(whole.dtype, torch.float32)).merge_and_unload()


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the frozen parameters to a dtype, in place, and those that are trained to float32 or to a wider one."""
    wide = torch.promote_types(dtype, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(wide if parameter.requires_grad else dtype)


def check_lora_options(args: Any) -> None:
    """Refuse training arguments that do not go with LoRA, before any model is loaded.

    Args:
        args: :class:`~carot_hf.CaRotTrainingArguments`.
    Raises:
        ImportError: If peft is not installed.
        ValueError: If an argument does not fit.
    """
    if find_spec("peft") is None:
        raise ImportError(f"Expected peft for LoRA, got none. `pip install 'carot_hf[lora]'`; {_SEE}")
    if args.objective != "contrastive":
        raise ValueError(
            f"Expected the objective 'contrastive' with LoRA, got {args.objective!r}. Train the head without LoRA, or "
            f"the pairs with it; {_SEE}"
        )
    if args.freeze is not None:
        raise ValueError(
            f"Expected `freeze` None with LoRA, which freezes both towers, got {args.freeze!r}. For adapters on one "
            f"tower pass a PeftModel with such `target_modules`; {_SEE}"
        )
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # the new and the old one
    if any(dict(getattr(args, name, None) or {}).get("use_reentrant") for name in names):
        raise ValueError(
            "Expected `use_reentrant` False with LoRA, got True. The first layers' inputs need no gradient, so that "
            f"reentrant checkpointing would give their adapters none; {_SEE}"
        )
    if args.push_to_hub and args.hub_strategy != "end":
        raise ValueError(
            f"Expected `hub_strategy` 'end' with LoRA, got '{args.hub_strategy.value}'. It would publish adapters, "
            f"which a pipeline would apply on top of the merged model; {_SEE}"
        )
    check_folder(args.output_dir)


def adapter_facts(model: Any) -> dict[str, Any]:
    """What LoRA a model has, in values that JSON keeps; of rank 0 if it has none."""
    if not is_adapted(model):
        return {"LoRA rank": 0}
    config = model.peft_config[_ADAPTER]
    targets = config.target_modules
    return {
        "LoRA rank": config.r,
        **{f"LoRA {name}": getattr(config, name) for name in (*_SCALING[1:], *_TRAINING)},
        "LoRA target_modules": targets if isinstance(targets, str) else sorted(targets),
    }


def check_penalties(model: Any, args: Any) -> None:
    """Refuse penalties on projections that are all frozen: constants would be logged as if they acted.

    Args:
        model: ``None``: one whose projections are frozen.
        args: :class:`~carot_hf.CaRotTrainingArguments`.
    Raises:
        ValueError: If there is such a penalty.
    """
    for name, projections in penalties().items():
        trained = model is not None and any(getattr(model, module).weight.requires_grad for module in projections)
        if getattr(args, name) and not trained:
            raise ValueError(
                f"Expected `{name}` 0 where LoRA leaves the projection frozen, got {getattr(args, name)}. The penalty "
                f"would be a constant: set it to 0, or name the projection in `modules_to_save`; {_SEE}"
            )


def check_adapters(model: Any, args: Any) -> None:
    """Refuse a ``PeftModel`` that is no LoRA on a ``CLIPModel``, or does not go with the arguments.

    Raises:
        ImportError: As :func:`check_lora_options`.
        TypeError: If adapters or network are of another kind.
        ValueError: If there are several adapters, nothing to train, or arguments that do not fit.
    """
    base, configs = base_model(model), model.peft_config
    kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
    tasks = [config.task_type for config in configs.values() if config.task_type is not None]
    if kinds != ["LORA"] or not isinstance(base, CLIPModel) or tasks:
        raise TypeError(
            f"Expected LoRA without `task_type` on a CLIPModel, got {' and '.join(kinds)} on a {type(base).__name__}"
            f"{f' for {tasks[0]}' if tasks else ''}. Use peft.get_peft_model(clip, peft.LoraConfig(...)); {_SEE}"
        )
    if list(configs) != [_ADAPTER] or list(model.active_adapters) != [_ADAPTER]:
        raise ValueError(
            f"Expected one adapter, active and called '{_ADAPTER}', got {sorted(configs)}. Merge or delete the "
            f"others; {_SEE}"
        )
    if getattr(base, "is_quantized", False):
        raise ValueError(f"Expected a network that is not quantized, got one. Its merge would be another model; {_SEE}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "Expected adapters that can be trained, got frozen ones. Load them with "
            f"PeftModel.from_pretrained(..., is_trainable=True); {_SEE}"
        )
    if args.lora_rank:
        raise ValueError(
            f"Expected `lora_rank` 0 for a model with adapters, got {args.lora_rank}. Pass the plain CLIPModel, or "
            f"set it to 0; {_SEE}"
        )
    check_lora_options(args)
    check_penalties(model, args)


def refuse_own_adapters(model: Any) -> None:
    """Raise a TypeError for a plain model with adapters in it (``model.add_adapter``): it would be saved unmerged."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(
            f"Expected a plain {type(model).__name__} or a peft.PeftModel, got one with adapters of `add_adapter` or "
            f"of its folder. Use peft.get_peft_model or peft.PeftModel.from_pretrained; {_SEE}"
        )


def check_folder(folder: str | Path) -> None:
    """Raise a ValueError if a merged model, saved there, would be loaded with older adapters on top."""
    if Path(folder, _ADAPTER_CONFIG).exists():
        raise ValueError(
            f"Expected a folder without adapters for the merged model, got {folder} with {_ADAPTER_CONFIG}. "
            f"`from_pretrained` would apply them on top: remove it or choose another folder; {_SEE}"
        )


@dataclass(frozen=True)
class Product:
    """What an adapter adds to a weight: ``scale * b @ a``.

    Attributes:
        names: Of the two parameters.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scale: ``lora_alpha / r``.
    """

    names: list[str]
    a: Tensor
    b: Tensor
    scale: float


def adapter_products(model: Any) -> list[Product]:
    """Return what each adapter adds to its layer.

    Raises:
        ValueError: If an adapter adds something else than the product of two matrices to the weights.
    """
    found = []
    for name, module in model.named_modules():
        if _ADAPTER in getattr(module, "lora_A", {}):
            a, b = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
            plain = a.dim() == b.dim() == 2 and not getattr(module, "lora_magnitude_vector", {})
            if not plain:
                raise ValueError(
                    f"Expected plain LoRA on linear layers for `l2_sp_weight`, got another kind on {name}. What it "
                    f"adds to the weights is no product B A: set the weight to 0; {_SEE}"
                )
            names = [f"{name}.lora_{part}.{_ADAPTER}.weight" for part in "AB"]
            found.append(Product(names, a, b, float(module.scaling[_ADAPTER])))
    return found


def save_beside(model: nn.Module, folder: str | Path) -> None:
    """Write what peft's adapter files lack: ``logit_scale``, and whatever else is trained beside adapters."""
    with whole_file(Path(folder, BESIDE_NAME)) as beside:
        save_file(beside_tensors(model), str(beside), metadata={"format": "pt"})


def load_beside(model: Any, folder: str | Path) -> None:
    """Restore what :func:`save_beside` wrote, after a look at the adapters in the folder.

    Raises:
        ValueError: If the folder is no checkpoint of such a run, or its adapters are scaled otherwise.
    """
    from peft import PeftConfig

    path = Path(folder, BESIDE_NAME)
    if not path.is_file():
        raise ValueError(
            f"Expected a checkpoint of a run with LoRA in {folder}, got one without {BESIDE_NAME}. Resume without "
            "LoRA, or from another checkpoint."
        )
    saved, own = PeftConfig.from_pretrained(str(folder)), model.peft_config[_ADAPTER]
    for name in _SCALING:
        if getattr(saved, name) != getattr(own, name):
            raise ValueError(
                f"Expected adapters with `{name}` {getattr(own, name)} in {folder}, got {getattr(saved, name)}. "
                "Resume with the LoRA that the run began with."
            )
    given, here = load_file(str(path)), beside_tensors(model)
    if given.keys() != here.keys():
        raise ValueError(
            f"Expected {sorted(here)} in {path}, got {sorted(given)}. Make the same parameters trainable as before."
        )
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(given[name])


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The adapters' tensors by the names that a checkpoint has."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model)
    return found


def beside_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`save_beside` writes."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad or parameter.dim() == 0) and f".{_ADAPTER}." not in name
    }
