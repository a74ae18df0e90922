"""The teacher: a float32 moving average of the student's weights, and the schedules of its momentum.

The schedules are pure functions of the step. :class:`Teacher` knows weights and names, never time; the moment of an
update belongs to :class:`carot_hf.TeacherCallback`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..basics.precision import at_least_float32
from ..basics.tensor_files import names_by_storage


def ema_momentum(step: int, total_steps: int, *, start: float = 0.05, end: float = 0.9, ramp: float = 0.2) -> float:
    r"""Momentum of the teacher's update at a step: linear from ``start`` to ``end``, then constant.

    .. math:: m(k) = m_0 + (m_1 - m_0) \, k / (r N) \quad (k < r N), \qquad m_1 \text{ afterwards}

    Args:
        step: ``k``, optimizer steps finished, >= 0.
        total_steps: ``N``, optimizer steps of the whole run, >= 1.
        start: ``m0``, in ``[0, 1]``.
        end: ``m1``, in ``[0, 1]``.
        ramp: ``r``, share of the run that the ramp takes, in ``[0, 1]``; 0 gives ``end`` throughout.
    Returns:
        The weight of the old teacher, in ``[0, 1]``; the student's is the rest.
    Raises:
        ValueError: If a range above does not hold.
    Source:
        CaRot: updates every 500 of about 25,030 steps, 0.05 to 0.9 over the first fifth of the run.
    """
    check_momentum("start", start)
    check_momentum("end", end)
    if not 0.0 <= ramp <= 1.0:
        raise ValueError(f"Expected `ramp` in [0, 1], got {ramp}. It is the share of the run that the ramp takes.")
    if step < 0 or total_steps < 1:
        raise ValueError(
            f"Expected `step` >= 0 and `total_steps` >= 1, got {step} and {total_steps}. Count optimizer steps."
        )
    ramp_steps = ramp * total_steps
    if step >= ramp_steps:
        return end
    return start + (end - start) * step / ramp_steps


def beta_momentum(step: int, total_steps: int, *, update_every: int = 1, beta: float = 0.5) -> float:
    r"""Momentum that makes the teacher a beta-weighted mean of the student's snapshots, the pretrained one included.

    .. math:: m_k = W_{k-} / W_k, \quad W_k = \sum_{j \le k} \kappa(\tau_j), \quad \tau_j = (j + 1/2) / (N + 1)

    over the steps :math:`j = 0, e, 2e, \dots` of the snapshots, with the density of Beta(b, b) as :math:`\kappa`; it is
    large at both ends of the run. :math:`\tau` is that of the step, not of the update's number, so that the weights
    are right for any interval; the published code takes the number.

    Args:
        step: ``k``, optimizer steps finished, a multiple of ``update_every``; at least one of them.
        total_steps: ``N``, optimizer steps of the whole run.
        update_every: ``e``, optimizer steps between snapshots.
        beta: ``b``, > 0; 1 is the plain mean.
    Returns:
        The weight of the old teacher, in ``(0, 1)``.
    Raises:
        ValueError: If a range above does not hold.
    Source:
        TRACER (arXiv 2605.29380), b = 0.5 and an update every step.
    """
    if not 0.0 < beta < math.inf:
        raise ValueError(f"Expected `beta` > 0, got {beta}. TRACER uses 0.5; 1 weighs all snapshots alike.")
    if update_every < 1 or step < update_every or step > total_steps or step % update_every:
        raise ValueError(
            f"Expected a positive multiple of `update_every` = {update_every} up to {total_steps} as `step`, got "
            f"{step}. The snapshot of step 0 is the pretrained model."
        )
    sums = _beta_sums(total_steps, update_every, beta)
    return sums[step // update_every - 1] / sums[step // update_every]


def half_life(momentum: float, update_every: int) -> float:
    r"""Steps after which half of the teacher is newer, :math:`e \ln 2 / -\ln m`, were the momentum to stay as it is.

    CaRot's final 0.9 every 500 steps: 3,289 steps. Infinite for a momentum of 1.
    """
    if momentum <= 0.0:
        return 0.0
    return math.inf if momentum >= 1.0 else update_every * math.log(2) / -math.log(momentum)


class Teacher:
    r"""A float32 average of a student: :math:`\psi \leftarrow m \psi + (1 - m) \theta`, matched by parameter name.

    The copy is taken at construction (:math:`\psi_0 = \theta_0`), is kept in float32 whatever the student's dtype (a
    bf16 teacher would never move at these rates; that of a float64 student is float64), never requires a gradient and
    is always in evaluation mode. Buffers are copied, never averaged. Parameters that share storage in the student share
    it in the teacher and move once.

    With ``share_frozen`` the student's frozen parameters are the teacher's too, the very objects, whatever their dtype:
    there is no second copy of them, and what moves or casts the student (``student.to``) does so for both. Frozen
    scalars are copied at each update, since a temperature may be baked into the student's ``logit_scale`` later.

    Args:
        model: The student. It is copied, not kept; what DDP or ``torch.compile`` put around it is left out, here and
            in every method.
        share_frozen: Hold only what is trained, such as adapters, and share the rest with the student.
    Attributes:
        model: The teacher network, same class as the student.
        shared: Names of the parameters that are the student's; empty without ``share_frozen``.
    Source:
        CaRot, section 2.3; the rule of timm's ``ModelEmaV3``, by name.
    """

    def __init__(self, model: nn.Module, *, share_frozen: bool = False) -> None:
        model = unwrapped(model)
        named = model.named_parameters(remove_duplicate=False)
        fixed = {name: value for name, value in named if share_frozen and not value.requires_grad}
        shared = {name: value for name, value in fixed.items() if value.dim() > 0}
        self.shared, self._fixed = frozenset(shared), frozenset(fixed)
        self.model = _frozen_copy(model, shared.values())

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: float) -> None:
        """Move towards ``model``: ``momentum`` 1 leaves the teacher, 0 replaces it.

        Args:
            model: The student; same parameter names and shapes as at construction.
            momentum: Weight of the old teacher, in ``[0, 1]``.
        Raises:
            ValueError: If the momentum is out of range, the names or shapes differ (the first one is named), or a
                shared parameter is not frozen any more.
        """
        check_momentum("momentum", momentum)
        model = unwrapped(model)
        self._share(model)
        own = dict(self.model.named_parameters())
        theirs = dict(model.named_parameters())
        _check_names(own, theirs, "parameter")
        alike: list[tuple[Tensor, Tensor]] = []  # the teacher's and the student's
        for name, parameter in own.items():
            student = theirs[name].detach()
            if name in self.shared:
                continue
            if momentum == 0.0 or name in self._fixed:
                parameter.copy_(student)
            elif (student.dtype, student.device) == (parameter.dtype, parameter.device):
                alike.append((parameter, student))
            else:  # one by one: all copies in float32 at once would be another model
                _move([parameter], [student.to(parameter.device, parameter.dtype)], momentum)
        if alike:
            _move([own for own, _ in alike], [student for _, student in alike], momentum)
        self._copy_buffers(model)

    def reset(self, model: nn.Module) -> None:
        """Start anew from ``model``: the same as an update with momentum 0."""
        self.update(model, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the teacher's weights and persistent buffers by name, without those that are the student's."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.shared}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, bit for bit.

        Args:
            state_dict: Tensors by name. Of parameters that share storage one name is enough; those that are the
                student's may be there with its values, up to rounding, as version 0.1 wrote them of a frozen tower.
        Raises:
            ValueError: If a name is missing, unknown or has another shape.
        """
        own = self.state_dict()
        own_and_shared = self.model.state_dict()
        given = {
            name: tensor
            for name, tensor in state_dict.items()
            if name not in self.shared or not _is_rounding(tensor, own_and_shared[name])
        }
        for names in names_by_storage(own):
            if there := [name for name in names if name in given]:
                given |= {name: given[there[0]] for name in names if name not in given}
        _check_names(own, given, "tensor")
        self.model.load_state_dict(given, strict=not self.shared)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[nn.Module]:
        """Lend the average to the student: inside, ``model`` has the teacher's weights and buffers, after it its own.

        The values are copied in place and back, in the student's dtype and on its device, so that DDP, compiled code
        and optimizers keep the tensors that they know. The student is restored bit for bit, also after an exception
        and after an evaluation that cast it (``bf16_full_eval``). For evaluating and saving: whatever else changes the
        student inside is undone. The memory of one more student is needed meanwhile.

        Args:
            model: The student; same names and shapes as at construction.
        Returns:
            A context manager that gives ``model``.
        Raises:
            ValueError: If the names or shapes differ; the student is as it was.
        """
        network = unwrapped(model)
        lent = _tensors(self.model)
        _check_names(lent, _tensors(network), "tensor")
        kept = {name: tensor.detach().clone() for name, tensor in _tensors(network).items()}
        try:
            _put(lent, network)
            yield model
        finally:
            _put(kept, network, dtypes=True)

    def to(self, device: torch.device) -> Teacher:
        """Move the network to a device, shared parameters included. The dtype stays as it is."""
        self.model.to(device)
        return self

    def _share(self, model: nn.Module) -> None:
        """Take over the frozen parameters of a student that is another model, or was moved by making new ones."""
        if not self._fixed:
            return
        own, theirs = (dict(network.named_parameters(remove_duplicate=False)) for network in (self.model, model))
        _check_names(own, theirs, "parameter")
        for name in sorted(self._fixed):
            if theirs[name].requires_grad:
                raise ValueError(
                    f"Expected parameter `{name}` frozen, as when the teacher was made, got one that is trained. "
                    "Make a new Teacher after changing `requires_grad`."
                )
            if name in self.shared and own[name] is not theirs[name]:
                module, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(module), leaf, theirs[name])

    def _copy_buffers(self, model: nn.Module) -> None:
        own = dict(self.model.named_buffers())
        theirs = dict(model.named_buffers())
        _check_names(own, theirs, "buffer")
        for name, buffer in own.items():
            buffer.copy_(theirs[name].to(buffer.device))


