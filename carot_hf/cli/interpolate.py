"""WiSE-FT: the models on the line from a zero-shot to a fine-tuned one, each with its own temperature.

    carot_hf interpolate --fine_tuned out/carot --suite digits --output_dir out/wise
    carot_hf interpolate --fine_tuned out/carot --suite digits --output_dir out/half --alpha 0.5 --save
    carot_hf interpolate --fine_tuned out/ft-1 out/ft-2 --method model_stock --output_dir out/stock

takes about a minute and a half on two cores without a GPU and prints one row for each alpha, the weight of the
fine-tuned end: accuracy and ECE at home (`id` in names of metrics) and as mean over the shifted sets (`ood`), the ECE
without and with the temperature T. T is fitted anew for each alpha, on the validation set: averaging weights changes
the confidence.

The ends are merged without temperatures: one that is baked into an end is taken out first. The fine-tuned end may be a
CLIPModel or a CLIPClassifier (presets ft, ft-ls, lp-ft); for a classifier the zero-shot end gets the suite's head.

Model Stock merges two or more fine-tuned models of one start into one, without a choice; VRF keeps both ends and mixes
their probabilities, image by image, by how near an image is to training images that zero-shot had wrong. Each is a row.

In the output folder: sweep.json (all metrics, and k, a, b and temperatures of VRF), sweep.csv (the table) and with
--save the merged model (of --alpha), calibrated, with its processor, in model/. Alpha is a choice like any other: fix
it beforehand (0.5 is WiSE-FT's) or choose it by the validation metrics in sweep.json, never by the shifted sets.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..basics.redaction import HIDDEN, public_words
from ..basics.whole_file import whole_file, write_whole
from .data_options import LOCAL_NAME, METHODS, OF_THE_SUITE, add_suite_options, start_model_of, suite_options
from .demo import COLUMNS
from .parser import Parser, positive

if TYPE_CHECKING:
    from ..data.suite import ShiftSuite
    from ..evaluation.evaluation import Evaluation
    from ..evaluation.evaluator import Evaluator

SWEEP = tuple(step / 10 for step in range(11))  # WiSE-FT's
HALF = 0.5  # its recommendation
WISE, STOCK, VRF = "wise", "model_stock", "vrf"
VRF_OPTIONS = ("k", "a", "b", "choose")  # of `fit_vrf`
TABLE = [
    *COLUMNS,
    ("shifted ECE, perturbed", "eval_ood_ece_pts"),
    ("T", "eval_temperature"),
]


class Mixture(NamedTuple):
    """What was measured of one mixture.

    Attributes:
        title: In the table.
        row: In sweep.json.
        found: The evaluation.
        model: The merged one; ``None``: it is none.
        facts: What it was made with, by a key of sweep.json; ``None``: nothing that it had to find.
    """

    title: str
    row: dict[str, float]
    found: Evaluation
    model: Any = None
    facts: dict[str, Any] | None = None


def main(argv: Sequence[str]) -> list[dict[str, float]]:
    """Run the sweep; return what sweep.json holds under "rows"."""
    options = parse(argv)
    from ..run.header import refuse_finished
    from ..run.lock import locked

    if not options.overwrite_output_dir:
        refuse_finished(options.output_dir)
        refuse_finished(options.output_dir / "model")
    if options.zero_shot is None:
        options.zero_shot = common_start(options.fine_tuned)
    with locked(options.output_dir):
        return sweep(options, argv)


def sweep(options: argparse.Namespace, argv: Sequence[str]) -> list[dict[str, float]]:
    """Evaluate each mixture, write the table, save the wanted one."""
    from ..evaluation.evaluation import comparison_table
    from ..models.classifier import CLIPClassifier
    from ..models.merging import interpolate
    from ..models.prepare import captions_of, zero_shot_classifier
    from ..suites.load import load_suite
    from .models import processor_of

    suite = load_suite(options.suite, **suite_options(options))
    zero_shot, *ends = (load_end(end) for end in (options.zero_shot, *options.fine_tuned))
    processor = processor_of(options.fine_tuned[0])
    if isinstance(ends[0], CLIPClassifier) and not isinstance(zero_shot, CLIPClassifier):
        zero_shot = zero_shot_classifier(zero_shot, suite, captions_of(zero_shot, suite, processor))
    rows: dict[str, dict[str, float]] = {}
    intervals = {}
    measured = mixed_images if options.method == VRF else merged_models
    for mixture in measured(zero_shot, ends, suite, processor, options):
        title, own = mixture.title, mixture.found.intervals.get(suite.test.name, {})
        rows[title] = mixture.row
        intervals[title] = {f"eval_id_{name}": interval for name, interval in own.items()}
        print(f"{title}: T {mixture.row['eval_temperature']:.3f}", flush=True)
    write(list(rows.values()), list(argv), options.output_dir, mixture.facts)  # of VRF, which is one row
    print("\n" + comparison_table(rows, TABLE, intervals))
    print(f"\nSaved to {options.output_dir}")
    if options.save:
        title, model = mixture.title, mixture.model
        if options.method == WISE:
            title, model = f"alpha {options.alpha:g}", interpolate(zero_shot, ends[0], options.alpha)
        keep(model, title, suite, processor, options)
    return list(rows.values())


def merged_models(
    zero_shot: Any, ends: Sequence[Any], suite: ShiftSuite, processor: Any, options: argparse.Namespace
) -> Iterator[Mixture]:
    """Measure each merge, one after the other."""
    from ..evaluation.oracle import oracle_metrics
    from ..models.merging import alpha_sweep
    from ..models.model_stock import model_stock

    if options.method == WISE:
        sweep = ((f"alpha {a:g}", {"alpha": a}, model) for a, model in alpha_sweep(zero_shot, ends[0], options.alphas))
    else:
        sweep = ((title, {}, model_stock(zero_shot, ends)) for title in (options.method,))
    for title, alpha, model in sweep:
        evaluator = evaluator_of(model, suite, processor, options)
        found = evaluator.evaluate()
        oracle = oracle_metrics(evaluator, suite, found.marks) if options.oracle else {}
        yield Mixture(title, {**alpha, **found.flat(), **oracle}, found, model)


def mixed_images(
    zero_shot: Any, ends: Sequence[Any], suite: ShiftSuite, processor: Any, options: argparse.Namespace
) -> Iterator[Mixture]:
    """The same of VRF, which is no model."""
    from ..evaluation.vrf import evaluate_vrf

    ends = [zero_shot, ends[0]]
    found, vrf = evaluate_vrf(*(evaluator_of(end, suite, processor, options) for end in ends), **options.vrf)
    how = "chosen on the validation set" if options.choose else "fixed"
    facts = {name: getattr(vrf, name) for name in ("k", "a", "b", "zero_shot_temperature", "fine_tuned_temperature")}
    facts |= {"choose": bool(options.choose), "failures": len(vrf.failures)}
    print(
        f"{len(vrf.failures)} training images that zero-shot alone has wrong, k = {vrf.k}; a = {vrf.a:g}, "
        f"b = {vrf.b:g} ({how})"
    )
    yield Mixture(options.method, found.flat(), found, facts={"vrf": facts})


def keep(merged: Any, title: str, suite: ShiftSuite, processor: Any, options: argparse.Namespace) -> None:
    """Calibrate a merged model and save it."""
    from .models import save

    evaluator = evaluator_of(merged, suite, processor, options)
    record = evaluator.calibrate()
    save(options.output_dir / "model", merged, processor, evaluator.calibrator)
    print(f"The model of {title}, temperature {record['temperature']:.3f}, is in model/")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what is wrong ends here, before anything is loaded."""
    parser = Parser("interpolate", __doc__ or "")
    parser.add_argument(
        "--fine_tuned", required=True, nargs="+", metavar="M", help="the end at alpha 1: its folder or name"
    )
    parser.add_argument("--zero_shot", metavar="M", help="the end at alpha 0; default: the start of the run")
    parser.add_argument(
        "--method",
        default=WISE,
        choices=[WISE, STOCK, VRF],
        metavar="M",
        help="wise (default), model_stock, vrf; docs/how-to/wise_ft",
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="where results go")
    add_suite_options(parser)
    parser.add_argument("--alphas", type=weight, nargs="+", metavar="A", help="default: 0 to 1 by 0.1")
    parser.add_argument("--alpha", type=weight, metavar="A", help="of the model that --save keeps; default: 0.5")
    parser.add_argument("--save", action="store_true", help="save the model (of --alpha), calibrated")
    parser.add_argument(
        "--criterion",
        default="nll",
        choices=["nll", "ece"],
        metavar="C",
        help="what a temperature minimises: nll (default), ece",
    )
    parser.add_argument(
        "--calibration_method",
        default="temperature",
        choices=METHODS,
        metavar="M",
        help=f"{METHODS[0]} (default), {', '.join(METHODS[1:])}",
    )
    add_vrf_options(parser)
    parser.add_argument("--oracle", action="store_true", help="measure the best temperature for the shifted sets, too")
    parser.add_argument("--use_cpu", action="store_true", help="leave accelerators alone")
    parser.add_argument("--batch_size", type=positive, metavar="N", help="images at a time; default: 256, on a CPU 32")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier sweep or model there")
    options = parser.read(argv)
    if message := what_does_not_fit(options):
        parser.error(message)
    options.alphas = list(SWEEP) if options.alphas is None else options.alphas
    options.alpha = HALF if options.alpha is None else options.alpha
    options.vrf = {name: value for name in VRF_OPTIONS if (value := getattr(options, name)) is not None}
    return options


