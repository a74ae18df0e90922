"""Pipelines of calibrated models: the stock ones, with a density calibrator where there is one beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, ZeroShotImageClassificationPipeline

from ..basics.precision import at_least_float32
from ..calibration.density import DensityCalibrator
from ..calibration.record import needs_calibrator
from .backbones import backbone_of, embedding_size
from .classifier import CLIPClassifierConfig, check_tower


class CalibratedZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """transformers' zero-shot pipeline, in which a temperature of each image divides the logits.

    Accuracy and the order of the labels are those of the stock pipeline.

    Args:
        calibrator: Made by ``calibrate("density")`` with the model.
        *args: As for transformers' pipeline.
        **kwargs: Likewise.
    Raises:
        ValueError: If the calibrator is of another image tower.
    """

    def __init__(self, *args: Any, calibrator: DensityCalibrator, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_tower(calibrator, self.model, embedding_size(self.model))
        if backbone_of(self.model).link != calibrator.link:
            raise ValueError(f"Expected a calibrator of this model, got one of the {calibrator.link}. It is another's.")
        self.calibrator = calibrator

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        labels, texts = model_inputs.pop("candidate_labels"), model_inputs.pop("text_inputs")
        text = texts[0] if hasattr(texts[0], "keys") else texts[0][0]  # the latter with a `batch_size`
        outputs = self.model(**text, **model_inputs)
        divisor = self.calibrator.temperature(outputs.image_embeds)[:, None]
        return {"candidate_labels": labels, "logits": at_least_float32(outputs.logits_per_image) / divisor}


def pipeline(name: str | Path, *, revision: str | None = None, token: str | bool | None = None, **options: Any) -> Any:
    """Return the pipeline of a saved model: zero-shot, or of its own classes if it is a `CLIPClassifier`.

    A model that was calibrated by density gets its calibrator; any other gives what the stock pipeline gives.

    Args:
        name: A folder, or an id on the Hub.
        revision: Of the repository.
        token: For a private one.
        **options: As for ``transformers.pipeline``, e.g. ``device``.
    Raises:
        FileNotFoundError: If the model says that it was calibrated by density, and there is no calibrator.
        ValueError: If that is of another image tower.
    """
    place = str(name)
    from_hub: dict[str, Any] = {"revision": revision, "token": token}
    config = AutoConfig.from_pretrained(place, **from_hub)  # nosec B615  # the user's choice; JSON, no code is run
    options = {"model": place, "dtype": torch.float32, **options} | from_hub
    task = "image-classification" if isinstance(config, CLIPClassifierConfig) else "zero-shot-image-classification"
    record = getattr(config, "calibration", None)
    if not needs_calibrator(record) or getattr(config, "density", None) is not None:
        return transformers.pipeline(task, **options)
    calibrator = DensityCalibrator.from_pretrained(name, **from_hub)
    if isinstance(config, CLIPClassifierConfig):
        made = transformers.pipeline(task, **options)
        made.model.attach_density(calibrator)
        return made
    return transformers.pipeline(task, pipeline_class=CalibratedZeroShotPipeline, calibrator=calibrator, **options)
