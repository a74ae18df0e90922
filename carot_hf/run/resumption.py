"""Resumption: the checkpoint that a run goes on from, what is another since, and where its epochs lie."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics.escape import guarded
from ..training_args import CaRotTrainingArguments
from .checkpoint import check_checkpoint, newest_complete_checkpoint
from .resume import (
    Change,
    Epochs,
    SavedRun,
    apply_hyperparameters,
    check_resumed,
    continued,
    read_run,
)

logger = guarded(logging.getLogger(__name__))


class Resumption:
    """What one training knows of the run that it goes on with.

    Attributes:
        saved: What the checkpoint says; ``None``: this is a fresh run.
        epochs: Where the epochs lie among the steps; ``None``: that is not known.
        changes: What is another since, for the checkpoints and the card.
    """

    def __init__(self) -> None:
        self.saved: SavedRun | None = None
        self.epochs: Epochs | None = None
        self.changes: list[Change] = []

    def find(self, asked: str | bool, output_dir: str, flaw: Callable[[Path], str | None]) -> str:
        """Return the checkpoint to go on from, looked through.

        Args:
            asked: A folder, or ``True`` or "latest": the newest that is sound.
            output_dir: Of the run.
            flaw: Says what is wrong with a complete one.
        Raises:
            ValueError: If there is none that is sound.
        """
        if asked is True or asked == "latest":
            return newest_complete_checkpoint(output_dir, flaw)
        check_checkpoint(str(asked), flaw)
        return str(asked)

    def compare(
        self,
        checkpoint: str,
        args: CaRotTrainingArguments,
        facts: Callable[[], Mapping[str, Any]],
        *,
        deepspeed: bool,
        first: bool,
    ) -> bool:
        """Refuse a checkpoint of another run before anything is read; say what else has changed.

        Args:
            checkpoint: Its folder.
            args: Of this run; published numbers of steps that nobody named become the checkpoint's.
            facts: Says what this run is.
            deepspeed: It writes its own optimizer.
            first: This process speaks.
        Returns:
            Whether arguments were set.
        """
        saved = read_run(checkpoint)
        known = {} if saved.facts is None else {**saved.facts["options"], **saved.facts["method"]}
        taken = bool(args.take_constants(known)) if known else False
        changes = check_resumed(saved, facts(), ignore_data_skip=args.ignore_data_skip, deepspeed=deepspeed)
        self.saved, self.changes = saved, saved.changes
        if saved.facts is None and first:
            logger.warning(
                "%s is of version 0.1 and does not say what its run was: suite, method, batch and order are not "
                "compared. Only with those of the first call does the run end where it would have ended.",
                saved.folder,
            )
        self.say(changes, first=first)
        return taken

    def say(self, changes: Sequence[Change], *, first: bool) -> None:
        """Warn of each, and keep it."""
        self.changes += changes
        for change in changes if first else ():
            logger.warning("Resumed after step %d with %s", change.step, change)

    def lay(self, values: Sequence[Any], args: CaRotTrainingArguments) -> tuple[tuple[Any, ...], int, float]:
        """Lay epochs and steps of a resumed run from where its checkpoint lies.

        Args:
            values: Of ``Trainer.set_initial_training_values``: epochs, steps of one, ..., steps in all.
            args: Of this run.
        Returns:
            The values, the steps in all and the epochs that they are.
        """
        num_epochs, steps, *counts, max_steps = values
        self.epochs = None
        patience = args.early_stopping_patience
        if self.saved is not None and self.saved.waited >= patience > 0:
            logger.warning(
                "Nothing is left to train: %s comes after %d evaluations without progress, where early stopping ends a "
                "run. To go on raise `early_stopping_patience`, or set it to 0.",
                self.saved.folder,
                self.saved.waited,
            )
            return (0, steps, *counts, max_steps), max_steps, max_steps / steps
        if num_epochs == sys.maxsize:  # of a loader without a length
            return tuple(values), max_steps, 0.0
        self.epochs = Epochs(steps) if self.saved is None else continued(self.saved, steps)
        if self.epochs.first_step:
            if args.max_steps > 0:
                num_epochs = self.epochs.last_epoch(max_steps)
            else:
                max_steps = self.epochs.last_step(args.num_train_epochs)
        if self.saved is not None and self.saved.step >= max_steps:
            place = self.saved.folder
            logger.warning("Nothing is left to train: %s is at step %d of %d.", place, self.saved.step, max_steps)
            # Workaround, transformers 5.17 to 5.23: Trainer takes a step before it looks whether one is left. Until: it
            # looks first.
            num_epochs = 0
        return (num_epochs, steps, *counts, max_steps), max_steps, max_steps / steps

    def position(self, step: int, args: CaRotTrainingArguments) -> tuple[int, int] | None:
        """Return finished epochs and batches of the next one, where epochs lie otherwise than Trainer thinks."""
        if self.saved is None or self.epochs is None or not self.epochs.first_step:
            return None
        epochs, steps = self.epochs.position(step)
        return epochs, 0 if args.ignore_data_skip else steps * args.gradient_accumulation_steps

    def keep_hyperparameters(self, optimizer: Any, scheduler: Any, wanted: Any, *, first: bool) -> None:
        """Set the hyperparameters that are asked for, in place of those that came with the optimizer's state."""
        if self.saved is not None:
            self.say(apply_hyperparameters(optimizer, scheduler, wanted, self.saved.step), first=first)
