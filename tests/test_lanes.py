"""Kernels on lanes: invariance by exact ranks, per-datum answers, and that no datum has a say in another's draws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from ranks import rank_test
from scipy import stats
from test_kernels import MODELS, STEP, engine_walk, forgets
from test_ranks import NORMAL

from pyrometer.inference import HMC, NUTS, Problem, ProblemError, RandomWalk, infer, mcmc
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Run, isolated
from pyrometer.inference.kernels import adaptation, metropolis, nuts, streams
from pyrometer.inference.lanes import Lanes, _slices, log_joint
from pyrometer.models import vae

F64 = torch.float64

# -- random numbers ---------------------------------------------------------------------------------------------------


def test_bits_are_those_of_splitmix64():
    """The published sequence of the generator seeded with 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    place = 1234567 + (torch.arange(4) + 1) * streams.GOLDEN
    assert [b % 2**64 for b in streams._mixed(place).tolist()] == published


def test_numbers_are_uniform_normal_and_apart():
    """200,000 numbers: Kolmogorov-Smirnov p > 1e-6; correlations of neighbours, lanes and pairs within 4.9 / sqrt n."""
    keys, counter = streams.keys(1, 2_000), torch.zeros(2_000, dtype=torch.int64)
    u, n = streams.uniforms(keys, counter, 100), streams.normals(keys, counter, 101)
    assert n.shape == (2_000, 101)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-6
    assert stats.kstest(n.flatten().numpy(), "norm").pvalue > 1e-6
    pairs = n[:, :50] * n[:, 51:]  # of one angle
    assert abs(float(pairs.mean())) < 4.9 / math.sqrt(pairs.numel())
    for values in (u - 0.5, n, n.square() - 1, pairs):
        values = values / values.std()
        for a, b in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1]), (values[:, -1:], values[:, :1])):
            assert abs(float((a * b).mean())) < 4.9 / math.sqrt(a.numel())


def test_the_nth_number_of_a_lane_is_the_same_wherever_it_stands():
    keys = streams.keys(1, 50)
    counter = torch.arange(50) * 7
    alone = streams.uniforms(keys[30:31], counter[30:31] + 2, 1)
    assert alone == streams.uniforms(keys, counter, 5)[30, 2]
    single = streams.uniforms(keys, counter, 5, torch.float32)
    assert single.dtype == torch.float32
    assert ((single > 0) & (single < 1)).all()


# -- invariance -------------------------------------------------------------------------------------------------------

ENGINES = {
    "nuts": (NUTS(backend="lanes", max_tree_depth=8), 1.0),
    "nuts, step too large": (NUTS(backend="lanes", max_tree_depth=8), 1.6),
    "nuts, shallow": (NUTS(backend="lanes", max_tree_depth=2), 1.0),
    "hmc": (HMC(num_steps=4), 1.0),
    "hmc, step too large": (HMC(num_steps=4), 1.5),
    "langevin": (HMC(num_steps=1), 1.2),
    "random walk": (RandomWalk(), 2.5),
}


def judged(model, name, replicates, seed=0):
    engine, stretch = ENGINES[name]
    return rank_test(MODELS[model].target(), engine_walk(model, engine, STEP[model] * stretch), replicates, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_a_kernel_leaves_its_target_invariant(model, name):
    """5,000 replicates of 20 states; false alarm 1e-6."""
    verdict = judged(model, name, 5_000, seed=1)
    assert verdict.accepted, verdict


def test_chains_move():
    walk = engine_walk("waiting_times", *ENGINES["nuts"])
    assert forgets(MODELS["waiting_times"].target(), walk) < 0.7


def observed_normal(y):
    """The normal of `test_ranks.py`, once for each datum: (mu, s) given five values."""
    with pyro.plate("data", len(y)):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(mu[:, None], s[:, None]).to_event(1), obs=y)


