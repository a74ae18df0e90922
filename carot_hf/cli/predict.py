"""``carot_hf predict MODEL IMAGES...``: class and calibrated confidence of images without labels."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..basics.escape import printable
from ..basics.whole_file import write_whole
from .data_options import add_model_options, add_suite_options, parts_of_no_suite, suite_options
from .parser import Parser, positive

if TYPE_CHECKING:
    from ..data.pictures import Picture

COLUMNS = ("image", "label", "confidence", "second", "second_confidence", "set", "distance")
_TEMPLATE = "a photo of a {}."
_CHUNK = 512  # images between two moments at which what is known is on the disk
_HELP = """Class, calibrated confidence, runner-up, conformal set and distance from the images of the training, a row
an image, in the order of the names. An interrupted call goes on where it was; images that cannot be decoded are listed
in OUTPUT_FILE.bad."""


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parse(argv)
    from ..suites.pictures import is_table, pictures_of

    pictures = pictures_of(options.images, options.image_column)
    write = Rows(options.output_file, overwrite=options.overwrite)  # refused before a model loads
    from tqdm import tqdm

    from ..basics.fingerprint import fingerprint
    from ..evaluation.fitting import check_home
    from ..evaluation.predictor import Predictor
    from ..suites.load import load_suite
    from .models import check_classes, classes_of, load, names_in

    given = names_in(vars(options))
    suite = None if options.suite is None else load_suite(options.suite, **suite_options(options))
    if suite is not None and options.estimate:
        check_home(suite.validation, suite.train, "temperature")
    loaded = load(options.model, options)
    if suite is not None and given is None:
        given = list(suite.class_names), list(suite.templates)
    names, templates = classes_of(loaded, options.model) if given is None else given
    check_classes(loaded, names)
    if len(names) < 2:
        raise ValueError(f"Expected two classes or more, got {names}. Name what the images may show.")
    predictor = Predictor(
        loaded.model,
        loaded.processor,
        names,
        templates,
        calibrator=loaded.calibrator,
        batch_size=options.batch_size,
        keep_heads=True,
    )
    facts = {"model": options.model, "weights": fingerprint(loaded.model), "classes": names, "templates": templates}
    if tables := {str(place): place.stat().st_size for place in options.images if is_table(place)}:
        facts["tables"] = tables  # a row of another table of this name may hold another image
    left = write.begin(facts, pictures)
    with tqdm(total=len(pictures), initial=len(pictures) - len(left), desc="Images") as bar:
        for start in range(0, len(left), _CHUNK):
            part = left[start : start + _CHUNK]
            write.add(*predictor.predict(part))
            bar.update(len(part))
    bad = write.end()
    said = f"; {len(bad):,} could not be decoded" if bad else ""
    print(f"{printable(options.output_file)}: {len(pictures) - len(bad):,} images{said}")
    if options.estimate:
        good = [picture for picture in pictures if printable(picture.name) not in bad]
        print(estimate(loaded, suite, good, options.batch_size))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("predict", _HELP)
    add_model_options(parser)
    add_suite_options(parser, None, instead="what the model was made for")
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        help="image files, folders of them, and tables (.csv, .tsv, .jsonl, .json, .parquet)",
    )
    parser.add_argument(
        "--image_column", metavar="C", help="of tables: paths, or encoded images; default: the one there is"
    )
    parser.add_argument(
        "--output_file", type=Path, default=Path("predictions.csv"), metavar="F", help=".csv, or .jsonl"
    )
    parser.add_argument("--classes", nargs="+", metavar="C", help="names of the classes, or a file with a name a line")
    parser.add_argument("--templates", nargs="+", metavar="T", help="captions of --classes, with {}")
    parser.add_argument(
        "--estimate", action="store_true", help="say what accuracy to expect, by the held-out images of --suite"
    )
    parser.add_argument("--batch_size", type=positive, metavar="N", help="images at a time; default: 64, on a CPU 32")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever is there")
    options = parser.read(argv)
    if message := what_does_not_fit(options):
        parser.error(message)
    options.templates = options.templates or [_TEMPLATE]
    return options


def what_does_not_fit(options: argparse.Namespace) -> str | None:
    """What cannot be, or would be ignored, of what is asked for, if anything."""
    if message := parts_of_no_suite(options):
        return message
    if options.suite is not None and options.classes:
        return "expected --suite or --classes, got both: each says which classes there are, so leave one out"
    if options.templates and not options.classes:
        return "expected --classes with --templates: name the classes, or leave it out for the captions that there are"
    if options.estimate and options.suite is None:
        return "expected --suite with --estimate: its held-out images say which confidences are right"
    if options.output_file.suffix not in (".csv", ".jsonl"):
        return f"expected an --output_file .csv or .jsonl, got {options.output_file}"
    return None


class Rows:
    """The rows of an output file, which a later call goes on with.

    Args:
        path: ``.csv`` or ``.jsonl``; beside it ``.json`` with what made it, and ``.bad`` with what cannot be decoded.
        overwrite: Begin anew.
    Raises:
        OSError: If they cannot be written.
        ValueError: If a finished file is there.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self._path, self._lines = path, path.suffix == ".jsonl"
        self._made, self._bad = Path(f"{path}.json"), Path(f"{path}.bad")
        self._facts: dict[str, Any] = {}
        self._anew = overwrite
        there = [place for place in (path, self._made, self._bad) if place.exists()]
        if there and not overwrite and (not self._made.exists() or self._read().get("finished") is not False):
            raise ValueError(
                f"Expected a new --output_file, got {there[0]}, which is there. Add --overwrite to replace it."
            )
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(f"the folder {path.parent} is read-only")

    def begin(self, facts: dict[str, Any], pictures: Sequence[Picture]) -> list[Picture]:
        """Say what makes the rows; return the pictures that have none yet.

        Raises:
            ValueError: If rows are there that something else has made.
        """
        self._facts = {**facts, "columns": list(COLUMNS)}
        if self._anew or not self._path.exists():
            with self._writing():
                self._bad.unlink(missing_ok=True)
                self._write(finished=False)
                with self._path.open("w", encoding="utf-8", newline="") as file:
                    if not self._lines:
                        csv.writer(file).writerow(COLUMNS)
            return list(pictures)
        if {key: value for key, value in self._read().items() if key != "finished"} != self._facts:
            raise ValueError(
                f"Expected to go on with {self._path}, but another model or other classes made it. Add --overwrite."
            )
        known, bad = self._known(), self._undecoded()
        return [picture for picture in pictures if picture.name not in known and printable(picture.name) not in bad]

    def add(self, rows: Sequence[Any], bad: Sequence[str]) -> None:
        """Write rows, on the disk when this returns."""
        with self._writing(), self._path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            for row in rows:
                classes = None if row.classes is None else list(row.classes)
                if self._lines:
                    values = [*vars(row).values()][:5]
                    file.write(json.dumps(dict(zip(COLUMNS, [*values, classes, row.distance], strict=True))) + "\n")
                    continue
                distance = "" if row.distance is None else f"{row.distance:.3f}"
                shown = "" if classes is None else "|".join(classes)
                confidences = f"{row.confidence:.6f}", row.second, f"{row.second_confidence:.6f}"
                writer.writerow([row.image, row.label, *confidences, shown, distance])
            file.flush()
            os.fsync(file.fileno())
        if bad:
            with self._writing(), self._bad.open("a", encoding="utf-8") as file:
                file.writelines(f"{printable(name)}\n" for name in bad)

    def end(self) -> set[str]:
        """Say that it is finished; return the images that could not be decoded."""
        self._write(finished=True)
        return self._undecoded()

    def _known(self) -> set[str]:
        """Images that have a row; a row that was cut short is taken away."""
        read = _whole_lines(self._path).decode("utf-8")
        if self._lines:
            return {json.loads(line)["image"] for line in read.split("\n")[:-1]}
        return {row[0] for row in csv.reader(io.StringIO(read, newline=""))}

    def _undecoded(self) -> set[str]:
        return set(_whole_lines(self._bad).decode("utf-8").split("\n")[:-1]) if self._bad.exists() else set()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say of an error where it was, and how to go on."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"Expected to write {self._path}, got {type(error).__name__}: {error}. The rows that are there stay: "
                "make room, or choose another --output_file, and give the command again."
            ) from error

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._made.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}  # a file of somebody else's

    def _write(self, *, finished: bool) -> None:
        write_whole(self._made, json.dumps({**self._facts, "finished": finished}, indent=2) + "\n")


