"""The peers' benchmark: every tool samples the same density, and what is printed is what was measured.

Densities are compared to 1e-8 (1 + |value|); libraries that are not installed are skipped with that reason. All
randomness is seeded; statistical tests say what share of seeds they would refuse, and the smallest error they see.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from pyrometer.benchmarks.cli import main
from pyrometer.benchmarks.speed import cases, results, run, tools, worker
from pyrometer.benchmarks.speed.agreement import disagreements
from pyrometer.benchmarks.speed.cases import _vae
from pyrometer.benchmarks.speed.record import (
    Draws,
    Estimate,
    Kept,
    LogWeights,
    Measurement,
    Particles,
    Plan,
    Steps,
    Timing,
    Weights,
    together,
)
from pyrometer.benchmarks.speed.table import render
from pyrometer.benchmarks.speed.tools import Prepared, Tool
from pyrometer.inference import ProblemError, statistics
from pyrometer.inference.density import Density

POSTERIORS = [name for name in cases.names() if cases.load(name).KIND == "posterior"]
FITS = [name for name in cases.names() if cases.load(name).KIND == "svi"]
POINTS = 20


def points(case, seed=0):
    """Unconstrained points, their images, and the log-Jacobians, by the case's own hand."""
    rng = np.random.default_rng(seed)
    for _ in range(POINTS):
        u = {name: 0.7 * rng.normal(size=shape) for name, shape in case.SHAPES.items()}
        yield (u, *case.constrain(u, np))


def assert_close(actual, expected, tolerance=1e-8):
    assert np.shape(actual) == np.shape(expected)
    assert np.all(np.abs(np.asarray(actual) - np.asarray(expected)) <= tolerance * (1 + np.abs(expected)))


# -- the same density in every library -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_pyro_program_has_the_density_written_by_hand(name):
    """On both sides of the constraints, so the Jacobian too; and the gradient by central differences."""
    case = cases.load(name)
    data = case.data()
    rng = np.random.default_rng(1)
    with Density(case.problem(data)) as density, torch.no_grad():
        for u, z, log_jacobian in points(case):
            latents = {n: torch.as_tensor(value) for n, value in z.items()}
            by_hand = case.log_joint(z, data, np)
            assert_close(float(density.log_joint(latents).sum()), by_hand)

            flat = density.unconstrain(latents)
            order = np.concatenate([np.ravel(u[n]) for n in density.continuous])
            assert_close(flat.numpy().ravel(), order, 1e-10)
            assert_close(float(density.log_joint(flat).sum()), by_hand + log_jacobian)

        value, gradient = density.value_and_grad(flat)
        assert_close(float(value.sum()), by_hand + log_jacobian)
        for _ in range(5):  # along random directions, over all latents at once
            step = {n: rng.normal(size=shape) for n, shape in case.SHAPES.items()}
            ends = []
            for sign in (1, -1):
                moved, jacobian = case.constrain({n: u[n] + sign * 1e-5 * step[n] for n in u}, np)
                ends.append(case.log_joint(moved, data, np) + jacobian)
            slope = float(gradient.numpy().ravel() @ np.concatenate([np.ravel(step[n]) for n in density.continuous]))
            assert_close(slope, (ends[0] - ends[1]) / 2e-5, 1e-5)


@pytest.mark.parametrize("name", POSTERIORS)
def test_numpyro_has_the_same_density(name):
    pytest.importorskip("numpyro", reason="NumPyro is not installed")
    import jax
    from numpyro.infer.util import log_density

    case = cases.load(name)
    data = case.data()
    with jax.enable_x64(True):
        model = case.numpyro_model(data)
        for _, z, _ in points(case):
            theirs, _ = log_density(model, (), {}, {n: jax.numpy.asarray(v) for n, v in z.items()})
            assert_close(float(theirs), case.log_joint(z, data, np))


@pytest.mark.parametrize("name", POSTERIORS)
def test_what_blackjax_samples_is_what_numpy_computes(name):
    pytest.importorskip("jax", reason="JAX is not installed")
    import jax

    case = cases.load(name)
    data = case.data()
    with jax.enable_x64(True):
        xp = jax.numpy
        for u, z, log_jacobian in points(case):
            there, their_jacobian = case.constrain({n: xp.asarray(v) for n, v in u.items()}, xp)
            theirs = case.log_joint(there, {n: xp.asarray(v) for n, v in data.items()}, xp)
            assert_close(float(theirs + their_jacobian), case.log_joint(z, data, np) + log_jacobian)


@pytest.mark.filterwarnings("ignore")  # PyTensor's, about compilers
@pytest.mark.parametrize("name", POSTERIORS)
def test_pymc_has_the_same_density(name):
    pytest.importorskip("pymc", reason="PyMC is not installed")
    case = cases.load(name)
    data = case.data()
    model = case.pymc_model(data)
    log_p = model.compile_logp(jacobian=False, mode="FAST_COMPILE")  # no C compiler: seconds, not half a minute
    for _, z, _ in points(case):
        point = {}
        for variable in model.free_RVs:
            transform = model.rvs_to_transforms[variable]
            value = np.asarray(z[variable.name])
            moved = value if transform is None else transform.forward(value, *variable.owner.inputs).eval()
            point[model.rvs_to_values[variable].name] = moved
        assert_close(float(log_p(point)), case.log_joint(z, data, np))


@pytest.mark.parametrize("name", POSTERIORS)
def test_data_are_the_same_in_float32(name):
    for value in cases.load(name).data().values():
        if value.dtype.kind == "f":
            assert np.array_equal(value, value.astype(np.float32).astype(float))


@pytest.mark.parametrize("name", POSTERIORS)
def test_identified_scalars_are_functions_of_single_draws(name):
    """Each keeps the (C, S) of the draws, and the draw (c, s) alone gives its entry (c, s)."""
    case = cases.load(name)
    rng = np.random.default_rng(2)
    draws = {n: np.exp(0.3 * rng.normal(size=(2, 3, *shape))) for n, shape in case.SHAPES.items()}
    if name == "mixture":
        draws["weight"] = rng.dirichlet(np.ones(3), (2, 3))
    found = case.identified(draws)
    alone = case.identified({n: v[1:, 2:] for n, v in draws.items()})
    assert found
    for scalar, values in found.items():
        assert values.shape[:2] == (2, 3)
        np.testing.assert_allclose(values[1, 2], alone[scalar][0, 0], rtol=1e-12)


def test_what_is_not_identified_leaves_the_scalars_alone():
    """Rotated loadings, permuted hidden units and units of the other sign are the same model."""
    rng = np.random.default_rng(3)
    ppca, network = cases.load("ppca"), cases.load("neural-network")
    z = {n: rng.normal(size=(1, 1, *shape)) for n, shape in ppca.SHAPES.items()}
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    for name, value in ppca.identified({**z, "w": z["w"] @ turn}).items():
        np.testing.assert_allclose(value, ppca.identified(z)[name], rtol=1e-12)
    z = {n: rng.normal(size=(1, 1, *shape)) for n, shape in network.SHAPES.items()}
    order, sign = rng.permutation(network.HIDDEN), rng.choice([-1.0, 1.0], network.HIDDEN)
    same = {n: z[n][..., order] * sign for n in ("w", "b", "v")} | {"c": z["c"]}
    np.testing.assert_allclose(network.identified(same)["logit"], network.identified(z)["logit"], rtol=1e-12)


