"""What home data teach about shifted ones: perturbed copies of held-out images, and a bank of images of the training.

No label and no statistic of a shifted set is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.density import DensityCalibrator, K, fit_density
from ..calibration.fit import fit_scaling
from ..calibration.rows import LogitRows
from ..data.shift_set import ShiftSet
from .logits import Head, SetLogits

MOST_PERTURBED = 5000  # images
LEAST_ACCURACY = 0.5  # of the clean one: copies that are recognised less often are no data of the task any more
CLEAN_SHARE = 0.25  # of the weight
METHODS = {"temperature": "ts", "perturbed": "pts", "density": "dts"}  # endings of their metrics
_WHOLE = 1 << 25  # logits that are kept while something is fitted on them


@dataclass(frozen=True, eq=False)
class HomeRows:
    """Held-out images and those perturbed copies of them that are still recognised.

    Attributes:
        logits: Of all of them.
        embeds: ``(R, D)``.
        labels: ``(R,)`` int64.
        weights: ``(R,)`` float64; a quarter of their sum is of the clean images.
        kept: Accuracy of the copies that were kept, by kind and severity.
        accuracy: Of the clean images.
    """

    logits: LogitRows
    embeds: Tensor
    labels: Tensor
    weights: Tensor
    kept: Mapping[str, float]
    accuracy: float


def home_rows(
    clean: tuple[Tensor, Tensor], copies: Mapping[str, tuple[Tensor, Tensor]], head: Head, data: ShiftSet
) -> HomeRows:
    """Choose the copies and weigh the rows.

    Args:
        clean: Embeddings and labels of held-out images.
        copies: The same of perturbed copies, by kind and severity.
        head: From embeddings to logits.
        data: The set of the images.
    Source:
        Tomani et al., CVPR 2021 (arXiv 2012.10988), with a family of perturbations in place of noise alone.
    """

    def accuracy(part: tuple[Tensor, Tensor]) -> float:
        logits = SetLogits(part[0], head, data)
        steps = range(0, len(logits), 4096)
        hits = sum(int((logits[i : i + 4096].argmax(1).cpu() == part[1][i : i + 4096]).sum()) for i in steps)
        return hits / len(logits)

    whole = accuracy(clean)
    found = {name: accuracy(part) for name, part in copies.items()}
    kept = {name: share for name, share in found.items() if share >= LEAST_ACCURACY * whole}
    parts = [clean, *(copies[name] for name in kept)]
    sizes = torch.tensor([len(part[1]) for part in parts], dtype=torch.float64)
    shares = sizes / sizes[1:].sum().clamp(min=1.0) * (1 - CLEAN_SHARE)
    shares[0] = CLEAN_SHARE if kept else 1.0
    embeds = torch.cat([part[0] for part in parts])
    weights = (shares / sizes).repeat_interleave(sizes.long())
    return HomeRows(SetLogits(embeds, head, data), embeds, torch.cat([part[1] for part in parts]), weights, kept, whole)


def fit_perturbed(rows: HomeRows, *, link: str, bounds: Any) -> dict[str, float]:
    """Fit one temperature (and bias) for images at home and their perturbed copies, by their likelihood."""
    logits = _read(rows.logits)
    return fit_scaling(
        logits, rows.labels, link=link, criterion="nll", bounds=bounds, warn=False, sample_weight=rows.weights
    )


def fit_relative_density(
    rows: HomeRows, bank: Tensor, scaling: Mapping[str, float], *, link: str, k: int = K
) -> DensityCalibrator:
    """Fit a temperature for each image, of logits at a temperature (and bias) that is or goes into the weights."""
    based = Based(_read(rows.logits), scaling)
    return fit_density(
        based, rows.embeds, rows.labels, bank, k=min(k, len(bank)), sample_weight=rows.weights, link=link
    )


def check_calibration_method(method: str) -> str:
    """Return the name of a method, or raise a ValueError."""
    if method not in METHODS:
        raise ValueError(f"Expected the calibration method to be one of {(*METHODS,)}, got {method!r}. Choose one.")
    return method


class Based(LogitRows):
    """Logits at a temperature and a bias.

    Args:
        logits: As the model gives them.
        scaling: "temperature" and, for SigLIP, "bias".
    """

    def __init__(self, logits: Tensor | LogitRows, scaling: Mapping[str, float]) -> None:
        self._logits, self._by, self._shift = logits, scaling["temperature"], scaling.get("bias", 0.0)
        self.shape = int(logits.shape[0]), int(logits.shape[1])
        self.dtype, self.device = logits.dtype, logits.device

    def __getitem__(self, rows: slice) -> Tensor:
        return self._logits[rows] / self._by + self._shift


def _read(logits: LogitRows) -> Tensor | LogitRows:
    """All rows, where they are not too many to be kept."""
    return logits[:] if len(logits) * logits.shape[1] <= _WHOLE else logits
