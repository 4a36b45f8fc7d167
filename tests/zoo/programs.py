"""Programs of the kinds that people write: long loops, Gaussian processes, differential equations, every support.

Nothing is known of their posteriors; what counts is that the density, its gradient and its compiled form are right.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints, transforms
from scipy import stats
from scipy.special import expit, log_expit, logsumexp
from torch import Tensor, nn

from pyrometer.inference import Problem

from .entry import Entry
from .exact import tensor

norm, lognormal = stats.norm.logpdf, stats.lognorm.logpdf


def gaussian_process() -> Entry:
    """Length scale, amplitude and noise of a squared-exponential kernel; the function is integrated out."""
    rng = np.random.default_rng(11)
    t = np.sort(rng.uniform(0, 4, 20))
    y = np.sin(2 * t) + 0.3 * rng.normal(size=20)

    def model(t: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.InverseGamma(3.0, 2.0))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        K = amplitude**2 * torch.exp(-0.5 * ((t[:, None] - t) / length) ** 2)
        L = torch.linalg.cholesky(K + (noise**2 + 1e-8) * torch.eye(len(t)))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(t)), scale_tril=L), obs=y)

    def log_joint(v, _, t, y):
        prior = stats.invgamma.logpdf(v["length"], 3, scale=2) + stats.halfnorm.logpdf(v["amplitude"])
        prior += lognormal(v["noise"], 0.5, scale=math.exp(-1))
        K = v["amplitude"] ** 2 * np.exp(-0.5 * np.subtract.outer(t, t) ** 2 / v["length"] ** 2)
        K += (v["noise"] ** 2 + 1e-8) * np.eye(len(t))
        return prior - 0.5 * (np.linalg.slogdet(2 * math.pi * K)[1] + y @ np.linalg.solve(K, y))

    return Entry(Problem(model, args=(tensor(t), tensor(y))), log_joint)


def latent_gaussian_process() -> Entry:
    """The function itself as a latent, whitened by a triangular factor, under counts."""
    t, y = np.linspace(0, 3, 15), np.array([1, 0, 2, 1, 3, 2, 4, 6, 3, 5, 2, 1, 1, 0, 1.0])

    def model(t: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 0.4))
        with pyro.plate("points", len(t)):
            white = pyro.sample("white", dist.Normal(torch.zeros_like(t), 1.0))
        K = torch.exp(-(t[:, None] - t).abs() / length) + 1e-6 * torch.eye(len(t))
        f = torch.linalg.cholesky(K) @ white
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(f.exp()), obs=y)

    def log_joint(v, _, t, y):
        K = np.exp(-np.abs(np.subtract.outer(t, t)) / v["length"]) + 1e-6 * np.eye(len(t))
        f = np.linalg.cholesky(K) @ v["white"]
        return lognormal(v["length"], 0.4) + norm(v["white"]).sum() + stats.poisson.logpmf(y, np.exp(f)).sum()

    return Entry(Problem(model, args=(tensor(t), tensor(y))), log_joint)


def predator_and_prey() -> Entry:
    """Lotka and Volterra's equations by 40 Runge-Kutta steps, seen at every fourth with log-normal noise."""

    def slope(s, rate):
        prey, predator = s
        return rate[0] * prey - rate[1] * prey * predator, -rate[2] * predator + rate[3] * prey * predator

    def path(start, rate):
        h, s, seen = 0.1, start, []
        for step in range(40):
            k1 = slope(s, rate)
            k2 = slope([a + h / 2 * k for a, k in zip(s, k1, strict=True)], rate)
            k3 = slope([a + h / 2 * k for a, k in zip(s, k2, strict=True)], rate)
            k4 = slope([a + h * k for a, k in zip(s, k3, strict=True)], rate)
            s = [a + h / 6 * (p + 2 * q + 2 * r + w) for a, p, q, r, w in zip(s, k1, k2, k3, k4, strict=True)]
            if step % 4 == 3:
                seen += s
        return seen

    centre = np.array([1.0, 0.5, 1.0, 0.5])
    y = np.array(path([1.5, 1.0], centre)) * np.exp(0.1 * np.random.default_rng(12).normal(size=20))

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(np.log(centre)), 0.2).to_event(1))
        start = pyro.sample("start", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
        noise = pyro.sample("noise", dist.Exponential(5.0))
        mean = torch.stack(path([start[0], start[1]], rate)).log()
        pyro.sample("y", dist.LogNormal(mean, noise + 0.05).to_event(1), obs=y)

    def log_joint(v, _, y):
        prior = lognormal(v["rate"], 0.2, scale=centre).sum() + lognormal(v["start"], 0.3).sum()
        prior += stats.expon.logpdf(v["noise"], scale=0.2)
        return prior + lognormal(y, v["noise"] + 0.05, scale=np.array(path(list(v["start"]), v["rate"]))).sum()

    return Entry(Problem(model, args=(tensor(y),)), log_joint)


def garch() -> Entry:
    """GARCH(1, 1) over 200 steps: the support of b depends on a."""
    y = np.random.default_rng(13).standard_t(5, size=200)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        base = pyro.sample("base", dist.HalfCauchy(1.0))
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(0.0, 1.0 - a))
        variance, path = torch.ones(()), []
        for value in y:
            path.append(variance)
            variance = base + a * (value - mean) ** 2 + b * variance
        pyro.sample("y", dist.Normal(mean, torch.stack(path).sqrt()).to_event(1), obs=y)

    def log_joint(v, _, y):
        variance = np.ones(len(y))
        for t in range(1, len(y)):
            variance[t] = v["base"] + v["a"] * (y[t - 1] - v["mean"]) ** 2 + v["b"] * variance[t - 1]
        prior = norm(v["mean"]) + stats.halfcauchy.logpdf(v["base"]) - np.log1p(-v["a"])
        return prior + norm(y, v["mean"], np.sqrt(variance)).sum()

    return Entry(Problem(model, args=(tensor(y),)), log_joint)


