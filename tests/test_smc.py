"""Sequential Monte Carlo against exact answers: evidence on the natural and the log scale, its error, and moments.

200 copies of a datum are 200 runs. A figure fails by chance with 1e-6 at |z| < 4.9; about 120 of them make 1e-4. The
standard error of mean Z-hat / Z is asserted to be below 0.02, so that a factor of 1.1 in the evidence is seen at once;
an error of the mean of 0.2 posterior sd / sqrt(200) likewise.
"""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from annealed import MAKERS, correlated, gamma_poisson
from scipy.optimize import brentq
from torch import Tensor
from zoo import EXACT

from pyrometer.inference import SMC, AnnealedImportance, Problem, ProblemError, groups, infer, tempering, why_not
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Draws, Run, isolated
from pyrometer.inference.kernels import streams
from pyrometer.inference.kernels.metropolis import HMC, RandomWalk
from pyrometer.inference.kernels.paths import PATHS, begin
from pyrometer.models import conjugate_gaussian

F64 = torch.float64
RUNS, LIMIT = 200, 4.9
every_case = pytest.mark.parametrize("case", MAKERS)


def errors(copies, engine, seed=1):
    """log Z-hat - log Z of all copies, checked to be what they should; and the posterior."""
    posterior = infer(copies.problem, engine, seed=seed)
    assert posterior.status.done, posterior.status
    off = posterior.log_evidence.value - copies.log_evidence
    assert off.shape == (RUNS,)
    return off, posterior


def assert_unbiased(off: Tensor, se: float = 0.02) -> None:
    ratio = off.exp()
    error = float(ratio.std() / math.sqrt(len(off)))
    assert error <= se
    assert abs(float(ratio.mean()) - 1) < LIMIT * error, ratio.mean()
    assert abs(float(off.mean())) <= 0.05


def assert_moments(copies, posterior) -> None:
    """Mean and second moment over the copies. Their ratio estimators are biased by O(1 / S): 0.02 sd are let pass."""
    x = posterior.draws[copies.site].reshape(1, posterior.num_samples, RUNS, -1)[..., 0]
    w = posterior.weights()
    z = (x - copies.mean) / copies.sd
    for power, expected in ((1, 0.0), (2, 1.0)):
        estimate = (w * z**power).sum((0, 1))
        error = float(estimate.std() / math.sqrt(RUNS))
        assert error < 0.03
        assert abs(float(estimate.mean()) - expected) < LIMIT * error + 0.02, (power, estimate.mean())


# -- evidence, its error, and moments --------------------------------------------------------------------------------


@every_case
def test_evidence_is_unbiased_its_error_covers_and_the_moments_are_right(case):
    copies = MAKERS[case](RUNS)
    off, posterior = errors(copies, SMC(num_samples=400))
    assert_unbiased(off)
    assert_moments(copies, posterior)
    assert 0.6 < float((off / posterior.log_evidence.std_error).square().mean()) < 1.5
    assert float(posterior.diagnostics.figures["temperatures"].min()) >= 2


@pytest.mark.parametrize("policy", ["never", "always", "adaptive"])
@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual", "multinomial"])
def test_every_scheme_and_policy_gives_the_same_evidence(policy, scheme):
    engine = SMC(num_samples=200, policy=policy, resampling=scheme, target_ess=0.5, threshold=0.7)
    off, posterior = errors(correlated(RUNS), engine)
    assert_unbiased(off)
    # too large is safe: measured from 0.85 to 1.15
    assert 0.5 < float((off / posterior.log_evidence.std_error).square().mean()) < 1.6
    assert_moments(correlated(RUNS), posterior)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": "langevin"},
        {"kernel": "random_walk"},
        {"kernel": HMC(num_steps=2), "num_moves": 2},
        {"kernel": "nuts", "num_moves": 1},
        {"path": "arithmetic", "num_temperatures": 20},
        {"criterion": "ess"},
        {"num_temperatures": 8},
    ],
    ids=str,
)
def test_every_kernel_path_and_schedule_gives_the_same_evidence(settings):
    copies = gamma_poisson(RUNS)
    off, posterior = errors(copies, SMC(num_samples=200, **settings))
    assert_unbiased(off)
    assert_moments(copies, posterior)


