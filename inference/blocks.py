"""The moves of a Gibbs sampler: each leaves the posterior as it is, and moves some latents of all chains at once.

`Exact` draws from full conditionals by their profiles; `Within` moves continuous latents by a Metropolis kernel. Both
write to the state in place, and both are compiled where the density can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Number
from typing import Any, Protocol

import torch
from torch import Tensor

from . import conjugate
from .conditionals import Profile, Slot, State, Unit
from .conjugate import Family, Frame
from .density import TERMS, Density
from .engine import EngineError
from .kernels import adaptation, streams
from .kernels.adaptation import Warmup
from .kernels.metropolis import Kernel, Moved, Point, only
from .lanes import Lanes
from .program import Scribe

FARTHEST = 64.0  # steps of a walk over whole numbers


class Way(Protocol):
    """How the elements of a unit are drawn from their profiles; `word` says it."""

    @property
    def word(self) -> str: ...

    @property
    def count(self) -> int:
        """Points of the profile."""

    def points(self, now: State, slot: Slot) -> State:
        """Where to evaluate, (P, C, *elements, *event), from the values in the slot."""

    def draw(self, points: State, profile: Tensor, slot: Slot) -> State:
        """New values (C, *elements, *event), given log densities (P, C, *elements). Raises `EngineError`."""


class Listed:
    """Every joint value of discrete latents: exact, by the categorical distribution of the profile."""

    def __init__(self, tables: State) -> None:
        self.tables = tables  # name -> (P, *event)
        self.count = len(next(iter(tables.values())))
        self.word = "by enumeration"

    def points(self, now: State, slot: Slot) -> State:
        found = {}
        for name, value in now.items():
            table = self.tables[name]
            lead = value.dim() - (table.dim() - 1)
            table = table.reshape(len(table), *[1] * lead, *table.shape[1:])
            found[name] = table.expand(len(table), *value.shape)
        return found

    def draw(self, points: State, profile: Tensor, slot: Slot) -> State:
        best = profile.amax(0)
        if not bool(best.isfinite().all()):
            raise EngineError(f"site {', '.join(self.tables)}: no value has a positive, finite probability")
        total = (profile - best).exp().cumsum(0)
        height = torch.rand_like(best) * total[-1]
        height = torch.minimum(height, torch.nextafter(total[-1], torch.zeros_like(height)))
        index = (total <= height).sum(0)  # (C, *elements)
        return {name: table[index] for name, table in self.tables.items()}


class Walk:
    """Whole numbers that cannot be listed: a step up or down, half of the time of size one, else log-uniform, accepted
    by Metropolis' rule."""

    count = 2
    word = "by a walk over whole numbers"

    def __init__(self, name: str) -> None:
        self.name = name

    def points(self, now: State, slot: Slot) -> State:
        value = now[self.name]
        shape, device = value.shape, value.device
        far = torch.exp(torch.rand(shape, device=device) * math.log(FARTHEST)).ceil()
        size = torch.where(torch.rand(shape, device=device) < 0.5, 1.0, far)
        sign = torch.where(torch.rand(shape, device=device) < 0.5, -1.0, 1.0)
        return {self.name: torch.stack([value, value + (size * sign).to(value.dtype)])}

    def draw(self, points: State, profile: Tensor, slot: Slot) -> State:
        values = points[self.name]
        rise = profile[1] - profile[0]
        rise = torch.where(rise.isnan(), -math.inf, rise)
        takes = torch.rand_like(rise).log() < rise
        return {self.name: torch.where(takes, values[1], values[0])}


class Conjugate:
    """A continuous latent in closed form. At every draw its family is checked again where the latent stands."""

    def __init__(self, name: str, family: Family, shape: Sequence[int], spread: float) -> None:
        """`shape` (C, *dims, *event) of the latent; `spread`: how far apart points stand at first."""
        self.name, self.family, self.spread = name, family, spread
        self.count = len(family.standard) + 1
        self.word = f"{family.word} in closed form"
        like = torch.zeros(tuple(shape), dtype=family.standard.dtype)
        self.frame = Frame(like, torch.full_like(like, spread))

    def begin(self, value: Tensor) -> None:
        self.frame = Frame(value.clone(), torch.full_like(value, self.spread))

    def _there(self, slot: Slot) -> Frame:
        at = (slice(None), *slot)
        return Frame(self.frame.centre[at], self.frame.scale[at])

    def points(self, now: State, slot: Slot) -> State:
        value = now[self.name]
        return {self.name: torch.cat([conjugate.points(self.family, self._there(slot)), value[None]])}

    def draw(self, points: State, profile: Tensor, slot: Slot) -> State:
        frame, profile, last = self._there(slot), profile[: self.count - 1], profile[-1]
        fit = conjugate.fit(self.family, profile)
        off = conjugate.misfit(self.family, fit.b, frame, profile[0], points[self.name][-1], last)
        if not bool((fit.proper & (off < 1)).all()):
            raise EngineError(
                f"site {self.name!r}: its conditional was found to be {self.family.word}, but is not where the chain "
                f"came to; move it by a kernel: Gibbs(blocks={{{self.name!r}: 'hmc'}})"
            )
        value, moved = self.family.draw(fit.b, frame)
        at = (slice(None), *slot)
        self.frame.centre[at], self.frame.scale[at] = moved.centre, moved.scale
        return {self.name: value}


