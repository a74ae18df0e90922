"""Calibration of a finished model: the metrics of its logits, the temperature that divides them, and where it is kept.

Logits and labels may be torch tensors on any device or numpy arrays. Half precision is worked on as float32; rows
are taken in chunks, so 50,000 x 1000 needs little memory beyond the logits, and little at all with `LogitRows`.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .ece.binning import calibration_bins, check_n_bins, checked_weights, classwise_sums, rows_that_count
from .ece.inputs import AS_LOGITS, as_array, looks_like_probabilities, to_numpy, two_dimensional
from .escape import guarded

logger = guarded(logging.getLogger(__name__))

CRITERIA = ("nll", "ece")
LINKS = ("softmax", "sigmoid")
PUBLISHED_BATCH = 512  # rows of one batch where published figures are means of per-batch ECE
_CHUNK_VALUES = 1 << 17  # logits worked on at a time: small enough for the cache of one core
_LOWEST_EXPONENT = -80.0  # exp(-80) is 0 for every sum here and still a normal float32; denormals are slow
_LARGEST = 1e30  # of a number in a record
_HALF_CHI_SQUARED = 1.920729410347062
_ECE_BINS = 10
_ECE_GRID = 96
_ECE_TIE = 1e-7  # two values of ECE closer than this differ by rounding


class LogitRows(ABC):
    """Logits that are computed when they are read, some rows at a time: a matrix that is never there as a whole.

    Attributes:
        shape: ``(N, K)``.
        dtype: Of the rows; a float dtype.
        device: Of the rows.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: slice) -> Tensor:
        """Return ``(n, K)``, the same values each time."""


Logits = Tensor | NDArray[Any] | LogitRows


