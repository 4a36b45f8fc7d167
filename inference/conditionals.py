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
from typing import Any

import torch
from torch import Tensor

from .compile import LARGEST_GRAPH
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


class Profile:
    """The profiles of units that do not meet in any term, compiled: from the state, points and slots to log densities.

    points of unit i: site -> (P, C, *elements, *event); answers (P, C, *elements) for each unit
    """

    def __init__(self, density: Density, units: Sequence[Unit], num_points: int) -> None:
        self.density, self.units, self.num_points = density, tuple(units), num_points
        self.names = list(density.latents)
        self.wanted = [(u, n) for u in self.units for n in u.names]
        self._rows = None if density.row_numbers is None else density.row_numbers.clone()
        self._run: dict[int, object] = {}
        self.why = self.backend = ""

    def __call__(
        self, state: State, points: Sequence[State], slots: Sequence[Slot], compiled: bool = True
    ) -> list[Tensor]:
        """The log densities, counted: as many evaluations as points, for each chain."""
        args = self._arguments(state, points, slots)
        chains = len(args[0])
        self.density.counts["evaluations"] += self.num_points * chains * self.density.batch_share
        if not compiled:
            return list(self._function(*args))
        if chains not in self._run:
            other = [torch.roll(a, 1, 0) if i < len(self.names) else a for i, a in enumerate(args)]
            moving = [] if self._rows is None else [self._rows]
            made = self.density.compile(self._function, [tuple(args), tuple(other)], moving)
            self._run[chains], self.why, self.backend = made, made.why, made.backend
        return list(self._run[chains](*args))  # type: ignore[operator]

    def renew(self) -> None:
        """The same profiles, of the minibatch that the density is in now."""
        if self._rows is not None and self.density.row_numbers is not None:
            self._rows.copy_(self.density.row_numbers)

    def _arguments(self, state: State, points: Sequence[State], slots: Sequence[Slot]) -> list[Tensor]:
        args = [state[n] for n in self.names]
        args += [points[i][n] for i, u in enumerate(self.units) for n in u.names]
        args += [u.mask(slot, args[0].device) for u, slot in zip(self.units, slots, strict=True) if u.slots > 1]
        return args

    def _function(self, *args: Tensor) -> tuple[Tensor, ...]:
        state, rest = dict(zip(self.names, args, strict=False)), list(args[len(self.names) :])
        chains = len(args[0])
        count = self.num_points * chains
        masks = rest[len(self.wanted) :]
        rows = {n: v.expand(self.num_points, *v.shape) for n, v in state.items()}
        for (u, name), values in zip(self.wanted, rest, strict=False):
            full = (self.num_points, *state[name].shape)
            if u.slots > 1:
                mask = masks[[v for v in self.units if v.slots > 1].index(u)]
                rows[name] = torch.where(mask, values, state[name]).expand(full)
            else:
                rows[name] = values.expand(full)
        flat = {n: v.reshape(count, *v.shape[2:]) for n, v in rows.items()}
        with self.density.minibatch(self._rows) if self._rows is not None else nullcontext():
            found = self.density.batched(self._sums, flat, count)
        return tuple(v.reshape(self.num_points, chains, *u.elements) for u, v in zip(self.units, found, strict=True))

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
