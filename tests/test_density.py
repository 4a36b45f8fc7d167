"""`Density` against densities written by hand, for plain Pyro programs of every kind.

All randomness is seeded, so a test that passes once passes always; where a limit was chosen from a distribution the
docstring says what share of seeds it would refuse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from close import assert_close
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from scipy import stats
from torch import nn
from torch.distributions import constraints

from pyrometer.inference import EM, ML, NUTS, SVI, Enumeration, ImportanceSampling, Problem, ProblemError, infer, learn
from pyrometer.inference.density import Density
from pyrometer.inference.preflight import check_minibatch
from pyrometer.inference.survey import survey_model

F64 = torch.float64
LIMIT = 4.9  # standard errors: passed by chance in all but 1e-6 of cases


@pytest.fixture(autouse=True)
def _own_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def data(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def some_u(density, *sample, seed=2, scale=0.7):
    return scale * data(*sample, *density.batch_shape, density.dim, seed=seed)


# -- programs, each with its density written a second time, in numpy and scipy ---------------------------------------


@dataclass(frozen=True)
class Case:
    """A program and its density: `expected(values, *args)` answers (log prior, log likelihood), each of shape `batch`,
    from one draw of the latents as numpy arrays (*batch, *other plates, *event).

    coordinates  site -> the entries of its event that its density is a density of; missing: all of them
    rows         whether one datum alone is a problem of its own: the first argument's rows are the data
    padding      values, *args -> the log prior of what is masked and moves nothing, which counts where u moves
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    expected: Callable[..., tuple[Any, Any]]
    batch: tuple[int, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    coordinates: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    rows: bool = False
    padding: Callable[..., Any] = lambda *_, **__: 0.0

    def problem(self) -> Problem:
        return Problem(self.model, args=self.args, kwargs=self.kwargs)


norm = stats.norm.logpdf
X = data(6)


def shared_mean():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 0.5), obs=x)

    return Case(model, (X,), lambda v, x: (norm(v["mu"], 1, 2), norm(x, v["mu"], 0.5).sum()))


def no_plate():
    """Observations without a plate, in a distribution of no batch shape: Pyro broadcasts and adds them up."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    return Case(model, (X,), lambda v, x: (norm(v["mu"]), norm(x, v["mu"]).sum()))


def no_plate_vector():
    """A latent with a batch shape and no plate."""

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("x", dist.Normal(w.sum().expand(len(x)), 1.0), obs=x)

    return Case(model, (X,), lambda v, x: (norm(v["w"]).sum(), norm(x, v["w"].sum()).sum()))


def local():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 0.5), obs=x)

    return Case(model, (X,), lambda v, x: (norm(v["z"], 0.3), norm(x, 2 * v["z"], 0.5)), (6,), rows=True)


def local_vector():
    """to_event on both sides, and a multivariate observation."""
    tril = torch.tensor([[1.0, 0.0], [0.7, 0.5]], dtype=F64)
    w = torch.tensor([[1.0, -1.0, 0.5], [0.3, 0.2, 2.0]], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 0.5])).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(z @ w.T.to(z), scale_tril=tril.to(z)), obs=x)

    def expected(v, x):
        covariance = (tril @ tril.T).numpy()
        mean = v["z"] @ w.numpy().T
        likelihood = [stats.multivariate_normal.logpdf(a, m, covariance) for a, m in zip(x, mean, strict=True)]
        return norm(v["z"], 0, [1, 2, 0.5]).sum(-1), np.array(likelihood)

    return Case(model, (data(5, 2),), expected, (5,), rows=True)


def nested_outer_right():
    """Groups at dim -1, their observations at dim -2: the group is the datum."""

    def model(x):  # (observations, groups)
        with pyro.plate("groups", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.5))
            with pyro.plate("inside", x.shape[0], dim=-2):
                e = pyro.sample("e", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(e, 0.4), obs=x)

    def expected(v, x):  # e: (groups, observations)
        prior = norm(v["z"], 0, 1.5) + norm(v["e"], v["z"][:, None]).sum(1)
        return prior, norm(x.T, v["e"], 0.4).sum(1)

    return Case(model, (data(3, 4),), expected, (4,))


def nested_outer_left():
    """The data plate at dim -2 around a plate of features at dim -1."""

    def model(x):
        with pyro.plate("data", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))  # (N, 1)
            with pyro.plate("features", x.shape[1], dim=-1):
                w = pyro.sample("w", dist.Normal(z, 0.3))
                pyro.sample("x", dist.Normal(w + z, 0.8), obs=x)

    def expected(v, x):
        assert v["z"].shape == (x.shape[0],)
        prior = norm(v["z"]) + norm(v["w"], v["z"][:, None], 0.3).sum(1)
        return prior, norm(x, v["w"] + v["z"][:, None], 0.8).sum(1)

    return Case(model, (data(4, 3),), expected, (4,), rows=True)


def singleton_dims():
    """A data plate at dim -3 with nothing to its right, and events of two dimensions."""

    def model(x):
        with pyro.plate("data", len(x), dim=-3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))  # (N, 1, 1, 2, 2)
            pyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.0), obs=x[:, None, None])

    def expected(v, x):
        return norm(v["z"]).sum((1, 2)), norm(x, v["z"].sum((1, 2)))

    return Case(model, (X,), expected, (6,), rows=True)


def two_batch_plates():
    """Every site is in both plates: the batch has two dimensions, left to right by dim."""

    def model(x):
        rows, columns = pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1)
        with columns, rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0] - z[..., 1], 1.0), obs=x)

    def expected(v, x):
        return norm(v["z"]).sum(-1), norm(x, v["z"][..., 0] - v["z"][..., 1])

    return Case(model, (data(2, 3),), expected, (2, 3))


def crossed():
    """Crossed effects: no plate holds both latents."""

    def model(x):
        rows, columns = pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with rows, columns:
            pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)

    def expected(v, x):
        a, b = v["a"].reshape(-1, 1), v["b"].reshape(1, -1)
        return norm(a).sum() + norm(b, 0, 2).sum(), norm(x, a + b, 0.5).sum()

    return Case(model, (data(2, 3),), expected)


def global_and_local():
    def model(x):
        scale = pyro.sample("scale", dist.HalfCauchy(2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def expected(v, x):
        prior = stats.halfcauchy.logpdf(v["scale"], 0, 2) + norm(v["z"], 0, v["scale"]).sum()
        return prior, norm(x, v["z"]).sum()

    return Case(model, (X,), expected)


def masked():
    """A mask on one statement by distribution, and on another by handler."""
    keep = torch.tensor([True, False, True, True, False, True])

    def model(x, keep):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(keep), obs=x)
            with poutine.mask(mask=~keep):
                pyro.sample("y", dist.Normal(-z, 2.0), obs=x)

    def expected(v, x, keep):
        return norm(v["z"]), np.where(keep, norm(x, v["z"]), norm(x, -v["z"], 2))

    return Case(model, (X, keep), expected, (6,))


def scaled():
    """poutine.scale by a number around a latent, by a tensor per datum around the data."""
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.1], dtype=F64)

    def model(x, weight):
        with poutine.scale(scale=0.25):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            with poutine.scale(scale=weight), poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def expected(v, x, weight):
        return 0.25 * norm(v["mu"]) + norm(v["z"], v["mu"]).sum(), (2 * weight * norm(x, v["z"])).sum()

    return Case(model, (X, weight), expected)


def factors():
    """pyro.factor per datum, over all, and scaled."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("per_datum", -0.5 * (x - z) ** 4)
            with poutine.scale(scale=3.0):
                pyro.factor("tripled", torch.cos(z))

    return Case(
        model, (X,), lambda v, x: (norm(v["z"]), -0.5 * (x - v["z"]) ** 4 + 3 * np.cos(v["z"])), (6,), rows=True
    )


def global_factor():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("f", -((mu - x.mean()) ** 2))

    return Case(model, (X,), lambda v, x: (norm(v["mu"]), -((v["mu"] - x.mean()) ** 2)))


