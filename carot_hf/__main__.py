"""``python -m carot_hf``: the command line."""

from .cli.main import run

run()
