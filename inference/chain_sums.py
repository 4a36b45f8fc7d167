"""Exact sums over all states of chains, and draws of whole paths: the forward-backward algorithm.

    a_t(j) = sum_i a_{t-1}(i) m_t(i, j),    b_{t-1}(i) = sum_j m_t(i, j) b_t(j),    p(x) = sum_j a_{T-1}(j),
    m_t(i, j) = exp(moves_t(i, j) + seen_t(j)) as in `markov.Factors`

Long chains run in machine code, T steps of K^2 products. Without it (no C compiler, a GPU) they are cut into about
sqrt(T) blocks. Inside, all blocks run together, from each state that they could begin in; then the blocks are joined
one after the other: 2 sqrt(T) steps in place of T. Rows keep scales of their own, so that none is lost beside another
(the same recursion as from a known beginning). Where a number is lost that may come back into weight, all is done again
in logs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .markov import Factors
from .native.chains import LARGEST, Chains
from .native.toolchain import CompileError

NATIVE_FROM = 100  # steps; shorter chains are not worth a compiler's time,
BLOCKS_FROM = 100  # and shorter ones are summed one step at a time
LEAST, DENSE = 1e-300, 1e-100  # of the largest: what linear space holds; what makes lost numbers harmless
FLOOR, SHARED = 1e-140, 1e-200  # a number below it beside its row is lost; so is the product of two rows


@dataclass(frozen=True, eq=False)
class Marginals:
    """What an E-step wants of chains: p(z_t | x), `single` (*batch, T, K), and p(z_{t-1}, z_t | x) summed over t,
    `pairs` (*batch, K, K). States are numbered as in the sites' support."""

    single: Tensor
    pairs: Tensor


def native(factors: Factors) -> tuple[Chains | None, str]:
    """The chains as machine code reads them; None where torch sums, and why where that is slower."""
    first = factors.first
    if len(factors.seen) < NATIVE_FROM or first.device.type != "cpu" or first.shape[1] > LARGEST:
        return None, ""
    try:
        return Chains(first, factors.moves, factors.seen, *_linear(factors)), ""
    except CompileError as error:
        return None, f"the chain was summed by torch, which is slower: {error}"


def marginals(factors: Factors, batch: tuple[int, ...], code: Chains | None = None) -> tuple[Marginals, Tensor]:
    """State and pair marginals, and log p(x) (*batch)."""
    single, pairs, total = _marginals(factors) if code is None else code.sums()
    K = single.shape[-1]
    return Marginals(single.reshape(*batch, -1, K), pairs.reshape(*batch, K, K)), total.reshape(batch)


def sampled(factors: Factors, count: int, code: Chains | None = None) -> tuple[Tensor, Tensor]:
    """Independent draws of whole paths, state numbers (S, N, T), going back from the end; and log p(x) (N,)."""
    T, (N, K) = len(factors.seen) + 1, factors.first.shape
    uniform = torch.rand(T, N, count, dtype=torch.float64, device=factors.first.device)
    if code is not None:
        paths, total = code.draws(uniform)
        return paths.permute(2, 1, 0), total
    log_a, total = forward(factors)
    if not bool(total.isfinite().all()):
        return torch.zeros(count, N, T, dtype=torch.long), total
    rows, path = torch.arange(N, device=uniform.device), list[Tensor]()
    moves = factors.moves.expand(T - 1, N, K, K)
    for t in reversed(range(T)):
        logits = log_a[t].expand(count, -1, -1)
        if path:
            logits = logits + moves[t].transpose(1, 2)[rows, path[-1]]
        share = torch.softmax(logits, -1).cumsum(-1)
        level = (uniform[t].T[..., None] * share[..., -1:]).contiguous()
        path.append(torch.searchsorted(share, level, right=True)[..., 0].clamp_max(K - 1))
    return torch.stack(path[::-1], 2), total


# -- by torch --------------------------------------------------------------------------------------------------------


def _linear(factors: Factors) -> tuple[Tensor, Tensor, int]:
    """exp of the moves with largest element 1, the logs of what that took out of each chain, (N,), and their kind."""
    moves = factors.moves
    top = _finite(moves.amax((2, 3), keepdim=True))
    m = (moves - top).exp()
    return m, top[..., 0, 0].expand(factors.seen.shape[:2]).sum(0), _kind(factors, m)


def _kind(factors: Factors, m: Tensor | None = None) -> int:
    """0: no move is below 1e-100 of the largest, so that from each state every other is reached at each step, and what
    is lost beside its row has no weight. 1: linear space holds the moves, or they are zero. 2: it does not."""
    moves = factors.moves
    if m is None:
        m = (moves - _finite(moves.amax((2, 3), keepdim=True))).exp()
    if bool((m >= DENSE).all()):
        return 0
    return 1 if bool(((m >= LEAST) | (moves == -math.inf)).all()) else 2


