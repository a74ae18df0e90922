"""`carot_hf suite`: what it shows of a suite, the pixels of its picture, and the files that it writes for folders."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pages as docs
import pytest
import yaml
from layouts import content, folders, parquet, picture, tars
from PIL import Image
from toys import CLASSES, ROOT, Noise, noise_suite

import carot_hf.suites.load
from carot_hf import ShiftSet, ShiftSuite, load_suite
from carot_hf.basics.yaml_text import load_yaml
from carot_hf.cli.main import main
from carot_hf.data.samples import MOST_BAD, doubtful_names, draw, example_captions, spread, unreadable
from carot_hf.evaluation.contact_sheet import ACROSS, Row, Tile, check_sheet, contact_sheet, fitting, font
from carot_hf.suites import describe, from_yaml

PETS = ["cat", "dog", "rabbit"]
GAP, TITLE, HEADING, PAPER = 10, 22, 34, 238  # of the sheet, by hand


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pets(place):
    """A folder with a training, a test and two shifted sets, and its suite file."""
    folders(place / "pets/train", [0, 1, 2] * 5, PETS)
    folders(place / "pets/test", [0, 1, 2] * 2, PETS)
    folders(place / "pets/sketch", [2, 0], PETS)
    folders(place / "pets/zoo", [0, 1, 1], ["feline", "other"])
    (place / "pets.yaml").write_text(
        "train: {path: pets/train}\nvalidation: 0.2\ntest: {path: pets/test}\nclass_names: [cat, dog, rabbit]\n"
        "shifts:\n  sketch: {path: pets/sketch}\n"
        "  zoo: {path: pets/zoo, label_names: [feline, other], columns: [[0], [1, 2]]}\n"
    )
    return place / "pets"


def run(*words):
    return python("-m", "carot_hf", *words)


def python(*words):
    """A process of this checkout, wherever the test is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


def section(printed, title):
    """The lines below a title, without their indent."""
    lines = printed.splitlines()
    start = lines.index(f"{title}:") + 1
    ends = [number for number, line in enumerate(lines) if number > start and not line.startswith("  ")]
    return [line[2:] for line in lines[start : ends[0] if ends else None]]


def sheet(path="suite.png"):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def tile(pixels, row, column, size, above=0):
    """The pixels of an image, where all sets above have one line of images."""
    cell = max(size, 112)
    top = GAP + row * (HEADING + TITLE + size + GAP) + HEADING + TITLE + above
    left = GAP + column * (cell + GAP)
    return pixels[top : top + size, left : left + size]


