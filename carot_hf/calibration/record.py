"""What calibrates a model, in its weights and in ``config.calibration``: put there, read, and taken out again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..ece.inputs import check_temperature
from .conformal import ConformalSets

_LARGEST = 1e30  # of a number in a record
_KINDS: dict[str, type] = {
    **dict.fromkeys(("split", "criterion", "method"), str),
    **dict.fromkeys(("templates", "classes", "kept"), list),
    **dict.fromkeys(("target", "conformal"), dict),
    "n": int,
}


def bake_temperature(
    model: nn.Module, temperature: float, *, bias: float = 0.0, record: Mapping[str, Any] | None = None
) -> None:
    r"""Put the temperature into the weights, in place, once: afterwards the model's own logits are divided by it.

    A model with a ``logit_scale`` (`transformers.CLIPModel`) gets ``logit_scale - ln(temperature)``, and one that has a
    ``logit_bias`` too (SigLIP) ``logit_bias / temperature + bias``, rounded once to the parameter's dtype; one without
    gets weight and bias of its linear ``head`` or ``classifier`` divided by the temperature.
    The parameter must be float32 or float64: in bfloat16 a baked scale of 100 would be off by up to 1.6 %. It is not
    widened here because a model saved as bfloat16 loads as bfloat16.

    Writes ``model.config.calibration = {"temperature": ..., **record}``, with ``"bias"`` for a model with a
    ``logit_bias``; it is saved with the config. Where adding ``ln(temperature)`` again would not give back the very
    ``logit_scale`` (rounding, when the sum passes a power of 2), the exact value is kept beside it as
    ``"logit_scale_before"``, and that of the bias always as ``"logit_bias_before"``, so that `unbake_temperature` loses
    no bit.

    Args:
        model: A model with a ``config``; its parameters are changed.
        temperature: Divides the logits; > 0.
        bias: Is added to the divided logits, as :func:`~carot_hf.calibration.sigmoid.fit_sigmoid` gives it.
        record: What else to write down (data set, number of rows, criterion ...), as JSON types.

    Raises:
        RuntimeError: If a temperature is baked in already.
        TypeError: If the model has no config, or nothing to bake into.
        ValueError: If the temperature, the bias, the record or the parameter's dtype is not as said above.
    """
    check_temperature(temperature)
    target, shift = _baking_target(model), _logit_bias(model)
    config: Any = model.config
    check_not_baked(model)
    if not math.isfinite(bias) or (bias and shift is None):
        raise ValueError(
            f"Expected a finite `bias` for a model with a `logit_bias`, got {bias} for {type(model).__name__}. A "
            "softmax does not see a bias that all classes share: leave it 0."
        )
    parameters = check_width(model)
    record = _checked_notes(dict(record or {}))
    calibration: dict[str, Any] = {"temperature": float(temperature)}
    with torch.no_grad():
        if isinstance(target, nn.Parameter):
            before = float(target)
            target.fill_(before - math.log(temperature))
            if float(torch.full_like(target, float(target) + math.log(temperature))) != before:
                calibration["logit_scale_before"] = before
        else:
            for parameter in parameters:
                parameter.div_(temperature)
        if shift is not None:
            calibration |= {"bias": float(bias), "logit_bias_before": float(shift)}
            shift.fill_(_shifted(float(shift), temperature, bias))
    config.calibration = {**calibration, **record}


def calibration_record(model: Any) -> dict[str, Any] | None:
    """Return ``config.calibration`` of a model, which `bake_temperature` wrote; ``None``: no temperature is baked in.

    Raises:
        ValueError: If it is none: it may come out of a stranger's ``config.json``.
    """
    config = getattr(model, "config", None)
    record = getattr(config, "calibration", None)
    if record is None:
        return None
    where = f"`calibration` of config.json of {getattr(config, '_name_or_path', '') or type(model).__name__}"
    cure = "Delete `calibration` there, and fit the temperature anew."
    if not isinstance(record, Mapping):
        raise ValueError(f"Expected a mapping as {where}, got {record!r:.80}. {cure}")
    for name in ("temperature", "bias", "logit_scale_before", "logit_bias_before"):
        if name not in record and name != "temperature":
            continue
        value: Any = record.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
        if not number or (name == "temperature" and value <= 0):
            wanted = "a finite number above 0" if name == "temperature" else "a finite number"
            raise ValueError(f"Expected {wanted} as `{name}` in the {where}, got {value!r:.80}. {cure}")
    if getattr(model, "logit_bias", None) is not None and not {"bias", "logit_bias_before"} <= record.keys():
        raise ValueError(f"Expected `bias` and `logit_bias_before` in the {where}, got {sorted(record)}. {cure}")
    for name, kind in _KINDS.items():
        if name in record and not isinstance(record[name], kind):
            raise ValueError(f"Expected a {kind.__name__} as `{name}` in the {where}, got {record[name]!r:.80}. {cure}")
    sure = record.get("sure")
    if sure is not None and (not isinstance(sure, float) or not 0.0 <= sure <= 1.0):
        raise ValueError(f"Expected a fraction as `sure` in the {where}, got {sure!r:.80}. {cure}")
    target = record.get("target", {"hash": "", "n": 0})
    if not isinstance(target.get("hash"), str) or not isinstance(target.get("n"), int):
        raise ValueError(f"Expected `hash` and `n` as `target` in the {where}, got {target!r:.80}. {cure}")
    try:
        kept_sets(record)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected conformal sets by score as `conformal` in the {where}: {error!r:.80}. {cure}"
        ) from None
    return dict(record)


def kept_sets(record: Mapping[str, Any]) -> dict[str, ConformalSets]:
    """Return the conformal sets of a record, by score."""
    found = {score: ConformalSets.from_dict(kept) for score, kept in record.get("conformal", {}).items()}
    if any(made.score != score for score, made in found.items()):
        raise ValueError(f"of other scores than {sorted(found)!r}")
    return found


def calibrated_per_image(model: Any) -> bool:
    """Whether a calibrator divides the logits of each image once more, beside what is in the weights."""
    return needs_calibrator(calibration_record(getattr(model, "module", model)))


def needs_calibrator(record: Any) -> bool:
    """Whether a record says that there is a calibrator beside the model."""
    return isinstance(record, Mapping) and record.get("per_image") is True


def inverse_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return temperature and bias that take those of a record out of logits again."""
    temperature = float(record["temperature"])
    inverse = {"temperature": 1.0 / temperature}
    if "bias" in record:
        inverse["bias"] = -float(record["bias"]) * temperature
    return inverse


