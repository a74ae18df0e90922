"""Learning curves: what a training logged, by step, in panels that share their axis."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..basics.escape import guarded, printable
from ..basics.log_names import loss_terms
from ..basics.whole_file import whole_file
from ..calibration.names import HOME, SHIFTED, SPLIT, directions
from .plots import COLORS, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = guarded(logging.getLogger(__name__))

CURVES_NAME = "learning_curves.png"
_SOFTWARE = "carot_hf learning_curves"  # in the PNG: whose file it is
_TITLES = {SPLIT: "validation", HOME: "test set", SHIFTED: "mean of shifts"}
_LINES = ("-", "--", "-.", ":")
_MARKED = 15  # marks of a line; of more points every so-many-th is marked
_WIDE = 30.0  # largest over smallest value from which on a panel is logarithmic

Points = list[tuple[float, float]]  # (step, value), by step
Panel = dict[str, Points]  # by label


def learning_curves(log_history: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """Draw what a training logged: terms of the loss, accuracy and ECE where it was evaluated, rates.

    One panel each, by step: the loss and its unweighted terms (logarithmic where they differ much); accuracy and ECE of
    the validation set and, where they were measured, of the test set and in the mean of the shifts; learning rate;
    momentum of the teacher. A panel of which nothing was logged is left out. Lines differ in style and marks as well
    as in colour.

    Args:
        log_history: ``trainer.state.log_history``, or that of a ``trainer_state.json``.
        title: Shown above.

    Returns:
        A new figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If nothing of this was logged.
    """
    panels = curves_of(log_history)
    if not panels:
        raise ValueError(
            f"Expected a log with a loss or an evaluation of some step, got {len(log_history)} entries without one. "
            "Pass `trainer.state.log_history` of a training that logged: see `logging_steps`."
        )
    figure = new_figure((7.2, 1.9 * len(panels) + 0.6))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, panel) in zip(axes, panels.items(), strict=True):
        _draw(ax, name, panel)
    axes[-1].set_xlabel("step")
    if title is not None:
        figure.suptitle(_plain(title))
    return figure


def curves_of(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Panel]:
    """Return the points of each panel by its title, and of each line by its label; empty panels are left out."""
    losses = [entry for entry in log_history if "loss" in entry]
    terms = sorted({name for entry in losses for name in loss_terms(entry)})  # a file has them in another order
    panels = {"loss": _lines(losses, {"loss": "loss", **{name: name for name in terms}})}
    for metric, words in (("accuracy", "accuracy"), ("ece", "ECE")):
        panels[words] = _lines(log_history, _sets(log_history, metric))
    for name, words in (("learning_rate", "learning rate"), ("teacher_momentum", "teacher momentum")):
        panels[words] = _lines(losses, {name: words})
    return {name: panel for name, panel in panels.items() if panel}


def keep_curves(folder: str | Path, log_history: Sequence[Mapping[str, Any]], *, goes_on: bool) -> bool:
    """Write ``learning_curves.png`` into the folder of a run; whatever goes wrong is no reason to lose a training.

    Args:
        folder: The run's.
        log_history: Of the run.
        goes_on: A picture that is there may be an earlier one of this run, and is replaced.
    Returns:
        Whether it was written. A file of another run, or of somebody's own, stays, with a warning.
    """
    path = Path(folder) / CURVES_NAME
    if not curves_of(log_history):
        return False
    if path.exists() and not (goes_on and _is_ours(path)):
        logger.warning("The learning curves are not drawn: %s is there, and not of this run. Move it away.", path)
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as beside:
            learning_curves(log_history).savefig(beside, dpi=100, metadata={"Software": _SOFTWARE})
    except Exception as error:  # noqa: BLE001  # a full disk, a broken font: the weights are not saved yet
        logger.warning("The learning curves could not be drawn into %s: %s.", path, " ".join(str(error).split()))
        return False
    return True


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return bool(image.info.get("Software") == _SOFTWARE)
    except (OSError, ValueError, SyntaxError):
        return False


def _sets(log_history: Sequence[Mapping[str, Any]], metric: str) -> dict[str, str]:
    """Labels by key of a metric: those of validation, test and shifts; without a validation set of all there are."""
    keys = {key for entry in log_history for key in entry if key.startswith("eval_")}
    titled = {f"eval_{name}_{metric}": title for name, title in _TITLES.items()}
    if f"eval_{SPLIT}_{metric}" in keys:
        return titled
    longer = tuple(f"_{name}" for name in directions() if name.endswith(f"_{metric}"))  # such as adaptive_ece
    others = sorted(key for key in keys if key.endswith(f"_{metric}") and not key.endswith(longer))
    return {key: titled.get(key, key[len("eval_") : -len(metric) - 1] or "evaluation") for key in others}


def _lines(entries: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Panel:
    """Points by label of those keys that have any; of two values of a step the later one."""
    found: Panel = {}
    for key, label in labels.items():
        points = {
            float(entry["step"]): float(entry[key])
            for entry in entries
            if isinstance(entry.get(key), int | float) and isinstance(entry.get("step"), int | float)
        }
        if points:
            found[label] = sorted(points.items())
    return found


def _draw(ax: Axes, name: str, panel: Panel) -> None:
    """One panel, with a legend where it has several lines."""
    for i, (label, points) in enumerate(panel.items()):
        steps, values = zip(*points, strict=True)
        ax.plot(
            steps,
            values,
            color=COLORS[i % len(COLORS)],
            linestyle=_LINES[i % len(_LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markevery=-(-len(points) // _MARKED),
            markersize=4,
            linewidth=1.5,
            label=_plain(label),
        )
    finite = [value for points in panel.values() for _, value in points if math.isfinite(value)]
    if name == "loss" and finite and min(finite) > 0 and max(finite) > _WIDE * min(finite):
        ax.set_yscale("log")
    ax.set_ylabel(name)
    ax.grid(alpha=0.3)
    if len(panel) > 1 or name in ("accuracy", "ECE"):
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _plain(text: str) -> str:
    """A name as it is: no control characters, no formulas."""
    return printable(text).replace("$", r"\$")
