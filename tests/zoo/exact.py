"""Problems whose posterior and evidence are exact: closed forms, sums over all discrete values, fine grids."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from scipy.special import betaln, gammaln, logsumexp
from test_contract import (
    asymmetric,
    beta_bernoulli,
    correlated,
    dirichlet_multinomial,
    flat_prior,
    poisson_rates,
    switching,
)
from torch import Tensor

from pyrometer.inference import Problem
from pyrometer.models import ppca

from .entry import Entry, Marginal, Mixture, Tabulated

F64 = torch.float64
GRID = np.linspace(-14, 14, 56_001)
norm = stats.norm.logpdf


def tensor(values: object) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=F64)


def sites(name: str, laws: dict[tuple[int, ...], object]) -> dict[str, Marginal]:
    """One marginal for each index into a site, () being the whole of a scalar one."""
    return {
        f"{name}{list(index) or ''}": Marginal(lambda draws, i=index: draws[name][(..., *i)], law)
        for index, law in laws.items()
    }


# -- the contract's tiny problems ------------------------------------------------------------------------------------


def beta_bernoulli_entry() -> Entry:
    return Entry(
        beta_bernoulli(),
        lambda v, _, x: stats.beta.logpdf(v["p"], 2, 3) + stats.bernoulli.logpmf(x, v["p"]).sum(),
        marginals=sites("p", {(): stats.beta(7, 5)}),
        log_evidence=betaln(7, 5) - betaln(2, 3),
    )


def gamma_poisson_entry() -> Entry:
    problem = poisson_rates()
    x = problem.args[0].numpy()
    return Entry(
        problem,
        lambda v, _, x: stats.gamma.logpdf(v["rate"], 3, scale=0.5) + stats.poisson.logpmf(x, v["rate"]),
        marginals=sites("rate", {(i,): stats.gamma(3 + x[i], scale=1 / 3) for i in range(len(x))}),
        log_evidence=stats.nbinom.logpmf(x, 3, 2 / 3).sum(),
    )


def correlated_entry() -> Entry:
    problem, R = correlated(), np.array([[1.0, 0.9], [0.9, 1.0]])
    x = problem.args[0].numpy()
    mvn = stats.multivariate_normal.logpdf
    along, across = (
        Marginal(lambda draws, s=s: draws["z"][..., 0] + s * draws["z"][..., 1], law)
        for s, law in ((1, stats.norm(x.sum() / 2, 3.8**0.5)), (-1, stats.norm(-np.diff(x)[0] / 2, 0.2**0.5)))
    )
    return Entry(
        problem,
        lambda v, _, x: mvn(v["z"], [0, 0], 2 * R) + mvn(x, v["z"], 2 * R),
        marginals={
            **sites("z", {(i,): stats.norm(x[i] / 2, 1) for i in range(2)}),
            "z0 + z1": along,
            "z0 - z1": across,
        },
        log_evidence=mvn(x, [0, 0], 4 * R),
    )


def dirichlet_multinomial_entry() -> Entry:
    prior, counts = np.array([1.0, 2, 3]), np.array([4.0, 0, 2])
    posterior = prior + counts

    def log_joint(v, _, counts):
        return stats.dirichlet.logpdf(v["p"] / v["p"].sum(), prior) + stats.multinomial.logpmf(counts, 6, v["p"])

    return Entry(
        dirichlet_multinomial(),
        log_joint,
        coordinates={"p": lambda p: p[..., :-1]},
        marginals=sites("p", {(i,): stats.beta(posterior[i], 12 - posterior[i]) for i in range(3)}),
        log_evidence=stats.dirichlet_multinomial.logpmf(counts, prior, 6),
    )


def flat_prior_entry() -> Entry:
    problem = flat_prior()
    x = problem.args[0].numpy()
    return Entry(
        problem,
        lambda v, _, x: norm(x, v["mean"]).sum(),
        marginals=sites("mean", {(): stats.norm(x.mean(), len(x) ** -0.5)}),
        log_evidence=norm(x, x.mean()).sum() + 0.5 * math.log(2 * math.pi / len(x)),
    )


def asymmetric_entry() -> Entry:
    law = Tabulated(GRID, norm(GRID) - np.exp(1 + GRID))
    return Entry(
        asymmetric(),
        lambda v, _, x: norm(v["z"]) + stats.poisson.logpmf(x, np.exp(1 + v["z"])),
        marginals=sites("z", {(): law}),
        log_evidence=law.log_normaliser,
    )


def switching_entry() -> Entry:
    def log_joint(v, _, x):
        z = v["z"]
        signs = np.logaddexp(np.log(0.4) + norm(x, z + 1, 0.5), np.log(0.6) + norm(x, 1 - z, 0.5))
        return norm(z, 0.5) + signs

    problem = switching().on(tensor([0.2, 1.4]))  # at the contract's 2.5 the two signs are too far apart for one chain
    laws = [Tabulated(GRID, log_joint({"z": GRID}, {}, x)) for x in problem.args[0].numpy()]
    return Entry(
        problem,
        log_joint,
        marginals=sites("z", {(i,): law for i, law in enumerate(laws)}),
        log_evidence=sum(law.log_normaliser for law in laws),
    )


# -- normal models ---------------------------------------------------------------------------------------------------


def normal_inverse_gamma() -> Entry:
    """s ~ InverseGamma(3, 2), w | s ~ N(0, 2 s I), y ~ N(X w, s): w has Student's t, s an inverse gamma law."""
    rng = np.random.default_rng(1)
    X = np.stack([np.ones(12), rng.normal(size=12)], 1)
    y = X @ [0.5, -1.0] + 0.7 * rng.normal(size=12)

    def model(X: Tensor, y: Tensor) -> None:
        s = pyro.sample("s", dist.InverseGamma(3.0, 2.0))
        w = pyro.sample("w", dist.Normal(X.new_zeros(2), (2 * s).sqrt()).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(X @ w, s.sqrt()), obs=y)

    def log_joint(v, _, X, y):
        s, w = v["s"], v["w"]
        prior = stats.invgamma.logpdf(s, 3, scale=2) + norm(w, 0, np.sqrt(2 * s)).sum()
        return prior + norm(y, X @ w, np.sqrt(s)).sum()

    precision = X.T @ X + np.eye(2) / 2
    centre, a = np.linalg.solve(precision, X.T @ y), 3 + 6
    b = 2 + 0.5 * (y @ y - centre @ precision @ centre)
    scale = np.sqrt(np.diag(np.linalg.inv(precision)) * b / a)
    log_evidence = (
        -6 * math.log(2 * math.pi)
        - 0.5 * (np.linalg.slogdet(precision)[1] + 2 * math.log(2))
        + (3 * math.log(2) - a * math.log(b) + gammaln(a) - gammaln(3))
    )
    return Entry(
        Problem(model, args=(tensor(X), tensor(y))),
        log_joint,
        marginals={
            **sites("s", {(): stats.invgamma(a, scale=b)}),
            **sites("w", {(i,): stats.t(2 * a, centre[i], scale[i]) for i in range(2)}),
        },
        log_evidence=float(log_evidence),
    )


