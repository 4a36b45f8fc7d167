"""Forward-backward against listing, a second recursion, and Baum-Welch's own fixed points."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyrometer.inference import EM, Enumeration, Problem, chain_sums, infer, learn, why_not
from pyrometer.inference.chain_sums import Marginals, marginals, native, sampled
from pyrometer.inference.density import Density
from pyrometer.inference.engine import isolated
from pyrometer.inference.engines.forward_backward import ForwardBackward
from pyrometer.inference.markov import Chain, Factors
from pyrometer.inference.native import chains
from pyrometer.inference.native.toolchain import CompileError, compiler
from pyrometer.inference.rolled import RollError, rolled
from pyrometer.models import gaussian_mixture, hidden_markov, linear_gaussian_ssm

F64 = torch.float64


def random_factors(
    steps: int, n: int = 2, k: int = 3, spread: float = 2.0, kind: str = "each", seed: int = 0
) -> Factors:
    """Moves of each step and datum, or 'one' matrix for all; 'zeros': of which two fifths are impossible."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return spread * torch.randn(*shape, generator=generator, dtype=F64)

    moves = normal(steps - 1, n, k, k) if kind == "each" else normal(1, 1, k, k)
    if kind == "zeros":
        moves[torch.rand(moves.shape, generator=generator) < 0.4] = -math.inf
        moves.diagonal(dim1=-2, dim2=-1).zero_()
    return Factors(normal(n, k), moves, normal(steps - 1, n, k))


