"""One latent whose posterior has two modes of weights 0.1 and 0.9: what finds one and not the other shows here.

    z ~ N(0, 3^2),   x | z ~ w N(z + h, 1) + (1 - w) N(z - h, 1),   x = 0,   w = 0.1

    posterior   w N(-0.9 h, 0.9) + (1 - w) N(0.9 h, 0.9):  mean (1 - 2 w) 0.9 h,  variance 0.9 + 4 w (1 - w) (0.9 h)^2
    evidence    N(h; 0, 10)

At x = 0 both parts of the noise explain the datum equally well, so that their weights are the posterior's; at another
they are w N(x - h; 0, 10) and (1 - w) N(x + h; 0, 10), around 0.9 (x - h) and 0.9 (x + h).
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
from pyrometer.inference.problem import Problem, ProblemError, Reference

from . import _settings

SCALE = 3.0  # of the prior, in sds of the noise
SHRINKAGE = SCALE**2 / (SCALE**2 + 1)  # of the posterior's modes towards zero, and the variance of each


def problem(*, weight: float = 0.1, separation: float = 6.0) -> Problem:
    """`weight` of the lower mode, and the distance between the modes in their sds. Raises `ProblemError` on a setting
    out of range."""
    weight = _settings.number("weight", weight, above=0.0)
    if weight >= 1:
        raise ProblemError(f"weight={weight!r}: expected a number below 1.")
    half = _settings.number("separation", separation, least=0.0) / 2 / math.sqrt(SHRINKAGE)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), SCALE))
        parts = dist.Normal(z + x.new_tensor([half, -half]), 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(x.new_tensor([weight, 1 - weight])), parts), obs=x)

    x = torch.zeros((), dtype=torch.float64)
    return Problem(model, args=(x,), reference=partial(reference, weight=weight, half=half), name="bimodal")


def reference(parameters: Mapping[str, Tensor], x: Tensor, weight: float, half: float) -> Reference:
    """Posterior and evidence in closed form, at any x ()."""
    prior = torch.tensor([weight, 1 - weight], dtype=torch.float64)
    noiseless = x.double() - torch.tensor([half, -half], dtype=torch.float64)
    log_weight = prior.log() + dist.Normal(0.0, math.sqrt(SCALE**2 + 1)).log_prob(noiseless)
    share, centre = torch.softmax(log_weight, 0), SHRINKAGE * noiseless
    mean = share @ centre
    return Reference(
        "exact",
        mean={"z": mean},
        sd={"z": (SHRINKAGE + share @ (centre - mean).square()).sqrt()},
        log_evidence=Evidence(torch.logsumexp(log_weight, 0), torch.zeros(()), "exact"),
        provenance="closed form: a mixture of two normal laws, each conjugate",
    )
