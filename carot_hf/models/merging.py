"""Merges of models of one class: interpolation of two ends (WiSE-FT), uniform and greedy soups; checks of all merges.

Weights are taken as they are stored, so a temperature that is baked into an end is part of its ``logit_scale`` (or of
its head) and is merged with it. No merge keeps ``config.calibration``: the temperature of one end says nothing about
another model, so fit a new one on the validation split.

Each result is a new model in evaluation mode that shares no memory with what went in. Its config and whatever else is
no tensor come from one of the models, named below. Floating parameters and buffers are merged on the CPU in float64
and rounded once to their own dtype; other tensors, such as position ids, must be equal and are kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

SWEEP = tuple(step / 10 for step in range(11))  # WiSE-FT: 0 to 1 by 0.1
# what changes the result of the same weights, shapes being equal
_SETTINGS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "id2label")


def interpolate(zero_shot: Model, fine_tuned: Model, alpha: float = 0.5) -> Model:
    r"""Return the model on the straight line between two ends, over all parameters, by name.

    .. math:: \theta_\alpha = (1 - \alpha) \, \theta_0 + \alpha \, \theta_1

    ``alpha`` 0 and 1 copy the weights of the end, bit for bit, zeros' signs, infinities and nan included. A value that
    is equal in both ends keeps its bits at every ``alpha``. To merge uncalibrated ends, call
    :func:`carot_hf.unbake_temperature` on a calibrated one first.

    Args:
        zero_shot: :math:`\theta_0`, the end at ``alpha`` 0; not changed.
        fine_tuned: :math:`\theta_1`, the end at ``alpha`` 1; not changed. Config, device and ``requires_grad`` of the
            result are its own.
        alpha: Weight of the fine-tuned end, in ``[0, 1]``.
    Returns:
        A new model of the same class, without ``config.calibration``.
    Raises:
        TypeError: If the ends are of different classes.
        ValueError: If ``alpha`` is out of range or the ends do not fit each other; the first differing name is given.
    Source:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), Eq. 1.
    """
    _check_alpha(alpha)
    check_twins(zero_shot, fine_tuned, ("`zero_shot`", "`fine_tuned`"))
    zero_shot_tensors, fine_tuned_tensors = floating(zero_shot), floating(fine_tuned)
    return model_with(
        fine_tuned,
        ((name, _mix(zero_shot_tensors[name], end, alpha)) for name, end in fine_tuned_tensors.items()),
    )


def alpha_sweep(zero_shot: Model, fine_tuned: Model, alphas: Sequence[float] = SWEEP) -> Iterator[tuple[float, Model]]:
    """Yield ``(alpha, interpolate(zero_shot, fine_tuned, alpha))`` for each weight, one model at a time.

    Confidence changes with ``alpha``: fit the temperature anew for each model, on the validation split, before its
    calibration is judged. :meth:`carot_hf.CaRotTrainer.evaluate` does.

    Args:
        zero_shot: As for :func:`interpolate`.
        fine_tuned: As for :func:`interpolate`.
        alphas: Weights of the fine-tuned end, each in ``[0, 1]``; 0 to 1 by 0.1.
    Raises:
        TypeError: If the ends are of different classes.
        ValueError: If a weight is out of range or the ends do not fit each other. Both are raised by the call, before
            the first model is asked for.
    """
    for alpha in alphas:
        _check_alpha(alpha)
    check_twins(zero_shot, fine_tuned, ("`zero_shot`", "`fine_tuned`"))
    return ((alpha, interpolate(zero_shot, fine_tuned, alpha)) for alpha in alphas)


def uniform_soup(models: Iterable[Model]) -> Model:
    """Return the mean of the weights of all models, each counted once.

    Args:
        models: One or more models of one class. They are read one after the other; of each but the first only its part
            in the float64 sums is kept, so a generator may load them one at a time.
    Returns:
        A new model with the config of the first. A soup of one has its weights bit for bit; a soup of two is
        ``interpolate(first, second, 0.5)``.
    Raises:
        TypeError: If the models are of different classes.
        ValueError: If there is no model, or they do not fit each other; the first differing name is given.
    Source:
        Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), section 2.
    """
    first: Model | None = None
    sums: dict[str, Tensor] = {}
    count = 0
    for count, model in enumerate(models, start=1):
        if first is None:
            first = model
            sums = _sums({}, first)
        else:
            check_twins(first, model, ("model 0", f"model {count - 1}"))
            sums = _sums(sums, model)
    if first is None:
        raise ValueError("Expected at least one model, got none. Pass the models to be averaged.")
    return _mean_model(first, sums, count)


def greedy_soup(models: Sequence[Model], score: Callable[[Model], float]) -> tuple[Model, list[int]]:
    """Average the models that help: add them best first, keep each one that does not lower the score of the mean.

    **The score must come from the validation split**, never from a test set that is reported: the soup is chosen by
    it, and this function cannot see which data it reads. It is called once for each model and once for each mean of
    two or more.

    Args:
        models: One or more models of one class. A sequence that loads a model when it is asked for one is enough; each
            is asked for at most twice.
        score: Called with a model, in whatever mode it is; returns a finite number, larger is better. It must leave
            the model's weights as they are.
    Returns:
        The soup, a new model with the config of the best model, and the indices of the models in it, best first. The
        best single model is always among them; equal scores rank by index.
    Raises:
        TypeError: If the models are of different classes.
        ValueError: If there is no model, they do not fit each other or a score is not finite.
    Source:
        Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), recipe 1.
    """
    if len(models) == 0:
        raise ValueError("Expected at least one model, got none. Pass the models to be averaged.")
    scores = [_finite(score(model), f"model {index}") for index, model in enumerate(models)]
    order = sorted(range(len(models)), key=lambda index: -scores[index])
    used, best = order[:1], scores[order[0]]
    first = models[order[0]]
    sums = _sums({}, first)
    soup = _mean_model(first, sums, 1)
    for index in order[1:]:
        model = models[index]
        check_twins(first, model, (f"model {order[0]}", f"model {index}"))
        tried_sums = _sums(sums, model)
        tried = _mean_model(first, tried_sums, len(used) + 1)
        tried_score = _finite(score(tried), f"the mean of models {[*used, index]}")
        if tried_score >= best:
            used, best, sums, soup = [*used, index], tried_score, tried_sums, tried
    return soup, used


def _check_merged(model: nn.Module) -> None:
    """Refuse adapters of peft, which is not imported for it: a mean of factors is not the factor of a mean."""
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(
            f"Expected models without adapters, got a {type(model).__name__} with some. Merge them first, with "
            "`PeftModel.merge_and_unload`, or load what `CaRotTrainer.save_model` wrote."
        )


def _check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"Expected `alpha` in [0, 1], got {alpha}. It is the weight of the fine-tuned end.")


def _finite(value: float, of: str) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"Expected a finite score, got {value} for {of}. Find out where the model diverged.")
    return value


def _mix(zero_shot: Tensor, fine_tuned: Tensor, alpha: float) -> Tensor:
    """The weighted mean of two tensors, on the CPU."""
    zero_shot, fine_tuned = zero_shot.detach().cpu(), fine_tuned.detach().cpu()
    if alpha in (0.0, 1.0):
        return zero_shot if alpha == 0.0 else fine_tuned
    mixed = (1.0 - alpha) * zero_shot.double() + alpha * fine_tuned.double()
    return torch.where(zero_shot == fine_tuned, fine_tuned, mixed.to(fine_tuned.dtype))


def _sums(sums: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The sums with one more model added, float64 on the CPU; nothing given is changed."""
    tensors = {name: tensor.detach().cpu() for name, tensor in floating(model).items()}
    if not sums:
        _check_merged(model)
        return {name: tensor.to(torch.float64, copy=True) for name, tensor in tensors.items()}
    return {name: total + tensors[name].double() for name, total in sums.items()}