def test_the_network_has_161_weights_and_other_cases_the_sizes_they_are_named_for():
    size = lambda name: sum(math.prod(shape) for shape in cases.load(name).SHAPES.values())  # noqa: E731
    assert size("neural-network") == 161
    assert cases.load("logistic").data()["x"].shape == (1000, 25)
    assert cases.load("gaussian-process").data()["y"].shape == (100,)
    assert cases.load("stochastic-volatility").data()["y"].shape == (500,)
    assert cases.load("mixture").data()["y"].shape == (500, 2)
    group = cases.load("varying-slopes").data()["group"]
    assert (len(group), len(set(group))) == (919, 85)


def test_eight_schools_knows_its_truth():
    """Against the integral over a grid of tau and mu, by Simpson's rule."""
    from scipy.integrate import simpson

    case = cases.load("eight-schools")
    data = case.data()
    tau, mu = np.linspace(1e-6, 150, 3001), np.linspace(-40, 40, 801)
    spread = data["sigma"] ** 2 + tau[:, None] ** 2  # (T, J)
    residual = data["y"] - mu[:, None]
    log_p = -0.5 * (np.log(spread).sum(1)[:, None] + (residual[None] ** 2 / spread[:, None]).sum(-1))
    log_p += -0.5 * (mu / 5) ** 2 - np.log1p((tau[:, None] / 5) ** 2)
    weight = np.exp(log_p - log_p.max())
    integral = lambda f: simpson(simpson(weight * f, x=mu), x=tau)  # noqa: E731
    truth = case.truth()
    for name, values in (("mu", mu + 0 * tau[:, None]), ("tau", tau[:, None] + 0 * mu)):
        for suffix, power in (("", 1), ("^2", 2)):
            expected = integral(values**power) / integral(np.ones_like(weight))
            assert truth[name + suffix].value == pytest.approx(expected, rel=1e-4)
    assert set(truth) == {
        n + suffix for n in ("mu", "tau", *(f"theta[{k}]" for k in range(8))) for suffix in ("", "^2")
    }


# -- the same loss, the same evidence --------------------------------------------------------------------------------


def installed(kind):
    return [
        pytest.param(tool, id=tool.name, marks=pytest.mark.skipif(bool(tool.missing), reason=f"no {tool.missing}"))
        for tool in tools.tools()
        if tool.kind == kind
    ]


@pytest.fixture
def small_fit(monkeypatch):
    """A fit that moves far enough for every term of its loss to matter: the latents hold about a nat each."""
    monkeypatch.setattr(_vae, "LEARNING_RATE", 0.01)
    return SimpleNamespace(SIZE=replace(cases.load("svi-step-64").SIZE, num_steps=400, num_data=512))


