"""From what a data set calls its labels to the classes of a suite: by name wherever both sides have names."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .columns import is_plain

LabelNames = Sequence[str] | Mapping[str, str]
_SHOWN = 12  # names of a list that an error shows


class ClassNames:
    """What the classes may be called by a data set.

    A name is looked for among the class names, then among these with case, ``_`` and spaces folded, then among
    ``label_names``, in the same two ways. A name that two classes share finds neither.

    Args:
        class_names: ``K`` names in the order of the classes.
        label_names: What the data call the classes: a list in the order of the classes, or a mapping from the data's
            name to the class name, in which several names may stand for one class.
    Attributes:
        class_names: The class names.
        label_names: The data's names, as a mapping to indices.
    Raises:
        ValueError: If ``label_names`` is a list of another length, or a mapping to something that is no class.
    """

    def __init__(self, class_names: Sequence[str], label_names: LabelNames | None = None) -> None:
        self.class_names = tuple(class_names)
        classes = list(enumerate(self.class_names))
        self._lookups = [_unique((name, index) for index, name in classes)]
        self._lookups.append(_unique((folded(name), index) for index, name in classes))
        self.label_names = self._own(label_names)
        self._lookups.append(dict(self.label_names))
        self._lookups.append(_unique((folded(name), index) for name, index in self.label_names.items()))

    def __len__(self) -> int:
        return len(self.class_names)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ClassNames)
            and self.class_names == other.class_names
            and self.label_names == other.label_names
        )

    def __hash__(self) -> int:
        return hash(self.class_names)

    def find(self, name: str) -> int | None:
        """Return the index of the class that a name stands for, ``None`` if it stands for none."""
        for lookup, key in zip(self._lookups, (name, folded(name)) * 2, strict=True):
            if key in lookup:
                return lookup[key]
        return None

    def known(self) -> list[str]:
        """Return the names that are looked for, the data's own first."""
        return [*self.label_names, *self.class_names]

    def is_own(self, name: str) -> bool:
        """Whether somebody said what a name stands for."""
        return name in self.label_names or folded(name) in self._lookups[3]

    def _own(self, label_names: LabelNames | None) -> dict[str, int]:
        if label_names is None:
            return {}
        if isinstance(label_names, Mapping):
            return {str(name): self._class(str(name), value) for name, value in label_names.items()}
        if isinstance(label_names, str) or len(label_names) != len(self.class_names):
            raise ValueError(
                f"Expected {len(self.class_names)} `label_names`, one for each class in order, got "
                f"{shown(label_names)}. Name them all, or give a mapping from the data's names to class names."
            )
        found = _unique((str(name), index) for index, name in enumerate(label_names))
        if len(found) < len(label_names):
            twice = [name for name, count in Counter(map(str, label_names)).items() if count > 1]
            raise ValueError(
                f"Expected distinct `label_names`, got {twice[0]!r} more than once. Give each class one name, or "
                "a mapping from the data's names to class names."
            )
        return found

    def _class(self, name: str, value: Any) -> int:
        index = self.find_class(value) if isinstance(value, str) else None
        if index is None:
            raise ValueError(
                f"Expected `label_names` to say for {name!r} one of the class names {shown(self.class_names)}, got "
                f"{value!r}. Correct it."
            )
        return index

    def find_class(self, name: str) -> int | None:
        """Return the index of a class by its own name, exactly or folded."""
        return self._lookups[0].get(name, self._lookups[1].get(folded(name)))


