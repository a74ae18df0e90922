"""The wheel as a user gets it: built from the sdist, installed into an empty environment, used from elsewhere."""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from elsewhere import elsewhere
from toys import ROOT

pytestmark = pytest.mark.package
SCRIPT = """
import json, torch, carot_hf
from transformers import CLIPConfig, CLIPModel
from carot_hf import CaRotTrainer, CaRotTrainingArguments, bake_temperature, fit_temperature, load_ece
from carot_hf.suites.imagenet.sets import wnids

torch.manual_seed(0)
logits = 4 * torch.randn(4000, 5)
labels = torch.multinomial((logits / 2).softmax(-1), 1)[:, 0]  # so the right temperature is 2
temperature = fit_temperature(logits, labels)
tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = CLIPModel(CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 16, "patch_size": 8}))
before = float(model.logit_scale)
bake_temperature(model, temperature)
model.save_pretrained("model")
after = float(CLIPModel.from_pretrained("model").logit_scale)
args = CaRotTrainingArguments.from_preset("carot", output_dir="run", use_cpu=True, report_to="none")
ece = load_ece().compute(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[0, 0])["ece"]
print(json.dumps({
    "file": carot_hf.__file__, "temperature": temperature, "baked": before - after, "ece": ece, "wnids": len(wnids()),
    "label_smoothing_factor": args.label_smoothing_factor, "trainer": CaRotTrainer.__name__,
}))
"""
TYPED = """
from carot_hf import CLIPClassifier, fit_temperature, load_suite

reveal_type(fit_temperature)
reveal_type(load_suite("digits").content_hash)
fit_temperature("logits")
"""


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "carot_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert names == {path.relative_to(ROOT).as_posix() for path in files}
    needed = ("ece/ece.py", "ece/binning.py", "ece/README.md", "suites/benchmarks/benchmarks.yaml")
    assert {f"carot_hf/{name}" for name in (*needed, "py.typed", "suites/imagenet/imagenet.json")} <= names


def test_the_sdist_has_no_tests_and_no_examples(built):
    with tarfile.open(built[1]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {name.partition("/")[0] for name in names} - {""} == {
        *("LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "carot_hf", "carot_hf.egg-info"),
        *("pyproject.toml", "setup.cfg"),
    }


def test_it_works_in_an_empty_environment(python, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = elsewhere([str(python), "script.py"], tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(python.parents[1])
    assert found["temperature"] == pytest.approx(2, abs=0.1)
    assert 2.718281828 ** found["baked"] == pytest.approx(found["temperature"], rel=1e-5)
    assert found["ece"] == pytest.approx(0.45)  # |1 - .9| and |0 - .8|, half each
    assert found["wnids"] == 1000
    assert found["trainer"] == "CaRotTrainer"


def test_the_command_is_there(python, tmp_path):
    said = elsewhere([str(python.with_name("carot_hf")), "--help"], tmp_path)
    assert said.returncode == 0, said.stderr
    assert "predict" in said.stdout
    refused = elsewhere([str(python.with_name("carot_hf")), "predict", str(tmp_path / "none"), str(tmp_path)], tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr


def test_its_types_are_seen(python, tmp_path):
    """mypy reads the annotations of an installed package only where it finds ``py.typed``."""
    (tmp_path / "typed.py").write_text(TYPED)
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n" for name in (
        "torch", "transformers", "datasets", "numpy", "PIL", "accelerate", "evaluate", "yaml", "matplotlib",
        "safetensors", "huggingface_hub", "tqdm", "scipy", "mlxtend", "sklearn",
    ))  # fmt: skip
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n" + skipped)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(python), "typed.py"]
    result = elsewhere(mypy, tmp_path)
    assert "criterion: str" in result.stdout or "criterion: builtins.str" in result.stdout, result.stdout
    assert '"str"' in result.stdout
    assert "py.typed" not in result.stdout
