"""The page as a visitor has it: served from a copy of the folder, called through its API, driven in a browser.

Runs in the environment of the Space: `make test-space`. CAROT_HF_SCREENSHOT=1 renews docs/space/app.png.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack

import pytest
from chromium import PATIENCE
from PIL import Image
from ports import reserved_port
from toys import ROOT

pytestmark = pytest.mark.space

SIX_ROWS = "0.31,0.32,0.27\n0.37,0.33,0.30\n0.30,0.31,0.39\n0.61,0.38,0.01\n0.10,0.65,0.25\n0.91,0.05,0.04"
SIX_LABELS = "1 0 0 1 0 0"
SIX_ECE = 2.27 / 6  # hits against confidences of three bins: |2 - 1.08| + |0 - 1.26| + |1 - 0.91| = 2.27
ROW = 'td:text-is("{}") + td'


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The folder copied as a Space has it, run from a directory that has nothing to do with it."""
    folder = tmp_path_factory.mktemp("space") / "flat"
    for part in ("carot_hf/ece", "space"):
        shutil.copytree(ROOT / part, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    ports = ExitStack()
    port = ports.enter_context(reserved_port())
    log = folder.parent / "log"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("GRADIO", "PYTHONPATH"))
    } | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder.parent / "gradio"),
        "HF_HOME": str(folder.parent / "hf"),
        "HF_HUB_OFFLINE": "1",
        "no_proxy": "127.0.0.1",
    }
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, folder / "app.py"],
            cwd=tmp_path_factory.mktemp("elsewhere"),
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + 3 * PATIENCE
        while True:
            try:
                with urllib.request.urlopen(address, timeout=PATIENCE):
                    break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(PATIENCE)
        ports.close()


# ---- the API ----


@pytest.fixture(scope="module")
def client(url):
    from gradio_client import Client

    client = Client(url, verbose=False, analytics_enabled=False)
    yield client
    client.close()


def test_the_page_sends_nothing_home(url):
    with urllib.request.urlopen(f"{url}config", timeout=PATIENCE) as answer:
        assert json.load(answer)["analytics_enabled"] is False


def test_api_measures(client):
    numbers, diagram = client.predict(SIX_ROWS, SIX_LABELS, check_sums=False, api_name="/measure")
    assert numbers["ece"] == pytest.approx(SIX_ECE, abs=1e-12)
    assert numbers["bins"]["count"] == [0, 0, 0, 3, 0, 0, 2, 0, 0, 1]
    with Image.open(diagram) as image:
        assert (image.format, image.size) == ("PNG", (720, 960))  # 4.8 x 6.4 inches at 150 dpi


def test_api_takes_options(client):
    rows = "\n".join(" ".join(["5"] + ["0"] * 9) for _ in range(10))
    labels = "0 0 0 0 0 0 0 1 2 3"
    plain, _ = client.predict(rows, labels, from_logits=True, api_name="/measure")
    scaled, _ = client.predict(rows, labels, from_logits=True, temperature="1.6422936938", api_name="/measure")
    assert plain["ece"] == pytest.approx(1 / (1 + 9 * math.exp(-5)) - 0.7, abs=1e-12)
    assert scaled["ece"] == pytest.approx(0, abs=1e-9)
    positive, _ = client.predict(
        "[0.51,0.45,0.39,0.66,0.68,0.29,0.81,0.85]", "0 0 0 1 0 1 1 1", mode="positive", api_name="/measure"
    )
    assert positive["ece"] == pytest.approx(0.3425, abs=1e-12)


def test_api_says_what_is_wrong(client):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="This looks like logits: pass from_logits=True"):
        client.predict("3.5 -1\n2 2", "0 1", api_name="/measure")
    with pytest.raises(AppError, match=r"Expected a number in line 2, got 'x'\. Write numbers"):
        client.predict("0.5 0.5\n0.5 x", "0 1", api_name="/measure")
    with pytest.raises(AppError, match="greater than maximum value 100"):
        client.predict("0.5 0.5", "0", n_bins=1_000_000_000, api_name="/measure")


# ---- the page ----


@pytest.fixture
def page(browser, url):
    """A fresh page; afterwards: no error in its console, and nothing asked of any other host."""
    page = browser.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((url, "data:", "blob:")) else problems.append(request.url),
    )
    page.goto(url)
    page.get_by_role("button", name="Compute").wait_for()
    yield page
    page.close()
    assert problems == []


def paste(page, rows, labels):
    page.get_by_label("predictions", exact=True).fill(rows)
    page.get_by_label("labels", exact=True).fill(labels)


def compute(page):
    page.get_by_role("button", name="Compute").click()


