"""Guides beyond the normal ones: flows, Pyro's structured ones, guides refined for each datum, and the enumerated ELBO.

Bounds are compared with exact evidence; 4.9 standard errors are a false alarm in a million.
"""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoStructured
from test_contract import beta_bernoulli, correlated, discrete_net, poisson_rates
from torch import Tensor

from pyrometer.inference import EM, SVI, Problem, ProblemError, SemiAmortised, infer, learn
from pyrometer.inference.density import Density
from pyrometer.inference.flows import Flow
from pyrometer.inference.guides import AutoGuide, PairedGuide, make_guide
from pyrometer.inference.objectives import enumerated, loss
from pyrometer.models import conjugate_gaussian, gaussian_mixture, ppca

F64 = torch.float64
zuko = pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="zuko is not installed")
SMALL = {"transforms": 2, "width": 8}


# ---------------------------------------------------------------------------------------------------------------
# Flows


def banana() -> tuple[Problem, float]:
    """z ~ N(0, I), x = -1 ~ N(z_2 - z_1^2, 0.3): a bent ridge, and its evidence by a rule in z_1 (z_2 integrated)."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 1] - z[..., 0] ** 2, 0.3), obs=x)

    grid = torch.linspace(-6, 6, 4001, dtype=F64)
    x_given_z1 = dist.Normal(-grid.square(), math.sqrt(1.09))
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid) + x_given_z1.log_prob(torch.tensor(-1.0, dtype=F64))
    evidence = float(torch.logsumexp(log_joint, 0) + math.log(12 / 4000))
    return Problem(model, args=(torch.tensor(-1.0, dtype=F64),), name="banana"), evidence


def stirred(density: Density, flow: Flow):
    """A flow guide away from where it starts."""
    guide = make_guide(density, flow)
    with torch.no_grad():
        for tensor in guide.tensors:
            tensor.add_(0.3 * torch.randn_like(tensor))
    return guide


@zuko
@pytest.mark.parametrize("kind", ["nsf", "maf"])
@pytest.mark.parametrize("make", [lambda: banana()[0], poisson_rates, beta_bernoulli])
def test_draws_have_the_density_that_is_told(kind, make):
    """log q of a draw, by the way out and by the way back, to 1e-8: shared latents, and latents of each datum."""
    torch.manual_seed(1)
    with Density(make()) as density, torch.no_grad():
        guide = stirred(density, Flow(kind=kind, **SMALL))
        u, log_q, log_score = guide.draw(50)
        assert u.shape == (50, *density.batch_shape, density.dim)
        assert log_q.shape == (50, *density.batch_shape)
        assert log_score is None
        torch.testing.assert_close(guide.log_prob(u), log_q, rtol=0, atol=1e-8)


@zuko
@pytest.mark.parametrize("kind", ["nsf", "maf"])
def test_the_density_of_a_flow_integrates_to_one(kind):
    """In one dimension, for each of four data, by the trapezoidal rule, which the knots of splines disturb by 1e-4: to
    1e-3. A Jacobian left out would be tenths. No two data have the same."""
    torch.manual_seed(2)
    with Density(poisson_rates()) as density, torch.no_grad():
        guide = stirred(density, Flow(kind=kind, **SMALL))
        grid = torch.linspace(-30, 30, 60_001, dtype=F64)
        density_at = guide.log_prob(grid[:, None, None].expand(-1, 4, 1)).exp()
        integral = density_at.sum(0) * (grid[1] - grid[0])
        torch.testing.assert_close(integral, torch.ones(4, dtype=F64), rtol=0, atol=1e-3)
        assert float((density_at[:, 0] - density_at[:, 1]).abs().max()) > 1e-2


@zuko
def test_a_flow_bends_where_a_normal_cannot():
    """The normal's best ELBO is 0.75 nats short; the flow halves that, and neither passes the evidence."""
    problem, evidence = banana()
    settings = {"num_particles": 8, "num_samples": 4000}
    normal = infer(problem, SVI(guide="AutoMultivariateNormal", num_steps=600, learning_rate=0.02, **settings))
    bent = infer(problem, SVI(guide=Flow(kind="maf"), num_steps=800, **settings))
    assert bent.status.done, bent.status
    for posterior in (normal, bent):
        bound = posterior.log_evidence
        assert bound.kind == "lower bound"
        assert float(bound.value) < evidence + 4.9 * float(bound.std_error)
    assert float(normal.log_evidence.value) < evidence - 0.6
    assert float(bent.log_evidence.value) > evidence - 0.45


