"""What the model that a run started from says of a batch, for the terms that hold the student to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..data.captions import CaptionTable, caption_embeddings
from ..models.backbones import image_inputs, logit_head
from ..objective.objective import Objective
from ..objective.start_losses import context_embeddings, difference_vectors, moved_mean
from ..objective.terms import CONTEXTS, MEAN, RANDOM_TEXTS, START, Started
from ..teacher.start import Start
from .embeds import Embeds, unit

RANDOM_STRINGS, RANDOM_LENGTH = 80, 8  # of Lipsum-FT's code: strings a step, tokens between the markers


class StartViews:
    """Asks the start model.

    Args:
        start: It.
        objective: The terms that are on; read at each call.
        taught: Its embeddings of a batch of pairs.
        captions: The suite's captions.
        autocast: Makes the context in which it runs.
        seed: Of the random strings.
    Raises:
        ValueError: If a term needs what the model or the suite does not have.
    """

    def __init__(
        self,
        start: Start,
        objective: Objective,
        taught: Callable[[Mapping[str, Any]], Embeds],
        captions: CaptionTable,
        autocast: Callable[[], AbstractContextManager[Any]],
        seed: int,
    ) -> None:
        self.start, self._objective, self._taught = start, objective, taught
        self._captions, self._autocast, self._seed = captions, autocast, seed
        self._contexts: Tensor | None = None
        if objective.needs(RANDOM_TEXTS):
            captions.check_random(RANDOM_LENGTH)
        if objective.needs(CONTEXTS) and captions.n_templates < 2:
            raise ValueError(
                f"Expected two templates or more for `context_distillation_weight`, got {captions.n_templates}. They "
                "are the contexts that are told apart: add some to the suite, or set the weight to 0."
            )

    def pairs(self, inputs: Mapping[str, Any], step: int) -> Started | None:
        """What is needed of a batch of pairs; ``None``: nothing."""
        if not self._objective.needs(START):
            return None
        embeds = self._taught(inputs) if self._objective.needs(MEAN) else (self._image(inputs),)
        return self._said(embeds, step)

    def images(self, inputs: Mapping[str, Any], step: int) -> Started | None:
        """What is needed of a batch of images; ``None``: nothing."""
        return self._said((self._image(inputs),), step) if self._objective.needs(START) else None

    def follow(self, embeds: Embeds, said: Started | None) -> None:
        """Move the mean of the moves by a batch, of all processes, that a step was made of."""
        if said is None or said.mean is None:
            return
        with torch.no_grad():
            image, text = difference_vectors(*embeds, *said.embeds)
            rows = self._objective.everyones(torch.stack([image, text], dim=1))  # (B, 2, D)
            self.start.mean = moved_mean(said.mean, rows.mean(dim=(0, 1)))

    def _said(self, embeds: tuple[Tensor, ...], step: int) -> Started:
        needs = self._objective.needs
        return Started(
            embeds,
            logit_head(self.start.network)[0].detach(),
            self._random_texts(step) if needs(RANDOM_TEXTS) else None,
            self._context_embeds() if needs(CONTEXTS) else None,
            self._mean(embeds[0]) if needs(MEAN) else None,
        )

    def _mean(self, like: Tensor) -> Tensor | None:
        """The mean of the moves, where the embeddings are: the model may have been moved since it was made."""
        mean = self.start.mean
        self.start.mean = None if mean is None else mean.to(like.device, like.dtype)
        return self.start.mean

    def _image(self, inputs: Mapping[str, Any]) -> Tensor:
        network: Any = self.start.network
        with torch.inference_mode(), self._autocast():
            found = unit(network.get_image_features(**image_inputs(inputs)).pooler_output)
        return found.clone()  # a loss with a gradient cannot use tensors of the inference mode

    def _random_texts(self, step: int) -> Tensor:
        """Embeddings of strings of random tokens, others each step, the same in all processes and after a resume."""
        network: Any = self.start.network
        tokens = self._captions.random(RANDOM_STRINGS, RANDOM_LENGTH, (self._seed, step))
        with torch.inference_mode(), self._autocast():
            device = network.logit_scale.device
            inputs = {name: value.to(device, non_blocking=True) for name, value in tokens.items()}
            found = unit(network.get_text_features(**inputs).pooler_output)
        return found.clone()

    def _context_embeds(self) -> Tensor:
        if self._contexts is None:
            with self._autocast():
                whole = caption_embeddings(self.start.network, self._captions)
            self._contexts = context_embeddings(whole.view(*self._captions.lengths.shape, -1))
        return self._contexts