def _whole_lines(path: Path) -> bytes:
    """Return a file whose last line may have been cut short; that is taken away."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole


def estimate(loaded: Any, suite: Any, pictures: Sequence[Picture], batch_size: int | None) -> str:
    """Say what accuracy to expect of images, by the held-out ones of a suite."""
    from ..data.pictures import PictureRows
    from ..data.shift_set import ShiftSet
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.memory import Memory

    memory = Memory(calibrator=loaded.calibrator)
    evaluator = Evaluator(loaded.model, loaded.processor, suite, batch_size=batch_size, memory=memory, keep_heads=True)
    data = ShiftSet(PictureRows(pictures), name="images", num_classes=len(suite.class_names), label_column=None)
    found = evaluator.estimate(data)
    beyond = (
        f"; {found['beyond']:.0%} are farther from home than 99 % of the held-out images" if "beyond" in found else ""
    )
    lines = [f"Accuracy to expect of {len(pictures):,} images{beyond}:"]
    lines += [
        f"  {name:5} {found[name]:.3f} ({found[f'{name}_low']:.3f} to {found[f'{name}_high']:.3f})"
        for name in ("mean", "atc")
    ]
    return "\n".join([*lines, "An estimate by confidences alone: a shift that makes sure answers wrong is not seen."])
