"""The moves of a Gibbs sampler: each leaves the posterior as it is, and moves some latents of all chains at once.

`Exact` draws from full conditionals by their profiles; `Within` moves continuous latents by a Metropolis kernel. Both
write to the state in place, and both are compiled where the density can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from . import conjugate
from .conditionals import Profile, Slot, State, Unit, Way
from .conjugate import Family, Frame
from .density import TERMS, Density
from .engine import EngineError
from .kernels import adaptation, streams
from .kernels.adaptation import Warmup
from .kernels.metropolis import Kernel, Moved, Point, only
from .lanes import Lanes

FARTHEST = 64.0  # steps of a walk over whole numbers


class Listed:
    """Every joint value of discrete latents: exact, by the categorical distribution of the profile."""

    word = "by enumeration"

    def __init__(self, tables: State) -> None:
        self.tables = tables  # name -> (P, *event)
        self.count = len(next(iter(tables.values())))

    def inputs(self, now: State, slot: Slot) -> tuple[Tensor, ...]:
        name, table = next(iter(self.tables.items()))
        value = now[name]
        shape = value.shape[: value.dim() - table.dim() + 1]
        return (torch.rand(shape, dtype=torch.float64, device=value.device),)

    def points(self, *inputs: Tensor) -> State:
        (uniform,) = inputs
        ones = [1] * uniform.dim()
        return {n: t.reshape(len(t), *ones, *t.shape[1:]).expand(len(t), *uniform.shape, *t.shape[1:])
                for n, t in self.tables.items()}  # fmt: skip

    def reduce(self, profile: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        (uniform,) = inputs
        best = profile.amax(0)
        total = (profile - best).exp().cumsum(0)
        height = uniform * (total[-1] * (1 - 2.0**-52))  # below the total, so that what has no probability is not met
        index = (total <= height).sum(0)
        return (best.isfinite().all(), *(table[index] for table in self.tables.values()))

    def draw(self, inputs: tuple[Tensor, ...], found: tuple[Tensor, ...], slot: Slot) -> State:
        if not bool(found[0]):
            raise EngineError(f"site {', '.join(self.tables)}: no value has a positive, finite probability")
        return dict(zip(self.tables, found[1:], strict=True))


class Walk:
    """Whole numbers that cannot be listed: a step up or down, half of the time of size one, else log-uniform, accepted
    by Metropolis' rule."""

    count = 2
    word = "by a walk over whole numbers"

    def __init__(self, name: str) -> None:
        self.name = name

    def inputs(self, now: State, slot: Slot) -> tuple[Tensor, ...]:
        value = now[self.name]
        far, near, up, uniform = torch.rand((4, *value.shape), dtype=torch.float64, device=value.device)
        size = torch.where(near < 0.5, 1.0, torch.exp(far * math.log(FARTHEST)).ceil())
        step = torch.where(up < 0.5, -size, size).to(value.dtype)
        return value, value + step, uniform

    def points(self, *inputs: Tensor) -> State:
        return {self.name: torch.stack(inputs[:2])}

    def reduce(self, profile: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        value, proposal, uniform = inputs
        rise = profile[1] - profile[0]
        takes = (uniform.log() < rise) & ~rise.isnan()
        return (torch.where(takes, proposal, value),)

    def draw(self, inputs: tuple[Tensor, ...], found: tuple[Tensor, ...], slot: Slot) -> State:
        return {self.name: found[0]}


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

    def inputs(self, now: State, slot: Slot) -> tuple[Tensor, ...]:
        at = (slice(None), *slot)
        return self.frame.centre[at], self.frame.scale[at], now[self.name]

    def points(self, *inputs: Tensor) -> State:
        centre, scale, value = inputs
        return {self.name: torch.cat([conjugate.points(self.family, Frame(centre, scale)), value[None]])}

    def reduce(self, profile: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        centre, scale, value = inputs
        profile, last = profile[: self.count - 1], profile[self.count - 1]
        fit = conjugate.fit(self.family, profile)
        off = conjugate.misfit(self.family, fit.b, Frame(centre, scale), profile[0], value, last)
        return fit.b, (fit.proper & (off < 1)).all()

    def draw(self, inputs: tuple[Tensor, ...], found: tuple[Tensor, ...], slot: Slot) -> State:
        if not bool(found[1]):
            raise EngineError(
                f"site {self.name!r}: its conditional was found to be {self.family.word}, but is not where the chain "
                f"came to; move it by a kernel: Gibbs(blocks={{{self.name!r}: 'hmc'}})"
            )
        value, moved = self.family.draw(found[0], Frame(*inputs[:2]))
        at = (slice(None), *slot)
        self.frame.centre[at], self.frame.scale[at] = moved.centre, moved.scale
        return {self.name: value}


class Exact:
    """Units that do not meet in any term, drawn from their conditionals side by side."""

    def __init__(self, density: Density, units: Sequence[Unit], ways: Sequence[Way]) -> None:
        self.units, self.ways = list(units), list(ways)
        self.profile = Profile(density, units, ways)
        self.slots: list[tuple[Slot, ...]] = [(slot,) for slot in units[0].each_slot()]
        if len(units) > 1:  # of one slot each
            self.slots = [tuple(next(u.each_slot()) for u in units)]

    @property
    def names(self) -> list[str]:
        return [name for u in self.units for name in u.names]

    @property
    def calls(self) -> int:
        """Evaluations of one chain in one sweep."""
        return self.profile.num_points * len(self.slots)

    def begin(self, state: State) -> None:
        self.profile.renew()
        for u, way in zip(self.units, self.ways, strict=True):
            if isinstance(way, Conjugate):
                way.begin(state[u.names[0]])

    def move(self, state: State, turn: int) -> None:
        slots = self.slots[turn]
        inputs = [
            way.inputs({n: state[n][(slice(None), *slot)] for n in u.names}, slot)
            for u, way, slot in zip(self.units, self.ways, slots, strict=True)
        ]
        found = self.profile(state, inputs, slots)
        for way, slot, given, answer in zip(self.ways, slots, inputs, found, strict=True):
            for name, value in way.draw(given, answer, slot).items():
                state[name][(slice(None), *slot)] = value


class Within:
    """Continuous latents moved by a Metropolis kernel, each chain of each datum by itself, the others held.

    The step size and the mass are tuned in warm-up, by `learn`, and stand still afterwards.
    """

    def __init__(
        self, density: Density, names: Sequence[str], terms: Sequence[str], kernel: Kernel, state: State
    ) -> None:
        self.density, self.names, self.terms, self.kernel, self.state = density, list(names), list(terms), kernel, state
        self.layout = density.layout.only(names)
        self.chains = len(next(iter(state.values())))
        data = max(1, density.batch_shape.numel())
        self.lanes = Lanes(density, self.chains, self._parts, self.chains * data, list(state.values()))
        # a support that moves with other latents moves the unconstrained value of one that stands still
        self.carries = all(_plain(s.domain) for s in self.layout.sites.values())
        self.made = False
        self.slots = [()]

    @property
    def calls(self) -> float:
        steps = getattr(self.kernel, "num_steps", 8 if self.kernel.gradient else 1)
        return steps + 1

    # -- the density of the block, the others read from the state ------------------------------------------------

    def _rows(self) -> Any:
        """Inside, the program sees the rows that the lanes are of."""
        rows = self.lanes.rows
        return nullcontext() if rows is None else self.density.minibatch(rows)

    def _parts(self, density: Density, u: Tensor) -> tuple[Tensor, ...]:
        batch = density.batch_shape

        def one(values: Mapping[str, Tensor]) -> Tensor:
            reading = density.read({**values, **self.layout.given(values[""])}, self.names, TERMS)
            total: Any = reading.log_jacobian
            for term in self.terms:
                total = total + density.sites[term].per_element(reading.terms[term])
            return total.expand(batch)

        others = {n: v for n, v in self.state.items() if n not in self.names}
        return (density.batched(one, {**others, "": u}, len(u)),)

    def _unconstrained(self, *values: Tensor) -> tuple[Tensor, ...]:
        def one(row: Mapping[str, Tensor]) -> Tensor:
            return self.layout.flat(self.density.read(row, want=frozenset({"unconstrained"})).unconstrained)

        with self._rows():
            return (self.density.batched(one, dict(zip(self.state, values, strict=True)), self.chains),)

    def _constrained(self, u: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        def one(row: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            free = self.layout.given(row[""])
            found = self.density.read({**row, **free}, self.names, frozenset({"values"})).values
            return tuple(s.to_pyro(found[n], s.event_dim) for n, s in self.layout.sites.items())

        with self._rows():
            return self.density.batched(one, {**dict(zip(self.state, values, strict=True)), "": u}, self.chains)

    # -- moving --------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Compile what moves, at where the state is."""
        lanes, values = self.lanes, tuple(self.state.values())
        rolled = tuple(torch.roll(v, 1, 0) for v in values)
        shaped = self._unconstrained(*values)[0]
        self.shape = shaped.shape
        u = shaped.reshape(-1, self.layout.dim)
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
        u = self._to_u(*self.state.values())[0].reshape(-1, self.layout.dim)
        self.u, ones = u, torch.ones_like(u[:, 0])
        self.keys, self.counter = (
            streams.keys(seed, len(u), u.device),
            torch.zeros_like(self.lanes.ids, device=u.device),
        )
        self.warmup = adaptation.begin(step_size * ones, torch.ones_like(u))
        self.step, self.mass = step_size * ones, torch.ones_like(u)
        self.moved = Moved(ones, ones, ones, ones > 1)

    def move(self, state: State, turn: int = 0) -> None:
        if not self.carries:
            self.u = self._to_u(*state.values())[0].reshape(-1, self.layout.dim)
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
