"""One chain of discrete latents, read from a program: its factors, and exact sums over all its states.

    p(x, z) = m_0(z_0) prod_{t=1..T-1} m_t(z_{t-1}, z_t),       m_t: of site z_t and of the observations that follow it

    a_t(j) = sum_i a_{t-1}(i) m_t(i, j),    b_{t-1}(i) = sum_j m_t(i, j) b_t(j),    p(x) = sum_j a_{T-1}(j)

A long chain is cut into about sqrt(T) blocks. Inside, all blocks run together, from each state that they could begin
in; then the blocks are joined one after the other: 2 sqrt(T) steps in place of T. Rows keep scales of their own, so
that none is lost beside another (the same recursion as from a known beginning).
"""

from __future__ import annotations

import math
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
from .program import SOMETIMES
from .rolled import Group, RollError, rolled

CYCLE = 3  # neighbours in time have dimensions of their own, and so has the one before them, to see that it is not used
BLOCKS_FROM = 100  # steps; shorter chains are summed one step at a time
SEVERAL = 3  # paths on which the factors are compared with the density


class NotAChain(Exception):  # noqa: N818
    """The latents are no single chain; the message says why."""


class _Laid(Messenger):
    """Sets each latent to all its states, on dimensions left of the plates, and notes the factors."""

    def __init__(self, density: Density) -> None:
        super().__init__()
        self.sites = density.sites
        self.first = -1 - max((-p.dim for s in self.sites.values() for p in s.plates), default=0)
        self.order: list[str] = []
        self.terms: list[tuple[int, str, Tensor]] = []

    def dim(self, step: int) -> int:
        return self.first - step % CYCLE

    def _process_message(self, msg: Message) -> None:
        if msg["type"] != "sample" or site_is_subsample(msg) or msg["is_observed"]:
            return
        name: str = msg["name"]
        if name not in self.sites:
            raise ProblemError(SOMETIMES.format(name))
        support = self.sites[name].support
        assert support is not None
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
    """log m_t: `first` (N, K), `later` (T - 1, N, K, K); N counts the batch, flattened."""

    first: Tensor
    later: Tensor


@dataclass(frozen=True, eq=False)
class Marginals:
    """What an E-step wants of chains: p(z_t | x), `single` (*batch, T, K), and p(z_{t-1}, z_t | x) summed over t,
    `pairs` (*batch, K, K). States are numbered as in the sites' support."""

    single: Tensor
    pairs: Tensor


