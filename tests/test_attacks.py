"""Files of strangers: tables, images, suites, checkpoints and names that try to run, read, publish or stop something.

Fast, and over the loopback address only. SECURITY.md says which test stands for which promise.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from launching import noise_trainer
from layouts import empty_png, folders, picture
from PIL import Image
from safetensors.torch import load_file, save_file
from toys import noise_suite, tiny_clip, tiny_processor
from transformers import CLIPModel

from carot_hf import CaRotTrainingArguments, ShiftSet, bake_temperature, load_suite, unbake_temperature
from carot_hf.basics.escape import code, markdown, printable
from carot_hf.basics.manifest import damage_of, write_manifest
from carot_hf.basics.redaction import public, public_words
from carot_hf.calibration.record import calibration_record
from carot_hf.cli import main as command_line
from carot_hf.cli import training
from carot_hf.data.images import FORMATS, MAX_BYTES, MAX_PIXELS, BadImageError, read_image
from carot_hf.evaluation.evaluation import comparison_table
from carot_hf.hub.card import ZERO_SHOT, CardFacts, model_card
from carot_hf.run import lock as run_lock
from carot_hf.run.checkpoint import checkpoint_folders, newest_complete_checkpoint
from carot_hf.run.lock import locked
from carot_hf.suites import rows as loading
from carot_hf.suites.recommended import method_options
from carot_hf.suites.splits import as_set
from carot_hf.suites.tables import read_text

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pets(tmp_path):
    """A folder with a table of four images, a suite around it, and a picture elsewhere that is nobody's business."""
    place = tmp_path / "pets"
    for name in ("train", "test"):
        (place / name).mkdir(parents=True)
        for row in range(4):
            (place / name / f"{row}.png").write_bytes(picture(row % 2, row, of=name))
        lines = [f"{row}.png,{NAMES[row % 2]}" for row in range(4)]
        (place / name / "table.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "own.png").write_bytes(picture(0, 9))
    (place / "pets.yaml").write_text(
        "train: {path: train/table.csv}\nvalidation: 0.5\ntest: {path: test/table.csv, name: home}\n"
    )
    return place / "pets.yaml"


def with_row(pets, path):
    """The suite with one more row in its training table."""
    table = pets.parent / "train" / "table.csv"
    table.write_text(table.read_text() + f"{path},dog\n")
    return pets


def with_yaml(pets, text):
    pets.write_text(pets.read_text() + text)
    return pets


# ---- images ----


def test_postscript_starts_no_ghostscript(tmp_path):
    """EPS bytes called cat.jpg: with PIL's own list of formats, the program ``gs`` of the path would run."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / "cat.eps").write_bytes(EPS)
    ours = (
        "from carot_hf import ShiftSet\n"
        "data = ShiftSet([{'image': {'bytes': open('cat.eps', 'rb').read(), 'path': 'cat.jpg'}, 'label': 0}],"
        " name='hub', num_classes=1)\n"
        "try:\n    data[0]\nexcept ValueError as error:\n    print(error)\n"
    )
    stock = "from PIL import Image\ntry:\n    Image.open('cat.eps').load()\nexcept Exception as error:\n    pass\n"
    said = {}
    for name, script in (("ours", ours), ("stock", stock)):
        place = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=place, capture_output=True, text=True)
        said[name] = done.stdout, (tmp_path / "ran").exists()
    assert (
        "an image that can be decoded in set 'hub' at index 0 (file cat.jpg), got UnidentifiedImageError"
        in (said["ours"][0])
    )
    assert [ran for _, ran in said.values()] == [False, True]  # the second shows that the trap works


@pytest.mark.parametrize("form", ["EPS", "WMF", "PDF", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG"])
def test_formats_of_other_programs_are_not_decoded(form):
    assert form not in FORMATS


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, "gs"),
        zlib.error("invalid stored block lengths"),
        MemoryError(),
        AssertionError("of a decoder"),
        RecursionError("of a decoder"),
        OverflowError("of a decoder"),
        ZeroDivisionError("of a decoder"),
        struct.error("of a decoder"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_a_bad_image(monkeypatch, tmp_path, error):
    """With set, index and file; it can be skipped."""
    (tmp_path / "0.png").write_bytes(picture(0, 0))
    data = ShiftSet([{"image": "0.png", "label": 0}], name="far", num_classes=1, image_root=tmp_path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(BadImageError, match=r"set 'far' at index 0 \(file .*0\.png\), got (an image that needs|\w+)"):
        data[0]


@pytest.mark.parametrize(
    ("size", "depth", "kind", "reason"),
    [
        (9_400, 16, 0, rf"9,400 x 9,400 pixels of mode I;16, which takes 883,600,000 bytes .*more than {MAX_BYTES:,}"),
        (9_400, 8, 3, rf"9,400 x 9,400 pixels of mode P, which takes [\d,]+ bytes to decode, more than {MAX_BYTES:,}"),
        (9_460, 8, 2, rf"89,491,600 pixels, more than {MAX_PIXELS:,}"),
        (9_460, 16, 6, rf"89,491,600 pixels, more than {MAX_PIXELS:,}"),
        (16_000, 1, 0, rf"256,000,000 pixels, more than {MAX_PIXELS:,}"),
    ],
)
def test_one_limit_of_memory_for_all_modes_before_decoding(monkeypatch, size, depth, kind, reason):
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: decoded.append(self.size))
    with pytest.raises(BadImageError, match=f"{reason}; shrink it"):
        read_image(empty_png(size, size, depth, kind))
    assert decoded == []


PEAK = """
import sys
from carot_hf.data.images import _BYTES, _OTHER_BYTES, _TURNED_BYTES, read_image

def memory(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

read_image("small.png")
for file, mode in zip(sys.argv[1::2], sys.argv[2::2]):
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    width, height = read_image(file).size
    allowed = _BYTES.get(mode, _OTHER_BYTES) + _TURNED_BYTES * file.startswith("turned")
    print(file, (memory("VmHWM") - before) / width / height, allowed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_that_an_image_takes_is_what_the_limit_counts(tmp_path):
    """Measured: bytes a pixel from the file to RGB, by mode."""
    side = 2000
    values = np.arange(side * side, dtype=np.uint32).reshape(side, side)
    made = {
        **{f"{mode}.png": Image.new(mode, (side, side)) for mode in ("RGB", "RGBA", "L", "LA", "1", "P")},
        "I16.png": Image.fromarray((values % 60_000).astype(np.uint16)),
        "I.tiff": Image.fromarray((values % 60_000).astype(np.int32)),
        "F.tiff": Image.fromarray((values / values.max()).astype(np.float32)),
        "turned.jpg": Image.new("RGB", (side, side)),
        "CMYK.jpg": Image.new("CMYK", (side, side)),
    }
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image in made.items():
        image.save(tmp_path / name, **({"exif": turned} if name == "turned.jpg" else {}))
    Image.new("P", (side, side)).save(tmp_path / "clear.png", transparency=0)
    Image.new("RGB", (3, 3)).save(tmp_path / "small.png")
    modes = {name: image.mode for name, image in made.items()} | {"clear.png": "P"}
    words = [word for pair in modes.items() for word in pair]
    done = subprocess.run([sys.executable, "-c", PEAK, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = {name: (float(took), float(allowed)) for name, took, allowed in map(str.split, done.stdout.splitlines())}
    assert measured.keys() == modes.keys()
    assert {name: both for name, both in measured.items() if both[0] > 1.1 * both[1]} == {}
    assert max(took for took, _ in measured.values()) > 8  # the measurement sees what is decoded


def test_a_picture_in_an_icon_is_as_large_as_it_says():
    """An icon of 16 x 16 by its header holds a PNG of 10,000 x 10,000."""
    inside = empty_png(10_000, 10_000)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22) + inside
    with pytest.raises(BadImageError, match=r"an image of 100,000,000 pixels, more than"):
        read_image(icon)


# ---- paths ----


@pytest.mark.parametrize("kind", ["absolute", "up", "link", "folder link"])
def test_a_table_names_images_of_its_own_folder_only(pets, kind):
    """A stranger's table could have private pictures trained on; refused before anything is trained."""
    private = pets.parent.parent / "private"
    train = pets.parent / "train"
    if kind == "link":
        (train / "linked.png").symlink_to(private / "own.png")
    elif kind == "folder link":
        (train / "linked").symlink_to(private)
    path = {
        "absolute": private / "own.png", "up": "../../private/own.png",
        "link": "linked.png", "folder link": "linked/own.png",
    }[kind]  # fmt: skip
    with pytest.raises(ValueError, match=r"Expected images in or below .*train in set 'train' at index 4, got .*png'"):
        load_suite(with_row(pets, path))


def test_links_within_the_folder_are_followed(pets):
    (pets.parent / "train" / "again.png").symlink_to("0.png")
    suite = load_suite(with_row(pets, "again.png"))
    assert len(suite.train) + len(suite.validation) == 5


def test_further_folders_are_allowed_by_the_suite_and_by_no_table(pets):
    private = pets.parent.parent / "private"
    with_row(pets, private / "own.png")
    table = pets.parent / "train" / "table.csv"
    own = table.read_text()
    names, *rows = own.splitlines()
    table.write_text("\n".join([f"{names},image_roots", *(f"{row},{private}" for row in rows)]))
    with pytest.raises(ValueError, match=r"`image_roots: \[folder\]` in the suite's YAML file"):
        load_suite(pets)
    suite = load_suite(with_yaml(pets, "image_roots: [../private]\n"))
    assert len(suite.train) + len(suite.validation) == 5


@pytest.mark.parametrize("value", ["[nowhere]", "[3]", "['']", "['train/table.csv']"])
def test_further_folders_that_are_none(pets, value):
    with pytest.raises(ValueError, match=r"pets\.yaml: image_roots: expected folders, got .*Example: image_roots: \["):
        load_suite(with_yaml(pets, f"image_roots: {value}\n"))


@pytest.mark.parametrize("layout", ["parquet", "jsonl", "arrow"])
def test_paths_of_other_tables(tmp_path, layout):
    """Images of parquet and arrow may be named by a path, too."""
    own = tmp_path / "own.png"
    own.write_bytes(picture(0, 9))
    place = tmp_path / "data"
    place.mkdir()
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    images = [{"bytes": None, "path": str(own)}] * 2
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
    if layout == "jsonl":
        lines = [f'{{"image": "{own}", "label": {label}}}' for label in (0, 1)]
        (place / "rows.jsonl").write_text("\n".join(lines))
    elif layout == "parquet":
        pyarrow.parquet.write_table(rows.data.table, place / "rows.parquet")
    else:
        with (
            pyarrow.OSFile(str(place / "rows.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, rows.data.schema) as out,
        ):
            out.write_table(rows.data.table)
    folders(tmp_path / "test", [0, 1], NAMES)
    (tmp_path / "a.yaml").write_text(
        f"class_names: [cat, dog]\ntrain: {{path: {next(place.iterdir())}}}\nvalidation: {{path: test}}\n"
        "test: {path: test, name: home}\nallow_shared_files: true\n"
    )
    with pytest.raises(ValueError, match=r"Expected images in or below .*data in set 'train' at index 0, got "):
        load_suite(tmp_path / "a.yaml")


def test_rows_from_the_hub_name_files_of_their_cache_only(tmp_path, monkeypatch):
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    own = tmp_path / "own.png"
    own.write_bytes(picture(0, 9))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "datasets--some--pets" / "snapshots" / "1" / "a.png"
    other = tmp_path / "hub" / "datasets--my--secrets" / "snapshots" / "1" / "a.png"
    for place in (cached, other):
        place.parent.mkdir(parents=True)
        place.write_bytes(picture(1, 3))
    images = [{"bytes": None, "path": str(path)} for path in (cached, other, own)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    opened = loading.open_source("some/pets", "train")
    data = as_set(opened.rows, name="hub", num_classes=2, **opened.places)
    assert data[0]["label"] == 0
    for index in (1, 2):
        with pytest.raises(ValueError, match=rf"Expected images in or below .* in set 'hub' at index {index}, got"):
            data[index]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_are_not_waited_for(pets):
    """Nobody writes into them: whoever opened one would wait for ever."""
    train = pets.parent / "train"
    os.mkfifo(train / "pipe.png")
    with pytest.raises(BadImageError, match=r"pipe\.png, which is no regular file"):
        read_image(str(train / "pipe.png"))
    with pytest.raises(ValueError, match=r"images of 'train' to be there, got none for 1 of its 5 images"):
        load_suite(with_row(pets, "pipe.png"))
    for name in ("rows.parquet", "rows.csv", "rows.tar", "rows.arrow"):
        place = pets.parent / name.replace(".", "_")
        place.mkdir()
        os.mkfifo(place / name)
        pets.write_text(f"train: {{path: {place.name}}}\nvalidation: 0.5\ntest: {{path: test/table.csv}}\n")
        with pytest.raises(ValueError, match=rf"Expected a regular file at .*{name}, got something else"):
            load_suite(pets)
    os.mkfifo(pets.parent / "names.txt")
    with pytest.raises(ValueError, match="no regular file"):
        read_text(pets.parent / "names.txt", "names")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_among_images_in_folders_stop_no_survey(tmp_path):
    """The search for images that sets share reads files; a pipe among them is one of the bad images."""
    for name in ("train", "test"):
        folders(tmp_path / name, [0, 1, 0, 1], NAMES)
        os.mkfifo(tmp_path / name / "cat" / "pipe.png")
    (tmp_path / "a.yaml").write_text("train: {path: train}\nvalidation: 0.5\ntest: {path: test}\n")
    suite = load_suite(tmp_path / "a.yaml")
    with pytest.raises(BadImageError, match=r"set 'test' at index \d \(file .*pipe\.png\), got .*no regular file"):
        [suite.test[index] for index in range(len(suite.test))]


# ---- suites ----

ORDERS = {
    "push_to_hub": True, "hub_model_id": "evil/copy", "hub_token": "x", "report_to": "wandb", "output_dir": "/etc",
    "resume_from_checkpoint": "/tmp/theirs", "overwrite_output_dir": True, "save_total_limit": 1, "deepspeed": "x.json",
    "run_name": "x", "logging_strategy": "no", "torch_compile": True, "dataloader_num_workers": 900, "seed": 1,
    "hub_private_repo": False, "load_best_model_at_end": True, "metric_for_best_model": "eval_home_ece",
    "on_bad_image": "skip", "accelerator_config": "x.json", "trackio_space_id": "evil/space", "project": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_a_suite_recommends_and_does_not_order(pets, name):
    value = str(ORDERS[name]).lower() if isinstance(ORDERS[name], bool) else ORDERS[name]
    with pytest.raises(ValueError, match=rf"recommended\.{name}: expected an option of the method, .* got '{name}'"):
        load_suite(with_yaml(pets, f"recommended: {{{name}: {value}}}\n"))
    assert name not in method_options()


def test_what_a_suite_may_recommend(pets):
    suite = load_suite(with_yaml(pets, "recommended: {learning_rate: 1e-5, teacher: frozen, lora_rank: 4}\n"))
    assert suite.recommended == {"learning_rate": 1e-5, "teacher": "frozen", "lora_rank": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, r"could not find expected ':'.* line 4, column 1"),
        ("deep: " + "[" * 3000 + "]" * 3000, r"at most 20 lists"),
        ("? [1]\n: 2\n", r"expected a word or a number as a key, got \[1\].* line 4"),
        ("null: 2\n", r"expected a word or a number as a key, got None.* line 4"),
        ("3: 2\n", r"expected one of the keys .*, got 3 in line 4"),
        ("true: 2\n", r"expected one of the keys .*, got True in line 4"),
        ("a: !!timestamp soon\n", r"expected a value of tag:yaml.org,2002:timestamp.* line 4"),
        ("a: !!int many\n", r"expected a value of tag:yaml.org,2002:int.* line 4"),
        (f"version: {'9' * 6000}\n", r"expected a value of tag:yaml.org,2002:int.* line 4"),
        ("a: !!python/object/apply:os.system [ls]\n", r"could not determine a constructor.* line 4"),
        ("name: !!binary aGFsbG8=\n", r"name: expected text, got b'hallo'"),
        ("name: \0\n", r"special characters are not allowed"),
        ("templates: &t [*t]\n", r"templates: expected a list of strings, got \[\[\.\.\.\]\]|templates"),
    ],
)
def test_suites_that_are_no_suites(pets, text, message):
    with pytest.raises(ValueError, match="(?s)" + message) as caught:
        load_suite(with_yaml(pets, text))
    assert str(pets) in str(caught.value)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_share_beyond_all_floats(pets, sign):
    """Fuzzing found it: no float holds it, and the comparison ended with an OverflowError."""
    text = pets.read_text(encoding="utf-8")
    pets.write_text(re.sub(r"validation: .*", f"validation: {sign}{10**400}", text), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"got {sign}inf"):
        load_suite(pets)


def test_a_bomb_of_aliases_is_neither_copied_nor_written_out(pets):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 15)]
    for last in ("templates: *a14", "class_names: *a14", "recommended: {learning_rate: *a14}", "name: *a14"):
        text = "\n".join([*lines, last])
        with pytest.raises(ValueError, match=str(pets)) as caught:
            load_suite(with_yaml(pets, text + "\n"))
        assert len(str(caught.value)) < 5_000
        pets.write_text("train: {path: train/table.csv}\nvalidation: 0.5\ntest: {path: test/table.csv}\n")


@pytest.mark.parametrize("key", ["templates", "recommended", "name", "class_names"])
def test_a_bomb_in_the_place_of_a_value(pets, key):
    bomb = "[&a [x, x, x, x, x, x, x, x, x, x]"
    for n, name in enumerate("bcdefghijk"):
        bomb += f", &{name} [{', '.join(['*' + 'abcdefghijk'[n]] * 10)}]"
    with pytest.raises(ValueError, match=rf"pets\.yaml: {key}: expected") as caught:
        load_suite(with_yaml(pets, f"{key}: {bomb}]\n"))
    assert len(str(caught.value)) < 5_000


def test_what_is_no_text(tmp_path, pets):
    with pytest.raises(ValueError, match=rf"Expected a YAML file, found a folder at {tmp_path}"):
        load_suite(_as_yaml(tmp_path))
    pets.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ValueError, match=r"Expected YAML in UTF-8, .*pets\.yaml, got .*, in line 1\. Save it as UTF-8"):
        load_suite(pets)
    pets.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"pets\.yaml, got .*line 2|pets\.yaml"):
        load_suite(pets)


def _as_yaml(folder):
    place = folder / "folder.yaml"
    place.mkdir(exist_ok=True)
    return place


# ---- checkpoints ----


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Two checkpoints of a run of four steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    made_trainer(out).train()
    return out


def made_trainer(out, model=None, **options):
    settings = {"max_steps": 4, "save_steps": 2, "warmup_steps": 0, "teacher_update_every": 1, "logging_steps": 1}
    return noise_trainer(out, model=model, **{**settings, **options})


@pytest.fixture
def run(whole_run, tmp_path):
    """A copy of it, whose newest checkpoint may be harmed."""
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def state_with(**fields):
    def harm(checkpoint):
        path = checkpoint / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return harm


def file_of(name, text):
    return lambda checkpoint: (checkpoint / name).write_text(text)


def tensors_of(name, change):
    def harm(checkpoint):
        tensors = load_file(checkpoint / name)
        change(tensors)
        save_file(tensors, checkpoint / name, metadata={"format": "pt"})

    return harm


def gone(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def drop(tensors):
    del tensors["logit_scale"]


def halve(tensors):
    tensors["logit_scale"] = tensors["logit_scale"].half()


def spoil(tensors):
    tensors["visual_projection.weight"][0, 0] = math.nan


def reshape(tensors):
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:-1].clone()


def add(tensors):
    tensors["stranger"] = torch.zeros(3)


class Trap:
    """Unpickled, it would run something."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def pickled(name, what):
    return lambda checkpoint: torch.save(what, checkpoint / name)


def moments(change):
    def harm(checkpoint):
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, checkpoint / "optimizer.pt")

    return harm


STATES = {  # fields of trainer_state.json, and what it is said to have
    "step of 10^9": ({"global_step": 10**9}, "1000000000 as `global_step` in place of a"),
    "step of 7": ({"global_step": 7}, "7 as `global_step` in the folder of step 4"),
    "step of -3": ({"global_step": -3}, "-3 as `global_step` in place of a number of s"),
    "step a text": ({"global_step": "4"}, "4 as `global_step` in place of a number"),
    "step true": ({"global_step": True}, "True as `global_step`"),
    "no step": ({"global_step": None}, "None as `global_step`"),
    "steps beyond the end": ({"max_steps": 3}, "3 as `max_steps` after 4 steps"),
    "epoch nan": ({"epoch": math.nan}, "nan as `epoch`"),
    "epochs of 10^400": ({"num_train_epochs": 10**400}, r"10+\.\.\. as `num_train_epochs`"),
    "best a list": ({"best_model_checkpoint": ["x"]}, "list as `best_model_checkpoint`"),
    "history": ({"log_history": [3]}, "entries in `log_history` that are no mappings"),
    "field unknown": ({"evil": 1}, "the field 'evil', which the installed"),
}
TENSORS = {  # of the student and of the teacher
    "lacks": (drop, r"lacks 1 of \d+ tensors, e\.g\. `logit"),
    "half": (halve, r"has `logit_scale` in torch\.float16 in"),
    "nan": (spoil, r"has nan or inf in `visual_projection\.w"),
    "shape": (reshape, r"has `visual_.*of shape \(\d+, \d+\)"),
    "more": (add, "has `stranger`, which the model does"),
}
HARM = {
    **{name: (state_with(**fields), rf"trainer_state\.json has {said}") for name, (fields, said) in STATES.items()},
    **{
        f"{of} {name}": (tensors_of(file, change), f"{re.escape(file)} {said}")
        for of, file in (("student", "model.safetensors"), ("teacher", "teacher.safetensors"))
        for name, (change, said) in TENSORS.items()
    },
    "state a list": (file_of("trainer_state.json", "[1]"), r"trainer_state\.json holds list, no mapping"),
    "state deep": (file_of("trainer_state.json", "[" * 100_000), r"trainer_state\.json cannot be read \(RecursionErr"),
    "state binary": (file_of("trainer_state.json", "\0\1"), r"trainer_state\.json cannot be read \(JSONDecodeError"),
    "run a list": (file_of("run.json", "[]"), r"run\.json holds list, no mapping"),
    "run empty": (file_of("run.json", "{}"), r"run\.json has None as `format`"),
    "student no file": (file_of("model.safetensors", "x"), r"model\.safetensors cannot be read \(SafetensorError\)"),
    "teacher gone": (gone("teacher.safetensors"), r"teacher\.safetensors is missing"),
    "optimizer gone": (gone("optimizer.pt"), r"it has no optimizer\.pt: it was saved with `save_only_model`"),
    "schedule gone": (gone("scheduler.pt"), r"it has no scheduler\.pt"),
    "optimizer code": (pickled("optimizer.pt", {"state": Trap()}), r"optimizer\.pt needs code to be read \(Unpickling"),
    "schedule code": (pickled("scheduler.pt", Trap()), r"scheduler\.pt needs code to be read \(UnpicklingError\)"),
    "random code": (pickled("rng_state.pth", Trap()), r"rng_state\.pth needs code to be read \(UnpicklingError\)"),
    "optimizer a list": (pickled("optimizer.pt", [1]), r"optimizer\.pt holds a list in place of a mapping"),
    "optimizer text": (file_of("optimizer.pt", "hello"), r"optimizer\.pt (cannot be read|needs code to be read)"),
    "optimizer of others": (
        moments(lambda s: s["param_groups"].pop()),
        r"optimizer\.pt is of \d+ parameters in place of",
    ),
    "optimizer nan": (
        moments(lambda s: s["state"][0]["exp_avg"].fill_(math.nan)),
        r"optimizer\.pt has nan or inf in `exp_avg` of parameter 0",
    ),
}


@pytest.mark.parametrize("name", HARM)
def test_a_checkpoint_that_agrees_with_its_manifest_and_is_none(run, name, caplog, monkeypatch, tmp_path):
    """Refused in one sentence that names file and field, nothing of it loaded; else the one before it is taken."""
    monkeypatch.chdir(tmp_path)
    harm, reason = HARM[name]
    newest = run / "checkpoint-4"
    harm(newest)
    write_manifest(newest)
    assert damage_of(newest) is None
    trainer = made_trainer(run)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"Expected a complete checkpoint in .*checkpoint-4, but {reason}") as caught:
        trainer.train(resume_from_checkpoint=str(newest))
    assert "weights_only" not in str(caught.value) + caplog.text
    assert len(str(caught.value)) < 600
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    assert trainer.state.global_step == 0
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert trainer.resumption.saved.folder.name == "checkpoint-2"
    assert f"Passing over {newest}: " in caplog.text
    assert not (tmp_path / "ran").exists()


MANIFESTS = {
    "list": "[]", "empty": "", "empty mapping": "{}", "no files": '{"files": {}}', "files a list": '{"files": [1]}',
    "deep": '{"files": ' + "[" * 100_000, "text": '{"files": {"a": 3}}', "size": '{"files": {"a": {"bytes": "3"}}}',
    "up": '{"files": {"../../x": {"bytes": 3, "blake2b": "x"}}}', "null": "null", "number": "3",
    "absolute": '{"files": {"/etc/passwd": {"bytes": 3, "blake2b": "x"}}}', "zero": "\0",
    "zero byte": '{"files": {"a\\u0000b": {"bytes": 3, "blake2b": "x"}}}',
    "long": '{"files": {"' + "a" * 10_000 + '": {"bytes": 3, "blake2b": "x"}}}', "none": '{"files": null}',
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_of_strangers(run, name):
    newest = run / "checkpoint-4"
    (newest / "manifest.json").write_text(MANIFESTS[name])
    found = damage_of(newest)
    assert found is not None
    assert "manifest.json" in found or "cannot be read" in found or found.endswith("is missing")
    assert newest_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_folders_that_look_like_checkpoints(tmp_path):
    for name in (
        "checkpoint-4",
        "checkpoint-²",
        "checkpoint-1e3",
        "checkpoint--3",
        f"checkpoint-{'9' * 30}",
        "checkpoint-x-5",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-4"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")
def test_a_checkpoint_file_that_cannot_be_read(run):
    """As another user than root, who may read all."""
    newest = run / "checkpoint-4"
    (newest / "model.safetensors").chmod(0)
    parents = [path for path in (run, *run.parents) if path.stat().st_uid == os.geteuid() and path != path.parent]
    modes = {path: path.stat().st_mode for path in parents}
    for path in parents:
        path.chmod(modes[path] | 0o055)
    was = os.geteuid()
    try:
        if was == 0:
            os.seteuid(65_534)
        assert damage_of(newest) == "model.safetensors cannot be read (PermissionError)"
    finally:
        os.seteuid(was)
        for path, mode in modes.items():
            path.chmod(mode)


# ---- models ----

RECORDS = [
    0, -1, math.nan, "warm", [1.0], True, {}, {"temperature": 0}, {"temperature": -1.5}, {"temperature": math.nan},
    {"temperature": math.inf}, {"temperature": "1"}, {"temperature": [1]}, {"temperature": True}, {"temperature": None},
    {"temperature": 10**400}, {"temperature": 1.5, "bias": "x"}, {"temperature": 1.5, "logit_scale_before": math.nan},
    {"temperature": 1.5, "n": "many"}, {"temperature": 1.5, "split": ["x"]}, {"temperature": 1.5, "templates": "x"},
    {"temperature": 1.5, "sure": "x"}, {"temperature": 1.5, "sure": 2.0}, {"temperature": 1.5, "sure": math.nan},
    {"temperature": 1.5, "kept": "x"}, {"temperature": 1.5, "target": []}, {"temperature": 1.5, "target": {"n": 3}},
    {"temperature": 1.5, "conformal": []}, {"temperature": 1.5, "conformal": {"lac": {}}},
    {"temperature": 2, "conformal": {"lac": {"threshold": "x", "alpha": 0.1, "score": "lac", "n": 3, "n_classes": 2}}},
    {"temperature": 2, "conformal": {"lac": {"threshold": 1, "alpha": 0.1, "score": "aps", "n": 3, "n_classes": 2}}},
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=repr)
def test_a_record_of_calibration_that_is_none(tmp_path, record):
    """In the ``config.json`` of a start model: refused before anything is measured, trained or published."""
    processor = tiny_processor()
    model = tiny_clip(processor.tokenizer)
    model.config.calibration = record
    message = r"(mapping as|as `\w+` in the) `calibration` of config\.json of .*Delete `calibration` there"
    before = model.logit_scale.item()
    for act in (calibration_record, unbake_temperature, lambda m: bake_temperature(m, 2.0)):
        with pytest.raises(ValueError, match=message):
            act(model)
    with pytest.raises(ValueError, match=message):
        made_trainer(tmp_path, model)
    assert model.logit_scale.item() == before


@pytest.mark.parametrize("name", ["logit_scale", "visual_projection.weight", "text_model.final_layer_norm.bias"])
def test_a_start_model_that_is_not_finite_is_neither_trained_nor_saved(tmp_path, name):
    model = tiny_clip(tiny_processor().tokenizer)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = math.nan
    with pytest.raises(ValueError, match=rf"a start model of finite weights, got nan or inf in `{name}` of CLIPModel"):
        made_trainer(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()


# ---- what is published ----


class Client:
    """Stands in for huggingface_hub's client; it notes by name what would be sent, chosen by its own filter."""

    def __init__(self):
        self.sent = []

    def upload_folder(self, *, folder_path, allow_patterns, run_as_future, path_in_repo=None, **options):
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        prefix = "" if path_in_repo is None else f"{path_in_repo}/"
        chosen = filter_repo_objects(names, allow_patterns=allow_patterns)
        self.sent.append({f"{prefix}{name}" for name in chosen})
        done = Future()
        done.set_result(None)
        return done if run_as_future else None


@pytest.fixture
def commits(monkeypatch):
    """What is sent to the Hub, a set of names for each commit."""
    client = Client()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **options: client)
    return client.sent


def to_publish(out, **options):
    trainer = made_trainer(out, **options)
    trainer.hub_model_id, trainer.push_in_progress = "tester/tiny", None
    return trainer


MODEL = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_what_is_published_is_chosen_not_left_over(tmp_path, commits):
    """Secrets, links, checkpoints at any depth, logs and files of the user's stay, and a teacher nobody asked for."""
    out = tmp_path / "run"
    trainer = to_publish(out, max_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.calibrate()
    for name in (".env", "id_rsa", "notes.txt", "old/checkpoint-3/optimizer.pt", "_cache/x", "teacher/own.txt",
                 "runs/events.out.tfevents.1", "checkpoint-7/x", "local.json", "model.pt",
                 "private.safetensors"):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("private")
    (tmp_path / "passwords").write_text("private")
    (out / "linked.txt").symlink_to(tmp_path / "passwords")
    (out / "metrics.json").write_text("{}")
    trainer.push_to_hub()
    trainer.push_to_hub(teacher=True)
    trainer.push_to_hub(also=["notes.txt", "runs"])
    first, second, third = commits
    assert first >= MODEL
    assert first - MODEL == {"README.md", "metrics.json", "eval_reliability.png"}
    assert second - first == {f"teacher/{name}" for name in MODEL}
    assert third - second == {"notes.txt", "runs/events.out.tfevents.1"}


@pytest.mark.parametrize(
    "name", ["linked.txt", "folder", "../passwords", "/etc/passwd", "nowhere", ".", "deep/linked.txt"]
)
def test_further_files_are_files_of_the_folder(tmp_path, commits, name):
    out = tmp_path / "run"
    trainer = to_publish(out)
    (out / "deep").mkdir(parents=True)
    (tmp_path / "passwords").write_text("private")
    (out / "linked.txt").symlink_to(tmp_path / "passwords")
    (out / "folder").symlink_to(tmp_path)
    (out / "deep" / "linked.txt").symlink_to(tmp_path / "passwords")
    with pytest.raises(ValueError, match=r"Expected files or folders in .*run to publish beside the model, got '"):
        trainer.push_to_hub(also=[name])
    assert commits == []
    with pytest.raises(ValueError, match="beside the model"):
        trainer.push_to_hub(also=["folder/passwords"])
    trainer.push_to_hub(also=["deep"])
    assert not any("linked" in name for name in commits[0])


def test_links_in_the_place_of_the_model_are_not_followed(tmp_path, commits):
    """A folder that somebody prepared: its metrics.json and picture lead elsewhere."""
    out = tmp_path / "run"
    out.mkdir()
    (tmp_path / "passwords").write_text("private")
    for name in ("metrics.json", "model.safetensors", "config.json"):
        (out / name).symlink_to(tmp_path / "passwords")
    trainer = to_publish(out, overwrite_output_dir=True)
    trainer.push_to_hub()
    assert "metrics.json" not in commits[0]
    assert commits[0] >= MODEL  # written anew, in the place of the links
    assert (tmp_path / "passwords").read_text() == "private"


def test_a_push_while_it_trains_takes_the_files_of_the_checkpoint(tmp_path, commits, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".env").write_text("private")
    trainer = to_publish(out, max_steps=2, hub_strategy="checkpoint", push_to_hub=False)
    trainer.args.push_to_hub = True
    write = trainer._write_checkpoint

    def and_strays(folder, *args):
        folder.mkdir(parents=True)
        (folder / "linked").symlink_to(out / ".env")
        write(folder, *args)
        (folder / "late.txt").write_text("private")  # after the manifest

    trainer._write_checkpoint = and_strays
    monkeypatch.setattr(trainer, "_finalize_training", lambda *args, **kwargs: None)
    trainer.train()
    model, checkpoint = commits[:2]
    assert model == {*MODEL, "README.md"}
    listed = json.loads((out / "checkpoint-2" / "manifest.json").read_text())["files"]
    assert checkpoint == {f"last-checkpoint/{name}" for name in [*listed, "manifest.json"] if name != "linked"}


PRIVATE = [
    ("/home/me/data", "", ".../data"), ("~/data/x", "", ".../x"), ("C:\\Users\\me\\x", "", ".../x"),
    ("file:///home/me/x", "", ".../x"), ("../../me/x", "", ".../x"), ("https://me:pw@host/x", "", "https://...@host/x"),
    ("s3://me:pw@host", "", "s3://...@host"), ("hunter2", "api_key", "..."), (123, "my_secret", "..."),
    ("hf_abcdefghijklmnopqrstuvw", "", "..."), ({"key": "x", "path": "/a/b"}, "", {"key": "...", "path": ".../b"}),
    (["/a/b", "c"], "", [".../b", "c"]), ("a photo of a {}.", "", "a photo of a {}."), ("cat/dog", "", "cat/dog"),
    ("openai/clip-vit-base-patch16", "", "openai/clip-vit-base-patch16"), (0.5, "", 0.5), (None, "hub_token", None),
    (True, "key", True), ("out/run", "", "out/run"), ("see /home/me/x, or ~/y", "", "see .../x, or .../y"),
    ("https://huggingface.co/x/y", "", "https://huggingface.co/x/y"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "name", "shown"), PRIVATE, ids=repr)
def test_what_is_public_of_an_option(value, name, shown):
    assert public(value, name) == shown


def test_command_lines_are_published_without_secrets():
    words = ["--data_root=/home/me/x", "--api_key", "k1", "k2", "--lr", "1e-5", "--url=http://u:p@h/x", "--my_secret=s"]
    words += ["--config", '{"password": "p", "path": "/a/b", "n": 1}', "--suite", "../me/s.yaml", "-k", "v"]
    assert public_words(words) == [
        "--data_root=.../x", "--api_key", "...", "...", "--lr", "1e-5", "--url=http://...@h/x", "--my_secret=...",
        "--config", '{"password": "...", "path": ".../b", "n": 1}', "--suite", ".../s.yaml", "-k", "v",
    ]  # fmt: skip


@dataclass
class OwnArguments(CaRotTrainingArguments):
    """Options of a user's, with a key, a folder and an account."""

    my_api_key: str = "k3y"
    my_folder: str = ""
    my_server: str = "https://me:pw@host/x"


def test_event_files_hold_no_key_and_no_place(tmp_path):
    pytest.importorskip("tensorboard")
    tiny_clip(tiny_processor().tokenizer).save_pretrained(tmp_path / "start")
    trainer = noise_trainer(
        tmp_path / "run", model=CLIPModel.from_pretrained(tmp_path / "start"), arguments=OwnArguments, max_steps=1,
        my_folder=str(tmp_path / "data"), report_to="tensorboard", hub_token="hf_" + "x" * 30, save_strategy="no",
        logging_steps=1,
    )  # fmt: skip
    trainer.train()
    content = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*tfevents*"))
    assert b"per_device_train_batch_size" in content
    for private in (str(tmp_path), "k3y", "me:pw", "xxxxxx"):
        assert private.encode() not in content
    trainer.create_model_card()
    trainer.save_model()
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name


# ---- names ----

EVIL = "x`|</td><script>alert(1)</script>[a](https://evil)\x1b[31m\u202e\n# Title @all **b** https://u.x www.y _z_"


def rendered(text):
    markdown_it = pytest.importorskip("markdown")
    return markdown_it.markdown(text, extensions=["tables", "fenced_code"])


def evil_card():
    facts = CardFacts(
        name=EVIL, repo=None, task=ZERO_SHOT, suite=EVIL, sets={EVIL: "home"}, metrics={f"{EVIL}_accuracy": 0.5,
        f"{EVIL}_ece": 0.1, f"{EVIL}_ece_ts": 0.2, f"{EVIL}_nll": 1.0, f"{EVIL}_nll_ts": 1.0}, temperature=1.5,
        n_bins=10, calibration={"temperature": 1.5, "split": EVIL, "n": 3, "criterion": EVIL},
        class_names=[EVIL, "cat"], templates=[EVIL, "```\n# T\n```"], steps=3, arguments={EVIL: EVIL},
        versions={"torch": "2"}, seed=0, command=EVIL,
        base_model=EVIL, diagram="a b)<x>.png", suite_version=EVIL, suite_hash="0" * 64, changes=[EVIL],
        chosen_by=EVIL, processes=2, license=EVIL, datasets=[EVIL], preset=EVIL, loss=EVIL, teacher_words=EVIL,
        language=EVIL, tags=[EVIL], marks={EVIL: EVIL},
    )  # fmt: skip
    return model_card(facts)


def test_names_of_strangers_are_no_orders_in_the_card():
    """Rendered, every one of them is text: no tag, link, title, cell or mention of theirs."""
    card = evil_card()
    text = card.text
    assert not any(mark in str(card) for mark in ("\x1b", "\u202e"))
    page = rendered(text)
    assert "<script" not in page
    assert "evil" in page
    assert 'href="https://evil' not in page
    titles = re.findall("<h[12]>(.*?)</h[12]>", page)
    known = ["Results", "Temperature", "Use", "Intended use and limits", "How to make it again", "Citation"]
    assert titles[1:] == known
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    width = {len(re.findall(r"(?<!\\)\|", line)) for line in rows if "0.5" in line or line.startswith("| set")}
    assert len(width) == 1
    assert ModelCard(str(card)).data.model_name == printable(EVIL)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pets_2", "pets_2"), ("c-fog-3", "c-fog-3"), ("a|b", r"a\|b"), ("<b>", "&lt;b&gt;"), ("_x_", r"\_x\_"),
        ("a*b*", r"a\*b\*"), ("[a](b)", r"\[a\]\(b\)"), ("a\nb", r"a\\nb"), ("\x1b[1m", r"\\x1b\[1m"),
        ("http://x", "http&#58;//x"), ("@all", "&#64;all"), ("Zürich 猫", "Zürich 猫"), ("a&lt;", "a&amp;lt;"),
    ],
)  # fmt: skip
def test_markdown_of_names(text, shown):
    assert markdown(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a|b", r"`a\|b`"), ("", "`  `"), ("a\nb", r"`a\nb`")],
)
def test_code_of_names(text, shown):
    assert code(text) == shown


