"""Rates, each with a count of its own: a positive latent whose posterior is skewed where counts are small.

rate_i ~ Gamma(shape, b),   x_i ~ Poisson(rate_i),   i = 1..N

posterior   rate_i | x_i ~ Gamma(shape + x_i, b + 1)
evidence    x_i ~ NegativeBinomial: C(x + shape - 1, x) (b / (b + 1))^shape (1 / (b + 1))^x
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, Reference

from . import _settings


def problem(*, num_data: int = 20, shape: float = 2.0, b: float = 0.5, seed: int = 0) -> Problem:
    """N counts drawn from the model; `b` is the inverse scale. Raises `ProblemError` on a setting out of range."""
    num_data = _settings.count("num_data", num_data)
    shape, b = _settings.number("shape", shape, above=0.0), _settings.number("b", b, above=0.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(shape), x.new_tensor(b)))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    generator = _settings.generator("seed", seed)
    rate = torch._standard_gamma(torch.full((num_data,), shape, dtype=torch.float64), generator) / b
    x = torch.poisson(rate, generator)
    return Problem(model, args=(x,), reference=partial(reference, shape=shape, b=b), name="gamma_poisson")


def reference(parameters: Mapping[str, Tensor], x: Tensor, shape: float, b: float) -> Reference:
    """Posterior and evidence of each datum in closed form; x (N). The model has no parameters."""
    x = x.double()
    posterior = dist.Gamma(shape + x, x.new_tensor(b + 1))
    ways = torch.lgamma(x + shape) - math.lgamma(shape) - torch.lgamma(x + 1)
    evidence = ways + shape * math.log(b / (b + 1)) - x * math.log1p(b)
    return Reference(
        "exact",
        mean={"rate": posterior.mean},
        sd={"rate": posterior.variance.sqrt()},
        log_evidence=Evidence(evidence, torch.zeros(()), "exact"),
        provenance="closed form: the gamma law is conjugate to the Poisson",
    )
