"""What the site needs beyond Markdown: docstrings in it, formulas as MathML, links that leave ``docs/``.

Docstrings use Sphinx' roles, as those of torch do. They are rewritten for mkdocstrings: a role becomes
a link where its target is on the site and code where it is not; ``:math:`` and ``.. math::`` become MathML, which
browsers draw without a script. `mkdocs.yml` names this file twice, for the extension and for the hooks.
"""

from __future__ import annotations

import html
import re
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
_ROLE = re.compile(r":(class|func|meth|mod):`~?([\w.]+)`")
_INLINE_MATH = re.compile(r":math:`(.+?)`", re.DOTALL)
_BLOCK_MATH = re.compile(r"^( *)\.\. math:: (.+(?:\n\1[ ]+\S.*)*)", re.MULTILINE)
_SECTION = re.compile(r"(?<=\S\n)(?=(?:Args|Attributes|Returns|Yields|Raises|Source):\n)")
_SOURCE = re.compile(r"^Source:\n((?: +.*\n?)+)", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
_ARGUMENTS = "<!-- the table of arguments -->"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)#]+)(#[^)]*)?\)")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring, in place."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(text: str, obj: griffe.Object) -> str:
    """Turn the roles of a docstring into Markdown; names are looked up from where the docstring stands."""

    def link(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if kind == "meth" and "." not in name:
            target = f"{obj.path if obj.is_class else obj.parent.path if obj.parent else ''}.{name}"
        else:
            first, dot, rest = name.partition(".")
            here = obj.module.imports.get(first, f"{obj.module.path}.{first}")
            target = name if first == "carot_hf" else here + dot + rest
        label = name.rpartition(".")[2] if target == name else name
        return f'<autoref optional identifier="{target}"><code>{label}</code></autoref>'

    text = _SECTION.sub("\n", text)  # griffe wants a blank line before each section
    text = _SOURCE.sub(lambda found: f"**Source:** {' '.join(found[1].split())}\n", text)
    text = _BLOCK_MATH.sub(lambda found: f"{found[1]}$$\n{found[1]}{found[2].strip()}\n{found[1]}$$", text)
    text = _INLINE_MATH.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    return _ROLE.sub(link, text)


def arguments_table() -> str:
    """Our training arguments with defaults and help, which stand in the code alone."""
    from carot_hf import CaRotTrainingArguments
    from carot_hf.basics.escape import table

    own, rows = get_annotations(CaRotTrainingArguments), [["argument", "default", ""]]
    for item in fields(CaRotTrainingArguments):
        if item.name in own:
            value: Any = item.default
            default = int(value) if type(value).__name__ == "Published" else value
            rows.append([f"`{item.name}`", f"`{default!r}`", item.metadata["help"]])
    return table(rows)


def on_page_markdown(text: str, *, page: Any, **_: Any) -> str:
    """Show links to files outside of ``docs/`` as their paths, for the site has no copy of them; fill in the table.

    Raises:
        FileNotFoundError: If there is no such file in the repository.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def show(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(
                f"docs/{page.file.src_uri}: expected a file at {match[2]}, got none. Correct the link."
            )
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        path = target.relative_to(ROOT).as_posix()
        return f"`{path}`" if match[1].strip("`") in (path, target.name) else f"{match[1]} (`{path}`)"

    return _LINK.sub(show, text.replace(_ARGUMENTS, arguments_table()) if _ARGUMENTS in text else text)


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas that arithmatex has marked into MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return str(convert(html.unescape(match[2]).strip(), display=display))

    return _FORMULA.sub(formula, content)
