"""Which commands there are, and how one ends: what the user can mend is one line, and the status 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from .parser import nearest

COMMANDS = {
    "train": "fine-tune, judge under shift, calibrate and save",
    "evaluate": "accuracy and calibration of a checkpoint on the sets of a suite; writes no model",
    "compare": "runs side by side: accuracy, ECE, and differences with intervals",
    "calibrate": "a calibrated copy of a checkpoint",
    "predict": "class and calibrated confidence of images without labels; what to expect of them",
    "suite": "check: what a suite holds, with a picture; init: a suite file for a folder",
    "interpolate": "WiSE-FT: the models between a zero-shot and a fine-tuned one",
    "export": "a classifier for transformers' image-classification pipeline, or an ONNX file",
    "tables": "the tables and figures of the papers, by one command",
    "demo": "zero-shot, FLYP and CaRot on real images, offline",
}
_GO_ON = ("predict", "tables")  # where an interrupted call was
_HELP = """usage: carot_hf COMMAND [options]

{commands}

carot_hf COMMAND --help says more. --debug shows where an error came from.
"""


def main(argv: Sequence[str]) -> int:
    """Run a command; return the exit status."""
    words = list(argv)
    shown = _HELP.format(commands="\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items()))
    if not words or words[0] in ("-h", "--help", "help"):
        print(shown)
        return 0
    if words[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        near = nearest(words[0], COMMANDS)
        print(f"carot_hf: expected a command, got {words[0]!r}.{near}\n\n{shown}", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:], f"carot_hf {words[0]}")


def run_command(name: str, words: Sequence[str], called: str) -> int:
    """Run one command; return the exit status: 0, 2 after an error that is said in one line, 130 if interrupted.

    With ``--debug`` among the words an error ends in its traceback; ``called`` is how the user called the command.
    """
    debug, rest = _without_debug(words)
    try:
        import_module(f".{name}", __package__).main(rest)
    except KeyboardInterrupt:
        cure = "; the same command goes on from here" if name in _GO_ON else ""
        print(f"\n{called}: interrupted{cure}", file=sys.stderr)
        return 130
    except (ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
        if debug:
            raise
        from ..basics.escape import printable

        print(f"{called}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return 0


def run() -> None:
    """The entry point of the console command."""
    sys.exit(main(sys.argv[1:]))


def script(name: str) -> None:
    """Run a command under the name of the script that was called."""
    sys.exit(run_command(name, sys.argv[1:], Path(sys.argv[0]).name))


def _without_debug(words: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether ``--debug`` is among words, and the others; with a value it is an option of ``TrainingArguments``."""
    kept = [
        word
        for word, behind in zip(words, [*words, "-"][1:], strict=True)
        if word != "--debug" or behind in ("underflow_overflow", "tpu_metrics_debug")
    ]
    return len(kept) < len(words), kept
