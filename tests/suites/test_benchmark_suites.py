"""The benchmarks from small local copies in the layouts of the Hub: what is trained, calibrated and judged on."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import numpy as np
import pytest
from layouts import content, picture, table, tars
from toys import ROOT

from carot_hf import load_suite
from carot_hf.data.stream import StreamedSet
from carot_hf.suites.benchmarks.table import Part, benchmark, benchmarks

PACS = ("photo", "art_painting", "cartoon", "sketch")
SIZES = dict(zip(PACS, (20, 6, 5, 4), strict=True))  # images a class


def domain_rows(sizes, classes, seed=0):
    """Labels and domains in a mixed order, so many images of each class in each domain."""
    pairs = [(label, name) for name, size in sizes.items() for label in range(classes) for _ in range(size)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[row][0] for row in order], [pairs[row][1] for row in order]


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pacs")
    labels, domains = domain_rows(SIZES, 7)
    features = {
        "label": datasets.ClassLabel(names=benchmarks()["pacs"].class_names),
        "domain": datasets.Value("string"),
    }
    table(root / "flwrlabs/pacs", "train", labels, features, files=3, domain=domains)
    return root, labels, domains


def rows_of(data):
    """The rows of a set, by what its images say."""
    return sorted(content(data))


def expected(labels, domains, wanted):
    pairs = enumerate(zip(labels, domains, strict=True))
    return sorted((label, label, row % 256) for row, (label, name) in pairs if name in wanted)


# ---- one domain is home ----


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "home"), [({}, "photo"), ({"home": "cartoon"}, "cartoon"), ({"home": "Art Painting"}, "art_painting")]
)
def test_the_home_domain_is_trained_calibrated_and_tested_on_and_the_others_are_shifts(pacs, streaming, options, home):
    root, labels, domains = pacs
    suite = load_suite("pacs", root=root, check_counts=False, streaming=streaming, **options)
    assert suite.test.name == home
    assert list(suite.shifts) == [name for name in PACS if name != home]
    for name, data in suite.shifts.items():
        assert isinstance(data, StreamedSet) is streaming
        assert len(data) == 7 * SIZES[name]
        assert rows_of(data) == expected(labels, domains, [name])
    parts = [rows_of(data) for data in (suite.train, suite.validation, suite.test)]
    assert sorted(row for part in parts for row in part) == expected(labels, domains, [home])  # disjoint, together all
    size = SIZES[home]
    held = [max(1, round(0.1 * size)), max(1, round((size - max(1, round(0.1 * size))) * 0.2 / 0.9))]
    for part, each in zip(parts, [size - sum(held), *held], strict=True):
        assert Counter(label for label, _, _ in part) == dict.fromkeys(range(7), each)


def test_the_shares_are_a_tenth_and_a_fifth_of_each_class_of_home(pacs):
    suite = load_suite("pacs", root=pacs[0], check_counts=False)
    assert [len(data) for data in (suite.train, suite.validation, suite.test)] == [7 * 14, 7 * 2, 7 * 4]


@pytest.mark.parametrize("streaming", [False, True])
def test_one_domain_is_left_out(pacs, streaming):
    root, labels, domains = pacs
    suite = load_suite("pacs", root=root, check_counts=False, held_out="sketch", streaming=streaming)
    assert (suite.test.name, list(suite.shifts)) == ("home", ["sketch"])
    assert rows_of(suite.shifts["sketch"]) == expected(labels, domains, ["sketch"])
    parts = [rows_of(data) for data in (suite.train, suite.validation, suite.test)]
    assert sorted(row for part in parts for row in part) == expected(labels, domains, PACS[:3])
    of_rows = dict(enumerate(domains))
    found = Counter((label, of_rows[row]) for label, _, row in parts[1])
    assert found == {(label, name): max(1, round(0.1 * SIZES[name])) for label in range(7) for name in PACS[:3]}


def test_what_is_held_out_depends_on_the_seed_alone(pacs):
    load = [load_suite("pacs", root=pacs[0], check_counts=False, seed=seed) for seed in (0, 0, 1)]
    found = [rows_of(suite.validation) for suite in load]
    assert found[0] == found[1] != found[2]
    assert load[0].content_hash == load[1].content_hash != load[2].content_hash
    streamed = load_suite("pacs", root=pacs[0], check_counts=False, streaming=True)
    assert rows_of(streamed.validation) == found[0]


def test_labels_are_matched_by_name_in_whatever_order_the_copy_has_them(tmp_path):
    names = benchmarks()["pacs"].class_names
    turned = names[::-1]
    labels, domains = domain_rows(dict.fromkeys(PACS, 3), 7)
    features = {"label": datasets.ClassLabel(names=turned), "domain": datasets.Value("string")}
    table(tmp_path / "pacs", "train", labels, features, domain=domains)
    suite = load_suite("pacs", root=tmp_path, check_counts=False)
    for data in (suite.train, suite.test, *suite.shifts.values()):
        assert all(names[label] == turned[painted] for label, painted, _ in content(data))


def test_some_of_the_shifts(pacs):
    suite = load_suite("pacs", root=pacs[0], check_counts=False, shifts=["sketch"])
    assert list(suite.shifts) == ["sketch"]
    for wrong in (["photo"], ["sketch", "sketch"], "sketch"):
        with pytest.raises(
            ValueError, match=r"distinct names out of \['art_painting', 'cartoon', 'sketch'\] for 'pacs'"
        ):
            load_suite("pacs", root=pacs[0], check_counts=False, shifts=wrong)


def test_office_home_has_names_of_words(tmp_path):
    facts = benchmarks()["office-home"]
    labels, domains = domain_rows(dict.fromkeys(facts.domains.values(), 3), 65)
    features = {"label": datasets.ClassLabel(names=list(facts.labels)), "domain": datasets.Value("string")}
    table(tmp_path / "office-home", "train", labels, features, domain=domains)
    suite = load_suite("office-home", root=tmp_path, check_counts=False)
    assert suite.test.name == "real_world"
    assert [suite.class_names[index] for index in (0, 21, 44, 58, 61)] == [
        "alarm clock", "flip-flops", "post-it notes", "TV", "toothbrush",
    ]  # fmt: skip
    assert rows_of(suite.shifts["clipart"]) == expected(labels, domains, ["Clipart"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["ClassLabel", "text and y"])
def test_domainnet_has_a_test_split_of_its_own(tmp_path, streaming, form):
    facts = benchmarks()["domainnet"]
    names, column = list(facts.domains), "label" if form == "ClassLabel" else "y"
    kinds = {
        column: datasets.ClassLabel(names=list(facts.labels)) if form == "ClassLabel" else datasets.Value("int64"),
        "domain": datasets.ClassLabel(names=names[::-1]) if form == "ClassLabel" else datasets.Value("string"),
    }
    rows = {}
    for split, seed in (("train", 0), ("test", 1)):
        labels, domains = domain_rows(dict.fromkeys(names, 3), 3, seed)
        rows[split] = labels, domains
        given = [names[::-1].index(name) for name in domains] if form == "ClassLabel" else domains
        table(tmp_path / "wltjr1007/DomainNet", split, labels, kinds, domain=given)
    suite = load_suite("domainnet", root=tmp_path, check_counts=False, home="real", streaming=streaming)
    assert len(suite.class_names) == 345
    assert suite.class_names[0] == "aircraft carrier"
    parts = [rows_of(data) for data in (suite.train, suite.validation)]
    assert sorted(row for part in parts for row in part) == expected(*rows["train"], ["real"])
    assert rows_of(suite.test) == expected(*rows["test"], ["real"])
    assert rows_of(suite.shifts["sketch"]) == expected(*rows["test"], ["sketch"])
    assert len(suite.shifts) == 5


# ---- roles of their own ----


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["numbers", "ClassLabel"])
def test_camelyon_is_calibrated_and_tested_at_home_and_judged_at_two_other_hospitals(tmp_path, streaming, kind):
    named = kind == "ClassLabel"
    features = {
        "label": datasets.Value("int64"),
        "center": datasets.ClassLabel(names=[f"c{index}" for index in range(5)]) if named else datasets.Value("int64"),
    }
    centers = {"train": [0, 3, 4], "validation": [0, 3, 4, 1], "test": [2]}
    rows = {}
    for split, wanted in centers.items():
        rows[split] = domain_rows(dict.fromkeys(wanted, 8), 2, seed=len(split))
        table(tmp_path / "Camelyon17-WILDS", split, rows[split][0], features, center=rows[split][1])
    suite = load_suite("camelyon17", root=tmp_path, check_counts=False, streaming=streaming)
    assert rows_of(suite.train) == expected(*rows["train"], [0, 3, 4])
    assert isinstance(suite.train, StreamedSet) is streaming  # nothing is cut of it
    parts = [rows_of(data) for data in (suite.validation, suite.test)]
    assert sorted(row for part in parts for row in part) == expected(*rows["validation"], [0, 3, 4])
    assert [len(part) for part in parts] == [24, 24]
    assert list(suite.shifts) == ["hospital1", "hospital2"]
    assert rows_of(suite.shifts["hospital1"]) == expected(*rows["validation"], [1])
    assert rows_of(suite.shifts["hospital2"]) == expected(*rows["test"], [2])
    assert suite.test.name == "home"


def waterbirds(root, kinds=("numbers", "numbers"), turned=False):
    """Labels and places of the three splits, and a copy of them."""
    names = (["landbird", "waterbird"], ["land", "water"])
    names = tuple(part[::-1] for part in names) if turned else names
    features = {
        column: datasets.ClassLabel(names=own) if kind == "ClassLabel" else datasets.Value("int64")
        for column, own, kind in zip(("label", "place"), names, kinds, strict=True)
    }
    rows = {}
    for split, seed in (("train", 0), ("validation", 1), ("test", 2)):
        rng = np.random.default_rng(seed)
        rows[split] = rng.integers(0, 2, 30).tolist(), rng.integers(0, 2, 30).tolist()
        table(root / "grodino/waterbirds", split, rows[split][0], features, files=2, place=rows[split][1])
    return rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("kinds", "turned"), [(("numbers", "numbers"), False), (("ClassLabel", "ClassLabel"), True)])
def test_waterbirds_has_four_groups(tmp_path, streaming, kinds, turned):
    rows = waterbirds(tmp_path, kinds, turned)
    suite = load_suite("waterbirds", root=tmp_path, check_counts=False, streaming=streaming)
    assert suite.shifts == {}
    for split, data in (("train", suite.train), ("validation", suite.validation), ("test", suite.test)):
        labels, places = (np.array(part) if not turned else 1 - np.array(part) for part in rows[split])
        assert data.groups.names == ("landbird, land", "landbird, water", "waterbird, land", "waterbird, water")
        assert data.groups.codes.tolist() == (2 * labels + places).tolist()
        assert [label for label, *_ in rows_of(data)] == sorted(labels)


@pytest.mark.parametrize("streaming", [False, True])
def test_stl10_is_a_shift_of_cifar10_by_names(tmp_path, streaming):
    facts = benchmarks()
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 10)).tolist()
    features = {"label": datasets.ClassLabel(names=facts["cifar10"].class_names)}
    table(tmp_path / "uoft-cs/cifar10", "train", labels, features, image="img")
    table(tmp_path / "uoft-cs/cifar10", "test", list(range(10)), features, image="img")
    tars(tmp_path / "djghosh/wds_stl10_test" / "test", np.repeat(np.arange(10), 2), image="webp", files=2)
    suite = load_suite("cifar10", root=tmp_path, check_counts=False, streaming=streaming)
    found = rows_of(suite.shifts["stl10"])
    assert len(found) == len(suite.shifts["stl10"]) == 18  # no monkeys
    names = {label: facts["stl10"].class_names[painted] for label, painted, _ in found}
    assert names == {
        0: "airplane",
        1: "car",
        2: "bird",
        3: "cat",
        4: "deer",
        5: "dog",
        7: "horse",
        8: "ship",
        9: "truck",
    }
    assert suite.shifts["stl10"].columns is None
    assert [len(data) for data in (suite.train, suite.validation, suite.test)] == [90, 10, 10]
    alone = load_suite("stl10", root=tmp_path, check_counts=False, streaming=streaming)
    assert (alone.train, alone.validation, len(alone.test), alone.shifts) == (None, None, 20, {})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "classes", "first"), [("iwildcam", 182, "empty"), ("fmow", 62, "airport")])
def test_the_test_sets_of_wilds_are_evaluated_only(tmp_path, streaming, name, classes, first):
    tars(tmp_path / name / "test", np.arange(0, classes, 5), image="png")
    suite = load_suite(name, root=tmp_path, check_counts=False, streaming=streaming)
    assert (len(suite.class_names), suite.class_names[0]) == (classes, first)
    assert (suite.train, suite.validation, suite.test.name) == (None, None, name)
    assert [label for label, *_ in rows_of(suite.test)] == list(range(0, classes, 5))


# ---- refusals ----


def test_another_number_of_rows_is_refused(pacs, tmp_path):
    with pytest.raises(
        ValueError, match=r"1,670 rows in 'train' \(PACS\), got 140\. .*`check_counts=False` \(`--partial`\)"
    ):
        load_suite("pacs", root=pacs[0])
    waterbirds(tmp_path)
    with pytest.raises(ValueError, match=r"Expected 4,795 rows in 'train' \(Waterbirds\), got 30"):
        load_suite("waterbirds", root=tmp_path)


def test_a_stream_of_another_number_of_rows_is_refused_when_it_is_read(tmp_path, model, processor):
    from carot_hf import Evaluator

    tars(tmp_path / "fmow" / "test", np.arange(0, 62, 5), image="png")
    suite = load_suite("fmow", root=tmp_path, streaming=True)
    assert len(suite.test) == 22_108
    with pytest.raises(ValueError, match="Expected 22,108 rows in set 'fmow', read 13"):
        Evaluator(model, processor, suite).evaluate()


def test_counts_that_are_right_pass_and_a_missing_label_does_not(tmp_path, monkeypatch):
    content = {
        "title": "Toy", "id": "me/toy", "layout": "parquet", "image": ["image"], "label": ["label"],
        "rows": {"test": 4}, "every_label": True, "labels": ["cat", "dog"], "templates": ["a {}"],
        "names_source": "mine", "licence": "mine", "test": {"split": "test"}, "shifts": {},
        "verified": "all", "not_verified": "nothing",
    }  # fmt: skip
    monkeypatch.setitem(benchmarks(), "toy", benchmark("toy", content))
    for folder, labels in (("right", [0, 1, 1, 0]), ("wrong", [0, 0, 0, 0])):
        table(tmp_path / folder / "toy", "test", labels, {"label": datasets.Value("int64")})
    assert len(load_suite("toy", root=tmp_path / "right").test) == 4
    with pytest.raises(
        ValueError, match=r"largest label 1 and 2 distinct labels in 'toy', got 4 rows, largest label 0"
    ):
        load_suite("toy", root=tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"toy\.lables: expected one of the keys"):
        benchmark("toy", {**content, "lables": []})
    with pytest.raises(ValueError, match=r"toy\.test\.splt: expected one of the keys"):
        benchmark("toy", {**content, "test": {"splt": "test"}})


def test_unknown_domains_and_both_at_once_are_refused(pacs):
    for option in ("home", "held_out"):
        with pytest.raises(
            ValueError,
            match=r"one of the domains \['photo', 'art_painting', 'cartoon', 'sketch'\] of 'pacs', got 'foto'",
        ):
            load_suite("pacs", root=pacs[0], **{option: "foto"})
        with pytest.raises(ValueError, match=f"Expected no `{option}` with 'waterbirds', which has no domains"):
            load_suite("waterbirds", root=pacs[0], **{option: "photo"})
        for other in ("digits", "imagenet", str(ROOT / "examples/suites/pets.yaml")):
            with pytest.raises(ValueError, match=rf"got \['{option}'\]"):
                load_suite(other, **{option: "photo"})
    with pytest.raises(ValueError, match=r"`home` or `held_out`, got both \('photo', 'sketch'\)"):
        load_suite("pacs", root=pacs[0], home="photo", held_out="sketch")


def test_a_copy_of_another_version_is_refused(tmp_path):
    labels, domains = domain_rows(dict.fromkeys([*PACS, "clay"], 3), 7)
    features = {"label": datasets.Value("int64"), "domain": datasets.Value("string")}
    table(tmp_path / "a/pacs", "train", labels, features, domain=domains)
    with pytest.raises(ValueError, match=r"PACS, column 'domain', to say one of \['photo', .*got 'clay'"):
        load_suite("pacs", root=tmp_path / "a", check_counts=False)
    table(tmp_path / "b/pacs", "train", labels, {"label": datasets.Value("int64")})
    with pytest.raises(ValueError, match=r"Expected a column 'domain' of domains in PACS, got \['image', 'label'\]"):
        load_suite("pacs", root=tmp_path / "b", check_counts=False)
    domains = ["photo" if name == "clay" else name for name in domains]
    for place, kind in (("c", datasets.ClassLabel(names=list("abcdefg"))), ("d", datasets.Value("int64"))):
        table(tmp_path / place / "pacs", "train", labels if place == "c" else [9] * len(labels),
              {"label": kind, "domain": datasets.Value("string")}, domain=domains)  # fmt: skip
    with pytest.raises(ValueError, match=r"called as the 7 classes .* got \['a', 'b'"):
        load_suite("pacs", root=tmp_path / "c", check_counts=False)
    with pytest.raises(ValueError, match=r"labels in \[0, 7\)"):
        load_suite("pacs", root=tmp_path / "d", check_counts=False)
    alone = ["photo"] * len(labels)
    table(tmp_path / "e/pacs", "train", labels, features, domain=alone)
    with pytest.raises(ValueError, match="Expected rows of the domain art_painting in split 'train' of PACS, got none"):
        load_suite("pacs", root=tmp_path / "e", check_counts=False)


def test_a_missing_copy_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"a local copy of 'pacs' in one of \['.*pacs'.*hf download flwrlabs/pacs"):
        load_suite("pacs", root=tmp_path)
    with pytest.raises(ValueError, match="Expected a folder of local copies as `root`"):
        load_suite("pacs", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a benchmark out of pacs, office-home, .*got 'pcas'"):
        load_suite("pcas")


def test_several_labels_an_image_are_refused(tmp_path):
    labels = [[0, 3], [1]]
    images = [{"bytes": picture(0, row), "path": None} for row in range(2)]
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())
    (tmp_path / "pacs/data").mkdir(parents=True)
    rows.add_column("domain", ["photo", "sketch"]).to_parquet(tmp_path / "pacs/data/train-0.parquet")
    with pytest.raises(ValueError, match=r"got a list \(\[0, 3\]\): pass one class index a row"):
        load_suite("pacs", root=tmp_path, check_counts=False)


# ---- the table ----


def test_the_table_adds_up():
    facts = benchmarks()
    totals = {name: {split: sum(rows.values()) if isinstance(rows, dict) else rows for split, rows in one.rows.items()}
              for name, one in facts.items()}  # fmt: skip
    assert totals["pacs"] == {"train": 9_991}
    assert totals["office-home"] == {"train": 15_588}
    assert totals["domainnet"] == {"train": 409_832, "test": 176_743}
    assert totals["camelyon17"] == {"train": 302_436, "validation": 33_560 + 34_904, "test": 85_054}
    assert sum(totals["waterbirds"].values()) == 11_788
    assert {name: len(one.labels) for name, one in facts.items()} == {
        "pacs": 7, "office-home": 65, "domainnet": 345, "camelyon17": 2, "waterbirds": 2, "cifar10": 10, "stl10": 10,
        "iwildcam": 182, "fmow": 62,
    }  # fmt: skip
    for name, one in facts.items():
        roles = one.roles([one.home] if one.home else [])
        parts = [
            part
            for part in (roles.train, roles.validation, roles.test, *roles.shifts.values())
            if isinstance(part, Part)
        ]
        assert all((facts[part.of] if part.of else one).expected(part) for part in parts), name
        assert one.templates
        assert all(template.count("{}") == 1 for template in one.templates)
        assert one.verified
        assert one.not_verified
        distinct = len(set(one.class_names))
        assert distinct == len(one.class_names) - (4 if name == "iwildcam" else 0), name
        assert not any("_" in text for text in one.class_names)


def test_the_published_lengths_of_files_of_names():
    """The Hub's pages say how long `classnames.txt` of two repositories is: a check of names that could not be seen."""
    facts = benchmarks()
    assert len("\n".join(facts["fmow"].class_names) + "\n") == 871
    assert len("\n".join(facts["camelyon17"].class_names) + "\n") == 57


def test_domains_of_the_card_of_the_suite_are_those_of_the_hub():
    assert json.dumps(benchmarks()["office-home"].domains) == (
        '{"art": "Art", "clipart": "Clipart", "product": "Product", "real_world": "Real World"}'
    )
