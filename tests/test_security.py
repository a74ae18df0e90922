"""What SECURITY.md promises: read off the source, and tried with hostile files and with a token."""

from __future__ import annotations

import ast
import io
import json
import logging

import pytest
import torch
from layouts import empty_png
from PIL import Image
from toys import ROOT

from carot_hf import ShiftSet, load_clip_checkpoint
from carot_hf.data.images import MAX_PIXELS, BadImageError, read_image

FILES = sorted(
    [*(ROOT / "carot_hf").rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "space").rglob("*.py")]
)
TOKEN = "hf_thisTokenMustNotBeSeenAnywhere"

# ---- no code from data ----

_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load"),
    *("pd.read_pickle", "torch.save"),
}
_SWITCHES = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(source):
    """Line and name of whatever could run code out of a file or a string."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
            names += [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in _CALLS]
        found += [(node.lineno, name) for name in names if name in _MODULES | _CALLS]
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in _CALLS:
            found.append((node.lineno, called))
        if called == "torch.load" and getattr(options.get("weights_only"), "value", None) is not True:
            found.append((node.lineno, "torch.load without weights_only=True"))
        for name, value in options.items():
            if name in _SWITCHES and getattr(value, "value", _SWITCHES[name]) == _SWITCHES[name]:
                found.append((node.lineno, name))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_code_out_of_data(path):
    allowed = [(21, "pickle")] if path.name == "convert.py" else []  # for the name of an error: see the next test
    assert [name for _, name in findings(path.read_text(encoding="utf-8"))] == [name for _, name in allowed]


def test_pickle_is_imported_for_its_error_only():
    tree = ast.parse((ROOT / "carot_hf" / "models" / "convert.py").read_text(encoding="utf-8"))
    assert {dotted(node) for node in ast.walk(tree) if dotted(node).startswith("pickle.")} == {"pickle.UnpicklingError"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "import os; os.system('ls')",
        "from os import system",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "import torch; torch.load('x.pt')",
        "import torch; torch.load('x.pt', weights_only=False)",
        "import torch; torch.load('x.pt', weights_only=flag)",
        "import torch; torch.save(model, 'x.pt')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "subprocess.run(command, shell=True)",
        "np.load('x.npy', allow_pickle=True)",
    ],
)
def test_each_of_these_would_be_found(source):
    assert findings(source)


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    torch.save({"weights": Trap(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"Expected a file of plain tensors, got .*needs code to be read"):
        load_clip_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


# ---- images ----


@pytest.mark.parametrize("size", [(MAX_PIXELS // 1000 + 1, 1000), (10_000, 17_000), (65_000, 65_000)])
def test_an_image_that_claims_too_many_pixels_is_refused_by_its_header(monkeypatch, size):
    """The three are below PIL's warning, between its warning and its error, and above both."""
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: decoded.append(self.size))
    data = empty_png(*size)
    for value in (data, {"bytes": data, "path": None}):
        with pytest.raises(BadImageError, match=r"pixels, more than 89,478,485; shrink it"):
            read_image(value)
    items = ShiftSet([{"image": data, "label": 0}], name="hub", num_classes=1)
    with pytest.raises(ValueError, match=r"decoded in set 'hub' at index 0, got .*"):
        items[0]
    assert decoded == []


def test_an_ordinary_image_is_none():
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, format="PNG")
    assert read_image(buffer.getvalue()).size == (30, 20)
    with pytest.raises(BadImageError, match="30 x 20 pixels, more than 599"):
        read_image(buffer.getvalue(), max_pixels=599)


# ---- tokens ----


def test_a_token_is_in_no_file_log_or_text_of_a_run(make_trainer, tmp_path, capfd):
    records = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("", "transformers", "carot_hf")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        trainer = make_trainer(
            hub_token=TOKEN, save_strategy="steps", save_steps=2, report_to="tensorboard", reliability_diagrams=True
        )
        trainer.train()
        trainer.evaluate()
        trainer.calibrate()
        trainer.save_model()
        trainer.create_model_card()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    args = trainer.args
    assert args.hub_token == TOKEN  # it was there to be seen
    printed = capfd.readouterr()
    for text in (args.to_json_string(), json.dumps(args.to_dict()), str(args), repr(args), str(args.changed())):
        assert TOKEN not in text
    assert TOKEN not in json.dumps(args.to_sanitized_dict(), default=str)
    assert TOKEN not in printed.out + printed.err + "".join(map(str, records))
    assert len(records) > 5
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"README.md", "config.json", "model.safetensors", "trainer_state.json", "optimizer.pt"} <= names
    assert any("tfevents" in name for name in names)
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path


def test_what_a_checkpoint_holds_beside_tensors_is_upstreams(make_trainer, tmp_path):
    """The pickles of a checkpoint, as SECURITY.md lists them; none of them is ours, and none goes to the Hub."""
    trainer = make_trainer(save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model()
    run = tmp_path / "run"
    readable = {".json", ".safetensors", ".md", ".png", ".txt"}
    others = {path.name for path in (run / "checkpoint-4").iterdir() if path.suffix not in readable}
    assert others == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.suffix for path in run.iterdir() if path.is_file()} <= readable
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(run / "checkpoint-4" / name, weights_only=True)