def test_joiners_of_words_stay():
    assert printable("می\u200cخواهم") == "می\u200cخواهم"
    assert printable("a\u2066b\x7f\x85\ud800") == r"a\u2066b\x7f\x85\ud800"


def test_names_of_strangers_are_no_orders_in_the_terminal(tmp_path, capfd, caplog):
    """Class, suite, set, version and folder with codes that colour, move and turn the text."""
    evil = "\x1b[2J\u202ered\n"
    suite = noise_suite()
    suite.class_names[0] = f"zero{evil}"
    suite = dataclasses.replace(suite, name=f"noise{evil}", version=f"1{evil}")
    suite.train.name = printable(f"train{evil}")
    options = {"max_steps": 1, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": False}
    made = noise_trainer(tmp_path / "run\x1b[2J", suite=suite, **options)
    made.train()
    made.evaluate()
    logging.getLogger("carot_hf.data.shift_set").warning("A set called %s of %d, in %s.", evil, 3, tmp_path / "a\x1bb")
    logging.getLogger("carot_hf.trainer").warning("A set called %s.", evil)
    said = capfd.readouterr()
    everything = said.out + said.err + caplog.text
    assert r"zero\x1b[2J\u202ered\n" in everything
    assert r"A set called \x1b[2J\u202ered\n of 3, in" in everything
    assert "\x1b[2J" not in everything
    assert "\u202e" not in everything
    assert comparison_table({evil: {"a": 1.0}}, [("a", "a")]).count("\n") == 2


def test_the_scripts_escape_what_they_say_last(capsys, monkeypatch):
    def fail(argv):
        raise ValueError("Expected data at \x1b[2J\n\u202ex")

    monkeypatch.setattr("carot_hf.cli.train.main", fail)

    monkeypatch.setattr(sys, "argv", ["finetune_imagenet.py"])
    with pytest.raises(SystemExit) as ended:
        command_line.script("train")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "finetune_imagenet.py: Expected data at \\x1b[2J \\u202ex\n"


# ---- the folder of a run ----


@pytest.mark.parametrize("name", ["file", "file/below", "loop", "dangling/x"])
def test_an_output_dir_that_is_no_folder(tmp_path, name):
    """Before a model is loaded, by the script and by the trainer."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(
        ValueError, match=r"Expected a folder as `output_dir`, got .*, where .* is none\. Choose another"
    ):
        made_trainer(tmp_path / name)
    with pytest.raises(ValueError, match="Expected a folder as `output_dir`"):
        training.main(["--suite", "digits", "--use_cpu", "--output_dir", str(tmp_path / name)])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc can be written to by nobody")
def test_an_output_dir_that_cannot_be_written_to():
    place = "/proc/self/run"
    with pytest.raises(
        ValueError, match=r"`output_dir` that can be written to, got /proc/self/run \(FileNotFoundError: No"
    ):
        training.main(["--suite", "digits", "--use_cpu", "--output_dir", place])
    with (
        pytest.raises(ValueError, match=r"`output_dir` that can be written to, got /proc/self/fdinfo"),
        locked("/proc/self/fdinfo"),
    ):
        pass


def holder(**facts):
    own = json.loads(run_lock._own())
    return json.dumps({**own, **facts})


def silent_for(path, seconds):
    past = time.time() - seconds
    os.utime(path, (past, past))


def test_a_folder_is_locked_by_process_and_host(tmp_path, caplog):
    lock = tmp_path / run_lock.LOCK_NAME
    with locked(tmp_path):
        facts = json.loads(lock.read_text())
        assert (facts["process"], facts["host"]) == (os.getpid(), socket.gethostname())
        with locked(tmp_path / ".." / tmp_path.name):  # the same folder, the same process
            pass
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "new" / "run"):
        pass
    assert list(tmp_path.iterdir()) == []  # nothing was written there
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started = run_lock._started(living.pid)
        lock.write_text(holder(process=living.pid, started=started))
        silent_for(lock, 10**6)
        with (
            pytest.raises(ValueError, match=rf"alone, got {tmp_path}, in which process {living.pid} on host"),
            locked(tmp_path),
        ):
            pass
        assert lock.exists()
        lock.write_text(holder(process=living.pid, started="1"))  # its number was given to another process
        with locked(tmp_path):
            pass
    finally:
        living.kill()
    wait_for(lambda: run_lock._started(living.pid) in ("ended", None))
    lock.write_text(holder(process=living.pid, started=started))
    with locked(tmp_path):  # killed, not buried
        pass
    living.wait()
    lock.write_text(holder(process=living.pid, started=started))
    with locked(tmp_path):
        pass
    assert f"Taking over {tmp_path} from process {living.pid} on host" in caplog.text


def test_a_lock_of_another_machine_is_taken_over_after_five_minutes(tmp_path):
    lock = tmp_path / run_lock.LOCK_NAME
    lock.write_text(holder(host="node7", machine="node7", process=3))
    with (
        pytest.raises(ValueError, match=r"process 3 on host node7 has been running since .* counts as gone 5 minutes"),
        locked(tmp_path),
    ):
        pass
    silent_for(lock, 301)
    with locked(tmp_path):
        assert json.loads(lock.read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\0", "[" * 10**5, '{"process": "x"}', '{"process": -1}', f'{{"process": {10**30}}}']
)
def test_locks_of_strangers(tmp_path, text):
    lock = tmp_path / run_lock.LOCK_NAME
    lock.write_text(text)
    with pytest.raises(ValueError, match="of this run alone"), locked(tmp_path):
        pass
    silent_for(lock, 301)
    with locked(tmp_path):
        pass


def test_of_several_that_find_a_stale_lock_one_takes_it(tmp_path, monkeypatch):
    """Another run takes it over between the look and the hand."""
    lock = tmp_path / run_lock.LOCK_NAME
    lock.write_text(holder(host="node7", machine="node7", process=3))
    silent_for(lock, 301)
    refuse = run_lock._refuse_living

    def faster(path, theirs, now):
        refuse(path, theirs, now)
        if "node7" in lock.read_text():
            lock.write_text(holder(host="node8", machine="node8", process=4))

    monkeypatch.setattr(run_lock, "_refuse_living", faster)
    with pytest.raises(ValueError, match="process 4 on host node8"), locked(tmp_path):
        pass
    assert json.loads(lock.read_text())["host"] == "node8"
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.LOCK_NAME]


def test_a_lock_gives_signs_of_life_and_tells_when_it_is_gone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "_BEAT", 0.01)
    lock = tmp_path / run_lock.LOCK_NAME
    with locked(tmp_path):
        silent_for(lock, 1000)
        wait_for(lambda: lock.stat().st_mtime > time.time() - 500)
        lock.write_text(holder(process=1))
        wait_for(lambda: "is not locked by this run any more" in caplog.text)
    assert json.loads(lock.read_text())["process"] == 1  # not ours to take away


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_file_system_without_links_is_locked_too(tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with locked(tmp_path):
        pass
    (tmp_path / run_lock.LOCK_NAME).write_text(holder(host="node7", machine="node7"))
    with pytest.raises(ValueError, match="on host node7"), locked(tmp_path):
        pass
