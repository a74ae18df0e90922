"""A suite's YAML file for the sets that a folder was found to hold, every further key in a comment.

What the keys mean is said in the words of ``examples/suites/pets.yaml``; a test compares them.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..basics.escape import printable
from ..basics.yaml_text import load_yaml
from ..data.labels import ClassNames, shown
from .from_folder import HELD_OUT
from .from_yaml import DEFAULT_TEMPLATES
from .look import Look, Part

_WIDTH = 120

# What a key is for, above it.
EXPLAINED = {
    "class_names": "One name for each label, in order; or the name of a text file with one a line. Left out: the names "
    "of the training set's (or, without one, the test set's) ClassLabel, or its folders, sorted. Labels that are names "
    'are matched with these, in whatever order the data have them; case, "_" and spaces do not count.',
    "templates": 'Captions, {} for the class name; a list or a text file. They should name no medium ("a sketch of"): '
    "a caption that says what an image is not is label noise.",
    "train": 'A data set on the Hub ("owner/name"), or a folder or file here: .parquet, .arrow, .csv, .tsv, .jsonl, '
    ".tar. A folder holds such files, metadata.csv or metadata.jsonl with file_name and label, what save_to_disk "
    "wrote, or one folder of images for each class. Paths in a table are relative to the table.",
    "validation": "A share of the training set, of each class at least one image and never the last, the same for all "
    "runs; or a set as above, which needs no train. Temperatures are fitted on it.",
    "shifts": "Shifted test sets by name. Nothing is ever chosen on them.",
    "recommended": "Options of the method that suit the data; they go before a preset's and behind the command line's.",
}
# Keys that stand in comments, each with an example and what it is for.
LABEL_NAMES = (
    "label_names: {n01: cat, n02: dog, n03: rabbit}",
    "what the data call the classes, once for all sets; or a list in order",
)
VERSION = "of this description and its data; in quotes. It goes into metrics and model cards"
OF_TRAIN = (
    (
        "split: train",
        "folders or files that name it: train, training; validation, valid, val, dev; test, testing, eval; any case. "
        "Default: train, validation, test",
    ),
    ("image_column: image", "default: the only column of images, or of file_name, path, ..."),
    ("label_column: label", "default: the first of label, labels, cls, wnid"),
    ("label_names: [n01, n02, n03]", "of this set alone; see above"),
    (
        "caption_column: text",
        "captions of the images' own in place of templates, or lists of them; labels are not needed",
    ),
    (
        "revision: 0123abc...",
        "commit of a data set on the Hub: the same data tomorrow. Default: the newest",
    ),
    (
        "layout: webdataset",
        "of a data set on the Hub that is made of tars: <split>/*.tar; here: folders, table, ...",
    ),
)
OF_TEST = (("name: home", "in the names of the metrics: eval_home_accuracy"),)
OF_SHIFTS = (
    (
        "columns: [[0], [1, 2]]",
        "for each label of this set the classes it stands for: the largest of their logits counts",
    ),
)
OF_SUITE = (
    ("image_roots: [/data/images]", "folders, beside its own, where a table may say that images are"),
    (
        "allow_shared_files: true",
        "images of the training set in the test set, or two sets of one path, are an error without it",
    ),
)
RECOMMENDED = ("learning_rate: 1e-5", "per_device_train_batch_size: 8", "num_train_epochs: 2")


class Description(NamedTuple):
    """A suite file.

    Attributes:
        text: Of the file.
        todo: What is left for a person to say, a sentence each.
    """

    text: str
    todo: list[str]


def describe(look: Look, base: Path) -> Description:
    """Write the sets of a folder down, with paths that are relative to ``base``, the folder of the file."""
    names = class_names_of(look)
    writer = _Writer(look, ClassNames(names), base)
    writer.top()
    for key in ("train", "validation", "test"):
        writer.split(key)
    writer.shifts()
    writer.bottom()
    return Description("\n".join(writer.lines) + "\n", writer.todo)


def class_names_of(look: Look) -> list[str]:
    """Return the names of the classes: those of the training set, else of all sets that there are."""
    if "train" in look.splits:
        return list(look.splits["train"].names)
    parts = [*look.splits.values(), *look.shifts.values()]
    return sorted({name for part in parts for name in part.names})


def unknown_labels(part: Part, classes: ClassNames) -> list[str]:
    """Return the labels of a set that are no class, neither by name nor by number."""
    return [name for name in part.names if _class_of(name, classes) is None]


def value(content: Any) -> str:
    """Write a text, a list or a mapping as YAML in one line, quoted so that it is read back as it is."""
    plain = printable(content) == str(content)
    for style in (None, '"'):
        dumped: str = yaml.safe_dump(
            content, default_flow_style=True, default_style=style, allow_unicode=plain, width=float("inf")
        )
        text = dumped.removesuffix("...\n").strip()
        if len(text.splitlines()) == 1 and load_yaml(text) == content:  # a number that was text is none
            break
    return text


class _Writer:
    """The lines of a file, as they are written."""

    def __init__(self, look: Look, classes: ClassNames, base: Path) -> None:
        self.lines: list[str] = []
        self.todo: list[str] = []
        self._look, self._classes, self._base = look, classes, base

    def top(self) -> None:
        """Name, classes and captions."""
        train = self._look.splits.get("train")
        name = os.path.basename(os.path.realpath(self._look.folder)) or "suite"
        self.lines += ["# Written by `carot_hf suite init`. Correct it, then look: carot_hf suite check FILE",
                       "# Paths are relative to this file.", "", f"name: {value(name)}"]  # fmt: skip
        self.lines += [f'version: "1.0"  # {VERSION}', "", *_comment(EXPLAINED["class_names"])]
        if train is not None and train.numbered:
            self._say(
                "class_names: the labels are numbers without names. Write in the place of each number what it stands "
                "for: captions are made of it."
            )
        classes = [
            f"  - {value(name)}{text}" for name, text in zip(self._classes.class_names, self._counts(), strict=True)
        ]
        self.lines += ["class_names:", *classes, *_as_comments([LABEL_NAMES])]
        self.lines += ["", *_comment(EXPLAINED["templates"]), "templates:"]
        self.lines += [f'  - "{template}"' for template in DEFAULT_TEMPLATES]

    def split(self, key: str) -> None:
        """Train, validation or test."""
        part = self._look.splits.get(key)
        self.lines += ["", *_comment(EXPLAINED[key])] if key in EXPLAINED else [""]
        more = {"train": OF_TRAIN, "test": OF_TEST}.get(key, ())
        if part is not None:
            self._set(key, part, more, "")
        elif key == "validation":
            train = self._look.splits.get("train")
            if train is not None and max(train.counts.values()) < 2:
                self._missing(key, "each class has one image, of which none can be held out")
            else:
                self.lines.append(f"{'# ' if train is None else ''}validation: {HELD_OUT}")
        else:
            self._missing(key, "none was found")

    def shifts(self) -> None:
        """The shifted sets."""
        self.lines += ["", *_comment(EXPLAINED["shifts"])]
        head = len(self.lines)
        written = [self._set(name, part, OF_SHIFTS, "  ") for name, part in self._look.shifts.items()]
        self.lines.insert(head, "shifts:" if any(written) else "# shifts:")
        if not written:
            self.lines += ["#   sketch:", "#     path: sketch", *_as_comments(OF_SHIFTS, "    ")]

    def bottom(self) -> None:
        """What few suites need."""
        self.lines += ["", *_as_comments(OF_SUITE), "", *_comment(EXPLAINED["recommended"]), "# recommended:"]
        self.lines += [f"#   {line}" for line in RECOMMENDED]

    def _set(self, key: str, part: Part, more: Sequence[tuple[str, str]], indent: str) -> bool:
        """Write a set down, in comments if its labels are not the classes; return whether it counts."""
        unknown = unknown_labels(part, self._classes)
        mark = f"{indent}# " if unknown else indent
        given: dict[str, Any] = {
            "path": _relative(part.path, self._base),
            **({} if part.split is None else {"split": part.split}),
        }
        if unknown:
            cures = "which of the classes each of them is"
            if more == OF_SHIFTS:
                cures += ", or for a set with labels of its own in `columns` which classes each label stands for"
            self._say(
                f"{key}: its labels {printable(shown(unknown))} are none of the classes. Say in `label_names` {cures}, "
                "then take the marks before its lines away.",
                indent,
            )
            given["label_names"] = dict.fromkeys(unknown, "?")
        self.lines.append(f"{mark}{key}:  # {part.size:,} images")
        self.lines += [f"{mark}  {name}: {value(content)}" for name, content in given.items()]
        left = [(text, why) for text, why in more if text.partition(":")[0] not in given]
        self.lines += _as_comments(left, f"{mark}  ")
        return not unknown

    def _missing(self, key: str, why: str) -> None:
        self._say(f"{key}: {why}. Name its folder or file as `path`, and take the marks before its lines away.")
        self.lines += [f"# {key}:", f"#   path: {key}"]

    def _say(self, sentence: str, indent: str = "") -> None:
        """Leave something to a person."""
        self.todo.append(sentence)
        self.lines += _comment(f"TODO {sentence}", indent)

    def _counts(self) -> list[str]:
        """Images of each class by set, as comments."""
        found: dict[str, Counter[int | None]] = {}
        for name, part in {**self._look.splits, **self._look.shifts}.items():
            if unknown_labels(part, self._classes):
                continue
            found[name] = Counter()
            for label, count in part.counts.items():
                found[name][_class_of(label, self._classes)] += count
        return [
            f"  # {', '.join(f'{counts[index]:,} in {name}' for name, counts in found.items())}"
            for index in range(len(self._classes))
        ]


def _class_of(name: str, classes: ClassNames) -> int | None:
    """The class of a label: by name, else by number, as a suite reads it."""
    found = classes.find(name)
    if found is None and name.strip().isdecimal() and int(name) < len(classes):
        return int(name)
    return found


def _comment(text: str, indent: str = "") -> list[str]:
    marked = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=marked, subsequent_indent=marked, break_on_hyphens=False)


def _as_comments(keys: Iterable[tuple[str, str]], indent: str = "") -> list[str]:
    """Keys with what they are for behind them; what does not fit stands in further lines."""
    lines: list[str] = []
    for text, why in keys:
        first = f"{indent}# {text}  # "
        rest = f"{indent}#{' ' * (len(first) - len(indent) - 3)}# "
        lines += textwrap.wrap(why, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return lines


def _relative(path: Path, base: Path) -> str:
    text = Path(os.path.relpath(os.path.realpath(path), os.path.realpath(base))).as_posix()
    return f"./{text}" if text.startswith("~") else text
