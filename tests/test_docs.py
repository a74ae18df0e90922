"""The documentation: every block of code of every page runs, or its options are those of the program; the site builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import carot_hf
import pages as docs
import pytest
from conftest import ROOT

from carot_hf import losses

# Blocks that neither run nor are checked: page, first line, why.
EXEMPT: dict[tuple[str, str], str] = {}
LANGUAGES = {"python", "bash", "yaml", "text", "bibtex"}  # bibtex is no code; the others are checked
QUICK = {  # pages that run in a few seconds
    "docs/explanations/batch_mean_ece.md",
    "docs/explanations/ema_teacher.md",
    "docs/explanations/same_class_pairs.md",
}
PAGES = {path.relative_to(ROOT).as_posix(): path for path in docs.pages()}
BLOCKS = {page: docs.blocks(path) for page, path in PAGES.items()}


def runs(page):
    return any(block.language in ("python", "bash") for block in BLOCKS[page])


def is_exempt(page, block):
    return (page, block.code.split("\n")[0]) in EXEMPT


def test_every_block_has_a_language_that_is_checked():
    unknown = [(page, block) for page, found in BLOCKS.items() for block in found if block.language not in LANGUAGES]
    assert [(page, block.line) for page, block in unknown if not is_exempt(page, block)] == []
    known = {(page, block.code.split("\n")[0]) for page, found in BLOCKS.items() for block in found}
    assert EXEMPT.keys() <= known, "an exemption is of no block"


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "bash" for b in BLOCKS[page])])
def test_programs_know_the_options_of_every_command(page):
    for block in BLOCKS[page]:
        if block.language == "bash" and not is_exempt(page, block):
            for words in docs.commands(block.code):
                docs.check_command(words)


def test_suites_have_keys_that_exist():
    for page, found in BLOCKS.items():
        for block in found:
            if block.language == "yaml" and not is_exempt(page, block):
                docs.check_suite(block.code)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if page in QUICK else [pytest.mark.slow]) for page in PAGES if runs(page)]
)
def test_page_runs(page, tmp_path):
    for name in docs.LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
    }
    exempt = [str(block.line) for block in BLOCKS[page] if is_exempt(page, block)]
    command = [sys.executable, str(ROOT / "tests" / "pages.py"), str(PAGES[page]), *exempt]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
