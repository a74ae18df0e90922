"""WiSE-FT: the models on the line from a zero-shot to a fine-tuned one, each with its own temperature.

    carot_hf interpolate --fine_tuned out/carot --suite digits --output_dir out/wise
    carot_hf interpolate --fine_tuned out/carot --suite digits --output_dir out/half --alpha 0.5 --save

takes about a minute and a half on two cores without a GPU and prints one row for each alpha, the weight of the
fine-tuned end: accuracy and ECE in distribution (ID) and as mean over the shifted sets (OOD), the ECE without and with
the temperature T. T is fitted anew for each alpha, on the validation split: averaging weights changes the confidence.

The ends are merged without temperatures: one that is baked into an end is taken out first. The fine-tuned end may be a
CLIPModel or a CLIPClassifier (presets ft, ft-ls, lp-ft); for a classifier the zero-shot end gets the suite's head.

In the output folder: sweep.json (all metrics), sweep.csv (the table) and with --save the merged model of --alpha,
calibrated, with its processor, in model/. Alpha is a choice like any other: fix it beforehand (0.5 is WiSE-FT's) or
choose it by the validation metrics in sweep.json, never by the shifted sets.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..basics.redaction import HIDDEN, public_words
from ..basics.whole_file import whole_file, whole_files, write_whole
from .data_options import LOCAL_NAME, METHODS, OF_THE_SUITE, add_suite_options, start_model_of, suite_options
from .demo import COLUMNS
from .parser import Parser

if TYPE_CHECKING:
    from ..data.suite import ShiftSuite
    from ..evaluation.evaluator import Evaluator

SWEEP = tuple(step / 10 for step in range(11))  # WiSE-FT's
TABLE = [
    *COLUMNS,
    ("OOD ECE, perturbed", "eval_ood_ece_pts"),
    ("T", "eval_temperature"),
]


def main(argv: Sequence[str]) -> list[dict[str, float]]:
    """Run the sweep; return what sweep.json holds under "rows"."""
    options = parse(argv)
    from ..run.header import refuse_finished
    from ..run.lock import locked

    if not options.overwrite_output_dir:
        refuse_finished(options.output_dir)
        refuse_finished(options.output_dir / "model")
    if options.zero_shot is None:
        options.zero_shot = recorded_start(Path(options.fine_tuned))
    with locked(options.output_dir):
        return sweep(options, argv)


def sweep(options: argparse.Namespace, argv: Sequence[str]) -> list[dict[str, float]]:
    """Evaluate each mixture, write the table, save the wanted one."""
    from ..evaluation.evaluation import comparison_table
    from ..evaluation.oracle import oracle_metrics
    from ..models.classifier import CLIPClassifier
    from ..models.merging import alpha_sweep, interpolate
    from ..models.prepare import captions_of, zero_shot_classifier
    from ..suites.load import load_suite
    from .models import processor_of

    suite = load_suite(options.suite, **suite_options(options))
    zero_shot, fine_tuned = (load_end(end) for end in (options.zero_shot, options.fine_tuned))
    processor = processor_of(options.fine_tuned)
    if isinstance(fine_tuned, CLIPClassifier) and not isinstance(zero_shot, CLIPClassifier):
        zero_shot = zero_shot_classifier(zero_shot, suite, captions_of(zero_shot, suite, processor))
    rows: list[dict[str, float]] = []
    intervals = {}
    for alpha, model in alpha_sweep(zero_shot, fine_tuned, options.alphas):
        evaluator = evaluator_of(model, suite, processor, options)
        found = evaluator.evaluate()
        metrics = found.flat()
        oracle = oracle_metrics(evaluator, suite, found.marks) if options.oracle else {}
        rows.append({"alpha": alpha, **metrics, **oracle})
        intervals[f"alpha {alpha:g}"] = {
            f"eval_id_{name}": ends for name, ends in found.intervals.get(suite.test.name, {}).items()
        }
        print(f"alpha {alpha:g}: T {metrics['eval_temperature']:.3f}", flush=True)
    write(rows, list(argv), options.output_dir)
    print("\n" + comparison_table({f"alpha {row['alpha']:g}": row for row in rows}, TABLE, intervals))
    print(f"\nSaved to {options.output_dir}")
    if options.save:
        save(interpolate(zero_shot, fine_tuned, options.alpha), suite, processor, options)
    return rows


def save(merged: Any, suite: ShiftSuite, processor: Any, options: argparse.Namespace) -> None:
    """Calibrate the model of ``--alpha`` and save it."""
    evaluator = evaluator_of(merged, suite, processor, options)
    record = evaluator.calibrate()
    with whole_files(options.output_dir / "model") as beside:
        merged.save_pretrained(beside)
        processor.save_pretrained(beside)
        if evaluator.calibrator is not None:
            evaluator.calibrator.save_pretrained(beside)
    print(f"The model of alpha {options.alpha:g}, temperature {record['temperature']:.3f}, is in model/")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what is wrong ends here, before anything is loaded."""
    parser = Parser("interpolate", __doc__ or "")
    parser.add_argument("--fine_tuned", required=True, help="the end at alpha 1: folder or name of the model")
    parser.add_argument("--zero_shot", help="the end at alpha 0; default: the model that the run started from")
    parser.add_argument("--output_dir", type=Path, required=True)
    add_suite_options(parser)
    parser.add_argument("--alphas", type=weight, nargs="+", default=list(SWEEP), help="default: 0 to 1 by 0.1")
    parser.add_argument("--alpha", type=weight, default=0.5, help="of the model that --save keeps; default: 0.5")
    parser.add_argument("--save", action="store_true", help="save the model of --alpha, calibrated")
    parser.add_argument("--criterion", default="nll", choices=["nll", "ece"], help="what the temperature minimises")
    parser.add_argument("--calibration_method", default="temperature", choices=METHODS, help="see docs/explanations")
    parser.add_argument("--oracle", action="store_true", help="measure the best temperature for the shifts, too")
    parser.add_argument("--batch_size", type=int, default=256, help="images at a time; default: 256")
    parser.add_argument("--use_cpu", action="store_true", help="leave accelerators alone")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier sweep or model there")
    return parser.read(argv)


