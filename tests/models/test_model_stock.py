"""Model Stock: a slow loop in float64, closed forms of two and three task vectors, which models fit."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import reference_merging
import torch
from tolerances import EXACT
from torch import nn
from toys import CLASSES, tiny_clip

from carot_hf import CLIPClassifier, bake_temperature, model_stock


class Net(nn.Module):
    """A row of weights of its own, and tensors that are no parameters."""

    def __init__(self, row, dtype=torch.float64):
        super().__init__()
        self.row = nn.Parameter(torch.tensor(row, dtype=dtype))
        self.register_buffer("ids", torch.arange(4), persistent=False)


def merged(start, *rows):
    return model_stock(Net(start), [Net(row) for row in rows]).row.detach().numpy()


def moved(model, seed, size=0.1):
    """Steps that have a part in common, so that all signs of cosines are there."""
    other = copy.deepcopy(model)
    generator, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            shared = torch.randn(parameter.shape, generator=common, dtype=parameter.dtype)
            parameter.add_(size * (noise * (1 + seed) + 2 * shared))
    return other


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(one, other):
    for name, tensor in tensors(one).items():
        assert torch.equal(bits(tensor), bits(tensors(other)[name])), name


@pytest.fixture
def start(model):
    return model.double()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_tensor_is_that_of_the_slow_loop(start, count):
    models = [moved(start, seed) for seed in range(count)]
    with torch.no_grad():
        models[0].visual_projection.weight.copy_(start.visual_projection.weight)  # not moved by one
    found = model_stock(start, iter(models))
    shares = set()
    for name, origin in start.named_parameters():
        rows = [model.get_parameter(name).detach().reshape(-1).tolist() for model in models]
        origin = origin.detach().reshape(-1)
        expected = reference_merging.model_stock(origin.tolist(), rows)
        own = found.get_parameter(name).detach().reshape(-1)
        np.testing.assert_allclose(own.numpy(), expected, rtol=0, atol=EXACT, err_msg=name)
        shares.add(round(float((own - origin).norm() / origin.norm().clamp(min=1e-9)), 3))
    assert len(shares) > 10, "each tensor has a weight of its own"


def test_orthogonal_task_vectors_give_the_start():
    start = [1.0, -0.0, 3.0, 0.5]
    found = merged(start, [2.0, 0.0, 3.0, 0.5], [1.0, 5.0, 3.0, 0.5], [1.0, 0.0, 3.0, -4.0])
    np.testing.assert_array_equal(found, start)
    assert np.signbit(found[1])


def test_equal_task_vectors_give_their_model(start):
    one = moved(start, 3)
    for count in (2, 3):
        found = model_stock(start, [one] * count)
        for name, parameter in found.named_parameters():
            torch.testing.assert_close(parameter, one.get_parameter(name), rtol=0, atol=EXACT)


def test_two_vectors_at_sixty_degrees_by_hand():
    """cos = 1/2: t = 1 / (3/2) = 2/3 of the mean (3/4, sqrt(3)/4), from (1, 1)."""
    found = merged([1.0, 1.0], [2.0, 1.0], [1.5, 1.0 + np.sqrt(0.75)])
    np.testing.assert_allclose(found, [1.0 + 0.5, 1.0 + np.sqrt(3) / 6], atol=EXACT)


@pytest.mark.parametrize("count", [2, 3])
def test_with_steps_of_one_length_it_is_where_the_altitudes_meet(count):
    """t |mean|^2 = c r^2 makes (w_i - w_H) . d_j = 0: with two models the orthocentre of the triangle with the start.

    With three, vectors that are turned into each other have one angle for all pairs.
    """
    start = np.array([0.3, -0.2, 0.5])
    steps = [np.array(row) for row in ([2.0, 1.0, 0.4], [0.4, 2.0, 1.0], [1.0, 0.4, 2.0])][:count]
    models = [start + step for step in steps]
    found = merged(start.tolist(), *(model.tolist() for model in models))
    for i, j in itertools.permutations(range(count), 2):
        assert (models[i] - found) @ steps[j] == pytest.approx(0, abs=EXACT)
    assert np.linalg.norm(found - start) > 0.5


@pytest.mark.parametrize(
    "rows",
    [
        [[2.0, 1.0], [0.0, 1.2]],  # an obtuse angle: t would be below 0
        [[2.0, 1.0], [0.0, 1.0]],  # opposite: t would be without bound
        [[1.0 + 1.0, 1.0], [0.5, 1.0 + np.sqrt(0.75)], [0.5, 1.0 - np.sqrt(0.75)]],  # three that cancel out
    ],
)
def test_models_that_move_apart_give_the_start(rows):
    np.testing.assert_array_equal(merged([1.0, 1.0], *rows), [1.0, 1.0])


def test_the_scale_of_a_step_does_not_change_the_weight():
    """A length of 1e-9 is a length: cos = 1/sqrt(2), t = 2 / (sqrt(2) + 1), as with steps of 1."""
    t = 2 / (np.sqrt(2) + 1)
    for size in (1e-9, 1.0):
        found = merged([0.0, 0.0], [size, 0.0], [size, size])
        np.testing.assert_allclose(found / size, [t, t / 2], atol=EXACT)


def test_a_model_that_did_not_move_has_nothing_in_common():
    """cos of (a, b) = 1, of the pairs with the third 0: c = 1/3, t = 1 / (5/3) = 3/5 of the mean 2/3."""
    np.testing.assert_allclose(merged([0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]), [0.4, 0.0], atol=EXACT)


def test_what_no_model_moved_keeps_its_bits(start):
    odd = torch.tensor([-0.0, 0.0, float("inf"), float("nan"), 1e-45, 1e300], dtype=torch.float64)
    with torch.no_grad():
        start.visual_projection.weight[0, :6] = odd
        start.text_projection.weight[0, 0] = -0.0
    models = [moved(start, seed) for seed in (1, 2)]
    for model in models:
        with torch.no_grad():
            model.visual_projection.weight[:] = start.visual_projection.weight.nan_to_num(1.0)
    with pytest.raises(ValueError, match=r"finite weights, got nan or inf in `visual_projection\.weight`"):
        model_stock(start, models)
    with torch.no_grad():
        start.visual_projection.weight[0, 3] = 1.0
        for model in models:
            model.visual_projection.weight.copy_(start.visual_projection.weight)
            model.text_projection.weight[0, 0] = 0.0
    found = model_stock(start, models)
    assert torch.equal(bits(found.visual_projection.weight), bits(start.visual_projection.weight))
    assert torch.equal(bits(found.text_projection.weight[0, :1]), bits(start.text_projection.weight[0, :1]))
    assert not torch.equal(found.text_projection.weight, start.text_projection.weight)


def test_the_order_of_the_models_does_not_matter(start):
    models = [moved(start, seed) for seed in range(3)]
    found = [model_stock(start, order) for order in itertools.permutations(models)]
    for other in found[1:]:
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(parameter, found[0].get_parameter(name), rtol=0, atol=EXACT)


def test_half_precision_is_rounded_once():
    """From 1 by two steps and by four of 2^-7 in bfloat16: cos 1, and the mean is three steps."""
    start, *models = (Net([value], torch.bfloat16) for value in (1.0, 1.0 + 2**-6, 1.0 + 2**-5))
    assert model_stock(start, models).row.item() == 1.0 + 3 * 2**-7


def test_the_result_is_new_of_the_first_model_and_forgets_the_temperature(model):
    models = [moved(model, seed) for seed in range(2)]
    bake_temperature(models[0], 2.0)
    models[0].visual_projection.requires_grad_(False)
    models[0].config.marker = "first"
    before = copy.deepcopy([model, *models])
    found = model_stock(model, models)
    for one, old in zip([model, *models], before, strict=True):
        assert_same_bits(one, old)
        own = {tensor.data_ptr() for tensor in tensors(one).values()}
        assert not own & {tensor.data_ptr() for tensor in tensors(found).values()}
    assert models[0].config.calibration == {"temperature": 2.0}
    assert not hasattr(found.config, "calibration")
    assert (found.config.marker, found.training) == ("first", False)
    assert not found.visual_projection.weight.requires_grad
    assert found.logit_scale.dtype == torch.float32


def test_a_classifier_is_merged_with_its_head(processor, tmp_path):
    clip = tiny_clip(processor.tokenizer).double()
    embeds = torch.nn.functional.normalize(torch.randn(len(CLASSES), clip.config.projection_dim).double(), dim=1)
    start = CLIPClassifier.from_clip(clip, embeds, list(CLASSES)).double()
    models = [moved(start, seed) for seed in range(2)]
    found = model_stock(start, models)
    assert type(found) is CLIPClassifier
    rows = [one.head.weight.detach().reshape(-1).tolist() for one in (start, *models)]
    expected = reference_merging.model_stock(rows[0], rows[1:])
    np.testing.assert_allclose(found.head.weight.detach().reshape(-1).numpy(), expected, rtol=0, atol=EXACT)
    found.save_pretrained(tmp_path)
    assert_same_bits(CLIPClassifier.from_pretrained(tmp_path, dtype=torch.float64), found)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_are_refused(count):
    with pytest.raises(ValueError, match=rf"Expected two or more fine-tuned models, got {count}\. There is no angle"):
        model_stock(Net([1.0]), [Net([2.0])] * count)


def test_models_that_do_not_fit_the_start_are_refused(model):
    with pytest.raises(ValueError, match=r"`row`: shape \(1,\) in `start`, shape \(2,\) in model 1"):
        model_stock(Net([1.0]), [Net([2.0]), Net([1.0, 2.0])])
    with pytest.raises(TypeError, match="got Net as `start` and CLIPModel as model 0"):
        model_stock(Net([1.0]), [model, model])
    other = copy.deepcopy(model)
    other.config.text_config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"difference at `config\.text_config\.hidden_act`"):
        model_stock(model, [other, other])


def test_adapters_are_refused(model):
    adapted = copy.deepcopy(model)
    adapted._hf_peft_config_loaded = True
    with pytest.raises(TypeError, match=r"Expected models without adapters, got a CLIPModel with some\. Merge them"):
        model_stock(model, [moved(model, 1), adapted])
