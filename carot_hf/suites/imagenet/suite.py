"""ImageNet-1K and its shifts as a suite, from the Hub or from local copies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...basics.content_hash import sha256_of_facts
from ...basics.processes import usable_cores
from ...data.shift_set import ShiftSet
from ...data.stream import StreamedSet
from ...data.suite import ShiftSuite
from ..copies import checked_root, copy_of, places_of
from ..rows import Opened, newest_commit, open_source
from ..splits import as_set, hold_out_of_stream, split_off
from .corruptions import CorruptedSet, corruption_names, parse_name
from .names import SOURCES, resolve_names
from .sets import NUM_CLASSES, SETS, SHIFTS, SetFacts
from .several import with_one_label

VERSION = "1.0"  # of the suite: another one when classes, sets, the held-out rows or how an image is read change
HOLD_OUT_SHARE = 0.02
OPTIONS = (*("root", "streaming", "shifts", "check_counts", "class_names", "templates", "name_sources", "seed"),)


def imagenet_suite(
    *,
    root: str | Path | None = None,
    streaming: bool = False,
    shifts: Sequence[str] = SHIFTS,
    check_counts: bool = True,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    name_sources: Sequence[str] = SOURCES,
    seed: int = 0,
) -> ShiftSuite:
    """ImageNet-1K with its shifted sets.

    Trained on: ImageNet-1K's training set without a class-balanced 2 %, which is ``validation``: temperatures and the
    label smoothing are fitted on it, never on a reported set. ``test``, called ``imagenet``, is its validation set.

    Args:
        root: Folder of local copies, ``<root>/<id on the Hub>``, ``<root>/<last part of it>`` or ``<root>/<name>``, in
            the layout of the Hub or as one folder of images a class. ``None``: load from the Hub.
        streaming: Read all but ``validation`` as streams; nothing is read in advance but the labels of ``hard``.
        shifts: Names out of ``v2``, ``r``, ``a``, ``sketch``, ``objectnet``, ``hard`` (one of several labels is right),
            and ``c-<corruption>-<severity>``, made while it is read (``pip install carot_hf[corruptions]``).
        check_counts: Refuse copies without the published numbers of rows and labels.
        class_names: 1000 names; ``None``: see :mod:`carot_hf.suites.imagenet.names`.
        templates: Captions with ``{}``; ``None``: see there.
        name_sources: Where names and templates are looked for, in order.
        seed: Of the rows that are held out. Not the seed of the training: all runs share one validation set.
    Raises:
        ValueError: If a set, its labels or names are not as expected; for gated sets with the page to accept.
    """
    own, corruptions = _checked_shifts(shifts)
    loader = _Loader(checked_root(root), streaming, check_counts)
    imagenet = SETS["imagenet"]
    opened = loader.open(imagenet, "train", streaming)
    names = resolve_names(
        NUM_CLASSES,
        class_names=class_names,
        templates=templates,
        label_names=_class_label(opened.rows),
        label_names_of=imagenet.hub_id,
        folder=loader.names_folder(),
        sources=name_sources,
    )
    train, validation = loader.held_out(opened, imagenet, seed)
    test = loader.as_set(loader.open(imagenet, "validation", streaming), imagenet, "validation")
    shifted = {name: loader.shift(SETS[name], streaming) for name in own}
    shifted |= {name: _corrupted(test, name) for name in corruptions}
    return ShiftSuite(
        name="imagenet",
        class_names=names.class_names,
        templates=names.templates,
        train=train,
        validation=validation,
        test=test,
        shifts={name: shifted[name] for name in shifts},
        recommended={"dataloader_num_workers": _workers()},
        sources={"class_names": names.source, "templates": names.templates_source},
        datasets=[imagenet.hub_id, *(SETS[name].hub_id for name in own)],
        version=VERSION,
    )


class _Loader:
    """Opens the sets of the family and checks them against what is published."""

    def __init__(self, root: Path | None, streaming: bool, check_counts: bool) -> None:
        self._root, self._streaming, self._check_counts = root, streaming, check_counts
        self._commits: dict[tuple[str, str], str | None] = {}  # by name and split of what is read from the Hub

    def open(self, facts: SetFacts, split: str, streaming: bool) -> Opened:
        """Open a split; a stream of the Hub at the commit of this moment, at which it stays."""
        source = self._source(facts)
        commit = newest_commit(source) if streaming and isinstance(source, str) else None
        self._commits[facts.name, split] = commit
        layout = facts.layout if isinstance(source, str) else None  # a local copy may be kept in another way
        return open_source(source, split, layout=layout, streaming=streaming, revision=commit)

    def shift(self, facts: SetFacts, streaming: bool) -> ShiftSet:
        """Load a shifted set."""
        split = "test" if len(facts.splits) > 1 else facts.splits[0]
        opened = self.open(facts, split, streaming)
        if not facts.several_right:
            return self.as_set(opened, facts, split)
        rows, right = with_one_label(opened.rows, facts.num_labels, facts.name)
        data = self.as_set(opened._replace(rows=rows), facts, split, len(right) if streaming else None)
        data.right = right
        return data

    def as_set(self, opened: Opened, facts: SetFacts, split: str, rows: int | None = None) -> ShiftSet:
        """Make the set of a split; ``rows``: their number, if it is known otherwise."""
        rows = facts.rows[split] if rows is None and self._check_counts else rows
        return as_set(
            opened.rows,
            name="train" if split == "train" else facts.name,
            num_classes=NUM_CLASSES,
            label_names=facts.label_names(),
            columns=facts.columns(),
            in_order=True,
            published=None if rows is None else (rows, facts.num_labels),
            exif=facts.exif,
            crop_border=facts.crop_border,
            test_only=facts.test_only,
            **opened.places,
        )

    def held_out(self, opened: Opened, facts: SetFacts, seed: int) -> tuple[ShiftSet, ShiftSet]:
        """Split the training rows into training and validation."""
        train = self.as_set(opened, facts, "train")
        if isinstance(train, StreamedSet):
            source = self._source(facts)
            stamp = _stamp(source) if isinstance(source, Path) else self._commits[facts.name, "train"]
            key = None if stamp is None else f"{source} {stamp}"
            classes = facts.num_labels if self._check_counts else _distinct(train)
            held = hold_out_of_stream(train, share=HOLD_OUT_SHARE, classes=classes, seed=seed, key=key)
            return train, held
        return split_off(train, HOLD_OUT_SHARE, seed, balanced=True)

    def names_folder(self) -> Path | None:
        """The local folder that may hold the files of names: that of ImageNet-V2, whose classes are ImageNet's."""
        if self._root is None:
            return None
        return next((path for path in places_of(self._root, SETS["v2"].hub_id, "v2") if path.is_dir()), self._root)

    def _source(self, facts: SetFacts) -> str | Path:
        return copy_of(self._root, facts.hub_id, facts.name, cure=", or leave it out of `shifts`")


