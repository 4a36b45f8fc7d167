"""Does NUTS leave its target invariant? Exact rank tests (`ranks.py`) of its transitions, the tuning frozen.

A replicate is a chain: the data are latent beside the parameters, so that the target is the joint law p(z, x), of
which exact draws are had by running the program, and one density serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from ranks import LENGTH, Target, Walk, rank_test
from scipy import stats
from scipy.special import logsumexp
from test_ranks import NORMAL

from pyrometer.inference import NUTS, Problem
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Run, isolated

norm = stats.norm.logpdf
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A program and its law a second time: `shapes` of its sites, exact draws, and test quantities at such draws.

    draw        (N, rng) -> site -> (N, *event)
    quantities  site -> (N, L, *event) to name -> (N, L)
    """

    model: Callable[[], None]
    shapes: dict[str, tuple[int, ...]]
    draw: Callable[[int, np.random.Generator], Values]
    quantities: Callable[[Values], Values]

    def flat(self, values: Values) -> np.ndarray:
        lead = next(iter(values.values())).ndim - len(next(iter(self.shapes.values())))
        parts = [values[n].reshape((*values[n].shape[:lead], -1)) for n in self.shapes]
        return np.concatenate(parts, -1)

    def sites(self, z: np.ndarray) -> Values:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        parts = np.split(z, ends[:-1], -1)
        return {n: p.reshape((*z.shape[:-1], *s)) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def target(self) -> Target:
        def draw(count, rng):
            return self.flat(self.draw(count, rng)), np.zeros(count)

        return Target(draw, lambda z, _: self.quantities(self.sites(z)))


def hierarchical_normal() -> Case:
    """A mean and a scale over five values, whose spread varies with it: a funnel."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(mu, s).expand([5]).to_event(1))
        pyro.factor("nothing", torch.zeros(()))

    def draw(count, rng):
        mu, s = rng.normal(size=count), rng.gamma(2.0, 0.5, count)
        return {"mu": mu, "s": s, "y": mu[:, None] + s[:, None] * rng.normal(size=(count, 5))}

    def quantities(v):
        mu, s, y = v["mu"], v["s"], v["y"]
        return {
            "mu": mu,
            "s": s,
            "mu log s": mu * np.log(s),
            "log prior": norm(mu) + stats.gamma.logpdf(s, 2, scale=0.5),
            "log likelihood": norm(y, mu[..., None], s[..., None]).sum(-1),
            "distance": (y.max(-1) - mu) / s,
        }

    return Case(model, {"mu": (), "s": (), "y": (5,)}, draw, quantities)


def waiting_times() -> Case:
    """Exponential waiting times at a log-normal rate: skewed in every direction."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("t", dist.Exponential((1 + z).exp()).expand([3]).to_event(1))
        pyro.factor("nothing", torch.zeros(()))

    def draw(count, rng):
        z = rng.normal(size=count)
        return {"z": z, "t": rng.exponential(size=(count, 3)) * np.exp(-1 - z)[:, None]}

    def quantities(v):
        z, t = v["z"], v["t"]
        return {
            "z": z,
            "t": t[..., 0],
            "z log t": z * np.log(t[..., 1]),
            "log prior": norm(z),
            "log likelihood": 3 * (1 + z) - t.sum(-1) * np.exp(1 + z),
            "longest": t.max(-1) / t.sum(-1),
        }

    return Case(model, {"z": (), "t": (3,)}, draw, quantities)


def labelled() -> Case:
    """A simplex of shares, and for each of four values a label that is summed out."""
    alpha = np.array([2.0, 1.0, 1.5])

    def model():
        share = pyro.sample("share", dist.Dirichlet(torch.tensor(alpha)))
        with pyro.plate("data", 4):
            label = pyro.sample("label", dist.Categorical(share))
            pyro.sample("y", dist.Normal(1.5 * label, 0.7))
        pyro.factor("nothing", torch.zeros(()))

    def draw(count, rng):
        share = rng.dirichlet(alpha, count)
        label = (rng.uniform(size=(count, 4, 1)) > share.cumsum(-1)[:, None]).sum(-1)
        return {"share": share, "y": 1.5 * label + 0.7 * rng.normal(size=(count, 4))}

    def quantities(v):
        share, y = v["share"], v["y"]
        parts = np.log(share)[..., None, :] + norm(y[..., None], 1.5 * np.arange(3), 0.7)
        return {
            "share 0": share[..., 0],
            "share 2": share[..., 2],
            "product": share[..., 0] * share[..., 1],
            "log prior": (np.log(share) * (alpha - 1)).sum(-1),
            "log likelihood": logsumexp(parts, axis=-1).sum(-1),
            "excess": y.mean(-1) - 1.5 * share @ np.arange(3),
        }

    return Case(model, {"share": (3,), "y": (4,)}, draw, quantities)


MODELS = {make.__name__: make() for make in (hierarchical_normal, waiting_times, labelled)}


def frozen(density: Density, draws: dict[str, torch.Tensor], step_size: float) -> dict[str, torch.Tensor]:
    """The state of chains at these draws, (n, *event): their own variances for the mass matrix, a given step size. It
    is not tuned, since on a wrong density tuning may end in a chain that stands still, which leaves anything
    invariant."""
    position = density.unconstrain(draws)
    return {
        "position": position,
        "inverse_mass": position.var(0).expand_as(position).clone(),
        "step_size": torch.full((len(position),), step_size, dtype=position.dtype),
    }


def engine_walk(model: str, engine: Any, step_size: float) -> Walk:
    """Chains from given states, all of one call; the mass matrix is that of 1,000 draws of the target."""
    case = MODELS[model]
    density = Density(Problem(case.model))

    def tensors(values: Values) -> dict[str, torch.Tensor]:
        return {n: torch.from_numpy(v) for n, v in values.items()}

    with density, torch.no_grad():
        state = frozen(density, tensors(case.draw(1_000, np.random.default_rng(5))), step_size)

    def walk(z, _, steps, rng):
        seed = int(rng.integers(2**63))
        with isolated(seed), density, torch.no_grad():
            warm = {n: t[:1].repeat(len(z), *[1] * (t.dim() - 1)) for n, t in state.items()}
            warm["position"] = density.unconstrain(tensors(case.sites(z)))
            run = Run(density, np.random.SeedSequence(seed), warm)
            draws = replace(engine, num_samples=steps, num_chains=len(z)).run(density, run)
        return case.flat({n: v.numpy() for n, v in draws.values.items()})

    return walk


SETTINGS = {"tuned": (1.0, 8), "step too large": (1.6, 8), "shallow": (1.0, 2)}  # stretch of the step, tree depth
STEP = {"hierarchical_normal": 0.25, "waiting_times": 0.4, "labelled": 0.5}


def walk_at(model: str, setting: str, backend: str) -> Walk:
    stretch, depth = SETTINGS[setting]
    return engine_walk(model, NUTS(backend=backend, max_tree_depth=depth), STEP[model] * stretch)


def assert_invariant(model: str, setting: str, backend: str, replicates: int, seed: int = 0) -> None:
    target, walk = MODELS[model].target(), walk_at(model, setting, backend)
    assert forgets(target, walk) < 0.7  # a chain that stands still would pass
    verdict = rank_test(target, walk, replicates, seed)
    assert verdict.accepted, verdict


def forgets(target: Target, walk: Walk) -> float:
    """The largest rank correlation, over coordinates, of 200 starts and the states 19 steps later."""
    rng = np.random.default_rng(3)
    z, x = target.draw(200, rng)
    end = walk(z, x, LENGTH - 1, rng)[:, -1]
    return max(float(stats.spearmanr(a, b).statistic) for a, b in zip(z.T, end.T, strict=True))


@pytest.mark.parametrize(("model", "setting"), [*zip(MODELS, SETTINGS, strict=True)])
def test_nuts_leaves_its_target_invariant(model, setting):
    """2,000 replicates of 20 states, and four and sixteen times as many where the first look is suspicious; each model
    and each setting once. It sees five of the eight bugs in `test_ranks.py`; the test below sees all."""
    assert_invariant(model, setting, "nutpie", 2_000)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_nuts_leaves_its_target_invariant_to_20_000_replicates(model, setting):
    assert_invariant(model, setting, "nutpie", 20_000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_pyros_kernel_leaves_its_target_invariant(model, setting):
    """1,000 replicates, its steps being slow: they see the largest bugs of `test_ranks.py`."""
    assert_invariant(model, setting, "pyro", 1_000)


# -- data that differ from chain to chain ----------------------------------------------------------------------------


def observed_normal():
    """The normal of `test_ranks.py`: (mu, s) given five values, which are moved between runs as a parameter."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    y = pyro.param("y", lambda: torch.tensor([0.3, -1.0, 0.8, 1.9, 0.2]))
    pyro.sample("residual", dist.Normal(mu - y, s).to_event(1), obs=torch.zeros(5))


def posterior_walk(backend: str) -> Walk:
    """One chain at a time in (mu, log s), each at its own data, by one density that is compiled once."""
    density = Density(Problem(observed_normal))
    engine = NUTS(backend=backend, num_chains=1)

    def walk(z, x, steps, rng):
        paths = []
        with isolated(seed := int(rng.integers(2**63))), density, torch.no_grad():
            starts = density.unconstrain({"mu": torch.from_numpy(z[:, 0]), "s": torch.from_numpy(z[:, 1]).exp()})
            state = {"inverse_mass": torch.tensor([[0.2, 0.1]]), "step_size": torch.tensor([0.7])}
            for stream, start, y in zip(np.random.SeedSequence(seed).spawn(len(z)), starts, x, strict=True):
                density.set_parameters({"y": torch.from_numpy(y)})
                run = Run(density, stream, {"position": start[None], **state})
                found = replace(engine, num_samples=steps).run(density, run).values
                paths.append(torch.stack([found["mu"][0], found["s"][0].log()], -1).numpy())
        return np.stack(paths)

    return walk


def test_nuts_is_right_for_the_data_that_it_is_given():
    """1,000 data sets from the model, 20 states each: it sees the prior or other data's posterior at once."""
    verdict = rank_test(NORMAL, posterior_walk("nutpie"), 1_000)
    assert verdict.accepted, verdict


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), [("nutpie", 5_000), ("pyro", 1_000)])
def test_nuts_is_right_for_more_data(backend, count):
    verdict = rank_test(NORMAL, posterior_walk(backend), count, seed=1)
    assert verdict.accepted, verdict
