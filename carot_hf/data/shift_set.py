"""A labelled set of images: what a model is trained on, calibrated on or judged on."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..basics.content_hash import sha256_of_array
from ..basics.error_notes import note
from ..basics.escape import guarded, printable
from .columns import (
    checked_columns,
    column_of,
    facts_of,
    found_label_column,
    image_column,
    names_of,
    selected_rows,
    undecoded,
)
from .groups import Groups
from .image_roots import ImageRoots
from .images import BadImageError, NotAnImageError, is_decoding_error, read_image
from .labels import ClassNames, LabelTable, class_indices, label_in_range, not_a_label, one_label_a_row, shown
from .right_labels import RightLabels

logger = guarded(logging.getLogger(__name__))


class ShiftSet(Dataset):
    """A sized data set of ``{"image": RGB PIL image, "label": int}``.

    Labels are class indices, or names: those of a ``ClassLabel``, or text. A :class:`ShiftSuite` matches names with its
    own, in whatever order the data have them; until then the numbers of a ``ClassLabel`` stand.

    Args:
        data: Anything with a length whose items are mappings, e.g. a ``datasets.Dataset`` with an ``Image`` feature, or
            pairs of image and label, as torchvision's data sets have them.
        name: Short name; the metrics of the set carry it.
        num_classes: Number of training classes, ``K``.
        columns: For each label of the set the training classes it stands for, one list a label; ``None``: all classes,
            one to one.
        labels: All labels, if they can be had without decoding images. Read from ``data`` when it is a
            ``datasets.Dataset``. They are checked at once; otherwise each label is checked when it is read.
        image_column: Key of the image.
        label_column: Key of the label; ``None``: the items have none (for prediction only).
        caption_column: Key of a caption of the image's own, or of a list of them, of which one is drawn anew in each
            epoch; training then takes it in place of a template with the class name.
        exif: Turn images as their EXIF orientation says.
        crop_border: Pixels cut off at each side before anything else.
        test_only: The set's terms forbid to train, to tune or to select on it.
        content: What says which images these are, such as the commit on the Hub or a checksum; it is part of
            :attr:`ShiftSuite.content_hash`.
        image_root: Folder that relative paths of images are relative to.
        image_roots: Folders in which images must lie that the rows name by a path; ``None``: anywhere. Images that are
            stored in the rows do not need it.
    Raises:
        ValueError: If the set is empty, a label or a column is out of range, a label or a caption is missing, or, when
            an item is read, its image cannot be decoded (the set and the index are named).
    """

    def __init__(
        self,
        data: Any,
        *,
        name: str,
        num_classes: int,
        columns: Sequence[Sequence[int]] | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
        exif: bool = True,
        crop_border: int = 0,
        test_only: bool = False,
        content: str | None = None,
        image_root: str | Path | None = None,
        image_roots: ImageRoots | None = None,
    ) -> None:
        for option, number, least in (("num_classes", num_classes, 1), ("crop_border", crop_border, 0)):
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
                raise ValueError(
                    f"Expected `{option}` of set '{name}' as a whole number of at least {least}, got {number!r}. "
                    "Correct it."
                )
        transformed = facts_of(data, "format").get("type") == "custom"
        encoded = undecoded(data, image_column)
        self.data, self.name, self.num_classes = data if transformed else encoded, printable(name), int(num_classes)
        self._encoded = encoded if transformed else None  # the rows that a transform of the user's sees
        self.columns = None if columns is None else checked_columns(name, columns, num_classes)
        self.image_column, self.label_column, self.caption_column = image_column, label_column, caption_column
        self.exif, self.crop_border, self.test_only, self.content = exif, int(crop_border), test_only, content
        if not hasattr(data, "__len__"):
            raise ValueError(
                f"Expected a data set with a length for '{name}', got {type(data).__name__}. Streamed data cannot be "
                "drawn by index; load it whole, or save it to disk first."
            )
        if len(data) == 0:
            raise ValueError(f"Expected at least one sample in set '{name}', got an empty data set. Check its split.")
        features = {} if transformed else facts_of(data, "features")
        self.image_root = None if image_root is None else Path(image_root)
        self.image_roots = image_roots
        self.groups: Groups | None = None  # of the rows, in their order; a set whose worst group is looked for has them
        self.right: RightLabels | None = None  # of the rows, where several labels are right; `labels` are one of them
        if labels is None and label_column in features:
            labels = column_of(data, str(label_column))
        self.own_names: tuple[str, ...] | None = names_of(features.get(str(label_column)))
        self._classes: ClassNames | None = None  # that the labels were matched with
        self._table: LabelTable | None = None  # from what the data have to the label
        self.read_by_name = False  # whoever made the rows has matched names already
        self._raw = None if labels is None else one_label_a_row(labels, len(data), name)
        self.labels: NDArray[Any] | None = (
            None if self._raw is None else class_indices(self._raw, self.num_labels, name, self._limit)
        )
        if self.own_names is not None and self.columns is not None and len(self.own_names) != self.num_labels:
            raise ValueError(
                f"Expected a ClassLabel of {self.num_labels} names in set '{name}', one for each of its labels, got "
                f"one of {len(self.own_names)} ({list(self.own_names[:3])} ...). Pass `columns`, which say what each "
                "of its labels stands for, or cast the column to plain integers if these are the suite's."
            )
        self.captions = self._checked_captions(data) if caption_column in features else None

    @classmethod
    def of(cls, data: Any, *, name: str, classes: ClassNames, **options: Any) -> ShiftSet:
        """Make a set of anything with rows, its columns found by kind and name, its labels matched with the classes.

        Args:
            data: As for `ShiftSet`; a ``ShiftSet`` keeps its columns.
            name: Short name.
            classes: Of the suite.
            **options: Options of `ShiftSet`; they go before what is found.
        """
        if isinstance(data, ShiftSet):
            return data.matched(classes)
        features, keys = facts_of(data, "features"), getattr(data, "column_names", None)
        if features and "image_column" not in options and "image" not in features:
            options["image_column"] = image_column(data)
        if "label_column" not in options:
            if keys is None and hasattr(data, "__len__") and len(data):
                first = data[0]
                keys = first if isinstance(first, Mapping) else None
            options["label_column"] = "label" if keys is None else found_label_column(keys)
        return cls(data, name=name, num_classes=len(classes), **options).matched(classes)

    def matched(self, classes: ClassNames) -> ShiftSet:
        """Return this set with its labels read as classes of a suite: by name where the data have names.

        Args:
            classes: Of the suite.
        Returns:
            This set if its labels are what they were, a copy else. The labels of a set with `columns` are its own.
        Raises:
            ValueError: If the data have names, and not all of them are names of classes; both lists are named.
        """
        if self._classes == classes or self.label_column is None or self.columns is not None:
            return self
        self._refuse_transformed(classes)
        table = LabelTable(self.own_names, classes, f"set '{self.name}'")
        if self.labels is not None and self._table is None and table.keeps_numbers:
            return self
        part = copy.copy(self)
        part._classes, part._table = classes, table
        if self._raw is not None:
            part.labels = class_indices(table.all(self._raw), self.num_labels, self.name, part._limit)
        return part

    def _refuse_transformed(self, classes: ClassNames) -> None:
        """Refuse labels that a transform of the user's returns if the data have the classes in another order."""
        feature = facts_of(self._encoded, "features").get(str(self.label_column))
        names = names_of(feature) or ()
        found = [classes.find(name) for name in names]
        if found and None not in found and found != list(range(len(classes))):
            raise ValueError(
                f"Expected the labels that the transform of set '{self.name}' returns in the order of the classes "
                f"{shown(classes.class_names)}, got data whose ClassLabel has the order {shown(list(names))}. "
                "Bring "
                "them into that order before the transform is set: `rows.align_labels_with_mapping({name: index, ...}, "
                f"'{self.label_column}')`."
            )

    @property
    def _limit(self) -> int:
        """Up to where numbers are labels: those of a ``ClassLabel`` until they are matched with the suite's."""
        return self.num_labels if self.own_names is None or self._table is not None else len(self.own_names)

    @property
    def has_names(self) -> bool:
        """Whether the labels of the data are names, or were."""
        return self.own_names is not None or self._table is not None or self.read_by_name

    def _checked_captions(self, data: Any) -> list[Any]:
        """All captions of a column that can be had without decoding images."""
        captions = list(column_of(data, str(self.caption_column)))
        for row, caption in enumerate(captions):
            self._check_caption(caption, f"index {row}")
        return captions

    def _check_caption(self, caption: Any, where: str) -> None:
        texts = caption if isinstance(caption, list | tuple) else [caption]
        for text in texts or [caption]:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"Expected a text in the column '{self.caption_column}' of set '{self.name}' at {where}, got "
                    f"{caption!r}. Drop the samples without a caption."
                )

    @property
    def num_labels(self) -> int:
        """Number of labels of this set: the training classes, or one for each list of columns."""
        return self.num_classes if self.columns is None else len(self.columns)

    def __len__(self) -> int:
        return len(self.data)

    def subset(self, rows: NDArray[np.int64], name: str) -> ShiftSet:
        """Return a set of some of the rows, of the same class and read in the same way.

        Args:
            rows: Their numbers, in the order wanted.
            name: Name of the new set.
        """
        part = copy.copy(self)  # whatever a subclass added comes along
        part.name = name
        part.data = selected_rows(self.data, rows)
        part._encoded = None if self._encoded is None else selected_rows(self._encoded, rows)
        part.labels = None if self.labels is None else self.labels[rows]
        part._raw = None if self._raw is None else self._raw[rows]
        part.captions = None if self.captions is None else [self.captions[row] for row in rows.tolist()]
        part.groups = None if self.groups is None else self.groups.of(rows)
        part.right = None if self.right is None else self.right.of(rows)
        return part

    @property
    def reading(self) -> dict[str, Any]:
        """The options that say how an item is read, for a set of other rows of the same source."""
        columns, pixels = ("image_column", "label_column", "caption_column"), ("exif", "crop_border")
        places = ("image_root", "image_roots")
        return {name: getattr(self, name) for name in (*columns, *pixels, *places, "test_only", "content")}

    @property
    def facts(self) -> dict[str, Any]:
        """What the set is, as texts and integers, for :attr:`ShiftSuite.content_hash`; no image is read."""
        own = {name: part.facts for name in ("groups", "right") if (part := getattr(self, name)) is not None}
        return {
            **own,
            "name": self.name,
            "size": len(self),
            "labels": None if self.labels is None else sha256_of_array(self.labels, "<i8"),
            "columns": self.columns,
            "captions": self.caption_column is not None,
            "exif": self.exif,
            "crop_border": self.crop_border,
            "content": self.content,
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def fetch(self, index: int, *, min_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return an item as an index gives it: a subclass may have a ``__getitem__`` or a `read` of its own.

        Args:
            index: Which one.
            min_size: See `decode`; not known to a ``__getitem__``.
        """
        plain = type(self).__getitem__ is ShiftSet.__getitem__
        return self.read(index, min_size=min_size) if plain else self[index]

    def read(self, index: int, *, min_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return an item; see `decode` for ``min_size``."""
        where = f"index {index}"
        try:
            item = self._mapping(self.data[index])
        except Exception as error:  # of the data set's own code, which is not ours to judge
            if self._is_of_the_image(error, index):
                raise self._unreadable(where, f"{type(error).__name__}: {error}") from error
            if -len(self) <= index < len(self):  # else it is the end of the set
                note(error, f"Raised by the data of set '{self.name}' at {where}, by its own code or transform.")
            raise
        result = self.decode(item, where, min_size=min_size)
        if "label" in result and self.labels is not None and result["label"] != self.labels[index]:
            raise ValueError(
                f"Expected the label {self.labels[index]} that `labels` has of set '{self.name}' at {where}, got "
                f"{result['label']} from the data. Pass the `labels` in the order of the rows, or none."
            )
        return result

    def _is_of_the_image(self, error: Exception, index: int) -> bool:
        """Whether the image is at fault for an error of the data set: ours does not decode, or PIL raised it."""
        if self._encoded is None:
            return is_decoding_error(error)
        try:
            read_image(self._encoded[index][self.image_column], exif=self.exif)
        except BadImageError:
            return True
        except LookupError:
            return False
        return False

    def decode(self, item: Mapping[str, Any], where: str, *, min_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Turn an item of ``data`` into an RGB image and a label.

        Args:
            item: A mapping with the columns of image and label.
            where: Which one it is, for errors: ``"index 7"``.
            min_size: Width and height that are enough; see :func:`~carot_hf.data.images.read_image`.
        Raises:
            BadImageError: If the image cannot be decoded.
            TypeError: If what stands in its place is of no kind that an image can be made of.
            ValueError: If a key is missing or the label is out of range.
        """
        value = self.located(self._cell(item, self.image_column, "image_column", where), where)
        border = self.crop_border
        try:
            image = read_image(value, min_size=None if border else min_size, exif=self.exif)
            if border:
                image = image.crop((border, border, image.width - border, image.height - border))
        except NotAnImageError as error:
            raise TypeError(
                f"Expected a PIL image, a (h, w, 3) uint8 array, bytes or a path in set '{self.name}' at {where}, got "
                f"{error}. Return the image itself, before it becomes a tensor; the trainer resizes and normalises it."
            ) from error
        except ValueError as error:  # a BadImageError, or a border that leaves nothing
            path = value.get("path") if isinstance(value, Mapping) else value
            file = f" (file {path})" if isinstance(path, str) else ""
            raise self._unreadable(where + file, str(error)) from error
        result: dict[str, Any] = {"image": image}
        if self.label_column is not None:
            result["label"] = self._check_label(self._cell(item, self.label_column, "label_column", where), where)
        if self.caption_column is not None:
            caption = self._cell(item, self.caption_column, "caption_column", where)
            self._check_caption(caption, where)
            result["caption"] = caption
        return result

    def _mapping(self, item: Any) -> Any:
        """An item by the names of its columns; a pair of image and label has none."""
        if isinstance(item, tuple | list) and len(item) == 2:
            return dict(zip((self.image_column, self.label_column or "label"), item, strict=True))
        return item

    @property
    def stored_rows(self) -> Any:
        """The data, before a transform of the user's."""
        return self.data if self._encoded is None else self._encoded

    def encoded_column(self) -> Any:
        """The images of all rows as they are stored, by index; empty if the data are no ``datasets.Dataset``."""
        rows = self.stored_rows
        feature = facts_of(rows, "features").get(self.image_column)
        if feature is None or getattr(feature, "decode", False) or not hasattr(rows, "with_format"):
            return ()
        return rows.with_format(None)[self.image_column]

    def encoded_lengths(self) -> list[int | None]:
        """Bytes of the images of all rows that are stored with them; ``None`` of one that is a file of its own."""
        import pyarrow as pa  # of a datasets.Dataset; the rest of the package runs without it
        import pyarrow.compute as pc

        rows = self.stored_rows
        column = rows.data.column(self.image_column)
        kind = column.type
        if pa.types.is_struct(kind):
            column, kind = pc.struct_field(column, "bytes"), kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            return [None] * len(rows)
        lengths = pc.binary_length(column)  # of the offsets alone: nothing that is mapped is read
        if rows._indices is not None:
            lengths = lengths.take(rows._indices.column(0))
        found: list[int | None] = lengths.to_pylist()
        return found

    def located(self, value: Any, where: str) -> Any:
        """What stands for an image, with the path from the folder that it is relative to.

        Args:
            value: An image, its bytes, or a path.
            where: Which one it is, for errors.
        Raises:
            ValueError: If the path leads out of `image_roots`.
        """
        if isinstance(value, Mapping):
            named = value.get("bytes") is None and isinstance(value.get("path"), str)
            return {**value, "path": self._place(value["path"], where)} if named else value
        return self._place(value, where) if isinstance(value, str) else value

    def _place(self, path: str, where: str) -> str:
        place = path if self.image_root is None else str(self.image_root / path)
        if self.image_roots is not None and place not in self.image_roots:
            raise ValueError(
                f"Expected images in or below {self.image_roots} in set '{self.name}' at {where}, got {place!r}, which "
                "lies or leads elsewhere. Copy it there, or allow its folder with `image_roots: [folder]` in the "
                "suite's YAML file."
            )
        return place

    def _cell(self, item: Mapping[str, Any], key: str, option: str, where: str) -> Any:
        if key not in item:
            raise ValueError(
                f"Expected the key '{key}' in set '{self.name}' at {where}, got the keys {sorted(item)}. Name the "
                f"right one with `{option}`."
            )
        return item[key]

    def _unreadable(self, where: str, reason: str) -> BadImageError:
        return BadImageError(
            f"Expected an image that can be decoded in set '{self.name}' at {where}, got {reason}. Replace or drop "
            "this sample, or pass on_bad_image='skip'."
        )

    def select(self, logits: Tensor) -> Tensor:
        """Turn logits of the training classes into logits of this set's labels.

        Args:
            logits: ``(n, K)`` float.
        Returns:
            ``(n, num_labels)``: for each label the maximum over its columns, before any softmax.
        """
        if self.columns is None:
            return logits
        if all(len(group) == 1 for group in self.columns):
            return logits[:, [group[0] for group in self.columns]]
        return torch.stack([logits[:, group].amax(dim=1) for group in self.columns], dim=1)

    def _check_label(self, label: Any, where: str) -> int:
        """From what stands in the place of a label to a label."""
        if isinstance(label, Tensor):
            label = label.numpy(force=True)
        if isinstance(label, np.ndarray) and label.ndim == 0:
            label = label.item()
        if (reason := not_a_label(label)) is not None:
            raise ValueError(
                f"Expected one label in set '{self.name}' at {where}, a class index or a name, got {reason}."
            )
        if self._table is not None:
            try:
                label = self._table(label)
            except ValueError as error:
                raise ValueError(f"{error} (at {where})") from None
        return label_in_range(label, self.num_labels, self.name, where)
