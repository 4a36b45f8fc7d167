"""Markov chains as their samplers leave them, and the answer that is made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .density import Density
from .engine import Draws
from .words import element, unravel

FAR_BELOW = 5.0  # spreads of the log density that separate a chain from the others
FEW = 20  # draws of a chain, below which its spread is not known
MANY_DEEP = 0.05  # share of the draws whose trajectory was cut short
DIVERGENCES_KEPT = 200
AT_A_TIME = 2**19  # numbers in the positions that are mapped to the sites at once


@dataclass(frozen=True)
class ChainPlan:
    """How each chain is run: what a sampler needs to know of the engine's settings."""

    num_samples: int
    warmup_steps: int
    target_acceptance: float
    max_tree_depth: int
    low_rank: bool


@dataclass(frozen=True)
class Tuning:
    """Step sizes (C,) and inverse mass matrices (C, P) of C chains, P numbers in all of a problem's latents."""

    step_size: Tensor
    inverse_mass: Tensor


@dataclass(frozen=True)
class Chain:
    """One chain, after its warm-up.

    positions     (S, P); fewer than asked for where the run was interrupted
    stats         figures of each draw, (S,), under arviz's names, among them lp, diverging and n_steps
    step_size     as tuned; `inverse_mass` (P,) likewise, None where the sampler does not hand it out
    divergences   (K, P): where the trajectories that diverged set out from
    """

    positions: Tensor
    stats: Mapping[str, Tensor]
    step_size: float
    inverse_mass: Tensor | None
    divergences: Tensor


def answer(density: Density, chains: Sequence[Chain], asked: int, plan: ChainPlan, notes: Sequence[str]) -> Draws:
    """The draws of all chains, of `asked` ones, their figures, and what is wrong with them; `state` for a warm start.

    The figures `divergence.<site>`, (K, *batch, *event), tell where trajectories that diverged set out from, up to
    200 of them.
    """
    chains, length = cut_alike(chains)
    stats = {name: torch.stack([chain.stats[name][:length] for chain in chains]) for name in chains[0].stats}
    divergences = torch.cat([chain.divergences for chain in chains])[:DIVERGENCES_KEPT]
    values, where = completed(density, [chain.positions[:length] for chain in chains], divergences)
    shape = (*density.batch_shape, density.dim)
    state = {
        "position": torch.stack([chain.positions[length - 1] for chain in chains]).reshape(-1, *shape),
        "step_size": torch.tensor([chain.step_size for chain in chains], dtype=torch.float64),
    }
    masses = [chain.inverse_mass for chain in chains if chain.inverse_mass is not None]
    if len(masses) == len(chains):
        state["inverse_mass"] = torch.stack(masses)
    return Draws(
        values,
        "mcmc",
        sample_stats=stats,
        state=state,
        notes=(*notes, *crowded(where, values)),
        alarms=(*cut_short(len(chains), asked, length, plan.num_samples), *stuck(stats["lp"]), *too_deep(stats, plan)),
        figures={f"divergence.{site}": value for site, value in where.items()},
    )


