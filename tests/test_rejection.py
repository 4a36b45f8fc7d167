"""Rejection sampling against exact answers: moments, evidence on the natural scale, calibration, and broken bounds.

Copies of a datum are independent runs. A figure fails by chance with 1e-6 at |z| < 4.9; about 60 of them make 1e-4.
With 20,000 exact draws the standard error of a mean is 0.007 sd and of a second moment 0.01 to 0.03, so that a sd off
by 5 % is seen at 5 standard errors or more.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from annealed import MAKERS
from ranks import SUSPICIOUS, p_value
from scipy import stats
from torch import Tensor

from pyrometer.benchmarks.ranks import APART, near_independent
from pyrometer.inference import Enumeration, ImportanceSampling, Problem, ProblemError, RejectionSampling, infer
from pyrometer.inference.engines import rejection_sampling
from pyrometer.models import beta_binomial, bimodal, conjugate_gaussian, gamma_poisson, gaussian_mixture, skewed

F64 = torch.float64
LIMIT = 4.9


def done(problem, engine, seed=1, **settings):
    posterior = infer(problem, engine, seed=seed, **settings)
    assert posterior.status.done, posterior.status
    return posterior


def z_score(values: Tensor, expected: float) -> float:
    """Of the mean of independent values."""
    return float((values.mean() - expected) / (values.std() / math.sqrt(values.numel())))


def assert_unbiased(off: Tensor, se: float = 0.02) -> None:
    """off: log Z-hat - log Z of independent runs."""
    ratio = off.exp()
    assert float(ratio.std() / math.sqrt(len(off))) < se
    assert abs(z_score(ratio, 1.0)) < LIMIT, ratio.mean()


def assert_moments(z: Tensor) -> None:
    """z: independent draws, standardised by the exact mean and sd."""
    assert abs(z_score(z.flatten(), 0.0)) < LIMIT, z.mean()
    assert abs(z_score(z.flatten().square(), 1.0)) < LIMIT, z.square().mean()


# -- exact draws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["prior", "laplace", "auto"])
@pytest.mark.parametrize("case", MAKERS)
def test_draws_are_exact_and_the_evidence_is_unbiased(case, proposal):
    copies = MAKERS[case](200)
    posterior = done(copies.problem, RejectionSampling(num_samples=100, proposal=proposal))
    off = posterior.log_evidence.value - copies.log_evidence
    assert_unbiased(off)
    assert 0.6 < float((off / posterior.log_evidence.std_error).square().mean()) < 1.5
    x = posterior.draws[copies.site].reshape(100, 200, -1)[..., 0]
    assert_moments((x - copies.mean) / copies.sd)
    assert posterior.kind == "iid"
    assert posterior.diagnostics["num_draws"] == 100
    if not posterior.diagnostics.verdict.count("second mode"):  # then the noise of 100 draws is all there is to say
        assert posterior.diagnostics.level == "caution"
        assert "by chance, most in" in posterior.diagnostics.verdict


@pytest.mark.parametrize(
    ("problem", "site", "law"),
    [
        (beta_binomial.problem(num_data=4), "p", lambda x: stats.beta(2 + x, 13 - x)),
        (gamma_poisson.problem(num_data=4), "rate", lambda x: stats.gamma(2 + x, scale=1 / 1.5)),
        (skewed.problem(), "z", lambda x: stats.loggamma(0.5, loc=-math.log(2))),
    ],
    ids=["beta_binomial", "gamma_poisson", "skewed"],
)
def test_quantiles_are_exact(problem, site, law):
    """Kolmogorov & Smirnov of 10,000 draws, each p above 1e-6: a shift of 0.05 sd is seen."""
    posterior = done(problem, RejectionSampling(num_samples=10_000))
    draws, data = posterior.draws[site][0].reshape(10_000, -1).numpy(), problem.args[0].reshape(-1).numpy()
    for column, x in zip(draws.T, data, strict=True):
        assert stats.kstest(column, law(x).cdf).pvalue > 1e-6


def test_both_modes_have_their_weights():
    problem = bimodal.problem()
    posterior = done(problem, RejectionSampling(num_samples=10_000))
    assert abs(z_score((posterior.draws["z"] < 0).double(), 0.1)) < LIMIT + 1  # 1e-6 of the other mode's tail is here
    assert posterior.diagnostics.level == "good"


def test_a_proposal_that_knows_one_mode_is_bounded_at_the_other():
    """The bound is sought from draws of the prior too; from those of the proposal alone it would be too small by far,
    and no draw would tell."""
    posterior = infer(bimodal.problem(separation=12.0), RejectionSampling(num_samples=5, proposal="laplace"), seed=1)
    assert posterior.status.state == "failed" or posterior.diagnostics["acceptance"] < 1e-3


def discrete_problem() -> Problem:
    return gaussian_mixture.problem(num_data=5)


@pytest.mark.parametrize("proposal", ["prior", "guide"])
def test_discrete_latents_have_their_exact_probabilities(proposal):
    problem = discrete_problem()
    posterior = done(problem, RejectionSampling(num_samples=5_000, proposal=proposal))
    probability = torch.softmax(problem.reference_at(posterior.parameters).log_weights, 0)
    for datum in range(5):
        seen = torch.bincount(posterior.draws["z"][0, :, datum].long(), minlength=3).double()
        expected = 5_000 * probability[:, datum]
        assert float(((seen - expected).square() / expected.clamp_min(1e-9)).sum()) < stats.chi2.isf(1e-6, 2)
    assert posterior.diagnostics.level == "good"


@pytest.mark.parametrize("proposal", ["guide", "engine", "posterior"])
def test_every_proposal_gives_the_same_law(proposal):
    problem = conjugate_gaussian.problem(num_data=50, guide_error=0.09)
    fitted = {"guide": "guide", "engine": ImportanceSampling(num_samples=500)}.get(proposal)
    fitted = fitted or infer(problem, ImportanceSampling(num_samples=500), seed=3)
    posterior = done(problem, RejectionSampling(num_samples=400, proposal=fitted))
    truth = problem.reference_at(posterior.parameters)
    assert_moments((posterior.draws["z"][0] - truth.mean["z"]) / truth.sd["z"])
    off = posterior.log_evidence.value - truth.log_evidence.value
    assert abs(z_score(off / posterior.log_evidence.std_error, 0.0)) < LIMIT


def calibration(problem: Problem, site: str, truth: Tensor, log_likelihood, engine) -> float:
    """p-value of the ranks of the latents that the data were drawn with, N data at once."""
    posterior = done(problem, engine)
    draws = posterior.draws[site][0]
    rng = np.random.default_rng(0)
    ranks = {}
    for name, f in (("latent", lambda z: z), ("log likelihood", log_likelihood)):
        own, other = f(truth).numpy(), f(draws).numpy()
        ties = (other == own).sum(0)
        ranks[name] = (other < own).sum(0) + rng.integers(ties + 1)
    return p_value(ranks, len(draws) + 1)


def normal_problem(count: int = 2_000) -> tuple[Problem, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(count, generator=generator, dtype=F64)
    x = z + 0.7 * torch.randn(count, generator=generator, dtype=F64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    return Problem(model, args=(x,)), z, x


def test_ranks_are_uniform():
    """2,000 data, 19 draws each: a mean off by 0.15 sd or a sd of 0.85 is seen."""
    problem, z, x = normal_problem()
    assert calibration(problem, "z", z, lambda z: -(x - z).square(), RejectionSampling(num_samples=19)) > SUSPICIOUS


def test_a_bound_too_small_fails_calibration():
    problem, z, x = normal_problem()
    low = dist.Normal(0.0, 0.7).log_prob(torch.zeros((), dtype=F64)) - 1.5
    engine = RejectionSampling(num_samples=19, proposal="prior", log_bound=float(low))
    assert calibration(problem, "z", z, lambda z: -(x - z).square(), engine) < 1e-6


# -- the bound -------------------------------------------------------------------------------------------------------


def test_a_bound_too_small_is_told_for_the_data_it_is_too_small_for():
    problem = gamma_poisson.problem(num_data=6)
    x = problem.args[0]
    exact = dist.Poisson(x.clamp_min(1e-9)).log_prob(x)  # the largest likelihood: at rate = x
    right = done(problem, RejectionSampling(num_samples=500, proposal="prior", log_bound=exact))
    assert right.diagnostics.level == "good"
    assert right.log_evidence.kind == "estimate"
    low = exact.clone()
    low[[1, 4]] -= 1.0
    wrong = done(problem, RejectionSampling(num_samples=500, proposal="prior", log_bound=low))
    assert wrong.diagnostics.level == "caution"
    assert "not exact at 2 of 6 data, first [1, 4]" in wrong.diagnostics.verdict
    assert wrong.log_evidence.kind == "lower bound"
    above = wrong.diagnostics["above_bound"]
    assert (above > 0).tolist() == [False, True, False, False, True, False]
    assert 0.9 < float(above.max()) <= 1.0 + 1e-9


def test_the_search_finds_the_largest_likelihood():
    problem = gamma_poisson.problem(num_data=6)
    x = problem.args[0]
    posterior = done(problem, RejectionSampling(num_samples=10, proposal="prior", margin=0.25))
    exact = dist.Poisson(x.clamp_min(1e-9)).log_prob(x) + 0.25
    torch.testing.assert_close(posterior.diagnostics["log_bound"], exact, rtol=0, atol=1e-6)


def test_a_ratio_without_bound_is_told():
    """Tails of the t are lighter than Cauchy's: the search climbs outwards for ever."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Cauchy(0.0, 1.0))
        pyro.sample("x", dist.Normal(z * 1e-6, 1.0), obs=x)

    problem = Problem(model, args=(torch.tensor(0.0, dtype=F64),))
    posterior = infer(problem, RejectionSampling(num_samples=20, proposal="laplace", max_proposals=20_000), seed=1)
    told = posterior.status.reason if not posterior.status.done else posterior.diagnostics.verdict
    assert "heavier tails" in told
    assert posterior.diagnostics.level != "good"


