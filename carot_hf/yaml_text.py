"""YAML as people write it: ``1e-5`` is a number, ``no`` a word, a date text, and a key stands once."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Whole(int):
    """An integer that knows how it was written."""

    text: str


class Decimal(float):
    """A number with a point or an exponent that knows how it was written."""

    text: str


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers and words of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
               r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)  # fmt: skip


def load_yaml(text: str) -> Any:
    """Load one document.

    Raises:
        yaml.YAMLError: If it is none, or a key is given twice.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def as_number(text: str) -> float | None:
    """Read a number out of a text; ``None`` if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            twice = key in seen
        except TypeError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"expected a word or a number as a key, got {key!r}", key_node.start_mark
            ) from error
        if twice:
            raise yaml.constructor.ConstructorError(
                f"{key!r} is given", seen[key], "and given again: expected each key once", key_node.start_mark
            )
        seen[key] = key_node.start_mark
    return dict(loader.construct_pairs(node, deep=True))


def _whole(loader: Any, node: Any) -> Whole:
    number = Whole(loader.construct_yaml_int(node))
    number.text = node.value
    return number


def _decimal(loader: Any, node: Any) -> Decimal:
    number = Decimal(loader.construct_yaml_float(node))
    number.text = node.value
    return number


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)
