"""VRF: slow loops over rows and distances, weights by hand, both ends, the choice at home, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import reference_calibration as reference
import torch
from tolerances import EXACT

from carot_hf import VRF, fit_temperature, fit_vrf
from carot_hf.calibration.nearest import squared_distance
from carot_hf.calibration.vrf import GRID_A, GRID_B, failures

DOUBLE = {"dtype": torch.float64}


def angles(*degrees):
    """Unit vectors in a plane."""
    radians = torch.tensor(degrees, **DOUBLE).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


@pytest.fixture
def rows():
    """Logits of two models, embeddings of any length, labels that each model has right now and then; failures."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (60,), generator=generator)
    zero_shot, fine_tuned = (torch.randn(60, 5, generator=generator, **DOUBLE) * size for size in (2.0, 5.0))
    for logits, size in ((zero_shot, 2.0), (fine_tuned, 6.0)):
        logits[torch.arange(60), labels] += size
    embeds, failed = (torch.randn(size, 4, generator=generator, **DOUBLE) for size in (60, 23))
    return zero_shot, fine_tuned, embeds, labels, failed


def slow(vrf, zero_shot, fine_tuned, embeds):
    temperatures = vrf.zero_shot_temperature, vrf.fine_tuned_temperature
    weights = [reference.vrf_weight(row, vrf.failures.tolist(), vrf.k, vrf.a, vrf.b) for row in embeds.tolist()]
    triples = zip(zero_shot.tolist(), fine_tuned.tolist(), weights, strict=True)
    return weights, [reference.vrf(*triple, temperatures) for triple in triples]


@pytest.mark.parametrize(("k", "a", "b"), [(1, 1.5, 0.6), (7, 0.9, 0.05), (23, 2.0, 1.0)])
def test_weights_and_probabilities_are_those_of_the_slow_loop(rows, k, a, b):
    zero_shot, fine_tuned, embeds, labels, failed = rows
    vrf = fit_vrf(zero_shot, fine_tuned, embeds, labels, failed, k=k, a=a, b=b)
    weights, probabilities = slow(vrf, zero_shot, fine_tuned, embeds)
    np.testing.assert_allclose(vrf.weights(embeds).numpy(), weights, rtol=0, atol=EXACT)
    found = vrf.probabilities(zero_shot, fine_tuned, embeds)
    np.testing.assert_allclose(found.numpy(), probabilities, rtol=0, atol=EXACT)
    np.testing.assert_allclose(found.sum(dim=1).numpy(), 1.0, rtol=0, atol=EXACT)
    assert len({round(weight, 3) for weight in weights}) > 20


def test_weights_by_hand():
    """Squared distances are 1 at 60 degrees, 2 at 90, 4 at 180; at a the weight is 1/2."""
    vrf = VRF(angles(0.0, 90.0), k=1, a=1.0, b=0.5)
    embeds = angles(-60.0, -90.0, 0.0) * torch.tensor([[3.0], [0.1], [1.0]], **DOUBLE)
    np.testing.assert_allclose(vrf.distance(embeds).numpy(), [1.0, 2.0, 0.0], atol=EXACT)
    expected = [0.5, 1 / (1 + math.exp(2.0)), 1 / (1 + math.exp(-2.0))]
    np.testing.assert_allclose(vrf.weights(embeds).numpy(), expected, atol=EXACT)
    second = dataclasses.replace(vrf, k=2)
    np.testing.assert_allclose(second.distance(embeds[1:]).numpy(), [4.0, 2.0], atol=EXACT)


def test_published_weights():
    """a = 1.5, b = 0.6: of an image that is a failure itself 1 / (1 + exp(-2.5)), of one at a right angle .303."""
    weights = VRF(angles(0.0), k=1).weights(angles(0.0, 90.0))
    np.testing.assert_allclose(weights.numpy(), [0.924141819978757, 0.302940715958024], atol=EXACT)


def test_the_kth_nearest_of_several_blocks_is_that_of_a_sort():
    generator = torch.Generator().manual_seed(0)
    bank, embeds = (torch.randn(size, 6, generator=generator, **DOUBLE) for size in (9000, 700))
    units = [part / part.norm(dim=1, keepdim=True) for part in (embeds, bank)]
    every = np.sort(((units[0][:, None, :4] - units[1][None, :, :4]) ** 2).sum(-1).numpy()
                    + ((units[0][:, None, 4:] - units[1][None, :, 4:]) ** 2).sum(-1).numpy(), axis=1)  # fmt: skip
    for k in (1, 8, 5000):
        np.testing.assert_allclose(squared_distance(embeds, bank, k).numpy(), every[:, k - 1], rtol=0, atol=EXACT)


@pytest.mark.parametrize(("a", "which"), [(1e6, 1), (-1e6, 0)])
@pytest.mark.parametrize("b", [0.6, 1e-3])
def test_at_both_ends_it_is_one_of_the_models(rows, a, b, which):
    zero_shot, fine_tuned, embeds, labels, failed = rows
    vrf = fit_vrf(zero_shot, fine_tuned, embeds, labels, failed, a=a, b=b)
    assert (vrf.weights(embeds) == which).all()
    logits, temperature = ((zero_shot, vrf.zero_shot_temperature), (fine_tuned, vrf.fine_tuned_temperature))[which]
    found = vrf.probabilities(zero_shot, fine_tuned, embeds)
    torch.testing.assert_close(found, (logits / temperature).softmax(dim=1), rtol=0, atol=EXACT)
    assert vrf.log_mixture(zero_shot * 1e4, fine_tuned * 1e4, vrf.distance(embeds)).isfinite().all()


