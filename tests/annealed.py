"""Problems for annealing: many copies of one datum, each of them a run of its own, with the exact answer.

A copy has its own particles and random numbers, so that R copies are R independent runs of one engine call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor
from zoo.entry import Tabulated

from pyrometer.inference import Problem

F64 = torch.float64
GRID = np.linspace(-14, 14, 56_001)
norm = stats.norm.logpdf


@dataclass(frozen=True)
class Copies:
    """A problem of R equal data, the log evidence of each, and mean and sd of its site's first coordinate."""

    problem: Problem
    log_evidence: float
    mean: float
    sd: float
    site: str = "z"


def repeated(value: object, count: int) -> Tensor:
    return torch.as_tensor(value, dtype=F64).expand(count, *np.shape(value)).clone()


def tabulated(problem: Problem, log_joint: np.ndarray) -> Copies:
    law = Tabulated(GRID, log_joint)
    return Copies(problem, law.log_normaliser, law.mean(), law.std())


def asymmetric(count: int) -> Copies:
    """z ~ N(0, 1), and no event from Poisson(exp(1 + z)): skewed, and so is the likelihood."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson((1 + z).exp()), obs=x)

    return tabulated(Problem(model, args=(repeated(0.0, count),)), norm(GRID) - np.exp(1 + GRID))


def bimodal(count: int) -> Copies:
    """z ~ N(0, 1.5^2) seen through noise of two parts, shifted to its left or right: modes of unequal weight."""
    weight, shift, x = np.array([0.2, 0.8]), np.array([-2.5, 2.5]), 0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.5))
            parts = dist.Normal(z[..., None] + torch.tensor(shift), 0.6)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor(weight)), parts), obs=x)

    parts = np.stack([np.log(w) + norm(x, GRID + s, 0.6) for w, s in zip(weight, shift, strict=True)])
    return tabulated(Problem(model, args=(repeated(x, count),)), norm(GRID, 0, 1.5) + logsumexp(parts, axis=0))


def gamma_poisson(count: int) -> Copies:
    """A rate, positive: the Jacobian of its logarithm takes part."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    law = stats.gamma(3 + 7, scale=1 / 3)
    evidence = float(stats.nbinom.logpmf(7, 3, 2 / 3))
    return Copies(Problem(model, args=(repeated(7.0, count),)), evidence, law.mean(), law.std(), "rate")


def correlated(count: int) -> Copies:
    """Two coordinates of correlation 0.9 before and after the data, which lie far out."""
    R, x = np.array([[1.0, 0.9], [0.9, 1.0]]), np.array([3.0, 1.0])

    def model(x: Tensor) -> None:
        scale = torch.linalg.cholesky(2 * torch.tensor(R))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=F64), scale_tril=scale))
            pyro.sample("x", dist.MultivariateNormal(z, scale_tril=scale), obs=x)

    evidence = float(stats.multivariate_normal.logpdf(x, [0, 0], 4 * R))
    return Copies(Problem(model, args=(repeated(x, count),)), evidence, float(x[0] / 2), 1.0)


def switching(count: int) -> Copies:
    """A continuous latent whose mean hangs on a discrete one: the prior of the first is a mixture."""
    x = 1.4

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Bernoulli(0.4))
            z = pyro.sample("z", dist.Normal(2 * s - 1, 1.0))
            pyro.sample("x", dist.Normal((2 * s - 1) * z + 1, 0.5), obs=x)

    plus = math.log(0.4) + norm(GRID, 1) + norm(x, GRID + 1, 0.5)
    minus = math.log(0.6) + norm(GRID, -1) + norm(x, 1 - GRID, 0.5)
    return tabulated(Problem(model, args=(repeated(x, count),)), np.logaddexp(plus, minus))


def guided(count: int) -> Copies:
    """z ~ N(0, 1), x ~ N(z, 0.3^2), and a guide that is wide and off the posterior."""
    x, sd = 2.0, 0.3

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, sd), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.6 * x, 0.5))

    variance = 1 / (1 + 1 / sd**2)
    evidence = float(norm(x, 0, math.sqrt(1 + sd**2)))
    problem = Problem(model, args=(repeated(x, count),), guide=guide)
    return Copies(problem, evidence, variance * x / sd**2, math.sqrt(variance))


MAKERS = {make.__name__: make for make in (asymmetric, bimodal, gamma_poisson, correlated, switching, guided)}
