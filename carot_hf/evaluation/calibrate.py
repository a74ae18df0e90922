"""What `calibrate` does: fit on held-out home data, put the temperature into the weights, and keep a record of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..basics.escape import guarded
from ..basics.fingerprint import tower_fingerprint
from ..basics.processes import done_by_first
from ..calibration.conformal import ConformalSets, TooFewRowsError
from ..calibration.conformal_logits import fit_sets
from ..calibration.density import DensityCalibrator
from ..calibration.metrics import read_set
from ..calibration.record import bake_temperature, check_not_baked, check_width
from ..calibration.selective import confidence_for_accuracy
from ..calibration.target import fit_to_accuracy, offset_to_accuracy
from ..calibration.temperature import temperature_interval
from ..data.perturbed_set import can_be_bank
from ..data.sample_hash import sample_hash
from ..data.shift_set import ShiftSet
from ..models.lora import base_model, merged
from .estimated import estimated
from .fitting import HomeFit
from .home import METHODS, Based
from .logits import SetLogits
from .memory import Memory

logger = guarded(logging.getLogger(__name__))

TARGET = "target"
FEW_ROWS = 50  # with fewer `calibrate` warns
SURE = 0.95
_MEASURED = ("nll", "ece")


def check_request(model: Any, method: str, images: ShiftSet | None) -> None:
    """Refuse, before any work, what cannot be done.

    Raises:
        ValueError: If there is no such method, images are missing or too many, or the weights are in half precision.
        RuntimeError: If the model is calibrated already.
    """
    check_not_baked(base_model(model))
    check_width(base_model(model))
    if method not in (*METHODS, TARGET):
        raise ValueError(f"Expected the method to be one of {(*METHODS, TARGET)}, got {method!r}. Choose one.")
    if (images is None) == (method == TARGET):
        raise ValueError(
            f"Expected `images` with the method {TARGET!r} and with no other, got "
            f"{'none' if images is None else 'some'} with {method!r}. Pass images of where the model will work, or "
            "choose another method."
        )


def calibrate(
    home: HomeFit,
    model: Any,
    method: str,
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    n_bins: int,
    alpha: float,
    images: ShiftSet | None = None,
) -> dict[str, Any]:
    """Calibrate a model, in place, and return the record; see :meth:`carot_hf.Evaluator.calibrate`.

    The names of the classes and the templates are for the record, ``alpha`` is that of the conformal sets.
    """
    mark = {} if images is None else {"hash": sample_hash(images), "n": len(images)}
    logits, embeds, labels = home.held_out()
    scaling = home.fit(logits, labels)
    record: dict[str, Any] = {
        "split": home.home().name,
        "n": len(labels),
        "criterion": home.criterion,
        "bounds": list(home.bounds),
        "templates": list(templates),
        "classes": list(classes),
        "method": method,
    }
    banked = home.link == "softmax" and can_be_bank(home.train)
    reached = method if method != TARGET else "density" if banked else "temperature"
    further = home.further(scaling, reached)
    calibrator: DensityCalibrator | None = further.get(METHODS["density"])
    if method == "perturbed":
        scaling = further[METHODS["perturbed"]]
    if images is not None:
        scaling, calibrator, estimate = _at_target(home, images, scaling, calibrator)
        record[TARGET] = {**mark, "accuracy": estimate}
    if reached != "temperature":
        record["kept"] = sorted(home.rows().kept)
    if calibrator is not None:
        calibrator = replace(calibrator, tower=tower_fingerprint(merged(model)))
        record["per_image"] = True
    if len(labels) < FEW_ROWS:
        _warn_of_few(logits, labels, scaling["temperature"], home.link)
    record["at_bound"] = scaling["temperature"] in home.bounds
    record |= _on_held_out(logits, labels, scaling, n_bins=n_bins, link=home.link)
    divisors = {} if calibrator is None else {"row_temperature": calibrator.temperature(embeds)}
    sets = conformal_sets(logits, labels, {**scaling, **divisors}, link=home.link, alpha=alpha, memory=home.memory)
    record["conformal"] = {score: made.to_dict() for score, made in sets.items()}
    home.memory.calibrator, home.memory.method = calibrator, method
    bake_temperature(base_model(model), scaling["temperature"], bias=scaling.get("bias", 0.0), record=record)
    return dict(base_model(model).config.calibration)


def _on_held_out(
    logits: SetLogits, labels: Tensor, scaling: Mapping[str, float], *, n_bins: int, link: str
) -> dict[str, float | None]:
    """Figures before and after, and the confidence from which on 95 % were right, as the weights will give it."""
    wanted = {"before": ({}, _MEASURED), "after": (scaling, _MEASURED)}
    seen, _ = read_set(logits, labels, wanted, n_bins=n_bins, link=link)
    found = {when: part.metrics(_MEASURED) for when, part in seen.items()}
    figures = {f"{name}_{when}": value for when, part in found.items() for name, value in part.items()}
    return {**figures, "sure": confidence_for_accuracy(seen["after"].confidences, seen["after"].correct, SURE)}


def conformal_sets(
    logits: SetLogits, labels: Tensor, scaling: Mapping[str, Any], *, link: str, alpha: float, memory: Memory
) -> dict[str, ConformalSets]:
    """Fit conformal sets on held-out rows, of the probabilities that are given away in the end.

    Args:
        logits: As the model gives them.
        labels: ``(n,)`` int64.
        scaling: What divides them; see :class:`~carot_hf.calibration.metrics.Scaling`.
        link: "softmax" or "sigmoid".
        alpha: Chance of a set without the right class.
        memory: Of what was said before.
    Returns:
        By score; empty, with a warning, if there are too few rows for this ``alpha``.
    """
    try:
        return done_by_first(lambda: fit_sets(logits, labels, scaling, link=link, alpha=alpha))
    except TooFewRowsError as error:
        if memory.first("conformal"):
            logger.warning("No conformal sets: %s", error)
        return {}


def _at_target(
    home: HomeFit, images: ShiftSet, scaling: dict[str, float], calibrator: DensityCalibrator | None
) -> tuple[dict[str, float], DensityCalibrator | None, float]:
    """The scaling and the calibrator whose mean confidence on images without labels is their estimated accuracy.

    The estimate is that of "atc", by the best confidences that home gives: with the density, where there is a bank.
    """
    away = home.embed({"": images}, "Target")[""][0]
    theirs = SetLogits(away, home.head, images)
    logits, embeds, labels = home.held_out()

    def work() -> tuple[dict[str, float], DensityCalibrator | None, float]:
        found = estimated((logits, embeds, labels), (theirs, away), calibrator, link=home.link, scaling=scaling)
        accuracy = found["atc"]
        fitted = fit_to_accuracy(theirs, accuracy, scaling, link=home.link, bounds=home.bounds)
        moved = None
        if calibrator is not None:
            moved = offset_to_accuracy(calibrator, Based(theirs, fitted), away, accuracy)
        return fitted, moved, accuracy

    return done_by_first(work)


def _warn_of_few(logits: SetLogits, labels: Tensor, temperature: float, link: str) -> None:
    """Say how little is known of a temperature that was fitted on few rows."""
    low, high = temperature_interval(logits, labels, link=link)
    logger.warning(
        "The temperature %.3g is fitted on %d rows only: its 95 %% interval is %.3g to %.3g. Hold out %d rows or "
        "more, or do not rely on it.",
        temperature,
        len(labels),
        low,
        high,
        FEW_ROWS,
    )
