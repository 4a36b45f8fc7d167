"""Metropolis kernels on lanes: random walk, Langevin and Hamiltonian proposals, each lane with its own accept step.

    random walk   u' = u + eps sqrt(inverse mass) n
    Langevin      one leapfrog step (Besag 1994; Roberts & Tweedie 1996, doi:10.2307/3318418)
    Hamiltonian   several (Duane et al. 1987, doi:10.1016/0370-2693(87)91197-X), their number the same for all lanes and
                  their size drawn for each, so that no trajectory comes back to where it began, again and again

A kernel leaves invariant the density that a `Path` makes of the parts of a target; for the posterior it is the one part
there is. It is bound to lanes once, which compiles it, and then moves whichever lanes stand there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..lanes import Lanes
from . import streams

DIVERGENT = 1000.0  # nats of energy lost, from which on a trajectory counts as diverging
JITTER = 0.2  # relative, of the step sizes
MIDDLE = 0.5  # of the numbers common to all lanes


class Point(NamedTuple):
    """Where lanes are: u (W, D), the parts there (W, J) and their gradients (W, J, D)."""

    u: Tensor
    values: Tensor
    gradients: Tensor


class Moved(NamedTuple):
    """How a transition went, (W,): mean acceptance probability, energy in nats, steps taken, whether it diverged."""

    acceptance: Tensor
    energy: Tensor
    steps: Tensor
    diverging: Tensor


# (beta (W,), parts (W, J)) -> log density (W,), and its derivative with respect to each part (W, J); and of parts
# (S, W, J), particles that share their temperature, log densities (S, W).
Path = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def only(beta: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """No path: the first part is the target."""
    return values[..., 0], torch.ones_like(values)


class Kernel(Protocol):
    """Settings of a kernel."""

    @property
    def gradient(self) -> bool:
        """Whether it needs gradients of the parts."""

    @property
    def target_acceptance(self) -> float: ...

    def bind(self, lanes: Lanes, path: Path, example: Point) -> Transition: ...


class Transition(Protocol):
    """A kernel on lanes."""

    def takes(self) -> int:
        """Random numbers of each lane's stream that one call takes."""

    def __call__(
        self,
        point: Point,
        beta: Tensor,
        step_size: Tensor,
        inverse_mass: Tensor,
        key: Tensor,
        counter: Tensor,
        common: float = MIDDLE,
    ) -> tuple[Point, Moved]:
        """Move the lanes that stand there. `common`: a uniform number of what must be alike in all lanes, those of
        other blocks too; the caller draws it, from nothing that a lane has seen."""  # fmt: skip


def force(path: Path, beta: Tensor, values: Tensor, gradients: Tensor) -> Tensor:
    """Gradient of the path's log density, (W, D); a part of weight zero counts for nothing, whatever it is."""
    weights = path(beta, values)[1][..., None]
    return torch.where(weights == 0, 0.0, weights * gradients).sum(1)


