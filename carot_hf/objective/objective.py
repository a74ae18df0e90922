"""Objective: the terms that are on, from embeddings of this process's rows to the weighted sum.

Knows the table of terms and the whole batch; nothing of models, training and logs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..basics.processes import row_counts
from .gather import gather_rows, local_columns
from .losses import same_class_targets, similarity_logits
from .terms import CLASSES, PAIRS, TEACHER_LOGITS, TERMS, TEXT, VISUAL, Started, Step, Term

Embeds = tuple[Tensor, Tensor]
Head = Sequence[Tensor]  # logit_scale and, with a sigmoid, logit_bias


@dataclass(frozen=True)
class Pairing:
    """How a link pairs images and captions.

    Attributes:
        logits: From embeddings and head of this process to its logits against the whole batch.
        shared: Whether the probabilities of a row sum to 1, so that captions of one class share them.
        clamped: Whether ``exp(logit_scale)`` has a usual maximum; SigLIP's own is above CLIP's 100.
    """

    logits: Callable[..., tuple[Tensor, ...]]
    shared: bool
    clamped: bool


class Objective:
    """The weighted sum of the terms that training arguments turn on.

    Args:
        args: :class:`~carot_hf.CaRotTrainingArguments`; read at each call, so that they may be changed in between.
        link: From logits to probabilities: "softmax" or "sigmoid".
    """

    def __init__(self, args: Any, link: str) -> None:
        self.args, self.link = args, link
        self._pairing = PAIRINGS[link]

    @property
    def terms(self) -> list[Term]:
        """The terms that are on, in the order of the table."""
        main = CLASSES if self.args.objective == "cross_entropy" else PAIRS
        return [
            row
            for row in TERMS.values()
            if self.link in row.links
            and (
                main in row.needs
                if row.weight is None
                else row.weight_in(self.args) > 0 and (main == PAIRS or row.of_images)
            )
        ]

    @property
    def clamps_scale(self) -> bool:
        """Whether ``exp(logit_scale)`` is to be clamped during training."""
        return bool(self.args.clamps_logit_scale and self._pairing.clamped)

    @property
    def modules(self) -> list[str]:
        """Modules of the student whose weights are penalised."""
        needs = {need for row in self.terms for need in row.needs}
        return [name for name in (VISUAL, TEXT) if name in needs]

    def needs(self, name: str) -> bool:
        """Whether a term that is on needs something, by its name in :mod:`carot_hf.objective.terms`."""
        return any(name in row.needs for row in self.terms)

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Sum terms with their weights."""
        return torch.stack([TERMS[name].weight_in(self.args) * term for name, term in terms.items()]).sum()

    def describe(self) -> str:
        """Return the terms with their weights, as a line for people."""
        parts = []
        for row in self.terms:
            if row.weight is not None:
                title = row.weight.removesuffix("_weight").replace("_", " ")
                parts.append(f"{row.weight_in(self.args):g} x {title}")
            else:
                parts.append("cross-entropy" if CLASSES in row.needs else f"contrastive ({self.link})")
        smoothing = self.args.label_smoothing_factor
        return " + ".join(parts) + (f", label smoothing {smoothing:g}" if smoothing else "")

    def class_terms(
        self, logits: Tensor, labels: Tensor, image: Tensor | None = None, start: Started | None = None
    ) -> dict[str, Tensor]:
        """The terms of a linear head's logits ``(b, K)`` and, where one needs them, of image embeddings ``(b, D)``."""
        embeds = () if image is None else (image,)
        step = Step(self.args.label_smoothing_factor, embeds, logits=(logits,), targets=labels, start=start)
        return self._of_rows(step, len(logits))

    def pair_terms(
        self,
        embeds: Embeds,
        head: Head,
        labels: Tensor | None,
        taught: Embeds | None = None,
        teacher_head: Head = (),
        start: Started | None = None,
    ) -> dict[str, Tensor]:
        """The terms that are functions of embeddings of pairs, by name, unweighted.

        Args:
            embeds: Of images and captions of this process, ``(b, D)`` each, length 1, at least float32.
            head: The student's.
            labels: ``(b,)`` int64, where there are any.
            taught: Of the teacher, as ``embeds``.
            teacher_head: The teacher's.
            start: Of the model that the run started from.
        Raises:
            ValueError: If captions of one class are told apart by labels, and there are none.
        """
        counts = self._row_counts(embeds[0])
        logits = self._pairing.logits(*embeds, head, counts, with_grad=True)
        targets, ignore = self._targets(labels, logits[0], counts)
        step = Step(self.args.label_smoothing_factor, embeds, logits, targets, ignore, taught or (), start=start)
        if taught is not None and self.needs(TEACHER_LOGITS):
            step.teacher_logits = self._pairing.logits(*taught, teacher_head, counts, with_grad=False)
        return self._of_rows(step, len(embeds[0]), counts)

    def everyones(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, without gradient."""
        return gather_rows(rows, with_grad=False, counts=self._row_counts(rows))

    def weight_terms(self, weights: Mapping[str, Tensor], moved: Tensor | None = None) -> dict[str, Tensor]:
        """The terms that are functions of weights alone.

        Args:
            weights: Of :attr:`modules`.
            moved: Squared distance of the trained weights to those that the run started from, if a term needs it.
        """
        return {row.name: row.compute(Step(weights=weights, moved=moved)) for row in self.terms if not row.of_rows}

    def _of_rows(self, step: Step, rows: int, counts: list[int] | None = None) -> dict[str, Tensor]:
        """Means over this process's rows, weighed so that the mean over the processes is that over all rows."""
        counts = self._row_counts(step.logits[0]) if counts is None else counts
        share = 1.0 if counts is None else rows * len(counts) / sum(counts)
        return {row.name: share * row.compute(step) for row in self.terms if row.of_rows}

    def _row_counts(self, local: Tensor) -> list[int] | None:
        """Rows of each process, where the last batch of an epoch may give them different numbers of rows."""
        uneven = self.args.world_size > 1 and not self.args.dataloader_drop_last
        return row_counts(len(local), local.device) if uneven else None

    def _targets(self, labels: Tensor | None, logits: Tensor, counts: list[int] | None) -> tuple[Tensor, Tensor | None]:
        """Targets and ignored columns of the pairs for the rows of this process."""
        columns, mode = local_columns(len(logits), logits.device, counts), self.args.same_class
        if mode == "negative":
            return columns, None
        if labels is None:
            raise ValueError(
                f"Expected `labels` in the batch for `same_class` '{mode}', got none. Let the data collator add them, "
                "or use 'negative'."
            )
        everyones = gather_rows(labels, with_grad=False, counts=counts)
        return same_class_targets(labels, everyones, columns, mode, shared=self._pairing.shared, dtype=logits.dtype)


def _both_ways(
    image: Tensor, text: Tensor, head: Head, counts: list[int] | None, *, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Compare this process's samples with the whole batch: two ``(b, B)`` matrices, rows image and text."""
    all_image, all_text = (gather_rows(part, with_grad=with_grad, counts=counts) for part in (image, text))
    return similarity_logits(image, all_text, *head), similarity_logits(text, all_image, *head)


def _one_way(image: Tensor, text: Tensor, head: Head, counts: list[int] | None, *, with_grad: bool) -> tuple[Tensor]:
    """Compare this process's images with all texts, ``(b, B)``: with a sigmoid each pair counts once."""
    return (similarity_logits(image, gather_rows(text, with_grad=with_grad, counts=counts), *head),)


PAIRINGS = {
    "softmax": Pairing(_both_ways, shared=True, clamped=True),
    "sigmoid": Pairing(_one_way, shared=False, clamped=False),
}
