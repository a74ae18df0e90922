"""What trackio has really recorded; here, because it goes with gradio and the pillow of the Space's environment."""

from __future__ import annotations

import json
import socket
import sqlite3
import sys
from contextlib import closing

import pytest
from PIL import Image
from reported import DIAGRAMS, REPORTED, check_scalars

pytestmark = pytest.mark.space


@pytest.fixture
def offline(monkeypatch):
    """Whoever wants to connect elsewhere than to this machine, is noted and fails."""
    asked = []
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(address)
            raise OSError(f"no network for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    return asked


def test_trackio_gets_terms_metrics_and_diagrams_locally(make_trainer, tmp_path, monkeypatch, offline):
    assert "trackio" not in sys.modules  # it reads its folder when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trainer = make_trainer(**REPORTED, report_to="trackio", run_name="mine", project="project")
    trainer.train()
    metrics = trainer.evaluate()
    sys.modules["trackio"].finish()  # at the end of the process it does so by itself
    with closing(sqlite3.connect(tmp_path / "trackio" / "project.db")) as database:
        found = database.execute("select run_name, metrics from metrics order by id").fetchall()
    assert {name for name, _ in found} == {"mine"}  # the final evaluation goes on with the run that training had closed
    rows = [json.loads(row) for _, row in found]
    recorded = {tag: [row[tag] for row in rows if tag in row] for row in rows for tag in row}
    check_scalars(trainer, metrics, recorded)
    images = {tag: shown for tag, shown in recorded.items() if isinstance(shown[0], dict)}
    assert images.keys() == DIAGRAMS
    assert {row["train/global_step"] for row in rows if DIAGRAMS & row.keys()} == {3}
    for (shown,) in images.values():
        with Image.open(tmp_path / "trackio" / "media" / shown["file_path"]) as image:
            image.load()
            assert image.size == (480, 640)
    assert len({shown["file_path"] for (shown,) in images.values()}) == len(DIAGRAMS)
    assert not offline
