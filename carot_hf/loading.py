"""Rows of images and labels, from the Hub or from a local copy: parquet files, webdataset tars, folders of images.

What `datasets` guesses wrong for image sets is said explicitly here: tars beside a text file, and folders named by
number without leading zeros, whose labels a sorted listing permutes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of httpx or httpx2
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
)
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Rows = Any  # a datasets.Dataset or a datasets.IterableDataset

LABEL_COLUMNS = ("label", "labels", "cls", "wnid")
_SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_SPLITS = {"train": "train", "validation": "validation|valid|val", "test": "test"}


def open_rows(
    source: str | Path, split: str, *, layout: str | None = None, streaming: bool = False, revision: str | None = None
) -> Rows:
    """Open one split.

    Args:
        source: A local folder or file, or else the id of a data set on the Hub.
        split: Its name there. In a folder: the files whose path names it, or all files if none names any split.
        layout: ``"parquet"`` or ``"webdataset"``: how the Hub holds it; ``None``: as `datasets` finds out. The layout
            of a local copy is seen from its files.
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
        return _undecoded(_open_local(path, split, streaming))
    at = "" if revision is None else f"@{revision}"
    files = {split: f"hf://datasets/{source}{at}/{split}/*.tar"} if layout == "webdataset" else None
    options = {"split": split, "streaming": streaming}
    try:
        if files is not None:
            rows = datasets.load_dataset("webdataset", data_files=files, **options)  # nosec B615  # `at`
            return _undecoded(rows)
        return _undecoded(datasets.load_dataset(str(source), revision=revision, **options))
    except (DatasetNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(
            f"Expected to load split '{split}' of '{source}' from the Hub, got {type(error).__name__}: {error} If the "
            f"data set is gated, accept its terms on https://huggingface.co/datasets/{source} and run `hf auth login`; "
            "if the machine has no network, copy the data set and pass the folder as `root`."
        ) from error


def newest_commit(source: str) -> str | None:
    """Return the commit that a data set on the Hub is at now; ``None`` if the Hub does not say it."""
    try:
        return huggingface_hub.HfApi().dataset_info(source).sha
    except (HTTPError, OSError) as error:
        logger.debug("No commit of '%s': %s", source, error)
        return None


def local_files(folder: Path, split: str) -> tuple[str, list[Path]]:
    """Find the files of a split: the layout (``parquet``, ``webdataset``, ``folders``) and the files, sorted.

    For ``folders`` the files are the images. A path names a split if one of its parts, cut at ``/ . - _``, is the name
    (``data/train-00000-of-00002.parquet``, ``test/0.tar``, ``val/n01440764/1.jpg``); of several the last.

    Raises:
        ValueError: If there is none.
    """
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    for layout, suffix in _SUFFIXES.items():
        found = _of_split(folder, [path for path in inside if path.suffix == suffix], split)
        if found:
            return layout, found
    images = [path for path in inside if path.suffix.lower() in _IMAGE_SUFFIXES and path.parent != folder]
    found = _of_split(folder, images, split, images=True)
    if found:
        return "folders", found
    raise ValueError(
        f"Expected .parquet or .tar files, or one folder of images for each class, of split '{split}' in {folder}, got "
        f"{[path.name for path in inside[:3]]} ... ({len(inside)} files). Name the right folder or split."
    )


def image_column(rows: Rows) -> str:
    """Return the name of the one column of images.

    Raises:
        ValueError: If there is none, or more than one.
    """
    features = rows.features or {}
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one column of images, got {found} among {sorted(features)}. Name it with `image_column`."
        )
    return found[0]


def label_column(rows: Rows) -> str:
    """Return the first of ``label``, ``labels``, ``cls``, ``wnid`` that there is.

    Raises:
        ValueError: If there is none.
    """
    features = rows.features or {}
    for name in LABEL_COLUMNS:
        if name in features:
            return name
    raise ValueError(
        f"Expected a label column called {', '.join(LABEL_COLUMNS)}, got {sorted(features)}. Name it with "
        "`label_column`."
    )


