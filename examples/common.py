"""What the scripts share: the options that name data, the models that suites start from, how a script ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from carot_hf.basics.escape import printable

START_MODELS = {
    "imagenet": "openai/clip-vit-base-patch16",
    "digits": str(Path(__file__).resolve().parent / "digits" / "clip"),
}
OF_THE_SUITE = "the suite's"  # start model, in metrics.json
LOCAL_NAME = "local.json"  # what metrics.json, which is published, does not say: places on this machine
SUITES = (
    "'imagenet' (ImageNet-1K and five shifts from the Hub, or from --data_root), 'digits' (embedded, offline), or a "
)
SUITES += "YAML file of your own (examples/suites/pets.yaml)"


def add_suite_options(parser: argparse.ArgumentParser, default: str | None = "digits") -> None:
    """Add the options that name data."""
    parser.add_argument("--suite", default=default, help=f"{SUITES}; default: {default or 'none'}")
    parser.add_argument("--data_root", help="folder of local copies of ImageNet and its shifts, in place of the Hub")
    parser.add_argument("--streaming", action="store_true", help="read the data as streams")
    parser.add_argument("--shifts", nargs="+", help="shifted sets of imagenet; default: v2 r a sketch objectnet")
    parser.add_argument("--partial", action="store_true", help="take copies of ImageNet that are only a part of it")


def suite_options(script: Any) -> dict[str, Any]:
    """The options of `load_suite` that were given; each suite refuses those that it does not have."""
    options = {"root": script.data_root, "shifts": script.shifts, "streaming": script.streaming or None}
    options["check_counts"] = False if script.partial else None
    return {name: value for name, value in options.items() if value is not None}


def start_model_of(suite: str) -> str:
    """The checkpoint that a suite is fine-tuned from: CLIP ViT-B/16, or the small one of the digits."""
    return START_MODELS.get(suite, START_MODELS["imagenet"])


def run(main: Callable[[list[str]], Any]) -> None:
    """Run the ``main`` of a script; end with one line, not a traceback, on what the user can mend."""
    try:
        main(sys.argv[1:])
    except (ImportError, OSError, TypeError, ValueError) as error:  # OSError: a model that is not there, a full disk
        sys.exit(f"{Path(sys.argv[0]).name}: {printable(' '.join(str(error).split()))}")
