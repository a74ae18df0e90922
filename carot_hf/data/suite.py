"""The suite that labelled sets form: what a model is trained on, calibrated on and judged on."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..basics.content_hash import sha256_of_facts
from ..basics.escape import guarded, printable
from ..calibration.names import common_name
from .captions import check_class_names, check_distinct, check_templates
from .labels import ClassNames, LabelNames
from .shift_set import ShiftSet

logger = guarded(logging.getLogger(__name__))

RESERVED_NAMES = ("id", "ood", "teacher", "validation")
_CURES = {
    "training": "Add it: `train` in the YAML file, a folder train/, or ShiftSuite(train=...)",
    "validation": "Add it: `validation: 0.1` (a share of `train`) or a set in the YAML file, a folder validation/, or "
    "ShiftSuite(validation=...)",
}


@dataclass
class ShiftSuite:
    """Everything a run needs of data: splits, shifted test sets, class names and templates.

    Attributes:
        name: Name of the suite.
        class_names: ``K`` names in the order of the labels.
        templates: Captions with ``{}`` for the class name.
        train: Trained on; ``None``: there is none, and nothing can be trained. This and the other sets may be a
            ``ShiftSet``, or rows of which one is made: a ``datasets.Dataset``, or anything with a length.
        validation: Held out of training; the temperature is fitted on it and nothing is reported on it. ``None``: there
            is none, and models are measured as they are.
        test: The in-distribution test set; its name is part of its metrics' names.
        shifts: Shifted test sets by name. Never selected on.
        recommended: Training arguments that suit this suite; they go before a preset and behind the command line.
        sources: Where class names and templates come from, as ``{"class_names": ..., "templates": ...}``.
        datasets: Ids of its data sets on the Hub, for the card of a pushed model.
        version: Of the suite; ``None``: it has none. Whoever changes what `content_hash` covers gives another one.
        label_names: What data sets call the classes, where that is not their name: a list in the order of the classes,
            or a mapping from the data's name to the class name.
        allow_shared: Take a training and a test set that have images in common.
    Raises:
        TypeError: If a set is neither a ``ShiftSet`` nor rows.
        ValueError: If names, templates or the number of classes do not fit, or there is only one class.
    """

    name: str
    class_names: list[str]
    templates: list[str]
    train: ShiftSet | None
    validation: ShiftSet | None
    test: ShiftSet
    shifts: dict[str, ShiftSet]
    recommended: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    version: str | None = None
    label_names: LabelNames | None = None
    allow_shared: bool = False

    def __post_init__(self) -> None:
        self.name = printable(self.name)
        self.version = None if self.version is None else printable(self.version)
        check_templates(self.templates)
        check_class_names(self.class_names)
        if not self.sources:  # ImageNet's published names have two pairs of equal ones
            check_distinct(self.class_names)
        self.train = None if self.train is None else self._set("train", self.train)
        self.validation = None if self.validation is None else self._set("validation", self.validation)
        self.test = self._set("test", self.test)
        self.shifts = {name: self._set(name, data) for name, data in self.shifts.items()}
        check_set_names([self.test.name, *self.shifts])
        home = [data for data in (self.train, self.validation) if data is not None]
        for split in (*home, self.test, *self.shifts.values()):
            if split.num_classes != len(self.class_names):
                raise ValueError(
                    f"Expected {split.num_classes} class names (set '{split.name}' has so many classes), got "
                    f"{len(self.class_names)}. Pass one name for each label, in order."
                )
        for split in home:
            if split.test_only:
                raise ValueError(
                    f"Expected set '{split.name}' to be one that may be trained and tuned on, got one whose terms "
                    "forbid it (ObjectNet). Use it as a shifted test set only."
                )
        for split in home:
            if split.right is not None:
                raise ValueError(
                    f"Expected one label an image in set '{split.name}', got several right ones (`right`). What is "
                    "trained or fitted needs one: use it as a test set only."
                )
        for split in (*home, self.test):
            if split.columns is not None:
                raise ValueError(
                    f"Expected set '{split.name}' to be labelled with the training classes, got `columns`. "
                    "Only shifted sets may have labels of their own."
                )
        self.train = None if self.train is None else self.train.matched(self.classes)
        self.validation = None if self.validation is None else self.validation.matched(self.classes)
        self.test = self.test.matched(self.classes)
        self.shifts = {name: data.matched(self.classes) for name, data in self.shifts.items()}
        self._check_labels_differ()

    @property
    def classes(self) -> ClassNames:
        """What the classes may be called by a data set."""
        return ClassNames(self.class_names, self.label_names)

    def _set(self, role: str, data: Any) -> ShiftSet:
        """A set of what stands for one; its labels are not matched yet."""
        if isinstance(data, ShiftSet):
            return data
        if isinstance(data, str | Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise TypeError(
                f"Expected a ShiftSet or rows as '{role}', got {type(data).__name__}. Wrap the data in "
                "carot_hf.ShiftSet(data, name=..., num_classes=...)."
            )
        return ShiftSet.of(data, name=role, classes=self.classes)

    def _check_labels_differ(self) -> None:
        """Refuse a training set of one class."""
        labels = None if self.train is None else self.train.labels
        if self.train is None or labels is None or self.train.caption_column is not None:
            return
        if (labels == labels[0]).all():
            raise ValueError(
                f"Expected at least two classes among the labels of set '{self.train.name}', got {labels[0]} for "
                "all of them. There is nothing to tell apart: check the split or the label column."
            )

    @property
    def evaluation_sets(self) -> dict[str, ShiftSet]:
        """Validation (if there is one), in-distribution test and shifts by name, in this order."""
        held = {} if self.validation is None else {"validation": self.validation}
        return {**held, self.test.name: self.test, **self.shifts}

    @property
    def content_hash(self) -> str:
        """SHA-256 of what the suite is, 64 hexadecimal digits: figures of suites with different ones do not compare.

        It covers the class names and templates in their order, the ids of the data sets on the Hub, and of each set its
        name, size, labels in the order of the rows, columns, how images are turned and cropped, and
        :attr:`ShiftSet.content`. Those of the embedded digits are the checksums of all pixels. Other images are not
        read, nor are captions of their own: two copies with the same labels in the same order and other pixels have the
        same hash, unless ``content`` tells them apart. Labels that are known only by reading the rows (of a stream, for
        one) are not covered, so a suite has one hash as a stream and another one when it is loaded whole. Paths,
        ``recommended``, and the suite's own name and version do not count. A set that there is none of counts as null.
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return sha256_of_facts(
            {
                "class_names": self.class_names,
                "templates": self.templates,
                "datasets": self.datasets,
                "splits": {role: None if data is None else data.facts for role, data in splits.items()},
                "shifts": {name: data.facts for name, data in self.shifts.items()},
            }
        )


