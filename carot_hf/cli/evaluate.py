"""``carot_hf evaluate MODEL --suite S``: accuracy and calibration of a checkpoint, as it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..basics.whole_file import write_whole

_HELP = """Accuracy and calibration of a checkpoint on the sets of a suite, with the temperature that is in its weights
and the calibrator beside it. A test set is enough. Trains nothing and writes no model: a table, metrics.json and
reliability diagrams."""


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parse(argv)
    place = options.output_dir
    if place is not None and (place / "metrics.json").exists() and not options.overwrite_output_dir:
        raise ValueError(f"Expected a new --output_dir, got {place}, with metrics.json. Add --overwrite_output_dir.")
    from ..evaluation.diagrams import can_draw, diagram_tables, keep_diagrams
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.memory import Memory
    from ..suites.load import load_suite
    from .models import check_classes, load

    suite = load_suite(options.suite)
    loaded = load(options.model, options.device)
    check_classes(loaded, suite.class_names)
    memory = Memory(calibrator=loaded.calibrator)
    evaluator = Evaluator(
        loaded.model, loaded.processor, suite, batch_size=options.batch_size, n_bins=options.n_bins, memory=memory
    )
    found = evaluator.evaluate(options.sets, calibrator=loaded.calibrator)
    print(found.table())
    if place is None:
        return
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / "metrics.json", found.to_json() + "\n")
    if can_draw():
        keep_diagrams(place / "reliability.png", diagram_tables(found.bins, found.bins_dts, None))
    print(f"\nSaved to {place}: {', '.join(sorted(path.name for path in place.iterdir()))}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="carot_hf evaluate", description=_HELP, allow_abbrev=False)
    parser.add_argument("model", help="folder, or id on the Hub")
    parser.add_argument("--suite", required=True, help="digits, imagenet, a YAML file, or a folder")
    parser.add_argument("--sets", nargs="+", help="names of its sets; default: all")
    parser.add_argument("--output_dir", type=Path, help="where metrics.json and the diagrams go; default: nowhere")
    parser.add_argument("--n_bins", type=int, default=10, help="confidence bins of the ECE; default: 10")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time; default: 64")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier metrics.json there")
    return parser.parse_args(argv)