class LabelTable:
    """From what stands in a label column to the index of a class.

    Numbers are indices. Text, and True and False as text, is looked up among the names; text of digits that is no name
    is the number it spells. The names of a ``ClassLabel`` are looked up in the same way, so that the order in which a
    data set has them does not matter, and one made from a sorted listing of "0", "1", "10", ... gives the numbers.

    Args:
        own: The names of the column's ``ClassLabel``, in its order; ``None``: it is none.
        names: What text may stand for; empty: the numbers of a ``ClassLabel`` are taken.
        where: What is read, for errors.
        published: The order of the labels is known from elsewhere: numbers of a ``ClassLabel`` with other names stand.
    Raises:
        ValueError: If names of the ``ClassLabel`` stand for no class, or two of them for the same one; when called,
            with text that is neither a name nor a number.
    """

    def __init__(
        self,
        own: Sequence[str] | None,
        names: Sequence[str] | ClassNames,
        where: str,
        *,
        published: bool = False,
    ) -> None:
        self._where = where
        self._names = names if isinstance(names, ClassNames) else ClassNames(names)
        self._own: list[int] | None = None
        self._by_name = False
        if own is not None:
            self._own = self._matched(list(own), published)

    @property
    def looks_up(self) -> bool:
        """Whether the names of a ``ClassLabel`` are looked up, and not its numbers taken."""
        return self._own is not None

    @property
    def keeps_numbers(self) -> bool:
        """Whether each number stands for itself."""
        return self._own is None or self._own == list(range(len(self._names)))

    def finds_names(self, values: Sequence[Any]) -> bool:
        """Whether a column has names that are looked up, and not numbers alone."""
        if self._own is not None:
            return self._by_name
        return any(isinstance(value, str | bool) and self._names.find(str(value)) is not None for value in set(values))

    def __call__(self, value: Any) -> Any:
        """Return the index; what is neither text nor a number passes, for `ShiftSet` to refuse."""
        if isinstance(value, bool | np.bool_):
            value = str(value)  # a name like any other: nobody said which class is True
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace").strip()
        if isinstance(value, str):
            return self._find(value)
        if self._own is not None and isinstance(value, int | np.integer) and 0 <= value < len(self._own):
            return self._own[value]
        return value

    def all(self, values: Sequence[Any] | NDArray[Any]) -> NDArray[np.int64]:
        """``(N,)`` indices of a whole column.

        Raises:
            ValueError: If one is neither a name nor a whole number; the row is named.
        """
        known: dict[Any, int] = {}
        result = np.empty(len(values), dtype=np.int64)
        for row, value in enumerate(values.tolist() if isinstance(values, np.ndarray) else values):
            try:
                result[row] = known[type(value), value]  # True equals 1
            except (KeyError, TypeError):  # TypeError: a list
                index = self._whole(value, row)
                known[type(value), value] = result[row] = index
        return result

    def _whole(self, value: Any, row: int) -> int:
        if (reason := not_a_label(value)) is not None:
            raise ValueError(f"Expected labels of {self._where} to be numbers or names, got {reason} in row {row}.")
        try:
            index = self(value)
        except ValueError as error:
            raise ValueError(f"{error} (row {row})") from None
        if int(index) != index:
            raise ValueError(
                f"Expected labels of {self._where} to be whole numbers, got {value} in row {row}. Correct them."
            )
        return int(index)

    def _matched(self, own: list[str], published: bool) -> list[int] | None:
        found = [self._names.find(name) for name in own]
        if own and all(index is not None for index in found):
            self._check_distinct(own, found)
            self._by_name = True
            return [int(index) for index in found if index is not None]
        if own and all(name.strip().isdecimal() for name in own):
            return [int(name) for name in own]
        if published or len(self._names) == 0:
            return None
        missing = [name for name, index in zip(own, found, strict=True) if index is None]
        raise ValueError(
            f"Expected the labels of {self._where} to be called as the {len(self._names)} classes "
            f"{shown(self._names.known())}, in any order, got {shown(own)}, of which {shown(missing)} are none of "
            "these. Say in `label_names` what the data call each class, or give a set with other classes its own "
            "`columns`."
        )

    def _check_distinct(self, own: list[str], found: Sequence[int | None]) -> None:
        """Refuse two names that stand for one class unless somebody said so."""
        for index, count in Counter(found).items():
            alike = [name for name, place in zip(own, found, strict=True) if place == index]
            if count > 1 and index is not None and not all(self._names.is_own(name) for name in alike):
                raise ValueError(
                    f"Expected labels of {self._where} that stand for different classes, got {shown(alike)}, both for "
                    f"{self._names.class_names[index]!r}. Say in `label_names` what each of them is."
                )

    def _find(self, name: str) -> int:
        index = self._names.find(name)
        if index is not None:
            return index
        if name.strip().isdecimal():
            return int(name)
        if not name.strip():
            raise ValueError(f"Expected labels of {self._where} to be numbers or names, got {name!r}. Fill it in.")
        known = self._names.known()
        among = f" or one of {len(known)} names {shown(known)}" if known else ""
        raise ValueError(
            f"Expected labels of {self._where} to be numbers{among}, got {name!r}. Correct it, say in `label_names` "
            "what the data call each class, or name another label column."
        )


