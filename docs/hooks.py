"""What the site needs beyond Markdown: docstrings, formulas as MathML, pages and links outside of ``docs/``.

Docstrings use Sphinx' roles, as those of torch do. They are rewritten for mkdocstrings: a role becomes
a link where its target is on the site and code where it is not; ``:math:`` and ``.. math::`` become MathML, which
browsers draw without a script. `mkdocs.yml` names this file twice, for the extension and for the hooks.
"""

from __future__ import annotations

import html
import posixpath
import re
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
# Pages of the site that lie elsewhere in the repository.
ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "benchmarks.md": "benchmarks/README.md",
    "reference/ece.md": "carot_hf/ece/README.md",
}
_ROLE = re.compile(r":(class|func|meth|mod|attr|data|obj|exc|const):`~?([\w.]+)`")
_INLINE_MATH = re.compile(r":math:`(.+?)`", re.DOTALL)
_BLOCK_MATH = re.compile(r"^( *)\.\. math:: (.+(?:\n\1[ ]+\S.*)*)", re.MULTILINE)
_SECTION = re.compile(r"(?<=\S\n)(?=(?:Args|Attributes|Returns|Yields|Raises|Source):\n)")
_SOURCE = re.compile(r"^Source:\n((?: +.*\n?)+)", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
_ARGUMENTS = "<!-- the table of arguments -->"
_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


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
        if kind in ("meth", "attr") and "." not in name:
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


def on_config(config: Any) -> None:
    """Say where the sources of pages are edited."""
    if config.repo_url:
        config.edit_uri = f"edit/{BRANCH}/docs/"


def on_files(files: Any, config: Any) -> None:
    """Add the pages that lie elsewhere in the repository."""
    for page, path in ELSEWHERE.items():
        file = File.generated(config, page, abs_src_path=str(ROOT / path))
        file.edit_uri = f"../{path}"
        files.append(file)


def on_nav(nav: Any, config: Any, **_: Any) -> None:
    """Remember the pages for the first one."""
    config.extra["pages"] = [(page.title, page.file.src_uri) for page in nav.pages]


def on_page_markdown(text: str, *, page: Any, config: Any, **_: Any) -> str:
    """Lead links to where they are on the site, or else in the repository; fill in the table and the list of pages."""
    if _ARGUMENTS in text:
        text = text.replace(_ARGUMENTS, arguments_table())
    text = with_links(text, page.file.src_uri, str(config.repo_url or "").rstrip("/"))
    return with_all_pages(text, config.extra["pages"]) if page.is_homepage else text


def with_links(text: str, page: str, repository: str) -> str:
    """Rewrite the links of a page that leave its folder.

    Args:
        text: Markdown.
        page: Path on the site.
        repository: Its address; links to files that the site does not have lead there. Empty: they are shown as paths.
    Raises:
        FileNotFoundError: If there is no such file in the repository.
    """
    source = ROOT / ELSEWHERE.get(page, f"docs/{page}")
    on_site = {path: name for name, path in ELSEWHERE.items()}

    def show(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            if match[2].startswith("."):
                raise FileNotFoundError(
                    f"{source.relative_to(ROOT)}: expected a file at {match[2]}, got none. Correct the link."
                )
            return match[0]  # brackets in code; of a link mkdocs says so itself
        path = target.relative_to(ROOT).as_posix()
        name = path.removeprefix("docs/") if path.startswith("docs/") else on_site.get(path)
        if name is not None:
            return f"[{match[1]}]({posixpath.relpath(name, posixpath.dirname(page) or '.')}{match[3] or ''})"
        if repository:
            return f"[{match[1]}]({repository}/{'tree' if target.is_dir() else 'blob'}/{BRANCH}/{path}{match[3] or ''})"
        return f"`{path}`" if match[1].strip("`") in (path, target.name) else f"{match[1]} (`{path}`)"

    return _LINK.sub(show, text)


def with_all_pages(text: str, pages: list[tuple[str, str]]) -> str:
    """Add the pages that the first page does not name to its end."""
    named = {match[2] for match in _LINK.finditer(text)} | {"index.md"}
    rest = [f"[{title}]({path})" for title, path in pages if path not in named]
    return f"{text}\n\nAlso here: {', '.join(rest)}.\n" if rest else text


def on_post_page(output: str, **_: Any) -> str:
    """Leave out what makes the theme ask the repository's host for its stars."""
    return output.replace(' data-md-component="source"', "")


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas that arithmatex has marked into MathML."""

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[2]).strip()
        if match[1] == "div":  # it scrolls where it is wider than the page, which MathML itself does not
            return f'<div class="formula">{convert(text, display="block")}</div>'
        return str(convert(text, display="inline"))

    return _FORMULA.sub(formula, content)
