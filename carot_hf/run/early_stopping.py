"""Early stopping: transformers' own callback, whose count survives a resume, and which says why it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from ..basics.escape import printable

_COUNT = "early_stopping_patience_counter"


class EarlyStopping(EarlyStoppingCallback):
    """Stop when the metric that chooses the best model has not become better in so many evaluations.

    Patience and threshold are those of the arguments at the start of a training. Only evaluations of the training
    count: not the one of ``eval_on_start``, and none that somebody asks for before or afterwards.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self._first_step: int | None = None  # of the training that runs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count, of a resumed run from where its checkpoint was."""
        super().on_train_begin(args, state, control, **kwargs)
        options: Any = args
        self.early_stopping_patience = options.early_stopping_patience
        self.early_stopping_threshold = options.early_stopping_threshold
        self._first_step = state.global_step
        # Workaround, transformers 5.17 to 5.23: the count in a checkpoint is read only with
        # `restore_callback_states_from_checkpoint`, which makes all callbacks with a state anew; and after a resume
        # from one that knows none of this callback saving ends in a KeyError. Until: counts come back unasked.
        states: Any = state.stateful_callbacks
        self.early_stopping_patience_counter = waited(states) if state.global_step else 0
        states[type(self).__name__] = self.state()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Count an evaluation without progress; after the last that is allowed stop, and say so."""
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        if self._first_step is None or state.global_step == self._first_step or name not in metrics:
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience and state.is_world_process_zero:
            tqdm.write(f"{'stopped':<11}{_reason(state, name, metrics[name], self.early_stopping_patience_counter)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count no more."""
        self._first_step = None


def arrange(handler: Any, args: Any) -> None:
    """Have the callback among those of a trainer where its arguments want one.

    Args:
        handler: Of the trainer's callbacks.
        args: Its arguments.
    Raises:
        ValueError: If there is another one of somebody's own.
    """
    own = [callback for callback in handler.callbacks if isinstance(callback, EarlyStopping)]
    check_alone(args, handler.callbacks)
    if args.early_stopping_patience and not own:
        handler.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
    for callback in own if not args.early_stopping_patience else ():
        handler.remove_callback(callback)


def check_alone(args: Any, callbacks: Iterable[Any]) -> None:
    """Refuse two callbacks that stop early.

    Args:
        args: Of the trainer.
        callbacks: Objects or classes, as ``Trainer`` takes them.
    Raises:
        ValueError: If there would be two.
    """
    kinds = [item if isinstance(item, type) else type(item) for item in callbacks]
    others = [kind for kind in kinds if issubclass(kind, EarlyStoppingCallback) and kind is not EarlyStopping]
    if args.early_stopping_patience and others:
        raise ValueError(
            f"Expected one callback that stops early, got `early_stopping_patience` {args.early_stopping_patience} and "
            f"a {others[0].__name__} among the callbacks. Leave one of them out."
        )


def waited(states: Any) -> Any:
    """Evaluations without progress up to a checkpoint, by the states of callbacks in it; 0 where none was counted."""
    state = states.get(EarlyStopping.__name__) if isinstance(states, Mapping) else None
    attributes = state.get("attributes") if isinstance(state, Mapping) else None
    return attributes.get(_COUNT, 0) if isinstance(attributes, Mapping) else 0


def _reason(state: TrainerState, name: str, value: float, count: int) -> str:
    """Why a training stops, in a line."""
    best = state.best_metric
    steps = [entry["step"] for entry in state.log_history if best is not None and entry.get(name) == best]
    since = "" if best is None else f", best {best:.4f}{f' at step {steps[0]:,.0f}' if steps else ''}"
    where = f"early at step {state.global_step:,} of {state.max_steps:,}"
    return f"{where}: {printable(name)} {value:.4f}{since}, patience {count}"
