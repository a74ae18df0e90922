"""The benchmarks as data: what they are called on the Hub, how they are laid out, what is trained and judged on.

Facts, no loading. They lie in ``benchmarks.yaml``, one entry a benchmark, and are read when they are first asked for.
One of your own is an entry more, from outside as well: ``benchmarks()["mine"] = benchmark("mine", {...})``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

from ...basics.yaml_text import load_yaml
from ...data.labels import ClassNames
from ..keys import checked_keys

# Known, and no benchmark: by name, what to ask for.
REFUSED = {
    "imagenet-hard": "it is a shifted set of ImageNet. Add it to those of `imagenet`: `--suite imagenet --shifts v2 r "
    "a sketch objectnet hard`"
}
HOME, AWAY = "home", "away"  # in the place of domains: those that are trained on, and the others
_PART = {
    "split": (str, "split: train"),
    "domains": ((str, list), "domains: [photo]"),
    "rows": (float, "rows: 7200"),
    "of": (str, "of: stl10"),
    "same": (dict, "same: {car: automobile}"),
    "without": (list, "without: [monkey]"),
    "each": (str, "each: away"),
    "cut": (str, "cut: train"),
    "share": (float, "share: 0.1"),
    "name": (str, "name: home"),
}
_KEYS = {
    "title": (str, "title: PACS"),
    "id": (str, "id: flwrlabs/pacs"),
    "layout": (str, "layout: parquet"),
    "image": (list, "image: [image]"),
    "label": (list, "label: [label]"),
    "domain": (str, "domain: domain"),
    "domains": (dict, "domains: {photo: photo}"),
    "rows": (dict, "rows: {train: 100}"),
    "every_label": (bool, "every_label: true"),
    "labels": (list, "labels: [cat, dog]"),
    "readable": (dict, "readable: {TV: TV}"),
    "group": (dict, "group: {column: place, names: [land, water], with_label: true}"),
    "templates": (list, 'templates: ["a photo of a {}."]'),
    "names_source": (str, "names_source: the data set's ClassLabel"),
    "licence": (str, "licence: unknown"),
    "home": (str, "home: photo"),
    "train": (dict, "train: {split: train}"),
    "validation": (dict, "validation: {cut: train, share: 0.1}"),
    "test": (dict, "test: {split: test}"),
    "shifts": (dict, "shifts: {each: away, split: train}"),
    "verified": (str, "verified: columns with the card"),
    "not_verified": (str, "not_verified: the rows"),
}
_OPTIONAL = ("domain", "domains", "readable", "group", "home", "train", "validation")


@dataclass(frozen=True)
class Part:
    """Rows of a split.

    Attributes:
        split: Its name on the Hub.
        domains: Rows of these domains alone; empty: all rows.
        rows: How many there are, where the table of rows does not say it.
        of: Another benchmark whose rows these are; ``None``: the one itself.
        same: What that one calls a class, where it is not the class's name: from its label to the class.
        without: Labels of that one that are none of the classes; their rows are left out.
    """

    split: str
    domains: tuple[str, ...] = ()
    rows: int | None = None
    of: str | None = None
    same: Mapping[str, str] = field(default_factory=dict, hash=False)
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A share of each class (and domain) of another set of the suite, which no longer has it.

    Attributes:
        of: "train" or "validation".
        share: In (0, 1).
        name: Of the set; ``None``: see `Roles`.
    """

    of: str
    share: float
    name: str | None = None


@dataclass(frozen=True)
class Roles:
    """What is trained, calibrated and judged on; ``name`` is that of the test set."""

    name: str
    train: Part | None
    validation: Part | Cut | None
    test: Part | Cut
    shifts: Mapping[str, Part] = field(hash=False)