@pytest.fixture
def own_loss(small_fit, known={}):  # noqa: B006  # our fit is the same for every tool: run once
    if not known:
        known["loss"] = tools.find(tools.OURS, "svi").prepare(small_fit, Plan()).called(5).loss
    return known["loss"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", installed("svi"))
def test_every_fit_has_the_same_loss(tool, small_fit, own_loss):
    """After 400 steps from equal weights. Seeds scatter by 0.2 %, so one pair of seeds in a hundred would be refused;
    without the divergence of q from the prior the loss is 3 % smaller, and at twice the learning rate 2 %."""
    if tool.name == "torch-compiled":
        pytest.skip("compiles for half a minute; its loss is torch-eager's")
    answer = tool.prepare(small_fit, Plan()).called(6)
    assert answer.count == 400
    assert answer.loss == pytest.approx(own_loss, rel=0.008)


@pytest.mark.parametrize("tool", installed("mixture"))
def test_every_tool_takes_the_same_em_steps(tool, monkeypatch):
    """The likelihood after three steps from equal starts, to rounding; against the steps taken here by the model's own
    reference and M-step."""
    case = cases.load("em-mixture")
    monkeypatch.setattr(case, "ROWS", 2000)
    monkeypatch.setattr(case, "NUM_STEPS", 3)
    theta = {name: torch.as_tensor(value) for name, value in case.start().items()}
    problem, x = case.problem(), theta.pop("x")
    for _ in range(3):
        weights = torch.softmax(problem.reference_at(theta).log_weights, 0)
        theta = problem.m_step({"z": torch.arange(5)[:, None].expand(5, 2000)}, weights, x)
    answer = tool.prepare(case, Plan()).called(3)
    assert answer.count == 3
    assert answer.loss == pytest.approx(-problem.reference_at(theta).log_evidence.total()[0] / 2000, rel=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", installed("chain"))
def test_every_tool_takes_the_same_steps_of_baum_welch(tool, monkeypatch):
    """The likelihood after three steps from equal starts, to rounding; against the steps written out here in numpy."""
    case = cases.load("baum-welch")
    monkeypatch.setattr(case, "ROWS", 200)
    monkeypatch.setattr(case, "NUM_STEPS", 3)
    start = case.start()
    x, initial, move = start["x"][:, 0], start["initial"], start["transition"]
    loc, scale = start["locs"][:, 0], start["scales"][:, 0]
    for step in range(4):
        e = np.exp(-0.5 * ((x[:, None] - loc) / scale) ** 2) / scale / math.sqrt(2 * math.pi)
        a, b, size = [initial * e[0]], [np.ones(5)], [1.0]
        for t in range(1, 200):
            size.append(a[-1].sum())
            a.append((a[-1] / size[-1]) @ move * e[t])
            after = e[200 - t] * b[-1]
            b.append(move @ after / after.sum())
        log_likelihood = np.log(size[1:]).sum() + math.log(a[-1].sum())
        if step == 3:
            break
        a, b = np.array(a), np.array(b[::-1])
        single = a * b / (a * b).sum(1, keepdims=True)
        pairs = a[:-1, :, None] * move * (e * b)[1:, None]
        pairs = (pairs / pairs.sum((1, 2), keepdims=True)).sum(0)
        initial, move = single[0], pairs / pairs.sum(1, keepdims=True)
        loc = single.T @ x / single.sum(0)
        scale = np.sqrt((single * (x[:, None] - loc) ** 2).sum(0) / single.sum(0))
    answer = tool.prepare(case, Plan()).called(3)
    assert answer.count == 3
    assert answer.loss == pytest.approx(-log_likelihood / 200, rel=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", installed("abc"))
def test_every_tool_finds_the_posterior_by_simulation(tool, monkeypatch):
    """Within 0.3 sd in mean and width, 6 standard errors of 400 draws; the prior is 1.2 sds away and 2.2 times as wide,
    and pyABC's few simulations bring it half the way."""
    case = cases.load("abc")
    monkeypatch.setattr(case, "NUM_SIMULATIONS", 300_000)
    monkeypatch.setattr(case, "NUM_SAMPLES", 400)
    answer = tool.prepare(case, Plan()).called(3)
    found = worker.judged(case, answer).estimates
    assert answer.count == 300_000 or tool.name == "pyabc"
    assert answer.draws.shape == (len(answer.draws), 4)
    assert found["mean off"].value < (0.8 if tool.name == "pyabc" else 0.3)
    assert found["sd ratio"].value == pytest.approx(1.0, abs=0.9 if tool.name == "pyabc" else 0.3)


def test_the_exact_posterior_of_the_case_by_simulation():
    """Against importance weights on a grid of one coordinate, of which all are alike."""
    case = cases.load("abc")
    mean, sd = case.posterior(case.data())
    theta = np.linspace(-6, 6, 20_001)
    for k, x in enumerate(case.data()["x"]):
        weight = np.exp(-0.5 * theta**2 - 0.5 * ((x - theta) / case.NOISE) ** 2)
        weight /= weight.sum()
        assert mean[k] == pytest.approx(weight @ theta, abs=1e-9)
        assert sd[k] == pytest.approx(math.sqrt(weight @ theta**2 - mean[k] ** 2), rel=1e-9)
    judged = worker.judged(case, Kept(7, np.stack([mean - sd, mean + 2 * sd]), np.array([2 / 3, 1 / 3])))
    assert judged.work == 7
    assert judged.estimates["mean off"].value == pytest.approx(0, abs=1e-12)
    assert judged.estimates["sd ratio"].value == pytest.approx(math.sqrt(2))
    judged = worker.judged(case, Kept(7, np.stack([mean, mean + sd])))
    assert judged.estimates["mean off"].value == pytest.approx(0.5)
    with pytest.raises(ValueError, match="not all finite"):
        worker.judged(case, Kept(7, np.full((3, 4), np.nan)))


@pytest.mark.parametrize("tool", installed("importance"))
def test_every_tool_weighs_the_same_prior_by_the_same_likelihood(tool, monkeypatch):
    """Against the exact evidence: |z| > 4.9 in one seed of a million; the error is 0.02, so 0.1 nat is seen."""
    case = cases.load("importance")
    monkeypatch.setattr(case, "NUM_DRAWS", 40_000)
    answer = tool.prepare(case, Plan()).called(3)
    exact = case.truth()["log evidence"].value
    assert answer.count == 40_000
    assert 0.001 < answer.std_error < 0.02
    assert abs(answer.log_evidence - exact) < 4.9 * answer.std_error


def has_its_precision(tool):
    """Skips a tool of JAX in float64, which has it from the environment of its process."""
    if tool.precision == "float64" and "jax" in tool.requires:
        pytest.skip("JAX has its precision from the environment")


def test_the_evidence_of_the_regression_is_that_of_its_densities_by_hand():
    """log p(y) = log p(beta) + log p(y | beta) - log p(beta | y), at any beta; the Pyro program has both densities."""
    case = cases.load("smc")
    data, exact = case.data(), case.truth()["log evidence"].value
    precision = data["x"].T @ data["x"] + np.eye(10)
    mean = np.linalg.solve(precision, data["x"].T @ data["y"])
    with Density(case.problem(data)) as density, torch.no_grad():
        for beta in 0.5 * np.random.default_rng(1).normal(size=(5, 10)) + 0.5 * mean:
            off = beta - mean
            posterior = 0.5 * (np.linalg.slogdet(precision)[1] - off @ precision @ off - 10 * math.log(2 * math.pi))
            by_hand = case.log_prior(beta, np) + case.log_likelihood(beta, data, np)
            assert by_hand - posterior == pytest.approx(exact, abs=1e-8)
            assert_close(float(density.log_joint({"beta": torch.from_numpy(beta)}).sum()), by_hand)


@pytest.mark.filterwarnings("ignore")
def test_pymc_has_the_regression():
    pytest.importorskip("pymc", reason="PyMC is not installed")
    case = cases.load("smc")
    data = case.data()
    model = case.pymc_model(data)
    log_p = [model.compile_logp(vars=v, mode="FAST_COMPILE") for v in (model.free_RVs, model.observed_RVs)]
    for beta in np.random.default_rng(1).normal(size=(5, 10)):
        assert_close(float(log_p[0]({"beta": beta})), case.log_prior(beta, np))
        assert_close(float(log_p[1]({"beta": beta})), case.log_likelihood(beta, data, np))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", installed("smc"))
def test_every_tool_finds_the_evidence_by_tempering(tool, monkeypatch):
    """The mean of four runs of 1,000 particles: one scatters by 0.15 nats at most, so 0.35 is 4.7 standard errors."""
    has_its_precision(tool)
    case = cases.load("smc")
    monkeypatch.setattr(case, "NUM_PARTICLES", 1000)
    prepared = tool.prepare(case, Plan())
    answers = [prepared.warm(seed) for seed in range(4)]
    assert {answer.count for answer in answers} == {1000}
    found = [answer.log_evidence for answer in answers]
    assert len(set(found)) == 4
    assert abs(np.mean(found) - case.truth()["log evidence"].value) < 0.35


@pytest.fixture(scope="module")
def thirty():
    """Thirty of the thousand data with their normals, and 8,000 log weights of each, made here."""
    case = cases.load("vae-latents-importance")
    data = {name: value[:30] if len(value) == case.DATA else value for name, value in case.data().items()}
    noise = np.random.default_rng(5).normal(size=(8000, 30, 10))
    z = data["loc"] + data["scale"] * noise
    logits = np.stack([np.tanh(rows @ data["a"]) @ data["b"] for rows in z])
    log_p = (data["x"] * logits - np.logaddexp(0.0, logits)).sum(-1) - 0.5 * (z**2).sum(-1)
    by_case = case.log_joint(z[0, 0], data["x"][0], data, np) + 5 * math.log(2 * math.pi)
    assert log_p[0, 0] == pytest.approx(by_case, abs=1e-8)
    return data, log_p + 0.5 * (noise**2).sum(-1) + np.log(data["scale"]).sum(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", installed("latents-importance"))
def test_every_tool_draws_from_the_same_normals_and_gives_the_same_weights(tool, thirty, monkeypatch):
    """Against weights made here: |z| > 4.9 for a mean and a mean square in one seed of 500,000; a mean that is off by
    0.05 nats is seen."""
    has_its_precision(tool)
    case, (data, expected) = cases.load("vae-latents-importance"), thirty
    monkeypatch.setattr(case, "data", lambda: data)
    monkeypatch.setattr(case, "NUM_DRAWS", 8000)
    monkeypatch.setattr(importlib.import_module(tools.__name__ + ".torch"), "ROWS", 30)
    answer = tool.prepare(case, Plan()).called(3)
    if tools.is_floor(tool.name):
        assert answer.count == 30 * 8000
        return
    assert answer.values.shape == (8000, 30)
    judged = worker.judged(case, answer)
    assert judged.work == 240_000
    assert (
        disagreements({"it": judged.estimates, "we": worker.judged(case, LogWeights(expected)).estimates})["it"].z < 4.9
    )
    spread = answer.values.std(0) / expected.std(0)  # of each datum, to some 0.02
    assert np.abs(spread - 1).max() < 0.2


def test_the_normals_lie_at_modes_and_are_as_wide_as_those():
    """Of each datum log p rises nowhere by more than 0.05 nats a sd, nearly all; and falls by about 1/2 at one."""
    case = cases.load("vae-latents-importance")
    data = case.data()
    log_p = lambda z, i: case.log_joint(z, data["x"][i], data, np)  # noqa: E731
    slopes = []
    for i in range(0, 1000, 50):
        loc, scale = data["loc"][i], data["scale"][i]
        for k in range(10):
            step = np.eye(10)[k] * scale * 1e-3
            slopes.append((log_p(loc + step, i) - log_p(loc - step, i)) / 2e-3)
    assert np.median(np.abs(slopes)) < 0.05
    assert (data["scale"] > 0).all()
    assert (data["scale"] <= 1).all()  # the prior's


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("patience", "done"), [(0.0, 2), (1000.0, 4)])
def test_data_by_themselves_are_as_many_as_patience_allows(patience, done, monkeypatch):
    """Two at least; the time told is that of all."""
    case = cases.load("vae-latents")
    made = case.data()
    monkeypatch.setattr(case, "data", lambda: {**made, "x": made["x"][:4]})
    default = torch.get_default_dtype()
    try:
        prepared = tools.find("pyro-datum-by-datum", "per-datum").prepare(
            case, Plan(chains=1, draws=4, warmup=2, patience=patience)
        )
        begin = time.perf_counter()
        answer = prepared.called(1)
        seconds = time.perf_counter() - begin
    finally:
        torch.set_default_dtype(default)
    assert answer.values["z"].shape == (1, 4, done, 10)
    assert 0.5 * seconds * 4 / done < answer.seconds <= seconds * 4 / done
    assert answer.note.startswith(f"only {done} of 4 data")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["pyrometer", "pyro"])
def test_nuts_draws_in_the_shapes_that_are_asked_for(name):
    case = cases.load("eight-schools")
    plan = Plan(chains=2, draws=6, warmup=5)
    default = torch.get_default_dtype()
    try:
        answer = tools.find(name, "posterior").prepare(case, plan).called(1)
    finally:
        torch.set_default_dtype(default)
    assert {n: v.shape for n, v in answer.values.items()} == {"mu": (2, 6), "tau": (2, 6), "eta": (2, 6, 8)}
    assert (answer.values["tau"] > 0).all()
    assert answer.warmup == 5
    assert answer.gradients >= 2 * 11
    assert answer.note.startswith("its density ran as") is (name == tools.OURS)


def test_fits_by_hand_start_from_the_weights_of_the_problem():
    size = cases.load("svi-step-64").SIZE
    problem = size.problem(size.data())
    problem.model(problem.args[0][:2])
    problem.guide(problem.args[0][:2])
    weights = {name.replace("$$$", "."): value for name, value in pyro.get_param_store().items()}
    start = size.start()
    assert set(start) == set(weights)
    for name, value in start.items():
        assert np.array_equal(value, weights[name].detach().numpy().T)


@pytest.mark.slow
@pytest.mark.parametrize("tool", installed("posterior"))
def test_every_tool_samples_eight_schools(tool, tmp_path):
    """In a process as the command starts it, against the exact means and mean squares: |z| > 4.9 for 20 figures in
    one seed of 50,000. With 1,500 effective draws a mean that is off by 0.13 sd is seen."""
    found = run.in_a_process("eight-schools", tool, Plan(draws=500, repeats=2), 0, tmp_path)
    assert found.state == "done", found.reason
    assert found.r_hat < 1.03
    truth = cases.load("eight-schools").truth()
    assert set(found.estimates) == set(truth)
    assert disagreements({tool.name: found.estimates}, truth)[tool.name].z < 4.9
    assert all(t.work > 200 and t.gradients > 2 * 4 * 500 for t in found.warm)
    assert all(e.error > 0 for e in found.estimates.values())


def test_rows_of_an_epoch_are_all_different():
    size = _vae.Size(4, 2, 1, num_data=300, num_steps=5)
    batches = _vae.rows(7, size, 5)
    assert batches.shape == (5, 128)
    for epoch in (batches[:2], batches[2:4]):
        assert len(set(epoch.ravel())) == 256
    assert not np.array_equal(batches[:2], batches[2:4])
    assert not np.array_equal(batches, _vae.rows(8, size, 5))


# -- one process -----------------------------------------------------------------------------------------------------


class Clockwork:
    """A tool whose answers are independent draws, and which counts how it is called."""

    def __init__(self, values=None, compiles=True, warm=True, seconds=None):
        self.seeds, self.compiles, self.values = [], compiles, values
        self.has_warm, self.seconds = warm, seconds
        self.order = []

    def tool(self):
        return Tool("clockwork", "posterior", {"numpy": "numpy"}, "float64", self.prepare, compiles=self.compiles)

    def prepare(self, case, plan):
        def answer(kind, seed):
            self.order.append(kind)
            self.seeds.append(seed)
            rng = np.random.default_rng(seed)
            shape = (plan.chains, plan.draws)
            values = self.values or {n: np.exp(rng.normal(size=(*shape, *s))) for n, s in case.SHAPES.items()}
            return Draws(values, warmup=7, gradients=900, seconds=self.seconds, note="by clockwork")

        called = lambda seed: answer("called", seed)  # noqa: E731
        return Prepared(called, (lambda seed: answer("warm", seed)) if self.has_warm else called)


def measured(monkeypatch, clockwork, **plan):
    monkeypatch.setattr(tools, "find", lambda name, kind: clockwork.tool())
    return worker.measure("eight-schools", "clockwork", 1, False, Plan(**{"draws": 200, "repeats": 2, **plan}))


def test_a_process_times_the_first_call_then_called_then_warm(monkeypatch):
    clockwork = Clockwork()
    found = measured(monkeypatch, clockwork)
    assert found.state == "done", found.reason
    # the first warm one is not timed: it compiles
    assert clockwork.order == ["called"] * 3 + ["warm"] * 3
    assert (len(found.called), len(found.warm)) == (2, 2)
    assert found.first > 0
    assert (found.round, found.empty, found.warmup, found.note) == (1, False, 7, "by clockwork")
    assert found.versions == {"numpy": np.__version__}
    gaps = np.diff(sorted(clockwork.seeds))
    assert (gaps >= 1000).all()
    other = Clockwork()
    monkeypatch.setattr(tools, "find", lambda name, kind: other.tool())
    worker.measure("eight-schools", "clockwork", 2, False, Plan(draws=200, repeats=2))
    assert not set(clockwork.seeds) & set(other.seeds)


def test_work_is_the_smallest_bulk_ess_of_the_identified_scalars(monkeypatch):
    rng = np.random.default_rng(4)
    values = {n: np.exp(rng.normal(size=(4, 200, *s))) for n, s in cases.load("eight-schools").SHAPES.items()}
    walk = np.exp(0.1 * rng.normal(size=(4, 200)).cumsum(1))
    values["mu"] = walk
    found = measured(monkeypatch, Clockwork(values, seconds=2.0))
    least = float(statistics.ess(torch.from_numpy(walk)))
    assert found.warm[0].work == pytest.approx(least)
    assert found.warm[0].rate == pytest.approx(least / 2)
    assert found.least_scalar == "mu"
    assert found.r_hat == pytest.approx(float(statistics.rhat(torch.from_numpy(walk))))
    theta = values["mu"] + values["tau"] * values["eta"][..., 3]
    assert found.estimates["theta[3]"].value == pytest.approx(theta.mean())
    assert found.estimates["theta[3]^2"].value == pytest.approx((theta**2).mean())
    one = float(statistics.mcse(torch.from_numpy(theta)))
    assert found.estimates["theta[3]"].error == pytest.approx(one / math.sqrt(2))  # of two answers


def test_a_tool_that_compiles_nothing_and_takes_long_is_run_once(monkeypatch):
    clockwork = Clockwork(compiles=False, warm=False)
    found = measured(monkeypatch, clockwork, patience=0.0)
    assert clockwork.order == ["called"]
    assert [t.seconds for t in found.warm] == [found.first] == list(found.called)


def test_one_that_compiles_is_run_warm_at_least_once(monkeypatch):
    clockwork = Clockwork()
    assert len(measured(monkeypatch, clockwork, patience=0.0).warm) == 1
    assert clockwork.order == ["called", "called", "warm", "warm"]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda v: {**v, "mu": np.full_like(v["mu"], np.nan)}, "mu has no effective draws"),
        (lambda v: {**v, "tau": np.ones_like(v["tau"])}, "tau has no effective draws"),
        (lambda v: {"mu": v["mu"]}, "KeyError: 'tau'"),
    ],
)
def test_draws_that_are_none_make_a_failure(monkeypatch, broken, words):
    rng = np.random.default_rng(5)
    values = {n: np.exp(rng.normal(size=(4, 50, *s))) for n, s in cases.load("eight-schools").SHAPES.items()}
    found = measured(monkeypatch, Clockwork(broken(values)))
    assert found.state == "failed"
    assert words in found.reason
    assert found.warm == ()


