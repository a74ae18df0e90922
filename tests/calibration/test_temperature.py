"""The search for a temperature against roots found by scipy, slow loops and plain grids."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from carot_hf import fit_temperature
from carot_hf.calibration import temperature_ece, temperature_nll
from carot_hf.calibration.metrics import top_label
from carot_hf.calibration.rows import LogitRows, every_row, row_chunks
from carot_hf.ece.binning import calibration_bins


def drawn(rows, classes, seed, *, scale=2.0, over=1.5, dtype=torch.float64):
    """Logits ``over`` times too large for the labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (logits * over).to(dtype), labels


def mixed(rows, classes, seed, dtype=torch.float32):
    """One half is far too sure of itself and the other not sure enough: no temperature calibrates both."""
    sure, unsure = drawn(rows // 2, classes, seed, over=4.0), drawn(rows // 2, classes, seed + 1, scale=4.0, over=0.3)
    return torch.cat([sure[0], unsure[0]]).to(dtype), torch.cat([sure[1], unsure[1]])


def exact_optimum(logits, labels, low, high, weights=None):
    """Root of the derivative of the NLL in 1 / T, in numpy's float64."""
    z, own = logits.double().numpy(), np.arange(len(labels))
    z = z - z.max(axis=1, keepdims=True)

    def slope(beta):
        p = np.exp(beta * z)
        means = (p * z).sum(axis=1) / p.sum(axis=1) - z[own, labels.numpy()]
        return np.average(means, weights=weights)

    return 1.0 / brentq(slope, 1.0 / high, 1.0 / low, xtol=1e-15, rtol=1e-14)


class Lazy(LogitRows):
    """Rows that count how often they are read."""

    def __init__(self, logits):
        self.logits, self.shape, self.dtype, self.device = logits, tuple(logits.shape), logits.dtype, logits.device
        self.read = 0

    def __getitem__(self, rows):
        part = self.logits[rows]
        self.read += len(part)
        return part


def ece_of(logits, labels, temperature):
    return calibration_bins(*top_label(logits, labels, temperature)).ece


def slow_ece(logits, labels, temperature):
    """ECE over ten bins of equal width by a loop over the rows."""
    gaps = [0.0] * 10
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        confidence = 1.0 / math.fsum(math.exp((z - max(row)) / temperature) for z in row)
        inside = next(b for b in range(10) if confidence <= (b + 1) / 10 or b == 9)
        gaps[inside] += confidence - (row.index(max(row)) == label)
    return math.fsum(abs(gap) for gap in gaps) / len(labels)


# NLL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "classes", "over"), [(40, 3, 1.2), (500, 10, 6.0), (9000, 20, 0.8), (20_000, 5, 3.0)])
def test_the_nll_optimum_is_the_exact_one(rows, classes, over, dtype):
    logits, labels = drawn(rows, classes, rows, over=over, dtype=dtype)
    expected = exact_optimum(logits, labels, 0.3, 20.0)
    assert fit_temperature(logits, labels, bounds=(0.3, 20.0)) == pytest.approx(expected, abs=1e-8)
    weights = np.random.default_rng(0).integers(0, 4, rows).astype(float)
    weights[:: rows // 2048 or 1] *= rows != 20_000  # then no row of the sample counts
    if weights.any():
        expected = exact_optimum(logits, labels, 0.3, 20.0, weights)
        found = fit_temperature(logits, labels, bounds=(0.3, 20.0), sample_weight=weights)
        assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("right", [True, False])
def test_a_sample_that_misleads_does_not_matter(right):
    """All rows of the sample are right, or wrong: its optimum is at a bound, that of all rows is not."""
    logits, labels = drawn(9000, 4, 3, over=2.0)
    best = logits.argmax(dim=1)
    sampled = slice(None, None, 9000 // 2048)
    labels[sampled] = best[sampled] if right else (best[sampled] + 1) % 4
    labels[1::4] = (best[1::4] + right) % 4
    expected = exact_optimum(logits, labels, 0.01, 1000.0)
    assert fit_temperature(logits, labels, bounds=(0.01, 1000.0)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_derivatives_are_those_of_a_slow_loop(weighted, exact):
    logits, labels = drawn(30, 6, 0, dtype=torch.float64 if not exact else torch.float32)
    weights = torch.arange(30, dtype=torch.float64) if weighted else None
    sums, mass, beta = np.zeros(3), 0.0, 0.7
    for i, (row, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        scaled = [beta * z for z in row]
        shares = [math.exp(s) for s in scaled]
        shares = [share / math.fsum(shares) for share in shares]
        mean = math.fsum(p * s for p, s in zip(shares, scaled, strict=True))
        central = [math.fsum(p * (s - mean) ** k for p, s in zip(shares, scaled, strict=True)) for k in (2, 3)]
        weight = i if weighted else 1
        sums, mass = sums + weight * np.array([mean - scaled[label], *central]), mass + weight
    found = temperature_nll.derivatives(logits, labels, beta, weights, exact=exact)
    assert found == pytest.approx((sums / mass).tolist(), rel=1e-12)


def test_rows_that_are_computed_are_read_twice_beside_their_check():
    logits, labels = drawn(20_000, 10, 5, dtype=torch.float32)
    lazy = Lazy(logits)
    assert fit_temperature(lazy, labels) == pytest.approx(fit_temperature(logits, labels), abs=1e-12)
    assert lazy.read < 3.8 * len(logits)  # a check, some steps over a ninth of the rows, one over all, one exact


@pytest.mark.parametrize("step", [1, 3, 7])
def test_every_row_is_a_slice_with_a_step(step):
    logits, labels = drawn(1000, 200, 0)
    for rows in (every_row(logits, step), every_row(Lazy(logits), step)):
        assert torch.equal(torch.cat([part for _, part, _ in row_chunks(rows, labels[::step])]), logits[::step])


# ECE


def grid_best(logits, labels, low, high):
    grid = np.geomspace(low, high, 600)
    grid[0], grid[-1] = low, high
    return min(ece_of(logits, labels, t) for t in grid.tolist())


@pytest.mark.parametrize("seed", range(24))
def test_the_ece_optimum_is_no_worse_than_a_grid(seed):
    random = np.random.default_rng(seed)
    rows, classes, dtype = (
        int(random.integers(1, 500)),
        (2, 3, 10, 100)[seed % 4],
        (torch.float32, torch.float64)[seed % 2],
    )
    over, scale = float(random.uniform(0.5, 6)), (0.3, 2.0, 30.0)[seed % 3]
    logits, labels = (
        mixed(rows + 2, classes, seed) if seed % 5 == 0 else drawn(rows, classes, seed, over=over, scale=scale)
    )
    logits = (logits.round() if seed % 7 == 0 else logits).to(dtype)
    low, high = ((0.5, 10.0), (0.05, 20.0), (1.0, 1.4))[random.integers(3)]
    temperature = fit_temperature(logits, labels, criterion="ece", bounds=(low, high), warn=False)
    assert low <= temperature <= high
    assert (
        ece_of(logits, labels, temperature) <= grid_best(logits, labels, low, high) + 1.2e-7
    )  # equal but for rounding
    if dtype == torch.float64:  # rounding to float32 moves rows over edges
        assert ece_of(logits, labels, temperature) == pytest.approx(slow_ece(logits, labels, temperature), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("make", [drawn, mixed])
@pytest.mark.parametrize(("rows", "classes"), [(4000, 300), (30_000, 40)])
def test_the_ece_optimum_of_many_rows_is_no_worse_than_a_grid(make, rows, classes):
    logits, labels = make(rows, classes, 1, dtype=torch.float32)
    temperature = fit_temperature(logits, labels, criterion="ece")
    assert ece_of(logits, labels, temperature) <= grid_best(logits, labels, 0.5, 10.0) + 1.2e-7


def test_only_what_can_be_best_is_looked_at(monkeypatch):
    """The logits are read for one polynomial, some rows next to edges, and the winner: not for each temperature."""
    logits, labels = drawn(20_000, 10, 5, dtype=torch.float32)
    lazy, start = Lazy(logits), fit_temperature(logits, labels)
    found = temperature_ece.fit_ece(lazy, labels, 0.5, 10.0, start)
    assert found == temperature_ece.fit_ece(logits, labels, 0.5, 10.0, start)
    assert lazy.read <= 7 * len(logits)


def test_confidences_of_a_piece_are_off_by_no_more_than_it_says():
    logits, labels = drawn(300, 1000, 2, scale=4.0, dtype=torch.float64)
    logits[:100] = torch.linspace(0.0, -300.0, 100, dtype=torch.float64)[:, None]
    logits[:100, 0] = 0.0  # one class before 999 equal ones: the least smooth that there is
    for work, rounding in ((torch.float64, 1e-9), (torch.float32, 3e-6)):
        for low in (0.5, 3.0, 8.0):
            piece = temperature_ece.Piece(
                low, 1.25 * low, temperature_ece._logs(logits.to(work), labels, low, 1.25 * low, work)
            )
            temperatures = np.geomspace(low, 1.25 * low, 23)
            for t, found in zip(temperatures.tolist(), piece.confidences(temperatures), strict=True):
                off = np.abs(found - top_label(logits, labels, t)[0])
                assert (off <= piece.off + rounding).all(), (low, t, (off / (piece.off + rounding)).max())


def test_a_piece_that_is_too_wide_for_a_polynomial_is_halved(monkeypatch):
    monkeypatch.setattr(temperature_ece, "_WIDTH", 6.0)
    logits, labels = mixed(400, 50, 0)
    temperature = fit_temperature(logits, labels, criterion="ece")
    assert ece_of(logits, labels, temperature) <= grid_best(logits, labels, 0.5, 10.0) + 1.2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_next_to_an_edge_are_computed_as_all_are(dtype):
    logits, labels = drawn(3000, 100, 4, dtype=dtype)
    random = np.random.default_rng(0)
    rows, temperatures = random.integers(0, 3000, 200), random.choice([0.7, 2.0, 9.0], 200)
    whole = {t: top_label(logits, labels, t)[0] for t in (0.7, 2.0, 9.0)}
    expected = [whole[t][row] for row, t in zip(rows, temperatures, strict=True)]
    for given in (logits, Lazy(logits)):
        assert temperature_ece._of_rows(given, labels, rows, temperatures) == pytest.approx(expected, rel=1e-6)


def test_confidences_on_an_edge_stay_there():
    """Two equal logits have the confidence 1/2 at each temperature, which belongs to the bin below."""
    logits = torch.zeros(40, 2, dtype=torch.float64)
    logits[20:, 0] = torch.linspace(0.1, 6.0, 20, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 1] * 10)
    search = temperature_ece._Search(logits, labels, 0.5, 10.0, 1.0)
    search.walk()
    assert len(search._found) > 600
    for t, found in list(search._found.items())[::50]:
        assert found == pytest.approx(slow_ece(logits, labels, t), abs=1e-9)


def test_the_grid_holds_six_hundred_temperatures_and_for_few_rows_more():
    coarse, fine = temperature_ece._grid(0.5, 10.0, 50_000), temperature_ece._grid(0.5, 10.0, 20)
    assert coarse == pytest.approx(np.geomspace(0.5, 10.0, 600), rel=1e-14)
    assert set(coarse.tolist()) <= set(fine.tolist())
    assert len(fine) == 4 * 599 + 1
    ratios = [after / before for before, after in pairwise(fine.tolist())]
    assert ratios == pytest.approx([20 ** (1 / 2396)] * 2396)
    assert (fine[0], fine[-1]) == (0.5, 10.0)


def test_bounds_far_apart_are_no_trouble():
    logits, labels = drawn(50, 3, 0, over=2.0)
    temperature = fit_temperature(logits, labels, criterion="ece", bounds=(1e-6, 1e6))
    assert ece_of(logits, labels, temperature) <= ece_of(logits, labels, fit_temperature(logits, labels))


@pytest.mark.parametrize("start", [0.5, 10.0])
def test_the_search_goes_up_and_down_as_far_as_it_has_to(start):
    logits, labels = drawn(300, 5, 2, over=2.0)
    found = temperature_ece.fit_ece(logits, labels, 0.5, 10.0, start)
    assert 1.2 < found < 4.0
    assert ece_of(logits, labels, found) <= grid_best(logits, labels, 0.5, 10.0) + 1.2e-7


def test_the_search_goes_on_where_the_mean_confidence_is_the_accuracy_already():
    """Rows at .95 of which .6 are right and rows at .55 of which .9 are: right on average at T = 1, best far above."""
    logits, labels = [], []
    for confidence, accuracy in ((0.95, 0.6), (0.55, 0.9)):
        rows = torch.zeros(200, 2, dtype=torch.float64)
        rows[:, 0] = math.log(confidence / (1 - confidence)) + torch.linspace(-0.02, 0.02, 200, dtype=torch.float64)
        logits.append(rows)
        labels.append((torch.arange(200) >= round(200 * accuracy)).long())
    logits, labels = torch.cat(logits), torch.cat(labels)
    confidences = top_label(logits, labels, 1.0)[0]
    assert abs(confidences.mean() - float((labels == 0).double().mean())) < 0.03
    for start in (0.9, 1.0, 1.1):
        found = temperature_ece.fit_ece(logits, labels, 0.2, 10.0, start)
        assert found > 1.25
        assert ece_of(logits, labels, found) <= grid_best(logits, labels, 0.2, 10.0) + 1.2e-7
