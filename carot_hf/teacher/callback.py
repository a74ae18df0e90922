"""When the teacher moves. A callback knows time; weights are elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..basics.escape import guarded
from ..basics.sharding import sharding
from .average import Teacher, ema_momentum
from .file import TEACHER_NAME, load_teacher_file, save_teacher_file

logger = guarded(logging.getLogger(__name__))

Schedule = Callable[[int, int], float]


class TeacherCallback(TrainerCallback):
    """Move a :class:`~carot_hf.Teacher` towards the student every ``update_every`` optimizer steps; save and resume it.

    For any ``transformers.Trainer``. The update comes after the optimizer step and before logging, evaluation and
    saving of the same step. At the start of a fresh run the teacher is set to the student. Each checkpoint gets the
    teacher's file; a run that is resumed goes on with the average of exactly that checkpoint, and
    ``load_best_model_at_end`` brings back the teacher of the best one.

    Args:
        teacher: The teacher to move.
        schedule: ``schedule(step, total_steps)`` gives the momentum; ``step`` counts finished optimizer steps.
        update_every: Optimizer steps between updates; 0 freezes the teacher.
        save_as: Name of the teacher's file in a checkpoint; two teachers of one run need two names. ``None``: neither
            save nor load; a resumed run keeps the teacher as it is. So does ``CaRotTrainer``, which does both itself.
        resume_from: The checkpoint folder that the run is resumed from, where it is not
            ``<output_dir>/checkpoint-<step>``: callbacks are not told.
    Attributes:
        momentum: Momentum of the latest update, ``None`` before the first one.
    Raises:
        ValueError: If ``update_every`` is negative; at the start of the training, if the resumed checkpoint has no file
            or one that was saved with other weights of the student, or where there can be no teacher (FSDP, ZeRO-3) or
            no file of it (checkpoints in a hyperparameter search).
    Source:
        CaRot, section 2.3 and Table 2: every 500 of about 25,030 steps.
    """

    def __init__(
        self,
        teacher: Teacher,
        schedule: Schedule = ema_momentum,
        update_every: int = 500,
        *,
        save_as: str | None = TEACHER_NAME,
        resume_from: str | Path | None = None,
    ) -> None:
        if update_every < 0:
            raise ValueError(f"Expected `update_every` >= 0, got {update_every}. 0 freezes the teacher.")
        self.teacher, self.schedule, self.update_every = teacher, schedule, update_every
        self.save_as, self.resume_from = save_as, resume_from
        self.momentum: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the teacher to the student; if the run is resumed, to the average of its checkpoint."""
        model = kwargs["model"]
        if (kind := sharding(args)) is not None:
            raise ValueError(
                f"Expected the whole model on every device for the teacher to follow by name, got {kind}, which splits "
                "it. Use DDP, or ZeRO up to stage 2."
            )
        if self.save_as is not None and state.is_hyper_param_search and args.save_strategy != SaveStrategy.NO:
            raise ValueError(
                "Expected a hyperparameter search without checkpoints, got `save_strategy` "
                f"'{SaveStrategy(args.save_strategy).value}': callbacks are not told the folder of a trial. Search "
                "with `save_strategy='no'`, then train with the best setting."
            )
        self.teacher.to(next(model.parameters()).device)
        self.momentum = None
        if state.global_step == 0:
            if self.resume_from is not None:
                raise ValueError(
                    f"Expected a resumed run for `resume_from` {self.resume_from}, got one that starts at step 0. "
                    "Give the same folder to `Trainer.train(resume_from_checkpoint=...)`."
                )
            self.teacher.reset(model)
            return
        if self.save_as is not None:
            self._load(Path(self.resume_from or _checkpoint(args, state)), model)
        if self.update_every and state.global_step >= self.update_every:
            latest = state.global_step - state.global_step % self.update_every
            self.momentum = self.schedule(latest, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the teacher when the step is due."""
        if self.update_every and state.global_step % self.update_every == 0:
            self.momentum = self.schedule(state.global_step, state.max_steps)
            self.teacher.update(kwargs["model"], self.momentum)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the teacher into the checkpoint that Trainer has just written."""
        if self.save_as is None:
            return
        if args.should_save:
            save_teacher_file(self.teacher, _checkpoint(args, state) / self.save_as, kwargs["model"])
        if args.world_size > 1:
            dist.barrier()  # whoever goes on may want to read it

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow Trainer to the best checkpoint, if it has gone back there."""
        if self.save_as is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint), kwargs["model"])

    def _load(self, checkpoint: Path, student: Any) -> None:
        path = checkpoint / str(self.save_as)
        if not path.is_file():
            raise ValueError(
                f"Expected the teacher's weights in {path}, got no such file. Resume from a checkpoint that has it; if "
                "it lies elsewhere, give its folder as `TeacherCallback(..., resume_from=...)`, too."
            )
        load_teacher_file(self.teacher, path, student)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where Trainer writes the checkpoint of a step, outside a hyperparameter search."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
