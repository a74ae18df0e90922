"""The training log in the terminal, in place of the dicts that transformers prints; what is logged stays as it is."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .log_lines import WIDTH, Columns, Pace, end_line, evaluation_lines, other_line, training_cells

Names = Callable[[], Collection[str]]  # says which sets are evaluated


class _ForPeople(TrainerCallback):
    """Writes lines in place of dicts.

    Args:
        names: Says which sets are evaluated.
    """

    def __init__(self, names: Names = tuple) -> None:
        super().__init__()
        self._names, self._pace, self._columns = names, Pace(), Columns()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch the time."""
        super().on_train_begin(args, state, control, **kwargs)
        self._pace, self._columns = Pace(), Columns(terminal_width())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when a step ended."""
        super().on_step_end(args, state, control, **kwargs)
        self._pace.step(time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write an entry, and leave it as it is."""
        if state.is_world_process_zero and logs:
            self._columns.width = terminal_width()
            tqdm.write("\n".join(self._lines(args, state, logs)))
            sys.stdout.flush()  # a file that is watched
            self._pace.pause(time.monotonic())

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when an evaluation ended."""
        super().on_evaluate(args, state, control, **kwargs)
        self._pace.pause(time.monotonic())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when a checkpoint was saved."""
        self._pace.pause(time.monotonic())

    def _lines(self, args: Any, state: Any, logs: Mapping[str, Any]) -> list[str]:
        """Return the lines of an entry."""
        if "loss" in logs:
            left = self._pace.left(state.max_steps - state.global_step)
            return self._columns.lines(training_cells(logs, state.global_step, state.max_steps, left))
        self._columns.interrupted()
        if "train_runtime" in logs:
            return [end_line(logs)]
        prefix = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), None)
        if prefix is None:
            return [other_line(logs)]
        epoch = f", epoch {logs['epoch']:.2f}" if logs.get("epoch") else ""
        where = f" after step {state.global_step:,}{epoch}" if state.global_step else ""
        names = self._names()
        return evaluation_lines(logs, prefix, names, also=_metric_of(args.metric_for_best_model, names), where=where)


class PrinterForPeople(_ForPeople, PrinterCallback):
    """Writes lines where there are no bars."""


class ProgressForPeople(_ForPeople, ProgressCallback):
    """Keeps the bars, and writes lines above them."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write an entry above the bar; outside of a training there is none, and nothing is written."""
        if self.training_bar is not None:
            super().on_log(args, state, control, logs, **kwargs)


def speak_to_people(handler: Any, names: Names) -> None:
    """Put ours in the place of the callback that ``Trainer`` has just added; those of notebooks and users stay.

    Args:
        handler: Of the callbacks of a trainer that was just made: Trainer's own is the last of them.
        names: Says which sets are evaluated.
    """
    kinds = {PrinterCallback: PrinterForPeople, ProgressCallback: ProgressForPeople}
    ours: Any = kinds.get(type(handler.callbacks[-1]))
    if ours is not None:
        handler.callbacks[-1] = ours(names)


def terminal_width() -> int:
    """Characters of a line of the terminal that is written to; 100 if it is none."""
    return shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH


def _metric_of(name: str | None, sets: Collection[str]) -> str | None:
    """The metric in the name of one of a set, as ``mine`` in ``eval_validation_mine``; ``None``: of no set."""
    bare = str(name).removeprefix("eval_")
    found = [bare.removeprefix(f"{data}_") for data in (*sets, "id") if bare.startswith(f"{data}_")]
    return min(found, key=len) if name is not None and found else None