def deterministic():
    """Deterministic sites per datum, per feature, and of all: none of them adds to the density."""

    def model(x):
        with pyro.plate("data", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("double", 2 * z)
            pyro.deterministic("path", torch.stack([z, z**2], -1), event_dim=1)
            with pyro.plate("features", x.shape[1], dim=-1):
                mean = pyro.deterministic("mean", z + torch.arange(3.0))
                pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def expected(v, x):
        return norm(v["z"]), norm(x, v["z"][:, None] + np.arange(3.0)).sum(1)

    return Case(model, (data(4, 3),), expected, (4,), rows=True)


def conditioned():
    """Data, and one latent of two, by pyro.condition."""

    def program():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 2.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(a + b, 1.0))

    model = pyro.condition(program, data={"x": X, "b": torch.tensor(0.7, dtype=F64)})
    return Case(model, (), lambda v: (norm(v["a"]), norm(0.7, v["a"], 2) + norm(X.numpy(), v["a"] + 0.7).sum()))


def reparameterised():
    """poutine.reparam: the decentred site is the latent, the old one is deterministic."""

    def program(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = poutine.reparam(program, config={"z": LocScaleReparam(0.0)})

    def expected(v, x):
        z = v["mu"] + 2 * v["z_decentered"]
        return norm(v["mu"], 0, 5) + norm(v["z_decentered"]).sum(), norm(x, z).sum()

    return Case(model, (X,), expected)


def blocked():
    """An observed site that poutine.block hides is no part of the density."""

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 0.1), obs=x)

    model = poutine.block(program, hide=["y"])
    return Case(model, (X,), lambda v, x: (norm(v["z"]), norm(x, v["z"])), (6,), rows=True)


def lifted():
    """poutine.lift turns a parameter into a latent site."""

    def program(x):
        w = pyro.param("w", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    model = poutine.lift(program, prior={"w": dist.Normal(1.0, 3.0)})
    return Case(model, (X,), lambda v, x: (norm(v["w"], 1, 3), norm(x, v["w"]).sum()))


def partly_observed():
    """obs_mask: the entries that are missing become a latent site."""
    seen = torch.tensor([True, False, True, True, False, True])

    def model(x, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            full = pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)
            pyro.sample("y", dist.Normal(full, 0.5), obs=2 * x)

    def expected(v, x, seen):
        full = np.where(seen, x, v["x_unobserved"])
        prior = norm(v["mu"]) + norm(v["x_unobserved"], v["mu"])[~seen].sum()
        return prior, norm(x, v["mu"])[seen].sum() + norm(2 * x, full, 0.5).sum()

    def padding(v, x, seen):
        return norm(v["x_unobserved"], v["mu"])[seen].sum()

    return Case(model, (X, seen), expected, padding=padding)


def simplex():
    def model(counts):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.8, 2.0, 3.0], dtype=F64)))
        pyro.sample("counts", dist.Multinomial(10, p), obs=counts)

    def expected(v, counts):
        return stats.dirichlet.logpdf(v["p"] / v["p"].sum(), [0.8, 2, 3]), stats.multinomial.logpmf(
            counts, 10, v["p"] / v["p"].sum()
        )

    counts = torch.tensor([2.0, 5.0, 3.0], dtype=F64)
    return Case(model, (counts,), expected, coordinates={"p": lambda p: p[..., :-1]})


def local_simplex():
    """One simplex per datum: the unconstrained event is shorter than the event."""

    def model(counts):
        with pyro.plate("data", len(counts)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=F64) * 2))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "counts", dist.Multinomial(4, torch.softmax(p.log() + z[:, None] * torch.arange(3), -1)), obs=counts
            )

    def expected(v, counts):
        logits = np.log(v["p"]) + v["z"][:, None] * np.arange(3)
        q = np.exp(logits - logits.max(1, keepdims=True))
        q = q / q.sum(1, keepdims=True)
        prior = [stats.dirichlet.logpdf(p / p.sum(), [2, 2, 2]) for p in v["p"]]
        return np.array(prior) + norm(v["z"]), stats.multinomial.logpmf(counts, 4, q)

    counts = torch.tensor([[1.0, 2.0, 1.0], [4.0, 0.0, 0.0], [0.0, 1.0, 3.0], [2.0, 2.0, 0.0]], dtype=F64)
    return Case(model, (counts,), expected, (4,), coordinates={"p": lambda p: p[..., :-1]}, rows=True)


def correlation():
    """LKJ with density prod_k L_kk^(K - k + 2 (eta - 1)) / c; for K = 3, c integrates to 1 numerically (below)."""

    def model(x):
        corr = pyro.sample("L", dist.LKJCholesky(3, torch.tensor(1.5, dtype=F64)))
        sd = pyro.sample("sd", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3).to(sd), scale_tril=sd[:, None] * corr), obs=x)

    def expected(v, x):
        eta, diagonal = 1.5, np.diag(v["L"])
        # correlations of each row are independent: c = prod_k of beta functions (Lewandowski et al. 2009, p. 1999)
        normaliser = sum(
            k / 2 * math.log(math.pi) + math.lgamma(eta + (2 - k) / 2) - math.lgamma(eta + 1) for k in (1, 2)
        )
        prior = sum((3 - k + 2 * (eta - 1)) * math.log(diagonal[k - 1]) for k in (2, 3)) - normaliser
        prior += stats.lognorm.logpdf(v["sd"], 0.5).sum()
        tril = v["sd"][:, None] * v["L"]
        return prior, stats.multivariate_normal.logpdf(x, np.zeros(3), tril @ tril.T).sum()

    def lower(t):
        return torch.stack([t[..., 1, 0], t[..., 2, 0], t[..., 2, 1]], -1)

    return Case(model, (data(5, 3),), expected, coordinates={"L": lower})


def ordered():
    """Improper priors on ordered and on positive ordered vectors: no density but the Jacobian."""

    def model(x):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,)))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.positive_ordered_vector, (), (3,)))
        pyro.sample("x", dist.Normal(a * b, 1.0).to_event(1), obs=x)

    return Case(model, (data(3),), lambda v, x: (0.0, norm(x, v["a"] * v["b"]).sum()))


def improper_scale():
    """Improper flat priors, on the line and above zero."""

    def model(x):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        sd = pyro.sample("sd", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, sd), obs=x)

    return Case(model, (X,), lambda v, x: (0.0, norm(x, v["mu"], v["sd"]).sum()))


def positive():
    """Gamma, inverse gamma, half-Cauchy, beta and Student's t in one."""

    def model(x):
        a = pyro.sample("a", dist.Gamma(2.0, 3.0))
        b = pyro.sample("b", dist.InverseGamma(3.0, 2.0))
        c = pyro.sample("c", dist.HalfCauchy(1.5))
        p = pyro.sample("p", dist.Beta(2.0, 0.7))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.StudentT(2 + a, p, b + c), obs=x)

    def expected(v, x):
        prior = (
            stats.gamma.logpdf(v["a"], 2, scale=1 / 3)
            + stats.invgamma.logpdf(v["b"], 3, scale=2)
            + stats.halfcauchy.logpdf(v["c"], scale=1.5)
            + stats.beta.logpdf(v["p"], 2, 0.7)
        )
        return prior, stats.t.logpdf(x, 2 + v["a"], v["p"], v["b"] + v["c"]).sum()

    return Case(model, (X,), expected)


def dependent_support():
    """A uniform below another site, and one between two: the transform moves with the sites."""

    def model(x):
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-top, top))
            w = pyro.sample("w", dist.Uniform(z, z + 1))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def expected(v, x):
        inside = (np.abs(v["z"]) <= v["top"]).all() and ((v["z"] <= v["w"]) & (v["w"] <= v["z"] + 1)).all()
        prior = stats.gamma.logpdf(v["top"], 2) - len(x) * np.log(2 * v["top"])
        return (prior if inside else -math.inf), norm(x, v["w"]).sum()

    return Case(model, (X,), expected)


def multivariate():
    """A multivariate normal latent, shared, whose precision is given."""
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=F64)

    def model(x, t):
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(2, dtype=F64), precision_matrix=precision))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=w[0] + w[1] * t), obs=x)

    def expected(v, x, t):
        p = 1 / (1 + np.exp(-(v["w"][0] + v["w"][1] * t)))
        return stats.multivariate_normal.logpdf(
            v["w"], [0, 0], np.linalg.inv(precision.numpy())
        ), stats.bernoulli.logpmf(x, p).sum()

    return Case(model, ((X > 0).double(), data(6, seed=3)), expected)


