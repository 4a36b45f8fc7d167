"""Densities of the zoo's programs against those written by hand, their gradients, and their compiled forms.

All points are drawn with fixed seeds, and nothing here is statistical but the check of the zoo's own evidence.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from close import assert_close
from scipy import stats
from zoo import EXACT, ZOO
from zoo.entry import Mixture, Tabulated

from pyrometer.inference import ImportanceSampling, infer
from pyrometer.inference.density import Density

F64 = torch.float64
POINTS = 100
LONG = ("predator_and_prey", "stochastic_volatility", "exponential_smoothing", "many_sites", "hidden_markov_by_hand")
# loops that take 5 to 40 s to trace and compile; `garch` is one of 200 steps that stays


@cache
def entry_of(name):
    return ZOO[name]()


def points(density, count=POINTS, seed=1):
    """u (count, *batch, D) around zero, where every support is met well inside its bounds."""
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * torch.randn((count, *density.batch_shape, density.dim), generator=generator, dtype=F64)


def by_hand(entry, density, values, args=None):
    """The second density at values, site -> (count, *batch, *event); returns (count, *batch)."""
    theta = {n: v.numpy() for n, v in density.theta.values().items()}
    args = [a.numpy() for a in (entry.problem.args if args is None else args)]
    count = len(next(iter(values.values())))
    rows = ({n: v[i].numpy() for n, v in values.items()} for i in range(count))
    return torch.tensor(np.array([entry.log_joint(row, theta, *args) for row in rows]), dtype=F64)


def moved_theta(density, seed=3):
    """Values of theta away from where it stands, inside its constraints; {} where there is none."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, value in density.theta.values().items():
        noise = torch.randn(value.shape, generator=generator, dtype=F64)
        values[name] = value * (1 + 0.3 * noise.tanh())
        if bool((value > 0).all()) and value.dim() and math.isclose(float(value.sum()), 1.0, rel_tol=1e-6):
            values[name] = values[name] / values[name].sum()
    return values


@pytest.fixture(params=ZOO)
def name(request):
    return request.param


def test_the_log_joint_is_the_one_written_by_hand(name):
    """At 100 points, 1e-8 relative; and so after theta has moved."""
    entry = entry_of(name)
    density = Density(entry.problem)
    for theta in ({}, moved_theta(density)):
        density.set_parameters(theta)
        with density, torch.no_grad():
            values = density.constrain(points(density))
            assert_close(density.log_joint(values), by_hand(entry, density, values), 1e-8)


def test_u_maps_to_values_and_back_with_the_jacobian_of_the_map(name):
    """The round trip to 1e-10; log_joint(u) - log_joint(values) = log |det d values / du| by autodiff to 1e-8."""
    entry = entry_of(name)
    density = Density(entry.problem)
    u = points(density, 3)
    with density, torch.no_grad():
        assert_close(density.unconstrain(density.constrain(u)), u, 1e-10)

    def coordinates(flat):
        values = density.constrain(flat.reshape(u.shape[1:]))
        return torch.cat([entry.coordinates.get(n, lambda v: v)(v).reshape(-1) for n, v in values.items()])

    with density:
        jacobian = torch.autograd.functional.jacobian(coordinates, u[0].reshape(-1))
        difference = (density.log_joint(u[0]) - density.log_joint(density.constrain(u[0]))).detach()
    assert jacobian.shape[0] == jacobian.shape[1]
    assert_close(difference.sum(), torch.linalg.slogdet(jacobian).logabsdet, 1e-8)


def test_the_gradient_is_that_of_central_differences(name):
    """Along 10 random directions at each of 10 points, 1e-5 of the gradient's length: a wrong coordinate is in all."""
    density = Density(entry_of(name).problem)
    u, step = points(density, 10), 1e-5
    directions = points(density, 10, seed=2)
    directions = directions / directions.flatten(1).norm(dim=1).reshape(-1, *[1] * (u.dim() - 1))
    with density, torch.no_grad():
        _, gradient = density.value_and_grad(u)
        up, down = (density.log_joint(u[:, None] + s * step * directions).reshape(10, 10, -1).sum(-1) for s in (1, -1))
    along = torch.einsum("pi,di->pd", gradient.flatten(1), directions.flatten(1))
    size = 1 + gradient.flatten(1).norm(dim=1)[:, None]
    assert_close((up - down) / (2 * step) / size, along / size, 1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in ZOO])
