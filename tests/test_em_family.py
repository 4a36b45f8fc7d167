"""EM in its variants: exact, generalised, variational, hard, from several starts, and with stochastic approximation.

Exact steps are compared with steps by hand, fixed points with zero gradients. Where chance judges, the test says how
far off what it looks at would be.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyrometer.inference import (
    EM,
    HMC,
    MAP,
    NUTS,
    SAEM,
    SVI,
    Enumeration,
    ImportanceSampling,
    Problem,
    ProblemError,
    Quadrature,
    infer,
    learn,
)
from pyrometer.inference.density import Density
from pyrometer.inference.em_steps import improve, maximise
from pyrometer.inference.engine import Draws, Run
from pyrometer.inference.learning import expected_log_joint, flat_draws
from pyrometer.inference.memory import MOST, Memory
from pyrometer.models import conjugate_gaussian, gaussian_mixture, ppca

F64 = torch.float64


def full_mixture(seed: int = 0, **settings) -> Problem:
    small = {"num_data": 80, "separation": 3.0, "num_components": 2, "covariance": "full"}
    return gaussian_mixture.problem(**{**small, "seed": seed, **settings})


# ---------------------------------------------------------------------------------------------------------------
# Exact


def test_responsibilities_are_those_of_the_densities_written_out():
    """To 1e-12, by scipy's normal densities and by the reference, at a theta that is not the start."""
    problem = full_mixture()
    theta = learn(problem, EM(num_steps=3)).parameters
    weights = infer(problem, Enumeration(), parameters=theta).weights()[0]
    x = problem.args[0].numpy()
    joint = np.stack(
        [
            float(w) * stats.multivariate_normal.pdf(x, m, L @ L.T)
            for w, m, L in zip(*(theta[n].numpy() for n in ("weights", "locs", "scale_trils")), strict=True)
        ]
    )
    np.testing.assert_allclose(weights, joint / joint.sum(0), rtol=0, atol=1e-12)
    reference = problem.reference_at(theta)
    np.testing.assert_allclose(torch.softmax(reference.log_weights, 0), joint / joint.sum(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(reference.log_evidence.value, np.log(joint.sum(0)), rtol=0, atol=1e-12)


def climbs(count: int) -> None:
    for seed in range(count):
        fit = learn(full_mixture(seed), EM(num_steps=15, tolerance=0.0))
        assert fit.status.done, fit.status
        value = fit.trail.value
        assert len(value) > 4  # an assignment that is certain converges early
        assert bool((value.diff() >= -1e-9 * (1 + value[1:].abs())).all())
        assert float(value[-1] - value[0]) > 1


def test_full_covariances_never_lower_the_likelihood():
    climbs(10)


@pytest.mark.slow
def test_full_covariances_never_lower_the_likelihood_over_200_data_sets():
    climbs(200)


def test_the_fixed_point_is_a_maximum_of_the_likelihood():
    """The gradient of the log evidence, by its own formula, is zero there, and every small move lowers it."""
    problem = full_mixture(num_data=200)
    fit = learn(problem, EM(num_steps=2000, tolerance=1e-12))
    leaves = {name: value.clone().requires_grad_() for name, value in fit.parameters.items()}
    total = gaussian_mixture.full_reference(leaves, *problem.args).log_evidence.value.sum()
    assert float(fit.trail.value[-1]) == pytest.approx(float(total.detach()), rel=1e-12)
    gradient = dict(zip(leaves, torch.autograd.grad(total, leaves.values()), strict=True))
    assert float(gradient["locs"].abs().max()) < 1e-6
    assert float(gradient["scale_trils"].tril().abs().max()) < 1e-6
    torch.testing.assert_close(gradient["weights"], torch.full((2,), 200.0, dtype=F64), rtol=0, atol=1e-6)


def test_an_m_step_that_is_no_maximum_is_found_out():
    """An M-step with the means of the step before: the likelihood falls, and the run fails at that step."""
    problem = gaussian_mixture.problem()

    def wrong(draws, weights, x):
        good = problem.m_step(draws, weights, x)
        return {**good, "scales": 1.7 * good["scales"]}

    fit = learn(replace(problem, m_step=wrong), EM(num_steps=20))
    assert fit.status.state == "failed"
    assert "the log likelihood fell from" in fit.status.reason
    assert "at step" in fit.status.reason
    assert "M-step (closed)" in fit.status.reason


def test_random_e_steps_may_fall():
    problem = conjugate_gaussian.problem(num_data=30)
    fit = learn(problem, EM(e_step=ImportanceSampling(num_samples=20, proposal="prior"), num_steps=60), seed=1)
    assert fit.status.done, fit.status
    assert float(fit.trail.value.diff().min()) < 0


def test_a_generalised_m_step_climbs_and_tells_when_it_overshoots():
    problem = gaussian_mixture.problem(num_data=80)
    small = EM(m_step="gradient", num_steps=40, gradient_steps=1, learning_rate=0.01)
    fit = learn(problem, small)
    assert bool((fit.trail.value.diff() >= 0).all())
    assert not any("overshot" in note for note in fit.notes)
    best = float(learn(problem, EM(num_steps=400)).trail.value[-1])
    longer = learn(problem, replace(small, num_steps=600, gradient_steps=2, learning_rate=0.02))
    assert float(longer.trail.value[-1]) == pytest.approx(best, abs=0.1)
    wild = learn(problem, replace(small, learning_rate=0.5))
    assert any("overshot: reduce learning_rate" in note for note in wild.notes)


def test_variational_em_climbs_a_lower_bound():
    """The guide of pPCA holds the posterior, so the bound ends at the likelihood's maximum less what Adam leaves."""
    problem = ppca.problem(num_data=60)
    e_step = SVI(num_steps=15, num_particles=5, learning_rate=0.03, num_samples=200)
    fit = learn(problem, EM(e_step=e_step, num_steps=40), seed=2)
    _, best = ppca.maximum_likelihood(problem.args[0], 2)
    assert fit.trail.kind == "lower bound"
    assert bool((fit.trail.value <= best + 4.9 * fit.trail.std_error).all())
    assert best - 5 < float(fit.trail.value[-1])
    assert float(fit.trail.value[0]) < best - 20


# ---------------------------------------------------------------------------------------------------------------
# Hard


def test_hard_em_is_lloyds_algorithm():
    """Equal weights and unit variances: assign to the nearest centre, take means; step by step as by hand."""
    x = gaussian_mixture.problem(num_data=60, num_components=3, separation=2.5).args[0]
    start = x[:3]

    def model(x: Tensor) -> None:
        locs = pyro.param("locs", start.clone)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3, dtype=F64)))
            pyro.sample("x", dist.Normal(locs[z], 1.0).to_event(1), obs=x)

    centres = start
    for steps in (1, 2, 3, 50):
        fit = learn(Problem(model, args=(x,)), EM(hard=True, num_steps=steps))
        centres = start
        for _ in range(steps):
            nearest = torch.cdist(x, centres).argmin(1)
            centres = torch.stack([x[nearest == k].mean(0) for k in range(3)])
        torch.testing.assert_close(fit.parameters["locs"], centres, rtol=0, atol=1e-6)
    assert "converged after" in fit.notes[0]
    assert torch.equal(fit.posterior.draws["z"][0, 0], torch.cdist(x, centres).argmin(1))
    assert fit.posterior.kind == "point"
    assert fit.posterior.log_evidence is None