def test_a_missed_maximum_within_the_margin_is_noted(monkeypatch):
    largest = rejection_sampling.largest
    monkeypatch.setattr(rejection_sampling, "largest", lambda *a: largest(*a)._replace(log_w=largest(*a).log_w - 0.1))
    posterior = done(skewed.problem(), RejectionSampling(num_samples=500, proposal="prior", margin=0.2))
    assert posterior.diagnostics.level == "good"
    assert any("missed the maximum" in note for note in posterior.diagnostics.notes)


# -- counting --------------------------------------------------------------------------------------------------------


def copies_of_a_count(count: int) -> tuple[Problem, float]:
    problem = beta_binomial.problem(num_data=1).on(torch.full((count,), 4.0, dtype=F64))
    return problem, float(
        dist.BetaBinomial(torch.tensor(2.0, dtype=F64), 3.0, 10).log_prob(torch.tensor(4.0, dtype=F64))
    )


BOUND = float(dist.Binomial(10, torch.tensor(0.4, dtype=F64)).log_prob(torch.tensor(4.0, dtype=F64)))


@pytest.mark.parametrize(("num_samples", "budget"), [(2, 10_000), (3, 10_000), (20, 40), (20, 36)])
def test_the_evidence_is_unbiased_at_few_acceptances_and_at_the_budgets_end(num_samples, budget):
    """4,000 copies; S / N would be 30 % too large at S = 3, and conditioning on how it ended as well."""
    problem, log_z = copies_of_a_count(4_000)
    engine = RejectionSampling(num_samples=num_samples, proposal="prior", log_bound=BOUND, max_proposals=budget)
    posterior = done(problem, engine)
    assert_unbiased(posterior.log_evidence.value - log_z)
    if budget < 100:
        short = (posterior.log_weights[0] == -math.inf).any(0)
        assert 0.1 < float(short.double().mean()) < 0.95


