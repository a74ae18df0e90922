"""What a model is trained on, calibrated on and judged on: one in-distribution family and its shifts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from . import digits
from .prompts import check_templates

RESERVED_NAMES = ("id", "ood", "teacher", "validation")
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, AttributeError, Image.DecompressionBombError)


class ShiftSet(Dataset):
    """A sized data set of ``{"image": RGB PIL image, "label": int}``.

    Args:
        data: Anything with a length whose items are mappings, e.g. a ``datasets.Dataset`` with an ``Image`` feature.
        name: Short name; the metrics of the set carry it.
        num_classes: Number of training classes, ``K``.
        columns: For each label of the set the training classes it stands for, one list a label; ``None``: all classes,
            one to one.
        labels: All labels, if they can be had without decoding images. Read from ``data`` when it is a
            ``datasets.Dataset``. They are checked at once; otherwise each label is checked when it is read.
        image_column: Key of the image.
        label_column: Key of the label; ``None``: the items have none (for prediction only).
    Raises:
        ValueError: If the set is empty, a label or a column is out of range, or, when an item is read, its image
            cannot be decoded (the set and the index are named).
    """

    def __init__(
        self,
        data: Any,
        *,
        name: str,
        num_classes: int,
        columns: Sequence[Sequence[int]] | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
    ) -> None:
        self.data, self.name, self.num_classes = data, name, num_classes
        self.columns = None if columns is None else [list(group) for group in columns]
        self.image_column, self.label_column = image_column, label_column
        if not hasattr(data, "__len__"):
            raise ValueError(
                f"Expected a data set with a length for '{name}', got {type(data).__name__}. Streamed data cannot be "
                "drawn by index; load it whole, or save it to disk first."
            )
        if len(data) == 0:
            raise ValueError(f"Expected at least one sample in set '{name}', got an empty data set. Check its split.")
        if self.columns is not None:
            _check_columns(name, self.columns, num_classes)
        if labels is None and hasattr(data, "column_names") and label_column in data.column_names:
            labels = np.asarray(data.with_format(None)[label_column])
        self.labels = None if labels is None else np.asarray(labels)
        if self.labels is not None and self.labels.dtype.kind not in "iu":
            self.labels = np.array([self._check_label(label, index) for index, label in enumerate(self.labels)])
        if self.labels is not None:
            for index in np.flatnonzero((self.labels < 0) | (self.labels >= self.num_labels))[:1].tolist():
                self._check_label(self.labels[index], index)

    @property
    def num_labels(self) -> int:
        """Number of labels of this set: the training classes, or one for each list of columns."""
        return self.num_classes if self.columns is None else len(self.columns)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            item = self.data[index]
            image = item[self.image_column].convert("RGB")
        except _DECODING_ERRORS as error:
            raise ValueError(
                f"Expected an image that can be decoded in set '{self.name}' at index {index}, got "
                f"{type(error).__name__}: {error}. Replace or drop this sample."
            ) from error
        except KeyError as error:
            raise ValueError(
                f"Expected the key '{self.image_column}' in set '{self.name}' at index {index}, got the keys "
                f"{sorted(item)}. Name the right one with `image_column`."
            ) from error
        if self.label_column is None:
            return {"image": image}
        if self.label_column not in item:
            raise ValueError(
                f"Expected the key '{self.label_column}' in set '{self.name}' at index {index}, got the keys "
                f"{sorted(item)}. Name the right one with `label_column`."
            )
        return {"image": image, "label": self._check_label(item[self.label_column], index)}

    def select(self, logits: Tensor) -> Tensor:
        """Turn logits of the training classes into logits of this set's labels.

        Args:
            logits: ``(n, K)`` float.
        Returns:
            ``(n, num_labels)``: for each label the maximum over its columns, before any softmax.
        """
        if self.columns is None:
            return logits
        if all(len(group) == 1 for group in self.columns):
            return logits[:, [group[0] for group in self.columns]]
        return torch.stack([logits[:, group].amax(dim=1) for group in self.columns], dim=1)

    def _check_label(self, label: Any, index: int) -> int:
        whole = isinstance(label, int | np.integer) or (isinstance(label, float | np.floating) and label == label // 1)
        if isinstance(label, bool) or not whole or not 0 <= label < self.num_labels:
            raise ValueError(
                f"Expected labels in [0, {self.num_labels}) in set '{self.name}', got {label} at index {index}. "
                "Pass class indices in the order of the class names, or the set's own `columns`."
            )
        return int(label)


@dataclass
class ShiftSuite:
    """Everything a run needs of data: splits, shifted test sets, class names and templates.

    Attributes:
        name: Name of the suite.
        class_names: ``K`` names in the order of the labels.
        templates: Captions with ``{}`` for the class name.
        train: Trained on.
        validation: Held out of training; the temperature is fitted on it and nothing is reported on it.
        test: The in-distribution test set; its name is part of its metrics' names.
        shifts: Shifted test sets by name. Never selected on.
        recommended: Training arguments that suit this suite; they go before a preset and behind the command line.
    Raises:
        ValueError: If names, templates or the number of classes do not fit.
    """

    name: str
    class_names: list[str]
    templates: list[str]
    train: ShiftSet
    validation: ShiftSet
    test: ShiftSet
    shifts: dict[str, ShiftSet]
    recommended: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_templates(self.templates)
        names = [self.test.name, *self.shifts]
        for name in names:
            if name in RESERVED_NAMES or not re.fullmatch(r"[A-Za-z0-9_\-]+", name) or names.count(name) > 1:
                raise ValueError(
                    f"Expected distinct set names of letters, digits, '_' and '-' other than {RESERVED_NAMES}, got "
                    f"{name!r}. Metrics are called eval_<set>_<metric>; choose another name."
                )
        for split in (self.train, self.validation, self.test, *self.shifts.values()):
            if split.num_classes != len(self.class_names):
                raise ValueError(
                    f"Expected {split.num_classes} class names (set '{split.name}' has so many classes), got "
                    f"{len(self.class_names)}. Pass one name for each label, in order."
                )
        for split in (self.train, self.validation, self.test):
            if split.columns is not None:
                raise ValueError(
                    f"Expected set '{split.name}' to be labelled with the training classes, got `columns`. "
                    "Only shifted sets may have labels of their own."
                )

    @property
    def evaluation_sets(self) -> dict[str, ShiftSet]:
        """Validation, in-distribution test and shifts by name, in this order."""
        return {"validation": self.validation, self.test.name: self.test, **self.shifts}


def load_suite(name_or_yaml: str, **options: Any) -> ShiftSuite:
    """Load a suite by name.

    Args:
        name_or_yaml: ``"digits"``: real images of digits from installed packages, no network. A demonstration, not
            evidence for ImageNet.
        **options: Options of the suite; ``digits`` has none.
    Raises:
        ValueError: If there is no such suite or option.
    """
    if name_or_yaml == "imagenet":
        raise ValueError(
            "Expected a suite that this version has ('digits'), got 'imagenet'. The ImageNet suite is not part of "
            "it yet; build a carot_hf.ShiftSuite from your own copies, or try --suite digits."
        )
    if name_or_yaml != "digits":
        raise ValueError(
            f"Expected the name of a suite ('digits'), got {name_or_yaml!r}. For other data build a "
            "carot_hf.ShiftSuite of carot_hf.ShiftSet."
        )
    if options:
        raise ValueError(f"Expected no options for the suite 'digits', got {sorted(options)}. Leave them out.")
    return _digits_suite()


class _Arrays:
    """Images and labels in memory, as items."""

    def __init__(self, split: digits.DigitSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"image": Image.fromarray(self.split.images[index]), "label": int(self.split.labels[index])}


def _digits_suite() -> ShiftSuite:
    def shift_set(name: str, split: digits.DigitSplit) -> ShiftSet:
        return ShiftSet(_Arrays(split), name=name, num_classes=len(digits.CLASS_NAMES), labels=split.labels)

    splits = digits.fine_tuning_splits()
    return ShiftSuite(
        name="digits",
        class_names=list(digits.CLASS_NAMES),
        templates=list(digits.TEMPLATES),
        train=shift_set("train", splits["train"]),
        validation=shift_set("validation", splits["validation"]),
        test=shift_set("uci", splits["test"]),
        shifts={name: shift_set(name, split) for name, split in digits.shift_splits().items()},
        recommended={
            "learning_rate": 5e-4,
            "per_device_train_batch_size": 128,
            "num_train_epochs": 33,  # 33 x 6 = 198 optimizer steps
            "warmup_steps": 0.1,
            "teacher_update_every": 4,  # 1/50 of the run, as 500 of 25,030
            "logging_steps": 10,
            "save_steps": 50,
            "save_total_limit": 2,
        },
    )


def _check_columns(name: str, columns: list[list[int]], num_classes: int) -> None:
    for label, group in enumerate(columns):
        if not group or any(not 0 <= column < num_classes for column in group):
            raise ValueError(
                f"Expected for label {label} of set '{name}' a list of training classes in [0, {num_classes}), got "
                f"{group}. Give one non-empty list of class indices for each label."
            )
