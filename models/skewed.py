"""One latent whose posterior is skewed, in closed form: the logarithm of a rate.

    exp(z) ~ Gamma(a, 1),   x ~ Poisson(exp(z)),   x = 0

    posterior   exp(z) | x ~ Gamma(a + x, 2):  mean digamma(a + x) - log 2,  variance trigamma(a + x)
    evidence    x ~ NegativeBinomial: C(x + a - 1, x) 2^-(a + x)

At a = 1/2 the skewness is -1.5: the left tail falls off like exp(z / 2), the right one like exp(-2 exp(z)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ExpTransform

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, Reference

from . import _settings


def problem(*, a: float = 0.5) -> Problem:
    """The smaller `a`, the more skewed. Raises `ProblemError` on a setting out of range."""
    a = _settings.number("a", a, above=0.0)

    def model(x: Tensor) -> None:
        rate = dist.Gamma(x.new_tensor(a), x.new_ones(()))
        z = pyro.sample("z", dist.TransformedDistribution(rate, [ExpTransform().inv]))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    x = torch.zeros((), dtype=torch.float64)
    return Problem(model, args=(x,), reference=partial(reference, a=a), name="skewed")


def reference(parameters: Mapping[str, Tensor], x: Tensor, a: float) -> Reference:
    """Posterior and evidence in closed form, at any x (). The model has no parameters."""
    x = x.double()
    evidence = torch.lgamma(x + a) - math.lgamma(a) - torch.lgamma(x + 1) - (a + x) * math.log(2.0)
    return Reference(
        "exact",
        mean={"z": torch.digamma(a + x) - math.log(2.0)},
        sd={"z": torch.polygamma(1, a + x).sqrt()},
        log_evidence=Evidence(evidence, torch.zeros(()), "exact"),
        provenance="closed form: the gamma law is conjugate to the Poisson, and z is its logarithm",
    )