def sequential():
    """A plate that is a loop, and a chain of sites after it."""

    def model(x):
        z = torch.zeros((), dtype=F64)
        for i in pyro.plate("loop", 2):
            pyro.sample(f"w_{i}", dist.Normal(float(i), 1.0))
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    def expected(v, x):
        path = np.array([v[f"z_{t}"] for t in range(3)])
        before = np.array([0.0, *path[:-1]])
        return norm(v["w_0"]) + norm(v["w_1"], 1) + norm(path, 0.9 * before, 0.5).sum(), norm(x, path).sum()

    return Case(model, (data(3),), expected)


def keyword_data():
    def model(t, *, x, power=1):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * t**power, 1.0), obs=x)

    t = data(6, seed=3)
    return Case(
        model,
        (t,),
        lambda v, t: (norm(v["z"]), norm(X.numpy(), v["z"] * t**2)),
        (6,),
        kwargs={"x": X, "power": 2},
    )


def likelihood_without_latent_plate():
    """Independent pairs of plates: observations in two plates side by side, one shared latent."""

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("first", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        with pyro.plate("second", len(y)):
            pyro.sample("y", dist.Normal(-mu, 2.0), obs=y)

    def expected(v, x, y):
        return norm(v["mu"]), norm(x, v["mu"]).sum() + norm(y, -v["mu"], 2).sum()

    return Case(model, (X, data(4)), expected)


CASES: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        shared_mean,
        no_plate,
        no_plate_vector,
        local,
        local_vector,
        nested_outer_right,
        nested_outer_left,
        singleton_dims,
        two_batch_plates,
        crossed,
        global_and_local,
        masked,
        scaled,
        factors,
        global_factor,
        deterministic,
        conditioned,
        reparameterised,
        blocked,
        lifted,
        partly_observed,
        simplex,
        local_simplex,
        correlation,
        ordered,
        improper_scale,
        positive,
        dependent_support,
        multivariate,
        sequential,
        keyword_data,
        likelihood_without_latent_plate,
    )
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def expected_at(case, values):
    """(log prior, log likelihood) of one draw, (*batch) each, from the second density."""
    given = {n: v.numpy() for n, v in values.items()}
    args = [a.numpy() if isinstance(a, torch.Tensor) else a for a in case.args]
    prior, likelihood = case.expected(given, *args)
    return np.asarray(prior, dtype=float), np.asarray(likelihood, dtype=float)


def row(values, *index):
    return {n: v[index] for n, v in values.items()}


def test_log_densities_are_those_written_by_hand(case):
    """Prior, likelihood and joint at two-dimensional arrays of points, 1e-8 relative."""
    density = Density(case.problem())
    assert tuple(density.batch_shape) == case.batch
    with density, torch.no_grad():
        values = density.constrain(some_u(density, 2, 3))
        assert set(values) == set(density.latents)
        prior, likelihood = density.log_prior(values), density.log_likelihood(values)
        joint = density.log_joint(values)
    assert joint.shape == prior.shape == likelihood.shape == (2, 3, *case.batch)
    for index in itertools.product(range(2), range(3)):
        expected = expected_at(case, row(values, *index))
        assert_close(prior[index], expected[0])
        assert_close(likelihood[index], expected[1])
        assert_close(joint[index], expected[0] + expected[1])


def test_the_jacobian_is_that_of_constrain(case):
    """log_joint(u) - log_joint(values) = log |det d values / d u|, by autodiff, 1e-8; log_prior carries it as well."""
    density = Density(case.problem())
    u = some_u(density)

    def coordinates(flat):
        values = density.constrain(flat.reshape(u.shape))
        events = (case.coordinates.get(n, lambda v: v)(v) for n, v in values.items())
        return torch.cat([e.reshape(-1) for e in events])

    with density:
        jacobian = torch.autograd.functional.jacobian(coordinates, u.reshape(-1))
        values = density.constrain(u)
        difference = density.log_joint(u) - density.log_joint(values)
        in_prior = density.log_prior(u) - density.log_prior(values)
        without = density.log_joint(u, jacobian=False)
        padding = case.padding({n: v.numpy() for n, v in values.items()}, *case.args, **case.kwargs)
        plain = density.log_joint(values) + torch.as_tensor(padding)
    assert jacobian.shape[0] == jacobian.shape[1]
    assert_close(difference.sum() - padding, torch.linalg.slogdet(jacobian).logabsdet)
    assert_close(in_prior, difference)
    assert_close(without, plain)


def test_constrain_and_unconstrain_are_inverse(case):
    """u -> values -> u, with sample dimensions, to 1e-10."""
    density = Density(case.problem())
    u = some_u(density, 2, 3)
    with density, torch.no_grad():
        assert_close(density.unconstrain(density.constrain(u)), u, 1e-10)


def test_gradients_are_central_differences(case):
    """d log_joint / du for several points at once, 1e-5 relative; and compiled, the same to rounding."""
    density = Density(case.problem())
    u = some_u(density, 2)
    with density, torch.no_grad():
        value, gradient = density.value_and_grad(u)
        assert_close(value, density.log_joint(u), 1e-12)
        compiled = density.compiled_value_and_grad(u)
        for at in (u, u + 0.2):
            for a, b in zip(compiled(at), density.value_and_grad(at), strict=True):
                assert_close(a, b, 1e-10)
        flat, step = u.reshape(2, -1), 1e-5
        for i in range(flat.shape[1]):
            e = torch.zeros_like(flat)
            e[:, i] = step
            up, down = (density.log_joint((flat + s * e).reshape(u.shape)).reshape(2, -1).sum(1) for s in (1, -1))
            assert_close(gradient.reshape(2, -1)[:, i], (up - down) / (2 * step), 1e-5)


@pytest.mark.parametrize("name", [n for n, make in CASES.items() if make().rows])
def test_a_datum_has_the_density_it_has_alone(name):
    """log_joint(u) of the batch, element by element, equals that of problems with one datum each."""
    case = CASES[name]()
    density = Density(case.problem())
    u = some_u(density, 3)
    with density, torch.no_grad():
        together = density.log_joint(u)
    for i in range(case.batch[0]):
        alone = Density(case.problem().on(case.args[0][i : i + 1]))
        assert tuple(alone.batch_shape) == (1,)
        with alone, torch.no_grad():
            assert_close(alone.log_joint(u[:, i : i + 1]), together[:, i : i + 1], 1e-12)


def test_data_may_be_permuted():
    """Permuting the data and the latents together permutes the density."""
    case = local_vector()
    order = torch.tensor([3, 0, 4, 1, 2])
    density, permuted = Density(case.problem()), Density(case.problem().on(case.args[0][order]))
    u = some_u(density, 2)
    with density, permuted, torch.no_grad():
        assert_close(permuted.log_joint(u[:, order]), density.log_joint(u)[:, order], 1e-12)


# -- what is found in a program --------------------------------------------------------------------------------------


def test_the_data_plate_of_shared_latents_is_found():
    density = Density(shared_mean().problem())
    assert (density.batch_plates, density.data_plate.name, density.data_plate.size) == ([], "data", 6)
    assert Density(likelihood_without_latent_plate().problem()).data_plate is None
    assert Density(no_plate().problem()).data_plate is None