class Exact:
    """Units that do not meet in any term, drawn from their conditionals side by side."""

    def __init__(self, density: Density, units: Sequence[Unit], ways: Sequence[Way]) -> None:
        self.units, self.ways = list(units), list(ways)
        self.count = max(way.count for way in ways)
        self.profile = Profile(density, units, self.count)
        self.slots: list[tuple[Slot, ...]] = [(slot,) for slot in units[0].each_slot()]
        if len(units) > 1:  # of one slot each
            self.slots = [tuple(next(u.each_slot()) for u in units)]

    @property
    def names(self) -> list[str]:
        return [name for u in self.units for name in u.names]

    @property
    def calls(self) -> int:
        """Evaluations of one chain in one sweep."""
        return self.count * len(self.slots)

    def begin(self, state: State) -> None:
        self.profile.renew()
        for u, way in zip(self.units, self.ways, strict=True):
            if isinstance(way, Conjugate):
                way.begin(state[u.names[0]])

    def move(self, state: State, turn: int, compiled: bool = True) -> None:
        slots = self.slots[turn]
        points = []
        for u, way, slot in zip(self.units, self.ways, slots, strict=True):
            found = way.points({n: state[n][(slice(None), *slot)] for n in u.names}, slot)
            if way.count < self.count:
                found = {
                    n: torch.cat([v, v[-1:].expand(self.count - way.count, *v.shape[1:])]) for n, v in found.items()
                }
            points.append(found)
        profiles = self.profile(state, points, slots, compiled)
        for way, slot, at, profile in zip(self.ways, slots, points, profiles, strict=True):
            at = {n: v[: way.count] for n, v in at.items()}
            for name, value in way.draw(at, profile[: way.count], slot).items():
                state[name][(slice(None), *slot)] = value