def test_temperatures_are_those_of_each_model_at_home(rows):
    zero_shot, fine_tuned, embeds, labels, failed = rows
    vrf = fit_vrf(zero_shot, fine_tuned, embeds, labels, failed, bounds=(0.1, 10.0))
    assert vrf.zero_shot_temperature == fit_temperature(zero_shot, labels, bounds=(0.1, 10.0))
    assert vrf.fine_tuned_temperature == fit_temperature(fine_tuned, labels, bounds=(0.1, 10.0))
    assert vrf.zero_shot_temperature != vrf.fine_tuned_temperature
    louder = fit_vrf(zero_shot * 1.5, fine_tuned, embeds, labels, failed, bounds=(0.1, 20.0))
    torch.testing.assert_close(
        louder.probabilities(zero_shot * 1.5, fine_tuned, embeds),
        vrf.probabilities(zero_shot, fine_tuned, embeds), rtol=0, atol=1e-7,  # a temperature is found to 1e-8
    )  # fmt: skip
    by_ece = fit_vrf(zero_shot, fine_tuned, embeds, labels, failed, criterion="ece")
    assert by_ece.fine_tuned_temperature == fit_temperature(fine_tuned, labels, criterion="ece")


@pytest.mark.parametrize("size", [1, 100, 700, 5000])
def test_k_is_the_published_one_on_imagenet_and_the_same_share_elsewhere(rows, size):
    zero_shot, fine_tuned, embeds, labels, _ = rows
    failed = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
    published = round(1000 * (size / 1_281_167))
    assert fit_vrf(zero_shot, fine_tuned, embeds, labels, failed).k == max(1, published)


def test_failures_by_hand():
    """Both right; zero-shot wrong; fine-tuned wrong; both wrong; zero-shot wrong by a tie, which the first wins."""
    zero_shot = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    fine_tuned = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    labels = torch.tensor([0, 0, 0, 0, 1])
    assert failures(zero_shot, fine_tuned, labels).tolist() == [False, True, False, False, True]


def test_the_choice_at_home_is_that_of_a_plain_search(rows):
    zero_shot, fine_tuned, embeds, labels, failed = rows
    vrf = fit_vrf(zero_shot, fine_tuned, embeds, labels, failed, k=2, choose=True)
    scores = {}
    for a, b in itertools.product(GRID_A, GRID_B):
        _, probabilities = slow(dataclasses.replace(vrf, a=a, b=b), zero_shot, fine_tuned, embeds)
        hits = sum(
            max(range(5), key=row.__getitem__) == y for row, y in zip(probabilities, labels.tolist(), strict=True)
        )
        scores[a, b] = hits, math.fsum(math.log(row[y]) for row, y in zip(probabilities, labels.tolist(), strict=True))
    assert (vrf.a, vrf.b) == max(scores, key=scores.__getitem__)
    assert len({hits for hits, _ in scores.values()}) > 3
    assert scores[vrf.a, vrf.b] > scores[1.5, 0.6]


def test_arrays_and_halves_are_taken(rows):
    zero_shot, fine_tuned, embeds, labels, failed = (part.numpy() for part in rows)
    vrf = fit_vrf(zero_shot, fine_tuned, embeds, labels, failed)
    expected = vrf.probabilities(*(torch.from_numpy(part) for part in (zero_shot, fine_tuned, embeds)))
    assert torch.equal(vrf.probabilities(zero_shot, fine_tuned, embeds), expected)
    half = vrf.probabilities(*(torch.from_numpy(part).half() for part in (zero_shot, fine_tuned, embeds)))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.05)


def without(rows, **changes):
    names = ("zero_shot_logits", "fine_tuned_logits", "embeds", "labels", "failed")
    return dict(zip(names, rows, strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"failed": torch.empty(0, 4)}, "right and the zero-shot model wrong, got none. Where zero-shot never fails"),
        ({"k": 24}, "`k` as a whole number from 1 to 23, the images where zero-shot failed, got 24"),
        ({"k": 0}, "`k` as a whole number from 1 to 23"),
        ({"b": 0.0}, "finite `b` above 0, got 1.5 and 0.0"),
        ({"a": math.nan}, "finite `a`"),
        ({"failed": torch.ones(3, 5)}, "`embeds` of 5 numbers a row"),
        ({"failed": torch.full((3, 4), math.nan)}, "finite `failed`"),
        ({"embeds": torch.ones(59, 4)}, "`embeds` of 60 rows, one for each of the logits, got 59"),
        ({"zero_shot_logits": torch.ones(60, 6)}, r"of one shape, got \(60, 6\) and \(60, 5\)"),
        ({"labels": torch.full((60,), 5)}, r"`labels` in \[0, 5\)"),
        ({"criterion": "mse"}, "`criterion`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(rows, changes, message):
    with pytest.raises(ValueError, match=message):
        fit_vrf(**without(rows, **changes))


def test_logits_of_other_shapes_are_not_mixed(rows):
    zero_shot, fine_tuned, embeds, labels, failed = rows
    vrf = fit_vrf(zero_shot, fine_tuned, embeds, labels, failed)
    for parts in ((zero_shot[:, :4], fine_tuned, embeds), (zero_shot, fine_tuned, embeds[:9])):
        with pytest.raises(ValueError, match="Expected logits of two models of one shape"):
            vrf.probabilities(*parts)
    with pytest.raises(ValueError, match="`embeds` of 4 numbers a row"):
        vrf.weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match="temperature"):
        dataclasses.replace(vrf, zero_shot_temperature=0.0)
