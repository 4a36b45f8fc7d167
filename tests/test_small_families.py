"""The small families and the simulators: each against a second density, each reference against a second computation.

All randomness is seeded. The z-tests refuse 1e-6 of the seeds each.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from test_models import assert_close, log_joint, tensors

from pyrometer.inference import ImportanceSampling, ProblemError, infer
from pyrometer.models import beta_binomial, bimodal, g_and_k, gamma_poisson, skewed, two_moons

F64 = torch.float64
LIMIT = 4.9


# -- every model against a second density ----------------------------------------------------------------------------


def beta_binomial_case(rng):
    problem, p = beta_binomial.problem(num_data=7, trials=12, a=1.5), rng.beta(1.5, 3.0, size=7)
    expected = stats.beta.logpdf(p, 1.5, 3).sum() + stats.binom.logpmf(problem.args[0].numpy(), 12, p).sum()
    return problem, tensors(p=p), expected


def gamma_poisson_case(rng):
    problem, rate = gamma_poisson.problem(num_data=7, shape=1.3), rng.gamma(1.3, 2.0, size=7)
    expected = stats.gamma.logpdf(rate, 1.3, scale=2).sum() + stats.poisson.logpmf(problem.args[0].numpy(), rate).sum()
    return problem, tensors(rate=rate), expected


def skewed_case(rng):
    z = rng.normal(-1, 2)
    return skewed.problem(a=0.7), tensors(z=z), stats.loggamma.logpdf(z, 0.7) - math.exp(z)


def bimodal_case(rng):
    z = rng.normal(0, 3)
    half = 2 / math.sqrt(0.9)
    parts = math.log(0.3) + stats.norm.logpdf(0, z + half), math.log(0.7) + stats.norm.logpdf(0, z - half)
    expected = stats.norm.logpdf(z, 0, 3) + np.logaddexp(*parts)
    return bimodal.problem(weight=0.3, separation=4.0), tensors(z=z), expected


def moon(theta, x):
    """log p(x | theta), written in polar coordinates around the centre of the crescent."""
    centre = complex(0.25 - abs(theta[0] + theta[1]) / math.sqrt(2), (theta[1] - theta[0]) / math.sqrt(2))
    arm = complex(*x) - centre
    if arm.real <= 0:
        return -math.inf
    return stats.norm.logpdf(abs(arm), 0.1, 0.01) - math.log(math.pi) - math.log(abs(arm))


def two_moons_case(rng):
    problem, theta = two_moons.problem(num_data=1, simulated=False), rng.uniform(-1, 1, size=(1, 2))
    expected = math.log(0.25) + sum(moon(t, x) for t, x in zip(theta, problem.args[0].numpy(), strict=True))
    return problem, tensors(theta=theta), expected


def g_and_k_density(x, A, B, g, k):
    def quantile(z):
        return A + B * (1 + 0.8 * (1 - math.exp(-g * z)) / (1 + math.exp(-g * z))) * (1 + z * z) ** k * z

    z = optimize.brentq(lambda z: quantile(z) - x, -30, 30, xtol=1e-14, rtol=1e-14)
    h = 1e-4
    rise = (8 * (quantile(z + h) - quantile(z - h)) - quantile(z + 2 * h) + quantile(z - 2 * h)) / (12 * h)
    return stats.norm.logpdf(z) - math.log(rise)


def g_and_k_case(rng):
    problem = g_and_k.problem(num_data=5, simulated=False)
    theta = rng.uniform([1, 1, 0.1, 0.1], [5, 3, 3, 1.5])
    expected = 4 * math.log(0.1) + sum(g_and_k_density(x, *theta) for x in problem.args[0].tolist())
    return problem, tensors(**dict(zip("ABgk", theta, strict=True))), expected


CASES = [beta_binomial_case, gamma_poisson_case, skewed_case, bimodal_case, two_moons_case, g_and_k_case]


@pytest.mark.parametrize("case", CASES)
def test_log_joint_equals_a_second_density(case):
    rng, compared = np.random.default_rng(1), 0
    for _ in range(30):
        problem, values, expected = case(rng)
        found = log_joint(problem, values, {})
        if math.isfinite(expected):
            assert_close(found, expected, 1e-7)
            compared += 1
        else:
            assert found == expected
    assert compared >= 3


def test_derivatives_of_g_and_k_are_those_of_differences():
    """The inverse is found without a graph; two steps with one give first and second derivatives."""
    at = torch.tensor([3.0, 1.2, 1.5, 0.4], dtype=F64, requires_grad=True)
    x = torch.tensor([2.1, 3.3, 9.0], dtype=F64)

    def log_density(v):
        return g_and_k.GAndK(*v).expand((3,)).log_prob(x).sum()

    assert torch.autograd.gradcheck(log_density, at, eps=1e-5, atol=1e-6)
    assert torch.autograd.gradgradcheck(log_density, at, eps=1e-5, atol=1e-5)


def test_densities_of_simulators_integrate_to_one_and_are_those_of_their_draws():
    law = g_and_k.GAndK(*(torch.tensor(v, dtype=F64) for v in g_and_k.TRUTH))

    def density(x):
        return math.exp(float(law.log_prob(torch.tensor(x, dtype=F64))))

    assert integrate.quad(density, -5, 200, points=[2.5, 3, 5], limit=200)[0] == pytest.approx(1, abs=1e-6)
    torch.manual_seed(1)
    share = (law.sample((40_000,)) < 3.5).double().mean()
    expected = integrate.quad(density, -5, 3.5, points=[2.5, 3])[0]
    assert abs(float(share) - expected) < LIMIT * math.sqrt(0.25 / 40_000)

    crescent = two_moons.Crescent(torch.tensor([0.3, -0.2], dtype=F64))
    grid = torch.linspace(-0.2, 0.2, 2_001, dtype=F64)
    points = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    mass = crescent.log_prob(points + crescent.added).exp() * (grid[1] - grid[0]) ** 2
    assert float(mass.sum()) == pytest.approx(1, abs=2e-3)  # cut along v = 0 by the grid
    draws = crescent.sample((40_000,)) - crescent.added
    for f in (lambda v: v[..., 0], lambda v: v[..., 1].square()):
        expected, values = float((mass * f(points)).sum()), f(draws)
        assert abs(float(values.mean()) - expected) < LIMIT * float(values.std()) / 200 + 2e-4


# -- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "site", "low", "high"),
    [
        (beta_binomial.problem(num_data=1), "p", 0.0, 1.0),
        (gamma_poisson.problem(num_data=1), "rate", 0.0, 60.0),
        (skewed.problem(), "z", -60.0, 6.0),
        (bimodal.problem(), "z", -12.0, 12.0),
        (bimodal.problem(weight=0.3).on(torch.tensor(0.4, dtype=F64)), "z", -12.0, 12.0),
    ],
)
def test_closed_forms_by_quadrature(problem, site, low, high):
    truth = problem.reference_at({})
    shape = truth.mean[site].shape

    def joint(z):
        return log_joint(problem, {site: torch.full(shape, z, dtype=F64)}, {})

    nodes, weights = np.polynomial.legendre.leggauss(40)
    edges = np.linspace(low, high, 13)
    z = ((edges[1:] + edges[:-1])[:, None] / 2 + (edges[1] - edges[0]) / 2 * nodes).ravel()
    mass = np.exp([joint(v) for v in z]) * np.tile(weights, 12) * (edges[1] - edges[0]) / 2
    mean = (mass * z).sum() / mass.sum()
    assert_close(truth.log_evidence.value.sum(), math.log(mass.sum()), 1e-8)
    assert_close(truth.mean[site].sum(), mean, 1e-8)
    assert_close(truth.sd[site].sum(), math.sqrt((mass * (z - mean) ** 2).sum() / mass.sum()), 1e-8)


def test_two_moons_reference_by_a_grid_of_theta():
    problem = two_moons.problem(num_data=2)
    truth = problem.reference_at({})
    grid = (torch.arange(2_000, dtype=F64) + 0.5) / 1_000 - 1
    theta = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    law = two_moons.Crescent(theta)
    for datum, x in enumerate(problem.args[0]):
        mass = law.log_prob(x).exp() * 1e-6 / 4
        total = mass.sum()
        mean = (mass[..., None] * theta).sum((0, 1)) / total
        sd = ((mass[..., None] * (theta - mean).square()).sum((0, 1)) / total).sqrt()
        assert abs(float(total.log() - truth.log_evidence.value[datum])) < 2e-3
        torch.testing.assert_close(mean, truth.mean["theta"][datum], atol=1e-3, rtol=0)
        torch.testing.assert_close(sd, truth.sd["theta"][datum], atol=1e-3, rtol=0)
        assert float(truth.mean_error["theta"].max()) < 1e-3


def test_exact_draws_of_two_moons_have_the_moments_of_the_reference():
    problem = two_moons.problem(num_data=3)
    truth = problem.reference_at({})
    z = (two_moons.exact_draws(problem.args[0], 20_000) - truth.mean["theta"]) / truth.sd["theta"]
    for values, expected in ((z, 0.0), (z.square(), 1.0)):
        error = values.std(0) / math.sqrt(20_000)
        assert bool(((values.mean(0) - expected).abs() < LIMIT * error + 1e-3).all())


def test_g_and_k_reference_by_importance_sampling():
    problem = g_and_k.problem(simulated=False)
    truth = problem.reference_at({})
    assert max(float(truth.mean_error[s] / truth.sd[s]) for s in "ABgk") < 0.03
    posterior = infer(problem, ImportanceSampling(num_samples=2_000, proposal="laplace"), seed=1)
    error = 1 / math.sqrt(posterior.diagnostics["ess"])
    for site in "ABgk":
        assert abs(float((posterior.mean(site) - truth.mean[site]) / truth.sd[site])) < LIMIT * error
        assert abs(float(posterior.sd(site) / truth.sd[site]) - 1) < 2 * LIMIT * error
    off = float(posterior.log_evidence.value - truth.log_evidence.value)
    both = math.hypot(float(posterior.log_evidence.std_error), float(truth.log_evidence.std_error))
    assert abs(off) < LIMIT * both


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (beta_binomial, {"trials": 0}, "trials=0"),
        (beta_binomial, {"a": 0.0}, "a=0.0.*above 0"),
        (beta_binomial, {"num_data": 1.5}, "num_data=1.5"),
        (gamma_poisson, {"b": -1.0}, "b=-1.0.*above 0"),
        (gamma_poisson, {"seed": -1}, "seed=-1"),
        (skewed, {"a": math.nan}, "a=nan"),
        (bimodal, {"weight": 1.0}, "weight=1.0.*below 1"),
        (bimodal, {"separation": -1.0}, "separation=-1.0"),
        (two_moons, {"simulated": "yes"}, "simulated='yes'"),
        (two_moons, {"num_data": 0}, "num_data=0"),
        (g_and_k, {"simulated": 1}, "simulated=1"),
        (g_and_k, {"num_data": 0}, "num_data=0"),
    ],
)
def test_bad_settings_are_refused_by_name(family, settings, message):
    with pytest.raises(ProblemError, match=message):
        family.problem(**settings)


@pytest.mark.parametrize("family", [beta_binomial, gamma_poisson, two_moons, g_and_k])
def test_same_seed_same_data_and_nothing_else_is_touched(family):
    before = torch.get_rng_state()
    first, again, other = (family.problem(seed=s).args[0] for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == F64
