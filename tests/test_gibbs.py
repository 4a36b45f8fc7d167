"""Gibbs sampling: does every move leave the posterior as it is, are the answers right, and are mistakes told?

Random scan is reversible and gets the exact rank test (tests/ranks.py); false alarm 1e-6 a test. Fixed scan, and NUTS
within Gibbs, get Geweke's: data are made latents too, and a chain that starts at a draw of the joint law must stay
there; |z| < 4.9 for first and second moments and products over thousands of copies side by side, 1e-6 each.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from ranks import Target, exact_ranks, p_value, sequential
from scipy import stats
from torch import Tensor

from pyrometer.inference import EM, Enumeration, Gibbs, Posterior, Problem, ProblemError, infer, learn, why_not
from pyrometer.inference import statistics as figures
from pyrometer.inference.blocks import Conjugate, Listed
from pyrometer.inference.conditionals import Structure
from pyrometer.inference.conjugate import Beta, Dirichlet, Frame, Normal, Power, fit, misfit, points
from pyrometer.inference.density import Density
from pyrometer.inference.sweep import Sweep, layout, some_draws
from pyrometer.models import gaussian_mixture, lda, noisy_or, sigmoid_belief_network

F64 = torch.float64
LENGTH = 20


# -- exact ranks: many copies of a small problem, each with data of its own ------------------------------------------


def normal_gamma(x: Tensor) -> None:
    """mu ~ N(0, 1), tau ~ Gamma(2, 2), five x ~ N(mu, 1 / tau): both in closed form."""
    with pyro.plate("copies", len(x)):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(mu[..., None], tau[..., None].rsqrt()).expand([len(x), 5]).to_event(1), obs=x)


def mixture(x: Tensor) -> None:
    """Two normals with unknown weight, means and common spread: labels listed, the rest in closed form."""
    with pyro.plate("copies", x.shape[1], dim=-1):
        weight = pyro.sample("weight", dist.Beta(2.0, 3.0))
        with pyro.plate("components", 2, dim=-2):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))  # (2, N)
        variance = pyro.sample("variance", dist.InverseGamma(3.0, 2.0))
        with pyro.plate("points", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Bernoulli(weight))
            pyro.sample("x", dist.Normal(torch.where(z > 0, mu[1], mu[0]), variance.sqrt()), obs=x)


def mixed(x: Tensor) -> None:
    """A log-normal scale for a kernel, a vector in closed form, causes that compete, and a count that cannot be listed."""
    n = len(x)
    with pyro.plate("copies", n, dim=-1):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))  # (N, 2)
        with pyro.plate("causes", 2, dim=-2):
            cause = pyro.sample("cause", dist.Bernoulli(0.4))  # (2, N)
        rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
        count = pyro.sample("count", dist.Poisson(rate))
        both = cause.sum(-2) + cause.prod(-2)
        centre = torch.stack([slope[..., 0] + both, slope.sum(-1) - both, count], -1)
        pyro.sample("x", dist.Normal(centre, scale[..., None]).to_event(1), obs=x)


def draws_of(model, example, copies: int) -> tuple[dict[str, Tensor], Tensor]:
    """Latents (N, ...) and data of N copies, from Pyro's own run of the program."""
    trace = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(example)
    found = {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and s["name"] != "copies"}
    found = {n: v for n, v in found.items() if n not in ("components", "points", "causes")}
    x = found.pop("x")
    return {n: v.movedim(-1, 0) if v.dim() > 1 and n != "slope" else v for n, v in found.items()}, x


EXAMPLES = {
    normal_gamma: lambda n: torch.zeros(n, 5, dtype=F64),
    mixture: lambda n: torch.zeros(4, n, dtype=F64),
    mixed: lambda n: torch.zeros(n, 3, dtype=F64),
}