def _finite(top: Tensor) -> Tensor:
    return torch.where(top.isfinite(), top, 0.0)


def forward(factors: Factors) -> tuple[Tensor, Tensor]:
    """log a_t, normalised, (T, N, K), and log of the whole sum, (N,)."""
    first, later = factors.first, factors.later
    if len(later) >= BLOCKS_FROM and _kind(factors) == 0:
        return _by_blocks(first, *_scaled(later))
    return _by_logs(first, later)


def _by_logs(first: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    rows, total = [], torch.zeros_like(first[:, 0])
    here = first
    for t in range(len(later) + 1):
        if t:
            here = torch.logsumexp(here[:, :, None] + later[t - 1], 1)
        size = torch.logsumexp(here, 1)
        total = total + size
        here = here - _finite(size)[:, None]
        rows.append(here)
    return torch.stack(rows), total


def _scaled(later: Tensor) -> tuple[Tensor, Tensor]:
    """m_t with largest element 1, and the logs of what they were divided by, (T - 1, N)."""
    top = later.amax((2, 3))
    return (later - top[..., None, None]).exp(), top


def _by_blocks(first: Tensor, scaled: Tensor, top: Tensor, ways: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `forward`; the sum is no number where one was lost that `ways`, 1 where m_t is not zero, could bring back."""
    steps, N, K = scaled.shape[:3]
    length = math.isqrt(steps)
    blocks = -(-steps // length)
    if extra := blocks * length - steps:
        scaled = torch.cat([scaled, torch.eye(K).to(scaled).expand(extra, N, K, K)])
        ways = None if ways is None else torch.cat([ways, scaled[-extra:]])

    def by_step(x: Tensor) -> Tensor:
        return x.reshape(blocks, length, N, K, K).transpose(0, 1).reshape(length, blocks * N, K, K)

    tiny = torch.finfo(scaled.dtype).tiny
    R = reached = torch.eye(K).to(scaled).expand(blocks * N, K, K)
    lost = torch.zeros_like(R, dtype=torch.bool)
    rows, sizes = [], []
    for step, m in enumerate(by_step(scaled).unbind()):  # all blocks together, from each state
        R = torch.bmm(R, m)
        size = R.sum(-1, keepdim=True)
        R = R / size.clamp_min(tiny)
        if ways is not None:
            reached = torch.bmm(reached, by_step(ways)[step]).clamp_max(1.0)
            lost |= (R < FLOOR) & (reached > 0)
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
    total = torch.logsumexp(v[..., 0], 1) + top.sum(0)
    return log_a, torch.full_like(total, math.nan) if bool(lost.any()) else total


def _marginals(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """p(z_t | x) (N, T, K), p(z_{t-1}, z_t | x) summed over t (N, K, K), and log p(x) (N). The backward sums b_t are
    the forward sums of the chain that runs the other way, and run beside them."""
    later, kind, N = factors.later, _kind(factors), len(factors.first)
    first = torch.cat([factors.first, torch.zeros_like(factors.first)])

    def both(x: Tensor) -> Tensor:
        return torch.cat([x, x.flip(0).transpose(2, 3)], 1)

    if len(later) >= BLOCKS_FROM and kind < 2:
        scaled, top = _scaled(later)
        ways = both((later > -math.inf).to(later)) if kind else None
        log_sums, total = _by_blocks(first, both(scaled), torch.cat([top, top.flip(0)], 1), ways)
        if bool(total.isfinite().all()):
            sums = log_sums.exp()
            a, b = sums[:, :N], sums[:, N:].flip(0)
            single = a * b
            pairs = a[:-1, :, :, None] * scaled * b[1:, :, None, :]
            of_pairs, of_single = pairs.sum((2, 3)), single.sum(-1, keepdim=True)
            if bool((of_pairs > SHARED).all() and (of_single > SHARED).all()):
                pairs = torch.einsum("tnij,tn->nij", pairs, 1 / of_pairs)
                return (single / of_single).movedim(0, 1), pairs, total[:N]
    log_sums, total = _by_logs(first, both(later))
    log_a, log_b = log_sums[:, :N], log_sums[:, N:].flip(0)
    single = torch.softmax(log_a + log_b, -1)
    pairs = (log_a[:-1, :, :, None] + later + log_b[1:, :, None, :]).flatten(2)
    return single.movedim(0, 1), torch.softmax(pairs, -1).sum(0).reshape(N, *later.shape[2:]), total[:N]
