"""What is kept of each image: by the one reading, in a file that a stranger may have written, and of which images."""

from __future__ import annotations

import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from toys import CLASSES, noise_set, tiny_clip

from carot_hf import Evaluator
from carot_hf.data.shift_set import ShiftSet
from carot_hf.data.stored import rows_mark, stored_paths
from carot_hf.evaluation import per_image_file
from carot_hf.evaluation.per_image import PerImage, difference_of, facts_of_images
from carot_hf.evaluation.per_image_file import PER_IMAGE_NAME, read_per_image, write_per_image


@pytest.fixture
def evaluator(suite, processor):
    return Evaluator(tiny_clip(processor.tokenizer), processor, suite, batch_size=8, method="density")


def test_the_one_reading_keeps_what_is_said_at_each_scaling(evaluator, suite, monkeypatch):
    read = []
    inner = type(evaluator.embedder).embed
    monkeypatch.setattr(type(evaluator.embedder), "embed", lambda self, *a: read.append(a[2]) or inner(self, *a))
    found = evaluator.evaluate(n_bootstrap=0)
    assert read.count("Evaluation") == 1
    for name, part in found.per_image.items():
        data = suite.evaluation_sets[name]
        logits, labels = evaluator.predict(data, remember=False)
        assert part.predicted.tolist() == logits.argmax(1).tolist()
        assert (part.predicted.dtype, part.labels.dtype) == (np.int32, np.int32)
        assert part.labels.tolist() == labels.tolist()
        assert part.hits.tolist() == found.rows[name][1].tolist()
        assert part.confidences[""] == pytest.approx(logits.softmax(1).amax(1).numpy(), abs=1e-6)
        expected = {""} if name == "validation" else {"", "ts", "pts", "dts"}
        assert part.confidences.keys() == expected
    temperature = found.scaling["temperature"]
    logits, _ = evaluator.predict(suite.test, remember=False)
    assert found.per_image["home"].confidences["ts"] == pytest.approx(
        (logits / temperature).softmax(1).amax(1).numpy(), abs=1e-6
    )
    assert found.per_image["part"].predicted.max() < 2, "labels of its own"


@pytest.mark.parametrize(("method", "ending"), [("temperature", "ts"), ("perturbed", "pts"), ("density", "dts")])
def test_what_a_training_writes_is_what_the_saved_checkpoint_answers(make_trainer, tmp_path, method, ending):
    trainer = make_trainer(calibration_method=method, max_steps=2)
    assert trainer.latest_rows == {}
    trainer.train()
    trainer.evaluate("home")
    assert trainer.latest_rows == {}, "a part of the suite is no evaluation of it"
    trainer.evaluate()
    record = trainer.calibrate()
    assert record["method"] == method
    write_per_image(tmp_path, trainer.latest_rows, record["method"])
    rows, own = read_per_image(tmp_path / PER_IMAGE_NAME)
    assert (own, set(rows)) == (ending, {"home", "far", "part"})
    again = trainer.evaluator.evaluate(
        n_bootstrap=0, calibrator=trainer.calibrator
    )  # the temperature is in the weights
    for name, part in rows.items():
        expected = again.per_image[name].confidences["dts" if method == "density" else ""]
        assert part.confidences[ending] == pytest.approx(expected, abs=1e-5)
        assert part.hits.tolist() == again.per_image[name].hits.tolist()
    trainer.forget()
    assert trainer.latest_rows == {}


def test_a_method_that_no_evaluation_measures_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of \('temperature', 'perturbed', 'density'\), got 'target'"):
        write_per_image(tmp_path, {}, "target")


def a_part(size=6, seed=0, **facts):
    rng = np.random.default_rng(seed)
    labels, predicted = (rng.integers(0, 4, size).astype(np.int32) for _ in range(2))
    known = {"n": size, "classes": "a" * 64, "labels": "b" * 64, "read": "c" * 64}
    return PerImage({"": rng.random(size).astype(np.float32)}, predicted, labels, known | facts)