def datum_walk(engine, step_size):
    """All replicates at once: each is a datum with a chain of its own, in (mu, log s)."""

    def walk(z, x, steps, rng):
        seed = int(rng.integers(2**63))
        with isolated(seed), Density(Problem(observed_normal, args=(torch.from_numpy(x),))) as density, torch.no_grad():
            warm = {
                "position": torch.from_numpy(z)[None],
                "inverse_mass": torch.tensor([0.2, 0.1], dtype=F64).expand(1, len(z), 2),
                "step_size": torch.full((1, len(z)), step_size, dtype=F64),
            }
            run = Run(density, np.random.SeedSequence(seed), warm)
            found = replace(engine, num_samples=steps, num_chains=1).run(density, run).values
        return torch.stack([found["mu"][0], found["s"][0].log()], -1).transpose(0, 1).numpy()

    return walk


WALKS = {
    "nuts": (NUTS(max_tree_depth=6), 0.7),
    "hmc": (HMC(num_steps=3), 0.8),
    "langevin": (HMC(num_steps=1), 1.2),
    "random walk": (RandomWalk(), 1.5),
}


@pytest.mark.parametrize("name", WALKS)
def test_every_datum_gets_its_own_posterior(name):
    """5,000 data with a chain each, 20 states; false alarm 1e-6. Errors seen: those of `test_ranks.py`."""
    verdict = rank_test(NORMAL, datum_walk(*WALKS[name]), 5_000)
    assert verdict.accepted, verdict


def _double_kinetic(monkeypatch):
    monkeypatch.setattr(metropolis, "kinetic", lambda r, mass: 0.6 * (r.square() * mass).sum(1))


def _always_accept(monkeypatch):
    plain = metropolis.accept
    monkeypatch.setattr(metropolis, "accept", lambda old, new, rise, uniform: plain(old, new, rise + 1, uniform))


def _narrow_momenta(monkeypatch):
    plain = streams.normals
    monkeypatch.setattr(streams, "normals", lambda *args: 0.9 * plain(*args))


def _no_half_step(monkeypatch):
    plain = metropolis.leapfrog

    def wrong(lanes, path, u, r, slope, beta, step, mass):
        u, r, values, gradients, new = plain(lanes, path, u, r, slope, beta, step, mass)
        return u, r - 0.5 * step[:, None] * new, values, gradients, new

    monkeypatch.setattr(metropolis, "leapfrog", wrong)
    monkeypatch.setattr(nuts, "leapfrog", wrong)


def _wrong_energy(monkeypatch):
    monkeypatch.setattr(nuts, "kinetic", lambda r, mass: 0.4 * (r.square() * mass).sum(1))


def _only_whole_trees(monkeypatch):
    """No subtree is looked at: a tree could not have been grown from all of its leaves."""
    opens, closes = nuts._tables(6)
    monkeypatch.setattr(nuts, "_tables", lambda _: (opens, torch.zeros_like(closes)))


def _other_data(monkeypatch):
    plain = mcmc.Lanes.evaluate
    monkeypatch.setattr(mcmc.Lanes, "evaluate", lambda self, u, g=True: tuple(t.roll(1, 0) for t in plain(self, u, g)))


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("hmc", _double_kinetic),
        ("hmc", _always_accept),
        ("hmc", _no_half_step),
        ("langevin", _narrow_momenta),
        ("random walk", _always_accept),
        ("nuts", _wrong_energy),
        pytest.param("nuts", _no_half_step, marks=pytest.mark.slow),
        pytest.param("nuts", _narrow_momenta, marks=pytest.mark.slow),
        ("nuts", _only_whole_trees),
        ("hmc", _other_data),
    ],
)
def test_a_planted_bug_is_found(name, bug, monkeypatch):
    bug(monkeypatch)
    assert not rank_test(NORMAL, datum_walk(*WALKS[name]), 5_000).accepted


# -- moments ----------------------------------------------------------------------------------------------------------


def conjugate(n=40):
    """z_i ~ N(0, 1), x_i ~ N(z_i, s_i): scales over three orders of magnitude, so that step sizes must differ."""
    s = torch.logspace(-1.5, 1.5, n, dtype=F64)
    x = torch.linspace(-2, 2, n, dtype=F64)

    def model(x, s):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, s), obs=x)

    variance = 1 / (1 + 1 / s**2)
    return Problem(model, args=(x, s)), variance * x / s**2, variance.sqrt()