def stochastic_volatility() -> Entry:
    """Log volatility as an autoregression over 200 steps, a latent at each, written as a loop."""
    T = 200
    y = 0.8 * np.random.default_rng(14).standard_t(4, size=T)

    def model(y: Tensor) -> None:
        persistence = pyro.sample("persistence", dist.Beta(20.0, 1.5))
        sd = pyro.sample("sd", dist.HalfNormal(0.5))
        shock = pyro.sample("shock", dist.Normal(0.0, 1.0).expand([T]).to_event(1))
        h, path = torch.zeros(()), []
        for t in range(T):
            h = persistence * h + sd * shock[t]
            path.append(h)
        pyro.sample("y", dist.Normal(0.0, (torch.stack(path) / 2).exp()).to_event(1), obs=y)

    def log_joint(v, _, y):
        h = np.zeros(T)
        for t in range(T):
            h[t] = v["persistence"] * h[t - 1] + v["sd"] * v["shock"][t]  # h[-1] is still 0 at t = 0
        prior = stats.beta.logpdf(v["persistence"], 20, 1.5) + stats.halfnorm.logpdf(v["sd"], scale=0.5)
        return prior + norm(v["shock"]).sum() + norm(y, 0, np.exp(h / 2)).sum()

    return Entry(Problem(model, args=(tensor(y),)), log_joint)


def exponential_smoothing() -> Entry:
    """A level that follows its data over 1,000 steps."""
    y = np.cumsum(0.1 * np.random.default_rng(15).normal(size=1000))

    def model(y: Tensor) -> None:
        gain = pyro.sample("gain", dist.Beta(2.0, 2.0))
        sd = pyro.sample("sd", dist.Gamma(2.0, 10.0))
        level, path = torch.zeros(()), []
        for t in range(len(y)):
            path.append(level)
            level = level + gain * (y[t] - level)
        pyro.sample("y", dist.Normal(torch.stack(path), sd).to_event(1), obs=y)

    def log_joint(v, _, y):
        level = np.zeros(len(y))
        for t in range(1, len(y)):
            level[t] = (1 - v["gain"]) * level[t - 1] + v["gain"] * y[t - 1]
        prior = stats.beta.logpdf(v["gain"], 2, 2) + stats.gamma.logpdf(v["sd"], 2, scale=0.1)
        return prior + norm(y, level, v["sd"]).sum()

    return Entry(Problem(model, args=(tensor(y),)), log_joint)


