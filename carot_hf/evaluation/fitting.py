"""HomeFit: what calibrates a model, fitted on held-out home data and on nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..basics.escape import guarded
from ..basics.processes import done_by_first
from ..calibration.fit import fit_scaling
from ..calibration.rows import LogitRows
from ..data.perturbed_set import bank_of, drawn_rows, perturbed_sets
from ..data.shift_set import ShiftSet
from ..data.suite import needed
from ..data.transforms import short_side
from .embed import Embedded, Embedder
from .home import METHODS, MOST_PERTURBED, HomeRows, fit_perturbed, fit_relative_density, home_rows
from .logits import Head, SetLogits
from .memory import Memory

logger = guarded(logging.getLogger(__name__))

_HELD_OUT = "to calibrate on"  # what a validation set is for
_WHOLE = 1 << 24  # logits of the validation set that are kept while its temperature is fitted


@dataclass
class HomeFit:
    """Fits on the validation set, its perturbed copies and a bank of the training, each image embedded once.

    Attributes:
        validation: The held-out set; ``None``: there is none, and nothing can be fitted on it.
        train: Images of the training, for a bank; ``None``: there are none.
        embed: Embeds sets.
        head: From embeddings to logits.
        embedder: Whose transform and collator the images go through.
        link: "softmax" or "sigmoid".
        criterion: What a temperature minimises.
        bounds: Lowest and highest temperature.
        memory: Keeps the embeddings.
        known: Of the weights as they are, in that memory.
    """

    validation: ShiftSet | None
    train: ShiftSet | None
    embed: Callable[[Mapping[str, ShiftSet], str], dict[str, Embedded]]
    head: Head
    embedder: Embedder
    link: str
    criterion: str
    bounds: tuple[float, float]
    memory: Memory
    known: dict[str, tuple[Any, ...]]

    def held_out(self, title: str = "Calibration") -> tuple[SetLogits, Tensor, Tensor]:
        """Logits, embeddings and labels of the validation set."""
        data = self.home()
        embeds, labels = self._embedded("validation", data, data, title)
        return SetLogits(embeds, self.head, data), embeds, labels

    def home(self) -> ShiftSet:
        """The validation set.

        Raises:
            ValueError: If there is none.
        """
        return needed(self.validation, "validation", _HELD_OUT)

    def fit(self, logits: LogitRows, labels: Tensor, *, warn: bool = True) -> dict[str, float]:
        """Fit what calibrates logits: "temperature" and, for SigLIP, "bias". One process does it for all.

        Args:
            logits: Of held-out rows.
            labels: ``(n,)`` int64.
            warn: Log a warning, the first time, if the temperature is at a bound.
        """

        def work() -> dict[str, float]:
            rows = logits[:] if len(logits) * logits.shape[1] <= _WHOLE else logits
            return fit_scaling(rows, labels, link=self.link, criterion=self.criterion, bounds=self.bounds, warn=False)

        fitted = done_by_first(work)
        if warn and fitted["temperature"] in self.bounds and self.memory.first("bound"):
            logger.warning(
                "The best temperature is at the bound %g of [%g, %g]: the optimum may lie outside, and what is "
                "baked in is not it. Look at the validation set, or set `calibration_bounds` wider.",
                fitted["temperature"],
                *self.bounds,
            )
        return fitted

    def further(self, home: Mapping[str, float], method: str) -> dict[str, Any]:
        """What the methods after "temperature" find, up to one of them, by the ending of their metrics.

        ``home`` is the temperature (and bias) of the validation set.
        """
        if method == "temperature":
            return {}
        part = bank_of(self.train) if method == "density" else None  # refused before any work
        rows = self.rows()
        bank = None if part is None else self._embedded("bank", self.train, part, "Bank")[0]

        def work() -> dict[str, Any]:
            found: dict[str, Any] = {METHODS["perturbed"]: fit_perturbed(rows, link=self.link, bounds=self.bounds)}
            if bank is not None:
                found[METHODS["density"]] = fit_relative_density(rows, bank, home, link=self.link)
            return found

        return done_by_first(work)

    def rows(self) -> HomeRows:
        """Held-out images and perturbed copies of them."""
        data, collator = self.home(), self.embedder.collator
        _, embeds, labels = self.held_out()
        rows = drawn_rows(data, MOST_PERTURBED)
        if self.known.get("copies", ())[:2] != (data, collator):
            part = data if rows is None else data.subset(rows, data.name)
            sets = perturbed_sets(part, side=short_side(self.embedder.transform))
            self.known["copies"] = (data, collator, self.embed(sets, "Perturbed copies"))
        clean = (embeds, labels) if rows is None else (embeds[rows], labels[rows])
        found = home_rows(clean, self.known["copies"][2], self.head, data)
        if self.memory.first("copies"):
            logger.info("Perturbed copies that are recognised (accuracy %.3f without): %s", found.accuracy, found.kept)
        return found

    def _embedded(self, key: str, data: ShiftSet | None, part: ShiftSet, title: str) -> Any:
        """Embeddings and labels of a set, or of the part that stands for it, made once of the same weights."""
        if self.known.get(key, ())[:2] != (data, self.embedder.collator):
            found = self.embed({"": part}, title)[""]
            self.known[key] = (data, self.embedder.collator, *found)
        return self.known[key][2:]


def check_home(validation: ShiftSet | None, train: ShiftSet | None, method: str) -> None:
    """Refuse, before any work, what a method, of `METHODS` or "target", cannot be fitted on.

    Raises:
        ValueError: If there is no validation set, or for "density" no training set that can be read by index.
    """
    needed(validation, "validation", _HELD_OUT)
    if method == "density":
        bank_of(train)
