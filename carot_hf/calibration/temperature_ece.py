"""The temperature of the least ECE: polynomials for the confidences of the rows stand in for most passes over them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ece.binning import calibration_bins
from .links import LINKS, chunk_of
from .metrics import top_label
from .rows import LOWEST_EXPONENT, LogitRows, chunk_rows, row_chunks

Floats = NDArray[np.float64]

_BINS = 10
_GRID = 600
_FINER, _ROUNDS = 13, 3
_TIE = 1e-7  # two values of ECE closer than this differ by rounding
_WIDTH, _NARROWEST = 1.25, 1.03  # highest temperature of a piece by its lowest
_NODES, _DEGREE = 10, 7  # of the polynomials: two nodes more than they need, which show how far off they are
_RAGGED = 1 << 20  # confidences on a grid, up to which it is made finer
_FEW = 1 << 20  # logits, up to which float64 costs nothing
_ROOM = 1 << 21  # confidences that are worked on at a time


def fit_ece(logits: Tensor | LogitRows, labels: Tensor, low: float, high: float, start: float) -> float:
    """The temperature in ``[low, high]`` of the least ECE over 10 uniform bins; among equals the nearest to ``start``.

    No worse than each of 600 temperatures from ``low`` to ``high``, up to 1e-7, and finer ones around the best of them.
    ECE is at least the distance of the mean confidence from the accuracy, and that confidence falls with the
    temperature: where the distance is beyond the best ECE so far, nothing farther out is looked at. In between the
    logits are read once for ten nodes, from which each row's confidence follows as a polynomial; rows that it puts
    next to the edge of a bin are computed from their logits, and in the end all rows at the temperature that wins.

    Args:
        logits: ``(N, K)``, checked.
        labels: ``(N,)`` int64.
        low: Lowest temperature.
        high: Highest temperature.
        start: Where the search begins, in ``[low, high]``: the optimum of the NLL.
    """
    search = _Search(logits, labels, low, high, start)
    search.walk()
    for _ in range(_ROUNDS):
        search.refine()
    return search.winner()


@dataclass(frozen=True, eq=False)
class Piece:
    """The confidences of all rows between two temperatures.

    Attributes:
        low: Lowest temperature.
        high: Highest.
        logs: ``(10, N)`` float64, the logarithm of each row's sum of exponentials at nodes evenly spaced in ``1 / T``.
    """

    low: float
    high: float
    logs: Floats

    @cached_property
    def off(self) -> Floats:
        """``(N,)`` how far off a confidence may be: eight times what the nodes have beside the polynomial."""
        beside = _beside() @ self.logs
        return np.asarray(8.0 * np.sqrt(np.square(beside).sum(axis=0)))

    def confidences(self, temperatures: Floats) -> Floats:
        """``(len(temperatures), N)`` largest probability of each row at temperatures within."""
        first, last = 1.0 / self.high, 1.0 / self.low
        logs: Floats = _interpolation(2.0 * (1.0 / temperatures - first) / (last - first) - 1.0) @ self.logs
        return np.exp(np.negative(logs, out=logs), out=logs)

    def within(self, temperatures: Floats) -> Floats:
        """Those of some temperatures that lie in the piece."""
        inside: Floats = temperatures[(temperatures >= self.low) & (temperatures <= self.high)]
        return inside


class _Search:
    """The temperatures looked at so far, and their ECE."""

    def __init__(self, logits: Tensor | LogitRows, labels: Tensor, low: float, high: float, start: float) -> None:
        self._logits, self._labels, self._low, self._high, self._start = logits, labels, low, high, start
        self._grid = np.append(_grid(low, high, len(logits)), start)
        hits = [chunk_of(rows, targets).hits for _, rows, targets in row_chunks(logits, labels)]
        self._correct = torch.cat(hits).cpu().numpy()
        self._accuracy, self._double = float(self._correct.mean()), logits.dtype == torch.float64
        self._rounding = 1e-9 if self._double else 3e-6  # of a confidence, with room to spare
        self._work = torch.float64 if logits.shape[0] * logits.shape[1] <= _FEW else logits.dtype
        self._found: dict[float, float] = {}
        self._exact: set[float] = set()
        self._pieces: list[Piece] = []  # those around the best so far
        self._means: dict[float, float] = {}  # confidence at the ends of what was looked at

    def walk(self) -> None:
        """Look at the grid around the start, then up and down, piece by piece, while the best may lie farther on."""
        half = math.sqrt(_WIDTH)
        bottom, top = max(self._low, self._start / half), min(self._high, self._start * half)
        self._add(bottom, top)
        while top < self._high and self._accuracy - self._means[top] <= self._least():
            low, top = top, min(top * _WIDTH, self._high)
            self._add(low, top)
        while bottom > self._low and self._means[bottom] - self._accuracy <= self._least():
            bottom, high = max(bottom / _WIDTH, self._low), bottom
            self._add(bottom, high)

    def refine(self) -> None:
        """Look at finer temperatures between the best and its neighbours."""
        finer = np.geomspace(*self._around(), _FINER)[1:-1]
        for piece in self._pieces:
            self._look(piece, piece.within(finer))

    def winner(self) -> float:
        """The best temperature, by an ECE of its logits."""
        while (best := self._best()) not in self._exact:
            self._found[best] = self._ece(top_label(self._logits, self._labels, best)[0])
            self._exact.add(best)
        return best

    def _least(self) -> float:
        """What is no more than the least ECE but for rounding."""
        return min(self._found.values()) + _TIE

    def _best(self) -> float:
        least = self._least()
        return min((t for t, ece in self._found.items() if ece <= least), key=lambda t: abs(math.log(t / self._start)))

    def _around(self) -> tuple[float, float]:
        """The neighbours of the best."""
        seen = sorted(self._found)
        place = seen.index(self._best())
        return seen[max(place - 1, 0)], seen[min(place + 1, len(seen) - 1)]

    def _ece(self, confidences: NDArray[Any]) -> float:
        return calibration_bins(confidences, self._correct, _BINS).ece

    def _add(self, low: float, high: float) -> None:
        """Look at the grid between two temperatures, in halves where one polynomial does not do."""
        piece = Piece(low, high, _logs(self._logits, self._labels, low, high, self._work))
        limit = 1e-8 if self._work == torch.float64 else 1.5e-6  # float32 alone is off by a third of it
        if float(piece.off.mean()) > limit and high > _NARROWEST * low:
            middle = math.sqrt(low * high)
            self._add(low, middle)
            self._add(middle, high)
            return
        self._means[high], self._means[low] = (float(np.exp(-piece.logs[end]).mean()) for end in (0, -1))
        self._look(piece, piece.within(self._grid))
        below, above = self._around()
        self._pieces = [kept for kept in (*self._pieces, piece) if kept.low <= above and kept.high >= below]

    def _look(self, piece: Piece, temperatures: Floats) -> None:
        """Find the ECE at temperatures within a piece."""
        size = max(1, _ROOM // len(self._correct))
        new = np.array([t for t in temperatures.tolist() if t not in self._found])
        for group in np.split(new, range(size, len(new), size)):
            confidences = piece.confidences(group)
            which, rows = _near_an_edge(confidences, piece.off + self._rounding).nonzero()
            confidences = confidences.astype(np.float64 if self._double else np.float32, copy=False)
            if len(rows):
                confidences[which, rows] = _of_rows(self._logits, self._labels, rows, group[which])
            self._found |= {t: self._ece(row) for t, row in zip(group.tolist(), confidences, strict=True)}


def _grid(low: float, high: float, rows: int) -> Floats:
    """600 temperatures, their ends included, and for few rows, whose ECE is more ragged, up to three between two."""
    coarse = np.append(np.geomspace(low, high, _GRID)[:-1], high)
    coarse[0] = low
    times = min(max(1, _RAGGED // (rows * _GRID)), 4)
    step = (math.log(high) - math.log(low)) / (_GRID - 1)
    between: Floats = coarse[:-1, None] * np.exp(step * np.arange(times) / times)
    return np.append(between, high)


def _logs(logits: Tensor | LogitRows, labels: Tensor, low: float, high: float, work: torch.dtype) -> Floats:
    """``(10, N)`` logarithm of each row's sum of exponentials at nodes from ``1 / high`` to ``1 / low``.

    From a node to the next the exponentials are multiplied by their ratios, which is faster than to take them anew.
    """
    logs = np.empty((_NODES, len(logits)))
    first, last = 1.0 / high, 1.0 / low
    room: list[Tensor] = []  # made once: the first chunk is the largest
    for start, rows, _ in row_chunks(logits, labels):
        if not room:
            room = [torch.empty_like(rows, dtype=torch.promote_types(work, rows.dtype)) for _ in range(3)]
        shifted, values, ratios = (part[: len(rows)] for part in room)
        torch.sub(rows, rows.amax(dim=1, keepdim=True), out=shifted).clamp_(min=LOWEST_EXPONENT / last)
        torch.mul(shifted, (last - first) / (_NODES - 1), out=ratios).exp_()
        sums = [torch.exp(shifted.mul_(first), out=values).sum(dim=1)]
        sums += [values.mul_(ratios).sum(dim=1) for _ in range(_NODES - 1)]
        logs[:, start : start + len(rows)] = torch.stack(sums).double().log_().cpu().numpy()
    return logs


def _near_an_edge(confidences: Floats, off: Floats) -> NDArray[np.bool_]:
    """Which confidences are no farther from an inner edge of the bins than they may be off."""
    scaled = confidences * _BINS
    edges = np.rint(scaled)
    inner = (edges > 0) & (edges < _BINS)
    near: NDArray[np.bool_] = np.abs(np.subtract(scaled, edges, out=scaled), out=scaled) <= _BINS * off
    return np.logical_and(near, inner, out=near)


def _of_rows(logits: Tensor | LogitRows, labels: Tensor, rows: NDArray[np.int64], temperatures: Floats) -> NDArray[Any]:
    """``(n,)`` confidence of each of ``n`` rows at a temperature of its own, as `top_label` computes it."""
    found = np.empty(len(rows))
    step, order = chunk_rows(logits.shape[1]), np.argsort(rows, kind="stable")
    starts, firsts = np.unique(rows[order] // step * step, return_index=True)
    for start, these in zip(starts.tolist(), np.split(order, firsts[1:]), strict=True):
        ((_, chunk, targets),) = row_chunks(logits[start : start + step], labels[start : start + step])
        at = torch.from_numpy(rows[these] - start).to(chunk.device)
        by = torch.from_numpy(temperatures[these]).to(chunk)
        part = chunk_of(chunk[at], targets[at]).divided(1.0, 0.0, by)
        found[these] = LINKS["softmax"].confidence(part, 1.0, 0.0).cpu().numpy()
    return found


def _interpolation(places: Floats) -> Floats:
    """``(n, 10)`` from values at nodes evenly spaced in [-1, 1] to those of the least-squares polynomial at places."""
    return np.asarray(np.polynomial.chebyshev.chebvander(places, _DEGREE) @ np.linalg.pinv(_polynomials()))


def _beside() -> Floats:
    """``(2, 10)`` orthonormal rows at right angles to the values of all polynomials at the nodes."""
    return np.asarray(np.linalg.qr(_polynomials(), mode="complete")[0].T[_DEGREE + 1 :])


def _polynomials() -> Floats:
    """``(10, 8)`` values at the nodes of the polynomials up to the degree."""
    return np.asarray(np.polynomial.chebyshev.chebvander(np.linspace(-1.0, 1.0, _NODES), _DEGREE), np.float64)
