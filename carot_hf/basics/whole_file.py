"""Files that are there whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial"  # in the names of what is being written
_OF_TORCH = ("PytorchStreamWriter", "inline_container")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path beside another one to write to; it takes the other's place when the block has ended well.

    On an error the file that was there stays as it was, and what was written goes.

    Args:
        path: Where the file is to be; its suffix is kept, since some writers go by it.
    Raises:
        OSError: If it cannot be written.
    """
    place = Path(path)
    beside = place.with_name(f".{place.stem}{PARTIAL}{place.suffix}")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, place)
    except Exception as error:
        if failed_to_write(error):
            raise _not_written(place, error) from error
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """Give a folder in another one to write to; its files take their places in that one when the block has ended well.

    On an error what was there stays as it was, and what was written goes.

    Args:
        folder: It is made if it is not there.
    Raises:
        OSError: If they cannot be written.
    """
    place = Path(folder)
    beside = place / PARTIAL
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        written = files_below(beside)
        for name in written:
            _sync(beside / name)
        for name in written:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, place / name)
    except Exception as error:
        if failed_to_write(error):
            raise _not_written(place, error) from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def files_below(folder: Path) -> list[str]:
    """Names of the files in a folder and below, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def failed_to_write(error: BaseException) -> bool:
    """Tell whether an error is about writing a file: of Python, safetensors or torch."""
    # Workaround, torch 2.13: `torch.save` raises a RuntimeError on a full disk. Until: it raises an OSError.
    of_torch = isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_TORCH)
    return of_torch or isinstance(error, (OSError, SafetensorError))


def _not_written(place: Path, error: BaseException) -> OSError:
    reason = " ".join(str(error).split())
    return OSError(
        f"Expected to write {place}, got {type(error).__name__}: {reason}. What was there before is as it was: make "
        "room, or choose another folder."
    )


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