def many_sites() -> Entry:
    """A random walk of 40 sample statements."""
    y = np.cumsum(np.random.default_rng(16).normal(size=40))

    def model(y: Tensor) -> None:
        sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
        z = torch.zeros(())
        for t in range(len(y)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, sd))
            pyro.sample(f"y_{t}", dist.StudentT(4.0, z, 0.5), obs=y[t])

    def log_joint(v, _, y):
        path = np.array([0.0, *(v[f"z_{t}"] for t in range(len(y)))])
        likelihood = stats.t.logpdf(y, 4, path[1:], 0.5).sum()
        return lognormal(v["sd"], 0.5) + norm(np.diff(path), 0, v["sd"]).sum() + likelihood

    return Entry(Problem(model, args=(tensor(y),)), log_joint)


def hidden_markov_by_hand() -> Entry:
    """The forward sums over 200 steps written out under `pyro.factor`; rows of simplexes, ordered means."""
    rng, T = np.random.default_rng(17), 200
    y = 2 * rng.integers(0, 2, T) + rng.normal(size=T)
    alpha = np.array([[4.0, 1.0], [1.0, 3.0]])

    def model(y: Tensor) -> None:
        with pyro.plate("states", 2):
            row = pyro.sample("row", dist.Dirichlet(torch.tensor(alpha)))
        first = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        mean = pyro.sample("mean", dist.TransformedDistribution(first, [transforms.OrderedTransform()]))
        seen = dist.Normal(mean, 1.0).log_prob(y[:, None])
        forward = seen[0] - math.log(2)
        for t in range(1, T):
            forward = torch.logsumexp(forward[:, None] + row.log(), 0) + seen[t]
        pyro.factor("y", torch.logsumexp(forward, 0))

    def log_joint(v, _, y):
        row, mean = v["row"] / v["row"].sum(-1, keepdims=True), v["mean"]
        prior = sum(stats.dirichlet.logpdf(r, a) for r, a in zip(row, alpha, strict=True))
        gap = math.log(mean[1] - mean[0])
        prior += norm(mean[0], 0, 2) + norm(gap, 0, 2) - gap
        forward = norm(y[0], mean) - math.log(2)
        for value in y[1:]:
            forward = (
                np.logaddexp(*(forward[:, None] + np.log(row))) - 0.5 * (value - mean) ** 2 - math.log(2 * math.pi) / 2
            )
        return prior + logsumexp(forward)

    return Entry(Problem(model, args=(tensor(y),)), log_joint, coordinates={"row": lambda p: p[..., :-1]})


