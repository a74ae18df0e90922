"""The density calibrator: recovered on synthetic rows, by hand, its limits, its files, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import EXACT

from carot_hf import DensityCalibrator, calibration_metrics, fit_density, fit_temperature
from carot_hf.calibration.metrics import read_set
from carot_hf.calibration.nearest import density, near_density
from carot_hf.calibration.sigmoid import fit_sigmoid

DOUBLE = {"dtype": torch.float64}


def spaced(probabilities, generator):
    """Labels whose share among rows of one probability is that probability: at spaced quantiles, in random order."""
    n = len(probabilities)
    levels = ((torch.arange(n, **DOUBLE) + 0.5) / n)[torch.randperm(n, generator=generator)]
    return (levels[:, None] > probabilities.cumsum(1)).sum(1).clamp(max=probabilities.shape[1] - 1)


@pytest.fixture(scope="module")
def rows():
    """20,000 rows of five classes whose temperature is known: a = .4, b = .3."""
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(200, 8, generator=generator, **DOUBLE), dim=1)
    embeds = F.normalize(torch.randn(20_000, 8, generator=generator, **DOUBLE), dim=1)
    distances = density(embeds, bank.half(), 10)
    points = (distances - distances.mean()) / distances.std(correction=0)
    logits = 4 * torch.randn(20_000, 5, generator=generator, **DOUBLE)
    labels = spaced((logits / (0.4 + 0.3 * points).exp()[:, None]).softmax(1), generator)
    weights = torch.rand(20_000, generator=generator, **DOUBLE)
    return logits, embeds, labels, bank, weights


def test_what_the_rows_were_made_with_is_found(rows):
    logits, embeds, labels, bank, _ = rows
    found = fit_density(logits, embeds, labels, bank)
    assert found.a == pytest.approx(0.4, rel=0.01)
    assert found.b == pytest.approx(0.3, rel=0.01)
    assert found.bank.dtype == torch.float16
    # and it is where the derivatives of the stated objective vanish, by differences
    points = found.standardised(density(embeds, found.bank, 10))

    def objective(a, b):
        scaled = logits / (a + b * points).exp()[:, None]
        return float(F.cross_entropy(scaled, labels)) + 1e-3 * b * b

    for step in (1e-4, -1e-4):
        assert objective(found.a + step, found.b) > objective(found.a, found.b)
        assert objective(found.a, found.b + step) > objective(found.a, found.b)


@pytest.mark.parametrize("weighted", [False, True])
def test_images_of_one_density_get_the_temperature_of_the_rows(rows, weighted):
    logits, embeds, labels, bank, weights = rows
    options = {"sample_weight": weights} if weighted else {}
    found = fit_density(logits, embeds[:1].expand(len(embeds), 8), labels, bank, **options)
    assert (found.b, found.sigma) == (0.0, 0.0)
    assert math.exp(found.a) == pytest.approx(fit_temperature(logits, labels, **options), abs=1e-8)


def test_weights_count_as_copies(rows):
    logits, embeds, labels, bank, _ = (part[:300] for part in rows)
    twice = torch.tensor([1.0, 2.0, 0.0] * 100)
    rows_twice = torch.arange(300).repeat_interleave(twice.long())
    assert fit_temperature(logits, labels, sample_weight=twice) == pytest.approx(
        fit_temperature(logits[rows_twice], labels[rows_twice]), rel=1e-9
    )
    assert fit_sigmoid(logits, labels, sample_weight=twice) == pytest.approx(
        fit_sigmoid(logits[rows_twice], labels[rows_twice]), rel=1e-6
    )
    weighted = fit_density(logits, embeds, labels, bank, sample_weight=twice)
    assert weighted.a != fit_density(logits, embeds, labels, bank).a
    with pytest.raises(ValueError, match="no `sample_weight` with the criterion 'ece'"):
        fit_temperature(logits, labels, criterion="ece", sample_weight=twice)


def test_a_bank_of_one_image_by_hand():
    bank = torch.tensor([[1.0, 0.0]])
    calibrator = DensityCalibrator(bank.half(), k=1, mu=-1.0, sigma=2.0, a=0.5, b=0.25)
    embeds = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], **DOUBLE)
    for row, cosine in zip(calibrator.temperature(embeds).tolist(), (1.0, 0.0, -1.0), strict=True):
        assert row == pytest.approx(math.exp(0.5 + 0.25 * (math.log(1.0001 - cosine) + 1.0) / 2.0), rel=EXACT)
    divided = calibrator.relative_to(2.0).temperature(embeds)
    torch.testing.assert_close(divided, calibrator.temperature(embeds) / 2, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("k", [1, 10, 77])
def test_the_nearest_images_are_those_of_a_slow_loop(k):
    """More rows and more bank than a block holds; the order of the bank does not matter."""
    generator = torch.Generator().manual_seed(1)
    bank = torch.randn(9000, 4, generator=generator).half()
    embeds = torch.randn(4100, 4, generator=generator, **DOUBLE)
    found = density(embeds, bank, k)
    unit = F.normalize(bank.double(), dim=1).numpy()
    for row in (0, 17, 1023, 1024, 4099):
        cosines = np.sort(unit @ (embeds[row] / embeds[row].norm()).numpy())[::-1]
        assert float(found[row]) == pytest.approx(math.log(1.0001 - min(1.0, cosines[:k].mean())), abs=1e-9)
    shuffled = bank[torch.randperm(9000, generator=generator)]
    torch.testing.assert_close(density(embeds, shuffled, k), found, atol=1e-9, rtol=0)
    torch.testing.assert_close(near_density(embeds[:9], bank, k), found[:9], atol=1e-9, rtol=0)


def test_a_temperature_for_each_row_in_one_reading(rows):
    """Metrics at the divided logits, beside the plain ones; accuracy stays."""
    logits, embeds, labels, bank, _ = (part[:500] for part in rows)
    calibrator = fit_density(logits, embeds, labels, bank)
    by = calibrator.temperature(embeds)
    wanted = {"": ({}, None), "dts": ({"temperature": 1.3, "row_temperature": by}, None)}
    seen, _ = read_set(logits, labels, wanted)
    expected = calibration_metrics(logits / (1.3 * by)[:, None], labels)
    assert seen["dts"].metrics() == pytest.approx(expected, rel=EXACT)
    assert seen["dts"].metrics()["accuracy"] == seen[""].metrics()["accuracy"]
    wanted["dts"][0]["bias"] = -1.5
    expected = calibration_metrics((logits / 1.3 - 1.5) / by[:, None], labels, link="sigmoid")
    found = read_set(logits, labels, wanted, link="sigmoid")[0]["dts"].metrics()
    assert found == pytest.approx(expected, rel=EXACT)
    for bad in (by[:-1], by.clone().fill_(0.0), by.clone().fill_(float("nan"))):
        with pytest.raises(ValueError, match=r"^Expected finite temperatures above 0"):
            read_set(logits, labels, {"": ({"row_temperature": bad}, None)})


def test_a_sigmoid_is_divided_too():
    """Recovered as for the softmax, from pairs of an image and a class."""
    generator = torch.Generator().manual_seed(2)
    bank = F.normalize(torch.randn(50, 6, generator=generator, **DOUBLE), dim=1)
    embeds = F.normalize(torch.randn(8000, 6, generator=generator, **DOUBLE), dim=1)
    distances = density(embeds, bank.half(), 5)
    points = (distances - distances.mean()) / distances.std(correction=0)
    logits = 3 * torch.randn(8000, 2, generator=generator, **DOUBLE)
    logits[:, 1] = -logits[:, 0]  # so that one of both is right, with the chances of a sigmoid
    labels = spaced((logits / (0.2 - 0.4 * points).exp()[:, None]).sigmoid(), generator)
    found = fit_density(logits, embeds, labels, bank, k=5, link="sigmoid")
    assert (found.a, found.b) == pytest.approx((0.2, -0.4), abs=0.02)  # noise of 8,000 labels
    assert found.link == "sigmoid"


def test_saved_and_read_it_is_the_same(rows, tmp_path):
    logits, embeds, labels, bank, _ = rows
    calibrator = fit_density(logits, embeds, labels, bank)
    calibrator.save_pretrained(tmp_path / "model")
    again = DensityCalibrator.from_pretrained(tmp_path / "model")
    assert torch.equal(again.bank, calibrator.bank)
    assert torch.equal(again.temperature(embeds[:50]), calibrator.temperature(embeds[:50]))
    single = again.temperature(embeds[:50].float())
    torch.testing.assert_close(single.double(), calibrator.temperature(embeds[:50]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "another format"),
        ({"a": None}, "`a` is None"),
        ({"b": 1e300}, "`b` is 1e\\+300"),
        ({"b": 10**400}, "`b` is 1000"),
        ({"sigma": -1.0}, "`sigma` is -1.0"),
        ({"mu": True}, "`mu` is True"),
        ({"k": 0}, "`k` is 0 with 200"),
        ({"k": 201}, "`k` is 201 with 200"),
        ({"link": ["softmax"]}, "`link` is list"),
        ({"tower": 3}, "`tower` 3"),
        (None, "cannot be read"),
    ],
)
def test_files_of_strangers(rows, tmp_path, change, said):
    logits, embeds, labels, bank, _ = rows
    fit_density(logits[:100], embeds[:100], labels[:100], bank).save_pretrained(tmp_path)
    file = tmp_path / "calibrator.json"
    content = json.loads(file.read_text())
    file.write_text("{" if change is None else json.dumps(content | change))
    with pytest.raises(ValueError, match=f"Expected a calibrator in .*{said}.*calibrate"):
        DensityCalibrator.from_pretrained(tmp_path)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no calibrator"):
        DensityCalibrator.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 201}, "whole number from 1 to 200"),
        ({"k": 0}, "whole number from 1 to 200"),
        ({"k": 2.0}, "whole number from 1 to 200"),
        ({"bank": torch.randn(200, 7)}, "`embeds` of 7 numbers a row"),
        ({"embeds": torch.randn(3, 8)}, "`embeds` of 100 rows"),
        ({"embeds": torch.full((100, 8), math.nan)}, "Expected finite `embeds`"),
        ({"bank": torch.ones(200, 8, dtype=torch.int64)}, "`bank` of a float dtype"),
        ({"labels": torch.full((100,), 9)}, "`labels` in \\[0, 5\\)"),
        ({"start": 0.0}, "finite `temperature` above 0"),
        ({"sample_weight": torch.zeros(100)}, "weight"),
    ],
)
def test_what_is_refused(rows, change, said):
    logits, embeds, labels, bank, _ = rows
    given = {"logits": logits[:100], "embeds": embeds[:100], "labels": labels[:100], "bank": bank} | change
    with pytest.raises(ValueError, match=said):
        fit_density(**given)
