"""Where class names and templates come from; none of ImageNet's are part of this package.

Names and templates are looked for, each on its own, in this order:

1. given by the user;
2. ``classnames.txt`` and ``zeroshot_classification_templates.txt`` in a local folder, or beside a data set
   ``clip-benchmark/wds_*`` on the Hub (offline: in its cache);
3. an installed ``open_clip_torch``: its file of names is read by path, neither imported nor executed;
4. the names of the data set's ``ClassLabel`` (it has no templates), with a warning.

Published numbers are of OpenAI's 1000 names and 80 templates: those of 2 and 3. The ``ClassLabel`` of
``ILSVRC/imagenet-1k`` has WordNet's synonyms ("tench, Tinca tinca") instead; the first of each is taken, because a
caption that lists synonyms is unlike those CLIP was trained on, and the figures are not comparable with published ones.
Names are never keys: two pairs of OpenAI's names are equal.
"""

from __future__ import annotations

import ast
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from ...basics.escape import guarded
from ...data.captions import PLACEHOLDER, check_templates

logger = guarded(logging.getLogger(__name__))

SOURCES = ("files", "open_clip", "ClassLabel")
DEFAULT_TEMPLATE = "a photo of a {}."
HUB_ID = "clip-benchmark/wds_imagenetv2"  # the files of ImageNet-R, -A and ObjectNet name the labels of those sets
NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
FILES = (NAMES_FILE, TEMPLATES_FILE)
_IMAGENET_CLASSES = 1000
_CLASS_LABEL = "ClassLabel"


@dataclass(frozen=True)
class ResolvedNames:
    """Class names and templates, and where they come from.

    Attributes:
        class_names: One for each class, in order; duplicates are possible.
        templates: With ``{}`` for the class name.
        source: Where the names come from, e.g. ``"user"`` or ``"ClassLabel of ILSVRC/imagenet-1k"``.
        templates_source: The same for the templates; ``"default"``: no source had any.
    """

    class_names: list[str]
    templates: list[str]
    source: str
    templates_source: str


@dataclass(frozen=True)
class _Offer:
    source: str
    names: list[str] | None = None
    templates: list[str] | None = None
    missing: str = ""


def resolve_names(
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    label_names_of: str = "the data set",
    folder: str | Path | None = None,
    indices: Sequence[int] | None = None,
    sources: Sequence[str] = SOURCES,
) -> ResolvedNames:
    """Find class names and templates, in the order of the module's docstring, and log where they come from.

    Args:
        num_classes: Number of classes, ``K``.
        class_names: ``K`` names given by the user.
        templates: Templates given by the user.
        label_names: Names of the data set's ``ClassLabel``. Passed over if they are WordNet ids or
            the numbers 0, 1, 2, ...
        label_names_of: The data set they belong to.
        folder: Local folder with the two files, e.g. a copy of a ``clip-benchmark/wds_*`` data set. With a folder the
            Hub is not asked.
        indices: The ImageNet classes that the ``K`` classes are, if they are a part of the 1000; sources with 1000
            names are then cut down to these.
        sources: Sources to try behind the user's, in order; a part of ``SOURCES``.
    Returns:
        Names, templates and their sources. Templates that nobody has become ``["a photo of a {}."]``.
    Raises:
        ValueError: If no source has names, a source has another number of names, a template has no place for the
            name, or a file cannot be understood.
    """
    unknown = [source for source in sources if source not in SOURCES]
    if unknown:
        raise ValueError(f"Expected `sources` out of {SOURCES}, got {unknown}. Leave these out.")
    found, found_templates, missing = None, None, []
    for offer in _offers(class_names, templates, label_names, label_names_of, folder, sources):
        if found is None and offer.names is not None:
            found = (_fit(offer.names, num_classes, indices, offer.source), offer.source)
        if found_templates is None and offer.templates is not None:
            found_templates = (_check(offer.templates, offer.source), offer.source)
        if found and found_templates:
            break
        missing += [offer.missing] if offer.missing else []
    if found is None:
        raise ValueError(
            f"Expected the names of {num_classes} classes, got none ({'; '.join(missing) or 'no sources'}). Pass "
            f"`class_names`, use a data set whose ClassLabel has names, put {NAMES_FILE} and {TEMPLATES_FILE} into "
            f"`folder` or go online once for those of '{HUB_ID}', or `pip install open_clip_torch`."
        )
    if found_templates is None:
        found_templates = ([DEFAULT_TEMPLATE], "default")
    resolved = ResolvedNames(found[0], found_templates[0], found[1], found_templates[1])
    _say(resolved, missing)
    return resolved


def _say(resolved: ResolvedNames, missing: Sequence[str]) -> None:
    """Log where names and templates come from, and what that means for comparisons."""
    if resolved.templates_source == "default":
        logger.warning(
            "No source has templates (%s): the only one is %r. ImageNet's published numbers use 80.",
            "; ".join(missing),
            DEFAULT_TEMPLATE,
        )
    if resolved.source.startswith(_CLASS_LABEL):
        logger.warning(
            "Class names are those of the %s, WordNet's synonyms: figures do not compare with published ones. The "
            "names of the papers could not be had (%s).",
            resolved.source,
            "; ".join(missing) or "no other source was asked",
        )
    logger.info("%d class names from: %s.", len(resolved.class_names), resolved.source)
    logger.info("%d templates from: %s.", len(resolved.templates), resolved.templates_source)