def test_together_is_the_mean_of_independent_estimates():
    parts = [{"a": Estimate(1.0, 0.3)}, {"a": Estimate(2.0, 0.4)}]
    assert together(parts) == {"a": Estimate(1.5, 0.25)}
    spread = together([{"a": Estimate(value, 0.0)} for value in (1.0, 2.0, 6.0)])  # sd sqrt(7), of three
    assert spread["a"].value == 3.0
    assert spread["a"].error == pytest.approx(math.sqrt(7 / 3))
    assert together(parts[:1])["a"].error == 0.3


@pytest.mark.parametrize(("answer", "name"), [(Steps(8, 3.5), "loss"), (Weights(9, -30.0, 0.1), "log evidence")])
def test_work_of_steps_and_weights_is_their_number(answer, name):
    judged = worker.judged(None, answer)
    assert judged.work == answer.count
    assert set(judged.estimates) == {name}


def test_work_of_weights_of_each_datum_is_their_number_and_means_of_their_logs_are_judged():
    """Data differ by more than draws do, and that is no error: every run has them all."""
    rng = np.random.default_rng(6)
    offset = np.array([-50.0, 0.0, 90.0])
    values = rng.normal(size=(400, 3)) + offset
    judged = worker.judged(None, LogWeights(values))
    assert judged.work == 1200
    mean, square = judged.estimates["log weight"], judged.estimates["log weight^2"]
    assert mean.value == pytest.approx(values.mean())
    assert mean.error == pytest.approx(1 / math.sqrt(1200), rel=0.1)
    assert square.value == pytest.approx((values**2).mean())
    assert square.error == pytest.approx(math.sqrt((2 + 4 * offset**2).mean() / 1200), rel=0.1)
    values[7, 1] = -math.inf
    with pytest.raises(ValueError, match="not all finite"):
        worker.judged(None, LogWeights(values))


