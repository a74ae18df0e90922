"""Which checkpoint a run can be resumed from: one whose manifest, written last, agrees with its files."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ..basics.escape import guarded
from ..basics.manifest import damage_of

logger = guarded(logging.getLogger(__name__))

Flaw = Callable[[Path], str | None]


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Return the folders ``checkpoint-<step>`` in a run's folder, by step, complete or not."""
    found = [(step_of(path), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def step_of(checkpoint: str | Path) -> int | None:
    """Return the step that the name of a checkpoint's folder says, ``None`` if it says none."""
    found = re.fullmatch(r"checkpoint-([0-9]{1,18})", Path(checkpoint).name)
    return None if found is None else int(found[1])


def is_complete(checkpoint: Path) -> bool:
    """Tell whether the saving of a checkpoint came to its end and its files have their sizes."""
    return damage_of(checkpoint, checksums=False) is None


def rotate_checkpoints(
    output_dir: str | Path, limit: int | None, *, written: str | Path, best: str | Path | None = None
) -> None:
    """Delete complete checkpoints of the lowest steps until no more than a limit are left.

    Steps are what a run knows; the times of files are of whoever copied them. What is not complete neither counts nor
    goes.

    Args:
        output_dir: The run's folder.
        limit: How many to keep; ``None`` or 0: all.
        written: The checkpoint just written, which stays.
        best: The best one, which stays, too.
    """
    if not limit or limit < 0:
        return
    kept = {Path(folder).resolve() for folder in (written, best) if folder is not None and Path(folder).is_dir()}
    others = [
        folder for folder in checkpoint_folders(output_dir) if folder.resolve() not in kept and is_complete(folder)
    ]
    for folder in others[: max(0, len(others) - max(0, limit - len(kept)))]:
        logger.info("Deleting %s: %d checkpoints are kept.", folder, limit)
        shutil.rmtree(folder)


def check_checkpoint(checkpoint: str | Path, flaw: Flaw = lambda _: None) -> None:
    """Raise a ValueError if a checkpoint is incomplete or damaged.

    Args:
        checkpoint: Its folder.
        flaw: Says what else may be wrong with a complete one, ``None`` if nothing is.
    """
    damage = damage_of(checkpoint) or flaw(Path(checkpoint))
    if damage is not None:
        raise ValueError(
            f"Expected a complete checkpoint in {checkpoint}, but {damage}. Resume from another one, or with "
            "`--resume_from_checkpoint` alone from the newest that is complete; or start a new run from these weights: "
            "load the model from that folder and train without `resume_from_checkpoint`."
        )


def newest_complete_checkpoint(output_dir: str | Path, flaw: Flaw = lambda _: None) -> str:
    """Return the newest checkpoint that is complete and undamaged; log those that are passed over.

    Args:
        output_dir: The run's folder.
        flaw: As for `check_checkpoint`.
    Raises:
        ValueError: If there is none.
    """
    found = []
    for folder in reversed(checkpoint_folders(output_dir)):
        damage = damage_of(folder) or flaw(folder)
        if damage is None:
            return str(folder)
        logger.warning("Passing over %s: %s.", folder, damage)
        found.append(f"{folder.name}: {damage}")
    raise ValueError(
        f"Expected a complete checkpoint in {output_dir}, got none{f' ({found[0]})' if found else ''}. Start without "
        "`resume_from_checkpoint`, or name the folder of the run as `output_dir`."
    )