@zuko
@pytest.mark.slow
def test_splines_split_one_mode_into_two():
    """Weights 0.3 and 0.7 at -2 and 2, sd 0.6, evidence 0. A normal holds one mode, and loses log 0.7 = 0.36 nats or
    more; splines that hold both lose half of that, and their draws are as wide as the two (sd 1.93)."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
        parts = torch.stack([dist.Normal(2.0 * s, 0.6).log_prob(z) for s in (-1.0, 1.0)])
        log_target = torch.logsumexp(parts + torch.tensor([0.3, 0.7], dtype=F64).log(), 0)
        pyro.factor("target", log_target - dist.Normal(0.0, 3.0).log_prob(z))

    problem = Problem(model, args=(torch.zeros(1, dtype=F64),))
    settings = {"num_steps": 1000, "num_particles": 16, "num_samples": 4000}
    normal = infer(problem, SVI(guide="AutoNormal", **settings))
    split = infer(problem, SVI(guide="flow", **settings))
    assert float(normal.log_evidence.value) < -0.33
    assert -0.25 < float(split.log_evidence.value) < 4.9 * float(split.log_evidence.std_error)
    assert float(normal.sd("z")) < 1
    assert 1.7 < float(split.sd("z")) < 2.2


@zuko
def test_one_flow_serves_latents_of_each_datum():
    """Four gamma posteriors over the logarithm. In one dimension an affine flow is a normal for each datum, whose best
    loses skewness^2 / 12 nats, 0.03 for the most skewed: within 0.1 nats of each evidence, and not above it."""
    problem = poisson_rates()
    posterior = infer(problem, SVI(guide=Flow(kind="maf", **SMALL), num_steps=600, num_particles=8, learning_rate=0.02))
    off = posterior.log_evidence.value - problem.reference.log_evidence.value
    assert bool((off < 4.9 * posterior.log_evidence.std_error + 1e-9).all())
    assert bool((off > -0.1).all())
    again = infer(
        problem, SVI(guide=Flow(kind="maf", **SMALL), num_steps=1, num_particles=8, learning_rate=1e-9), warm=posterior
    )
    error = torch.hypot(again.log_evidence.std_error, posterior.log_evidence.std_error)
    assert float(((again.log_evidence.value - posterior.log_evidence.value) / error).abs().max()) < 4.9
    assert posterior.engine_options["guide"]["kind"] == "maf"


def test_without_zuko_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for guide in ("flow", Flow, Flow(kind="maf")):
        with pytest.raises(ProblemError, match=r"pip install 'pyrometer\[flows\]'"):
            infer(correlated(), SVI(guide=guide))


def test_flow_settings_are_checked():
    with pytest.raises(ProblemError, match="expected one of nsf, maf"):
        Flow(kind="nfs")
    with pytest.raises(ProblemError, match="transforms=0"):
        Flow(transforms=0)
    with pytest.raises(ProblemError, match="AutoDelta, flow"):
        SVI(guide="flows")


# ---------------------------------------------------------------------------------------------------------------
# Pyro's


def test_a_structured_guide_is_taken_as_it_is():
    """AutoStructured holds normal posteriors: within 0.1 nats of the evidence, where mean field loses 0.83."""
    problem = correlated()
    posterior = infer(problem, SVI(guide=AutoStructured, num_steps=400, num_particles=4, learning_rate=0.03))
    off = float(posterior.log_evidence.value - problem.reference.log_evidence.value)
    assert -0.1 < off < 4.9 * float(posterior.log_evidence.std_error)


def test_a_guide_that_is_a_point_has_no_bound():
    with pytest.raises(ProblemError, match=r"use the engine Laplace\(\)"):
        SVI(guide=AutoLaplaceApproximation)


# ---------------------------------------------------------------------------------------------------------------
# Every value of a discrete guide


def test_the_enumerated_elbo_is_pyros():
    """Three components, responsibilities away from the posterior: to 1e-10, value and gradients."""
    problem = gaussian_mixture.problem(num_data=20)
    moved = {"bias": torch.tensor([0.5, -1.0, 0.2], dtype=F64), "locs": 0.5 + torch.ones(3, 2, dtype=F64).cumsum(0)}
    with Density(problem, learning=True, parameters=moved) as density:
        bound = enumerated(density, PairedGuide(density))
        assert bound.shape == (20,)
        minus = loss(density, PairedGuide(density), 1, "enumerated")
        assert float(minus.detach()) == pytest.approx(-float(bound.detach().sum()), rel=1e-12)
        tensors = [*density.theta.tensors, *density.phi.tensors]
        gradients = torch.autograd.grad(minus, tensors)
        theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(problem.model, problem.guide, *density.args)
        assert float(minus.detach()) == pytest.approx(float(theirs.detach()), rel=1e-10)
        for ours, other in zip(gradients, torch.autograd.grad(theirs, tensors), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-8)


def test_the_enumerated_elbo_has_no_noise_and_the_score_function_has_its_mean():
    """2,000 estimates of 'elbo' at the same guide: their mean within 4.9 standard errors."""
    with Density(discrete_net(), learning=True) as density:
        guide = PairedGuide(density)
        exact = float(loss(density, guide, 1, "enumerated").detach())
        assert exact == float(loss(density, guide, 7, "enumerated").detach())
        torch.manual_seed(3)
        z, log_q, _ = guide.draw(2000)
        draws = -(density.log_joint(z) - log_q).sum(1).detach()
    assert abs(float(draws.mean()) - exact) < 4.9 * float(draws.std()) / math.sqrt(2000)


def test_minibatches_stand_for_all_data():
    problem = gaussian_mixture.problem(num_data=20)
    with Density(problem, learning=True) as density:
        guide = PairedGuide(density)
        whole = float(loss(density, guide, 1, "enumerated").detach())
        halves = []
        for rows in (torch.arange(8), torch.arange(8, 16), torch.arange(16, 20)):
            with density.minibatch(rows):
                halves.append(float(loss(density, guide, 1, "enumerated").detach()) * len(rows) / 20)
    assert sum(halves) == pytest.approx(whole, rel=1e-12)


def test_svi_by_enumeration_reaches_the_posterior():
    """The net's guide has one distribution for all data, so its bound stays below. The mixture's guide holds the
    posterior: a fit closes all but half a nat of the gap over 40 data, and learns theta up to the maximum."""
    net = infer(discrete_net(), SVI(objective="enumerated", num_steps=300, learning_rate=0.05))
    truth = discrete_net().reference_at({}).log_evidence.value
    assert net.status.done, net.status
    assert bool((net.log_evidence.value < truth + 4.9 * net.log_evidence.std_error).all())
    problem = gaussian_mixture.problem(num_data=40)
    theta = learn(problem, EM(num_steps=5)).parameters
    fitted = infer(problem, SVI(objective="enumerated", num_steps=600, learning_rate=0.05), parameters=theta)
    off = fitted.log_evidence.value - problem.reference_at(theta).log_evidence.value
    begun = infer(problem, SVI(objective="enumerated", num_steps=1, learning_rate=1e-9), parameters=theta)
    assert float((begun.log_evidence.value - problem.reference_at(theta).log_evidence.value).sum()) < -2
    assert -0.5 < float(off.sum()) < 4.9 * fitted.log_evidence.total()[1]
    learned = learn(problem, SVI(objective="enumerated", num_steps=600, learning_rate=0.02))
    best = float(learn(problem, EM(num_steps=200)).trail.value[-1])
    assert best - 0.5 < float(learned.trail.value[-1]) <= best + 1e-6


def test_what_cannot_be_listed_is_refused_in_words():
    svi = SVI(objective="enumerated")
    assert "leave discrete sites out" in infer(conjugate_gaussian.problem(), svi).status.reason
    assert "leave discrete sites out" in infer(correlated(), svi).status.reason


# ---------------------------------------------------------------------------------------------------------------
# Refined for each datum


def lazy(problem: Problem) -> Problem:
    """The problem with one normal for all data, whatever they are."""

    def guide(x: Tensor) -> None:
        loc = pyro.param("q_loc", lambda: x.new_zeros(2))
        scale = pyro.param("q_scale", lambda: x.new_ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return Problem(problem.model, args=problem.args, guide=guide, reference=problem.reference, name="lazy")


def test_a_normal_stands_where_it_is_put():
    """log q and moments of an AutoMultivariateNormal that was given a mean and a covariance, for each of 3 data."""
    problem = ppca.problem(num_data=3)
    torch.manual_seed(4)
    mean, tril = torch.randn(3, 2, dtype=F64), torch.tensor([[0.5, 0.0], [-0.7, 0.2]], dtype=F64).expand(3, 2, 2)
    with Density(problem) as density, torch.no_grad():
        guide = AutoGuide(density, "AutoMultivariateNormal")
        guide.stand(mean, tril)
        u, log_q, _ = guide.draw(20)
    torch.testing.assert_close(log_q, dist.MultivariateNormal(mean, scale_tril=tril).log_prob(u), rtol=0, atol=1e-9)


def test_refining_closes_the_gap_of_each_datum():
    """Normal posteriors, so the refined bound can be the evidence: below it for every datum, within 0.02 nats, where a
    guide that ignores the data loses more than 5 nats in all; and the gain is told."""
    problem = lazy(ppca.problem(num_data=12))
    lazily = infer(problem, SVI(num_steps=300, num_particles=4, learning_rate=0.02))
    refined = infer(problem, SemiAmortised(num_steps=300, num_particles=4, refine_steps=300, learning_rate=0.02))
    truth = problem.reference_at(refined.parameters).log_evidence.value
    bound = refined.log_evidence
    assert refined.status.done, refined.status
    assert bound.kind == "lower bound"
    assert bool((bound.value <= truth + 4.9 * bound.std_error + 1e-9).all())
    assert bool((bound.value > truth - 0.02).all())
    error = torch.hypot(bound.std_error, lazily.log_evidence.std_error)
    assert bool((bound.value >= lazily.log_evidence.value - 4.9 * error).all())
    assert float((truth - lazily.log_evidence.value).sum()) > 5
    gain = refined.diagnostics["elbo_gain"]
    assert gain.shape == (12,)
    assert float((gain - (bound.value - lazily.log_evidence.value)).abs().max()) < 1.0
    torch.testing.assert_close(refined.mean("z"), problem.reference_at(refined.parameters).mean["z"], rtol=0, atol=0.15)


def test_more_steps_gain_more():
    problem = lazy(ppca.problem(num_data=12))
    totals = [
        infer(problem, SemiAmortised(num_steps=10, refine_steps=steps, refine_rate=0.02)).log_evidence.total()[0]
        for steps in (1, 40, 160)
    ]
    assert totals[0] + 1 < totals[1]
    assert totals[1] + 0.5 < totals[2]


def test_one_small_step_leaves_the_guide_where_it_was():
    """Begun at the moments of 1,000 draws of a normal guide: the ELBO per datum within 0.05 nats of its own."""
    problem = lazy(ppca.problem(num_data=6))
    posterior = infer(problem, SemiAmortised(num_steps=1, learning_rate=1e-9, refine_steps=1, refine_rate=1e-9))
    assert float(posterior.diagnostics["elbo_gain"].abs().max()) < 0.5
    draws = posterior.draws["z"][0]
    assert float(draws.mean(0).abs().max()) < 6 / math.sqrt(500)
    assert float((draws.std(0) - 1).abs().max()) < 6 / math.sqrt(1000)


def test_refining_that_loses_is_an_alarm():
    posterior = infer(ppca.problem(num_data=6), SemiAmortised(num_steps=1, refine_steps=20, refine_rate=3.0))
    assert posterior.status.state == "failed" or "reduce refine_rate" in posterior.diagnostics.verdict


def test_as_e_step_theta_learns_from_refined_posteriors():
    problem = conjugate_gaussian.problem(num_data=50)
    e_step = SemiAmortised(num_steps=10, refine_steps=15, refine_rate=0.1, num_samples=100)
    fit = learn(problem, EM(e_step=e_step, num_steps=12))
    assert fit.status.done, fit.status
    assert float(fit.parameters["theta"]) == pytest.approx(float(problem.args[0].mean()), abs=0.1)


def test_without_a_guide_there_is_nothing_to_amortise():
    assert "no guide to amortise" in infer(poisson_rates(), SemiAmortised()).status.reason
    assert "use SVI" in infer(discrete_net(), SemiAmortised()).status.reason
    assert np.isfinite(infer(ppca.problem(num_data=4), SemiAmortised(num_steps=5)).cost.gradients)


@pytest.mark.parametrize("calls", [600, 6000])
def test_sized_spends_about_what_it_is_given(calls):
    problem = ppca.problem(num_data=8)
    for engine in (SemiAmortised(), SemiAmortised(batch_size=4)):
        with Density(problem) as density:
            sized = engine.sized(calls, density)
        cost = infer(problem, sized).cost
        assert 0.6 * calls < cost.evaluations + cost.gradients < 1.5 * calls + 1300  # the start takes 1,000 draws
