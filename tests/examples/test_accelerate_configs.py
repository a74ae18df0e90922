"""The launch files are read by accelerate's own loader, and their commands by its own parser."""

from __future__ import annotations

import re
import shlex

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from toys import ROOT

FILES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
PUBLISHED_BATCH = 512


def command_of(path):
    """The first command of the comment at the top."""
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = re.sub(r"\\\s*\n", " ", "\n".join(lines))
    return shlex.split(next(line for line in text.splitlines() if line.startswith("accelerate launch")))


def parsed(path):
    words = command_of(path)
    assert words[:2] == ["accelerate", "launch"]
    return launch_command_parser().parse_args(words[2:])


def test_there_is_one_for_each_case():
    assert [path.stem for path in FILES] == ["cpu", "eight_gpus", "one_gpu", "two_nodes"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    """An unknown key is an error of accelerate's loader."""
    config = load_config_from_file(str(path))
    assert config.num_processes == {"cpu": 1, "one_gpu": 1, "eight_gpus": 8, "two_nodes": 16}[path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_command_names_the_file_the_script_and_the_published_batch(path):
    args = parsed(path)
    assert (ROOT / args.config_file) == path
    assert (ROOT / args.training_script).is_file()
    options = args.training_script_args
    if "--per_device_train_batch_size" in options:
        at_once = int(options[options.index("--per_device_train_batch_size") + 1])
        assert at_once * load_config_from_file(str(path)).num_processes == PUBLISHED_BATCH


def test_the_two_nodes_differ_in_their_rank_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    args, _, _ = _validate_launch_command(parsed(ROOT / "examples" / "accelerate" / "two_nodes.yaml"))
    assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, 0)
    assert (args.main_process_ip, args.main_process_port, args.rdzv_backend) == ("10.0.0.1", 29500, "static")
    assert args.multi_gpu
