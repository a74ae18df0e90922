"""The loss of one step: student and teacher on pairs, the terms, and what the log says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.captions import CaptionTable
from ..data.shared_captions import share_captions
from ..models.backbones import logit_head, pair_inputs
from ..objective.gradient_cache import CachedGradients, RandomState, cache_gradients, surrogate
from ..objective.objective import Objective
from ..objective.terms import MOVED
from ..teacher.start import Start
from .embeds import Embeds, embeds_of, rows_at
from .moved import squared_distance
from .start import StartViews
from .taught import Taught


class LossStep:
    """Computes the terms of the loss, of one batch or of all micro-batches of a contrastive batch.

    Args:
        objective: The terms that are on.
        teacher: Its network; ``None``: no term needs one.
        captions: The suite's captions.
        start: The model that the run started from; ``None``: no term needs it.
        unwrap: From the model that Trainer passes to the student.
        autocast: Makes the context in which networks run without gradient.
        prepare: Moves a batch to the device.
        device: Of the student.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Any,
        captions: CaptionTable,
        start: Start | None = None,
        *,
        unwrap: Callable[[Any], Any],
        autocast: Callable[[], AbstractContextManager[Any]],
        prepare: Callable[[Any], Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        self.objective, self.teacher = objective, teacher
        args = objective.args
        self._taught = None if teacher is None else Taught(teacher, captions, args, autocast)
        self._start: StartViews | None = None
        if start is not None and args.needs_start:
            recalled = self._taught  # of a teacher that never moves: it is the start model
            if recalled is None or start.network is not teacher:
                recalled = Taught(start.network, captions, args, autocast, moves=False)
            self._start = StartViews(start, objective, recalled, captions, autocast, args.order_seed)
        self._unwrap, self._autocast, self._prepare, self._device = unwrap, autocast, prepare, device
        self._captions = captions
        self._batches: list[Any] = []  # of one step with the gradient cache
        self._caption_of: Tensor | None = None  # of each sample of the step, among the captions of all micro-batches
        self._index, self._number = 0, 0  # of the micro-batch, and of the step
        self._cached: CachedGradients | None = None
        self._cached_terms: dict[str, Tensor] = {}
        self._random_states: list[RandomState] = []
        self._sums: dict[str, Tensor] = {}
        self._steps = 0.0

    def begin(self, batches: list[Any], number: int = 0, *, joined: bool = True) -> list[Any]:
        """Begin a step with its micro-batches.

        Args:
            batches: Of one step.
            number: Steps before it.
            joined: Whether they are one contrastive batch, whose loss is that of all of them. If there are two or more,
                their gradients are cached.
        Returns:
            The micro-batches to train on: of one contrastive batch each distinct caption is in one of them.
        """
        self._number, self._index, self._cached = number, 0, None
        self._batches, self._caption_of = [], None
        if joined and len(batches) > 1:
            self._batches, self._caption_of = share_captions(batches, self._captions)
        return self._batches or batches

    @property
    def caches(self) -> bool:
        """Whether the loss of this step is one of several micro-batches."""
        return bool(self._batches)

    def terms(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """Compute the terms of one batch by name, unweighted, and the model's output."""
        if self.objective.args.objective == "cross_entropy":
            return self._class_terms(model, inputs)
        student = self._unwrap(model)
        pairs = pair_inputs(inputs)
        outputs = model(**pairs)
        embeds = embeds_of(outputs, inputs)
        start = None if self._start is None else self._start.pairs(inputs, self._number)
        terms = self._pair_terms(embeds, logit_head(student), inputs.get("labels"), self.taught(inputs), start)
        if self._start is not None and model.training:
            self._start.follow(embeds, start)
        return {**terms, **self._weight_terms(student)}, outputs

    def cached_loss(self, model: nn.Module, inputs: Mapping[str, Any], share: float) -> tuple[Tensor, Any]:
        """A micro-batch's part of the loss of the whole contrastive batch: :mod:`carot_hf.objective.gradient_cache`.

        Its value is that of the whole batch, in each micro-batch: Trainer takes the mean over them.
        """
        student, count = self._unwrap(model), len(self._batches)
        if self._cached is None:
            self._cached, self._cached_terms = self._embed_batches(model, logit_head(student))
        index = self._index
        self._index += 1
        self._random_states[index].restore()
        outputs = model(**pair_inputs(inputs))
        terms = {**self._cached_terms, **self._weight_terms(student)}
        self.remember(terms, share)
        part = surrogate(self._cached, index, *embeds_of(outputs, inputs), logit_head(student))
        penalties = {name: terms[name] for name in terms.keys() - self._cached_terms.keys()}
        if penalties:
            part = part + self.objective.weighted(penalties) / count
        value = self.objective.weighted({name: term.detach() for name, term in terms.items()})
        return value + count * (part - part.detach()), outputs

    def taught(self, inputs: Mapping[str, Any]) -> Embeds | None:
        """The teacher's embeddings of a batch, if there is one."""
        return None if self._taught is None else self._taught(inputs)

    def remember(self, terms: Mapping[str, Tensor], share: float) -> None:
        """Add terms to the sums for the log, which weigh a micro-batch by its share of a step."""
        for name, term in terms.items():
            self._sums[name] = share * term.detach() + self._sums.get(name, 0.0)
        self._steps += share

    def forget(self) -> None:
        """Begin the sums anew."""
        self._sums, self._steps = {}, 0.0

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the mean of each term since the last call, over steps and processes; empty: there was no step.

        Args:
            reduce: Takes the mean of a vector over the processes.
        """
        names, sums, steps = list(self._sums), list(self._sums.values()), self._steps
        self.forget()
        if not steps or not sums:
            return {}
        means = reduce(torch.stack(sums) / steps).tolist()  # a device is asked once
        return dict(zip(names, means, strict=True))

    def _class_terms(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """The terms of a linear head, and of image embeddings where one needs them."""
        start = None if self._start is None else self._start.images(inputs, self._number)
        wanted = {} if start is None else {"output_image_embeds": True}
        outputs = model(pixel_values=inputs["pixel_values"], **wanted)
        image = None if start is None else outputs.image_embeds
        return self.objective.class_terms(outputs.logits, inputs["labels"], image, start), outputs

    def _pair_terms(
        self, embeds: Embeds, head: Sequence[Tensor], labels: Any, taught: Any, start: Any
    ) -> dict[str, Tensor]:
        """The terms that are functions of embeddings of this device's rows, the student's and others', and labels."""
        teacher_head = () if self.teacher is None else logit_head(self.teacher)
        return self.objective.pair_terms(embeds, head, labels, taught, teacher_head, start)

    def _weight_terms(self, student: Any) -> dict[str, Tensor]:
        """The terms that are functions of weights alone."""
        weights = {name: getattr(student, name).weight for name in self.objective.modules}
        moved = None
        if self._start is not None and self.objective.needs(MOVED):
            moved = squared_distance(student, self._start.start.network)
        return self.objective.weight_terms(weights, moved)

    def _embed_batches(self, model: nn.Module, head: Sequence[Tensor]) -> tuple[CachedGradients, dict[str, Tensor]]:
        """The first pass over all micro-batches of a step: gradients of their embeddings, and the terms."""
        embeds, taught, labels, starts = [], [], [], []
        self._random_states = []
        for batch in self._batches:
            inputs = self._prepare(batch)
            self._random_states.append(RandomState(self._device))
            with torch.no_grad(), self._autocast():
                embeds.append(embeds_of(model(**pair_inputs(inputs)), inputs))
            said_by_teacher = self.taught(inputs)
            taught += [] if said_by_teacher is None else [said_by_teacher]
            said = None if self._start is None else self._start.pairs(inputs, self._number)
            starts += [] if said is None else [said]
            labels += [inputs["labels"]] if "labels" in inputs else []
        whole = torch.cat(labels) if labels else None
        joined = self._of_samples(taught) if taught else None
        start = replace(starts[0], embeds=self._of_samples([said.embeds for said in starts])) if starts else None
        terms: dict[str, Tensor] = {}

        def loss_of(images: Tensor, texts: Tensor, *head: Tensor) -> Tensor:
            terms.update(self._pair_terms(self._of_samples([(images, texts)]), head, whole, joined, start))
            return self.objective.weighted(terms)

        cached = cache_gradients(embeds, head, loss_of)
        if self._start is not None:
            self._start.follow(self._of_samples(embeds), start)
        return cached, {name: term.detach() for name, term in terms.items()}

    def _of_samples(self, parts: Sequence[tuple[Tensor, ...]]) -> Any:
        """Embeddings of all samples of a step, of images and perhaps of captions, from those of its micro-batches."""
        image, *texts = (torch.cat(rows) for rows in zip(*parts, strict=True))
        if self._caption_of is not None:
            texts = [rows_at(self._caption_of, rows) for rows in texts]
        return image, *texts
