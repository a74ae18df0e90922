"""Pictures of the explanations, drawn from the library's own functions.

    python docs/pictures.py     # from the root of the repository: writes docs/explanations/*.png anew

A picture holds the numbers that it shows, so that `tests/test_docs_pictures.py` sees when it is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from carot_hf.ece.binning import calibration_bins
from carot_hf.evaluation.plots import COLORS, new_figure
from carot_hf.teacher.average import beta_momentum, ema_momentum

FOLDER = Path(__file__).resolve().parent / "explanations"
BATCH, ROWS = 512, (128, 512, 2_048, 8_192, 32_768)
STEPS, SHOWN = 25_030, 10_000  # ten epochs of ImageNet in batches of 512; the part that is drawn
TEACHERS: tuple[tuple[str, int, Callable[[int, int], float]], ...] = (
    ("EMA, every step", 1, ema_momentum),
    ("EMA, every 500 (CaRot)", 500, ema_momentum),
    ("EMA, every 1,000", 1_000, ema_momentum),
    ("beta-weighted, every step (TRACER)", 1, beta_momentum),
)
SURE = 5  # confidences are Beta(5, 1): mostly sure


def expected_ece(rows: float, n_bins: int = 10) -> float:
    r"""ECE that a perfectly calibrated model with confidences of Beta(5, 1) shows by chance.

    .. math:: \sqrt{2 / \pi n} \, \sum_b \sqrt{w_b \, c_b (1 - c_b)}
    """
    edges = np.linspace(0, 1, n_bins + 1)
    shares = np.diff(edges**SURE)
    centers = SURE / (SURE + 1) * np.diff(edges ** (SURE + 1)) / shares
    return float(np.sqrt(2 / (np.pi * rows)) * np.sqrt(shares * centers * (1 - centers)).sum())


def batch_mean_ece() -> Any:
    """Draw ECE against rows: that of the whole set falls, the mean over batches stays."""
    generator = np.random.default_rng(0)
    whole, batched = [], []
    for rows in ROWS:
        confidences = generator.beta(SURE, 1, rows)
        correct = generator.random(rows) < confidences
        whole.append(calibration_bins(confidences, correct).ece)
        parts = [slice(start, start + BATCH) for start in range(0, rows, BATCH)]
        batched.append(float(np.mean([calibration_bins(confidences[part], correct[part]).ece for part in parts])))
    figure = new_figure((6.4, 3.8))
    ax = figure.subplots()
    ax.plot(ROWS, [expected_ece(rows) for rows in ROWS], color=COLORS[4], label="whole set, by the formula")
    ax.plot(ROWS, whole, color=COLORS[4], marker="o", linestyle="none", label="whole set, drawn once")
    level = [expected_ece(min(rows, BATCH)) for rows in ROWS]
    ax.plot(ROWS, level, color=COLORS[5], linestyle="--", label=f"mean over batches of {BATCH}, by the formula")
    ax.plot(
        ROWS, batched, color=COLORS[5], marker="s", linestyle="none", label=f"mean over batches of {BATCH}, drawn once"
    )
    ax.set(xscale="log", yscale="log", xlabel="rows", ylabel="ECE of a calibrated model", ylim=(1e-3, 0.4))
    ax.set_xticks(ROWS, [f"{rows:,}" for rows in ROWS])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", ncols=2, loc="upper center")
    return figure


def ema_teacher() -> Any:
    """Draw the share of the pretrained weights in the teacher against the step."""
    figure = new_figure((6.4, 3.8))
    ax = figure.subplots()
    for number, (label, every, momentum) in enumerate(TEACHERS):
        at, shares = pretrained_share(every, momentum)
        ax.step(
            at,
            shares,
            where="post",
            color=COLORS[(0, 5, 4, 3)[number]],
            linestyle=("-", "-", "--", "-.")[number],
            label=label,
        )
    ax.set(
        yscale="log",
        ylim=(1e-4, 1.5),
        xlim=(-150, SHOWN),
        xlabel="step of 25,030",
        ylabel="share of the pretrained weights",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return figure


def pretrained_share(every: int, momentum: Callable[[int, int], float]) -> tuple[list[int], list[float]]:
    """Steps of the updates, 0 first, and what of the pretrained weights is left in the teacher after each."""
    at, shares = [0], [1.0]
    for step in range(every, SHOWN + 1, every):
        at.append(step)
        shares.append(shares[-1] * momentum(step, STEPS))
    return [*at, SHOWN], [*shares, shares[-1]]


def numbers(figure: Any) -> str:
    """The points of all lines by label, as they stand in the file."""
    (ax,) = figure.axes
    drawn = {
        line.get_label(): np.asarray(line.get_xydata())[:: 500 if len(line.get_xydata()) > 1000 else 1]
        for line in ax.lines
    }
    return json.dumps(
        {label: [[f"{value:.3g}" for value in point] for point in points] for label, points in drawn.items()}
    )


PICTURES = {"batch_mean_ece.png": batch_mean_ece, "ema_teacher.png": ema_teacher}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(FOLDER / name, dpi=100, metadata={"Description": numbers(figure)})