def test_particles_are_judged_by_the_exact_evidence():
    case = cases.load("smc")
    exact = case.truth()["log evidence"].value
    judged = [worker.judged(case, Particles(2000, exact + off)) for off in (-0.3, 0.1)]
    assert judged[0].work == 2000
    both = together([j.estimates for j in judged])
    assert both["log evidence"].value == pytest.approx(exact - 0.1)
    assert both["log evidence"].error == pytest.approx(0.2)
    assert both["evidence off"].value == pytest.approx(0.2)
    assert both["evidence off"].error == pytest.approx(0.1)
    with pytest.raises(ValueError, match="log evidence is nan"):
        worker.judged(case, Particles(2000, math.nan))


def test_one_run_alone_says_nothing_of_agreement_and_several_do():
    case = cases.load("smc")
    exact = case.truth()["log evidence"].value

    def row(*offs):
        estimates = together([worker.judged(case, Particles(9, exact + off)).estimates for off in offs])
        found = replace(measurement(tools.OURS, 0, (1.0,), work=9.0, estimates=estimates), case="smc")
        return results.Benchmark(Plan(), (found,)).rows("smc")[0]

    alone, several = row(3.0), row(2.9, 3.0, 3.1)
    assert alone.disagreement is None
    assert (alone.off, alone.off_error) == (pytest.approx(3.0), 0.0)
    assert several.disagreement.z == pytest.approx(3.0 / (0.1 / math.sqrt(3)))
    assert several.off == pytest.approx(3.0)
    assert several.off_error == pytest.approx(0.1 / math.sqrt(3))


def moving(rng, chains=4, draws=60, data=7):
    return rng.normal(size=(chains, draws, data, 3)) * np.linspace(1.0, 2.0, data)[:, None]


def of_each_datum(values):
    """The least bulk ESS of the scalars of each datum."""
    return [float(statistics.ess(torch.from_numpy(values[:, :, k])).min()) for k in range(values.shape[2])]


SMALL_HMC = SimpleNamespace(KIND="hmc", NUM_STEPS=3, LONGEST=20, identified=lambda z: {"z": z["z"][:, :, :2]})


def test_work_of_hmc_is_gradients_of_each_datum_and_all_data_are_judged():
    """The worst datum is one that no agreement is asked of: the last, whose draws are each told four times."""
    values = moving(np.random.default_rng(1))
    values[:, :, 6] = np.repeat(values[:, ::4, 6], 4, 1)
    judged = worker.judged(SMALL_HMC, Draws({"z": values}, warmup=5, gradients=90))
    assert judged.work == 90 * 7
    each = of_each_datum(values)
    assert judged.ess == (pytest.approx(each[6]), pytest.approx(sorted(each)[3]))
    assert judged.ess[0] < 0.5 * judged.ess[1]
    assert set(judged.estimates) == {f"z[{k}]{s}" for k in range(6) for s in ("", "^2")}
    assert judged.note == ""


def test_work_of_nuts_per_datum_is_the_median_datum_times_all():
    """So that a tool that samples seven of a thousand is not asked for the others, and its worst is told."""
    case = SimpleNamespace(KIND="per-datum", DATA=1000, identified=SMALL_HMC.identified)
    values = moving(np.random.default_rng(1))
    values[:, :, 6] = np.repeat(values[:, ::4, 6], 4, 1)
    judged = worker.judged(case, Draws({"z": values}, warmup=5))
    each = sorted(of_each_datum(values))
    assert judged.ess == (pytest.approx(each[0]), pytest.approx(each[3]))
    assert judged.work == pytest.approx(1000 * each[3])
    two = worker.judged(case, Draws({"z": values[:, :, 5:]}, warmup=5))
    assert two.work == pytest.approx(1000 * sum(of_each_datum(values[:, :, 5:])) / 2)


def test_a_chain_that_stands_still_is_told_and_one_that_breaks_is_a_failure():
    values = moving(np.random.default_rng(2))
    values[1, :, (1, 5)] = 0.3
    judged = worker.judged(SMALL_HMC, Draws({"z": values}, warmup=5, gradients=90))
    assert judged.note == "2 of 7 data have a chain that never moves"
    assert judged.ess[0] is None
    assert judged.ess[1] > 0
    assert set(judged.estimates) == {f"z[{k}]{s}" for k in range(3) for s in ("", "^2")}  # of the datum that moves
    values[2, 3, 5] = math.nan
    with pytest.raises(ValueError, match="not all finite"):
        worker.judged(SMALL_HMC, Draws({"z": values}, warmup=5, gradients=90))
    with pytest.raises(ValueError, match="gradients is not known"):
        worker.judged(SMALL_HMC, Draws({"z": moving(np.random.default_rng(2))}, warmup=5))


def test_a_long_case_is_cut_short(monkeypatch):
    plans = []
    monkeypatch.setattr(worker, "_measured", lambda case, tool, plan, blank: plans.append(plan))
    for warmup in (None, 7, 900):
        worker.measure("vae-latents-hmc", tools.OURS, 0, True, Plan(warmup=warmup))
    worker.measure("vae-latents", tools.OURS, 0, True, Plan())
    assert [(plan.draws, plan.warmup) for plan in plans] == [(200, 200), (200, 7), (200, 200), (1000, None)]


