"""Which parts of a log joint a latent takes part in, and its log density along many values at once.

The log joint is a sum of terms, one for each element of each site. A latent is moved by its profile, the sum of the
terms that depend on it, at P values, the others held:

    profile[p, element] = sum of the terms that depend on the element, at its value p

Elements of a plate that also holds every term which depends on them are independent given the rest: all of them get
their profiles from the same P evaluations, so that the cost is linear in the data. Elements along other dimensions
take turns, one slot after the other.

Which sites a latent reaches is read off the operations of the program; that plates keep their elements apart, which
Pyro's semantics promise, is tried. Values are laid out as Pyro does, (C, *plates by their dimension, *event).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .compile import LARGEST_GRAPH, Compiled
from .density import Density
from .program import Plate
from .trace import TraceError, trace

State = dict[str, Tensor]  # latent site -> (C, *as Pyro lays it out)
NEAR = 1e-9  # relative: terms that did not change


class Structure:
    """What each latent reaches, and which of its dimensions keep their elements apart; from values of C >= 2 draws."""

    def __init__(self, density: Density, state: State) -> None:
        self.density = density
        values = {name: value[0] for name, value in state.items()}
        with density.uncounted(), torch.no_grad():
            terms = density.read(values).terms
            self.shapes = {name: tuple(term.shape) for name, term in terms.items()}
            self.reach = self._reached({name: value[:2] for name, value in state.items()}, list(terms))
            self.apart = [p for p in self._plates() if not self._couples(state, p)]

    def _plates(self) -> list[Plate]:
        return list(dict.fromkeys(p for site in self.density.latents.values() for p in site.plates))

    def _reached(self, values: State, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Latent -> the sites whose terms depend on it, by runs at two draws; all sites where the program decides by
        values what it runs."""
        names = list(values)

        def one(row: State) -> tuple[Tensor, ...]:
            found = self.density.read(row).terms
            return tuple(found[name] for name in terms)

        def function(*args: Tensor) -> tuple[Tensor, ...]:
            return self.density.batched(one, dict(zip(names, args, strict=True)), 2)

        everything = dict.fromkeys(names, tuple(terms))
        if not self.density.vectorised:
            return everything
        try:
            graph = trace(function, list(values.values()), limit=LARGEST_GRAPH).graph
        except (TraceError, RuntimeError):
            return everything
        sources = _sources(graph)
        outputs: Any = next(n for n in graph.nodes if n.op == "output").args[0]
        return {
            name: tuple(t for t, node in zip(terms, outputs, strict=True) if i in sources(node))
            for i, name in enumerate(names)
        }

    def _couples(self, state: State, plate: Plate) -> bool:
        """Whether moving half of a plate's elements moves a term of the other half."""
        first, second = ({name: value[c] for name, value in state.items()} for c in (0, 1))
        for half in (0, 1):
            moved = dict(first)
            for name, site in self.density.latents.items():
                if plate in site.plates:
                    dim = plate.dim - site.event_dim
                    takes = (torch.arange(first[name].shape[dim]) % 2 == half).to(first[name].device)
                    takes = takes.reshape(-1, *[1] * (-dim - 1))
                    moved[name] = torch.where(takes, second[name], first[name])
            before, after = (self.density.read(values).terms for values in (first, moved))
            for name, term in before.items():
                if plate not in self.density.sites[name].plates:
                    continue
                rows = slice(1 - half, None, 2)
                a, b = (t.movedim(plate.dim, 0)[rows] for t in (term, after[name]))
                if not torch.allclose(a, b, rtol=NEAR, atol=NEAR, equal_nan=True):
                    return True
        return False

    def keeps_apart(self, name: str, dim: int, size: int) -> bool:
        """Whether a latent's elements along a dimension of the plates are independent, given all else."""
        site = self.density.latents[name]
        plate = next((p for p in self.apart if p in site.plates and p.dim == dim), None)
        return plate is not None and all(
            plate in self.density.sites[t].plates and len(self.shapes[t]) >= -dim and self.shapes[t][dim] == size
            for t in self.reach[name]
        )


