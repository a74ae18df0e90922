"""Evaluator: a model, a suite, and what is known of how well and how confidently the one does on the other.

Needs no trainer. Under torch.distributed each image is embedded once over all processes and each set measured by one of
them; all must call the same methods in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..basics.escape import guarded
from ..basics.fingerprint import fingerprint, tower_fingerprint
from ..basics.precision import at_least_float32
from ..basics.processes import done_by_first, place
from ..calibration.density import DensityCalibrator
from ..calibration.fit import fit_scaling, scaling_bounds
from ..calibration.metrics import read_set, scaled_metrics
from ..calibration.record import bake_temperature, calibration_record, check_not_baked, check_width, inverse_of
from ..calibration.rows import LogitRows
from ..calibration.temperature import temperature_interval
from ..data.batches import CaRotCollator
from ..data.captions import CaptionTable, class_embeddings
from ..data.perturbed_set import bank_of, drawn_rows, perturbed_sets
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite
from ..data.transforms import check_image_size, image_transform, short_side
from ..models.backbones import backbone_of, is_backbone, logit_head
from ..models.classifier import CLIPClassifier
from ..models.lora import base_model, merged
from ..models.prepare import align_markers, captions_of
from .embed import Embedded, Embedder
from .estimated import estimated
from .evaluation import Evaluation, Reported, with_aggregates
from .home import (
    METHODS,
    MOST_PERTURBED,
    HomeRows,
    check_calibration_method,
    fit_perturbed,
    fit_relative_density,
    home_rows,
)
from .logits import Head, SetLogits
from .measure import bins_at, compared, given_scalings, measure_all, scaling_of

logger = guarded(logging.getLogger(__name__))

FEW_ROWS = 50  # with fewer `calibrate` warns
_WHOLE = 1 << 24  # logits of the validation set that are kept while its temperature is fitted
_HEAD = ("logit_scale", "logit_bias", "head.weight", "head.bias")  # what no embedding depends on
OwnMetrics = Callable[[Tensor, Tensor], Mapping[str, float]]


@dataclass
class Memory:
    """What an evaluator keeps between calls; several of one model may share it.

    Attributes:
        weights: The fingerprint of the weights that `known` was computed from.
        known: Embeddings of the validation set, its perturbed copies, the bank and the classes.
        warned_of_bound: A temperature at a bound has been warned of.
        said: Which perturbed copies are kept has been said.
        calibrator: Of :meth:`Evaluator.calibrate`, by the method "density".
        method: Of the latest calibration.
    """

    weights: str = ""
    known: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    warned_of_bound: bool = False
    said: bool = False
    calibrator: DensityCalibrator | None = None
    method: str = "temperature"


class Evaluator:
    """Measure a model on the sets of a suite, fit what calibrates it, and put that into its weights.

    Args:
        model: A ``CLIPModel``, one of its relatives (:data:`~carot_hf.models.backbones.BACKBONES`) or a
            :class:`~carot_hf.CLIPClassifier` of the suite's classes; unwrapped. Its start and end markers become those
            of the tokenizer, as in training.
        processor: The model's.
        suite: Sets, class names and templates.
        batch_size: Images at a time in one process.
        n_bins: Confidence bins.
        device: Where the model is put; ``None``: where it is.
        criterion: What a temperature minimises: "nll" or, with a softmax, "ece".
        bounds: Lowest and highest temperature; ``None``: those that are usual for the link.
        method: What :meth:`evaluate` measures beside the plain figures: "temperature", fitted on the validation set
            (``_ts``); "perturbed", which adds one that is fitted on perturbed copies of it, too (``_pts``); "density",
            which adds a temperature for each image (``_dts``).
        train: Images of the training, of which "density" keeps a bank; ``None``: the suite's.
        captions: The suite's captions in the model's tokens; ``None``: made when they are needed.
        embedder: Embeds images; ``None``: made of the rest.
        memory: What is kept between calls; ``None``: a new one.
    Attributes:
        link: From logits to probabilities: "softmax" or "sigmoid".
    Raises:
        TypeError: If the model is of no family that is known.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        suite: ShiftSuite,
        *,
        batch_size: int = 256,
        n_bins: int = 10,
        device: str | torch.device | None = None,
        criterion: str = "nll",
        bounds: Sequence[float] | None = None,
        method: str = "temperature",
        train: ShiftSet | None = None,
        captions: CaptionTable | None = None,
        embedder: Embedder | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.processor, self.suite, self.n_bins = model, processor, suite, n_bins
        self.criterion, self.bounds, self.method = criterion, bounds, check_calibration_method(method)
        self._train = suite.train if train is None else train
        network = base_model(model)
        if is_backbone(network):
            align_markers(network, processor)
        self.link = "softmax" if isinstance(network, CLIPClassifier) else backbone_of(network).link
        if device is not None:
            model.to(device)
        self._captions = captions
        if embedder is None:
            transform = image_transform(processor)
            check_image_size(model, transform)
            collator = CaRotCollator(transform, captions, 0)  # type: ignore[arg-type]  # of training samples alone
            embedder = Embedder(transform, collator, batch_size, next(model.parameters()).device, progress=True)
        self.embedder = embedder
        self._memory = Memory() if memory is None else memory

    @property
    def captions(self) -> CaptionTable:
        """The suite's captions in the model's tokens."""
        if self._captions is None:
            self._captions = captions_of(base_model(self.model), self.suite, self.processor)
        return self._captions

    def evaluate(
        self,
        sets: Mapping[str, ShiftSet] | Sequence[str] | None = None,
        *,
        calibrator: float | Mapping[str, float] | DensityCalibrator | None = None,
        n_bootstrap: int = 0,
        own_metrics: OwnMetrics | None = None,
        remember: bool = True,
        title: str = "Evaluation",
    ) -> Evaluation:
        """Measure accuracy and calibration of sets, each image embedded once, each set's logits read once.

        Args:
            sets: By name, or names of the suite's; ``None``: all of the suite.
            calibrator: A temperature, or "temperature" and "bias", at which sets are measured, too (``_ts``), or a
                `DensityCalibrator` of these logits (``_dts``); ``None``: what is fitted on the validation set, if that
                is among them, by the methods up to `method` and the one of the latest :meth:`calibrate`.
            n_bootstrap: Resamples of the 95 % intervals of accuracy and ECE; 0: none.
            own_metrics: Called with logits ``(n, labels)`` and labels of each set; what it returns joins the metrics.
            remember: Use again what was computed of the same weights, and measure without a baked temperature, too.
            title: Of the bar.
        Raises:
            ValueError: If there is no such set, or one without labels.
        """
        chosen = self._chosen(sets)
        if missing := [data.name for data in chosen.values() if data.label_column is None]:
            raise ValueError(f"Expected labels in every set, got none in {missing}. Use `predict` for those.")
        parts = self.embed(chosen, title)
        known = self._known_of_weights() if remember else {}
        if chosen.get("validation") is self.suite.validation:
            known["validation"] = (self.suite.validation, self.embedder.collator, *parts["validation"])
        logits, labels = self._logits(chosen, parts, self.head(known))
        scalings = given_scalings(calibrator, getattr(base_model(self.model), "density", None))
        if not scalings and "validation" in chosen:
            scalings["ts"] = self.fit(logits["validation"], labels["validation"], warn=remember)
            scalings |= self._fitted_at_home(known, scalings["ts"]) if remember else {}
        record = calibration_record(base_model(self.model)) if remember else None
        inverse = None if record is None else inverse_of(record)
        common = {"n_bins": self.n_bins, "link": self.link, "n_bootstrap": n_bootstrap, "inverse": inverse}
        options: dict[str, dict[str, Any]] = {name: {**common, "scalings": {}} for name in chosen}
        for name in options.keys() - {"validation"}:
            for end, item in scalings.items():
                made = partial(scaling_of, item, scalings.get("ts"), parts[name][0], self.link)
                options[name]["scalings"][end] = made
        found = measure_all({name: (logits[name], labels[name]) for name in chosen}, options)
        if own_metrics is not None:
            for name, part in found.items():
                part.metrics.update(own_metrics(logits[name].whole(), labels[name]))
        return Evaluation(
            metrics=with_aggregates({name: part.metrics for name, part in found.items()}, self.suite, scalings),
            bins={name: part.bins for name, part in found.items()},
            bins_ts=bins_at("ts", found),
            bins_pts=bins_at("pts", found),
            bins_dts=bins_at("dts", found),
            scaling=scalings.get("ts", {}),
            sizes={name: len(part) for name, part in labels.items()},
            comparison=compared(self.model, found, record, scalings, self.suite) if remember else Reported(),
            intervals={name: part.intervals for name, part in found.items() if part.intervals},
            rows={name: part.rows for name, part in found.items() if part.rows is not None},
        )

    def predict(
        self, data: ShiftSet, *, remember: bool = True, title: str = "Prediction"
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits of a set ``(n, labels)`` and its labels ``(n,)``, where it has any; on the CPU.

        Args:
            data: With or without labels.
            remember: Use again what was computed of the same weights.
            title: Of the bar.
        """
        embeds, labels = self.embed({"": data}, title)[""]
        head = self.head(self._known_of_weights() if remember else None)
        return SetLogits(embeds, head, data).whole().cpu(), labels

    def estimate(self, data: ShiftSet, title: str = "Estimate") -> dict[str, float]:
        """Estimate the accuracy on images without labels; see :func:`~carot_hf.evaluation.estimated.estimated`.

        The confidences are those of the model as it is, divided by the calibrator's temperatures if there is one:
        calibrate it first. Under shift an estimate can be wrong; its interval says how far it depends on the draw.
        """
        known, validation = self._known_of_weights(), self.suite.validation
        embeds, labels = self._embedded("validation", validation, known, "Validation")
        head, away = self.head(known), self.embed({"": data}, title)[""][0]
        own = getattr(base_model(self.model), "density", None)
        return estimated(
            (SetLogits(embeds, head, validation), embeds, labels),
            (SetLogits(away, head, data), away),
            self.calibrator if own is None else own,
            link=self.link,
        )

    def calibrate(self, method: str | None = None) -> dict[str, Any]:
        """Fit the temperature on the validation set and put it into the model's weights; accuracy stays.

        After an :meth:`evaluate` of the same weights no image and no caption is embedded again.

        Args:
            method: "temperature": the best one for the validation set; where data shift it is too low. "perturbed": one
                for it and for perturbed copies of its images. "density": that of "temperature", and `calibrator`,
                which divides the logits of each image once more; ``None``: the evaluator's own.

        Returns:
            The record that is kept in ``config.calibration``: temperature, bias (SigLIP), split, size, criterion,
            bounds and whether the temperature is at one, templates, method, which perturbed copies it has seen, and
            ``nll`` and ``ece`` of the split before and after.
        Raises:
            RuntimeError: If the model is calibrated already.
            ValueError: If it is in half precision.
        """
        network, data = base_model(self.model), self.suite.validation
        method = self.method if method is None else check_calibration_method(method)
        check_not_baked(network)
        check_width(network)  # before any work
        known = self._known_of_weights()
        embeds, labels = self._embedded("validation", data, known, "Calibration")
        logits = SetLogits(embeds, self.head(known), data)
        scaling = self.fit(logits, labels)
        further = self._fitted_at_home(known, scaling, method)
        scaling = further["pts"] if method == "perturbed" else scaling
        self._memory.calibrator, self._memory.method = further.get("dts"), method
        if method == "density":
            self._memory.calibrator = replace(further["dts"], tower=tower_fingerprint(merged(self.model)))
        bounds = scaling_bounds(self.bounds, self.link)
        if len(labels) < FEW_ROWS:
            self._warn_of_few(logits, labels, scaling["temperature"])
        wanted = {"before": ({}, scaled_metrics()), "after": (scaling, scaled_metrics())}
        seen, _ = read_set(logits, labels, wanted, n_bins=self.n_bins, link=self.link)
        record: dict[str, Any] = {
            "split": data.name,
            "n": len(labels),
            "criterion": self.criterion,
            "bounds": list(bounds),
            "at_bound": scaling["temperature"] in bounds,
            "templates": list(self.suite.templates),
            "method": method,
        }
        if method != "temperature":
            record["kept"] = sorted(self._home_rows(known).kept)
        for when, part in seen.items():
            measured = part.metrics(["nll", "ece"])
            record |= {f"{name}_{when}": value for name, value in measured.items()}
        bake_temperature(network, scaling["temperature"], bias=scaling.get("bias", 0.0), record=record)
        return dict(network.config.calibration)

    def fit(self, logits: LogitRows, labels: Tensor, *, warn: bool = True) -> dict[str, float]:
        """Fit what calibrates logits: "temperature" and, for SigLIP, "bias". One process does it for all.

        Args:
            logits: Of held-out rows.
            labels: ``(n,)`` int64.
            warn: Log a warning, the first time, if the temperature is at a bound.
        """

        def work() -> dict[str, float]:
            rows = logits[:] if len(logits) * logits.shape[1] <= _WHOLE else logits
            return fit_scaling(rows, labels, link=self.link, criterion=self.criterion, bounds=self.bounds, warn=False)

        fitted = done_by_first(work)
        low, high = scaling_bounds(self.bounds, self.link)
        if fitted["temperature"] in (low, high) and warn and not self._memory.warned_of_bound:
            self._memory.warned_of_bound = True
            logger.warning(
                "The best temperature is at the bound %g of [%g, %g]: the optimum may lie outside, and what is "
                "baked in is not it. Look at the validation set, or set `calibration_bounds` wider.",
                fitted["temperature"],
                low,
                high,
            )
        return fitted

    @property
    def calibrator(self) -> DensityCalibrator | None:
        """Of the latest :meth:`calibrate` by the method "density": of the logits as the weights give them now."""
        return self._memory.calibrator

    def _fitted_at_home(
        self, known: dict[str, tuple[Any, ...]], home: Mapping[str, float], method: str | None = None
    ) -> dict[str, Any]:
        """What further methods find, up to one of them, beside the temperature of the validation set."""
        wanted = [self.method, self._memory.method] if method is None else [method]
        method = max(wanted, key=list(METHODS).index)
        if method == "temperature":
            return {}
        train = self._train
        part = bank_of(train) if method == "density" else None  # refused before any work
        rows = self._home_rows(known)
        bank = None if part is None else self._embedded("bank", train, known, "Bank", part)[0]
        bounds = scaling_bounds(self.bounds, self.link)

        def work() -> dict[str, Any]:
            found: dict[str, Any] = {"pts": fit_perturbed(rows, link=self.link, bounds=bounds)}
            if bank is not None:
                found["dts"] = fit_relative_density(rows, bank, home, link=self.link)
            return found

        return done_by_first(work)

    def _home_rows(self, known: dict[str, tuple[Any, ...]]) -> HomeRows:
        """Embeddings of held-out images and of perturbed copies, each made once of the same weights."""
        data, collator = self.suite.validation, self.embedder.collator
        embeds, labels = self._embedded("validation", data, known, "Calibration")
        rows = drawn_rows(data, MOST_PERTURBED)
        if known.get("copies", ())[:2] != (data, collator):
            part = data if rows is None else data.subset(rows, data.name)
            sets = perturbed_sets(part, side=short_side(self.embedder.transform))
            known["copies"] = (data, collator, self.embed(sets, "Perturbed copies"))
        clean = (embeds, labels) if rows is None else (embeds[rows], labels[rows])
        found = home_rows(clean, known["copies"][2], self.head(known), data)
        if not self._memory.said:
            self._memory.said = True
            logger.info("Perturbed copies that are recognised (accuracy %.3f without): %s", found.accuracy, found.kept)
        return found

    def _embedded(
        self, key: str, data: ShiftSet, known: dict[str, tuple[Any, ...]], title: str, part: ShiftSet | None = None
    ) -> Any:
        """Embeddings and labels of a set, or of a part that stands for it, made once of the same weights."""
        if known.get(key, ())[:2] != (data, self.embedder.collator):
            found = self.embed({"": data if part is None else part}, title)[""]
            known[key] = (data, self.embedder.collator, *found)
        return known[key][2:]

    def embed(self, sets: Mapping[str, ShiftSet], title: str = "Evaluation") -> dict[str, Embedded]:
        """Embed the images of sets: ``(n, D)`` of length 1, at least float32, and labels ``(n,)``, on the CPU."""
        found = self.embedder.embed(self.model, sets, title)
        self.embedder.bad_images.report(first=place()[0] == 0)
        return found

    @torch.no_grad()
    def head(self, known: dict[str, tuple[Any, ...]] | None = None) -> Head:
        """Weight ``(K, D)`` and bias ``(K,)`` that turn embeddings into logits, in at least float32.

        Args:
            known: Of the same weights; class embeddings are taken from it, or go into it.
        """
        known = {} if known is None else known
        if isinstance(self.model, CLIPClassifier):
            head = self.model.head
            return _for_float64(at_least_float32(head.weight.detach()), at_least_float32(head.bias.detach()))
        if known.get("classes", (None,))[0] is not self.captions:
            with self.embedder.autocast():
                known["classes"] = (self.captions, class_embeddings(self.model, self.captions))
        classes = known["classes"][1]
        scale, *shift = (at_least_float32(parameter.detach()) for parameter in logit_head(self.model))
        bias = shift[0].expand(len(classes)) if shift else torch.zeros(len(classes)).to(classes)
        return _for_float64(scale.exp() * classes, bias)

    def _known_of_weights(self) -> dict[str, tuple[Any, ...]]:
        """What has been computed from the weights as they are now: empty after any change of them.

        Embeddings of the validation set and of the classes, neither of which depends on ``logit_scale``, a bias or the
        linear head.
        """
        weights = fingerprint(base_model(self.model), leave_out=_HEAD)
        if weights != self._memory.weights:
            self._memory.weights, self._memory.known = weights, {}
        return self._memory.known

    def _chosen(self, sets: Mapping[str, ShiftSet] | Sequence[str] | None) -> dict[str, ShiftSet]:
        own = self.suite.evaluation_sets
        if sets is None:
            return dict(own)
        if isinstance(sets, Mapping):
            return dict(sets)
        for name in [sets] if isinstance(sets, str) else sets:
            if name not in own:
                raise ValueError(f"Expected the name of a set of {sorted(own)}, got {name!r}. Correct the name.")
        return {name: own[name] for name in ([sets] if isinstance(sets, str) else sets)}

    def _logits(
        self, sets: Mapping[str, ShiftSet], parts: Mapping[str, Embedded], head: Head
    ) -> tuple[dict[str, SetLogits], dict[str, Tensor]]:
        labels: dict[str, Any] = {name: part[1] for name, part in parts.items()}
        if any(part is None for part in labels.values()):
            raise ValueError("Expected labels in every set, got none. Use `predict` for images without labels.")
        return {name: SetLogits(parts[name][0], head, data) for name, data in sets.items()}, labels

    def _warn_of_few(self, logits: SetLogits, labels: Tensor, temperature: float) -> None:
        """Say how little is known of a temperature that was fitted on few rows."""
        low, high = temperature_interval(logits, labels, link=self.link)
        logger.warning(
            "The temperature %.3g is fitted on %d rows only: its 95 %% interval is %.3g to %.3g. Hold out %d rows or "
            "more, or do not rely on it.",
            temperature,
            len(labels),
            low,
            high,
            FEW_ROWS,
        )


def _for_float64(weight: Tensor, bias: Tensor) -> Head:
    """A head where sums in float64 can be taken."""
    # Workaround, torch 2.13: MPS has no float64, so there the CPU measures. Until: it has.
    return (weight.cpu(), bias.cpu()) if weight.device.type == "mps" else (weight, bias)
