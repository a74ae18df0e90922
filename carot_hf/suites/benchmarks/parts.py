"""Sets of a benchmark: rows of a split or of some of its domains, with labels and groups; their number checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.columns import names_of
from ...data.groups import Groups
from ...data.labels import LabelTable, folded
from ...data.shift_set import ShiftSet
from ...data.stream import StreamedSet, shard_rows
from ..copies import copy_of
from ..rows import Opened, check_labels, newest_commit, open_source
from ..splits import as_set
from .table import Benchmark, Part


class Loader:
    """Opens sets of benchmarks, each split once.

    Args:
        root: Folder of local copies; ``None``: the Hub.
        streaming: Open what is not cut as streams.
        check_counts: Refuse other numbers of rows than those of the table.
    """

    def __init__(self, root: Path | None, streaming: bool, check_counts: bool) -> None:
        self._root, self._streaming, self._check_counts = root, streaming, check_counts
        self._whole: dict[tuple[str, str], _Whole] = {}

    def load(self, facts: Benchmark, part: Part, name: str, target: Benchmark, *, whole: bool = False) -> ShiftSet:
        """Load a part of a benchmark as a set with the labels of ``target``, that of the suite.

        Args:
            whole: Not as a stream: it is cut into parts by the numbers of its rows.
        Raises:
            ValueError: If there is no copy, a column is missing, or rows, labels or domains are not as expected.
        """
        expected = facts.expected(part) if self._check_counts else None
        if self._streaming and not whole:
            return self._stream(facts, part, name, target, expected)
        key = facts.hub_id, part.split
        if key not in self._whole:
            self._whole[key] = _Whole(self._open(facts, part.split, False), facts, part.split)
        data = self._whole[key].part(part, name, facts, target)
        self._check(data, facts, target, expected)
        return data

    def domains(self, facts: Benchmark, part: Part) -> NDArray[np.int64] | None:
        """``(n,)`` which of its domains each row of a part is of, as it was loaded; ``None``: it is not of several."""
        return self._whole[facts.hub_id, part.split].domains_of(part) if len(part.domains) > 1 else None

    def _open(self, facts: Benchmark, split: str, streaming: bool) -> Opened:
        source = copy_of(self._root, facts.hub_id, facts.name)
        commit = newest_commit(source) if streaming and isinstance(source, str) else None
        layout = facts.layout if isinstance(source, str) else None  # a local copy may be kept in another way
        return open_source(source, split, layout=layout, streaming=streaming, revision=commit)

    def _stream(self, facts: Benchmark, part: Part, name: str, target: Benchmark, expected: int | None) -> ShiftSet:
        opened = self._open(facts, part.split, True)
        rows, label = opened.rows, _found(opened.rows, facts.label, "labels", facts)
        if part.domains:
            column = _domain_column(rows, facts)
            lookup = _Lookup(rows, column, facts.domains, facts)
            rows = rows.filter(partial(_is_of, lookup, frozenset(part.domains)), input_columns=[column])
        if part.of is not None:
            to = _Translation(rows, label, facts, part, target)
            features = rows.features
            rows = rows.filter(partial(_has_label, to), input_columns=[label])
            rows = rows.map(partial(_relabelled, to, label), input_columns=[label], features=features)
        data = _set(rows, name, facts if part.of is None else target, facts, label, opened.places, expected)
        if facts.group is not None:
            columns = [label, facts.group.column]
            passed = [
                row for shard in range(rows.num_shards) for row in shard_rows(rows.select_columns(columns), shard)
            ]
            to_label = data.to_label if isinstance(data, StreamedSet) else None
            labels = [to_label(row[label]) if to_label else row[label] for row in passed]
            data.groups = groups_of(rows, [row[facts.group.column] for row in passed], np.array(labels), facts)
        return data

    def _check(self, data: ShiftSet, facts: Benchmark, target: Benchmark, expected: int | None) -> None:
        if expected is None or data.labels is None:
            return
        if len(data) != expected:
            raise ValueError(
                f"Expected {expected:,} rows in '{data.name}' ({facts.title}), got {len(data):,}. The copy is "
                "incomplete or another version; for a part of it on purpose pass `check_counts=False` (`--partial`)."
            )
        if facts.every_label and facts is target:
            check_labels(data.name, data.labels, expected, len(facts.labels))


class _Whole:
    """A split whose rows can be had by number."""

    def __init__(self, opened: Opened, facts: Benchmark, split: str) -> None:
        self.opened, self.facts, self.split = opened, facts, split
        self.label = _found(opened.rows, facts.label, "labels", facts)
        self._domains: NDArray[np.int64] | None = None
        self._data: ShiftSet | None = None

    @property
    def data(self) -> ShiftSet:
        """All rows, with the benchmark's own labels."""
        if self._data is None:
            rows = self.opened.rows
            self._data = _set(rows, self.split, self.facts, self.facts, self.label, self.opened.places, None)
            if self.facts.group is not None and self._data.labels is not None:
                column = _found(rows, (self.facts.group.column,), "groups", self.facts)
                values = list(rows.with_format(None)[column])
                self._data.groups = groups_of(rows, values, self._data.labels, self.facts)
        return self._data

    def part(self, part: Part, name: str, facts: Benchmark, target: Benchmark) -> ShiftSet:
        """Some of the rows as a set of a suite."""
        if part.of is not None:
            return self._translated(part, name, facts, target)
        return self.data.subset(self._rows_of(part), name)

    def domains_of(self, part: Part) -> NDArray[np.int64]:
        """``(n,)`` the domain of each row of a part, as numbers."""
        return self._codes()[self._rows_of(part)]

    def _rows_of(self, part: Part) -> NDArray[np.int64]:
        if not part.domains:
            return np.arange(len(self.data))
        names = list(self.facts.domains)
        rows = np.flatnonzero(np.isin(self._codes(), [names.index(name) for name in part.domains]))
        if len(rows) == 0:
            raise ValueError(
                f"Expected rows of the domain {' or '.join(part.domains)} in split '{part.split}' of "
                f"{self.facts.title}, got none. The copy is incomplete."
            )
        return rows

    def _codes(self) -> NDArray[np.int64]:
        if self._domains is None:
            column = _domain_column(self.opened.rows, self.facts)
            read = _Lookup(self.opened.rows, column, self.facts.domains, self.facts)
            numbers = {name: number for number, name in enumerate(self.facts.domains)}
            values = list(self.opened.rows.with_format(None)[column])
            self._domains = np.array([numbers[read(value)] for value in values])
        return self._domains

    def _translated(self, part: Part, name: str, facts: Benchmark, target: Benchmark) -> ShiftSet:
        """The rows whose labels are classes of another benchmark, with its labels."""
        rows = self.opened.rows
        to = _Translation(rows, self.label, facts, part, target)
        labels = [to(value) for value in list(rows.with_format(None)[self.label])]
        kept = [row for row, label in enumerate(labels) if label is not None]
        rows = rows.select(kept).remove_columns(self.label)
        rows = rows.add_column(self.label, np.array([label for label in labels if label is not None], np.int64))
        return _set(rows, name, target, facts, self.label, self.opened.places, None)