def test_one_acceptance_tells_no_evidence():
    problem, _ = copies_of_a_count(5)
    assert done(problem, RejectionSampling(num_samples=1, proposal="prior")).log_evidence is None


def test_a_spent_budget_is_told_and_the_weights_leave_copies_out():
    problem, _ = copies_of_a_count(200)
    posterior = done(problem, RejectionSampling(num_samples=200, proposal="prior", log_bound=BOUND, max_proposals=200))
    assert posterior.kind == "weighted"
    assert "the budget of proposals was spent at 200 of 200 data" in posterior.diagnostics.verdict
    assert posterior.diagnostics.level == "caution"
    assert posterior.num_samples == 200
    counts = (posterior.log_weights[0] == 0).sum(0)
    assert int(counts.min()) == posterior.diagnostics["num_draws"]
    torch.testing.assert_close(posterior.diagnostics["acceptance"], counts.double() / 200)
    kept = posterior.draws["p"][0][posterior.log_weights[0] == 0]
    law = stats.beta(6, 9)
    assert_moments((kept - law.mean()) / law.std())


def test_a_spent_budget_leaves_draws_and_no_points_of_a_rule():
    """Copies have weight zero, but what is there was drawn: it is ranked, thinned and compared as draws are."""
    problem = conjugate_gaussian.problem()
    posterior = infer(problem, RejectionSampling(num_samples=1000, max_proposals=1000))
    assert posterior.kind == "weighted"
    assert not posterior.is_rule
    assert infer(gaussian_mixture.problem(), Enumeration()).is_rule
    kept = near_independent(posterior, 1000, [])[1]
    accepted = (posterior.log_weights[0] > -math.inf).sum(0)
    assert bool((kept <= (accepted / APART).clamp_min(1)).all())
    assert bool((kept > accepted / APART - 1.5).all())