def _sources(graph: torch.fx.Graph) -> Callable[[torch.fx.Node], set[int]]:
    """Which arguments of the graph each node depends on. What is written to memory reaches all that share it."""
    memory: dict[torch.fx.Node, torch.fx.Node] = {}  # node -> the first that had its memory
    sources: dict[torch.fx.Node, set[int]] = {}  # of all that was written there
    inputs = itertools.count()
    for node in graph.nodes:
        if node.op == "placeholder":
            memory[node], sources[node] = node, {next(inputs)}
            continue
        found = set().union(*(sources[memory[n]] for n in node.all_input_nodes))
        shared = [node.args[0]] if node.target is operator.getitem else _shared(node)
        memory[node] = memory[shared[0]] if shared else node
        sources.setdefault(memory[node], set()).update(found)
        for other in shared:
            sources[memory[other]].update(found)
    return lambda node: sources[memory[node]]


def _shared(node: torch.fx.Node) -> list[Any]:
    """The arguments whose memory an operation answers with a view of, or writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = [node.args[i] if i < len(node.args) else node.kwargs.get(a.name) for i, a in enumerate(schema.arguments)]
    marked = [g for g, a in zip(given, schema.arguments, strict=True) if a.alias_info is not None]
    return [g for g in marked if isinstance(g, torch.fx.Node)]


Slot = tuple[slice, ...]  # of the dimensions of a value that are not one element's own


@dataclass(frozen=True)
class Unit:
    """Latents that are moved together, element by element: one, or several whose joint values are listed.

    names   of one shape (*plates)
    terms   the sites that depend on them
    shape   (*dims) of their elements: the plates, and the event where its numbers are elements of their own
    apart   for each of these dimensions, whether its elements are independent
    event   trailing dimensions of an element's own value
    """

    names: tuple[str, ...]
    terms: tuple[str, ...]
    shape: tuple[int, ...]
    apart: tuple[bool, ...]
    event: int
    plates: int  # how many of the dimensions are plates

    @property
    def slots(self) -> int:
        return math.prod(n for n, apart in zip(self.shape, self.apart, strict=True) if not apart)

    @property
    def elements(self) -> tuple[int, ...]:
        """The shape of what one slot holds."""
        return tuple(n if apart else 1 for n, apart in zip(self.shape, self.apart, strict=True))

    def each_slot(self) -> Iterator[Slot]:
        choices = [
            [slice(None)] if apart or n == 1 else [slice(i, i + 1) for i in range(n)]
            for n, apart in zip(self.shape, self.apart, strict=True)
        ]
        yield from itertools.product(*choices)

    def mask(self, slot: Slot, device: torch.device) -> Tensor:
        """Which elements the slot holds, (*dims, *ones)."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=device)
        mask[slot] = True
        return mask.reshape(*self.shape, *[1] * self.event)


def unit(structure: Structure, state: State, names: tuple[str, ...], event: int | None = None) -> Unit:
    """`event`: trailing dimensions that make one value; None: all of the event."""
    sites = [structure.density.latents[n] for n in names]
    terms = tuple(dict.fromkeys(t for n in names for t in structure.reach[n]))
    dims = tuple(state[names[0]].shape[1:])
    event = sites[0].event_dim if event is None else event
    plates = len(dims) - sites[0].event_dim
    shape = dims[: len(dims) - event]
    apart = tuple(
        i < plates and n > 1 and all(structure.keeps_apart(name, i - plates, n) for name in names)
        for i, n in enumerate(shape)
    )
    return Unit(names, terms, shape, apart, event, plates)


