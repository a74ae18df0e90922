"""Memory: what evaluators of one model keep between calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..basics.fingerprint import fingerprint
from ..calibration.density import DensityCalibrator
from ..models.lora import base_model

_HEAD = ("logit_scale", "logit_bias", "head.weight", "head.bias")  # what no embedding depends on


@dataclass
class Memory:
    """What an evaluator keeps between calls; several of one model may share it.

    Attributes:
        weights: The fingerprint of the weights that `known` was computed from.
        known: Embeddings of the validation set, its perturbed copies, the bank and the classes.
        warned: Of what has been warned once.
        calibrator: Of :meth:`Evaluator.calibrate`, by the methods "density" and "target".
        method: Of the latest calibration.
    """

    weights: str = ""
    known: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    calibrator: DensityCalibrator | None = None
    method: str = "temperature"

    def of(self, model: Any) -> dict[str, tuple[Any, ...]]:
        """What has been computed from the weights as they are now: empty after any change of them.

        Embeddings of the validation set and of the classes, neither of which depends on ``logit_scale``, a bias or the
        linear head.
        """
        weights = fingerprint(base_model(model), leave_out=_HEAD)
        if weights != self.weights:
            self.weights, self.known = weights, {}
        return self.known

    def first(self, what: str) -> bool:
        """Whether this has not been said yet; from now on it has."""
        new = what not in self.warned
        self.warned.add(what)
        return new