@pytest.mark.parametrize(
    "engine",
    [
        NUTS(num_samples=500, warmup_steps=200, num_chains=32),
        HMC(num_samples=500, warmup_steps=200, num_chains=32),
        HMC(num_samples=1500, warmup_steps=200, num_chains=32, num_steps=1),
        RandomWalk(num_samples=8000, warmup_steps=500, num_chains=32),
    ],
    ids=["nuts", "hmc", "langevin", "random walk"],
)
def test_moments_of_every_datum_are_exact(engine):
    """t of mean, second moment and quantile shares over 32 chains, 40 data: below 6.1 each (1e-6), mean t^2 of the 200
    within [0.7, 1.4]; standard errors of the mean at most 0.02 sd."""
    problem, mean, sd = conjugate()
    posterior = infer(problem, engine, seed=3)
    assert posterior.status.done
    w = ((posterior.draws["z"] - mean) / sd).numpy()  # (32, S, 40)
    points = stats.norm.ppf([0.05, 0.5, 0.95])
    off = np.stack([w.mean(1), (w**2).mean(1) - 1, *((w < p).mean(1) - stats.norm.cdf(p) for p in points)], -1)
    error = off.std(0, ddof=1) / math.sqrt(32)
    t = off.mean(0) / error
    assert np.abs(t).max() < 6.1
    assert 0.7 < (t**2).mean() < 1.4
    assert error[:, 0].max() < 0.02
    scale = posterior.state["step_size"].mean(0) * posterior.state["inverse_mass"].mean(0)[:, 0].sqrt()
    assert float((scale / sd).min()) > 0.3  # each datum has steps of its own size
    assert float((scale / sd).max()) < 8


def test_moments_of_a_vae_are_those_of_its_grid():
    """30 digits, 16 chains, fixed seed: |t| < 8.2, the 1e-6 point of 15 degrees of freedom."""
    problem = vae.problem(num_train=30, num_test=0)
    posterior = infer(problem, NUTS(num_samples=300, warmup_steps=200, num_chains=16), seed=0)
    truth = problem.reference(posterior.parameters, *problem.args)
    z = posterior.draws["z"]
    for got, right in ((z, truth.mean["z"]), (z.square(), truth.sd["z"].square() + truth.mean["z"].square())):
        each = got.mean(1) - right
        t = each.mean(0) / (each.std(0) / 4)
        assert float(t.abs().max()) < 8.2


# -- one datum and the others -----------------------------------------------------------------------------------------


def spoiled(value):
    problem, *_ = conjugate(40)
    x, s = problem.args
    x = x.clone()
    x[7] = value
    return problem.on(x, s)


SMALL = {
    "nuts": NUTS(num_samples=40, warmup_steps=40),
    "hmc": HMC(num_samples=40, warmup_steps=40),
    "random walk": RandomWalk(num_samples=40, warmup_steps=40),
}


def narrow(monkeypatch):
    """48 lanes at a time."""
    monkeypatch.setattr(mcmc, "SLOTS", 48)
    monkeypatch.setattr(mcmc, "FEWEST_SLOTS", 16)
    monkeypatch.setattr(Lanes.__init__, "__defaults__", (log_joint, 48, ()))


@pytest.fixture(params=["together", "in blocks"])
def blocks(request, monkeypatch):
    """All lanes side by side, or 48 of the 160 at a time."""
    if request.param == "in blocks":
        narrow(monkeypatch)
    else:
        monkeypatch.setattr(mcmc, "FEWEST_SLOTS", 160)
    return request.param


@pytest.mark.parametrize("value", [1e200, 1e9])
@pytest.mark.parametrize("name", SMALL)
def test_a_bad_datum_changes_no_other_datums_draws(name, value, blocks):
    """Bit for bit, whether the density is zero wherever it starts or the chain has to go far."""
    good, bad = (infer(p, SMALL[name], seed=5) for p in (spoiled(0.5), spoiled(value)))
    others = [i for i in range(40) if i != 7]
    assert torch.equal(good.draws["z"][:, :, others], bad.draws["z"][:, :, others])
    for figure in good.sample_stats:
        assert torch.equal(good.sample_stats[figure][..., others], bad.sample_stats[figure][..., others])
    if value == 1e200:
        assert bad.diagnostics.level == "bad"
        assert "not finite at datum 7" in bad.diagnostics.verdict


