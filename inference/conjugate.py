"""Exponential families along one latent: what a conditional is, from its log density at a few points, and a draw of it.

    f(v) = constant + b . T(v)

Where the log joint, as a function of one latent, is linear in the statistics T of a family, as many of its values as
there are statistics, and one more, tell b, and with it the conditional in closed form: no algebra on the program, and
the data enter by nothing but the density. The points stand in standard coordinates t, so that b is one product with a
matrix known beforehand. Whether f is of the family is seen at points that were not used.

    Normal      t = (v - centre) / scale    T = (t_i, t_i t_j)
    Power(p)    t = v / scale               T = (log t, t^p)          t^p is Gamma: p = 1 gamma, p = -1 inverse gamma
    Beta        t = v                       T = (log t, log(1 - t))
    Dirichlet   t = v                       T = log t_k

Shapes: points (P, ..., *event), log densities (P, ...), where ... are chains and elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from .batching import log_gammas

MOST_DIMENSIONS = 10  # of a normal vector: it takes (D + 1) (D + 2) / 2 points
POWERS = (1.0, -1.0, -2.0, 2.0)
TINY = torch.finfo(torch.float64).tiny
WIDE = 2.0  # sds of the conditional that points stand apart


class Frame(NamedTuple):
    """Where the points of each element stand: centre and scale, (..., *event); moved to where the conditional is."""

    centre: Tensor
    scale: Tensor


class Fit(NamedTuple):
    """Coefficients b (m, ...), and whether they are those of a distribution, (...)."""

    b: Tensor
    proper: Tensor


class Family(Protocol):
    """One exponential family; `event` is the number of trailing dimensions of a value, 0 or 1."""

    @property
    def word(self) -> str: ...

    @property
    def event(self) -> int: ...

    @property
    def standard(self) -> Tensor:
        """The points in standard coordinates, (m + 1, *event)."""

    def statistics(self, t: Tensor) -> Tensor:
        """T at t (..., *event), (m, ...)."""

    def to_standard(self, v: Tensor, frame: Frame) -> Tensor: ...

    def to_value(self, t: Tensor, frame: Frame) -> Tensor: ...

    def proper(self, b: Tensor) -> Tensor: ...

    def draw(self, b: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        """A draw for each element, (..., *event), and where to put the points next."""


def points(family: Family, frame: Frame) -> Tensor:
    """Where to evaluate the log density, (m + 1, ..., *event)."""
    t = family.standard.to(frame.centre)
    own = t.dim() - 1
    lead = frame.centre.dim() - own
    return family.to_value(t.reshape(t.shape[0], *[1] * lead, *t.shape[1:]).expand(len(t), *frame.centre.shape), frame)


def fit(family: Family, log_density: Tensor) -> Fit:
    """From log densities (m + 1, ...) at `points`. Raises nothing: what is no distribution is not `proper`."""
    rise = log_density[1:] - log_density[:1]
    solver = _solver(family).to(rise)
    b = (solver.reshape(*solver.shape, *[1] * (rise.dim() - 1)) * rise).sum(1)
    return Fit(b, family.proper(b) & log_density.isfinite().all(0))


def misfit(family: Family, b: Tensor, frame: Frame, first: Tensor, value: Tensor, log_density: Tensor) -> Tensor:
    """How far log densities (...) at `value` (..., *event) are from the family's, relative to what rounding allows: of
    the family where below 1. `first` is the log density at the first point."""
    t = family.to_standard(value, frame)
    origin = family.statistics(family.standard[:1])[:, 0].to(b)
    rise = ((family.statistics(t) - origin.reshape(-1, *[1] * (b.dim() - 1))) * b).sum(0)
    found = log_density - first
    allowed = 1e-8 * (1 + log_density.abs() + first.abs()) + 1e-7 * found.abs()
    return torch.where(found.isfinite() & rise.isfinite(), (found - rise).abs() / allowed, math.inf)


def _solver(family: Family) -> Tensor:
    """The matrix from differences of the log density to b."""
    found = _SOLVERS.get(family)
    if found is None:
        t = family.statistics(family.standard)  # (m, m + 1)
        found = _SOLVERS[family] = torch.linalg.inv((t[:, 1:] - t[:, :1]).T)
    return found


_SOLVERS: dict[Any, Tensor] = {}  # constants of the families


@dataclass(frozen=True)
class Normal:
    """f(t) = g . t - t Q t / 2: N(Q^-1 g, Q^-1), of a number (D = 0) or of a vector of D."""

    dim: int = 0
    word = "normal"

    @property
    def event(self) -> int:
        return 1 if self.dim else 0

    @cached_property
    def _pairs(self) -> tuple[list[int], list[int]]:
        rows, columns = torch.triu_indices(self.dim or 1, self.dim or 1).tolist()
        return rows, columns

    @cached_property
    def standard(self) -> Tensor:
        d = self.dim or 1
        one = torch.eye(d, dtype=torch.float64)
        both = [one[i] + one[j] for i, j in zip(*self._pairs, strict=True) if i < j]
        t = torch.cat([torch.zeros(1, d, dtype=torch.float64), one, -one, *(row[None] for row in both)])
        return t if self.dim else t[:, 0]

    def statistics(self, t: Tensor) -> Tensor:
        t = t.movedim(-1, 0) if self.dim else t[None]
        rows, columns = self._pairs
        return torch.cat([t, t[rows] * t[columns]])

    def to_standard(self, v: Tensor, frame: Frame) -> Tensor:
        return (v - frame.centre) / frame.scale

    def to_value(self, t: Tensor, frame: Frame) -> Tensor:
        return frame.centre + frame.scale * t

    def _precision(self, b: Tensor) -> Tensor:
        """Q, (..., D, D)."""
        d = self.dim
        rows, columns = self._pairs
        Q = b.new_zeros((*b.shape[1:], d, d))
        for part, i, j in zip(b[d:], rows, columns, strict=True):
            Q[..., i, j] = Q[..., j, i] = -part * (2 if i == j else 1)
        return Q

    def proper(self, b: Tensor) -> Tensor:
        if self.dim <= 1:
            return b[1] < 0
        Q = self._precision(b)
        return Q.isfinite().all(-1).all(-1) & (torch.linalg.cholesky_ex(Q.nan_to_num())[1] == 0)

    def draw(self, b: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        if self.dim <= 1:
            mean, sd = -b[0] / (2 * b[1]), (-2 * b[1]).rsqrt()
            mean, sd = (mean[..., None], sd[..., None]) if self.dim else (mean, sd)
            t = mean + sd * torch.randn_like(mean)
        else:
            factor = torch.linalg.cholesky(self._precision(b))
            mean = torch.cholesky_solve(b[: self.dim].movedim(0, -1)[..., None], factor)[..., 0]
            noise = torch.randn_like(mean)[..., None]
            t = mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)[..., 0]
            sd = torch.diagonal(torch.cholesky_inverse(factor), dim1=-2, dim2=-1).sqrt()
        return self.to_value(t, frame), Frame(self.to_value(mean, frame), frame.scale * WIDE * sd)


@dataclass(frozen=True)
class Power:
    """f(t) = b_1 log t + b_2 t^p: t^p is Gamma((b_1 + 1) / p, -b_2)."""

    power: float = 1.0
    event = 0

    @property
    def word(self) -> str:
        return {1.0: "gamma", -1.0: "inverse gamma"}.get(self.power, f"gamma of its power {self.power:g}")

    @property
    def standard(self) -> Tensor:
        return torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def statistics(self, t: Tensor) -> Tensor:
        return torch.stack([t.log(), t**self.power])

    def to_standard(self, v: Tensor, frame: Frame) -> Tensor:
        return v / frame.scale

    def to_value(self, t: Tensor, frame: Frame) -> Tensor:
        return t * frame.scale

    def proper(self, b: Tensor) -> Tensor:
        return ((b[0] + 1) / self.power > 0) & (b[1] < 0)

    def draw(self, b: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        shape = (b[0] + 1) / self.power
        gamma = torch._standard_gamma(shape).clamp_min(TINY) / -b[1]
        middle = (shape / -b[1]) ** (1 / self.power) * frame.scale
        v = (gamma ** (1 / self.power) * frame.scale).clamp(TINY, 1 / TINY)
        return v, Frame(frame.centre, middle.clamp(1e-100, 1e100))


def _as_it_is(_: Any, value: Tensor, frame: Frame) -> Tensor:
    """Of values between 0 and 1: they are standard coordinates."""
    return value


def _above_minus_one(_: Any, b: Tensor) -> Tensor:
    return (b > -1).all(0)


@dataclass(frozen=True)
class Beta:
    """f(t) = b_1 log t + b_2 log(1 - t): Beta(b_1 + 1, b_2 + 1)."""

    word = "beta"
    event = 0

    @property
    def standard(self) -> Tensor:
        return torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)

    def statistics(self, t: Tensor) -> Tensor:
        return torch.stack([t.log(), torch.log1p(-t)])

    to_standard = to_value = _as_it_is
    proper = _above_minus_one

    def draw(self, b: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        t = torch.softmax(log_gammas(b + 1), 0)[0]
        return t.clamp(TINY, 1 - 2.0**-53), frame


@dataclass(frozen=True)
class Dirichlet:
    """f(t) = sum_k b_k log t_k: Dirichlet(b + 1)."""

    size: int
    word = "Dirichlet"
    event = 1

    @cached_property
    def standard(self) -> Tensor:
        k = self.size
        t = torch.cat([torch.ones(1, k, dtype=torch.float64), 1 + 3 * torch.eye(k, dtype=torch.float64)])
        return t / t.sum(1, keepdim=True)

    def statistics(self, t: Tensor) -> Tensor:
        return t.log().movedim(-1, 0)

    to_standard = to_value = _as_it_is
    proper = _above_minus_one

    def draw(self, b: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        t = torch.softmax(log_gammas(b + 1), 0).clamp_min(TINY)
        return t.movedim(0, -1), frame


def candidates(domain: Any, event_shape: tuple[int, ...]) -> Iterator[Family]:
    """Families whose values satisfy the constraint: of whole events where these are vectors, else of their numbers."""
    while isinstance(domain, constraints.independent):
        domain = domain.base_constraint
    size = event_shape[0] if len(event_shape) == 1 else 0
    if domain is constraints.real or domain is constraints.real_vector:
        if not event_shape:
            yield Normal()
        elif 0 < size <= MOST_DIMENSIONS:
            yield Normal(size)
    elif domain is constraints.simplex and size:
        yield Dirichlet(size)
    elif _is(domain, constraints.greater_than, constraints.greater_than_eq, lower_bound=0):
        yield from map(Power, POWERS)
    elif _is(domain, constraints.interval, constraints.half_open_interval, lower_bound=0, upper_bound=1):
        yield Beta()


def _is(domain: Any, *kinds: Callable[..., Any], **bounds: float) -> bool:
    """One of these constraints with plain numbers as bounds."""
    found = [getattr(domain, name, None) for name in bounds]
    return isinstance(domain, tuple(k for k in kinds if isinstance(k, type))) and found == list(bounds.values())
