"""Model Stock: a merge of a few fine-tuned models with their start, tensor by tensor, by the angle between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .merging import Model, check_twins, floating, model_with


def model_stock(start: Model, models: Iterable[Model]) -> Model:
    r"""Return the model between a start and the mean of models fine-tuned from it that their angles suggest.

    .. math:: \theta_H = t \, \bar\theta + (1 - t) \, \theta_0, \qquad t = \frac{N c}{1 + (N - 1) c}

    for each tensor by its name, with the task vectors :math:`d_i = \theta_i - \theta_0` of that tensor and ``c`` the
    mean of :math:`\cos(d_i, d_j)` over all pairs. Where the models have moved alike (``c`` = 1) their mean is taken,
    where they have nothing in common (``c`` = 0) the start. Where all task vectors have one length and all pairs one
    angle, :math:`\theta_i - \theta_H` is orthogonal to :math:`d_j` for all :math:`i \ne j`. Entries that no model has
    moved keep their bits.

    Args:
        start: :math:`\theta_0`, the model that all were fine-tuned from; not changed.
        models: :math:`\theta_i`, two or more fine-tuned models of its class, e.g. of different seeds. They are read one
            after the other; of each but the first only its part in two float64 sums is kept, so a generator may load
            them one at a time. Their order does not matter, but that config, device and ``requires_grad`` of the result
            are those of the first.
    Returns:
        A new model of the same class, without ``config.calibration``.
    Raises:
        TypeError: If the models are of different classes.
        ValueError: If there are fewer than two fine-tuned models, one does not fit the start (the first differing name
            is given), or a tensor that has moved is not finite.
    Source:
        Jang et al. 2024, "Model Stock" (arXiv 2403.19522): the merge after the training, not its periodic form. Its
        code is not public. The formula is that of mergekit 0.1 (merge_methods/model_stock.py) and of fusion_bench
        (method/model_stock); both take a named tensor, whole, for a "layer", as here. For more than two models mergekit
        averages the cosines of the pairs, as here, and fusion_bench their angles. A cosine with a model that did not
        move a tensor is 0, as in both. In two things this differs: nothing is added to a length, so that small steps
        count as large ones do; and ``t`` stays in ``[0, 1]``. A mean cosine below 0 gives the start, where both go
        beyond it, without bound where the task vectors cancel out.
    """
    tensors = floating(start)
    layers = {name: _Layer(tensor.detach().cpu().double()) for name, tensor in tensors.items()}
    first: Model | None = None
    count = 0
    for count, model in enumerate(models, start=1):
        check_twins(start, model, ("`start`", f"model {count - 1}"))
        if first is None:
            first = model
        for name, tensor in floating(model).items():
            layers[name].add(tensor.detach().cpu().double())
    if first is None or count < 2:
        raise ValueError(
            f"Expected two or more fine-tuned models, got {count}. There is no angle between fewer; to move one model "
            "towards its start use `interpolate`."
        )
    return model_with(first, _merged(layers, tensors, count))


class _Layer:
    """Sums over the task vectors of one tensor, float64 on the CPU.

    The lengths of the sums say all: of unit vectors :math:`|\\sum u_i|^2 = n + 2 \\sum_{i<j} \\cos(d_i, d_j)`.
    """

    def __init__(self, start: Tensor) -> None:
        self.start, self.moved = start, 0
        self.total, self.units = torch.zeros_like(start), torch.zeros_like(start)

    def add(self, tensor: Tensor) -> None:
        """Take in the tensor of one more fine-tuned model; one that is equal counts as a task vector of length 0."""
        if torch.equal(tensor, self.start):
            return
        vector = tensor - self.start
        self.total = self.total + vector
        self.units = self.units + vector / torch.linalg.vector_norm(vector)
        self.moved += 1

    def cosine(self, count: int) -> float:
        """The mean over all pairs of ``count`` models."""
        return (float(self.units.square().sum()) - self.moved) / (count * (count - 1))


def _merged(layers: dict[str, _Layer], start: dict[str, Tensor], count: int) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        own = start[name].detach().cpu()
        if not layer.moved:
            yield name, own
            continue
        if not bool(layer.units.isfinite().all()):
            raise ValueError(
                f"Expected finite weights, got nan or inf in `{name}` of the start or of a model. Find out where the "
                "model diverged."
            )
        step = ratio(layer.cosine(count), count) / count * layer.total
        yield name, torch.where(step == 0, own.double(), layer.start + step).to(own.dtype)


def ratio(cosine: float, count: int) -> float:
    """Return ``t``, the weight of the mean of ``count`` models whose mean cosine this is."""
    if cosine <= 0:
        return 0.0
    return min(1.0, count * cosine / (1 + (count - 1) * cosine))