class Within:
    """Continuous latents moved by a Metropolis kernel, each chain of each datum by itself, the others held.

    The step size and the mass are tuned in warm-up, by `learn`, and stand still afterwards.
    """

    def __init__(
        self, density: Density, names: Sequence[str], terms: Sequence[str], kernel: Kernel, state: State
    ) -> None:
        self.density, self.names, self.terms, self.kernel, self.state = density, list(names), list(terms), kernel, state
        batch = len(density.batch_shape)
        self.sites = [density.latents[n] for n in names]
        self.shapes = [s.own_shape(s.unconstrained_shape, s.unconstrained_event_dim)[batch:] for s in self.sites]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.dim = sum(self.sizes)
        self.chains = len(next(iter(state.values())))
        data = max(1, density.batch_shape.numel())
        self.lanes = Lanes(density, self.chains, self._parts, self.chains * data, list(state.values()))
        # a support that moves with other latents moves the unconstrained value of one that stands still
        self.carries = all(_plain(s.domain) for s in self.sites)
        self.made = False
        self.slots = [()]

    @property
    def calls(self) -> float:
        steps = getattr(self.kernel, "num_steps", 8 if self.kernel.gradient else 1)
        return steps + 1

    # -- the density of the block, the others read from the state ------------------------------------------------

    def _free(self, u: Tensor) -> State:
        """u (*batch, D) -> site -> unconstrained, as Pyro lays it out."""
        parts = torch.split(u, self.sizes, -1)
        return {
            name: site.to_pyro(part.reshape((*part.shape[:-1], *shape)), site.unconstrained_event_dim)
            for name, site, shape, part in zip(self.names, self.sites, self.shapes, parts, strict=True)
        }

    def _rows(self) -> Any:
        """Inside, the program sees the rows that the lanes are of."""
        rows = self.lanes.rows
        return nullcontext() if rows is None else self.density.minibatch(rows)

    def _parts(self, density: Density, u: Tensor) -> tuple[Tensor, ...]:
        batch = density.batch_shape

        def one(values: Mapping[str, Tensor]) -> Tensor:
            reading = density.read({**values, **self._free(values[""])}, self.names, TERMS)
            total: Any = reading.log_jacobian
            for term in self.terms:
                total = total + Scribe._per_element(reading.terms[term], density.sites[term])
            return total.expand(batch)

        others = {n: v for n, v in self.state.items() if n not in self.names}
        return (density.batched(one, {**others, "": u}, len(u)),)

    def _unconstrained(self, *values: Tensor) -> tuple[Tensor, ...]:
        def one(row: Mapping[str, Tensor]) -> Tensor:
            parts = self.density.read(row, want=frozenset({"unconstrained"})).unconstrained
            batch = len(self.density.batch_shape)
            return torch.cat([parts[n].reshape(*parts[n].shape[:batch], -1) for n in self.names], -1)

        with self._rows():
            return (self.density.batched(one, dict(zip(self.state, values, strict=True)), self.chains),)

    def _constrained(self, u: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        def one(row: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            free = self._free(row[""])
            found = self.density.read({**row, **free}, self.names, frozenset({"values"})).values
            return tuple(s.to_pyro(found[n], s.event_dim) for n, s in zip(self.names, self.sites, strict=True))

        with self._rows():
            return self.density.batched(one, {**dict(zip(self.state, values, strict=True)), "": u}, self.chains)

    # -- moving --------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Compile what moves, at where the state is."""
        lanes, values = self.lanes, tuple(self.state.values())
        rolled = tuple(torch.roll(v, 1, 0) for v in values)
        shaped = self._unconstrained(*values)[0]
        self.shape = shaped.shape
        u = shaped.reshape(-1, self.dim)
        self._to_u = lanes.compile(self._unconstrained, [values, rolled])
        self._to_values = lanes.compile(self._constrained, [(shaped, *values), (shaped + 0.1, *rolled)])
        gradient = self.kernel.gradient
        self._evaluate = lanes.compile(lambda v: lanes.evaluate(v, gradient), [(u,), (u + 0.1,)])
        with self.density.uncounted():
            self.transition = self.kernel.bind(lanes, only, Point(u, *lanes.evaluate(u, gradient)))
        target = self.kernel.target_acceptance

        def learn(*args: Tensor) -> tuple[Tensor, ...]:
            position, acceptance, inside, ends = args[-4:]
            active = acceptance == acceptance
            return adaptation.update(Warmup(*args[:-4]), position, acceptance, target, active, inside, ends)

        ones = torch.ones_like(u[:, 0])
        w = adaptation.begin(ones, torch.ones_like(u))
        self._learn = lanes.compile(learn, [(*w, u, 0.5 * ones, ones > k, ones > 1 - k) for k in range(2)])
        self.made = True

    def begin(self, seed: int, step_size: float) -> None:
        self.lanes.renew()
        if not self.made:
            self._make()
        u = self._to_u(*self.state.values())[0].reshape(-1, self.dim)
        self.u, ones = u, torch.ones_like(u[:, 0])
        self.keys, self.counter = (
            streams.keys(seed, len(u), u.device),
            torch.zeros_like(self.lanes.ids, device=u.device),
        )
        self.warmup = adaptation.begin(step_size * ones, torch.ones_like(u))
        self.step, self.mass = step_size * ones, torch.ones_like(u)
        self.moved = Moved(ones, ones, ones, ones > 1)

    def move(self, state: State, turn: int = 0, compiled: bool = True) -> None:
        if not self.carries:
            self.u = self._to_u(*state.values())[0].reshape(-1, self.dim)
        point = Point(self.u, *self._evaluate(self.u))
        self.lanes.count(1, self.kernel.gradient)
        ones = torch.ones_like(self.step)
        point, self.moved = self.transition(point, ones, self.step, self.mass, self.keys, self.counter)
        self.counter = self.counter + self.transition.takes()
        self.u = point.u
        for name, value in zip(self.names, self._to_values(self.u.reshape(self.shape), *state.values()), strict=True):
            state[name].copy_(value)

    def learn(self, inside: bool, ends: bool, last: bool) -> None:
        """After a move of the warm-up: tune step size and mass; after the `last`, settle them."""
        flag = torch.ones_like(self.step) > 0
        w = Warmup(*self._learn(*self.warmup, self.u, self.moved.acceptance, flag & inside, flag & ends))
        self.warmup = w
        self.step, self.mass = adaptation.settled(w) if last else (w.log_step.exp(), w.inverse_mass)


def _plain(domain: Any) -> bool:
    """Whether a constraint is the same in every run: no tensor is part of it."""
    if isinstance(domain, Tensor):
        return False
    if domain is None or isinstance(domain, Number | str | bool):
        return True
    if isinstance(domain, list | tuple):
        return all(map(_plain, domain))
    return all(map(_plain, vars(domain).values()))