def folded(name: str) -> str:
    """A name without what people do not mean by it: case, ``_`` for a space, and the form of Unicode."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def not_a_label(value: Any) -> str | None:
    """Say what is wrong with something in the place of a label that is neither text nor a number."""
    if value is None or (isinstance(value, float) and value != value):
        return "nothing (null or NaN): drop these rows, or fill them in"
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) > 0:
        one_hot = np.ndim(value) == 1 and sorted(np.asarray(value).tolist()) == [0] * (len(value) - 1) + [1]
        kind = "a one-hot row" if one_hot else "a list"
        return f"{kind} ({value}): pass one class index a row, for one-hot rows their argmax"
    return None


def shown(names: Sequence[str]) -> str:
    """A list of names for an error, cut if it is long."""
    if isinstance(names, str) or len(names) <= _SHOWN:
        return repr(names if isinstance(names, str) else list(names))
    return f"[{', '.join(repr(name) for name in list(names)[:_SHOWN])}, ...] ({len(names)} names)"


def _unique(pairs: Any) -> dict[str, int]:
    """Names that stand for one index only."""
    found: dict[str, set[int]] = {}
    for name, index in pairs:
        found.setdefault(name, set()).add(index)
    return {name: next(iter(indices)) for name, indices in found.items() if len(indices) == 1}


def label_in_range(label: Any, num_labels: int, name: str, where: str) -> int:
    """Return a whole number in ``[0, num_labels)`` as a class index, or raise a ValueError."""
    whole = isinstance(label, int | np.integer) or (isinstance(label, float | np.floating) and label == label // 1)
    if isinstance(label, bool) or not whole or not 0 <= label < num_labels:
        raise ValueError(
            f"Expected labels in [0, {num_labels}) in set '{name}', got {label} at {where}. "
            "Pass class indices in the order of the class names, or the set's own `columns`."
        )
    return int(label)


def one_label_a_row(labels: Any, size: int, name: str) -> NDArray[Any]:
    """Return all labels as they are; raise a ValueError if one is missing or is no single value."""
    values = labels if isinstance(labels, np.ndarray) else np.asarray(labels) if is_plain(labels) else list(labels)
    if isinstance(values, list):
        for row, value in enumerate(values):
            if (reason := not_a_label(value)) is not None:
                raise ValueError(
                    f"Expected one label a row in set '{name}', a class index or a name, got {reason}, in row {row}."
                )
        values = np.asarray(values)
    if values.shape != (size,):
        raise ValueError(
            f"Expected `labels` of shape ({size},), one for each sample of set '{name}', got "
            f"{values.shape}. Pass class indices in the order of the rows, or leave them out."
        )
    if values.dtype.kind == "f" and np.isnan(values).any():
        row = int(np.argmax(np.isnan(values)))
        raise ValueError(f"Expected a label in set '{name}', got {not_a_label(float('nan'))}, in row {row}.")
    return values


def class_indices(values: NDArray[Any], num_labels: int, name: str, limit: int) -> NDArray[Any] | None:
    """Return labels as integers in range; ``None`` of text or truth, which names of a suite have to be matched with."""
    if values.dtype.kind in "USOb":
        return None
    if values.dtype.kind not in "iu":
        checked = [
            label_in_range(label, num_labels, name, f"index {index}") for index, label in enumerate(values.tolist())
        ]
        return np.array(checked)
    for index in np.flatnonzero((values < 0) | (values >= limit))[:1].tolist():
        label_in_range(values[index], num_labels, name, f"index {index}")
    return values