def target(model, engine: Gibbs) -> tuple[Target, object]:
    """The exact rank test of an engine: all copies walk at once, twice, and a walk takes the first steps of one path."""
    paths: dict[str, object] = {}

    def draw(count: int, rng: np.random.Generator):
        old = torch.get_default_dtype()
        torch.set_default_dtype(F64)
        try:
            torch.manual_seed(int(rng.integers(2**62)))
            latents, x = draws_of(model, EXAMPLES[model](count), count)
        finally:
            torch.set_default_dtype(old)
        walk = walked(Problem(model, args=(x,)), engine, latents, LENGTH - 1, int(rng.integers(2**62)))
        data = x if x.shape[0] == count else x.movedim(-1, 0)
        names = list(latents)
        flat = lambda values, lead: torch.cat([values[n].double().reshape(*lead, -1) for n in names], -1).numpy()  # noqa: E731
        paths["A"], paths["B"] = flat(walk, (2, LENGTH - 1, count)).swapaxes(1, 2)  # (N, steps, D)
        paths["used"] = np.zeros(count, bool)
        paths["sizes"] = {n: latents[n][0].numel() for n in names}
        numbered = np.concatenate([np.arange(count)[:, None], data.reshape(count, -1).numpy()], 1)
        return flat(latents, (count,)), numbered

    def walk(z, x, steps, rng):
        rows = x[:, 0].astype(int)
        used = paths["used"][rows]
        paths["used"][rows] = True
        return np.where(used[:, None, None], paths["B"][rows, :steps], paths["A"][rows, :steps])

    def quantities(z, x):
        data = torch.as_tensor(x[:, 1:])
        ends = np.cumsum(list(paths["sizes"].values()))
        columns = dict(zip(paths["sizes"], np.split(z, ends[:-1], -1), strict=True))
        found = {f"{n}[{k}]": v[..., k] for n, v in columns.items() for k in range(v.shape[-1])}
        found |= LIKELIHOODS[model](columns, data.numpy()[:, None])
        a, b = list(found)[:2]
        return {**found, "product": found[a] * found[b]}

    return Target(draw, quantities), walk


def walked(problem: Problem, engine: Gibbs, latents: dict[str, Tensor], steps: int, seed: int) -> dict[str, Tensor]:
    """Two chains from the same states, (2, steps, N, ...), without warm-up."""
    count = len(next(iter(latents.values())))
    state = {f"value.{n}": v[None].expand(2, *v.shape).clone() for n, v in latents.items()}
    state["step_size.0"] = torch.full((2, count), engine.step_size, dtype=F64)  # of the one kernel, where there is one
    state["inverse_mass.0"] = torch.ones(2, count, 1, dtype=F64)
    warm = Posterior({}, engine="gibbs", state=state)
    posterior = infer(problem, engine, seed=seed, warm=warm)
    assert posterior.status.done, posterior.status
    return dict(posterior.draws)


def normal_likelihood(c, x):
    mu, tau = c["mu"], c["tau"]
    return {
        "log likelihood": stats.norm.logpdf(x, mu, tau**-0.5).sum(-1),
        "log prior": -0.5 * mu[..., 0] ** 2 + np.log(tau[..., 0]) - 2 * tau[..., 0],
        "distance": x.max(-1) - mu[..., 0],
    }


def mixture_likelihood(c, x):
    centre = np.where(c["z"] > 0, c["mu"][..., 1:], c["mu"][..., :1])
    return {
        "log likelihood": stats.norm.logpdf(x, centre, c["variance"] ** 0.5).sum(-1),
        "distance": (x[..., 0] - c["mu"][..., 0]) * c["z"][..., 0],
        "log prior": -0.125 * (c["mu"] ** 2).sum(-1) + stats.invgamma.logpdf(c["variance"][..., 0], 3, scale=2),
        "labels": stats.bernoulli.logpmf(c["z"], c["weight"]).sum(-1),
    }


def mixed_likelihood(c, x):
    both = c["cause"].sum(-1) + c["cause"].prod(-1)
    slope, scale = c["slope"], c["scale"][..., 0]
    centre = np.stack([slope[..., 0] + both, slope.sum(-1) - both, c["count"][..., 0]], -1)
    return {
        "log likelihood": stats.norm.logpdf(x, centre, scale[..., None]).sum(-1),
        "distance": (x[..., 2] - c["count"][..., 0]) / scale,
        "log prior": -0.5 * (slope**2).sum(-1) - 2 * np.log(scale) ** 2 - np.log(scale),
        "slopes": slope.prod(-1),
        "count": stats.poisson.logpmf(c["count"], c["rate"])[..., 0],
    }


LIKELIHOODS = {normal_gamma: normal_likelihood, mixture: mixture_likelihood, mixed: mixed_likelihood}


