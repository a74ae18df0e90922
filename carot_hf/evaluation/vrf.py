"""VRF of two models on the sets of their suite: each image embedded by both, nothing fitted on a shifted set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..basics.processes import done_by_first
from ..calibration.fit import fit_scaling, scaling_bounds
from ..calibration.rows import LogitRows
from ..calibration.vrf import VRF, A, B, failures, fit_vrf
from ..data.perturbed_set import MOST_IN_BANK, can_be_bank, drawn_rows
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite, needed
from .evaluation import Evaluation
from .evaluator import Evaluator
from .logits import SetLogits
from .measure import evaluation_of, measure_all
from .right import settled

WEIGHT = "fine_tuned_weight"
_TRAIN = "training images"  # beside the names of sets


def evaluate_vrf(
    zero_shot: Evaluator,
    fine_tuned: Evaluator,
    *,
    k: int | None = None,
    a: float = A,
    b: float = B,
    choose: bool = False,
    n_bootstrap: int = 1000,
) -> tuple[Evaluation, VRF]:
    """Mix a zero-shot and a fine-tuned model image by image, and measure the mixture on all sets of their suite.

    The temperatures of both, and with ``choose`` how images are weighed, are fitted on the validation set; the failures
    of zero-shot are those among at most 20,000 training images, of each class as many as of the others.

    Args:
        zero_shot: Of the model before the fine-tuning. Criterion, bounds and bins of the temperatures are its own.
        fine_tuned: Of the model after it; of the same suite.
        k: See :func:`~carot_hf.fit_vrf`, as ``a``, ``b`` and ``choose``.
        a: See there.
        b: See there.
        choose: See there.
        n_bootstrap: Draws of the 95 % intervals of accuracy and ECE; 0: none are made.
    Returns:
        The evaluation, with the names of :meth:`carot_hf.Evaluator.evaluate`, and what was fitted. The plain figures
        are those of the mixed probabilities, ``_ts`` those at one more temperature of their logarithms that was fitted
        on the validation set; ``fine_tuned_weight`` is the mean weight of the fine-tuned model. A set whose labels are
        some of the classes is measured as of one model: both give probabilities of these labels, which are mixed.
    Raises:
        ValueError: If the evaluators are of two suites, a model has SigLIP's sigmoid, the suite has no validation set
            or no training set that can be read by index, a set has no labels, or as :func:`~carot_hf.fit_vrf` does.
    """
    suite, train = _checked(zero_shot, fine_tuned)
    sets = suite.evaluation_sets
    read = _read(zero_shot, fine_tuned, {**sets, _TRAIN: train})
    fits = {"criterion": zero_shot.criterion, "bounds": scaling_bounds(zero_shot.bounds, "softmax")}
    vrf, scaling = done_by_first(lambda: _fitted(read, fits, k=k, a=a, b=b, choose=choose))
    mixed = {name: Mixture(vrf, *read.logits[name], vrf.distance(read.embeds[name])) for name in sets}
    common = {"n_bins": zero_shot.n_bins, "link": "softmax", "n_bootstrap": n_bootstrap}
    options = {name: {**common, "scalings": {"ts": lambda: scaling} if name != "validation" else {}} for name in sets}
    labels = {name: settled(mixed[name], read.labels[name], data) for name, data in sets.items()}
    found = measure_all({name: (mixed[name], labels[name]) for name in sets}, options)
    for name, part in found.items():
        part.metrics[WEIGHT] = float(vrf.weights(read.embeds[name]).mean())
    per_image = {name: part.per_image for name, part in found.items()}
    return evaluation_of(found, suite, scaling, per_image=per_image), vrf


@dataclass(frozen=True)
class _Read:
    """What was read of sets, by name: logits of both models, embeddings by the fine-tuned one, labels."""

    logits: dict[str, tuple[SetLogits, SetLogits]]
    embeds: dict[str, Tensor]
    labels: dict[str, Any]


def _read(zero_shot: Evaluator, fine_tuned: Evaluator, sets: Mapping[str, ShiftSet]) -> _Read:
    """Embed each image by both models."""
    parts = [evaluator.embed(sets, "VRF") for evaluator in (zero_shot, fine_tuned)]
    heads = [evaluator.head() for evaluator in (zero_shot, fine_tuned)]
    first, second = (
        {name: SetLogits(part[name][0], head, data) for name, data in sets.items()}
        for part, head in zip(parts, heads, strict=True)
    )
    logits = {name: (first[name], second[name]) for name in sets}
    return _Read(logits, {name: part[0] for name, part in parts[1].items()}, {n: p[1] for n, p in parts[1].items()})


def _fitted(read: _Read, fits: Mapping[str, Any], **chosen: Any) -> tuple[VRF, dict[str, float]]:
    """What mixes, and what calibrates the mixture once more, of the validation and the training images."""
    failed = torch.from_numpy(failures(*read.logits[_TRAIN], read.labels[_TRAIN]))
    zero_shot, fine_tuned = (part.whole() for part in read.logits["validation"])
    embeds, labels = read.embeds["validation"], read.labels["validation"]
    made = fit_vrf(zero_shot, fine_tuned, embeds, labels, read.embeds[_TRAIN][failed], **chosen, **fits)
    mixture = made.log_mixture(zero_shot, fine_tuned, made.distance(embeds))
    return made, fit_scaling(mixture, labels, link="softmax", warn=False, **fits)


class Mixture(LogitRows):
    """The logarithms of the mixed probabilities of a set, computed when they are read: logits of temperature 1.

    ``distances`` are those of the fine-tuned model's embeddings, ``(N,)``.
    """

    def __init__(self, vrf: VRF, zero_shot: LogitRows, fine_tuned: LogitRows, distances: Tensor) -> None:
        self._vrf, self._zero_shot, self._fine_tuned, self._distances = vrf, zero_shot, fine_tuned, distances
        self.shape, self.dtype, self.device = fine_tuned.shape, fine_tuned.dtype, fine_tuned.device

    def __getitem__(self, rows: slice) -> Tensor:
        return self._vrf.log_mixture(
            self._zero_shot[rows].to(self.device), self._fine_tuned[rows], self._distances[rows]
        )


def _checked(zero_shot: Evaluator, fine_tuned: Evaluator) -> tuple[ShiftSuite, ShiftSet]:
    """The suite of both, and the training images that stand for all of them; refused before any work."""
    if zero_shot.suite is not fine_tuned.suite:
        raise ValueError(
            f"Expected two evaluators of one suite, got '{zero_shot.suite.name}' and '{fine_tuned.suite.name}'. Make "
            "both with the same ShiftSuite."
        )
    if (links := {zero_shot.link, fine_tuned.link}) != {"softmax"}:
        raise ValueError(f"Expected two models with a softmax, got the links {sorted(links)}. Mix models of CLIP.")
    suite = zero_shot.suite
    needed(suite.validation, "validation", "to fit the temperatures of VRF on")
    train = needed(suite.train, "training", "in which VRF looks for failures of zero-shot")
    if not can_be_bank(train):
        raise ValueError(
            "Expected a training set that can be read by index, in which VRF looks for failures of zero-shot, got a "
            "stream. Load it without `streaming`."
        )
    if missing := [data.name for data in suite.evaluation_sets.values() if data.label_column is None]:
        raise ValueError(f"Expected labels in every set, got none in {missing}. Leave it out of the suite.")
    rows = drawn_rows(train, MOST_IN_BANK)
    return suite, train if rows is None else train.subset(rows, train.name)
