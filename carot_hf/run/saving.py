"""A model in the folder of a run: whole or not at all, and nothing of an earlier one beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers.trainer import TRAINING_ARGS_NAME

from ..basics.whole_file import files_below, whole_files
from ..calibration.density_file import BANK_NAME, NUMBERS_NAME

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_model(folder: Path, save: Callable[[Path], None]) -> list[str]:
    """Let something be saved beside a folder and put it there; return its files.

    Args:
        folder: Of the run.
        save: Saves into the folder that it is given.
    """
    with whole_files(folder) as beside:
        save(beside)
        drop_pickle(beside)
        written = files_below(beside)
    _drop_stale_weights(folder, written)
    return written


def drop_pickle(folder: Path) -> None:
    """Delete a pickle that nothing reads, in which a `hub_token` would be published."""
    Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)


def _drop_stale_weights(folder: Path, written: Sequence[str]) -> None:
    """Delete weights of an earlier model that was kept in another number of files, and its calibrator."""
    if any(_WEIGHTS.fullmatch(name) for name in written):
        for path in folder.iterdir():
            stale = _WEIGHTS.fullmatch(path.name) or path.name in (NUMBERS_NAME, BANK_NAME)
            if stale and path.name not in written:
                path.unlink()
