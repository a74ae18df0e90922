"""The tables and figures of the CaRot paper, and what came after it, by one command.

    carot_hf tables --suite digits --seeds 5              # an hour on two cores without a GPU
    carot_hf tables --suite digits --seeds 1 --quick      # shorter runs: about 4 minutes
    carot_hf tables --suite imagenet --seeds 1            # with the published figures beside ours
    carot_hf tables --suite mine.yaml --methods flyp carot dive    # these alone, beside the start model

writes out/report/README.md with Table 1 (methods), Table 2 (how often the teacher moves), the ECE after each
calibration at home and under shift, beside that of the best T for the shifted sets, the reliability diagrams of
Figures 1, 2, 4 and 5, the scatter of accuracy at home and shifted with WiSE-FT's curve, and the paired comparison of
CaRot and FLYP; and results.csv.

Each cell is a run of `carot_hf train` or `interpolate` in its own folder under cells/, with its log.txt. Say the
command again after an interruption: finished cells stay, an interrupted run goes on from its last checkpoint. The
label smoothing of the LS rows is chosen once, by the validation NLL of the first seed; no shifted set chooses anything.
On `digits` this is a demonstration of the methods, not evidence for ImageNet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess  # nosec B404  # runs our own commands, without a shell
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..basics.redaction import public_words
from ..basics.whole_file import write_whole
from .data_options import add_suite_options, suite_options, suite_words
from .parser import Parser

if TYPE_CHECKING:
    from ..data.suite import ShiftSuite

TRAIN, MERGE = ("-m", "carot_hf", "train"), ("-m", "carot_hf", "interpolate")
FIRST_SEED = 42
BATCH = 512  # of the published runs
SMOOTHINGS = (0.01, 0.03, 0.05, 0.1, 0.2)
PUBLISHED_INTERVAL = 500 / 25030  # of the steps of a run, between updates of the teacher
QUICK_EPOCHS, QUICK_SMOOTHINGS, QUICK_ALPHAS = 16, (0.1,), ("0", "0.5", "1")
ALPHAS = tuple(f"{i / 10:g}" for i in range(11))
# What can be asked for, and the runs that it is made of.
TRAINED = (
    *("ft", "ft-ls", "flyp", "flyp-ls", "carot", "lp-ft", "carot-2024", "tracer", "every-1", "every-2x", "never"),
    *("fd", "l2-sp", "dive", "lipsum", "car-ft"),
)
MERGED = {"wise-ft": "ft", "wise-ft-ls": "ft-ls", "wise-carot": "carot", "model-stock": "ft", "vrf": "ft"}


@dataclass(frozen=True)
class Cell:
    """One run: the folder's name, what Python runs, its arguments, the file that it writes last, and its processes."""

    name: str
    command: tuple[str, ...]
    arguments: tuple[str, ...]
    result: str = "metrics.json"
    processes: int = 1

    @property
    def resumes(self) -> bool:
        """Whether the command can go on from a checkpoint."""
        return self.command == TRAIN and "--zero_shot" not in self.arguments


def main(argv: Sequence[str]) -> Path:
    """Run what is missing, write the report, return its path."""
    options = parse(argv)
    from ..run.lock import locked

    with locked(options.output_dir):
        return report(options, argv)


