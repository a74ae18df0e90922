"""What a run is about to do, as lines for people, and what of it is likely to be a mistake; what it has written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..basics.escape import printable_lines

FINISHED = (  # what an earlier run or its user would lose if another one wrote into the folder
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_model.safetensors"),
    *("metrics.json", "README.md", "sweep.json"),
)
_INDENT = 11


@dataclass(frozen=True)
class Balance:
    """An epoch with every class in it as often as every other.

    Attributes:
        classes: That have images.
        each: How often each of them comes in an epoch, in words.
        least: How often the images of the most frequent class come at least.
        most: How often those of the rarest one come at most.
        together: How often the same image comes in one batch at most.
        named: The rarest class.
    """

    classes: int
    each: str
    least: int
    most: int
    together: int
    named: str

    @classmethod
    def of(cls, counts: NDArray[np.int64], names: Sequence[str], size: int, pairs: int) -> Balance:
        """Count what an epoch holds.

        Args:
            counts: ``(K,)`` images of each class.
            names: Of the classes.
            size: Samples of an epoch.
            pairs: Of a batch.
        """
        there = counts[counts > 0]
        each, more = divmod(size, len(there))
        most = -(-(each + (more > 0)) // int(there.min()))
        rarest = names[int(np.flatnonzero(counts == there.min())[0])]
        together = -(-most // max(1, size // pairs))
        often = f"{each:,} or {each + 1:,}" if more else f"{each:,}"
        return cls(len(there), often, each // int(there.max()), most, together, repr(rarest))

    def __str__(self) -> str:
        times = f"{self.least:,} to {self.most:,} times" if self.least < self.most else f"{self.most:,} times"
        times = "once" if self.least == self.most == 1 else times
        return f"each of {self.classes:,} classes {self.each} times an epoch, an image of them {times}"


@dataclass(frozen=True)
class Plan:
    """A run before its first step.

    Attributes:
        model: What is trained, in words.
        method: Terms of the loss, in words.
        table: Images a class and set.
        steps: Optimizer steps in all.
        epochs: Passes over the training images.
        first_step: Steps that are done already.
        warmup: Steps of warm-up.
        teacher: How the teacher follows; ``None``: there is none.
        update_every: Steps between its updates; 0: it never moves.
        processes: Processes that train together.
        batch: Pairs of a process and micro-batch.
        accumulation: Micro-batches of a step.
        pairs: Pairs in the loss of a step; ``None``: the loss knows no pairs.
        shared: Expected share of pairs of a batch that share their class with another one; ``None``: not known.
        device: What it runs on.
        scaled: Published numbers of steps that became shares.
        writes: What will be written where, a line each.
        augment: How training images vary, in words; ``None``: as published.
        balance: How the classes are balanced; ``None``: they are not.
    """

    model: str
    method: str
    table: str
    steps: int
    epochs: float
    first_step: int
    warmup: int
    teacher: str | None
    update_every: int
    processes: int
    batch: int
    accumulation: int
    pairs: int | None
    shared: float | None
    device: str
    scaled: Mapping[str, int]
    writes: Sequence[str]
    augment: str | None = None
    balance: Balance | None = None

    @property
    def moves(self) -> int:
        """How often the teacher will have moved at the end of the run."""
        return self.steps // self.update_every if self.update_every else 0


def header(plan: Plan) -> str:
    """Lay a plan out."""
    batch = f"{plan.processes} process{'es' if plan.processes > 1 else ''} x {plan.batch}"
    if plan.accumulation > 1:
        batch += f" x {plan.accumulation} micro-batches"
    lines = {
        "model": plan.model,
        "method": plan.method,
        "images": plan.table,
        "steps": f"{plan.steps:,} in {plan.epochs:g} epochs, warm-up {plan.warmup:,}"
        + (f", from step {plan.first_step:,} on" if plan.first_step else ""),
        "teacher": "none" if plan.teacher is None else _teacher(plan),
        "batch": f"{batch}{'' if plan.pairs is None else f', {plan.pairs:,} pairs in the loss'}, on {plan.device}",
        "writes": "\n".join(plan.writes),
    }
    if plan.augment is not None:
        lines["augment"] = plan.augment
    if plan.balance is not None:
        lines["balanced"] = str(plan.balance)
    if plan.scaled:
        named = ", ".join(f"{name} {value:,}" for name, value in sorted(plan.scaled.items()))
        lines["scaled"] = f"{named}: this run's share of the papers' 500 of 25,030 steps; name them to have others"
    lines = {name: printable_lines(text) for name, text in lines.items()}
    return "\n".join(f"{name:<{_INDENT}}" + text.replace("\n", "\n" + " " * _INDENT) for name, text in lines.items())


def plan_warnings(plan: Plan) -> list[str]:
    """What of a plan is likely to be a mistake, one sentence each."""
    found = []
    if plan.teacher is not None and plan.update_every and not plan.moves:
        found.append(
            f"The teacher will never move: `teacher_update_every` is {plan.update_every:,}, the run has {plan.steps:,} "
            f"steps. Set it to {max(1, round(plan.steps / 50))}, or `teacher` 'frozen' if that is meant."
        )
    if plan.warmup >= plan.steps > 0:
        found.append(
            f"The learning rate never reaches its peak: `warmup_steps` is {plan.warmup:,}, the run has {plan.steps:,} "
            f"steps. Set it to {max(1, round(plan.steps / 50))}, or to a share such as 0.02."
        )
    if plan.shared is not None and plan.shared > 0.5:
        found.append(
            f"In a batch of {plan.pairs:,} pairs {100 * plan.shared:.0f} % share their class with another pair, which "
            "the loss takes for a negative. `same_class` 'ignore' (--same_class ignore) leaves such pairs out."
        )
    if plan.balance is not None and plan.balance.together > 1 and plan.shared is not None:
        found.append(
            f"Of {plan.balance.named} an image comes {plan.balance.together} times in one batch, of which the loss "
            "takes all but its own for negatives. `same_class` 'ignore' (--same_class ignore) leaves such pairs out."
        )
    return found


def shared_class_share(counts: NDArray[np.int64], pairs: int) -> float:
    r"""Expected share of the pairs of a batch whose class another pair of the batch has, too.

    .. math:: \sum_c \frac{n_c}{N} \Big(1 - \binom{N - n_c}{B - 1} / \binom{N - 1}{B - 1}\Big)

    Args:
        counts: ``(K,)`` images of each class, :math:`n_c`.
        pairs: Pairs :math:`B` of a batch, drawn without replacement.
    """
    rows = int(counts.sum())
    others = min(pairs, rows) - 1
    share = 0.0
    for count in counts[counts > 0].tolist():
        share += count / rows * (1.0 - math.exp(_log_choose(rows - count, others) - _log_choose(rows - 1, others)))
    return share


def refuse_finished(folder: str | Path) -> None:
    """Raise a ValueError if a folder holds a finished model, its metrics or its card."""
    if found := [name for name in FINISHED if Path(folder, name).is_file()]:
        raise ValueError(
            f"Expected an `output_dir` without a finished model, got {folder} with {', '.join(found)}. Choose another "
            "folder, or add --overwrite_output_dir (overwrite_output_dir=True) to replace what is there."
        )


def model_line(model: Any) -> str:
    """Class and size of a model, and how much of it is trained."""
    parameters = list(model.parameters())
    total = sum(value.numel() for value in parameters)
    trained = sum(value.numel() for value in parameters if value.requires_grad)
    part = "" if trained == total else f", {trained / 1e6:,.2f} M of them trained"
    return f"{type(model).__name__}, {total / 1e6:,.2f} M parameters{part}"


def _teacher(plan: Plan) -> str:
    if not plan.update_every:
        return f"{plan.teacher}, never moves"
    return f"{plan.teacher}, moves {plan.moves:,} times, {every(plan.update_every)}"


def every(steps: float) -> str:
    """``every 4 steps``; of 1 ``every step``."""
    return "every step" if steps == 1 else f"every {steps:,g} steps"


def _log_choose(n: int, k: int) -> float:
    return -math.inf if k > n else math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
