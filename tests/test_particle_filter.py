"""Particle filters against the forward algorithm, the Kalman filter, and quadrature: evidence, its error, moments.

R independent filters of S particles are one run. A figure fails by chance with 1e-6 at |z| < 4.9, and about 150 of them
make 2e-4. Standard errors of mean Z-hat / Z are asserted to be small enough for an error of 10 % to be seen; those of
means and second moments for one of 0.2 sd / sqrt(R) times a few.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from zoo import EXACT

from pyrometer.inference import Problem, ProblemError, infer, why_not
from pyrometer.inference.cloud import CloudPlan
from pyrometer.inference.density import Density
from pyrometer.inference.engine import isolated
from pyrometer.inference.engines.particle_filter import ParticleFilter
from pyrometer.inference.engines.particle_marginal import ParticleMarginalMetropolis
from pyrometer.inference.sequential import carried, shared_latents, time_of
from pyrometer.models import deep_markov, hidden_markov, linear_gaussian_ssm, noisy_autoregression

F64 = torch.float64
RUNS, LIMIT = 256, 4.9
MAKERS = {
    "hidden_markov": lambda: hidden_markov.problem(num_data=3),
    "symbols": lambda: hidden_markov.problem(num_data=2, emissions="categorical"),
    "linear_gaussian_ssm": lambda: linear_gaussian_ssm.problem(num_data=3, num_steps=6, emission_scale=1.0),
}


@cache
def problem_of(name: str) -> Problem:
    return MAKERS[name]()


def clouds(problem: Problem, plan: CloudPlan, seed: int = 1, num_moves: int = 0):
    """The cloud of R filters, their lines, and the truth."""
    density = Density(problem)
    with isolated(seed), torch.no_grad(), density:
        cloud, lines, _ = carried(density, plan, num_moves=num_moves)
    return cloud, lines, problem.reference_at(density.theta.values())


def assert_unbiased(off: Tensor, se: float) -> None:
    """off (R, *batch): log Z-hat - log Z of independent filters."""
    ratio = off.exp()
    error = ratio.std(0) / math.sqrt(len(off))
    assert bool((error <= se).all()), error
    assert bool(((ratio.mean(0) - 1).abs() < LIMIT * error).all()), ratio.mean(0)


def assert_moments(cloud, lines, truth, bias: float) -> None:
    """Mean and second moment of each latent, over the filters, whose own are biased by O(1 / S)."""
    weights = torch.softmax(cloud.log_weights, 0)
    for site, mean in truth.mean.items():
        x = (lines[site].double() - mean) / truth.sd[site]
        w = weights.reshape(weights.shape + (1,) * (x.dim() - weights.dim()))
        for power, expected in ((1, 0.0), (2, 1.0)):
            estimate = (w * x**power).sum(0)
            error = estimate.std(0) / math.sqrt(RUNS)
            assert bool((error < 0.06).all()), (site, error)
            assert bool(((estimate.mean(0) - expected).abs() < LIMIT * error + bias).all()), (site, power)


# -- evidence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["never", "always", "adaptive"])
@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual", "multinomial"])
@pytest.mark.parametrize("name", ["hidden_markov", "linear_gaussian_ssm"])
def test_every_scheme_and_policy_gives_the_same_evidence(name, policy, scheme):
    plan = CloudPlan(100 if policy != "never" else 300, RUNS, scheme=scheme, policy=policy)
    cloud, _, truth = clouds(problem_of(name), plan)
    off = cloud.log_evidence - truth.log_evidence.value
    assert_unbiased(off, 0.1 if policy == "never" else 0.04)
    if policy != "never":
        square = (off / cloud.variance().sqrt()).square().mean()
        assert 0.5 < float(square) < 2.0, square  # the error by families covers


@pytest.mark.parametrize("name", ["symbols"])
def test_symbols_too(name):
    cloud, lines, truth = clouds(problem_of(name), CloudPlan(100, RUNS))
    assert_unbiased(cloud.log_evidence - truth.log_evidence.value, 0.04)
    assert_moments(cloud, lines, truth, 0.03)


def test_the_variance_falls_like_one_over_the_particles():
    problem = linear_gaussian_ssm.problem(num_data=1, num_steps=5, emission_scale=1.0)
    counts, variances = np.array([100, 1000, 10_000]), []
    for count in counts:
        runs = 256 if count < 5000 else 128  # of the slope, 0.04 are chance
        cloud, _, truth = clouds(problem, CloudPlan(int(count), runs, policy="always"))
        variances.append(float((cloud.log_evidence - truth.log_evidence.value).var(0).mean()))
    slope = np.polyfit(np.log(counts), np.log(variances), 1)[0]
    assert abs(slope + 1) < 0.2, slope


@pytest.mark.slow
def test_the_variance_still_falls_at_many_particles():
    problem, variances = problem_of("hidden_markov"), []
    for count in (1000, 100_000):
        cloud, _, truth = clouds(problem, CloudPlan(count, 64, policy="always"))
        variances.append(float((cloud.log_evidence - truth.log_evidence.value).var(0).mean()))
    assert abs(math.log(variances[1] / variances[0]) / math.log(100) + 1) < 0.2


@pytest.mark.parametrize("chains", [1, 16])
def test_the_posterior_has_the_evidence_and_an_error_that_covers(chains):
    """40 seeds of one filter each (families), or of 16 (between filters): mean square of a z-value near 1."""
    problem, squares = problem_of("hidden_markov"), []
    for seed in range(40 if chains == 1 else 20):
        posterior = infer(problem, ParticleFilter(num_samples=100, num_chains=chains), seed=seed)
        assert posterior.status.done, posterior.status
        truth = problem.reference_at(posterior.parameters)
        z = (posterior.log_evidence.value - truth.log_evidence.value) / posterior.log_evidence.std_error
        squares.append(z.square())
    assert 0.5 < float(torch.stack(squares).mean()) < 1.9


def test_weights_of_all_filters_together_are_for_the_posterior():
    """Filters are weighed by their own evidence, which plain averaging over them is not: with 5 particles it shows."""
    problem = problem_of("linear_gaussian_ssm")
    posterior = infer(problem, ParticleFilter(num_samples=5, num_chains=20_000, policy="always"), seed=0)
    truth = problem.reference_at(posterior.parameters)
    torch.testing.assert_close(posterior.log_evidence.value, truth.log_evidence.value, rtol=0, atol=0.05)
    for site, mean in truth.mean.items():
        assert float(((posterior.mean(site) - mean) / truth.sd[site]).abs().max()) < 0.06, site
        assert float((posterior.sd(site) / truth.sd[site] - 1).abs().max()) < 0.06, site


# -- smoothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_moves", [0, 2])
@pytest.mark.parametrize("policy", ["always", "adaptive"])
@pytest.mark.parametrize("name", ["hidden_markov", "linear_gaussian_ssm"])
def test_smoothed_moments(name, policy, num_moves):
    cloud, lines, truth = clouds(problem_of(name), CloudPlan(200, RUNS, policy=policy), num_moves=num_moves)
    assert_moments(cloud, lines, truth, 0.03)


def test_backward_smoothing_keeps_more_lines_apart():
    problem = linear_gaussian_ssm.problem(num_data=2, num_steps=30)
    first = {}
    for smoothing in ("ancestry", "backward"):
        posterior = infer(problem, ParticleFilter(num_samples=200, policy="always", smoothing=smoothing), seed=0)
        first[smoothing] = len(posterior.draws["z_0"][0, :, 0, 0].unique())
    assert first["ancestry"] < 30
    assert first["backward"] > 80


def test_backward_smoothing_wants_a_markov_chain():
    status = infer(second_order(), ParticleFilter(num_samples=20, smoothing="backward")).status
    assert status.state == "failed"
    assert "smoothing='ancestry'" in status.reason


# -- guides ------------------------------------------------------------------------------------------------------


def guided() -> Problem:
    """x_t given its past and y_t: the best proposal that looks no further, with a wider sd to make weights uneven."""
    problem = linear_gaussian_ssm.problem(num_data=2)
    a, c, q, r = 0.9, 1.2, 0.5, 0.7

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = None
            for t in range(x.shape[1]):
                loc, sd = (x.new_zeros(len(x), 1), 1.0) if z is None else (a * z, q)
                precision = 1 / sd**2 + c**2 / r**2
                centre = (loc / sd**2 + c * x[:, t] / r**2) / precision
                z = pyro.sample(f"z_{t}", dist.Normal(centre, 1.2 / math.sqrt(precision)).to_event(1))

    return Problem(problem.model, problem.args, guide=guide, reference=problem.reference)


def test_a_guide_draws_given_the_particles_that_survived():
    cloud, lines, truth = clouds(guided(), CloudPlan(100, RUNS, guided=True, policy="always"))
    off = cloud.log_evidence - truth.log_evidence.value
    assert_unbiased(off, 0.02)
    assert_moments(cloud, lines, truth, 0.03)
    plain, _, _ = clouds(guided(), CloudPlan(100, RUNS, policy="always"))
    assert float(off.var()) < 0.5 * float((plain.log_evidence - truth.log_evidence.value).var())


def test_a_guide_of_its_own_networks():
    problem = deep_markov.problem(num_data=2, num_steps=4)
    for proposal in ("bootstrap", "guide"):
        posterior = infer(problem, ParticleFilter(num_samples=2000, num_chains=16, proposal=proposal), seed=0)
        truth = problem.reference_at(posterior.parameters)
        value, error = posterior.log_evidence.value, posterior.log_evidence.std_error
        assert bool((error < 0.15).all())
        assert bool(((value - truth.log_evidence.value).abs() < 6 * error).all())


# -- programs of many kinds --------------------------------------------------------------------------------------


def second_order() -> Problem:
    """z_t ~ N(z_{t-1} - 0.5 z_{t-2}, 1), with a running sum that is kept through resampling, and two observations."""
    y = torch.tensor([0.5, -1.0, 2.0, 1.0, 0.0, -0.5], dtype=F64)

    def model(y: Tensor) -> None:
        before, here, level = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for t in range(len(y)):
            new = pyro.sample(f"z_{t}", dist.Normal(here - 0.5 * before, 1.0))
            before, here = here, new
            level = 0.5 * level + here
            pyro.sample(f"y_{t}", dist.Normal(here, 1.0), obs=y[t])
            pyro.sample(f"w_{t}", dist.Normal(level, 2.0), obs=y[t])

    return Problem(model, args=(y,), name="second_order")


def joint_normal(problem: Problem) -> tuple[float, Tensor, Tensor]:
    """Evidence, mean and covariance of a program that is linear and Gaussian in T scalar latents, from its log joint:
    a quadratic, whose coefficients are found by central differences, exact for quadratics."""
    density = Density(problem)
    n = density.dim
    with density, torch.no_grad():
        eye = torch.eye(n, dtype=F64)
        f0, plus, minus = density.log_joint(torch.zeros(n, dtype=F64)), density.log_joint(eye), density.log_joint(-eye)
        cross = density.log_joint((eye[:, None] + eye).reshape(-1, n)).reshape(n, n)
        gradient = (plus - minus) / 2
        precision = -(cross - plus[:, None] - plus + f0)
    mean = torch.linalg.solve(precision, gradient)
    top = f0 + 0.5 * gradient @ mean
    return float(top + n / 2 * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)), mean, torch.linalg.inv(precision)


def test_what_is_carried_in_the_programs_own_variables_follows_the_particles():
    problem = second_order()
    evidence, mean, covariance = joint_normal(problem)
    posterior = infer(problem, ParticleFilter(num_samples=200, num_chains=RUNS, policy="always"), seed=0)
    assert posterior.status.done, posterior.status
    assert abs(float(posterior.log_evidence.value) - evidence) < 5 * float(posterior.log_evidence.std_error)
    assert float(posterior.log_evidence.std_error) < 0.03
    for t in range(len(mean)):
        assert abs(float(posterior.mean(f"z_{t}") - mean[t])) < 0.05
        assert abs(float(posterior.sd(f"z_{t}")) - float(covariance[t, t].sqrt())) < 0.05


def masked(last: bool = True) -> Problem:
    """Scaled and masked sites, a factor, a deterministic one, a latent after the last observation, and no markov."""
    y = torch.tensor([0.5, math.nan, -1.0], dtype=F64)

    def model(y: Tensor) -> None:
        z = torch.zeros(())
        for t in range(3):
            z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z, 1.0))
            pyro.deterministic(f"square_{t}", z**2)
            seen = ~y[t].isnan()
            with pyro.poutine.mask(mask=seen), pyro.poutine.scale(scale=0.5):
                pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t].nan_to_num())
            pyro.factor(f"f_{t}", -0.1 * z**2)
        if last:
            pyro.sample("z_3", dist.Normal(z, 1.0))

    return Problem(model, args=(y,), name="masked")


def test_masks_scales_factors_and_a_last_latent():
    problem = masked()
    evidence, mean, covariance = joint_normal(problem)
    posterior = infer(problem, ParticleFilter(num_samples=300, num_chains=RUNS, policy="always"), seed=0)
    assert posterior.status.done, posterior.status
    assert abs(float(posterior.log_evidence.value) - evidence) < 5 * float(posterior.log_evidence.std_error) < 0.03
    for t in range(4):
        assert abs(float(posterior.mean(f"z_{t}") - mean[t])) < 0.05
        assert abs(float(posterior.sd(f"z_{t}")) - float(covariance[t, t].sqrt())) < 0.05
    assert torch.equal(posterior.draws["square_1"], posterior.draws["z_1"] ** 2)


def test_a_mask_of_the_distribution_does_not_reach_the_draws():
    """z_t is drawn from N(0, 1) and counts as flat: z_t given y_t is N(y_t, 1), and log p(y) = 0."""

    def model(y: Tensor) -> None:
        for t in range(2):
            z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0).mask(torch.tensor(False)))
            pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t])

    y = torch.tensor([0.2, -0.4], dtype=F64)
    posterior = infer(Problem(model, args=(y,)), ParticleFilter(num_samples=300, num_chains=RUNS), seed=0)
    assert abs(float(posterior.log_evidence.value)) < 5 * float(posterior.log_evidence.std_error) < 0.05
    for t in range(2):
        assert abs(float(posterior.mean(f"z_{t}") - y[t])) < 0.05


def test_the_order_in_time_is_that_of_the_statements():
    time = time_of(Density(masked()))
    assert time.steps == (("z_0",), ("z_1",), ("z_2",), ("z_3",))
    assert time.last == {"f_0", "f_1", "f_2"}


def test_one_pass_of_the_program_whatever_its_length():
    calls = []
    for steps in (5, 20):
        runs = 0
        problem = linear_gaussian_ssm.problem(num_data=1, num_steps=steps)

        def model(x: Tensor, problem: Problem = problem) -> None:
            nonlocal runs
            runs += 1
            problem.model(x)

        density = Density(Problem(model, problem.args))
        before = runs
        with isolated(0), torch.no_grad(), density:
            carried(density, CloudPlan(50))
        calls.append(runs - before)
        assert density.counts["evaluations"] == 50
    assert calls == [1, 1]


# -- refusals and failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["beta_bernoulli", "gamma_poisson"])
def test_models_without_time_are_refused_with_the_reason(name):
    assert "no order in time" in why_not(EXACT[name]().problem, ParticleFilter())
    assert "no order in time" in why_not(EXACT[name]().problem, ParticleMarginalMetropolis())


def test_writing_into_a_tensor_is_refused_in_words():
    def model(y: Tensor) -> None:
        z = torch.zeros(())
        for t in range(3):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            kept = z * 1.0
            kept += 1.0
            pyro.sample(f"y_{t}", dist.Normal(kept, 1.0), obs=y[t])

    status = infer(Problem(model, args=(torch.zeros(3, dtype=F64),)), ParticleFilter(num_samples=20)).status
    assert status.state == "failed"
    assert "out of place" in status.reason


def test_impossible_observations_end_in_a_failure():
    def model(y: Tensor) -> None:
        with pyro.plate("data", 2):
            z = torch.zeros(2)
            for t in range(3):
                z = pyro.sample(f"z_{t}", dist.Uniform(z, z + 1))
                pyro.factor(f"y_{t}", torch.where((z - y[:, t]).abs() < 1, 0.0, -math.inf))

    y = torch.tensor([[0.9, 1.5, 2.0], [0.9, 9.0, 2.0]], dtype=F64)
    status = infer(Problem(model, args=(y,)), ParticleFilter(num_samples=50)).status
    assert status.state == "failed"
    assert "1 data" in status.reason


@pytest.mark.parametrize(
    ("cls", "settings", "hint"),
    [
        (ParticleFilter, {"proposal": "prior"}, "auto, bootstrap, guide"),
        (ParticleFilter, {"resampling": "killing"}, "systematic, stratified, residual, multinomial"),
        (ParticleFilter, {"policy": "sometimes"}, "adaptive, always, never"),
        (ParticleFilter, {"smoothing": "forward"}, "ancestry, backward"),
        (ParticleFilter, {"threshold": 1.0}, "between 0 and 1"),
        (ParticleFilter, {"num_samples": 1}, "at least 2"),
        (ParticleFilter, {"particles": 10}, "num_"),
        (ParticleMarginalMetropolis, {"num_particles": 0}, "at least 1"),
        (ParticleMarginalMetropolis, {"target_acceptance": 0.0}, "between 0 and 1"),
        (ParticleMarginalMetropolis, {"sites": "a"}, "names"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_with_what_to_do(cls, settings, hint):
    with pytest.raises(ProblemError, match=hint):
        cls(**settings)


# -- particle marginal Metropolis-Hastings ---------------------------------------------------------------------------


def test_what_all_steps_share_is_found():
    assert shared_latents(Density(noisy_autoregression.problem())) == ("a", "q")
    assert shared_latents(Density(linear_gaussian_ssm.problem(num_data=1))) == ()
    assert "shared by all steps" in why_not(hidden_markov.problem(), ParticleMarginalMetropolis())
    with pytest.raises(ProblemError, match="none of the first step's"):
        why_not(noisy_autoregression.problem(), ParticleMarginalMetropolis(sites=("a", "z_3")))


def marginal_moments(chains: int, samples: int, seed: int) -> None:
    """t-values of independent chains (limit at 1e-6 for 31 degrees of freedom: 6.1) for first and second moments."""
    problem = noisy_autoregression.problem(num_steps=5)
    engine = ParticleMarginalMetropolis(
        num_samples=samples, warmup_steps=80, num_chains=chains, num_particles=8, resampling="stratified"
    )
    posterior = infer(problem, engine, seed=seed)
    assert posterior.status.done, posterior.status
    truth = problem.reference_at({})
    assert 0.05 < float(posterior.diagnostics["acceptance"]) < 0.6
    for site, mean in truth.mean.items():
        z = (posterior.draws[site] - mean) / truth.sd[site]  # (C, S)
        for power, expected in ((1, 0.0), (2, 1.0)):
            of_chain = (z**power).mean(1)
            error = float(of_chain.std()) / math.sqrt(chains)
            assert error < 0.1, (site, error)
            assert abs(float(of_chain.mean()) - expected) < 6.1 * error, (site, power, of_chain.mean(), error)


def test_particle_marginal_moments_with_few_particles():
    """Eight particles: their noise is large, and the answer exact all the same."""
    marginal_moments(64, 150, seed=0)


@pytest.mark.slow
def test_particle_marginal_moments_at_length():
    marginal_moments(128, 1000, seed=1)
