"""A saved or pushed model as an ONNX file: calibrated probabilities by onnxruntime alone (docs/use_without_us.md).

    python examples/export_onnx.py --model out/carot --suite digits --output out/carot.onnx

takes some seconds. A CLIPModel becomes a classifier of the suite's classes, with the mean over the suite's captions; a
CLIPClassifier (presets ft, ft-ls, lp-ft) is taken as it is and needs no suite. Needs `pip install carot_hf[onnx]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import add_suite_options, run, suite_options
from transformers import AutoConfig, CLIPModel, CLIPProcessor

from carot_hf import CLIPClassifier, export_classifier, export_onnx, load_suite
from carot_hf.data.captions import CaptionTable, class_embeddings


def main(argv: Sequence[str]) -> Path:
    """Write the file; return its path."""
    options = parse(argv)
    if options.output.exists() and not options.overwrite_output_dir:
        raise ValueError(f"Expected a new file, got {options.output}, which there is. Add --overwrite_output_dir.")
    processor = CLIPProcessor.from_pretrained(options.model)  # nosec B615  # the user's own model
    path = export_onnx(classifier_of(options, processor), processor, options.output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, its probabilities are those of the model")
    return path


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name on the Hub, with its processor")
    add_suite_options(parser, None)  # of a CLIPModel: class names and captions
    parser.add_argument("--output", type=Path, required=True, help="the file")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace a file that there is")
    return parser.parse_args(argv)


def classifier_of(options: argparse.Namespace, processor: CLIPProcessor) -> CLIPClassifier:
    """Load the model; make a classifier of a CLIPModel."""
    if AutoConfig.from_pretrained(options.model).model_type == "clip_classifier":  # nosec B615  # JSON; no code is run
        classifier: CLIPClassifier = CLIPClassifier.from_pretrained(options.model, dtype=torch.float32)
        return classifier
    model = CLIPModel.from_pretrained(options.model, dtype=torch.float32)  # nosec B615  # the user's own model
    if options.suite is None:
        raise ValueError("Expected --suite for a CLIPModel, got none. It has the class names and the captions.")
    suite = load_suite(options.suite, **suite_options(options))
    record = getattr(model.config, "calibration", None)
    if record is None:
        print("The model is not calibrated: no temperature is in its weights.")
    elif record.get("templates", suite.templates) != suite.templates:
        print(
            "The temperature was fitted with other captions than this suite's: the probabilities are less calibrated."
        )
    context = model.config.text_config.max_position_embeddings
    captions = CaptionTable(processor, suite.class_names, suite.templates, context)
    with torch.no_grad():
        return export_classifier(model, class_embeddings(model, captions), suite.class_names)


if __name__ == "__main__":
    run(main)
