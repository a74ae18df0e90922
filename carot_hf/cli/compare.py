"""``carot_hf compare RUN RUN ...``: runs side by side, and differences over the images that they share."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..basics.escape import markdown, printable, table
from ..basics.whole_file import write_whole
from .parser import Parser

if TYPE_CHECKING:
    from ..evaluation.runs import Differences, Run

COLUMNS = ("run", "first", "set", "metric", "value", "first_value", "difference", "low", "high", "images", "why_not")
CSV, PICTURE = "compare.csv", "compare.png"
_METRICS = ("accuracy", "ece")
_HELP = """Accuracy and ECE of runs side by side, as their saved checkpoints answer, and what each further run has more
than the first, with 95 % intervals over the images that both have seen. A RUN is the output folder of carot_hf evaluate
or of a training, or its metrics.json."""


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parse(argv)
    from .evaluate import refuse_written

    place = options.output_dir
    if place is not None and not options.overwrite_output_dir:
        refuse_written(place, (CSV, PICTURE))
    from ..evaluation.runs import differences, read_runs

    runs = read_runs(options.runs)
    print(side_by_side(runs, options.n_bins))
    draws = {"n_bins": options.n_bins, "n_bootstrap": options.n_bootstrap, "seed": options.seed}
    found = [differences(run, runs[0], **draws) for run in runs[1:]]
    for part in found:
        print(f"\n{in_words(part)}")
    if notes := remarks(runs, options.n_bins):
        print("\n" + "\n".join(notes))
    if place is not None:
        print(f"\nSaved to {printable(place)}: {', '.join(keep(place, runs, found, options.n_bins))}")


def side_by_side(runs: Sequence[Run], n_bins: int) -> str:
    """A row a run; accuracy and ECE of each set. What is not known is empty."""
    names = list(dict.fromkeys(name for run in runs for name in run.figures))
    rows = [["", *(f"{markdown(name)} {title}" for name in names for title in ("accuracy", "ECE"))]]
    for run in runs:
        values = [value for name in names for value in run.measured(name, n_bins)]
        rows.append([run.name.replace("|", "\\|"), *("" if value is None else f"{value:.3f}" for value in values)])
    return table(rows)


def in_words(part: Differences) -> str:
    """The differences of a run, and why there are none of the other sets."""
    from ..evaluation.compare import Comparison

    lines = [f"{part.run} less {part.first}:"]
    lines += [Comparison(part.found).table()] if part.found else []
    for reason in dict.fromkeys(part.why.values()):
        names = ", ".join(printable(name) for name, why in part.why.items() if why == reason)
        lines.append(f"not compared: {names}: {reason}")
    return "\n".join(lines)


def remarks(runs: Sequence[Run], n_bins: int) -> list[str]:
    """What to know of the figures: sets that are no evidence, and an ECE of other bins."""
    lines = []
    for run in runs:
        for name, said in run.figures.items():
            if said.mark is not None:
                lines.append(f"{run.name}: {printable(name)} is no evidence for its calibration ({said.mark})")
        there = [said for name, said in run.figures.items() if name not in (run.rows or {}) and said.ece is not None]
        other = sorted({said.n_bins for said in there} - {n_bins})
        if other:
            lines.append(f"{run.name}: an ECE of {other[0]} bins is left out; ask for --n_bins {other[0]} to see it")
    return lines


def keep(place: Path, runs: Sequence[Run], found: Sequence[Differences], n_bins: int) -> list[str]:
    """Write the table and, if there is a difference, the picture; return the names of the files."""
    from ..evaluation.diagrams import can_draw
    from ..evaluation.forest import write_forest

    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / CSV, as_csv(runs, found, n_bins))
    if not any(part.found for part in found) or not can_draw():
        (place / PICTURE).unlink(missing_ok=True)  # of an earlier call, which would not belong to this table
        return [CSV]
    write_forest(place / PICTURE, found)
    return [CSV, PICTURE]


def as_csv(runs: Sequence[Run], found: Sequence[Differences], n_bins: int) -> str:
    """A row for each further run, set and metric; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run, part in zip(runs[1:], found, strict=True):
        for name in dict.fromkeys([*part.found, *part.why]):
            pairs = zip(_METRICS, run.measured(name, n_bins), runs[0].measured(name, n_bins), strict=True)
            for metric, *values in pairs:
                numbers = [*values, *(part.found[name][metric] if name in part.found else (None, None, None))]
                cells = ["" if value is None else f"{value:.6f}" for value in numbers]
                rest = [part.sizes.get(name, ""), part.why.get(name, "")]
                writer.writerow([part.run, part.first, printable(name), metric, *cells, *rest])
    return text.getvalue()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("compare", _HELP)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders, or metrics.json files; two or more")
    parser.add_argument("--output_dir", type=Path, help="where compare.csv and compare.png go; default: nowhere")
    parser.add_argument("--n_bins", type=int, default=10, help="confidence bins of the ECE; default: 10")
    parser.add_argument("--n_bootstrap", type=int, default=2000, help="draws of the intervals; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the files of an earlier call there"
    )
    options = parser.read(argv)
    if len(options.runs) < 2:
        parser.error("expected two runs or more")
    return options