def headline(page, text):
    page.get_by_role("heading", name=text, exact=True).wait_for()


def number(page, name):
    return page.locator(f"#table {ROW.format(name)}").inner_text()


def diagram_is_loaded(page):
    page.wait_for_function(
        "() => [...document.images].some(i => i.alt.startsWith('Reliability') && i.complete && i.naturalWidth > 0)"
    )


def test_paste_and_compute(page):
    paste(page, SIX_ROWS, SIX_LABELS)
    page.get_by_role("button", name="Options").click()
    page.get_by_label("check_sums").uncheck()
    compute(page)
    headline(page, "ECE 0.3783")
    diagram_is_loaded(page)
    # accuracy 3/6, mean confidence 3.25/6
    assert [number(page, name) for name in ("ece", "accuracy", "avg_confidence", "overconfidence", "n")] == [
        "0.3783", "0.5000", "0.5417", "0.0417", "6",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("example", "ece"),
    [
        ("calibrated", "0.0000"),
        ("over-confident", "0.2000"),
        ("logits", "0.2428"),
        ("logits, scaled", "0.0000"),
        ("six rows by hand", "0.3783"),
    ],
)
def test_examples(page, example, ece):
    page.get_by_role("button", name=example, exact=True).click()
    headline(page, f"ECE {ece}")
    assert number(page, "ece") == ece
    diagram_is_loaded(page)


def test_upload(page, tmp_path):
    rows = "a,b,label\n0.3,0.7,1\n0.9,0.1,0\n0.4,0.6,0\n"
    paste(page, "0.5 0.5", "1")  # the file goes first
    page.locator("input[type=file]").set_input_files(
        {"name": "rows.csv", "mimeType": "text/csv", "buffer": rows.encode()}
    )
    page.locator("a[href*='rows.csv']").wait_for()  # the upload is complete
    compute(page)
    # three bins: |.7 - 1| + |.9 - 1| + |.6 - 0| = 1 over 3 rows
    headline(page, "ECE 0.3333")
    page.get_by_text("3 rows from rows.csv.").wait_for()
    page.get_by_role("button", name="over-confident", exact=True).click()  # takes the file away
    headline(page, "ECE 0.2000")
    page.get_by_text("100 rows from the text.").wait_for()


def test_error_is_shown_and_goes_when_it_is_cured(page):
    page.get_by_role("button", name="over-confident", exact=True).click()
    headline(page, "ECE 0.2000")
    paste(page, "3.5 -1\n2 2", "0 1")
    compute(page)
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == (
        "Not computed. Expected `predictions` in [0, 1], got 3.5 in row 0, column 0. "
        "This looks like logits: pass from_logits=True, or apply a softmax first."
    )
    page.locator("#table").wait_for(state="hidden")  # old numbers never stand beside an error
    assert page.get_by_role("heading", name="ECE 0.2000").count() == 0
    assert page.get_by_alt_text("Reliability diagram").count() == 0
    page.get_by_label("from_logits").check()
    compute(page)
    # confidences 1 / (1 + e^-4.5) = .9890, right, and .5 at a tie, wrong
    headline(page, "ECE 0.2555")
    diagram_is_loaded(page)
    assert page.get_by_role("alert").count() == 0


def test_unreadable_text_names_the_line(page):
    paste(page, "0.5 0.5\n0.5 <b>x</b>", "0 1")
    compute(page)
    page.get_by_role("alert").wait_for()
    assert "Expected a number in line 2, got '<b>x</b>'. Write" in page.get_by_role("alert").inner_text()


def test_narrow_and_wide(page, tmp_path):
    """Nothing is cut off on a phone, and values stand on one line."""
    folder = ROOT / "docs" / "space" if os.environ.get("CAROT_HF_SCREENSHOT") == "1" else tmp_path
    page.get_by_role("button", name="over-confident", exact=True).click()
    headline(page, "ECE 0.2000")
    diagram_is_loaded(page)
    page.wait_for_function("() => document.getAnimations().every(a => a.playState !== 'running')")
    page.screenshot(path=folder / "app.png", full_page=True)
    wide = page.locator(f"#table {ROW.format('ece')}").bounding_box()
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function("() => document.documentElement.scrollWidth <= 400")
    narrow = page.locator(f"#table {ROW.format('overconfidence')}")
    assert narrow.evaluate("cell => getComputedStyle(cell).whiteSpace") == "nowrap"
    assert narrow.bounding_box()["x"] + narrow.bounding_box()["width"] < 400
    assert narrow.bounding_box()["width"] == pytest.approx(wide["width"], abs=2)
    image = page.get_by_alt_text("Reliability diagram").bounding_box()
    assert image["x"] >= 0
    assert 250 < image["width"] <= 400
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