@pytest.mark.parametrize("name", SMALL)
def test_the_width_of_a_block_changes_nothing(name, monkeypatch):
    """But the rounding, which tuning makes larger, for each width is compiled by itself: a draw that went another way
    would be off by its sd."""
    problem, *_ = conjugate(40)
    engine = replace(SMALL[name], warmup_steps=10)
    whole = infer(problem, engine, seed=2)
    monkeypatch.setattr(mcmc, "FEWEST_SLOTS", 16)
    for width in (32, 48, 96):
        monkeypatch.setattr(mcmc, "SLOTS", width)
        monkeypatch.setattr(Lanes.__init__, "__defaults__", (log_joint, width, ()))
        narrow = infer(problem, engine, seed=2)
        assert torch.allclose(narrow.draws["z"], whole.draws["z"], rtol=0, atol=1e-6)
        assert torch.equal(narrow.sample_stats["n_steps"], whole.sample_stats["n_steps"])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("width", [64, 256])
def test_the_order_of_the_data_changes_nothing(name, width, monkeypatch):
    """Bit for bit, in whole vectors of lanes: data that take their starts and random numbers along take their draws
    along."""
    monkeypatch.setattr(mcmc, "SLOTS", width)
    monkeypatch.setattr(Lanes.__init__, "__defaults__", (log_joint, width, ()))
    problem, *_ = conjugate(64)
    generator = torch.Generator().manual_seed(1)
    order, start = torch.randperm(64, generator=generator), torch.randn(4, 64, dtype=F64, generator=generator)
    plain = infer(problem, replace(SMALL[name], initial={"z": start}), seed=5)
    keys = streams.keys

    def taken_along(seed, lanes, device=None):
        found = keys(seed, lanes, device)
        return found.reshape(4, 64)[:, order].reshape(-1) if lanes == 256 else found

    monkeypatch.setattr(streams, "keys", taken_along)
    engine = replace(SMALL[name], initial={"z": start[:, order]})
    other = infer(problem.on(*(t[order] for t in problem.args)), engine, seed=5)
    assert torch.equal(plain.draws["z"][..., order], other.draws["z"])
    for figure in plain.sample_stats:
        assert torch.equal(plain.sample_stats[figure][..., order], other.sample_stats[figure])


def test_trajectories_differ_in_length_and_are_as_long_for_all():
    """Over 200 draws all lengths from 1 to 2 n - 1 are met, evenly (chi-squared at 1e-6), in every lane at once."""
    problem, *_ = conjugate(3)
    posterior = infer(problem, HMC(num_samples=200, warmup_steps=5, num_steps=3), seed=1)
    steps = posterior.sample_stats["n_steps"]
    assert (steps == steps[:1, :, :1]).all()
    met = torch.bincount(steps[0, :, 0])[1:]
    assert len(met) == 5
    assert stats.chisquare(met.numpy()).pvalue > 1e-6


def test_no_work_is_wasted_where_trees_differ():
    s = torch.logspace(-1.3, 0.5, 400, dtype=F64)

    def model(x, s):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), s), obs=x)  # the smaller s, the longer its trees

    problem = Problem(model, args=(torch.zeros(400, dtype=F64), s))
    posterior = infer(problem, NUTS(num_samples=100, warmup_steps=100), seed=0)
    steps = posterior.sample_stats["n_steps"].double().mean((0, 1))
    assert float(steps.max() / steps.median()) > 1.5
    assert 1.0 <= float(posterior.diagnostics["executed"]) < 1.3


def test_rows_are_used_only_where_they_are_rows():
    problem, *_ = conjugate(40)
    with Density(problem) as density:
        assert _slices(density, log_joint)
        assert Lanes(density, 4, width=50).width == 50
    x, s = problem.args

    def closed_over():
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, s), obs=x)

    with Density(Problem(closed_over)) as density:
        assert not _slices(density, log_joint)
        assert Lanes(density, 4, width=50).whole
    assert infer(Problem(closed_over), HMC(num_samples=5, warmup_steps=5)).draws["z"].shape == (4, 5, 40)