def varying_slopes() -> Entry:
    """Intercepts and slopes of six groups, correlated; some data masked, all of them scaled."""
    rng, groups, N = np.random.default_rng(18), 6, 30
    group, x = rng.integers(0, groups, N), rng.normal(size=N)
    y, seen = 1 + 0.5 * x + rng.normal(size=N), rng.uniform(size=N) < 0.8

    def model(group: Tensor, x: Tensor, y: Tensor, seen: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
        with pyro.plate("groups", groups):
            w = pyro.sample("w", dist.MultivariateNormal(mean, scale_tril=sd[:, None] * corr))
        with poutine.scale(scale=0.5), pyro.plate("data", len(y)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(w[group, 0] + w[group, 1] * x, 0.8), obs=y)

    def log_joint(v, _, group, x, y, seen):
        rho, L = v["corr"][1, 0], v["sd"][:, None] * v["corr"]
        prior = norm(v["mean"]).sum() + stats.halfnorm.logpdf(v["sd"]).sum() + math.log(0.75) + math.log1p(-(rho**2))
        prior += stats.multivariate_normal.logpdf(v["w"], v["mean"], L @ L.T).sum()
        likelihood = norm(y, v["w"][group, 0] + v["w"][group, 1] * x, 0.8)
        return prior + 0.5 * likelihood[seen].sum()

    args = (torch.tensor(group), tensor(x), tensor(y), torch.tensor(seen))
    return Entry(Problem(model, args=args), log_joint, coordinates={"corr": lambda L: L[..., 1, 0]})


def ordinal() -> Entry:
    """Ordered cutpoints without a proper prior of their own, under grades; a slope by `pyro.factor`."""
    grade, x = np.array([0, 1, 2, 1, 0, 2, 2, 1]), np.array([-1.0, 0.2, 1.5, 0.1, -0.4, 0.9, 0.3, -0.2])

    def model(grade: Tensor, x: Tensor) -> None:
        cut = pyro.sample("cut", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
        slope = pyro.sample("slope", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.factor("shrink", -0.5 * (cut**2).sum() - slope)
        with pyro.plate("data", len(x)):
            pyro.sample("grade", dist.OrderedLogistic(slope * x, cut), obs=grade)

    def log_joint(v, _, grade, x):
        edges = np.array([-np.inf, *v["cut"], np.inf])
        p = expit(edges[grade + 1] - v["slope"] * x) - expit(edges[grade] - v["slope"] * x)
        return -0.5 * (v["cut"] ** 2).sum() - v["slope"] + np.log(p).sum()

    return Entry(Problem(model, args=(torch.tensor(grade), tensor(x))), log_joint)


def censored_survival() -> Entry:
    """Weibull life times, some of them cut off, whose part is a factor; an interval that starts at a latent."""
    time, dead = np.array([0.4, 1.2, 2.0, 0.9, 3.0, 3.0]), np.array([1, 1, 0, 1, 0, 0.0])

    def model(time: Tensor, dead: Tensor) -> None:
        shape = pyro.sample("shape", dist.Gamma(3.0, 2.0))
        lower = pyro.sample("lower", dist.Exponential(1.0))
        upper = pyro.sample("upper", dist.Uniform(lower, lower + 3))
        hazard = shape * (time / upper).log() + (shape / time).log()
        survival = -((time / upper) ** shape)
        with pyro.plate("people", len(time)):
            pyro.factor("life", dead * hazard + survival)

    def log_joint(v, _, time, dead):
        law = stats.weibull_min(v["shape"], scale=v["upper"])
        prior = stats.gamma.logpdf(v["shape"], 3, scale=0.5) + stats.expon.logpdf(v["lower"]) - math.log(3)
        return prior + np.where(dead == 1, law.logpdf(time), law.logsf(time)).sum()

    return Entry(Problem(model, args=(tensor(time), tensor(dead))), log_joint)


def small_network() -> Entry:
    """A float32 network that decodes a latent of each datum: theta are its weights."""
    x = np.random.default_rng(19).integers(0, 2, (5, 4)).astype(float)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def log_joint(v, theta, x):
        hidden = np.tanh(v["z"] @ theta["net.0.weight"].T + theta["net.0.bias"])
        logits = hidden @ theta["net.2.weight"].T + theta["net.2.bias"]
        return norm(v["z"]).sum(-1) + log_expit(np.where(x == 1, logits, -logits)).sum(-1)

    return Entry(Problem(model, args=(tensor(x),)), log_joint)


def learned_mixture() -> Entry:
    """Labels summed out at a theta of simplex, location and positive scale; a shared shift and a latent scale."""
    y = np.random.default_rng(20).normal(size=(7, 2))

    def model(y: Tensor) -> None:
        share = pyro.param("share", torch.tensor([0.5, 0.3, 0.2]), constraint=constraints.simplex)
        centre = pyro.param("centre", torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -1.0]]))
        width = pyro.param("width", torch.tensor(0.8), constraint=constraints.positive)
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.Chi2(4.0))
        with pyro.plate("data", len(y)):
            label = pyro.sample("label", dist.Categorical(share))
            pyro.sample("y", dist.Normal(centre[label] + shift, width * scale).to_event(1), obs=y)

    def log_joint(v, theta, y):
        mean = theta["centre"][:, None] + v["shift"]
        parts = np.log(theta["share"])[:, None] + norm(y, mean, theta["width"] * v["scale"]).sum(-1)
        return norm(v["shift"]).sum() + stats.chi2.logpdf(v["scale"], 4) + logsumexp(parts, axis=0).sum()

    return Entry(Problem(model, args=(tensor(y),)), log_joint)


PROGRAMS = {
    make.__name__: make
    for make in (
        gaussian_process,
        latent_gaussian_process,
        predator_and_prey,
        garch,
        stochastic_volatility,
        exponential_smoothing,
        many_sites,
        hidden_markov_by_hand,
        varying_slopes,
        ordinal,
        censored_survival,
        small_network,
        learned_mixture,
    )
}
