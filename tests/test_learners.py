"""Do the learners find the theta that they should? Against eigen-solutions, direct maximisers and closed forms.

Where a learner uses random numbers its docstring states its Monte Carlo error; limits are 5 of these or more, so that
a false alarm is below 1e-6. Seeds are fixed: a test that passes once passes always.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from scipy.optimize import minimize
from test_contract import Surroundings, assert_same, beta_bernoulli, discrete_net, switching
from torch import Tensor, nn

from pyrometer.inference import (
    EM,
    ML,
    NUTS,
    SVI,
    Enumeration,
    Fit,
    ImportanceSampling,
    Problem,
    ProblemError,
    Quadrature,
    find_learner,
    infer,
    learn,
    registry,
)
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Run
from pyrometer.inference.learning import TrailWriter, expected_log_joint, flat_draws, minibatches
from pyrometer.models import conjugate_gaussian, gaussian_mixture, ppca, vae

F64 = torch.float64


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def mixture_log_likelihood(x: Tensor, weights: Tensor, locs: Tensor, scales: Tensor) -> Tensor:
    """sum_i log sum_k w_k N(x_i; loc_k, diag(scale_k)^2), written out."""
    standardised = (x[:, None] - locs) / scales
    log_density = (-0.5 * standardised**2 - scales.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    return torch.logsumexp(weights.log() + log_density, 1).sum()


def ppca_log_likelihood(x: Tensor, W: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    covariance = W @ W.T + sigma**2 * torch.eye(x.shape[1], dtype=F64)
    return dist.MultivariateNormal(mu, covariance).log_prob(x).sum()


# ---------------------------------------------------------------------------------------------------------------
# Exact EM


@pytest.mark.parametrize("num_nodes", [3, 8])
def test_ppca_by_em_is_the_eigen_solution(num_nodes):
    """W W', sigma, mu and the log likelihood to 1e-8, from a small random W."""
    problem = ppca.problem()
    fit = learn(problem, EM(e_step=Quadrature(num_nodes=num_nodes), num_steps=300, tolerance=0.0))
    exact, log_likelihood = ppca.maximum_likelihood(problem.args[0], 2)
    assert fit.status.done, fit.status
    W = fit.parameters["W"]
    torch.testing.assert_close(W @ W.T, exact["W"] @ exact["W"].T, rtol=0, atol=1e-8)
    torch.testing.assert_close(fit.parameters["sigma"], exact["sigma"], rtol=0, atol=1e-8)
    torch.testing.assert_close(fit.parameters["mu"], exact["mu"], rtol=0, atol=1e-8)
    assert float(fit.trail.value[-1]) == pytest.approx(log_likelihood, rel=1e-8)
    assert float(ppca_log_likelihood(problem.args[0], **fit.parameters)) == pytest.approx(log_likelihood, rel=1e-10)


def test_ppca_by_em_with_a_numerical_m_step_is_the_eigen_solution():
    """L-BFGS in place of the closed form: the same fixed point, to 1e-5."""
    problem = ppca.problem(num_data=60, data_dim=3, latent_dim=1)
    fit = learn(problem, EM(e_step=Quadrature(num_nodes=3), m_step="full", num_steps=60))
    exact, log_likelihood = ppca.maximum_likelihood(problem.args[0], 1)
    W = fit.parameters["W"]
    torch.testing.assert_close(W @ W.T, exact["W"] @ exact["W"].T, rtol=0, atol=1e-4)
    assert float(fit.trail.value[-1]) == pytest.approx(log_likelihood, rel=1e-8)


def trails(make: Callable[..., Problem], learner: EM, count: int):
    for seed in range(count):
        fit = learn(make(seed=seed), learner)
        assert fit.status.done, fit.status
        yield fit


def assert_never_falls(fit: Fit) -> None:
    value = fit.trail.value
    assert len(value) > 2
    assert bool((value.diff() >= -1e-9 * (1 + value[1:].abs())).all()), value
    assert float(value[-1] - value[0]) > 0.1


MONOTONE = {
    "mixture, closed": (partial(gaussian_mixture.problem, num_data=80, separation=2.0), Enumeration(), "closed", 12),
    "mixture, full": (partial(gaussian_mixture.problem, num_data=20, num_components=2), Enumeration(), "full", 4),
    "ppca, closed": (partial(ppca.problem, num_data=15, data_dim=4), Quadrature(num_nodes=3), "closed", 8),
}