# -- tuning -----------------------------------------------------------------------------------------------------------


def test_windows_double_and_end_before_the_warm_up_does():
    inside, ends = adaptation.schedule(1000)
    at = ends.nonzero()[:, 0] + 1
    widths = at.diff(prepend=inside.nonzero()[0])
    assert inside.sum() == widths.sum()
    assert (widths[1:-1] == 2 * widths[:-2]).all()
    assert inside[:100].sum() == 0
    assert inside[750:].sum() == 0
    for short in (0, 1, 5, 19, 20, 50, 150):
        inside, ends = adaptation.schedule(short)
        assert len(inside) == max(1, short)
        assert bool(ends.any()) == (short >= 20)


def test_tuning_finds_scale_and_step_and_then_stops():
    problem, _, sd = conjugate(40)
    first = infer(problem, HMC(num_samples=50, warmup_steps=300), seed=1)
    assert float(first.sample_stats["acceptance_rate"].mean()) == pytest.approx(0.85, abs=0.08)
    longer = infer(problem, HMC(num_samples=80, warmup_steps=300), seed=1)
    assert torch.equal(first.draws["z"], longer.draws["z"][:, :50])
    for name in ("step_size", "inverse_mass"):
        assert torch.equal(first.state[name], longer.state[name])
    ratio = first.state["inverse_mass"][..., 0].sqrt().mean(0) / sd
    assert float(ratio.min()) > 0.7
    assert float(ratio.max()) < 1.4


def test_tuning_of_trees_stops_with_the_warm_up():
    problem, *_ = conjugate(4)
    first, longer = (infer(problem, NUTS(num_samples=n, warmup_steps=40), seed=1) for n in (20, 40))
    assert torch.equal(first.draws["z"], longer.draws["z"][:, :20])
    for name in ("step_size", "inverse_mass"):
        assert torch.equal(first.state[name], longer.state[name])


@pytest.mark.parametrize("name", ["nuts", "hmc"])
def test_a_warm_start_goes_on_without_warm_up(name):
    problem, *_ = conjugate(40)
    first = infer(problem, SMALL[name], seed=1)
    second = infer(problem, SMALL[name], seed=2, warm=first)
    assert second.cost.tuning_gradients == 0
    assert torch.equal(first.state["step_size"], second.state["step_size"])
    assert torch.equal(first.state["inverse_mass"], second.state["inverse_mass"])
    with pytest.raises(ProblemError, match="the warm start holds positions of shape"):
        infer(problem, replace(SMALL[name], num_chains=3), warm=first)
    if name == "hmc":
        with pytest.raises(ProblemError, match="give one of them"):
            infer(problem, replace(SMALL[name], initial={"z": 0.0}), warm=first)


@pytest.mark.parametrize("engine", [HMC, RandomWalk])
def test_settings_are_checked(engine):
    for bad in ({"target_acceptance": 1.0}, {"target_acceptance": -1}, {"step_size": 0}, {"num_chains": 0}):
        with pytest.raises(ProblemError, match=next(iter(bad))):
            engine(**bad)


def test_diagnostics_are_per_datum():
    problem, *_ = conjugate(40)
    posterior = infer(problem, NUTS(num_samples=200, warmup_steps=200), seed=1)
    for name in ("r_hat_per_datum", "ess_bulk_per_datum", "ess_tail_per_datum", "divergences_per_datum"):
        assert posterior.diagnostics[name].shape == (40,)
    assert float(posterior.diagnostics["r_hat_per_datum"].max()) == posterior.diagnostics["r_hat"]
    assert float(posterior.diagnostics["ess_bulk_per_datum"].min()) == posterior.diagnostics["ess_bulk"]