def probabilistic_pca() -> Entry:
    """Latents of each datum at theta = (W, mu, sigma), as `models/ppca.py` writes them: all normal."""
    problem = ppca.problem(num_data=6, data_dim=4)

    def log_joint(v, theta, x):
        mean = v["z"] @ theta["W"].T + theta["mu"]
        return norm(v["z"]).sum(-1) + norm(x, mean, theta["sigma"]).sum(-1)

    with pyro.get_param_store().scope():
        problem.model(*problem.args)
        W, mu, sigma = (pyro.param(name).detach().numpy() for name in ("W", "mu", "sigma"))
    x, precision = problem.args[0].numpy(), np.eye(2) + W.T @ W / sigma**2
    mean = np.linalg.solve(precision, W.T @ (x - mu).T / sigma**2).T
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    laws = {(i, k): stats.norm(mean[i, k], sd[k]) for i, k in np.ndindex(mean.shape)}
    evidence = stats.multivariate_normal.logpdf(x, mu, W @ W.T + sigma**2 * np.eye(4))
    return Entry(problem, log_joint, marginals=sites("z", laws), log_evidence=float(evidence.sum()))


def local_level() -> Entry:
    """A random walk seen with noise, the walk a loop over its steps: a linear Gaussian state space."""
    rng, T = np.random.default_rng(2), 15
    y = np.cumsum(rng.normal(size=T)) * 0.6 + rng.normal(size=T)

    def model(y: Tensor) -> None:
        step = pyro.sample("step", dist.Normal(0.0, 0.6).expand([T]).to_event(1))
        level, path = torch.tensor(0.0), []
        for t in range(T):
            level = level + step[t]
            path.append(level)
        pyro.sample("y", dist.Normal(torch.stack(path), 1.0).to_event(1), obs=y)

    L = np.tril(np.ones((T, T)))  # the path is L @ step
    covariance = np.linalg.inv(np.eye(T) / 0.36 + L.T @ L)
    mean, path_sd = covariance @ L.T @ y, np.sqrt(np.diag(L @ covariance @ L.T))
    paths = {
        f"path[{t}]": Marginal(lambda draws, t=t: draws["step"][..., : t + 1].sum(-1), stats.norm((L @ mean)[t], sd))
        for t, sd in enumerate(path_sd)
    }
    steps = sites("step", {(t,): stats.norm(mean[t], np.sqrt(covariance[t, t])) for t in range(T)})
    return Entry(
        Problem(model, args=(tensor(y),)),
        lambda v, _, y: norm(v["step"], 0, 0.6).sum() + norm(y, np.cumsum(v["step"])).sum(),
        marginals={**steps, **paths},
        log_evidence=float(stats.multivariate_normal.logpdf(y, np.zeros(T), 0.36 * L @ L.T + np.eye(T))),
    )


