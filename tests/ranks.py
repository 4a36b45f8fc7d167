"""Does a transition kernel leave its target invariant? The exact rank test, and its sequential rule.

Draw (z, x) from p(z, x), place z at a random position of a chain of L states, and run a reversible kernel for p(z | x)
forwards from it to the end and backwards to the start. Every state of the chain is then an equally good draw, so the
rank of a test quantity at z among its L values is uniform. This is exact: it needs no convergence and no reference.

Gandy & Scott 2020, "Unit testing for MCMC and other Monte Carlo methods", https://arxiv.org/abs/2001.06465. The kernel
must be reversible (Metropolis, HMC and NUTS with fresh momenta, random-scan Gibbs, independent draws).

Parameters alone do not see a sampler that forgets data; the log likelihood and another function of the data do
(Modrák et al. 2023, https://doi.org/10.1214/23-BA1404): give these among the quantities, always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

Array = np.ndarray

LENGTH = 20  # states of a chain
FALSE_ALARM = 1e-6  # of one test, all its quantities and rounds together
ROUNDS = 3
SUSPICIOUS = (FALSE_ALARM / 2) ** (1 / ROUNDS)  # 0.008: in every round, by chance, in half of the false alarms


@dataclass(frozen=True)
class Target:
    """A joint law that can be drawn from, N copies at a time.

    draw        (N, rng) -> states z (N, D) and their data x (N, ...)
    quantities  states (N, L, D) and data (N, ...) -> name -> (N, L)
    """

    draw: Callable[[int, np.random.Generator], tuple[Array, Array]]
    quantities: Callable[[Array, Array], Mapping[str, Array]]


# A kernel, repeated: (starts (n, D), data (n, ...), steps, rng) -> the states after each step, (n, steps, D).
Walk = Callable[[Array, Array, int, np.random.Generator], Array]


def exact_ranks(
    target: Target, walk: Walk, replicates: int, rng: np.random.Generator, length: int = LENGTH
) -> dict[str, Array]:
    """Quantity -> rank of the draw among the states of its chain, (N,) of 0 .. L - 1, ties broken at random.
    A quantity that is not finite somewhere in a chain has rank -1 there."""
    z, x = target.draw(replicates, rng)
    before = rng.integers(length, size=replicates)  # states to the left of the draw; the others are to its right
    others = np.full((replicates, length - 1, z.shape[1]), np.nan)
    with np.errstate(all="ignore"):  # what is not finite is found by its rank
        for steps in range(1, length):
            left, right = np.flatnonzero(before == steps), np.flatnonzero(length - 1 - before == steps)
            rows = np.concatenate([left, right])
            path = walk(z[rows], x[rows], steps, rng) if len(rows) else others[:0, :steps]
            others[left, :steps], others[right, length - 1 - steps :] = np.split(path, [len(left)])
        values = target.quantities(np.concatenate([z[:, None], others], 1), x)
        return {name: _rank(value, rng) for name, value in values.items()}


def _rank(value: Array, rng: np.random.Generator) -> Array:
    own, other = value[:, :1], value[:, 1:]
    ties = np.abs(other - own) <= 1e-9 * (1 + np.abs(own))  # a state that came back through a transform is the same
    rank = ((other < own) & ~ties).sum(1) + rng.integers(ties.sum(1) + 1)
    return np.where(np.isfinite(value).all(1), rank, -1)


def p_value(ranks: Mapping[str, Array], length: int = LENGTH) -> float:
    """The smallest p-value over quantities and three tests, times their number: chi-squared over the L ranks, and z of
    the mean and of the spread of the ranks, which are what see a shift and a wrong width. 0 where a rank is missing.
    Raises ValueError below 25 L replicates, where chi-squared is no longer the law of its statistic."""
    p = []
    for rank in ranks.values():
        if len(rank) < 25 * length:
            raise ValueError(f"{len(rank)} replicates are too few for {length} ranks: take at least {25 * length}.")
        if (rank < 0).any():
            return 0.0
        p.append(stats.chisquare(np.bincount(rank, minlength=length)).pvalue)
        centred, uniform = ((r + 0.5) / length - 0.5 for r in (rank, np.arange(length)))
        for got, law in ((centred, uniform), (centred**2, uniform**2)):
            p.append(2 * stats.norm.sf(abs(got.mean() - law.mean()) / law.std() * np.sqrt(len(rank))))
    return float(min(1.0, min(p) * len(p)))


@dataclass(frozen=True)
class Verdict:
    """How a sequential test ended: its p-value in each round."""

    p_values: tuple[float, ...]
    accepted: bool


def sequential(
    p_of: Callable[[int, np.random.Generator], float], replicates: int, seed: int, rounds: int = ROUNDS
) -> Verdict:
    """Accept a p-value that is not suspicious; reject a tiny one; between them go on with four times as many fresh
    replicates, and reject what stays suspicious in every round. False alarm: 1e-6 in all."""
    p_values: list[float] = []
    for index, stream in enumerate(np.random.SeedSequence(seed).spawn(rounds)):
        p_values.append(p_of(replicates * 4**index, np.random.default_rng(stream)))
        if p_values[-1] >= SUSPICIOUS or p_values[-1] < FALSE_ALARM / 2:
            break
    return Verdict(tuple(p_values), p_values[-1] >= SUSPICIOUS)


def rank_test(target: Target, walk: Walk, replicates: int, seed: int = 0, rounds: int = ROUNDS) -> Verdict:
    """Whether the kernel leaves the target invariant, as far as so many replicates can tell."""
    return sequential(lambda n, rng: p_value(exact_ranks(target, walk, n, rng)), replicates, seed, rounds)