def _set(
    rows: Any,
    name: str,
    classes: Benchmark,
    facts: Benchmark,
    label: str,
    places: Mapping[str, Any],
    expected: int | None,
) -> ShiftSet:
    """Make a set of rows with the labels of a benchmark; a stream's rows are as many as expected, or counted."""
    streamed = not hasattr(rows, "__len__")
    return as_set(
        rows,
        name=name,
        num_classes=len(classes.labels),
        label_names=classes.classes,
        published=(expected, len(classes.labels)) if streamed and expected is not None else None,
        image=_found(rows, facts.image, "images", facts),
        label=label,
        exif=False,
        **places,
    )


def _found(rows: Any, names: Sequence[str], what: str, facts: Benchmark) -> str:
    """The first of the columns that there is."""
    for name in names:
        if name in (rows.features or {}):
            return name
    raise ValueError(
        f"Expected a column {' or '.join(map(repr, names))} of {what} in {facts.title}, got "
        f"{sorted(rows.features or {})}. The copy has another layout: describe it in a YAML file "
        "(see examples/suites/)."
    )


def _domain_column(rows: Any, facts: Benchmark) -> str:
    return _found(rows, (str(facts.domain),), "domains", facts)


class _Lookup:
    """From what stands in a column to one of our names for it.

    A text is looked up, folded; of a ``ClassLabel`` its name, unless numbers are what is known: so are its numbers.
    """

    def __init__(self, rows: Any, column: str, known: Mapping[str, str | int], facts: Benchmark) -> None:
        self._names = names_of(rows.features[column])
        self._where = f"{facts.title}, column {column!r},"
        self._known = list(known.values())
        self._by_number = all(isinstance(value, int) for value in known.values())
        self._lookup = {value if self._by_number else folded(str(value)): name for name, value in known.items()}

    def __call__(self, value: Any) -> str:
        """Return the name."""
        key = value
        if self._by_number:
            key = int(value) if str(value).strip().isdecimal() else value
        else:
            named = self._names is not None and isinstance(value, int | np.integer)
            key = folded(self._names[value] if named and self._names is not None else str(value))
        if key not in self._lookup:
            of = "" if self._names is None else f" of the ClassLabel {list(self._names)}"
            raise ValueError(
                f"Expected {self._where} to say one of {self._known}, got {value!r}{of}. The copy is another version."
            )
        return self._lookup[key]