def photo(seed, width, height):
    """Smooth in colour, so that a filter matters and rounding does not."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------- help and wiring


@pytest.mark.parametrize("words", [["suite"], ["suite", "check"], ["suite", "init"]])
def test_help_fits_a_screen_and_needs_no_torch(words):
    code = f"import sys; sys.argv[1:] = {[*words, '--help']}; import carot_hf.__main__"
    check = f"import atexit, sys; atexit.register(lambda: print([m in sys.modules for m in ('torch', 'PIL')])); {code}"
    said = python("-c", check)
    lines = said.stdout.splitlines()
    assert lines[-1] == "[False, False]", said.stderr
    assert len(lines) < 30
    if words == ["suite"]:
        assert all(re.search(rf"^    {name} ", said.stdout, re.MULTILINE) for name in ("check", "init"))


def test_whatever_load_suite_takes_is_checked(place, monkeypatch, capsys):
    """A name, a file or a folder: what a word means is not decided twice."""
    asked = []
    monkeypatch.setattr(carot_hf.suites.load, "load_suite", lambda name: asked.append(name) or noise_suite())
    assert main(["suite", "check", "some/folder", "--size", "16"]) == 0
    assert asked == ["some/folder"]
    assert "Suite 'noise': 4 classes, 4 sets, 99 images" in capsys.readouterr().out


# ---------------------------------------------------------------- check: what is printed


def test_a_suite_is_shown(pets, capsys):
    assert main(["suite", "check", "pets.yaml", "--size", "32"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Suite 'pets': 3 classes, 5 sets, 26 images\n")
    table = [line.split() for line in section(said, "Images a class and set")]
    assert table == [
        ["images", "train", "validation", "test", "sketch", "zoo"],
        ["cat", "4", "1", "2", "1", "?"],
        ["dog", "4", "1", "2", "0", "?"],
        ["rabbit", "4", "1", "2", "1", "?"],
        ["all", "12", "3", "6", "2", "3"],
    ]
    assert section(said, "Images in several sets") == ["none"]
    assert section(said, "Labels were matched") == [
        *(f"{name:10}  by name" for name in ("train", "validation", "test", "sketch")),
        f"{'zoo':10}  labels of its own, which stand for the classes ['cat', 'dog/rabbit']",
    ]
    assert section(said, "Captions, for example") == ["a photo of a cat.", "a photo of a dog.", "a photo of a rabbit."]
    assert section(said, "Likely mistakes") == ["Set 'sketch' has no image of 'dog'."]
    assert "suite.png: images of each set at 32 x 32 pixels" in said


def test_labels_without_names_are_said_to_be_taken_by_position(place, capsys):
    parquet(place / "data", "train", np.array([0, 1, 2] * 3))
    parquet(place / "data", "test", np.array([0, 1, 2]), feature=datasets.ClassLabel(names=["dog", "rabbit", "cat"]))
    (place / "s.yaml").write_text(
        "train: {path: data}\ntest: {path: data}\nvalidation: 0.2\nclass_names: [cat, dog, rabbit]\n"
    )
    assert main(["suite", "check", "s.yaml", "--size", "16"]) == 0
    lines = section(capsys.readouterr().out, "Labels were matched")
    assert lines == [
        *(f"{name:10}  by position: 0 is 'cat', 1 is 'dog', ..." for name in ("train", "validation")),
        f"{'test':10}  by name",
    ]


def test_images_that_sets_share_are_said(pets, capsys, refused):
    shutil.copy(pets / "train/cat/0.png", pets / "sketch/cat/copy.png")
    assert main(["suite", "check", "pets.yaml", "--size", "16"]) == 0
    said = capsys.readouterr().out
    first = section(said, "Images in several sets")
    assert len(first) == 1
    assert re.fullmatch(r"1 images of 'sketch' are in '(train|validation)', too", first[0])
    assert any("of set 'sketch' are in" in line for line in section(said, "Likely mistakes"))
    shutil.copy(pets / "train/dog/1.png", pets / "test/dog/copy.png")
    (pets.parent / "pets.yaml").write_text((pets.parent / "pets.yaml").read_text().replace("0.2", "{path: pets/zoo2}"))
    folders(pets.parent / "pets/zoo2", [0, 1, 2], PETS)
    assert "images that are not trained on" in refused("suite", "check", "pets.yaml", "--output_file", "b.png")


def test_images_in_memory_are_not_said_to_be_compared(capsys, monkeypatch):
    monkeypatch.setattr(carot_hf.suites.load, "load_suite", lambda name: noise_suite())
    assert main(["suite", "check", "noise", "--size", "16"]) == 0
    assert section(capsys.readouterr().out, "Images in several sets") == [
        "none are known: images in memory are not compared"
    ]


def test_captions_of_the_images_own_are_shown(pets, capsys):
    rows = [{"file_name": f"cat/{3 * row}.png", "text": f"a cat, the {row}th \x1b[2J"} for row in range(5)]
    table = datasets.Dataset.from_list(rows)
    table.to_json(pets / "train" / "rows.jsonl")
    (pets.parent / "c.yaml").write_text(
        "train: {path: pets/train/rows.jsonl, caption_column: text}\nvalidation: {path: pets/sketch}\n"
        "test: {path: pets/test}\nclass_names: [cat, dog, rabbit]\n"
    )
    assert main(["suite", "check", "c.yaml", "--size", "16"]) == 0
    said = capsys.readouterr().out
    assert section(said, "Captions, for example") == [rf"a cat, the {row}th \x1b[2J" for row in range(5)]
    assert section(said, "Labels were matched")[0] == f"{'train':10}  no labels"
    assert "\x1b" not in said


def test_captions_are_spread_over_the_classes_and_templates():
    suite = noise_suite()
    assert example_captions(suite, 5) == [
        "a photo of the digit zero",  # classes 0, 0, 1, 2, 3 with the three templates in turn
        "the number zero",
        "an image of one",
        "a photo of the digit two",
        "the number three",
    ]
    names = [f"class {index}" for index in range(1000)]
    sets = [ShiftSet(Noise(4, seed), name=f"s{seed}", num_classes=1000) for seed in range(3)]
    large = ShiftSuite("large", names, ["{}", "a {}"], *sets, shifts={})
    assert example_captions(large, 5) == ["class 0", "a class 200", "class 400", "a class 600", "class 800"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cat", "dog 2", "b52 bomber"], []),
        (["cat", "n01440764", "7"], ["['n01440764', '7'] are numbers or codes"]),
        (["golden_retriever", "cat"], ["['golden_retriever'] have '_'"]),
        (["a_b", "0"], ["['0'] are numbers", "['a_b'] have '_'"]),
    ],
)
def test_names_that_make_odd_captions_are_said(names, said):
    found = doubtful_names(names)
    assert len(found) == len(said)
    assert all(text in sentence for text, sentence in zip(said, found, strict=True))


# ---------------------------------------------------------------- check: the picture


def test_the_pixels_are_those_of_a_resize_and_a_crop(place):
    """By PIL's ``box``, which resizes the crop alone; the sizes make whole pixels of it."""
    boxes = {"wide": (300, 200, (50, 0, 250, 200)), "tall": (150, 240, (0, 45, 150, 195)), "turned": (240, 160, None)}
    for number, (name, (width, height, _)) in enumerate(boxes.items()):
        for split in ("train", "validation", "test"):
            (place / split / name).mkdir(parents=True)
            exif = Image.Exif()
            exif[0x0112] = 6 if name == "turned" else 1  # to be turned by 90 degrees, clockwise
            for index in range(1 if split != "train" else 2):
                image = photo(100 * number + ("train", "validation", "test").index(split) * 10 + index, width, height)
                image.save(place / split / name / f"{index}.png", exif=exif)
    (place / "s.yaml").write_text("train: {path: train}\nvalidation: {path: validation}\ntest: {path: test}\n")
    assert main(["suite", "check", "s.yaml", "--size", "80", "--images", "3"]) == 0
    pixels = sheet()
    for row, split in ((1, "validation"), (2, "test")):
        for column, name in enumerate(sorted(boxes)):  # tall, turned, wide: the classes in their order
            image = Image.open(place / split / name / "0.png").convert("RGB")
            box = boxes[name][2]
            if name == "turned":
                image, box = image.transpose(Image.Transpose.ROTATE_270), (0, 40, 160, 200)
            expected = np.asarray(image.resize((80, 80), Image.Resampling.BICUBIC, box=box)).astype(int)
            assert expected.std() > 20
            assert np.abs(tile(pixels, row, column, 80) - expected).max() <= 1, (split, name)