def test_the_data_plate_is_the_one_whose_size_the_data_have():
    """Of two plates that hold all observations, rows are cut from the one that an argument's first dimension has."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", x.shape[0], dim=-2), pyro.plate("pixels", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    for shape in ((3, 6), (6, 3)):
        density = Density(Problem(model, args=(data(*shape),)))
        assert density.data_plate.name == "data"
        check_minibatch(density)


def test_sites_keep_their_layout():
    """(*batch, *other plates, *event), whatever the order of dims in the program."""
    density = Density(nested_outer_right().problem())
    with density, torch.no_grad():
        draws = density.prior(5).values
    assert {n: tuple(v.shape) for n, v in draws.items()} == {"z": (5, 4), "e": (5, 4, 3)}
    assert [p.name for p in density.batch_plates] == ["groups"]
    assert density.sites["e"].inner_shape == (3,)
    assert density.dim == 4  # of one group: z and three e
    one = Density(singleton_dims().problem())
    with one, torch.no_grad():
        assert tuple(one.prior(5).values["z"].shape) == (5, 6, 2, 2)


def test_deterministic_sites_come_with_the_draws():
    density = Density(deterministic().problem())
    u = some_u(density, 2)
    with density, torch.no_grad():
        values = density.complete(u)
        again = density.complete({"z": values["z"]})
        assert list(density.constrain(u)) == ["z"]
    z = u[..., 0]
    expected = {
        "z": z,
        "double": 2 * z,
        "path": torch.stack([z, z**2], -1),
        "mean": z[..., None] + torch.arange(3.0, dtype=F64),
    }
    assert set(again) == set(expected)
    for name, value in expected.items():
        assert_close(values[name], value, 1e-12)
        assert_close(again[name], value, 1e-12)


def test_what_is_not_told_by_the_latents_given_is_left_out():
    """With discrete latents summed out, a deterministic site that may depend on them has no value."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("sum", k + z)
            pyro.sample("x", dist.Normal(k + z, 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    u = some_u(density, 2)
    k = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0], dtype=F64).expand(2, 6)
    with density, torch.no_grad():
        assert list(density.complete(u)) == ["z"]
        values = density.complete({"z": u[..., 0], "k": k})
    assert_close(values["sum"], u[..., 0] + k, 1e-12)


def test_a_deterministic_scalar_of_shared_latents():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("square", mu**2)
        with pyro.plate("data", len(x)):
            pyro.deterministic("shifted", mu + x)
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    mu = data(4)
    with density, torch.no_grad():
        values = density.complete({"mu": mu})
    assert_close(values["square"], mu**2, 1e-12)
    assert_close(values["shifted"], mu[:, None] + X, 1e-12)


def test_observed_data_and_pointwise_likelihoods_have_the_layout_of_sites():
    """Each observation by itself: (sample, *batch, *other plates); their sum is the likelihood."""
    case = nested_outer_right()
    density = Density(case.problem())
    with density, torch.no_grad():
        values = density.prior(2).values
        pointwise = density.pointwise(values)
        total = density.log_likelihood(values)
    assert_close(density.observed["x"], case.args[0].T, 0)
    assert tuple(pointwise["x"].shape) == (2, 4, 3)
    assert_close(pointwise["x"], norm(case.args[0].numpy().T, values["e"].numpy(), 0.4))
    assert_close(pointwise["x"].sum(-1), total, 1e-12)
    shapes = {"shared_mean": (2, 6), "crossed": (2, 2, 3), "local_vector": (2, 5), "masked": (2, 6), "scaled": (2, 6)}
    for name, shape in shapes.items():  # what is masked counts nothing, what is scaled counts as often as it says
        density = Density(CASES[name]().problem())
        with density, torch.no_grad():
            values = density.prior(2).values
            pointwise = density.pointwise(values)
            assert {tuple(p.shape) for p in pointwise.values()} == {shape}
            per_element = sum(pointwise.values()).reshape((2, *density.batch_shape, -1)).sum(-1)
            assert_close(per_element, density.log_likelihood(values), 1e-12)


@pytest.mark.parametrize("couple", ["mean", "batch_norm"])
def test_data_that_move_one_another_are_treated_as_one(couple):
    """A plate promises independence; a model that breaks it gets batch () and a note, and its true density."""
    norm_layer = nn.BatchNorm1d(1, track_running_stats=False, affine=False)

    def centre(z):
        return z - z.mean() if couple == "mean" else norm_layer(z[:, None])[:, 0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(centre(z), 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    assert tuple(density.batch_shape) == ()
    assert density.dim == 6
    assert any("couples its data" in note and "'data'" in note for note in density.notes)
    u = some_u(density, 3)
    with density, torch.no_grad():
        values, joint = density.constrain(u), density.log_joint(u)
    for i in range(3):
        z = values["z"][i].numpy()
        shifted = z - z.mean()
        if couple == "batch_norm":
            shifted = shifted / np.sqrt(z.var() + 1e-5)
        assert_close(joint[i], norm(z).sum() + norm(X.numpy(), shifted).sum())


def test_independent_data_are_not_taken_for_coupled():
    for name in ("local", "local_vector", "nested_outer_right", "two_batch_plates"):
        density = Density(CASES[name]().problem())
        assert density.notes == []
        assert density.batch_shape.numel() > 1


# -- discrete latents, summed out ------------------------------------------------------------------------------------


def lse(values, axis=0):
    values = np.asarray(values, dtype=float)
    top = values.max(axis, keepdims=True)
    return np.squeeze(top, axis) + np.log(np.exp(values - top).sum(axis))


def test_a_mixture_with_local_and_shared_continuous_latents():
    """sum_k w_k N(x; mu_k, 1), mu shared: value, gradient, and the listed values with it."""
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=F64)

    def model(x):
        with pyro.plate("components", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(mu[k], 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    assert (tuple(density.batch_shape), density.discrete, density.continuous) == ((), ["k"], ["mu"])
    u = some_u(density, 3)
    with density, torch.no_grad():
        joint, gradient = density.value_and_grad(u)
        k = torch.tensor([0, 2, 1, 1, 0, 2])
        given = density.log_joint({"mu": u, "k": k.expand(3, 6)})
        vectorised = density.vectorised
    assert vectorised
    for i in range(3):
        mu = u[i].numpy()
        terms = np.log(weights.numpy()) + norm(X.numpy()[:, None], mu, 1)
        assert_close(joint[i], norm(mu, 0, 3).sum() + lse(terms, 1).sum())
        chosen = terms[np.arange(6), k.numpy()]
        assert_close(given[i], norm(mu, 0, 3).sum() + chosen.sum())
        share = np.exp(terms - lse(terms, 1)[:, None])
        assert_close(gradient[i], -mu / 9 + (share * (X.numpy()[:, None] - mu)).sum(0))


def test_the_jacobian_stays_where_discrete_latents_are_summed_out():
    """A scale per datum beside its category: log_joint(log s) = log_joint(s) + log s."""

    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k, s), obs=x)

    density = Density(Problem(model, args=(X,)))
    u = some_u(density, 3)
    with density, torch.no_grad():
        joint = density.log_joint(u)
        assert_close(density.log_joint(u, jacobian=False), density.log_joint({"s": u[..., 0].exp()}), 1e-12)
    s = u[..., 0].exp().numpy()
    terms = [math.log(0.7) + norm(X.numpy(), 0, s), math.log(0.3) + norm(X.numpy(), 1, s)]
    assert_close(joint, stats.lognorm.logpdf(s, 1.0) + lse(terms) + u[..., 0].numpy())


def test_a_hidden_markov_chain_per_datum():
    """pyro.markov, four steps, two states: against all 16 paths of each datum."""
    start, move = torch.tensor([0.6, 0.4], dtype=F64), torch.tensor([[0.7, 0.3], [0.1, 0.9]], dtype=F64)

    def model(x):  # (data, time)
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            state = None
            for t in pyro.markov(range(x.shape[1])):
                state = pyro.sample(f"s_{t}", dist.Categorical(start if t == 0 else move[state]))
                pyro.sample(f"x_{t}", dist.Normal(2.0 * state + shift, 1.0), obs=x[:, t])

    x = data(3, 4)
    density = Density(Problem(model, args=(x,)))
    assert tuple(density.batch_shape) == (3,)
    u = some_u(density, 2)
    with density, torch.no_grad():
        joint = density.log_joint(u)
    for s, i in itertools.product(range(2), range(3)):
        shift, paths = float(u[s, i, 0]), []
        for path in itertools.product(range(2), repeat=4):
            p = math.log(start[path[0]]) + sum(math.log(move[a, b]) for a, b in itertools.pairwise(path))
            paths.append(p + sum(norm(float(x[i, t]), 2.0 * k + shift) for t, k in enumerate(path)))
        assert_close(joint[s, i], norm(shift) + lse(paths))


def two_discrete_sites(x):
    """A category and a coin that depends on it, both per datum, and a one-hot site."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=F64)))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.3 * a))
        c = pyro.sample("c", dist.OneHotCategorical(torch.tensor([0.1, 0.9], dtype=F64)))
        pyro.sample("x", dist.Normal(a * b + 3.0 * c[..., 1], 1.0), obs=x)


def test_two_discrete_sites_and_a_one_hot_in_one_plate():
    density = Density(Problem(two_discrete_sites, args=(X,)))
    assert tuple(density.batch_shape) == (6,)
    with density, torch.no_grad():
        joint = density.log_joint({})
    terms = []
    for a, b, c in itertools.product(range(3), range(2), range(2)):
        q = 0.2 + 0.3 * a
        prior = math.log([0.2, 0.3, 0.5][a]) + math.log(q if b else 1 - q) + math.log([0.1, 0.9][c])
        terms.append(prior + norm(X.numpy(), a * b + 3.0 * c, 1))
    assert_close(joint, lse(terms))


def test_some_discrete_sites_given_the_others_summed_out():
    density = Density(Problem(two_discrete_sites, args=(X,)))
    a = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with density, torch.no_grad():
        joint = density.log_joint({"a": a})
    terms = []
    for b, c in itertools.product(range(2), range(2)):
        q = 0.2 + 0.3 * a[0].numpy()
        prior = np.log(np.array([0.2, 0.3, 0.5]))[a[0]] + np.log(q if b else 1 - q) + math.log([0.1, 0.9][c])
        terms.append(prior + norm(X.numpy(), a[0].numpy() * b + 3.0 * c, 1))
    assert_close(joint[0], lse(terms))


def test_a_shared_switch_sums_over_all_data_at_once():
    """log sum_k p(k) prod_i p(x_i | k): the product inside the sum."""

    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    with density, torch.no_grad():
        joint = density.log_joint({})
    assert tuple(joint.shape) == ()
    terms = [math.log(0.7) + norm(X.numpy(), 0).sum(), math.log(0.3) + norm(X.numpy(), 1).sum()]
    assert_close(joint, lse(terms))


def test_a_discrete_site_of_each_group_with_observations_inside():
    """Plates in both orders: the product over the inner plate stands inside the sum over the group's value."""
    x = data(3, 4)

    def outer_right(x):  # (observations, groups)
        with pyro.plate("groups", x.shape[1], dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6], dtype=F64)))
            with pyro.plate("inside", x.shape[0], dim=-2):
                pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    def outer_left(x):
        with pyro.plate("groups", x.shape[0], dim=-2):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6], dtype=F64)))
            with pyro.plate("inside", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    terms = [math.log(w) + norm(x.numpy(), 2.0 * k).sum(0) for k, w in enumerate((0.4, 0.6))]
    for model, args in ((outer_right, x), (outer_left, x.T.contiguous())):
        density = Density(Problem(model, args=(args,)))
        assert tuple(density.batch_shape) == (4,)
        with density, torch.no_grad():
            assert_close(density.log_joint({}), lse(terms))


def test_discrete_latents_with_two_batch_plates():
    x = data(2, 3)

    def model(x):
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6], dtype=F64)))
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    density = Density(Problem(model, args=(x,)))
    with density, torch.no_grad():
        terms = [math.log(w) + norm(x.numpy(), 2.0 * k) for k, w in enumerate((0.4, 0.6))]
        assert_close(density.log_joint({}), lse(terms))


