"""What several commands share: the options that name data, and the models that suites start from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

START_MODELS = {
    "imagenet": "openai/clip-vit-base-patch16",
    "digits": str(Path(__file__).resolve().parent.parent / "suites" / "digits_clip"),
}
OF_THE_SUITE = "the suite's"  # start model, in metrics.json
LOCAL_NAME = "local.json"  # what metrics.json, which is published, does not say: places on this machine
SUITE = "digits, imagenet, a benchmark (pacs, domainnet, ...), a YAML file, or a folder of images"
METHODS = ("temperature", "perturbed", "density")


def add_suite_options(
    parser: argparse.ArgumentParser,
    default: str | None = "digits",
    *,
    required: bool = False,
    instead: str | None = None,
) -> None:
    """Add the options that name data; ``instead`` says what is taken without a suite where there is no default."""
    group = parser.add_argument_group("data")
    shown = SUITE if required else f"{SUITE}; default: {default or instead or 'none'}"
    group.add_argument("--suite", default=default, required=required, metavar="S", help=shown)
    add_part_options(group)


def add_part_options(group: Any) -> None:
    """Add the options that say what a suite is made of, to a parser or a group of it."""
    group.add_argument("--data_root", metavar="D", help="folder of local copies of what is on the Hub")
    group.add_argument("--streaming", action="store_true", help="read the data as streams")
    group.add_argument("--shifts", nargs="+", metavar="S", help="of imagenet's or a benchmark's shifted sets these")
    group.add_argument("--partial", action="store_true", help="take copies that are only a part")
    group.add_argument("--home", metavar="D", help="a benchmark's domain that is trained on")
    group.add_argument("--held_out", metavar="D", help="a benchmark's domain that is not, but all others are")


def add_model_options(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add the options that name a checkpoint."""
    shown = "folder, id on the Hub, or a file of weights in the naming of OpenAI's CLIP (FLYP, WiSE-FT, open_clip)"
    parser.add_argument("model", help=shown, **options)
    group = parser.add_argument_group("model")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    group.add_argument("--processor", metavar="P", help="of a file of weights: folder, or id on the Hub")
    group.add_argument(
        "--hidden_act", metavar="A", help="of a file of weights: quick_gelu (OpenAI), or gelu (most of open_clip)"
    )


def suite_options(script: Any) -> dict[str, Any]:
    """The options of `load_suite` that were given; each suite refuses those that it does not have."""
    options = {"root": script.data_root, "shifts": script.shifts, "streaming": script.streaming or None}
    options |= {"home": script.home, "held_out": script.held_out}
    options["check_counts"] = False if script.partial else None
    return {name: value for name, value in options.items() if value is not None}


def part_words(script: Any) -> list[str]:
    """The options that say what the suite is made of, as they stand on a command line."""
    words = []
    for name in ("data_root", "home", "held_out"):
        if (value := getattr(script, name)) is not None:
            words += [f"--{name}", value]
    words += ["--streaming"] if script.streaming else []
    words += ["--shifts", *script.shifts] if script.shifts else []
    return [*words, *(["--partial"] if script.partial else [])]


def suite_words(script: Any) -> list[str]:
    """The options that name the data, as they stand on a command line."""
    return ["--suite", script.suite, *part_words(script)]


def parts_of_no_suite(script: Any) -> str | None:
    """What is wrong where options say what a suite is made of, and none is named; ``None``: nothing."""
    words = part_words(script) if script.suite is None else []
    if not words:
        return None
    return f"expected --suite with {words[0]}, which says what a suite is made of: name the suite, or leave it out"


def start_model_of(suite: str) -> str:
    """The checkpoint that a suite is fine-tuned from: CLIP ViT-B/16, or the small one of the digits."""
    return START_MODELS.get(suite, START_MODELS["imagenet"])
