"""Lanes: many chains (or particles) of many data, each a row of one matrix, evaluated together.

Lane l is chain l // N of datum l % N. A density of N data is asked for the rows that the lanes are of, so that any
lanes can stand side by side, always as many as the compiled code expects: thousands of data pass through in blocks,
and memory stays where it is. Where the program's data cannot be sliced, or all lanes fit into one block, they are all
evaluated as they stand.

What is evaluated are the `parts` of a density: the log joint alone, or two ends of a path between distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .density import Density
from .preflight import check_minibatch
from .problem import ProblemError

Parts = Callable[[Density, Tensor], tuple[Tensor, ...]]
WIDTH = 1024  # lanes of a block
ALIKE = 1e-6  # relative: how far rows may be from the same data evaluated together


def log_joint(density: Density, u: Tensor) -> tuple[Tensor, ...]:
    """The posterior, unnormalised: one part."""
    return (density.log_joint(u),)


class Lanes:
    """All lanes of a density, and the block of them that is being moved.

    per_datum  chains or particles of each datum
    parts      the log densities that are evaluated, (u (*sample, *batch, D)) -> J of (*sample, *batch)
    width      lanes of a block, at most; where that is less than all, the data must be ones that can be sliced
    reads      tensors that the parts read and that change between calls
    """

    def __init__(
        self,
        density: Density,
        per_datum: int,
        parts: Parts = log_joint,
        width: int = WIDTH,
        reads: Sequence[Tensor] = (),
    ) -> None:
        self.density, self.per_datum, self.parts, self.reads = density, per_datum, parts, list(reads)
        self.data = max(1, density.batch_shape.numel())
        self.total = per_datum * self.data
        self.shape = (per_datum, *density.batch_shape)
        self.width = self.total if width >= self.total or not _sliceable(density, parts) else width
        self.whole = self.width == self.total
        self._outer = density.row_numbers  # of a minibatch that the lanes are in
        self.rows = None if self.whole and self._outer is None else self._numbers(torch.arange(self.width)).clone()
        self.ids = torch.arange(self.width)
        self._slower: dict[str, str] = {}

    def renew(self) -> Lanes:
        """The same lanes, of the minibatch that the density is in now."""
        self._outer = self.density.row_numbers
        self.place(torch.arange(self.width))
        return self

    def blocks(self) -> Iterator[tuple[Tensor, int]]:
        """Lane numbers (width,), and how many of them count: the last block is filled up with lanes that do not."""
        for first in range(0, self.total, self.width):
            self.place(torch.arange(first, first + self.width) % self.total)
            yield self.ids, min(self.width, self.total - first)

    def place(self, ids: Tensor) -> None:
        """Let these lanes (width,) be the ones that are evaluated."""
        self.ids = ids
        if self.rows is not None:
            self.rows.copy_(self._numbers(ids))

    def _numbers(self, ids: Tensor) -> Tensor:
        """The rows of the data that are evaluated for lanes."""
        within = ids % self.data if not self.whole else torch.arange(self.data)
        if self._outer is None:
            return within.to(self.density.device)
        return self._outer[within.to(self._outer.device)]

    def evaluate(self, u: Tensor, gradient: bool = True) -> tuple[Tensor, Tensor]:
        """The parts (W, J) at u (W, D), and their gradients (W, J, D), or (W, J, 0) without."""
        with nullcontext() if self.rows is None else self.density.minibatch(self.rows):
            shaped = u.reshape(*self.shape, u.shape[1]) if self.whole else u
            if not gradient:
                values = torch.stack([part.reshape(-1) for part in self.parts(self.density, shaped)], 1)
                return values, values.new_zeros((*values.shape, 0))
            v = shaped.detach().requires_grad_(True)
            with torch.enable_grad():
                found = self.parts(self.density, v)
                slopes = [_gradient(part, v, last=part is found[-1]) for part in found]
            values = torch.stack([part.detach().reshape(-1) for part in found], 1)
            return values, torch.stack([slope.reshape(u.shape) for slope in slopes], 1)

    def compile(
        self, function: Callable[..., tuple[Tensor, ...]], examples: Sequence[tuple[Tensor, ...]]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """A function that calls `evaluate`, compiled. Its evaluations are not counted: see `count`."""

        def uncounted(*args: Tensor) -> tuple[Tensor, ...]:
            with self.density.uncounted():  # also where it stays as it is, and calls the density each time
                return function(*args)

        rows = [] if self.rows is None else [self.rows]
        made = self.density.compile(uncounted, list(examples), [*rows, *self.reads])
        if made.why:
            self._slower[made.backend] = made.why
        return made

    def notes(self) -> tuple[str, ...]:
        """In words, what of the compiled functions is slower than it could be."""
        return tuple(f"part of the density runs as {b}, which is slower: {why}" for b, why in self._slower.items())

    def count(self, evaluations: float, gradient: bool = True) -> None:
        """Tell the density of evaluations of the block's lanes: one is all data once."""
        share = self.density.batch_share * self.width / self.data
        self.density.counts["gradients" if gradient else "evaluations"] += evaluations * share


def _sliceable(density: Density, parts: Parts) -> bool:
    """`_slices`, looked at once for each density."""
    key = ("slices", parts, density.row_numbers is None)
    if key not in density.kept:
        density.kept[key] = _slices(density, parts)
    return density.kept[key]


def _slices(density: Density, parts: Parts) -> bool:
    """Whether rows can be evaluated by themselves, and have the densities that they have among all."""
    if len(density.batch_shape) != 1 or density.improper:
        return False
    if density.row_numbers is not None:
        return True  # they were looked at when the minibatch was made
    try:
        check_minibatch(density)
    except ProblemError:
        return False
    size = density.batch_shape[0]
    with density.uncounted(), torch.random.fork_rng(devices=[]), torch.no_grad():
        u = density.unconstrain(density.prior(2).values)
        ids = torch.randperm(2 * size, device=u.device)[: size + 1]  # some rows twice
        together = [part.reshape(-1)[ids] for part in parts(density, u)]
        try:
            with density.minibatch(ids % size):
                apart: Any = parts(density, u.reshape(-1, u.shape[-1])[ids])
        except (RuntimeError, ValueError, IndexError):
            return False
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=ALIKE, atol=ALIKE, equal_nan=True)
        for a, b in zip(together, apart, strict=True)
    )


def _gradient(value: Tensor, v: Tensor, last: bool) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(v)
    found = torch.autograd.grad(value.sum(), v, retain_graph=not last, allow_unused=True)[0]
    return torch.zeros_like(v) if found is None else found
