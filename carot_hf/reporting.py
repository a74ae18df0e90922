"""What a final evaluation leaves besides numbers: reliability diagrams in the output folder and in TensorBoard."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ece.binning import CalibrationBins
from .plots import reliability_diagram, reliability_grid

logger = logging.getLogger(__name__)


def diagrams_path(output_dir: str, prefix: str) -> Path:
    """Where the diagrams of an evaluation are: beside ``<prefix>_results.json`` of ``Trainer.save_metrics``."""
    return Path(output_dir) / f"{prefix}_reliability.png"


def write_diagrams(
    path: Path,
    bins: Mapping[str, CalibrationBins],
    bins_ts: Mapping[str, CalibrationBins],
    temperature: float | None,
) -> None:
    """Write one picture: a row for each set, without and with temperature scaling.

    Args:
        path: A PNG file; its folder is made.
        bins: Tables by set.
        bins_ts: Tables by set with the fitted temperature; the split it was fitted on has none.
        temperature: The fitted temperature, for the title of its column.
    """
    scaled = f"T = {temperature:.3f}" if temperature is not None else "with T"
    tables = {
        name: {"as trained": table, **({scaled: bins_ts[name]} if name in bins_ts else {})}
        for name, table in bins.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    reliability_grid(tables).savefig(path, dpi=100)


def send_diagrams(
    callbacks: Iterable[Any], bins: Mapping[str, CalibrationBins], *, prefix: str, step: int, ending: str = ""
) -> None:
    """Give each set's diagram to TensorBoard, as image ``<prefix>/<set>_reliability``, if that reporter is on.

    Args:
        callbacks: Those of the trainer; that of TensorBoard is known by its open ``tb_writer``.
        bins: Tables by set.
        prefix: First part of the tag.
        step: Training steps done.
        ending: Last part of the tag.
    """
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is None:
            continue
        for name, table in bins.items():
            image = _pixels(reliability_diagram(table, title=name))
            writer.add_image(f"{prefix}/{name}_reliability{ending}", image, step, dataformats="HWC")
        writer.flush()


def can_draw() -> bool:
    """Whether matplotlib is installed; without it, say what is missing."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    logger.info("No reliability diagrams: matplotlib is missing. Install it with `pip install carot_hf[plot]`.")
    return False


def _pixels(figure: Any) -> NDArray[np.uint8]:
    """``(height, width, 3)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pixels
