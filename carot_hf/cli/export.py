"""``carot_hf export MODEL --output F``: calibrated probabilities without this library.

    carot_hf export out/carot --suite digits --output out/carot.onnx     # for onnxruntime alone
    carot_hf export out/carot --suite digits --output out/classifier     # for transformers' image-classification

takes some seconds. A CLIP becomes a classifier of the classes that it was calibrated for, or of --suite, with
the mean over the captions; a CLIPClassifier (presets ft, ft-ls, lp-ft) is taken as it is, and a --suite must have its
classes. A density calibrator goes along. ONNX needs `pip install carot_hf[onnx]` (docs/use_without_us.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_options import add_model_options, add_suite_options, parts_of_no_suite, suite_options
from .parser import Parser

if TYPE_CHECKING:
    from ..data.suite import ShiftSuite
    from ..models.classifier import CLIPClassifier


def main(argv: Sequence[str]) -> Path:
    """Write the file or folder; return its path."""
    options = parse(argv)
    place: Path = options.output
    if place.exists() and not options.overwrite_output_dir:
        raise ValueError(f"Expected a new --output, got {place}, which there is. Add --overwrite_output_dir.")
    from ..models.onnx import export_onnx
    from ..suites.load import load_suite
    from .models import load, save

    suite = None if options.suite is None else load_suite(options.suite, **suite_options(options))
    options.device = "cpu"
    loaded = load(options.model, options)
    classifier = classifier_of(loaded, options.model, suite)
    if place.suffix == ".onnx":
        export_onnx(classifier, loaded.processor, place)
        print(f"{place}: {place.stat().st_size / 1e6:.1f} MB, its probabilities are those of the model")
        return place
    save(place, classifier, loaded.processor)
    print(f"{place}: a CLIPClassifier of {classifier.config.num_labels:,} classes")
    return place


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("export", __doc__ or "")
    add_model_options(parser, nargs="?")
    parser.add_argument("--model", dest="named", help=argparse.SUPPRESS)  # as of the script
    parser.add_argument("--output", type=Path, required=True, help="a file .onnx, or a folder for a CLIPClassifier")
    add_suite_options(parser, None, instead="what the model was made for")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace what is there")
    options = parser.read(argv)
    options.model = options.model or options.named
    if options.model is None:
        parser.error("expected a model, got none")
    if message := parts_of_no_suite(options):
        parser.error(message)
    if options.device not in (None, "cpu"):
        parser.error(f"expected no --device, or cpu, got {options.device}: an export is made on the CPU")
    return options


def classifier_of(loaded: Any, name: str, suite: ShiftSuite | None) -> CLIPClassifier:
    """Make a classifier of a model that has none, of the classes of a suite, or of those that it was calibrated for."""
    import torch

    from ..calibration.record import calibration_record
    from ..data.captions import CaptionTable, class_embeddings
    from ..models.classifier import CLIPClassifier, export_classifier
    from .models import check_classes, classes_of

    if isinstance(loaded.model, CLIPClassifier):
        if suite is not None:
            check_classes(loaded, suite.class_names)
        return loaded.model
    record = calibration_record(loaded.model)
    if suite is None:
        names, templates = classes_of(loaded, name)
    else:
        names, templates = list(suite.class_names), list(suite.templates)
    if record is None:
        print("The model is not calibrated: no temperature is in its weights.")
    elif record.get("templates", templates) != templates:
        print("The temperature was fitted with other captions than these: the probabilities are less calibrated.")
    captions = CaptionTable(loaded.processor, names, templates, loaded.model.config.text_config.max_position_embeddings)
    with torch.no_grad():
        classifier = export_classifier(loaded.model, class_embeddings(loaded.model, captions), names)
    if loaded.calibrator is not None:
        classifier.attach_density(loaded.calibrator)
    return classifier
