"""Where names and templates come from: four sources, their order, and what is said when there is none."""

from __future__ import annotations

import logging
import sys

import huggingface_hub
import pytest
from datasets import ClassLabel

from carot_hf.suites.imagenet import names as class_names
from carot_hf.suites.imagenet.names import resolve_names
from carot_hf.suites.imagenet.sets import SETS

HUB = "clip-benchmark/wds_imagenetv2"

# As open_clip's file has it, shortened: names that repeat, an apostrophe, a name with brackets.
METADATA = """
OPENAI_IMAGENET_TEMPLATES = (
    lambda c: f'a bad photo of a {c}.',
    lambda c: f'a {c} in a video game.',
    lambda c: f"the embroidered {c}.",
)
SIMPLE_IMAGENET_TEMPLATES = (lambda c: f'itap of a {c}.',)
IMAGENET_CLASSNAMES = (
    "tench", "kite (bird of prey)", "missile",
    "yellow lady's slipper", "missile"
)
"""
OPEN_CLIP_NAMES = ["tench", "kite (bird of prey)", "missile", "yellow lady's slipper", "missile"]
OPEN_CLIP_TEMPLATES = ["a bad photo of a {}.", "a {} in a video game.", "the embroidered {}."]


@pytest.fixture(autouse=True)
def nothing_around(tmp_path, monkeypatch):
    """No open_clip, an empty cache, and no connection (conftest sets HF_HUB_OFFLINE)."""
    monkeypatch.setattr(class_names.util, "find_spec", lambda name: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def install_open_clip(monkeypatch, folder, text=METADATA):
    """Put a package on the path that cannot be imported, as open_clip cannot be without torchvision."""
    monkeypatch.undo()
    (folder / "open_clip").mkdir(parents=True)
    (folder / "open_clip" / "__init__.py").write_text("raise ImportError('torchvision')")
    (folder / "open_clip" / "zero_shot_metadata.py").write_text(text)
    info = folder / "open_clip_torch-3.3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: open_clip_torch\nVersion: 3.3.0\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.syspath_prepend(str(folder))


def write_files(folder, names=None, templates=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {"classnames.txt": names, "zeroshot_classification_templates.txt": templates}.items():
        if lines is not None:
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_cache(folder, names, templates):
    """The Hub's cache as hf_hub_download leaves it."""
    repository = folder / "cache" / "datasets--clip-benchmark--wds_imagenetv2"
    write_files(repository / "snapshots" / ("0" * 40), names, templates)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_the_users_names_come_first(caplog, tmp_path):
    folder = write_files(tmp_path / "files", ["x", "y"], ["a {c}"])
    with caplog.at_level(logging.INFO, logger="carot_hf.suites.imagenet.names"):
        found = resolve_names(
            2, class_names=("cat", "dog"), templates=("one {}", "two {}"), label_names=["p", "q"], folder=folder
        )
    assert (found.class_names, found.templates) == (["cat", "dog"], ["one {}", "two {}"])
    assert (found.source, found.templates_source) == ("user", "user")
    assert [record.message for record in caplog.records] == ["2 class names from: user.", "2 templates from: user."]


def test_the_order_of_the_sources(tmp_path, monkeypatch):
    install_open_clip(monkeypatch, tmp_path)
    label = ClassLabel(names=["a", "b", "c", "d", "e"])
    folder = write_files(tmp_path / "imagenetv2", ["f", "g", "h", "i", "j"], ["photo of {c}"])
    write_cache(tmp_path, ["k", "l", "m", "n", "o"], ["hub {c}"])
    everything = {"label_names": label.names, "label_names_of": "ILSVRC/imagenet-1k", "folder": folder}

    found = resolve_names(5, **everything, sources=("ClassLabel", "files"))
    assert (found.class_names, found.source) == (label.names, "ClassLabel of ILSVRC/imagenet-1k")
    assert (found.templates, found.templates_source) == (["photo of {}"], "files in imagenetv2")

    found = resolve_names(5, **everything)  # the paper's protocol
    assert (found.class_names, found.source) == (["f", "g", "h", "i", "j"], "files in imagenetv2")

    found = resolve_names(5)
    assert (found.class_names, found.source) == (["k", "l", "m", "n", "o"], f"files of {HUB}")
    assert (found.templates, found.templates_source) == (["hub {}"], f"files of {HUB}")

    found = resolve_names(5, templates=["my {}"])
    assert (found.source, found.templates, found.templates_source) == (f"files of {HUB}", ["my {}"], "user")

    monkeypatch.setattr(class_names, "HUB_ID", "clip-benchmark/wds_other")
    found = resolve_names(5)
    assert (found.class_names, found.source) == (OPEN_CLIP_NAMES, "open_clip_torch 3.3.0")

    found = resolve_names(5, **everything, sources=("open_clip", "ClassLabel"))
    assert (found.class_names, found.templates) == (OPEN_CLIP_NAMES, OPEN_CLIP_TEMPLATES)
    with pytest.raises(ValueError, match=r"got \['wordnet'\]"):
        resolve_names(5, sources=["wordnet"])


def test_open_clip_is_read_by_path_and_never_imported(tmp_path, monkeypatch):
    install_open_clip(monkeypatch, tmp_path)
    with pytest.raises(ImportError, match="torchvision"):
        import open_clip  # noqa: F401
    found = resolve_names(5)
    assert found.class_names == OPEN_CLIP_NAMES
    assert found.templates == OPEN_CLIP_TEMPLATES
    assert "open_clip" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        METADATA.replace("{c} in a video game", "{open('/tmp/x')} in a video game"),
        METADATA.replace("{c} in a video game", "{c.upper()} in a video game"),
        METADATA.replace("{c} in a video game", "{d} in a video game"),
        METADATA.replace("{c} in a video game", "{c!r} in a video game"),
        METADATA.replace("{c} in a video game", "{c:>9} in a video game"),
        METADATA.replace('"tench"', "str(1)"),
        METADATA.replace("OPENAI_IMAGENET_TEMPLATES = (", "OPENAI_IMAGENET_TEMPLATES = tuple("),
        METADATA.replace("IMAGENET_CLASSNAMES", "NAMES"),
        METADATA.replace("(", "[", 1),
    ],
)
def test_only_literals_of_open_clip_are_trusted(tmp_path, monkeypatch, text):
    install_open_clip(monkeypatch, tmp_path, text)
    with pytest.raises(ValueError, match=r"as literals in .*zero_shot_metadata\.py, got .*Install open_clip_torch"):
        resolve_names(5)