def test_the_file_comes_back(tmp_path):
    sets = {"home": a_part(), "c-fog_3": a_part(9, 1, content="d" * 64, rows="names:" + "e" * 64)}
    assert write_per_image(tmp_path, sets) == tmp_path / PER_IMAGE_NAME
    found, ending = read_per_image(tmp_path / PER_IMAGE_NAME)
    assert (ending, list(found)) == ("", list(sets))
    for name, part in sets.items():
        assert found[name].confidences[""].tolist() == part.confidences[""].tolist()
        assert found[name].predicted.tolist() == part.predicted.tolist()
        assert found[name].labels.tolist() == part.labels.tolist()
        assert found[name].facts == part.facts


def put(folder, tensors, said):
    save_file(tensors, str(folder / PER_IMAGE_NAME), said)


FLAWS = {
    "nan": (lambda t, s, f: t["home.confidence"].fill(np.nan), r"`home.confidence` has values outside"),
    "inf": (lambda t, s, f: t["home.confidence"].fill(np.inf), r"`home.confidence` has values outside"),
    "high": (lambda t, s, f: t["home.confidence"].fill(1.5), r"`home.confidence` has values outside"),
    "hit": (lambda t, s, f: np.logical_not(t["home.hit"], out=t["home.hit"]), "`home.hit` is not where"),
    "negative": (lambda t, s, f: t["home.label"].fill(-1), r"`home.label` has values below 0"),
    "dtype": (lambda t, s, f: t.update({"home.hit": np.ones(6, np.uint8)}), "`home.hit` is U8"),
    "wide": (lambda t, s, f: t.update({"home.label": np.ones(6)}), "`home.label` is F64"),
    "shape": (lambda t, s, f: t.update({"home.hit": np.ones((6, 1), bool)}), r"of shape \[6, 1\] in place of BOOL"),
    "short": (lambda t, s, f: t.update({"home.hit": np.ones(5, bool)}), r"\[5\] in place of BOOL of \[6\]"),
    "missing": (lambda t, s, f: t.pop("home.hit"), "it lacks, or should not have, `home.hit`"),
    "extra": (lambda t, s, f: t.update(extra=np.ones(1)), "should not have, `extra`"),
    "format": (lambda t, s, f: s.update(format="9"), "another format than 1: 9"),
    "ending": (lambda t, s, f: s.update(ending="xts"), "`ending` is xts"),
    "json": (lambda t, s, f: s.update(facts="{"), r"cannot be read \(JSONDecodeError\)"),
    "deep": (lambda t, s, f: s.update(facts="[" * 100_000), r"cannot be read|by the names"),
    "list": (lambda t, s, f: s.update(facts="[1]"), "by the names of sets"),
    "name": (lambda t, s, f: s.update(facts=json.dumps({"../x\x1b": {}})), "by the names of sets"),
    "facts": (lambda t, s, f: f.update(more=1), "`facts` of set 'home' are others"),
    "n": (lambda t, s, f: f.update(n=True), "`n` of set 'home' is True"),
    "none": (lambda t, s, f: f.pop("n"), "`n` of set 'home' is None"),
    "huge": (lambda t, s, f: f.update(n=10**18), r"in place of F32 of \[1000000000000000000\]"),
    "hash": (lambda t, s, f: f.update(labels="x\x1b[2J"), "`labels` of set 'home' is"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_what_a_stranger_wrote_is_refused_in_a_sentence(tmp_path, flaw):
    write_per_image(tmp_path, {"home": a_part()})
    tensors = load_file(tmp_path / PER_IMAGE_NAME)
    said = {"format": "1", "ending": "", "facts": ""}
    facts = dict(a_part().facts)
    change, expected = FLAWS[flaw]
    change(tensors, said, facts)
    said["facts"] = said["facts"] or json.dumps({"home": facts})
    put(tmp_path, tensors, said)
    with pytest.raises(ValueError, match=expected) as refused:
        read_per_image(tmp_path / PER_IMAGE_NAME)
    assert "Run `carot_hf evaluate` again." in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_are_none(tmp_path, monkeypatch):
    path = tmp_path / PER_IMAGE_NAME
    with pytest.raises(FileNotFoundError, match="found no file"):
        read_per_image(path)
    for content in (b"", b"\xff" * 100, b"\xff" * 7 + b"\x7f" + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read \(SafetensorError\)"):
            read_per_image(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError):  # to open it would wait for ever
        read_per_image(path)
    path.unlink()
    write_per_image(tmp_path, {"home": a_part()})
    monkeypatch.setattr(per_image_file, "LARGEST", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_per_image(path)


def facts(data, classes=CLASSES):
    return facts_of_images(data, np.asarray(data.labels), classes)


def test_what_tells_images_from_others():
    home = noise_set("home", 12, 0)
    assert difference_of(facts(home), facts(noise_set("other", 12, 0))) is None, "its name does not count"
    assert difference_of(facts(home), facts(noise_set("home", 11, 0))) == "another number of images (12 and 11)"
    assert difference_of(facts(home), facts(home, CLASSES[::-1])).startswith("other classes")
    turned = home.subset(np.arange(12)[::-1].copy(), "home")
    assert difference_of(facts(home), facts(turned)) == "other labels, or another order"
    cropped = ShiftSet(home.data, name="home", num_classes=4, labels=home.labels, crop_border=1)
    assert difference_of(facts(home), facts(cropped)) == "images cropped or turned in another way"
    known = [ShiftSet(home.data, name="h", num_classes=4, labels=home.labels, content=name) for name in "ab"]
    assert difference_of(facts(known[0]), facts(known[1])) == "other images"
    assert difference_of(facts(home), facts(known[1])) is None, "one of them does not say"
    part = {"name": "part", "num_classes": 4, "labels": [0, 1]}
    own = [ShiftSet([{}, {}], **part, columns=columns) for columns in ([[0], [1]], [[0], [1, 2]])]
    assert difference_of(facts(own[0]), facts(own[1])).startswith("other classes")


def stored(rows, tmp_path, feature):
    made = datasets.Dataset.from_dict(
        {"image": rows, "label": [0] * len(rows)},
        features=datasets.Features({"image": feature, "label": datasets.Value("int64")}),
    )
    return made.cast_column("image", datasets.Image(decode=False)) if isinstance(feature, datasets.Image) else made


def test_rows_are_known_by_their_files_without_reading_them(tmp_path):
    text, image, binary = datasets.Value("string"), datasets.Image(decode=False), datasets.Value("binary")
    kinds = {
        "paths": (["/a/1.png", "/a/2.png"], text, (["/a/1.png", "/a/2.png"], [False, False])),
        "bytes": ([b"123", b"4567"], binary, ([None, None], [True, True])),
        "both": (
            [{"bytes": b"1", "path": None}, {"bytes": None, "path": "b/2.png"}, {"bytes": b"", "path": "3.png"}],
            image,
            ([None, "b/2.png", "3.png"], [True, False, True]),
        ),
    }
    for cells, feature, expected in kinds.values():
        rows = stored(cells, tmp_path, feature)
        assert stored_paths(rows, "image") == expected
        order = list(range(len(cells)))[::-1]
        chosen = stored_paths(rows.select(order), "image")
        assert chosen == ([expected[0][k] for k in order], [expected[1][k] for k in order])

    def mark(cells, feature):
        return rows_mark(ShiftSet(stored(cells, tmp_path, feature), name="s", num_classes=2))

    assert mark(["/a/1.png", "/a/2.png"], text) == mark(["c/1.png", "c/2.png"], text), "a copy elsewhere"
    assert mark(["/a/1.png", "/a/2.png"], text) != mark(["/a/2.png", "/a/1.png"], text)
    assert mark([b"123", b"4567"], binary).startswith("sizes:")
    assert mark([b"123", b"4567"], binary) != mark([b"1234", b"567"], binary)
    assert rows_mark(noise_set("home", 4, 0)) is None
    ours, theirs = {"rows": mark(["1.png"], text)}, {"rows": mark(["2.png"], text)}
    assert difference_of(ours, theirs).startswith("other images, by the names")
    assert difference_of(ours, {"rows": mark([b"1"], binary)}) is None, "names and sizes say nothing of each other"


def test_an_evaluation_in_training_makes_no_facts(evaluator):
    assert evaluator.evaluate(["home"], n_bootstrap=0, remember=False).per_image == {}
    part = evaluator.evaluate(["home"], n_bootstrap=0).per_image["home"]
    assert part.facts["n"] == 19
    assert torch.equal(torch.from_numpy(part.labels), torch.arange(19, dtype=torch.int32) % 4)


def test_image_paths_of_a_folder_are_marks(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    rows = stored([str(tmp_path / "1.png")], tmp_path, datasets.Image(decode=False))
    assert rows_mark(ShiftSet(rows, name="s", num_classes=2)).startswith("names:")