def add_vrf_options(parser: argparse.ArgumentParser) -> None:
    """Add those of `fit_vrf`, whose defaults stay its own."""
    group = parser.add_argument_group("of --method vrf")
    group.add_argument(
        "--k", type=positive, metavar="N", help="which nearest failure counts; default: 0.078 %% of them"
    )
    group.add_argument("--a", type=finite, metavar="X", help="squared distance where both count alike; default: 1.5")
    group.add_argument("--b", type=above_0, metavar="X", help="how gently the weight falls there; default: 0.6")
    group.add_argument(
        "--choose", action="store_true", default=None, help="choose a and b by accuracy on the validation set"
    )


def what_does_not_fit(options: argparse.Namespace) -> str | None:
    """What the method cannot do of what is asked for, if anything."""
    method, count = options.method, len(options.fine_tuned)
    if method == STOCK and count < 2:
        return f"expected two or more --fine_tuned models for --method {method}, got 1"
    if method != STOCK and count > 1:
        return f"expected one --fine_tuned model for --method {method}, got {count}"
    if method != WISE and (options.alphas is not None or options.alpha is not None):
        return f"expected no --alphas and no --alpha with --method {method}: it finds its own weights"
    given = [name for name in VRF_OPTIONS if getattr(options, name) is not None]
    if method != VRF and given:
        return f"expected no --{given[0]} with --method {method}: add --method {VRF}, whose it is, or leave it out"
    if options.choose and len(given) > 1 and given != ["k", "choose"]:
        return "expected --choose, or --a and --b, got both: it finds them on the validation set, so leave one out"
    further = options.save or options.oracle or options.calibration_method != METHODS[0]
    if method == VRF and further:
        return f"expected no --save, --oracle and --calibration_method with --method {method}: it is no model, but two"
    return None


