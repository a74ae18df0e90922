"""One run at a time in a folder: a lock by process and host, which is taken over from a process that is gone."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..basics.escape import guarded
from ..basics.processes import done_by_first

logger = guarded(logging.getLogger(__name__))

LOCK_NAME = ".run.lock"
_BEAT = 30.0  # seconds between two signs of life
_SILENT = 300.0  # seconds without one after which a process of another host counts as gone
_held: dict[str, int] = {}  # by folder: how often this process has locked it


@contextmanager
def locked(output_dir: str | Path) -> Iterator[None]:
    """Hold a run's folder, which is made if there is none, while the block runs; within a process as often as wanted.

    A process of this machine counts as gone when it is gone, one of another machine (or container) when it has given no
    sign of life for five minutes.

    Args:
        output_dir: The folder.
    Raises:
        ValueError: If another run holds it, or nothing can be written there.
    """
    made = make_folder(output_dir)
    key = os.path.realpath(output_dir)
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    path, own = Path(key, LOCK_NAME), _own()
    try:
        _take(path, own)
    except OSError as error:
        raise _unwritable(output_dir, error) from error
    _held[key] = 1
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, own, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        del _held[key]
        if _read(path) == own:
            path.unlink(missing_ok=True)
        for folder in made:  # nothing was written there
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def alone(output_dir: str | Path) -> Iterator[None]:
    """Hold a run's folder for all processes, which all end if the first one cannot have it; see `locked`."""
    with ExitStack() as held:
        done_by_first(lambda: held.enter_context(locked(output_dir)))
        yield


def make_folder(output_dir: str | Path) -> list[Path]:
    """Make a folder for a run unless it is there.

    Returns:
        The folders that were made, the innermost first.
    Raises:
        ValueError: If it, or what it lies in, is a file, or may not be made.
    """
    refuse_file(output_dir)
    path = Path(output_dir).absolute()
    missing = [part for part in (path, *path.parents) if not part.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output_dir, error) from error
    return missing


def refuse_file(output_dir: str | Path) -> None:
    """Raise a ValueError if a folder for a run, or what it lies in, is a file."""
    path = Path(output_dir).absolute()
    for part in (path, *path.parents):
        if os.path.lexists(part) and not part.is_dir():
            raise ValueError(
                f"Expected a folder as `output_dir`, got {output_dir}, where {part} is none. Choose another folder."
            )


def _unwritable(output_dir: str | Path, error: OSError) -> ValueError:
    return ValueError(
        f"Expected an `output_dir` that can be written to, got {output_dir} ({type(error).__name__}: "
        f"{error.strerror or error}). Choose another folder, or change its rights."
    )


def _take(path: Path, own: str) -> None:
    """Put a lock there, whole, unless another run's is there."""
    mine = path.with_name(f"{LOCK_NAME}.{os.getpid()}")
    try:
        for _ in range(10):
            mine.write_text(own, encoding="utf-8")  # anew: its time is the folder's own clock
            if _put(mine, path):
                return
            theirs = _read(path)
            if theirs is not None:
                _refuse_living(path, theirs, mine.stat().st_mtime)
                _put_aside(path, theirs)
        raise ValueError(f"Expected to lock {path.parent}, but several runs try to. Give each a folder of its own.")
    finally:
        mine.unlink(missing_ok=True)


def _put(mine: Path, path: Path) -> bool:
    """Whether the lock could be put there, where none was."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(mine.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _refuse_living(path: Path, theirs: str, now: float) -> None:
    """Raise a ValueError unless the process that holds a folder is gone."""
    holder = _facts(theirs)
    try:
        silent = now - path.stat().st_mtime
    except FileNotFoundError:
        return
    process, host = holder.get("process"), holder.get("host")
    here = holder.get("machine") == _machine()
    alive = _is_alive(process, holder.get("started")) if here and isinstance(process, int) else None
    if alive if alive is not None else silent < _SILENT:
        wait = "" if alive else f" It counts as gone {_SILENT / 60:.0f} minutes after its last sign of life."
        raise ValueError(
            f"Expected an `output_dir` of this run alone, got {path.parent}, in which process {process} on host {host} "
            f"has been running since {holder.get('since')}.{wait} Wait for its end, or choose another folder."
        )
    logger.warning("Taking over %s from process %s on host %s, which is gone.", path.parent, process, host)


def _put_aside(path: Path, theirs: str) -> None:
    """Take away the lock that was read, and no other one: of several that try one succeeds."""
    aside = path.with_name(f"{LOCK_NAME}.{os.getpid()}.old")
    try:
        path.rename(aside)
        if _read(aside) != theirs:  # another run was faster, and this is its lock
            _put(aside, path)
    except FileNotFoundError:
        pass
    finally:
        aside.unlink(missing_ok=True)


def _beat(path: Path, own: str, ended: threading.Event) -> None:
    """Give signs of life until the end."""
    while not ended.wait(_BEAT):
        if _read(path) != own:
            logger.warning("%s is not locked by this run any more: another one may write there, too.", path.parent)
            return
        try:
            os.utime(path)
        except OSError as error:
            logger.debug("No sign of life in %s: %s", path, error)


def _own() -> str:
    facts = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return json.dumps(facts)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _facts(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
    """What tells processes that know each other's numbers: host, and on Linux its start and the process namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _is_alive(process: int, started: Any) -> bool | None:
    """Whether a process of this machine runs; ``None`` if that cannot be told."""
    if process == os.getpid():  # what this process holds is known
        return False
    if os.name != "posix":
        return None
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = _started(process)
    return now is None or started is None or now == started


def _started(process: int) -> str | None:
    """When a process started, in ticks, where Linux tells; ``"ended"`` of one that only waits to be buried."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] == "Z" else fields[19]