class LabelTable:
    """From what stands in a label column to the index of a class.

    Numbers are indices. Text is looked up among the names; text of digits is the number it spells. The names of a
    ``ClassLabel`` are looked up in the same way, so that one made from a sorted listing of "0", "1", "10", ... gives
    the numbers and not the places in that listing; if its names are others than ours its numbers stand.

    Args:
        feature: The column's feature.
        names: The names that text may hold, in the order of the indices, e.g. wnids.
        where: What is read, for errors.
    Raises:
        ValueError: When called with text that is neither a name nor a number.
    """

    def __init__(self, feature: Any, names: Sequence[str], where: str) -> None:
        self._where = where
        self._names = {name: index for index, name in reversed(list(enumerate(names)))}
        self._own: list[int] | None = None
        if isinstance(feature, datasets.ClassLabel):
            own = list(feature.names)
            if all(name in self._names for name in own) or all(name.isdecimal() for name in own):
                self._own = [self._find(name) for name in own]

    @property
    def looks_up(self) -> bool:
        """Whether the names of a ``ClassLabel`` are looked up, and not its numbers taken."""
        return self._own is not None

    def __call__(self, value: Any) -> Any:
        """Return the index; what is neither text nor a number passes, for `ShiftSet` to refuse."""
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace").strip()
        if isinstance(value, str):
            return self._find(value)
        if self._own is not None and isinstance(value, int | np.integer) and 0 <= value < len(self._own):
            return self._own[value]
        return value

    def all(self, values: Sequence[Any] | NDArray[Any]) -> NDArray[np.int64]:
        """``(N,)`` indices of a whole column."""
        try:
            distinct, places = np.unique(np.asarray(values), return_inverse=True)
            indices = [self(value) for value in distinct.tolist()]
            whole = [int(index) for index in indices]
        except TypeError as error:  # None among them, for one
            raise ValueError(f"Expected labels of {self._where} to be numbers or names, got {error}.") from error
        if whole != indices:
            wrong = next(index for index in indices if int(index) != index)
            raise ValueError(f"Expected labels of {self._where} to be whole numbers, got {wrong}. Correct them.")
        return np.asarray(whole, dtype=np.int64)[places.reshape(-1)]

    def _find(self, name: str) -> int:
        if name in self._names:
            return self._names[name]
        if name.strip().isdecimal():
            return int(name)
        known = list(reversed(self._names))[:3]
        raise ValueError(
            f"Expected labels of {self._where} to be numbers or one of {len(self._names)} names ({known} ...), got "
            f"{name!r}. Correct the class names, or name another label column."
        )


def check_labels(name: str, labels: NDArray[np.int64], rows: int, classes: int) -> None:
    """Raise a ValueError unless rows, largest label and number of distinct labels are those that are published."""
    got = len(labels), int(labels.max(initial=-1)), len(np.unique(labels))
    if got != (rows, classes - 1, classes):
        raise ValueError(
            f"Expected {rows:,} rows, largest label {classes - 1} and {classes} distinct labels in '{name}', got "
            f"{got[0]:,} rows, largest label {got[1]} and {got[2]} distinct labels. The copy is incomplete or another "
            "version; for a part of it on purpose pass `check_counts=False`."
        )


def hold_out(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into those to train on and a class-balanced share that is held out.

    Args:
        labels: ``(N,)`` class indices.
        share: Of all rows, in (0, 1): each class gives ``round(share * N / classes)`` rows, at least one and at most
            half of its own.
        seed: Of the draw; a class's rows depend on nothing else.
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
        held.append(np.random.default_rng((seed, label)).permutation(members)[: min(quota, len(members) // 2)])
    chosen = np.sort(np.concatenate(held))
    if len(chosen) == 0:
        raise ValueError(
            f"Expected a class with at least two images to hold a validation set out of, got {len(labels)} images of "
            f"{len(classes)} classes, one each. Pass a validation set of its own in place of a share, or more images."
        )
    return np.setdiff1d(np.arange(len(labels)), chosen, assume_unique=True), chosen


def _open_local(path: Path, split: str, streaming: bool) -> Rows:
    if path.is_file():
        layout = {suffix: name for name, suffix in _SUFFIXES.items()}.get(path.suffix)
        if layout is None:
            raise ValueError(f"Expected a .parquet or .tar file or a folder, got {path}. Convert it to one of these.")
        files = [path]
    elif (path / "state.json").exists():  # save_to_disk
        saved = datasets.load_from_disk(str(path))
        return saved.to_iterable_dataset(num_shards=min(16, len(saved))) if streaming else saved
    else:
        layout, files = local_files(path, split)
    if layout != "folders":
        names = [str(file) for file in files]
        options = {"split": split, "streaming": streaming}
        return datasets.load_dataset(layout, data_files={split: names}, **options)  # nosec B615  # local files
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    columns = {"image": [str(file) for file in files], "label": [file.parent.name for file in files]}
    listing = datasets.Dataset.from_dict(columns, features=features)
    return listing.to_iterable_dataset(num_shards=min(16, len(files))) if streaming else listing


def _of_split(folder: Path, files: Sequence[Path], split: str, *, images: bool = False) -> list[Path]:
    """The files whose path below the folder names the split; of images the folder of their class says nothing.

    A path names one split at most, or the same rows would be trained on and judged on: that of the last part of it, the
    file's name first, which names one and no other.
    """
    asked = next((name for name, pattern in _SPLITS.items() if re.fullmatch(pattern, split.lower())), split)
    patterns = {asked: re.escape(split.lower()), **_SPLITS}

    def named(path: Path) -> str | None:
        inner = path.relative_to(folder)
        for part in reversed((inner.parent.parent if images else inner).parts):
            words = re.split(r"[._-]", part.lower())
            found = [name for name, pattern in patterns.items() if any(re.fullmatch(pattern, word) for word in words)]
            if len(found) == 1:
                return found[0]
        return None

    names = [named(path) for path in files]
    if not any(names):
        return list(files)
    return [path for path, name in zip(files, names, strict=True) if name == asked]


def _undecoded(rows: Rows) -> Rows:
    """Leave images as bytes or paths."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode:
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows
