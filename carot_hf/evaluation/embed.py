"""Embeddings of the images of sets: each image once over all processes, each row whatever stands beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm

from ..basics.modes import evaluating
from ..basics.precision import at_least_float32, wide_dtype
from ..basics.processes import gather_uneven, place
from ..data.bad_images import BadImages
from ..data.batches import CaRotCollator, ReadSet, ReplacedCollator
from ..data.loaders import images_at_once
from ..data.shift_set import ShiftSet
from ..data.stream import RowCollator, StreamedRows, StreamedSet
from ..data.transforms import check_image_size, float_pixels, image_transform
from ..models.backbones import embedding_size, image_inputs
from ..models.lora import base_model

Embedded = tuple[Tensor, Tensor | None]  # (n, D) at least float32, and labels (n,), on the CPU


@dataclass
class Embedder:
    """Embeds the images of sets with a model.

    Attributes:
        transform: The image transform, as :func:`~carot_hf.data.transforms.image_transform` makes it.
        collator: Makes a batch of samples.
        batch_size: Images at a time in one process; a batch is filled up to it, so that a row depends on no other.
        device: Where the model lies.
        skip: Replace images that cannot be decoded.
        loader: Options of ``DataLoader``.
        autocast: Makes the context that the model runs in.
        progress: Show a bar.
        after_batch: Called with the loader after each batch of a set that has a length; shows progress in our place.
        bad_images: Notes replaced images.
    """

    transform: Any
    collator: Any
    batch_size: int = 256
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    skip: bool = False
    loader: Mapping[str, Any] = field(default_factory=dict)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    progress: bool = False
    after_batch: Callable[[Any], None] | None = None
    bad_images: BadImages = field(default_factory=BadImages)

    def embed(self, model: Any, sets: Mapping[str, ShiftSet], title: str = "Evaluation") -> dict[str, Embedded]:
        """Embed sets: streams one by one, the others in one pass.

        Args:
            model: Unwrapped; its mode stays as it is.
            sets: By name.
            title: Of the bar.
        Raises:
            ValueError: If a stream has other rows than it says.
        """
        with evaluating(model), torch.no_grad():
            found = {
                name: self._stream(model, data, title) for name, data in sets.items() if isinstance(data, StreamedSet)
            }
            indexed = {name: data for name, data in sets.items() if name not in found}
            if indexed:
                found |= self._indexed(model, indexed, title)
        return {name: found[name] for name in sets}

    def _indexed(self, model: Any, sets: Mapping[str, ShiftSet], title: str) -> dict[str, Embedded]:
        sizes = [len(data) for data in sets.values()]
        rank, world = place()
        every: Any = ConcatDataset([ReadSet(data, skip=self.skip) for data in sets.values()])
        bounds = [part * len(every) // world for part in (rank, rank + 1)]
        share = _Numbered(every, range(*bounds))
        _, embeds, labels = self._gathered(model, self._batches(share, len(share), title))
        parts = embeds.split(sizes), [None] * len(sizes) if labels is None else labels.split(sizes)
        return dict(zip(sets, zip(*parts, strict=True), strict=True))

    def _stream(self, model: Any, data: StreamedSet, title: str) -> Embedded:
        source = StreamedRows(data, *place(), skip=self.skip)
        count, embeds, labels = self._gathered(model, self._batches(source, len(data), f"{title} of {data.name}"))
        if count != len(data):
            raise ValueError(
                f"Expected {len(data):,} rows in set '{data.name}', read {count:,}. The copy is incomplete or another "
                "version."
            )
        return embeds, labels

    def _batches(self, source: Any, rows: int, title: str) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Numbers of rows and batches of this process, with a bar."""
        loader: Any = DataLoader(
            source, batch_size=self.batch_size, collate_fn=RowCollator(ReplacedCollator(self.collator)), **self.loader
        )
        sized = isinstance(source, _Numbered)
        shown = self.progress and not (sized and self.after_batch is not None)
        with tqdm(total=rows, desc=title, disable=not shown, leave=None) as bar:
            for numbers, batch in loader:
                yield numbers, batch
                bar.update(min(len(numbers) * (1 if sized else place()[1]), rows - bar.n))
                if sized and self.after_batch is not None:
                    self.after_batch(loader)

    def _gathered(
        self, model: Any, batches: Iterator[tuple[Tensor, dict[str, Any]]]
    ) -> tuple[int, Tensor, Tensor | None]:
        """How many rows all processes have, their embeddings in the order of the numbers, and their labels."""
        width, dtype = embedding_size(model), wide_dtype(base_model(model).dtype)
        columns = [[torch.empty(0, dtype=torch.int64)], [torch.empty(0, width, dtype=dtype)]]
        labels: list[Tensor] = []
        for numbers, batch in batches:
            batch = self.bad_images.note(batch)
            columns[0].append(numbers)
            columns[1].append(self.images(model, batch).cpu())
            labels += [batch["labels"]] if "labels" in batch else []
        joined = [gather_uneven(torch.cat(column).to(self.device)).cpu() for column in columns]
        order = joined[0].argsort()
        own = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
        every = gather_uneven(own.to(self.device)).cpu()
        return len(order), joined[1][order], every[order] if len(every) == len(order) else None

    def images(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Embed a batch of at most ``batch_size`` images: ``(b, D)``, length 1, at least float32."""
        images = {name: part.to(self.device) for name, part in image_inputs(batch).items()}
        images["pixel_values"] = float_pixels(images["pixel_values"], self.transform, base_model(model).dtype)
        rows = len(images["pixel_values"])
        missing = self.batch_size - rows
        if missing > 0:  # always one shape: a row's embedding then depends on no batch and on no number of processes
            images = {
                name: torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) for name, part in images.items()
            }
        with torch.no_grad(), self.autocast():
            embeds = model.get_image_features(**images).pooler_output[:rows]
        return F.normalize(at_least_float32(embeds), dim=-1)

    def steps(self, rows: int) -> int:
        """Batches of one process for so many rows of all."""
        return math.ceil(rows / (self.batch_size * place()[1]))


def embedder_of(model: Any, processor: Any, batch_size: int | None, *, most: int = 256, **options: Any) -> Embedder:
    """Make the embedder of a model outside of training; ``batch_size`` None: 32 on a CPU, else ``most``."""
    transform = image_transform(processor)
    check_image_size(model, transform)
    collator = CaRotCollator(transform, None, 0)  # type: ignore[arg-type]  # of training samples alone
    device = next(model.parameters()).device
    batch_size = images_at_once(device, most) if batch_size is None else batch_size
    return Embedder(transform, collator, batch_size, device, **options)


class _Numbered(Dataset):  # type: ignore[type-arg]
    """Some rows of a data set, each with its number."""

    def __init__(self, data: Any, rows: range) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.data[self.rows[index]], "row": self.rows[index]}