def test_of_synonyms_the_first_is_taken_unless_it_is_taken_twice():
    label_names = ["Gila monster, Heloderma", "Cardigan, Cardigan Welsh corgi", "cardigan", "crane", "crane"]
    found = resolve_names(5, label_names=label_names, templates=["{}"])
    assert found.class_names == ["Gila monster", "Cardigan, Cardigan Welsh corgi", "cardigan", "crane", "crane"]


def test_labels_that_are_no_names_are_passed_over(tmp_path):
    """timm/mini-imagenet's ClassLabel has wnids, one without names has numbers."""
    facts = SETS["mini-imagenet"]
    folder = write_files(tmp_path / "files", [f"name {index}" for index in range(1000)], ["{c}"])
    indices = [column for [column] in facts.columns()]
    found = resolve_names(100, label_names=facts.label_names(), folder=folder, indices=indices)
    assert (found.class_names[:3], found.source) == (["name 12", "name 15", "name 51"], "files in files")
    with pytest.raises(ValueError, match=r"ClassLabel of timm/mini-imagenet has WordNet ids"):
        resolve_names(100, label_names=facts.label_names(), label_names_of="timm/mini-imagenet")
    with pytest.raises(ValueError, match=r"ClassLabel of x has numbers"):
        resolve_names(3, label_names=ClassLabel(num_classes=3).names, label_names_of="x")


def test_a_source_without_templates_leaves_them_to_the_next(caplog, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "files", ["a", "b"])
    found = resolve_names(2, folder=folder)
    assert (found.templates, found.templates_source) == (["a photo of a {}."], "default")
    assert "No source has templates" in caplog.text
    assert "the folder" in caplog.text
    assert "has no zeroshot_classification_templates.txt" in caplog.text
    install_open_clip(monkeypatch, tmp_path / "site")
    found = resolve_names(2, folder=folder)
    assert (found.class_names, found.source) == (["a", "b"], "files in files")
    assert (found.templates, found.templates_source) == (OPEN_CLIP_TEMPLATES, "open_clip_torch 3.3.0")


def test_without_a_source_the_error_names_all_four():
    with pytest.raises(ValueError, match="names of 10 classes, got none") as caught:
        resolve_names(10)
    message = str(caught.value)
    for cure in ("`class_names`", "ClassLabel", "classnames.txt", HUB, "pip install open_clip_torch", "LocalEntry"):
        assert cure in message


def test_the_hub_is_asked_once_and_only_when_its_turn_comes(monkeypatch, tmp_path):
    asked = []

    def download(repo_id, filename, *, repo_type):
        asked.append((repo_id, filename, repo_type))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    resolve_names(2, class_names=["a", "b"], templates=["{}"])
    resolve_names(2, folder=write_files(tmp_path / "files", ["a", "b"], ["{c}"]))
    assert asked == []
    with pytest.raises(ValueError, match="LocalEntryNotFoundError"):
        resolve_names(2)
    assert asked == [(HUB, "classnames.txt", "dataset")]


def test_the_number_of_names_is_checked_and_blank_lines_are_none(tmp_path):
    folder = write_files(tmp_path / "files", ["a", "", "  b  ", ""], ["{c}"])
    assert resolve_names(2, folder=folder).class_names == ["a", "b"]
    with pytest.raises(ValueError, match=r"Expected 3 class names, got 2 \(source: files in files\)"):
        resolve_names(3, folder=folder)
    with pytest.raises(ValueError, match=r"Expected 3 class names, got 1 \(source: user\)"):
        resolve_names(3, class_names=["a"], folder=folder)
    with pytest.raises(ValueError, match=r"Expected 1 class names, got 2 \(source: ClassLabel of the data set\)"):
        resolve_names(1, label_names=["a", "b"])
    with pytest.raises(ValueError, match="a name for class 1, got ' '"):
        resolve_names(2, class_names=["a", " "], templates=["{}"])
    for option in ("class_names", "templates"):
        with pytest.raises(ValueError, match=f"`{option}` as a list of strings, got 'abc'"):
            resolve_names(3, **{option: "abc"})
    write_files(folder, templates=["a photo"])
    with pytest.raises(ValueError, match=r"in every template, got 'a photo'.*\(source: files in files\)"):
        resolve_names(2, folder=folder)
