"""Particle marginal Metropolis-Hastings: a random walk over what is shared, with a particle filter for the rest.

    propose u' ~ N(u, s^2 C),   accept with min(1, Z-hat(u') p(u') / (Z-hat(u) p(u))),

where Z-hat(u) is the particle filter's unbiased estimate of p(x | u), kept until a proposal is accepted: then the chain
leaves the exact posterior invariant for any number of particles, and a line of the filter is a draw of the latents
(Andrieu, Doucet & Holenstein 2010, doi:10.1111/j.1467-9868.2009.00736.x). All chains' filters run as lanes of one pass
through the program. C and s are learned in warm-up from all chains and then held fixed (Haario, Saksman & Tamminen
2001, doi:10.2307/3318737).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..cloud import CloudPlan
from ..density import Density
from ..engine import Draws, EngineError, Run, seed_all
from ..problem import ProblemError
from ..resampling import SCHEMES
from ..sequential import carried, shared_latents, time_of, why_not_sequential
from ..settings import check_choice, check_share, settings

CANDIDATES = 10  # draws of the prior for each chain, of which the best is its start
NOISY = 3.0  # sd of log Z-hat, in nats, from which on chains stick
RIDGE = 1e-6


class Stand(NamedTuple):
    """Where the chains stand: unconstrained u (C, D), log Z-hat p(u) (C,) and its sd, and the filters' particles there:
    log weights (C, S), lines of theirs (C, S, *own), and the values at u (C, *own)."""

    u: Tensor
    value: Tensor
    noise: Tensor
    weights: Tensor
    lines: dict[str, Tensor]
    fixed: dict[str, Tensor]

    def draw(self) -> dict[str, Tensor]:
        """A value of every latent, for each chain: any line of its filter, by weight, each time anew."""
        index = torch.multinomial(torch.softmax(self.weights, 1), 1)[:, 0]
        chain = torch.arange(len(index), device=index.device)
        return self.fixed | {name: line[chain, index] for name, line in self.lines.items()}


@settings
class ParticleMarginalMetropolis:
    """Move the latents that all steps share by a random walk, and filter the others given them.

    num_samples, warmup_steps  per chain
    num_particles      of each chain's filter: enough for log Z-hat to vary by about 1 nat
    target_acceptance  mean acceptance probability that the step is tuned to in warm-up
    sites              names of the latents to walk over; None: those before the first observation on which every later
                       step depends
    resampling         'systematic', 'stratified', 'residual' or 'multinomial', at every step
    """

    name: ClassVar[str] = "particle_marginal"
    num_samples: int = 1000
    warmup_steps: int = 500
    num_chains: int = 4
    num_particles: int = 100
    target_acceptance: float = 0.2
    sites: tuple[str, ...] | None = None
    resampling: str = "systematic"

    def __post_init__(self) -> None:
        check_choice(self, "resampling", SCHEMES)
        check_share(self, "target_acceptance")
        if self.sites is not None and (isinstance(self.sites, str) or not all(isinstance(n, str) for n in self.sites)):
            raise ProblemError(f"ParticleMarginalMetropolis(sites={self.sites!r}): expected names, ('a', 'b').")

    def sized(self, calls: float, density: Density) -> Self:
        steps = max(2, int(calls / (self.num_chains * self.num_particles)) - CANDIDATES)
        return replace(self, num_samples=(steps + 1) // 2, warmup_steps=steps // 2)

    def supports(self, density: Density) -> str:
        if reason := why_not_sequential(density):
            return reason
        names = self._walked(density)
        if not names:
            return "no latent before the first observation is shared by all steps; the particle filter serves"
        for name in names:
            if density.latents[name].discrete:
                return f"site {name!r} is discrete, and a random walk needs continuous latents"
        return ""

    def _walked(self, density: Density) -> tuple[str, ...]:
        if self.sites is None:
            return shared_latents(density)
        first = time_of(density).steps[0]
        for name in self.sites:
            if name not in first:
                known = ", ".join(first)
                raise ProblemError(
                    f"ParticleMarginalMetropolis(sites=...): {name!r} is none of the first step's: {known}."
                )
        return tuple(n for n in first if n in self.sites)

    def run(self, density: Density, run: Run) -> Draws:
        seed_all(run.child(0).seed)
        names = self._walked(density)
        if run.warm:
            here = self._stand(density, names, run.warm["u"].to(density.dtype))
            cholesky, log_scale = run.warm["cholesky"].to(here.u), float(run.warm["log_scale"])
        else:
            with run.tuning():
                here = self._start(density, names)
            cholesky, log_scale = torch.eye(here.u.shape[1]).to(here.u), math.log(2.4 / math.sqrt(here.u.shape[1]))
        warmup = 0 if run.warm else self.warmup_steps
        learned = Covariance(here.u)
        for step in range(warmup):
            with run.tuning():
                here, rate = self._move(density, names, here, cholesky * math.exp(log_scale))
            log_scale += 3 * (step + 1) ** -0.6 * (float(rate.mean()) - self.target_acceptance)
            learned.add(here.u)
            if step >= warmup // 4 and step % 10 == 0:
                cholesky = learned.cholesky()
            run.progress("warm-up", step + 1, warmup)
        kept: list[dict[str, Tensor]] = []
        told: list[tuple[Tensor, ...]] = []
        for step in range(self.num_samples):
            here, rate = self._move(density, names, here, cholesky * math.exp(log_scale))
            kept.append(here.draw())
            told.append((rate, here.value, here.noise))
            run.progress("draws", step + 1, self.num_samples)
        rates, values, noises = (torch.stack(row, 1) for row in zip(*told, strict=True))
        noise, alarms = float(noises.mean()), []
        if noise > NOISY:
            alarms.append(
                f"the filter's log evidence varies by {noise:.1f} nats (sd; 1 is best), so that chains stick: "
                "take more particles (num_particles)"
            )
        return Draws(
            density.complete({name: torch.stack([draw[name] for draw in kept], 1) for name in density.latents}),
            "mcmc",
            sample_stats={"acceptance_rate": rates, "lp": values},
            state={"u": here.u, "cholesky": cholesky, "log_scale": torch.tensor(log_scale)},
            alarms=tuple(alarms),
            figures={"acceptance": rates.mean(), "log_evidence_sd": torch.tensor(noise)},
        )

    def _move(self, density: Density, names: tuple[str, ...], here: Stand, scale: Tensor) -> tuple[Stand, Tensor]:
        there = self._stand(density, names, here.u + torch.randn_like(here.u) @ scale.T)
        rate = (there.value - here.value).clamp_max(0.0).exp()
        keep = torch.rand_like(rate) < rate

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(keep.reshape(-1, *[1] * (new.dim() - 1)), new, old)

        return tree_map(chosen, there, here), rate

    def _start(self, density: Density, names: tuple[str, ...]) -> Stand:
        u = density.unconstrain(density.prior(CANDIDATES * self.num_chains).values)
        sizes = [math.prod(_own(density, n)) for n in density.continuous]
        parts = dict(zip(density.continuous, u.split(sizes, -1), strict=True))
        tried = self._stand(density, names, torch.cat([parts[n] for n in names], -1))
        best = tried.value.reshape(CANDIDATES, -1).argmax(0)
        index = best * self.num_chains + torch.arange(self.num_chains, device=best.device)
        if not bool(tried.value[index].isfinite().all()):
            raise EngineError(f"a chain has no start with a positive likelihood in {CANDIDATES} draws of the prior")
        return tree_map(lambda t: t[index], tried)

    def _stand(self, density: Density, names: tuple[str, ...], u: Tensor) -> Stand:
        """Run the filters of all chains at u (C, D)."""
        parts = u.split([math.prod(_own(density, n)) for n in names], -1)
        given = {n: part.reshape(-1, *_own(density, n)) for n, part in zip(names, parts, strict=True)}
        plan = CloudPlan(self.num_particles, len(u), scheme=self.resampling, policy="always")
        cloud, lines, log_given = carried(density, plan, given)
        value = (cloud.log_evidence + log_given).nan_to_num(nan=-math.inf).to(u)
        turned = {n: v.movedim(1, 0) for n, v in lines.items()}
        return Stand(u, value, cloud.variance().sqrt().to(u), cloud.log_weights.T, turned, cloud.fixed)


class Covariance:
    """Running mean and covariance of the chains' points, which counts the unit matrix as one of them."""

    def __init__(self, u: Tensor) -> None:
        self.count, self.centre, self.moment = 1.0, u.mean(0), torch.eye(u.shape[1]).to(u)

    def add(self, points: Tensor) -> None:
        for u in points:
            self.count += 1
            off = u - self.centre
            self.centre = self.centre + off / self.count
            self.moment = self.moment + (torch.outer(off, u - self.centre) - self.moment) / self.count

    def cholesky(self) -> Tensor:
        ridge = RIDGE * self.moment.diagonal().mean() * torch.eye(len(self.moment)).to(self.moment)
        return torch.linalg.cholesky(self.moment + ridge)


def _own(density: Density, name: str) -> tuple[int, ...]:
    site: Any = density.latents[name]
    return site.own_shape(site.unconstrained_shape, site.unconstrained_event_dim)