def test_each_image_stands_below_its_class(pets):
    """Red is the class in `layouts.picture`; of zoo the labels are its own."""
    assert main(["suite", "check", "pets.yaml", "--size", "24", "--images", "6"]) == 0
    pixels = sheet()
    rows = [[0, 0, 1, 1, 2, 2], [0, 1, 2], [0, 0, 1, 1, 2, 2], [0, 2], [0, 1, 1]]
    for row, classes in enumerate(rows):
        assert [tile(pixels, row, column, 24)[8, 8, 0] for column in range(len(classes))] == classes
        beyond = tile(pixels, row, len(classes), 24)
        assert (beyond == PAPER).all(), "a smaller set has fewer images"


def test_the_same_picture_every_time(pets, place):
    assert main(["suite", "check", "pets.yaml", "--size", "16"]) == 0
    assert main(["suite", "check", "pets.yaml", "--size", "16", "--output_file", "deep/again.png"]) == 0
    assert (place / "suite.png").read_bytes() == (place / "deep/again.png").read_bytes()


def test_titles_stay_within_their_cell_and_the_sheet():
    size, names = 64, ["W" * 200, "cat", "a name of many words that goes on and on"]
    tiles = [Tile(np.zeros((size, size, 3), np.uint8), name, "class 0") for name in names]
    pixels = np.asarray(contact_sheet([Row("W" * 500, tiles), Row("far", tiles[:1])], size)).astype(int)
    title = pixels[GAP + HEADING : GAP + HEADING + TITLE]
    for column in range(3):
        left = GAP + column * (112 + GAP)
        assert title[:, left : left + 112].min() < 100, "ink"
        assert (title[:, left + 112 : left + 112 + GAP] == PAPER).all(), "none between two titles"
    assert (pixels[:, -GAP:] == PAPER).all()
    assert (pixels[-GAP:] == PAPER).all()
    heading = pixels[GAP : GAP + HEADING]
    assert heading[-6:].min() == PAPER, "what hangs down is whole"
    assert title[-1].min() == PAPER


def test_long_names_are_cut_to_what_fits():
    name = "a name of many words that goes on and on"
    assert fitting(name, 10_000, 15) == name
    cut = fitting(name, 112, 15)
    assert cut.endswith("...")
    assert name.startswith(cut[:-3])
    assert font(15).getlength(cut) <= 112
    longer = name[: len(cut[:-3]) + 1].rstrip()
    assert longer == cut[:-3] or font(15).getlength(longer + "...") > 112
    assert fitting("W", 1, 15) == "..."


def test_a_name_without_letters_in_the_font_is_a_number_that_the_screen_explains(place, capsys):
    for split in ("train", "test"):
        folders(place / "data" / split, [0, 1] * 3, ["cat", "\u732b"])
    (place / "s.yaml").write_text("train: {path: data/train}\nvalidation: 0.2\ntest: {path: data/test}\n")
    assert main(["suite", "check", "s.yaml", "--size", "112", "--images", "2"]) == 0
    assert "  class 1 there: \u732b\n" in capsys.readouterr().out
    named = np.asarray(contact_sheet([Row("x", [Tile(np.zeros((112, 112, 3), np.uint8), "class 1", "")])], 112))
    title = slice(GAP + HEADING, GAP + HEADING + TITLE)
    assert (sheet()[title, GAP + 122 : GAP + 234] == named[title, GAP : GAP + 112]).all()


def test_a_set_of_many_images_takes_several_lines(monkeypatch):
    monkeypatch.setattr(carot_hf.suites.load, "load_suite", lambda name: noise_suite())
    assert main(["suite", "check", "noise", "--size", "20", "--images", str(ACROSS + 2)]) == 0
    pixels = sheet()
    line = TITLE + 20 + GAP
    assert pixels.shape == (GAP + 4 * (HEADING + 2 * line), GAP + ACROSS * (112 + GAP), 3)
    second = tile(pixels, 0, 1, 20, above=line)
    assert second.std() > 10
    assert (tile(pixels, 0, 2, 20, above=line) == PAPER).all()


def test_a_picture_that_is_too_large_is_refused_before_an_image_is_read(monkeypatch, refused):
    class Unread(Noise):
        def __getitem__(self, index):
            raise AssertionError("read")

    monkeypatch.setattr(carot_hf.suites.load, "load_suite", lambda name: noise_suite(Unread))
    error = refused("suite", "check", "noise", "--size", "2000")
    assert "at most 89,478,485 pixels, got one of 16,090 x 8,274 for 4 sets of 8" in error
    with pytest.raises(AssertionError, match="read"):
        main(["suite", "check", "noise", "--size", "20"])
    check_sheet(4, 8, 224)


# ---------------------------------------------------------------- the draw