def _mean_model(like: Model, sums: Mapping[str, Tensor], count: int) -> Model:
    return model_with(like, ((name, total / count) for name, total in sums.items()))


@torch.no_grad()
def model_with(like: Model, tensors: Iterable[tuple[str, Tensor]]) -> Model:
    """A copy of ``like`` with other values in its floating tensors and without the record of a temperature."""
    merged = copy.deepcopy(like)
    own = floating(merged)
    for name, tensor in tensors:
        own[name].copy_(tensor)
    config: Any = getattr(merged, "config", None)
    if hasattr(config, "calibration"):
        del config.calibration
    return merged.eval()


def floating(model: nn.Module) -> dict[str, Tensor]:
    """Floating parameters and buffers by name; tensors under several names once."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}


def check_twins(one: nn.Module, other: nn.Module, titles: tuple[str, str]) -> None:
    """Refuse two models whose tensors or settings differ, naming the first difference."""
    for model in (one, other):
        _check_merged(model)
    if type(one) is not type(other):
        raise TypeError(
            f"Expected models of one class, got {type(one).__name__} as {titles[0]} and {type(other).__name__} as "
            f"{titles[1]}. Merge a model with one that was fine-tuned from it."
        )
    here, there = _all_tensors(one), _all_tensors(other)
    for name in [*here, *(name for name in there if name not in here)]:
        difference = _difference(name, here, there)
        if difference is not None:
            raise ValueError(
                f"Expected two models with the same tensors, got a difference at `{name}`: {difference[0]} in "
                f"{titles[0]}, {difference[1]} in {titles[1]}. {difference[2]}"
            )
    configs: list[Any] = [getattr(model, "config", None) for model in (one, other)]
    mine, theirs = (_settings(config.to_dict() if hasattr(config, "to_dict") else {}) for config in configs)
    for path in {**mine, **theirs}:
        if mine.get(path) != theirs.get(path):
            raise ValueError(
                f"Expected two models with the same settings, got a difference at `config.{path}`: {mine.get(path)!r} "
                f"in {titles[0]}, {theirs.get(path)!r} in {titles[1]}. The same weights mean something else under each."
            )


def _difference(name: str, here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> tuple[str, str, str] | None:
    """What ``name`` is in both models and what to do, if that differs."""
    origin = "Merge a model with one that was fine-tuned from it."
    if name not in here or name not in there:
        one, other = ("there", "missing") if name in here else ("missing", "there")
        return one, other, origin
    mine, theirs = here[name], there[name]
    if mine.shape != theirs.shape:
        return f"shape {tuple(mine.shape)}", f"shape {tuple(theirs.shape)}", origin
    if mine.dtype != theirs.dtype:
        return str(mine.dtype), str(theirs.dtype), "Bring both to one dtype, best with `model.float()`."
    if _twin(name, here) != _twin(name, there):
        return f"stored as `{_twin(name, here)}`", f"stored as `{_twin(name, there)}`", "Tie the weights of both alike."
    if not mine.is_floating_point() and not torch.equal(mine.cpu(), theirs.cpu()):
        return "some values", f"others (both {mine.dtype})", "Numbers that are not floating cannot be averaged."
    return None


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def _twin(name: str, tensors: Mapping[str, Tensor]) -> str:
    """The first name under which the tensor of ``name`` is known: another one if weights are tied."""
    return next(other for other, tensor in tensors.items() if tensor is tensors[name])


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By path each setting of a config that decides what the weights mean."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _SETTINGS:
            found[prefix + key] = value
        elif isinstance(value, Mapping):
            found.update(_settings(value, f"{prefix}{key}."))
    return found