def calibration_metrics(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    *,
    n_bins: int = 10,
    temperature: float = 1.0,
    bias: float = 0.0,
    link: str = "softmax",
    sample_weight: Tensor | NDArray[Any] | None = None,
    ignore_index: int | None = None,
) -> dict[str, float]:
    r"""Accuracy and calibration of ``softmax(logits / temperature)`` over a whole data set.

    Args:
        logits: ``(N, K)`` float, before the softmax. Not probabilities. A tensor, an array, or `LogitRows`.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        n_bins: Number of confidence bins of every ECE here.
        temperature: Divides the logits; > 0.
        bias: Is added to the divided logits; with the sigmoid only, for a softmax does not see it.
        link: From logits to probabilities: ``"softmax"``, or ``"sigmoid"`` of each logit (SigLIP).
        sample_weight: ``(N,)`` weights >= 0, by which every mean is taken: a row of weight 2 counts as two, one of
            weight 0 is left out. None: 1 each.
        ignore_index: Label of rows that are left out.

    Returns:
        Python floats: fractions, never percent.

        - ``accuracy``; ``top5_accuracy`` (of the first min(5, K) classes). Equal logits rank by class index.
        - ``ece``, ``mce``: expected and maximum calibration error of the confidence, uniform bins.
        - ``ece_batch_mean``: mean of the ECE of consecutive batches of 512 rows, each weighted by its rows (so a
          last, partial batch counts less). Biased upward and dependent on the order of the rows; it is what the
          published CaRot and TRACER tables hold.
        - ``adaptive_ece``: ECE with bins of equal mass. ``classwise_ece``: mean over the classes of the ECE of
          :math:`p_k` as a forecast of class k.
        - ``nll``: mean of :math:`-\ln p_y`; with the sigmoid of the sum over the classes of
          :math:`-\ln p_k` for the label and :math:`-\ln(1 - p_k)` for the others. ``brier``: mean of
          :math:`\sum_k (p_k - 1[y = k])^2`, in [0, 2], or up to K with the sigmoid.
        - ``auroc``: chance that a right row has a higher confidence than a wrong one, ties counted half; nan when
          all rows are right or all are wrong, for then there is no such pair.
        - ``overconfidence``: mean confidence - accuracy, signed.

    Raises:
        ValueError: If a shape or range above does not hold, or a logit is not finite.

    Source:
        Guo et al. 2017 (ECE, MCE, NLL); Kull et al. 2019 (class-wise ECE); Nixon et al. 2019 (adaptive ECE).
    """
    check_n_bins(n_bins)
    _check_link(link, bias)
    logits, labels, weights = _kept_rows(logits, labels, sample_weight, ignore_index)
    logits, labels = checked_rows(logits, labels, temperature, warn=True)
    n_rows, n_classes = logits.shape
    mass = float(n_rows) if weights is None else float(weights.sum())
    confidences, correct = _empty_like_rows(logits), np.empty(n_rows, dtype=bool)
    nll = brier = top5 = 0.0
    class_sums = np.zeros((n_classes, n_bins))
    for start, rows, targets in row_chunks(logits, labels):
        at = slice(start, start + len(rows))
        own_weights = None if weights is None else weights[at]
        shifted, margins, hits = _shift(rows, targets)
        top5 += _total(_in_top5(rows, targets, hits), own_weights)
        if link == "softmax":
            exponentials = shifted.div_(temperature).clamp_(min=_LOWEST_EXPONENT).exp_()
            totals = exponentials.sum(dim=1)
            nll += _total(totals.double().log() - margins.double() / temperature, own_weights)
            probabilities = exponentials.div_(totals[:, None]).cpu().numpy()
            confidences[at] = totals.reciprocal().cpu().numpy()
        else:
            scaled = rows / temperature + bias
            own = scaled.gather(1, targets[:, None])[:, 0]
            nll += _total(F.softplus(scaled).sum(dim=1, dtype=torch.float64) - own.double(), own_weights)
            confidences[at] = scaled.amax(dim=1).sigmoid().cpu().numpy()
            probabilities = scaled.sigmoid_().cpu().numpy()
        correct[at] = hits.cpu().numpy()
        label_index = targets.cpu().numpy()
        class_sums += classwise_sums(probabilities, label_index, n_bins, own_weights)
        probabilities[np.arange(len(label_index)), label_index] -= 1.0
        squares = np.einsum("ij,ij->i", probabilities, probabilities)
        brier += float(squares.sum(dtype=np.float64)) if own_weights is None else float(own_weights @ squares)
    bins = calibration_bins(confidences, correct, n_bins, sample_weight=weights)
    adaptive = calibration_bins(confidences, correct, n_bins, strategy="quantile", sample_weight=weights)
    return {
        "accuracy": bins.avg_accuracy,
        "top5_accuracy": top5 / mass,
        "ece": bins.ece,
        "ece_batch_mean": _batch_mean_ece(confidences, correct, n_bins, weights),
        "adaptive_ece": adaptive.ece,
        "classwise_ece": float(np.abs(class_sums).sum() / (mass * n_classes)),
        "mce": bins.mce,
        "nll": nll / mass,
        "brier": brier / mass,
        "auroc": _auroc(confidences, correct, weights),
        "overconfidence": bins.overconfidence,
    }


