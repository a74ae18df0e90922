"""``carot_hf calibrate MODEL --suite S --output_dir D``: a calibrated copy of a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from .data_options import METHODS, add_model_options, add_suite_options, suite_options, suite_words
from .parser import Parser, positive

_HELP = """Fit on the held-out images of a suite what makes a checkpoint's confidences right; write a calibrated copy.
Accuracy stays. A temperature that is in the weights already is taken out and fitted anew."""


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parse(argv)
    from ..run.header import refuse_finished
    from ..run.lock import locked

    if not options.overwrite_output_dir:
        refuse_finished(options.output_dir)
    with locked(options.output_dir):
        work(options)


def work(options: argparse.Namespace) -> None:
    """Fit, and write the copy."""
    from ..calibration.record import calibration_record, unbake_temperature
    from ..data.pictures import PictureRows
    from ..data.shift_set import ShiftSet
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.fitting import check_home
    from ..suites.load import load_suite
    from ..suites.pictures import pictures_of
    from .models import check_classes, load, save

    images = None
    suite = load_suite(options.suite, **suite_options(options))
    check_home(suite.validation, suite.train, options.method)
    if options.images:
        images = ShiftSet(
            PictureRows(pictures_of(options.images)),
            name="target",
            num_classes=len(suite.class_names),
            label_column=None,
        )
    loaded = load(options.model, options)
    check_classes(loaded, suite.class_names)
    if getattr(loaded.model, "density", None) is not None:
        loaded.model.drop_density()
    if calibration_record(loaded.model) is not None:
        print("The temperature that is in the weights is taken out and fitted anew.")
        unbake_temperature(loaded.model)
    evaluator = Evaluator(loaded.model, loaded.processor, suite, batch_size=options.batch_size, keep_heads=True)
    record = evaluator.calibrate(options.method, images)
    save(options.output_dir, loaded.model, loaded.processor, evaluator.calibrator)
    print(
        f"T = {record['temperature']:.3f} by {record['n']:,} held-out images: NLL {record['nll_before']:.4f} -> "
        f"{record['nll_after']:.4f}, ECE {record['ece_before']:.4f} -> {record['ece_after']:.4f} on them"
    )
    print(f"Saved to {options.output_dir}: carot_hf evaluate {options.output_dir} {shlex.join(suite_words(options))}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("calibrate", _HELP)
    add_model_options(parser)
    add_suite_options(parser, None, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the calibrated copy")
    parser.add_argument(
        "--method",
        choices=(*METHODS, "target"),
        default="temperature",
        help="temperature: right at home; perturbed: one for home and away; density: one for each image; target: for "
        "--images; default: temperature",
    )
    parser.add_argument("--images", nargs="+", type=Path, help="of the place of use, with --method target; no labels")
    parser.add_argument("--batch_size", type=positive, help="images at a time; default: 256, on a CPU 32")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace a model that is there")
    options = parser.read(argv)
    if (options.method == "target") != bool(options.images):
        parser.error("expected --images with --method target, and with no other")
    return options
