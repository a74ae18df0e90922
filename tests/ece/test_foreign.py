"""Agreement with torchmetrics, uncertainty-calibration and scikit-learn as they are installed, and where they fail.

uncertainty-calibration (imported as ``calibration``) puts a value into the bins ``(lo, hi]`` in float64, as we do:

- ``get_ece``: its bins are ``get_equal_prob_bins``, which despite the name have equal width. With
  ``mode="top-label"`` it is our ``ece``, with 1-D input that of ``mode="positive"``, and with ``mode="marginal"`` our
  ``classwise_ece``.
- ``get_ece_em``: ``get_equal_bins``, equal mass; an edge lies midway between two rows. Our ``adaptive_ece`` where no
  confidences are equal and the number of bins divides the number of rows.
- ``lower_bound_scaling_ce(p=2, debias=False)`` on the bins of equal width: our ``rmsce``.

torchmetrics sums in float32 and has bins ``[lo, hi)``: equal to 1e-4 on rows that are not on an edge.
"""

from __future__ import annotations

import calibration as verified
import numpy as np
import pytest
import torch
from calibration.utils import bin as put_into_bins
from calibration.utils import get_equal_prob_bins, lower_bound_scaling_ce, normal_debiased_ce
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from carot_hf import fit_temperature
from carot_hf.calibration.metrics import top_label
from carot_hf.ece.binning import calibration_bins
from carot_hf.ece.ece import ECE
from carot_hf.ece.uncertainty import debiased_ece

PROBLEMS = range(200)


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Nothing is written into the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))
        yield


@pytest.fixture(scope="module")
def metric(caches):
    return ECE()


def problem(seed, ties=False):
    """Probabilities of 2 to 12 classes from sharp to flat, labels that follow them more or less, and a bin number."""
    generator = np.random.default_rng(seed)
    n_bins = int(generator.integers(1, 26))
    rows, classes = n_bins * int(generator.integers(1, 20)), int(generator.integers(2, 13))
    logits = generator.normal(size=(rows, classes)) * generator.uniform(0.2, 6)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    if ties:  # also on the edges of the bins, and 0 and 1
        probabilities = np.rint(probabilities * n_bins) / n_bins
    labels = np.where(generator.random(rows) < 0.6, logits.argmax(axis=1), generator.integers(0, classes, rows))
    return probabilities, labels, n_bins


# Agreement


@pytest.mark.parametrize("ties", [False, True])
def test_uncertainty_calibration_finds_the_same_errors(metric, ties):
    for seed in PROBLEMS:
        rows, labels, n_bins = problem(seed, ties)
        ours = metric.compute(predictions=rows, references=labels, n_bins=n_bins, classwise=True, check_sums=not ties)
        assert ours["ece"] == pytest.approx(verified.get_ece(rows, labels, num_bins=n_bins), abs=1e-12), seed
        marginal = verified.get_ece(rows, labels, num_bins=n_bins, mode="marginal")
        assert ours["classwise_ece"] == pytest.approx(marginal, abs=1e-12), seed
        square = lower_bound_scaling_ce(
            rows, labels, p=2, debias=False, num_bins=n_bins, binning_scheme=get_equal_prob_bins, mode="top-label"
        )
        assert ours["rmsce"] == pytest.approx(square, abs=1e-12), seed
        positive = metric.compute(predictions=rows[:, 1], references=labels == 1, n_bins=n_bins, mode="positive")
        theirs = verified.get_ece(rows[:, 1], (labels == 1).astype(int), num_bins=n_bins)
        assert positive["ece"] == pytest.approx(theirs, abs=1e-12), seed


def test_uncertainty_calibration_finds_the_same_error_on_bins_of_equal_mass(metric):
    for seed in PROBLEMS:
        rows, labels, n_bins = problem(seed)
        ours = metric.compute(predictions=rows, references=labels, n_bins=n_bins)["adaptive_ece"]
        assert ours == pytest.approx(verified.get_ece_em(rows, labels, num_bins=n_bins), abs=1e-12), seed