class Way(Protocol):
    """How the elements of a unit are drawn. `points` and `reduce` are compiled with the density; what depends on random
    numbers alone is among the `inputs`, (C, *elements, ...) each."""

    word: str  # how, in words
    count: int  # points of the profile

    def inputs(self, now: State, slot: Slot) -> tuple[Tensor, ...]:
        """From the values in the slot."""

    def points(self, *inputs: Tensor) -> State:
        """Where to evaluate, (P, C, *elements, *event)."""

    def reduce(self, profile: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the draw needs of the log densities (P, C, *elements)."""

    def draw(self, inputs: tuple[Tensor, ...], found: tuple[Tensor, ...], slot: Slot) -> State:
        """New values (C, *elements, *event). Raises `EngineError`."""


class Given:
    """Points as they are handed over, and the log densities there: to look at a conditional."""

    word = "not at all"

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def inputs(self, now: State, slot: Slot) -> tuple[Tensor, ...]:
        return (now[self.name],)

    def points(self, *inputs: Tensor) -> State:
        return {self.name: inputs[0]}

    def reduce(self, profile: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (profile,)

    def draw(self, inputs: tuple[Tensor, ...], found: tuple[Tensor, ...], slot: Slot) -> State:
        return {}


class Profile:
    """The profiles of units that do not meet in any term, and what their ways make of them: one compiled function."""

    def __init__(self, density: Density, units: Sequence[Unit], ways: Sequence[Way]) -> None:
        self.density, self.units, self.ways = density, list(units), list(ways)
        self.num_points = max(way.count for way in ways)
        self.names = list(density.latents)
        self._rows = None if density.row_numbers is None else density.row_numbers.clone()
        self._run: Compiled | None = None
        self._sizes: list[tuple[int, int]] = []  # inputs and answers of each unit

    @property
    def backend(self) -> str:
        return self._run.backend if self._run else "eager"

    @property
    def why(self) -> str:
        return self._run.why if self._run else ""

    def __call__(
        self, state: State, inputs: Sequence[tuple[Tensor, ...]], slots: Sequence[Slot], compiled: bool = True
    ) -> list[tuple[Tensor, ...]]:
        """The answers of each unit's way; counted, as many evaluations as points, for each chain."""
        turning = [(u, slot) for u, slot in zip(self.units, slots, strict=True) if u.slots > 1]
        held = [state[n] for n in self.names]
        args = (*held, *(t for each in inputs for t in each), *(u.mask(slot, held[0].device) for u, slot in turning))
        self.density.counts["evaluations"] += self.num_points * len(held[0]) * self.density.batch_share
        self._sizes = [(len(each), 0) for each in inputs] if not self._sizes else self._sizes
        if not compiled:
            return self._apart(self._function(*args))
        if self._run is None:
            other = tuple(torch.roll(a, 1, 0) if i < len(held) else a for i, a in enumerate(args))
            moving = [] if self._rows is None else [self._rows]
            self._run = self.density.compile(self._function, [args, other], moving)
        return self._apart(self._run(*args))

    def _apart(self, answers: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        left = iter(answers)
        return [tuple(itertools.islice(left, count)) for _, count in self._sizes]

    def renew(self) -> None:
        """The same profiles, of the minibatch that the density is in now."""
        if self._rows is not None and self.density.row_numbers is not None:
            self._rows.copy_(self.density.row_numbers)

    def _function(self, *args: Tensor) -> tuple[Tensor, ...]:
        left = iter(args)
        state = {n: next(left) for n in self.names}
        inputs = [tuple(itertools.islice(left, count)) for count, _ in self._sizes]
        chains, p = len(args[0]), self.num_points
        rows = {n: v.expand(p, *v.shape) for n, v in state.items()}
        for u, way, given in zip(self.units, self.ways, inputs, strict=True):
            mask = next(left) if u.slots > 1 else None
            for name, values in way.points(*given).items():
                if way.count < p:
                    values = torch.cat([values, values[-1:].expand(p - way.count, *values.shape[1:])])
                values = values if mask is None else torch.where(mask, values, state[name])
                rows[name] = values.expand(rows[name].shape)
        flat = {n: v.reshape(p * chains, *v.shape[2:]) for n, v in rows.items()}
        with self.density.minibatch(self._rows) if self._rows is not None else nullcontext():
            found = self.density.batched(self._sums, flat, p * chains)
        answers = [
            way.reduce(v.reshape(p, chains, *u.elements)[: way.count], *given)
            for u, way, v, given in zip(self.units, self.ways, found, inputs, strict=True)
        ]
        self._sizes = [(len(given), len(answer)) for given, answer in zip(inputs, answers, strict=True)]
        return tuple(t for answer in answers for t in answer)

    def _sums(self, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        terms = self.density.read(values).terms
        return tuple(_summed(u, {t: terms[t] for t in u.terms}) for u in self.units)


def _summed(u: Unit, terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms for each element of a slot, (*elements)."""
    kept = [i - u.plates for i in range(u.plates) if u.apart[i]]
    total: Tensor | float = 0.0
    for term in terms.values():
        others = [d for d in range(-term.dim(), 0) if d not in kept]
        total = total + (term.sum(others) if others else term).reshape(u.elements)
    assert isinstance(total, Tensor)
    return total
