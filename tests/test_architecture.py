"""Who may import whom: the table of the rooms, read off the source."""

from __future__ import annotations

import ast
import configparser
import re
import statistics
import subprocess
import sys

import pytest
from toys import ROOT

PACKAGE = ROOT / "carot_hf"
LOWEST = ROOT / "tests" / "versions" / "lowest.txt"

# From the bottom: a package imports from those named, and from files of its own. One module at the top is a room, too.
ALLOWED = {
    "ece": set(),  # the evaluate module, which also runs alone in a Space
    "metric": set(),  # loads ece through evaluate, by its folder
    "basics": set(),
    "calibration": {"basics", "ece"},
    "data": {"basics", "calibration"},
    "objective": {"basics"},
    "teacher": {"basics"},
    "models": {"basics", "calibration", "data", "objective"},
    "presets": set(),
    "argument_checks": {"data", "objective", "teacher"},
    "training_args": {"argument_checks", "basics", "calibration", "data", "models", "objective", "presets"},
    "suites": {"basics", "data", "training_args"},
    "evaluation": {"basics", "calibration", "data", "ece", "models"},
    "run": {"basics", "calibration", "data", "models", "objective", "teacher", "training_args"},
    "hub": {"basics", "calibration", "models"},
    "trainer": {
        "basics", "calibration", "data", "evaluation", "hub", "models", "objective", "run", "teacher",
        "training_args",
    },
    "cli": {
        "basics", "calibration", "data", "ece", "evaluation", "hub", "models", "presets", "run", "suites", "trainer",
        "training_args",
    },
    "__main__": {"cli"},
}  # fmt: skip
THIRD_PARTY = {
    "ece": {"numpy", "datasets", "evaluate"},
    "metric": {"evaluate"},
    "basics": {"numpy", "safetensors", "torch", "yaml"},
    "calibration": {"huggingface_hub", "numpy", "safetensors", "torch"},
    "data": {"accelerate", "datasets", "numpy", "PIL", "pyarrow", "torch"},
    "objective": {"torch"},
    "teacher": {"safetensors", "torch", "transformers"},
    "models": {
        "peft",
        "PIL",
        "safetensors",
        "torch",
        "transformers",
    },  # and those of the extra onnx, when it is asked for
    "presets": set(),
    "argument_checks": set(),
    "training_args": {"accelerate", "torch", "transformers"},
    "suites": {
        "datasets",
        "huggingface_hub",
        "matplotlib",
        "mlxtend",
        "numpy",
        "PIL",
        "sklearn",
        "transformers",
        "yaml",
    },
    "evaluation": {"huggingface_hub", "matplotlib", "numpy", "PIL", "safetensors", "torch", "tqdm", "transformers"},
    "run": {"numpy", "torch", "tqdm", "transformers"},
    "hub": {"huggingface_hub", "transformers"},
    "cli": {"accelerate", "numpy", "scipy", "torch", "tqdm", "transformers", "yaml"},
    "__main__": set(),
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(path.read_text(encoding="utf-8"))


def room(name):
    """The package of a module, or the module itself at the top."""
    return name.split(".")[0]


def from_imports(name, tree):
    """Module and names of every `from ... import ...`, those inside functions included; modules by their whole name."""
    package = ["carot_hf", *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), [alias.name for alias in node.names]


def imports(name, tree):
    """Absolute names of all imports of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
    for module, names in from_imports(name, tree):
        yield module
        yield from (f"{module}.{part}" for part in names)


TREES = {name: tree for name, tree in modules() if name != "__init__"}
MODULES = {name: set(imports(name, tree)) for name, tree in TREES.items()}


def ours(name):
    found = {i.removeprefix("carot_hf.") for i in MODULES[name] if i.startswith("carot_hf.")}
    return {i for i in found if i in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_only(name):
    assert room(name) in ALLOWED, f"{name} has no place in the table"
    assert {room(i) for i in ours(name)} - {room(name)} <= ALLOWED[room(name)]


def test_the_table_has_no_circle_and_no_ghosts():
    assert ALLOWED.keys() == {room(name) for name in MODULES}
    used = {name: {room(i) for part in MODULES if room(part) == name != "ece" for i in ours(part)} for name in ALLOWED}
    assert {name: ALLOWED[name] - used[name] for name in ALLOWED if ALLOWED[name] - used[name]} == {}, "never used"
    for table in (ALLOWED, {name: ours(name) for name in MODULES}):
        order = []
        while len(order) < len(table):
            ready = [name for name in table if name not in order and table[name] <= set(order)]
            assert ready, f"imports go round in a circle among {sorted(table.keys() - set(order))}"
            order += ready


def test_private_names_stay_in_their_package():
    crossing = [
        (name, module, part)
        for name, tree in TREES.items()
        for module, parts in from_imports(name, tree)
        for part in parts
        if module.startswith("carot_hf.") and room(module.removeprefix("carot_hf.")) != room(name)
        if part.startswith("_") or any(piece.startswith("_") for piece in module.split("."))
    ]
    assert crossing == []


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in THIRD_PARTY])
def test_low_rooms_know_few_libraries(name):
    roots = {i.split(".")[0] for i in MODULES[name]} - {"carot_hf", "__future__"}
    assert roots - set(sys.stdlib_module_names) <= THIRD_PARTY[room(name)]


def test_only_the_metric_and_its_loader_know_evaluate():
    assert [name for name, found in MODULES.items() if "evaluate" in found] == ["ece.ece", "metric"]


def test_peft_is_imported_in_functions_of_one_module_only():
    assert [name for name, found in MODULES.items() if any(room(i) == "peft" for i in found)] == ["models.lora"]
    at_once = {room(i) for node in TREES["models.lora"].body for i in imports("models.lora", ast.Module([node], []))
               if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert "peft" not in at_once


def test_binning_stands_in_one_place():
    """Nobody else sorts confidences into bins; calibration searches sorted ranks for its AUROC, no bins."""
    users = {
        (name, node.attr)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("searchsorted", "histogram", "digitize", "bucketize")
    }
    assert users == {("ece.binning", "searchsorted"), ("calibration.metrics", "searchsorted")}


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


OVERRIDDEN = {
    "_finalize_training", "_finish_current_push", "_get_grad_norm", "_hp_search_setup", "_init_training_state",
    "_load_best_model", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_prepare_inputs",
    "_push_from_checkpoint", "_save", "_save_checkpoint", "call_model_init", "compute_loss", "create_model_card",
    "evaluate", "evaluation_loop", "floating_point_ops", "get_batch_samples", "get_decay_parameter_names",
    "get_eval_dataloader", "get_test_dataloader", "get_train_dataloader", "hyperparameter_search", "init_hf_repo",
    "log", "push_to_hub", "set_initial_training_values", "train", "training_step",
}  # fmt: skip


def test_no_method_of_the_trainer_is_overridden_by_accident():
    """A helper called `_evaluate` once replaced one that Trainer calls."""
    from transformers import Trainer

    from carot_hf import CaRotTrainer

    ours = [kind for kind in CaRotTrainer.__mro__ if kind.__module__.startswith("carot_hf.")]
    assert [kind.__name__ for kind in ours] == ["CaRotTrainer", "RunTrainer", "EvaluatingTrainer", "PublishingTrainer"]
    names = {name for kind in ours for name, value in vars(kind).items() if callable(value) and name[:2] != "__"}
    assert {name for name in names if hasattr(Trainer, name)} == OVERRIDDEN


def test_a_trainer_without_what_it_asks_for_is_not_made():
    from carot_hf.evaluation.trainer import EvaluatingTrainer
    from carot_hf.hub.trainer import PublishingTrainer
    from carot_hf.run.trainer import RunTrainer

    asked = {RunTrainer: {"facts", "parts"}, EvaluatingTrainer: {"teacher_network"},
             PublishingTrainer: {"card_facts", "teacher_files"}}  # fmt: skip
    for kind, names in asked.items():
        assert kind.__abstractmethods__ == names
        with pytest.raises(TypeError, match="abstract"):
            kind(args=None)


def test_nothing_grows_too_long():
    """Files that are read in one sitting, functions on one screen; docstrings counted."""
    folders = ("carot_hf", "examples", "space", "benchmarks", "docs")
    files = {path: path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")}
    lines = {path: text.count("\n") for path, text in files.items()}
    assert {path for path, count in lines.items() if count > 450} == set()
    assert statistics.median(count for path, count in lines.items() if ROOT / "carot_hf" in path.parents) < 170
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.end_lineno:
                most = 450 if isinstance(node, ast.ClassDef) else 40 if path == PACKAGE / "trainer.py" else 60
                assert node.end_lineno - node.lineno < most, f"{path}: {node.name}"
