"""YAML as people write it: ``1e-5`` is a number, ``no`` a word, a date text, and a key stands once."""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml

_DEEPEST = 20  # lists and mappings in each other


class Whole(int):
    """An integer that knows how it was written."""

    text: str


class Decimal(float):
    """A number with a point or an exponent that knows how it was written."""

    text: str


class Mapped(dict[Any, Any]):
    """A mapping that knows in which line each key was written, from 1."""

    lines: dict[Any, int]


class _Short(reprlib.Repr):
    """An alias of aliases is long when it is written out."""

    repr_Mapped = reprlib.Repr.repr_dict  # the name that reprlib looks for


_SHORT = _Short()
_SHORT.maxlevel = 2


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers and words of YAML 1.2."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Make a value; one that is none of what its tag says is an error of YAML, with its line."""
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of datetime, base64, int ...
            raise _wrong(f"expected a value of {node.tag}, got {_shown(error)}", node.start_mark) from error


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
    """Load one document; its mappings are `Mapped`.

    Raises:
        yaml.YAMLError: If it is none, is nested too deep, or a key is given twice or is neither word nor number.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise _wrong(f"expected at most {_DEEPEST} lists or mappings in each other, got more", event.start_mark)
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (AttributeError, TypeError, ValueError) as error:  # of what tags make in a second go
        raise _wrong(f"expected values as their tags say, got {_shown(error)}", loader.get_mark()) from error
    finally:
        loader.dispose()


def short(value: Any) -> str:
    """Write a value of a file out for a message, of large ones only the start."""
    return _SHORT.repr(value)


def as_number(text: str) -> float | None:
    """Read a number out of a text; ``None`` if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _wrong(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _mapping(loader: Any, node: Any) -> Mapped:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float) or key != key:
            raise _wrong(f"expected a word or a number as a key, got {short(key)}", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                f"{key!r} is given", seen[key], "and given again: expected each key once", key_node.start_mark
            )
        seen[key] = key_node.start_mark
    made = Mapped(loader.construct_pairs(node, deep=True))
    made.lines = {key: mark.line + 1 for key, mark in seen.items()}
    return made


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
