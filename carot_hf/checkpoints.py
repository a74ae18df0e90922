"""Which checkpoint a run can be resumed from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Return the folders ``checkpoint-<step>`` in a run's folder, by step, complete or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def is_complete(checkpoint: Path) -> bool:
    """Tell whether the saving of a checkpoint came to its end: Trainer writes the file of its state last."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def newest_complete_checkpoint(output_dir: str | Path) -> str:
    """Return the newest checkpoint whose saving was not interrupted; log those that are passed over.

    Raises:
        ValueError: If there is none.
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        if is_complete(folder):
            return str(folder)
        logger.warning("Passing over %s: its saving was interrupted.", folder)
    raise ValueError(
        f"Expected a complete checkpoint in {output_dir}, got none. Start without `resume_from_checkpoint`, or name "
        "the folder of the run as `output_dir`."
    )