def test_whole_numbers_are_spread_evenly():
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    for size in range(1, 30):
        for count in range(1, 30):
            found = spread(size, count)
            times = Counter(found)
            assert len(found) == count
            assert found == sorted(found)
            assert set(found) <= set(range(size))
            assert max(times.values()) - min(times[place] for place in range(size)) <= 1


def test_a_draw_has_each_item_once_and_goes_on_to_other_classes():
    labels = [0] * 9 + [1] + [2] * 3
    data = ShiftSet([{"image": Image.new("RGB", (4, 4), (row, 0, 0)), "label": labels[row]} for row in range(13)],
                    name="x", num_classes=3, labels=labels)  # fmt: skip
    found = draw(data, 9)
    rows = [item["image"].getpixel((0, 0))[0] for item in found.items]
    assert len(set(rows)) == 9
    assert [labels[row] for row in rows] == sorted(labels[row] for row in rows)
    assert Counter(labels[row] for row in rows)[1] == 1
    assert len(draw(data, 50).items) == 13
    assert [item["image"].getpixel((0, 0))[0] for item in draw(data, 9).items] == rows


def test_a_set_of_bad_images_is_given_up():
    data = ShiftSet([{"image": b"none", "label": row % 4} for row in range(200)], name="x", num_classes=4)
    found = draw(data, 8)
    assert (len(found.items), len(found.bad)) == (0, MOST_BAD)


def test_labels_that_are_known_by_reading_are_drawn_too():
    data = ShiftSet(Noise(30, 0), name="x", num_classes=len(CLASSES))
    assert data.labels is None
    assert len(draw(data, 8).items) == 8


# ---------------------------------------------------------------- check: what cannot be read


