"""Commands that must be refused."""

from __future__ import annotations

import pytest

from carot_hf.cli.main import main


@pytest.fixture
def refused(capsys):
    """Run a command that ends with status 2; return its last line on stderr, which says why."""

    def run(*words, lines=None):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith(f"carot_hf {words[0]}: ")
        assert lines is None or len(said) == lines
        return said[-1]

    return run
