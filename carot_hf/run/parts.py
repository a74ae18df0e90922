"""CheckpointParts: what a resume needs beside what Trainer saves, looked through before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..basics.tensor_files import tensors_flaw
from ..models.backbones import load_renamed, weights_flaw
from ..models.lora import ADAPTERS_NAME, BESIDE_NAME, adapter_tensors, beside_tensors, is_adapted, load_beside
from ..teacher.average import Teacher
from ..teacher.file import TEACHER_NAME, load_teacher_file, save_teacher_file, teacher_flaw
from ..teacher.start import START_NAME, Start
from .checkpoint_files import optimizer_flaw, run_flaw, state_flaw
from .resume import RUN_NAME


class CheckpointParts:
    """The parts of one run's checkpoints; knows what they are, not when they are written.

    Args:
        student: Unwrapped.
        teacher: ``None``: there is none.
        start: The model before the first step, of which name and checksum are kept; ``None``: no term needs it. A
            teacher that is this very network is not written.
        sharded: Weights may lie in several files.
    """

    def __init__(
        self, student: Any, teacher: Teacher | None, start: Start | None = None, *, sharded: bool = False
    ) -> None:
        self.student, self.teacher, self.start, self.sharded = student, teacher, start, sharded

    def flaw(self, checkpoint: Path, other_run: Callable[[], bool]) -> str | None:
        """Say what is wrong with a complete checkpoint, ``None`` if nothing is.

        Args:
            checkpoint: Its folder.
            other_run: Whether it is of another run, which is refused elsewhere: then only what can be told is.
        """
        if (flaw := state_flaw(checkpoint) or run_flaw(checkpoint / RUN_NAME)) is not None:
            return flaw
        if other_run():
            return None
        if is_adapted(self.student):
            parts = {ADAPTERS_NAME: adapter_tensors(self.student), BESIDE_NAME: beside_tensors(self.student)}
            flaws = [tensors_flaw(checkpoint / name, own) for name, own in parts.items()]
        else:
            sharded = self.sharded or (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file()
            flaws = [None if sharded else weights_flaw(self.student, checkpoint)]
        flaw = next((found for found in flaws if found is not None), None)
        if flaw is None and self.teacher is not None and self._holds_teacher(checkpoint):
            flaw = teacher_flaw(self.teacher, checkpoint / TEACHER_NAME)
        if flaw is None and self.start is not None and (self._moves or (checkpoint / START_NAME).is_file()):
            flaw = self.start.flaw(checkpoint / START_NAME)
        trained = sum(value.requires_grad for value in self.student.parameters())
        return flaw or optimizer_flaw(checkpoint, trained)

    def save(self, checkpoint: Path) -> None:
        """Write what is ours, before Trainer writes the rest."""
        checkpoint.mkdir(parents=True, exist_ok=True)
        if self.start is not None:
            self.start.save(checkpoint / START_NAME)
        if self.teacher is not None and self._moves:
            save_teacher_file(self.teacher, checkpoint / TEACHER_NAME)

    def load_weights(self, checkpoint: str | Path) -> bool:
        """Load weights whose names on disk are others than the student's; ``False``: they are not, Trainer may."""
        return load_renamed(self.student, str(checkpoint))

    def load(self, checkpoint: str | Path) -> None:
        """Restore the teacher, and what is trained beside adapters.

        Raises:
            ValueError: If there should be a teacher and is none.
        """
        if is_adapted(self.student):
            load_beside(self.student, str(checkpoint))
        if self.start is not None and (Path(checkpoint) / START_NAME).is_file():
            self.start.load(Path(checkpoint) / START_NAME)
        if self.teacher is None or not self._holds_teacher(Path(checkpoint)):
            return
        path = Path(checkpoint) / TEACHER_NAME
        if not path.is_file():
            raise ValueError(
                f"Expected the teacher's weights in {path}, got no such file. Resume from a checkpoint of a run with a "
                "teacher."
            )
        load_teacher_file(self.teacher, path)

    @property
    def _moves(self) -> bool:
        """Whether the teacher is another network than that of the start."""
        return self.start is None or self.teacher is None or self.start.network is not self.teacher.model

    def _holds_teacher(self, checkpoint: Path) -> bool:
        """Whether a checkpoint has to have the teacher by value, or has it: version 0.1 wrote one that never moves."""
        return self._moves or not (checkpoint / START_NAME).is_file()
