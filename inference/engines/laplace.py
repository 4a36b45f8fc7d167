"""Laplace's method: a normal distribution at the mode, with the curvature there, for each datum by itself.

    q(u) = N(m, H^-1),   m = argmax log p(x, u),   H = -d^2 log p(x, u) / du^2 at m
    log p(x) ~ log p(x, m) + D/2 log 2 pi - 1/2 log det H

in the unconstrained space, whose Jacobian belongs to the density; exact where the posterior is normal there. Discrete
latents are summed out. Tierney & Kadane 1986, doi:10.1080/01621459.1986.10478240.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch

from ..density import Density
from ..engine import Draws, Run, as_chain, no_sum
from ..laplace import earlier_mode, laplace
from ..posterior import Evidence, evidence_from_weights
from ..settings import settings


@settings
class Laplace:
    """Climb to the highest mode by damped Newton steps from several starts, and draw from the normal there.

    The evidence is Laplace's formula, which has no sampling error but one of approximation; `std_error` is its distance
    from the importance-weighted estimate of the same draws (`refined`), with that estimate's own error. It is infinite
    where the climb found no mode. Where the normal misses the posterior's tails, k-hat says so.

    num_samples  draws from the normal
    num_starts   points to climb from, for each datum; the best two of some prior draws and others as they come
    num_steps    Newton steps at most, each 1 + D gradients for each start
    """

    name: ClassVar[str] = "laplace"
    num_samples: int = 1000
    num_starts: int = 6
    num_steps: int = 100

    EXPECTED_STEPS: ClassVar[int] = 12  # after which most climbs have ended

    def supports(self, density: Density) -> str:
        if not density.continuous:
            return "the latents are discrete, and there is no curvature; enumeration is exact for them"
        if density.unlisted:
            return no_sum(density)
        return ""

    def sized(self, calls: float, density: Density) -> Laplace:
        """Half for the climb, half for the draws, each of which is evaluated and mapped to its support."""
        newton = 1 + density.dim
        starts = min(self.num_starts, max(1, int(calls / 2 / (self.EXPECTED_STEPS * newton))))
        steps = min(self.num_steps, max(1, int(calls / 2 / (starts * newton)) - 1))
        climb = starts * newton * (1 + min(steps, self.EXPECTED_STEPS))
        return replace(self, num_starts=starts, num_steps=steps, num_samples=max(2, int((calls - climb) / 2)))

    def run(self, density: Density, run: Run) -> Draws:
        with run.tuning():
            start = earlier_mode(density, run)
            fit = laplace(density, self.num_steps, start=start, num_starts=self.num_starts)
        assert fit.value is not None and fit.flat is not None and fit.unfinished is not None  # noqa: PT018
        noise = torch.randn((self.num_samples, *fit.mean.shape), dtype=fit.mean.dtype, device=fit.mean.device)
        u = fit.mean + (fit.tril @ noise[..., None])[..., 0]
        log_volume = fit.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * density.dim * math.log(2 * math.pi)
        log_q = -0.5 * noise.square().sum(-1) - log_volume
        log_joint = density.log_joint(u)
        log_ratio = (log_joint - log_q).double().cpu()
        formula = (fit.value + log_volume).double().cpu()
        weighted = evidence_from_weights(log_ratio)
        error = torch.hypot(formula - weighted.value, weighted.std_error)
        error = torch.where((fit.flat | fit.unfinished).cpu(), math.inf, error)
        return Draws(
            as_chain(density.complete(u)),
            "iid",
            log_evidence=Evidence(formula, error, "estimate", weighted),
            sample_stats={"lp": log_joint[None], "log_q": log_q[None]},
            state={"mode": fit.mean},
            log_ratio=log_ratio,
            alarms=(*fit.alarms, *fit.no_modes),
        )