class Chain:
    """The chain of a density, found by one run. Raises `NotAChain`."""

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
        self.placed: dict[tuple[int, int], list[tuple[Tensor | None, Tensor | None, int, int]]] = {}
        laid = self._run()
        self.sites = laid.order
        self.shapes = [self._where(laid, step, name, value) for step, name, value in laid.terms]
        self._check()
        self.calls = 0

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

    def factors(self) -> Factors:
        """log m at the parameters as they are now. From the second call on, the program's loop is rolled up."""
        self.calls += 1
        whole = self.density.row_numbers is None
        if self.calls > 1 and whole and self.groups is None:
            try:
                terms = lambda: [value for _, _, value in self._run().terms]  # noqa: E731
                self.groups = rolled(terms, self.density.theta.tensors)
            except RollError:
                self.groups = []
            self.placed = {}
        if not whole or not self.groups:
            self.placed = {}
            return self._gathered([([i], v[None]) for i, (_, _, v) in enumerate(self._run().terms)])
        with self.density.once():
            return self._gathered([(g.numbers, g()) for g in self.groups])

    def _gathered(self, terms: list[tuple[list[int], Tensor]]) -> Factors:
        density, K = self.density, self.states
        batch, dims = tuple(density.batch_shape), [p.dim for p in density.batch_plates]
        N = math.prod(batch)
        first = torch.zeros(N, K, dtype=torch.float64, device=density.device)
        later = first.new_zeros(len(self.sites) - 1, N, K, K)
        for number, (members, value) in enumerate(terms):
            for rows, steps, before, now in self._places(number, members):
                value_here = value if rows is None else value[rows]
                lead = max(-before, -now, *(-d for d in dims), value.dim() - 1)
                value_here = value_here.reshape(len(value_here), *[1] * (lead + 1 - value.dim()), *value.shape[1:])
                rest = [d for d in range(-lead, 0) if d not in (*dims, before, now)]
                value_here = value_here.permute(0, *dims, *rest, before, now)
                if rest:
                    value_here = value_here.sum(list(range(1 + len(dims), value_here.dim() - 2)))
                ends = value_here.shape[-2:]
                value_here = value_here.expand(-1, *batch, *ends).reshape(-1, N, *ends).to(first)
                if steps is None:
                    first += value_here[:, :, 0].sum(0)
                else:
                    later.index_add_(0, steps, value_here.expand(-1, -1, K, K))
        return Factors(first, later)

    def _places(self, number: int, members: list[int]) -> list[tuple[Tensor | None, Tensor | None, int, int]]:
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
                    None if begins else torch.tensor([step for _, step in places], device=self.density.device),
                    before,
                    now,
                )
                for (before, now, begins), places in split.items()
            ]
        return self.placed[key]

    def _check(self) -> None:
        """The sum of the factors along some paths must be the density's log joint."""
        density = self.density
        with density.uncounted():
            factors = self.factors()
            shape = (SEVERAL, len(factors.first), len(self.sites))
            paths = torch.randint(self.states, shape, device=density.device)
            truth = density.log_joint(self.values(paths))
        told = factors.first.expand(SEVERAL, -1, -1).gather(2, paths[:, :, :1])[..., 0]
        for t in range(1, len(self.sites)):
            told = told + factors.later[t - 1][torch.arange(told.shape[1]), paths[:, :, t - 1], paths[:, :, t]]
        if not torch.allclose(told.reshape(truth.shape), truth.to(told), rtol=1e-5, atol=1e-5, equal_nan=True):
            raise NotAChain("the latents' joint density is not that of one chain")

    def values(self, paths: Tensor) -> dict[str, Tensor]:
        """State numbers (S, N, T) as values, site -> (S, *batch, *own)."""
        found, batch = {}, tuple(self.density.batch_shape)
        for t, name in enumerate(self.sites):
            site = self.density.latents[name]
            assert site.support is not None
            value = site.support[paths[:, :, t]]
            found[name] = value.reshape(len(paths), *batch, *site.inner_shape, *value.shape[2:])
        return found


