"""Ports for servers that are started later, where a port must be known before."""

from __future__ import annotations

import fcntl
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reserved_port():
    """A port below those that the system gives out by itself, and ours alone while this lasts."""
    folder = Path(tempfile.gettempdir())
    for port in range(20000, 30000):
        with (folder / f"carot_hf-port-{port}").open("w") as lock, socket.socket() as probe:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                probe.bind(("127.0.0.1", port))
            except OSError:  # another test has it, or a server that is none of ours
                continue
            probe.close()
            yield port
            return
    raise RuntimeError("Expected a free port from 20000 to 29999, got none.")
