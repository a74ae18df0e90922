"""The ONNX file against the stock pipeline, in a process that knows onnxruntime, numpy and PIL alone."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from tolerances import float32_bound
from toys import CLIP, Noise
from transformers import CLIPModel, CLIPProcessor, pipeline

from carot_hf import bake_temperature, export_classifier, export_onnx, load_suite
from carot_hf.cli import export as script
from carot_hf.data.captions import CaptionTable, class_embeddings
from carot_hf.models import onnx as onnx_export

USE = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
asked = facts["preprocessing"]


def pixels(path):
    image = Image.open(path).convert(asked["mode"])
    factor = asked["size"] / min(image.size)
    size = [asked["size"] if side == min(image.size) else int(side * factor) for side in image.size]
    image = image.resize(size, Image.Resampling[asked["resample"].upper()])
    height, width = asked["crop"]
    left, top = (image.width - width) // 2, (image.height - height) // 2
    values = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    return ((values - asked["mean"]) / asked["std"]).transpose(2, 0, 1).astype(np.float32)


batch = np.stack([pixels(path) for path in sys.argv[2:]])
rows = {n: session.run(["probabilities", "logits"], {"pixel_values": batch[:n]}) for n in (1, 3, 8)}
assert not {"torch", "transformers", "carot_hf"} & set(sys.modules)
dtypes = [part.dtype.name for part in rows[8]]
print(json.dumps({"facts": facts, "dtypes": dtypes, "rows": {n: [p.tolist() for p in r] for n, r in rows.items()}}))
"""


def classifier_of(model, processor, names, temperature=None):
    captions = CaptionTable(
        processor, names, ["a photo of {}", "the {}"], model.config.text_config.max_position_embeddings
    )
    with torch.no_grad():
        heads = class_embeddings(model, captions)
    if temperature is not None:
        bake_temperature(model, temperature, record={"split": "validation", "n": 15})
    return export_classifier(model, heads, names)


def bound_of(classifier):
    """Two float32 programs of one network: what their probabilities may differ by."""
    multiplier, size = classifier.head.weight.norm(dim=1).max().item(), classifier.head.in_features
    return float32_bound(multiplier, size)


def check(classifier, processor, images, tmp_path):
    """Export, use without torch, compare with the stock pipeline; return facts and the largest difference."""
    classifier.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    path = export_onnx(classifier, processor, tmp_path / "new" / "model.onnx")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]  # one file
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    files = [tmp_path / f"{index}.png" for index in range(len(images))]
    for file, image in zip(files, images, strict=True):
        image.save(file)
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, str(tmp_path / "use.py"), str(path), *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout)
    names = told["facts"]["class_names"]
    classify = pipeline("image-classification", model=str(tmp_path / "model"), device="cpu")
    worst = 0.0
    for count, (probabilities, logits) in told["rows"].items():
        assert len(probabilities) == int(count)
        for image, row in zip(images, probabilities, strict=False):
            stock = {answer["label"]: answer["score"] for answer in classify(image, top_k=len(names))}
            worst = max(worst, np.abs(np.array(row) - [stock[name] for name in names]).max())
        exponents = np.exp(np.array(logits) - np.max(logits, axis=1, keepdims=True))
        np.testing.assert_allclose(exponents / exponents.sum(axis=1, keepdims=True), probabilities, atol=1e-6)
    assert told["dtypes"] == ["float32", "float32"]
    return told["facts"], worst


def test_the_tiny_model_with_odd_names_and_a_temperature(model, processor, tmp_path):
    noise = Noise(8, 3)
    images = [image.resize((20 + 7 * i, 31)) for i, image in enumerate(noise[index]["image"] for index in range(8))]
    images[2] = images[2].convert("L")
    names = ["zero", 'it\'s "one"', "数字", "zero"]
    classifier = classifier_of(model, processor, names, temperature=2.5)
    facts, worst = check(classifier, processor, images, tmp_path)
    assert worst <= bound_of(classifier)
    assert facts["class_names"] == ["zero (0)", 'it\'s "one"', "数字", "zero (3)"]
    assert (facts["calibration"]["temperature"], facts["calibration"]["split"]) == (2.5, "validation")
    asked = facts["preprocessing"]
    assert (asked["size"], asked["crop"], asked["resample"]) == (16, [16, 16], "bicubic")
    assert asked["mean"] == pytest.approx(processor.image_processor.image_mean)
    content = (tmp_path / "new" / "model.onnx").read_bytes()
    assert b".py" not in content  # no source files of this machine