def test_masked_observations_of_discrete_latents_say_nothing():
    seen = torch.tensor([True, False, True, True, True, False])

    def model(x, seen):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    density = Density(Problem(model, args=(X, seen)))
    with density, torch.no_grad():
        terms = [math.log(0.7) + norm(X.numpy(), 0), math.log(0.3) + norm(X.numpy(), 1)]
        assert_close(density.log_joint({}), np.where(seen.numpy(), lse(terms), 0.0))


def test_summing_out_equals_the_sum_over_what_is_listed():
    """Enumeration lists the values, the density sums them out: one evidence, by two ways."""
    problem = Problem(two_discrete_sites, args=(X,))
    posterior = infer(problem, Enumeration())
    with Density(problem) as density, torch.no_grad():
        assert_close(posterior.log_evidence.value, density.log_joint({}), 1e-12)


# -- dtypes, control flow ---------------------------------------------------------------------------------------------


def test_control_flow_that_depends_on_draws_gives_the_same_numbers_one_by_one():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        loc = mu if mu.item() > 0 else 3 * mu
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    assert not density.vectorised
    assert any("cannot be batched" in note for note in density.notes)
    mu = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)
    loc = np.where(mu > 0, mu, 3 * mu)
    with density, torch.no_grad():
        assert_close(density.log_joint(mu[:, None]), norm(mu) + norm(X.numpy(), loc[:, None]).sum(1))
        draws = density.prior(50)
        assert_close(draws.log_prior + draws.log_likelihood, density.log_joint(draws.values), 1e-12)
        assert_close(density.value_and_grad(mu[:1, None])[1], [[float(1 + 3 * (X.numpy() + 3).sum())]])


class Decoder(nn.Module):
    """A float32 network as users write it: a model with a decoder and per-datum latents."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
        self.raw = nn.Parameter(torch.tensor(-0.3))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.raw.exp()).to_event(1), obs=x)


def test_a_float32_module_is_evaluated_in_float64():
    """To 1e-5 of the module's own float32 figures, and to 1e-12 of the same arithmetic in float64 numpy."""
    module, x = Decoder(), data(4, 3).float()
    density = Density(Problem(module.model, args=(x,)))
    assert (density.dtype, density.notes) == (F64, [])
    z = data(4, 2).float()
    conditioned_model = poutine.condition(module.model, data={"z": z})
    trace = poutine.trace(conditioned_model).get_trace(x)
    trace.compute_log_prob()
    single = (trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]).detach()
    with density, torch.no_grad():
        double = density.log_joint({"z": z[None]})[0]
    assert double.dtype == F64
    assert_close(double, single, 1e-5)
    w0, b0, w1, b1 = (p.detach().double().numpy() for p in module.net.parameters())
    mean = np.tanh(z.double().numpy() @ w0.T + b0) @ w1.T + b1
    expected = norm(z.double().numpy()).sum(1)
    expected = expected + norm(x.double().numpy(), mean, math.exp(float(module.raw.detach().double()))).sum(1)
    assert_close(double, expected, 1e-12)
    assert next(module.net.parameters()).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_program_bound_to_float32_falls_back_with_a_note():
    weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.float(), 1.0).to_event(1), obs=x)

    x = data(4, 2).float()
    density = Density(Problem(model, args=(x,)))
    assert density.dtype == torch.float32
    assert any("float64" in note and "float32" in note for note in density.notes)
    z = data(4, 2, seed=3).float()
    with density, torch.no_grad():
        joint = density.log_joint({"z": z[None]})[0]
    assert_close(joint, norm(z).sum(1) + norm(x, z @ weight).sum(1), 1e-5)


