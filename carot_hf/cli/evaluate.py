"""``carot_hf evaluate MODEL --suite S``: accuracy and calibration of a checkpoint, as it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..basics.escape import printable
from ..basics.whole_file import write_whole
from .data_options import add_model_options, add_suite_options, suite_options
from .parser import Parser, positive

METRICS, FIGURES, GROUPS = "metrics.json", "per_class.csv", "groups.csv"
CONFUSION, DIAGRAMS = "confusion.png", "reliability.png"
WORST = 10  # classes that are shown
_HELP = """Accuracy and calibration of a checkpoint on the sets of a suite, with the temperature that is in its weights
and the calibrator beside it. A test set is enough. Trains nothing and writes no model: tables, metrics.json, figures of
each class (per_class.csv) and of each group (groups.csv) if there are any, answers to each image
(per_image.safetensors, for carot_hf compare), reliability diagrams and confusion matrices."""


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parse(argv)
    place = options.output_dir
    from ..evaluation.per_image_file import PER_IMAGE_NAME

    if place is not None and not options.overwrite_output_dir:
        refuse_written(place, (METRICS, FIGURES, GROUPS, CONFUSION, DIAGRAMS, PER_IMAGE_NAME))
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.memory import Memory
    from ..evaluation.per_group import groups_table
    from ..suites.load import load_suite
    from .models import check_classes, load

    suite = load_suite(options.suite, **suite_options(options))
    loaded = load(options.model, options)
    check_classes(loaded, suite.class_names)
    memory = Memory(calibrator=loaded.calibrator)
    evaluator = Evaluator(
        loaded.model,
        loaded.processor,
        suite,
        batch_size=options.batch_size,
        n_bins=options.n_bins,
        memory=memory,
        keep_heads=True,
    )
    found = evaluator.evaluate(options.sets, calibrator=loaded.calibrator)
    per_image = loaded.calibrator is not None or getattr(loaded.model, "density", None) is not None
    method = "density" if per_image else ""
    print(found.table())
    figures = figures_of(suite, found, method)
    if suite.test.name in figures:
        print(f"\n{worst_of(suite.test.name, figures[suite.test.name])}")
    groups = groups_of(suite, found, method, options.n_bins)
    for name, own in groups.items():
        print(f"\nThe groups of {name}, the lowest accuracy first (of few images the ECE is high by chance):")
        print(groups_table(own))
    if place is not None:
        keep(place, suite, found, figures, method, groups)
        names = ", ".join(sorted(printable(path.name) for path in place.iterdir()))
        print(f"\nSaved to {printable(place)}: {names}")


def figures_of(suite: Any, found: Any, method: str) -> dict[str, Any]:
    """Figures of the classes of each set, by what the checkpoint answers; none where several labels are right."""
    from ..evaluation.per_class import class_figures
    from ..evaluation.per_image import ending_of, label_names

    figures = {}
    for name, part in found.per_image.items():
        if suite.evaluation_sets[name].right is not None:
            continue
        confidences = part.confidences.get(ending_of(method), part.confidences[""])  # validation has no further ones
        names = label_names(suite.evaluation_sets[name], suite.class_names)
        figures[name] = class_figures(part.labels, part.predicted, confidences, names)
    return figures


def groups_of(suite: Any, found: Any, method: str, n_bins: int) -> dict[str, Any]:
    """Figures of the groups of each set that has some, by what the checkpoint answers to each image."""
    from ..evaluation.per_group import group_figures
    from ..evaluation.per_image import ending_of

    figures = {}
    for name, part in found.per_image.items():
        groups = suite.evaluation_sets[name].groups
        if groups is not None:
            confidences = part.confidences.get(ending_of(method), part.confidences[""])
            figures[name] = group_figures(groups, confidences, part.hits, n_bins)
    return figures


def worst_of(name: str, figures: Any) -> str:
    """The classes of a set that are recognised least often, as a title and a table."""
    from ..evaluation.per_class import per_class_table

    many = len(figures.names) > WORST
    which = f"The {WORST} of {len(figures.names):,} classes" if many else "The classes"
    return f"{which} of {name}, the lowest recall first:\n{per_class_table(figures, WORST if many else None)}"


def keep(place: Path, suite: Any, found: Any, figures: Any, method: str, groups: Any) -> None:
    """Write the numbers, metrics.json last of them, and then the pictures."""
    from ..evaluation.confusion import write_confusion
    from ..evaluation.diagrams import can_draw, diagram_tables, keep_diagrams
    from ..evaluation.per_class import per_class_csv
    from ..evaluation.per_group import groups_csv
    from ..evaluation.per_image import ending_of
    from ..evaluation.per_image_file import write_per_image

    place.mkdir(parents=True, exist_ok=True)
    write_per_image(place, found.per_image, method)
    write_whole(place / FIGURES, per_class_csv(figures))
    if groups:
        write_whole(place / GROUPS, groups_csv(groups))
    facts = {"suite": suite.name, "suite_sha256": suite.content_hash, "answers": ending_of(method)}
    write_whole(place / METRICS, json.dumps({**facts, **json.loads(found.to_json())}, indent=2) + "\n")
    if can_draw():
        keep_diagrams(place / DIAGRAMS, diagram_tables(found.bins, found.bins_dts, None))
        write_confusion(
            place / CONFUSION, {name: (found.per_image[name], part.names) for name, part in figures.items()}
        )


def refuse_written(place: Path, names: Sequence[str]) -> None:
    """Raise a ValueError if files of an earlier call are there."""
    there = [name for name in names if (place / name).exists()]
    if there:
        raise ValueError(f"Expected a new --output_dir, got {place}, with {there[0]}. Add --overwrite_output_dir.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("evaluate", _HELP)
    add_model_options(parser)
    add_suite_options(parser, None, required=True)
    parser.add_argument("--sets", nargs="+", help="names of its sets; default: all")
    parser.add_argument("--output_dir", type=Path, help="where the files go; default: nowhere")
    parser.add_argument("--n_bins", type=int, default=10, help="confidence bins of the ECE; default: 10")
    parser.add_argument("--batch_size", type=positive, help="images at a time; default: 256, on a CPU 32")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the files of an earlier call there"
    )
    return parser.read(argv)