def test_uncertainty_calibration_removes_the_same_bias():
    """It resamples 1000 times; its mean is off by a few thousandths of a deviation that is at most 0.5 / sqrt(rows)."""
    np.random.seed(0)  # noqa: NPY002 - the generator that it draws from
    generator = np.random.default_rng(0)
    for _ in range(20):
        confidences = np.concatenate([generator.uniform(size=300), np.repeat(np.arange(10) / 10 + 0.05, 2)])
        correct = generator.random(320) < confidences**1.3
        binned = put_into_bins(list(zip(confidences, correct, strict=True)), get_equal_prob_bins([], 10))
        theirs = normal_debiased_ce(binned, power=1)
        assert debiased_ece(calibration_bins(confidences, correct)) == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_scikit_learn_draws_the_same_curve(strategy, dtype):
    """Its quantiles lie at (i / n) (N - 1), between two rows: the bins are ours where n divides N."""
    for seed in PROBLEMS:
        rows, labels, n_bins = problem(seed)
        confidences, correct = rows[:, 1].astype(dtype), labels == 1
        bins = calibration_bins(confidences, correct, n_bins, strategy)
        prob_true, prob_pred = calibration_curve(correct, confidences, n_bins=n_bins, strategy=strategy)
        filled = bins.count > 0
        np.testing.assert_allclose(bins.accuracy[filled], prob_true, rtol=0, atol=1e-12, err_msg=str(seed))
        np.testing.assert_allclose(bins.confidence[filled], prob_pred, rtol=0, atol=1e-12, err_msg=str(seed))


def test_torchmetrics_is_close_away_from_its_faults(metric):
    norms = {"l1": "ece", "l2": "rmsce", "max": "mce"}
    for seed in PROBLEMS:
        rows, labels, n_bins = problem(seed)
        rows = 0.999 * rows + 0.001 / rows.shape[1]  # below 1 in float32 too
        predictions, classes = torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)
        of_class_1 = predictions[:, 1].contiguous()
        ours = metric.compute(predictions=predictions, references=classes, n_bins=n_bins)
        positive = metric.compute(predictions=of_class_1, references=classes == 1, n_bins=n_bins, mode="positive")
        for norm, name in norms.items():
            theirs = multiclass_calibration_error(predictions, classes, rows.shape[1], n_bins=n_bins, norm=norm)
            assert ours[name] == pytest.approx(float(theirs), abs=1e-4), (seed, name)
            theirs = binary_calibration_error(of_class_1, (classes == 1).long(), n_bins=n_bins, norm=norm)
            assert positive[name] == pytest.approx(float(theirs), abs=1e-4), (seed, name)


# Faults of torchmetrics


def test_torchmetrics_puts_confidence_1_into_an_extra_bin(metric):
    """9 right at .92 and 1 wrong at 1.0 share (.9, 1], where 9 of 10 are right at a mean confidence of .928."""
    confidences, correct = torch.tensor([0.92] * 9 + [1.0]), torch.tensor([1] * 9 + [0])
    theirs = binary_calibration_error(confidences, correct, n_bins=10)
    ours = metric.compute(predictions=confidences, references=correct, mode="top_label")["ece"]
    assert float(theirs) == pytest.approx(0.9 * 0.08 + 0.1 * 1.0, abs=1e-6)
    assert ours == pytest.approx(0.928 - 0.9, abs=1e-7)


def test_torchmetrics_stops_adding_at_two_to_the_24_rows():
    """Half of the first 2^24 rows are right, none of the 2^22 after them: 2 in 5 at confidence .5. It misses these."""
    confidences, correct = np.full(2**24 + 2**22, 0.5, np.float32), np.zeros(2**24 + 2**22, bool)
    correct[: 2**24 : 2] = True
    theirs = binary_calibration_error(
        torch.from_numpy(confidences), torch.from_numpy(correct), n_bins=10, validate_args=False
    )
    assert float(theirs) == 0.0
    assert calibration_bins(confidences, correct).ece == pytest.approx(0.5 - 0.4, abs=1e-12)


def test_torchmetrics_takes_probabilities_for_logits_because_of_one_rounding(metric):
    """(1 + 1e-7, 0) and (.9, .1), both right, in bins of their own: it takes the softmax of both."""
    rows, labels = torch.tensor([[1 + 1e-7, 0.0], [0.9, 0.1]]), torch.tensor([0, 0])
    assert float(rows[0, 0]) > 1
    theirs = multiclass_calibration_error(rows, labels, 2, n_bins=10)
    assert float(theirs) == pytest.approx(1 - (1 / (1 + np.exp(-1)) + 1 / (1 + np.exp(-0.8))) / 2, abs=1e-6)
    ours = metric.compute(predictions=rows, references=labels)["ece"]
    assert ours == pytest.approx((0.0 + 0.1) / 2, abs=1e-7)