def test_the_compiled_density_equals_the_program(name):
    """Value and gradient at 20 points, 1e-9 relative; and so after theta has moved."""
    density = Density(entry_of(name).problem)
    u = points(density, 20)
    with density, torch.no_grad():
        compiled = density.compiled(u[0])
        assert compiled.backend != "eager", compiled.why
        assert_same_as_eager(density, compiled, u)
        if theta := moved_theta(density):
            before = compiled(u[0])[0].clone()
            density.set_parameters(theta)
            assert_same_as_eager(density, compiled, u)
            assert not torch.equal(compiled(u[0])[0], before)


OTHER_DATA = (
    "gamma_poisson",
    "correlated",
    "asymmetric",
    "normal_inverse_gamma",
    "gaussian_process",
    "learned_mixture",
)


@pytest.mark.parametrize("name", OTHER_DATA)
def test_a_program_compiled_for_other_data_answers_with_them(name):
    """The same operations on numbers that differ: nothing of the first compilation is left in the second."""
    entry = entry_of(name)
    other = tuple(other_data(a) for a in entry.problem.args)
    answers = []
    for problem in (entry.problem, entry.problem.on(*other), entry.problem):
        density = Density(problem)
        u = points(density, 3)
        with density, torch.no_grad():
            compiled = density.compiled(u[0])
            assert_same_as_eager(density, compiled, u)
            values = density.constrain(u)
            jacobian = density.log_joint(u) - density.log_joint(values)
            answers.append(torch.stack([compiled(at)[0] for at in u]))
            assert_close(answers[-1] - jacobian, by_hand(entry, density, values, problem.args), 1e-8)
    assert torch.equal(answers[0], answers[2])
    assert not torch.allclose(answers[0], answers[1])


def other_data(x):
    """Other data of the same kind: real numbers shrunk, whole ones in another order."""
    if x.is_floating_point() and bool((x != x.round()).any()):
        return 0.9 * x
    return x.flip(0) if x.dim() else x + 1


def assert_same_as_eager(density, compiled, u):
    """At every row of u."""
    fast = [torch.stack(parts) for parts in zip(*(compiled(at) for at in u), strict=True)]
    for one, plain in zip(fast, density.value_and_grad(u), strict=True):
        assert_close(one, plain, 1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_the_evidence_of_the_zoo_is_that_of_importance_sampling(name):
    """2,000 draws: within 4.9 standard errors (1e-6), which are below 0.04 nats: it sees 0.2 nats at worst."""
    entry = entry_of(name)
    posterior = infer(entry.problem, ImportanceSampling(num_samples=2_000), seed=1)
    assert posterior.status.done, posterior.status
    error = float(posterior.log_evidence.std_error.square().sum().sqrt())
    assert error < 0.04
    assert abs(float(posterior.log_evidence.value.sum()) - entry.log_evidence) < 4.9 * error + 1e-9


def test_laws_of_the_zoo_are_those_of_a_mixture_of_normals():
    """A mixture by its parts and by its density on a grid; one part alone, and its evidence, by scipy."""
    grid = np.linspace(-14, 14, 56_001)
    for weights, laws in (
        ([0.3, 0.7], stats.norm(np.array([-1.0, 2.0]), np.array([0.5, 1.0]))),
        ([1.0], stats.norm([0.7], [1.3])),
    ):
        density = sum(w * laws.pdf(grid[:, None])[:, i] for i, w in enumerate(weights))
        by_parts, tabulated = Mixture(np.log(weights) + 5, laws), Tabulated(grid, np.log(density + 1e-300) - 3)
        assert tabulated.log_normaliser == pytest.approx(-3, abs=1e-10)
        for law in (by_parts, tabulated):
            mean = np.dot(weights, laws.mean())
            assert law.mean() == pytest.approx(mean, abs=1e-10)
            assert law.std() ** 2 == pytest.approx(np.dot(weights, laws.var() + laws.mean() ** 2) - mean**2, abs=1e-10)
            for q in (0.05, 0.5, 0.95):
                assert np.dot(weights, laws.cdf(law.ppf(q))) == pytest.approx(q, abs=1e-7)