def completed(
    density: Density, positions: Sequence[Tensor], others: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every site, (C, S, *batch, *event), of the positions (S, P) of C chains, and the latent ones of `others`
    (K, P), {} where K = 0. All in one run of the program where memory allows, since each costs the same."""
    points = torch.cat([*positions, others])
    found = mapped(density, points.reshape(-1, *density.batch_shape, density.dim))
    count = len(points) - len(others)
    values = {site: value[:count].unflatten(0, (len(positions), -1)) for site, value in found.items()}
    return values, {site: found[site][count:] for site in density.continuous} if len(others) else {}


def mapped(density: Density, points: Tensor) -> dict[str, Tensor]:
    """Every site, (K, *batch, *event), of points (K, *batch, D), some at a time to keep memory small."""
    rows = max(1, AT_A_TIME // max(1, points[0].numel()))
    found: dict[str, Tensor] = {}
    for first, part in zip(range(0, len(points), rows), points.split(rows), strict=True):
        for site, value in density.complete(part).items():
            if site not in found:
                found[site] = value.new_empty((len(points), *value.shape[1:]))
            found[site][first : first + rows] = value
    return found


def cut_alike(chains: Sequence[Chain]) -> tuple[list[Chain], int]:
    """The chains and the common length that together hold most draws; all of them where none is shorter."""
    lengths = [len(chain.positions) for chain in chains]
    length = most_together(lengths)
    return [chain for chain, m in zip(chains, lengths, strict=True) if m >= length], length


def most_together(lengths: Sequence[int]) -> int:
    """The length at which to cut chains, without those that are shorter, that keeps most draws."""
    return max(set(lengths), key=lambda n: (n * sum(m >= n for m in lengths), n))


INTERRUPTED = "interrupted: "  # how the note of an answer begins that Ctrl-C cut short


def cut_short(chains: int, asked: int, draws: int, num_samples: int) -> list[str]:
    if (chains, draws) == (asked, num_samples):
        return []
    part = f"{chains} of {asked} chains, " if chains < asked else ""
    return [f"{INTERRUPTED}{part}{draws} of {num_samples} draws of each are there"]


def interrupted(notes: Iterable[str]) -> bool:
    """Whether these are the notes of such an answer: who runs more than one inference has to end as well."""
    return any(note.startswith(INTERRUPTED) for note in notes)


def stuck(lp: Tensor) -> list[str]:
    return [
        f"the log density of chain {c} stays {gap:.0f} nats below that of the others: it is stuck, its draws are not "
        "of the posterior; start it elsewhere (initial=...) or run a longer warm-up"
        for c, gap in far_below(lp)
    ]


def too_deep(stats: Mapping[str, Tensor], plan: ChainPlan) -> list[str]:
    deep = stats["reached_max_treedepth"]
    if float(deep.double().mean()) <= MANY_DEEP:
        return []
    return [
        f"{int(deep.sum())} of {deep.numel()} trajectories were cut short at max_tree_depth={plan.max_tree_depth}: "
        "raise it, or reparameterise the model"
    ]


def far_below(lp: Tensor) -> list[tuple[int, float]]:
    """Chains whose log density (C, S) stays far below the others', and by how much: (chain, nats)."""
    gap, far = below(lp)
    return [(c, float(gap[c])) for c in range(len(lp)) if far[c]]


def below(lp: Tensor) -> tuple[Tensor, Tensor]:
    """By how many nats the log density (C, S, ...) of each chain stays below that of the others, (C, ...), and whether
    that is far.

    Measured against the chain in the upper middle by its median, so that up to half of the chains may be lost.
    Spread is 1.48 times the median distance from the median, the sd of a normal.
    """
    if lp.shape[0] < 2 or lp.shape[1] < FEW:
        nothing = torch.zeros_like(lp[:, 0] if lp.shape[1] else lp.sum(1))
        return nothing, nothing > 0
    median = lp.median(1).values
    spread = 1.4826 * (lp - median[:, None]).abs().median(1).values
    middle = median.argsort(0, descending=True)[(len(lp) - 1) // 2][None]
    gap = median.gather(0, middle) - median
    usual = spread.gather(0, middle)
    return gap, (gap > FAR_BELOW * usual) & (usual > 0)  # discrete latents may keep one value most of the time


def crowded(where: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[str]:
    """In words, the scalar at whose extreme the divergences (K, ...) crowd among the draws (C, S, ...), if any does.

    The share of draws below a divergence is uniform where the two have nothing to do with each other. Told is a mean
    share of the outer fifth, if it is more than 5 sd, sqrt(25 / 12 K), from a half.
    """
    found, text = 0.3, ""
    for site, starts in where.items():
        if not starts.is_floating_point():
            continue
        draws = values[site].flatten(0, 1).reshape(-1, starts[0].numel())
        starts = starts.reshape(len(starts), -1)
        ordered = torch.from_numpy(np.sort(draws.T.contiguous().numpy(), 1))  # ten times quicker than torch's
        below = torch.searchsorted(ordered, starts.T.contiguous()).double() / ordered.shape[1]
        share = below.mean(1)
        at = int((share - 0.5).abs().argmax())
        if abs(float(share[at]) - 0.5) > max(found, math.sqrt(25 / 12 / len(starts))):
            found = abs(float(share[at]) - 0.5)
            side, quantile = ("small", share[at]) if share[at] < 0.5 else ("large", 1 - share[at])
            scalar = element(site, unravel(at, where[site].shape[1:]))
            text = f"divergences crowd at {side} values of {scalar}: on average in its outer {100 * quantile:.0f} %"
    return [text] if text else []
