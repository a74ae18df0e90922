"""A classifier as an ONNX file, for onnxruntime without torch: pixels in, probabilities out, the facts inside."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from ..basics.escape import guarded
from ..calibration.record import calibration_record
from ..data.transforms import ImageTransform
from .classifier import CLIPClassifier

logger = guarded(logging.getLogger(__name__))

OPSET = 18  # the exporter's own; onnxruntime 1.14 and later know it
TOLERANCE = 1e-4  # largest difference between probabilities of torch and of onnxruntime
_ONE_FILE = 2**31 - 2**24  # bytes of weights; protobuf holds less than 2 GiB
_CHECKED_BATCH = 3  # not the batch that it is traced with


def export_onnx(classifier: CLIPClassifier, processor: Any, path: str | Path, *, check: bool = True) -> Path:
    """Write a classifier to an ONNX file.

    Input ``pixel_values``: ``(batch, 3, height, width)`` float32, any batch. Outputs ``probabilities``, the softmax
    (the temperature is in the head already), and ``logits``: ``(batch, K)`` float32 both. The file carries, as JSON in
    its metadata, ``class_names`` (in the order of the columns), ``preprocessing`` (``size``, the short side after
    the resize; ``crop``, height and width; ``resample``; ``mean`` and ``std`` of values in [0, 1]; ``mode``) and
    ``calibration`` (the record of the temperature, or ``null``). Weights of 2 GiB or more, which no such file can hold,
    go into ``<path>.data`` beside it; keep the two together.

    Args:
        classifier: For instance of :meth:`carot_hf.CaRotTrainer.export_classifier`. It stays as it is.
        processor: The model's ``CLIPProcessor`` or its image processor.
        path: The file, e.g. ``out/model.onnx``; its folder is made.
        check: Compare with torch, by onnxruntime on random pixels.
    Returns:
        The path.
    Raises:
        TypeError: If the model is not a classifier.
        ValueError: If the processor does not do what CLIP's does, or crops to another size than the model's.
        ImportError: If onnx, onnxscript or onnxruntime is missing.
        RuntimeError: If the probabilities of the file differ from those of the model by more than 1e-4.
    """
    if not isinstance(classifier, CLIPClassifier):
        cure = (
            "Make a classifier of a CLIPModel with `trainer.export_classifier()`, or with `carot_hf.export_classifier`."
            if isinstance(classifier, CLIPModel)
            else "Unwrap the model (`accelerator.unwrap_model`), or load it with CLIPClassifier.from_pretrained."
        )
        raise TypeError(f"Expected a CLIPClassifier, got {type(classifier).__name__}. {cure}")
    transform = ImageTransform.from_processor(processor)
    vision: Any = classifier.config.vision_config
    side = vision.image_size
    if transform.crop != (side, side):
        raise ValueError(
            f"Expected a processor that crops to the model's {side} x {side} pixels, got {transform.crop}. Pass the "
            "processor of this model."
        )
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        _import(name)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    network = _Outputs(copy.deepcopy(classifier).to("cpu", torch.float32)).eval()
    external = sum(weight.nbytes for weight in network.state_dict().values()) >= _ONE_FILE
    program = _traced(network, side)
    program.model.metadata_props.update(_facts(classifier, transform))
    for node in program.model.graph.all_nodes():  # where torch notes the source files of this machine
        node.metadata_props.clear()
    program.save(path, external_data=external)
    _import("onnx").checker.check_model(str(path), full_check=True)
    if external:
        logger.info("The weights, 2 GiB or more, are in %s.data: keep it beside %s.", path.name, path.name)
    if check:
        _compare(network, path, side)
    return path


class _Outputs(nn.Module):
    """Pixels to probabilities and logits."""

    def __init__(self, classifier: CLIPClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output: Any = self.classifier(pixel_values, return_dict=True)
        return output.logits.softmax(dim=-1), output.logits


def _traced(network: nn.Module, side: int) -> Any:
    """The program, of any batch."""
    # Workaround, torch 2.13: the exporter warns that torchvision is missing, and of its own deprecations. Until: it is
    # silent about what no caller can change.
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                network,
                (torch.zeros(2, 3, side, side),),
                input_names=["pixel_values"],
                output_names=["probabilities", "logits"],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        registration.setLevel(level)


def _facts(classifier: CLIPClassifier, transform: ImageTransform) -> dict[str, str]:
    names: Any = classifier.config.id2label
    preprocessing = {
        "mode": "RGB",
        "size": transform.crop if transform.size is None else transform.size,
        "crop": transform.crop,
        "resample": Image.Resampling(transform.resample).name.lower(),
        "mean": transform.mean,
        "std": transform.std,
    }
    facts = {
        "class_names": [names[index] for index in range(len(names))],
        "preprocessing": preprocessing,
        "calibration": calibration_record(classifier),
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}


def _compare(network: nn.Module, path: Path, side: int) -> None:
    """Raise unless the file gives the network's probabilities."""
    session = _import("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = torch.randn(_CHECKED_BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(pixels)[0]
    got = torch.from_numpy(session.run(["probabilities"], {"pixel_values": pixels.numpy()})[0])
    difference = float((got - expected).abs().max())
    if not difference <= TOLERANCE:
        path.unlink()
        raise RuntimeError(
            f"Expected probabilities within {TOLERANCE} of the model's from {path}, got a difference of "
            f"{difference:.3g}; the file is removed. Try other versions of torch, onnxscript and onnxruntime."
        )
    logger.info("Probabilities of %s and of the model differ by at most %.2g.", path.name, difference)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Expected the package {name} for the export to ONNX, got {error}. Install it with "
            "`pip install carot_hf[onnx]`."
        ) from error