def top_label(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    temperature: float = 1.0,
    *,
    bias: float = 0.0,
    link: str = "softmax",
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Confidence and hit of each row, ready for `carot_hf.ece.binning.calibration_bins`.

    Args:
        logits: ``(N, K)`` float, before the softmax.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        temperature: Divides the logits; > 0.
        bias: Is added to the divided logits; with the sigmoid only.
        link: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        ``(N,)`` largest probability of ``logits / temperature + bias``, float64 for float64 logits and else float32,
        and ``(N,)`` bool, whether the argmax of the logits as given (first index among equals) is the label.

    Raises:
        ValueError: If a shape or range above does not hold, or a logit is not finite.
    """
    _check_link(link, bias)
    logits, labels = checked_rows(logits, labels, temperature)
    confidences, correct = _empty_like_rows(logits), np.empty(len(logits), dtype=bool)
    for start, rows, targets in row_chunks(logits, labels):
        at = slice(start, start + len(rows))
        shifted, _, hits = _shift(rows, targets)
        if link == "softmax":
            largest = shifted.div_(temperature).clamp_(min=_LOWEST_EXPONENT).exp_().sum(dim=1).reciprocal()
        else:
            largest = (rows.amax(dim=1) / temperature + bias).sigmoid()
        confidences[at], correct[at] = largest.cpu().numpy(), hits.cpu().numpy()
    return confidences, correct


def fit_temperature(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    *,
    criterion: str = "nll",
    bounds: tuple[float, float] = (0.5, 10.0),
    warn: bool = True,
) -> float:
    r"""The temperature within ``bounds`` whose ``softmax(logits / temperature)`` is best calibrated.

    ``"nll"`` minimises :math:`\frac{1}{N} \sum_i [\ln \sum_k e^{\beta z_{ik}} - \beta z_{iy_i}]`, convex in
    :math:`\beta = 1/T`, by Newton steps in :math:`\ln \beta` kept inside a shrinking bracket. ``"ece"`` minimises the
    ECE over 10 uniform bins, which jumps and may have many minima, on a logarithmic grid that is then refined;
    among equal values the one nearest to the ``"nll"`` optimum is taken. It makes some 130 passes, ``"nll"`` about 6.

    Args:
        logits: ``(N, K)`` float, before the softmax, of rows held out of training. Not probabilities.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        criterion: ``"nll"`` or ``"ece"``.
        bounds: Lowest and highest temperature, ``0 < low < high``.
        warn: Log a warning if the optimum is at a bound.

    Returns:
        The temperature, dimensionless; divide logits by it.

    Raises:
        ValueError: If a shape or range above does not hold, a logit is not finite, or an option is unknown.

    Source:
        Guo et al. 2017, section 4.2 (NLL); CaRot (2023), appendix A.1 (ECE over [0.5, 10]).
    """
    if criterion not in CRITERIA:
        raise ValueError(f"Expected `criterion` to be one of {CRITERIA}, got {criterion!r}. Pass one of these names.")
    low, high = (float(bound) for bound in bounds)
    if not 0 < low < high < math.inf:
        raise ValueError(f"Expected `bounds` with 0 < low < high, got {bounds}. Pass e.g. `bounds=(0.5, 10.0)`.")
    logits, labels = checked_rows(logits, labels, warn=True)
    temperature = _fit_nll(logits, labels, low, high)
    if criterion == "ece":
        temperature = _fit_ece(logits, labels, low, high, temperature)
    if warn:
        warn_at_bound(temperature, low, high)
    return temperature


def temperature_interval(
    logits: Logits,
    labels: Tensor | NDArray[Any],
    *,
    link: str = "softmax",
    bounds: tuple[float, float] = (0.05, 20.0),
) -> tuple[float, float]:
    r"""The 95 % likelihood interval of the temperature: :math:`\{T: N (NLL(T) - \min NLL) \le 1.92\}`, within bounds.

    For few rows: each of some hundred looks at one temperature takes a pass. With the sigmoid the bias is the best one
    at each temperature, so that the interval is that of its profile likelihood.

    Args:
        logits: ``(N, K)`` float, before the link.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        link: ``"softmax"`` or ``"sigmoid"``.
        bounds: Lowest and highest temperature, ``0 < low < high``. An end that is a bound may lie farther out.
    Returns:
        Lowest and highest temperature.
    Raises:
        ValueError: If a shape or range above does not hold, or a logit is not finite.
    Source:
        Wilks 1938; 1.92 is half of the 95 % point of chi-squared with one degree of freedom.
    """
    _check_link(link, 0.0)
    logits, labels = checked_rows(logits, labels)

    def rise(beta: float) -> float:
        """``N NLL`` at ``1 / T``, convex in it."""
        return len(logits) * _profile_nll(logits, labels, beta, link)

    lowest, highest = 1.0 / bounds[1], 1.0 / bounds[0]
    best = _golden(rise, lowest, highest)
    limit = rise(best) + _HALF_CHI_SQUARED
    ends = []
    for end in (lowest, highest):
        inside, outside = best, end
        if rise(end) > limit:
            for _ in range(50):
                middle = 0.5 * (inside + outside)
                inside, outside = (middle, outside) if rise(middle) <= limit else (inside, middle)
        ends.append(1.0 / outside)
    return ends[1], ends[0]


def warn_at_bound(temperature: float, low: float, high: float) -> None:
    """Log a warning if a fitted temperature is one of its bounds."""
    if temperature in (low, high):
        logger.warning(
            "The best temperature is at the bound %g of [%g, %g]: the optimum may lie outside. "
            "Check the logits, or pass wider `bounds`.",
            temperature,
            low,
            high,
        )


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
        bias: Is added to the divided logits, as :func:`~carot_hf.sigmoid.fit_sigmoid` gives it.
        record: What else to write down (data set, number of rows, criterion ...), as JSON types.

    Raises:
        RuntimeError: If a temperature is baked in already.
        TypeError: If the model has no config, or nothing to bake into.
        ValueError: If the temperature, the bias, the record or the parameter's dtype is not as said above.
    """
    _check_temperature(temperature)
    target, shift = _baking_target(model), _logit_bias(model)
    config: Any = model.config
    check_not_baked(model)
    if not math.isfinite(bias) or (bias and shift is None):
        raise ValueError(
            f"Expected a finite `bias` for a model with a `logit_bias`, got {bias} for {type(model).__name__}. A "
            "softmax does not see a bias that all classes share: leave it 0."
        )
    parameters = [target] if isinstance(target, nn.Parameter) else list(target.parameters())
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Expected a float32 parameter to bake the temperature into, got {parameter.dtype}. "
                "Call `model.float()` first, or load with `dtype=torch.float32`."
            )
    record = dict(record or {})
    if taken := record.keys() & {"temperature", "bias", "logit_scale_before", "logit_bias_before"}:
        raise ValueError(f"Expected `record` without the key {taken.pop()!r}, got {record}. Rename it.")
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected `record` of JSON types, got {record} ({error}). Use str, int, float.") from error
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
    for name, kind in (("split", str), ("criterion", str), ("n", int), ("templates", list)):
        if name in record and not isinstance(record[name], kind):
            raise ValueError(f"Expected a {kind.__name__} as `{name}` in the {where}, got {record[name]!r:.80}. {cure}")
    return dict(record)