def test_the_trail_of_hard_em_is_the_best_log_joint():
    problem = gaussian_mixture.problem()
    fit = learn(problem, EM(hard=True))
    best = problem.reference_at(fit.parameters).log_weights.amax(0).sum()
    assert float(fit.trail.value[-1]) == pytest.approx(float(best), rel=1e-12)
    assert fit.trail.kind == "lower bound"
    assert bool((fit.trail.value.diff() >= -1e-9 * fit.trail.value[1:].abs()).all())
    soft = learn(problem, EM(num_steps=300))
    assert float(soft.trail.value[-1]) > float(fit.trail.value[-1])


def test_hard_em_of_continuous_latents_climbs_the_log_joint():
    """x_i ~ N(z_i, 1), z_i ~ N(theta, 1): theta = mean(x), z_i = (x_i + theta) / 2."""
    problem = conjugate_gaussian.problem(num_data=30)
    x = problem.args[0]
    fit = learn(problem, EM(hard=True, num_steps=80))
    assert fit.status.done, fit.status
    assert float(fit.parameters["theta"]) == pytest.approx(float(x.mean()), abs=1e-8)
    torch.testing.assert_close(fit.posterior.draws["z"][0, 0], (x + x.mean()) / 2, rtol=0, atol=1e-8)
    assert fit.trail.kind == "estimate"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hard": True, "e_step": NUTS()}, "e_step='nuts' gives no mode"),
        ({"hard": True, "e_step": MAP(space="unconstrained")}, "space='constrained'"),
        ({"num_starts": 2, "batch_size": 10}, "use batch_size=None"),
        ({"num_starts": 0}, "num_starts=0"),
        ({"start_spread": 0}, "start_spread=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ProblemError, match=message):
        EM(**settings)


# ---------------------------------------------------------------------------------------------------------------
# Several starts


def test_several_starts_leave_a_poor_maximum():
    """Both locs of two components start at one place, which is a saddle that EM cannot leave; other starts do."""
    problem = gaussian_mixture.problem(num_data=100, num_components=2, separation=6.0)
    x = problem.args[0]
    stuck = {"locs": x.mean(0).expand(2, 2)}
    single = learn(problem, EM(num_steps=200), parameters=stuck)
    several = learn(problem, EM(num_steps=200, num_starts=4), parameters=stuck)
    good = learn(problem, EM(num_steps=200))
    assert float(good.trail.value[-1]) > float(single.trail.value[-1]) + 10
    assert float(several.trail.value[-1]) == pytest.approx(float(good.trail.value[-1]), abs=1e-6)
    told = [note for note in several.notes if note.startswith("start ")]
    assert len(told) == 4
    assert told[0].startswith(f"start 1 ended at {float(single.trail.value[-1]):.6g}")
    at_end = problem.reference_at(several.parameters).log_evidence.total()[0]
    assert at_end == pytest.approx(float(several.trail.value[-1]), rel=1e-10)  # theta and posterior are the best's
    torch.testing.assert_close(several.posterior.parameters["locs"], several.parameters["locs"], rtol=0, atol=0)


def test_starts_that_fail_are_told_and_passed_over():
    problem = gaussian_mixture.problem(num_data=60)
    fit = learn(problem, EM(num_steps=50, num_starts=6, start_spread=8.0))
    assert fit.status.done, fit.status
    assert any("failed: " in note and "holds no data" in note for note in fit.notes)


def test_starts_need_evidence_to_be_compared():
    engine = HMC(num_samples=5, warmup_steps=5, num_chains=1, num_steps=1)
    fit = learn(conjugate_gaussian.problem(num_data=5), EM(e_step=engine, num_steps=2, num_starts=2))
    assert "gives none" in fit.status.reason


# ---------------------------------------------------------------------------------------------------------------
# Stochastic approximation


class ExactDraw:
    """One draw of each z_i from N((x_i + theta) / 2, 1 / 2)."""

    name = "exact_draw"

    def supports(self, density) -> str:
        return ""

    def run(self, density, run) -> Draws:
        mean = (density.args[0] + density.theta.values()["theta"]) / 2
        return Draws({"z": (mean + math.sqrt(0.5) * torch.randn_like(mean))[None, None]}, "iid")


def root_mean_square(learner) -> float:
    """Of theta less the mean of the data, over 12 seeds."""
    problem = conjugate_gaussian.problem(num_data=100)
    errors = [
        float(learn(problem, learner, seed=seed).parameters["theta"] - problem.args[0].mean()) for seed in range(12)
    ]
    return math.sqrt(sum(e**2 for e in errors) / len(errors))


def test_saem_goes_where_monte_carlo_em_cannot():
    """One exact draw for each of 100 data. Monte Carlo EM keeps an error of 0.071 / sqrt(3/4) = 0.082. SAEM's, of a
    Robbins-Monro sequence with gain 1/k and drift 1/2, is 0.071 sqrt(log(k) / k): 0.013 after k = 150 steps, and half
    as much again from the start. The root mean square over 12 seeds is within 40 % of its own in all but 1 of 10^4."""
    assert root_mean_square(SAEM(e_step=ExactDraw(), num_steps=165, warmup_steps=15)) < 0.03
    assert root_mean_square(EM(e_step=ExactDraw(), num_steps=40)) > 0.05


@pytest.mark.slow
def test_saem_by_chains_reaches_the_maximum_of_the_likelihood():
    """pPCA: the sum over 200 data is flat in the likelihood near its maximum, within 0.3 nats of the eigen-solution."""
    problem = ppca.problem()
    fit = learn(problem, SAEM(num_steps=200, warmup_steps=60))
    exact, best = ppca.maximum_likelihood(problem.args[0], 2)
    assert fit.status.done, fit.status
    assert not fit.notes
    assert best - 0.3 < problem.reference_at(fit.parameters).log_evidence.total()[0] <= best + 1e-9
    assert float(fit.parameters["sigma"]) == pytest.approx(float(exact["sigma"]), abs=0.01)


def test_saem_by_gradients_where_no_maximum_is_declared():
    problem = replace(conjugate_gaussian.problem(num_data=100), m_step=None)
    fit = learn(problem, SAEM(e_step=ExactDraw(), num_steps=300))
    assert float(fit.parameters["theta"]) == pytest.approx(float(problem.args[0].mean()), abs=0.05)


def test_saem_remembers_with_the_weights_of_its_recursion():
    """Q_t = (1 - g_t) Q_{t-1} + g_t q_t, as draws with weights: equal to the recursion of values, to rounding; and what
    was drawn before a gain of 1 is forgotten."""
    torch.manual_seed(0)
    memory, value = Memory(Density(conjugate_gaussian.problem(num_data=4))), 0.0
    for gain in (1.0, 1.0, 0.5, 1 / 3, 0.7):
        draws, weights = {"z": torch.randn(3, 4, dtype=F64)}, torch.softmax(torch.randn(3, 4, dtype=F64), 0)
        value = (1 - gain) * value + gain * float((weights * draws["z"].square()).sum())
        all_draws, all_weights = memory.blended(draws, weights, gain)
        assert float((all_weights * all_draws["z"].square()).sum()) == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(all_weights.sum(0), torch.ones(4, dtype=F64), rtol=0, atol=1e-12)
    assert len(all_weights) == 3 * 4


def test_saem_remembers_a_quadratic_log_joint_whole():
    """pPCA: the M-step on what is remembered is that on all 1,500 draws of each datum, though at most 400 are kept."""
    problem = ppca.problem(num_data=30)
    torch.manual_seed(0)
    density = Density(problem)
    memory, every = Memory(density), []
    with density, torch.no_grad():
        for k in range(1, 751):
            every.append(torch.randn(2, 30, 2, dtype=F64) + torch.arange(30)[:, None])
            kept, weights = memory.blended({"z": every[-1]}, torch.full((2, 30), 0.5, dtype=F64), 1 / k)
            assert len(weights) <= MOST
    assert not memory.thinned
    whole = torch.cat(every)
    equal = torch.full(whole.shape[:2], 1 / len(whole), dtype=F64)
    found, exact = (problem.m_step(*draws, *problem.args) for draws in ((kept, weights), ({"z": whole}, equal)))
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8)


