"""What the teacher says of a batch: its embeddings of images and captions.

The teacher moves seldom. Where a suite has fewer captions than there will be until it does, all are embedded at once
and kept; else those of the batch, each distinct one once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..data.captions import CAPTION_NUMBER, CaptionTable, caption_embeddings
from ..models.backbones import embedding_size, image_inputs, pair_inputs
from .embeds import Embeds, embeds_of, unit

_MOST_BYTES = 2**28  # of kept embeddings


class Taught:
    """The teacher's embeddings of batches.

    Args:
        network: The teacher's network.
        captions: The suite's captions.
        args: :class:`~carot_hf.CaRotTrainingArguments`; read at each call.
        autocast: Makes the context in which the network runs.
        moves: Whether the network follows the student at all.
    """

    def __init__(
        self,
        network: Any,
        captions: CaptionTable,
        args: Any,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        moves: bool = True,
    ) -> None:
        self._network, self._captions, self._args, self._autocast = network, captions, args, autocast
        self._moves = moves
        self._kept: tuple[int, Tensor] | None = None  # state of the text tower, and its embeddings of all captions

    def __call__(self, inputs: Mapping[str, Any]) -> Embeds:
        """Return image and text embeddings of a batch, ``(b, D)`` each, at least float32, of length 1.

        Of a micro-batch of :func:`~carot_hf.data.shared_captions.share_captions` the texts are its own captions.
        """
        numbers = inputs.get(CAPTION_NUMBER)
        with torch.inference_mode(), self._autocast():
            if numbers is None or not self._keeps():
                image, text = embeds_of(self._network(**pair_inputs(inputs)), inputs)
            else:
                image = unit(self._network.get_image_features(**image_inputs(inputs)).pooler_output)
                numbers = torch.as_tensor(numbers).to(image.device, non_blocking=True)
                text = self._texts().index_select(0, numbers)
        return image.clone(), text.clone()  # a loss with a gradient cannot use tensors of the inference mode

    def _texts(self) -> Tensor:
        """Embeddings of all captions, ``(K M, D)``."""
        state = _state_of(self._network)
        if self._kept is None or self._kept[0] != state:
            self._kept = None  # before the new ones: only one of them takes memory
            self._kept = state, caption_embeddings(self._network, self._captions)
        return self._kept[1]

    def _keeps(self) -> bool:
        """Whether to embed all captions once costs less than those of each step until the teacher moves."""
        args, count = self._args, self._captions.lengths.numel()
        if getattr(self._network, "_compiled_call_impl", None) is not None:
            return False  # of a compiled network only the call as a whole is compiled
        moves = args.moves_every if self._moves else 0
        steps = min(moves or math.inf, args.max_steps if args.max_steps > 0 else math.inf)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        distinct = count * -math.expm1(-rows / count)  # of so many draws, on average
        return 2 * count <= steps * distinct and 4 * count * embedding_size(self._network) <= _MOST_BYTES


def _state_of(network: Any) -> int:
    """A number that changes with any weight of the text side: torch counts what is written to a tensor."""
    return sum(value._version for name, value in network.named_parameters() if "text_" in name)
