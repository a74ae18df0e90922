"""From a run to what its card says."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics.installed import versions
from ..basics.redaction import public, public_text
from ..calibration.record import calibration_record
from ..models.lora import base_model
from .card import CLASSIFICATION, ZERO_SHOT, CardFacts, command_line, hub_ids


def run_facts_for_card(
    args: Any,
    suite: Any,
    *,
    given: Mapping[str, Any],
    model: Any,
    measured: Any,
    arguments: Mapping[str, Any],
    changes: Sequence[Any],
    **rest: Any,
) -> CardFacts:
    """Return what a card says.

    Args:
        args: Training arguments.
        suite: The suite.
        given: What a user says: ``model_name``, ``finetuned_from``, ``license``, ``language``, ``tags``, ``dataset``.
        model: That is trained, unwrapped or not.
        measured: Of the latest evaluation, a ``Reported``.
        arguments: That are not their defaults.
        changes: Since the run was resumed.
        **rest: Further fields of the card.
    """
    network = base_model(model)
    start = str(getattr(network.config, "_name_or_path", "") or "")
    return CardFacts(
        name=given.get("model_name") or Path(args.output_dir).name,
        task=CLASSIFICATION if args.objective == "cross_entropy" else ZERO_SHOT,
        suite=suite.name,
        sets={suite.test.name: "home", **dict.fromkeys(suite.shifts, "shifted")},
        metrics=measured.metrics,
        temperature=measured.temperature,
        intervals=measured.intervals,
        marks=measured.marks,
        n_bins=args.n_bins,
        templates=suite.templates,
        class_names=suite.class_names,
        processes=args.world_size,
        arguments=public(arguments),
        versions=versions(),
        seed=args.seed,
        preset=args.loss_preset,
        calibration=calibration_record(network),
        command=command_line(sys.argv),
        base_model=given.get("finetuned_from")
        or (None if Path(start).exists() else next(iter(hub_ids([start])), None)),
        license=given.get("license"),
        language=given.get("language"),
        datasets=as_list(given.get("dataset")) or suite.datasets,
        tags=as_list(given.get("tags")),
        suite_version=suite.version,
        suite_hash=suite.content_hash,
        changes=[public_text(f"After step {change.step:,} the run was resumed with {change}") for change in changes],
        **rest,
    )


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """Return one text or several as a list."""
    return [value] if isinstance(value, str) else list(value or [])
