"""Learning with latents kept from step to step: Monte Carlo EM by persistent chains, and particle gradients."""

from __future__ import annotations

import math

import pytest
import torch

from pyrometer.inference import EM, HMC, NUTS, ParticleGradient, ProblemError, RandomWalk, learn
from pyrometer.inference.learners import em
from pyrometer.models import conjugate_gaussian, ppca

PROBLEM = conjugate_gaussian.problem(num_data=100)  # z_i ~ N(theta, 1), x_i ~ N(z_i, 1): theta_ML = mean(x)
MEAN = float(PROBLEM.args[0].mean())

LEARNERS = {
    "em, hmc": (EM(e_step=HMC(num_samples=5, warmup_steps=20, num_chains=2), num_steps=60, m_step="full"), 0.1),
    "em, hmc, minibatch": (
        EM(e_step=HMC(num_samples=5, warmup_steps=20, num_chains=2), num_steps=300, batch_size=25, learning_rate=0.03),
        0.15,
    ),
    "em, random walk": (
        EM(e_step=RandomWalk(num_samples=20, warmup_steps=50, num_chains=2), num_steps=60, m_step="full"), 0.15
    ),
    "em, nuts, minibatch": (
        EM(e_step=NUTS(num_samples=3, warmup_steps=20, num_chains=2), num_steps=300, batch_size=25, learning_rate=0.03),
        0.15,
    ),
    "particles": (ParticleGradient(num_steps=800, learning_rate=0.02, step_size=0.05), 0.1),
    "particles, minibatch": (
        ParticleGradient(num_steps=2500, learning_rate=0.01, step_size=0.05, batch_size=20), 0.15
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_of_persistent_latents_reaches_the_mean(name):
    """The mean of 100 K draws of sd 0.71 has an error below 0.03; Adam adds a few of its steps. It starts 1.1 off."""
    learner, tolerance = LEARNERS[name]
    fit = learn(PROBLEM, learner, seed=1)
    assert fit.status.done, fit.status
    assert float(fit.parameters["theta"]) == pytest.approx(MEAN, abs=tolerance)


def test_chains_go_on_where_they_stood(monkeypatch):
    """From the second epoch on every E-step begins at the last draws of its data, and there is no warm-up."""
    warm = []
    plain = HMC.run
    monkeypatch.setattr(HMC, "run", lambda self, density, run: warm.append(run.warm) or plain(self, density, run))
    kept = []
    keep = em.Chains.keep
    monkeypatch.setattr(
        em.Chains, "keep", lambda self, index, state: kept.append((index, state)) or keep(self, index, state)
    )
    learn(PROBLEM, EM(e_step=HMC(num_samples=2, warmup_steps=5), num_steps=12, batch_size=25), seed=0)
    assert [bool(w) for w in warm] == [False] * 4 + [True] * 8
    last = {}
    for (index, state), before in zip(kept, warm, strict=True):
        if before:
            for column, datum in enumerate(index.tolist()):
                assert torch.equal(before["position"][:, column], last[datum])
        for column, datum in enumerate(index.tolist()):
            last[datum] = state["position"][:, column]


def test_particles_have_the_posteriors_moments_up_to_the_step():
    """With theta at its maximum: Langevin steps of size h widen a variance v to v / (1 - h / 2v); here by 5 %.
    theta's fixed point is not moved by that, the posterior being normal."""
    fit = learn(
        PROBLEM, ParticleGradient(num_steps=3000, num_particles=50, step_size=0.05, learning_rate=0.005), seed=2
    )
    assert float(fit.parameters["theta"]) == pytest.approx(MEAN, abs=0.04)
    # E log p(x, z) = -log 2 pi - E[(x - z)^2 + (z - theta)^2] / 2, both squares having the variance of z on top
    x = PROBLEM.args[0]
    variance = 0.5 / (1 - 0.05)  # of posterior variance 1/2: h / 2v = h
    expected = (-math.log(2 * math.pi) - ((x - MEAN) ** 2 / 4 + variance)).sum()
    tail = fit.trail.value[-20:]
    assert float(tail.mean()) == pytest.approx(float(expected), abs=4.9 * float(tail.std()) / math.sqrt(20) + 0.6)


def test_particles_learn_the_loadings_of_ppca():
    """W W' + sigma^2 I, which is identified, within 0.1 of the eigen-solution's, relative to its largest number."""
    problem = ppca.problem(num_data=200)
    fit = learn(problem, ParticleGradient(num_steps=4000, learning_rate=0.01, step_size=0.01), seed=0)
    exact = learn(problem, EM(num_steps=200), seed=0)
    found = [p.parameters["W"] @ p.parameters["W"].T for p in (fit, exact)]
    assert float((found[0] - found[1]).abs().max() / found[1].abs().max()) < 0.15


def test_settings_are_checked():
    for bad in ({"step_size": 0.0}, {"num_particles": 0}, {"learning_rate": -1.0}):
        with pytest.raises(ProblemError, match=next(iter(bad))):
            ParticleGradient(**bad)
    fit = learn(PROBLEM, ParticleGradient(step_size=1e6, num_steps=50), seed=0)
    assert fit.status.state == "failed"
    assert "try a smaller step_size" in fit.status.reason