def test_a_case_that_needs_many_repeats_has_them(monkeypatch):
    plans = []
    monkeypatch.setattr(worker, "_measured", lambda case, tool, plan, blank: plans.append(plan))
    for repeats in (1, 40):
        worker.measure("smc", tools.OURS, 0, True, Plan(repeats=repeats))
    worker.measure("importance", tools.OURS, 0, True, Plan(repeats=1))
    assert [plan.repeats for plan in plans] == [10, 40, 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", installed("hmc"))
def test_hmc_and_the_products_in_it_do_the_same_work(tool, monkeypatch):
    """2 chains of 30 data, 12 draws and 8 of warm-up, 8 leapfrog steps each: as many gradients but for a few to start
    (and for ours, whose trajectories have lengths of their own)."""
    case = cases.load("vae-latents-hmc")
    made = case.data()
    monkeypatch.setattr(case, "data", lambda: {**made, "x": made["x"][:30]})
    has_its_precision(tool)
    monkeypatch.setattr(importlib.import_module(tools.__name__ + ".torch"), "ROWS", 60)
    answer = tool.prepare(case, Plan(chains=2, draws=12, warmup=8)).called(3)
    steps = 8 * (12 + 8) * 2
    if tools.is_floor(tool.name):
        assert answer.count == steps * 30
        return
    (values,) = answer.values.values()
    assert values.shape == (2, 12, 30, 10)
    assert len(np.unique(values[..., 0])) > 0.5 * 2 * 12 * 30
    assert (0.6 if tools.is_ours(tool.name) else 1.0) * steps <= answer.gradients <= 1.4 * steps


# -- agreement -------------------------------------------------------------------------------------------------------


def estimates(**means):
    return {tool: {"a": Estimate(mean, 0.1), "b": Estimate(0.0, 0.1)} for tool, mean in means.items()}


def test_the_wrong_tool_is_told_from_the_right_ones():
    found = disagreements(estimates(one=1.0, two=1.1, three=0.9, wrong=3.0))
    assert found["wrong"].name == "a"
    assert found["wrong"].z == pytest.approx(2.0 / math.hypot(0.1, 0.1))
    assert all(found[tool].z < 1.5 for tool in ("one", "two", "three"))


def test_of_two_that_differ_both_are_told_and_one_alone_has_nothing_to_say():
    found = disagreements(estimates(one=1.0, two=3.0))
    assert found["one"].z == found["two"].z > 10
    assert disagreements(estimates(one=1.0)) == {}


def test_where_the_truth_is_known_all_are_held_to_it():
    found = disagreements(estimates(one=3.0, two=3.1, three=2.9, lone=1.0), {"a": Estimate(1.0, 0.0)})
    assert found["lone"].z == 0
    assert all(found[tool].z > 15 for tool in ("one", "two", "three"))


def test_what_is_not_finite_agrees_with_nothing():
    assert disagreements(estimates(one=math.nan, two=1.0, three=1.0))["one"].z == math.inf
    assert disagreements({"one": {"a": Estimate(1.0, 0.0)}, "two": {"a": Estimate(1.0, 0.0)}})["one"].z == 0


# -- turns and processes ---------------------------------------------------------------------------------------------


def answered(case, tool, plan, turn, caches, **changes):
    return replace(
        Measurement(case, tool.name, tool.precision, turn, turn % 2 == 0),
        **{"first": 3.0, "called": (1.0,), "warm": (Timing(0.5, 100.0, 2000),), **changes},
    )


@pytest.fixture
def three_tools(monkeypatch):
    """Three tools of every kind: ours, a peer, and one whose library nobody has."""
    made = [
        Tool(name, kind, {library: library}, "float64", lambda case, plan: None)
        for kind in results.UNITS
        for name, library in ((tools.OURS, "torch"), ("peer-fast", "numpy"), ("absent", "no-such-library"))
    ]
    monkeypatch.setattr(tools, "tools", lambda: made)


@pytest.mark.usefixtures("three_tools")
def test_tools_take_turns_and_what_is_absent_is_listed_once():
    seen = []

    def measure(case, tool, plan, turn, caches):
        seen.append((tool.name, turn))
        return answered(case, tool, plan, turn, caches)

    found = [s for s in run.steps(["importance"], [], Plan(rounds=3), measure) if isinstance(s, Measurement)]
    assert [turn for _, turn in seen] == [0, 0, 1, 1, 2, 2]
    assert [name for name, _ in seen] == [tools.OURS, "peer-fast", "peer-fast", tools.OURS, tools.OURS, "peer-fast"]
    (absent,) = [m for m in found if m.tool == "absent"]
    assert (absent.state, absent.reason) == ("not installed", "no-such-library")
    assert len(found) == 7


@pytest.mark.usefixtures("three_tools")
def test_what_failed_is_not_tried_again_on_that_case_but_on_the_next():
    seen = []

    def measure(case, tool, plan, turn, caches):
        seen.append((case, tool.name))
        failing = tool.name == "peer-fast" and case == "importance"
        return answered(case, tool, plan, turn, caches, **({"state": "failed", "reason": "boom"} if failing else {}))

    list(run.steps(["importance", "logistic"], ["peer", "pyrometer"], Plan(rounds=2), measure))
    assert seen.count(("importance", "peer-fast")) == 1
    assert seen.count(("logistic", "peer-fast")) == 2
    assert seen.count(("importance", tools.OURS)) == 2


def test_a_process_measures_and_its_caches_are_emptied_in_every_other_turn(tmp_path):
    tool = tools.find("torch-eager", "importance")
    caches = tmp_path / "caches"
    caches.mkdir()
    (caches / "left").touch()
    for turn, empty in ((1, False), (2, True)):
        found = run.in_a_process("importance", tool, Plan(repeats=1, cores=1), turn, caches)
        assert found.state == "done", found.reason
        assert found.empty is empty
        assert (caches / "left").exists() is not empty
    assert found.warm[0].work == 100_000
    assert found.warm[0].seconds > 0
    assert found.import_seconds > 0
    exact = cases.load("importance").truth()["log evidence"].value
    assert abs(found.estimates["log evidence"].value - exact) < 4.9 * found.estimates["log evidence"].error


def test_a_process_that_takes_too_long_or_ends_is_a_row_with_that_reason(tmp_path):
    tool = tools.find("torch-eager", "importance")
    late = run.in_a_process("importance", tool, Plan(limit=0.05), 0, tmp_path / "a")
    assert (late.state, late.reason) == ("timed out", "no answer within 0.05 s")
    ended = run.in_a_process("no-such-case", tool, Plan(), 0, tmp_path / "b")
    assert ended.state == "failed"
    assert "ended with code 1" in ended.reason
    assert "no_such_case" in ended.reason


def test_each_compiler_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTENSOR_FLAGS", "mode=FAST_RUN")
    variables = run._own_caches(tmp_path)
    for name in ("PYROMETER_CACHE", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        assert Path(variables[name]).parent == tmp_path
    assert variables["PYTENSOR_FLAGS"] == f"mode=FAST_RUN,base_compiledir={tmp_path}/pytensor"


# -- rows, table, JSON -----------------------------------------------------------------------------------------------


def measurement(tool, turn, seconds, work=100.0, mean=1.0, error=0.1, **changes):
    return Measurement(
        "logistic",
        tool,
        "float32" if tool == "peer" else "float64",
        turn,
        turn % 2 == 0,
        import_seconds=1.5,
        first=10.0 + turn,
        called=(5.0, 6.0),
        warm=tuple(Timing(s, work, 4000) for s in seconds),
        note="runs on rails" if tool == "peer" else "",
        load=0.25 + turn,
        versions={"lib-" + tool: "1.2"},
        **{"warmup": 500, "r_hat": 1.001, "estimates": {"beta[0]": Estimate(mean, error)}, **changes},
    )


def benchmark(**more):
    found = [
        measurement(tools.OURS, 0, (1.0, 2.0)),
        measurement(tools.OURS, 1, (4.0,)),
        measurement("peer", 0, (4.0, 8.0)),
        measurement("peer", 1, (16.0,)),
        measurement("wrong", 0, (0.1,), mean=9.0),
        Measurement("logistic", "absent", "float64", state="not installed", reason="no-such-library"),
        Measurement("logistic", "slow", "float64", state="timed out", reason="no answer within 600 s"),
    ]
    return results.Benchmark(Plan(rounds=2), tuple(found), command="pyrometer speed logistic", **more)


def shown(renderable, width=120):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_rows_are_medians_minima_and_ratios():
    rows = {row.tool: row for row in benchmark().rows("logistic")}
    ours, peer = rows[tools.OURS], rows["peer"]
    assert (ours.rate, ours.best, ours.warm, ours.least) == (50.0, 100.0, 2.0, 1.0)
    assert (peer.rate, peer.best, peer.warm, peer.least) == (12.5, 25.0, 8.0, 4.0)
    assert (ours.ratio, peer.ratio) == (1.0, 4.0)
    assert (ours.called, ours.cold, ours.cached) == (5.5, 10.0, 11.0)
    assert ours.gradient_rate == 2000.0
    assert (ours.import_seconds, ours.work, ours.warmup, ours.r_hat) == (1.5, 100.0, 500, 1.001)
    assert rows["wrong"].disagreement.z == pytest.approx(8.0 / math.hypot(0.1, 0.1 / math.sqrt(2)))
    assert ours.disagreement.z < 1
    assert rows["slow"] == results.Row("slow", "float64", "timed out", "no answer within 600 s")
    assert [row.tool for row in benchmark().rows("logistic")][:3] == [tools.OURS, "wrong", "peer"]


def test_the_table_says_it_all_in_120_columns():
    text = shown(render(benchmark()))
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines[tools.OURS][:5] == ["50", "ESS/s,", "the", "best", "peer"]
    (ours,) = [line.split() for line in text.splitlines() if line.startswith(" pyrometer")]
    assert ours[1:] == ["50", "1.00", "2.00", "1.00", "5.50", "10.0", "11.0", "2,000", "100", "0.0", "64"]
    assert "absent not installed: no-such-library" in text
    assert "slow timed out: no answer within 600 s" in text
    assert "wrong disagrees on beta[0]" in text
    assert "the best peer (peer) 12.5: 4.00 times as fast" in text  # not the wrong one, fast as it is
    assert "the best in float64" not in text  # only the wrong one is
    assert "warm-up draws of each chain: 500 (pyrometer, wrong, peer)" in text
    assert "peer: runs on rails" in text
    assert "load of the machine 0.2 to 1.2" in text
    assert "lib-peer 1.2" in text


def test_the_best_of_our_precision_is_named_beside_a_faster_one_of_another():
    found = (measurement(tools.OURS, 0, (1.0,)), measurement("peer", 0, (0.5,)), measurement("exact-peer", 0, (4.0,)))
    text = shown(render(results.Benchmark(Plan(), found)))
    assert "the best peer (peer) 200: 0.500 times as fast" in text
    assert "the best in float64 (exact-peer) 25: 4.00 times as fast" in text


def test_chains_that_have_not_mixed_win_nothing():
    found = [measurement(tools.OURS, 0, (1.0,)), measurement("stuck", 0, (0.1,)), measurement("peer", 0, (2.0,))]
    found[1] = replace(found[1], r_hat=1.4)
    text = shown(render(results.Benchmark(Plan(), tuple(found))))
    assert "stuck: R-hat 1.40" in text
    assert "the best peer (peer)" in text


def test_a_tool_that_failed_in_a_later_round_keeps_its_figures_and_says_so():
    late = Measurement("logistic", tools.OURS, "float64", 1, state="timed out", reason="late")
    text = shown(render(results.Benchmark(Plan(), (measurement(tools.OURS, 0, (1.0,)), late))))
    assert any(line.split()[:2] == ["pyrometer", "100"] for line in text.splitlines())
    assert "pyrometer timed out: late" in text


def test_the_products_alone_are_a_floor_and_no_peer():
    """Work is gradients: 12,000 of ours in 2 s, the products' 12,000 in 1.5 s."""

    def row(tool, seconds, **more):
        found = measurement(tool, 0, (seconds,), work=12_000.0, r_hat=None, **more)
        return replace(found, case="vae-latents-hmc", precision="float64")

    floor = {"estimates": {}, "warmup": None}
    ours = row(tools.OURS, 2.0, ess=(31.7, 210.4))
    stuck = row("blackjax-vectorised-x64", 4.0, ess=(None, 187.2))
    found = (ours, stuck, row("products-torch-x64", 1.5, **floor), row("products-jax-x64", 3.0, **floor))
    text = shown(render(results.Benchmark(Plan(), found)))
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(" ") and line.strip()}
    assert lines[tools.OURS][0] == "6,000"
    assert lines[tools.OURS][-4:] == ["31.7", "210", "0.0", "64"]
    assert lines["blackjax-vectorised-x64"][-4:-2] == ["-", "187"]
    assert lines["products-torch-x64"][-4:] == ["-", "-", "-", "64"]
    assert "the best peer (blackjax-vectorised-x64) 3,000: 2.00 times as fast" in text
    assert (
        "pyrometer 6,000 grad/s, the products alone (products-torch-x64) 8,000: 1.33 times the products' time" in text
    )
    assert "chains of 200 draws and as many of warm-up, at most" in text
    read = Measurement.from_json(json.loads(json.dumps(asdict(stuck))))
    assert read == stuck


def test_the_products_of_weights_are_a_floor_too_and_nuts_per_datum_tells_its_worst_and_median():
    floor = {"estimates": {}, "warmup": None, "r_hat": None}
    ours = measurement(tools.OURS, 0, (2.0,), work=12_000.0, r_hat=None, warmup=None)
    found = (ours, measurement("products-torch-x64", 0, (0.5,), work=12_000.0, **floor))
    text = shown(render(results.Benchmark(Plan(), tuple(replace(m, case="vae-latents-importance") for m in found))))
    assert "pyrometer 6,000 weights/s, the products alone (products-torch-x64) 24,000: 4.00 times the products" in text
    few = measurement("numpyro-vectorised-x64", 0, (2.0,), work=812_345.0, ess=(31.7, 812.345))
    text = shown(render(results.Benchmark(Plan(), (replace(few, case="vae-latents"),))))
    assert max(map(len, text.splitlines())) <= 120
    (line,) = [line.split() for line in text.splitlines() if line.startswith(" numpyro")]
    assert line[1] == "406,172"
    assert line[-4:] == ["31.7", "812", "-", "64"] or line[-4:-1] == ["31.7", "812", "-"]


@pytest.mark.parametrize(
    ("case", "answer", "words"),
    [
        ("svi-step-64", {"loss": Estimate(21.4567, 0.0)}, ["steps/s", "loss", "21.457"]),
        ("importance", {"log evidence": Estimate(-31.0, 0.5)}, ["draws/s", "|z|", "exact value"]),
        ("em-mixture", {"loss": Estimate(13.2567, 0.0)}, ["steps/s", "loss", "13.257"]),
        ("baum-welch", {"loss": Estimate(1.8567, 0.0)}, ["steps/s", "loss", "1.857"]),
        ("abc", {"mean off": Estimate(0.0312, 0.0), "sd ratio": Estimate(1.0451, 0.0)}, ["sims/s", "0.031", "1.045"]),
        (
            "abc",
            {"mean off": Estimate(0.0312, 0.0021), "sd ratio": Estimate(1.0451, 0.0113)},
            ["0.031±0.002", "1.045±0.011"],
        ),
        (
            "smc",
            {"log evidence": Estimate(-171.0, 0.05), "evidence off": Estimate(0.0712, 0.0113)},
            ["particles/s", "error", "0.071±0.011", "|z|", "exact value", "10 repeats in each round"],
        ),
        ("vae-latents-importance", {"log weight": Estimate(-41.0, 0.5)}, ["weights/s", "|z|", "two matrix products"]),
    ],
)
def test_other_kinds_have_their_own_columns(case, answer, words):
    found = replace(measurement(tools.OURS, 0, (1.0,)), case=case, estimates=answer, warmup=None)
    text = shown(render(results.Benchmark(Plan(), (found,))))
    for word in words:
        assert word in text
    assert "grad/s" not in text


def test_json_holds_every_measurement_and_reads_back(tmp_path):
    path = tmp_path / "speed.json"
    made = benchmark(complete=False)
    made.to_json(path)
    read = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not strict JSON"))
    assert [Measurement.from_json(m) for m in read["measurements"]] == list(made.measurements)
    assert (read["command"], read["complete"]) == ("pyrometer speed logistic", False)
    assert read["plan"] == asdict(made.plan)
    (case,) = read["cases"]
    assert (case["case"], case["unit"]) == ("logistic", "ESS/s")
    assert [row["tool"] for row in case["rows"]] == [row.tool for row in made.rows("logistic")]
    assert case["rows"][0]["ratio"] == 1.0
    assert {"torch", "lib-peer"} <= set(read["versions"])
    assert "cores" in read["machine"]


# -- discovery and the command ---------------------------------------------------------------------------------------


def test_every_file_is_a_case_or_tools(tmp_path, monkeypatch):
    (tmp_path / "new_case.py").write_text("KIND = 'posterior'\n")
    (tmp_path / "_helper.py").write_text("")
    monkeypatch.setattr(cases, "__path__", [*cases.__path__, str(tmp_path)])
    assert "new-case" in cases.names()
    assert not [name for name in cases.names() if name.startswith(("-", "_"))]
    assert cases.load("new-case").KIND == "posterior"
    sys.modules.pop(f"{cases.__name__}.new_case")

    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "newcomer.py").write_text(
        "from pyrometer.benchmarks.speed.tools import Tool\n"
        "TOOLS = [Tool('newcomer', 'svi', {'torch': 'torch'}, 'float32', None)]\n"
    )
    monkeypatch.setattr(tools, "__path__", [*tools.__path__, str(peers)])
    assert "newcomer" in [tool.name for tool in tools.tools()]
    assert tools.tools()[0].name == tools.OURS
    sys.modules.pop(f"{tools.__name__}.newcomer")