def recorded_start(folder: Path) -> str:
    """The model that a run started from, as its own metrics.json says."""
    record = folder / "metrics.json"
    try:
        report = json.loads(record.read_text(encoding="utf-8"))
        here = folder / LOCAL_NAME
        if here.is_file():
            places = json.loads(here.read_text(encoding="utf-8"))
            report |= {key: value for key, value in places.items() if value is not None}
        start, suite = str(report["start_model"]), str(report["suite"])
        if start.startswith(f"{HIDDEN}/"):
            raise KeyError(LOCAL_NAME)  # it was published, and the place stayed where it was
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected {record} to say which model the run started from, got {type(error).__name__}. Name it with "
            "--zero_shot."
        ) from error
    return start_model_of(suite) if start.startswith(OF_THE_SUITE) else start


def weight(text: str) -> float:
    """Read a number in [0, 1]."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a weight in [0, 1], got {text}: it is that of the fine-tuned end")
    return value


def load_end(name: str) -> Any:
    """Load an end in float32, without a baked temperature."""
    from ..calibration.record import unbake_temperature
    from .models import model_of

    model = model_of(name)
    if getattr(model.config, "calibration", None) is not None:
        print(f"{name} is calibrated: its temperature is taken out before merging, and fitted anew for each alpha.")
        unbake_temperature(model)
    return model


def evaluator_of(model: Any, suite: ShiftSuite, processor: Any, options: argparse.Namespace) -> Evaluator:
    """Make an evaluator of a mixture, on the accelerator that there is."""
    from accelerate import PartialState

    from ..evaluation.evaluator import Evaluator

    device = PartialState(cpu=options.use_cpu).device
    chosen = {"criterion": options.criterion, "method": options.calibration_method}
    return Evaluator(model, processor, suite, batch_size=options.batch_size, device=device, **chosen)


def write(rows: Sequence[dict[str, float]], argv: Sequence[str], folder: Path) -> None:
    """Write all metrics as JSON and the table as CSV."""
    report = {"command": shlex.join(["carot_hf", "interpolate", *public_words(argv)]), "rows": rows}
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # nan, e.g. an AUROC without errors
    write_whole(folder / "sweep.json", json.dumps(report, indent=2) + "\n")
    keys = ["alpha", *(key for _, key in TABLE)]
    with whole_file(folder / "sweep.csv") as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