def report(options: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Run the cells that are missing, and write the page."""
    from ..suites.load import load_suite
    from .report import write_report

    start = time.perf_counter()
    suite = load_suite(options.suite, **suite_options(options))
    if not suite.shifts:
        raise ValueError(f"Expected a suite with shifted sets for tables, got '{suite.name}' with none. Name some.")
    runner = Runner(options.output_dir / "cells", options.jobs)
    seeds = [FIRST_SEED + i for i in range(options.seeds)]
    smoothings = QUICK_SMOOTHINGS if options.quick else SMOOTHINGS
    choices = {
        base: {eps: train_cell(f"{base}-eps{eps:g}", base, seeds[0], options, smoothing=eps) for eps in smoothings}
        for base in ("ft-ls", "flyp-ls")
        if base in options.methods
    }
    runner.run([cell for cells in choices.values() for cell in cells.values()])
    scores = {
        base: {eps: runner.read(cell)["metrics"]["eval_validation_nll"] for eps, cell in cells.items()}
        for base, cells in choices.items()
    }
    chosen = {base: min(by_eps, key=by_eps.__getitem__) for base, by_eps in scores.items()}
    cells = plan(seeds, chosen, teacher_interval(suite, options), options)
    runner.run([cell for by_seed in cells.values() for cell in by_seed])
    merges = merge_plan(cells, seeds, runner, options)
    runner.run([cell for by_seed in merges.values() for cell in by_seed])
    page = write_report(
        options.output_dir,
        suite,
        runs={method: [runner.read(cell) for cell in by_seed] for method, by_seed in cells.items()},
        sweeps={method: [runner.read(cell)["rows"] for cell in by_seed] for method, by_seed in merges.items()},
        smoothings=scores,
        seeds=seeds,
        interval=teacher_interval(suite, options),
        command=" ".join(["carot_hf tables", *public_words(argv)]),
        seconds=(runner.seconds(), time.perf_counter() - start),
        quick=options.quick,
    )
    print(f"\n{page.read_text(encoding='utf-8').split('## Figures')[0]}\nReport: {page}")
    return page


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("tables", __doc__ or "")
    add_suite_options(parser)
    parser.add_argument("--model_name_or_path", help="checkpoint to start from; default: the suite's")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 42, 43, ... of each trained method")
    parser.add_argument(
        "--methods", nargs="+", choices=[*TRAINED, *MERGED], metavar="M", help="rows: " + ", ".join((*TRAINED, *MERGED))
    )
    parser.add_argument("--quick", action="store_true", help="half as long runs, smoothing 0.1, three alphas")
    parser.add_argument("--output_dir", type=Path, default=Path("out/report"), help="default: out/report")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: 1 on GPUs, else as many as there are cores")
    parser.add_argument(
        "--processes", type=int, default=1, help="GPUs of each training run; they share its batch (and --jobs is 1)"
    )
    parser.add_argument("--use_cpu", action="store_true", help="leave accelerators alone")
    options = parser.read(argv)
    asked = options.methods or ()  # in a report of all rows these two are left out
    if "vrf" in asked and options.streaming:
        parser.error("expected no --streaming for vrf, which looks for images in the training set")
    if "model-stock" in asked and options.seeds < 2:
        parser.error(f"expected --seeds of at least 2 for model-stock, which merges two runs, got {options.seeds}")
    wanted = set(options.methods or (*TRAINED, *MERGED))
    wanted |= {MERGED[name] for name in wanted & MERGED.keys()}  # what a merge is made of
    options.methods = [name for name in (*TRAINED, *MERGED) if name in wanted]
    if options.jobs is None:
        import torch

        from ..basics.processes import usable_cores

        options.jobs = 1 if torch.cuda.is_available() else usable_cores()
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"expected --seeds and --jobs of at least 1, got {options.seeds} and {options.jobs}")
    if options.processes > 1:
        options.jobs = 1
        if BATCH % options.processes:
            parser.error(f"expected --processes that divide the batch of {BATCH}, got {options.processes}")
    if (options.output_dir / "README.md").exists() and not (options.output_dir / "cells").exists():
        parser.error(f"expected a new folder or one of an earlier report, got {options.output_dir}: choose another one")
    if options.quick and options.suite != "digits":
        parser.error("expected --quick with --suite digits only: it shortens the runs of that suite")
    return options


def teacher_interval(suite: ShiftSuite, options: argparse.Namespace) -> int:
    """Steps between updates of the teacher: the published share of the run."""
    from ..data.suite import needed

    epochs = QUICK_EPOCHS if options.quick else int(suite.recommended.get("num_train_epochs", 10))
    train = needed(suite.train, "training", "for tables of methods that train")
    batches = len(train) // int(suite.recommended.get("per_device_train_batch_size", BATCH))
    return max(1, round(batches * epochs * PUBLISHED_INTERVAL))


def train_cell(
    name: str, preset: str, seed: int, options: argparse.Namespace, *flags: str, smoothing: float | None = None
) -> Cell:
    """Describe a training run."""
    arguments = [*suite_words(options), "--preset", preset, "--seed", str(seed), *flags]
    if smoothing is not None:
        arguments += ["--label_smoothing_factor", f"{smoothing:g}"]
    if options.quick:
        arguments += ["--num_train_epochs", str(QUICK_EPOCHS)]
    if options.processes > 1:
        arguments += ["--per_device_train_batch_size", str(BATCH // options.processes)]
    words = (*arguments, *start(options), *common(options))
    return Cell(f"{name}-{seed}", TRAIN, words, processes=options.processes)


def start(options: argparse.Namespace, flag: str = "--model_name_or_path") -> tuple[str, ...]:
    """The checkpoint to start from, if one is given."""
    return (flag, options.model_name_or_path) if options.model_name_or_path else ()


def common(options: argparse.Namespace) -> tuple[str, ...]:
    """Arguments of all trainings."""
    quiet = ("--report_to", "none", "--disable_tqdm", "True", "--save_total_limit", "1")
    return (*quiet, *shift(options), *(("--use_cpu",) if options.use_cpu else ()))


def shift(options: argparse.Namespace) -> tuple[str, ...]:
    """What is measured beside the temperature of home; a density needs training images that are read by index."""
    return ("--calibration_method", "perturbed" if options.streaming else "density", "--oracle")


def plan(
    seeds: Sequence[int], chosen: dict[str, float], interval: int, options: argparse.Namespace
) -> dict[str, list[Cell]]:
    """Lay out all training runs: one a method and seed."""
    every = "--teacher_update_every"
    special = {  # name, preset, and what is said beside it
        "carot": ("carot", "carot", every, str(interval)),
        "carot-2024": ("carot-2024", "carot-2024", every, str(interval)),
        "tracer": ("tracer", "tracer", every, "1"),
        "every-1": ("carot-every-1", "carot", every, "1"),
        "every-2x": ("carot-every-2x", "carot", every, str(2 * interval)),
        "never": ("carot-never", "carot", "--teacher", "frozen"),
        "fd": ("fd", "fd", every, "1"),
    }

    def make(method: str, seed: int) -> Cell:
        if method in chosen:
            return train_cell(f"{method}-eps{chosen[method]:g}", method, seed, options, smoothing=chosen[method])
        name, preset, *flags = special.get(method, (method, method))
        return train_cell(name, preset, seed, options, *flags)

    zero_shot = (*suite_words(options), *start(options), "--zero_shot", "--seed", str(seeds[0]), *common(options))
    return {
        "zero-shot": [Cell("zero-shot", TRAIN, zero_shot)],
        **{name: [make(name, seed) for seed in seeds] for name in options.methods if name in TRAINED},
    }


def merge_plan(
    cells: dict[str, list[Cell]], seeds: Sequence[int], runner: Runner, options: argparse.Namespace
) -> dict[str, list[Cell]]:
    """Lay out the merges: WiSE-FT's alphas, all for the first seed and 0.5 for the others, Model Stock, VRF."""

    def merge(name: str, ends: Sequence[Cell], *flags: str, measured: Sequence[str] = shift(options)) -> Cell:
        folders = [str(runner.folder(cell)) for cell in ends]
        chosen = (*start(options, "--zero_shot"), *flags, *measured, *(("--use_cpu",) if options.use_cpu else ()))
        return Cell(name, MERGE, (*suite_words(options), "--fine_tuned", *folders, *chosen), "sweep.json")

    merges: dict[str, list[Cell]] = {}
    whole = QUICK_ALPHAS if options.quick else ALPHAS
    for base in ("ft", "ft-ls", "carot"):
        if f"wise-{base}" not in options.methods:
            continue
        merges[f"wise-{base}"] = [
            merge(f"wise-{cell.name}", [cell], "--alphas", *(whole if seed == seeds[0] else ("0.5",)))
            for seed, cell in zip(seeds, cells[base], strict=True)
        ]
    if "model-stock" in options.methods and (pairs := seed_pairs(cells["ft"])):
        merges["model-stock"] = [
            merge(f"model-stock-{one.name}-{other.name}", [one, other], "--method", "model_stock")
            for one, other in pairs
        ]
    if "vrf" in options.methods and not options.streaming:  # it looks for images in the training set
        merges["vrf"] = [merge(f"vrf-{cell.name}", [cell], "--method", "vrf", measured=()) for cell in cells["ft"]]
    return merges


def seed_pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Each seed with the next, the last with the first: as many pairs as seeds, or the only one of two seeds."""
    pairs = list(zip(cells, [*cells[1:], cells[0]], strict=True))
    return pairs if len(cells) > 2 else pairs[: len(cells) - 1]


class Runner:
    """Runs cells as processes, some at a time; what is finished is not run again."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder, self._jobs = folder, jobs
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def folder(self, cell: Cell) -> Path:
        """Where a cell writes."""
        return self._folder / cell.name

    def read(self, cell: Cell) -> dict[str, Any]:
        """What a finished cell wrote."""
        result: dict[str, Any] = json.loads((self.folder(cell) / cell.result).read_text(encoding="utf-8"))
        return result

    def seconds(self) -> float:
        """Time that all cells took, also in earlier calls."""
        return float(sum(json.loads(path.read_text())["seconds"] for path in self._folder.glob("*/cell.json")))

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the unfinished ones; the first failure stops the rest."""
        for cell in cells:
            self._check_same(cell)
        waiting = [cell for cell in cells if not (self.folder(cell) / cell.result).exists()]
        done = len(cells) - len(waiting)
        print(f"{len(cells)} cells, {done} of them finished before", flush=True)
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = [pool.submit(self._run_one, cell) for cell in waiting]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _check_same(self, cell: Cell) -> None:
        stamp = self.folder(cell) / "cell.json"
        if not stamp.exists():
            return
        before = json.loads(stamp.read_text())["arguments"]
        if before != list(cell.arguments):
            raise ValueError(
                f"Expected the arguments with which {self.folder(cell)} was begun, {' '.join(before)}, got "
                f"{' '.join(cell.arguments)}. Choose another --output_dir, or delete this folder."
            )

    def _run_one(self, cell: Cell) -> None:
        if self._stop.is_set():
            return
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        stamp = folder / "cell.json"
        spent = json.loads(stamp.read_text())["seconds"] if stamp.exists() else 0.0
        write_whole(stamp, json.dumps({"arguments": cell.arguments, "seconds": spent}))
        from ..run.checkpoint import checkpoint_folders, is_complete

        resume = cell.resumes and any(is_complete(path) for path in checkpoint_folders(folder))
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cell.processes}"]
        python = [sys.executable, *(several if cell.processes > 1 else [])]
        command = [*python, *cell.command, *cell.arguments, "--output_dir", str(folder)]
        threads = {"OMP_NUM_THREADS": "1"} if self._jobs > 1 else {}  # one core each
        start = time.perf_counter()
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            result = subprocess.run(  # nosec B603  # a list of arguments: this Python, our command, its options
                [
                    *command,
                    "--resume_from_checkpoint" if resume else "--overwrite_output_dir",
                ],  # the folder is this cell's
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**threads, **os.environ},
                check=False,
            )
        seconds = time.perf_counter() - start
        write_whole(stamp, json.dumps({"arguments": cell.arguments, "seconds": spent + seconds}))
        if result.returncode or not (folder / cell.result).exists():
            self._stop.set()
            raise RuntimeError(
                f"Expected `{cell.command[-1]}` to finish for '{cell.name}', got exit status {result.returncode}. "
                f"See {folder / 'log.txt'}; the same command goes on from here."
            )
        with self._lock:
            print(f"{cell.name}: {seconds:.0f} s", flush=True)
