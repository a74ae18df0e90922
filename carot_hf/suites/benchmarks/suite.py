"""A benchmark as a suite: trained on its home, judged on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...data.labels import folded
from ...data.shift_set import ShiftSet
from ...data.suite import ShiftSuite
from ..copies import checked_root
from ..rows import hold_out
from .parts import Loader
from .table import Benchmark, Cut, Part, Roles, benchmarks

VERSION = "1.0"  # of the suites: another one when classes, sets or the rows that are held out change
OPTIONS = ("root", "streaming", "shifts", "check_counts", "home", "held_out", "seed")


def benchmark_suite(
    name: str,
    *,
    root: str | Path | None = None,
    streaming: bool = False,
    shifts: Sequence[str] | None = None,
    check_counts: bool = True,
    home: str | None = None,
    held_out: str | None = None,
    seed: int = 0,
) -> ShiftSuite:
    """Load a benchmark; see :data:`~carot_hf.suites.benchmarks.table.Benchmark` for what is known of each.

    Args:
        name: Out of :func:`~carot_hf.suites.benchmarks.table.benchmarks`.
        root: Folder of local copies, ``<root>/<id on the Hub>``, ``<root>/<last part of it>`` or ``<root>/<name>``.
            ``None``: load from the Hub.
        streaming: Read all sets as streams but those that parts are held out of, which are loaded whole.
        shifts: Names of the shifted sets that are wanted; ``None``: all.
        check_counts: Refuse copies without the published number of rows.
        home: The domain that is trained on; all others are shifts. ``None``: the benchmark's own.
        held_out: The domain that is not trained on (leave one domain out): the shift; all others are home.
        seed: Of the rows that are held out. Not the seed of the training: all runs share one validation set.
    Raises:
        ValueError: If there is no such benchmark, domain or set, or the data are not as expected.
    """
    facts = benchmarks().get(name)
    if facts is None:
        raise ValueError(f"Expected one of {list(benchmarks())}, got {name!r}. Correct the name.")
    roles = facts.roles(_home(facts, home, held_out))
    loader = Loader(checked_root(root), streaming, check_counts)
    wanted = _chosen(roles, shifts, facts)
    sets = _home_sets(loader, facts, roles, seed)
    away = {
        shift: loader.load(facts if part.of is None else benchmarks()[part.of], part, shift, facts)
        for shift, part in wanted.items()
    }
    others = [benchmarks()[part.of].hub_id for part in wanted.values() if part.of is not None]
    return ShiftSuite(
        name=facts.name,
        class_names=facts.class_names,
        templates=list(facts.templates),
        train=sets.get("train"),
        validation=sets.get("validation"),
        test=sets["test"],
        shifts=away,
        sources={"class_names": facts.names_source, "templates": facts.names_source},
        datasets=[facts.hub_id, *others],
        version=VERSION,
    )


def _home(facts: Benchmark, home: str | None, held_out: str | None) -> list[str]:
    """The domains that are trained on, or a ValueError."""
    if home is not None and held_out is not None:
        raise ValueError(
            f"Expected `home` or `held_out`, got both ({home!r}, {held_out!r}). `home` is the domain that is trained "
            "on, `held_out` the one that is not."
        )
    given = home if held_out is None else held_out
    if not facts.has_home:
        if given is not None:
            raise ValueError(
                f"Expected no `{'home' if held_out is None else 'held_out'}` with '{facts.name}', which has no domains "
                f"to choose from, got {given!r}. Leave it out."
            )
        return []
    known = {folded(name): name for name in facts.domains}
    chosen = known.get(folded(str(facts.home if given is None else given)))
    if chosen is None:
        raise ValueError(
            f"Expected one of the domains {list(facts.domains)} of '{facts.name}', got {given!r}. Correct the name."
        )
    return [chosen] if held_out is None else [name for name in facts.domains if name != chosen]


def _chosen(roles: Roles, shifts: Sequence[str] | None, facts: Benchmark) -> dict[str, Part]:
    """The shifted sets that are wanted."""
    if shifts is None:
        return dict(roles.shifts)
    unknown = isinstance(shifts, str) or set(shifts) - set(roles.shifts) or len(set(shifts)) < len(shifts)
    if unknown:
        raise ValueError(
            f"Expected `shifts` as a list of distinct names out of {list(roles.shifts)} for '{facts.name}', got "
            f"{shifts!r}. Correct it."
        )
    return {name: roles.shifts[name] for name in shifts}


def _home_sets(loader: Loader, facts: Benchmark, roles: Roles, seed: int) -> dict[str, ShiftSet]:
    """The sets for training, calibration and testing: those that are sets of their own, and what is cut of them."""
    described = {"train": roles.train, "validation": roles.validation, "test": roles.test}
    names = {"train": "train", "validation": "validation", "test": roles.name}
    cuts = {role: cut for role, cut in described.items() if isinstance(cut, Cut)}
    sets: dict[str, ShiftSet] = {}
    for role, part in described.items():
        if isinstance(part, Part):
            own = {name: cut for name, cut in cuts.items() if cut.of == role}
            data = loader.load(facts, part, names[role], facts, whole=bool(own))
            sets[role], cut_off = _cut(data, own, names, loader.domains(facts, part) if own else None, seed)
            sets |= cut_off
    return sets


def _cut(
    data: ShiftSet, cuts: dict[str, Cut], names: dict[str, str], domains: np.ndarray | None, seed: int
) -> tuple[ShiftSet, dict[str, ShiftSet]]:
    """Cut shares of each class, and of each class in each domain, off a set: the rest of it, and they."""
    if not cuts or data.labels is None:
        return data, {}
    strata = data.labels if domains is None else data.labels * (int(domains.max()) + 1) + domains
    rest, left, found = np.arange(len(data)), 1.0, {}
    for role, cut in cuts.items():
        kept, held = hold_out(strata[rest], cut.share / left, seed)
        found[role] = data.subset(rest[held], names[role])
        rest, left = rest[kept], left - cut.share
    return data.subset(rest, data.name), found
