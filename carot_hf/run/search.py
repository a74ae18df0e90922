"""What a hyperparameter search looks for: never a metric of a shifted set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..calibration.names import DEFAULT_BEST_METRIC, HOME, SHIFTED, SPLIT, greater_is_better, set_of
from ..data.suite import ShiftSuite

Goal = Callable[[dict[str, float]], float]


def search_goal(args: Any, suite: ShiftSuite, own: Goal | None, direction: Any) -> tuple[Goal, Any]:
    """Return the objective of a search and its direction.

    Args:
        args: Their ``metric_for_best_model``, or ``eval_validation_nll``, is looked for.
        suite: Metrics of its shifted sets are kept from an objective of one's own.
        own: Objective of one's own; ``None``: the metric.
        direction: As given; ``None``: that of the metric, "minimize" for an objective of one's own.
    Raises:
        ValueError: If the direction is not the metric's.
    """
    metric = f"eval_{str(args.metric_for_best_model or DEFAULT_BEST_METRIC).removeprefix('eval_')}"
    if own is None:
        better = "maximize" if greater_is_better(metric) else "minimize"
        if direction not in (None, better):
            raise ValueError(
                f"Expected `direction` '{better}' for {metric!r}, got {direction!r}. Leave it out, or pass a "
                "`compute_objective`."
            )
        direction = better
    shifts = (*suite.shifts, SHIFTED)
    homes = (SPLIT, HOME, suite.test.name)

    def objective(metrics: dict[str, float]) -> float:
        """From the metrics of all sets but the shifted ones."""
        kept = {name: value for name, value in metrics.items() if set_of(name, (*homes, *shifts)) not in shifts}
        if own is not None:
            return _asked(own, kept, homes[1:])
        if metric not in kept:
            raise ValueError(
                f"Expected the metric {metric!r} of the evaluation, got {sorted(kept)}. Name one of these as "
                "`metric_for_best_model`, pass a `compute_objective`, or `eval_sets` 'all' if it is of the test set."
            )
        return kept[metric]

    return objective, direction or "minimize"


def _asked(own: Goal, metrics: dict[str, float], test: tuple[str, ...]) -> float:
    """Call an objective of one's own; one that asks for the test set, which was not measured, hears of the cure."""
    try:
        return own(metrics)
    except KeyError as error:
        if set_of(str(error.args[0]), test) is None:
            raise
        raise ValueError(
            f"Expected a `compute_objective` of what an evaluation during training measures, got one that asks for "
            f"{error.args[0]!r}. Pass `eval_sets` 'all' to measure the test set as well, or ask for the validation set."
        ) from error
