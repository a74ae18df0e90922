"""The losses of Lipsum-FT, CAR-FT and DiVE against slow loops in float64, values and gradients, and their zeros."""

from __future__ import annotations

import pytest
import reference_start as slow
import torch
import torch.nn.functional as F
from tolerances import EXACT

from carot_hf.objective.start_losses import (
    context_distillation_loss,
    context_embeddings,
    difference_vector_loss,
    energy_gap_loss,
    moved_mean,
)

ROWS, SIZE, TEXTS = 5, 7, 4


def unit(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


IMAGE, TEXT = unit(ROWS, SIZE, seed=0), unit(ROWS, SIZE, seed=1)
IMAGE_START, TEXT_START = unit(ROWS, SIZE, seed=2), unit(ROWS, SIZE, seed=3)
TEXTS_START = unit(TEXTS, SIZE, seed=4)
MEAN = 0.1 * unit(SIZE, seed=5)
SCALE = torch.tensor(1.7, dtype=torch.float64)
LOSSES = {
    "energy gap": (
        lambda image, text: energy_gap_loss(image, IMAGE_START, TEXTS_START, SCALE),
        lambda image, text: slow.energy_gap(image, IMAGE_START.tolist(), TEXTS_START.tolist(), SCALE.item()),
    ),
    "contexts": (
        lambda image, text: context_distillation_loss(image, IMAGE_START, TEXTS_START, SCALE),
        lambda image, text: slow.context_distillation(image, IMAGE_START.tolist(), TEXTS_START.tolist(), SCALE.item()),
    ),
    "difference vectors": (
        lambda image, text: difference_vector_loss(image, text, IMAGE_START, TEXT_START, MEAN),
        lambda image, text: slow.difference_vectors(
            image, text, IMAGE_START.tolist(), TEXT_START.tolist(), MEAN.tolist()
        ),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_slow_loops(name):
    fast, loop = LOSSES[name]
    image, text = IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_()
    loss = fast(image, text)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(loop(IMAGE.tolist(), TEXT.tolist()), rel=EXACT)
    found = torch.autograd.grad(loss, (image, text), allow_unused=True)
    step = 1e-5
    for which, gradient in enumerate(found):
        if gradient is None:
            assert name != "difference vectors"
            assert which == 1
            continue
        for row, column in ((0, 0), (2, 3), (ROWS - 1, SIZE - 1)):
            sides = []
            for sign in (1, -1):
                moved = [IMAGE.clone(), TEXT.clone()]
                moved[which][row, column] += sign * step
                sides.append(loop(*(part.tolist() for part in moved)))
            assert gradient[row, column].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-6)


def test_all_are_zero_where_the_student_is_the_start_model():
    nothing = torch.zeros(SIZE, dtype=torch.float64)
    assert energy_gap_loss(IMAGE, IMAGE, TEXTS_START, SCALE).item() == 0
    assert context_distillation_loss(IMAGE, IMAGE, TEXTS_START, SCALE).item() == pytest.approx(0, abs=EXACT)
    assert difference_vector_loss(IMAGE, TEXT, IMAGE, TEXT, nothing).item() == 0


def test_a_move_that_is_the_same_for_all_costs_nothing():
    shift = 0.3 * unit(SIZE, seed=6)
    loss = difference_vector_loss(IMAGE + shift, TEXT + shift, IMAGE, TEXT, shift)
    assert loss.item() == pytest.approx(0, abs=EXACT)
    apart = difference_vector_loss(IMAGE + shift, TEXT - shift, IMAGE, TEXT, shift)
    assert apart.item() == pytest.approx(8 * shift.square().sum().item(), rel=EXACT)  # |v - m|^2 and |u - v|^2: 4 each


def test_energies_by_hand():
    """One image, one text: half the squared difference of the two logits."""
    image, start = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    text, scale = torch.tensor([[0.6, 0.8]]), torch.tensor(2.0).log()
    assert energy_gap_loss(image, start, text, scale).item() == pytest.approx((2 * 0.6 - 2 * 0.8) ** 2 / 2)


def test_contexts_are_means_over_the_classes():
    captions = unit(3, 2, SIZE, seed=7)
    found = context_embeddings(captions)
    assert found.tolist() == [pytest.approx(row) for row in slow.contexts(captions.tolist())]


def test_the_mean_moves_by_a_hundredth():
    assert moved_mean(MEAN, torch.ones_like(MEAN)).tolist() == pytest.approx([0.99 * m + 0.01 for m in MEAN.tolist()])


def test_no_gradient_reaches_the_start_model():
    start, text_start, texts, scale, mean = (
        part.clone().requires_grad_() for part in (IMAGE_START, TEXT_START, TEXTS_START, SCALE, MEAN)
    )
    image = IMAGE.clone().requires_grad_()
    loss = (
        energy_gap_loss(image, start, texts, scale)
        + context_distillation_loss(image, start, texts, scale)
        + difference_vector_loss(image, TEXT, start, text_start, mean)
    )
    loss.backward()
    assert image.grad is not None
    assert all(part.grad is None for part in (start, text_start, texts, scale, mean))


def test_half_precision_under_autocast_is_computed_in_float32():
    rows = [part.to(torch.bfloat16) for part in (IMAGE, TEXT, IMAGE_START, TEXT_START, TEXTS_START)]
    wide = [part.double() for part in rows]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [
            energy_gap_loss(rows[0], rows[2], rows[4], SCALE.float()),
            context_distillation_loss(rows[0], rows[2], rows[4], SCALE.float()),
            difference_vector_loss(*rows[:4], MEAN.float()),
        ]
    exact = [
        energy_gap_loss(wide[0], wide[2], wide[4], SCALE),
        context_distillation_loss(wide[0], wide[2], wide[4], SCALE),
        difference_vector_loss(*wide[:4], MEAN),
    ]
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert one.item() == pytest.approx(other.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: energy_gap_loss(IMAGE, IMAGE_START[:2], TEXTS_START, SCALE),
            r"`start_image_embeds`.*\(5, 7\).*\(2, 7\)",
        ),
        (lambda: energy_gap_loss(IMAGE, IMAGE_START, TEXTS_START[:, :3], SCALE), r"rows of \(7,\) numbers.*\(4, 3\)"),
        (lambda: context_distillation_loss(IMAGE, IMAGE_START, TEXTS_START[0], SCALE), r"rows of \(7,\).*got \(7,\)"),
        (lambda: difference_vector_loss(IMAGE, TEXT[:3], IMAGE, TEXT, MEAN), r"`text_embeds`.*\(3, 7\)"),
        (lambda: difference_vector_loss(IMAGE, TEXT, IMAGE, TEXT, MEAN[:3]), r"rows of \(7,\).*\(1, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