def broken(pets):
    """One image of each kind of damage: no image in the training set, one that ends early in the test set."""
    for file in (pets / "train/cat").iterdir():
        file.write_bytes(b"no image")
    good = io.BytesIO()
    photo(0, 60, 60).save(good, "JPEG")
    (pets / "test/dog/cut.jpg").write_bytes(good.getvalue()[: len(good.getvalue()) // 2])


def test_bad_images_in_the_draw_are_named_and_others_taken(pets, capsys):
    broken(pets)
    assert main(["suite", "check", "pets.yaml", "--size", "24", "--images", "6"]) == 0
    lines = section(capsys.readouterr().out, "Images that cannot be decoded, with others in their place")
    found = [line for line in lines if line.startswith("train, index ")]
    assert len(found) == 4, "each of the four cats that are left to train on"
    suite = load_suite("pets.yaml")
    for line in found:
        index, file, reason = re.fullmatch(r"train, index (\d+) \((.+)\): (.+)", line).groups()
        assert suite.train.labels[int(index)] == 0
        assert suite.train.data[int(index)]["image"]["path"] == file
        assert reason.startswith("UnidentifiedImageError")
    reds = [tile(sheet(), 0, column, 24)[8, 8, 0] for column in range(6)]
    assert sorted(reds) == [1, 1, 1, 1, 2, 2] or sorted(reds) == [1, 1, 1, 2, 2, 2]


def test_decode_lists_all_that_cannot_be_read(pets, capsys):
    assert main(["suite", "check", "pets.yaml", "--size", "16", "--decode"]) == 0
    assert "All 26 images can be decoded." in capsys.readouterr().out
    broken(pets)
    assert main(["suite", "check", "pets.yaml", "--size", "16", "--decode", "--overwrite", "--images", "1"]) == 2
    said = capsys.readouterr()
    lines = section(said.out, "Images that cannot be decoded")
    assert Counter(line.split(",")[0] for line in lines) == {"train": 4, "validation": 1, "test": 1}
    assert sum("cut.jpg): OSError: " in line for line in lines) == 1
    assert said.err.splitlines()[-1] == (
        "carot_hf suite: Expected 27 images that can be decoded, got 6 that cannot. Replace or drop them."
    )


def test_several_processes_find_what_one_finds_in_its_order(place):
    folders(place / "many", [0, 1, 2] * 17, PETS)
    files = sorted((place / "many").rglob("*.png"))
    for number in (0, 7, 16, 31, 32, 50):
        files[number].write_bytes(b"no image" if number % 2 else files[number].read_bytes()[:45])
    data = from_yaml.suite_from_description({"test": {"path": "many"}}, "here", place, name="many").test
    one = list(unreadable(data))
    assert len(one) == 51
    assert [row for row, bad in enumerate(one) if bad is not None] == [0, 7, 16, 31, 32, 50]
    assert all(bad is None or (bad.row, bad.file) == (row, str(files[row])) for row, bad in enumerate(one))
    assert list(unreadable(data, 2)) == one


class Watched(Noise):
    """Says which process reads; one row may hold what is no item."""

    def __init__(self, size, place, wrong=None):
        super().__init__(size, 0)
        self.place, self.wrong = place, wrong

    def __getitem__(self, index):
        (self.place / str(os.getpid())).touch()
        if index == self.wrong:
            raise ValueError(f"row {index} is odd")
        return super().__getitem__(index)


def test_others_read_and_an_error_of_theirs_is_as_ones_own(tmp_path):
    (tmp_path / "pids").mkdir()
    good = ShiftSet(Watched(70, tmp_path / "pids"), name="x", num_classes=4)
    assert list(unreadable(good, 2)) == [None] * 70
    read = {path.name for path in (tmp_path / "pids").iterdir()}
    assert len(read) == 2
    assert str(os.getpid()) not in read
    odd = ShiftSet(Watched(70, tmp_path, wrong=40), name="x", num_classes=4)
    errors = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match="row 40 is odd") as raised:
            list(unreadable(odd, workers))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_a_process_says_what_is_wrong_in_a_line_with_status_2(pets, place, refused):
    assert "got 'fruit'" in refused("suite", "check", "fruit", "--output_file", "f.png")
    (place / "suite.png").write_bytes(b"mine")
    found = run("suite", "check", "pets.yaml")
    assert found.returncode == 2
    said = "Expected a new --output_file, got suite.png, which is there. Add --overwrite"
    assert found.stderr.strip().splitlines()[-1].startswith(f"carot_hf suite: {said}")
    assert "Traceback" not in found.stderr
    assert (place / "suite.png").read_bytes() == b"mine"
    broken(pets)
    found = run("suite", "check", "pets.yaml", "--decode", "--output_file", "other.png", "--size", "16")
    assert found.returncode == 2
    assert "cut.jpg" in found.stdout


def test_a_picture_of_the_same_suite_is_replaced_and_no_other_file(pets, place, refused):
    check = ["suite", "check", "pets.yaml", "--size", "16", "--images", "2"]
    assert main(check) == 0
    first = (place / "suite.png").read_bytes()
    with Image.open(place / "suite.png") as image:
        assert image.info["Title"] == "pets"
    folders(place / "pets/sketch", [1, 1, 1], PETS)
    assert main(check) == 0
    second = (place / "suite.png").read_bytes()
    assert second != first, "there are other images now"
    (place / "pets.yaml").rename(place / "zoo \u6570.yaml")
    other_check = [*check[:2], "zoo \u6570.yaml", *check[3:]]
    assert "got suite.png, the picture of the suite 'pets'. Add --overwrite" in refused(*other_check)
    assert (place / "suite.png").read_bytes() == second
    assert main([*other_check, "--overwrite"]) == 0
    assert main(other_check) == 0
    Image.new("RGB", (9, 9)).save(place / "plain.png")
    for other in (b"", b"text", (place / "plain.png").read_bytes(), second[:20]):
        (place / "suite.png").write_bytes(other)
        assert "got suite.png, which is there. Add --overwrite to replace it." in refused(*other_check)
        assert (place / "suite.png").read_bytes() == other
    (place / "pets/suite.yaml").write_bytes(second)  # a picture where a suite file goes is somebody's
    assert main(["suite", "init", "pets"]) == 2
    assert (place / "pets/suite.yaml").read_bytes() == second


@pytest.mark.parametrize("output", ["/proc/self/suite", "{here}/file/suite", "{here}/folder"])
def test_a_place_that_cannot_be_written_is_one_line(pets, place, refused, output):
    (place / "file").write_text("mine")
    for suffix in (".png", ".yaml"):
        (place / f"folder{suffix}").mkdir()
    name = output.format(here=place)
    for words in (["check", "pets.yaml", "--size", "16"], ["init", "pets"]):
        suffix = ".png" if words[0] == "check" else ".yaml"
        error = refused("suite", *words, "--output_file", name + suffix, "--overwrite")
        assert name in error or "file" in error
    assert (place / "file").read_text() == "mine"


def test_options_that_do_not_fit(capsys):
    for words in (["check", "d", "--output_file", "a.jpg"], ["init", "d", "--output_file", "a.txt"],
                  ["check", "d", "--images", "0"], ["check", "d", "--size", "x"], []):  # fmt: skip
        assert main(["suite", *words]) == 2
    assert "expected a whole number above 0, got '0'" in capsys.readouterr().err


# ---------------------------------------------------------------- init


def split_folders(root):
    folders(root / "train", [0, 1, 2] * 4, PETS)
    folders(root / "val", [0, 1], PETS)
    folders(root / "Test", [0, 1, 2], PETS)
    folders(root / "sketch", [1, 2], PETS)
    folders(root / "Art_test", [2, 2, 0, 1], PETS)
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").write_text("mine")
    return {"train": 12, "validation": 2, "test": 3, "sketch": 2, "Art_test": 4}


def split_below_a_home(root):
    parquet(root / "home", "train", np.array([0, 1, 2] * 4), feature=datasets.ClassLabel(names=PETS))
    parquet(root / "home", "test", np.array([0, 1, 2]), feature=datasets.ClassLabel(names=PETS))
    folders(root / "sketch", [1, 2], PETS)
    tars(root / "art", [0, 1, 2, 2], column="label", names=PETS)
    return {"train": 9, "validation": 3, "test": 3, "sketch": 2, "art": 4}


def one_table(root):
    """The folder of an image names its split."""
    lines = ["file_name,label"]
    for row in range(12):
        split = "train" if row < 9 else "test"
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / split / f"{row}.png").write_bytes(picture(row % 3, row))
        lines.append(f"{split}/{row}.png,{PETS[row % 3]}")
    (root / "metadata.csv").write_text("\n".join(lines))
    return {"train": 6, "validation": 3, "test": 3}