def check_not_baked(model: nn.Module) -> None:
    """Raise a RuntimeError if a temperature is baked into the model: a second one would act on top of it."""
    record = calibration_record(model)
    if record is None and getattr(getattr(model, "config", None), "density", None) is not None:
        raise RuntimeError(
            "Expected a model without a density calibrator, got one that divides its logits already. Call its "
            "`drop_density()` first."
        )
    if record is not None:
        raise RuntimeError(
            f"Expected a model without a baked temperature, got one with T = {float(record['temperature'])}, by "
            f"the method {record.get('method', 'temperature')!r}. "
            "Call `carot_hf.unbake_temperature(model)` first, and fit on the logits of the unbaked model."
        )


def check_width(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a temperature is baked into.

    Raises:
        ValueError: If they are in half precision, where a baked scale would be off by up to 1.6 %.
    """
    target = _baking_target(model)
    parameters = [target] if isinstance(target, nn.Parameter) else list(target.parameters())
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Expected a float32 parameter to bake the temperature into, got {parameter.dtype}. "
                "Call `model.float()` first, or load with `dtype=torch.float32`."
            )
    return parameters


def unbake_temperature(model: nn.Module) -> None:
    """Take a baked temperature out again, in place, and remove ``config.calibration``.

    An untouched ``logit_scale`` gets back the very value it had, bit for bit, also after a save and a load; one that
    was trained since gets ``ln(temperature)`` added; the same holds for a ``logit_bias``. Weights of a linear head are
    multiplied by the temperature, which restores them up to a rounding of the last bit or two (the division is not one
    to one in floating point).

    Raises:
        RuntimeError: If no temperature is baked in.
        TypeError: If the model has no config, or nothing that could hold a temperature.
        ValueError: If ``config.calibration`` is no such record.
    """
    target = _baking_target(model)
    config: Any = model.config
    calibration = calibration_record(model)
    if calibration is None:
        raise RuntimeError(
            "Expected a model with a baked temperature, got one without `config.calibration`. "
            "There is nothing to undo; call `bake_temperature` first."
        )
    temperature = float(calibration["temperature"])
    if getattr(config, "density", None) is not None:
        drop: Any = model.drop_density
        drop()  # it divides calibrated logits
    with torch.no_grad():
        if isinstance(target, nn.Parameter):
            before = calibration.get("logit_scale_before", math.nan)
            untouched = torch.equal(target, torch.full_like(target, before - math.log(temperature)))
            target.fill_(before if untouched else float(target) + math.log(temperature))
        else:
            for parameter in target.parameters():
                parameter.mul_(temperature)
        shift = _logit_bias(model)
        if shift is not None:
            before, bias = float(calibration["logit_bias_before"]), float(calibration["bias"])
            untouched = torch.equal(shift, torch.full_like(shift, _shifted(before, temperature, bias)))
            shift.fill_(before if untouched else (float(shift) - bias) * temperature)
    del config.calibration


def _checked_notes(record: dict[str, Any]) -> dict[str, Any]:
    """What else is to be written down, or a ValueError."""
    if taken := record.keys() & {"temperature", "bias", "logit_scale_before", "logit_bias_before"}:
        raise ValueError(f"Expected `record` without the key {taken.pop()!r}, got {record}. Rename it.")
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected `record` of JSON types, got {record} ({error}). Use str, int, float.") from error
    return record


def _baking_target(model: nn.Module) -> nn.Parameter | nn.Linear:
    """The ``logit_scale`` of the model, or else its linear head."""
    if getattr(model, "config", None) is not None:
        logit_scale = getattr(model, "logit_scale", None)
        if isinstance(logit_scale, nn.Parameter) and logit_scale.numel() == 1:
            return logit_scale
        for name in ("head", "classifier"):
            head = getattr(model, name, None)
            if isinstance(head, nn.Linear):
                return head
    raise TypeError(
        "Expected a model with a `config` and a `logit_scale` or a linear `head` or `classifier`, "
        f"got {type(model).__name__}. Unwrap the model (`accelerator.unwrap_model`) if it is wrapped."
    )


def _logit_bias(model: nn.Module) -> nn.Parameter | None:
    shift = getattr(model, "logit_bias", None)
    return shift if isinstance(shift, nn.Parameter) and shift.numel() == 1 else None


def _shifted(logit_bias: float, temperature: float, bias: float) -> float:
    return logit_bias / temperature + bias
