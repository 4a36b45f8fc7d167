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
    """A log-normal scale for a kernel, a vector in closed form, causes that compete, a count that cannot be listed."""
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
    """The exact rank test of an engine: all copies walk at once, twice, and each walk is the beginning of a path."""
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


def test_ranks_of_the_truth_among_draws_of_long_chains_are_uniform():
    """Simulation-based calibration (Talts et al. 2018, arXiv:1804.06788): cold starts, warm-up and all, of quantities
    that do not change with the labels; 1,000 copies, the rank of the truth among 19 draws of a chain. p > 1e-6."""
    copies = 1_000
    torch.manual_seed(11)
    old = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    truth, x = draws_of(mixture, EXAMPLES[mixture](copies), copies)
    torch.set_default_dtype(old)
    engine = Gibbs(num_chains=1, num_samples=95, warmup_steps=30)
    posterior = infer(Problem(mixture, args=(x,)), engine, seed=3)
    assert posterior.status.done, posterior.status
    both = {n: torch.cat([truth[n][None], posterior.draws[n][0, 4::5]]).numpy() for n in truth}
    found = {
        "weight": np.minimum(both["weight"], 1 - both["weight"]),
        "variance": both["variance"],
        "means": both["mu"].sum(-1),
        "apart": np.abs(both["mu"][..., 1] - both["mu"][..., 0]),
        "log prior": -0.125 * (both["mu"] ** 2).sum(-1) + stats.invgamma.logpdf(both["variance"], 3, scale=2),
    }
    ranks = {n: (v[1:] < v[:1]).sum(0) for n, v in found.items()}
    assert p_value(ranks, 20) > 1e-6


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


def _without_check(self, inputs, found, slot):
    value, _ = self.family.draw(found[0], Frame(*inputs[:2]))
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
    reduce = Listed.reduce
    monkeypatch.setattr(Listed, "reduce", lambda self, profile, uniform: reduce(self, 0.8 * profile, uniform))


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
        pytest.param({"scan": "random", "kernel": "nuts", "step_size": 0.7}, marks=pytest.mark.slow),
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


CASES = [pytest.param(n, s, marks=pytest.mark.slow if s == "fixed" else ()) for n in EXACT for s in ("random", "fixed")]


@pytest.mark.parametrize(("name", "scan"), CASES)
def test_moments_are_exact(name, scan):
    """32 chains; |t| < 6.1, 1e-6 each; the standard error of a mean is below 0.05 sd, so that 0.3 sd would be seen."""
    problem, mean, sd = EXACT[name]()
    posterior = infer(problem, Gibbs(num_chains=CHAINS, num_samples=400, warmup_steps=50, scan=scan), seed=2)
    assert posterior.status.done, posterior.status
    assert set(mean) == set(posterior.draws)
    for site in mean:
        t, error = t_values(posterior.draws[site], mean[site], sd[site])
        assert error < 0.05, site
        assert np.abs(t).max() < LIMIT, (site, t)


# -- families: b from the density at a few points --------------------------------------------------------------------

FAMILIES = {
    "normal": (Normal(), lambda v: -0.5 * ((v - 3.0) / 0.2) ** 2, stats.norm(3, 0.2)),
    "gamma": (Power(1.0), lambda v: 1.5 * v.log() - 4 * v, stats.gamma(2.5, scale=1 / 4)),
    "inverse gamma": (Power(-1.0), lambda v: -4.5 * v.log() - 2 / v, stats.invgamma(3.5, scale=2)),
    "precision of a scale": (Power(-2.0), lambda v: -7 * v.log() - 2 / v**2, None),
    "Rayleigh": (Power(2.0), lambda v: v.log() - 0.5 * v**2, stats.rayleigh()),
    "beta": (Beta(), lambda v: 1.5 * v.log() - 0.4 * torch.log1p(-v), stats.beta(2.5, 0.6)),
}


