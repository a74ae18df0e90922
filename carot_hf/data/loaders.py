"""Loaders of a training: each process reads its own share of every batch, and no sample fills a batch up.

accelerate only moves the batches. It would fill uneven last batches up with samples from the start of the epoch, which
are false negatives of themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from .balanced import BalancedSampler, balanced_labels
from .batches import DrawnSet, DrawSampler, ReadSet, ReplacedCollator, ShareSampler
from .shift_set import ShiftSet
from .stream import StreamedDraws, StreamedSet


def images_at_once(device: torch.device, most: int = 256) -> int:
    """Return how many images to embed at a time where nobody says it: on a CPU small batches are faster."""
    return 32 if device.type == "cpu" else most


def loader_options(args: Any, device: torch.device) -> dict[str, Any]:
    """Return the options of a ``DataLoader`` that ``TrainingArguments`` set."""
    workers = args.dataloader_num_workers
    return {
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory and device.type == "cuda",
        "prefetch_factor": args.dataloader_prefetch_factor if workers else None,
        "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None) if workers else None,
    }


def training_loader(
    data: ShiftSet,
    args: Any,
    *,
    batch_size: int,
    collator: Any,
    epoch: Callable[[], int],
    seed: int,
    min_size: tuple[int, int] | None,
    device: torch.device,
) -> Any:
    """Return the loader of a training set; its samples carry the number of their draw (:mod:`carot_hf.data.batches`).

    Args:
        data: With random access, or a stream.
        args: :class:`~carot_hf.CaRotTrainingArguments`.
        batch_size: Of one process.
        collator: Makes a batch of samples.
        epoch: Called when an epoch starts; returns its number.
        seed: Of the order.
        min_size: Width and height that are enough for a training image.
        device: Where the batches go.
    Raises:
        ValueError: If there is no whole batch, or the last one would be a single pair.
    """
    whole_batch = args.contrastive_batch_size or batch_size * args.world_size
    if isinstance(data, StreamedSet):
        batches = len(data) // whole_batch * (whole_batch // (batch_size * args.world_size))
        _check_whole(batches > 0, data, whole_batch, "Lower the batch size.")
        source: Any = StreamedDraws(
            data,
            batch_size=batch_size,
            batches=batches,
            rank=args.process_index,
            world=args.world_size,
            seed=seed,
            min_size=min_size,
            skip=args.skips_bad_images,
        )
        return _moved(source, args, collator, device, batch_size=batch_size)
    cure = "Lower `per_device_train_batch_size`, or set `dataloader_drop_last` False."
    _check_whole(not args.dataloader_drop_last or len(data) >= whole_batch, data, whole_batch, cure)
    plain = args.objective == "contrastive" and not args.contrastive_batch_size  # the cache leaves a rest out
    if plain and not args.dataloader_drop_last and len(data) % whole_batch == 1:
        raise ValueError(
            f"Expected two pairs or more in every batch, got a last one of 1 from the {len(data)} samples of set "
            f"'{data.name}' in batches of {whole_batch}. Choose another batch size, or set `dataloader_drop_last`."
        )
    drawn = DrawnSet(ReadSet(data, skip=args.skips_bad_images, min_size=min_size))
    order = _order(data, args, batch_size * args.world_size, seed, epoch)
    shares = ShareSampler(order, batch_size, args.process_index, args.world_size, drop_last=args.dataloader_drop_last)
    return _moved(drawn, args, collator, device, batch_sampler=shares)


def whole_of(args: Any, at_once: int) -> int:
    """Return what the samples of a class-balanced epoch are a multiple of: none that it counts is left out.

    Args:
        args: :class:`~carot_hf.CaRotTrainingArguments`.
        at_once: Samples of a batch, over all processes.
    """
    return int(args.contrastive_batch_size or (at_once if args.dataloader_drop_last else 1))


def _order(data: ShiftSet, args: Any, at_once: int, seed: int, epoch: Callable[[], int]) -> DrawSampler:
    """The samples of an epoch, in their order."""
    if args.class_balanced:
        pairs = args.contrastive_batch_size or at_once
        return BalancedSampler(balanced_labels(data), seed, epoch, pairs=pairs, whole=whole_of(args, at_once))
    shuffle = args.train_sampling_strategy != "sequential"
    return DrawSampler(len(data), seed, epoch, shuffle=shuffle, whole=args.contrastive_batch_size or 1)


def evaluation_loader(data: Any, args: Any, *, collator: Any, device: torch.device) -> Any:
    """Return the loader of a set to evaluate or predict, in its order."""
    readable = ReadSet(data, skip=args.skips_bad_images)
    return DataLoader(
        readable, batch_size=args.eval_batch_size, collate_fn=ReplacedCollator(collator), **loader_options(args, device)
    )


def _moved(data: Any, args: Any, collator: Any, device: torch.device, **batches: Any) -> Any:
    """A loader as ``Trainer`` makes them, of this process's own share, whose batches accelerate moves."""
    options = loader_options(args, device)
    loader = DataLoader(
        data,
        **batches,
        collate_fn=ReplacedCollator(collator),
        persistent_workers=args.dataloader_num_workers > 0 and args.dataloader_persistent_workers,
        **options,
    )
    # Workaround, accelerate 1.15: asked for its own share, `prepare` would split what is split already and fill up the
    # last batch with repeated samples. Told of one process, it only moves batches. Until: it takes a sharded loader.
    return prepare_data_loader(
        loader,
        device=device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        non_blocking=options["pin_memory"] or bool(getattr(args.accelerator_config, "non_blocking", False)),
    )


def _check_whole(there: bool, data: ShiftSet, whole_batch: int, cure: str) -> None:
    if not there:
        raise ValueError(
            f"Expected at least one whole batch of {whole_batch} samples in set '{data.name}', got {len(data)}. {cure}"
        )


def let_workers_go(loader: Any) -> None:
    """End the workers of a training loader, which would stay as long as the trainer.

    When the garbage collector finds a trainer with its loader, it closes the queues first: torch then waits 5 seconds
    for each worker, which is never told to end.
    """
    # Workaround, torch 2.13. Until: a loader's iterator tells its workers to end before it closes their queues.
    for part in (loader, getattr(loader, "base_dataloader", None)):
        if part is not None and getattr(part, "_iterator", None) is not None:
            part._iterator = None