def bimodal() -> Entry:
    """z ~ N(0, 1.5^2) seen through noise of two parts, to its left or its right: two unequal modes."""
    weight, shift, x = np.array([0.2, 0.8]), np.array([-1.5, 1.5]), 0.5

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.5))
        parts = dist.Normal(z + torch.tensor(shift), 0.8)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor(weight)), parts), obs=x)

    variance = 1 / (1 / 1.5**2 + 1 / 0.8**2)
    log_weights = np.log(weight) + norm(x, shift, np.sqrt(1.5**2 + 0.8**2))
    posterior = stats.norm(variance * (x - shift) / 0.8**2, variance**0.5)
    return Entry(
        Problem(model, args=(tensor(x),)),
        lambda v, _, x: norm(v["z"], 0, 1.5) + logsumexp(np.log(weight) + norm(x, v["z"] + shift, 0.8)),
        marginals=sites("z", {(): Mixture(log_weights, posterior)}),
        log_evidence=float(logsumexp(log_weights)),
    )


# -- discrete latents, summed out ------------------------------------------------------------------------------------


def two_component_mixture() -> Entry:
    """w ~ Beta(2, 2) and a label for each of six data: a sum over 2^6 labels, in each of which w has a beta law."""
    x = np.array([-0.8, 0.4, 1.2, 1.9, 2.7, 3.6])

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Bernoulli(w))
            pyro.sample("x", dist.Normal(2.5 * label, 1.0), obs=x)

    def log_joint(v, _, x):
        parts = np.logaddexp(np.log1p(-v["w"]) + norm(x), np.log(v["w"]) + norm(x, 2.5))
        return stats.beta.logpdf(v["w"], 2, 2) + parts.sum()

    labels = np.array(list(itertools.product((0, 1), repeat=6)))
    a = 2 + labels.sum(1)
    log_weights = norm(x, 2.5 * labels).sum(1) + betaln(a, 10 - a) - betaln(2, 2)
    return Entry(
        Problem(model, args=(tensor(x),)),
        log_joint,
        marginals=sites("w", {(): Mixture(log_weights, stats.beta(a, 10 - a))}),
        log_evidence=float(logsumexp(log_weights)),
    )


def hidden_markov() -> Entry:
    """Two hidden states over eight steps, by `pyro.markov`; the unknown mean of state 1 by a grid."""
    rng, T, stay = np.random.default_rng(3), 8, 0.8
    state = np.array([0, 0, 1, 1, 1, 0, 1, 1])
    y = 1.5 * state + rng.normal(size=T)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(1.0, 1.0))
        transition = torch.tensor([[stay, 1 - stay], [1 - stay, stay]])
        x = torch.tensor(0)
        for t in pyro.markov(range(T)):
            x = pyro.sample(f"x_{t}", dist.Categorical(transition[x]))
            pyro.sample(f"y_{t}", dist.Normal(mean * x, 1.0), obs=y[t])

    def log_joint(v, _, y):
        mean = np.asarray(v["mean"])
        at_0, at_1 = np.zeros(mean.shape), np.full(mean.shape, -np.inf)
        with np.errstate(divide="ignore"):
            for value in y:
                at_0, at_1 = (
                    np.logaddexp(at_0 + np.log(p), at_1 + np.log(1 - p)) + norm(value, m)
                    for p, m in ((stay, 0.0), (1 - stay, mean))
                )
        return norm(mean, 1.0) + np.logaddexp(at_0, at_1)

    law = Tabulated(GRID, log_joint({"mean": GRID}, {}, y))
    return Entry(
        Problem(model, args=(tensor(y),)),
        log_joint,
        marginals=sites("mean", {(): law}),
        log_evidence=law.log_normaliser,
    )


