"""SigLIP's likelihood: loss and distillation against slow loops, the fit against closed forms and scikit-learn."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from reference import gradient, sigmoid_cross_entropy, sigmoid_kl, smoothed
from sklearn.linear_model import LogisticRegression
from tolerances import EXACT

from carot_hf import bake_temperature, calibration_metrics, unbake_temperature
from carot_hf.calibration.metrics import top_label
from carot_hf.calibration.sigmoid import fit_sigmoid
from carot_hf.ece.binning import calibration_bins
from carot_hf.objective.sigmoid import sigmoid_distillation_loss, sigmoid_loss


def matrix(seed, rows=3, columns=5, spread=4.0):
    return spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COLUMNS = torch.tensor([1, 4, 0])
IGNORE = torch.tensor([[True, False, False, False, True], [False] * 5, [False, False, True, False, False]])


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("ignore", [None, IGNORE])
def test_the_loss_and_its_gradient_against_a_loop(epsilon, ignore):
    logits = matrix(0)
    targets = torch.nn.functional.one_hot(COLUMNS, 5).double()
    left_out = None if ignore is None else ignore.tolist()
    rows = smoothed(targets.tolist(), epsilon, left_out)

    def slow(values):
        return sigmoid_cross_entropy(values, rows, left_out)

    value = logits.clone().requires_grad_()
    loss = sigmoid_loss(value, COLUMNS, label_smoothing=epsilon, ignore=ignore)
    assert loss.item() == pytest.approx(slow(logits.tolist()), rel=EXACT)
    loss.backward()
    np.testing.assert_allclose(value.grad.numpy(), gradient(slow, logits.numpy()), atol=1e-6)


def test_distillation_and_its_gradient_against_a_loop():
    student, teacher = matrix(1), matrix(2)

    def slow(values):
        return sigmoid_kl(teacher.tolist(), values)

    value, other = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = sigmoid_distillation_loss(value, other)
    assert loss.item() == pytest.approx(slow(student.tolist()), rel=EXACT)
    loss.backward()
    np.testing.assert_allclose(value.grad.numpy(), gradient(slow, student.numpy()), atol=1e-6)
    assert other.grad is None
    assert sigmoid_distillation_loss(student, student).item() == 0.0


def test_large_logits_stay_finite_and_float32_under_autocast():
    logits = torch.tensor([[200.0, -200.0], [-300.0, 300.0]], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = sigmoid_loss(logits), sigmoid_distillation_loss(logits, -logits)
    for loss in losses:
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        loss.backward(retain_graph=True)
    assert losses[0].item() == 0.0
    assert losses[1].item() == pytest.approx((400 + 600) / 2)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: sigmoid_loss(z), "Pass the column of each row's own pair"),
        (lambda z: sigmoid_loss(z, COLUMNS, label_smoothing=1.0), r"`label_smoothing` in \[0, 1\)"),
        (lambda z: sigmoid_loss(z[0]), "of one shape"),
        (lambda z: sigmoid_distillation_loss(z, z[:, :2]), "teacher_logits_per_image"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(matrix(0))


@pytest.mark.parametrize(("classes", "margin", "right"), [(2, 2.0, 0.8), (10, 5.0, 0.7), (1000, 12.0, 0.8)])
def test_the_closed_form(classes, margin, right):
    """Logits [m, 0, ..., 0]: the first is right with probability a, the others share the rest; two equations."""
    n = 5 * (classes - 1) if classes > 100 else 100 * (classes - 1)
    labels = np.zeros(n, dtype=np.int64)
    wrong = round((1 - right) * n)
    labels[:wrong] = 1 + np.arange(wrong) % (classes - 1)
    logits = torch.zeros(n, classes)
    logits[:, 0] = margin
    share = wrong / n
    top, rest = math.log((1 - share) / share), math.log(share / (classes - 1) / (1 - share / (classes - 1)))
    temperature, bias = fit_sigmoid(logits, torch.from_numpy(labels))
    assert temperature == pytest.approx(margin / (top - rest), rel=1e-6)
    assert bias == pytest.approx(rest, rel=1e-6)
    options = {"temperature": temperature, "bias": bias, "link": "sigmoid"}
    assert calibration_metrics(logits, torch.from_numpy(labels), **options)["ece"] == pytest.approx(0, abs=1e-6)


def problem(seed, n=400, classes=6):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(n, classes, dtype=torch.float64) - 5
    return logits, torch.distributions.Categorical(logits=0.4 * logits).sample()


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_a_logistic_regression_on_all_pairs(seed):
    logits, labels = problem(seed)
    pairs = torch.nn.functional.one_hot(labels, logits.shape[1]).flatten().numpy()
    theirs = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    theirs.fit(logits.reshape(-1, 1).numpy(), pairs)
    temperature, bias = fit_sigmoid(logits, labels)
    assert 1 / temperature == pytest.approx(float(theirs.coef_[0, 0]), rel=1e-6)
    assert bias == pytest.approx(float(theirs.intercept_[0]), rel=1e-6)


def test_what_must_not_and_what_must_change_the_fit():
    logits, labels = problem(0)
    temperature, bias = fit_sigmoid(logits, labels)
    order = torch.randperm(len(logits))
    same = [fit_sigmoid(logits[order], labels[order]), fit_sigmoid(logits.repeat(3, 1), labels.repeat(3))]
    for found in same:
        assert found == pytest.approx((temperature, bias), rel=1e-6)
    assert fit_sigmoid(2 * logits, labels) == pytest.approx((2 * temperature, bias), rel=1e-6)
    assert fit_sigmoid(logits + 3, labels) == pytest.approx((temperature, bias - 3 / temperature), rel=1e-6)
    assert fit_sigmoid(logits / temperature + bias, labels) == pytest.approx((1, 0), abs=1e-6)


def test_the_fit_is_at_a_bound_and_says_so(caplog):
    """Separable rows want ever smaller temperatures; the bias is then the best one there."""
    labels = torch.arange(4).repeat(10)
    logits = 2.0 * torch.nn.functional.one_hot(labels, 4).double() - 1.0
    with caplog.at_level(logging.WARNING):
        temperature, bias = fit_sigmoid(logits, labels, bounds=(0.5, 8.0))
    assert temperature == 0.5
    assert "at the bound 0.5" in caplog.text
    slopes = torch.sigmoid(logits / 0.5 + bias) - torch.nn.functional.one_hot(labels, 4)
    assert float(slopes.sum() / len(labels)) == pytest.approx(0, abs=1e-6)


def test_logits_that_are_all_alike_leave_the_temperature_and_get_a_bias():
    labels = torch.arange(5)
    temperature, bias = fit_sigmoid(torch.full((5, 5), 7.0), labels)
    assert 7.0 / temperature + bias == pytest.approx(math.log(0.2 / 0.8), rel=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf)])
def test_bounds_are_checked(bounds):
    with pytest.raises(ValueError, match="`bounds` with 0 < low < high"):
        fit_sigmoid(matrix(0), COLUMNS, bounds=bounds)


def test_metrics_of_the_sigmoid_against_a_loop():
    logits, labels = problem(3, n=150)
    options = {"temperature": 1.7, "bias": -0.4, "link": "sigmoid"}
    metrics = calibration_metrics(logits, labels, n_bins=7, **options)
    nll = brier = 0.0
    confidences, hits = [], []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        answers = [1 / (1 + math.exp(-(value / 1.7 - 0.4))) for value in row]
        nll -= sum(math.log(p if k == label else 1 - p) for k, p in enumerate(answers))
        brier += sum((p - (k == label)) ** 2 for k, p in enumerate(answers))
        confidences.append(max(answers))
        hits.append(max(range(len(row)), key=row.__getitem__) == label)
    bins = calibration_bins(np.array(confidences), np.array(hits), 7)
    assert metrics["nll"] == pytest.approx(nll / 150, rel=1e-9)
    assert metrics["brier"] == pytest.approx(brier / 150, rel=1e-9)
    assert metrics["ece"] == pytest.approx(bins.ece, abs=1e-9)
    assert metrics["accuracy"] == pytest.approx(np.mean(hits))
    found = top_label(logits, labels, 1.7, bias=-0.4, link="sigmoid")
    np.testing.assert_allclose(found[0], confidences, rtol=1e-12)
    classwise = np.mean(
        [
            calibration_bins(torch.sigmoid(logits[:, k] / 1.7 - 0.4).numpy(), (labels == k).numpy(), 7).ece
            for k in range(6)
        ]
    )
    assert metrics["classwise_ece"] == pytest.approx(classwise, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"), [({"link": "probit"}, "'softmax', SigLIP's"), ({"bias": 1.0}, "finite `bias`")]
)
def test_links_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        calibration_metrics(matrix(0), COLUMNS, **options)


class Head(torch.nn.Module):
    """What baking looks at."""

    def __init__(self, scale, bias, dtype=torch.float32):
        super().__init__()
        self.logit_scale, self.logit_bias = (
            torch.nn.Parameter(torch.tensor([value], dtype=dtype)) for value in (scale, bias)
        )
        self.config = type("Config", (), {})()


@pytest.mark.parametrize(("temperature", "bias"), [(1.7, -0.4), (0.31, 2.0), (9.0, 0.0)])
def test_scale_and_bias_are_baked_and_come_out_bit_for_bit(temperature, bias):
    head = Head(4.7647, -12.9324, torch.float64)
    similarity = torch.linspace(-1, 1, 9, dtype=torch.float64)
    before = head.logit_scale.exp() * similarity + head.logit_bias
    values = [value.clone() for value in head.parameters()]
    bake_temperature(head, temperature, bias=bias, record={"split": "validation"})
    after = head.logit_scale.exp() * similarity + head.logit_bias
    torch.testing.assert_close(after, before / temperature + bias, rtol=0, atol=EXACT)
    assert head.config.calibration["bias"] == bias
    with pytest.raises(RuntimeError, match="unbake_temperature"):
        bake_temperature(head, 2.0)
    unbake_temperature(head)
    assert all(torch.equal(value, old) for value, old in zip(head.parameters(), values, strict=True))


def test_a_bias_that_was_trained_since_is_shifted_back():
    head = Head(4.7647, -12.9324)
    bake_temperature(head, 2.0, bias=1.0)
    with torch.no_grad():
        head.logit_bias += 0.5
    unbake_temperature(head)
    assert head.logit_bias.item() == pytest.approx(-12.9324 + 0.5 * 2.0, abs=1e-5)


def test_a_bias_needs_a_place():
    head = Head(1.0, 1.0)
    del head.logit_bias
    with pytest.raises(ValueError, match="model with a `logit_bias`"):
        bake_temperature(head, 2.0, bias=1.0)