def rank_verdict(model, replicates: int, rounds: int = 3, seed: int = 0, **settings):
    engine = Gibbs(num_chains=2, num_samples=LENGTH - 1, warmup_steps=0, **settings)

    def p_of(count, rng):
        law, walk = target(model, engine)
        return p_value(exact_ranks(law, walk, count, rng, LENGTH), LENGTH)

    return sequential(p_of, replicates, seed, rounds)


@pytest.mark.parametrize("model", [normal_gamma, mixture])
def test_random_scan_passes_the_exact_rank_test(model):
    verdict = rank_verdict(model, 5_000)
    assert verdict.accepted, verdict


@pytest.mark.parametrize(("kernel", "step"), [("hmc", 0.6), ("random_walk", 1.5)])
def test_kernels_within_gibbs_pass_the_exact_rank_test(kernel, step):
    """Steps so large that a third or more is rejected: small ones hide mistakes of the accept step."""
    verdict = rank_verdict(mixed, 5_000, kernel=kernel, step_size=step)
    assert verdict.accepted, verdict


# -- planted bugs: each must be found in one round -------------------------------------------------------------------


def shape_off_by_a_half(monkeypatch):
    draw = Power.draw
    monkeypatch.setattr(
        Power, "draw", lambda self, b, frame: draw(self, b + torch.tensor([0.5, 0.0])[:, None, None], frame)
    )


def prior_dropped(monkeypatch):
    reached = Structure._reached

    def without(self, values, terms):
        return {n: tuple(t for t in found if t != n or n != "mu") for n, found in reached(self, values, terms).items()}

    monkeypatch.setattr(Structure, "_reached", without)
    monkeypatch.setattr(Conjugate, "draw", _without_check)


def _without_check(self, points_, profile, slot):
    frame = self._there(slot)
    value, moved = self.family.draw(fit(self.family, profile[: self.count - 1]).b, frame)
    return {self.name: value}


def stale_value(monkeypatch):
    """Every block of a sweep sees the values from before it."""

    def once(self, sweep):
        before = {n: v.clone() for n, v in sweep.state.items()}
        found = {}
        for block, turn in sweep.turns:
            state = {n: v.clone() for n, v in before.items()}
            block.move(state, turn)
            found |= {n: state[n] for n in block.names}
        for name, value in found.items():
            sweep.state[name].copy_(value)

    monkeypatch.setattr(Gibbs, "_once", once)


@pytest.mark.parametrize("bug", [shape_off_by_a_half, prior_dropped])
def test_a_planted_bug_is_found(bug, monkeypatch):
    """Gamma's shape off by 1/2; the prior's term dropped, of which the ranks of mu alone would show nothing."""
    bug(monkeypatch)
    verdict = rank_verdict(normal_gamma, 5_000, rounds=1)
    assert not verdict.accepted, verdict


def flat_labels(monkeypatch):
    draw = Listed.draw
    monkeypatch.setattr(Listed, "draw", lambda self, p, profile, slot: draw(self, p, 0.8 * profile, slot))


@pytest.mark.parametrize("bug", [flat_labels, stale_value])
def test_a_planted_bug_of_discrete_moves_is_found(bug, monkeypatch):
    """Labels drawn at 0.8 of their log odds; every block drawn given the values from before the sweep."""
    bug(monkeypatch)
    verdict = rank_verdict(mixture, 5_000, rounds=1)
    assert not verdict.accepted, verdict


# -- Geweke: data are latents too, and the joint law must stand ------------------------------------------------------


def joint(copies: int):
    """mu ~ N(0, 1), log s ~ N(-1/2, 1/2), z ~ Bernoulli(0.3), y_1, y_2 ~ N(mu + 2 z, s): nothing of it observed."""

    def model(x: Tensor) -> None:
        with pyro.plate("copies", copies):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.LogNormal(-0.5, 0.5))
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal((mu + 2 * z)[..., None], s[..., None]).expand([copies, 2]).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return Problem(model, args=(torch.zeros(copies, dtype=F64),))


def statistics_of(v: dict[str, np.ndarray]) -> np.ndarray:
    """First and second moments, and products, of mu, log s, z and the standardised data: (..., 9)."""
    mu, log_s, z = v["mu"], (np.log(v["s"]) + 0.5) / 0.5, v["z"]
    e = (v["y"] - (mu + 2 * z)[..., None]) / v["s"][..., None]
    return np.stack(
        [mu, mu**2 - 1, log_s, log_s**2 - 1, z - 0.3, e[..., 0], e[..., 0] ** 2 - 1, e[..., 0] * mu, (z - 0.3) * log_s],
        -1,
    )


