"""TERMS: one row for each term of the loss. Weights, logs, refusals and the need of a teacher follow from the rows.

A term of one's own is a row more, from outside as well::

    TERMS["margin"] = Term("margin", "margin_weight", ("pairs",), lambda step: my_margin(*step.logits))

with a field ``margin_weight`` in a subclass of the training arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .losses import (
    contrastive_loss,
    cross_entropy_loss,
    cross_norm_penalty,
    distillation_loss,
    feature_distillation_loss,
    orthogonality_penalty,
)
from .sigmoid import sigmoid_distillation_loss, sigmoid_loss
from .start_losses import context_distillation_loss, difference_vector_loss, energy_gap_loss

IMAGES = "images"  # embeddings of images, with either objective
PAIRS = "pairs"  # embeddings of images and captions, their logits and targets
CLASSES = "classes"  # logits of a linear head, and labels
TEACHER = "teacher"  # the teacher's embeddings of the same pairs
TEACHER_LOGITS = "teacher_logits"  # and its logits
START = "start"  # what the model that the run started from says of the same batch
RANDOM_TEXTS, CONTEXTS = "random_texts", "contexts"  # embeddings by the start model's text tower
MEAN = "mean"  # the moving mean of the moves since the start
MOVED = "moved"  # how far the trained weights are from the start model's
VISUAL, TEXT = "visual_projection", "text_projection"  # weights of the model, by the name of the module
EITHER = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Started:
    """What the model that a run started from says of a batch. What no term needs is not there.

    Attributes:
        embeds: Of images ``(b, D)`` and, of pairs, captions ``(b, D)``, length 1, at least float32.
        scale: Its ``logit_scale``, 0-dimensional.
        random_texts: ``(M, D)``, length 1, of strings of random tokens.
        contexts: ``(M, D)``, length 1, of the templates.
        mean: ``(D,)``, the moving mean of the moves since.
    """

    embeds: tuple[Tensor, ...]
    scale: Tensor
    random_texts: Tensor | None = None
    contexts: Tensor | None = None
    mean: Tensor | None = None


@dataclass
class Step:
    """What the terms of a step are functions of. What no term needs is not there.

    Attributes:
        label_smoothing: epsilon, in [0, 1).
        embeds: Of images and, of pairs, captions of this process, ``(b, D)`` each, length 1, at least float32.
        logits: Of this process's rows against the whole batch, ``(b, B)``: images and captions as rows with a softmax,
            images with a sigmoid. Of a linear head ``(b, K)``.
        targets: Columns ``(b,)`` int64, or ``(b, B)`` float; of a linear head labels ``(b,)``.
        ignore: ``(b, B)`` bool, pairs that are left out; None: none.
        taught: Of the teacher, as ``embeds``.
        teacher_logits: Of the teacher, as ``logits``.
        weights: Weights of modules of the student, by name.
        start: Of the model that the run started from, a `Started`.
        moved: Squared distance of the trained weights to that model's, 0-dimensional.
    """

    label_smoothing: float = 0.0
    embeds: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()
    targets: Any = None
    ignore: Tensor | None = None
    taught: tuple[Tensor, ...] = ()
    teacher_logits: tuple[Tensor, ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    start: Any = None
    moved: Any = None


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    Attributes:
        name: Under which it is logged, unweighted.
        weight: Field of the training arguments that weighs it, off at 0; None: it is what the objective is, weight 1.
        needs: Of the names above.
        compute: From a step to the term, 0-dimensional. A mean over the rows of this process, unless it needs weights
            of modules alone.
        links: With which links from logits to probabilities it goes.
        source: The paper and equation.
    """

    name: str
    weight: str | None
    needs: tuple[str, ...]
    compute: Callable[[Step], Tensor]
    links: tuple[str, ...] = EITHER
    source: str = ""

    @property
    def of_rows(self) -> bool:
        """Whether it is a mean over rows."""
        return bool({PAIRS, CLASSES, IMAGES} & set(self.needs))

    @property
    def of_images(self) -> bool:
        """Whether it knows images alone, and goes with either objective."""
        return IMAGES in self.needs

    def weight_in(self, args: Any) -> float:
        """Its weight in training arguments."""
        return 1.0 if self.weight is None else float(getattr(args, self.weight))


def _contrastive(step: Step) -> Tensor:
    image, text = step.logits
    return contrastive_loss(image, text, step.targets, label_smoothing=step.label_smoothing, ignore=step.ignore)


