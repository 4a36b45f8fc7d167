"""Ranks of a truth among independent draws of an answer, and whether they are uniform.

Ranks, ties broken at random, are spread to u = (rank + uniform) / (L + 1), which is exactly uniform whatever L is: so
an answer of few effective draws gives fewer of them. Tests: chi-squared, Kolmogorov-Smirnov, z of the mean and of the
spread of the ranks, and the variance of their normal scores, which sees a wrong width best.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.special import ndtri
from torch import Tensor

from pyrometer.inference import Posterior
from pyrometer.inference.posterior import gathered
from pyrometer.inference.statistics import ess

FEWEST = 100  # replicates: with fewer the tests' laws are not what they say
BINS, PER_BIN = 20, 25
APART = 2.0  # draws that are kept stand this many autocorrelation times apart


@dataclass(frozen=True)
class Quantity:
    """A test quantity: its spread ranks u (N), the p-value of each test, and what is wrong in sds of the answer.

    shift   mean normal score of the truth: positive where the answer lies too low
    spread  their sd: above 1 where the answer is too narrow
    """

    name: str
    u: tuple[float, ...]
    p_values: Mapping[str, float]
    shift: float
    spread: float

    @property
    def p_value(self) -> float:
        return min(self.p_values.values())


@dataclass(frozen=True)
class Round:
    """One round: replicates that gave a rank, why others did not, draws that they ranked among (the median), and the
    smallest p-value times the number of tests."""

    replicates: int
    failures: Mapping[str, int]
    draws: float
    p_value: float


def near_independent(
    posterior: Posterior, most: int, entries: list[tuple[str, int]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Draws (L, *batch, *event), and how many of the first of them are nearly independent at each datum, (data,)."""
    batch, total = tuple(posterior.batch_shape), posterior.num_chains * posterior.num_samples
    number = max(math.prod(batch), 1)
    steps = torch.arange(most)[:, None]
    if posterior.kind == "weighted":
        weights = posterior.weights().flatten(0, 1).reshape(total, number)
        worth = 1 / weights.square().sum(0)
        if posterior.is_rule:  # any number of draws can be made of its points
            worth = torch.full_like(worth, math.inf)
        kept = _count(worth, most, most)
        index = torch.multinomial(weights.T, most, replacement=True).T  # (L, data)
    else:
        worth = torch.full((number,), math.inf, dtype=torch.float64)
        for site, i in entries if posterior.kind == "mcmc" else []:
            if site in posterior.draws:
                values = posterior.draws[site]
                scalar = values.reshape(*values.shape[:2], number, -1)[..., i].double()
                for kind in ("bulk", "tail"):
                    worth = torch.minimum(worth, ess(scalar, kind).nan_to_num(nan=1.0))
        kept = _count(worth, most, total)
        index = ((steps + 0.5) / kept * total).long().clamp_max(total - 1)  # evenly spaced over all chains
    index = index.reshape(most, *batch)
    return {name: gathered(values.flatten(0, 1), index) for name, values in posterior.draws.items()}, kept


def heaviest(posterior: Posterior) -> float:
    """The largest weight among the points of a rule, of the median datum; 0 where they are draws."""
    return float(posterior.weights().flatten(0, 1).amax(0).median()) if posterior.is_rule else 0.0


def _count(worth: Tensor, most: int, total: int) -> Tensor:
    return (worth / APART).clamp(1, min(most, total)).floor().long()


class Ranked:
    """The ranks of a round as they come, and what failed."""

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self.u: dict[str, list[np.ndarray]] = {}
        self.kept: list[np.ndarray] = []
        self.failures: Counter[str] = Counter()
        self.total = 0

    def fail(self, reason: str, count: int) -> None:
        self.failures[reason] += count
        self.total += count

    def add(self, found: Mapping[str, Tensor], kept: Tensor, rng: np.random.Generator) -> None:
        count = kept.numpy()
        used = np.arange(self.draws)[:, None] < count
        values = {name: value.numpy() for name, value in found.items()}
        good = np.ones(len(count), bool)
        for value in values.values():
            good &= ~(np.isnan(value[0]) | (np.isnan(value[1:]) & used).any(0))
        if not good.all():
            self.failures["a test quantity is not a number"] += int((~good).sum())
        for name, value in values.items():
            truth, own = value[:1], value[1:]
            with np.errstate(invalid="ignore"):  # of infinities that are equal, which tie
                ties = (own == truth) | (np.abs(own - truth) <= 1e-9 * (1 + np.abs(truth)))
            below = ((own < truth) & ~ties & used).sum(0)
            rank = below + rng.integers((ties & used).sum(0) + 1)
            u = (rank + rng.uniform(size=len(count))) / (count + 1)
            self.u.setdefault(name, []).append(u[good])
        self.kept.append(count[good])
        self.total += len(count)

    def quantities(self) -> tuple[Quantity, ...]:
        joined = {name: np.concatenate(parts) for name, parts in self.u.items()}
        return tuple(
            Quantity(name, tuple(u.tolist()), uniformity(u), *(float(f(ndtri(u))) for f in (np.mean, np.std)))
            for name, u in joined.items()
            if len(u) >= FEWEST
        )

    def round(self) -> Round:
        found = self.quantities()
        p = [p for quantity in found for p in quantity.p_values.values()]
        kept = np.concatenate(self.kept) if self.kept else np.zeros(0)
        draws = float(np.median(kept)) if len(kept) else 0.0
        return Round(len(kept), dict(self.failures), draws, min(1.0, min(p) * len(p)) if p else 1.0)


def uniformity(u: np.ndarray) -> dict[str, float]:
    """p-values of u (N) in (0, 1) being uniform, by five tests; two-sided where there are two sides."""
    n = len(u)
    bins = max(2, min(BINS, n // PER_BIN))
    squares = float((ndtri(u) ** 2).sum())
    return {
        "chi-squared": float(stats.chisquare(np.bincount((u * bins).astype(int), minlength=bins)).pvalue),
        "Kolmogorov-Smirnov": float(stats.kstest(u, "uniform").pvalue),
        "mean": _two_sided((u.mean() - 0.5) * math.sqrt(12 * n)),
        "spread": _two_sided((((u - 0.5) ** 2).mean() - 1 / 12) * math.sqrt(180 * n)),
        "normal scores": float(min(1.0, 2 * min(stats.chi2.cdf(squares, n), stats.chi2.sf(squares, n)))),
    }


def _two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def smallest_seen(replicates: int, quantities: int, limit: float) -> tuple[float, float]:
    """Errors that 19 of 20 runs would reject at once: of a mean, in sds, and of an sd, relative.

    A shift d moves the mean rank by d / (2 sqrt pi); an sd r times too small gives normal scores of variance 1 / r^2.
    """
    z = stats.norm.isf(limit / (10 * max(quantities, 1))) + stats.norm.isf(0.05)
    return float(z * math.sqrt(math.pi / 3 / replicates)), float(z / math.sqrt(2 * replicates))