def test_open_spans_are_closed_in_order():
    """Against the recursion: subtrees of a tree of 16 leaves, by the leaves where they begin and end."""
    opens, closes = (t.numpy() for t in nuts._tables(5))
    edge = {}
    for leaf in range(16):
        for place in np.flatnonzero(opens[leaf]):
            edge[place] = leaf
        found = {(edge[place], leaf) for place in np.flatnonzero(closes[leaf])}
        spans = {(first, first + 2**d - 1) for d in range(1, 5) for first in range(0, 16, 2**d)}
        assert found == {span for span in spans if span[1] == leaf}


class Bowl:
    """A normal target of sds 1 and 3, for kernels that ask lanes for it."""

    precision = torch.tensor([1.0, 1 / 9], dtype=F64)

    def evaluate(self, u, gradient=True):
        return -0.5 * (u.square() * self.precision).sum(1, keepdim=True), (-u * self.precision)[:, None]


def test_turns_of_spans_are_those_of_the_recursion():
    """300 trees of up to 32 leaves, leaf by leaf: a tree is cut off where one of the spans that the leaf closes turns,
    its momenta added up from edge to edge, and grows where none does, to the left half of the time (within 4.9 sd)."""
    lanes, width, depth = Bowl(), 300, 5
    ones = torch.ones(width, dtype=F64)
    step, mass = 0.4 * ones, torch.ones(width, 2, dtype=F64)
    u = torch.randn(width, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    point = metropolis.Point(u, *lanes.evaluate(u))
    none = torch.zeros(width, dtype=torch.int64)
    tree = nuts.plant(point, metropolis.only, ones, mass, streams.keys(3, width), none, depth)
    leaves = [[] for _ in range(width)]  # momenta of the subtree that grows
    closed = turned = 0
    leftwards = [tree.forward < 0]
    while not bool(tree.done.all()):
        momenta = metropolis.leapfrog(
            lanes, metropolis.only, tree.at_u, tree.at_r, tree.at_slope, ones, tree.forward * step, mass
        )[1]
        new = nuts.grow(tree, lanes, metropolis.only, ones, step, mass, depth)
        for lane in (~tree.done).nonzero()[:, 0].tolist():
            own = leaves[lane] = [*leaves[lane], momenta[lane]]
            spans = [own[-(2**d) :] for d in range(1, depth) if len(own) % 2**d == 0]
            middle = [sum(span) - (span[0] + span[-1]) / 2 for span in spans]
            turns = any(
                float(m @ end) <= 0 for m, span in zip(middle, spans, strict=True) for end in span[:: len(span) - 1]
            )
            complete = len(own) == 2 ** int(tree.depth[lane])
            joined = bool(new.log_weight[lane] > tree.log_weight[lane])
            assert joined == (complete and not turns)
            assert complete or bool(new.done[lane]) == turns
            closed, turned = closed + len(spans), turned + turns
            if complete:
                leaves[lane] = []
        leftwards.append(new.forward[(new.depth > tree.depth) & ~tree.done & ~new.done] < 0)
        tree = nuts.Tree(*(
            torch.where(tree.done.reshape(-1, *[1] * (b.dim() - 1)), a, b) for a, b in zip(tree, new, strict=True)
        ))  # fmt: skip
    assert closed > 1000
    assert turned > 50
    for coins in (leftwards[0], torch.cat(leftwards[1:])):
        assert abs(float(coins.double().mean()) - 0.5) < 4.9 * 0.5 / math.sqrt(len(coins))


def test_trees_that_are_cut_short_are_told():
    problem, *_ = conjugate(3)
    posterior = infer(problem, NUTS(num_samples=30, warmup_steps=30, max_tree_depth=1), seed=1)
    assert posterior.diagnostics.level in ("caution", "bad")
    assert "cut short at max_tree_depth at data 0, 1, 2" in posterior.diagnostics.verdict


def test_lanes_that_run_slower_than_they_could_say_so(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    problem, *_ = conjugate(5)
    for engine in (HMC(num_samples=5, warmup_steps=5), NUTS(num_samples=5, warmup_steps=5)):
        posterior = infer(problem, engine)
        assert posterior.cost.backend == "graph"
        assert any(
            "runs as graph, which is slower: not compiled: no C compiler" in n for n in posterior.diagnostics.notes
        )