def drawn(family, log_density, count=20_000):
    """Draws from the family that is fitted at two frames far from where the density is."""
    torch.manual_seed(1)
    found = []
    for centre, scale in ((0.4, 1.0), (0.4, 7.0)):
        frame = Frame(torch.full((count,), centre, dtype=F64), torch.full((count,), scale, dtype=F64))
        at = log_density(points(family, frame))
        fitted = fit(family, at)
        assert bool(fitted.proper.all())
        v, _ = family.draw(fitted.b, frame)
        assert float(misfit(family, fitted.b, frame, at[0], v, log_density(v)).max()) < 1
        off = misfit(family, fitted.b, frame, at[0], v, log_density(v) + 1e-4 * (v > v.median()))
        assert float((off > 1).double().mean()) > 0.4  # what is not the family's is seen
        found.append(v)
    return torch.cat(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_told_from_its_density_at_three_points(name):
    """Kolmogorov and Smirnov's test of 40,000 draws, p > 1e-6; the power -2 by its gamma."""
    family, log_density, law = FAMILIES[name]
    v = drawn(family, log_density).numpy()
    v, law = (v, law) if law is not None else (v**-2, stats.gamma(3.0, scale=1 / 2))
    assert stats.kstest(v, law.cdf).pvalue > 1e-6


def test_vectors_are_told_from_their_density():
    """A normal in three dimensions and a Dirichlet of three: means and covariances of 40,000 draws, |z| < 4.9."""
    torch.manual_seed(2)
    A = torch.tensor([[2.0, 0.5, -0.3], [0.5, 1.0, 0.4], [-0.3, 0.4, 0.8]], dtype=F64)
    mean, frame = (
        torch.tensor([1.0, -2.0, 0.5], dtype=F64),
        Frame(torch.zeros(40_000, 3, dtype=F64), 3 * torch.ones(40_000, 3, dtype=F64)),
    )
    normal, log_density = Normal(3), lambda v: -0.5 * torch.einsum("...i,ij,...j", v - mean, A, v - mean)
    v, moved = normal.draw(fit(normal, log_density(points(normal, frame))).b, frame)
    torch.testing.assert_close(moved.centre, mean.expand_as(moved.centre), rtol=0, atol=1e-9)
    white = ((v - mean) @ torch.linalg.cholesky(A)).numpy()
    products = np.stack([*white.T, *(white[:, i] * white[:, j] - (i == j) for i in range(3) for j in range(i + 1))])
    assert np.abs(products.mean(1) / products.std(1) * 200).max() < 4.9
    concentration = torch.tensor([0.3, 2.0, 5.0], dtype=F64)
    dirichlet, log_density = Dirichlet(3), lambda v: ((concentration - 1) * v.log()).sum(-1)
    b = fit(dirichlet, log_density(points(dirichlet, frame))).b
    torch.testing.assert_close(b[:, 0], concentration - 1, rtol=0, atol=1e-9)
    share = dirichlet.draw(b, frame)[0].numpy()
    law = stats.dirichlet(concentration.numpy())
    assert np.abs((share.mean(0) - law.mean()) / np.sqrt(law.var()) * 200).max() < 4.9
    assert np.abs(share.var(0) / law.var() - 1).max() < 0.06


# -- the plan --------------------------------------------------------------------------------------------------------


def planned(problem: Problem, **settings):
    density = Density(problem)
    with density, torch.no_grad(), torch.random.fork_rng():
        engine = Gibbs(num_chains=2, **settings)
        return engine._sweep(density)


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


Y = torch.tensor([0.3, 2.1, -1.0, 4.0])


def test_what_has_a_closed_form_is_found_and_the_rest_moves_by_the_kernel():
    sweep = planned(Problem(hierarchy, args=(Y,)))
    assert sweep.words == {"mu": "normal in closed form", "theta": "normal in closed form", "tau": "by HMC"}
    assert sweep.structure.reach == {"mu": ("mu", "theta"), "tau": ("tau", "theta"), "theta": ("theta", "y")}
    assert [len(block.slots) for block in sweep.blocks] == [1, 1, 1]  # all groups at once


def test_a_chain_of_states_takes_two_turns_whatever_its_length():
    for length in (3, 6):
        sweep = planned(hidden_markov(length)[0])
        assert [sorted(block.names) for block in sweep.exact] == [
            [f"z_{t}" for t in range(0, length, 2)],
            [f"z_{t}" for t in range(1, length, 2)],
        ]


def test_elements_that_interact_take_turns():
    sweep = planned(sigmoid_belief_network.problem(num_data=7, latent_dim=3))
    assert [len(block.slots) for block in sweep.exact] == [3]  # units in turn, all data at once
    assert {len(block.slots) for block in planned(lda.problem()).exact} == {1, 2}  # topics in turn, words at once


def test_a_sweep_costs_a_few_evaluations_however_many_data_there_are():
    """Evaluations of all data, not of a datum: 3 of each of 4 chains for the labels, 1 for the log joint."""
    for count in (20, 200):
        problem = gaussian_mixture.problem(num_data=count)
        cost = infer(problem, Gibbs(num_samples=10, warmup_steps=0)).cost
        again = infer(problem, Gibbs(num_samples=20, warmup_steps=0)).cost
        assert again.evaluations - cost.evaluations == 10 * 4 * (3 + 1)


def coupled(x: Tensor) -> None:
    """A plate whose elements are not apart, against its promise: each label shifts its neighbour's datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(z + torch.roll(z, 1), 0.5), obs=x)


def test_a_plate_that_does_not_keep_its_promise_is_not_relied_on():
    x = torch.tensor([0.1, 1.2, 1.8], dtype=F64)
    problem = Problem(coupled, args=(x,))
    sweep = planned(problem)
    assert [len(block.slots) for block in sweep.exact] == [3]
    states = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    log_p = stats.bernoulli.logpmf(states, 0.4).sum(1)
    log_p += stats.norm.logpdf(x.numpy(), states + np.roll(states, 1, 1), 0.5).sum(1)
    mean = torch.from_numpy(np.exp(log_p - np.logaddexp.reduce(log_p)) @ states)
    posterior = infer(problem, Gibbs(num_chains=CHAINS, num_samples=300, warmup_steps=20))
    assert np.abs(t_values(posterior.draws["z"], mean, (mean * (1 - mean)).sqrt())[0]).max() < LIMIT


def test_what_is_only_nearly_of_a_family_is_left_to_the_kernel():
    """Student's t with many degrees of freedom; a gamma cut off by uniform data."""

    def heavy(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.StudentT(200.0, mu, 1.0), obs=x)

    def cut(x: Tensor) -> None:
        top = pyro.sample("top", dist.Gamma(9.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(torch.zeros_like(top), top), obs=x)

    assert planned(Problem(heavy, args=(Y,))).words == {"mu": "by HMC"}
    posterior = infer(Problem(cut, args=(Y.abs() + 3,)), Gibbs(num_samples=50, warmup_steps=50))
    if posterior.status.done:  # by a kernel
        assert bool((posterior.draws["top"] >= 7).all())
    else:  # taken for a gamma at draws of the prior, and found out
        assert "its conditional was found to be gamma, but is not" in posterior.status.reason


def test_what_comes_out_of_a_family_in_the_run_is_an_error_and_not_an_answer():
    """Five latents with normal conditionals, but for one, at which the search for closed forms does not look."""

    def bent(x: Tensor) -> None:
        with pyro.plate("latents", 5):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("bend", -(mu[..., 1] ** 4))
        pyro.sample("x", dist.Normal(mu.sum(-1), 1.0), obs=x)

    problem = Problem(bent, args=(torch.tensor(8.0, dtype=F64),))
    posterior = infer(problem, Gibbs(num_samples=50, warmup_steps=50))
    assert posterior.status.state == "failed"
    assert "its conditional was found to be normal, but is not" in posterior.status.reason
    given = infer(problem, Gibbs(num_samples=50, warmup_steps=50, blocks={"mu": "hmc"}))
    assert given.status.done, given.status


def test_where_nothing_is_discrete_or_conjugate_it_says_so_and_runs():
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Weibull(a, 1.3), obs=x)

    posterior = infer(Problem(model, args=(torch.tensor(1.5),)), Gibbs(num_samples=20, warmup_steps=10))
    assert posterior.status.done
    assert any("all move by the kernel" in note for note in posterior.diagnostics.notes)
    assert posterior.log_evidence is None


# -- blocks by hand --------------------------------------------------------------------------------------------------


def pair(x: Tensor) -> None:
    """Two labels that only their sum explains, for each datum: one at a time they hardly move."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        b = pyro.sample("b", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(a + b, 0.1), obs=x)


def test_discrete_latents_of_one_block_are_listed_together():
    """At x = 1 the values (1, 0) and (0, 1) change places at once; independent draws, so the ESS is their number."""
    problem = Problem(pair, args=(torch.tensor([1.0, 2.0]),))
    truth = infer(problem, Enumeration())
    posterior = infer(problem, Gibbs(num_samples=1000, warmup_steps=0, blocks=[("a", "b")]), seed=4)
    assert float(figures.ess(posterior.draws["a"].double()).min()) > 3_000
    for site in "ab":
        error = truth.sd(site) / math.sqrt(4_000)
        assert float(((posterior.mean(site) - truth.mean(site)) / error).abs().max()) < 4.9


def test_blocks_and_kernels_by_hand_are_as_asked_for():
    problem = Problem(hierarchy, args=(Y,))
    assert planned(problem, blocks=[("mu", "tau")]).words["mu"] == "by HMC"
    words = planned(problem, blocks={"mu": "random_walk", ("theta", "tau"): "nuts"}).words
    assert words == {"mu": "by RandomWalk", "theta": "by NUTS", "tau": "by NUTS"}
    posterior = infer(problem, Gibbs(blocks={"mu": "random_walk", ("theta", "tau"): "hmc"}, num_samples=30))
    assert posterior.status.done
    assert posterior.sample_stats["acceptance_rate"].shape == (4, 30)


def test_tuning_stops_with_the_warm_up():
    problem = Problem(hierarchy, args=(Y,))
    short, long = (infer(problem, Gibbs(num_samples=n, warmup_steps=60), seed=5) for n in (5, 40))
    assert torch.equal(short.state["step_size.0"], long.state["step_size.0"])
    assert torch.equal(short.state["inverse_mass.0"], long.state["inverse_mass.0"])
    assert torch.equal(short.draws["mu"], long.draws["mu"][:, :5])
    warm = infer(problem, Gibbs(num_samples=5, warmup_steps=60), seed=6, warm=long)
    assert torch.equal(warm.state["step_size.0"], long.state["step_size.0"])


def test_supports_that_depend_on_other_latents():
    """b ~ Uniform(0, a) with a ~ Gamma(3, 1), both by kernels: E b = E a / 2 under the prior, and x tells nothing."""

    def model(x: Tensor) -> None:
        with pyro.plate("copies", len(x)):
            a = pyro.sample("a", dist.Gamma(3.0, 1.0))
            b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
            pyro.sample("x", dist.Normal(0.0 * b, 1.0), obs=x)

    engine = Gibbs(num_chains=2, num_samples=100, warmup_steps=100, blocks={"a": "hmc", "b": "hmc"})
    posterior = infer(Problem(model, args=(torch.zeros(400, dtype=F64),)), engine, seed=1)
    assert posterior.status.done, posterior.status
    a, b = posterior.draws["a"], posterior.draws["b"]
    assert bool((b < a).all())
    for values, mean in ((a, 3.0), (b, 1.5), (b / a, 0.5), ((b / a) ** 2, 1 / 3)):
        each = values.mean(1).flatten()  # 800 independent chains
        assert abs(float(each.mean() - mean) / float(each.std() / math.sqrt(800))) < 4.9


def test_a_block_whose_support_moved_goes_on_from_its_own_value():
    """The same, from exact draws, by kernels that are not tuned: the law stands. b mixes slowly, so that what moved it
    when `a` moved would last (mean of b / a and of a off by 10 standard errors)."""

    def model(x: Tensor) -> None:
        with pyro.plate("copies", len(x)):
            a = pyro.sample("a", dist.Gamma(3.0, 1.0))
            b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
            pyro.sample("x", dist.Normal(0.0 * b, 1.0), obs=x)

    blocks = {"a": "hmc", "b": "langevin"}
    engine = Gibbs(num_chains=2, num_samples=40, warmup_steps=0, step_size=0.2, blocks=blocks)
    posterior = infer(Problem(model, args=(torch.zeros(1000, dtype=F64),)), engine, seed=1)
    assert posterior.status.done, posterior.status
    a, b = posterior.draws["a"][:, -1].flatten(), posterior.draws["b"][:, -1].flatten()  # 2,000 of them
    for values, mean in ((a, 3.0), (a**2, 12.0), (b, 1.5), (b / a, 0.5), ((b / a) ** 2, 1 / 3)):
        assert abs(float(values.mean() - mean) / float(values.std() / math.sqrt(2000))) < 4.9


@pytest.mark.parametrize("settings", [{}, {"batch_size": 30}], ids=str)
def test_it_is_an_e_step_of_all_data_and_of_minibatches(settings):
    """The log likelihood that EM comes to is that of EM by enumeration, to 0.05 nats a datum."""
    problem = gaussian_mixture.problem(num_data=60)
    steps = (None, Gibbs(num_samples=20, warmup_steps=5, num_chains=2))
    exact, ours = (learn(problem, EM(e_step=step, num_steps=40, **settings), seed=1) for step in steps)
    assert ours.status.done, ours.status
    found, best = (problem.reference_at(f.parameters).log_evidence.per_datum()[0] for f in (ours, exact))
    assert abs(found - best) < 0.05


def test_sized_spends_about_what_it_is_given():
    for problem in (gaussian_mixture.problem(num_data=30), Problem(hierarchy, args=(Y,))):
        for calls in (2_000, 20_000):
            engine = Gibbs().sized(calls, Density(problem))
            cost = infer(problem, engine).cost
            assert 0.5 * calls < cost.evaluations + cost.gradients < 1.3 * calls
    assert Gibbs().sized(1, Density(problem)).num_samples >= 1


# -- mistakes and hopeless runs --------------------------------------------------------------------------------------

MISTAKES = {
    "blocks that are none": (lambda: Gibbs(blocks=3), "expected a list of blocks"),
    "a block without names": (lambda: Gibbs(blocks=[()]), "expected names of latents"),
    "a latent in two blocks": (lambda: Gibbs(blocks=["z", ("z", "y")]), "site 'z' is in two blocks"),
    "a kernel nobody knows": (lambda: Gibbs(kernel="slice"), "Gibbs.kernel='slice'.: expected one of hmc"),
    "a kernel nobody knows for a block": (lambda: Gibbs(blocks={"mu": "slice"}), "expected one of hmc"),
    "a scan nobody knows": (lambda: Gibbs(scan="sweep"), "expected one of random, fixed"),
    "a step of no size": (lambda: Gibbs(step_size=0.0), "expected a positive number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_settings_are_refused(name):
    make, words = MISTAKES[name]
    with pytest.raises(ProblemError, match=words):
        make()


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (["zz"], "no latent site 'zz'; it has mu, z"),
        ([("mu", "z")], "site 'z' is discrete"),
        ({"z": "hmc"}, "site 'z' is discrete"),
        ([("z", "pair")], "cannot be listed together"),
    ],
)
def test_blocks_that_do_not_fit_the_model_are_refused(blocks, words):
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(mu + z, 1.0), obs=x)
        with pyro.plate("two", 2):
            pyro.sample("pair", dist.Bernoulli(0.5))

    with pytest.raises(ProblemError, match=words):
        infer(Problem(model, args=(Y,)), Gibbs(blocks=blocks, num_samples=2))


def test_a_hopeless_start_is_a_failed_run():
    def impossible(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("never", torch.where(z > 2, 0.0, -math.inf))

    posterior = infer(Problem(impossible, args=(Y,)), Gibbs(initial_tries=20))
    assert posterior.status.state == "failed"
    assert "no start with a finite log density in 20 draws" in posterior.status.reason
    assert not posterior.draws


def test_a_warm_start_of_another_model_or_of_other_blocks_is_refused():
    problem = Problem(hierarchy, args=(Y,))
    first = infer(problem, Gibbs(num_samples=4, warmup_steps=2))
    with pytest.raises(ProblemError, match="same model, same data, same num_chains"):
        infer(problem, Gibbs(num_samples=4, num_chains=3), warm=first)
    with pytest.raises(ProblemError, match="tuned for other blocks"):
        infer(problem, Gibbs(num_samples=4, blocks=[("mu", "tau")]), warm=first)


def test_an_improper_prior_with_a_latent_that_cannot_be_listed_is_refused_in_words():
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        n = pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(mu + n, 1.0), obs=x)

    assert "the prior of 'mu' is improper" in why_not(Problem(model, args=(torch.tensor(1.0),)), Gibbs())