@dataclass(frozen=True)
class Group:
    """Groups of the images of a set: those of a column, or each label in each of them.

    Attributes:
        column: Its numbers, or the names of its ``ClassLabel`` or its texts, are those of ``names``.
        names: In the order of the numbers.
        with_label: A group is a label and a name.
    """

    column: str
    names: tuple[str, ...]
    with_label: bool = False


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is known of a benchmark before it is loaded.

    Attributes:
        name: The word.
        title: As it is called.
        hub_id: Data set on the Hub.
        layout: "parquet": the repository's own splits; "webdataset": tars in one folder a split.
        image: What the column of images may be called, in this order.
        label: What the column of labels may be called, in this order.
        domain: Column of the domains; ``None``: there are none.
        domains: By the names that we give them what stands in the column: a text (also that of a ``ClassLabel``), or a
            number, which is the ``ClassLabel``'s own.
        rows: By split, or by split and domain.
        every_label: Each label occurs in each set.
        labels: What the data call the classes, in the order of their numbers.
        readable: Names of classes that are not the label with spaces for ``_``, in lower case.
        templates: Captions with ``{}``.
        names_source: Where names and templates come from.
        licence: As far as it is known.
        home: The domain that is trained on if nobody names another.
        group: Groups of the images; ``None``: none.
        parts: Descriptions of "train", "validation", "test" and "shifts".
        verified: What of this was compared with what.
        not_verified: The rest.
    """

    name: str
    title: str
    hub_id: str
    layout: str
    image: tuple[str, ...]
    label: tuple[str, ...]
    domain: str | None = None
    domains: Mapping[str, str | int] = field(default_factory=dict, hash=False)
    rows: Mapping[str, Any] = field(hash=False)
    every_label: bool
    labels: tuple[str, ...]
    readable: Mapping[str, str] = field(default_factory=dict, hash=False)
    templates: tuple[str, ...]
    names_source: str
    licence: str
    home: str | None = None
    group: Group | None = None
    parts: Mapping[str, Any] = field(hash=False)
    verified: str = ""
    not_verified: str = ""

    @property
    def class_names(self) -> list[str]:
        """The classes as captions say them."""
        return [self.readable.get(label, label.replace("_", " ").lower()) for label in self.labels]

    @property
    def classes(self) -> ClassNames:
        """What a column of labels may say: numbers, or names of ours or of the data."""
        distinct = len(set(self.labels)) == len(self.labels)
        return ClassNames(self.class_names, list(self.labels) if distinct else None)

    @property
    def has_home(self) -> bool:
        """Whether one trains on some domains and is judged on the others."""
        return self.home is not None

    def expected(self, part: Part) -> int | None:
        """Return the rows of a part of this benchmark; ``None``: not known."""
        if part.rows is not None:
            return part.rows
        rows = self.rows.get(part.split)
        if isinstance(rows, Mapping):
            return sum(int(rows[name]) for name in part.domains or rows)
        return None if part.domains or rows is None else int(rows)

    def roles(self, home: Sequence[str] = ()) -> Roles:
        """Return which part is what.

        Args:
            home: Domains that are trained on; all others are shifts.
        """
        chosen = {HOME: tuple(home), AWAY: tuple(name for name in self.domains if name not in home)}
        shifts, test = self.parts["shifts"], self.parts["test"]
        if "each" in shifts:
            away = {name: _part({**shifts, "domains": [name]}, chosen) for name in chosen[shifts["each"]]}
        else:
            away = {name: _part(content, chosen) for name, content in shifts.items()}
        alone = home[0] if len(home) == 1 else HOME
        return Roles(
            name=test.get("name") or (alone if home else self.name),
            train=_part(self.parts["train"], chosen) if "train" in self.parts else None,
            validation=_role(self.parts["validation"], chosen) if "validation" in self.parts else None,
            test=_role(test, chosen),
            shifts=away,
        )


def _role(content: Mapping[str, Any], chosen: Mapping[str, tuple[str, ...]]) -> Part | Cut:
    if "cut" in content:
        return Cut(content["cut"], content["share"], content.get("name"))
    return _part(content, chosen)


def _part(content: Mapping[str, Any], chosen: Mapping[str, tuple[str, ...]]) -> Part:
    domains = content.get("domains", ())
    return Part(
        split=content["split"],
        domains=chosen[domains] if isinstance(domains, str) else tuple(domains),
        rows=int(content["rows"]) if "rows" in content else None,
        of=content.get("of"),
        same=content.get("same", {}),
        without=tuple(content.get("without", ())),
    )


def benchmark(name: str, content: Any, where: str = "benchmarks") -> Benchmark:
    """Read an entry of ``benchmarks.yaml``, or a mapping with the same keys; errors say ``where`` it stands.

    Raises:
        ValueError: If a key is unknown, missing or of the wrong kind.
    """
    required = [key for key in _KEYS if key not in _OPTIONAL]
    entry = checked_keys(content, where, name, _KEYS, required)
    parts: dict[str, Any] = {
        role: entry.pop(role) for role in ("train", "validation", "test", "shifts") if role in entry
    }
    for role, part in parts.items():
        many = part if role == "shifts" and "each" not in part else {role: part}
        for key, value in many.items():
            checked_keys(value, where, f"{name}.{key}", _PART, ())
    if (group := entry.pop("group", None)) is not None:
        entry["group"] = Group(group["column"], tuple(group["names"]), group.get("with_label", False))
    entry["labels"] = list(map(str, entry["labels"]))
    hub_id = entry.pop("id")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Benchmark(name=name, hub_id=hub_id, parts=parts, **given)


@lru_cache(maxsize=1)
def benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name; the same mapping each time, to which others may be added."""
    text = resources.files(__package__).joinpath("benchmarks.yaml").read_text(encoding="utf-8")
    return {name: benchmark(name, content, "benchmarks.yaml") for name, content in load_yaml(text).items()}