def test_the_digits_model(tmp_path, caplog):
    processor = CLIPProcessor.from_pretrained(CLIP)
    classifier = classifier_of(CLIPModel.from_pretrained(CLIP), processor, [str(digit) for digit in range(10)])
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (32 + i, 40, 3)).astype(np.uint8)) for i in range(8)]
    with caplog.at_level("INFO", logger="carot_hf"):
        facts, worst = check(classifier, processor, images, tmp_path)
    assert worst <= bound_of(classifier)
    assert facts["calibration"] is None
    assert "differ by at most" in caplog.text


def test_a_model_without_a_head_is_refused(model, processor, tmp_path):
    with pytest.raises(TypeError, match=r"Expected a CLIPClassifier, got CLIPModel\. .*trainer\.export_classifier\(\)"):
        export_onnx(model, processor, tmp_path / "model.onnx")
    with pytest.raises(TypeError, match=r"got Linear\. Unwrap"):
        export_onnx(torch.nn.Linear(2, 2), processor, tmp_path / "model.onnx")


def test_a_processor_of_another_model_is_refused(model, processor, tmp_path):
    other = CLIPProcessor.from_pretrained(CLIP)
    with pytest.raises(ValueError, match=r"the model's 16 x 16 pixels, got \(32, 32\)"):
        export_onnx(classifier_of(model, processor, ["a", "b"]), other, tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(model, processor, tmp_path, monkeypatch, name):
    classifier = classifier_of(model, processor, ["a", "b"])
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"the package {name} .*`pip install carot_hf\[onnx\]`"):
        export_onnx(classifier, processor, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_a_file_that_differs_is_removed(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match=r"got a difference of .*the file is removed"):
        export_onnx(classifier_of(model, processor, ["a", "b"]), processor, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_large_weights_lie_beside_the_file_and_half_precision_is_exported_in_float32(
    model, processor, tmp_path, monkeypatch
):
    """It checks itself against the float32 model."""
    monkeypatch.setattr(onnx_export, "_ONE_FILE", 1)
    classifier = classifier_of(model, processor, ["a", "b"]).to(torch.bfloat16)
    path = export_onnx(classifier, processor, tmp_path / "model.onnx")
    assert classifier.dtype == torch.bfloat16
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    floats = sum(value.numel() for value in classifier.state_dict().values() if value.is_floating_point())
    assert (tmp_path / "model.onnx.data").stat().st_size > 3.5 * floats  # transposed or not, 4 bytes each
    assert path.stat().st_size < 200_000


@pytest.mark.slow
def test_the_script_exports_a_calibrated_model_by_its_suite(tmp_path, capsys):
    """Against CLIP's own towers, caption by caption."""
    model, processor = CLIPModel.from_pretrained(CLIP).eval(), CLIPProcessor.from_pretrained(CLIP)
    with pytest.raises(ValueError, match=r"Expected class names, .* Name a --suite"):
        script.main(["--model", str(CLIP), "--output", str(tmp_path / "x.onnx")])
    suite = load_suite("digits")
    bake_temperature(model, 1.7, record={"templates": suite.templates})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    path = script.main(["--model", str(tmp_path / "model"), "--suite", "digits", "--output", str(tmp_path / "a.onnx")])
    told = capsys.readouterr().out
    assert "MB" in told
    assert "captions" not in told
    image = suite.shifts["mnist"][5]["image"]
    pixels = processor(images=image, return_tensors="pt").pixel_values
    heads = []
    with torch.no_grad():
        for name in suite.class_names:
            rows = []
            for template in suite.templates:
                tokens = processor.tokenizer(template.format(name), return_tensors="pt")
                row = model.get_text_features(**tokens).pooler_output[0]
                rows.append(row / row.norm())
            mean = torch.stack(rows).mean(dim=0)
            heads.append(mean / mean.norm())
        embed = model.get_image_features(pixel_values=pixels).pooler_output[0]
        expected = (model.logit_scale.exp() * torch.stack(heads) @ (embed / embed.norm())).softmax(dim=0)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(["probabilities"], {"pixel_values": pixels.numpy()})[0][0]
    bound = float32_bound(model.logit_scale.exp().item(), model.config.projection_dim)
    assert got.tolist() == pytest.approx(expected.tolist(), abs=bound)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["calibration"])["temperature"] == 1.7
    assert json.loads(facts["class_names"]) == suite.class_names
