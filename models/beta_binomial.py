"""Chances of success, each with trials of its own: the smallest discrete data with a continuous latent.

p_i ~ Beta(a, b),   x_i ~ Binomial(n, p_i),   i = 1..N

posterior   p_i | x_i ~ Beta(a + x_i, b + n - x_i)
evidence    x_i ~ BetaBinomial(n, a, b)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, ProblemError, Reference

from . import _settings


def problem(*, num_data: int = 20, trials: int = 10, a: float = 2.0, b: float = 3.0, seed: int = 0) -> Problem:
    """N counts of successes in n trials, drawn from the model. Raises `ProblemError` on a setting out of range."""
    num_data, trials = _settings.count("num_data", num_data), _settings.count("trials", trials)
    a, b = _settings.number("a", a, above=0.0), _settings.number("b", b, above=0.0)
    if trials > 2**53:
        raise ProblemError(f"trials={trials}: expected a number that a float64 can count to, at most 2^53.")

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            p = pyro.sample("p", dist.Beta(x.new_tensor(a), x.new_tensor(b)))
            pyro.sample("x", dist.Binomial(trials, p), obs=x)

    generator = _settings.generator("seed", seed)
    first, second = (_gamma(shape, num_data, generator) for shape in (a, b))
    x = torch.binomial(torch.full((num_data,), float(trials), dtype=torch.float64), first / (first + second), generator)
    return Problem(model, args=(x,), reference=partial(reference, trials=trials, a=a, b=b), name="beta_binomial")


def _gamma(shape: float, count: int, generator: torch.Generator) -> Tensor:
    return torch._standard_gamma(torch.full((count,), shape, dtype=torch.float64), generator)


def reference(parameters: Mapping[str, Tensor], x: Tensor, trials: int, a: float, b: float) -> Reference:
    """Posterior and evidence of each datum in closed form; x (N). The model has no parameters."""
    x = x.double()
    posterior = dist.Beta(a + x, b + trials - x)
    evidence = dist.BetaBinomial(x.new_tensor(a), x.new_tensor(b), trials).log_prob(x)
    return Reference(
        "exact",
        mean={"p": posterior.mean},
        sd={"p": posterior.variance.sqrt()},
        log_evidence=Evidence(evidence, torch.zeros(()), "exact"),
        provenance="closed form: the beta law is conjugate to the binomial",
    )