def table_for_each(root):
    for name, rows in {"train": range(9), "test": range(9, 12), "far": range(12, 14)}.items():
        lines = ["file_name\tlabel"]
        for row in rows:
            (root / "images" / PETS[row % 3]).mkdir(parents=True, exist_ok=True)
            (root / "images" / PETS[row % 3] / f"{row}.png").write_bytes(picture(row % 3, row))
            lines.append(f"images/{PETS[row % 3]}/{row}.png\t{PETS[row % 3]}")
        (root / f"{name}.tsv").write_text("\n".join(lines))
    folders(root / "sketch", [1, 2], PETS)
    return {"train": 6, "validation": 3, "test": 3, "far": 2, "sketch": 2}


def classes_with_splits(root):
    for name, label in zip(PETS, range(3), strict=True):
        for split, count in {"train": 4, "valid": 1, "test": 2}.items():
            (root / name / split).mkdir(parents=True)
            for row in range(count):
                (root / name / split / f"{row}.png").write_bytes(picture(label, row, of=split))
    return {"train": 12, "validation": 3, "test": 6}


def saved_splits(root):
    def rows(labels, of):
        images = [{"bytes": picture(label, row, of=of), "path": None} for row, label in enumerate(labels)]
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=PETS)})
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=kinds)

    sets = {"train": rows([0, 1, 2] * 4, "a"), "test": rows([0, 1, 2], "b"), "far": rows([2, 1], "c")}
    datasets.DatasetDict(sets).save_to_disk(root)
    return {"train": 9, "validation": 3, "test": 3, "far": 2}


def a_folder_beside_a_table(root):
    one_table(root)
    table = (root / "metadata.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(line for line in table if not line.startswith("test/")))
    (root / "metadata.csv").unlink()
    shutil.rmtree(root / "test")
    folders(root / "test", [0, 1], PETS)
    return {"train": 6, "validation": 3, "test": 2}


LAYOUTS = [split_folders, split_below_a_home, one_table, table_for_each, classes_with_splits, saved_splits,
           a_folder_beside_a_table]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("output", [None, "elsewhere/described.yaml"])
def test_the_file_for_a_folder_loads_and_gives_its_sets(place, capsys, layout, output):
    sizes = layout(place / "data")
    words = [] if output is None else ["--output_file", output]
    before = sorted(path for path in (place / "data").rglob("*"))
    assert main(["suite", "init", "data", *words]) == 0
    written = place / (output or "data/suite.yaml")
    said = capsys.readouterr().out
    assert f"{output or 'data/suite.yaml'}: written, and it loads. Next: carot_hf suite check" in said
    assert "Left to you" not in said
    assert {*before, *([] if output else [written])} == set((place / "data").rglob("*"))
    suite = load_suite(written)
    found = {"train": suite.train, "validation": suite.validation, "test": suite.test, **suite.shifts}
    assert {name: len(data) for name, data in found.items()} == sizes
    assert (suite.name, suite.class_names, suite.templates) == ("data", PETS, ["a photo of a {}."])
    for data in found.values():
        assert all(label == seen for label, seen, _ in content(data)), "each image has the class that it shows"
    classes = load_yaml(written.read_text())["class_names"]
    counts = [line for line in written.read_text().splitlines() if line.startswith("  - cat  # ")]
    assert classes == PETS
    held = sizes["validation"] if "validation:  #" not in written.read_text() else 0
    total = Counter(np.concatenate([suite.train.labels, suite.validation.labels if held else []]).tolist())[0]
    assert f"{total} in train" in counts[0]


def test_nothing_found_is_lost_from_the_screen(place, capsys):
    split_folders(place / "data")
    (place / "data/README.csv").write_text("a,b\n1,2\n")
    assert main(["suite", "init", "data"]) == 0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in section(said, "No set")] == ["README.csv", "notes"]
    assert [line.split()[:2] for line in section(said, "Found in data")] == [
        ["train", "12"], ["validation", "2"], ["test", "3"], ["Art_test", "4"], ["sketch", "2"]
    ]  # fmt: skip


def test_of_two_names_of_a_split_the_usual_one_is_it(place):
    for name in ("train", "dev", "val", "test"):
        folders(place / "data" / name, [0, 1, 2], PETS)
    assert main(["suite", "init", "data"]) == 0
    written = load_yaml((place / "data/suite.yaml").read_text())
    assert written["validation"] == {"path": "val"}
    assert written["shifts"] == {"dev": {"path": "dev"}}


def test_classes_that_are_called_as_splits_are_classes(place, capsys, caplog):
    """What was tried on the way is neither said to be no set nor warned of."""
    folders(place / "data", [0, 1, 2] * 4, ["cat", "test tube", "train"])
    (place / "data" / "loose.png").write_bytes(picture(0, 0))
    assert main(["suite", "init", "data"]) == 0
    assert "No set" not in capsys.readouterr().out
    assert caplog.records == []
    assert load_yaml((place / "data/suite.yaml").read_text())["class_names"] == ["cat", "test tube", "train"]


def unmarked(text, *keys):
    """A file with the marks of comments taken away from the lines of some keys and what belongs to them."""
    for key in keys:
        text = re.sub(rf"^# {key}:\n#   path: {key}$", f"{key}:\n  path: {key}", text, flags=re.MULTILINE)
    return text


