"""What follows or recalls the student in a training: the teacher, when it moves, and the model of the start."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..basics.precision import wide_dtype
from ..models.backbones import embedding_size
from ..models.lora import base_model, is_adapted
from ..models.prepare import Prepared
from ..objective.terms import MEAN, needed
from ..teacher.average import Teacher, beta_momentum, ema_momentum
from ..teacher.callback import Schedule, TeacherCallback
from ..teacher.start import Start
from ..training_args import CaRotTrainingArguments
from .header import every


@dataclass(frozen=True)
class Companions:
    """The networks beside the student.

    Attributes:
        teacher: ``None``: no term needs one.
        start: The model before the first step; ``None``: no term needs it. It is the teacher's network where that never
            moves: there is one copy.
        callbacks: What moves them.
    """

    teacher: Teacher | None = None
    start: Start | None = None
    callbacks: list[TeacherCallback] = field(default_factory=list)

    @property
    def moves(self) -> TeacherCallback | None:
        """The callback of the teacher."""
        return None if self.teacher is None else self.callbacks[0]


class CompanionMaker:
    """Makes the networks beside a student; those that there are, if they were made of the same parameters."""

    def __init__(self) -> None:
        self._teachers, self._starts = TeacherMaker(), TeacherMaker()

    def make(
        self,
        args: CaRotTrainingArguments,
        prepared: Prepared,
        model: Any,
        student: Any,
        compile_options: dict[str, Any] | None,
    ) -> Companions:
        """Return what the terms that are on need.

        Args:
            args: Of the training.
            prepared: The model before it.
            model: The student as Trainer has it.
            student: Unwrapped.
            compile_options: Of ``nn.Module.compile``; ``None``: nothing is compiled.
        """
        teacher, start, callbacks = None, None, []
        name = str(getattr(student.config, "_name_or_path", "") or "")
        size = embedding_size(base_model(student)) if needed(args, MEAN) else None
        if args.needs_teacher:
            teacher = self._teachers.make(model, student, compile_options)
            callbacks.append(TeacherCallback(teacher, schedule(args), args.moves_every, save_as=None))
            start = None if args.moves_every else Start(teacher.model, name, size)
        else:
            self._teachers = TeacherMaker()
        if args.needs_start and start is None:
            if prepared.clip is not None:  # a classifier's: it has texts, and is no twin of the student
                copy = self._starts.make(prepared.clip, prepared.clip, None).to(args.device)
            else:
                copy = self._starts.make(model, student, compile_options)
                callbacks.append(TeacherCallback(copy, update_every=0, save_as=None))
            start = Start(copy.model, name, size)
        elif not args.needs_start:
            self._starts = TeacherMaker()
        return Companions(teacher, start, callbacks)


class TeacherMaker:
    """Makes the teacher of a student; the one that there is, if it was made of the same parameters."""

    def __init__(self) -> None:
        self._made: tuple[Any, frozenset[str], Teacher] | None = None  # of a student, and what is its own alone

    def make(self, model: Any, student: Any, compile_options: dict[str, Any] | None) -> Teacher:
        """Return a teacher.

        Args:
            model: The student as Trainer has it.
            student: Unwrapped.
            compile_options: Of ``nn.Module.compile``; ``None``: it is not compiled.
        """
        frozen = [parameter for parameter in student.parameters() if not parameter.requires_grad]
        # a tower in half precision is copied: it does not fit into the teacher's forward pass, which is float32
        share = is_adapted(student) or all(wide_dtype(value.dtype) == value.dtype for value in frozen)
        names = frozenset(
            name
            for name, value in student.named_parameters(remove_duplicate=False)
            if share and not value.requires_grad and value.dim() > 0
        )
        if self._made is not None and self._made[0] is student and self._made[1] == names:
            return self._made[2]
        teacher = Teacher(model, share_frozen=share)
        if compile_options is not None:  # the student is compiled by accelerate, in the same way
            teacher.model.compile(**compile_options)
        self._made = student, names, teacher
        return teacher


def teacher_words(args: CaRotTrainingArguments) -> str | None:
    """How the teacher of a training follows the student, in words; ``None``: there is none."""
    if not args.needs_teacher:
        return None
    if args.teacher == "frozen" or not args.teacher_update_every:
        return "the model as it was before the first step; it never moves"
    when = every(args.teacher_update_every)
    if args.teacher == "beta":
        beta = f"{args.teacher_beta:g}"
        return f"mean of the weights at all of its moves, weighted by Beta({beta}, {beta}); moves {when}"
    start, end, ramp = args.teacher_momentum_start, args.teacher_momentum_end, args.teacher_momentum_ramp
    momentum = f"{end:g}"
    if start != end and ramp > 0:
        momentum = f"from {start:g} to {end:g} over the first {100 * ramp:g} % of the steps, then constant"
    return f"moving average of the weights; moves {when}; momentum (weight of the old teacher) {momentum}"


def schedule(options: CaRotTrainingArguments) -> Schedule:
    """Momentum of the teacher as a function of the step and the number of steps."""
    if options.teacher == "beta":
        return partial(beta_momentum, update_every=options.teacher_update_every, beta=options.teacher_beta)
    return partial(
        ema_momentum,
        start=options.teacher_momentum_start,
        end=options.teacher_momentum_end,
        ramp=options.teacher_momentum_ramp,
    )
