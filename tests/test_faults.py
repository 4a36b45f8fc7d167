"""Runs that cannot succeed, of every engine and learner that there is: each ends, and says what is wrong.

A density that is zero, or no number, everywhere or in places; a parameter without spread; numbers beyond the range of
floating point; samplers that never accept, always diverge or are always cut short; and settings that make no sense.
Whatever is asked, the answer is an error by name before any work, a status with its reason, or a verdict that is no
praise; never a finite-looking figure. Engines and learners are discovered, so that those added later are tried too.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import fields
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrometer.benchmarks import compare
from pyrometer.inference import Posterior, Problem, ProblemError, infer, learn, registry, why_not
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Run
from pyrometer.inference.engines.abc import ABC
from pyrometer.inference.engines.forward_backward import ForwardBackward
from pyrometer.inference.engines.hmc import HMC
from pyrometer.inference.engines.importance_sampling import ImportanceSampling
from pyrometer.inference.engines.nuts import NUTS
from pyrometer.inference.engines.particle_filter import ParticleFilter
from pyrometer.inference.engines.random_walk import RandomWalk
from pyrometer.inference.engines.rejection_sampling import RejectionSampling
from pyrometer.inference.engines.smc import SMC
from pyrometer.inference.kernels import metropolis

F64 = torch.float64
ENGINES, LEARNERS = registry.engines(), registry.learners()
LONGEST = 60.0  # seconds of one run: what never ends would be seen
COSTLY = ("annealed_importance", "particle_marginal", "semi_amortised", "nuts", "hmc")  # to compile, at this size
SMALL = {
    "num_samples": 30, "num_steps": 6, "warmup_steps": 10, "num_chains": 2, "max_tree_depth": 3, "num_particles": 8,
    "max_proposals": 500, "refine_steps": 5, "num_temperatures": 4, "initial_tries": 20,
}  # fmt: skip


def small(cls):
    return cls(**{f.name: SMALL[f.name] for f in fields(cls) if f.name in SMALL})


# -- programs, for engines of every kind ------------------------------------------------------------------------------


def of_each_datum(law):
    """A normal latent for each datum, and a guide; `law(z)` is the law of the data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.125)), 1.0))
            pyro.sample("x", law(z), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    return model, guide


def of_all_data(law):
    def model(x):
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.125)), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", law(z), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    return model, guide


def discrete(law):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(pyro.param("theta", torch.tensor(0.375))))
            pyro.sample("x", law(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("loc", torch.tensor(0.0))))

    return model, guide


def in_time(law):
    """What all steps share, and a latent of each step."""

    def model(x):
        drift = pyro.sample("drift", dist.Normal(pyro.param("theta", torch.tensor(0.125)), 1.0))
        z = torch.tensor(0.0)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Normal(z + drift, 1.0))
            pyro.sample(f"x_{t}", law(z), obs=x[t])

    return model, None


def chain(law):
    def model(x):
        stay = pyro.param("theta", torch.tensor(0.75))
        z = None
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.5 if z is None else z * stay + (1 - z) * (1 - stay)))
            pyro.sample(f"x_{t}", law(z), obs=x[t])

    return model, None


SHAPES = {make.__name__: make for make in (of_each_datum, of_all_data, discrete, in_time, chain)}


def normal(z):
    return dist.Normal(z, 1.0)


def problem_of(shape, law=normal, data=(0.3, -0.4, 1.1)):
    model, guide = SHAPES[shape](law)
    return Problem(model, args=(torch.tensor(data, dtype=F64),), guide=guide, name=shape)


@cache
def serves(name, shape):
    """Whether the engine serves this shape of model, where nothing is wrong with it."""
    return not why_not(problem_of(shape), small(ENGINES[name]))


PAIRS = [pytest.param(e, s, id=f"{e}-{s}") for e in ENGINES for s in SHAPES]


def ended(problem, engine, **options):
    """The answer; a refusal is one too, as a failed status with its words."""
    start = time.perf_counter()
    try:
        posterior = infer(problem, engine, **options)
    except ProblemError:
        return None
    assert time.perf_counter() - start < LONGEST
    assert posterior.status.state in ("done", "failed", "unsupported")
    if not posterior.status.done:
        assert posterior.status.reason
        assert posterior.draws == {}
        assert posterior.log_weights is None
        assert posterior.log_evidence is None
    return posterior


