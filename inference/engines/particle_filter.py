"""Particle filter: particles of each sequence carried along a program's own order in time, and smoothed.

    log Z = sum_t log sum_s W_{t-1} w_t      with the weights W_{t-1} that are carried into step t

The estimate is unbiased on the natural scale under every scheme and policy of resampling. Its standard error is that
of the families of the first particles (see `smc`), or, with `num_chains` of at least 8, of independent filters.
Smoothing by ancestry keeps the lines of the particles of the end. Backward smoothing chooses the ancestor of each line
anew at every step, going back, by Metropolis steps on its number,

    propose i ~ W_t,   accept with min(1, p(x_{t+1} | x_t^i) / p(x_{t+1} | x_t^current)),

which begin at the true ancestor and cost a program's step each (Dau & Chopin 2023, doi:10.1214/23-AOS2324).
Sources: Gordon, Salmond & Smith 1993, doi:10.1049/ip-f-2.1993.0015; Chopin & Papaspiliopoulos 2020,
doi:10.1007/978-3-030-47845-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..cloud import Cloud, CloudPlan
from ..density import Density
from ..engine import Draws, Run, seed_all
from ..posterior import Evidence, evidence_from_weights
from ..problem import ProblemError
from ..resampling import POLICIES, SCHEMES
from ..sequential import carried, check_lines, why_not_sequential
from ..settings import check_choice, check_share, settings

PROPOSALS, SMOOTHING = ("auto", "bootstrap", "guide"), ("ancestry", "backward")
FEW_FAMILIES = 10
MANY_FILTERS = 8


@settings
class ParticleFilter:
    """Draw each step's latents, weigh by its observations, resample, go on; sequences of a plate each for itself.

    num_samples   particles of each sequence in each filter
    num_chains    independent filters
    proposal      'bootstrap', from the model; 'guide', whose sites are drawn given the particles' past; 'auto': a guide
                  that stands ready, else the model
    resampling    'systematic', 'stratified', 'residual' or 'multinomial'
    policy        resample 'always', 'never', or 'adaptive', below `threshold` of the particles
    smoothing     'ancestry', or 'backward' with `num_moves` Metropolis steps at each time
    """

    name: ClassVar[str] = "particle_filter"
    num_samples: int = 1000
    num_chains: int = 1
    proposal: str = "auto"
    resampling: str = "systematic"
    policy: str = "adaptive"
    threshold: float = 0.5
    smoothing: str = "ancestry"
    num_moves: int = 2

    def __post_init__(self) -> None:
        check_choice(self, "proposal", PROPOSALS)
        check_choice(self, "resampling", SCHEMES)
        check_choice(self, "policy", POLICIES)
        check_choice(self, "smoothing", SMOOTHING)
        check_share(self, "threshold")
        if not isinstance(self.num_samples, bool) and isinstance(self.num_samples, int) and self.num_samples == 1:
            raise ProblemError("ParticleFilter(num_samples=1): one particle has no weight to compare; take at least 2.")

    def sized(self, calls: float, density: Density) -> Self:
        return replace(self, num_samples=max(2, int(calls / self.num_chains)))

    def supports(self, density: Density) -> str:
        if self.proposal == "guide":
            density.require_guide()
        return why_not_sequential(density)

    def run(self, density: Density, run: Run) -> Draws:
        guided = self.proposal == "guide" or (self.proposal == "auto" and density.guide_ready)
        plan = CloudPlan(self.num_samples, self.num_chains, guided, self.resampling, self.policy, self.threshold)
        seed_all(run.child(0).seed)
        cloud, lines, _ = carried(density, plan, num_moves=self.num_moves if self.smoothing == "backward" else 0)
        if self.smoothing == "ancestry":
            check_lines(density, cloud, lines)
        return self.answer(density, cloud, lines)

    def answer(self, density: Density, cloud: Cloud, lines: Mapping[str, Tensor]) -> Draws:
        # each filter's weights sum to its own estimate of Z, so that all particles together have that of the mean
        log_weights = (cloud.log_weights + cloud.log_evidence).movedim(1, 0)  # (R, S, *batch)
        values = {name: value.movedim(1, 0) for name, value in lines.items()}
        families = cloud.families().amin(0)
        alarms = []
        evidence = evidence_from_weights(cloud.log_evidence)
        if self.num_chains < MANY_FILTERS:
            share = torch.softmax(cloud.log_evidence, 0)
            error = (share.square() * cloud.variance()).sum(0).sqrt()
            evidence = Evidence(evidence.value, error, "estimate")
            if int(families.min()) < FEW_FAMILIES:
                alarms.append(
                    f"all particles of a sequence descend from {int(families.min())} of the first, too few for the "
                    f"standard error of its evidence: take more particles, or num_chains={MANY_FILTERS}"
                )
        return Draws(
            density.complete(values),
            "weighted",
            log_weights.cpu(),
            evidence,
            alarms=tuple(alarms),
            figures={"families": families.double(), "least_ess": cloud.least.amin(0)},
        )
