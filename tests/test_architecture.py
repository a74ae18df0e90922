"""Who may import whom: the table of the rooms, read off the source."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "carot_hf"
LOWEST = ROOT / "tests" / "versions" / "lowest.txt"

# floor 0 and ground: arithmetic, no transformers, no framework
ALLOWED = {
    "ece.__init__": set(),
    "ece.binning": set(),
    "ece.inputs": {"ece.binning"},
    "ece.uncertainty": {"ece.binning"},
    "ece.rows": {"ece.binning", "ece.inputs"},
    "ece.ece": {"ece.binning", "ece.inputs", "ece.rows", "ece.uncertainty"},
    "metric": set(),  # loads ece.ece through evaluate, by its folder
    "precision": set(),
    "modes": set(),
    "metric_names": set(),
    "losses": {"precision"},
    "sigmoid": {"calibration", "losses", "precision"},
    "backbones": {"checkpoint_files"},
    "teacher": {"precision"},
    "distributed": set(),
    "images": set(),
    "image_roots": set(),
    "escape": set(),
    "redaction": set(),
    "run_lock": {"escape"},
    "input_wait": {"escape"},
    "gradient_cache": set(),
    "checkpoints": {"escape", "whole_file"},
    "checkpoint_files": {"checkpoints"},
    "whole_file": set(),
    "content_hash": set(),
    "fingerprint": set(),
    "digits": set(),
    "imagenet": set(),
    "corruptions": set(),
    "calibration": {"ece.binning", "ece.inputs", "escape"},
    "merging": set(),
    # floor 1: data, options, and models beside CLIPModel
    "adapters": {"whole_file"},  # LoRA; the only one that knows peft
    "classifier": {"escape", "precision"},
    "convert": set(),
    "prompts": {"modes", "precision"},
    "class_names": {"escape", "prompts"},
    "transforms": set(),
    "data": {"images", "prompts", "transforms"},
    "labels": set(),
    "columns": set(),
    "folders": {"escape", "images"},
    "tables": {"columns"},
    "loading": {"columns", "escape", "folders", "image_roots", "tables"},  # rows from the Hub or from disk
    "sets": {"columns", "content_hash", "escape", "image_roots", "images", "labels", "metric_names", "prompts"},
    "streaming": {"escape", "images", "sets"},
    "splits": {"columns", "escape", "labels", "loading", "sets", "streaming"},
    "survey": {"escape", "sets"},
    "imagenet_suite": {
        "class_names", "content_hash", "corruptions", "imagenet", "loading", "sets", "splits", "streaming",
    },
    "yaml_text": set(),
    "recommended": {"training_args", "yaml_text"},
    "suite_file": {
        "columns", "escape", "labels", "loading", "prompts", "recommended", "sets", "splits", "survey", "tables",
        "yaml_text",
    },
    "suites": {"content_hash", "digits", "imagenet_suite", "sets", "suite_file"},
    "training_args": {"adapters", "losses", "metric_names", "redaction", "teacher"},
    "resume": {"checkpoint_files", "redaction", "training_args", "whole_file"},
    "publish": {"checkpoints", "whole_file"},
    "onnx_export": {"calibration", "classifier", "escape", "transforms"},
    "prepare": {"adapters", "backbones", "calibration", "classifier", "escape", "precision", "prompts", "sets"},
    # floor 2: when and what to show
    "teacher_file": {"checkpoint_files", "teacher", "whole_file"},
    "callbacks": {"escape", "teacher", "teacher_file"},
    "evaluation": {"calibration", "ece.binning", "escape", "metric_names", "sets", "sigmoid"},
    "plots": {"ece.binning"},
    "model_card": {"escape", "redaction"},
    "reporting": {"ece.binning", "escape", "plots", "whole_file"},
    "header": {"escape"},
    # the Space of the metric, which installs the package: nothing of ours imports it
    "ece.csv_rows": set(),
    "ece.app": {"ece.csv_rows", "metric", "plots"},
    # floor 3: the trainer
    "suite_trainer": {
        "adapters", "backbones", "calibration", "classifier", "data", "distributed", "ece.binning", "escape",
        "evaluation", "fingerprint", "metric_names", "model_card", "precision", "prepare", "prompts", "publish",
        "redaction", "reporting", "resume", "run_lock", "sets", "streaming", "training_args", "transforms",
        "whole_file",
    },
    "trainer": {
        "adapters", "backbones", "callbacks", "checkpoint_files", "checkpoints", "classifier", "content_hash",
        "distributed", "escape", "evaluation", "gradient_cache", "header", "input_wait", "losses", "model_card",
        "precision", "prepare", "resume", "run_lock", "sets", "sigmoid", "suite_trainer", "survey", "teacher",
        "teacher_file", "training_args", "whole_file",
    },
}  # fmt: skip
THIRD_PARTY = {
    "ece.binning": {"numpy"},
    "ece.inputs": {"numpy"},
    "ece.rows": {"numpy"},
    "ece.uncertainty": {"numpy"},
    "ece.ece": {"numpy", "datasets", "evaluate"},
    "ece.csv_rows": {"numpy"},
    "ece.app": {"gradio", "numpy", "PIL"},
    "metric": {"evaluate"},
    "losses": {"torch"},
    "precision": {"torch"},
    "modes": {"torch"},
    "metric_names": set(),
    "sigmoid": {"torch"},
    "backbones": {"safetensors", "torch", "transformers"},
    "transforms": {"numpy", "PIL", "torch"},
    "teacher": {"torch"},
    "teacher_file": {"safetensors", "torch"},
    "resume": {"torch", "transformers"},
    "checkpoint_files": {"safetensors", "torch", "transformers"},
    "distributed": {"torch"},
    "checkpoints": set(),
    "whole_file": {"safetensors"},
    "publish": {"huggingface_hub"},
    "content_hash": {"numpy"},
    "fingerprint": {"torch"},
    "calibration": {"numpy", "torch"},
    "merging": {"torch"},
    "adapters": {"peft", "safetensors", "torch", "transformers"},
    "classifier": {"torch", "transformers"},
    "onnx_export": {"PIL", "torch", "transformers"},  # and those of the extra, when it is called
    "convert": {"torch", "safetensors", "transformers"},
    "digits": {"numpy", "PIL", "matplotlib", "mlxtend", "sklearn"},
    "imagenet": set(),
    "corruptions": {"numpy", "PIL"},  # and the package of the corruptions, when it is asked for
    "class_names": {"huggingface_hub"},
    "evaluation": {"numpy", "torch"},
    "sets": {"numpy", "pyarrow", "torch"},
    "images": {"numpy", "PIL"},
    "image_roots": set(),
    "escape": set(),
    "redaction": set(),
    "run_lock": set(),
    "gradient_cache": {"torch"},
    "input_wait": set(),
    "streaming": {"numpy", "torch"},
    "labels": {"numpy"},
    "columns": {"datasets"},
    "folders": set(),
    "tables": {"datasets"},
    "loading": {"datasets", "huggingface_hub", "numpy"},
    "survey": {"numpy", "torch"},
    "header": {"numpy"},
    "yaml_text": {"yaml"},
    "recommended": {"transformers"},
    "suite_file": {"numpy", "yaml"},
    "plots": {"numpy", "matplotlib"},
    "model_card": {"huggingface_hub"},
    "reporting": {"numpy", "matplotlib"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(path.read_text(encoding="utf-8"))


def imports(name, tree):
    """Absolute names of all imports of a module, those inside functions included."""
    package = ["carot_hf", *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


MODULES = {name: set(imports(name, tree)) for name, tree in modules()}


def ours(name):
    found = {i.removeprefix("carot_hf.") for i in MODULES[name] if i.startswith("carot_hf.")}
    return {i for i in found if (PACKAGE / f"{i.replace('.', '/')}.py").exists()}


def test_nothing_imports_the_space():
    assert not [name for name in MODULES if "ece.app" in ours(name)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_point_down_only(name):
    assert name in ALLOWED, f"{name} has no place in the table"
    assert ours(name) <= ALLOWED[name]


def test_the_table_has_no_circle_and_no_ghosts():
    assert ALLOWED.keys() == MODULES.keys() - {"__init__"}
    order = []
    while len(order) < len(ALLOWED):
        ready = [name for name in ALLOWED if name not in order and ALLOWED[name] <= set(order)]
        assert ready, "imports go round in a circle"
        order += ready


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_low_rooms_know_few_libraries(name):
    roots = {i.split(".")[0] for i in MODULES[name]} - {"carot_hf", "__future__"}
    assert roots - set(sys.stdlib_module_names) <= THIRD_PARTY[name]


def test_only_the_metric_and_its_loader_know_evaluate():
    assert [name for name, found in MODULES.items() if "evaluate" in found] == ["ece.ece", "metric"]


def test_peft_is_imported_in_functions_of_one_module_only():
    assert [name for name, found in MODULES.items() if any(i.split(".")[0] == "peft" for i in found)] == ["adapters"]
    tree = dict(modules())["adapters"]
    at_once = {i.split(".")[0] for node in tree.body for i in imports("adapters", ast.Module([node], []))
               if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert "peft" not in at_once


def test_binning_stands_in_one_place():
    """Nobody else sorts confidences into bins; calibration searches sorted ranks for its AUROC, no bins."""
    users = {
        (name, node.attr)
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("searchsorted", "histogram", "digitize", "bucketize")
    }
    assert users == {("ece.binning", "searchsorted"), ("calibration", "searchsorted")}


def test_importing_the_package_is_light():
    code = "import sys, carot_hf; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_imports_add_little_to_those_of_transformers():
    """`Trainer` itself imports datasets; the public names, but the metric's, add no plotting, no metric and no data."""
    code = """
import sys, time, transformers
start = time.perf_counter()
import carot_hf
seconds = time.perf_counter() - start
heavy = ("datasets", "evaluate", "matplotlib", "sklearn", "mlxtend", "scipy", "peft", "pandas", "pyarrow")
assert not {"datasets", "evaluate", "matplotlib"} & sys.modules.keys()
from transformers import Trainer
before = set(sys.modules)
for name in carot_hf.__all__:
    if name != "load_ece":
        getattr(carot_hf, name)
assert "carot_hf.trainer" in sys.modules
print(seconds, [name for name in heavy if name in sys.modules and name not in before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, added = result.stdout.strip().split(" ", 1)
    assert added == "[]"
    assert float(seconds) < 0.3


def lower_bounds():
    """Lower bounds of setup.cfg: of the package, and of what the extra `demo` brings."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [setup["options"]["install_requires"], extras["plot"], extras["demo"]]
    return dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(lines), flags=re.MULTILINE))


def test_the_lowest_versions_are_those_that_setup_cfg_admits():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", LOWEST.read_text(encoding="utf-8"), flags=re.MULTILINE))
    bounds = lower_bounds()
    assert len(bounds) >= 12
    for name, bound in bounds.items():
        if name != "torch":  # one torch for all tests
            version = pinned[name.replace("_", "-")]
            assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", version), (name, bound, version)


def test_all_public_names_exist():
    import carot_hf

    for name in carot_hf.__all__:
        assert getattr(carot_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = carot_hf.nothing
    assert set(carot_hf.__all__) == {*carot_hf._HOMES, "__version__"}
