"""What processes that train together say to each other. Outside of torch.distributed each is alone."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_KEPT: list[Any] = []
_LAST_MOMENT = 0.5  # seconds


def keep_group() -> None:
    """Hold on to the default process group until the interpreter ends.

    When the last reference to a gloo group goes with DDP's reducer, torch 2.13 holds the interpreter's lock while it
    waits for the group's threads, and one of these may be waiting for that lock to let go of its last tensors: the
    process hangs after all is done. With this reference the group goes later, when its threads have nothing left. One
    that still asks for the lock while the interpreter ends aborts the process: so it is left to them for a moment.
    """
    # Workaround, torch 2.13, gloo. Until: the destructor of a process group lets go of the interpreter's lock.
    if several() and not any(group is dist.group.WORLD for group in _KEPT):
        if not _KEPT:
            atexit.register(time.sleep, _LAST_MOMENT)
        _KEPT.append(dist.group.WORLD)


def usable_cores() -> int:
    """Return how many cores this process may use: of a machine that is shared, perhaps not all."""
    # Python 3.13 has it as os.process_cpu_count; only Linux says which
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)


def said_by_all(value: Any) -> list[Any]:
    """Return what each process says, by rank."""
    if not several():
        return [value]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def said_by_first(value: Any) -> Any:
    """Return what the first process says to all of them."""
    if not several():
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def done_by_first(work: Callable[[], T]) -> T:
    """Let the first process do something that raises at most a ValueError; all get what it gives, or raise that."""
    done: tuple[Any, str | None] = (None, None)
    if place()[0] == 0:
        try:
            done = (work(), None)
        except ValueError as error:  # the others wait for an answer
            if not several():
                raise
            done = (None, str(error))
    result, refused = said_by_first(done)
    if refused is not None:
        raise ValueError(refused)
    found: T = result
    return found


def row_counts(rows: int, device: torch.device) -> list[int]:
    """Tell how many rows each process has, by rank."""
    if not several():
        return [rows]
    ones = [1] * dist.get_world_size()
    return list(map(int, stacked_rows(torch.tensor([rows], device=device), ones).tolist()))


def gather_uneven(local: Tensor) -> Tensor:
    """Stack the rows of all processes in the order of their ranks, however many each one has; without gradient.

    Args:
        local: ``(b, ...)``; ``b`` may differ between processes and be 0, the rest may not.
    """
    return stacked_rows(local, row_counts(len(local), local.device)) if several() else local


def stacked_rows(local: Tensor, counts: Sequence[int]) -> Tensor:
    """Collectives take equal shapes: shorter parts travel with zeros below, which are cut off here."""
    sent = padded_rows(local.detach(), max(counts))
    parts = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(parts, sent)
    return torch.cat([part[:rows] for part, rows in zip(parts, counts, strict=True)])


def padded_rows(part: Tensor, rows: int) -> Tensor:
    """Return the part, contiguous, with zeros below it up to a number of rows."""
    missing = rows - len(part)
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part.contiguous()


def lost_process(error: RuntimeError) -> str | None:
    """Say in a sentence or two which process an error tells the loss of, ``None`` if it is about something else.

    Knows what torch says of a data loader's worker, and gloo and NCCL of another rank, in torch 2.13.
    """
    text = str(error)
    if "DataLoader worker" in text:
        return (
            "Expected the workers of the data loader to live, but one ended, most often killed for want of memory. "
            "Lower `dataloader_num_workers`, then resume."
        )
    lost = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "remote process",
    )
    if isinstance(error, dist.DistError) or ("gloo" in text and any(part in text for part in lost)):
        return (
            "Expected all processes to answer, but one was lost or is late by more than `ddp_timeout` seconds. "
            "Look at the first error of the other processes, then resume."
        )
    return None
