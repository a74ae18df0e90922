"""The code blocks of a page of the documentation, and what is done with each kind of them.

    python tests/pages.py docs/tutorial.md     # in an empty folder: run the page from top to bottom

Python blocks run in one namespace. A block with `title="x"` is written to that file. A ``text`` block after a Python
block is what that one prints, with numbers up to one unit of their last digit or 5 %. `carot_hf train` and
`interpolate` run where their suite is here: digits, or a file or folder that the page wrote. Training on digits
is cut to a few steps. Of every other command the options are read by the parser of its own program.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib
import io
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("carot_hf", "examples", "benchmarks", "docs", "setup.cfg", "Makefile")
# What pages leave where they are run, beside `out`: data and suites that the reader makes.
OF_PAGES = ("mine", "mine.yaml", "pets", "pets.yaml", "captioned.yaml", "run.yaml")
CUT = {
    "train": ["--max_steps", "4", "--save_steps", "2", "--use_cpu"],
    "interpolate": ["--alphas", "0", "1", "--use_cpu"],
}
NUMBER = re.compile(r"-?\d*\.?\d+(?:e-?\d+)?")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, the file it is to be saved as, its text and the line of its fence."""

    language: str
    title: str | None
    code: str
    line: int


def pages():
    """All pages whose blocks are code that a reader may copy."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "carot_hf" / "ece" / "README.md"]


def blocks(path):
    """Fenced blocks, and commands that are set off by four spaces."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found, start, fence = [], 0, None
    for number, line in enumerate(lines):
        opening = re.match(r"( *)(```+)(.*)", line)
        if fence is None and opening:
            fence, start = opening, number
        elif fence is not None and line.strip() == fence[2]:
            language, _, rest = fence[3].strip().partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            indent = len(fence[1])
            code = "".join(text[indent:] + "\n" for text in lines[start + 1 : number])
            found.append(Block(language, title and title[1], code, start + 1))
            fence = None
        elif fence is None and re.match(r"    (python|accelerate|torchrun|make|hf|pip|carot_hf) ", line):
            found.append(Block("bash", None, line.strip() + "\n", number))
    assert fence is None, f"{path}: a block is not closed"
    return found


def commands(code):
    """The commands of a ``bash`` block, as words."""
    joined = re.sub(r"\\\s*\n", " ", code)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def script_of(words):
    """The script that a command starts, and its arguments."""
    if words[0] == "carot_hf":
        return f"-m carot_hf {words[1]}", words[2:]
    if words[0] == "python":
        return words[1], words[2:]
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or (ROOT / args.config_file).is_file(), args.config_file
        if args.module:
            return f"-m {args.training_script} {args.training_script_args[0]}", args.training_script_args[1:]
        return args.training_script, args.training_script_args
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[1:])
        if args.module:
            return f"-m {args.training_script} {args.training_script_args[0]}", args.training_script_args[1:]
        return args.training_script, args.training_script_args
    return None, []


def ours(words):
    """The name of our command that a command runs, by itself or as a script; of others none."""
    script = script_of(words)[0]
    if script is None or script.startswith("-m carot_hf "):
        return script and script.split()[2]
    found = re.search(r'^    script\("(\w+)"\)$', (ROOT / script).read_text(), re.MULTILINE)
    return found and found[1]


def check_command(words):
    """Raise unless the program exists and knows every option."""
    script, arguments = script_of(words)
    if script is not None and script.startswith("-m"):
        check_ours(ours(words), arguments)
    elif script is not None:
        assert (ROOT / script).is_file(), f"no script {script}"
        check_script(script, arguments)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif words[0] == "hf":
        check_help(["-c", "from huggingface_hub.cli.hf import main; main()", words[1]], words[2:])
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    else:
        raise AssertionError(f"no rule for the command {words}")


def check_script(script, arguments):
    """Let the parser of the script read its arguments; of one without, look them up in its help."""
    if (name := ours(["python", script])) is not None:
        check_ours(name, arguments)
    else:
        check_help([script], arguments, ROOT)


def check_ours(name, arguments):
    """Let the parser of a command read its arguments."""
    if name == "train":
        importlib.import_module("carot_hf.cli.train_options").parser_of().parse_args(arguments)
    else:
        importlib.import_module(f"carot_hf.cli.{name}").parse(arguments)