def test_saem_remembers_how_often_each_state_was_drawn():
    problem = gaussian_mixture.problem(num_data=20)
    torch.manual_seed(0)
    density = Density(problem)
    memory, every = Memory(density), []
    with density, torch.no_grad():
        for k in range(1, 1001):
            every.append(torch.randint(2, (1, 20)) * torch.randint(2, (1, 20)))
            kept, weights = memory.blended({"z": every[-1]}, torch.ones(1, 20, dtype=F64), 1 / k)
            assert len(weights) <= MOST
    assert not memory.thinned
    share = (weights * (kept["z"] == 1)).sum(0)
    torch.testing.assert_close(share, (torch.cat(every) == 1).double().mean(0), rtol=0, atol=1e-12)


def test_saem_thins_what_it_cannot_shorten_and_says_so():
    """A log joint of fourth order in z; 1,000 steps of N(0, 1) with weight 3/4 and N(4, 1) with 1/4, for 100 data. The
    moments are those of 200 draws or more: E z = 1 within 4.9 sqrt(4 / 200 / 100) = 0.07 and E z^2 = 5 within 4.9
    sqrt(66 / 200 / 100) = 0.28 (false alarm 2e-6 in all). Lost weights would make them 2 and 9."""

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.ones((), dtype=F64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(scale * z.square(), 1.0), obs=x)

    torch.manual_seed(0)
    density = Density(Problem(model, args=(torch.zeros(100, dtype=F64),)))
    memory = Memory(density)
    weights_of_two = torch.tensor([[0.75], [0.25]], dtype=F64).expand(2, 100)
    with density, torch.no_grad():
        for k in range(1, 1001):  # in the second row, a quarter of the weight, draws around 4
            z = torch.randn(2, 100, dtype=F64) + torch.tensor([[0.0], [4.0]], dtype=F64)
            kept, weights = memory.blended({"z": z}, weights_of_two, 1 / k)
            assert len(weights) <= MOST
    assert memory.thinned
    first, second = (float((weights * kept["z"] ** power).sum(0).mean()) for power in (1, 2))
    assert abs(first - 1.0) < 4.9 * math.sqrt(4.0 / 200 / 100)
    assert abs(second - 5.0) < 4.9 * math.sqrt(66.0 / 200 / 100)
    fit = learn(
        Problem(model, args=(torch.ones(5, dtype=F64),)),
        SAEM(e_step=ImportanceSampling(num_samples=300, proposal="prior"), num_steps=4, warmup_steps=1, m_step="full"),
    )
    assert any("was thinned to 200 draws" in note for note in fit.notes), fit.notes


