"""The plan of a Gibbs sampler: which latents are drawn exactly and how, which move together, and which by a kernel.

Discrete latents are listed, or walk over whole numbers where they cannot be. A continuous latent is drawn in closed
form where its conditional is found to be of a family, at draws of the prior and at draws of the conditional itself;
what remains moves as one block by a kernel. Units that meet in no term are moved side by side, so that a hidden Markov
chain written as a loop takes two turns, odd and even, whatever its length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from . import conjugate
from .blocks import Conjugate, Exact, Listed, Walk, Within
from .conditionals import Given, Profile, Slot, State, Structure, Unit, Way, unit
from .conjugate import Family, Frame
from .density import Density
from .kernels.metropolis import Kernel
from .problem import ProblemError

MOST_VALUES = 4096  # of latents that are listed together
MOST_CALLS = 512  # evaluations that a closed form may take in a sweep: beyond, a kernel is cheaper
MANY = 64  # continuous latents; of more no closed form is sought
TRIED = 8  # draws from a family, at which the density must be the family's
SLOTS_TRIED = 3
DRAWS = 32  # of the prior, for how far the latents spread

Blocks = Sequence[tuple[tuple[str, ...], Kernel | None]]  # the latents of a block, and their kernel where it was named


def layout(density: Density, values: Mapping[str, Tensor]) -> State:
    """site -> (n, *batch, *event) to (n, *as Pyro lays it out)."""
    sites = {n: density.latents[n] for n in density.latents}
    return {n: torch.stack([s.to_pyro(v, s.event_dim) for v in values[n]]) for n, s in sites.items()}


def own(density: Density, state: State) -> dict[str, Tensor]:
    """site -> (n, *as Pyro lays it out) to (n, *batch, *event)."""
    return {n: torch.func.vmap(lambda v, s=s: s.to_own(v, s.event_dim))(state[n]) for n, s in density.latents.items()}


def some_draws(density: Density, count: int) -> dict[str, Tensor]:
    """Draws of the prior, (n, *batch, *event); where it is improper, near zero in unconstrained space, and uniform over
    the supports of discrete latents."""
    if not density.improper:
        return dict(density.prior(count).values)
    u = torch.rand((count, *density.batch_shape, density.dim), dtype=density.dtype, device=density.device) * 4 - 2
    values = density.constrain(u)
    for name in density.discrete:
        site = density.latents[name]
        shape = site.own_shape(site.shape, site.event_dim)
        table = site.support if site.support is not None else torch.zeros(1, *shape[len(shape) - site.event_dim :])
        index = torch.randint(len(table), (count, *shape[: len(shape) - site.event_dim]))
        values[name] = table[index].to(density.device)
    return values


class Sweep:
    """The blocks of one problem, and the state (C, ...) that they move in place."""

    def __init__(self, density: Density, chains: int, by_hand: Blocks, rest: Kernel) -> None:
        self.density = density
        with density.uncounted():
            draws = layout(density, some_draws(density, DRAWS))
            self.state: State = {n: v[:chains].clone() for n, v in _repeated(draws, chains).items()}
            self.structure = Structure(density, draws)
            self.exact: list[Exact] = []
            self.within: list[Within] = []
            self.words: dict[str, str] = {}
            self._plan(draws, by_hand, rest)
        self.turns = [(block, turn) for block in self.blocks for turn in range(len(block.slots))]

    @property
    def blocks(self) -> list[Exact | Within]:
        return [*self.exact, *self.within]

    @property
    def calls(self) -> float:
        """Evaluations and gradients of one sweep of all chains, roughly."""
        return len(next(iter(self.state.values()))) * sum(block.calls for block in self.blocks)

    def begin(self, values: Mapping[str, Tensor], seeds: Sequence[int], step_size: float) -> None:
        """Stand at values (C, *batch, *event)."""
        for name, value in layout(self.density, values).items():
            self.state[name].copy_(value)
        for exact in self.exact:
            exact.begin(self.state)
        for within, seed in zip(self.within, seeds, strict=True):
            within.begin(seed, step_size)

    def settle(self) -> None:
        """Draw the discrete latents: at a start it is the continuous ones that were chosen, and a chance draw of labels
        would lead them astray."""
        for exact in self.exact:
            if all(name in self.density.discrete for name in exact.names):
                for turn in range(len(exact.slots)):
                    exact.move(self.state, turn)

    def notes(self) -> Iterator[str]:
        how: dict[str, list[str]] = {}
        for name, word in self.words.items():
            how.setdefault(word, []).append(name)
        yield "; ".join(f"{_listed(names)} {word}" for word, names in how.items())
        if not self.exact:
            yield "no latent is discrete or was found to have a conditional in closed form: all move by the kernel"
        for exact in self.exact:
            if len(exact.slots) > 1:
                yield f"the elements of {_listed(exact.names)} meet in other sites: they take {len(exact.slots)} turns"
            if exact.profile.why:
                yield (
                    f"the conditional of {_listed(exact.names)} runs as {exact.profile.backend}, which is slower: "
                    f"{exact.profile.why}"
                )
        for within in self.within:
            yield from within.lanes.notes()

    # -- planning ------------------------------------------------------------------------------------------------

    def _plan(self, draws: State, by_hand: Blocks, rest: Kernel) -> None:
        density, found, left = self.density, list[tuple[Unit, Way]](), list[str]()
        named = {name for names, _ in by_hand for name in names}
        by_kernel = [(names, kernel) for names, kernel in by_hand if kernel is not None]
        # what Python loops over comes in many sites of one kind: looking at each costs more than it gains
        seek = len(density.continuous) <= MANY and density.dtype == torch.float64
        for names, kernel in [*by_hand, *(((n,), None) for n in density.latents if n not in named)]:
            if kernel is not None:
                continue
            drawn = self._exactly(draws, names, seek or names[0] in named)
            if drawn is not None:
                found.append(drawn)
            elif names[0] in named:
                by_kernel.append((names, rest))
            else:
                left += names
        self.exact = [Exact(density, [u for u, _ in group], [way for _, way in group]) for group in _apart(found)]
        for exact in self.exact:
            for u, way in zip(exact.units, exact.ways, strict=True):
                self.words |= dict.fromkeys(u.names, way.word)
        for names, kernel in [*by_kernel, *([(tuple(left), rest)] if left else [])]:
            terms = tuple(dict.fromkeys(t for n in names for t in self.structure.reach[n]))
            self.within.append(Within(density, names, terms, kernel, self.state))
            self.words |= {name: f"by {type(kernel).__name__}" for name in names}

    def _exactly(self, draws: State, names: tuple[str, ...], seek: bool) -> tuple[Unit, Way] | None:
        """How the latents are drawn from their conditional, or None: by a kernel."""
        sites = [self.density.latents[n] for n in names]
        if not sites[0].discrete:
            return self._closed(draws, names[0]) if len(names) == 1 and seek else None
        if sites[0].support is None:
            return unit(self.structure, draws, names, event=0), Walk(names[0])
        u = unit(self.structure, draws, names)
        tables = [s.support.to(draws[n]) for n, s in zip(names, sites, strict=True) if s.support is not None]
        if len(names) > 1:
            self._check_together(u, tables)
            index = torch.tensor(list(itertools.product(*(range(len(t)) for t in tables))))
            tables = [t[index[:, i]] for i, t in enumerate(tables)]
        return u, Listed(dict(zip(names, tables, strict=True)))

    def _check_together(self, u: Unit, tables: Sequence[Tensor]) -> None:
        values = math.prod(map(len, tables))
        shapes = {self.density.latents[n].shape for n in u.names}
        if u.slots > 1 or len(shapes) > 1 or values > MOST_VALUES:
            raise ProblemError(
                f"Gibbs(blocks=...): {_listed(u.names)} cannot be listed together: their elements must be as many, "
                f"independent given all else, and have at most {MOST_VALUES} values (here {values}). Give each a block."
            )

    def _closed(self, draws: State, name: str) -> tuple[Unit, Way] | None:
        """A family that the conditional is of, as far as can be seen; None where there is none."""
        site = self.density.latents[name]
        event_shape = tuple(draws[name].shape[draws[name].dim() - site.event_dim :]) if site.event_dim else ()
        spread = _spread(draws[name])
        for family in conjugate.candidates(site.domain, event_shape):
            u = unit(self.structure, draws, (name,), event=family.event)
            way = Conjugate(name, family, self.state[name].shape, spread)
            if u.slots * way.count <= MOST_CALLS and self._is(family, u, draws, spread):
                return u, way
        return None

    def _is(self, family: Family, u: Unit, draws: State, spread: float) -> bool:
        """Whether the conditional is of the family at three draws of the prior: the density at draws from the family
        and at other draws of the prior is the family's."""
        name = u.names[0]
        state = {n: v[:3].clone() for n, v in draws.items()}
        slots = list(u.each_slot())
        for slot in [slots[i] for i in sorted({0, len(slots) // 2, len(slots) - 1})][:SLOTS_TRIED]:
            at = (slice(None), *slot)
            value = state[name][at]
            frame = Frame(value, torch.full_like(value, spread))
            first = self._profile(u, state, conjugate.points(family, frame), slot)
            fit = conjugate.fit(family, first)
            if not bool(fit.proper.all()):
                return False
            tried = [family.draw(fit.b, frame)[0] for _ in range(TRIED)] + [
                draws[name][3 * i : 3 * i + 3][at] for i in range(4)
            ]
            v = torch.stack(tried)
            found = self._profile(u, state, v, slot)
            off = torch.stack(
                [conjugate.misfit(family, fit.b, frame, first[0], *row) for row in zip(v, found, strict=True)]
            )
            if not bool((off < 1).all()):
                return False
        return True

    def _profile(self, u: Unit, state: State, points: Tensor, slot: Slot) -> Tensor:
        """The log density at points (P, C, *elements, *event) of a unit of one latent."""
        profile = Profile(self.density, [u], [Given(u.names[0], len(points))])
        return profile(state, [(points,)], [slot], compiled=False)[0][0]


def _spread(values: Tensor) -> float:
    """How far apart points should stand for a latent with these prior draws: 1.48 times the median distance from the
    median for reals, the median for what is positive."""
    flat = values.double().flatten()
    middle = flat.median()
    spread = float(middle) if bool((flat > 0).all()) else 1.4826 * float((flat - middle).abs().median())
    return min(max(spread, 1e-6), 1e6) if math.isfinite(spread) else 1.0


def _apart(found: Sequence[tuple[Unit, Way]]) -> list[list[tuple[Unit, Way]]]:
    """Groups of units that meet in no term, greedily; a unit whose elements take turns stands alone."""
    groups: list[tuple[set[str], list[tuple[Unit, Way]]]] = []
    for u, way in found:
        for terms, group in groups:
            if u.slots == 1 and group[0][0].slots == 1 and terms.isdisjoint(u.terms):
                terms.update(u.terms)
                group.append((u, way))
                break
        else:
            groups.append((set(u.terms), [(u, way)]))
    return [group for _, group in groups]


def _repeated(draws: State, count: int) -> State:
    """At least `count` rows."""
    times = -(-count // DRAWS)
    return {n: v.repeat(times, *[1] * (v.dim() - 1)) for n, v in draws.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