def test_a_module_with_float32_buffers_is_evaluated_and_its_buffers_stay():
    """Running means are the module's own: evaluating a density must not move them, nor be stopped by their dtype."""
    layer = nn.BatchNorm1d(1)
    before = {n: b.clone() for n, b in layer.named_buffers()}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(layer(z[:, None])[:, 0], 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    with density, torch.no_grad():
        assert bool(density.log_joint(some_u(density, 2)).isfinite().all())
    for name, buffer in layer.named_buffers():
        assert bool((buffer == before[name]).all())
        assert buffer.dtype == before[name].dtype


# -- draws of the prior ----------------------------------------------------------------------------------------------
# Draws are seen through indicators of their exact quantiles: binomial counts, with the exact variance.


def at_quantiles(draws, law, quantiles=(0.05, 0.25, 0.5, 0.75, 0.95)):
    """z scores of the share of draws below exact quantiles (continuous law), or at values (discrete law)."""
    draws = np.asarray(draws, dtype=float).ravel()
    n = len(draws)
    if hasattr(law, "pdf") and not hasattr(law.dist, "pmf"):
        events = [(draws <= law.ppf(q), q) for q in quantiles]
    else:
        values = np.unique(draws)
        assert abs(law.pmf(values).sum() - 1) < 1e-3
        events = [(draws == v, law.pmf(v)) for v in values if law.pmf(v) > 1e-3]
    return np.array([(hit.mean() - p) / math.sqrt(p * (1 - p) / n) for hit, p in events])


LAWS = {
    "normal": (lambda: dist.Normal(1.0, 2.0), stats.norm(1, 2)),
    "gamma": (lambda: dist.Gamma(0.3, 2.0), stats.gamma(0.3, scale=0.5)),
    "inverse_gamma": (lambda: dist.InverseGamma(2.0, 3.0), stats.invgamma(2, scale=3)),
    "chi2": (lambda: dist.Chi2(3.0), stats.chi2(3)),
    "beta": (lambda: dist.Beta(0.4, 1.3), stats.beta(0.4, 1.3)),
    "student": (lambda: dist.StudentT(3.0, 1.0, 2.0), stats.t(3, 1, 2)),
    "cauchy": (lambda: dist.Cauchy(1.0, 2.0), stats.cauchy(1, 2)),
    "half_cauchy": (lambda: dist.HalfCauchy(2.0), stats.halfcauchy(0, 2)),
    "half_normal": (lambda: dist.HalfNormal(2.0), stats.halfnorm(0, 2)),
    "exponential": (lambda: dist.Exponential(2.0), stats.expon(scale=0.5)),
    "laplace": (lambda: dist.Laplace(1.0, 2.0), stats.laplace(1, 2)),
    "log_normal": (lambda: dist.LogNormal(0.5, 0.7), stats.lognorm(0.7, scale=math.exp(0.5))),
    "uniform": (lambda: dist.Uniform(-1.0, 3.0), stats.uniform(-1, 4)),
    "weibull": (lambda: dist.Weibull(2.0, 1.5), stats.weibull_min(1.5, scale=2)),
    "gumbel": (lambda: dist.Gumbel(1.0, 2.0), stats.gumbel_r(1, 2)),
    "pareto": (lambda: dist.Pareto(2.0, 3.0), stats.pareto(3, scale=2)),
    "categorical": (
        lambda: dist.Categorical(torch.tensor([0.1, 0.6, 0.3])),
        stats.rv_discrete(values=([0, 1, 2], [0.1, 0.6, 0.3])),
    ),
    "bernoulli": (lambda: dist.Bernoulli(0.3), stats.bernoulli(0.3)),
    "binomial": (lambda: dist.Binomial(5, torch.tensor(0.3)), stats.binom(5, 0.3)),
    "poisson": (lambda: dist.Poisson(2.5), stats.poisson(2.5)),
    "geometric": (lambda: dist.Geometric(0.4), stats.geom(0.4, loc=-1)),
    "negative_binomial": (lambda: dist.NegativeBinomial(3.0, torch.tensor(0.4)), stats.nbinom(3, 0.6)),
}


@pytest.mark.parametrize("name", LAWS)
def test_prior_draws_follow_their_law(name):
    """20,000 draws, alone and three abreast in a plate; |z| < 4.9 at every quantile or value: refuses about 1e-4 of
    seeds over all laws. Sees a shift of 0.04 sd, and copies of draws."""
    make, law = LAWS[name]

    def model(x):
        v = pyro.sample("v", make())
        with pyro.plate("three", 3):
            w = pyro.sample("w", make())
        pyro.sample("x", dist.Normal(v.double() + w.double().sum(), 1e9), obs=x)

    density = Density(Problem(model, args=(torch.tensor(0.0),)))
    with density, torch.no_grad():
        draws = density.prior(20_000).values
    assert draws["w"].shape == (20_000, 3)
    for values in (draws["v"], *draws["w"].T):
        assert np.abs(at_quantiles(values, law)).max() < LIMIT
    if hasattr(law, "pdf") and not hasattr(law.dist, "pmf"):
        columns = np.stack([draws["v"].numpy(), *draws["w"].T.numpy()])
        assert len(np.unique(columns)) > 0.99 * columns.size
        below = (columns <= law.median()).astype(float) - 0.5
        correlation = (below @ below.T) / 20_000 / 0.25
        assert np.abs(correlation - np.eye(4)).max() < LIMIT / math.sqrt(20_000)  # columns are independent


@pytest.mark.parametrize("concentration", [(0.02, 0.05, 0.03), (0.5, 1.0, 2.0), (20.0, 30.0, 50.0)])
def test_dirichlet_draws_follow_their_law(concentration):
    """Marginals are beta; small concentrations put almost all mass at the corners. Limits as above."""

    def model(x):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor(concentration, dtype=F64)))
        pyro.sample("x", dist.Normal(p.sum(), 1.0), obs=x)

    density = Density(Problem(model, args=(torch.tensor(0.0),)))
    with density, torch.no_grad():
        draws = density.prior(20_000)
    p, total = draws.values["p"].numpy(), sum(concentration)
    assert np.allclose(p.sum(1), 1, atol=1e-12)
    assert bool(draws.log_prior.isfinite().all())
    for k, a in enumerate(concentration):
        law = stats.beta(a, total - a)
        points = [q for q in (0.25, 0.5, 0.75) if 1e-12 < law.ppf(q) < 1 - 1e-12]
        if points:
            assert np.abs(at_quantiles(p[:, k], law, points)).max() < LIMIT
        mean, variance = a / total, law.var()
        assert abs(p[:, k].mean() - mean) < LIMIT * math.sqrt(variance / 20_000)
    product = p[:, 0] * p[:, 1]
    expected = concentration[0] * concentration[1] / (total * (total + 1))
    assert abs(product.mean() - expected) < LIMIT * product.std() / math.sqrt(20_000) + 1e-12


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_lkj_draws_follow_their_law(dim):
    """Every correlation is 2 Beta(b, b) - 1 with b = eta - 1 + dim / 2, for two concentrations side by side. Limits as
    above. (torch's own sampler is wrong from three dimensions on: its squared lengths are Beta(r - 1/2, .).)"""
    eta = torch.tensor([1.5, 4.0], dtype=F64)

    def model(x):
        with pyro.plate("two", 2):
            tril = pyro.sample("L", dist.LKJCholesky(dim, eta))
        pyro.sample("x", dist.Normal(tril.sum(), 1.0), obs=x)

    density = Density(Problem(model, args=(torch.tensor(0.0),)))
    with density, torch.no_grad():
        tril = density.prior(20_000).values["L"]
    corr = (tril @ tril.mT).numpy()
    assert np.allclose(corr[..., range(dim), range(dim)], 1, atol=1e-12)
    for k in range(2):
        b = float(eta[k]) - 1 + dim / 2
        for i, j in itertools.combinations(range(dim), 2):
            assert np.abs(at_quantiles(corr[:, k, j, i], stats.beta(b, b, loc=-1, scale=2))).max() < LIMIT


def test_multivariate_normal_draws_follow_their_law():
    covariance = torch.tensor([[2.0, 1.2], [1.2, 1.0]], dtype=F64)

    def model(x):
        w = pyro.sample("w", dist.MultivariateNormal(torch.tensor([1.0, -1.0], dtype=F64), covariance))
        pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

    density = Density(Problem(model, args=(torch.tensor(0.0),)))
    with density, torch.no_grad():
        w = density.prior(20_000).values["w"].numpy()
    for direction in ((1, 0), (0, 1), (1, 1), (1, -1)):
        a = np.array(direction, dtype=float)
        law = stats.norm(a @ [1, -1], math.sqrt(a @ covariance.numpy() @ a))
        assert np.abs(at_quantiles(w @ a, law)).max() < LIMIT


def test_prior_draws_carry_their_log_densities():
    """log_prior and log_likelihood of the draws, per datum, are those of the values; their sum is the log joint."""
    for name in ("local_vector", "nested_outer_right", "positive", "dependent_support", "scaled", "local_simplex"):
        density = Density(CASES[name]().problem())
        with density, torch.no_grad():
            draws = density.prior(7)
            assert_close(draws.log_prior, density.log_prior(draws.values), 1e-12)
            assert_close(draws.log_likelihood, density.log_likelihood(draws.values), 1e-12)
            assert_close(draws.log_prior + draws.log_likelihood, density.log_joint(draws.values), 1e-12)


def test_prior_draws_of_discrete_latents_carry_their_log_densities():
    density = Density(Problem(two_discrete_sites, args=(X,)))
    with density, torch.no_grad():
        draws = density.prior(7)
        assert {n: v.shape for n, v in draws.values.items()} == {"a": (7, 6), "b": (7, 6), "c": (7, 6, 2)}
        assert_close(draws.log_prior + draws.log_likelihood, density.log_joint(draws.values), 1e-12)