@pytest.mark.parametrize("layout", ["folders", "table"])
def test_what_is_missing_is_said_with_the_cure(place, capsys, layout):
    if layout == "folders":
        folders(place / "data", [0, 1, 2] * 4, PETS)
    else:
        one_table(place / "data")
        for path in (place / "data/test").iterdir():
            path.rename(place / "data/train" / path.name)
        table = (place / "data/metadata.csv").read_text().replace("test/", "train/")
        (place / "data/metadata.csv").write_text(table.replace("train/", "images/"))
        (place / "data/train").rename(place / "data/images")
    assert main(["suite", "init", "data"]) == 0
    said, text = capsys.readouterr().out, (place / "data/suite.yaml").read_text()
    [todo] = section(said, "Left to you")
    assert todo == "test: none was found. Name its folder or file as `path`, and take the marks before its lines away."
    assert "# TODO test: none was found." in text
    assert "data/suite.yaml: written. It does not load yet: data/suite.yaml: test: expected this key, got none." in said
    with pytest.raises(ValueError, match="test: expected this key, got none"):
        load_suite(place / "data/suite.yaml")
    folders(place / "elsewhere", [0, 2], PETS)
    cured = unmarked(text, "test").replace("path: test", "path: ../elsewhere")
    (place / "data/suite.yaml").write_text(cured)
    suite = load_suite(place / "data/suite.yaml")
    assert (len(suite.train), len(suite.validation), len(suite.test)) == (9, 3, 2)


def test_worlds_of_the_same_classes_are_shifts_until_somebody_says_which_is_home(place, capsys):
    folders(place / "data/photo", [0, 1, 2] * 3, PETS)
    folders(place / "data/art", [0, 1], PETS)
    assert main(["suite", "init", "data"]) == 0
    assert [line.split(":")[0] for line in section(capsys.readouterr().out, "Left to you")] == ["train", "test"]
    written = load_yaml((place / "data/suite.yaml").read_text())
    assert written["shifts"] == {"art": {"path": "art"}, "photo": {"path": "photo"}}
    assert "validation" not in written, "a share of nothing"
    assert written["class_names"] == PETS


def test_classes_of_one_image_leave_none_to_hold_out(place, capsys):
    folders(place / "data/train", [0, 1, 2], PETS)
    folders(place / "data/test", [0, 1, 2], PETS)
    assert main(["suite", "init", "data"]) == 0
    assert "validation: each class has one image" in capsys.readouterr().out


def test_a_set_of_other_labels_stands_in_comments(pets, capsys):
    """The rest loads; without the marks its own labels are asked for, and given they are taken."""
    assert main(["suite", "init", "pets"]) == 0
    [todo] = section(capsys.readouterr().out, "Left to you")
    assert todo.startswith("zoo: its labels ['feline', 'other'] are none of the classes. Say in `label_names`")
    written = pets / "suite.yaml"
    assert list(load_suite(written).shifts) == ["sketch"]
    text = re.sub(r"^  # (?!TODO|them|marks|before)", "  ", written.read_text(), flags=re.MULTILINE)
    assert load_yaml(text)["shifts"]["zoo"]["label_names"] == {"feline": "?", "other": "?"}
    zoo = {"path": "zoo", "label_names": ["feline", "other"], "columns": [[0], [1, 2]]}
    content = {**yaml.safe_load(written.read_text())}
    content["shifts"] = {**content["shifts"], "zoo": zoo}
    written.write_text(yaml.safe_dump(content))
    assert len(load_suite(written).shifts["zoo"]) == 3


def test_labels_that_are_numbers_ask_for_names(place, capsys):
    parquet(place / "data", "train", np.array([0, 3, 1] * 3))
    parquet(place / "data", "test", np.array([0, 2]))
    assert main(["suite", "init", "data"]) == 0
    assert section(capsys.readouterr().out, "Left to you")[0].startswith("class_names: the labels are numbers")
    suite = load_suite(place / "data/suite.yaml")
    assert suite.class_names == ["0", "1", "2", "3"]
    assert suite.test.labels.tolist() == [0, 2]


STRANGE = ["1e5", "yes", "null", "01", "0x1f", "1_000", "a: b", "- x", "#c", "{}", '"q"', "it's", "new\nline", "tab\t",
           "\u202elive", "\u732b", "a # b", "[x]", "*a", "&a", "!t", "%d", "@at", "`b`", "~", "2020-01-01", "12:30",
           "\x1b[2J", "---", "x,y", "  two  ", "=", "<<", "\u2028s", "\x85n", "?", "| p", "True"]  # fmt: skip


def test_names_of_strangers_are_read_back_as_they_are(place):
    folders(place / "data/train", [*range(len(STRANGE))] * 2, STRANGE)
    folders(place / "data/test", range(3), STRANGE)
    folders(place / "data/a: [b] # c", range(2), STRANGE)
    assert main(["suite", "init", "data"]) == 0
    text = (place / "data/suite.yaml").read_text()
    assert not re.search(r"[\x1b\u202e\u2028\x85]", text)
    suite = load_suite(place / "data/suite.yaml")
    assert suite.class_names == sorted(STRANGE)
    assert list(suite.shifts) == ["a_b_c"]
    assert yaml.safe_load(text)["class_names"] == sorted(STRANGE), "by another reader, too"


