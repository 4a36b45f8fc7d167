"""Annealed importance sampling against exact answers: unbiased from below, and bracketed from above.

200 copies of a datum are 200 runs of 16 chains. A figure fails by chance with 1e-6 at |z| < 4.9; about 50 of them make
5e-5. The standard error of mean Z-hat / Z is asserted to be below 0.03, so that an evidence wrong by 15 % is seen.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from annealed import MAKERS, correlated, gamma_poisson, guided
from torch import Tensor
from zoo import EXACT

from pyrometer.inference import SMC, AnnealedImportance, Problem, ProblemError, groups, infer, why_not
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Run, isolated
from pyrometer.inference.engines.annealed_importance import Bracket, bracket
from pyrometer.inference.kernels.metropolis import HMC
from pyrometer.inference.kernels.paths import PATHS, arithmetic, geometric, prior_to_posterior
from pyrometer.models import conjugate_gaussian, vae

F64 = torch.float64
RUNS, LIMIT = 200, 4.9


def errors(copies, engine, seed=1):
    posterior = infer(copies.problem, engine, seed=seed)
    assert posterior.status.done, posterior.status
    return posterior.log_evidence.value - copies.log_evidence, posterior


def assert_unbiased(off: Tensor) -> None:
    ratio = off.exp()
    error = float(ratio.std() / math.sqrt(len(off)))
    assert error <= 0.03
    assert abs(float(ratio.mean()) - 1) < LIMIT * error, ratio.mean()
    assert abs(float(off.mean())) <= 0.05


# -- forward: evidence and moments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MAKERS)
def test_evidence_is_unbiased_its_error_covers_and_the_moments_are_right(case):
    copies = MAKERS[case](RUNS)
    off, posterior = errors(copies, AnnealedImportance(num_samples=16, num_temperatures=80))
    assert_unbiased(off)
    assert 0.6 < float((off / posterior.log_evidence.std_error).square().mean()) < 2  # 15 degrees of freedom: 1.15
    x = posterior.draws[copies.site].reshape(1, 16, RUNS, -1)[..., 0]
    for power, expected in ((1, 0.0), (2, 1.0)):
        estimate = (posterior.weights() * ((x - copies.mean) / copies.sd) ** power).sum((0, 1))
        error = float(estimate.std() / math.sqrt(RUNS))
        assert error < 0.06
        assert abs(float(estimate.mean()) - expected) < LIMIT * error + 0.02  # ratio estimators: O(1 / S)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "sigmoid"},
        {"schedule": "linear", "num_temperatures": 200},
        {"path": "arithmetic", "num_temperatures": 150},
        {"kernel": "langevin", "num_moves": 2},
        {"kernel": "random_walk", "num_moves": 4},
        {"kernel": HMC(num_steps=2)},
        {"num_samples": 5},
    ],
    ids=str,
)
def test_every_schedule_path_and_kernel_gives_the_same_evidence(settings):
    settings = {"num_samples": 16, "num_temperatures": 80} | settings
    assert_unbiased(errors(gamma_poisson(RUNS), AnnealedImportance(**settings))[0])


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_start_does_not_matter(start):
    engine = AnnealedImportance(num_samples=16, num_temperatures=80, start=start)
    assert_unbiased(errors(guided(RUNS), engine)[0])


def test_more_temperatures_bring_the_bound_up_to_the_evidence():
    """The mean of single log weights is below log Z by half their variance, which falls like 1 / K."""
    gaps = []
    for count in (10, 40, 160):
        log_w = errors(correlated(RUNS), AnnealedImportance(num_samples=16, num_temperatures=count))[1].log_weights
        gaps.append(correlated(RUNS).log_evidence - float(log_w.mean()))
    slope = np.polyfit(np.log([10, 40, 160]), np.log(gaps), 1)[0]
    assert -1.3 < slope < -0.7, gaps
    assert gaps[-1] < 0.1


@pytest.mark.parametrize("name", ["normal_inverse_gamma", "local_level", "two_component_mixture", "probabilistic_pca"])
def test_the_zoo_has_its_evidence(name):
    entry = EXACT[name]()
    value, error = infer(entry.problem, AnnealedImportance(), seed=0).log_evidence.total()
    assert error < 0.1
    assert abs(value - entry.log_evidence) < 6 * error


def hard_vae():
    """Twenty digits and a decoder with weights made large, so that posteriors are narrow and of several modes; the
    evidence by a grid."""
    problem = vae.problem(num_train=20, num_test=0, latent_dim=2, seed=1)
    with torch.no_grad():
        theta = infer(problem, AnnealedImportance(num_temperatures=1, num_samples=2), seed=0).parameters
    theta = {n: 4 * v if n == "decoder.layers.2.weight" else 2 * v for n, v in theta.items()}
    return problem, theta, problem.reference_at(theta).log_evidence


@pytest.mark.parametrize("engine", [AnnealedImportance(), SMC()], ids=["annealed", "smc"])
def test_digits_have_the_evidence_of_the_grid(engine):
    problem, theta, truth = hard_vae()
    posterior = infer(problem, engine, parameters=theta, seed=0)
    off = posterior.log_evidence.value - truth.value
    assert float(truth.std_error.max()) < 1e-6
    assert float(posterior.log_evidence.std_error.max()) < 0.4
    assert abs(float(off.sum())) < LIMIT * posterior.log_evidence.total()[1]
    assert float(off.abs().mean()) < 0.1


# -- what is frozen, and what is apart -------------------------------------------------------------------------------


def test_a_chain_learns_nothing_from_the_others():
    """Tuning is over when the chains begin: all but the first begin elsewhere, and the first has the same weight."""
    engine = AnnealedImportance(num_samples=16, num_temperatures=20)
    with isolated(0), torch.no_grad(), (density := Density(gamma_poisson(3).problem)):
        run = Run(density, np.random.SeedSequence(0))
        bound, u, tuning = engine.prepared(density, run)
        before = [t.clone() for t in tuning]
        plain = engine.chains(bound, tuning, u, 7, run)[1]
        moved = torch.cat([u[:3], u[3:] + 5.0])
        other = engine.chains(bound, tuning, moved, 7, run)[1]
        assert all(torch.equal(a, b) for a, b in zip(before, tuning, strict=True))
    torch.testing.assert_close(plain[0], other[0], rtol=1e-10, atol=1e-10)
    assert float((plain[1:] - other[1:]).abs().min()) > 1e-3


def test_tuning_is_listed_apart_and_has_random_numbers_of_its_own():
    engine = AnnealedImportance(num_samples=16, num_temperatures=20)
    posterior = infer(gamma_poisson(3).problem, engine, seed=0)
    cost = posterior.cost
    assert cost.gradients - cost.tuning_gradients == pytest.approx(16 * (1 + 20 * 3))
    assert cost.tuning_gradients > 0
    assert posterior.diagnostics.figures["acceptance"].shape == (20,)
    assert bool((posterior.diagnostics.figures["acceptance"] > 0.6).all())


def test_data_in_groups_have_the_answer_of_all_at_once(monkeypatch):
    problem = gamma_poisson(7).problem.on(torch.tensor([0.0, 3, 9, 1, 30, 2, 5], dtype=F64))
    engine = AnnealedImportance(num_samples=16, num_temperatures=20)
    whole = infer(problem, engine, seed=0)
    monkeypatch.setattr(groups, "BLOCK", 48)
    parts = infer(problem, engine, seed=0)
    torch.testing.assert_close(parts.log_weights, whole.log_weights, rtol=0, atol=1e-7)
    torch.testing.assert_close(parts.draws["rate"], whole.draws["rate"], rtol=1e-6, atol=1e-7)


def test_a_broken_datum_changes_no_other_and_ends_in_a_failure():
    def problem(x: Tensor) -> Problem:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.factor("x", -3 * (x - z).square())

        return Problem(model, args=(x,))

    answers, engine = [], AnnealedImportance(num_samples=16, num_temperatures=20)
    for value in (2.0, math.inf):
        x = torch.tensor([value, 0.5, -3.0], dtype=F64)
        with isolated(0), torch.no_grad(), (density := Density(problem(x))):
            answers.append(engine.run(density, Run(density, np.random.SeedSequence(0))))
    good, broken = answers
    torch.testing.assert_close(good.log_weights[..., 1:], broken.log_weights[..., 1:], rtol=1e-9, atol=1e-9)
    assert not bool(broken.log_evidence.value[0].isfinite())
    assert infer(problem(x), engine).status.state == "failed"


# -- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_path_is_exact_at_its_ends_and_knows_its_derivatives(path):
    values = torch.tensor([[-1.0, -math.inf], [-math.inf, 2.0], [0.3, -700.0]], dtype=F64)
    for beta, column in ((0.0, 0), (1.0, 1)):
        value, weights = path(torch.full((3,), beta, dtype=F64), values)
        assert torch.equal(value, values[:, column])
        finite = values[:, column].isfinite()
        assert torch.equal(weights[finite][:, column], torch.ones(2, dtype=F64))
        assert torch.equal(weights[finite][:, 1 - column], torch.zeros(2, dtype=F64))
    v = torch.randn((9, 2), dtype=F64, requires_grad=True)
    beta = torch.linspace(0.05, 0.95, 9, dtype=F64)
    value, weights = path(beta, v)
    (slope,) = torch.autograd.grad(value.sum(), v)
    torch.testing.assert_close(slope, weights.detach())


def test_the_paths_are_what_they_are_called():
    beta, values = torch.tensor([0.3], dtype=F64), torch.tensor([[-1.0, 2.0]], dtype=F64)
    assert float(geometric(beta, values)[0]) == pytest.approx(0.7 * -1 + 0.3 * 2)
    assert float(arithmetic(beta, values)[0]) == pytest.approx(math.log(0.7 * math.exp(-1) + 0.3 * math.exp(2)))


def test_the_first_part_is_the_prior_in_the_unconstrained_space():
    """A density in log rate: integrated over a grid it gives one."""
    with torch.no_grad(), (density := Density(gamma_poisson(1).problem)):
        grid = torch.linspace(-14, 5, 4_001, dtype=F64)
        prior, joint = prior_to_posterior(density, grid[:, None, None])
    step = float(grid[1] - grid[0])
    assert float(prior.exp().sum() * step) == pytest.approx(1, abs=1e-6)
    assert float(joint.exp().sum() * step) == pytest.approx(math.exp(gamma_poisson(1).log_evidence), rel=1e-6)


def test_discrete_latents_are_summed_out_of_the_prior():
    """z is a mixture of two normals there; leaving the label out would give a normal."""
    with torch.no_grad(), (density := Density(MAKERS["switching"](2).problem)):
        z = torch.linspace(-3, 3, 13, dtype=F64)[:, None, None].expand(13, 2, 1)
        found = prior_to_posterior(density, z)[0]
    normal = dist.Normal(torch.tensor([1.0, -1.0], dtype=F64), 1.0).log_prob(z)
    expected = torch.logsumexp(normal + torch.tensor([0.4, 0.6], dtype=F64).log(), -1)
    torch.testing.assert_close(found, expected)


# -- the bracket -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_bracket_holds_the_truth_of_the_twin(start):
    """Conjugate normals: x is N(theta, 2). Both sides are unbiased, e^{-upper} for 1 / Z."""
    problem = conjugate_gaussian.problem(num_data=RUNS, guide_error=0.3)
    engine = AnnealedImportance(num_samples=16, num_temperatures=60, start=start)
    found = bracket(problem, engine, seed=0)
    with isolated(0), torch.no_grad(), (density := Density(problem)):
        parameters = density.theta.values()
    truth = found.problem.reference_at(parameters).log_evidence.value
    for off in (found.lower.value - truth, truth - found.upper.value):
        assert_unbiased(off)
        assert float(off.mean()) < 0.005
    assert float(found.gap.mean()) > -LIMIT * float(found.gap.std()) / math.sqrt(RUNS)
    assert (found.lower.kind, found.upper.kind, found.own.kind) == ("lower bound", "upper bound", "lower bound")
    own = problem.reference_at(parameters).log_evidence.value
    assert abs(float((found.own.value - own).sum())) < 6 * found.own.total()[1]
    assert "simulated" in found.note


def test_the_gap_closes_at_a_thousand_temperatures():
    found = bracket(conjugate_gaussian.problem(num_data=20), AnnealedImportance(num_temperatures=1000), seed=0)
    assert float(found.gap.abs().max()) < 0.1
    assert float(found.upper.std_error.max()) < 0.02


def test_digits_are_bracketed():
    """The decoder is known, so that the grid gives the twin's evidence too."""
    problem, theta, _ = hard_vae()
    found = bracket(problem, AnnealedImportance(num_samples=32), seed=0, parameters=theta)
    truth = found.problem.reference_at(theta).log_evidence.value
    error = (found.lower.std_error.square() + found.upper.std_error.square()).sqrt()
    assert float(found.lower.value.sum()) <= float(truth.sum()) + LIMIT * found.lower.total()[1]
    assert float(found.upper.value.sum()) >= float(truth.sum()) - LIMIT * found.upper.total()[1]
    assert float(found.gap.mean()) < 0.3
    assert bool((found.gap > -6 * error).all())


def test_a_bracket_is_refused_where_there_can_be_none():
    with pytest.raises(ProblemError, match="annealed importance"):
        bracket(guided(3).problem, SMC())
    with pytest.raises(ProblemError, match="improper prior"):
        bracket(EXACT["flat_prior"]().problem)

    def doubled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=2 * x + 1)

    with pytest.raises(ProblemError, match="no argument alone holds the data of site 'x'"):
        bracket(Problem(doubled, args=(torch.ones(3, dtype=F64),)))
    assert isinstance(bracket(MAKERS["switching"](3).problem, AnnealedImportance(num_temperatures=5)), Bracket)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"start": "posterior"}, "auto, prior, guide"),
        ({"schedule": "cosine"}, "adaptive, sigmoid, linear"),
        ({"path": "moments"}, "geometric, arithmetic"),
        ({"kernel": 3}, "hmc, langevin, random_walk, nuts"),
        ({"num_temperatures": 0}, "at least 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_with_what_to_do(settings, hint):
    with pytest.raises(ProblemError, match=hint):
        AnnealedImportance(**settings)


def test_what_it_cannot_start_from_is_said():
    assert "improper prior" in why_not(EXACT["flat_prior"]().problem, AnnealedImportance())