def _workers() -> int:
    """The cores that fall to one of this machine's processes and that it may use, at most 16."""
    of_machine = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, of_machine, usable_cores()))


def _corrupted(test: ShiftSet, name: str) -> ShiftSet:
    """The test set under a corruption."""
    if isinstance(test, StreamedSet):
        raise ValueError(f"Expected sets that are not streamed with '{name}', got `streaming`. Leave one of them out.")
    data = CorruptedSet(test, *parse_name(name))
    return ShiftSet(data, name=name, num_classes=test.num_classes, labels=test.labels)


def _class_label(rows: Any) -> list[str] | None:
    feature = rows.features.get("label")
    return list(feature.names) if hasattr(feature, "names") else None


def _distinct(data: StreamedSet) -> int:
    """Number of distinct labels of a stream, by reading it."""
    return len({data.to_label(item[data.label_column]) for _, item in data.share(0, 1)})


def _stamp(folder: Path) -> str:
    """A text that changes when a file of a local copy does."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else [folder]
    found = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return sha256_of_facts({"files": found})


def _checked_shifts(shifts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets of the table and corruptions among the shifts, or a ValueError."""
    known = [name for name, facts in SETS.items() if facts.shifted]
    own, corruptions = [name for name in shifts if name in known], [name for name in shifts if name.startswith("c-")]
    unknown = set(shifts) - {*own, *corruptions}
    if isinstance(shifts, str) or unknown or len(set(shifts)) < len(shifts):
        known += [f"c-{name}-<1..5>" for name in corruption_names()]
        raise ValueError(f"Expected `shifts` as a list of distinct names out of {known}, got {shifts!r}.")
    return own, corruptions
