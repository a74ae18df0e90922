"""Which commands there are, and how one ends: what the user can mend is one line, and the status 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "calibrate": "a calibrated copy of a checkpoint",
    "evaluate": "accuracy and calibration of a checkpoint on the sets of a suite; writes no model",
    "predict": "class and calibrated confidence of images without labels; what to expect of them",
    "suite": "check: what a suite holds, with a picture; init: a suite file for a folder",
}
_HELP = """usage: carot_hf COMMAND [options]

{commands}

carot_hf COMMAND --help says more. --debug shows where an error came from.
"""


def main(argv: Sequence[str]) -> int:
    """Run a command; return the exit status."""
    words = list(argv)
    shown = _HELP.format(commands="\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
    if not words or words[0] in ("-h", "--help", "help"):
        print(shown)
        return 0
    if words[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    name, rest = words[0], [word for word in words[1:] if word != "--debug"]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        print(f"carot_hf: expected a command, got {name!r}.{f' Did you mean {near[0]}?' if near else ''}\n\n{shown}")
        return 2
    command = import_module(f".{name}", __package__)
    try:
        command.main(rest)
    except KeyboardInterrupt:
        print(f"\ncarot_hf {name}: interrupted", file=sys.stderr)
        return 130
    except (ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
        if "--debug" in words:
            raise
        print(f"carot_hf {name}: {_in_a_line(error)}", file=sys.stderr)
        return 2
    return 0


def run() -> None:
    """The entry point of the console command."""
    sys.exit(main(sys.argv[1:]))


def _in_a_line(error: BaseException) -> str:
    from ..basics.escape import printable

    return printable(" ".join(str(error).split()))
