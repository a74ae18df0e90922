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


def add_suite_options(parser: argparse.ArgumentParser, default: str | None = "digits") -> None:
    """Add the options that name data."""
    group = parser.add_argument_group("data")
    group.add_argument("--suite", default=default, help=f"{SUITE}; default: {default or 'none'}")
    group.add_argument("--data_root", help="folder of local copies of what is on the Hub")
    group.add_argument("--streaming", action="store_true", help="read the data as streams")
    group.add_argument(
        "--shifts", nargs="+", help="shifted sets, of imagenet (default: v2 r a sketch objectnet) or a benchmark"
    )
    group.add_argument("--partial", action="store_true", help="take copies that are only a part of the data")
    group.add_argument("--home", help="domain of a benchmark that is trained on; the others are shifts")
    group.add_argument("--held_out", help="domain of a benchmark that is a shift; the others are trained on")


def add_model_options(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add the options that name a checkpoint."""
    shown = "folder, id on the Hub, or a file of weights in the naming of OpenAI's CLIP (FLYP, WiSE-FT, open_clip)"
    parser.add_argument("model", help=shown, **options)
    group = parser.add_argument_group("model")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    group.add_argument("--processor", help="of a file of weights: folder, or id on the Hub")
    group.add_argument("--hidden_act", help="of a file of weights: quick_gelu (OpenAI), or gelu (most of open_clip)")


def suite_options(script: Any) -> dict[str, Any]:
    """The options of `load_suite` that were given; each suite refuses those that it does not have."""
    options = {"root": script.data_root, "shifts": script.shifts, "streaming": script.streaming or None}
    options |= {"home": script.home, "held_out": script.held_out}
    options["check_counts"] = False if script.partial else None
    return {name: value for name, value in options.items() if value is not None}


def start_model_of(suite: str) -> str:
    """The checkpoint that a suite is fine-tuned from: CLIP ViT-B/16, or the small one of the digits."""
    return START_MODELS.get(suite, START_MODELS["imagenet"])