@pytest.mark.parametrize("content", [*STRANGE, ".inf", "\udcff", "a" * 500, "word " * 100, "\ufeffx", "\U0001f600", ""])
def test_a_value_is_one_line_and_read_back(content):
    for held in (content, [content, "x"], {content: content}):
        text = describe.value(held)
        assert len(text.splitlines()) == 1
        for read in (load_yaml, yaml.safe_load):
            found = read(f"key: {text}  # comment\n")["key"]
            assert found == held
            assert type(found) is str or not isinstance(held, str)


def test_a_folder_whose_name_is_no_text_does_not_stop_the_others(place, capsys):
    split_folders(place / "data")
    folders(place / "data" / "odd", [0, 1], PETS)
    (place / "data" / "odd").rename(place / "data" / "odd\udcff")
    assert main(["suite", "init", "data"]) == 0
    said = capsys.readouterr().out
    assert "\udcff" not in said
    suite = load_suite(place / "data/suite.yaml")
    assert {"sketch", "Art_test"} <= set(suite.shifts)


def test_names_that_metrics_may_not_have_are_changed(place):
    folders(place / "data/train", [0, 1, 2] * 3, PETS)
    folders(place / "data/test", [0, 1, 2], PETS)
    for name in ("id", "ood", "teacher_x", "a b", "a_b", "\u732b"):
        folders(place / "data" / name, [0, 1], PETS)
    assert main(["suite", "init", "data"]) == 0
    found = load_yaml((place / "data/suite.yaml").read_text())["shifts"]
    assert {name: entry["path"] for name, entry in found.items()} == {
        "shift_id": "id", "shift_ood": "ood", "shift_teacher_x": "teacher_x", "a_b": "a b", "a_b_2": "a_b",
        "shift": "\u732b",
    }  # fmt: skip
    assert len(load_suite(place / "data/suite.yaml").shifts) == 6


def test_a_file_that_is_there_stays(pets, refused):
    (pets / "suite.yaml").write_text("mine")
    assert "Expected a new --output_file, got pets/suite.yaml, which is there" in refused("suite", "init", "pets")
    assert (pets / "suite.yaml").read_text() == "mine"
    assert main(["suite", "init", "pets", "--overwrite"]) == 0
    assert (pets / "suite.yaml").read_text() != "mine"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([], "found none in [] (0 files and folders). Looked for folders train, validation and test"),
        (["a.txt"], "found none in ['a.txt'] (1 files and folders)"),
        (["t.csv"], "t.csv: Expected one column of images, got []"),
        (None, "Expected a folder of data, found none at data"),
    ],
)
def test_a_folder_without_images_is_refused(place, refused, made, said):
    if made is not None:
        (place / "data").mkdir()
        for name in made:
            (place / "data" / name).write_text("a,b\n1,2\n")
    assert said in refused("suite", "init", "data")
    assert not (place / "data/suite.yaml").exists()


def test_a_file_that_does_not_load_says_why(pets, capsys):
    shutil.rmtree(pets / "test")
    shutil.copytree(pets / "train", pets / "test")
    assert main(["suite", "init", "pets"]) == 0
    assert "It does not load yet: Expected a test set of images that are not trained on" in capsys.readouterr().out


# ---------------------------------------------------------------- one source of what keys mean


def keys_in(text):
    """All keys of a suite file, those in comments included."""
    return set(re.findall(r"^[ #]*([a-z_]+):(?: |$)", text, re.MULTILINE))


def comments_in(text):
    return " ".join(re.sub(r"#", " ", " ".join(re.findall(r"#.*", text))).split())


EXAMPLE = (ROOT / "examples/suites/pets.yaml").read_text()


def test_the_file_has_every_key_that_there_is(place):
    folders(place / "data/train", [0, 1, 2] * 3, PETS)
    folders(place / "data/test", [0, 1, 2], PETS)
    assert main(["suite", "init", "data"]) == 0
    tables = (from_yaml._SUITE_KEYS, from_yaml._TRAIN_KEYS, from_yaml._TEST_KEYS, from_yaml._SHIFT_KEYS)
    known = {key for keys in tables for key in keys}
    recommended = {"learning_rate", "per_device_train_batch_size", "num_train_epochs"}
    sets = {"sketch"}
    assert keys_in((place / "data/suite.yaml").read_text()) == known | recommended | sets
    assert keys_in(EXAMPLE) == known | recommended | sets | {"zoo"}


def test_the_explanations_are_those_of_the_example():
    said = comments_in(EXAMPLE)
    keys = [*describe.OF_TRAIN, *describe.OF_TEST, *describe.OF_SHIFTS, *describe.OF_SUITE, describe.LABEL_NAMES]
    texts = [*describe.EXPLAINED.values(), *(why for _, why in keys), describe.VERSION]
    assert len(texts) > 15
    assert [text for text in texts if text not in said] == []


def test_a_key_without_its_mark_is_one_that_is_read(place):
    """The examples in the comments are of the right kind."""
    keys = {"train": describe.OF_TRAIN, "test": describe.OF_TEST, "": (*describe.OF_SUITE, describe.LABEL_NAMES)}
    for part, lines in keys.items():
        for text, _ in lines:
            docs.check_suite(text if part == "" else f"{part}:\n  path: x\n  {text}\n")
    for text, _ in describe.OF_SHIFTS:
        docs.check_suite(f"shifts:\n  x:\n    path: x\n    {text}\n")
    docs.check_suite("recommended:\n" + "".join(f"  {line}\n" for line in describe.RECOMMENDED))
