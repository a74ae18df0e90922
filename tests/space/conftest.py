"""The browser of a file of tests."""

from __future__ import annotations

import pytest
from chromium import open_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A context with a profile of its own; Playwright is there in the environment of these tests alone."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = open_browser(playwright, tmp_path_factory.mktemp("profile"))
        yield context
        context.close()