def check_not_baked(model: nn.Module) -> None:
    """Raise a RuntimeError if a temperature is baked into the model: a second one would act on top of it."""
    record = calibration_record(model)
    if record is not None:
        raise RuntimeError(
            f"Expected a model without a baked temperature, got one with {record}. "
            "Call `carot_hf.unbake_temperature(model)` first, and fit on the logits of the unbaked model."
        )


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


def _profile_nll(logits: Tensor | LogitRows, labels: Tensor, beta: float, link: str) -> float:
    """Mean NLL of the logits times ``beta``, with the sigmoid at the bias that is best there."""
    rows = torch.cat([part.double() for _, part, _ in row_chunks(logits, labels)]) * beta
    own = rows.gather(1, labels[:, None])[:, 0]
    if link == "softmax":
        return float((rows.logsumexp(dim=1) - own).mean())
    low, high = -float(rows.max()) - 40.0, -float(rows.min()) + 40.0  # the mean probability is 1 / K in between
    for _ in range(80):
        bias = 0.5 * (low + high)
        low, high = (low, bias) if float((rows + bias).sigmoid().sum()) > len(rows) else (bias, high)
    return float((F.softplus(rows + bias).sum(dim=1) - own - bias).mean())


def _golden(function: Callable[[float], float], low: float, high: float) -> float:
    """The minimum of a convex function between two numbers, by golden sections."""
    share = 0.5 * (math.sqrt(5.0) - 1.0)
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(60):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = function(right)
    return 0.5 * (low + high)


def _check_link(link: str, bias: float) -> None:
    if link not in LINKS:
        raise ValueError(
            f"Expected `link` to be one of {LINKS}, got {link!r}. CLIP's is 'softmax', SigLIP's 'sigmoid'."
        )
    if not math.isfinite(bias) or (bias and link == "softmax"):
        raise ValueError(
            f"Expected a finite `bias`, and 0 with the softmax, which does not see it; got {bias} with {link!r}. "
            "Leave it out."
        )


