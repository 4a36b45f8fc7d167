"""The sequential families: each density against one by numpy, each reference against a second computation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from close import assert_close, tensors
from pyro import poutine
from scipy import stats

from pyrometer.inference.problem import ProblemError
from pyrometer.models import deep_markov, hidden_markov, linear_gaussian_ssm, noisy_autoregression

F64 = torch.float64


@pytest.fixture(autouse=True)
def _own_param_store():
    with pyro.get_param_store().scope():
        yield


def log_joint(problem, values, parameters):
    fixed = poutine.condition(poutine.substitute(problem.model, data=parameters), data=values)
    trace = poutine.trace(fixed).get_trace(*problem.args)
    return float(trace.log_prob_sum().detach())


def start_of(problem):
    with pyro.get_param_store().scope():
        trace = poutine.trace(problem.model).get_trace(*problem.args)
    return {n.replace("$$$", "."): v["value"].detach().double() for n, v in trace.nodes.items() if v["type"] == "param"}


# -- densities ---------------------------------------------------------------------------------------------------


def markov_theta(rng, k, kind):
    theta = {"initial": rng.dirichlet(np.ones(k)), "transition": rng.dirichlet(np.ones(k), k)}
    if kind == "normal":
        return theta | {"locs": rng.normal(size=(k, 2)), "scales": rng.gamma(3.0, 0.5, size=(k, 2))}
    return theta | {"emission": rng.dirichlet(np.ones(4), k)}


def path_density(theta, x, z):
    """log p(x, z) of one sequence, written out."""
    total = math.log(theta["initial"][z[0]])
    for t, state in enumerate(z):
        if t:
            total += math.log(theta["transition"][z[t - 1], state])
        if "emission" in theta:
            total += math.log(theta["emission"][state, x[t]])
        else:
            total += stats.norm.logpdf(x[t], theta["locs"][state], theta["scales"][state]).sum()
    return total


def markov_case(kind):
    def case(rng):
        problem = hidden_markov.problem(num_data=3, num_steps=5, emissions=kind, data_dim=2)
        theta, z = markov_theta(rng, 3, kind), rng.integers(3, size=(3, 5))
        expected = sum(path_density(theta, x, path) for x, path in zip(problem.args[0].numpy(), z, strict=True))
        return problem, {f"z_{t}": torch.as_tensor(z[:, t]) for t in range(5)}, tensors(**theta), expected

    return case


def ssm_case(rng):
    problem = linear_gaussian_ssm.problem(num_data=3, num_steps=4, latent_dim=2, data_dim=3)
    x, z = problem.args[0].numpy(), rng.normal(size=(3, 4, 2))
    A, C, q, r = rng.normal(size=(2, 2)), rng.normal(size=(3, 2)), rng.gamma(2, size=2), rng.gamma(2, size=3)
    expected = stats.norm.logpdf(z[:, 0]).sum() + stats.norm.logpdf(x, z @ C.T, r).sum()
    expected += stats.norm.logpdf(z[:, 1:], z[:, :-1] @ A.T, q).sum()
    theta = tensors(transition=A, emission=C, transition_scale=q, emission_scale=r)
    return problem, tensors(**{f"z_{t}": z[:, t] for t in range(4)}), theta, expected


def autoregression_case(rng):
    problem = noisy_autoregression.problem(num_steps=5, noise=0.5)
    x, z, a, q = problem.args[0].numpy(), rng.normal(size=5), rng.normal(), rng.gamma(2)
    expected = stats.norm.logpdf(a, 0.5, 0.3) + stats.lognorm.logpdf(q, 0.4, scale=0.5) + stats.norm.logpdf(z[0])
    expected += stats.norm.logpdf(z[1:], a * z[:-1], q).sum() + stats.norm.logpdf(x, z, 0.5).sum()
    return problem, tensors(a=a, q=q, **{f"z_{t}": z[t] for t in range(5)}), {}, expected


def networks(theta):
    """Transition and emission of a deep Markov model by numpy: z (...) -> mean, sd, and means (..., D)."""
    w = {n.removeprefix("model."): v.numpy() for n, v in theta.items()}

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def step(z):
        out = linear("step.outer", np.tanh(linear("step.inner", z[..., None])))
        return z + out[..., 0], 0.2 + np.logaddexp(0, out[..., 1])

    return step, lambda z: linear("outer", np.tanh(linear("inner", z[..., None])))


def deep_case(rng):
    problem = deep_markov.problem(num_data=3, num_steps=4, hidden=5, seed=int(rng.integers(100)))
    theta = start_of(problem)
    x, z = problem.args[0].numpy(), rng.normal(size=(3, 4)) * 2
    step, emit = networks(theta)
    expected = stats.norm.logpdf(z[:, 0]).sum() + stats.norm.logpdf(x, emit(z), 0.5).sum()
    expected += stats.norm.logpdf(z[:, 1:], *step(z[:, :-1])).sum()
    return problem, tensors(**{f"z_{t}": z[:, t] for t in range(4)}), theta, expected


CASES = {
    "normal": markov_case("normal"),
    "categorical": markov_case("categorical"),
    "linear_gaussian_ssm": ssm_case,
    "noisy_autoregression": autoregression_case,
    "deep_markov": deep_case,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_log_joint_equals_a_second_density(case):
    rng = np.random.default_rng(1)
    for _ in range(20):
        problem, values, theta, expected = case(rng)
        with pyro.get_param_store().scope():
            assert_close(log_joint(problem, values, {} if theta.get("noise") is not None else theta), expected, 1e-8)


# -- references --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "categorical"])
def test_forward_backward_is_the_sum_over_paths(kind):
    problem = hidden_markov.problem(num_data=2, num_steps=4, emissions=kind, data_dim=2)
    theta = markov_theta(np.random.default_rng(2), 3, kind)
    reference = problem.reference_at(tensors(**theta))
    paths = np.array(list(itertools.product(range(3), repeat=4)))
    for n, x in enumerate(problem.args[0].numpy()):
        log_p = np.array([path_density(theta, x, path) for path in paths])
        assert_close(reference.log_weights[:, n], log_p, 1e-10)
        evidence = np.logaddexp.reduce(log_p)
        assert_close(reference.log_evidence.value[n], evidence, 1e-10)
        weight = np.exp(log_p - evidence)
        for t in range(4):
            mean = weight @ paths[:, t]
            assert_close(reference.mean[f"z_{t}"][n], mean, 1e-10)
            assert_close(reference.sd[f"z_{t}"][n], math.sqrt(weight @ (paths[:, t] - mean) ** 2), 1e-8)


def test_kalman_is_the_joint_normal():
    problem = linear_gaussian_ssm.problem(num_data=3, num_steps=4, latent_dim=2, data_dim=3)
    rng = np.random.default_rng(3)
    A, C, q, r = rng.normal(size=(2, 2)), rng.normal(size=(3, 2)), rng.gamma(2, size=2), rng.gamma(2, size=3)
    theta = tensors(transition=A, emission=C, transition_scale=q, emission_scale=r)
    reference = problem.reference_at(theta)
    # z = L e with e standard normal, x = blockdiag(C) z + noise
    L = np.zeros((8, 8))
    for t in range(4):
        for s in range(t + 1):
            L[2 * t : 2 * t + 2, 2 * s : 2 * s + 2] = np.linalg.matrix_power(A, t - s) @ (
                np.diag(q) if s else np.eye(2)
            )
    prior, big_c = L @ L.T, np.kron(np.eye(4), C)
    marginal = big_c @ prior @ big_c.T + np.diag(np.tile(r**2, 4))
    gain = prior @ big_c.T @ np.linalg.inv(marginal)
    x = problem.args[0].numpy().reshape(3, -1)
    assert_close(reference.log_evidence.value, stats.multivariate_normal.logpdf(x, np.zeros(12), marginal), 1e-10)
    mean, sd = (x @ gain.T).reshape(3, 4, 2), np.sqrt(np.diag(prior - gain @ big_c @ prior)).reshape(4, 2)
    for t in range(4):
        assert_close(reference.mean[f"z_{t}"], mean[:, t], 1e-9)
        assert_close(reference.sd[f"z_{t}"], np.tile(sd[t], (3, 1)), 1e-9)


def test_autoregression_by_another_rule():
    """Gauss-Hermite nodes for a and log q, and the joint normal of x and z in place of the Kalman filter."""
    problem = noisy_autoregression.problem(num_steps=3)
    (x,) = problem.args
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    rows = []
    for (u, wu), (v, wv) in itertools.product(zip(nodes, weights, strict=True), repeat=2):
        a, q = 0.5 + 0.3 * u, math.exp(math.log(0.5) + 0.4 * v)
        L = np.array([[1, 0, 0], [a, q, 0], [a * a, a * q, q]])
        prior = L @ L.T
        marginal = prior + 0.8**2 * np.eye(3)
        density = stats.multivariate_normal.pdf(x.numpy(), np.zeros(3), marginal)
        gain = prior @ np.linalg.inv(marginal)
        z, var = gain @ x.numpy(), np.diag(prior - gain @ prior)
        first, second = np.array([a, q, *z]), np.array([a**2, q**2, *(z**2 + var)])
        rows.append(wu * wv / (2 * math.pi) * density * np.array([1.0, *first, *second]))
    total = np.sum(rows, 0)
    reference = problem.reference_at({})
    assert_close(reference.log_evidence.value, math.log(total[0]), 1e-7)
    mean, second = total[1:6] / total[0], total[6:] / total[0]
    for name, m, s in zip(["a", "q", "z_0", "z_1", "z_2"], mean, np.sqrt(second - mean**2), strict=True):
        assert_close(reference.mean[name], m, 1e-6)
        assert_close(reference.sd[name], s, 1e-6)
        assert float(reference.mean_error[name]) < 1e-6


def test_deep_markov_by_another_grid():
    """Two steps, as an integral over the plane by numpy."""
    problem = deep_markov.problem(num_data=2, num_steps=2, hidden=6)
    theta = start_of(problem)
    reference = problem.reference_at(theta)
    step, emit = networks(theta)
    grid = np.linspace(-11, 11, 1701)
    loc, sd = step(grid)
    log_prior = stats.norm.logpdf(grid)[:, None] + stats.norm.logpdf(grid, loc[:, None], sd[:, None])
    for n, x in enumerate(problem.args[0].numpy()):
        seen = stats.norm.logpdf(x[:, None], emit(grid), 0.5).sum(-1)
        log_p = log_prior + seen[0][:, None] + seen[1]
        top = log_p.max()
        p = np.exp(log_p - top)
        evidence = top + math.log(p.sum()) + 2 * math.log(grid[1] - grid[0])
        assert abs(float(reference.log_evidence.value[n]) - evidence) < 1e-5
        for t, marginal in enumerate((p.sum(1), p.sum(0))):
            weight = marginal / marginal.sum()
            mean = weight @ grid
            assert abs(float(reference.mean[f"z_{t}"][n]) - mean) < 1e-5
            assert abs(float(reference.sd[f"z_{t}"][n]) - math.sqrt(weight @ (grid - mean) ** 2)) < 1e-5
    assert float(reference.log_evidence.std_error.max()) < 1e-5


# -- learning and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "categorical"])
def test_the_m_step_is_the_maximiser(kind):
    generator = torch.Generator().manual_seed(3)
    problem = hidden_markov.problem(num_data=4, num_steps=6, emissions=kind, data_dim=2)
    (x,) = problem.args
    draws = {f"z_{t}": torch.randint(3, (7, 4), generator=generator) for t in range(6)}
    weights = torch.rand(7, 4, generator=generator, dtype=F64)
    weights = weights / weights.sum(0)
    theta = problem.m_step(draws, weights, x)
    assert set(theta) == set(start_of(problem))

    def expected(free):
        theta = {n: torch.softmax(v, -1) if n in ("initial", "transition", "emission") else v for n, v in free.items()}
        likelihood = hidden_markov.log_likelihoods(theta, x)
        total = theta["initial"].log()[draws["z_0"]]
        for t in range(6):
            if t:
                total = total + theta["transition"].log()[draws[f"z_{t - 1}"], draws[f"z_{t}"]]
            total = total + likelihood[torch.arange(4), t, draws[f"z_{t}"]]
        return (weights * total).sum()

    free = {n: v.log() if n in ("initial", "transition", "emission") else v for n, v in theta.items()}
    free = {n: v.clamp_min(-30).clone().requires_grad_() for n, v in free.items()}
    for gradient in torch.autograd.grad(expected(free), free.values()):
        assert float(gradient.abs().max()) < 1e-7


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (hidden_markov, {"emissions": "gaussian"}, "expected one of normal, categorical"),
        (hidden_markov, {"num_states": 1}, "num_states=1"),
        (hidden_markov, {"stay": 1.0}, "stay=1.0"),
        (hidden_markov, {"num_steps": 1}, "num_steps=1"),
        (linear_gaussian_ssm, {"transition_scale": 0.0}, "transition_scale=0.0"),
        (linear_gaussian_ssm, {"num_data": 0}, "num_data=0"),
        (noisy_autoregression, {"noise": -1.0}, "noise=-1.0"),
        (deep_markov, {"hidden": 0}, "hidden=0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(family, settings, message):
    with pytest.raises(ProblemError, match=message):
        family.problem(**settings)


@pytest.mark.parametrize("family", [hidden_markov, linear_gaussian_ssm, noisy_autoregression, deep_markov])
def test_same_seed_same_problem_and_nothing_else_is_touched(family):
    before = torch.get_rng_state()
    first, again, other = (family.problem(seed=s) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.args[0], again.args[0])
    assert not torch.equal(first.args[0], other.args[0])
    for name, value in start_of(first).items():
        assert torch.equal(value, start_of(again)[name])