# -- minibatches -----------------------------------------------------------------------------------------------------

INDEX = torch.tensor([4, 1, 2])  # 3 of 6, and 4 of 6 below: no divisor


def scale_of(index):
    return 6 / len(index)


@pytest.mark.parametrize("index", [INDEX, torch.tensor([5, 0, 3, 1])], ids=["3 of 6", "4 of 6"])
@pytest.mark.parametrize("hard_coded", [False, True], ids=["len(x)", "hard-coded"])
def test_a_minibatch_scales_the_data_of_shared_latents_once(index, hard_coded):
    """log p(mu) + N/B sum_{i in batch} log p(x_i | mu), whether the plate's size comes from the data or not."""

    def model(x, t):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6 if hard_coded else len(x)):
            pyro.sample("x", dist.Normal(mu * t, 1.0), obs=x)
            pyro.factor("f", 0.1 * mu * x)

    t = data(6, seed=5)
    density = Density(Problem(model, args=(X, t)))
    check_minibatch(density)
    mu = data(2)
    with density, torch.no_grad(), density.minibatch(index):
        joint, likelihood = density.log_joint(mu[:, None]), density.log_likelihood(mu[:, None])
        assert density.data_scale == 1.0
        assert tuple(density.batch_shape) == ()
    for s in range(2):
        m = float(mu[s])
        terms = norm(X.numpy(), m * t.numpy()) + 0.1 * m * X.numpy()
        assert_close(likelihood[s], scale_of(index) * terms[index].sum())
        assert_close(joint[s], norm(m) + scale_of(index) * terms[index].sum())


def test_a_minibatch_of_per_datum_latents_has_their_own_densities():
    """The rows' densities are what they are in the full data; a sum over them is scaled by data_scale."""
    case = keyword_data()
    density = Density(case.problem())
    u = some_u(density, 2)
    with density, torch.no_grad():
        full = density.log_joint(u)
        with density.minibatch(INDEX):
            assert tuple(density.batch_shape) == (3,)
            assert density.data_scale == 2.0
            assert_close(density.rows(u[0]), u[0][INDEX], 0)
            assert_close(density.log_joint(u[:, INDEX]), full[:, INDEX], 1e-12)
            assert density.prior(4).values["z"].shape == (4, 3)
        assert (tuple(density.batch_shape), density.data_scale) == ((6,), 1.0)
        assert_close(density.log_joint(u), full, 0)


def test_a_minibatch_over_data_that_poutine_scale_weighs():
    """N/B comes on top of the user's own scale, and leaves what is outside the plate alone."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=0.5), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    mu, z = data(1), data(1, 3)
    with density, torch.no_grad(), density.minibatch(INDEX):
        joint = density.log_joint({"mu": mu, "z": z})
    inside = 0.5 * 2 * (norm(z[0], float(mu)) + norm(X[INDEX], z[0])).sum()
    assert_close(joint[0], norm(float(mu)) + inside)


def test_a_minibatch_scales_no_other_plate():
    """Latents in a plate of their own keep their weight; data in two plates are scaled once."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        features = pyro.plate("features", 3, dim=-1)
        with features:
            w = pyro.sample("w", dist.Normal(mu, 1.0))
        with pyro.plate("data", len(x), dim=-2), features:
            pyro.sample("x", dist.Normal(w, 0.5), obs=x)

    x = data(6, 3)
    density = Density(Problem(model, args=(x,)))
    assert density.data_plate.name == "data"
    check_minibatch(density)
    mu, w = data(2), data(2, 3, seed=4)
    with density, torch.no_grad(), density.minibatch(INDEX):
        joint = density.log_joint({"mu": mu, "w": w})
    for s in range(2):
        prior = norm(float(mu[s])) + norm(w[s].numpy(), float(mu[s])).sum()
        assert_close(joint[s], prior + 2 * norm(x[INDEX].numpy(), w[s].numpy(), 0.5).sum())


def test_a_minibatch_with_discrete_latents_is_scaled_after_the_sums():
    """log p(mu) + N/B sum_i log sum_k: the scale stands outside the logarithm."""

    def model(x):
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6], dtype=F64)))
            pyro.sample("x", dist.Normal(mu[k], 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    check_minibatch(density)
    mu = data(2)
    with density, torch.no_grad(), density.minibatch(INDEX):
        joint = density.log_joint(mu[None])
    terms = np.log([0.4, 0.6]) + norm(X[INDEX].numpy()[:, None], mu.numpy(), 1)
    assert_close(joint[0], norm(mu.numpy(), 0, 3).sum() + 2 * lse(terms, 1).sum())


def test_the_mean_over_minibatches_is_the_full_density():
    """All 20 batches of 3 of 6: unbiased exactly, with shared latents and with a guide for local ones."""
    density = Density(shared_mean().problem())
    u = some_u(density, 2)
    with density, torch.no_grad():
        full, parts = density.log_joint(u), []
        for index in itertools.combinations(range(6), 3):
            with density.minibatch(torch.tensor(index)):
                parts.append(density.log_joint(u))
    assert_close(torch.stack(parts).mean(0), full, 1e-12)


def test_minibatches_reach_the_guide():
    """Guide draws and log q of the rows: the amortised guide sees the rows' data; global guide sites are not scaled."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(0.5, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    density = Density(Problem(model, args=(X,), guide=guide))
    with density, torch.no_grad(), density.minibatch(INDEX):
        values, log_q, _ = density.guide(5)
    assert values["z"].shape == (5, 3)
    assert float((values["z"] - X[INDEX]).abs().max()) < 1.0  # ten sd of the guide
    expected = norm(values["mu"], 0.5, 2) + 2 * norm(values["z"], X[INDEX], 0.1).sum(1)
    assert_close(log_q, expected)


def test_check_minibatch_refuses_data_that_are_closed_over():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(mu, 1.0 + x[0] ** 2), obs=X)

    with pytest.raises(ProblemError, match=r"closed over|fails on 3 of 6"):
        check_minibatch(Density(Problem(model, args=(X,))))


def test_check_minibatch_refuses_an_argument_that_only_looks_like_data():
    """Six weights of a quadrature rule beside six data: sliced, they change every datum's density."""
    weights = torch.arange(1.0, 7.0, dtype=F64)

    def model(x, weights):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * weights.sum(), 1.0), obs=x)

    with pytest.raises(ProblemError, match=r"other densities .*first dimension is 6 is no data"):
        check_minibatch(Density(Problem(model, args=(X, weights))))


def test_check_minibatch_refuses_data_that_are_not_in_args():
    def program():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(mu, 1.0))

    with pytest.raises(ProblemError, match="no argument has plate 'data'"):
        check_minibatch(Density(Problem(pyro.condition(program, data={"x": X}))))
    with pytest.raises(ProblemError, match="need a plate that holds all observations"):
        check_minibatch(Density(no_plate().problem()))
    with pytest.raises(ProblemError, match="several batch plates"):
        check_minibatch(Density(two_batch_plates().problem()))


def test_check_minibatch_accepts_what_can_be_sliced():
    for name in ("shared_mean", "local", "local_vector", "keyword_data", "masked", "local_simplex", "multivariate"):
        density = Density(CASES[name]().problem())
        check_minibatch(density)
        assert density.row_numbers is None


# -- modules with random parameters ------------------------------------------------------------------------------------


