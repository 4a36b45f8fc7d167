"""Particles of many data carried along a path of densities, each datum at a pace of its own.

    w_s <- w_s f_b'(u_s) / f_b(u_s),     Z_b' / Z_b ~ sum_s W_s f_b'(u_s) / f_b(u_s),     W: the weights carried so far

then, where the weights have become uneven, resampling, then moves that leave f_b' invariant (Del Moral, Doucet & Jasra
2006, doi:10.1111/j.1467-9868.2006.00553.x; Chopin & Papaspiliopoulos 2020, doi:10.1007/978-3-030-47845-2). The next b'
is the largest that keeps the conditional effective sample size (Zhou, Johansen & Aston 2016, arXiv:1303.3123)

    CESS(b') / S = (sum_s W_s v_s)^2 / sum_s W_s v_s^2,     v_s = f_b'(u_s) / f_b(u_s).

Random numbers belong to particles and data, and a datum that has arrived stands still: no datum's answer depends on
which others are moved beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .engine import Run
from .groups import Bound
from .kernels import streams
from .kernels.metropolis import Point
from .resampling import ancestors, takes

TRIALS, CLOSE, LEAST = 60, 1e-6, 2.0**-60  # of temperatures, at most; how close one is to the best, relative and least
STRETCH = 2.0  # of a step, within which the next one is looked for first
MOST = 1e4  # of minus the log share, which may be infinite
MAX_STAGES = 500  # temperatures, from which on the rest of the path is taken in one step
LEARN = 1.0  # change of log step size for each unit of acceptance that is missing
PRIOR_COUNT = 5.0  # particles that the last stage's variances count for


def seed_of(run: Run, index: int) -> int:
    """A seed for keys, the run's own for each index."""
    return int(run.child(index).seed.generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class PathPlan:
    """How particles are carried.

    betas        temperatures from 0 to 1 for all data, or None: chosen for each datum by `criterion`
    criterion    'cess' as above; 'ess': the effective sample size itself falls to no less than `target` of what it was
    target       share of the effective sample size that a step may leave
    policy       resample 'always', 'never', or 'adaptive', where it has fallen below `threshold` of the particles
    moves        for each temperature, at most; `exactly` that many, or until no coordinate keeps a correlation with
                 where it was above `correlation`
    """

    betas: Tensor | None = None
    criterion: str = "cess"
    target: float = 0.7
    scheme: str = "systematic"
    policy: str = "adaptive"
    threshold: float = 0.5
    moves: int = 10
    exactly: bool = False
    correlation: float = 0.3
    at_start: bool = False  # move at b = 0 too, for the tuning there


class Stage(NamedTuple):
    """What was done at a temperature, for each datum (G,); where a datum had arrived before, it is as it was then."""

    beta: Tensor
    log_step: Tensor
    inverse_mass: Tensor  # (G, D)
    acceptance: Tensor
    moves: Tensor


@dataclass
class Carried:
    """Particles at the end of the path: log weights normalised (S, G), log Z and its relative variance (G,), and the
    stages, of which each datum has gone through `arrived` (G,)."""

    log_weights: Tensor
    log_evidence: Tensor
    variance: Tensor
    stages: list[Stage]
    arrived: Tensor
    ancestors_left: Tensor
    hurried: bool = False


def selected(keep: Tensor, new: Point, old: Point) -> Point:
    """The new point in the lanes (W,) that keep it."""
    return Point(
        torch.where(keep[:, None], new.u, old.u),
        torch.where(keep[:, None], new.values, old.values),
        torch.where(keep[:, None, None], new.gradients, old.gradients),
    )


def added(log_weights: Tensor, increment: Tensor) -> Tensor:
    """Log weights after an increment; zero stays zero, also where the increment is undefined for it."""
    return torch.where(log_weights == -math.inf, -math.inf, log_weights + increment)


def per_datum_variance(u: Tensor, weights: Tensor) -> Tensor:
    """Variance of particles u (S, G, D) under normalised weights (S, G), (G, D)."""
    centre = (weights[..., None] * u).sum(0)
    return (weights[..., None] * (u - centre).square()).sum(0)


def carry(bound: Bound, point: Point, key: Tensor, datum_key: Tensor, plan: PathPlan) -> tuple[Point, Carried]:
    """Where the lanes that stand there are at the end of the path, and what is told of them. key (W,) for moves,
    datum_key (G,) for resampling."""
    S, G, D = bound.count, bound.data, point.u.shape[1]
    dtype, device = point.u.dtype, point.u.device
    path, kernel, lane = bound.path, bound.kernel, bound.lane
    even = torch.full((S, G), -math.log(S), dtype=dtype, device=device)
    zero = torch.zeros(G, dtype=dtype, device=device)

    def height(at: Tensor) -> Tensor:
        return path(at, point.values.reshape(S, G, -1))[0]

    def rise(here: Tensor, to: Tensor) -> Tensor:
        return height(to) - here

    log_w, log_z, beta, stride = even, zero, zero, zero + 1
    broken, chance, apart = zero != zero, zero, zero
    eve = torch.arange(S, device=device)[:, None].expand(S, G)
    log_step = torch.full_like(zero, math.log(bound.first_step(D)))
    mass = per_datum_variance(point.u.reshape(S, G, D), even.exp())
    mass = torch.where((mass > 0) & mass.isfinite(), mass, 1.0)
    counter = torch.zeros(S * G, dtype=torch.int64, device=device)
    datum_counter = torch.zeros(G, dtype=torch.int64, device=device)
    arrived = torch.zeros(G, dtype=torch.int64, device=device)
    stages: list[Stage] = []
    last = Stage(zero, log_step, mass, zero, zero)
    hurried = False
    stage = 0 if plan.at_start else 1
    while True:
        going = ((beta < 1) & ~broken) if stage else ~broken
        if not bool(going.any()):
            break
        if stage:
            here = height(beta)
            if plan.betas is not None:
                target = torch.full_like(zero, float(plan.betas[stage]))
            elif stage >= MAX_STAGES:
                target, hurried = torch.ones_like(zero), True
            else:
                target = _next(beta, log_w, partial(rise, here), plan, STRETCH * stride)
            target = torch.where(going, target, beta)
            stride = torch.where(going, target - beta, stride)
            new = torch.where(going, added(log_w, rise(here, target)), log_w)
            step = torch.logsumexp(new, 0)
            log_z = log_z + torch.where(going, step, 0.0)
            broken = broken | ~log_z.isfinite()
            held, log_w = of_families(eve, log_w), torch.where(going & ~broken, new - step, log_w)
            apart = apart + (of_families(eve, log_w) - held).square().sum(0)
            beta, going = target, going & ~broken
            arrived = torch.where(going, stage, arrived)
            # the weights of the end are kept: there, resampling would only add noise
            share = 1 / (2 * log_w).exp().sum(0) / S
            again = going & (beta < 1) & (plan.policy != "never")
            if plan.policy == "adaptive":
                again = again & (share < plan.threshold)
            if bool(again.any()):
                number = takes(plan.scheme, S)
                uniform = streams.uniforms(datum_key, datum_counter, number, dtype).T
                index = ancestors(plan.scheme, torch.where(again, log_w, even), uniform)
                index = torch.where(again, index, torch.arange(S, device=device)[:, None])
                point = Point(*(_taken(t, index) for t in point))
                held = of_families(eve, log_w)
                eve, log_w = eve.gather(0, index), torch.where(again, even, log_w)
                chance = chance + torch.where(again, (of_families(eve, log_w) - held).square().sum(0), 0.0)
                datum_counter = datum_counter + number * again
        # moves, for data that were carried on
        weights = log_w.exp()
        spread = per_datum_variance(point.u.reshape(S, G, D), weights)
        counts = 1 / weights.square().sum(0)[:, None]
        spread = (counts * spread + PRIOR_COUNT * mass) / (counts + PRIOR_COUNT)
        mass = torch.where(going[:, None] & spread.isfinite() & (spread > 0), spread, mass)
        before, moving = _figures(point, weights), going
        acceptance, moves = zero, zero
        for move in range(plan.moves):
            new_point, moved = bound.transition(point, lane(beta), lane(log_step.exp()), lane(mass), key, counter)
            keep = lane(moving)
            point = new_point if bool(moving.all()) else selected(keep, new_point, point)
            counter = counter + bound.transition.takes() * keep
            accepted = (weights * moved.acceptance.reshape(S, G).to(dtype)).sum(0)
            tuned = (log_step + LEARN * (accepted - kernel.target_acceptance)).clamp_max(math.log(bound.longest))
            log_step = torch.where(moving, tuned, log_step)
            acceptance = acceptance + torch.where(moving, accepted, 0.0)
            moves = moves + moving
            if not plan.exactly and move + 1 < plan.moves:
                moving = moving & (_correlation(before, _figures(point, weights), weights) > plan.correlation)
                if not bool(moving.any()):
                    break
        last = Stage(
            beta,
            log_step,
            mass,
            torch.where(going, acceptance / moves.clamp_min(1), last.acceptance),
            torch.where(going, moves, last.moves),
        )
        stages.append(last)
        stage += 1
    log_z = torch.where(broken & log_z.isfinite(), math.nan, log_z)
    log_w = torch.where(broken, log_z.clamp_max(-math.inf), log_w)
    families = of_families(eve, log_w)
    # the difference is that of two chances where it is small, and what the steps add if moves forget all is the least
    variance = torch.maximum((families - 1 / S).square().sum(0) - chance, apart)
    return point, Carried(log_w, log_z, variance, stages, arrived, (families > 0).sum(0), hurried)


def of_families(eve: Tensor, log_weights: Tensor) -> Tensor:
    """The weight of all that descend from each of the first particles, (S, G)."""
    return torch.zeros_like(log_weights).scatter_add_(0, eve.contiguous(), log_weights.exp())


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Lanes (S G, ...) of the ancestors (S, G)."""
    shaped = values.reshape(*index.shape, *values.shape[1:])
    expanded = index.reshape(*index.shape, *[1] * (shaped.dim() - 2)).expand(shaped.shape)
    return shaped.gather(0, expanded).reshape(values.shape)


def _next(
    beta: Tensor, log_w: Tensor, change: Callable[[Tensor], Tensor], plan: PathPlan, stride: Tensor | float = 1.0
) -> Tensor:
    """The next temperature of each datum (G,), where the share that is kept falls below the target; it is first looked
    for within the stride. `change` maps temperatures to the log increments (S, G).

    Regula falsi that halves what stays (Illinois; Dowell & Jarratt 1971, doi:10.1007/BF01934364) on the root of minus
    the log share: the steps of a geometric path make that close to linear in the temperature.
    """
    goal = math.sqrt(-math.log(plan.target))

    def excess(to: Tensor) -> Tensor:
        v = added(log_w, change(to))  # log W v
        if plan.criterion == "ess":
            kept = 2 * torch.logsumexp(v, 0) - torch.logsumexp(2 * v, 0) + torch.logsumexp(2 * log_w, 0)
        else:
            second = torch.where(v == -math.inf, -math.inf, 2 * v - log_w)
            kept = 2 * torch.logsumexp(v, 0) - torch.logsumexp(second, 0)
        return kept.clamp(-MOST, 0.0).neg().sqrt().nan_to_num(nan=0.0) - goal  # undefined: the caller sees that

    low, high = beta, (beta + stride).clamp_max(1.0)
    below, above = torch.full_like(beta, -goal), excess(high)
    whole = above <= 0
    if bool((whole & (high < 1)).any()):
        low, below = torch.where(whole, high, low), torch.where(whole, above, below)
        end = excess(torch.ones_like(high))
        high, above = torch.where(whole, 1.0, high), torch.where(whole, end, above)
        whole = above <= 0
    side = torch.zeros_like(beta)
    for _ in range(TRIALS):
        close = (CLOSE * high).clamp_min(LEAST)
        wide = ~whole & (high - low > close)  # the others stand, so that none depends on them
        if not bool(wide.any()):
            break
        at = low - below * (high - low) / (above - below)
        at = torch.maximum(torch.minimum(at, high - close / 2), low + close / 2)
        found = excess(at)
        short, far = wide & (found <= 0), wide & (found > 0)
        below = torch.where(short, found, torch.where(far & (side > 0), below / 2, below))
        above = torch.where(far, found, torch.where(short & (side < 0), above / 2, above))
        low, high = torch.where(short, at, low), torch.where(far, at, high)
        side = far.to(side.dtype) - short.to(side.dtype)
    return high  # by a hair too far, but never where it was


def _figures(point: Point, weights: Tensor) -> Tensor:
    """Coordinates and the log density ratio of the ends, about their means, (S, G, D + 1)."""
    ratio = point.values[:, -1:] - point.values[:, :1]
    x = torch.cat([point.u, ratio.nan_to_num(0.0, 0.0, 0.0)], 1).reshape(*weights.shape, -1)
    return x - (weights[..., None] * x).sum(0)


def _correlation(before: Tensor, after: Tensor, weights: Tensor) -> Tensor:
    """The largest correlation of a figure with what it was, (G,)."""
    weighted = weights[..., None] * after
    spread = (weights[..., None] * before.square()).sum(0) * (weighted * after).sum(0)
    found = (weighted * before).sum(0) / spread.sqrt()
    return torch.where(spread > 0, found, 0.0).abs().nan_to_num(0.0).amax(-1)


class Tuning(NamedTuple):
    """Temperature, log step size and inverse mass along the path, at T + 1 stages for each datum, (T + 1, N),
    (T + 1, N, D), of which `arrived` (N,) + 1 are in use. Between stages they are linear in the stage."""

    beta: Tensor
    log_step: Tensor
    inverse_mass: Tensor
    arrived: Tensor

    @staticmethod
    def of(carried: Carried) -> Tuning:
        columns = {f: torch.stack([getattr(s, f) for s in carried.stages]) for f in Stage._fields}
        return Tuning(columns["beta"], columns["log_step"], columns["inverse_mass"], carried.arrived)

    def first(self, count: int) -> Tuning:
        return self.rows(torch.arange(count, device=self.arrived.device))

    def rows(self, data: Tensor) -> Tuning:
        return Tuning(self.beta[:, data], self.log_step[:, data], self.inverse_mass[:, data], self.arrived[data])

    @staticmethod
    def joined(tunings: list[Tuning]) -> Tuning:
        """Of all data: where some have fewer stages than others, their last is repeated."""
        most = max(len(t.beta) for t in tunings)

        def column(name: str) -> Tensor:
            each = [getattr(t, name) for t in tunings]
            return torch.cat([torch.cat([x, x[-1:].expand(most - len(x), *x.shape[1:])]) for x in each], 1)

        arrived = torch.cat([t.arrived for t in tunings])
        return Tuning(column("beta"), column("log_step"), column("inverse_mass"), arrived)

    def at(self, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Temperature (N,), step size (N,) and inverse mass (N, D) at a share of the way, counted in stages."""
        place = share * self.arrived.to(self.beta.dtype)
        below = place.floor().long().clamp_max((self.arrived - 1).clamp_min(0))
        part = place - below

        def between(t: Tensor) -> Tensor:
            index = below.reshape(1, -1, *[1] * (t.dim() - 2)).expand(1, *t.shape[1:])
            low, high = t.gather(0, index)[0], t.gather(0, (index + 1).clamp_max(len(t) - 1))[0]
            weight = part.reshape(-1, *[1] * (t.dim() - 2))
            return low + weight * (high - low)

        beta = between(self.beta)
        return (beta if share < 1 else torch.ones_like(beta)), between(self.log_step).exp(), between(self.inverse_mass)
