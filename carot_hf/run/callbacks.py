"""When the logit scale is clamped, and what happens on SIGTERM. Callbacks know time; weights are elsewhere."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..basics.escape import guarded

logger = guarded(logging.getLogger(__name__))


class LogitScaleCallback(TrainerCallback):
    """Keep ``exp(logit_scale)`` at or below a maximum: before the first step and after every optimizer step.

    Args:
        maximum: Largest multiplier, > 0; CLIP's is 100.
    Source:
        Radford et al. 2021, section 2.5. CLIP's own training clamps; the published CaRot code does not.
    """

    def __init__(self, maximum: float = 100.0) -> None:
        if maximum <= 0:
            raise ValueError(f"Expected a maximum > 0 for exp(logit_scale), got {maximum}. CLIP's own is 100.")
        self.max_log = math.log(maximum)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clamp before the first forward pass: a baked temperature may have left the scale above the maximum."""
        self._clamp(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clamp before anything reads the new weights."""
        self._clamp(kwargs["model"])

    @torch.no_grad()
    def _clamp(self, model: Any) -> None:
        model.logit_scale.clamp_(max=self.max_log)


class TerminationCallback(TrainerCallback):
    """On SIGTERM, e.g. of a scheduler: finish the step, save a checkpoint, end the training.

    With several processes all of them stop at the same step, whichever was asked: the next one, since what they tell
    each other at the end of a step is read at the end of the next, when it has long arrived.

    Attributes:
        stopped: Whether the training ended for that reason.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._told: tuple[Tensor, Any] | None = None  # at the end of the step before, on its way to this process's CPU

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signal inside; outside of the main thread, where Python cannot, do nothing."""
        self.stopped = self._asked = False
        self._told = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if the signal has come."""
        if self._asked if args.world_size == 1 else self._one_was_asked(args.device):
            self.stopped = control.should_save = control.should_training_stop = True

    def _one_was_asked(self, device: torch.device) -> bool:
        """Whether any process had been asked by the end of the step before; the device is not waited for."""
        before = self._told
        asked = torch.full((), int(self._asked), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        here, arrived = torch.empty((), dtype=asked.dtype, pin_memory=device.type == "cuda"), None
        here.copy_(asked, non_blocking=True)
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        self._told = here, arrived
        if before is None:
            return False
        if before[1] is not None:
            before[1].synchronize()  # of a step ago: done, since the loss of this step has been looked at
        return bool(before[0])

    def _note(self, *_: Any) -> None:
        logger.warning("SIGTERM: the step is finished and saved, then the training ends.")
        self._asked = True
