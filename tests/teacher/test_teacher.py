"""The teacher: schedule, closed form, names, dtypes, buffers, shared weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from runs import Net
from torch import nn

from carot_hf import Teacher
from carot_hf.teacher.average import ema_momentum


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize(
    ("step", "momentum"), [(0, 0.05), (2503, 0.475), (5005, 0.05 + 0.85 * 5005 / 5006), (5006, 0.9), (25030, 0.9)]
)
def test_momentum_of_the_paper(step, momentum):
    assert ema_momentum(step, 25030) == pytest.approx(momentum, abs=1e-12)


def test_pretrained_share_after_three_updates_is_nine_permille():
    share = np.prod([ema_momentum(step, 25030) for step in (500, 1000, 1500)])
    assert share == pytest.approx(0.0090, abs=5e-5)


def test_no_ramp_gives_the_end():
    assert ema_momentum(0, 10, ramp=0.0) == 0.9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start": -0.1}, r"`start` in \[0, 1\], got -0.1"),
        ({"end": 1.1}, r"`end` in \[0, 1\], got 1.1"),
        ({"ramp": 2.0}, "share of the run"),
        ({"step": -1}, "Count optimizer steps"),
        ({"total_steps": 0}, "Count optimizer steps"),
    ],
)
def test_bad_schedule_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ema_momentum(**{"step": 1, "total_steps": 10, **kwargs})


def test_teacher_equals_closed_form(net):
    """After k updates: prod(m) theta_0 + sum_i (1 - m_i) prod_{j > i} m_j theta_i, in float64."""
    teacher, momenta = Teacher(net), [0.3, 0.5, 0.9, 0.9]
    snapshots = [copy.deepcopy(dict(net.named_parameters()))]
    for momentum in momenta:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        snapshots.append(copy.deepcopy(dict(net.named_parameters())))
        teacher.update(net, momentum)
    weights = [np.prod(momenta)]
    weights += [(1 - momenta[i]) * np.prod(momenta[i + 1 :]) for i in range(len(momenta))]
    assert sum(weights) == pytest.approx(1)
    for name, value in teacher.model.named_parameters():
        expected = sum(w * s[name].detach().double() for w, s in zip(weights, snapshots, strict=True))
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=0)


def test_momentum_zero_and_one_are_end_points_bit_for_bit(net):
    teacher = Teacher(net)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        net.first.weight.mul_(1.7)
    teacher.update(net, 1.0)
    assert torch.equal(teacher.model.first.weight, before["first.weight"])
    teacher.update(net, 0.0)
    assert torch.equal(teacher.model.first.weight, net.first.weight)


@pytest.mark.parametrize("momentum", [0.05, 0.3, 0.9, 0.9999])
def test_a_teacher_that_is_its_student_stays_bit_for_bit(net, momentum):
    """The two weights of the average sum to 1 in real numbers, not in rounded ones: no update may let it drift."""
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape))
    teacher = Teacher(net)
    before = copy.deepcopy(teacher.state_dict())
    for _ in range(100):
        teacher.update(net, momentum)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_teacher_matches_by_name_not_by_order(net):
    """A student whose parameters are registered in another order gives the same teacher."""
    other = Net()
    other.load_state_dict(net.state_dict())
    first = other._modules.pop("first")
    other._modules["first"] = first  # now the last
    assert [n for n, _ in other.named_parameters()] != [n for n, _ in net.named_parameters()]
    teacher = Teacher(net)
    with torch.no_grad():
        other.first.weight.zero_()
    teacher.update(other, 0.5)
    torch.testing.assert_close(teacher.model.first.weight, net.first.weight / 2)


def test_freezing_a_parameter_does_not_shift_the_others(net):
    teacher = Teacher(net)
    with torch.no_grad():
        net.first.weight.fill_(1.0)
    teacher.update(net, 0.0)
    assert torch.equal(teacher.model.frozen.weight, net.frozen.weight)
    assert torch.equal(teacher.model.first.weight, net.first.weight)


def test_shared_weights_stay_shared_and_move_once(net):
    teacher = Teacher(net)
    assert teacher.model.out.weight is teacher.model.embed.weight
    start = net.embed.weight.detach().clone()
    with torch.no_grad():
        net.embed.weight.zero_()
    teacher.update(net, 0.5)
    torch.testing.assert_close(teacher.model.out.weight, start / 2)  # a second move would leave a quarter


def test_buffers_are_copied_not_averaged(net):
    teacher = Teacher(net)
    net.count += 3
    net.running += 0.25
    teacher.update(net, 0.9)
    assert teacher.model.count.tolist() == [10]
    assert teacher.model.count.dtype == torch.int64
    assert teacher.model.running.tolist() == [0.75]


def test_bf16_student_moves_a_float32_teacher(net):
    student = net.to(torch.bfloat16)
    teacher = Teacher(student)
    assert all(p.dtype == torch.float32 for p in teacher.model.parameters())
    step = 2.0**-7  # one unit of bf16 above 1
    with torch.no_grad():
        student.first.weight.fill_(1.0 + step)
        teacher.model.first.weight.fill_(1.0)
    stuck = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(10):
        teacher.update(student, 0.9)
        stuck = 0.9 * stuck + 0.1 * student.first.weight[0, 0]
    assert teacher.model.first.weight[0, 0].item() == pytest.approx(1 + step * (1 - 0.9**10), abs=1e-6)
    assert stuck.item() == 1.0  # the same average kept in bf16 goes nowhere


def test_teacher_takes_no_gradient_and_stays_in_eval(net):
    net.train()
    teacher = Teacher(net)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert net.first.weight.requires_grad


def test_teacher_is_a_copy(net):
    teacher = Teacher(net)
    before = teacher.model.first.weight.clone()
    with torch.no_grad():
        net.first.weight.add_(1)
    assert torch.equal(teacher.model.first.weight, before)


def test_state_dict_round_trip_is_bit_equal_with_one_name_for_shared_weights(net):
    teacher = Teacher(net)
    teacher.update(Net(), 0.37)
    state = {name: value.clone() for name, value in teacher.state_dict().items() if name != "out.weight"}
    other = Teacher(Net())
    other.load_state_dict(state)
    for (name, a), b in zip(teacher.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_differences_are_named(net):
    teacher = Teacher(net)
    state = dict(teacher.state_dict())
    del state["first.bias"]
    with pytest.raises(ValueError, match=r"`first.bias` exists only in the teacher"):
        teacher.load_state_dict(state)
    with pytest.raises(ValueError, match=r"`first.weight` of shape \(4, 3\), got \(3, 3\)"):
        teacher.load_state_dict({**teacher.state_dict(), "first.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"`momentum` in \[0, 1\], got 1.5"):
        teacher.update(net, 1.5)
    with pytest.raises(ValueError, match="exists only in"):
        teacher.update(nn.Linear(2, 2), 0.5)
