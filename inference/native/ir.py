"""Loops over arrays: what a graph of tensor operations is lowered to, and C is written from.

A tensor is a strided window on a buffer, as in torch. A `Loop` computes one scalar expression at every point of an
index space and stores or reduces it; a `Call` is a routine of BLAS or LAPACK, or other C that is no loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

C_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "uint8_t",
}


@dataclass(frozen=True)
class Buffer:
    """Contiguous memory. kind: 'argument' and 'result' (given at each call), 'fixed' (constants and parameters), or
    'scratch'."""

    name: str
    kind: str
    dtype: torch.dtype
    size: int
    index: int = 0  # position among its kind


@dataclass(frozen=True)
class Window:
    """A strided view of a buffer, in elements."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.buffer.dtype

    def broadcast(self, shape: tuple[int, ...]) -> Window:
        """The same elements as a tensor of this shape, repeated by strides of zero."""
        lead = len(shape) - len(self.shape)
        own = zip(self.shape, self.strides, shape[lead:], strict=True)
        return Window(self.buffer, shape, (0,) * lead + tuple(0 if n == 1 else s for n, s, _ in own), self.offset)


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True)
class Access:
    """One element of a buffer at a point of the loops: offset + sum_l strides[l] * index_l, and for indirect access
    + sum (value of an index expression, wrapped to its size) * stride."""

    buffer: Buffer
    offset: int
    strides: tuple[int, ...]
    indirect: tuple[tuple[Expr, int, int], ...] = ()  # (index, size, stride); size 0: known to be within

    @property
    def dtype(self) -> torch.dtype:
        return self.buffer.dtype


@dataclass(frozen=True)
class Literal:
    value: float | int | bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Counter:
    """start + step * (index of a loop)."""

    loop: int
    start: int
    step: int
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True)
class Apply:
    """A C expression with {0}, {1} ... for its arguments, each computed in its own dtype and cast to `within`."""

    template: str
    args: tuple[Expr, ...]
    dtype: torch.dtype
    within: torch.dtype


Expr = Access | Literal | Counter | Apply


@dataclass(frozen=True)
class Loop:
    """target = expr at every point; with `reduce`, combined over the loops in `over`. `adds`: += into what is there.
    `over_base`: writes where other loops have written before, and so runs after them."""

    sizes: tuple[int, ...]
    expr: Expr
    target: Access
    reduce: str = ""
    over: frozenset[int] = frozenset()
    adds: bool = False
    over_base: bool = False

    def accesses(self) -> list[Access]:
        """Everything read."""
        return _accesses(self.expr) + [a for index, _, _ in self.target.indirect for a in _accesses(index)]


def _accesses(expr: Expr) -> list[Access]:
    if isinstance(expr, Access):
        return [expr] + [a for index, _, _ in expr.indirect for a in _accesses(index)]
    return [a for arg in expr.args for a in _accesses(arg)] if isinstance(expr, Apply) else []


@dataclass(frozen=True)
class Call:
    """C text with $0, $1 ... for pointers to windows, $T0 for their types, and $R0 ... for `routines` of BLAS or
    LAPACK."""

    text: str
    windows: tuple[Window, ...]
    writes: tuple[Buffer, ...]
    routines: tuple[str, ...] = ()


@dataclass
class Nest:
    """Loops that run together."""

    sizes: tuple[int, ...]
    loops: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """A lowered graph: what runs in order, and what memory it needs."""

    steps: tuple[Loop | Call, ...]
    arguments: tuple[Window, ...]
    results: tuple[Window, ...]
    fixed: tuple[Buffer, ...]
    constants: tuple[torch.Tensor, ...]  # what the fixed buffers hold, parameters included