class Regression(PyroModule):
    """Pyro's Bayesian regression: the weights of a linear layer are latent sites."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 2.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 3.0).expand([1]).to_event(1))
        self.log_sigma = nn.Parameter(torch.tensor(-0.5))

    def forward(self, t, y):
        mean = self.linear(t)[:, 0]
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Normal(mean, self.log_sigma.exp()), obs=y)


def test_bayesian_regression_as_a_pyro_module():
    t, y = data(6, 2), X
    density = Density(Problem(Regression(), args=(t.float(), y.float())))
    assert set(density.latents) == {"linear.weight", "linear.bias"}
    assert tuple(density.batch_shape) == ()
    assert list(density.theta) == ["log_sigma"]
    weight, bias = data(3, 1, 2), data(3, 1, seed=4)
    values = {"linear.weight": weight, "linear.bias": bias}
    t, y = t.float().double().numpy(), y.float().double().numpy()
    with density, torch.no_grad():
        assert density.vectorised
        joint, pointwise = density.log_joint(values), density.pointwise(values)["y"]
    assert pointwise.shape == (3, 6)
    for s in range(3):
        mean = t @ weight[s, 0].numpy() + float(bias[s])
        each = norm(y, mean, math.exp(-0.5))
        assert_close(pointwise[s], each)
        assert_close(joint[s], norm(weight[s].numpy(), 0, 2).sum() + norm(float(bias[s]), 0, 3) + each.sum())


# -- guides ---------------------------------------------------------------------------------------------------------


def test_guide_draws_have_their_log_q_per_datum():
    """log q with an auxiliary site and an extra inner plate; log_score is the part that is not reparameterised."""

    def model(x):
        with pyro.plate("data", x.shape[0], dim=-2):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", x.shape[1], dim=-1):
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w + k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-2):
            pyro.sample("k", dist.Bernoulli(0.25))
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True), 0.5))
            with pyro.plate("features", x.shape[1], dim=-1):
                pyro.sample("w", dist.Normal(x, 0.3))

    x = data(4, 3)
    density = Density(Problem(model, args=(x,), guide=guide))
    with density, torch.no_grad():
        values, log_q, log_score = density.guide(5)
    assert {n: tuple(v.shape) for n, v in values.items()} == {"k": (5, 4), "z": (5, 4), "w": (5, 4, 3)}
    score = stats.bernoulli.logpmf(values["k"], 0.25)
    expected = score + norm(values["z"], x.mean(1), 0.5) + norm(values["w"], x, 0.3).sum(2)
    assert_close(log_q, expected)
    assert_close(log_score, score)


def test_an_auxiliary_site_of_the_guide_counts_in_log_q_and_is_no_latent():
    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a, 0.5))

    case = local()
    density = Density(Problem(case.model, args=case.args, guide=guide))
    with density, torch.no_grad():
        values, log_q, _ = density.guide(5)
    assert set(values) == {"z"}
    assert log_q.shape == (5, 6)


# -- evaluations -----------------------------------------------------------------------------------------------------


class Counter:
    """A model that counts its runs itself, in whole data sets, and cannot be batched over draws."""

    def __init__(self, discrete=False):
        self.runs = 0.0
        self.discrete = discrete

    def model(self, x):
        self.runs += len(x) / 6
        theta = pyro.param("theta", torch.tensor(0.1, dtype=F64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            bool(z.sum() > 0)  # control flow on a value: one run for each draw
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        loc = pyro.param("loc", torch.tensor(0.0, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((loc + x) / 2, 0.7))


def counted_run(counter, engine, monkeypatch):
    """The posterior, and the runs that the model counted between the start of `engine.run` and its end."""
    plain, seen = type(engine).run, {}

    def run(self, density, run):
        before = counter.runs
        try:
            return plain(self, density, run)
        finally:
            seen["runs"] = counter.runs - before

    monkeypatch.setattr(type(engine), "run", run)
    problem = Problem(counter.model, args=(X,), guide=counter.guide)
    return infer(problem, engine, backend="eager"), seen["runs"]


@pytest.mark.parametrize(
    "engine",
    [
        ImportanceSampling(num_samples=20, proposal="prior"),
        ImportanceSampling(num_samples=20, proposal="guide"),
        NUTS(num_samples=5, warmup_steps=5, num_chains=1),
        SVI(num_steps=12, num_samples=15, num_particles=3),
        SVI(num_steps=12, num_samples=15, batch_size=4),
        SVI(num_steps=12, num_samples=15, guide="AutoNormal"),
    ],
    ids=["is_prior", "is_guide", "nuts", "svi_particles", "svi_minibatch", "svi_auto"],
)
def test_evaluations_are_those_the_model_counts(engine, monkeypatch):
    """In whole data sets: a minibatch of 4 of 6 counts 4/6. Constraining and `deterministic` run the program but
    evaluate no density that an engine uses; they count as evaluations all the same."""
    posterior, runs = counted_run(Counter(), engine, monkeypatch)
    assert posterior.status.done, posterior.status
    assert posterior.cost.evaluations + posterior.cost.gradients == pytest.approx(runs, rel=1e-12)
    assert posterior.cost.tuning_evaluations <= posterior.cost.evaluations
    assert posterior.cost.tuning_gradients <= posterior.cost.gradients


def test_evaluations_do_not_depend_on_batching_or_tracing():
    """The same calls, vectorised and one by one, count alike."""
    counts = {}
    for name, case in (("batched", local()), ("plain", local())):
        density = Density(case.problem())
        density.vectorised = name == "batched"
        with density, torch.no_grad():
            density.log_joint(some_u(density, 4, 5))
            density.prior(7)
            density.value_and_grad(some_u(density, 3))
            density.compiled_value_and_grad(some_u(density, 2))(some_u(density, 2))
            with density.minibatch(INDEX):
                density.log_likelihood(some_u(density, 4))
        counts[name] = dict(density.counts)
    assert counts["batched"] == counts["plain"] == {"evaluations": 20 + 7 + 4 * 3 / 6, "gradients": 3 + 2}


@pytest.mark.parametrize(
    "learner",
    [EM(e_step=ImportanceSampling(num_samples=7, proposal="prior"), num_steps=3), SVI(num_steps=6, num_samples=8)],
    ids=["em", "svi"],
)
def test_learners_count_what_the_model_counts(learner, monkeypatch):
    counter, plain, seen = Counter(), type(learner).fit, {}

    def fit(self, density, run):
        before = counter.runs
        try:
            return plain(self, density, run)
        finally:
            seen["runs"] = counter.runs - before

    monkeypatch.setattr(type(learner), "fit", fit)
    result = learn(Problem(counter.model, args=(X,), guide=counter.guide), learner)
    assert result.status.done, result.status
    assert result.cost.evaluations + result.cost.gradients == pytest.approx(seen["runs"], rel=1e-12)


def test_ml_counts_minibatches_in_shares_of_the_data():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("theta", torch.tensor(0.0)), 1.0), obs=x)

    fit = learn(Problem(model, args=(X,)), ML(num_steps=30, batch_size=4))
    assert fit.cost.gradients == pytest.approx(30 * 4 / 6, rel=1e-12)
    assert fit.cost.evaluations == 0


# -- nothing is left behind ------------------------------------------------------------------------------------------


def test_building_and_using_a_density_leaves_no_trace():
    """Param store, random state, default dtype, and the program's parameters are as before."""

    def model(x):
        theta = pyro.param("theta", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pyro.param("mine", torch.tensor(3.0))
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    density = Density(Problem(model, args=(X,)))
    assert bool((torch.get_rng_state() == state).all())
    with density, torch.no_grad():
        density.log_joint(some_u(density, 2))
    assert torch.get_default_dtype() == dtype
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert bool((torch.get_rng_state() == state).all())


def test_a_density_may_be_entered_twice_and_closes_after_an_error():
    module = Decoder()
    density = Density(Problem(module.model, args=(data(4, 3).float(),)))
    seen = []

    def fail():
        with density, density:
            seen.append(module.raw.dtype)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [F64]
    assert module.raw.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_the_survey_runs_the_model_once():
    calls = []

    def model(x):
        calls.append(len(x))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    facts = survey_model(Problem(model, args=(X,)))
    assert calls == [6]
    assert (list(facts.sites), facts.data_plate.name) == (["mu", "x"], "data")


def test_the_prior_of_continuous_latents_sums_discrete_ones_out():
    """A label that z depends on belongs to the prior of z; the observations do not."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
            pyro.sample("x", dist.Normal(z + k, 0.5), obs=x)

    z = torch.linspace(-2, 4, 5, dtype=torch.float64)
    density = Density(Problem(model, args=(torch.arange(5.0),)))
    parts = [math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(z), math.log(0.3) + dist.Normal(2.0, 1.0).log_prob(z)]
    torch.testing.assert_close(density.log_prior(z[:, None]), torch.logaddexp(*parts), atol=1e-10, rtol=0)
    k = torch.tensor([0.0, 1, 0, 1, 1], dtype=torch.float64)
    given = torch.where(k > 0, parts[1], parts[0])
    torch.testing.assert_close(density.log_prior({"z": z, "k": k}), given, atol=1e-10, rtol=0)