@pytest.mark.parametrize("case", MONOTONE)
def test_the_log_likelihood_never_falls(case):
    """EM's own promise, to 1e-9 relative, over random data sets; each rises by more than 0.1 nats in all. The figures
    are the likelihood itself, written out, at the theta of the end."""
    make, engine, m_step, count = MONOTONE[case]
    for seed, fit in enumerate(trails(make, EM(e_step=engine, m_step=m_step, num_steps=12), count)):
        assert_never_falls(fit)
        by_hand = ppca_log_likelihood if "ppca" in case else mixture_log_likelihood
        at_end = by_hand(make(seed=seed).args[0], **fit.parameters)
        assert float(fit.trail.value[-1]) == pytest.approx(float(at_end), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("case", MONOTONE)
def test_the_log_likelihood_never_falls_over_200_data_sets(case):
    make, engine, m_step, _ = MONOTONE[case]
    for fit in trails(make, EM(e_step=engine, m_step=m_step, num_steps=25), 200):
        assert_never_falls(fit)


def direct_maximum(problem: Problem) -> tuple[dict[str, Tensor], float]:
    """The maximum of the mixture's likelihood by scipy, from the start that the problem has."""
    x = problem.args[0]
    with pyro.get_param_store().scope():
        problem.model(x)
        start = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    k, d = start["locs"].shape

    def unpack(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flat[:k].softmax(0), flat[k : k + k * d].reshape(k, d), flat[k + k * d :].exp().reshape(k, d)

    def loss(flat):
        theta = torch.tensor(flat, dtype=F64, requires_grad=True)
        value = -mixture_log_likelihood(x, *unpack(theta))
        (gradient,) = torch.autograd.grad(value, theta)
        return float(value.detach()), gradient.numpy()

    flat = torch.cat([start["weights"].log(), start["locs"].flatten(), start["scales"].log().flatten()]).numpy()
    found = minimize(loss, flat, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000})
    return dict(zip(("weights", "locs", "scales"), unpack(torch.tensor(found.x)), strict=True)), -float(found.fun)


@pytest.mark.parametrize(
    "learner",
    [EM(num_steps=400, tolerance=0.0), EM(m_step="full", num_steps=60, tolerance=0.0), ML(num_steps=400)],
    ids=["EM closed", "EM full", "ML"],
)
def test_the_fixed_point_is_the_maximum_of_the_likelihood(learner):
    """Every parameter to 1e-6 (L-BFGS inside: 1e-5) of where scipy's BFGS ends on the likelihood written out."""
    problem = gaussian_mixture.problem(num_data=80, num_components=2, separation=4.0)
    expected, maximum = direct_maximum(problem)
    fit = learn(problem, learner)
    assert fit.status.done, fit.status
    tolerance = 1e-6 if getattr(learner, "m_step", "") == "auto" else 1e-5
    for name, value in expected.items():
        torch.testing.assert_close(fit.parameters[name], value, rtol=0, atol=tolerance)
    assert float(mixture_log_likelihood(problem.args[0], **fit.parameters)) == pytest.approx(maximum, abs=1e-8)


def test_em_stops_where_nothing_rises_any_more():
    problem = ppca.problem()
    fit = learn(problem, EM(e_step=Quadrature(num_nodes=3), num_steps=1000, tolerance=1e-9))
    assert any("converged" in note for note in fit.notes)
    assert len(fit.trail) < 300


# ---------------------------------------------------------------------------------------------------------------
# Every learner on the smallest problem of all


CLOSED = {"num_steps": 30}
LEARNERS: dict[str, tuple[Any, float]] = {
    # a learner, and how far from mean(x) it may end: 5 of its Monte Carlo errors or more
    "em quadrature": (EM(e_step=Quadrature(num_nodes=4), **CLOSED), 1e-6),
    "em quadrature, full": (EM(e_step=Quadrature(num_nodes=4), m_step="full", **CLOSED), 1e-5),
    "em quadrature, gradient": (
        EM(e_step=Quadrature(num_nodes=4), m_step="gradient", num_steps=100, gradient_steps=5, learning_rate=0.05), 1e-2
    ),
    "em importance": (EM(e_step=ImportanceSampling(num_samples=100, proposal="laplace"), **CLOSED), 0.06),
    "em importance, prior": (EM(e_step=ImportanceSampling(num_samples=400, proposal="prior"), **CLOSED), 0.06),
    "em importance, minibatch": (
        EM(
            e_step=ImportanceSampling(num_samples=50, proposal="prior"),
            batch_size=40,
            num_steps=400,
            learning_rate=0.02,
        ),
        0.2,
    ),
    "em nuts": (EM(e_step=NUTS(num_chains=2, warmup_steps=30, num_samples=40), num_steps=15), 0.08),
    "em svi": (
        EM(e_step=SVI(num_steps=20, num_particles=10, learning_rate=0.02, num_samples=200), num_steps=50), 0.1
    ),
    "svi": (SVI(num_steps=800, num_particles=10, learning_rate=0.02, num_samples=200), 0.1),
    "svi, AutoNormal": (
        SVI(guide="AutoNormal", num_steps=800, num_particles=10, learning_rate=0.02, num_samples=200), 0.1
    ),
    "svi, minibatch": (SVI(batch_size=40, num_steps=1500, learning_rate=0.01, num_samples=200), 0.25),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_reaches_the_mean_of_the_data(name):
    """theta_ML = mean(x), about 1.1, from a start at 0. Exact E-steps: to rounding (0.5^30). With K draws of each of
    100 posteriors of sd 0.71 the fixed point has a Monte Carlo error of 0.71 / sqrt(100 K) / sqrt(3/4): 0.008 at
    K = 100; 40 correlated draws of two chains make it 0.013. Adam at rate r on noisy gradients wanders by a few r."""
    learner, tolerance = LEARNERS[name]
    problem = conjugate_gaussian.problem(num_data=100)
    fit = learn(problem, learner, seed=3)
    assert fit.status.done, fit.status
    assert abs(float(problem.args[0].mean())) > 0.8
    assert float(fit.parameters["theta"]) == pytest.approx(float(problem.args[0].mean()), abs=tolerance)
    assert fit.learner == learner.name
    assert fit.cost.evaluations + fit.cost.gradients > 0
    assert fit.cost.seconds > 0
    if getattr(learner, "batch_size", None) is None:
        torch.testing.assert_close(fit.posterior.parameters["theta"], fit.parameters["theta"], rtol=0, atol=0)
        expected = (problem.args[0] + float(fit.parameters["theta"])) / 2
        assert float((fit.posterior.mean("z") - expected).abs().max()) < 0.8


@pytest.mark.parametrize("name", registry.learners())
def test_every_discovered_learner_reaches_it_or_says_why_not(name):
    """A learner that is added runs here with its defaults; 0.2 is what a noisy one may miss by."""
    problem = conjugate_gaussian.problem(num_data=100)
    assert find_learner(name) is registry.learners()[name]
    fit = learn(problem, name)
    if fit.status.state == "unsupported":
        assert fit.status.reason
        assert float(fit.parameters["theta"]) == 0.0
        assert fit.posterior is None
        return
    assert fit.status.done, fit.status
    assert float(fit.parameters["theta"]) == pytest.approx(float(problem.args[0].mean()), abs=0.2)


@pytest.mark.parametrize("name", registry.learners())
def test_a_learner_leaves_nothing_behind(name):
    """Generators, the param store with a user's entries, defaults; modules with their values, dtypes and gradients."""
    for problem in (conjugate_gaussian.problem(num_data=5), vae.problem(num_train=5, num_test=0, hidden=4)):
        cls = registry.learners()[name]
        small = {"num_steps": 3, "num_samples": 10}
        learner = cls(**{f.name: small[f.name] for f in fields(cls) if f.name in small})
        pyro.param("mine", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
        pyro.param("theta", torch.tensor(7.5))
        before = Surroundings.of(problem)
        fit = learn(problem, learner)
        after = Surroundings.of(problem)
        for field in fields(Surroundings):
            if field.name != "tensors":
                assert getattr(before, field.name) == getattr(after, field.name), field.name
        for tensor, facts in before.tensors.items():
            assert facts == after.tensors[tensor], tensor
        assert fit.parameters
        assert all(not v.requires_grad for v in fit.parameters.values())


@pytest.mark.parametrize("name", ["em importance, prior", "em importance, minibatch", "svi", "svi, minibatch"])
def test_the_same_seed_gives_the_same_fit(name):
    learner = LEARNERS[name][0]
    small = type(learner)(**{**{f.name: getattr(learner, f.name) for f in fields(learner)}, "num_steps": 25})
    problem = conjugate_gaussian.problem(num_data=100)
    first = learn(problem, small, seed=8)
    torch.manual_seed(0)
    again, other = learn(problem, small, seed=8), learn(problem, small, seed=9)
    assert_same(dict(first.parameters), dict(again.parameters))
    assert_same(dict(first.guide_parameters), dict(again.guide_parameters))
    assert torch.equal(first.trail.value, again.trail.value)
    assert not torch.equal(first.parameters["theta"], other.parameters["theta"])
    assert first.seed == 8


# ---------------------------------------------------------------------------------------------------------------
# Fisher's identity, and steps that can be told by hand


def e_step(problem: Problem, engine: Any, seed: int = 0, theta: Any = None) -> tuple[Density, Tensor]:
    """The gradient of the expected log joint in the leaves of theta, at the theta of the E-step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        density = Density(problem, learning=True, dtype=F64)
        with density:
            if theta:
                density.set_parameters(theta)
            with torch.no_grad():
                draws = engine.run(density, Run(density, np.random.SeedSequence(seed)))
            values, weights = flat_draws(draws, tuple(density.batch_shape))
            gradients = torch.autograd.grad(expected_log_joint(density, values, weights), density.theta.tensors)
            return density, torch.cat([g.flatten() for g in gradients])


def evidence_gradient(density: Density, log_likelihood: Callable[..., Tensor], *data: Tensor) -> Tensor:
    with density:
        values = {n: leaf.value() for n, leaf in density.theta.by_name.items()}
        gradients = torch.autograd.grad(log_likelihood(*data, **values), density.theta.tensors)
    return torch.cat([g.flatten() for g in gradients])


def conjugate_log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
    return dist.Normal(theta, math.sqrt(2.0)).log_prob(x).sum()


@pytest.mark.parametrize("case", ["mixture", "ppca", "conjugate"])
def test_fishers_identity_holds_for_exact_engines(case):
    """grad E[log p(x, z)] at fixed posterior weights = grad log p(x), to 1e-8 relative, at a theta off the optimum."""
    problem, engine, log_likelihood, theta = {
        "mixture": (
            gaussian_mixture.problem(num_data=30),
            Enumeration(),
            mixture_log_likelihood,
            {"weights": torch.tensor([0.2, 0.3, 0.5], dtype=F64)},
        ),
        "ppca": (ppca.problem(num_data=20), Quadrature(num_nodes=4), ppca_log_likelihood, {"sigma": scalar(1.4)}),
        "conjugate": (
            conjugate_gaussian.problem(num_data=20),
            Quadrature(num_nodes=4),
            conjugate_log_likelihood,
            {"theta": scalar(0.3)},
        ),
    }[case]
    density, found = e_step(problem, engine, theta=theta)
    exact = evidence_gradient(density, log_likelihood, problem.args[0])
    assert float(exact.abs().max()) > 1
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))


@pytest.mark.parametrize(
    "engine",
    [
        ImportanceSampling(num_samples=1000, proposal="guide"),
        ImportanceSampling(num_samples=1000, proposal="laplace"),
        SVI(num_steps=1, learning_rate=1e-13, num_samples=500),
    ],
    ids=["guide", "laplace", "svi"],
)
def test_fishers_identity_holds_on_average_for_random_engines(engine):
    """32 E-steps on 100 data, |t| < 6.1 (31 degrees of freedom, 1e-6); sees 2 % of the gradient. The guide is too wide
    for importance sampling, which corrects it, and exact for SVI, which does not."""
    error = 0.0 if isinstance(engine, SVI) else 0.09
    problem = conjugate_gaussian.problem(num_data=100, guide_error=error)
    rows = torch.stack([e_step(problem, engine, seed)[1] for seed in range(32)])
    density, _ = e_step(problem, engine)
    exact = evidence_gradient(density, conjugate_log_likelihood, problem.args[0])
    t = (rows.mean(0) - exact) / (rows.std(0) / math.sqrt(32))
    assert float(t.abs().max()) < 6.1
    assert float((rows.std(0) / math.sqrt(32) / exact).abs().max()) < 0.004


def test_fishers_identity_by_nuts():
    """8 chains of 60 draws of 50 data, judged by 8 runs (t with 7 degrees of freedom at 1e-6: 14.8)."""
    problem = conjugate_gaussian.problem(num_data=50)
    engine = NUTS(num_chains=1, warmup_steps=40, num_samples=60)
    rows = torch.stack([e_step(problem, engine, seed)[1] for seed in range(8)])
    density, _ = e_step(problem, Quadrature(num_nodes=4))
    exact = evidence_gradient(density, conjugate_log_likelihood, problem.args[0])
    t = (rows.mean(0) - exact) / (rows.std(0) / math.sqrt(8))
    assert float(t.abs().max()) < 14.8
    assert float((rows.mean(0) / exact - 1).abs().max()) < 0.1


def test_draws_of_weight_zero_count_for_nothing():
    """A draw where the density is zero has weight zero: Q and its gradient stay finite."""

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", lambda: scalar(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z, z + 3 * scale, validate_args=False), obs=x)

    problem = Problem(model, args=(torch.tensor([0.5, 0.2], dtype=F64),))
    _, gradient = e_step(problem, ImportanceSampling(num_samples=200, proposal="prior"))
    torch.testing.assert_close(gradient, torch.tensor([-2.0], dtype=F64))  # -N d log(3 scale) / d log scale


EQUAL = torch.full((10,), 2.0, dtype=F64)


def equal_data() -> Problem:
    """Ten equal data: every minibatch has the gradient of all, N/B times its own."""
    return conjugate_gaussian.problem(num_data=10).on(EQUAL)


@pytest.mark.parametrize("batch_size", [None, 4, 3])
def test_an_em_gradient_step_is_what_it_is_by_hand(batch_size):
    """theta <- theta + rate * sum_i (E[z_i] - theta), E[z_i] = (2 + theta) / 2, also from minibatches that do not
    divide the data: 3 of 10 count 10/3 times."""
    learner = EM(
        e_step=Quadrature(num_nodes=4), m_step="gradient", gradient_steps=2, num_steps=3, learning_rate=0.01,
        optimizer=torch.optim.SGD, batch_size=batch_size,
    )  # fmt: skip
    theta = 0.0
    for _ in range(3):
        centre = (2 + theta) / 2
        for _ in range(2):
            theta += 0.01 * 10 * (centre - theta)
    assert float(learn(equal_data(), learner).parameters["theta"]) == pytest.approx(theta, rel=1e-9)


@pytest.mark.parametrize("num_steps", [5, 40])  # the second is traced to a graph
@pytest.mark.parametrize("batch_size", [None, 4, 3])
def test_an_ml_gradient_step_is_what_it_is_by_hand(batch_size, num_steps):
    def model(x: Tensor) -> None:
        theta = pyro.param("theta", lambda: scalar(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 2.0), obs=x)

    learner = ML(optimizer=torch.optim.SGD, num_steps=num_steps, learning_rate=0.01, batch_size=batch_size)
    fit = learn(Problem(model, args=(EQUAL,)), learner)
    assert float(fit.parameters["theta"]) == pytest.approx(2 * (1 - (1 - 0.01 * 10 / 4) ** num_steps), rel=1e-6)
    at_start = 10 * float(dist.Normal(scalar(0.0), 2.0).log_prob(scalar(2.0)))
    assert float(fit.trail.value[0]) == pytest.approx(at_start, rel=1e-6)


@pytest.mark.parametrize("num_steps", [4, 40])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_svi_moves_theta_and_phi_by_one_gradient(batch_size, num_steps):
    """A guide that is nearly a point: the gradient is that of log p(x, z) at z = loc, for theta and loc alike."""

    def model(x: Tensor) -> None:
        theta = pyro.param("theta", lambda: scalar(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: scalar(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * torch.ones_like(x), 1e-9))

    rate, theta, loc = 0.01, 0.0, 0.5
    for _ in range(num_steps):
        theta, loc = theta + rate * 10 * (loc - theta), loc + rate * 10 * ((theta - loc) + (2 - loc))
    learner = SVI(
        optimizer=torch.optim.SGD, learning_rate=rate, num_steps=num_steps, batch_size=batch_size, num_samples=5
    )
    fit = learn(Problem(model, args=(EQUAL,), guide=guide), learner)
    assert float(fit.parameters["theta"]) == pytest.approx(theta, rel=1e-5)
    assert float(fit.guide_parameters["loc"]) == pytest.approx(loc, rel=1e-5)


def test_minibatches_are_uniform_draws_without_replacement():
    """N = 10, B = 4: two batches from each shuffle, eight different rows, two left out; all rows alike over 200
    shuffles (a row's count is Binomial(200, 0.8), sd 5.7; limit 6 sds)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with Density(conjugate_gaussian.problem(num_data=10)) as density:
            batches = minibatches(density, 4)
            pairs = [(next(batches), next(batches)) for _ in range(200)]
    for a, b in pairs:
        assert len(torch.cat([a, b]).unique()) == 8
    counts = torch.cat([torch.cat(p) for p in pairs]).bincount(minlength=10)
    assert float((counts - 160).abs().max()) < 35


# ---------------------------------------------------------------------------------------------------------------
# Maximum likelihood


def logistic_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 3, generator=generator, dtype=F64)
    logits = features @ torch.tensor([1.0, -0.5, 0.2], dtype=F64) + 0.3
    return features, torch.bernoulli(torch.sigmoid(logits), generator=generator)


def logistic() -> Problem:
    def model(features: Tensor, y: Tensor) -> None:
        w = pyro.param("w", lambda: torch.zeros(3, dtype=F64))
        b = pyro.param("b", lambda: scalar(0.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=features @ w + b), obs=y)

    return Problem(model, args=logistic_data())


def newton() -> tuple[Tensor, float]:
    """The maximum of the logistic likelihood, (w, b), by Newton's method, and its log likelihood."""
    features, y = logistic_data()
    design = torch.cat([features, torch.ones(200, 1, dtype=F64)], 1)
    beta = torch.zeros(4, dtype=F64)
    for _ in range(30):
        p = torch.sigmoid(design @ beta)
        beta = beta + torch.linalg.solve(design.T @ ((p * (1 - p))[:, None] * design), design.T @ (y - p))
    return beta, float(dist.Bernoulli(logits=design @ beta).log_prob(y).sum())


@pytest.mark.parametrize(
    ("learner", "tolerance", "kind"),
    [
        (ML(), 1e-6, "exact"),
        (ML(optimizer=torch.optim.Adam, learning_rate=0.05, num_steps=600), 1e-3, "exact"),
        (ML(batch_size=50, learning_rate=0.01, num_steps=1500), 0.15, "estimate"),
        (ML(batch_size=50, optimizer=torch.optim.SGD, learning_rate=1e-3, num_steps=1500), 0.15, "estimate"),
    ],
    ids=["L-BFGS", "Adam", "minibatch Adam", "minibatch SGD"],
)
def test_logistic_regression_by_ml_equals_newton(learner, tolerance, kind):
    """Minibatches of 50 of 200 leave an error of about 0.03 (rate 0.01 of Adam): limit 5 of these. The standard errors
    of the estimate itself are 0.2."""
    problem = logistic()
    fit = learn(problem, learner)
    beta, maximum = newton()
    found = torch.cat([fit.parameters["w"], fit.parameters["b"][None]])
    assert float((found - beta).abs().max()) < tolerance
    assert fit.trail.kind == kind
    if kind == "exact":
        assert float(fit.trail.value.max()) == pytest.approx(maximum, abs=1e-3)
    else:
        assert float(fit.trail.value[-20:].mean()) == pytest.approx(maximum, abs=15)
    assert fit.posterior is None
    assert not fit.guide_parameters


def test_ml_refuses_continuous_latents_and_says_what_serves():
    fit = learn(conjugate_gaussian.problem(num_data=5), ML())
    assert fit.status.state == "unsupported"
    assert "'z'" in fit.status.reason
    assert "EM or SVI" in fit.status.reason


def test_learners_of_latents_refuse_a_model_without():
    fit = learn(logistic(), EM())
    assert fit.status.state == "unsupported"
    assert "ML" in fit.status.reason


def test_a_problem_without_parameters_cannot_be_learned():
    for problem in (beta_bernoulli(), discrete_net(), switching()):
        with pytest.raises(ProblemError, match="no parameters to learn"):
            learn(problem, EM())


# ---------------------------------------------------------------------------------------------------------------
# What a fit records


@pytest.mark.parametrize(
    ("problem", "learner", "kind", "length"),
    [
        (gaussian_mixture.problem(num_data=60), EM(num_steps=7, tolerance=0.0), "exact", 8),
        (ppca.problem(num_data=20), EM(e_step=Quadrature(num_nodes=3), num_steps=7, tolerance=0.0), "estimate", 8),
        (
            conjugate_gaussian.problem(num_data=20),
            EM(e_step=ImportanceSampling(num_samples=50, proposal="prior"), num_steps=7),
            "estimate",
            8,
        ),
        (
            conjugate_gaussian.problem(num_data=20),
            EM(e_step=ImportanceSampling(num_samples=50, proposal="prior"), num_steps=7, batch_size=5),
            "estimate",
            7,
        ),
        (
            conjugate_gaussian.problem(num_data=20),
            EM(e_step=SVI(num_steps=2, num_samples=20), num_steps=7),
            "lower bound",
            8,
        ),
        (
            conjugate_gaussian.problem(num_data=20),
            EM(e_step=NUTS(num_samples=3, warmup_steps=3, num_chains=1), num_steps=3),
            None,
            0,
        ),
        (conjugate_gaussian.problem(num_data=20), SVI(num_steps=7, num_samples=20), "lower bound", 7),
        (logistic(), ML(num_steps=7, optimizer=torch.optim.Adam), "exact", 7),
        (logistic(), ML(num_steps=7, batch_size=20), "estimate", 7),
    ],
    ids=["em", "em quadrature", "em is", "em is minibatch", "em svi", "em nuts", "svi", "ml", "ml minibatch"],
)
def test_the_trail_records_the_objective(problem, learner, kind, length):
    fit = learn(problem, learner)
    assert fit.status.done, fit.status
    trail = fit.trail
    assert len(trail) == length == len(trail.value) == len(trail.std_error) == len(trail.seconds)
    if kind is not None:
        assert trail.kind == kind
        assert trail.step.tolist() == list(range(length))
        assert bool(trail.value.isfinite().all())
        assert bool((trail.seconds.diff() >= 0).all())
        assert bool((trail.std_error >= 0).all())
        if kind == "exact":
            assert bool((trail.std_error == 0).all())
        if isinstance(getattr(learner, "e_step", None), ImportanceSampling | SVI):
            assert bool((trail.std_error > 0).all())


def test_the_trail_of_importance_em_is_the_log_likelihood_within_its_error():
    """At each of 20 theta: |z| < 4.9, and z of about unit size."""
    problem = conjugate_gaussian.problem(num_data=50)
    for batch_size in (None, 20):
        learner = EM(
            e_step=ImportanceSampling(num_samples=300, proposal="prior"), m_step="gradient", num_steps=20,
            learning_rate=1e-12, batch_size=batch_size,
        )  # fmt: skip
        trail = learn(problem, learner).trail
        exact = float(problem.reference_at({"theta": scalar(0.0)}).log_evidence.value.sum())
        if batch_size is None:
            z = (trail.value - exact) / trail.std_error
            assert float(z.abs().max()) < 4.9
            assert 0.4 < float(z.square().mean()) < 2.5
        else:  # the choice of the rows adds to the spread, not to the mean
            t = (trail.value.mean() - exact) / (trail.value.std() / math.sqrt(20))
            assert abs(float(t)) < 7.4


@pytest.mark.parametrize("total", [10, 1000, 1001])
def test_a_long_trail_is_averaged_in_blocks(total):
    """At most 200 or so figures; none lost, the last step among them; the error is that of the block's mean."""
    writer = TrailWriter("lower bound", total)
    values = torch.randn(total, generator=torch.Generator().manual_seed(0), dtype=F64)
    for step, value in enumerate(values):
        writer.add(step, value)
    trail = writer.trail()
    block = math.ceil(total / 200)
    assert len(trail) <= 201
    assert int(trail.step[-1]) == total - 1
    torch.testing.assert_close(trail.value[0], values[:block].mean())
    if block > 1:
        torch.testing.assert_close(trail.std_error[0], values[:block].std() / math.sqrt(block))


def test_guide_parameters_are_those_that_were_trained():
    """An untrained guide must not pass for a learned one; a trained one is there, by name, and is used."""
    problem = conjugate_gaussian.problem(num_data=20)
    phi = {"slope", "intercept", "scale"}
    assert not learn(problem, EM(e_step=Quadrature(num_nodes=4), num_steps=3)).guide_parameters
    assert not learn(problem, SVI(guide="AutoNormal", num_steps=3)).guide_parameters
    trained = learn(problem, SVI(num_steps=300, num_particles=10, learning_rate=0.02))
    assert set(trained.guide_parameters) == phi
    assert set(trained.parameters) == {"theta"}
    variational = learn(problem, EM(e_step=SVI(num_steps=5, num_samples=10), num_steps=3))
    assert set(variational.guide_parameters) == phi
    posterior = infer(problem, ImportanceSampling(num_samples=100), parameters=trained)
    assert posterior.cost.tuning_evaluations == 0  # the learned guide was the proposal: no pilot was needed
    assert float(posterior.log_evidence.std_error.max()) < 0.1


def test_a_fit_is_the_theta_of_what_comes_after():
    problem = conjugate_gaussian.problem(num_data=20)
    fit = learn(problem, EM(e_step=Quadrature(num_nodes=4), num_steps=40, tolerance=0.0))
    theta = fit.parameters["theta"]
    for parameters in (fit, fit.parameters):
        posterior = infer(problem, Quadrature(num_nodes=4), parameters=parameters)
        assert torch.equal(posterior.parameters["theta"], theta)
        torch.testing.assert_close(posterior.mean("z"), (problem.args[0] + theta) / 2, rtol=1e-9, atol=1e-9)
    onward = learn(problem, EM(e_step=Quadrature(num_nodes=4), num_steps=1), parameters=fit)
    assert float(onward.parameters["theta"]) == pytest.approx(float(theta), abs=1e-7)
    start = learn(problem, EM(e_step=Quadrature(num_nodes=4), num_steps=1), parameters={"theta": scalar(5.0)})
    assert float(start.parameters["theta"]) == pytest.approx((float(problem.args[0].mean()) + 5) / 2, abs=1e-9)


def test_progress_is_told():
    told: list[tuple[str, int, int]] = []
    learn(conjugate_gaussian.problem(num_data=5), EM(num_steps=3), progress=lambda *step: told.append(step))
    assert [step for _, step, total in told if total == 3] == [1, 2, 3]


def test_em_chooses_enumeration_where_it_serves():
    fit = learn(gaussian_mixture.problem(num_data=10), EM(num_steps=2))
    assert fit.posterior.log_evidence.kind == "exact"
    fit = learn(conjugate_gaussian.problem(num_data=10), EM(num_steps=2))
    assert fit.posterior.log_evidence.kind == "estimate"
    assert fit.posterior.num_samples == 100


def test_a_learner_that_diverges_fails_with_the_step():
    exact, sgd = Quadrature(num_nodes=4), torch.optim.SGD
    for learner in (
        SVI(num_steps=300, learning_rate=1e6, optimizer=sgd),
        EM(e_step=exact, m_step="gradient", optimizer=sgd, learning_rate=1e9, num_steps=300),
    ):
        fit = learn(conjugate_gaussian.problem(num_data=20), learner)
        assert fit.status.state == "failed", fit.notes  # an infinite log likelihood has not converged
        assert fit.status.reason
        assert fit.posterior is None


# ---------------------------------------------------------------------------------------------------------------
# The M-step that a problem declares


@pytest.mark.parametrize(
    ("m_step", "message"),
    [
        (lambda draws, weights, x: {"thta": scalar(0.0)}, "'thta'"),
        (lambda draws, weights, x: {"theta": torch.zeros(2, dtype=F64)}, r"theta.*shape"),
        (lambda draws, weights, x: {"theta": scalar(math.nan)}, "theta"),
        (lambda draws, weights, x: scalar(0.0), "m_step"),
        (lambda draws, weights, x: None, "m_step"),
        (lambda draws: {"theta": scalar(0.0)}, "m_step"),
        (lambda draws, weights, x: {}, "m_step"),
    ],
    ids=["unknown name", "shape", "nan", "tensor", "none", "arguments", "empty"],
)
def test_an_m_step_declared_wrongly_is_a_clear_error(m_step, message):
    problem = conjugate_gaussian.problem(num_data=5)
    wrong = Problem(problem.model, args=problem.args, m_step=m_step)
    with pytest.raises(ProblemError, match=message):
        learn(wrong, EM(e_step=Quadrature(num_nodes=4), num_steps=2))


def test_an_m_step_outside_its_constraint_is_a_clear_error():
    problem = gaussian_mixture.problem(num_data=10)
    m_step = lambda draws, weights, x: {"scales": -torch.ones(3, 2, dtype=F64)}  # noqa: E731
    with pytest.raises(ProblemError, match="'scales'"):
        learn(Problem(problem.model, args=problem.args, m_step=m_step), EM(num_steps=2))


def test_the_closed_m_step_sees_draws_weights_and_data():
    """Shapes as promised: draws (S, N), weights (S, N) that sum to one over S, the data as they are."""
    seen: list[Any] = []
    problem = conjugate_gaussian.problem(num_data=6)

    def m_step(draws, weights, x):
        seen.append((draws["z"].shape, weights.shape, weights.sum(0), x))
        return conjugate_gaussian.m_step(draws, weights, x)

    engine = ImportanceSampling(num_samples=9, proposal="prior")
    learn(Problem(problem.model, args=problem.args, m_step=m_step), EM(e_step=engine, num_steps=2))
    for draws, weights, total, x in seen:
        assert draws == weights == (9, 6)
        torch.testing.assert_close(total, torch.ones(6, dtype=F64))
        assert torch.equal(x, problem.args[0])
    assert len(seen) == 2


def test_closed_forms_and_minibatches_exclude_one_another():
    problem = conjugate_gaussian.problem(num_data=10)
    with pytest.raises(ProblemError, match="all data"):
        learn(problem, EM(m_step="closed", batch_size=5))
    with pytest.raises(ProblemError, match="no closed-form M-step"):
        learn(Problem(problem.model, args=problem.args), EM(m_step="closed"))


def test_em_refuses_minibatches_of_a_global_latent():
    problem = gaussian_mixture.problem(case="merging", num_data=10)
    fit = learn(problem, EM(e_step=Quadrature(num_nodes=4), batch_size=5))
    assert fit.status.state == "unsupported"
    assert "global" in fit.status.reason


# ---------------------------------------------------------------------------------------------------------------
# Wherever theta lives


class Owned(nn.Module):
    """theta in an `nn.Module` that is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(scalar(0.0))
        self.log_scale = nn.Parameter(scalar(0.0))

    def forward(self, x: Tensor) -> None:
        observe(x, self.loc, self.log_scale.exp())

    def program(self, x: Tensor) -> None:
        self(x)


class Constrained(PyroModule):
    """theta in a `PyroModule`, one of it constrained."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(scalar(0.0))
        self.scale = PyroParam(scalar(1.0), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        observe(x, self.loc, self.scale)


def observe(x: Tensor, loc: Tensor, scale: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def in_store() -> tuple[Any, dict[str, Tensor]]:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: scalar(0.0))
        observe(x, loc, pyro.param("scale", lambda: scalar(1.0), constraint=constraints.positive))

    return model, {}


def owned() -> tuple[Any, dict[str, Tensor]]:
    module = Owned()
    return module, dict(module.named_parameters())


def bound_method() -> tuple[Any, dict[str, Tensor]]:
    module = Owned()
    return module.program, dict(module.named_parameters())


def pyro_module() -> tuple[Any, dict[str, Tensor]]:
    module = Constrained()
    return module, dict(module.named_parameters())


def closed_over() -> tuple[Any, dict[str, Tensor]]:
    net = Owned()

    def model(x: Tensor) -> None:
        observe(x, net.loc, net.log_scale.exp())

    return model, dict(net.named_parameters())


def registered() -> tuple[Any, dict[str, Tensor]]:
    net = Owned()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        observe(x, net.loc, net.log_scale.exp())

    return model, dict(net.named_parameters())


def plain_leaves() -> tuple[Any, dict[str, Tensor]]:
    loc, log_scale = scalar(0.0).requires_grad_(), scalar(0.0).requires_grad_()

    def model(x: Tensor) -> None:
        observe(x, loc, log_scale.exp())

    return model, {"loc": loc, "log_scale": log_scale}


PLACES = {
    "pyro.param": (in_store, {"loc", "scale"}),
    "nn.Module": (owned, {"loc", "log_scale"}),
    "bound method": (bound_method, {"loc", "log_scale"}),
    "PyroModule": (pyro_module, {"loc", "scale"}),
    "closure": (closed_over, {"net.loc", "net.log_scale"}),
    "pyro.module": (registered, {"net.loc", "net.log_scale"}),
    "plain leaves": (plain_leaves, {"loc", "log_scale"}),
}
PLACE_X = 1.5 + 2.0 * torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "learner",
    [
        EM(e_step=Quadrature(num_nodes=4), m_step="full", num_steps=60),
        SVI(guide="AutoNormal", num_steps=900, num_particles=20, learning_rate=0.02, num_samples=50),
    ],
    ids=["em", "svi"],
)
def test_theta_is_found_named_and_learned_wherever_it_lives(place, learner):
    """x ~ N(loc, scale^2 + 1): loc = mean(x), scale^2 = var(x) - 1 (n in the denominator). The user's tensors keep
    their values, dtypes, gradients and flags. SVI's Adam leaves 0.03."""
    make, names = PLACES[place]
    model, tensors = make()
    for t in tensors.values():
        t.grad = torch.full_like(t, 3.0)
    before = {n: (t.detach().clone(), t.dtype, t.requires_grad, t.grad, t.data_ptr()) for n, t in tensors.items()}
    fit = learn(Problem(model, args=(PLACE_X,)), learner)
    assert fit.status.done, fit.status
    assert set(fit.parameters) == names
    tolerance = 1e-4 if isinstance(learner, EM) else 0.15
    found = {n.removeprefix("net."): float(v) for n, v in fit.parameters.items()}
    scale = found["scale"] if "scale" in found else math.exp(found["log_scale"])
    assert found["loc"] == pytest.approx(float(PLACE_X.mean()), abs=tolerance)
    assert scale == pytest.approx(math.sqrt(float(PLACE_X.var(correction=0)) - 1), abs=tolerance)
    for n, (value, dtype, requires_grad, grad, pointer) in before.items():
        t = tensors[n]
        assert torch.equal(t.detach(), value)
        assert (t.dtype, t.requires_grad, t.data_ptr()) == (dtype, requires_grad, pointer)
        assert t.grad is grad
        assert bool((grad == 3.0).all())
    assert not pyro.get_param_store().keys()
    judged = infer(Problem(model, args=(PLACE_X,)), Quadrature(num_nodes=4), parameters=fit)
    assert_same(dict(judged.parameters), dict(fit.parameters))


def test_a_run_starts_from_what_plain_pyro_trained():
    """A value in the param store is theta; learning goes on from it and leaves it there."""
    problem = conjugate_gaussian.problem(num_data=20)
    pyro.param("theta", scalar(4.0))
    assert float(infer(problem, Quadrature(num_nodes=4)).parameters["theta"]) == 4.0
    fit = learn(problem, EM(e_step=Quadrature(num_nodes=4), num_steps=1))
    assert float(fit.parameters["theta"]) == pytest.approx((float(problem.args[0].mean()) + 4) / 2, abs=1e-9)
    assert float(pyro.param("theta").detach()) == 4.0


def test_frozen_parameters_stay_where_they_are():
    """requires_grad=False takes a parameter out of theta."""
    module = Owned()
    module.log_scale.requires_grad_(False)
    fit = learn(Problem(module, args=(PLACE_X,)), EM(e_step=Quadrature(num_nodes=4), m_step="full", num_steps=60))
    assert set(fit.parameters) == {"loc"}
    assert float(fit.parameters["loc"]) == pytest.approx(float(PLACE_X.mean()), abs=1e-5)


def test_a_module_shared_by_model_and_guide_is_theta_once():
    """theta in the guide too: found once, moved once."""

    def model(x: Tensor) -> None:
        observe(x, pyro.param("loc", lambda: scalar(0.0)), scalar(1.0))

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: scalar(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + loc) / 2, math.sqrt(0.5)))

    fit = learn(Problem(model, args=(PLACE_X,), guide=guide), SVI(num_steps=600, num_particles=10, learning_rate=0.02))
    assert set(fit.parameters) == {"loc"}
    assert not fit.guide_parameters
    assert float(fit.parameters["loc"]) == pytest.approx(float(PLACE_X.mean()), abs=0.1)


def test_float32_networks_learn_and_come_back_in_float32():
    """The VAE: the bound rises by 5 nats a datum in 150 steps; its own networks are not touched."""
    problem = vae.problem(num_train=200, num_test=0, hidden=16)
    fit = learn(problem, SVI(num_steps=300, batch_size=50, learning_rate=0.01, num_samples=20))
    assert fit.status.done, fit.status
    assert float(fit.trail.value[-20:].mean() - fit.trail.value[:20].mean()) > 5 * 200
    assert all(v.dtype == torch.float32 for v in fit.parameters.values())
    assert all(name.startswith("decoder.") for name in fit.parameters)
    assert all(name.startswith("encoder.") for name in fit.guide_parameters)
    before = infer(problem, Quadrature(num_nodes=8)).log_evidence.total()[0]
    after = infer(problem, Quadrature(num_nodes=8), parameters=fit).log_evidence.total()[0]
    assert after - before > 5 * 200


def test_em_learns_a_network_through_importance_sampling():
    """The wake-phase update on a small decoder: the evidence by quadrature rises at every look."""
    problem = vae.problem(num_train=40, num_test=0, hidden=8)
    evidence, parameters = [], None
    for _ in range(3):
        learner = EM(e_step=ImportanceSampling(num_samples=50, proposal="prior"), num_steps=15, learning_rate=0.02)
        fit = learn(problem, learner, parameters=parameters)
        parameters = fit
        evidence.append(infer(problem, Quadrature(num_nodes=10), parameters=fit).log_evidence.total()[0])
    assert evidence[0] < evidence[1] < evidence[2]
    assert evidence[2] - evidence[0] > 40