def noisy_or() -> Entry:
    """Two hidden causes for each of five effects; the leak is unknown, q = 1 - leak ~ Beta(3, 2)."""
    x, on = np.array([1.0, 0, 1, 1, 0]), np.array([0.3, 0.2])
    fails = np.array([0.2, 0.4])  # a cause that is on fails to bring the effect about

    def model(x: Tensor) -> None:
        q = pyro.sample("q", dist.Beta(3.0, 2.0))
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Bernoulli(on[0].item()))
            second = pyro.sample("second", dist.Bernoulli(on[1].item()))
            silent = q * fails[0] ** first * fails[1] ** second
            pyro.sample("x", dist.Bernoulli(1 - silent), obs=x)

    def log_joint(v, _, x):
        silent = v["q"] * np.prod(1 - on + on * fails)  # linear in q, so that the sum over causes is a factor
        return stats.beta.logpdf(v["q"], 3, 2) + x.sum() * np.log1p(-silent) + (1 - x).sum() * np.log(silent)

    t = GRID  # in logits, where the density is smooth and vanishes at both ends: by e^-28, at e^-14 it would not do
    q = 1 / (1 + np.exp(-t))
    with_jacobian = log_joint({"q": q}, {}, x) + np.log(q) - t - np.logaddexp(0, -t)
    in_logits = Tabulated(t, with_jacobian)
    logit = Marginal(lambda draws: torch.logit(draws["q"]), in_logits)
    return Entry(
        Problem(model, args=(tensor(x),)),
        log_joint,
        marginals={"logit q": logit},
        log_evidence=in_logits.log_normaliser,
    )


def topics() -> Entry:
    """One document of four words over three known topics: a sum over 3^4 labels, in each a Dirichlet law."""
    prior, words = np.array([1.0, 1.5, 2.0]), [0, 3, 3, 1]
    of_topic = np.array([[0.6, 0.2, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6]])

    def model(words: Tensor) -> None:
        share = pyro.sample("share", dist.Dirichlet(torch.tensor(prior)))
        with pyro.plate("words", len(words)):
            topic = pyro.sample("topic", dist.Categorical(share))
            pyro.sample("word", dist.Categorical(torch.tensor(of_topic)[topic]), obs=words)

    def log_joint(v, _, words):
        share = v["share"] / v["share"].sum()
        return stats.dirichlet.logpdf(share, prior) + np.log(share @ of_topic[:, words]).sum()

    labels = np.array(list(itertools.product(range(3), repeat=4)))
    posterior = prior + (labels[..., None] == np.arange(3)).sum(1)  # (81, 3)
    norms = gammaln(posterior).sum(1) - gammaln(posterior.sum(1)) - gammaln(prior).sum() + gammaln(prior.sum())
    log_weights = np.log(of_topic[labels, words]).sum(1) + norms
    laws = {(k,): Mixture(log_weights, stats.beta(posterior[:, k], 8.5 - posterior[:, k])) for k in range(3)}
    return Entry(
        Problem(model, args=(torch.tensor(words),)),
        log_joint,
        coordinates={"share": lambda p: p[..., :-1]},
        marginals=sites("share", laws),
        log_evidence=float(logsumexp(log_weights)),
    )


EXACT = {
    make.__name__.removesuffix("_entry"): make
    for make in (
        beta_bernoulli_entry,
        gamma_poisson_entry,
        correlated_entry,
        dirichlet_multinomial_entry,
        flat_prior_entry,
        asymmetric_entry,
        switching_entry,
        normal_inverse_gamma,
        probabilistic_pca,
        local_level,
        bimodal,
        two_component_mixture,
        hidden_markov,
        noisy_or,
        topics,
    )
}
