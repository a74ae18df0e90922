"""``carot_hf predict``: tables of images, and calls that are killed, refused or run out of room, as real processes."""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from csv_files import csv_rows
from PIL import Image
from toys import CLASSES, ROOT, noise_suite, tiny_clip, tiny_processor

import carot_hf.cli.predict
from carot_hf import Evaluator
from carot_hf.cli.main import main
from carot_hf.cli.models import save
from carot_hf.data.pictures import Picture, PictureRows
from carot_hf.data.shift_set import ShiftSet
from carot_hf.suites.pictures import pictures_in, pictures_of

CHUNK = "import carot_hf.cli.predict as p; p._CHUNK = 16; from carot_hf.cli.main import run; run()"
SLOW = f"""
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
import carot_hf.cli.predict as p
add = p.Rows.add
middle = lambda: p.Path({{path!r}}).read_bytes().count(b"\\n") > 32
asleep = p.Path({{path!r}} + ".asleep")  # a signal before would come while a row is written
p.Rows.add = lambda rows, *found: (add(rows, *found), middle() and (asleep.touch(), time.sleep(600)))
{CHUNK}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, processor = tmp_path_factory.mktemp("model"), tiny_processor()
    evaluator = Evaluator(tiny_clip(processor.tokenizer), processor, noise_suite())
    evaluator.calibrate()
    save(folder, evaluator.model, processor)
    return folder


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 18, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    """Six pictures in a folder and one below."""
    for row in range(6):
        place = tmp_path / "photos" / ("sub" if row > 3 else "") / f"{row}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(row))
    return tmp_path / "photos"


NAMES = ["0.png", "1.png", "2.png", "3.png", "sub/4.png", "sub/5.png"]


def predicted(checkpoint, output, *words):
    assert main(["predict", str(checkpoint), *map(str, words), "--device", "cpu", "--output_file", str(output)]) == 0
    return csv_rows(output)


def write_table(folder, kind, names):
    table = folder / f"table{kind}"
    if kind == ".parquet":
        datasets.Dataset.from_dict({"label": names, "file_name": names}).to_parquet(table)
    elif kind in (".csv", ".tsv"):
        mark = "," if kind == ".csv" else "\t"
        table.write_text(
            "".join(f"{a}{mark}{b}\n" for a, b in [("label", "file_name"), *zip(names, names, strict=True)])
        )
    else:
        rows = [{"label": name, "file_name": name} for name in names]
        table.write_text(json.dumps(rows) if kind == ".json" else "\n".join(map(json.dumps, rows)))
    return table


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_a_table_is_as_its_files(checkpoint, photos, tmp_path, kind):
    expected = predicted(checkpoint, tmp_path / "folder.csv", photos)
    assert [row["image"] for row in expected] == [str(photos / name) for name in NAMES]
    table = write_table(photos, kind, [*NAMES, "0.png"])
    assert predicted(checkpoint, tmp_path / "t.csv", table) == expected, "an image that is named twice has one row"
    assert predicted(checkpoint, tmp_path / "both.csv", photos, table) == expected


def test_images_that_are_stored_in_rows(checkpoint, photos, tmp_path):
    """Bytes, in a column of the feature Image and in a binary one, a path, a row with nothing, and a broken one."""
    cells = [{"bytes": (photos / name).read_bytes(), "path": "/elsewhere/x.png"} for name in NAMES[:4]]
    cells += [{"bytes": None, "path": "sub/4.png"}, None, {"bytes": b"none", "path": None}]
    kinds = datasets.Features(
        {"image": datasets.Image(), "second": datasets.Value("binary"), "n": datasets.Value("int8")}
    )
    second = [png(row) for row in range(7)]
    rows = datasets.Dataset.from_dict({"image": cells, "second": second, "n": range(7)}, features=kinds)
    table = photos / "t.parquet"
    pyarrow.parquet.write_table(rows.data.table, table)  # `to_parquet` would put the file into the table
    expected = predicted(checkpoint, tmp_path / "folder.csv", photos)
    found = predicted(checkpoint, tmp_path / "t.csv", table)
    assert [row.pop("image") for row in found] == [*(f"{table}#{row}" for row in range(4)), str(photos / "sub/4.png")]
    assert found == [{k: v for k, v in row.items() if k != "image"} for row in expected[:5]]
    assert (tmp_path / "t.csv.bad").read_text().splitlines() == [f"{table}#5", f"{table}#6"]
    other = predicted(checkpoint, tmp_path / "second.csv", table, "--image_column", "second")
    assert [row["image"] for row in other] == [f"{table}#{row}" for row in range(7)]
    assert [row["confidence"] for row in other[:6]] == [row["confidence"] for row in expected]


def test_an_interrupted_table_goes_on(checkpoint, photos, tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"image": [png(row) for row in range(10)]}).to_parquet(photos / "t.parquet")
    monkeypatch.setattr(carot_hf.cli.predict, "_CHUNK", 3)
    words = ["predict", str(checkpoint), str(photos / "t.parquet"), "--device", "cpu", "--output_file"]
    assert main([*words, str(tmp_path / "whole.csv")]) == 0
    add, calls = carot_hf.cli.predict.Rows.add, []

    def stopped(self, rows, bad):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append([row.image for row in rows])
        add(self, rows, bad)

    with monkeypatch.context() as patch:
        patch.setattr(carot_hf.cli.predict.Rows, "add", stopped)
        assert main([*words, str(tmp_path / "cut.csv")]) == 130
    assert len(csv_rows(tmp_path / "cut.csv")) == 6
    (tmp_path / "cut.csv.bad").write_text(f"{photos / 't.parquet'}#8")  # killed in a line
    assert main([*words, str(tmp_path / "cut.csv")]) == 0
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert (tmp_path / "cut.csv.bad").read_text() == ""
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(carot_hf.cli.predict.Rows, "add", stopped)
        assert main([*words, str(tmp_path / "other.csv")]) == 130
    datasets.Dataset.from_dict({"image": [png(row) for row in range(11)]}).to_parquet(photos / "t.parquet")
    assert main([*words, str(tmp_path / "other.csv")]) == 2, "row 7 of another table is another image"


def test_nothing_is_read_before_its_turn(photos):
    datasets.Dataset.from_dict({"image": [png(row) for row in range(4)], "more": [b"x"] * 4}).to_parquet(
        photos / "t.parquet"
    )

    asked = []

    class Watched:
        def __init__(self, rows):
            self.rows = rows

        def __getitem__(self, row):
            asked.append(row)
            return self.rows[row]

    pictures = pictures_in(photos / "t.parquet")
    assert pictures[0].rows.column_names == ["image"], "no other column is read with it"
    watched = [picture._replace(rows=Watched(picture.rows)) for picture in pictures]
    data = ShiftSet(PictureRows(watched), name="images", num_classes=2, label_column=None)
    assert asked == []
    assert np.array_equal(np.asarray(data[2]["image"]), np.asarray(Image.open(io.BytesIO(png(2)))))
    assert asked == [2]


def test_a_table_names_nothing_that_lies_elsewhere(checkpoint, photos, tmp_path, refused):
    (tmp_path / "secret.png").write_bytes(png(9))
    (photos / "link.png").symlink_to(tmp_path / "secret.png")
    (photos / "within.png").symlink_to(photos / "0.png")
    output = str(tmp_path / "p.csv")
    for name in ("/etc/passwd", "../secret.png", str(tmp_path / "secret.png"), "link.png", "sub/../../secret.png"):
        for kind in (".csv", ".parquet"):
            table = write_table(photos, kind, ["0.png", name])
            error = refused("predict", checkpoint, table, "--output_file", output)
            assert f"in row 1 of {table}, got {name!r}, which lies or leads elsewhere" in error
    assert not os.path.exists(output)
    found = predicted(
        checkpoint, tmp_path / "p.csv", write_table(photos, ".csv", [str(photos / "0.png"), "within.png"])
    )
    assert [row["image"] for row in found] == [str(photos / "0.png"), str(photos / "within.png")]
    os.mkfifo(photos / "pipe.png")  # to open it would wait for ever
    table = write_table(photos, ".csv", ["0.png", "pipe.png", "gone.png", "sub"])
    assert len(predicted(checkpoint, tmp_path / "q.csv", table)) == 1
    assert [Path(line).name for line in (tmp_path / "q.csv.bad").read_text().splitlines()] == [
        "pipe.png",
        "gone.png",
        "sub",
    ]
    named = predicted(checkpoint, tmp_path / "r.csv", tmp_path / "secret.png", photos / "link.png")
    assert len(named) == 2, "what somebody names himself may lie anywhere"


def test_the_whole_line_of_names_is_kept_once(photos):
    table = write_table(photos, ".csv", ["./1.png", "0.png"])
    names = [picture.name for picture in pictures_of([photos / "sub", table, photos, photos / "0.png"])]
    assert names == [str(photos / name) for name in ["sub/4.png", "sub/5.png", "1.png", "0.png", "2.png", "3.png"]]
    assert Picture("a.png").value == "a.png"


@pytest.mark.parametrize(
    ("name", "content", "words", "said"),
    [
        ("t.csv", "name,kind\na,b\n", [], "Name it with --image_column. The table is"),
        ("t.csv", "image,kind\na,b\n", ["--image_column", "photo"], "Expected the column 'photo' in"),
        ("t.json", '[{"image": 1}]', ["--image_column", "image"], "Expected paths or encoded images in the column"),
        ("t.csv", "image\n", [], "Expected a header and rows"),
        ("t.jsonl", "no json", [], "Expected a JSON object in line 1"),
        ("t.parquet", "no parquet", [], "Expected a parquet table at"),
    ],
)
def test_tables_that_are_none(checkpoint, tmp_path, refused, name, content, words, said):
    (tmp_path / name).write_text(content)
    call = ["predict", str(checkpoint), str(tmp_path / name), "--output_file", str(tmp_path / "p.csv"), *words]
    assert said in refused(*call)
    assert not (tmp_path / "p.csv").exists()


def test_a_table_without_rows(tmp_path):
    datasets.Dataset.from_dict({"image": [b"x"]}).select([]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no data"):
        pictures_in(tmp_path / "t.parquet")


# ---- real processes: each takes seconds to import what it needs ----


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def command(*words, code=None):
    return [sys.executable, *(["-c", code] if code else ["-m", "carot_hf"]), "predict", *map(str, words)]


def ended(words, status=2, **options):
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=600, **options)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_killed_call_and_one_without_room_go_on(checkpoint, tmp_path):
    """Killed by SIGINT in the middle, then out of room in the middle of a row; in the end as if nothing had been."""
    folder = tmp_path / "many"
    folder.mkdir()
    for row in range(320):
        (folder / f"{row:03}.png").write_bytes(b"none" if row in (7, 200) else png(row))
    words = [checkpoint, folder, "--device", "cpu", "--batch_size", "8", "--output_file"]
    assert main(["predict", *map(str, words), str(tmp_path / "whole.csv")]) == 0
    cut = tmp_path / "cut.csv"
    call = command(*words, cut, code=CHUNK)
    slow = command(*words, cut, code=SLOW.format(path=str(cut)))  # waits in the middle
    process = subprocess.Popen(slow, stderr=subprocess.PIPE, text=True, env=environment())
    while process.poll() is None and not Path(f"{cut}.asleep").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1] == "carot_hf predict: interrupted; the same command goes on from here"
    assert "Traceback" not in said
    after = cut.stat().st_size
    whole = (tmp_path / "whole.csv").read_bytes()
    assert 0 < after < len(whole)
    room = (after + len(whole)) // 2

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    said = ended(call, preexec_fn=small)
    assert said.startswith(f"carot_hf predict: Expected to write {cut}, got OSError: [Errno 27]")
    assert "give the command again" in said
    assert after < cut.stat().st_size <= room
    assert main(["predict", *map(str, words), str(cut)]) == 0
    assert cut.read_bytes() == whole
    bad = [str(folder / name) for name in ("007.png", "200.png")]
    assert Path(f"{cut}.bad").read_text().splitlines() == bad
    assert Path(f"{cut}.json").read_bytes() == (tmp_path / "whole.csv.json").read_bytes()


def test_a_full_disk_is_a_line(checkpoint, photos, tmp_path, refused):
    (tmp_path / "p.csv").symlink_to("/dev/full")
    words = ["predict", str(checkpoint), str(photos), "--device", "cpu", "--output_file", str(tmp_path / "p.csv")]
    error = refused(*words, "--overwrite")
    assert "p.csv, got OSError: [Errno 28] No space left on device. The rows that are there stay" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{model}", "{empty}"], "Expected images in the folder"),
        pytest.param(
            *(["{here}/no/model", "{photos}"], "Expected a folder with a model, or an id on the Hub, got"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(["{model}", "{photos}", "--classes", "{here}/classes.txt"], "a file with a name a line, got"),
            marks=pytest.mark.slow,
        ),
        (["{model}", "{photos}/t.csv", "--image_column", "photo"], "Expected the column 'photo' in"),
    ],
)
def test_what_is_not_there_is_a_line_and_status_2(checkpoint, photos, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    write_table(photos, ".csv", NAMES).rename(photos / "t.csv")
    places = {"model": checkpoint, "photos": photos, "here": tmp_path, "empty": tmp_path / "empty"}
    call = command(*(word.format(**places) for word in words), "--output_file", tmp_path / "p.csv")
    error = ended(call)
    assert error.startswith("carot_hf predict: ")
    assert said in error
    assert not (tmp_path / "p.csv").exists()


def bound_by_rights():
    """Take from root what lets it write anywhere, for what is started next."""
    if ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        raise OSError(ctypes.get_errno(), "prctl")


def test_a_folder_that_is_read_only_is_said_before_a_model_loads(photos, tmp_path):
    folder = tmp_path / "read_only"
    folder.mkdir()
    folder.chmod(0o555)
    call = command("no/model/at/all", photos, "--output_file", folder / "p.csv")
    error = ended(call, preexec_fn=bound_by_rights if os.geteuid() == 0 else None)
    assert f"Expected to write {folder}/p.csv, got PermissionError: the folder {folder} is read-only" in error
    assert "make room, or choose another --output_file" in error


def test_classes_of_a_file_still_work(checkpoint, photos, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    words = ["--classes", tmp_path / "names.txt", "--templates", "{}"]
    assert len(predicted(checkpoint, tmp_path / "p.csv", photos, *words)) == 6
