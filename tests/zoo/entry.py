"""What the zoo knows of a problem, and the laws that its exact answers are written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor

from pyrometer.inference import Problem


class Law(Protocol):
    """The law of a scalar; scipy's frozen distributions are laws."""

    def mean(self) -> float: ...

    def std(self) -> float: ...

    def ppf(self, q: float) -> float: ...


@dataclass(frozen=True)
class Marginal:
    """A scalar of the posterior: `of` takes it from the draws, site -> (C, S, *batch, *event), as (C, S)."""

    of: Callable[[Mapping[str, Tensor]], Tensor]
    law: Law


@dataclass(frozen=True)
class Entry:
    """A plain Pyro program, and its density and its posterior worked out without Pyro and torch.

    log_joint     (one draw of the continuous latents, theta, *args), all as numpy arrays, to log p(x, z) in nats,
                  (*batch), with discrete latents summed out and without a Jacobian
    coordinates   site -> the entries of its event that its density is a density of; missing: all of them
    marginals     exact laws of scalars of the posterior, where they are known
    log_evidence  log p(x) in nats, of all data together
    """

    problem: Problem
    log_joint: Callable[..., Any]
    coordinates: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    marginals: Mapping[str, Marginal] = field(default_factory=dict)
    log_evidence: float | None = None


class Tabulated:
    """A law on a line by its unnormalised log density on an even grid (trapezoidal rule: exact to rounding where the
    density is smooth and vanishes at both ends)."""

    def __init__(self, grid: np.ndarray, log_density: np.ndarray) -> None:
        self.grid, step = grid, grid[1] - grid[0]
        self.log_normaliser = float(logsumexp(log_density) + np.log(step))
        self.weight = np.exp(log_density - self.log_normaliser) * step

    def mean(self) -> float:
        return float(self.weight @ self.grid)

    def std(self) -> float:
        return float(np.sqrt(self.weight @ (self.grid - self.mean()) ** 2))

    def ppf(self, q: float) -> float:
        below = np.cumsum(self.weight) - self.weight / 2  # mass of half a cell lies on each side of a point
        return float(np.interp(q, below, self.grid))


class Mixture:
    """A finite mixture of scipy's laws, one frozen distribution with arrays for parameters; `log_weights` need not
    be normalised."""

    def __init__(self, log_weights: np.ndarray, laws: Any) -> None:
        self.weights, self.laws = np.exp(log_weights - logsumexp(log_weights)), laws

    def mean(self) -> float:
        return float(self.weights @ self.laws.mean())

    def std(self) -> float:
        second = self.weights @ (self.laws.var() + self.laws.mean() ** 2)
        return float(np.sqrt(second - self.mean() ** 2))

    def ppf(self, q: float) -> float:
        ends = self.laws.ppf(q)
        if np.ptp(ends) == 0:
            return float(ends[0])
        return float(brentq(lambda x: self.weights @ self.laws.cdf(x) - q, ends.min(), ends.max(), xtol=1e-13))
