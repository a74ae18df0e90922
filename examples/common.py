"""What the scripts share: the options that name data, the models that suites start from, how a script ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from carot_hf import Evaluator, ShiftSet, ShiftSuite
from carot_hf.basics.escape import printable
from carot_hf.calibration.fit import fit_scaling
from carot_hf.calibration.metrics import read_set

START_MODELS = {
    "imagenet": "openai/clip-vit-base-patch16",
    "digits": str(Path(__file__).resolve().parent / "digits" / "clip"),
}
OF_THE_SUITE = "the suite's"  # start model, in metrics.json
LOCAL_NAME = "local.json"  # what metrics.json, which is published, does not say: places on this machine
SUITES = (
    "'imagenet' (ImageNet-1K and five shifts from the Hub, or from --data_root), 'digits' (embedded, offline), or a "
)
SUITES += "YAML file (examples/suites/pets.yaml) or a folder of your own"


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


def oracle_metrics(evaluator: Evaluator, suite: ShiftSuite, left_out: Collection[str] = ()) -> dict[str, float]:
    """ECE with the one temperature that is best for all shifted sets, by their labels: a bound to compare with.

    It is fitted on what it is measured on, so it is no method. Each set weighs the same.

    Args:
        evaluator: Of a model without a temperature in its weights.
        suite: With shifts.
        left_out: Shifts that stay out of the mean, as of ``ood``.
    Returns:
        ``eval_<set>_ece_oracle`` of the test set and the shifts, ``eval_id_...`` and ``eval_ood_...``.
    """
    found = {data.name: _predicted(evaluator, data) for data in (suite.test, *suite.shifts.values())}
    counted = [name for name in suite.shifts if name not in left_out] or list(suite.shifts)
    shifted = [found[name] for name in counted]
    width = max(logits.shape[1] for logits, _ in shifted)
    rows = [
        F.pad(logits, (0, width - logits.shape[1]), value=-1e4) for logits, _ in shifted
    ]  # classes without a chance
    labels, weights = [part[1] for part in shifted], [torch.full((len(part),), 1 / len(part)) for part in rows]
    fitted = fit_scaling(
        torch.cat(rows),
        torch.cat(labels),
        link=evaluator.link,
        criterion="nll",
        warn=False,
        sample_weight=torch.cat(weights),
    )
    seen = {name: read_set(*part, {"": (fitted, ["ece"])}, link=evaluator.link)[0][""] for name, part in found.items()}
    ece = {name: part.bins.ece for name, part in seen.items()}
    ece |= {"id": ece[suite.test.name], "ood": sum(ece[name] for name in counted) / len(counted)}
    return {f"eval_{name}_ece_oracle": value for name, value in ece.items()}


def _predicted(evaluator: Evaluator, data: ShiftSet) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = evaluator.predict(data)
    if labels is None:
        raise ValueError(
            f"Expected labels in set '{data.name}', got none: there is no best temperature to compare with."
        )
    return logits, labels


def run(main: Callable[[list[str]], Any]) -> None:
    """Run the ``main`` of a script; end with one line, not a traceback, on what the user can mend."""
    try:
        main(sys.argv[1:])
    except (ImportError, OSError, TypeError, ValueError) as error:  # OSError: a model that is not there, a full disk
        sys.exit(f"{Path(sys.argv[0]).name}: {printable(' '.join(str(error).split()))}")
