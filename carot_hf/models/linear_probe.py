"""The linear probe: the head that fits the frozen features of the training images best, before the first step."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.escape import guarded
from ..calibration.rows import check_range
from ..objective.losses import check_smoothing
from .classifier import check_labels, check_lengths

logger = guarded(logging.getLogger(__name__))

_CHUNK_VALUES = 1 << 22  # logits of the linear probe held at a time
_PROBE_HISTORY = 50  # steps that L-BFGS remembers; with 10 the digits suite takes 7 times as many passes
_PROBE_TOLERANCE = 1e-11  # nats a step; on the digits suite probabilities are then within 1.2e-4 of the optimum's


@torch.no_grad()
def linear_probe(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    label_smoothing: float = 0.0,
    l2: float = 0.01,
    max_iter: int = 1000,
) -> tuple[Tensor, Tensor]:
    r"""Fit a linear head on frozen features: the first stage of LP-FT.

    Minimises over all rows at once, by L-BFGS with strong Wolfe line search from the given head,

    .. math:: \frac1N \Big[ \sum_i CE(W f_i + b, \, y_i) + \frac{\lambda}{2} \|W\|_F^2 \Big],

    which is strictly convex in W; with :math:`\lambda = 1/C` it is scikit-learn's ``LogisticRegression``. Logits
    are made in chunks of rows and in float64 (in float32 the search stalls while the gradient is still 1e-6). Nothing
    is random. 100 to 250 passes over the features are usual; each one is logged at level DEBUG, the outcome at INFO.

    Args:
        features: ``(N, D)`` float, rows of length 1, of images without augmentation. The work is done on their device.
        labels: ``(N,)`` integer class indices in ``[0, K)``.
        weight: ``(K, D)`` float, the head to start from.
        bias: ``(K,)`` float.
        label_smoothing: epsilon, in ``[0, 1)``: share of the target that is spread evenly over the classes.
        l2: :math:`\lambda`, > 0. The default is ours: of the powers of ten the one with the lowest NLL on the
            validation split of the digits suite.
        max_iter: Most steps of the search, >= 1. If they end before a step gains less than 1e-11, a warning is logged.
    Returns:
        Weight and bias, new tensors of the dtype and on the device of those given.
    Raises:
        ValueError: If a shape or range above does not hold.
    Source:
        Kumar et al. 2022 (arXiv 2202.10054), who choose :math:`\lambda` on in-distribution validation data.
    """
    _check_probe(features, labels, weight, bias, label_smoothing, l2, max_iter)
    device = torch.device("cpu") if features.device.type == "mps" else features.device  # mps has no float64
    head, shift = (start.detach().to(device, torch.float64, copy=True) for start in (weight, bias))
    step = max(1, _CHUNK_VALUES // len(weight))
    passes = 0

    def objective() -> float:
        nonlocal passes
        passes += 1
        value = _objective(head, shift, features, labels, label_smoothing, l2, step)
        logger.debug("Linear probe: pass %d, objective %.9f", passes, value)
        return value

    search = _search([head, shift], max_iter)
    first, last = float(search.step(objective)), objective()
    logger.info("Linear probe: objective %.6f, then %.6f after %d passes", first, last, passes)
    if search.state[head]["n_iter"] >= max_iter:
        logger.warning(
            "The linear probe is not at its optimum after %d steps. Raise `max_iter`, or `l2`: a weak penalty takes "
            "more steps.",
            max_iter,
        )
    return head.to(weight.device, weight.dtype), shift.to(bias.device, bias.dtype)


def _search(parameters: list[Tensor], max_iter: int) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        parameters,
        max_iter=max_iter,
        max_eval=25 * max_iter,  # as many as a line search may take: the limit is that of the steps
        tolerance_grad=0.0,
        tolerance_change=_PROBE_TOLERANCE,
        history_size=_PROBE_HISTORY,
        line_search_fn="strong_wolfe",
    )


@torch.no_grad()  # the search turns gradients on around it
def _objective(
    head: Tensor, shift: Tensor, features: Tensor, labels: Tensor, label_smoothing: float, l2: float, step: int
) -> float:
    """The value at a head, whose gradients are set; ``step`` rows at a time."""
    n_rows, n_classes = len(features), len(head)
    loss, head.grad, shift.grad = 0.5 * l2 * float(head.square().sum()), l2 * head, torch.zeros_like(shift)
    for start in range(0, n_rows, step):
        rows = features[start : start + step].to(head.device, torch.float64)  # (n, D)
        targets = labels[start : start + step].to(head.device, torch.int64)[:, None]
        log_probs = F.log_softmax(torch.addmm(shift, rows, head.T), dim=1)  # (n, K)
        picked = log_probs.gather(1, targets)
        loss -= float((1 - label_smoothing) * picked.sum() + label_smoothing / n_classes * log_probs.sum())
        residuals = log_probs.exp_().sub_(label_smoothing / n_classes)
        residuals.scatter_add_(1, targets, residuals.new_full(targets.shape, label_smoothing - 1))
        head.grad.addmm_(residuals.T, rows)
        shift.grad.add_(residuals.sum(dim=0))
    head.grad.div_(n_rows)
    shift.grad.div_(n_rows)
    return loss / n_rows


def _check_probe(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, label_smoothing: float, l2: float, max_iter: int
) -> None:
    if features.dim() != 2 or len(features) < 1 or not features.is_floating_point():
        raise ValueError(
            f"Expected `features` of a float dtype and shape (N, D) with N >= 1, got {features.dtype} of shape "
            f"{tuple(features.shape)}. Pass the normalised embedding of each image."
        )
    size = features.shape[1]
    if weight.dim() != 2 or len(weight) < 2 or weight.shape[1] != size or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"Expected `weight` of shape (K, {size}) with K >= 2 and `bias` of shape (K,), got {tuple(weight.shape)} "
            f"and {tuple(bias.shape)}. Pass those of the head that takes these features."
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError("Expected finite `weight` and `bias`, got nan or inf. Start from the zero-shot head.")
    check_smoothing(label_smoothing)
    if not 0.0 < l2 < float("inf"):
        raise ValueError(f"Expected a finite `l2` above 0, got {l2}. Without a penalty there may be no optimum.")
    if max_iter < 1:
        raise ValueError(f"Expected `max_iter` >= 1, got {max_iter}. It is the most steps of the search.")
    check_labels(labels, len(features))
    check_range(labels, len(weight), "the rows of `weight`")
    check_lengths("features", features)


def fit_head(model: Any, embeds: Tensor, labels: Tensor | None, head: tuple[Tensor, Tensor], smoothing: float) -> None:
    """Put the linear probe of features into a classifier.

    Call it before the model is wrapped: DDP then gives all processes the weights of the first, and DeepSpeed, whose
    optimizer keeps weights of its own from the moment of wrapping, knows them; ``on_train_begin`` is too late for both.

    Args:
        model: With a linear ``head``; changed in place.
        embeds: ``(N, D)``, as evaluation sees the training images.
        labels: ``(N,)``.
        head: Weight and bias to start from.
        smoothing: Label smoothing of the targets.
    Raises:
        ValueError: If there are no labels.
    """
    logger.info("Linear probe: fitting the head on frozen features before the first step.")
    if labels is None:
        raise ValueError("Expected labels in the training set, got none. A linear probe needs them.")
    weight, bias = linear_probe(embeds, labels, *(part.cpu() for part in head), label_smoothing=smoothing)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