def test_nothing_accepted_is_a_failed_run():
    problem, _ = copies_of_a_count(3)
    posterior = infer(problem, RejectionSampling(proposal="prior", log_bound=40.0, max_proposals=1_000))
    assert posterior.status.state == "failed"
    assert "none of 1000 proposals was accepted for 3 of 3 data" in posterior.status.reason
    assert not posterior.draws
    assert posterior.log_evidence is None


def test_data_that_are_done_drop_out_of_the_work():
    """One datum in a hundred is hard: its proposals must not be made for the others."""
    x = torch.full((100,), 4.0, dtype=F64)
    x[17] = 10.0
    problem = beta_binomial.problem(num_data=1).on(x)
    bound = dist.Binomial(10, x / 10 * (1 - 1e-9)).log_prob(x)
    posterior = done(problem, RejectionSampling(num_samples=500, proposal="prior", log_bound=bound))
    proposals = posterior.diagnostics["proposals"]
    assert int(proposals.argmax()) == 17
    assert posterior.cost.evaluations < 0.5 * float(proposals.max())
    assert posterior.cost.evaluations >= float(proposals.mean())


def test_the_budget_of_calls_is_kept():
    problem, _ = copies_of_a_count(20)
    density_calls = 5_000
    from pyrometer.inference.density import Density

    with Density(problem) as density:
        engine = RejectionSampling().sized(density_calls, density)
    assert done(problem, engine).cost.evaluations <= 1.3 * density_calls


# -- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal": "piror"}, "expected one of auto, prior, guide, laplace"),
        ({"proposal": "prior", "log_bound": math.nan}, "expected finite numbers, in nats"),
        ({"proposal": "prior", "log_bound": "high"}, "expected finite numbers, in nats"),
        ({"log_bound": 0.0}, "say for which proposal"),
        ({"margin": 0.0}, "expected a positive number"),
        ({"max_proposals": 0}, "whole number of at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ProblemError, match=message):
        RejectionSampling(**settings)


def test_a_bound_of_another_shape_is_refused():
    problem, _ = copies_of_a_count(3)
    with pytest.raises(ProblemError, match=r"expected one number, or one for each datum, \(3,\)"):
        infer(problem, RejectionSampling(proposal="prior", log_bound=torch.zeros(4)))


def test_an_undefined_density_is_a_failed_run():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(z > 2.8, math.nan, -((x - z) ** 2)))

    problem = Problem(model, args=(torch.zeros(3, dtype=F64),))
    posterior = infer(problem, RejectionSampling(proposal="prior"))
    assert posterior.status.state == "failed"
    assert "undefined (NaN)" in posterior.status.reason
