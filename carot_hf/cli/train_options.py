"""The options of ``carot_hf train``: the suite, the method and ``TrainingArguments``; a YAML file may hold them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..basics.yaml_text import load_yaml
from ..data.suite import ShiftSuite, needed
from ..presets import PRESETS, preset_arguments
from ..run.checkpoint import checkpoint_folders, is_complete
from ..run.header import refuse_finished
from ..suites.load import load_suite
from ..training_args import CaRotTrainingArguments
from .data_options import SUITE, suite_options
from .parser import nearest, refuse_unknown

_NAMES = {"model": "model_name_or_path"}  # of a YAML file
_STEPS_AN_EPOCH = 8  # at least, where nobody has named a batch


@dataclass
class ScriptArguments:
    """What is trained on what."""

    suite: str = field(
        default="imagenet",
        metadata={"help": f"Data: {SUITE}."},
    )
    data_root: str | None = field(default=None, metadata={"help": "Folder of local copies of what is on the Hub."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data as streams: nothing is downloaded in advance."}
    )
    shifts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shifted sets of imagenet: v2 r a sketch objectnet c-fog-3 ... Default: the first five. Of a "
            "benchmark: some of its own; default: all."
        },
    )
    partial: bool = field(default=False, metadata={"help": "Take copies that are only a part of the data."})
    home: str | None = field(
        default=None, metadata={"help": "Domain of a benchmark that is trained on; the others are shifts."}
    )
    held_out: str | None = field(
        default=None, metadata={"help": "Domain of a benchmark that is a shift; the others are trained on."}
    )
    preset: str = field(
        default="carot",
        metadata={
            "help": "Method: " + " ".join(f"[{name}] {preset.source}" for name, preset in PRESETS.items()),
            "choices": sorted(PRESETS),
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to start from: CLIP or a relative (docs/backbones.md). Default: the suite's own."
        },
    )
    oracle: bool = field(
        default=False,
        metadata={"help": "Measure the temperature that is best for the shifts by their labels, too: to compare with."},
    )
    zero_shot: bool = field(default=False, metadata={"help": "Do not train: evaluate and calibrate the start model."})


class _Parser(HfArgumentParser):
    """One whose errors are ``ValueError``."""

    def error(self, message: str) -> Any:
        """Raise a ValueError that says how to see the options."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}. `carot_hf train --help_all` shows all options.")

    def read(self, words: Sequence[str]) -> tuple[ScriptArguments, CaRotTrainingArguments]:
        """Read the words; one that nothing knows is refused with the nearest option."""
        found = self.parse_args_into_dataclasses(list(words), return_remaining_strings=True, look_for_args_file=False)
        refuse_unknown(found[-1], self._option_string_actions)
        return found[0], found[1]


def parser_of() -> _Parser:
    """The parser of all options, those of ``TrainingArguments`` included."""
    parser = _Parser((ScriptArguments, CaRotTrainingArguments), prog="carot_hf train", allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="YAML file with any of these options; the command line goes first")
    return parser


def options_of(argv: Sequence[str]) -> tuple[_Parser, list[str], ScriptArguments, CaRotTrainingArguments]:
    """Read the command line without the suite; a bad option fails here, before anything is loaded.

    Returns:
        The parser with the defaults of the preset, the words (those of ``--config`` first), and what they say.
    """
    parser = parser_of()
    words = _with_config(parser, argv)
    first = HfArgumentParser(ScriptArguments, add_help=False, allow_abbrev=False)
    first.error = parser.error  # type: ignore[method-assign]
    script: ScriptArguments = first.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )[0]
    parser.set_defaults(output_dir=str(Path("out", "zero_shot" if script.zero_shot else script.preset)))
    parser.set_defaults(**preset_arguments(script.preset))
    return parser, words, *parser.read(words)


def parse(argv: Sequence[str]) -> tuple[ScriptArguments, CaRotTrainingArguments, ShiftSuite]:
    """Read the command line; the order of precedence is command line, its YAML file, suite, preset."""
    parser, words, script, early = options_of(argv)
    if early.resume_from_checkpoint is None and not early.overwrite_output_dir:
        refuse_finished(early.output_dir)
        refuse_checkpoints(early.output_dir)
    suite = load_suite(script.suite, **suite_options(script))
    train = needed(suite.train, "training", "to train on")
    few = _batch_of_few(len(train), {*suite.recommended}, words, early)
    if few and early.process_index == 0:
        print(f"Batches of {min(few.values())}, for {suite.name} has {len(train):,} training images.")
    parser.set_defaults(**few, **suite.recommended)
    return script, parser.read(words)[1], suite


def _batch_of_few(
    images: int, recommended: set[str], words: Sequence[str], args: CaRotTrainingArguments
) -> dict[str, int]:
    """The batch of a training set that is too small for the published one, where nobody has named a batch."""
    named = {word.partition("=")[0].replace("-", "_") for word in words}
    name = "per_device_train_batch_size"
    fixed = {f"__{name}", "__contrastive_batch_size"} & named or name in recommended
    if fixed or images >= _STEPS_AN_EPOCH * getattr(args, name) * args.world_size:
        return {}
    whole = 2 ** int(math.log2(max(2, images // _STEPS_AN_EPOCH)))
    return {name: max(1, whole // args.world_size)}


def _with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The words of the command line behind those of the file that it names."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.error = parser.error  # type: ignore[method-assign]
    own.add_argument("--config", type=Path)
    found, words = own.parse_known_args(list(argv))
    return words if found.config is None else [*config_words(parser, found.config), *words]


def config_words(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """Turn a YAML file of options into words of a command line.

    Args:
        parser: That will read them.
        path: A mapping from options, without their dashes, to values; ``model`` is ``model_name_or_path``. The value of
            ``suite`` may be what a suite's own file says; paths in it are relative to this file.
    Raises:
        ValueError: If there is no such file, it is no mapping, or a key is no option.
    """
    if not path.is_file():
        raise ValueError(f"Expected a YAML file as --config, got {path}, which is not there.")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected YAML in {path}, got {error}. Correct that line.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected options and their values in {path}, got {type(content).__name__}.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    words = []
    for key, value in content.items():
        name = _NAMES.get(key, key)
        if name not in actions:
            raise ValueError(f"{path}: expected an option, got {key!r}.{nearest(str(key), actions)}")
        if name == "suite" and isinstance(value, Mapping):  # it stands in the file itself: see suite_from_file
            if path.suffix not in (".yaml", ".yml"):  # its name would be that of something else
                raise ValueError(f"Expected a file .yaml as --config with a suite in it, got {path}. Rename it.")
            value = str(path)
        words += _words(name, value, actions[name])
    return words


def _words(name: str, value: Any, action: argparse.Action) -> list[str]:
    if value is None:
        return []
    if value is True and action.nargs == "?":
        return [f"--{name}"]
    if isinstance(value, list) and len(value) != 1 and action.nargs is None:
        raise ValueError(f"Expected one value of {name}, got {value}. Several can be given in Python only.")
    if isinstance(value, list):
        return [f"--{name}", *(_text(part) for part in value)]
    return [f"--{name}={_text(value)}"]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(getattr(value, "text", value))  # a number as it was written


def refuse_checkpoints(output_dir: str) -> None:
    """Raise a ValueError if there are checkpoints of an earlier run in a folder."""
    if any(is_complete(folder) for folder in checkpoint_folders(output_dir)):
        raise ValueError(
            f"Expected an `output_dir` without checkpoints, got {output_dir}. Add --resume_from_checkpoint to go on "
            "from them, --overwrite_output_dir to delete them, or choose another folder."
        )
