"""Rows of images and labels, from the Hub or from a local copy, in whatever layout they are kept.

What `datasets` guesses wrong for image sets is said explicitly here: tars beside a text file, folders named by number
without leading zeros, whose labels a sorted listing permutes, and paths with brackets, which it takes for patterns.
"""

from __future__ import annotations

import difflib
import glob
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of httpx or httpx2
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from numpy.typing import NDArray

from ..basics.escape import guarded
from ..data.columns import image_column, undecoded
from ..data.image_roots import ImageRoots
from .folders import Found, asked_split, files_of_split, images_in, images_of_split, split_of, walk
from .tables import METADATA, SUFFIXES, read_tables, with_folders

logger = guarded(logging.getLogger(__name__))

Rows = Any  # a datasets.Dataset or a datasets.IterableDataset

LAYOUTS = ("parquet", "arrow", "webdataset", "table", "metadata", "folders")
_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", **dict.fromkeys(SUFFIXES, "table")}
_ALONE = {**_SUFFIXES, ".json": "table"}  # in a folder a .json may be anything
_NEARLY = 0.7  # alike enough for a slip of the pen
_CONTENT = "parquet, arrow, CSV, TSV, JSON lines, tars, or one folder of images for each class"


class Opened(NamedTuple):
    """Rows, and where they are from.

    Attributes:
        rows: Images undecoded.
        files: What was read, of a local copy; two sets with a file in common share rows.
        root: Relative paths of images are relative to it; ``None``: rows from the Hub.
        roots: Images that rows name by a path must lie there; ``None``: they were found, not named.
        named: Whether the split was asked for by name: on the Hub always, in a local copy if it names splits.
    """

    rows: Rows
    files: tuple[str, ...]
    root: Path | None
    named: bool
    roots: ImageRoots | None

    @property
    def places(self) -> dict[str, Any]:
        """Where images are that are named by a path: two options of a ``ShiftSet``."""
        return {"image_root": self.root, "image_roots": self.roots}