def geweke(engine: Gibbs, copies: int = 4_000, seed: int = 3) -> np.ndarray:
    """z of each statistic after the last of so many sweeps that began at the joint law."""
    problem, rng = joint(copies), np.random.default_rng(seed)
    mu, s = rng.normal(size=(2, copies)), np.exp(-0.5 + 0.5 * rng.normal(size=(2, copies)))
    z = (rng.uniform(size=(2, copies)) < 0.3).astype(float)
    y = (mu + 2 * z)[..., None] + s[..., None] * rng.normal(size=(2, copies, 2))
    state = {f"value.{n}": torch.from_numpy(v) for n, v in {"mu": mu, "s": s, "z": z, "y": y}.items()}
    state |= {"step_size.0": torch.full((2, copies), engine.step_size, dtype=F64)}
    state |= {"inverse_mass.0": torch.ones(2, copies, 1, dtype=F64)}
    posterior = infer(problem, engine, seed=seed, warm=Posterior({}, engine="gibbs", state=state))
    assert posterior.status.done, posterior.status
    values = {n: v.numpy() for n, v in posterior.draws.items()}
    assert (values["s"][:, -1] != s).mean() > 0.9
    found = statistics_of(values).mean(1).reshape(-1, 9)  # the average of each chain over its sweeps
    return found.mean(0) / (found.std(0, ddof=1) / math.sqrt(len(found)))


@pytest.mark.parametrize(
    "settings",
    [
        {"scan": "fixed", "kernel": "random_walk", "step_size": 1.0},
        {"scan": "fixed", "kernel": "nuts", "step_size": 0.7},
        {"scan": "random", "kernel": "nuts", "step_size": 0.7},
    ],
    ids=str,
)
def test_the_joint_law_stands_under_fixed_scan_and_nuts_within_gibbs(settings):
    """8,000 chains of 6 sweeps: a mean off by 0.06 sd at the last sweep is seen."""
    z = geweke(Gibbs(num_chains=2, num_samples=6, warmup_steps=0, **settings))
    assert np.abs(z).max() < 4.9, z


def test_geweke_sees_a_scale_that_is_moved_without_its_accept_step(monkeypatch):
    from pyrometer.inference.kernels import metropolis

    def always(old, new, rise, uniform):
        return new, torch.ones_like(rise), rise < -1000

    monkeypatch.setattr(metropolis, "accept", always)
    z = geweke(Gibbs(num_chains=2, num_samples=6, warmup_steps=0, kernel="random_walk", step_size=1.0))
    assert np.abs(z).max() > 4.9, z


# -- exact posteriors ------------------------------------------------------------------------------------------------

CHAINS = 32
LIMIT = stats.t.isf(0.5e-6, CHAINS - 1)


def t_values(draws: Tensor, mean: Tensor, sd: Tensor) -> tuple[np.ndarray, float]:
    """t of first and second moments (C, S, ...) against exact ones over chains, and the largest error of a mean in sd.
    Scalars that are certain are left out."""
    w = ((draws.double() - mean) / sd).reshape(*draws.shape[:2], -1).numpy()[..., (sd > 0.02).reshape(-1).numpy()]
    averages = np.stack([w.mean(1), (w**2).mean(1) - 1])  # (2, C, K)
    error = averages.std(1, ddof=1) / math.sqrt(CHAINS)
    return averages.mean(1) / error, float(error[0].max())


def hidden_markov(num_steps: int = 6):
    """Two states in a Python loop, and the exact marginals by listing all paths."""
    move = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=F64)
    y = torch.tensor([0.1, 1.3, 0.8, -0.5, 1.1, 0.4], dtype=F64)[:num_steps]

    def model(y: Tensor) -> None:
        z = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(move[z]), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(z.double(), 0.7), obs=y[t])

    paths = np.array(list(itertools.product([0, 1], repeat=num_steps)))
    log_p = np.zeros(len(paths))
    for t in range(num_steps):
        before = paths[:, t - 1] if t else np.zeros(len(paths), int)
        log_p += np.log(move.numpy()[before, paths[:, t]]) + stats.norm.logpdf(y[t], paths[:, t], 0.7)
    weight = np.exp(log_p - np.logaddexp.reduce(log_p))
    mean = torch.from_numpy(weight @ paths)
    return Problem(model, args=(y,)), {f"z_{t}": mean[t] for t in range(num_steps)}


