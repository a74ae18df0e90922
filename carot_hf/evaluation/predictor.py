"""Predictor: what a calibrated model says of images without labels, some at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.conformal import ConformalSets
from ..calibration.density import DensityCalibrator
from ..calibration.links import at_scaling, check_link, chunk_of
from ..calibration.record import calibration_record, kept_sets
from ..data.captions import CaptionTable, class_embeddings
from ..data.images import BadImageError
from ..data.pictures import Picture, PictureRows
from ..data.shift_set import ShiftSet
from ..models.backbones import backbone_of, caption_options
from ..models.classifier import CLIPClassifier
from .embed import embedder_of
from .kept_heads import kept_class_embeddings
from .logits import SetLogits, head_of


@dataclass(frozen=True)
class Prediction:
    """What is said of one image.

    Attributes:
        image: Its name: where it is.
        label: The likeliest class.
        confidence: Its probability, calibrated as the model is.
        second: The next one, and
        second_confidence: its probability.
        classes: The conformal set by "aps", in the order of the classes; ``None``: the model has no thresholds.
        distance: From the images of the training, in standard deviations from the mean of home; ``None``: the model has
            no bank.
    """

    image: str
    label: str
    confidence: float
    second: str
    second_confidence: float
    classes: tuple[str, ...] | None
    distance: float | None


class Predictor:
    """Says of images what class they are of.

    Args:
        model: A ``CLIPModel`` or one of its relatives, or a `CLIPClassifier`.
        processor: The model's.
        class_names: Names of the classes, in the order of the labels.
        templates: Captions with ``{}`` for the name; of a `CLIPClassifier` nothing depends on them.
        calibrator: Divides the logits of each image; ``None``: nothing does.
        batch_size: Images at a time; ``None``: 64, on a CPU 32.
        keep_heads: As of an :class:`~carot_hf.Evaluator`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        class_names: Sequence[str],
        templates: Sequence[str],
        *,
        calibrator: DensityCalibrator | None = None,
        batch_size: int | None = None,
        keep_heads: bool = False,
    ) -> None:
        self.model, self.class_names = model, list(class_names)
        own = getattr(model, "density", None)
        self.calibrator = calibrator if own is None else own
        self._embedder = embedder_of(model, processor, batch_size, most=64, skip=True)
        if isinstance(model, CLIPClassifier):
            self._link, self._head = "softmax", head_of(model)
        else:
            options = caption_options(model.config, processor.tokenizer)
            captions = CaptionTable(processor.tokenizer, self.class_names, templates, **options)
            embed = kept_class_embeddings if keep_heads else class_embeddings
            with torch.no_grad():
                self._link, self._head = backbone_of(model).link, head_of(model, embed(model, captions))
        record = calibration_record(model)
        known = {} if record is None else kept_sets(record)
        same = record is not None and record.get("classes", self.class_names) == self.class_names
        self._sets: ConformalSets | None = known.get("aps") if same else None

    def predict(self, images: Sequence[Picture]) -> tuple[list[Prediction], list[str]]:
        """Return what is said of images, in their order, and the names of those that cannot be decoded.

        Args:
            images: Of files, or of rows of a table.
        """
        data = ShiftSet(PictureRows(images), name="images", num_classes=len(self.class_names), label_column=None)
        try:
            embeds = self._embedder.embed(self.model, {"images": data})["images"][0]
        except BadImageError:  # not one of them
            self._embedder.bad_images.take()
            return [], [image.name for image in images]
        replaced = set(self._embedder.bad_images.take().get("images", ()))
        found = self._described(images, data, embeds)
        kept = [prediction for row, prediction in enumerate(found) if row not in replaced]
        return kept, [images[row].name for row in sorted(replaced)]

    def _described(self, images: Sequence[Picture], data: ShiftSet, embeds: Tensor) -> list[Prediction]:
        divisors: Mapping[str, Any] = {}
        distances: list[float | None] = [None] * len(images)
        if self.calibrator is not None:
            divisors = {"row_temperature": self.calibrator.temperature(embeds)}
            distances = self.calibrator.distance(embeds).tolist()
        logits = SetLogits(embeds, self._head, data).whole()
        chunk = chunk_of(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        scaled = check_link(self._link).scale(*at_scaling(chunk, divisors, slice(None)))
        values, places = scaled.probabilities.cpu().topk(min(2, len(self.class_names)))
        sets = None if self._sets is None else self._sets.sets(scaled.probabilities.cpu())
        return [
            Prediction(
                image=image.name,
                label=self.class_names[places[row][0]],
                confidence=float(values[row][0]),
                second=self.class_names[places[row][1]],
                second_confidence=float(values[row][1]),
                classes=None if sets is None else tuple(self.class_names[k] for k in sets[row].nonzero()[0].tolist()),
                distance=distances[row],
            )
            for row, image in enumerate(images)
        ]
