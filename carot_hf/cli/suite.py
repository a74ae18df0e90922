"""``carot_hf suite check S`` shows what a suite holds; ``carot_hf suite init FOLDER`` writes a suite file."""

from __future__ import annotations

import argparse
import logging
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..basics.escape import printable
from ..basics.whole_file import whole_file, write_whole
from .data_options import SUITE, add_part_options, suite_options
from .parser import Parser, positive

_HELP = "Describe images of your own, and look at them before anything is trained. No model is loaded."
_CHECK = """Classes, images a class and set, images that sets share, what is likely a mistake, captions, how labels were
matched, and a picture of some images of each set as a model will see them: turned, resized, cropped."""
_INIT = """Look into a folder and write a YAML file for it: the sets and classes that are there, and every other key in
a comment. Folders train, validation and test are found by name, every other one is a shift."""
_CAPTIONS = 5
_MOST_WORKERS = 8  # processes that decode


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parse(argv)
    refuse_written(options)
    (check if options.command == "check" else init)(options)


def refuse_written(options: argparse.Namespace, suite: str | None = None) -> None:
    """Refuse to replace a file, but for the picture of an earlier check of this suite, or of any if none is named.

    Raises:
        ValueError: If another file is there, and nobody asked for another one in its place.
    """
    from ..evaluation.contact_sheet import suite_of_sheet

    place = options.output_file
    if place.is_dir():
        raise ValueError(f"Expected a new --output_file, got {place}, which is there. Name a file.")
    if options.overwrite or not place.exists():
        return
    of = suite_of_sheet(place) if options.command == "check" else None
    if of is None or suite not in (None, of):
        what = "which is there" if of is None else f"the picture of the suite '{printable(of)}'"
        raise ValueError(f"Expected a new --output_file, got {place}, {what}. Add --overwrite to replace it.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("suite", _HELP)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Part)
    sub = commands.add_parser("check", help="show what a suite holds", description=_CHECK)
    sub.add_argument("suite", help=SUITE)
    add_part_options(sub.add_argument_group("data"))
    sub.add_argument(
        "--output_file", type=Path, default=Path("suite.png"), metavar="F", help="the picture; default: suite.png"
    )
    sub.add_argument("--images", type=positive, default=8, metavar="N", help="images a set in the picture; default: 8")
    sub.add_argument("--size", type=positive, default=224, metavar="N", help="pixels a side as the model; default: 224")
    sub.add_argument("--decode", action="store_true", help="decode every image, list those that cannot be: status 2")
    sub.add_argument("--overwrite", action="store_true", help="replace a file that is no picture of this suite, too")
    sub = commands.add_parser("init", help="write a suite file for a folder", description=_INIT)
    sub.add_argument("folder", type=Path, help="with the images, or tables of them")
    sub.add_argument("--output_file", type=Path, help="default: FOLDER/suite.yaml")
    sub.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    options = parser.read(argv)
    if options.command == "check" and options.streaming:
        parser.error("expected no --streaming with check, which looks at images by their number: leave it out")
    if options.command == "init" and options.output_file is None:
        options.output_file = options.folder / "suite.yaml"
    suffixes = (".png",) if options.command == "check" else (".yaml", ".yml")
    if options.output_file.suffix not in suffixes:
        parser.error(f"expected an --output_file {' or '.join(suffixes)}, got {options.output_file}")
    return options


class _Part(Parser):
    """The parser of one of the two."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog.removeprefix("carot_hf "), description)


def check(options: argparse.Namespace) -> None:
    """Show a suite.

    Raises:
        ValueError: If it cannot be loaded or, with ``decode``, an image cannot be decoded; all are listed before.
    """
    from ..data.samples import sets_of
    from ..data.survey import survey
    from ..evaluation.contact_sheet import check_sheet
    from ..suites.load import load_suite

    suite = load_suite(options.suite, **suite_options(options))
    refuse_written(options, suite.name)
    found = survey(suite)
    sets = dict(zip(found.sizes, sets_of(suite), strict=True))
    check_sheet(len(sets), options.images, options.size)
    print(report(suite, sets, found))
    draw_sheet(suite, sets, options)
    if options.decode:
        decode(sets)


def report(suite: Any, sets: dict[str, Any], found: Any) -> str:
    """What is known of a suite without decoding an image, in sections; its sets have the names of its survey."""
    from ..data.samples import doubtful_names, example_captions, matching

    version = "" if suite.version is None else f", version {suite.version}"
    total = sum(found.sizes.values())
    title = f"Suite '{suite.name}'{version}: {len(suite.class_names):,} classes, {len(sets)} sets, {total:,} images"
    width = max(map(len, sets))
    common = [f"{n:,} images of '{b}' are in '{a}', too" for (a, b), n in found.shared.items()]
    sections = {
        "Images a class and set": found.table().splitlines(),
        "Images in several sets": common or [_none_shared(sets, found)],
        "Labels were matched": [f"{name:{width}}  {matching(data, suite.class_names)}" for name, data in sets.items()],
        "Captions, for example": [printable(caption) for caption in example_captions(suite, _CAPTIONS)],
        "Likely mistakes": [*found.warnings(), *doubtful_names(suite.class_names)] or ["none found"],
    }
    return "\n".join(
        [title, *(line for name, lines in sections.items() for line in ["", f"{name}:", *_indented(lines)])]
    )


def draw_sheet(suite: Any, sets: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the picture, and say which images in the draw cannot be decoded."""
    from ..data.samples import MOST_BAD, draw, label_title
    from ..data.transforms import ImageTransform
    from ..evaluation.contact_sheet import Row, Tile, can_write, contact_sheet, sheet_info

    transform = ImageTransform(size=options.size, crop=(options.size, options.size), mean=(0,) * 3, std=(1,) * 3)
    rows, bad = [], []
    for name, data in sets.items():
        drawn = draw(data, options.images)
        tiles = [
            Tile(
                transform.evaluate(item["image"]).permute(1, 2, 0).numpy(), *label_title(data, item, suite.class_names)
            )
            for item in drawn.items
        ]
        rows.append(Row(f"{name}: {len(tiles)} of {len(data):,} images", tiles))
        bad += [f"{name}, {one}" for one in drawn.bad]
        if len(drawn.bad) == MOST_BAD:
            bad.append(f"{name}: no further image was looked for. --decode lists all that cannot be decoded.")
    if bad:
        print("\n".join(["", "Images that cannot be decoded, with others in their place:", *_indented(bad)]))
    options.output_file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(options.output_file) as beside:
        contact_sheet(rows, options.size).save(beside, format="PNG", pnginfo=sheet_info(suite.name))
    print(
        f"\n{options.output_file}: images of each set at {options.size} x {options.size} pixels, as a model sees them"
    )
    unwritten = {tile.instead: tile.title for row in rows for tile in row.tiles if not can_write(tile.title)}
    print("".join(f"  {instead} there: {title}\n" for instead, title in sorted(unwritten.items())), end="")


def decode(sets: dict[str, Any]) -> None:
    """Decode every image, and list those that cannot be.

    Raises:
        ValueError: If there are such.
    """
    from tqdm import tqdm

    from ..basics.processes import usable_cores
    from ..data.samples import unreadable

    total, bad = sum(map(len, sets.values())), []
    cores = usable_cores()
    workers = min(_MOST_WORKERS, cores) if cores > 1 else 0
    with tqdm(total=total, desc="Images") as bar:
        for name, data in sets.items():
            for one in unreadable(data, workers):
                bar.update()
                if one is not None:
                    bad.append(f"{name}, {one}")
    if not bad:
        print(f"All {total:,} images can be decoded.")
        return
    print("\n".join(["Images that cannot be decoded:", *_indented(bad)]), flush=True)
    raise ValueError(
        f"Expected {total:,} images that can be decoded, got {len(bad):,} that cannot. Replace or drop them."
    )


def init(options: argparse.Namespace) -> None:
    """Write a suite file.

    Raises:
        ValueError: If the folder holds no set.
    """
    from ..suites.describe import describe
    from ..suites.load import load_suite
    from ..suites.look import look_into

    with _quiet():  # each place is opened in several ways
        look = look_into(options.folder)
    place = options.output_file
    made = describe(look, place.parent)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, made.text)
    sets = {**look.splits, **look.shifts}
    width = max(map(len, sets))
    lines = [f"{name:{width}}  {part.size:>9,} images, {part.path}" for name, part in sets.items()]
    sections = {
        f"Found in {options.folder}": lines,
        "No set": [f"{name}: {reason}" for name, reason in look.passed_over.items()],
        "Left to you": made.todo,
    }
    shown = [line for title, lines in sections.items() if lines for line in [f"{title}:", *_indented(lines), ""]]
    print("\n".join(map(printable, shown)))
    try:
        load_suite(place)
    except ValueError as error:
        print(f"{printable(place)}: written. It does not load yet: {printable(' '.join(str(error).split()))}")
        return
    print(f"{printable(place)}: written, and it loads. Next: carot_hf suite check {printable(place)}")


def _none_shared(sets: dict[str, Any], found: Any) -> str:
    if not found.compared:
        return "not looked for: there are too many images"
    encoded = [len(data.encoded_column()) > 0 for data in sets.values()]
    return "none" if all(encoded) else "none are known: images in memory are not compared"


def _indented(lines: Sequence[str]) -> list[str]:
    return [textwrap.indent(line, "  ") for line in lines]


@contextmanager
def _quiet() -> Iterator[None]:
    """No warning of what lies in a folder."""
    logger = logging.getLogger("carot_hf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
