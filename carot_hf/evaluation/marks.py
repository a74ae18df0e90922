"""Which shifted sets are no evidence for a calibration, since it has seen their like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..data.perturbed_set import is_seen
from ..data.sample_hash import sample_hash
from ..data.shift_set import ShiftSet
from ..data.stream import StreamedSet

KIND_SEEN, TARGET_SET = "kind seen", "target"


def marks_of(sets: Mapping[str, ShiftSet], scalings: Iterable[str], record: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the sets that stay out of the mean over the shifts, and why.

    A set that is corrupted as the perturbations corrupt is "kind seen", where something was fitted on them; the set of
    the images that a temperature was fitted for is "target".

    Args:
        sets: By name.
        scalings: Endings of what was fitted.
        record: Of what is in the weights; ``None``: nothing is.
    """
    record = record or {}
    fitted = bool(set(scalings) - {"ts"} or record.get("kept"))
    marks = {name: KIND_SEEN for name in sets if fitted and is_seen(name)}
    target = record.get("target")
    if target is not None:
        alike = {name: data for name, data in sets.items() if len(data) == target["n"]}
        known = {name: sample_hash(data) for name, data in alike.items() if not isinstance(data, StreamedSet)}
        marks |= {name: TARGET_SET for name, found in known.items() if found == target["hash"]}
    return marks
