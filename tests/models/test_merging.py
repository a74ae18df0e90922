"""Merges: end points bit for bit, closed forms in float64, which models fit, which models a greedy soup keeps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from toys import tiny_clip

from carot_hf import bake_temperature
from carot_hf.models.merging import alpha_sweep, greedy_soup, interpolate, uniform_soup


class Net(nn.Module):
    """Tied weights, a floating and an integer buffer, and a config."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(4, 3)
        self.register_buffer("running", torch.randn(3))
        self.register_buffer("ids", torch.arange(4), persistent=False)


def bits(tensor):
    """The raw bytes, so that -0 differs from 0 and nan equals nan."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(bits(tensor), bits(other[name])), name


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def perturbed(model, seed=1, size=0.1):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((size * noise).to(parameter.dtype))
    return other


@pytest.fixture
def ends(model):
    return model, perturbed(model)


# ---- interpolate ----


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_end_points_bit_for_bit(ends, alpha, dtype):
    zero_shot, fine_tuned = (end.to(dtype) for end in ends)
    odd = torch.tensor([-0.0, 0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 1e30, 1.0])
    with torch.no_grad():
        zero_shot.visual_projection.weight[0, :8] = odd
        fine_tuned.visual_projection.weight[0, :8] = odd.flip(0)
    assert_same_bits(interpolate(zero_shot, fine_tuned, alpha), fine_tuned if alpha else zero_shot)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7, 1e-9, 1 - 1e-9])
def test_interpolation_is_the_closed_form_rounded_once(ends, alpha):
    zero_shot, fine_tuned = ends
    merged = interpolate(zero_shot, fine_tuned, alpha)
    assert type(merged) is type(fine_tuned)
    parameters = dict(merged.named_parameters())
    assert "logit_scale" in parameters
    for name, start in zero_shot.named_parameters():
        theta_0 = start.detach().numpy().astype(np.float64)
        theta_1 = fine_tuned.get_parameter(name).detach().numpy().astype(np.float64)
        expected = ((1 - alpha) * theta_0 + alpha * theta_1).astype(np.float32)
        np.testing.assert_array_equal(parameters[name].detach().numpy(), expected, err_msg=name)


def test_half_precision_is_rounded_once():
    """At alpha 0.25 between 1 and 1 + 2^-7 in bfloat16 (step 2^-7) the mean rounds to 1, at 0.75 to the other end."""
    ends = [nn.Linear(1, 1, bias=False).bfloat16() for _ in range(2)]
    with torch.no_grad():
        ends[0].weight.fill_(1.0)
        ends[1].weight.fill_(1.0 + 2**-7)
    assert [interpolate(*ends, alpha).weight.item() for alpha in (0.25, 0.75)] == [1.0, 1.0 + 2**-7]


def test_values_equal_in_both_ends_stay(ends):
    zero_shot, fine_tuned = (end.double() for end in ends)
    with torch.no_grad():
        fine_tuned.visual_projection.weight.copy_(zero_shot.visual_projection.weight)
    for alpha in (0.1, 0.3, 0.9):
        merged = interpolate(zero_shot, fine_tuned, alpha)
        assert torch.equal(merged.visual_projection.weight, zero_shot.visual_projection.weight)
        assert not torch.equal(merged.text_projection.weight, zero_shot.text_projection.weight)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_result_is_new_and_the_ends_are_as_before(ends, alpha):
    zero_shot, fine_tuned = ends
    fine_tuned.train()
    fine_tuned.logit_scale.grad = torch.ones(())
    fine_tuned.visual_projection.requires_grad_(False)
    before = copy.deepcopy(ends)
    merged = interpolate(zero_shot, fine_tuned, alpha)
    for end, old in zip(ends, before, strict=True):
        assert_same_bits(end, old)
        own = {tensor.data_ptr() for tensor in tensors(end).values()}
        assert not own & {tensor.data_ptr() for tensor in tensors(merged).values()}
    assert merged.config is not fine_tuned.config
    assert not merged.training
    assert fine_tuned.training
    assert merged.logit_scale.grad is None
    assert merged.logit_scale.requires_grad
    assert not merged.visual_projection.weight.requires_grad


def test_tied_weights_and_buffers():
    zero_shot, fine_tuned = Net(0), Net(1)
    merged = interpolate(zero_shot, fine_tuned, 0.25)
    assert merged.out.weight is merged.embed.weight
    np.testing.assert_allclose(
        merged.running.numpy(), 0.75 * zero_shot.running.numpy() + 0.25 * fine_tuned.running.numpy(), rtol=1e-6
    )
    assert torch.equal(merged.ids, torch.arange(4))
    assert not hasattr(merged, "config")


def test_a_merge_forgets_the_temperature_but_not_its_effect(ends):
    zero_shot, fine_tuned = ends
    bake_temperature(fine_tuned, 2.0)
    bake_temperature(zero_shot, 3.0)
    stored = [end.logit_scale.item() for end in ends]
    for merged in (
        interpolate(zero_shot, fine_tuned, 0.5),
        uniform_soup(ends),
        greedy_soup(ends, lambda model: 1.0)[0],
    ):
        assert not hasattr(merged.config, "calibration")
        assert merged.logit_scale.item() == pytest.approx(sum(stored) / 2, abs=1e-6)
    assert fine_tuned.config.calibration == {"temperature": 2.0}


def test_a_merged_model_can_be_saved_and_loaded(ends, tmp_path):
    bake_temperature(ends[1], 2.0)
    merged = interpolate(*ends, 0.3)
    merged.save_pretrained(tmp_path)
    assert_same_bits(type(merged).from_pretrained(tmp_path), merged)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_alpha_out_of_range_is_refused(ends, alpha):
    with pytest.raises(ValueError, match=r"Expected `alpha` in \[0, 1\], got"):
        interpolate(*ends, alpha)
    with pytest.raises(ValueError, match=r"Expected `alpha` in \[0, 1\], got"):
        alpha_sweep(*ends, [0.5, alpha])


class Wide(Net):
    """The same tensors, another class."""


def test_other_classes_are_refused():
    with pytest.raises(TypeError, match="got Net as `zero_shot` and Wide as `fine_tuned`"):
        interpolate(Net(), Wide())


def drop_head(net):
    del net.head


def reshape(net):
    net.head = nn.Linear(4, 2)


def halve(net):
    net.head.half()


def untie(net):
    net.out.weight = nn.Parameter(net.out.weight.detach().clone())


def renumber(net):
    net.ids += 1


def add(net):
    net.more = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_head, r"`head\.weight`: there in `zero_shot`, missing in `fine_tuned`"),
        (add, r"`more\.weight`: missing in `zero_shot`, there in `fine_tuned`"),
        (reshape, r"`head\.weight`: shape \(3, 4\) in `zero_shot`, shape \(2, 4\) in `fine_tuned`"),
        (halve, r"`head\.weight`: torch.float32 in `zero_shot`, torch.float16 in `fine_tuned`\. Bring both to one"),
        (untie, r"`out\.weight`: stored as `embed\.weight` in `zero_shot`, stored as `out\.weight` in `fine_tuned`"),
        (renumber, r"`ids`: some values in `zero_shot`, others \(both torch.int64\) in `fine_tuned`"),
    ],
)
def test_the_first_difference_is_named(change, message):
    zero_shot, fine_tuned = Net(0), Net(1)
    change(fine_tuned)
    for merge in (interpolate, alpha_sweep):
        with pytest.raises(ValueError, match=message):
            merge(zero_shot, fine_tuned)
    with pytest.raises(ValueError, match=message.replace("`zero_shot`", "model 0").replace("`fine_tuned`", "model 1")):
        uniform_soup([zero_shot, fine_tuned])
    with pytest.raises(ValueError, match=message.replace("`zero_shot`", "model 0").replace("`fine_tuned`", "model 1")):
        greedy_soup([zero_shot, fine_tuned], lambda model: 1.0)


@pytest.mark.parametrize(
    ("tower", "key", "value"), [("text", "hidden_act", "gelu"), ("vision", "num_attention_heads", 4)]
)
def test_settings_that_no_shape_shows_are_compared(ends, tower, key, value):
    """The same weights under another activation or number of heads are another function."""
    setattr(getattr(ends[1].config, f"{tower}_config"), key, value)
    with pytest.raises(
        ValueError, match=rf"difference at `config\.{tower}_config\.{key}`: .*{value}.* in `fine_tuned`"
    ):
        interpolate(*ends)


def test_other_order_of_labels_is_refused(ends):
    for end, names in zip(ends, (["cat", "dog"], ["dog", "cat"]), strict=True):
        end.config.id2label = dict(enumerate(names))
    with pytest.raises(ValueError, match=r"difference at `config\.id2label`"):
        interpolate(*ends)


def test_legacy_and_corrected_end_markers_merge(ends):
    """A trained model carries the tokenizer's end marker, OpenAI's start model the legacy 2: no reason to refuse."""
    ends[0].config.text_config.eos_token_id = 2
    assert interpolate(*ends).config.text_config.eos_token_id == ends[1].config.text_config.eos_token_id


def test_sweep_goes_from_end_to_end_by_tenths(ends):
    steps = list(alpha_sweep(*ends))
    assert [alpha for alpha, _ in steps] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert_same_bits(steps[0][1], ends[0])
    assert_same_bits(steps[10][1], ends[1])
    assert_same_bits(steps[3][1], interpolate(*ends, 0.3))
    assert [alpha for alpha, _ in alpha_sweep(*ends, [0.25])] == [0.25]


# ---- soups ----


def test_soup_of_one_bit_for_bit(model):
    with torch.no_grad():
        model.visual_projection.weight[0, :3] = torch.tensor([-0.0, float("inf"), 1e-45])
    for soup in (uniform_soup([model]), greedy_soup([model], lambda model: 0.0)[0]):
        assert_same_bits(soup, model)
        assert soup.logit_scale.data_ptr() != model.logit_scale.data_ptr()


def test_soup_of_two_is_the_middle(ends):
    assert_same_bits(uniform_soup(ends), interpolate(*ends, 0.5))


def test_uniform_soup_is_the_mean_and_takes_a_generator(model):
    models = [perturbed(model, seed) for seed in range(7)]
    soup = uniform_soup(perturbed(model, seed) for seed in range(7))
    for name, parameter in soup.named_parameters():
        stack = np.stack([one.get_parameter(name).detach().numpy() for one in models]).astype(np.float64)
        np.testing.assert_array_equal(parameter.detach().numpy(), stack.mean(axis=0).astype(np.float32), err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_soup_keeps_no_weights_that_were_read(model, dtype):
    """A generator may load the next weights into the same model."""
    model.to(dtype)

    def reused():
        for value in (1.0, 2.0, 6.0):
            with torch.no_grad():
                model.logit_scale.fill_(value)
            yield model

    assert uniform_soup(reused()).logit_scale.item() == 3.0


def scalar(value):
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(value)
    return net


def near(target):
    return lambda model: -abs(model.weight.item() - target)


@pytest.mark.parametrize(
    ("values", "target", "used", "mean"),
    [
        # best is 4; with 8: 6, worse; with 0: 2, worse
        ([0.0, 8.0, 4.0], 4.0, [2], 4.0),
        # best is 6 (off by 1); with 2: 4 (off by 1, as good: kept); with 11: 19/3 (off by 4/3: left out)
        ([11.0, 2.0, 6.0], 5.0, [2, 1], 4.0),
        # best is 3 (off by 1), then 7 (off by 3): mean 5, off by 1, kept; then 0 (off by 4): 10/3, off by 2/3, kept
        ([0.0, 7.0, 3.0], 4.0, [2, 1, 0], 10 / 3),
        # equal scores go by index: 5 (off by 1), 3 (off by 1): mean 4, kept
        ([5.0, 3.0], 4.0, [0, 1], 4.0),
    ],
)
def test_greedy_soup_by_hand(values, target, used, mean):
    models = [scalar(value) for value in values]
    soup, indices = greedy_soup(models, near(target))
    assert indices == used
    assert soup.weight.item() == pytest.approx(mean, rel=1e-7)
    assert [model.weight.item() for model in models] == values


def test_a_model_left_out_does_not_enter_later_means():
    """5.25 is best (off by 1/4); with 5.5 the mean is worse; with 4.25 then 4.75, as good. All three have mean 5."""
    soup, used = greedy_soup([scalar(value) for value in (5.25, 5.5, 4.25)], near(5.0))
    assert (used, soup.weight.item()) == ([0, 2], 4.75)


def test_greedy_soup_scores_each_model_and_each_mean_once():
    seen = []

    def score(model):
        seen.append(model.weight.item())
        return near(4.0)(model)

    greedy_soup([scalar(value) for value in (0.0, 7.0, 3.0)], score)
    assert seen == pytest.approx([0.0, 7.0, 3.0, 5.0, 10 / 3])


def test_soups_refuse_nothing_and_nan():
    for merge in (uniform_soup, lambda models: greedy_soup(models, lambda model: 1.0)):
        with pytest.raises(ValueError, match="Expected at least one model, got none"):
            merge([])
    with pytest.raises(ValueError, match="Expected a finite score, got nan for model 1"):
        greedy_soup([scalar(1.0), scalar(2.0)], lambda model: 1.0 if model.weight.item() == 1.0 else float("nan"))


def test_models_of_another_start_merge_as_well(processor):
    """Nothing but class, tensors and settings is asked for: two random models of one shape have a middle."""
    one, other = (tiny_clip(processor.tokenizer, seed) for seed in (0, 1))
    middle = interpolate(one, other)
    assert middle.logit_scale.item() == one.logit_scale.item()
