"""When the teacher moves, and when the logit scale is clamped. Callbacks know time; weights are elsewhere."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .teacher import Teacher, ema_momentum

logger = logging.getLogger(__name__)

Schedule = Callable[[int, int], float]


class TeacherCallback(TrainerCallback):
    """Move a :class:`~carot_hf.Teacher` towards the student every ``update_every`` optimizer steps.

    The update comes after the optimizer step and before logging, evaluation and saving of the same step. At the start
    of a fresh run the teacher is set to the student; a resumed run (``global_step`` > 0) keeps the teacher as it is.

    Args:
        teacher: The teacher to move.
        schedule: ``schedule(step, total_steps)`` gives the momentum; ``step`` counts finished optimizer steps.
        update_every: Optimizer steps between updates; 0 freezes the teacher.
    Attributes:
        momentum: Momentum of the latest update, ``None`` before the first one.
    Raises:
        ValueError: If ``update_every`` is negative.
    Source:
        CaRot, section 2.3 and Table 2: every 500 of about 25,030 steps.
    """

    def __init__(self, teacher: Teacher, schedule: Schedule = ema_momentum, update_every: int = 500) -> None:
        if update_every < 0:
            raise ValueError(f"Expected `update_every` >= 0, got {update_every}. 0 freezes the teacher.")
        self.teacher, self.schedule, self.update_every = teacher, schedule, update_every
        self.momentum: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the teacher to the student, unless the run is resumed."""
        model = kwargs["model"]
        self.teacher.to(next(model.parameters()).device)
        self.momentum = None
        if state.global_step == 0:
            self.teacher.reset(model)
        elif self.update_every and state.global_step >= self.update_every:
            latest = state.global_step - state.global_step % self.update_every
            self.momentum = self.schedule(latest, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the teacher when the step is due."""
        if self.update_every and state.global_step % self.update_every == 0:
            self.momentum = self.schedule(state.global_step, state.max_steps)
            self.teacher.update(kwargs["model"], self.momentum)


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

    With several processes all of them stop at the same step, whichever was asked.

    Attributes:
        stopped: Whether the training ended for that reason.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signal inside; outside of the main thread, where Python cannot, do nothing."""
        self.stopped = self._asked = False
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
        if args.world_size > 1:
            asked = torch.tensor(int(self._asked), device=args.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self._asked = bool(asked)
        if self._asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def _note(self, *_: Any) -> None:
        logger.warning("SIGTERM: the step is finished and saved, then the training ends.")
        self._asked = True
