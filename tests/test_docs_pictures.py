"""The pictures of the explanations: their lines against slow loops, the committed files against their lines."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
from PIL import Image
from toys import ROOT

spec = importlib.util.spec_from_file_location("docs_pictures", ROOT / "docs" / "pictures.py")
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


@pytest.fixture(scope="module", params=list(pictures.PICTURES))
def drawn(request):
    return request.param, pictures.PICTURES[request.param]()


def test_the_committed_pictures_show_these_numbers(drawn):
    name, figure = drawn
    with Image.open(pictures.FOLDER / name) as image:
        assert image.info["Description"] == pictures.numbers(figure), "run `python docs/pictures.py`"
        assert image.size == (640, 380)


def test_each_page_shows_its_picture(drawn):
    name, _ = drawn
    page = (pictures.FOLDER / name).with_suffix(".md").read_text(encoding="utf-8")
    assert page.count(f"]({name})") == 1


@pytest.mark.parametrize("rows", [512, 32_768])
def test_the_expected_ece_is_that_of_many_draws(rows):
    """Correct answers drawn by bins: binomial hits about the mean confidence; the formula takes them as normal."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(300):
        confidences = generator.beta(5, 1, rows)
        hits = generator.random(rows) < confidences
        gaps = [0.0] * 10
        places = np.minimum((confidences * 10).astype(int), 9)
        for b in range(10):
            gaps[b] = abs(float((hits[places == b] - confidences[places == b]).sum())) / rows
        found.append(sum(gaps))
    assert pictures.expected_ece(rows) == pytest.approx(np.mean(found), rel=0.06)


def test_the_share_of_the_pretrained_weights_is_a_product_of_momenta():
    """Of the ramp by hand: .05 + .85 k / 5,006, then .9; of the beta mean by the densities themselves."""
    at, shares = pictures.pretrained_share(500, pictures.ema_momentum)
    expected = math.prod(0.05 + 0.85 * step / 5_006 if step < 5_006 else 0.9 for step in range(500, 6_001, 500))
    assert shares[at.index(6_000)] == pytest.approx(expected, rel=1e-12)
    at, shares = pictures.pretrained_share(1, pictures.beta_momentum)
    places = [(step + 0.5) / 25_031 for step in range(2_001)]
    weights = [1 / math.sqrt(place * (1 - place)) for place in places]  # Beta(1/2, 1/2) up to a factor
    assert shares[at.index(2_000)] == pytest.approx(weights[0] / sum(weights), rel=1e-9)