@pytest.mark.parametrize("name", cases.names())
def test_every_case_has_what_its_kind_needs_and_we_are_timed_on_it(name):
    case = cases.load(name)
    needs = {
        "posterior": "data problem numpyro_model pymc_model SHAPES constrain log_joint identified",
        "per-datum": "data problem SHAPES log_joint identified DATA",
        "hmc": "data problem SHAPES log_joint identified NUM_STEPS",
        "gibbs": "data problem numpyro_model SHAPES identified",
        "svi": "SIZE",
        "importance": "data problem NUM_DRAWS truth",
        "latents-importance": "data problem log_joint NUM_DRAWS",
        "smc": "data problem pymc_model log_prior log_likelihood NUM_PARTICLES COLUMNS truth",
        "mixture": "problem start NUM_STEPS ROWS",
        "chain": "problem start NUM_STEPS ROWS",
        "abc": "data problem posterior DIM NOISE NUM_SIMULATIONS NUM_SAMPLES",
    }[case.KIND]
    for part in needs.split():
        assert hasattr(case, part), part
    assert (case.__doc__ or "").splitlines()[0].endswith(".")
    assert any(tool.name == tools.OURS for tool in tools.chosen([], [case.KIND]))
    if case.KIND == "posterior":
        a, b = case.data(), case.data()
        assert all(np.array_equal(a[n], b[n]) for n in a)  # the simulator's seed is its own


