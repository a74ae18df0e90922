"""What commands leave in the root of a checkout changes no check: `make lint` is green beside any of it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages as docs
import pytest
from toys import ROOT

from carot_hf.cli import demo, tables, train_options

OURS = ("carot_hf", "examples", "space", "benchmarks", "docs", "tests")
FILES = ("Makefile", "README.md", "mkdocs.yml", "pyproject.toml", "setup.cfg")
# Of today's commands and of older ones, of their trackers, and of the libraries underneath.
LEFT = ("out", "demo", "report", "runs", "trainer_output", "tmp_trainer", "wandb", "mlruns", "trackio", "build", "dist",
        "site", ".gradio", "lightning_logs", "data", "moved", "carot_hf.egg-info", *docs.OF_PAGES)  # fmt: skip
BAD = "import sys\nimport os, json\nx:int = 'a'\ndef test_it(): assert 0\n"


def imported():
    """The names that our files import: a folder of that name must not be taken for one of ours."""
    found = set()
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    found.add(node.module.split(".")[0])
    return found - set(OURS)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the checkout with all leftovers, and with a folder for each library that is imported."""
    folder = tmp_path_factory.mktemp("leftovers") / "clone"
    for name in OURS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    names = imported()
    assert {"torch", "transformers", "wandb", "pages", "toys"} <= names
    for name in {*LEFT, *names}:
        (folder / name / "files").mkdir(parents=True)
        for file in ("a.py", "test_a.py", "conftest.py", "files/b.py"):
            (folder / name / file).write_text(BAD)
    return folder


def output(folder, *command):
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("check", [["check", "."], ["format", "--check", "."]], ids=["check", "format"])
def test_ruff_looks_at_ours_alone(clone, check):
    status, said = output(clone, sys.executable, "-m", "ruff", *check, "--no-cache")
    assert status == 0, said


def test_ruff_looks_at_all_of_ours(clone):
    _, said = output(clone, sys.executable, "-m", "ruff", "check", ".", "--show-files", "--no-cache")
    shown = {Path(line) for line in said.splitlines() if line.endswith(".py")}
    assert shown == {path for name in OURS for path in (clone / name).rglob("*.py")}


@pytest.mark.release
def test_pytest_collects_nothing_of_it(clone):
    status, said = output(clone, sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    collected = [line for line in said.splitlines() if "::" in line]
    assert status == 0, said[-2000:]
    assert len(collected) > 1000
    assert all(re.match("tests/([a-z]+/)?test_", line) for line in collected)


@pytest.mark.release
def test_make_lint_is_green(clone):
    command = ["make", "--assume-old=.venv/.ready", "lint", f"BIN={Path(sys.executable).parent}"]
    status, said = output(clone, *command)
    assert status == 0, said


def test_by_default_scripts_write_into_out(monkeypatch, tmp_path):
    """One place that is ignored by git, and that a reader may delete."""
    assert demo.parse([]).output_dir == Path("out/demo")
    assert tables.parse([]).output_dir == Path("out/report")
    for flags, folder in (([], "carot"), (["--preset", "flyp"], "flyp"), (["--zero_shot"], "zero_shot")):
        args = train_options.parse(["--suite", "digits", "--use_cpu", *flags])[1]
        assert args.output_dir == os.path.join("out", folder)
    args = train_options.parse(["--suite", "digits", "--use_cpu", "--output_dir", str(tmp_path)])[1]
    assert args.output_dir == str(tmp_path)


def test_commands_of_the_pages_write_into_out():
    for path in docs.pages():
        for block in docs.blocks(path):
            for words in docs.commands(block.code) if block.language == "bash" else ():
                for option in ("--output_dir", "--output"):
                    if option in words:
                        assert words[words.index(option) + 1].startswith("out/"), (path, words)


def test_git_ignores_it():
    ignored = set((ROOT / ".gitignore").read_text().split())
    missing = [name for name in LEFT if not {f"/{name}/", f"{name}/", f"/{name}", "*.egg-info/"} & ignored]
    assert missing == []