def leapfrog(
    lanes: Lanes, path: Path, u: Tensor, r: Tensor, slope: Tensor, beta: Tensor, step: Tensor, inverse_mass: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of size `step` (W,), backwards where it is negative: u, r, the parts, their gradients, the force."""
    half = r + 0.5 * step[:, None] * slope
    u = u + step[:, None] * inverse_mass * half
    values, gradients = lanes.evaluate(u)
    slope = force(path, beta, values, gradients)
    return u, half + 0.5 * step[:, None] * slope, values, gradients, slope


def kinetic(r: Tensor, inverse_mass: Tensor) -> Tensor:
    return 0.5 * (r.square() * inverse_mass).sum(1)


@dataclass(frozen=True)
class HMC:
    """Leapfrog steps with fresh momenta: 1 to 2 `num_steps` - 1 of them by the common number, `num_steps` in its
    middle. One step is Langevin's proposal."""

    num_steps: int = 10
    target_acceptance: float = 0.8
    gradient: bool = True

    def bind(self, lanes: Lanes, path: Path, example: Point) -> Transition:
        return _Hamiltonian(self.num_steps, lanes, path, example)


def langevin() -> HMC:
    """The Metropolis-adjusted Langevin algorithm, at the acceptance that is best in many dimensions
    (Roberts & Rosenthal 1998, doi:10.1111/1467-9868.00123)."""
    return HMC(num_steps=1, target_acceptance=0.574)


class _Hamiltonian:
    def __init__(self, num_steps: int, lanes: Lanes, path: Path, example: Point) -> None:
        self.num_steps, self.lanes = num_steps, lanes
        self.dim = dim = example.u.shape[1]
        dtype, used = example.u.dtype, streams.normals_take(dim)

        def begin(
            u: Tensor, values: Tensor, gradients: Tensor, beta: Tensor, step: Tensor, mass: Tensor, key: Tensor,
            counter: Tensor,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            uniform = streams.uniforms(key, counter + used, 2, dtype)
            r = streams.normals(key, counter, dim, dtype) / mass.sqrt()
            energy = kinetic(r, mass) - path(beta, values)[0]
            step = step * (1 + JITTER * (2 * uniform[:, 1] - 1))
            return r, force(path, beta, values, gradients), step, energy, uniform[:, 0]

        def leap(*args: Tensor) -> tuple[Tensor, ...]:
            return leapfrog(lanes, path, *args)

        def end(*args: Tensor) -> tuple[Tensor, ...]:
            old, new, (r, beta, mass, before, uniform) = Point(*args[:3]), Point(*args[3:6]), args[6:]
            after = kinetic(r, mass) - path(beta, new.values)[0]
            point, acceptance, lost = accept(old, new, before - after, uniform)
            return (*point, acceptance, torch.where(uniform < acceptance, after, before), lost)

        ones, mass = torch.ones_like(example.u[:, 0]), torch.ones_like(example.u)
        none = torch.zeros(len(ones), dtype=torch.int64, device=ones.device)
        # what the target has no part in is compared at figures of moderate size: extreme data must not decide
        plain = [Point(*(torch.cos(torch.arange(t.numel(), device=t.device) + k).reshape(t.shape).to(t)
                         for t in example)) for k in range(3)]  # fmt: skip
        self.begin = lanes.compile(
            begin,
            [
                (*point, ones, 0.1 * ones, mass, streams.keys(k, len(ones), ones.device), none)
                for k, point in enumerate(plain[:2])
            ],
        )
        self.leap = lanes.compile(
            leap, [(example.u, other.u, other.gradients.sum(1), ones, 0.1 * ones, mass) for other in plain[:2]]
        )
        self.end = lanes.compile(
            end,
            [
                (*old, *new, new.u, ones, mass, old.values[:, 0], 0.5 + 0.4 * new.values[:, 0])
                for old, new in (plain[:2], plain[1:])
            ],
        )

    def takes(self) -> int:
        return streams.normals_take(self.dim) + 2

    def __call__(
        self, point: Point, beta: Tensor, step_size: Tensor, inverse_mass: Tensor, key: Tensor, counter: Tensor,
        common: float = MIDDLE,
    ) -> tuple[Point, Moved]:  # fmt: skip
        num_steps = 1 + int((2 * self.num_steps - 1) * common)
        r, slope, step, before, uniform = self.begin(*point, beta, step_size, inverse_mass, key, counter)
        u, values, gradients = point
        for _ in range(num_steps):
            u, r, values, gradients, slope = self.leap(u, r, slope, beta, step, inverse_mass)
        self.lanes.count(num_steps)
        *moved, acceptance, energy, lost = self.end(
            *point, u, values, gradients, r, beta, inverse_mass, before, uniform
        )
        return Point(*moved), Moved(acceptance, energy, torch.full_like(acceptance, num_steps), lost)


@dataclass(frozen=True)
class RandomWalk:
    """Normal proposals around where the lane is (Metropolis et al. 1953; Roberts, Gelman & Gilks 1997,
    doi:10.1214/aoap/1034625254, for the acceptance aimed at)."""

    target_acceptance: float = 0.234
    gradient: bool = False

    def bind(self, lanes: Lanes, path: Path, example: Point) -> Transition:
        return _RandomWalk(lanes, path, example)


class _RandomWalk:
    def __init__(self, lanes: Lanes, path: Path, example: Point) -> None:
        self.lanes, self.dim = lanes, example.u.shape[1]
        dtype, used = example.u.dtype, streams.normals_take(self.dim)

        def step(
            u: Tensor, values: Tensor, beta: Tensor, step: Tensor, mass: Tensor, key: Tensor, counter: Tensor
        ) -> tuple[Tensor, ...]:
            proposal = u + step[:, None] * mass.sqrt() * streams.normals(key, counter, self.dim, dtype)
            uniform = streams.uniforms(key, counter + used, 1, dtype)[:, 0]
            new = lanes.evaluate(proposal, gradient=False)[0]
            none = torch.zeros((*values.shape, 0), dtype=dtype, device=u.device)
            rise = path(beta, new)[0] - path(beta, values)[0]
            point, acceptance, _ = accept(Point(u, values, none), Point(proposal, new, none), rise, uniform)
            return point.u, point.values, acceptance, -path(beta, point.values)[0]

        ones, mass = torch.ones_like(example.u[:, 0]), torch.ones_like(example.u)
        none = torch.zeros(len(ones), dtype=torch.int64, device=ones.device)
        self.step = lanes.compile(
            step,
            [(*example[:2], ones, 0.1 * ones, mass, streams.keys(k, len(ones), ones.device), none) for k in range(2)],
        )

    def takes(self) -> int:
        return streams.normals_take(self.dim) + 1

    def __call__(
        self, point: Point, beta: Tensor, step_size: Tensor, inverse_mass: Tensor, key: Tensor, counter: Tensor,
        common: float = MIDDLE,
    ) -> tuple[Point, Moved]:  # fmt: skip
        u, values, acceptance, energy = self.step(*point[:2], beta, step_size, inverse_mass, key, counter)
        self.lanes.count(1, gradient=False)
        moved = Point(u, values, point.gradients)
        return moved, Moved(acceptance, energy, torch.ones_like(acceptance), torch.zeros_like(acceptance).bool())


def accept(old: Point, new: Point, rise: Tensor, uniform: Tensor) -> tuple[Point, Tensor, Tensor]:
    """Metropolis: to the new point with probability min(1, exp(rise)), lane by lane; never where that is undefined.
    The point, the probability (W,), and whether the trajectory diverged."""
    rise = torch.where(rise.isnan(), -math.inf, rise)
    probability = rise.clamp_max(0.0).exp()
    takes = uniform < probability
    point = Point(
        torch.where(takes[:, None], new.u, old.u),
        torch.where(takes[:, None], new.values, old.values),
        torch.where(takes[:, None, None], new.gradients, old.gradients),
    )
    return point, probability, rise < -DIVERGENT