def test_the_error_covers_where_moves_hardly_mix():
    """One random step at each temperature: what the families of the first particles have in common is most of it."""
    engine = SMC(num_samples=200, kernel=RandomWalk(target_acceptance=0.7), num_moves=1, num_temperatures=10)
    off, posterior = errors(correlated(RUNS), replace(engine, policy="always"))
    assert_unbiased(off, 0.03)
    assert 0.5 < float((off / posterior.log_evidence.std_error).square().mean()) < 1.8


def test_the_start_does_not_matter():
    copies = MAKERS["guided"](RUNS)
    for start in ("prior", "guide"):
        off, posterior = errors(copies, SMC(num_samples=200, start=start))
        assert_unbiased(off)
        assert_moments(copies, posterior)


def test_the_variance_falls_like_one_over_the_particles():
    counts = np.array([50, 200, 800])
    variances = [float(errors(correlated(RUNS), SMC(num_samples=int(n), num_temperatures=8))[0].var()) for n in counts]
    slope = np.polyfit(np.log(counts), np.log(variances), 1)[0]
    assert abs(slope + 1) < 0.2, slope


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"flat_prior", "dirichlet_multinomial"}))
def test_the_zoo_has_its_evidence_and_its_means(name):
    """Global latents among them, and discrete ones that are summed out. Six standard errors of the run's own: the
    smallest error seen is about 0.3 nats."""
    entry = EXACT[name]()
    posterior = infer(entry.problem, SMC(), seed=3)
    assert posterior.status.done, posterior.status
    value, error = posterior.log_evidence.total()
    assert error < 0.1
    assert abs(value - entry.log_evidence) < 6 * error
    w = posterior.weights()
    for label, marginal in entry.marginals.items():
        x = marginal.of(posterior.draws)
        batch = posterior.batch_shape
        own = w if not batch else w[..., int(label.split("[")[1].split(",")[0].rstrip("]"))]
        assert abs(float((own * x).sum()) - marginal.law.mean()) < 0.25 * marginal.law.std(), label


# -- the parts it is made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["cess", "ess"])
def test_the_next_temperature_leaves_the_share_that_was_asked_for(criterion):
    """Against a root found by scipy, for an increment that is far from symmetric and uneven weights."""
    rng = np.random.default_rng(0)
    delta = -np.exp(1 + rng.normal(size=(500, 2)))
    w = rng.dirichlet(np.ones(500), 2).T
    beta = np.array([0.0, 0.2])

    def change(to: Tensor) -> Tensor:
        return (to - torch.from_numpy(beta)) * torch.from_numpy(delta)

    plan = tempering.PathPlan(criterion=criterion, target=0.6)
    found = tempering._next(torch.from_numpy(beta), torch.from_numpy(np.log(w)), change, plan)

    def share(to: float, k: int) -> float:
        v = np.exp((to - beta[k]) * delta[:, k])
        if criterion == "cess":
            return (w[:, k] @ v) ** 2 / (w[:, k] @ v**2)
        return (w[:, k] @ v) ** 2 / np.square(w[:, k] * v).sum() * np.square(w[:, k]).sum()

    for k in range(2):
        expected = brentq(lambda to, k=k: share(to, k) - 0.6, beta[k], 1)
        assert 0 <= float(found[k]) / expected - 1 < 2e-6