def assert_no_praise(posterior):
    """Refused, failed, or flagged; and no evidence that is a finite number beside it, but for what is flagged."""
    if posterior is None or not posterior.status.done:
        return
    assert posterior.diagnostics.level in ("caution", "bad"), posterior.diagnostics
    for draws in posterior.draws.values():
        assert bool(draws.isfinite().all())


def test_every_engine_serves_a_shape_that_is_broken_here():
    assert {name for name in ENGINES if any(serves(name, shape) for shape in SHAPES)} == set(ENGINES)


# -- densities that are none ------------------------------------------------------------------------------------------

BEYOND = (1e200, -1e200, 1e200)  # so far that every likelihood is zero


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_a_likelihood_of_zero_everywhere_is_never_an_answer(name, shape):
    """All weights zero, no finite start, no acceptance: failed, or 'bad'. ABC, which has no likelihood, says that its
    nearest simulations are far away."""
    if not serves(name, shape):
        pytest.skip("the engine does not serve such models")
    posterior = ended(problem_of(shape, data=BEYOND), small(ENGINES[name]))
    assert_no_praise(posterior)
    if posterior is not None and posterior.status.done and not hasattr(ENGINES[name], "simulates"):
        assert posterior.diagnostics.level == "bad"
        assert posterior.log_evidence is None or not bool(posterior.log_evidence.value.isfinite().any())


def undefined(z):
    """A scale that is no number where z is negative, and overflows where it is large."""
    return dist.Normal(0.0, torch.sqrt(z.double()).exp(), validate_args=False)


@pytest.mark.parametrize(
    ("name", "shape"),
    [pytest.param(*p.values, id=p.id, marks=pytest.mark.slow if p.values[1] == "of_all_data" else ()) for p in PAIRS],
)
def test_draws_where_the_density_is_no_number_are_never_told(name, shape):
    if shape in ("discrete", "chain") or not serves(name, shape):
        pytest.skip("the engine does not serve such models, or they have no such draws")
    posterior = ended(problem_of(shape, undefined), small(ENGINES[name]), seed=1)
    if posterior is None or not posterior.status.done:
        return
    if posterior.log_evidence is not None:
        assert not bool(posterior.log_evidence.value.isnan().any())
    weights = posterior.weights()
    for site in (n for n in posterior.draws if n.startswith("z")):
        broken = (posterior.draws[site] < 0).double() * weights.reshape(weights.shape + (1,) * (
            posterior.draws[site].dim() - weights.dim()
        ))  # fmt: skip
        assert float(broken.sum()) == 0 or posterior.diagnostics.level in ("caution", "bad")


@pytest.mark.parametrize("name", ENGINES)
def test_overflow_is_no_answer(name):
    """exp(exp(z)) of a wide latent: inf and nan beside each other, in values and in gradients."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 100.0))
            pyro.sample("x", dist.Normal(z.exp().exp(), 1.0, validate_args=False), obs=x)

    posterior = ended(Problem(model, args=(torch.tensor([3.0, 4.0], dtype=F64),)), small(ENGINES[name]))
    if posterior is not None and posterior.status.done:
        for draws in posterior.draws.values():
            assert bool(draws.isfinite().all())
        if posterior.log_evidence is not None and posterior.diagnostics.level == "good":
            assert bool(posterior.log_evidence.value.isfinite().all())


@pytest.mark.parametrize("name", ENGINES)
def test_a_latent_without_spread_is_no_praise(name):
    """A prior of sd 1e-300 is a point to floating point: squares of it vanish."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, torch.tensor(1e-300, dtype=F64)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    posterior = ended(Problem(model, args=(torch.tensor([3.0, 4.0], dtype=F64),)), small(ENGINES[name]))
    if posterior is not None and posterior.status.done and posterior.log_evidence is not None:
        truth = float(dist.Normal(0.0, 1.0).log_prob(torch.tensor([3.0, 4.0])).sum())
        value = float(posterior.log_evidence.value)
        assert value == pytest.approx(truth, abs=1.0) or posterior.diagnostics.level in ("caution", "bad")