# Temperatures


def clip_like(rows, classes, seed):
    """Calibrated logits like those of CLIP on ImageNet: a class stands out by 8 +- 2 from normal noise; 58 % right."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    chosen = torch.randint(classes, (rows,), generator=generator)
    logits[torch.arange(rows), chosen] += 8 + 2 * torch.randn(rows, generator=generator)
    return logits


def mean_variance(logits):
    """Mean over the rows of the variance of a row's logits under its softmax: Fisher information of ln T, per row."""
    probabilities = logits.double().softmax(dim=1)
    mean = (probabilities * logits).sum(dim=1, keepdim=True)
    return float((probabilities * (logits - mean) ** 2).sum(dim=1).mean())


def test_errors_of_fitted_temperatures_are_those_of_the_labels_alone():
    r"""Labels drawn from softmax(z / T): ln T is estimated with deviation 1 / sqrt(N V), V the `mean_variance`.

    V cannot exceed some ln(K)^2 / 4 + 1, 13 for 1000 classes: at N = 50,000 no method finds T to better than 0.12 %.
    """
    scores = []
    for seed in range(24):
        true = (0.8, 1.5, 3.0)[seed % 3]
        logits = clip_like(3000, 100, seed)
        labels = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        fitted = fit_temperature(logits * true, labels)
        scores.append(np.log(fitted / true) * np.sqrt(3000 * mean_variance(logits)))
    assert np.abs(scores).max() < 4
    assert abs(np.mean(scores)) < 4 / np.sqrt(24)
    assert 0.5 < np.mean(np.square(scores)) < 1.75  # chi-squared with 24 degrees: 2.6 deviations either way


@pytest.mark.parametrize(("true", "seed"), [(3.0, 0), (1.5, 1)])
def test_a_true_temperature_is_found_within_two_thousandths(true, seed):
    """50,000 x 1000; each of 500 rows 100 times, its labels at 100 evenly spaced quantiles with a random offset.

    Each label is still distributed as the softmax, but a row's labels hold hardly any luck. The best class comes
    first, the others by logit, so that the mean logit of the labels is off by less than (range of logits) / 100 a row.
    """
    logits = clip_like(500, 1000, seed).sort(dim=1, descending=True).values
    offsets = torch.rand(500, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    quantiles = (torch.arange(100) + offsets) / 100
    labels = torch.searchsorted(logits.double().softmax(1).cumsum(1), quantiles).clamp(max=999)
    fitted = fit_temperature((logits * true).repeat_interleave(100, dim=0), labels.flatten())
    assert fitted == pytest.approx(true, rel=0.002)
    # 0.2 % is far out: the mean over 500 rows of independent errors, each uniform and at most (range / 100) wide
    variance = mean_variance(logits)
    width = float((logits[:, 0] - logits[:, -1]).square().mean()) ** 0.5 / 100
    assert width / np.sqrt(12 * 500) / variance < 0.002 / 5


@pytest.mark.parametrize("seeds", [PROBLEMS[::2], pytest.param(PROBLEMS[1::2], marks=pytest.mark.slow)])
def test_the_ece_criterion_is_never_worse_than_the_nll_optimum_for_a_foreign_judge(seeds):
    better = 0
    for seed in seeds:
        generator = np.random.default_rng(seed)
        rows, classes = int(generator.integers(5, 120)), int(generator.integers(2, 9))
        logits = generator.normal(size=(rows, classes)) * generator.uniform(0.5, 8)
        labels = np.where(generator.random(rows) < 0.5, logits.argmax(1), generator.integers(0, classes, rows))
        errors = {}
        for criterion in ("nll", "ece"):
            confidences, correct = top_label(logits, labels, fit_temperature(logits, labels, criterion=criterion))
            errors[criterion] = verified.get_ece(confidences, correct.astype(int), num_bins=10)
        assert errors["ece"] <= errors["nll"] + 2e-7, seed  # ties within 1e-7 go to the NLL optimum
        better += errors["ece"] < errors["nll"] - 1e-3
    assert better > 75