@pytest.mark.parametrize("spread", [0.1, 10.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_next_temperature_is_found_in_few_looks(spread, dtype):
    """From any stride on, for steps of any size, also where half of the particles die at once."""
    looks = []
    delta = torch.from_numpy(-spread * np.random.default_rng(1).normal(size=(500, 1)) ** 2).to(dtype)
    dead = torch.where(delta < delta.median(), -math.inf, 0.0)
    even, beta = torch.full((500, 1), -math.log(500), dtype=dtype), torch.zeros(1, dtype=dtype)

    for increment, stride in itertools.product((delta, dead), (1e-12, 1e-3, 1.0)):
        looks.append(0)

        def change(to: Tensor, increment: Tensor = increment) -> Tensor:
            looks[-1] += 1
            return to * increment

        found = tempering._next(beta, even, change, tempering.PathPlan(target=0.8), torch.full_like(beta, stride))
        assert 0 < float(found) <= 1
        kept = change(found).exp()
        share = float(kept.mean() ** 2 / kept.square().mean())
        assert (share >= 0.8 and float(found) == 1) or share == pytest.approx(0.8, abs=1e-3) or increment is dead
    assert max(looks) <= 30


def carried(copies, plan, count=100):
    """What is told of copies after the path, their lanes, and the density there."""
    density = Density(copies.problem)
    with isolated(0), torch.no_grad(), density:
        parts, draw = begin(density, "prior")
        u = draw(count).reshape(-1, density.dim)
        bound = groups.Bound(density, count, parts, groups.KERNELS["hmc"], PATHS["geometric"], u)
        _, ids, _ = next(bound.groups())
        key, datum_key = streams.keys(1, len(u)), streams.keys(2, bound.data)
        point, answer = tempering.carry(bound, bound.point(u[ids]), key, datum_key, plan)
        return answer, point, bound.lanes.evaluate(point.u)


def test_what_is_known_of_a_particle_moves_with_it():
    _, point, (values, gradients) = carried(correlated(7), tempering.PathPlan(policy="always", moves=1, exactly=True))
    torch.testing.assert_close(point.values, values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(point.gradients, gradients, rtol=1e-9, atol=1e-9)


def test_the_last_weights_are_kept_and_normalised():
    answer, _, _ = carried(correlated(7), tempering.PathPlan(policy="always"))
    torch.testing.assert_close(answer.log_weights.exp().sum(0), torch.ones(7, dtype=F64))
    assert bool((answer.log_weights.std(0) > 1e-6).all())
    assert bool((answer.ancestors_left < 80).all())
    answer, _, _ = carried(correlated(7), tempering.PathPlan(policy="never"))
    assert bool((answer.ancestors_left == 100).all())
    assert bool((1 / answer.log_weights.exp().square().sum(0) < 60).all())


def test_data_go_at_their_own_pace():
    problem = gamma_poisson(3).problem.on(torch.tensor([1.0, 9.0, 60.0], dtype=F64))
    posterior = infer(problem, SMC(num_samples=300), seed=0)
    stages = posterior.diagnostics.figures["temperatures"]
    assert bool((stages.diff() >= 2).all()), stages


def test_data_in_groups_have_the_answer_of_all_at_once(monkeypatch):
    """Seven data in groups of three, the last of them filled up, with random numbers of their own."""
    problem = gamma_poisson(7).problem.on(torch.tensor([0.0, 3, 9, 1, 30, 2, 5], dtype=F64))
    whole = infer(problem, SMC(num_samples=50), seed=0)
    monkeypatch.setattr(groups, "BLOCK", 150)
    parts = infer(problem, SMC(num_samples=50), seed=0)
    torch.testing.assert_close(parts.log_evidence.value, whole.log_evidence.value, rtol=0, atol=1e-8)
    torch.testing.assert_close(parts.log_weights, whole.log_weights, rtol=0, atol=1e-8)
    torch.testing.assert_close(parts.draws["rate"], whole.draws["rate"], rtol=1e-7, atol=1e-8)
    assert parts.cost.gradients < 3 * whole.cost.gradients


@pytest.mark.parametrize(
    "engine",
    [SMC(num_samples=20), AnnealedImportance(num_samples=8, num_temperatures=10, kernel=HMC(num_steps=2))],
    ids=lambda engine: engine.name,
)
def test_a_density_is_compiled_once_for_many_runs(engine):
    """As E-steps are: at other parameters and other rows of the data, the answer that a new density would give."""
    problem = conjugate_gaussian.problem(num_data=9)

    def ran(density: Density, shift: float, rows: Tensor | None) -> Draws:
        density.set_parameters({name: value + shift for name, value in theta.items()})
        with density.minibatch(rows) if rows is not None else nullcontext():
            return engine.run(density, Run(density, np.random.SeedSequence(3)))

    with isolated(0), torch.no_grad(), (density := Density(problem)):
        theta = density.theta.values()
        for first, second in (
            (None, None),
            (torch.tensor([0, 1, 2]), torch.tensor([8, 3, 5])),
            (None, torch.arange(9)),
        ):
            ran(density, 0.0, first)
            spent = density.compile_seconds
            again = ran(density, 0.5, second)
            assert (density.compile_seconds == spent) == ((first is None) == (second is None))
            with Density(problem) as new:
                expected = ran(new, 0.5, second)
            assert torch.equal(again.log_weights, expected.log_weights)
            assert all(torch.equal(again.values[name], value) for name, value in expected.values.items())


def factored(x: Tensor) -> Problem:
    """Infinitely bad at x = inf; at x = 7 undefined below z = -1.2."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", torch.where((x == 7) & (z < -1.2), math.nan, -3 * (x - z).square()))

    return Problem(model, args=(x,))


@pytest.mark.parametrize("bad", [7.0, math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_a_broken_datum_changes_no_other_and_ends_in_a_failure(bad, place):
    answers = []
    for value in (2.0, bad):
        x = torch.tensor([0.5, 1.0, 2.0, -3.0], dtype=F64)
        x[place] = value
        with isolated(0), torch.no_grad(), (density := Density(factored(x))):
            answers.append(SMC(num_samples=60).run(density, Run(density, np.random.SeedSequence(0))))
    good, broken = answers
    others = [i for i in range(4) if i != place]
    assert torch.equal(good.log_evidence.value[others], broken.log_evidence.value[others])
    torch.testing.assert_close(good.log_evidence.std_error[others], broken.log_evidence.std_error[others])
    torch.testing.assert_close(good.values["z"][:, :, others], broken.values["z"][:, :, others])
    assert not bool(broken.log_evidence.value[place].isfinite())
    status = infer(factored(x), SMC(num_samples=60)).status
    assert status.state == "failed"
    assert "1 data" in status.reason


def test_data_of_likelihood_zero_over_half_the_prior_are_no_trouble():
    """One event of Poisson(max(0, z)): half of the first particles have weight zero, and no gradient."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.clamp_min(0.0)), obs=x)

    posterior = infer(Problem(model, args=(torch.ones(RUNS, dtype=F64),)), SMC(num_samples=200), seed=0)
    assert posterior.status.done, posterior.status
    z = np.linspace(0, 12, 200_001)
    truth = math.log(float(np.sum(z * np.exp(-z - z**2 / 2)) * z[1]) / math.sqrt(2 * math.pi))
    assert_unbiased(posterior.log_evidence.value - truth)
    assert bool((posterior.draws["z"][posterior.log_weights > -math.inf] > 0).all())


# -- settings and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"start": "laplace"}, "auto, prior, guide"),
        ({"path": "harmonic"}, "geometric, arithmetic"),
        ({"criterion": "var"}, "cess, ess"),
        ({"resampling": "killing"}, "systematic, stratified, residual, multinomial"),
        ({"policy": "sometimes"}, "adaptive, always, never"),
        ({"target_ess": 1.0}, "between 0 and 1"),
        ({"threshold": True}, "between 0 and 1"),
        ({"kernel": "gibbs"}, "hmc, langevin, random_walk, nuts"),
        ({"kernel": HMC}, "HMC\\(num_steps=10\\)"),
        ({"num_samples": 1}, "at least 2"),
        ({"num_moves": 0}, "at least 1"),
        ({"num_temperatures": 0}, "at least 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_with_what_to_do(settings, hint):
    with pytest.raises(ProblemError, match=hint):
        SMC(**settings)


def test_what_it_cannot_start_from_is_said():
    assert "improper prior" in why_not(EXACT["flat_prior"]().problem, SMC())
    guided = MAKERS["guided"](3).problem
    with pytest.raises(ProblemError, match="guide"):
        why_not(replace(guided, guide=None), SMC(start="guide"))

    def both(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("s", dist.Bernoulli(0.5))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert "the guide draws site 's'" in why_not(
        replace(MAKERS["switching"](3).problem, guide=both), SMC(start="guide")
    )
