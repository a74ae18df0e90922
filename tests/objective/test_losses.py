"""Losses against slow loops, closed forms and transformers' own CLIP loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from tolerances import EXACT
from transformers.loss.loss_utils import LOSS_MAPPING  # noqa: F401  (fails early if transformers moves its losses)
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from carot_hf.objective.losses import (
    contrastive_loss,
    cross_norm_penalty,
    distillation_loss,
    feature_distillation_loss,
    orthogonality_penalty,
    similarity_logits,
)

ROWS, COLUMNS = 4, 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def logits(generator, rows=ROWS, columns=COLUMNS, scale=3.0):
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale).requires_grad_()


def assert_same(loss, value, point, function):
    """Value and gradient of ``loss`` at the leaf ``point`` equal those of the slow loop."""
    assert loss.item() == pytest.approx(value, abs=EXACT)
    (grad,) = torch.autograd.grad(loss, point, retain_graph=True)
    np.testing.assert_allclose(grad.numpy(), reference.gradient(function, point.detach().double().numpy()), atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_loss_equals_loop(generator, epsilon, masked):
    image, text = logits(generator), logits(generator)
    columns = torch.tensor([2, 0, 5, 3])
    targets = np.eye(COLUMNS)[columns].tolist()
    ignore = None
    if masked:
        ignore = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
        ignore[0, 4] = ignore[2, 1] = ignore[2, 0] = True
    loss = contrastive_loss(image, text, columns, label_smoothing=epsilon, ignore=ignore)
    mask = None if ignore is None else ignore.tolist()
    value = reference.contrastive(image.tolist(), text.tolist(), targets, epsilon, mask)
    assert_same(loss, value, image, lambda x: reference.contrastive(x, text.tolist(), targets, epsilon, mask))
    assert_same(loss, value, text, lambda x: reference.contrastive(image.tolist(), x, targets, epsilon, mask))


def test_contrastive_loss_takes_rows_of_probabilities(generator):
    image, text = logits(generator), logits(generator)
    rows = torch.rand(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    rows /= rows.sum(dim=-1, keepdim=True)
    loss = contrastive_loss(image, text, rows, label_smoothing=0.2)
    value = reference.contrastive(image.tolist(), text.tolist(), rows.tolist(), 0.2)
    assert_same(loss, value, image, lambda x: reference.contrastive(x, text.tolist(), rows.tolist(), 0.2))


def test_contrastive_loss_equals_transformers(generator):
    image = logits(generator, 5, 5)
    ours, theirs = contrastive_loss(image, image.T), image_text_contrastive_loss(image.T)
    assert ours.item() == pytest.approx(theirs.item(), abs=EXACT)
    for a, b in zip(torch.autograd.grad(ours, image), torch.autograd.grad(theirs, image), strict=True):
        torch.testing.assert_close(a, b, atol=EXACT, rtol=0)


def test_smoothing_is_one_minus_eps_onehot_plus_eps_over_columns(generator):
    image = logits(generator, 5, 5)
    rows = 0.7 * torch.eye(5, dtype=torch.float64) + 0.3 / 5
    smoothed = contrastive_loss(image, image.T, label_smoothing=0.3)
    torch.testing.assert_close(smoothed, contrastive_loss(image, image.T, rows), atol=EXACT, rtol=0)
    theirs = torch.nn.functional.cross_entropy(image, torch.arange(5), label_smoothing=0.3)
    theirs = (theirs + torch.nn.functional.cross_entropy(image.T, torch.arange(5), label_smoothing=0.3)) / 2
    torch.testing.assert_close(smoothed, theirs, atol=EXACT, rtol=0)


def test_contrastive_loss_of_equal_logits_is_log_of_columns():
    loss = contrastive_loss(torch.zeros(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS), torch.arange(ROWS))
    assert loss.item() == pytest.approx(math.log(COLUMNS), abs=1e-6)


def test_distillation_loss_equals_loop(generator):
    matrices = [logits(generator) for _ in range(4)]
    lists = [m.tolist() for m in matrices]
    loss = distillation_loss(*matrices)
    value = reference.distillation(*lists)
    assert_same(loss, value, matrices[0], lambda x: reference.distillation(x, *lists[1:]))
    assert_same(loss, value, matrices[1], lambda x: reference.distillation(lists[0], x, *lists[2:]))


def test_distillation_is_zero_at_equality_and_spares_the_teacher(generator):
    image, text = logits(generator), logits(generator)
    teacher_image, teacher_text = image.detach().clone().requires_grad_(), text.detach().clone().requires_grad_()
    loss = distillation_loss(image, text, teacher_image, teacher_text)
    assert loss.item() == pytest.approx(0, abs=1e-7)
    (distillation_loss(image * 2, text, teacher_image, teacher_text)).backward()
    assert image.grad is not None
    assert image.grad.abs().max() > 0.01
    assert teacher_image.grad is None
    assert teacher_text.grad is None


def test_feature_distillation_equals_loop(generator):
    embeds = [
        torch.nn.functional.normalize(torch.randn(3, 5, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(4)
    ]
    embeds[0] = embeds[0].clone().requires_grad_()
    embeds[2] = embeds[2].clone().requires_grad_()
    loss = feature_distillation_loss(*embeds)
    lists = [e.tolist() for e in embeds]
    value = reference.feature_distillation(*lists)
    assert_same(loss, value, embeds[0], lambda x: reference.feature_distillation(x, *lists[1:]))
    loss.backward()
    assert embeds[2].grad is None
    assert feature_distillation_loss(embeds[0], embeds[1], embeds[0], embeds[1]).item() == 0
    opposite = feature_distillation_loss(embeds[0], embeds[1], -embeds[0], -embeds[1])
    assert opposite.item() == pytest.approx(8, abs=1e-5)


def test_orthogonality_equals_loop(generator):
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)  # (embed, width)
    loss = orthogonality_penalty(weight)
    assert_same(loss, reference.orthogonality(weight.tolist()), weight, reference.orthogonality)
    assert orthogonality_penalty(weight, squared=True).item() == pytest.approx(loss.item() ** 2, rel=1e-6)


def test_orthogonality_is_zero_for_orthonormal_rows_and_has_a_gradient_there():
    weight = torch.eye(3, 5, requires_grad=True)
    loss = orthogonality_penalty(weight)
    assert loss.item() == pytest.approx(1e-6, abs=1e-9)
    loss.backward()
    assert torch.isfinite(weight.grad).all()


def test_cross_norm_equals_loop(generator):
    visual = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    text = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = cross_norm_penalty(visual, text)
    lists = visual.tolist(), text.tolist()
    assert_same(loss, reference.cross_norm(*lists), visual, lambda x: reference.cross_norm(x, lists[1]))
    assert_same(loss, reference.cross_norm(*lists), text, lambda x: reference.cross_norm(lists[0], x))


def test_similarities_are_float32_under_autocast():
    embeds = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    scale = torch.tensor(math.log(100.0))
    exact = 100 * embeds.double() @ embeds.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = similarity_logits(embeds, embeds, scale)
        loss = contrastive_loss(result, result.T)
        naive = scale.exp() * (embeds @ embeds.T)
    assert result.dtype == loss.dtype == torch.float32
    assert (result.double() - exact).abs().max() < 1e-4
    assert (naive.double() - exact).abs().max() > 0.05  # what the functions guard against


def test_half_precision_logits_are_computed_in_float32(generator):
    image = logits(generator, 5, 5).detach().bfloat16()
    torch.testing.assert_close(contrastive_loss(image, image.T), contrastive_loss(image.float(), image.float().T))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrastive_loss(torch.zeros(2, 3), torch.zeros(3, 2)), "one shape"),
        (lambda: contrastive_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "only square logits"),
        (lambda: contrastive_loss(torch.zeros(2, 2), torch.zeros(2, 2), label_smoothing=1.0), r"\[0, 1\), got 1.0"),
        (lambda: contrastive_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(3).long()), r"shape \(2,\)"),
        (lambda: contrastive_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 3)), "one row of probabilities"),
        (lambda: contrastive_loss(torch.zeros(2, 2), torch.zeros(2, 2), ignore=torch.zeros(2, 2)), "as bool"),
        (lambda: distillation_loss(*[torch.zeros(2, 2)] * 3, torch.zeros(2, 3)), "teacher_logits_per_text"),
        (lambda: orthogonality_penalty(torch.zeros(3)), r"\(embed, width\)"),
        (lambda: cross_norm_penalty(torch.zeros(3, 2), torch.zeros(4, 2)), "share the embedding size"),
        (lambda: feature_distillation_loss(*[torch.zeros(2, 2)] * 3, torch.zeros(2, 3)), "teacher_text_embeds"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