def test_saem_of_exact_e_steps_is_a_damped_em():
    problem = gaussian_mixture.problem(num_data=80)
    fit = learn(problem, SAEM(num_steps=120, warmup_steps=60))
    best = learn(problem, EM(num_steps=300))
    assert float(fit.trail.value[-1]) == pytest.approx(float(best.trail.value[-1]), abs=1e-3)


def test_saem_tells_of_chains_that_do_not_move():
    stuck = HMC(num_chains=1, num_samples=1, warmup_steps=0, step_size=50.0)
    fit = learn(conjugate_gaussian.problem(num_data=20), SAEM(e_step=stuck, num_steps=5, warmup_steps=2))
    assert any("hardly move" in note for note in fit.notes)


def test_saem_refuses_what_it_cannot_do():
    with pytest.raises(ProblemError, match=r"decay=0\.5"):
        SAEM(decay=0.5)
    with pytest.raises(ProblemError, match="declares no closed-form M-step"):
        learn(replace(ppca.problem(), m_step=None), SAEM(m_step="closed"))
    with pytest.raises(ProblemError, match="Did you mean 'num_steps'"):
        SAEM(max_iter=3)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 50])
def test_the_climb_leaves_its_tensors_where_it_ended(num_steps):
    """As torch's own L-BFGS does on the tensors themselves, wherever it is stopped on its way through a valley."""

    def valley(t: Tensor) -> Tensor:
        return -((1 - t[0]) ** 2 + 10 * (t[1] - t[0] ** 2) ** 2)

    ours, theirs = (torch.tensor([-1.0, 1.5], dtype=F64, requires_grad=True) for _ in range(2))
    maximise(lambda: valley(ours), [ours], num_steps)
    optimizer = torch.optim.LBFGS(
        [theirs], max_iter=num_steps, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -valley(theirs)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-12)


def test_the_expected_log_joint_rises_in_every_exact_m_step():
    """Q at the new theta is at least Q at the old one, on the same draws: quadrature nodes of pPCA."""
    problem = ppca.problem(num_data=20)
    with Density(problem, learning=True, dtype=F64) as density, torch.no_grad():
        draws = Quadrature(num_nodes=3).run(density, Run(density, np.random.SeedSequence(0)))
        values, weights = flat_draws(draws, (20,))
        before = float(expected_log_joint(density, values, weights))
        improve("closed", density, values, weights, torch.optim.Adam(density.theta.tensors), 1)
        closed = float(expected_log_joint(density, values, weights))
        improve("full", density, values, weights, torch.optim.Adam(density.theta.tensors), 1)
        full = float(expected_log_joint(density, values, weights))
    assert before + 1 < closed
    assert full == pytest.approx(closed, abs=1e-6)