def _move(own: list[Tensor], theirs: list[Tensor], momentum: float) -> None:
    """``own += (1 - momentum) * (theirs - own)``, in place, in one pass: weights that are alike stay, bit for bit."""
    torch._foreach_lerp_(own, theirs, 1.0 - momentum)


@lru_cache(maxsize=4)
def _beta_sums(total_steps: int, update_every: int, beta: float) -> list[float]:
    """``W`` after each snapshot, up to a constant factor."""
    weights = []
    for step in range(0, total_steps + 1, update_every):
        tau = (step + 0.5) / (total_steps + 1)
        weights.append((tau * (1.0 - tau)) ** (beta - 1.0))
    return list(accumulate(weights))


def check_momentum(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a momentum, i.e. lies in ``[0, 1]``."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"Expected `{name}` in [0, 1], got {value}. It is the weight of the old teacher.")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that are not saved included; shared ones once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@torch.no_grad()
def _put(values: Mapping[str, Tensor], network: nn.Module, *, dtypes: bool = False) -> None:
    """Copy values in place; ``dtypes``: give back a dtype that was changed meanwhile, too."""
    for name, tensor in _tensors(network).items():
        if dtypes and tensor.dtype != values[name].dtype:
            tensor.data = values[name].to(tensor.device)
        else:
            tensor.copy_(values[name])


def _frozen_copy(model: nn.Module, shared: Iterable[Tensor]) -> nn.Module:
    """A copy in at least float32; parameters that are one tensor stay one, and those in ``shared`` are not copied."""
    kept = {id(parameter): parameter for parameter in shared}
    teacher = copy.deepcopy(model, dict(kept))
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        if id(tensor) in kept:
            continue
        if tensor.is_floating_point():
            tensor.data = at_least_float32(tensor.data)
        tensor.requires_grad_(False)
        tensor.grad = None
    return teacher.eval()


def _is_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by no more than float32 averages of equal values do."""
    return one.shape == other.shape and torch.allclose(one.double().cpu(), other.double().cpu(), rtol=1e-5, atol=1e-7)


def _check_names(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], kind: str) -> None:
    for name in sorted(own.keys() ^ theirs.keys()):
        side = "the teacher" if name in own else "the other side"
        raise ValueError(
            f"Expected the {kind}s that the teacher was made from, got a difference: `{name}` exists only in {side}. "
            "Make a new Teacher from the model that is trained now."
        )
    for name, tensor in own.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"Expected {kind} `{name}` of shape {tuple(tensor.shape)}, got {tuple(theirs[name].shape)}. "
                "Make a new Teacher from the model that is trained now."
            )