def forward(first: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """log a_t, normalised, (T, N, K), and log of the whole sum, (N,); arguments as in `Factors`."""
    if len(later) >= BLOCKS_FROM:
        log_a, total = _by_blocks(first, *_scaled(later))
        if bool(total.isfinite().all()):
            return log_a, total  # else some sum is below the smallest number, or is zero
    rows, total = [], torch.zeros_like(first[:, 0])
    here = first
    for t in range(len(later) + 1):
        if t:
            here = torch.logsumexp(here[:, :, None] + later[t - 1], 1)
        size = torch.logsumexp(here, 1)
        total = total + size
        here = here - torch.where(size.isfinite(), size, 0.0)[:, None]
        rows.append(here)
    return torch.stack(rows), total


def _scaled(later: Tensor) -> tuple[Tensor, Tensor]:
    """m_t with largest element 1, and the logs of what they were divided by, (T - 1, N)."""
    top = later.amax((2, 3))
    return (later - top[..., None, None]).exp(), top


def _by_blocks(first: Tensor, scaled: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    steps, N, K = scaled.shape[:3]
    length = math.isqrt(steps)
    blocks = -(-steps // length)
    if extra := blocks * length - steps:
        scaled = torch.cat([scaled, torch.eye(K).to(scaled).expand(extra, N, K, K)])
    by_step = scaled.reshape(blocks, length, N, K, K).transpose(0, 1).reshape(length, blocks * N, K, K)
    tiny = torch.finfo(scaled.dtype).tiny
    R = torch.eye(K).to(scaled).expand(blocks * N, K, K)
    rows, sizes = [], []
    for m in by_step.unbind():  # all blocks together, from each state
        R = torch.bmm(R, m)
        size = R.sum(-1, keepdim=True)
        R = R / size.clamp_min(tiny)
        rows.append(R)
        sizes.append(size)
    scale = torch.stack(sizes)[..., 0].log().cumsum(0).reshape(length, blocks, N, K)
    log_last = R.reshape(blocks, N, K, K).log() + scale[-1][..., None]
    v, starts = first[:, :, None], []
    for m in log_last.unbind():  # v: log a at the beginning of the block
        starts.append(v)
        v = torch.logsumexp(v + m, 1)[:, :, None]
    weight = torch.softmax(torch.stack(starts)[..., 0] + scale, -1)  # (length, blocks, N, K)
    a = torch.bmm(weight.reshape(-1, 1, K), torch.stack(rows).reshape(-1, K, K))
    a = a.reshape(length, blocks, N, K).transpose(0, 1).reshape(-1, N, K)[:steps]
    log_a = torch.cat([torch.log_softmax(first, -1)[None], a.log()])
    return log_a, torch.logsumexp(v[..., 0], 1) + top.sum(0)


def marginals(factors: Factors, batch: tuple[int, ...]) -> tuple[Marginals, Tensor]:
    """State and pair marginals, and log p(x) (*batch). The backward sums b_t are the forward sums of the chain that
    runs the other way, and run beside them."""
    first, later = factors.first, factors.later
    N, K = first.shape
    first = torch.cat([first, torch.zeros_like(first)])
    single: Tensor | None = None
    pairs = later
    if len(later) >= BLOCKS_FROM:
        scaled, top = _scaled(later)
        there_and_back = torch.cat([scaled, scaled.flip(0).transpose(2, 3)], 1)
        log_sums, total = _by_blocks(first, there_and_back, torch.cat([top, top.flip(0)], 1))
        if bool(total.isfinite().all()):
            sums = log_sums.exp()
            a, b = sums[:, :N], sums[:, N:].flip(0)
            single = a * b
            pairs = a[:-1, :, :, None] * scaled * b[1:, :, None, :]
            of_pairs, of_single = pairs.sum((2, 3), keepdim=True), single.sum(-1, keepdim=True)
            if bool((of_pairs > 0).all() and (of_single > 0).all()):
                single, pairs = single / of_single, torch.einsum("tnij,tn->nij", pairs, 1 / of_pairs[..., 0, 0])
            else:
                single = None
    if single is None:  # some product is below the smallest number
        log_sums, total = forward(first, torch.cat([later, later.flip(0).transpose(2, 3)], 1))
        log_a, log_b = log_sums[:, :N], log_sums[:, N:].flip(0)
        single = torch.softmax(log_a + log_b, -1)
        pairs = log_a[:-1, :, :, None] + later + log_b[1:, :, None, :]
        pairs = torch.softmax(pairs.flatten(2), -1).sum(0)
    found = Marginals(single.movedim(0, 1).reshape(*batch, -1, K), pairs.reshape(*batch, K, K))
    return found, total[:N].reshape(batch)


def sampled(factors: Factors, count: int) -> tuple[Tensor, Tensor]:
    """Independent draws of whole paths, state numbers (S, N, T), going back from the end; and log p(x) (N,)."""
    log_a, total = forward(factors.first, factors.later)
    if not bool(total.isfinite().all()):
        return torch.zeros(count, len(total), len(log_a), dtype=torch.long), total

    def chosen(logits: Tensor) -> Tensor:
        uniform = torch.rand_like(logits[..., :1])
        share = torch.softmax(logits, -1).cumsum(-1)
        return torch.searchsorted(share, uniform * share[..., -1:], right=True)[..., 0].clamp_max(logits.shape[-1] - 1)

    z = chosen(log_a[-1].expand(count, -1, -1).contiguous())
    path = [z]
    for log_here, log_m in zip(log_a[:-1].flip(0), factors.later.flip(0), strict=True):
        table = (log_here[:, :, None] + log_m).transpose(1, 2)  # (N, next, now)
        z = chosen(table[torch.arange(len(total), device=z.device), z])
        path.append(z)
    return torch.stack(path[::-1], 2), total
