"""The model that a run started from: a network that never moves, saved as a name and a checksum, not by value."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..basics.fingerprint import fingerprint
from ..basics.precision import wide_dtype
from ..basics.redaction import public
from ..basics.tensor_files import tensors_flaw
from ..basics.whole_file import whole_file

START_NAME = "start.safetensors"
_NAME, _HASH, _MEAN = "model", "hash", "difference_mean"


class Start:
    """What a run keeps of its beginning.

    Args:
        network: The model before the first step, frozen; its weights are never written.
        name: Where it came from, for people; of a folder of the machine the last part is kept: checkpoints are pushed.
        size: ``D``, of embeddings whose moves are averaged; ``None``: no term needs their mean.
    Attributes:
        mean: ``(D,)``, the moving mean of how far embeddings have moved since, zeros at first; ``None`` without a size.
    """

    def __init__(self, network: nn.Module, name: str = "", size: int | None = None) -> None:
        self.network, self.name = network, str(public(name))
        kind = next(network.parameters())
        self.mean: Tensor | None = None if size is None else kind.new_zeros(size, dtype=wide_dtype(kind.dtype))
        self._known: tuple[int, str] | None = None  # state of the weights, and their checksum

    @property
    def checksum(self) -> str:
        """Of all weights."""
        state = sum(value._version for value in self.network.parameters())
        if self._known is None or self._known[0] != state:
            self._known = state, fingerprint(self.network)
        return self._known[1]

    def save(self, path: str | Path) -> None:
        """Write name, checksum and mean; a reader sees the whole file or none."""
        tensors = {} if self.mean is None else {_MEAN: self.mean.detach().cpu()}
        with whole_file(path) as beside:
            save_file(tensors, str(beside), {"format": "pt", _NAME: self.name, _HASH: self.checksum})

    def load(self, path: str | Path) -> None:
        """Restore the mean, bit for bit; see :meth:`flaw` for what is to be looked at before."""
        if self.mean is not None:
            self.mean = load_file(str(path))[_MEAN].to(self.mean.device)

    def flaw(self, path: str | Path) -> str | None:
        """Return what is wrong with a file that :meth:`save` wrote; ``None`` if nothing is.

        Another start model than the run's is: its terms would pull towards other weights from here on.
        """
        if (flaw := tensors_flaw(path, {} if self.mean is None else {_MEAN: self.mean})) is not None:
            return flaw
        with safe_open(str(path), framework="pt") as opened:
            said = opened.metadata() or {}
        if said.get(_HASH) != self.checksum:
            started = f" ({said[_NAME][:200]!r})" if said.get(_NAME) else ""
            return (
                f"{Path(path).name} is of a run that started from another model{started}; make the trainer with the "
                "model that the run began with"
            )
        return None