def open_source(
    source: str | Path, split: str, *, layout: str | None = None, streaming: bool = False, revision: str | None = None
) -> Opened:
    """Open one split.

    Args:
        source: A local folder or file, or else the id of a data set on the Hub.
        split: Its name there. In a folder: the files whose path names it, or all files if none names any split.
        layout: How it is kept, one of `LAYOUTS`; ``None``: as `datasets` finds out on the Hub, as the files say in a
            local copy.
        streaming: Return an ``IterableDataset`` and download nothing in advance.
        revision: Commit, tag or branch of the data set on the Hub; ``None``: the newest.
    Returns:
        The rows, images undecoded. A folder of images has the columns ``image`` and ``label``, the folder's name.
    Raises:
        ValueError: If there is no such data set, split or file, the Hub asks for a login, or is out of reach.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"Expected no `revision` of a local copy, got {revision!r} for {path}. Leave it out.")
        opened = _open_local(path, split, layout, streaming)
        return opened._replace(rows=_undecoded(opened.rows))
    at = "" if revision is None else f"@{revision}"
    files = {split: f"hf://datasets/{source}{at}/{split}/*.tar"} if layout == "webdataset" else None
    options = {"split": split, "streaming": streaming}
    try:
        if files is not None:
            rows = datasets.load_dataset("webdataset", data_files=files, **options)  # nosec B615  # `at`
        else:
            rows = datasets.load_dataset(str(source), revision=revision, **options)
    except (DatasetNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(
            f"Expected to load split '{split}' of '{source}' from the Hub, got {type(error).__name__}: {error} If the "
            f"data set is gated, accept its terms on https://huggingface.co/datasets/{source} and run `hf auth login`; "
            "if the machine has no network, copy the data set and pass the folder as `root`."
        ) from error
    return Opened(_undecoded(rows), (f"{source}{at}#{split}",), None, True, _caches(str(source)))


def newest_commit(source: str) -> str | None:
    """Return the commit that a data set on the Hub is at now; ``None`` if the Hub does not say it."""
    try:
        return huggingface_hub.HfApi().dataset_info(source).sha
    except (HTTPError, OSError) as error:
        logger.debug("No commit of '%s': %s", source, error)
        return None


def local_files(folder: Path, split: str, layout: str | None = None) -> Found:
    """Find the files of a split, and how they are kept.

    Args:
        folder: Where to look.
        split: A path names it if one of its parts does: ``data/train-00000-of-00002.parquet``, ``test/0.tar``,
            ``val/n01440764/1.jpg``; see :mod:`carot_hf.suites.folders`.
        layout: One of `LAYOUTS` to look for; ``None``: any, images in folders last.
    Raises:
        ValueError: If there is none, or tables lie beside folders of images.
    """
    inside = walk(folder)
    groups: dict[str, list[Path]] = {}
    for path in inside:
        kind = "metadata" if path.name.lower() in METADATA else _SUFFIXES.get(path.suffix.lower())
        if kind is not None:
            groups.setdefault(kind, []).append(path)
    tried = []
    for kind in ("metadata", "parquet", "arrow", "webdataset"):
        if kind in groups and layout in (None, kind):
            files, named = files_of_split(folder, groups[kind], split)
            if files:
                return Found(kind, files, [], named)
            tried += groups[kind]
    images = images_in(inside) if layout in (None, "folders") or "table" in groups else []
    found = _classes_of(folder, images, split, layout, beside_tables="table" in groups)
    if "table" in groups and layout in (None, "table"):
        if found is not None and len(set(found.classes)) > 1 and layout is None:
            raise ValueError(
                f"Expected a table, or folders of images, in {folder}, got {groups['table'][0].name} beside folders "
                f"such as {found.classes[0]!r}. Name the table itself as the path, or say `layout: folders`."
            )
        files, named = files_of_split(folder, groups["table"], split)
        if files:
            return Found("table", files, [], named)
        tried += groups["table"]
    if found is not None and found.files:
        return found
    splits = sorted({name for path in [*tried, *images] for part in path.relative_to(folder).parts
                     if (name := split_of(part)) is not None})  # fmt: skip
    seen = f"{[path.name for path in inside[:3]]} ... ({len(inside)} files)"
    raise ValueError(
        f"Expected {_CONTENT}, of split '{split}' in {folder}, got {seen}"
        f"{f', which name the splits {splits}' if splits else ''}. Name the right folder or split."
    )


def _classes_of(
    folder: Path, images: list[Path], split: str, layout: str | None, *, beside_tables: bool
) -> Found | None:
    """The images of a split in folders of classes, if there are such folders."""
    if layout not in (None, "folders"):
        return None
    try:
        return images_of_split(folder, images, split)
    except ValueError:  # folders of images without classes, which the tables beside them describe
        if beside_tables and layout is None:
            return None
        raise


def check_labels(name: str, labels: NDArray[np.int64], rows: int, classes: int) -> None:
    """Raise a ValueError unless rows, largest label and number of distinct labels are those that are published."""
    got = len(labels), int(labels.max(initial=-1)), len(np.unique(labels))
    if got != (rows, classes - 1, classes):
        raise ValueError(
            f"Expected {rows:,} rows, largest label {classes - 1} and {classes} distinct labels in '{name}', got "
            f"{got[0]:,} rows, largest label {got[1]} and {got[2]} distinct labels. The copy is incomplete or another "
            "version; for a part of it on purpose pass `check_counts=False`."
        )


def hold_out(
    labels: NDArray[np.int64], share: float, seed: int, *, balanced: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into those to train on and a share that is held out.

    Args:
        labels: ``(N,)`` class indices.
        share: In (0, 1): each class gives ``round(share * n)`` of its ``n`` rows, and at least one, but never its last.
        seed: Of the draw; a class's rows depend on nothing else.
        balanced: Each class gives ``round(share * N / classes)`` rows, at least one and at most half of its own: the
            protocol of ImageNet here.
    Returns:
        Two sorted arrays of row numbers, disjoint, together all.
    Raises:
        ValueError: If no class has two rows.
    """
    classes = np.unique(labels)
    quota = max(1, round(share * len(labels) / len(classes)))
    held = []
    for label in classes.tolist():
        members = np.flatnonzero(labels == label)
        most = len(members) // 2 if balanced else len(members) - 1
        wanted = quota if balanced else max(1, round(share * len(members)))
        held.append(np.random.default_rng((seed, label)).permutation(members)[: min(wanted, most)])
    chosen = np.sort(np.concatenate(held))
    if len(chosen) == 0:
        raise ValueError(
            f"Expected a class with at least two images to hold a validation set out of, got {len(labels)} images of "
            f"{len(classes)} classes, one each. Pass a validation set of its own in place of a share, or more images."
        )
    return np.setdiff1d(np.arange(len(labels)), chosen, assume_unique=True), chosen


def _open_local(path: Path, split: str, layout: str | None, streaming: bool) -> Opened:
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"Expected `layout` to be one of {LAYOUTS}, got {layout!r}. Leave it out to have it found.")
    if path.is_file():
        kind = _ALONE.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"Expected a .parquet, .arrow, .csv, .tsv, .jsonl or .tar file or a folder, got {path}. "
                             "Convert it to one of these.")  # fmt: skip
        found = Found(kind, [path], [], False)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():  # save_to_disk
        return _open_saved(path, split, streaming)
    else:
        found = local_files(path, split, layout)
    if found.layout != "folders":
        _refuse_no_file(found.files)
    files, root, named = tuple(os.path.abspath(file) for file in found.files), found.files[0].parent, found.named
    if found.layout in ("parquet", "webdataset"):
        names = [glob.escape(str(file)) for file in found.files]
        options = {"split": split, "streaming": streaming}
        rows = datasets.load_dataset(found.layout, data_files={split: names}, **options)  # nosec B615  # local files
        if len({file.parent for file in found.files}) > 1:
            root = path
        return Opened(rows, files, root, named, ImageRoots([root]))
    if found.layout == "arrow":
        rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in found.files])
    elif found.layout == "folders":
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
        columns = {"image": [str(file) for file in found.files], "label": found.classes}
        rows = datasets.Dataset.from_dict(columns, features=features)
    else:
        root = path if path.is_dir() and len({file.parent for file in found.files}) > 1 else root
        rows = _read_rows(found, root)
        if not named and (chosen := _rows_of_split(rows, split)) is not None:
            rows, files, named = chosen, tuple(f"{file}#{asked_split(split)}" for file in files), True
    shards = min(16, len(rows))
    roots = None if found.layout == "folders" else ImageRoots([root])
    return Opened(rows.to_iterable_dataset(num_shards=shards) if streaming else rows, files, root, named, roots)