def _fit_nll(logits: Tensor | LogitRows, labels: Tensor, low: float, high: float) -> float:
    """Root of the derivative of the mean NLL with respect to u = ln(1 / T), which is negative left of the optimum."""
    maxima = torch.cat([rows.amax(dim=1) for _, rows, _ in row_chunks(logits, labels)])
    mean_margin = 0.0
    for start, rows, targets in row_chunks(logits, labels):
        label_logits = rows.gather(1, targets[:, None])[:, 0]
        mean_margin += float((label_logits.double() - maxima[start : start + len(rows)].double()).sum()) / len(logits)

    def slope(u: float) -> tuple[float, float]:
        """Derivative of the NLL, and variance of the scaled logits: slope / variance is a Newton step."""
        beta, first, second = math.exp(u), 0.0, 0.0
        for start, rows, _ in row_chunks(logits, labels):
            scaled = (rows - maxima[start : start + len(rows), None]).mul_(beta).clamp_(min=_LOWEST_EXPONENT)
            weights = scaled.exp()
            totals = weights.sum(dim=1).double()
            mean = weights.mul_(scaled).sum(dim=1).double() / totals
            square = weights.mul_(scaled).sum(dim=1).double() / totals
            first += float(mean.sum())
            second += float((square - mean * mean).sum())
        return first / len(logits) - beta * mean_margin, second / len(logits)

    left, right = -math.log(high), -math.log(low)
    u = min(max(0.0, left), right)
    last_step = right - left
    unseen = {left, right}  # ends of the bracket where the sign of the slope is not known yet
    for _ in range(100):
        value, variance = slope(u)
        if value == 0.0:
            break
        if u in (left, right) and u in unseen and (value > 0.0) == (u == left):
            return high if u == left else low
        unseen.discard(u)
        left, right = (left, u) if value > 0.0 else (u, right)
        end = left if value > 0.0 else right
        step = -value / variance if variance > 0.0 else math.copysign(math.inf, -value)
        if not left < u + step < right or abs(step) > 0.5 * last_step:
            step = (end if end in unseen else 0.5 * (left + right)) - u
        u, last_step = u + step, abs(step)
        if last_step < 1e-6:  # Newton squares the error: what is left is below the rounding of the data
            break
    return min(max(math.exp(-u), low), high)


def _fit_ece(logits: Tensor | LogitRows, labels: Tensor, low: float, high: float, nll_optimum: float) -> float:
    """Grid over [low, high], then three finer grids around the best; among equals the nearest to ``nll_optimum``."""
    correct = top_label(logits, labels)[1]
    temperatures = np.unique(np.append(np.geomspace(low, high, _ECE_GRID), nll_optimum))
    errors = _ece_at(logits, labels, correct, temperatures)
    best = 0
    for round_ in range(4):
        ties = np.flatnonzero(errors <= errors.min() + _ECE_TIE)
        best = int(ties[np.argmin(np.abs(np.log(temperatures[ties] / nll_optimum)))])
        if round_ == 3:
            break
        around = temperatures[max(best - 1, 0)], temperatures[min(best + 1, len(temperatures) - 1)]
        finer = np.setdiff1d(np.geomspace(*around, 13), temperatures)
        order = np.argsort(np.append(temperatures, finer))
        errors = np.append(errors, _ece_at(logits, labels, correct, finer))[order]
        temperatures = np.append(temperatures, finer)[order]
    return float(temperatures[best])


