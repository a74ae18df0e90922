"""What a run says before its first step, and at its end."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..basics.escape import guarded, printable
from ..data.augment import PUBLISHED, described
from ..data.balanced import balanced_counts
from ..data.loaders import whole_of
from ..data.suite import ShiftSuite
from ..data.survey import say_warnings, survey
from ..training_args import PUBLISHED_STEPS, CaRotTrainingArguments
from .checkpoint import checkpoint_folders, is_complete
from .header import Balance, Plan, every, header, model_line, plan_warnings, shared_class_share

logger = guarded(logging.getLogger(__name__))


def announce(
    args: CaRotTrainingArguments,
    suite: ShiftSuite,
    model: Any,
    *,
    method: str,
    steps: int,
    epochs: float,
    first_step: int,
    update_every: int | None,
    transform: str | None = None,
) -> None:
    """Write the header of a run and, of a fresh one, what is likely to be a mistake.

    Args:
        args: Of the run.
        suite: With the set that is trained on.
        model: Unwrapped.
        method: The terms of the loss, in words.
        steps: Optimizer steps in all.
        epochs: That they are.
        first_step: Steps that are done already.
        update_every: Steps between updates of the teacher; ``None``: there is none.
        transform: What varies the training images in place of ``augment``, in words; ``None``: nothing.
    """
    found = survey(suite)
    counts, balance = _balanced(args, suite, found.counts.get("train"))
    contrastive = args.objective == "contrastive"
    pairs = args.contrastive_batch_size or args.per_device_train_batch_size * args.world_size
    hidden = contrastive and args.same_class == "negative" and counts is not None and counts.sum() > 0
    unnamed = {name: int(getattr(args, name)) for name in args.unnamed()}
    plan = Plan(
        model=model_line(model),
        method=method,
        table=found.table(),
        steps=steps,
        epochs=epochs,
        first_step=first_step,
        warmup=int(args.get_warmup_steps(steps)),
        teacher=None if update_every is None else args.teacher,
        update_every=update_every or 0,
        processes=args.world_size,
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        pairs=pairs if contrastive else None,
        shared=shared_class_share(counts, pairs) if hidden and counts is not None else None,
        device=str(args.device),
        scaled={name: steps for name, steps in unnamed.items() if steps != PUBLISHED_STEPS},
        writes=will_write(args),
        augment=_augment(args, transform),
        balance=balance,
    )
    tqdm.write(f"{header(plan)}\n")
    if plan.first_step == 0:  # a run that goes on has said it
        for sentence in plan_warnings(plan):
            logger.warning("%s", sentence)
        say_warnings(suite)


def _balanced(
    args: CaRotTrainingArguments, suite: ShiftSuite, counts: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64] | None, Balance | None]:
    """How often each class comes in an epoch, and how that comes about; of classes as they are, ``None``."""
    if not args.class_balanced or counts is None:
        return counts, None
    at_once = args.per_device_train_batch_size * args.world_size
    size = int(counts.sum()) - int(counts.sum()) % whole_of(args, at_once)
    balance = Balance.of(counts, suite.class_names, size, args.contrastive_batch_size or at_once)
    return balanced_counts(counts, size), balance


def _augment(args: CaRotTrainingArguments, transform: str | None) -> str | None:
    """How training images vary, in words; ``None``: as published."""
    if transform is not None:
        return f"by a transform: {transform}"
    return None if args.augment == PUBLISHED else described(args.augment)


def will_write(args: CaRotTrainingArguments) -> list[str]:
    """Return what a run writes, and where, a line each."""
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    when = {
        "no": "no checkpoints",
        "steps": f"checkpoint-<step> {every(args.save_steps)}",
        "epoch": "checkpoint-<step> after each epoch",
        "best": "checkpoint-<step> when it is the best",
    }
    kept = f", the last {args.save_total_limit} are kept" if args.save_total_limit else ""
    reporters = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    logs = ", ".join(name for name in reporters if name and name != "none")
    lines = f"a line of the log {every(args.logging_steps)}" + (f", also to {logs}" if logs else "")
    return [f"{args.output_dir}: {when[str(strategy)]}{kept if strategy != 'no' else ''}", lines]


def announce_end(output_dir: str, steps: int) -> None:
    """Say which checkpoints there are at the end."""
    kept = [folder.name for folder in complete_checkpoints(output_dir)]
    where = f"{', '.join(kept)} in {output_dir}" if kept else "no checkpoint; `save_model` saves it"
    tqdm.write(f"{'finished':<11}{steps:,} steps; {printable(where)}\n")


def last_kept(output_dir: str) -> str:
    """Say, after something went wrong, which checkpoint is the last."""
    kept = complete_checkpoints(output_dir)
    return f"The last checkpoint is {kept[-1]}." if kept else "No checkpoint was kept yet."


def complete_checkpoints(output_dir: str) -> list[Any]:
    """Return the folders of the complete checkpoints of a run, by step."""
    return [folder for folder in checkpoint_folders(output_dir) if is_complete(folder)]