def _open_saved(path: Path, split: str, streaming: bool) -> Opened:
    """What ``save_to_disk`` wrote: one data set, or one for each split."""
    saved, named, at = datasets.load_from_disk(str(path)), False, path
    if isinstance(saved, datasets.DatasetDict):
        found = [name for name in saved if name == split] or [
            name for name in saved if asked_split(name) == asked_split(split)
        ]
        if len(found) != 1:
            raise ValueError(
                f"Expected the split '{split}' in {path}, got {sorted(saved)}. Name one of these as `split`."
            )
        saved, named, at = saved[found[0]], True, path / found[0]
    rows = saved.to_iterable_dataset(num_shards=min(16, len(saved))) if streaming else saved
    return Opened(rows, (str(at.resolve()),), path, named, ImageRoots([path]))


def _caches(source: str) -> ImageRoots:
    """Where `datasets` keeps the files of a data set on the Hub."""
    repo = repo_folder_name(repo_id=source, repo_type="dataset")
    downloads = (datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH)
    return ImageRoots([Path(huggingface_hub.constants.HF_HUB_CACHE, repo), *downloads])


def _refuse_no_file(paths: Iterable[Path]) -> None:
    """Raise a ValueError unless all of them are regular files: to open a pipe would wait for ever."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"Expected a regular file at {path}, got something else. Take it away.")


def _read_rows(found: Found, root: Path) -> datasets.Dataset:
    """The rows of tables; of an ImageFolder's ``metadata`` with the folders as labels if it has none."""
    if found.files[0].suffix == ".parquet":
        names = [glob.escape(str(path)) for path in found.files]
        rows = datasets.load_dataset("parquet", data_files=names, split="train")  # nosec B615  # local files
    else:
        rows = read_tables(found.files, root)
    return with_folders(rows, image_column(rows)) if found.layout == "metadata" else rows


def _rows_of_split(rows: datasets.Dataset, split: str) -> datasets.Dataset | None:
    """The rows whose image lies in a folder that names the split, if each of them lies in one that names some."""
    try:
        paths = rows[image_column(rows)]
    except ValueError:  # whoever reads the rows will say so, or knows the column
        return None
    if not all(isinstance(path, str) for path in paths):
        return None
    folders = [os.path.dirname(path) for path in paths]
    if all(map(os.path.isabs, folders)):  # where all of them lie says nothing of one
        common = os.path.commonpath(folders)
        folders = [os.path.relpath(folder, common) for folder in folders]
    splits = [next((name for part in reversed(Path(folder).parts) if (name := split_of(part))), None)
              for folder in folders]  # fmt: skip
    if not all(splits):
        return None
    return rows.select([row for row, name in enumerate(splits) if name == asked_split(split)])


def refuse_local_look(source: str, base: Path) -> None:
    """Raise a ValueError if the id of a data set on the Hub was meant for a path below ``base`` that is not there.

    So looks what has a suffix of data, more parts than an id or a mark of a path, or begins with a folder that there
    is, or nearly is.
    """
    path = Path(source).expanduser()
    first = path.parts[0] if path.parts else ""
    beside = [] if path.is_absolute() or not base.is_dir() else [entry.name for entry in base.iterdir()]
    near = {name.casefold() for name in beside}
    marked = source.startswith((".", "/", "~")) or "\\" in source or len(path.parts) > 2
    close = difflib.get_close_matches(first.casefold(), near, n=1, cutoff=_NEARLY)
    if marked or path.suffix.lower() in _ALONE or close:
        raise ValueError(_missing(path, base))


def _missing(path: Path, base: Path) -> str:
    """Say that there is no such file or folder, and which one was meant."""
    place = Path(path.anchor) if path.is_absolute() else base
    parts = path.parts[1:] if path.is_absolute() else path.parts
    for number, part in enumerate(parts):
        if not (place / part).exists():
            there = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
            near = {name.casefold(): name for name in there}
            match = difflib.get_close_matches(part.casefold(), near, n=1)
            if match:
                before = path.parts[: len(path.parts) - len(parts) + number]
                hint = f"Did you mean {Path(*before, near[match[0]], *parts[number + 1 :])}?"
            else:
                hint = f"In {place} there are {there[:8]}; correct the path."
            return f"expected data at {place.joinpath(*parts[number:])}, found no such folder as {place / part}. {hint}"
        place = place / part
    return f"expected data at {place}, found none. Correct the path."


def _undecoded(rows: Rows) -> Rows:
    """Leave images as bytes or paths."""
    for name in rows.features or {}:
        rows = undecoded(rows, name)
    return rows
