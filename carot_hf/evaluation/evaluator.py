"""Evaluator: a model, a suite, and what is known of how well and how confidently the one does on the other.

Needs no trainer. Under torch.distributed each image is embedded once over all processes and each set measured by one of
them; all must call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..basics.processes import place
from ..calibration.conformal import ConformalSets, checked_alpha
from ..calibration.conformal_logits import conformal_of, sets_of
from ..calibration.density import DensityCalibrator
from ..calibration.fit import scaling_bounds
from ..calibration.record import calibration_record, inverse_of
from ..data.captions import CaptionTable, class_embeddings
from ..data.groups import groups_of
from ..data.shift_set import ShiftSet
from ..data.suite import ShiftSuite
from ..models.backbones import backbone_of, is_backbone
from ..models.classifier import CLIPClassifier
from ..models.lora import base_model
from ..models.prepare import align_markers, captions_of
from .calibrate import TARGET, calibrate, check_request, conformal_sets
from .embed import Embedded, Embedder, embedder_of
from .estimated import estimated
from .evaluation import Evaluation, Reported
from .fitting import HomeFit, check_home
from .home import METHODS, check_calibration_method
from .kept_heads import kept_class_embeddings
from .logits import Head, SetLogits, head_of
from .marks import marks_of
from .measure import Measured, compared, evaluation_of, given_scalings, measure_all, scaling_of
from .memory import Memory
from .per_image import PerImage, facts_of_images
from .right import settled

OwnMetrics = Callable[[Tensor, Tensor], Mapping[str, float]]


class Evaluator:
    """Measure a model on the sets of a suite, fit what calibrates it, and put that into its weights.

    Args:
        model: A ``CLIPModel``, one of its relatives (:data:`~carot_hf.models.backbones.BACKBONES`) or a
            :class:`~carot_hf.CLIPClassifier` of the suite's classes; unwrapped. Its start and end markers become those
            of the tokenizer, as in training.
        processor: The model's.
        suite: Sets, class names and templates. One without a validation set is measured as the model is.
        batch_size: Images at a time in one process; ``None``: 256, on a CPU 32.
        n_bins: Confidence bins.
        device: Where the model is put; ``None``: where it is.
        criterion: What a temperature minimises: "nll" or, with a softmax, "ece".
        bounds: Lowest and highest temperature; ``None``: those that are usual for the link.
        alpha: Chance of a conformal set without the right class.
        method: What :meth:`evaluate` measures beside the plain figures: "temperature", fitted on the validation set
            (``_ts``); "perturbed", which adds one that is fitted on perturbed copies of it, too (``_pts``); "density",
            which adds a temperature for each image (``_dts``).
        train: Images of the training, of which "density" keeps a bank; ``None``: the suite's, if it has any.
        captions: The suite's captions in the model's tokens; ``None``: made when they are needed.
        embedder: Embeds images; ``None``: made of the rest.
        memory: What is kept between calls; ``None``: a new one.
        keep_heads: Keep the embeddings of many class captions on the disk, too: see
            :func:`~carot_hf.evaluation.kept_heads.kept_class_embeddings`.
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
        batch_size: int | None = None,
        n_bins: int = 10,
        device: str | torch.device | None = None,
        criterion: str = "nll",
        bounds: Sequence[float] | None = None,
        alpha: float = 0.1,
        method: str = "temperature",
        train: ShiftSet | None = None,
        captions: CaptionTable | None = None,
        embedder: Embedder | None = None,
        memory: Memory | None = None,
        keep_heads: bool = False,
    ) -> None:
        self.model, self.processor, self.suite, self.n_bins = model, processor, suite, n_bins
        self.criterion, self.bounds, self.method = criterion, bounds, check_calibration_method(method)
        self.alpha = checked_alpha(alpha)
        self._train = suite.train if train is None else train
        self._class_embeddings = kept_class_embeddings if keep_heads else class_embeddings
        network = base_model(model)
        if is_backbone(network):
            align_markers(network, processor)
        self.link = "softmax" if isinstance(network, CLIPClassifier) else backbone_of(network).link
        if device is not None:
            model.to(device)
        self._captions = captions
        self.embedder = embedder_of(model, processor, batch_size, progress=True) if embedder is None else embedder
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
        n_bootstrap: int = 1000,
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
            n_bootstrap: Draws of the 95 % intervals of accuracy and ECE; 0: none are made.
            own_metrics: Called with logits ``(n, labels)`` and labels of each set; what it returns joins the metrics.
            remember: Use again what was computed of the same weights, and measure without a baked temperature, too.
            title: Of the bar.
        Raises:
            ValueError: If there is no such set, or one without labels; without a training set for "density".
        """
        chosen = self._chosen(sets)
        if missing := [data.name for data in chosen.values() if data.label_column is None]:
            raise ValueError(f"Expected labels in every set, got none in {missing}. Use `predict` for those.")
        scalings = given_scalings(calibrator, getattr(base_model(self.model), "density", None))
        fits, parts = self._will_fit(chosen, scalings, remember), self.embed(chosen, title)
        known = self._memory.of(self.model) if remember else {}
        if (held := chosen.get("validation")) is not None and held is self.suite.validation:
            known["validation"] = (held, self.embedder.collator, *parts["validation"])
        home, record = self._home(known), calibration_record(base_model(self.model)) if remember else None
        logits, labels = self._logits(chosen, parts, home.head)
        if fits:
            scalings = self._fitted(home, logits["validation"], labels["validation"], remember)
        made = {name: self._scalings_of(scalings, part[0]) for name, part in parts.items()}
        inverse = None if record is None else inverse_of(record)
        common = dict[str, Any](n_bins=self.n_bins, link=self.link, n_bootstrap=n_bootstrap * remember, inverse=inverse)
        if remember and "validation" in chosen:
            common["sets"] = self._conformal(logits["validation"], labels["validation"], made["validation"])
        options = _options(chosen, labels, common, made)
        found = measure_all({name: (logits[name], labels[name]) for name in chosen}, options)
        if own_metrics is not None:
            for name, part in found.items():
                part.metrics.update(own_metrics(logits[name].whole(), labels[name]))
        marks = marks_of(chosen, scalings, record)
        return evaluation_of(
            found,
            self.suite,
            scalings.get("ts", {}),
            marks,
            comparison=compared(self.model, found, record, scalings, self.suite, marks) if remember else Reported(),
            per_image=self._with_facts(chosen, found) if remember else {},
        )

    def _will_fit(self, sets: Mapping[str, ShiftSet], given: Mapping[str, Any], remember: bool) -> bool:
        """Whether a calibration is fitted on the validation set; refuse, before any work, what cannot be."""
        fits = not given and "validation" in sets
        if fits and remember:
            check_home(sets["validation"], self._train, self.method)
        return fits

    def _with_facts(self, sets: Mapping[str, ShiftSet], found: Mapping[str, Measured]) -> dict[str, PerImage]:
        """What is said of each image, with what tells the images from others."""
        names, parts = self.suite.class_names, {name: part.per_image for name, part in found.items()}
        return {
            name: replace(part, facts=facts_of_images(sets[name], part.labels, names)) for name, part in parts.items()
        }

    def _fitted(self, home: HomeFit, logits: SetLogits, labels: Tensor, remember: bool) -> dict[str, Any]:
        """What the methods up to the evaluator's and the latest calibration's find, by the ending of their metrics."""
        scalings: dict[str, Any] = {"ts": home.fit(logits, labels, warn=remember)}
        if not remember:
            return scalings
        methods = {self.method, self._memory.method} - {TARGET}
        scalings |= home.further(scalings["ts"], max(methods, key=list(METHODS).index))
        if self._targeted() and self.calibrator is not None:
            scalings["dts"] = self.calibrator
        return scalings

    def _targeted(self) -> bool:
        """Whether the weights are calibrated for a target: its calibrator is relative to them, and not to home."""
        return TARGET in (calibration_record(base_model(self.model)) or {})

    def _scalings_of(self, scalings: Mapping[str, Any], embeds: Tensor) -> dict[str, Callable[[], Mapping[str, Any]]]:
        """What makes the divisors of a set's logits, by the ending of their metrics."""
        own = self._targeted()
        home = {end: None if own and item is self.calibrator else scalings.get("ts") for end, item in scalings.items()}
        return {end: partial(scaling_of, item, home[end], embeds, self.link) for end, item in scalings.items()}

    def _conformal(
        self, logits: SetLogits, labels: Tensor, scalings: Mapping[str, Callable[[], Mapping[str, Any]]]
    ) -> dict[str, ConformalSets]:
        """Conformal sets by score, of the probabilities at the last scaling."""
        scaling = list(scalings.values())[-1]() if scalings else {}
        return conformal_sets(logits, labels, scaling, link=self.link, alpha=self.alpha, memory=self._memory)

    def predict(
        self, data: ShiftSet, *, remember: bool = True, title: str = "Prediction"
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits of a set ``(n, labels)`` and its labels ``(n,)``, where it has any; on the CPU.

        Args:
            data: With or without labels; where several are right, the one that is most likely stands for them.
            remember: Use again what was computed of the same weights.
            title: Of the bar.
        """
        embeds, labels = self.embed({"": data}, title)[""]
        head = self.head(self._memory.of(self.model) if remember else None)
        logits = SetLogits(embeds, head, data)
        return logits.whole().cpu(), None if labels is None else settled(logits, labels, data)

    def estimate(self, data: ShiftSet, title: str = "Estimate") -> dict[str, float]:
        """Estimate the accuracy on images without labels; see :func:`~carot_hf.evaluation.estimated.estimated`.

        The confidences are those of the model as it is, divided by the calibrator's temperatures if there is one:
        calibrate it first. Under shift an estimate can be wrong; its interval says how far it depends on the draw.

        Raises:
            ValueError: If the suite has no validation set.
        """
        home = self._home(self._memory.of(self.model))
        held = home.held_out("Validation")
        away = self.embed({"": data}, title)[""][0]
        own = getattr(base_model(self.model), "density", None)
        calibrator = self.calibrator if own is None else own
        return estimated(held, (SetLogits(away, home.head, data), away), calibrator, link=self.link)

    def sets(self, data: ShiftSet, score: str = "aps", title: str = "Prediction") -> NDArray[np.bool_]:
        """Return which classes are in the conformal set of each image: ``(n, labels)`` bool.

        The thresholds are those of the record of :meth:`calibrate`, of the probabilities that the model and its
        calibrator give. They hold at home; under shift coverage was measured by :meth:`evaluate`, and is no promise.

        Args:
            data: With or without labels, of the classes that the model was calibrated with.
            score: "aps", whose sets grow where the model is less sure, or "lac".
            title: Of the bar.
        Raises:
            RuntimeError: If the model was not calibrated, or on too few images for conformal sets.
            ValueError: If there is no such score.
        """
        network = base_model(self.model)
        kept = conformal_of(network, score)
        embeds = self.embed({"": data}, title)[""][0]
        logits = SetLogits(embeds, self.head(self._memory.of(self.model)), data)
        calibrator = self.calibrator if getattr(network, "density", None) is None else network.density
        scaling = {} if calibrator is None else {"row_temperature": calibrator.temperature(embeds)}
        return sets_of(kept, logits, scaling, link=self.link)

    def calibrate(self, method: str | None = None, images: ShiftSet | None = None) -> dict[str, Any]:
        """Fit the temperature on the validation set and put it into the model's weights; accuracy stays.

        After an :meth:`evaluate` of the same weights no image and no caption is embedded again.

        Args:
            method: "temperature": the best one for the validation set; where data shift it is too low. "perturbed": one
                for it and for perturbed copies of its images. "density": that of "temperature", and `calibrator`,
                which divides the logits of each image once more. "target": one (for SigLIP a bias) with which the mean
                confidence of `images` is their estimated accuracy, and a calibrator. ``None``: the evaluator's own.
            images: Of the place of use, for "target"; their labels are not read. A set of these images is no evidence
                for what was fitted on them: :meth:`evaluate` says so and leaves it out of the mean over the shifts.

        Returns:
            The record that is kept in ``config.calibration``: temperature, bias (SigLIP), split, size, criterion,
            bounds and whether the temperature is at one, templates, class names, method, which perturbed copies it has
            seen, the target's hash, size and estimated accuracy, ``nll`` and ``ece`` of the split before and after, and
            the conformal sets that were fitted on it.
        Raises:
            RuntimeError: If the model is calibrated already.
            ValueError: If it is in half precision, images are missing or too many, or the suite has no validation set,
                or for "density" no training set.
        """
        method = self.method if method is None else method
        check_request(self.model, method, images)
        check_home(self.suite.validation, self._train, method)
        return calibrate(
            self._home(self._memory.of(self.model)),
            self.model,
            method,
            classes=self.suite.class_names,
            templates=self.suite.templates,
            n_bins=self.n_bins,
            alpha=self.alpha,
            images=images,
        )

    def _home(self, known: dict[str, tuple[Any, ...]]) -> HomeFit:
        """What fits on held-out home data; ``known`` of the weights as they are."""
        return HomeFit(
            validation=self.suite.validation,
            train=self._train,
            embed=self.embed,
            head=self.head(known),
            embedder=self.embedder,
            link=self.link,
            criterion=self.criterion,
            bounds=scaling_bounds(self.bounds, self.link),
            memory=self._memory,
            known=known,
        )

    @property
    def calibrator(self) -> DensityCalibrator | None:
        """Of the latest :meth:`calibrate` by "density" or "target": of the logits as the weights give them now."""
        return self._memory.calibrator

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
            return head_of(self.model)
        if known.get("classes", (None,))[0] is not self.captions:
            with self.embedder.autocast():
                known["classes"] = (self.captions, self._class_embeddings(self.model, self.captions))
        return head_of(self.model, known["classes"][1])

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
        logits = {name: SetLogits(parts[name][0], head, data) for name, data in sets.items()}
        return logits, {name: settled(logits[name], labels[name], data) for name, data in sets.items()}


def _options(
    sets: Mapping[str, ShiftSet], labels: Mapping[str, Tensor], common: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The keywords of `measure` by set; on the validation set what was fitted on it is not measured."""
    groups = {name: groups_of(data, labels[name]) for name, data in sets.items()}
    options = {name: {**common, "groups": groups[name], "scalings": made[name]} for name in sets}
    if "validation" in options:
        options["validation"] |= {"scalings": {}, "sets": {}}
    return options