def listed(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """State marginals (N, T, K), pairs summed over time (N, K, K) and log sums (N,), by listing every path."""
    steps, k = len(factors.seen) + 1, factors.first.shape[1]
    paths = torch.tensor(list(itertools.product(range(k), repeat=steps)))
    log_p = factors.first[:, paths[:, 0]]
    for t in range(1, steps):
        log_p = log_p + factors.later[t - 1][:, paths[:, t - 1], paths[:, t]]
    total, weight = torch.logsumexp(log_p, 1), torch.softmax(log_p, 1)
    one = torch.nn.functional.one_hot(paths, k).double()
    pairs = torch.einsum("ns,sti,stj->nij", weight, one[:, :-1], one[:, 1:])
    return torch.einsum("ns,stk->ntk", weight, one), pairs, total


@pytest.fixture(params=["native", "blocks", "logs"])
def way(request, monkeypatch):
    """Chains of any length by machine code, by blocks or one step at a time."""
    if request.param == "native" and compiler() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(chain_sums, "NATIVE_FROM", 0 if request.param == "native" else 10**9)
    monkeypatch.setattr(chain_sums, "BLOCKS_FROM", 1 if request.param == "blocks" else 10**9)
    return request.param


def summed(factors: Factors):
    return marginals(factors, (len(factors.first),), native(factors)[0])


def drawn(factors: Factors, count: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return sampled(factors, count, native(factors)[0])[0]


def one_by_one(monkeypatch, factors: Factors):
    monkeypatch.setattr(chain_sums, "BLOCKS_FROM", 10**9)
    return marginals(factors, (len(factors.first),))


def assert_same(found, expected, rtol=1e-10):
    (mine, total), (theirs, truth) = found, expected
    torch.testing.assert_close(total, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.single, theirs.single, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(mine.pairs, theirs.pairs, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("kind", ["each", "one", "zeros"])
@pytest.mark.parametrize(("steps", "n", "k"), [(1, 2, 3), (2, 2, 3), (7, 2, 3), (5, 3, 1), (4, 19, 2)])
def test_marginals_are_those_of_all_paths(way, kind, steps, n, k):
    factors = random_factors(steps, n, k, kind=kind)
    single, pairs, truth = listed(factors)
    assert_same(summed(factors), (Marginals(single, pairs), truth))


@pytest.mark.parametrize("way", ["native", "blocks"], indirect=True)
@pytest.mark.parametrize("kind", ["each", "one", "zeros"])
@pytest.mark.parametrize(("steps", "spread"), [(120, 1.0), (1000, 30.0), (400, 120.0), (1024, 200.0), (120, 400.0)])
def test_every_way_gives_what_logs_give(monkeypatch, way, kind, steps, spread):
    """At spreads of 100 nats and more, numbers are lost that come back into weight: what sees it sums in logs. Left
    unseen, they cost 1e-4 of the evidence at 200 nats."""
    for seed in range(3):
        factors = random_factors(steps, 2, 4, spread, kind, seed)
        assert_same(summed(factors), one_by_one(monkeypatch, factors), rtol=1e-7)
        monkeypatch.setattr(chain_sums, "BLOCKS_FROM", 1 if way == "blocks" else 10**9)


def apart(*losing: tuple[int, int]) -> tuple[Factors, float]:
    """Two states without a way between, one of which loses 60 nats a step: (steps, which) in turn; the evidence too."""
    seen = torch.cat([-60.0 * torch.eye(2, dtype=F64)[which].expand(steps, 1, 2) for steps, which in losing])
    off = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=F64)
    return Factors(torch.zeros(1, 2, dtype=F64), off[None, None], seen), float(torch.logsumexp(seen.sum((0, 1)), 0))


def test_states_that_do_not_meet_keep_scales_of_their_own(way):
    """First one falls behind by thousands of nats, and then the other; and one that is behind at both ends, but not on
    the whole, where the ends tell nothing of it."""
    factors, truth = apart((200, 0), (200, 1))
    found, total = summed(factors)
    assert abs(float(total) - truth) < 1e-6
    torch.testing.assert_close(found.single[0, 200], torch.full((2,), 0.5, dtype=F64), rtol=1e-8, atol=0)
    factors, truth = apart((50, 0), (300, 1), (50, 0))
    found, total = summed(factors)
    assert abs(float(total) - truth) < 1e-6
    torch.testing.assert_close(found.single[0, :, 0], torch.ones(401, dtype=F64), rtol=0, atol=1e-12)
    assert bool((drawn(factors, 20) == 0).all())


def test_a_state_that_is_lost_only_within_a_block_comes_back(way):
    """Two ways part from one state and meet in another, all in one block. First and last one falls behind by 900 nats,
    on the whole it is 600 ahead: from no end and no beginning is that seen."""
    off = -math.inf
    moves = torch.full((4, 4), off, dtype=F64)
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (2, 2), (1, 3), (2, 3), (3, 3)):
        moves[i, j] = 0.0
    seen = torch.zeros(1599, 1, 4, dtype=F64)
    seen[:203, :, 1:] = seen[203:217, :, 0] = seen[203:217, :, 3] = seen[217:, :, :3] = off
    seen[203:206, :, 1] = seen[206:214, :, 2] = seen[214:217, :, 1] = -300.0
    factors = Factors(torch.tensor([[0.0, off, off, off]], dtype=F64), moves[None, None], seen)
    found, total = summed(factors)
    assert abs(float(total) + 1800.0) < 1e-9
    assert abs(float(found.single[0, 210, 1]) - 1) < 1e-12
    assert bool((drawn(factors, 20)[:, 0, 210] == 1).all())


@pytest.mark.parametrize(("kind", "spread"), [("each", 1.0), ("one", 1.0), ("zeros", 1.0), ("zeros", 200.0)])
def test_draws_have_the_frequencies_of_all_paths(way, kind, spread):
    """Pearson's test of 40,000 draws of each of two chains on 27 paths: refused by chance once in a million; a path
    whose share is off by 0.015 is seen."""
    factors = random_factors(3, kind=kind, spread=spread, seed=4)
    paths = drawn(factors, 40_000)
    number = paths @ torch.tensor([9, 3, 1])
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    rows = torch.arange(2)[:, None]
    log_p = factors.first[rows, every[:, 0]]
    moves = factors.moves.expand(2, 2, 3, 3)
    for t in (1, 2):
        log_p = log_p + moves[t - 1][rows, every[:, t - 1], every[:, t]] + factors.seen[t - 1][rows, every[:, t]]
    p = torch.softmax(log_p, 1)
    for n in range(2):
        count = torch.bincount(number[:, n], minlength=27).double()
        usual = p[n] * 40_000 > 5
        rare = ~usual
        statistic = ((count - 40_000 * p[n]).square() / (40_000 * p[n]))[usual].sum()
        assert stats.chi2.sf(float(statistic), max(1, int(usual.sum()) - 1)) > 1e-6
        assert float(count[rare].sum()) <= stats.poisson.isf(1e-6, 40_000 * float(p[n][rare].sum()) + 1e-12)


@pytest.mark.parametrize("kind", ["each", "zeros"])
@pytest.mark.parametrize("spread", [2.0, 150.0])
def test_machine_code_draws_the_paths_that_torch_draws(monkeypatch, kind, spread):
    if compiler() is None:
        pytest.skip("no C compiler")
    factors = random_factors(150, 5, 4, spread, kind)
    mine = drawn(factors, 50)
    monkeypatch.setattr(chain_sums, "NATIVE_FROM", 10**9)
    assert torch.equal(mine, drawn(factors, 50))


def test_without_a_compiler_the_answers_are_the_same_and_it_is_said(monkeypatch):
    problem = hidden_markov.problem(num_data=2, num_steps=120)
    fits = [infer(problem, ForwardBackward(num_samples=20), seed=1)]

    def none(text: str) -> None:
        raise CompileError("no C compiler was found (set CC, or install gcc)")

    monkeypatch.setattr(chains, "load", none)
    chains._library.cache_clear()
    fits.append(infer(problem, ForwardBackward(num_samples=20), seed=1))
    assert not [n for n in fits[0].diagnostics.notes if "compiler" in n] or compiler() is None
    (said,) = [n for n in fits[1].diagnostics.notes if "compiler" in n]
    assert said == "the chain was summed by torch, which is slower: no C compiler was found (set CC, or install gcc)"
    torch.testing.assert_close(fits[0].log_evidence.value, fits[1].log_evidence.value, rtol=1e-12, atol=0)
    assert all(torch.equal(fits[0].draws[f"z_{t}"], fits[1].draws[f"z_{t}"]) for t in range(120))


@pytest.mark.parametrize("emissions", ["normal", "categorical"])
def test_evidence_and_draws_of_the_family(emissions):
    """2,000 independent draws: |z| < 4.9 for mean and second moment of each state number, and of neighbours' products;
    an error of 0.11 sd is seen."""
    problem = hidden_markov.problem(emissions=emissions, num_data=3, num_steps=6)
    posterior = infer(problem, ForwardBackward(num_samples=2000), seed=0)
    assert posterior.status.done, posterior.status
    listing = infer(problem, Enumeration())
    torch.testing.assert_close(posterior.log_evidence.value, listing.log_evidence.value, rtol=1e-12, atol=1e-12)
    assert posterior.log_evidence.kind == "exact"
    functions = [lambda d, t=t: d[f"z_{t}"].double() ** p for t in range(6) for p in (1, 2)]  # noqa: B023
    functions += [lambda d, t=t: (d[f"z_{t}"] * d[f"z_{t + 1}"]).double() for t in range(5)]
    functions += [lambda d, t=t: (d[f"z_{t}"] == 1).double() for t in range(6)]
    for function in functions:
        truth = listing.expectation(function)
        sd = (listing.expectation(lambda d, f=function: f(d) ** 2) - truth**2).clamp_min(1e-12).sqrt()
        z = (posterior.expectation(function) - truth) / sd * math.sqrt(2000)
        assert float(z.abs().max()) < 4.9


def test_without_markov_and_with_plates_masks_and_one_hot_states():
    """Inner plates, two sites at a step, an observation of a transition, one-hot states, two batch plates."""

    def model(y: Tensor) -> None:
        move, loc = y.new_tensor([[0.7, 0.3], [0.2, 0.8]]), y.new_tensor([-1.0, 1.5])
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = None
            for t in range(5):
                new = pyro.sample(f"z_{t}", dist.OneHotCategorical(y.new_tensor([0.4, 0.6]) if z is None else z @ move))
                with pyro.poutine.mask(mask=torch.tensor(t != 2)), pyro.plate(f"inner_{t}", 4, dim=-3):
                    pyro.sample(f"x_{t}", dist.Normal(new @ loc, 1.0), obs=y[t])
                if z is not None:
                    pyro.sample(f"d_{t}", dist.Normal((new - z) @ loc, 2.0), obs=y[t, 0])
                z = new

    y = torch.randn(5, 4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    problem = Problem(model, args=(y,))
    posterior = infer(problem, ForwardBackward(num_samples=50), seed=0)
    assert posterior.status.done, posterior.status
    assert posterior.batch_shape == (2, 3)
    listing = infer(problem, Enumeration())
    torch.testing.assert_close(posterior.log_evidence.value, listing.log_evidence.value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", ["none", "two matrices", "a step alone", "two ties", "two alike at a step"])
def test_chains_whose_steps_differ(change):
    """Against listing, at three thetas: as the program runs, and rolled up."""

    def model(y: Tensor) -> None:
        move = pyro.param("move", torch.softmax(y[:4].reshape(2, 2), -1), constraint=dist.constraints.simplex)
        loc = pyro.param("loc", y.new_tensor([-1.0, 1.5]))
        other = move.flip(0)
        z = None
        for t in range(7):
            before, alone = z, z is None or (change == "a step alone" and t == 3)
            table = other if change == "two matrices" and t == 4 else move
            z = pyro.sample(f"z_{t}", dist.Categorical(y.new_tensor([0.4, 0.6]) if alone else table[before]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=y[t])
            if change == "two alike at a step":
                pyro.sample(f"w_{t}", dist.Normal(loc[z], 1.0), obs=y[6 - t])
            if change == "two ties" and t == 5:
                pyro.sample("tie", dist.Normal(loc[z] * loc[before], 1.0), obs=y[0])

    y = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=F64)
    density = Density(Problem(model, args=(y,)))
    with isolated(0), torch.no_grad(), density:
        chain = Chain(density)
        every = torch.tensor(list(itertools.product(range(2), repeat=7)))[:, None]
        for _ in range(3):
            found, total = summed(chain.factors())
            log_p = density.log_joint(chain.values(every))
            torch.testing.assert_close(total[0], torch.logsumexp(log_p, 0), rtol=1e-12, atol=1e-12)
            p = torch.softmax(log_p, 0)
            truth = torch.stack([(p[:, None] * torch.eye(2)[every[:, 0, t]]).sum(0) for t in range(7)])
            torch.testing.assert_close(found.single[0], truth, rtol=1e-10, atol=1e-12)
            density.theta.set({"move": torch.softmax(torch.randn(2, 2), -1), "loc": torch.randn(2)})
            assert len(chain.factors().moves) == (1 if change in ("none", "two alike at a step") else 6)


# -- the program rolled up -------------------------------------------------------------------------------------------


def test_the_rolled_program_is_the_program_at_every_theta():
    problem = hidden_markov.problem(num_data=2, num_steps=30, data_dim=2)
    density = Density(problem)
    with isolated(0), torch.no_grad(), density:
        chain = Chain(density)
        for step in range(4):
            density.theta.set(
                {
                    "transition": torch.softmax(torch.randn(3, 3, dtype=F64), -1),
                    "locs": torch.randn(3, 2, dtype=F64),
                    "scales": torch.rand(3, 2, dtype=F64) + 0.5,
                }
            )
            rolled_up, plain = chain.factors(), Chain(density).factors()
            assert bool(chain.groups) == (step > 0)
            torch.testing.assert_close(rolled_up.first, plain.first, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(rolled_up.later, plain.later, rtol=1e-12, atol=1e-12)
        assert sum(len(g.numbers) for g in chain.groups) == 60
        assert len(chain.groups) <= 8  # three cycles of dimensions, two sites, and the first step


def test_what_depends_on_values_cannot_be_rolled_up():
    theta = torch.tensor(2.0)
    with pytest.raises(RollError):
        rolled(lambda: [theta * 2 if theta > 1 else theta], [theta])
    group, *_ = rolled(lambda: [theta * c for c in (torch.tensor(1.0), torch.tensor(3.0))], [theta])
    theta.fill_(5.0)
    assert group().tolist() == [5.0, 15.0]


# -- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("emissions", ["normal", "categorical"])
def test_baum_welch_is_em_by_listing(emissions):
    problem = hidden_markov.problem(emissions=emissions, num_steps=6, num_data=5)
    fits = [learn(problem, EM(num_steps=8, e_step=e)) for e in (ForwardBackward(num_samples=5), Enumeration())]
    assert fits[0].trail.kind == "exact"
    torch.testing.assert_close(fits[0].trail.value, fits[1].trail.value, rtol=1e-10, atol=1e-9)
    for name, value in fits[0].parameters.items():
        torch.testing.assert_close(value, fits[1].parameters[name], rtol=1e-7, atol=1e-9)


def test_baum_welch_never_falls_and_ends_where_the_gradient_vanishes():
    problem = hidden_markov.problem(num_data=2, num_steps=120, num_states=2, seed=1)
    fit = learn(problem, EM(num_steps=150, tolerance=1e-9))
    assert fit.trail.kind == "exact"
    assert float(fit.trail.value.diff().min()) > -1e-8
    leaves = {n: v.clone().requires_grad_() for n, v in fit.parameters.items()}
    value = hidden_markov.reference(leaves, problem.args[0]).log_evidence.value.sum()
    assert abs(float(value.detach()) - float(fit.trail.value[-1])) < 1e-7
    for name, gradient in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
        if name == "initial":  # two sequences: it may stand at a corner
            continue
        if name == "transition":  # along the simplex
            gradient = gradient - (gradient * leaves[name].detach()).sum(-1, keepdim=True)
        assert float(gradient.abs().max()) < 1e-3, name


def test_default_e_step_of_a_long_chain_is_forward_backward():
    problem = hidden_markov.problem(num_data=1, num_steps=40)
    fit = learn(problem, EM(num_steps=2))
    assert fit.trail.kind == "exact"


# -- refusals ----------------------------------------------------------------------------------------------------


def chain_of(step) -> Problem:
    """A chain of three states, whose logits at t are step(all states before)."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", 2):
            states = []
            for t in range(5):
                states.append(pyro.sample(f"z_{t}", dist.Categorical(logits=step(states))))
                pyro.sample(f"y_{t}", dist.Normal(states[-1].double(), 1.0), obs=y[:, t])

    return Problem(model, args=(torch.zeros(2, 5, dtype=F64),))


def test_what_is_no_chain_is_refused_with_the_reason():
    table = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    second = chain_of(lambda s: table[s[-1], s[-2]] if len(s) > 1 else table[0, 0])
    assert "depends on a latent before" in why_not(second, ForwardBackward())
    third = chain_of(lambda s: table[0][s[-3]] if len(s) > 2 else table[0, 0])
    assert why_not(third, ForwardBackward()) != ""
    first = chain_of(lambda s: table[0][s[-1]] if s else table[0, 0])
    assert why_not(first, ForwardBackward()) == ""
    assert "continuous" in why_not(linear_gaussian_ssm.problem(), ForwardBackward())
    assert "no chain" in why_not(gaussian_mixture.problem(), ForwardBackward())


def test_impossible_data_end_in_a_failure():
    problem = hidden_markov.problem(num_data=2, num_steps=5)
    x = problem.args[0].clone()
    x[1, 2] = 1e200
    status = infer(replace(problem.on(x), reference=None), ForwardBackward()).status
    assert status.state == "failed"
    assert "1 data, first [1]" in status.reason
