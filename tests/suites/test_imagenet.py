"""The facts of the ImageNet family: tables that hang together, and maps that put a logit in its place."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from toys import ROOT, Noise

from carot_hf import ShiftSet
from carot_hf.suites.imagenet.sets import NUM_CLASSES, SETS, SHIFTS, wnids

# Known from the papers, the Hub pages and WordNet, not from the table: index, wnid.
KNOWN_WNIDS = {
    0: "n01440764",  # tench
    134: "n02012849",  # crane, the bird
    207: "n02099601",  # golden retriever
    281: "n02123045",  # tabby
    517: "n03126707",  # crane, the machine
    610: "n03595614",  # jersey, T-shirt
    999: "n15075141",  # toilet paper
}


def test_wnids_are_sorted_distinct_and_well_formed():
    ids = wnids()
    assert len(ids) == 1000
    assert all(before < after for before, after in itertools.pairwise(ids))
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in ids)
    assert {index: ids[index] for index in KNOWN_WNIDS} == KNOWN_WNIDS


@pytest.mark.parametrize(
    ("name", "size", "total", "first", "last"),
    [
        # sums of the indices as timm 1.0.31 lists them; first and last folder of the published archives
        ("r", 200, 86_135, "n01443537", "n12267677"),
        ("a", 200, 102_178, "n01498041", "n12267677"),
        ("mini-imagenet", 100, 52_529, "n01532829", "n13133613"),
    ],
)
def test_subsets_ascend_with_the_wnid(name, size, total, first, last):
    columns = [column for [column] in SETS[name].columns()]
    assert len(columns) == size == SETS[name].num_labels
    assert all(before < after for before, after in itertools.pairwise(columns))
    assert sum(columns) == total
    names = SETS[name].label_names()
    assert (names[0], names[-1]) == (first, last)
    assert list(names) == sorted(names)


def test_imagenet_r_and_a_share_86_classes():
    r, a = ({column for [column] in SETS[name].columns()} for name in "ra")
    assert len(r & a) == 86


def test_objectnet_labels_are_sorted_folders_and_no_class_occurs_twice():
    facts = SETS["objectnet"]
    folders, columns = facts.label_names(), facts.columns()
    assert len(folders) == len(columns) == 113
    assert list(folders) == sorted(folders)
    assert (folders[0], folders[91], folders[112]) == ("alarm_clock", "t-shirt", "wok")
    assert Counter(map(len, columns)) == {1: 104, 2: 6, 3: 3}
    flat = [column for group in columns for column in group]
    assert len(flat) == len(set(flat)) == 125
    known = {"alarm_clock": {409, 530}, "chair": {423, 559, 765}, "t-shirt": {610}, "toilet_paper_roll": {999}}
    assert {name: set(columns[folders.index(name)]) for name in known} == known


def test_rows_and_rules_of_each_set():
    assert {name: dict(facts.rows) for name, facts in SETS.items()} == {
        "imagenet": {"train": 1281167, "validation": 50000},
        "v2": {"test": 10000},
        "r": {"test": 30000},
        "a": {"test": 7500},
        "sketch": {"test": 50889},
        "objectnet": {"test": 18574},
        "hard": {"validation": None},
        "mini-imagenet": {"train": 50000, "validation": 10000, "test": 5000},
    }
    assert set(SHIFTS) < set(SETS)
    assert [name for name, facts in SETS.items() if facts.test_only or facts.crop_border] == ["objectnet", "hard"]
    assert SETS["objectnet"].crop_border == 2
    assert [name for name, facts in SETS.items() if facts.gated] == ["imagenet"]
    assert [name for name, facts in SETS.items() if facts.layout == "parquet"] == ["imagenet", "hard", "mini-imagenet"]
    assert [name for name, facts in SETS.items() if facts.several_right] == ["hard"]
    assert not any(facts.exif for facts in SETS.values())
    assert SETS["imagenet"].splits == ("train", "validation")
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETS["v2"].num_labels = 3


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_a_name_and_columns_for_each_label(name):
    facts = SETS[name]
    columns = facts.columns()
    assert facts.name == name
    assert len(facts.label_names()) == facts.num_labels
    if columns is None:
        assert facts.num_labels == NUM_CLASSES
        assert facts.label_names() == wnids()
    else:
        assert len(columns) == facts.num_labels
        assert all(0 <= column < NUM_CLASSES for group in columns for column in group)
        columns[0].append(-1)  # the caller's own copy
        assert facts.columns() != columns


def through(name, logits):
    facts = SETS[name]
    data = Noise(2, 0)
    shift = ShiftSet(data, name=name, num_classes=NUM_CLASSES, columns=facts.columns(), labels=data.labels)
    return shift.select(logits)


def test_columns_put_a_logit_in_its_place():
    """Class 1 (goldfish) is label 0 of -R and no class of -A; class 6 (stingray) is label 3 of -R and 0 of -A."""
    logits = torch.zeros(2, NUM_CLASSES)
    logits[0, 1], logits[1, 6] = 5.0, 7.0
    for name, label in {"r": 3, "a": 0}.items():
        picked = through(name, logits)
        assert picked.shape == (2, 200)
        assert (picked[1].argmax().item(), picked[1].max().item()) == (label, 7.0)
    assert through("r", logits)[0, 0] == 5.0
    assert through("a", logits)[0].eq(0).all()
    assert torch.equal(through("sketch", logits), logits)


def test_objectnet_takes_the_best_of_a_labels_classes():
    """A chair is a barber, folding or rocking chair: the best logit, not their sum or mean."""
    logits = torch.full((1, NUM_CLASSES), -9.0)
    logits[0, [423, 559, 765]] = torch.tensor([1.0, 3.0, 2.0])  # chair
    logits[0, 409] = 2.5  # alarm_clock: analog clock
    logits[0, 610] = 2.9  # t-shirt
    picked = through("objectnet", logits)
    assert picked.shape == (1, 113)
    folders = SETS["objectnet"].label_names()
    best = {folders[index]: picked[0, index].item() for index in picked[0].argsort(descending=True)[:3]}
    assert best == pytest.approx({"chair": 3.0, "t-shirt": 2.9, "alarm_clock": 2.5})
    assert picked.sort().values[0, :110].eq(-9).all()


def test_importing_reads_nothing_and_no_library():
    code = (
        "import sys, carot_hf.suites.imagenet.sets as i;"
        "print(i._tables.cache_info().currsize, [m for m in ('torch', 'numpy', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "0 []"