def regression():
    """slope (2) ~ N(0, 1), variance ~ InverseGamma(3, 2), y ~ N(x slope, sqrt(variance)): against a fine grid of the
    variance, given which the slopes are normal."""
    x = torch.tensor([[1.0, -0.5], [0.3, 0.8], [1.2, 0.1], [-0.7, 0.4], [0.2, -1.1]], dtype=F64)
    y = torch.tensor([1.1, 0.2, 0.9, -0.4, 0.5], dtype=F64)

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        variance = pyro.sample("variance", dist.InverseGamma(3.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ slope, variance.sqrt()), obs=y)

    v = np.exp(np.linspace(-4, 5, 4001))
    log_w, means, squares = [], [], []
    for s in v:
        cov = s * np.eye(5) + (x @ x.T).numpy()
        log_w.append(
            stats.multivariate_normal.logpdf(y, np.zeros(5), cov) + stats.invgamma.logpdf(s, 3, scale=2) + np.log(s)
        )
        C = np.linalg.inv(np.eye(2) + (x.T @ x).numpy() / s)
        m = C @ (x.T @ y).numpy() / s
        means.append(m), squares.append(m**2 + np.diag(C))
    w = np.exp(log_w - np.logaddexp.reduce(log_w))
    mean = {"slope": w @ np.array(means), "variance": w @ v}
    sd = {
        "slope": np.sqrt(w @ np.array(squares) - mean["slope"] ** 2),
        "variance": np.sqrt(w @ v**2 - mean["variance"] ** 2),
    }
    to = lambda d: {n: torch.as_tensor(u) for n, u in d.items()}  # noqa: E731
    return Problem(model, args=(x, y)), to(mean), to(sd)


def counted():
    """n ~ Poisson(6), y ~ Binomial(n, 0.4) = 3, one of each of two data: n - 3 is Poisson(3.6)."""
    y = torch.tensor([3.0, 0.0], dtype=F64)

    def model(y: Tensor) -> None:
        with pyro.plate("data", 2):
            n = pyro.sample("n", dist.Poisson(6.0))
            pyro.sample("y", dist.Poisson(0.4 * n + 1e-9), obs=y)

    n = np.arange(200)
    log_w = stats.poisson.logpmf(n, 6)[:, None] + stats.poisson.logpmf(y.numpy(), 0.4 * n[:, None] + 1e-9)
    w = np.exp(log_w - np.logaddexp.reduce(log_w, 0))
    mean = w.T @ n
    return (
        Problem(model, args=(y,)),
        {"n": torch.as_tensor(mean)},
        {"n": torch.as_tensor(np.sqrt(w.T @ n**2 - mean**2))},
    )


def family(problem: Problem):
    reference = problem.reference_at(infer(problem, Gibbs(num_samples=4, warmup_steps=0)).parameters)
    return problem, dict(reference.mean), dict(reference.sd)


def markov():
    problem, mean = hidden_markov()
    return problem, mean, {n: (m * (1 - m)).sqrt() for n, m in mean.items()}


EXACT = {
    "hidden Markov chain": markov,
    "noisy-or": lambda: family(noisy_or.problem(num_data=5)),
    "belief network": lambda: family(sigmoid_belief_network.problem(num_data=5)),
    "lda": lambda: family(lda.problem(num_documents=2)),
    "mixture": lambda: family(gaussian_mixture.problem(num_data=20, separation=1.5)),
    "regression": regression,
    "counts": counted,
}


@pytest.mark.parametrize("scan", ["random", "fixed"])
@pytest.mark.parametrize("name", EXACT)
def test_moments_are_exact(name, scan):
    """32 chains; |t| < 6.1, 1e-6 each; the standard error of a mean is below 0.03 sd, so that 0.2 sd would be seen."""
    problem, mean, sd = EXACT[name]()
    posterior = infer(problem, Gibbs(num_chains=CHAINS, num_samples=400, warmup_steps=50, scan=scan), seed=2)
    assert posterior.status.done, posterior.status
    assert set(mean) == set(posterior.draws)
    for site in mean:
        t, error = t_values(posterior.draws[site], mean[site], sd[site])
        assert error < 0.05, site
        assert np.abs(t).max() < LIMIT, (site, t)
