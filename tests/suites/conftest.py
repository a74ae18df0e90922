"""What `datasets` makes of the copies of a test is kept in the test's own folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