def check_set_names(names: Sequence[str]) -> None:
    """Raise a ValueError unless sets, the test set and the shifts, can have metrics that are called so."""
    taken = [f"teacher_{name}" for name in (*names, *RESERVED_NAMES)]  # what a teacher's metrics begin with
    for name in names:
        text = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_\-]+", name)
        if not text or name in (*RESERVED_NAMES, *taken) or names.count(name) > 1:
            raise ValueError(
                f"Expected distinct set names of letters, digits, '_' and '-' other than {RESERVED_NAMES} and "
                f"teacher_<set>, got {name!r}. Metrics are called eval_<set>_<metric>; choose another name."
            )
    if (twice := common_name((*names, *RESERVED_NAMES))) is not None:
        raise ValueError(
            f"Expected set names that give one name for each metric, got {twice!r} for two of {list(names)}. Choose "
            "another name."
        )


def needed(data: ShiftSet | None, role: str, purpose: str) -> ShiftSet:
    """Return a set of a suite that there must be for a purpose.

    Args:
        data: The suite's ``train`` or ``validation``.
        role: "training" or "validation".
        purpose: What it is needed for, as "to fit a temperature on".
    Raises:
        ValueError: If there is none.
    """
    if data is None:
        raise ValueError(
            f"Expected a {role} set {purpose}, got a suite without one, which is there to evaluate models as they are. "
            f"{_CURES[role]}."
        )
    return data