class _Translation:
    """From a label of one benchmark to that of another, by the names; ``None``: it is none of its classes."""

    def __init__(self, rows: Any, label: str, facts: Benchmark, part: Part, target: Benchmark) -> None:
        self._own = LabelTable(names_of(rows.features[label]), facts.classes, f"{facts.title}, column {label!r},")
        self._to: list[int | None] = []
        for name in facts.labels:
            index = target.classes.find(part.same.get(name, name))
            if (index is None) != (name in part.without):
                raise ValueError(
                    f"Expected each label of {facts.title} to be a class of {target.title} or one of those that are "
                    f"left out {list(part.without)}, got {name!r}. Correct `same` or `without`."
                )
            self._to.append(index)

    def __call__(self, value: Any) -> int | None:
        """Return the other label."""
        own = int(self._own(value))
        if not 0 <= own < len(self._to):
            raise ValueError(f"Expected labels in [0, {len(self._to)}), got {value!r}. The copy is another version.")
        return self._to[own]


def _is_of(lookup: _Lookup, wanted: frozenset[str], value: Any) -> bool:
    return lookup(value) in wanted


def _has_label(to: _Translation, value: Any) -> bool:
    return to(value) is not None


def _relabelled(to: _Translation, label: str, value: Any) -> dict[str, Any]:
    return {label: to(value)}


def groups_of(rows: Any, values: Sequence[Any], labels: NDArray[Any], facts: Benchmark) -> Groups:
    """Make the groups of rows of ``n`` values, of a ``ClassLabel`` by its names, with ``(n,)`` class indices.

    Raises:
        ValueError: If a value is none of the groups.
    """
    group = facts.group
    if group is None:
        raise ValueError(f"Expected a benchmark with groups, got {facts.title}. It has none.")
    feature = rows.features[group.column]
    texts = names_of(feature) is not None or any(isinstance(value, str) for value in values)
    known = {name: name if texts else number for number, name in enumerate(group.names)}
    read = _Lookup(rows, group.column, known, facts)
    numbers = {name: number for number, name in enumerate(group.names)}
    codes = np.array([numbers[read(value)] for value in values])
    if not group.with_label:
        return Groups(group.names, codes)
    pairs = tuple(f"{label}, {name}" for label in facts.class_names for name in group.names)
    return Groups(pairs, labels * len(group.names) + codes)