def test_the_peers_are_all_there():
    names = {(tool.name, tool.kind) for tool in tools.tools()}
    for method in ("parallel", "sequential", "vectorised"):
        assert {(f"numpyro-{method}", "posterior"), (f"numpyro-{method}-x64", "posterior")} <= names
    assert {(n, "posterior") for n in ("pyro", "pymc", "pymc-nutpie", "blackjax-parallel")} <= names
    assert {(n, "svi") for n in ("pyro", "torch-eager", "torch-compiled", "numpyro-step", "numpyro-scan")} <= names
    assert {("scikit-learn", "mixture"), ("hmmlearn", "chain")} <= names
    assert {(n, "abc") for n in ("sbi", "sbi-regression", "pyabc")} <= names
    assert {(n, "per-datum") for n in ("pyro-datum-by-datum", "blackjax-vectorised", "numpyro-vectorised")} <= names
    assert {(n, "importance") for n in ("pyro", "torch-eager", "jax-jit")} <= names
    for tool in ("jax-jit", "jax-jit-x64", "torch-eager", "products-jax", "products-torch-x64"):
        assert (tool, "latents-importance") in names
    assert {(n, "smc") for n in ("blackjax-fixed", "blackjax-tuned", "blackjax-tuned-x64", "pymc")} <= names


def command(*arguments):
    return CliRunner().invoke(main, ["speed", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eight-scools"], "did you mean 'eight-schools'"),
        (["svi"], "no-error"),
        (["--tools", "numpiro-parallel", "logistic"], "did you mean 'numpyro-parallel'"),
        (["--rounds", "0"], "--rounds"),
        (["--draws", "two"], "--draws"),
        (["--seed", "-1"], "--seed -1"),
        (["--json", "/no/such/folder/out.json"], "no folder"),
    ],
)
def test_a_mistake_is_told_with_code_2(arguments, words, monkeypatch):
    monkeypatch.setattr(run, "in_a_process", answered)
    done = command(*arguments)
    if words == "no-error":
        assert done.exit_code == 0
        return
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("three_tools")
def test_the_command_runs_prints_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "in_a_process", answered)
    path = tmp_path / "out.json"
    done = command("svi-step", "--rounds", 2, "--seed", 3, "--tools", "pyrometer,absent", "--json", path)
    assert done.exit_code == 0, done.output
    for name in FITS:
        assert name in done.stdout
        assert f"{name}, round 1: pyrometer" in done.stderr
    assert "absent not installed: no-such-library" in done.stdout
    read = json.loads(path.read_text())
    assert read["command"].startswith("pyrometer speed svi-step --tools pyrometer,absent --seed 3")
    assert (read["plan"]["rounds"], read["plan"]["seed"], read["complete"]) == (2, 3, True)
    assert {m["tool"] for m in read["measurements"]} == {"pyrometer", "absent"}


@pytest.mark.usefixtures("three_tools")
def test_ctrl_c_prints_what_is_ready_and_exits_130(monkeypatch):
    def interrupted(case, tool, plan, turn, caches):
        if tool.name == "peer-fast":
            raise KeyboardInterrupt
        return answered(case, tool, plan, turn, caches)

    monkeypatch.setattr(run, "in_a_process", interrupted)
    done = command("importance")
    assert done.exit_code == 130
    assert "pyrometer" in done.stdout
    assert "ended early" in done.stdout


def test_names_mean_themselves_or_what_begins_with_them():
    assert cases.chosen(["svi_step"]) == FITS == ["svi-step-64", "svi-step-784"]
    assert cases.chosen(["Logistic"]) == ["logistic"]
    assert cases.chosen([]) == cases.names()
    assert [tool.name for tool in tools.chosen(["pyro"], ["svi"])] == ["pyro"]
    for unknown in ("zzzz", "log", ""):
        with pytest.raises(ProblemError, match=r"there are: .*eight-schools"):
            cases.chosen([unknown])
