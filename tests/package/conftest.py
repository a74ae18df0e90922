"""The wheel, built from the sdist and installed into one empty environment for all tests of this folder."""

from __future__ import annotations

import subprocess
import sys
import venv

import pytest
from elsewhere import elsewhere
from toys import ROOT


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="session")
def python(built, tmp_path_factory):
    """The Python of an empty environment outside the repository with the wheel in it, and with nothing else."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ROOT / "tests" / "versions" / "newest.txt"
    result = elsewhere([*install, "--constraint", str(constraints), str(built[0])], folder)
    assert result.returncode == 0, result.stderr
    return python
