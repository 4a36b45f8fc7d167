"""One chain of discrete latents, read from a program: its factors.

    p(x, z) = f(z_0) prod_{t=1..T-1} exp(moves_t(z_{t-1}, z_t) + seen_t(z_t))

`moves`: what ties neighbours; `seen`: what site z_t and the observations that follow it say of z_t alone. A program
whose transitions are the same at every step has one matrix of moves. `chain_sums` sums over all states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .density import Density
from .problem import ProblemError
from .program import SOMETIMES, settle
from .rolled import Group, RollError, rolled

CYCLE = 3  # neighbours in time have dimensions of their own, and so has the one before them, to see that it is not used
COMPILE_FROM = 500  # steps; recording so many costs more than a compiler does
SEVERAL = 3  # paths on which the factors are compared with the density


class NotAChain(Exception):  # noqa: N818
    """The latents are no single chain; the message says why."""


class _Laid(Messenger):
    """Sets each latent to all its states, on dimensions left of the plates, and notes the factors."""

    def __init__(self, density: Density) -> None:
        super().__init__()
        self.sites, self.dtype = density.sites, density.dtype
        self.first = -1 - max((-p.dim for s in self.sites.values() for p in s.plates), default=0)
        self.order: list[str] = []
        self.terms: list[tuple[int, str, Tensor]] = []

    def dim(self, step: int) -> int:
        return self.first - step % CYCLE

    def _process_message(self, msg: Message) -> None:
        if msg["type"] != "sample" or site_is_subsample(msg):
            return
        settle(msg)
        name: str = msg["name"]
        if msg["is_observed"]:
            return
        if name not in self.sites:
            raise ProblemError(SOMETIMES.format(name))
        support = self.sites[name].values(self.dtype)
        self.order.append(name)
        left = -self.dim(len(self.order) - 1) - 1
        msg["value"] = support.reshape(len(support), *[1] * left, *support.shape[1:])

    def _postprocess_message(self, msg: Message) -> None:
        if msg["type"] != "sample" or site_is_subsample(msg) or self.sites[msg["name"]].role == "deterministic":
            return
        fn: Any = msg["fn"]
        value = scale_and_mask(fn.log_prob(msg["value"]), msg["scale"], msg["mask"])
        value = value.expand(torch.broadcast_shapes(value.shape, fn.batch_shape))
        self.terms.append((max(0, len(self.order) - 1), msg["name"], value))


@dataclass(frozen=True, eq=False)
class Factors:
    """Logs of the factors: `first` (N, K), `moves` (1 or T - 1, 1 or N, K, K), one where all are the same, and `seen`
    (T - 1, N, K). N counts the batch, flattened."""

    first: Tensor
    moves: Tensor
    seen: Tensor

    @property
    def later(self) -> Tensor:
        """moves + seen, (T - 1, N, K, K)."""
        return self.moves + self.seen[:, :, None]


class Chain:
    """The chain of a density, found by one run, in which a long program that is to learn is rolled up at once. Raises
    `NotAChain`."""

    def __init__(self, density: Density) -> None:
        self.density = density
        sizes = set()
        for name, site in density.latents.items():
            if not site.discrete:
                raise NotAChain(f"site {name!r} is continuous; forward-backward sums over discrete states")
            if site.support is None:
                raise NotAChain(f"site {name!r} cannot be listed: its support is infinite or differs between elements")
            if math.prod(site.inner_shape) != 1:
                raise NotAChain(f"site {name!r} holds several elements of a datum, which no single chain does")
            sizes.add(len(site.support))
        if len(density.latents) < 2:
            raise NotAChain("there is one discrete latent for each datum, so no chain: take enumeration")
        if len(sizes) > 1:
            raise NotAChain(f"the latents have different numbers of states: {sorted(sizes)}")
        self.states, self.calls = sizes.pop(), 0
        self.groups: list[Group] | None = None
        self.values_of_groups: Callable[[], tuple[Tensor, ...]] = self._values_of_groups
        self.placed: dict[tuple[int, int], list[tuple[Tensor | None, Any, int, int]]] = {}
        self.tied_once: bool | None = None  # whether each step has one term of two states
        laid = self._rolled() if density.learning and len(density.latents) >= COMPILE_FROM else self._run()
        self.sites = laid.order
        self.shapes = [self._where(laid, step, name, value) for step, name, value in laid.terms]
        factors = self._gathered(self._alike([value for _, _, value in laid.terms]))
        self._check(factors)
        self.first = factors, [t.detach().clone() for t in density.theta.tensors]

    def _run(self) -> _Laid:
        with self.density.once(), _Laid(self.density) as laid:
            self.density.problem.model(*self.density.args, **self.density.kwargs)
        return laid

    def _where(self, laid: _Laid, step: int, name: str, value: Tensor) -> tuple[int, int, int]:
        """A term's step, and its dimensions of the state before and of the state now."""
        for other in range(CYCLE):
            dim = laid.first - other
            if -dim <= value.dim() and value.shape[dim] != 1 and dim not in (laid.dim(step), laid.dim(step - 1)):
                raise NotAChain(
                    f"site {name!r} depends on a latent before {self.sites[max(0, step - 1)]!r}, and a chain's on none"
                )
        return step, laid.dim(step - 1), laid.dim(step)

    def factors(self, often: bool = False) -> Factors:
        """The factors at the parameters as they are now: those of the first run while these are what they were then.
        From the second call on, from the first where it is known that there will be more, the loop is rolled up."""
        self.calls += 1
        whole = self.density.row_numbers is None
        if (often or self.calls > 1) and whole and self.groups is None:
            self._rolled()
        if not whole or not self.groups:
            factors, theta = self.first
            if whole and all(torch.equal(a, b) for a, b in zip(theta, self.density.theta.tensors, strict=True)):
                if self.calls == 1:  # the run that found the chain was made for this answer
                    self.density.counts["evaluations"] += self.density.batch_share
                return factors
            self.placed = {}
            return self._gathered(self._alike([value for _, _, value in self._run().terms]))
        with self.density.once():
            numbers = [g.numbers for g in self.groups]
            return self._gathered(list(zip(numbers, self.values_of_groups(), strict=True)))

    def _rolled(self) -> _Laid:
        """Run the program, and roll its loop up where that can be done."""
        runs: list[_Laid] = []

        def terms() -> list[Tensor]:
            runs.append(self._run())
            return [value for _, _, value in runs[0].terms]

        try:
            self.groups = rolled(terms, self.density.theta.tensors)
            if len(self.density.latents) >= COMPILE_FROM:
                self.values_of_groups = self.density.compile(self._values_of_groups, [(), ()], [])
        except RollError:
            self.groups = []
        self.placed = {}
        return runs[0] if runs else self._run()

    def _values_of_groups(self) -> tuple[Tensor, ...]:
        return tuple(group() for group in self.groups or ())

    def _alike(self, terms: list[Tensor]) -> list[tuple[list[int], Tensor]]:
        """Terms of one shape, and of steps that are laid alike, together: (members, *shape), or one row where all are
        the same."""
        dims, groups = [p.dim for p in self.density.batch_plates], dict[Any, list[int]]()
        for i, value in enumerate(terms):
            for d in dims:  # one row stands for all of a batch that does not tell them apart
                if -d <= value.dim() and value.stride(d) == 0:
                    value = terms[i] = value.narrow(d, 0, 1)
            step, before, now = self.shapes[i]
            groups.setdefault((value.shape, value.dtype, before, now, step == 0), []).append(i)
        together = [(members, torch.stack([terms[i] for i in members])) for members in groups.values()]
        return [(m, v[:1] if torch.equal(v, v[:1].expand_as(v)) else v) for m, v in together]

    def _gathered(self, terms: list[tuple[list[int], Tensor]]) -> Factors:
        density, K = self.density, self.states
        batch, dims = tuple(density.batch_shape), [p.dim for p in density.batch_plates]
        N = math.prod(batch)
        first = torch.zeros(N, K, dtype=torch.float64, device=density.device)
        seen = first.new_zeros(len(self.sites) - 1, N, K)
        ties: list[tuple[Any, Tensor]] = []
        for number, (members, value) in enumerate(terms):
            for rows, steps, before, now in self._places(number, members):
                same = value.stride(0) == 0 or len(value) == 1  # for all members
                value_here = value[:1] if same else value if rows is None else value[rows]
                lead = max(-before, -now, *(-d for d in dims), value.dim() - 1)
                value_here = value_here.reshape(len(value_here), *[1] * (lead + 1 - value.dim()), *value.shape[1:])
                rest = [d for d in range(-lead, 0) if d not in (*dims, before, now)]
                value_here = value_here.permute(0, *dims, *rest, before, now)
                if rest:
                    value_here = value_here.sum(list(range(1 + len(dims), value_here.dim() - 2)))
                if any(size > 1 for size in value_here.shape[1:-2]):
                    value_here = value_here.expand(-1, *batch, -1, -1)
                value_here = value_here.flatten(1, -3) if dims else value_here[:, None]  # (members, 1 or N, .., ..)
                if steps is None:
                    count = len(members) if rows is None else len(rows)
                    first += value_here[:, :, 0].expand(count, -1, -1).sum(0)
                elif value_here.shape[2] == 1:
                    _add(seen, steps, value_here[:, :, 0].to(seen))
                else:
                    ties.append((steps, value_here.to(first).expand(-1, -1, K, K)))
        return Factors(first, self._moves(ties), seen)

    def _moves(self, ties: list[tuple[Any, Tensor]]) -> Tensor:
        """(T - 1, 1 or N, K, K) of values at steps; one for all steps where they are the same."""
        if not ties:
            return torch.zeros(1, 1, self.states, self.states, dtype=torch.float64, device=self.density.device)
        if self.tied_once is None:
            every = torch.arange(len(self.sites) - 1, device=self.density.device)
            self.tied_once = torch.equal(torch.cat([every[steps] for steps, _ in ties]).sort().values, every)
        value = ties[0][1]
        if self.tied_once and all(len(v) == 1 and torch.equal(v, value) for _, v in ties):
            return value[:, :1] if torch.equal(value, value[:, :1].expand_as(value)) else value
        N = max(v.shape[1] for _, v in ties)
        moves = value.new_zeros(len(self.sites) - 1, N, self.states, self.states)
        for steps, v in ties:
            _add(moves, steps, v)
        return moves

    def _places(self, number: int, members: list[int]) -> list[tuple[Tensor | None, Any, int, int]]:
        """Of terms that came together: which of them (None: all) belong to which steps (None: the first), counted
        from the second, and their dimensions of the state before and now."""
        key = number, len(members)
        if key not in self.placed:
            split: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}
            for row, member in enumerate(members):
                step, before, now = self.shapes[member]
                split.setdefault((before, now, step == 0), []).append((row, step - 1))
            self.placed[key] = [
                (
                    None if len(places) == len(members) else torch.tensor([row for row, _ in places]),
                    None if begins else _slice([step for _, step in places], self.density.device),
                    before,
                    now,
                )
                for (before, now, begins), places in split.items()
            ]
        return self.placed[key]

    def _check(self, factors: Factors) -> None:
        """The sum of the factors along some paths must be the density's log joint."""
        density = self.density
        N, steps = len(factors.first), len(self.sites)
        tried = density.tried
        if steps >= COMPILE_FROM and tried is not None and tried.holds(density):
            paths, truth = self._paths(tried.values), tried.log_joint
        else:
            paths = torch.randint(self.states, (SEVERAL, N, steps), device=density.device)
            with density.uncounted():
                truth = density.log_joint(self.values(paths))
        told = factors.first.expand(len(paths), -1, -1).gather(2, paths[:, :, :1])[..., 0]
        row, step = torch.arange(N, device=paths.device)[:, None], torch.arange(steps - 1, device=paths.device)
        before, now = paths[:, :, :-1], paths[:, :, 1:]
        moves = factors.moves.expand(steps - 1, N, -1, -1)
        told = told + (moves[step, row, before, now] + factors.seen[step, row, now]).sum(-1)
        if not torch.allclose(told.reshape(truth.shape), truth.to(told), rtol=1e-5, atol=1e-5, equal_nan=True):
            raise NotAChain("the latents' joint density is not that of one chain")

    def _paths(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values, site -> (S, *batch, *own), as state numbers (S, N, T)."""
        columns = []
        for name in self.sites:
            support, value = self.density.latents[name].values(self.density.dtype), values[name]
            listed, rows = support.reshape(self.states, -1), value.reshape(len(value), -1, 1, support[0].numel())
            columns.append((rows == listed).all(-1).long().argmax(-1))
        return torch.stack(columns, 2)

    def values(self, paths: Tensor) -> dict[str, Tensor]:
        """State numbers (S, N, T) as values, site -> (S, *batch, *own)."""
        found, batch = {}, tuple(self.density.batch_shape)
        for t, name in enumerate(self.sites):
            site = self.density.latents[name]
            value = site.values(self.density.dtype)[paths[:, :, t]]
            found[name] = value.reshape(len(paths), *batch, *site.inner_shape, *value.shape[2:])
        return found


def _slice(steps: list[int], device: torch.device | None) -> Any:
    """Steps as a slice where they are evenly spaced, which is read faster; else as a tensor, for some may be equal."""
    gap = steps[1] - steps[0] if len(steps) > 1 else 1
    if gap > 0 and steps == list(range(steps[0], steps[-1] + 1, gap)):
        return slice(steps[0], steps[-1] + 1, gap)
    return torch.tensor(steps, device=device)


def _add(total: Tensor, steps: Any, value: Tensor) -> None:
    """Add values (1 or len(steps), ...) to total (T - 1, ...) at these steps."""
    if isinstance(steps, slice):
        total[steps] += value
    else:
        total.index_add_(0, steps, value.expand(len(steps), *total.shape[1:]))
