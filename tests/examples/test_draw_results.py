"""The picture of the README shows the numbers of the table in docs/digits, and so does the table of the README."""

from __future__ import annotations

import csv
import re
import subprocess
import sys

import numpy as np
import pytest
from draw_results import dumbbells, main, measured
from toys import ROOT

CSV = ROOT / "docs" / "digits" / "results.csv"
SVG = ROOT / "docs" / "results.svg"


def means(method, column):
    """By numpy, from the columns of the file as text."""
    header, *lines = list(csv.reader(CSV.read_text().splitlines()))
    place = header.index(column)
    return np.array([float(line[place]) for line in lines if line[0] == method]).mean()


EXPECTED = {
    f"{side} {name} {when}": means(method, f"eval_{side}_ece{end if when == 'after' else ''}")
    for side in ("id", "ood")
    for name, method, end in [
        ("zero-shot + T", "zero-shot", "_ts"),
        ("FLYP + T", "flyp", "_ts"),
        ("CaRot + T", "carot", "_ts"),
        ("CaRot + density", "carot", "_dts"),
    ]
    for when in ("before", "after")
}


def test_the_marks_lie_where_the_table_says():
    figure = dumbbells(measured(CSV))
    marks = [line for ax in figure.axes for line in ax.lines if line.get_gid()]
    drawn = {line.get_gid().rpartition(" ")[0]: line.get_xdata()[0] for line in marks}
    assert drawn == pytest.approx(EXPECTED, abs=1e-12)
    written = sorted(text.get_text() for ax in figure.axes for text in ax.texts)
    assert written == sorted(f"{value:.3f}"[1:] for value in EXPECTED.values())


def test_the_picture_in_the_repository_is_that_of_the_table():
    ids = re.findall(r'<g id="((?:id|ood) [^"]+ (?:before|after)) ([\d.]+)">', SVG.read_text(encoding="utf-8"))
    assert {name: float(value) for name, value in ids} == pytest.approx(EXPECTED, abs=5e-7)


def test_the_same_picture_each_time(tmp_path):
    for name in ("one.svg", "two.svg"):
        command = [sys.executable, str(ROOT / "examples" / "draw_results.py"), str(CSV), str(tmp_path / name)]
        subprocess.run(command, check=True)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_without_two_names_it_says_the_command():
    with pytest.raises(SystemExit, match=r"python examples/draw_results.py docs/digits/results.csv docs/results.svg"):
        main(["results.csv"])