def _sigmoid(step: Step) -> Tensor:
    (image,) = step.logits
    return sigmoid_loss(image, step.targets, label_smoothing=step.label_smoothing, ignore=step.ignore)


def _cross_entropy(step: Step) -> Tensor:
    return cross_entropy_loss(step.logits[0], step.targets, label_smoothing=step.label_smoothing)


def _energy_gap(step: Step) -> Tensor:
    return energy_gap_loss(step.embeds[0], step.start.embeds[0], step.start.random_texts, step.start.scale)


def _contexts(step: Step) -> Tensor:
    return context_distillation_loss(step.embeds[0], step.start.embeds[0], step.start.contexts, step.start.scale)


def _difference_vectors(step: Step) -> Tensor:
    (image, text), (start_image, start_text) = step.embeds, step.start.embeds
    return difference_vector_loss(image, text, start_image, start_text, step.start.mean)


_ROWS = (
    Term("cross_entropy", None, (CLASSES,), _cross_entropy, ("softmax",), "WiSE-FT (arXiv 2109.01903)"),
    Term("contrastive", None, (PAIRS,), _contrastive, ("softmax",), "CaRot 2023, Eq. 1; FLYP"),
    Term("sigmoid", None, (PAIRS,), _sigmoid, ("sigmoid",), "SigLIP (arXiv 2303.15343), section 3.2"),
    Term(
        "distillation",
        "distillation_weight",
        (PAIRS, TEACHER, TEACHER_LOGITS),
        lambda step: distillation_loss(*step.logits, *step.teacher_logits),
        ("softmax",),
        "CaRot 2023, Eq. 2",
    ),
    Term(
        "sigmoid_distillation",
        "distillation_weight",
        (PAIRS, TEACHER, TEACHER_LOGITS),
        lambda step: sigmoid_distillation_loss(*step.logits, *step.teacher_logits),
        ("sigmoid",),
        "CaRot 2023, Eq. 2, with SigLIP's likelihood",
    ),
    Term(
        "feature_distillation",
        "feature_distillation_weight",
        (PAIRS, TEACHER),
        lambda step: feature_distillation_loss(*step.embeds, *step.taught),
        source="TRACER (arXiv 2605.29380)",
    ),
    Term(
        "energy_gap",
        "energy_gap_weight",
        (IMAGES, START, RANDOM_TEXTS),
        _energy_gap,
        source="Lipsum-FT (arXiv 2404.00860)",
    ),
    Term(
        "context_distillation",
        "context_distillation_weight",
        (IMAGES, START, CONTEXTS),
        _contexts,
        source="CAR-FT (arXiv 2211.16175)",
    ),
    Term(
        "difference_vectors",
        "difference_vector_weight",
        (PAIRS, START, MEAN),
        _difference_vectors,
        source="DiVE (arXiv 2511.09973)",
    ),
    Term("l2_sp", "l2_sp_weight", (MOVED,), lambda step: step.moved, source="L2-SP (arXiv 1802.01483)"),
    Term(
        "orthogonality",
        "orthogonality_weight",
        (VISUAL,),
        lambda step: orthogonality_penalty(step.weights[VISUAL]),
        source="CaRot 2024",
    ),
    Term(
        "cross_norm",
        "cross_norm_weight",
        (VISUAL, TEXT),
        lambda step: cross_norm_penalty(step.weights[VISUAL], step.weights[TEXT]),
        source="CaRot 2024",
    ),
)
TERMS: dict[str, Term] = {row.name: row for row in _ROWS}


def weight_fields() -> list[str]:
    """Return the fields of training arguments that weigh a term."""
    return list(dict.fromkeys(row.weight for row in TERMS.values() if row.weight is not None))


def fields_with(*needs: str) -> list[str]:
    """Return the fields of training arguments that weigh a term with one of these needs."""
    rows = [row for row in TERMS.values() if row.weight is not None and set(needs) & set(row.needs)]
    return list(dict.fromkeys(str(row.weight) for row in rows))


def penalties() -> dict[str, list[str]]:
    """Return by field of the training arguments the modules of the student whose weights it penalises."""
    rows = {row.weight: [name for name in row.needs if name in (VISUAL, TEXT)] for row in TERMS.values()}
    return {str(name): modules for name, modules in rows.items() if modules}


def needed(args: Any, *needs: str) -> bool:
    """Tell whether a term that is on needs one of these, by the names above."""
    return any(getattr(args, name) > 0 for name in fields_with(*needs))