def check_help(program, arguments, folder=None):
    """Look the options up in what ``--help`` says."""
    if flags := {word for word in arguments if word.startswith("--")}:
        environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
        command = [sys.executable, *program, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
        assert flags <= set(re.findall(r"--[a-z0-9_-]+", shown.stdout)), (flags, shown.stdout)


def check_pip(words):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(config["options.extras_require"])
    for word in words:
        if wanted := re.search(r"\[(.+)\]", word):
            assert set(wanted[1].split(",")) <= extras, word
        elif not word.startswith("-"):
            assert word == "carot_hf" or (ROOT / word).exists(), word


def check_suite(text):
    """Read a suite, or a part of one, by the rules of load_suite; its data need not be there."""
    from carot_hf.suites import from_yaml as rules

    content = yaml.safe_load(text)
    if (inner := rules.suite_in(content)) is not None:
        parser = importlib.import_module("carot_hf.cli.train_options").parser_of()
        assert content.keys() - {"model"} <= {action.dest for action in parser._actions}
        content = inner
    content = rules.checked_keys(content, "page", "", rules._SUITE_KEYS, ())
    sets = {"train": rules._TRAIN_KEYS, "validation": rules._SET_KEYS, "test": rules._TEST_KEYS}
    for key in sets.keys() & content.keys():
        if isinstance(content[key], dict):
            rules.checked_keys(content[key], "page", key, sets[key], ("path",))
    for name, value in content.get("shifts", {}).items():
        rules.checked_keys(value, "page", f"shifts.{name}", rules._SHIFT_KEYS, ("path",))


def small(words):
    """Whether a command runs here: one process, a suite and a model that are here, no tracker with an account."""
    if words[0] not in ("accelerate", "python", "carot_hf") or ours(words) not in CUT:
        return False
    given = dict(itertools.pairwise(words))
    if "--suite" not in given:
        return Path(given.get("--config", "none")).is_file()
    if given.get("--report_to") in ("wandb", "trackio") or not Path(given.get("--model_name_or_path", ".")).exists():
        return False
    return given["--suite"] == "digits" or Path(given["--suite"]).exists()


def run_command(words):
    script, arguments = script_of(words)
    cut = CUT[ours(words)]
    if dict(itertools.pairwise(arguments)).get("--suite") != "digits" or "--method" in arguments:
        cut = ["--use_cpu"]  # a page's own suite says how long it is trained; only WiSE-FT has alphas
    launcher = ["-m", "accelerate.commands.launch"] if words[0] == "accelerate" else []
    result = subprocess.run(
        [sys.executable, *launcher, *script.split(), *arguments, *cut], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def check_output(expected, printed):
    """Compare word by word; numbers up to one unit of the last digit that is shown, or 5 %."""
    words, found = expected.split(), printed.split()
    assert len(words) == len(found), f"expected\n{expected}\ngot\n{printed}"
    for word, other in zip(words, found, strict=True):
        same = NUMBER.sub("#", word) == NUMBER.sub("#", other)
        numbers = list(zip(NUMBER.findall(word), NUMBER.findall(other), strict=False))
        if not same or not all(near(*pair) for pair in numbers):
            raise AssertionError(f"expected {word}, got {other}, in\n{expected}\ngot\n{printed}")


def near(shown, got):
    unit = 10.0 ** -len(shown.partition(".")[2]) if "e" not in shown else 0.0
    unit = unit if "." in shown else 0.0
    return math.isclose(float(shown), float(got), rel_tol=0.05, abs_tol=unit)


def cut_digits():
    """Let the suite of digits recommend a few steps to Python, as the commands on it are cut."""
    from carot_hf.suites import load as suites

    whole = suites._digits_suite

    def cut():
        suite = whole()
        suite.recommended.update(max_steps=4, save_steps=2)
        return suite

    suites._digits_suite = cut


def run(path, exempt=()):
    """Run the blocks of a page, in order, in the working directory."""
    cut_digits()
    namespace = {"__name__": "__main__"}
    printed = None
    for block in blocks(path):
        if block.line in exempt:
            continue
        output = None
        if block.title is not None:
            Path(block.title).write_text(block.code, encoding="utf-8")
        if block.language == "python":
            stream = io.StringIO()
            code = compile("\n" * block.line + block.code, str(path), "exec")
            with contextlib.redirect_stdout(stream):
                exec(code, namespace)
            output = stream.getvalue()
        elif block.language == "bash":
            for words in commands(block.code):
                if small(words):
                    run_command(words)
        elif block.language == "text":
            assert printed is not None, f"{path}:{block.line}: text that no Python block prints"
            check_output(block.code, printed)
        printed = output


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "examples")]
    run(Path(sys.argv[1]), {int(line) for line in sys.argv[2:]})
