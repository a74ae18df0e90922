"""Every page of the site in a browser, at the width of a desktop and of a phone; the search from disk and below a path.

Runs where the browser is: `make test-space`, which builds the site before. The screenshots are in build/screenshots.
"""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.space

BUILD = Path(__file__).resolve().parents[2] / "build"
SITE, SHOTS = BUILD / "docs", BUILD / "screenshots"
DESKTOP, PHONE = 1280, 400
BARE_TABLE = (
    "article table:not([class]):not(.md-typeset__table > *)"  # the theme's script puts each into one that scrolls
)
# What sticks out of the window, what is cut off or scrolls within the page, and images that are not there.
PROBLEMS = """() => {
  const wide = document.documentElement.clientWidth, found = {out: [], scrolls: [], missing: []}
  const name = e => `${e.tagName} ${e.className} ${(e.textContent || "").trim().slice(0, 40)}`
  if (document.documentElement.scrollWidth > wide) found.out.push(`page ${document.documentElement.scrollWidth}`)
  for (const e of document.querySelectorAll("article, article *")) {
    const box = e.getBoundingClientRect(), scroller = e.parentElement.closest(".md-typeset__scrollwrap, .formula")
    if (box.width && box.height && !scroller && (box.right > wide + 1 || box.left < -1)) found.out.push(name(e))
    const cut = getComputedStyle(e).overflowX !== "visible" && e.clientWidth && e.scrollWidth > e.clientWidth + 1
    if (cut) found.scrolls.push(`${name(e)} ${e.scrollWidth} in ${e.clientWidth}`)
  }
  for (const image of document.images) if (!image.complete || !image.naturalWidth) found.missing.push(image.src)
  return found
}"""


@pytest.fixture(scope="module")
def pages():
    found = [path for path in sorted(SITE.rglob("*.html")) if path.name != "404.html"]
    assert len(found) > 30, "run `make docs`"
    return found


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_nothing_is_cut_off_or_missing(browser, pages, width):
    """On a phone tables and formulas may scroll within the page; on a desktop nothing does."""
    page, problems = browser.new_page(), {}
    page.route("**/search_index.js", lambda route: route.abort())  # a second a page, for a search that nobody makes
    page.set_viewport_size({"width": width, "height": 900})
    for path in pages:
        name = path.relative_to(SITE).with_suffix("").as_posix()
        page.goto(path.as_uri())
        page.wait_for_function(f"() => !document.querySelector('{BARE_TABLE}')")
        found = page.evaluate(PROBLEMS)
        if width == PHONE:
            found["scrolls"] = [
                what for what in found["scrolls"] if not what.startswith(("DIV md-typeset__", "DIV formula"))
            ]
        problems |= {name: found} if any(found.values()) else {}
        page.screenshot(path=SHOTS / str(width) / f"{name}.png", full_page=True)
    page.close()
    assert problems == {}


def found_by_search(page, word):
    """Addresses of the pages that the search box finds."""
    page.locator(".md-search__input").click()
    page.locator(".md-search__input").press_sequentially(word)
    page.locator(".md-search-result__link").first.wait_for()
    return [link.get_attribute("href") for link in page.locator(".md-search-result__link").all()]


def test_the_search_works_from_disk(browser):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((SITE / "index.html").as_uri())
    assert any("batch_mean_ece.html" in address for address in found_by_search(page, "batch-mean"))
    assert [address for address in asked if not address.startswith(("file:", "data:", "about:"))] == []
    page.close()


def test_pages_and_search_work_below_a_path(browser, tmp_path):
    """As on a host that keeps the site of each project below its name; nothing is asked for outside of it."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "project").symlink_to(SITE, target_is_directory=True)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base, page, answers = f"http://127.0.0.1:{server.server_port}/some/project/", browser.new_page(), {}
    page.on("response", lambda response: answers.update({response.url: response.status}))
    try:
        page.goto(f"{base}reference/teacher.html")
        addresses = found_by_search(page, "batch-mean")
        page.goto(next(address for address in addresses if "batch_mean_ece.html" in address))
        assert page.locator("h1").inner_text().startswith("Why the batch-mean ECE misleads")
        assert {url: status for url, status in answers.items() if status >= 400 or not url.startswith(base)} == {}
    finally:
        page.close()
        server.shutdown()
        server.server_close()