def _offers(
    class_names: Sequence[str] | None,
    templates: Sequence[str] | None,
    label_names: Sequence[str] | None,
    label_names_of: str,
    folder: str | Path | None,
    sources: Sequence[str],
) -> Iterator[_Offer]:
    """Yield what each source has; a source is not touched before its turn."""
    for words, option in ((class_names, "class_names"), (templates, "templates")):
        if isinstance(words, str):
            raise ValueError(f"Expected `{option}` as a list of strings, got {words!r}. Put it into a list.")
    yield _Offer(
        "user", None if class_names is None else list(class_names), None if templates is None else list(templates)
    )
    for source in sources:
        if source == "ClassLabel":
            yield _from_class_label(label_names, label_names_of)
        elif source == "files":
            yield _from_hub() if folder is None else _from_folder(Path(folder))
        else:
            yield _from_open_clip()


def _from_class_label(label_names: Sequence[str] | None, of: str) -> _Offer:
    source = f"{_CLASS_LABEL} of {of}"
    if not label_names:
        return _Offer(source, missing=f"{of} has no ClassLabel with names")
    if all(re.fullmatch(r"n\d{8}", name) for name in label_names):
        return _Offer(source, missing=f"the ClassLabel of {of} has WordNet ids instead of names")
    if all(name == str(index) for index, name in enumerate(label_names)):  # what datasets writes when it has no names
        return _Offer(source, missing=f"the ClassLabel of {of} has numbers instead of names")
    first = [name.split(",")[0].strip() for name in label_names]
    count = Counter(name.lower() for name in first)  # CLIP's tokenizer lowers the case
    names = [name if count[name.lower()] == 1 else full for name, full in zip(first, label_names, strict=True)]
    return _Offer(source, names, missing="a ClassLabel has no templates")


def _from_folder(folder: Path) -> _Offer:
    lines = {name: _lines(folder / name) for name in FILES if (folder / name).is_file()}
    absent = [name for name in FILES if name not in lines]
    missing = f"the folder {folder} has no {' and no '.join(absent)}" if absent else ""
    return _offer_of_files(f"files in {folder.name}", lines, missing)


def _from_hub() -> _Offer:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    lines: dict[str, list[str]] = {}
    missing = ""
    for name in FILES:
        try:
            file = hf_hub_download(HUB_ID, name, repo_type="dataset")  # nosec B615  # lines of text, shown as the source
            lines[name] = _lines(Path(file))
        except (OSError, HfHubHTTPError) as error:
            missing = f"{name} of '{HUB_ID}' cannot be had from the Hub or its cache ({type(error).__name__})"
            if name == NAMES_FILE:
                break  # without connection the second file would only cost the same time again
    return _offer_of_files(f"files of {HUB_ID}", lines, missing)


def _offer_of_files(source: str, lines: Mapping[str, list[str]], missing: str) -> _Offer:
    templates = lines.get(TEMPLATES_FILE)
    if templates is not None:  # clip-benchmark marks the place of the name by {c}
        templates = [template.replace("{c}", PLACEHOLDER) for template in templates]
    return _Offer(source, lines.get(NAMES_FILE), templates, missing)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _from_open_clip() -> _Offer:
    spec = util.find_spec("open_clip")  # finds the package, does not import it: that would need torchvision
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = next((Path(folder) / "zero_shot_metadata.py" for folder in folders), None)
    if path is None or not path.is_file():
        return _Offer("open_clip_torch", missing="open_clip_torch is not installed")
    try:
        source = f"open_clip_torch {metadata.version('open_clip_torch')}"
    except metadata.PackageNotFoundError:
        source = "open_clip"
    try:
        values = {
            target.id: statement.value
            for statement in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        names = [str(name) for name in ast.literal_eval(values["IMAGENET_CLASSNAMES"])]
        templates = [_template_of(node) for node in values["OPENAI_IMAGENET_TEMPLATES"].elts]  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"Expected IMAGENET_CLASSNAMES and OPENAI_IMAGENET_TEMPLATES as literals in {path}, got "
            f"{type(error).__name__}: {error}. Install open_clip_torch 3.3.0, or pass `class_names` and `templates`."
        ) from error
    return _Offer(source, names, templates)


def _template_of(node: ast.AST) -> str:
    """Turn ``lambda c: f'a photo of a {c}.'`` into ``'a photo of a {}.'`` without running it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Lambda(args=ast.arguments(args=[ast.arg(arg=name)]), body=ast.JoinedStr(values=parts)):
            return "".join(_piece(part, name) for part in parts)
    raise ValueError(f"a template that is no f-string of one name: {ast.unparse(node)}")


def _piece(part: ast.AST, name: str) -> str:
    match part:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=ast.Name(id=used), conversion=-1, format_spec=None) if used == name:
            return PLACEHOLDER
    raise ValueError(f"a template with more than the name in it: {ast.unparse(part)}")


def _fit(names: list[str], num_classes: int, indices: Sequence[int] | None, source: str) -> list[str]:
    if indices is not None and len(names) == _IMAGENET_CLASSES:
        names = [names[index] for index in indices]
    if len(names) != num_classes:
        raise ValueError(
            f"Expected {num_classes} class names, got {len(names)} (source: {source}). Pass `class_names`, one for "
            "each label in order, or `indices` if the classes are a part of ImageNet's 1000."
        )
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"Expected a name for class {index}, got {name!r} (source: {source}). Pass non-empty strings."
            )
    return names


def _check(templates: list[str], source: str) -> list[str]:
    try:
        check_templates(templates)
    except ValueError as error:
        raise ValueError(f"{error} (source: {source})") from error
    return templates