def test_points_without_density_are_never_accepted():
    """Where the rise is no number or minus infinity a lane stays; where it is plus infinity it goes."""
    old, new = (
        metropolis.Point(torch.full((4, 1), v), torch.full((4, 1), v), torch.full((4, 1, 1), v)) for v in (0.0, 1.0)
    )
    rise = torch.tensor([math.nan, -math.inf, math.inf, 0.0])
    point, probability, diverged = metropolis.accept(old, new, rise, torch.full((4,), 0.5))
    assert point.u[:, 0].tolist() == point.values[:, 0].tolist() == point.gradients[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert probability.tolist() == [0, 0, 1, 1]
    assert diverged.tolist() == [True, True, False, False]


# -- learners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("shape", ["of_each_datum", "discrete"])
def test_nothing_is_learned_from_a_likelihood_of_zero(name, shape):
    """Failed with the reason, refused, or theta as it was and finite, with no figure that looks like a likelihood."""
    try:
        fit = learn(problem_of(shape, data=BEYOND), small(LEARNERS[name]))
    except ProblemError:
        return
    if fit.status.done:
        assert all(bool(v.isfinite().all()) for v in fit.parameters.values())
        assert not bool(fit.trail.value.isfinite().any())
        return
    assert fit.status.state in ("failed", "unsupported")
    assert fit.status.reason


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_learners_refuse_data_that_are_no_numbers(name, value):
    with pytest.raises(ProblemError, match="'x'"):
        learn(problem_of("of_each_datum", data=(1.0, value)), small(LEARNERS[name]))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_engines_refuse_data_that_are_no_numbers(name, value):
    with pytest.raises(ProblemError, match="'x'"):
        infer(problem_of("of_each_datum", data=(1.0, value)), small(ENGINES[name]))


# -- hopeless runs ----------------------------------------------------------------------------------------------------


def informative(sd=1e-3):
    """A likelihood a thousand times narrower than the prior."""
    return problem_of("of_each_datum", lambda z: dist.Normal(z, sd))


HOPELESS = {
    "every step diverges": (HMC(num_samples=30, warmup_steps=0, step_size=1e6), normal, "never moves"),
    "nothing is accepted": (RandomWalk(num_samples=30, warmup_steps=0, step_size=1e9), normal, "never moves"),
    "trees are always cut": (NUTS(num_samples=30, warmup_steps=20, max_tree_depth=1), normal, "cut short"),
    "one draw has all the weight": (
        ImportanceSampling(num_samples=50, proposal="prior"), lambda z: dist.Normal(z, 1e-4), "Kish ESS down to 1.0",
    ),
    "a path in one step": (
        SMC(num_samples=30, num_temperatures=1, num_moves=1), lambda z: dist.Normal(z, 1e-4), "Kish ESS down to",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOPELESS)
def test_a_hopeless_run_says_so(name):
    engine, law, words = HOPELESS[name]
    posterior = infer(problem_of("of_each_datum", law), engine)
    assert posterior.status.done, posterior.status
    assert posterior.diagnostics.level == "bad"
    assert words in posterior.diagnostics.verdict


def test_every_divergence_is_counted():
    posterior = infer(problem_of("of_each_datum"), HMC(num_samples=30, warmup_steps=0, step_size=1e6, num_chains=2))
    assert posterior.diagnostics["divergences"] == 2 * 30 * 3
    assert "180 of 180 transitions diverged" in posterior.diagnostics.verdict


def test_weights_beyond_every_tail_have_a_k_hat_above_one():
    model = problem_of("of_each_datum", lambda z: dist.Normal(z, 0.02))
    posterior = infer(model, ImportanceSampling(num_samples=500, proposal="prior"))
    assert posterior.diagnostics["k_hat"] > 1
    assert posterior.diagnostics.level == "bad"


NOTHING = {
    "no proposal is accepted": (
        RejectionSampling(num_samples=5, max_proposals=2000, proposal="prior", log_bound=50.0),
        "none of 2000 proposals",
    ),
    "no simulation is near": (
        ABC(num_samples=5, num_simulations=2000, tolerance=0.0), "none of .* was accepted|fewer than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_accepted_is_a_failure_and_a_dash(name):
    engine, words = NOTHING[name]
    problem = problem_of("of_each_datum")
    posterior = ended(problem, engine)
    assert posterior.status.state == "failed"
    assert re.search(words, posterior.status.reason)
    comparison = compare(problem, [engine, ImportanceSampling(num_samples=50)])
    row = comparison.rows[0]
    assert row.status.state == "failed"
    assert row.errors == {}
    assert row.log_evidence is None
    assert " - " in str(comparison)


@pytest.mark.parametrize("engine", [ParticleFilter(), ForwardBackward()], ids=lambda e: e.name)
def test_one_step_is_no_time(engine):
    shape = "in_time" if engine.name == "particle_filter" else "chain"
    posterior = ended(problem_of(shape, data=(0.3,)), engine)
    assert posterior.status.state == "unsupported"
    assert "order in time" in posterior.status.reason or "no chain" in posterior.status.reason
    with pytest.raises(ProblemError, match="is empty"):
        problem_of(shape, data=())


def test_particles_that_all_die_midway_are_a_failure():
    posterior = ended(problem_of("in_time", data=(0.3, 1e200, 0.1)), ParticleFilter(num_samples=50))
    assert posterior.status.state == "failed"
    assert "weights are zero" in posterior.status.reason


# -- settings ---------------------------------------------------------------------------------------------------------

METHODS = {**ENGINES, **LEARNERS}
COUNTS = [
    pytest.param(name, f.name, id=f"{name}-{f.name}")
    for name, cls in METHODS.items()
    for f in fields(cls)
    if f.type in ("int", "int | None")
]


@pytest.mark.parametrize(("name", "setting"), COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "5", math.nan])
def test_every_count_is_a_whole_number_of_something(name, setting, value):
    cls = METHODS[name]
    if setting == "warmup_steps" and value == 0:
        assert cls(**{setting: 0}).warmup_steps == 0
        return
    with pytest.raises(ProblemError, match=rf"{cls.__name__}\({setting}="):
        cls(**{setting: value})


@pytest.mark.parametrize("name", METHODS)
def test_a_misspelt_setting_is_refused_with_the_nearest(name):
    cls = METHODS[name]
    known = fields(cls)[0].name
    with pytest.raises(ProblemError, match=f"has no setting '{known}s'.*'{known}'"):
        cls(**{f"{known}s": 1})


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("seed", [-1, 2**64, 0.5])
def test_no_engine_runs_with_a_seed_that_is_none(name, seed):
    with pytest.raises(ProblemError, match="whole number from 0"):
        infer(problem_of("of_each_datum"), small(ENGINES[name]), seed=seed)


# -- what a run may not depend on, nor change -------------------------------------------------------------------------


def first_served(name):
    return next(shape for shape in SHAPES if serves(name, shape))


def apart(a: Posterior, b: Posterior) -> float:
    """The largest difference of two answers, draws and evidence, relative to 1 + their size."""
    assert list(a.draws) == list(b.draws)
    pairs = [(a.draws[n], b.draws[n]) for n in a.draws]
    if a.log_evidence is not None:
        pairs.append((a.log_evidence.value, b.log_evidence.value))
    return max(float(((x.double() - y.double()).abs() / (1 + x.double().abs())).max()) for x, y in pairs)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in COSTLY else n for n in ENGINES])
def test_threads_and_the_users_defaults_change_no_number(name):
    """Single or double precision by default: the same numbers, bit by bit. Two threads: the same up to the rounding of
    sums, which torch adds up in another order. And what was set stays set."""
    problem, engine = problem_of(first_served(name)), small(ENGINES[name])
    plain = infer(problem, engine, seed=3)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(F64)
        double = infer(problem, engine, seed=3)
        assert torch.get_default_dtype() == F64
        torch.set_default_dtype(dtype)
        torch.set_num_threads(2)
        double_threads = infer(problem, engine, seed=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    assert apart(plain, double) == 0.0
    assert apart(plain, double_threads) < 1e-9


def test_runs_and_their_children_have_seeds_of_their_own():
    """Of 100 neighbouring seeds with four children each, which have four of their own: 2,100 numbers, all different."""
    with Density(problem_of("of_all_data")) as density:
        words = []
        for seed in range(100):
            run = Run(density, np.random.SeedSequence(seed))
            children = [run.child(c) for c in range(4)]
            for one in (run, *children, *(child.child(c) for child in children for c in range(4))):
                words.append(int(one.seed.generate_state(1, np.uint64)[0]))
    assert len(set(words)) == len(words) == 100 * (1 + 4 + 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, cls in ENGINES.items() if not getattr(cls, "exact", False)])
def test_a_hundred_neighbouring_seeds_share_no_draw(name):
    """Of continuous latents, over all chains."""
    shape = next((s for s in ("of_each_datum", "of_all_data", "in_time") if serves(name, s)), None)
    if shape is None or name == "map":
        pytest.skip("the draws are discrete, or a mode")
    problem, engine, seen = problem_of(shape), small(ENGINES[name]), set()
    for seed in range(100):
        posterior = infer(problem, engine, seed=seed)
        assert posterior.status.done
        own = set(posterior.draws["z_1" if shape == "in_time" else "z"].flatten().tolist())
        assert not own & seen
        seen |= own
