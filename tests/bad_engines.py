"""Engines that are known to be wrong, and one that is right, on a model whose posterior is known exactly.

z_i ~ N(0, 1),   x_ij ~ N(z_i, 1), j = 1..m:      z_i | x_i ~ N(sum_j x_ij / (m + 1), 1 / (m + 1))
"""

from __future__ import annotations

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch

from pyrometer.inference import Problem
from pyrometer.inference.engine import Draws, EngineError
from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Later, Reference
from pyrometer.inference.settings import settings

F64 = torch.float64


def posterior(x):
    """Mean and sd of z given x (..., m), (...)."""
    return x.sum(-1) / (x.shape[-1] + 1), torch.full(x.shape[:-1], (x.shape[-1] + 1) ** -0.5, dtype=F64)


def reference(parameters, x):
    mean, sd = posterior(x.double())
    m = x.shape[-1]
    covariance = torch.eye(m, dtype=F64) + 1
    evidence = dist.MultivariateNormal(torch.zeros(m, dtype=F64), covariance).log_prob(x.double())
    generator = torch.Generator().manual_seed(5)
    return Reference(
        "exact",
        mean={"z": mean},
        sd={"z": sd},
        log_evidence=Evidence(evidence, torch.zeros(()), "exact"),
        draws=Later(lambda: {"z": mean + sd * torch.randn((2000, *mean.shape), generator=generator, dtype=F64)}),
    )


def repeated(num_data=40, num_repeats=4, shared=False, fixed=False):
    """The model: each datum a latent of its own, or all of them one (`shared`). `fixed`: the plate has its size from
    outside of the arguments."""

    def model(x):
        if shared:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            with pyro.plate("data", x.shape[0]):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return
        with pyro.plate("data", num_data if fixed else x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([x.shape[0], num_repeats]).to_event(1), obs=x)

    generator = torch.Generator().manual_seed(3)
    shape = (num_repeats,) if shared else (num_data, num_repeats)
    z = torch.randn(shape[:-1], generator=generator, dtype=F64)
    x = z[..., None] + torch.randn(shape, generator=generator, dtype=F64)
    return Problem(model, args=(x,), reference=reference, name="repeated")


WRONG = ("prior", "narrow", "half", "shifted")


@settings
class Planted:
    """The exact posterior, or what is wrong with it: 'prior', the prior for it; 'narrow', its sd times 0.8; 'half',
    half of the data ignored; 'shifted', its mean off by 0.3 sd.

    weighted     draws of the prior, weighted to it
    correlation  of neighbouring draws, in four chains; None: independent draws
    fail_above   fails where the first number of the data is above
    """

    name: ClassVar[str] = "planted"
    wrong: str = ""
    num_samples: int = 500
    weighted: bool = False
    correlation: float | None = None
    fail_above: float = math.inf

    def supports(self, density):
        return ""

    def run(self, density, run):
        (x,) = density.args
        if float(x.flatten()[0]) > self.fail_above:
            raise EngineError("planted to fail")
        mean, sd = posterior(x[..., : x.shape[-1] // 2] if self.wrong == "half" else x)
        if self.wrong == "prior":
            mean, sd = torch.zeros_like(mean), torch.ones_like(sd)
        mean = mean + 0.3 * sd * (self.wrong == "shifted")
        sd = sd * (0.8 if self.wrong == "narrow" else 1.0)
        if self.weighted:
            z = torch.randn((self.num_samples, *mean.shape), dtype=F64)
            log_w = dist.Normal(mean, sd).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
            return Draws({"z": z[None]}, "weighted", log_w[None], log_ratio=log_w)
        noise = torch.randn((4, self.num_samples, *mean.shape), dtype=F64)
        if self.correlation is not None:
            for s in range(1, self.num_samples):
                step = (1 - self.correlation**2) ** 0.5
                noise[:, s] = self.correlation * noise[:, s - 1] + step * noise[:, s]
        return Draws({"z": mean + sd * noise}, "iid" if self.correlation is None else "mcmc")
