"""The command line's parser: an error is one sentence, a typo gets the nearest option, help fits a screen."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are ``ValueError``, for the one place that ends a command.

    Args:
        command: After ``carot_hf``.
        text: What the command does; two paragraphs of it are shown.
    """

    def __init__(self, command: str, text: str) -> None:
        super().__init__(
            prog=f"carot_hf {command}",
            description="\n\n".join(text.split("\n\n")[:2]),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words; one that nothing knows is refused with the nearest option."""
        found, unknown = self.parse_known_args(words)
        refuse_unknown(unknown, self._option_string_actions)
        return found

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError that says how to see the options."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` shows the options.")


def refuse_unknown(words: Sequence[str], options: Iterable[str]) -> None:
    """Raise a ValueError if there are words that no option has taken."""
    if words:
        raise ValueError(f"Expected known options, got {words[0]!r}.{nearest(words[0].partition('=')[0], options)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?``, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def positive(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
