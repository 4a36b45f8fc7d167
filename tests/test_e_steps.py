"""Any engine is an E-step: Fisher's identity, grad log p(x) = E[grad log p(x, z) | x], by every engine that samples.

32 E-steps at a theta off the optimum; |t| < 6.1 for each coordinate of theta (31 degrees of freedom, 1e-6; some 60
coordinates). Their standard errors are at most 1.5 % of the gradient's largest, so that 10 % of it are seen.
`test_learners.py` has the exact engines, importance sampling, SVI and NUTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_learners import conjugate_log_likelihood, e_step, evidence_gradient, mixture_log_likelihood
from torch import Tensor

from pyrometer.inference import (
    HMC,
    SMC,
    AnnealedImportance,
    ForwardBackward,
    Gibbs,
    ParticleFilter,
    Problem,
    RandomWalk,
    RejectionSampling,
)
from pyrometer.models import conjugate_gaussian, gaussian_mixture, hidden_markov, linear_gaussian_ssm

F64 = torch.float64


def kalman_log_likelihood(x: Tensor, **theta: Tensor) -> Tensor:
    return linear_gaussian_ssm.reference(theta, x).log_evidence.value.sum()


def forward_log_likelihood(x: Tensor, initial: Tensor, transition: Tensor, locs: Tensor, scales: Tensor) -> Tensor:
    """The forward algorithm in logarithms; x (N, T, 1)."""
    emitted = torch.distributions.Normal(locs[:, 0], scales[:, 0]).log_prob(x)  # (N, T, K)
    log_a = initial.log() + emitted[:, 0]
    for t in range(1, x.shape[1]):
        log_a = torch.logsumexp(log_a[:, :, None] + transition.log(), 1) + emitted[:, t]
    return torch.logsumexp(log_a, 1).sum()


def normals() -> Problem:
    return conjugate_gaussian.problem(num_data=100)


CASES: dict[str, tuple[Callable[[], Problem], Any, Callable[..., Tensor], dict[str, Tensor]]] = {
    "rejection": (
        normals,
        RejectionSampling(num_samples=300, proposal="prior", log_bound=-0.9189),
        conjugate_log_likelihood,
        {},
    ),
    "smc": (normals, SMC(num_samples=500), conjugate_log_likelihood, {}),
    "annealed importance": (
        normals,
        AnnealedImportance(num_samples=300, num_temperatures=20),
        conjugate_log_likelihood,
        {},
    ),
    "hmc": (normals, HMC(num_samples=60, warmup_steps=100, num_chains=8), conjugate_log_likelihood, {}),
    "random walk": (
        normals,
        RandomWalk(num_samples=400, warmup_steps=200, num_chains=8),
        conjugate_log_likelihood,
        {},
    ),
    "gibbs": (
        lambda: gaussian_mixture.problem(num_data=100),
        Gibbs(num_samples=100, warmup_steps=5),
        mixture_log_likelihood,
        {},
    ),
    "particle filter": (
        lambda: linear_gaussian_ssm.problem(num_steps=4),
        ParticleFilter(num_samples=4000),
        kalman_log_likelihood,
        {"transition_scale": torch.tensor([0.8], dtype=F64)},
    ),
    "forward-backward": (
        lambda: hidden_markov.problem(num_steps=4),
        ForwardBackward(num_samples=1000),
        forward_log_likelihood,
        {},
    ),
}


@pytest.mark.parametrize("case", [pytest.param(n, marks=() if n == "gibbs" else pytest.mark.slow) for n in CASES])
def test_fishers_identity_holds_on_average(case):
    make, engine, log_likelihood, theta = CASES[case]
    problem = make()
    rows = torch.stack([e_step(problem, engine, seed, theta)[1] for seed in range(32)])
    density, _ = e_step(problem, engine, theta=theta)
    exact = evidence_gradient(density, log_likelihood, problem.args[0])
    largest, error = float(exact.abs().max()), rows.std(0) / math.sqrt(32)
    assert largest > 1
    assert float(error.max()) < 0.015 * largest
    assert bool(((rows.mean(0) - exact).abs() < 6.1 * error + 1e-9 * largest).all()), (rows.mean(0) - exact) / error