def _ece_at(
    logits: Tensor | LogitRows, labels: Tensor, correct: NDArray[np.bool_], temperatures: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``(len(temperatures),)`` ECE of the logits divided by each temperature."""
    errors = []
    for group in np.array_split(temperatures, -(-len(temperatures) // 16)):  # bounds the memory to 16 floats a row
        confidences = np.empty((len(group), len(logits)), dtype=_empty_like_rows(logits).dtype)
        for start, rows, targets in row_chunks(logits, labels):
            shifted = _shift(rows, targets)[0]
            totals = [shifted.div(t).clamp_(min=_LOWEST_EXPONENT).exp_().sum(dim=1) for t in group.tolist()]
            confidences[:, start : start + len(rows)] = torch.stack(totals).reciprocal_().cpu().numpy()
        errors += [calibration_bins(row, correct, _ECE_BINS).ece for row in confidences]
    return np.array(errors)


def row_chunks(logits: Tensor | LogitRows, labels: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield first row, logits as float32 or float64, and labels of one chunk after the other."""
    step = max(1, _CHUNK_VALUES // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = logits[start : start + step]
        yield start, rows if rows.dtype == torch.float64 else rows.float(), labels[start : start + step]


def _shift(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A new ``(n, K)`` tensor with row maximum 0, its values ``(n,)`` at the labels, and ``(n,)`` hits."""
    maxima, predictions = rows.max(dim=1, keepdim=True)  # the first index among equals
    shifted = rows - maxima
    return shifted, shifted.gather(1, targets[:, None])[:, 0], predictions[:, 0] == targets


def _in_top5(rows: Tensor, targets: Tensor, hits: Tensor) -> Tensor:
    """``(n,)`` whether the label is among the first five classes by logit, equal logits in the order of the classes."""
    label_logits = rows.gather(1, targets[:, None])
    larger = (rows > label_logits).sum(dim=1)
    near = (~hits & (larger < 5)).nonzero()[:, 0]  # only here can equal logits matter
    earlier = torch.arange(rows.shape[1], device=rows.device) < targets[near, None]
    equal = ((rows[near] == label_logits[near]) & earlier).sum(dim=1)
    found = hits.clone()
    found[near] = larger[near] + equal < 5
    return found


def _total(values: Tensor, weights: NDArray[np.float64] | None) -> float:
    """Sum by weight, in float64."""
    if weights is None:
        return float(values.sum())
    return float(values.double() @ torch.from_numpy(weights).to(values.device))


def _batch_mean_ece(
    confidences: NDArray[Any], correct: NDArray[np.bool_], n_bins: int, weights: NDArray[np.float64] | None = None
) -> float:
    """Mean of the ECE of consecutive batches of 512 rows, by the weight of each."""
    total = 0.0
    for start in range(0, len(confidences), PUBLISHED_BATCH):
        batch = slice(start, start + PUBLISHED_BATCH)
        own = None if weights is None else weights[batch]
        bins = calibration_bins(confidences[batch], correct[batch], n_bins, sample_weight=own)
        total += bins.ece * float(bins.n if own is None else own.sum())
    return total / float(len(confidences) if weights is None else weights.sum())


def _auroc(confidences: NDArray[Any], correct: NDArray[np.bool_], weights: NDArray[np.float64] | None = None) -> float:
    """Mann-Whitney statistic over pairs of a right and a wrong row."""
    right, wrong = confidences[correct], np.sort(confidences[~correct])
    if len(right) == 0 or len(wrong) == 0:
        return math.nan
    if weights is not None:
        order = np.argsort(confidences[~correct], kind="stable")
        reached = np.concatenate([[0.0], np.cumsum(weights[~correct][order])])
        sides = [reached[np.searchsorted(wrong, right, side=side)] for side in ("left", "right")]  # type: ignore[arg-type]
        return float(weights[correct] @ (sides[0] + sides[1]) / (2 * weights[correct].sum() * reached[-1]))
    below = np.searchsorted(wrong, right, side="left").sum() + np.searchsorted(wrong, right, side="right").sum()
    return float(below / (2 * len(right) * len(wrong)))


def _empty_like_rows(logits: Tensor | LogitRows) -> NDArray[Any]:
    return np.empty(len(logits), dtype=np.float64 if logits.dtype == torch.float64 else np.float32)


def _check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"Expected a finite `temperature` above 0, got {temperature}. It divides the logits; 1.0 leaves them as is."
        )


class _Rows(LogitRows):
    """Some rows of others, read when they are asked for.

    Args:
        logits: All rows.
        rows: ``(n,)`` numbers of those that are kept, in order.
    """

    def __init__(self, logits: Tensor | LogitRows, rows: NDArray[np.int64]) -> None:
        self._logits, self._kept = logits, rows
        self.shape = len(rows), logits.shape[1]
        self.dtype, self.device = logits.dtype, logits.device

    def __getitem__(self, rows: slice) -> Tensor:
        kept = self._kept[rows]
        if len(kept) == 0:
            return self._logits[0:0]
        first = int(kept[0])
        block = self._logits[first : int(kept[-1]) + 1]
        return block[torch.from_numpy(kept - first).to(block.device)]


def _kept_rows(
    logits: Logits, labels: Any, sample_weight: Any, ignore_index: int | None
) -> tuple[Logits, Any, NDArray[np.float64] | None]:
    """The rows that count, and their weights; None: 1 each."""
    if sample_weight is None and ignore_index is None:
        return logits, labels, None
    labels = _as_labels(labels)
    if labels.ndim != 1:
        return logits, labels, None  # to be refused
    weights = checked_weights(sample_weight, len(labels))
    rows = rows_that_count(labels.cpu().numpy(), weights, ignore_index)
    if rows is None:
        return logits, labels, weights
    whole = logits if isinstance(logits, LogitRows) else _as_logits(logits)
    if tuple(labels.shape) != (len(whole),):
        return whole, labels, weights  # to be refused
    weights = None if weights is None else weights[rows]
    return _Rows(whole, rows), labels[torch.from_numpy(rows).to(labels.device)], weights


def _as_logits(logits: Any) -> Tensor:
    return logits.detach() if isinstance(logits, Tensor) else _from_numpy(logits, "logits")


def _as_labels(labels: Any) -> Tensor:
    return labels.detach() if isinstance(labels, Tensor) else _from_numpy(labels, "labels")


def checked_rows(
    logits: Logits, labels: Tensor | NDArray[Any], temperature: float = 1.0, *, warn: bool = False
) -> tuple[Tensor | LogitRows, Tensor]:
    """Return both as tensors on the device of the logits, shapes and values checked.

    Args:
        logits: See `calibration_metrics`.
        labels: See there.
        temperature: See there.
        warn: Warn if all rows look like probabilities.
    """
    _check_temperature(temperature)
    if not isinstance(logits, LogitRows):
        logits = _as_logits(logits)
    labels = _as_labels(labels)
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"Expected `logits` of a float dtype and shape (N, K) with N >= 1 and K >= 2, got {logits.dtype} of shape "
            f"{shape}. Pass one row of class scores, before the softmax, for each sample."
        )
    if tuple(labels.shape) != shape[:1]:
        two = labels.ndim == 2 and len(labels) == len(logits)
        got = two_dimensional(labels.cpu().numpy(), "labels") if two else f"{tuple(labels.shape)}. Pass class indices."
        raise ValueError(f"Expected `labels` of shape ({len(logits)},), got {got}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"Expected `labels` of an integer dtype, got {labels.dtype}. Pass class indices.")
    labels = labels.to(logits.device, torch.int64)
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"Expected `labels` in [0, {logits.shape[1]}), got {int(labels[row])} in row {row}. "
            "Leave out rows without a class, and map labels to the columns of `logits`."
        )
    probable = warn and len(logits) > 1
    for start, rows, _ in row_chunks(logits, labels):
        probable = probable and looks_like_probabilities(rows)
        if math.isfinite(rows.sum()):  # the sum shows a nan or inf at a fifth of the cost of `isfinite`
            continue
        for row, column in (~rows.isfinite()).nonzero()[:1].tolist():
            raise ValueError(
                f"Expected finite `logits`, got {float(rows[row, column])} in row {start + row}, column {column}. "
                "Find out where the model diverged; to leave a class out, drop its column."
            )
    if probable:
        warnings.warn(AS_LOGITS + "Pass logits: `probabilities.log()` gives these probabilities back.", stacklevel=3)
    return logits, labels


def _from_numpy(values: Any, name: str) -> Tensor:
    """A tensor that shares memory where torch allows it."""
    array = to_numpy(as_array(values, name))
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"Expected `{name}` as numbers, got {array.dtype}. "
            + ("Pass class indices." if name == "labels" else "Pass one row of class scores for each sample.")
        )
    if array.dtype.kind == "u":
        array = array.astype(np.int64)
    return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
