"""What a final evaluation leaves besides numbers: reliability diagrams in the output folder and at the reporters."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..basics.escape import guarded
from ..basics.whole_file import whole_file
from ..ece.binning import CalibrationBins
from .plots import reliability_diagram, reliability_grid

logger = guarded(logging.getLogger(__name__))

PLAIN = "as trained"  # title of what is without a temperature
Tables = Mapping[str, Mapping[str, CalibrationBins]]  # by set, by title
Images = Mapping[str, NDArray[np.uint8]]  # by tag; (height, width, 3) each

# Reporters with `log({tag: Image(pixels)})`, as transformers calls their callbacks: the package of each.
_PACKAGES = {"WandbCallback": "wandb", "TrackioCallback": "trackio"}


def diagrams_path(output_dir: str, prefix: str) -> Path:
    """Where the diagrams of an evaluation are: beside ``<prefix>_results.json`` of ``Trainer.save_metrics``."""
    return Path(output_dir) / f"{prefix}_reliability.png"


def diagram_tables(
    bins: Mapping[str, CalibrationBins], bins_ts: Mapping[str, CalibrationBins], temperature: float | None
) -> Tables:
    """Give each table the title under which every picture of it is shown.

    Args:
        bins: Tables by set, without a temperature.
        bins_ts: Tables by set with it; the split it was fitted on has none.
        temperature: The temperature, fitted or in the weights already.
    """
    scaled = f"T = {temperature:.3f}" if temperature is not None else "with T"
    return {
        name: {PLAIN: table, **({scaled: bins_ts[name]} if name in bins_ts else {})} for name, table in bins.items()
    }


def write_diagrams(path: Path, tables: Tables) -> None:
    """Write one picture, a row for each set, a column for each title; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        reliability_grid(tables).savefig(beside, dpi=100)


def keep_diagrams(path: Path, tables: Tables) -> None:
    """Write the picture; one that cannot be written is no reason to lose what was computed."""
    try:
        write_diagrams(path, tables)
    except OSError as error:
        logger.warning("The reliability diagrams could not be written to %s: %s.", path, " ".join(str(error).split()))


def send_diagrams(callbacks: Iterable[Any], tables: Tables, *, prefix: str, step: int) -> None:
    """Give each table's diagram to the reporters that are on.

    As image ``<prefix>/<set>_reliability``, and with a temperature ``<prefix>/<set>_reliability_ts``. Reporters are the
    callbacks with an open ``tb_writer`` (TensorBoard), transformers' callbacks for W&B and trackio, and every other one
    with a method ``log_images(images, step)``, where ``images`` are ``(height, width, 3)`` uint8 arrays by tag.
    """
    senders = [sender for sender in map(_sender, callbacks) if sender is not None]
    if not senders or not tables:
        return
    images = {
        f"{prefix}/{name}_reliability{'' if title == PLAIN else '_ts'}": _pixels(
            reliability_diagram(table, title=f"{name}, {title}")
        )
        for name, titled in tables.items()
        for title, table in titled.items()
    }
    for sender in senders:
        sender(images, step)


def _sender(callback: Any) -> Callable[[Images, int], None] | None:
    """What takes images on behalf of a callback; ``None`` if it is no reporter of images."""
    if (own := getattr(callback, "log_images", None)) is not None:
        return own  # type: ignore[no-any-return]
    if (writer := getattr(callback, "tb_writer", None)) is not None:
        return partial(_to_tensorboard, writer)
    package = next((_PACKAGES[kind.__name__] for kind in type(callback).__mro__ if kind.__name__ in _PACKAGES), None)
    return None if package is None else partial(_to_package, import_module(package))


def _to_tensorboard(writer: Any, images: Images, step: int) -> None:
    for tag, pixels in images.items():
        writer.add_image(tag, pixels, step, dataformats="HWC")
    writer.flush()


def _to_package(package: Any, images: Images, step: int) -> None:
    """Into the run that the callback has open, on the axis that it uses."""
    shown = {tag: package.Image(pixels) for tag, pixels in images.items()}
    package.log({**shown, "train/global_step": step})


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