def common_start(folders: Sequence[str]) -> str:
    """The one model that all runs started from."""
    starts = sorted({recorded_start(Path(folder)) for folder in folders})
    if len(starts) > 1:
        raise ValueError(f"Expected runs from one start model, got {starts}. Name the right one with --zero_shot.")
    return starts[0]


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


def finite(text: str) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def above_0(text: str) -> float:
    """Read a finite number above 0."""
    if (value := finite(text)) <= 0.0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def load_end(name: str) -> Any:
    """Load an end in float32, without a baked temperature."""
    from ..calibration.record import unbake_temperature
    from .models import model_of

    model = model_of(name)
    if getattr(model.config, "calibration", None) is not None:
        print(f"{name} is calibrated: its temperature is taken out before merging, and fitted anew for each mixture.")
        unbake_temperature(model)
    return model


def evaluator_of(model: Any, suite: ShiftSuite, processor: Any, options: argparse.Namespace) -> Evaluator:
    """Make an evaluator of a mixture, on the accelerator that there is."""
    from accelerate import PartialState

    from ..evaluation.evaluator import Evaluator

    device = PartialState(cpu=options.use_cpu).device
    chosen = {"criterion": options.criterion, "method": options.calibration_method}
    return Evaluator(model, processor, suite, batch_size=options.batch_size, device=device, **chosen)


def write(rows: Sequence[dict[str, float]], argv: Sequence[str], folder: Path, facts: dict[str, Any] | None) -> None:
    """Write all metrics, and what the mixture was made with, as JSON and the table as CSV."""
    report = {"command": shlex.join(["carot_hf", "interpolate", *public_words(argv)]), **(facts or {}), "rows": rows}
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # nan, e.g. an AUROC without errors
    write_whole(folder / "sweep.json", json.dumps(report, indent=2) + "\n")
    keys = [*(["alpha"] if "alpha" in rows[0] else []), *(key for _, key in TABLE)]
    with whole_file(folder / "sweep.csv") as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
