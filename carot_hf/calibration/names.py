"""The metrics by name: which direction is better, and which of them may choose a model."""

from __future__ import annotations

from collections.abc import Iterable

from .metrics import GROUP_METRICS, METRICS

DEFAULT_BEST_METRIC = "eval_validation_nll"
SPLIT, HOME, SHIFTED = "validation", "id", "ood"  # as the sets of every suite are called, beside their own names


def directions() -> dict[str, str]:
    """Return the direction of every metric that a set can have, those with a temperature as well."""
    rows = [*METRICS.values(), *GROUP_METRICS.values()]
    scaled = {f"{row.name}_{end}": row.direction for row in rows if row.scaled for end in ("ts", "pts", "dts")}
    return {row.name: row.direction for row in rows} | scaled


def parse_metric(name: str, sets: Iterable[str]) -> list[tuple[str, str]]:
    """Read ``[eval_][teacher_]<set>_<metric>`` against the names that there are, whole.

    Args:
        name: As in ``metric_for_best_model``.
        sets: Names of sets.
    Returns:
        Pairs of set and metric; several if names of sets end as names of metrics begin. Empty: it is none of ours.
    """
    bare, sets = name.removeprefix("eval_"), list(sets)
    for prefix in ("", "teacher_"):
        found = [(data, metric) for data in sets for metric in directions() if bare == f"{prefix}{data}_{metric}"]
        if found:
            return found
    return []


def common_name(sets: Iterable[str]) -> str | None:
    """Return a name that metrics of two sets would share, as ``a_top5_accuracy`` of the sets "a" and "a_top5"."""
    names = [f"{data}_{metric}" for data in sets for metric in directions()]
    return next((name for name in names if names.count(name) > 1), None)


def set_of(name: str, sets: Iterable[str]) -> str | None:
    """Return the set of a metric that somebody's ``compute_metrics`` made: the longest name that it begins with."""
    bare, known = name.removeprefix("eval_"), sorted(sets, key=len, reverse=True)
    for prefix in ("", "teacher_"):
        for data in known:
            if bare.startswith(f"{prefix}{data}_"):
                return data
    return None


def greater_is_better(name: str) -> bool:
    """Return the direction of a metric of any set, by the longest name of a metric that it ends with.

    Raises:
        ValueError: If zero is best.
    """
    bare = name.removeprefix("eval_")
    for metric in sorted(directions(), key=len, reverse=True):
        if bare == metric or bare.endswith(f"_{metric}"):
            if directions()[metric] == "signed":
                _raise_signed(name)
            return directions()[metric] == "higher"
    return bare.rpartition("_")[2] != "loss"  # as in transformers


def check_selection(
    name: str, greater: bool | None, homes: Iterable[str], shifts: Iterable[str], *, all_sets: bool = True
) -> None:
    """Refuse to choose a model by a metric of a shifted set, by a signed one, or against a metric's direction.

    Args:
        name: ``metric_for_best_model``.
        greater: ``greater_is_better``; ``None``: not given.
        homes: Names of the sets of the training distribution.
        shifts: Names of the shifted sets.
        all_sets: These are the names of all sets, so that the set of a metric of somebody's own can be told.
    Raises:
        ValueError: As said. A metric that is none of ours is refused only if it is of a shifted set.
    """
    homes, shifts = list(homes), list(shifts)
    found = parse_metric(name, [*homes, *shifts])
    of: set[str | None] = {data for data, _ in found}
    if not of and all_sets:
        of = {set_of(name, [*homes, *shifts])}
    if of & set(shifts):
        raise ValueError(
            f"Expected `metric_for_best_model` of the in-distribution or the validation set, got {name!r}. Choosing a "
            f"model by shifted test sets spoils them as tests; use '{DEFAULT_BEST_METRIC}' or 'eval_id_accuracy'."
        )
    known, bare = directions(), name.removeprefix("eval_")
    ways = {known[metric] for _, metric in found} | ({known[bare]} if bare in known else set())
    if "signed" in ways:
        _raise_signed(name)
    wrong = "lower" if greater else "higher"
    if greater is not None and wrong in ways:
        raise ValueError(
            f"Expected `greater_is_better` {not greater} for {name!r}, got {greater}: the {wrong} it is, the better. "
            "Leave it out; it follows from the metric."
        )


def chosen_by(name: str | None, test: str) -> bool:
    """Tell whether a metric that chooses a model is of the test set, which is reported: "id" or its own name.

    Args:
        name: ``metric_for_best_model``.
        test: Name of the test set.
    """
    return name is not None and set_of(name, (SPLIT, HOME, test, SHIFTED)) in (HOME, test)


def _raise_signed(metric: str) -> None:
    raise ValueError(
        f"Expected `metric_for_best_model` of which more or less is better, got {metric!r}, which is signed and best "
        f"at 0. Use '{DEFAULT_BEST_METRIC}', or a calibration error, e.g. 'eval_validation_ece'."
    )
