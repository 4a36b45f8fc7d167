"""Mistakes that people make, each with what they are told: who is to blame, and what to do, before any work is done.

Three kinds of answer. `ProblemError` for input that cannot be used at all; the status 'unsupported' for an engine that
does not serve a sound problem; the status 'failed' where only the run itself could tell. Never a finite-looking number.
"""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyrometer.benchmarks import compare
from pyrometer.inference import (
    EM,
    ML,
    NUTS,
    SVI,
    Enumeration,
    ImportanceSampling,
    Posterior,
    Problem,
    ProblemError,
    Quadrature,
    infer,
    learn,
    registry,
    why_not,
)

X = torch.linspace(-1, 1, 6)
PRIOR = ImportanceSampling(num_samples=50, proposal="prior")
GUIDE = ImportanceSampling(num_samples=50, proposal="guide")
LAPLACE = ImportanceSampling(num_samples=50, proposal="laplace")
SHORT_NUTS = NUTS(num_samples=5, warmup_steps=5, num_chains=1)
SHORT_SVI = SVI(num_steps=5, num_samples=50)


@pytest.fixture(autouse=True)
def worked(monkeypatch):
    """Which engines and learners were set to work."""
    done: list[str] = []

    def watch(cls, verb):
        plain = getattr(cls, verb)

        def method(self, density, run):
            done.append(cls.__name__)
            return plain(self, density, run)

        monkeypatch.setattr(cls, verb, method)

    for cls in registry.engines().values():
        watch(cls, "run")
    for cls in registry.learners().values():
        watch(cls, "fit")
    return done


# -- programs --------------------------------------------------------------------------------------------------------


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def centred(x):
    z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
    pyro.sample("x", dist.Normal(z, x.exp()).to_event(1), obs=x)


def local_guide(x):
    gain = pyro.param("gain", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(gain * x, 0.7))


def shared(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def learnable(x):
    theta = pyro.param("theta", torch.tensor(0.1))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, sd))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def learnable_observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0), obs=x)


def learnable_shared(x):
    mu = pyro.sample("mu", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def without_plate(x):
    mu = pyro.sample("mu", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
    pyro.sample("x", dist.Normal(mu.expand(len(x)), 1.0).to_event(1), obs=x)


def coins(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def counts_and_shifts(x):
    """A discrete latent whose support cannot be listed, beside a continuous one."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Poisson(3.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(k + w, 1.0), obs=x)


def flat(x):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def observing(likelihood):
    """A model whose data come from `likelihood(mu)`."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(mu), obs=x)

    return model


def with_latent(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def raises(x):
    raise KeyError("no such column")


def observes_nothing(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def two_of_a_name(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def one_name_in_a_loop(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for value in x:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=value)


def colliding_plates(x):
    with pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", 2, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plate_of_another_size(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def event_dim_forgotten(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def subsampled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=3) as rows:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])


def subsampled_by_index(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample=torch.arange(3)) as rows:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])


def subsampled_loop(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(x), subsample_size=3):
        pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=x[i])


def closes_over_data(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=X)


def dropout(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(nn.functional.dropout(z, 0.5, True), 1.0), obs=x)


def noisy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu + torch.randn(()), 1.0), obs=x)


def sometimes_another_site(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    if mu > 0:
        mu = mu + pyro.sample("nu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def changing_model():
    names = itertools.chain(["mu"], itertools.repeat("nu"))

    def model(x):
        mu = pyro.sample(next(names), dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    return model


def negative_scale(x):
    """A scale that may be negative: at half of the prior draws the density is not defined."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, mu), obs=x)


def vast_prior(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.tensor(1e308, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_lacking(x):
    pyro.param("gain", torch.tensor(0.5))


def guide_with_more(x):
    local_guide(x)
    with pyro.plate("data", len(x)):
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def guide_with_data(x):
    local_guide(x)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def guide_outside(x):
    pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))


def guide_in_another_plate(x):
    with pyro.plate("others", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def guide_of_another_shape(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None].expand(-1, 2), 0.7).to_event(1))


def guide_of_another_kind(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(torch.ones(3)))


def guide_that_subsamples(x):
    with pyro.plate("data", len(x), subsample_size=3):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def guide_without_arguments():
    pass


def on(model, *args, engine=PRIOR, **kwargs):
    """A call that infers: `infer(Problem(model, args), engine)`."""
    options = {k: kwargs.pop(k) for k in ("seed", "parameters", "warm", "device") if k in kwargs}
    return lambda: infer(Problem(model, args=args or (X,), **kwargs), engine, **options)


def learning(model, learner, *args, **kwargs):
    options = {k: kwargs.pop(k) for k in ("seed", "parameters", "device") if k in kwargs}
    return lambda: learn(Problem(model, args=args or (X,), **kwargs), learner, **options)


def paired(guide, engine=SHORT_SVI):
    return on(local, engine=engine, guide=guide)


def assert_said(pattern, text):
    assert re.search(pattern, text, re.DOTALL), text


NAN, INF = torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])


# -- refused: ProblemError, and nothing was run -----------------------------------------------------------------------

REFUSED = {
    # the problem
    "model is a name": (lambda: Problem("model"), r"^model: expected a Pyro callable, got str"),
    "model is a class": (on(nn.Linear, 3), r"model .*(class|Linear)"),
    "args is a tensor": (lambda: Problem(local, args=X), r"^args: expected a tuple, got Tensor.*args=\(x,\)"),
    "args is a list": (lambda: Problem(local, args=[X]), r"^args: expected a tuple, got list.*args=\(x,\)"),
    "args are too few": (lambda: infer(Problem(local), PRIOR), r"model failed .*missing 1 required .*'x'"),
    "kwargs is a list": (lambda: Problem(local, kwargs=["x"]), r"^kwargs: expected a dict, got list"),
    "held_out is a tensor": (lambda: Problem(local, (X,), held_out=X), r"^held_out: expected a tuple.*\(x,\)"),
    "guide is a name": (lambda: Problem(local, (X,), guide="AutoNormal"), r"^guide: .*SVI\(guide='AutoNormal'\)"),
    "guide is a class": (paired(autoguide.AutoNormal), r"guide.*(class|instance|SVI\(guide=)"),
    "reference is a number": (lambda: Problem(local, (X,), reference=3), r"^reference: expected a Reference .*int"),
    "m_step is a name": (lambda: Problem(local, (X,), m_step="closed"), r"^m_step: expected a function .*str"),
    "infer without Problem": (lambda: infer(local, PRIOR), r"expected a Problem, got function.*args=\(x,\)"),
    "learn without Problem": (lambda: learn(local, ML()), r"expected a Problem, got function.*args=\(x,\)"),
    "why_not without Problem": (lambda: why_not(local, PRIOR), r"expected a Problem, got function"),
    "compare without Problem": (lambda: compare(local, [PRIOR]), r"expected a Problem, got function"),
    # the data
    "no data": (lambda: Problem(local, args=(torch.zeros(0),)), r"args\[0\] is empty, shape \(0,\)"),
    "no rows": (lambda: Problem(local, args=(X, torch.zeros(0, 3))), r"args\[1\] is empty, shape \(0, 3\)"),
    "no data by keyword": (lambda: Problem(local, kwargs={"x": torch.zeros(0)}), r"kwargs\['?x'?\] is empty"),
    "a DataLoader": (on(centred, DataLoader(TensorDataset(X))), r"not a DataLoader.*batch_size="),
    "an array of numpy": (on(centred, X.numpy()), r"torch\.as_tensor\(x\)"),
    "nan in the data": (on(local, NAN), r"site 'x'.*contains NaN \(1 of 2\).*poutine\.mask"),
    "inf in the data": (on(local, INF), r"site 'x'.*(inf|finite)"),
    "data of another shape": (on(shared, torch.zeros(6, 2)), r"site 'x'.*\(6, 2\).*\[6\]"),
    "plate of another size": (on(plate_of_another_size), r"site 'x'.*\(6,\).*\[5\]"),
    "whole numbers for a network": (
        on(lambda x: shared(nn.Linear(1, 1)(x[:, None])[:, 0]), torch.tensor([1, 2, 3])),
        r"model failed .*(Long|int64).*(Float|float)",
    ),
    "float data for a categorical": (
        on(observing(lambda mu: dist.Categorical(logits=mu * torch.ones(3))), torch.tensor([0.0, 5.0])),
        r"site 'x'.*Categorical",
    ),
    "category out of range": (
        on(observing(lambda mu: dist.Categorical(logits=mu * torch.ones(3))), torch.tensor([0, 5])),
        r"site 'x'.*Categorical.*support.*.*5",
    ),
    "two for a coin": (
        on(observing(lambda mu: dist.Bernoulli(logits=mu)), torch.tensor([0.0, 2.0])),
        r"site 'x'.*Bernoulli.*support.*.*2",
    ),
    "negative count": (
        on(observing(lambda mu: dist.Poisson(mu.exp())), torch.tensor([3.0, -1.0])),
        r"site 'x'.*Poisson.*support.*.*-1",
    ),
    "negative duration": (
        on(observing(lambda mu: dist.Gamma(mu.exp(), 1.0)), torch.tensor([3.0, -1.0])),
        r"site 'x'.*Gamma.*support.*.*-1",
    ),
    "data that require gradients": (on(local, X.clone().requires_grad_()), r"argument 0.*detach"),
    "a dict of data that require gradients": (
        on(lambda d: local(d["x"]), {"x": X.clone().requires_grad_()}),
        r"argument 0.*detach",
    ),
    "data as an array": (on(local, X.numpy()), r"site 'x'.*[Tt]ensor"),
    "data as a list": (on(local, [1.0, 2.0]), r"site 'x'.*[Tt]ensor"),
    "an observation as a number": (
        on(lambda x: shared(x) or pyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0)),
        r"'y'.*[Tt]ensor",
    ),
    # the model
    "model that raises": (on(raises), r"model failed .*\(6,\).*KeyError.*no such column"),
    "nothing observed": (on(observes_nothing), r"observes nothing.*obs="),
    "two sites of one name": (on(two_of_a_name), r"two sample sites are named 'z'"),
    "one site name in a loop": (on(one_name_in_a_loop), r"two sample sites are named 'x'"),
    "two plates at one dim": (on(colliding_plates), r"model failed .*plates .*collide at dim=-1.*dim=-2"),
    "to_event forgotten": (on(event_dim_forgotten), r"model failed .*plate\('data'\).*z"),
    "own subsample size": (on(subsampled), r"plate 'data' subsamples 3 of 6.*batch_size"),
    "own subsample": (on(subsampled_by_index), r"plate 'data' subsamples 3 of 6.*batch_size"),
    "own subsample in a loop": (on(subsampled_loop), r"plate 'data' subsamples 3 of 6.*batch_size"),
    "dropout in the model": (on(dropout), r"random"),
    "noise in the model": (on(noisy, engine=SHORT_NUTS), r"random"),
    "a latent hidden by block": (on(poutine.block(local, hide=["z"])), r"random"),
    "a site that comes and goes": (on(sometimes_another_site), r"site 'nu'.*(some|always)"),
    "a site that changes its name": (on(changing_model()), r"site '(nu|mu)'.*(some|always)"),
    # the guide
    "guide lacks a site": (paired(guide_lacking), r"guide lacks site 'z'.*sample it there"),
    "guide lacks a site, importance": (paired(guide_lacking, GUIDE), r"guide lacks site 'z'"),
    "guide with another site": (paired(guide_with_more), r"guide site 'extra' is not a latent site of the model \(z\)"),
    "guide with an observed site": (paired(guide_with_data), r"guide site 'x' is not a latent site"),
    "guide outside the plate": (paired(guide_outside), r"guide site 'z' .*plate 'data'.*(SVI\(guide=|same plate)"),
    "guide in another plate": (paired(guide_in_another_plate), r"guide site 'z' .*plate 'data'"),
    "guide of another shape": (paired(guide_of_another_shape), r"guide site 'z' has shape \(6, 2\).*\(6,\)"),
    "discrete guide for a continuous latent": (paired(guide_of_another_kind), r"guide site 'z'.*(discrete|support)"),
    "continuous guide for a discrete latent": (
        on(coins, engine=SHORT_SVI, guide=local_guide),
        r"guide site 'z'.*(discrete|support)",
    ),
    "guide that subsamples": (paired(guide_that_subsamples), r"plate 'data' subsamples 3 of 6"),
    "guide of other arguments": (paired(guide_without_arguments), r"guide failed .*positional argument"),
    "no guide to propose from": (on(local, engine=GUIDE), r"problem 'local' has no guide: pass guide="),
    # seeds and devices
    **{
        f"seed {seed!r}": (on(local, seed=seed), r"seed = .*whole number from 0 to 2\*\*64 - 1")
        for seed in (-1, 2**64, 1.5, True, "0", None)
    },
    "seed to learn": (learning(learnable, SVI(), seed=-1), r"seed = -1.*from 0 to"),
    "seed to compare": (lambda: compare(Problem(local, (X,)), [PRIOR], seed=-1), r"seed = -1.*from 0 to"),
    "unknown device": (on(local, device="gpu"), r"device='gpu'"),
    "another kind of device": (on(local, device="meta"), r"device='meta'.*'cpu' or 'cuda'"),
    # engines and learners
    "unknown engine": (on(local, engine="nutz"), r"no engine 'nutz'.*'nuts'"),
    "unknown engine, far": (on(local, engine="oracle"), r"no engine 'oracle'.*There are: .*enumeration"),
    "no engine": (on(local, engine=None), r"None is no engine: pass an instance"),
    "engine is a function": (on(local, engine=local), r"is no engine: pass an instance"),
    "unknown learner": (learning(learnable, "emm"), r"no learner 'emm'.*'em'"),
    "engine that learns nothing": (learning(learnable, SHORT_NUTS), r"NUTS.* is no learner"),
    "unknown engine to compare": (lambda: compare(Problem(local, (X,)), ["nutz"]), r"no engine 'nutz'.*'nuts'"),
    "no engine to compare": (lambda: compare(Problem(local, (X,)), []), r"engines: none given"),
    "unknown learner to compare": (
        lambda: compare(Problem(learnable, (X,)), [PRIOR], learn="emm"),
        r"no learner 'emm'.*'em'",
    ),
    "unknown E-step": (lambda: EM(e_step="nutz"), r"no engine 'nutz'.*'nuts'"),
    # settings: their names
    "settings by position": (lambda: NUTS(100), r"NUTS takes settings by name: num_samples"),
    "typo": (lambda: NUTS(num_sample=100), r"NUTS has no setting 'num_sample'.*'num_samples'"),
    "PyMC's draws": (lambda: NUTS(draws=100), r"NUTS has no setting 'draws'.*'num_samples'"),
    "PyMC's tune": (lambda: NUTS(tune=100), r"NUTS has no setting 'tune'.*'warmup_steps'"),
    "PyMC's chains": (lambda: NUTS(chains=2), r"NUTS has no setting 'chains'.*'num_chains'"),
    "PyMC's target_accept": (lambda: NUTS(target_accept=0.9), r"'target_accept'.*'target_acceptance'"),
    "Stan's iter_sampling": (lambda: NUTS(iter_sampling=100), r"'iter_sampling'.*'num_samples'"),
    "Stan's iter_warmup": (lambda: NUTS(iter_warmup=100), r"'iter_warmup'.*'warmup_steps'"),
    "Stan's adapt_delta": (lambda: NUTS(adapt_delta=0.9), r"'adapt_delta'.*'target_acceptance'"),
    "Stan's max_treedepth": (lambda: NUTS(max_treedepth=5), r"'max_treedepth'.*'max_tree_depth'"),
    "NumPyro's num_warmup": (lambda: NUTS(num_warmup=100), r"'num_warmup'.*'warmup_steps'"),
    "Pyro's lr": (lambda: SVI(lr=0.1), r"SVI has no setting 'lr'.*'learning_rate'"),
    "seed as a setting": (lambda: NUTS(seed=1), r"NUTS has no setting 'seed'.*infer\("),
    # settings: their values
    **{
        f"{cls.__name__}({name}={value!r})": (
            lambda cls=cls, name=name, value=value: cls(**{name: value}),
            rf"{cls.__name__}\({name}=.*expected",
        )
        for cls, name, values in (
            (NUTS, "num_samples", (0, -1, 1.5, 10.0, True, "5", None)),
            (NUTS, "num_chains", (0, -2)),
            (NUTS, "warmup_steps", (-1, 2.5)),
            (NUTS, "target_acceptance", (0.0, 1.0, math.nan, "high")),
            (NUTS, "max_tree_depth", (0, 2.5, True)),
            (NUTS, "initial_tries", (0,)),
            (SVI, "num_particles", (0, -1, 1.5, False)),
            (SVI, "num_steps", (0, -1)),
            (SVI, "batch_size", (0, -3, 2.5)),
            (SVI, "learning_rate", (0, -0.1, math.nan, math.inf, "fast")),
            (SVI, "guide", ("AutoNormall", 3)),
            (SVI, "optimizer", ("Adam", None)),
            (ImportanceSampling, "num_samples", (0, -1)),
            (ImportanceSampling, "degrees", (0, -1, math.nan)),
            (ImportanceSampling, "proposal", ("piror",)),
            (Quadrature, "num_nodes", (0, 2.5)),
            (Quadrature, "max_nodes", (0,)),
            (Enumeration, "max_values", (0, 1.5)),
            (EM, "num_steps", (0,)),
            (EM, "gradient_steps", (0, 1.5)),
            (EM, "m_step", ("close",)),
            (EM, "tolerance", (-1.0, "small")),
            (EM, "optimizer", ("Adam",)),
            (ML, "learning_rate", (-1.0,)),
        )
        for value in values
    },
    # minibatches
    "batch larger than the data": (paired(local_guide, SVI(num_steps=5, batch_size=7)), r"batch_size = 7.*6 data"),
    "batch larger than the data, EM": (learning(learnable, EM(num_steps=3, batch_size=7)), r"batch_size = 7.*6 data"),
    "batch larger than the data, ML": (
        learning(learnable_observed, ML(num_steps=3, batch_size=7)),
        r"batch_size = 7.*6 data",
    ),
    "batch without a plate": (on(without_plate, engine=SVI(num_steps=5, batch_size=3)), r"plate.*batch_size=None"),
    "batch without a plate, learning": (
        learning(without_plate, SVI(num_steps=5, batch_size=3)),
        r"plate.*batch_size=None",
    ),
    "batches of data closed over": (
        on(closes_over_data, engine=SVI(num_steps=5, batch_size=3)),
        r"(3 of 6 rows|3 rows).*",
    ),
    "batches without data in args": (
        lambda: infer(Problem(lambda: closes_over_data(None)), SVI(num_steps=5, batch_size=3)),
        r"no argument has plate 'data'.*args",
    ),
    # parameters
    "parameter misspelt": (on(learnable, parameters={"thta": 1.0}), r"no parameter 'thta'.*'theta'"),
    "parameter of no model": (on(local, parameters={"theta": 1.0}), r"no parameter 'theta'.*none"),
    "parameter misspelt, learning": (
        learning(learnable, SHORT_SVI, parameters={"thta": 1.0}),
        r"no parameter 'thta'.*'theta'",
    ),
    "parameter of another shape": (on(learnable, parameters={"theta": torch.zeros(2)}), r"'theta'.*\(\), got \(2,\)"),
    "parameter outside its constraint": (on(learnable, parameters={"sd": -1.0}), r"'sd'.*outside.*0"),
    "parameter not a number": (on(learnable, parameters={"theta": math.nan}), r"'theta'.*(outside|nan|finite)"),
    "parameter infinite": (on(learnable, parameters={"theta": math.inf}), r"'theta'.*(outside|inf|finite)"),
    "parameter is a word": (on(learnable, parameters={"theta": "big"}), r"'theta'"),
    "parameter is None": (on(learnable, parameters={"theta": None}), r"'theta'"),
    "parameters without names": (on(learnable, parameters=[1.0]), r"^parameters.*(mapping|dict|name)"),
    "parameters by number": (on(learnable, parameters={0: 1.0}), r"no parameter 0"),
    "nothing to learn": (learning(local, SHORT_SVI), r"problem 'local' has no parameters to learn.*pyro\.param"),
    "nothing to learn, EM": (learning(local, EM()), r"problem 'local' has no parameters to learn"),
    "no closed M-step": (
        learning(learnable, EM(m_step="closed")),
        r"'learnable' declares no closed-form M-step.*m_step=",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused_before_anything_runs(name, worked):
    call, message = REFUSED[name]
    with pytest.raises(ProblemError) as caught:
        call()
    assert_said(message, str(caught.value))
    assert worked == []


# -- refused: what an earlier answer cannot be used for ---------------------------------------------------------------


def answer(engine, x=X, model=local, **kwargs):
    posterior = infer(Problem(model, args=(x,), **kwargs), engine)
    assert posterior.status.done, posterior.status
    return posterior


def failed_answer():
    """A sound problem on which this run found no start."""
    huge = torch.tensor([1e200, 1e200], dtype=torch.float64)
    posterior = infer(Problem(local, args=(huge,)), SHORT_NUTS)
    assert posterior.status.state == "failed"
    return posterior


FROM_EARLIER = {
    "warm start on other data": (
        lambda: on(local, engine=SHORT_NUTS, warm=answer(SHORT_NUTS, X[:5])),
        r"warm start.*\(1, 5, 1\).*\(1, 6, 1\)",
    ),
    "warm start with other chains": (
        lambda: on(local, engine=NUTS(num_samples=5, warmup_steps=5, num_chains=2), warm=answer(SHORT_NUTS)),
        r"warm start.*num_chains",
    ),
    "warm start of a guide on other data": (
        lambda: on(local, engine=SHORT_SVI, warm=answer(SHORT_SVI, X[:5])),
        r"warm start.*AutoNormal",
    ),
    "warm start of another family": (
        lambda: on(
            local,
            engine=SVI(num_steps=5, num_samples=5, guide="AutoMultivariateNormal"),
            warm=answer(SHORT_SVI),
        ),
        r"warm start.*AutoMultivariateNormal",
    ),
    "warm start from another engine": (
        lambda: on(local, engine=SHORT_NUTS, warm=answer(SHORT_SVI)),
        r"warm.*(svi|SVI).*(nuts|NUTS)",
    ),
    "warm start from another engine, SVI": (
        lambda: on(local, engine=SHORT_SVI, warm=answer(SHORT_NUTS)),
        r"warm.*(nuts|svi|AutoNormal)",
    ),
    "warm start from a failed run": (
        lambda: on(local, engine=SHORT_NUTS, warm=failed_answer()),
        r"warm.*(no draws|failed|state)",
    ),
    "warm start from a dict": (lambda: on(local, engine=SHORT_NUTS, warm={"position": X}), r"warm.*[Pp]osterior"),
    "proposal without draws": (
        lambda: on(local, engine=ImportanceSampling(proposal=failed_answer())),
        r"proposal has no draws.*failed",
    ),
    "proposal fitted on other data": (
        lambda: on(local, engine=ImportanceSampling(proposal=answer(SHORT_NUTS, X[:5]))),
        r"proposal.*(site 'z'|batch|data|shape)",
    ),
    "proposal fitted on another model": (
        lambda: on(shared, engine=ImportanceSampling(proposal=answer(SHORT_NUTS))),
        r"proposal.*'(mu|z)'",
    ),
    "proposal by a guide fitted on other data": (
        lambda: on(local, engine=ImportanceSampling(proposal=answer(SHORT_SVI, X[:5]))),
        r"proposal.*(site 'z'|batch|data|shape|AutoNormal)",
    ),
    "parameters by a posterior": (
        lambda: on(learnable, parameters=answer(PRIOR, model=learnable)),
        r"^parameters.*(mapping|dict|name|Fit)",
    ),
}


@pytest.mark.parametrize("name", FROM_EARLIER)
def test_earlier_answers_that_do_not_fit_are_refused(name, worked):
    make, message = FROM_EARLIER[name]
    call = make()
    worked.clear()
    with pytest.raises(ProblemError) as caught:
        call()
    assert_said(message, str(caught.value))


# -- unsupported: a sound problem, another engine ---------------------------------------------------------------------

UNSUPPORTED = {
    "nuts on coins": (on(coins, engine=SHORT_NUTS), r"discrete.*enumeration"),
    "nuts on counts": (on(counts_and_shifts, engine=SHORT_NUTS), r"site 'k'.*(summed out|listed)"),
    "svi on counts": (on(counts_and_shifts, engine=SHORT_SVI), r"site 'k' cannot be summed out.*guide"),
    "autoguide on coins": (on(coins, engine=SVI(guide="AutoNormal")), r"AutoNormal needs continuous latents.*guide"),
    "laplace on coins": (on(coins, engine=LAPLACE), r"discrete.*proposal='prior'"),
    "laplace on counts": (on(counts_and_shifts, engine=LAPLACE), r"site 'k'"),
    "enumeration of a line": (on(local, engine=Enumeration()), r"site 'z' is continuous"),
    "enumeration of counts": (
        on(with_latent(lambda: dist.Poisson(3.0)), engine=Enumeration()),
        r"site 'z'.*(infinite|listed)",
    ),
    "enumeration of too many values": (on(coins, engine=Enumeration(max_values=1)), r"2 joint values.*max_values = 1"),
    "quadrature on coins": (on(coins, engine=Quadrature()), r"discrete; enumeration"),
    "quadrature in many dimensions": (
        on(lambda x: shared(x) or pyro.sample("w", dist.Normal(torch.zeros(9), 1.0)), engine=Quadrature()),
        r"10 dimensions.*max_nodes",
    ),
    "prior draws of a flat prior": (on(flat), r"site 'mu' has an improper prior"),
    "nothing latent": (on(learnable_observed), r"no latent sites.*learn\(problem, ML\(\)\)"),
    "proposal engine that cannot": (
        on(coins, engine=ImportanceSampling(proposal=SHORT_NUTS)),
        r"proposal engine cannot run: .*discrete",
    ),
    "ML on latents": (learning(learnable, ML()), r"site 'z' is latent.*EM or SVI"),
    "EM without latents": (learning(learnable_observed, EM()), r"no latent sites.*ML\(\)"),
    "EM by enumeration of a line": (learning(learnable, EM(e_step=Enumeration())), r"E-step cannot run: site 'z'"),
    "EM on minibatches of shared latents": (
        learning(learnable_shared, EM(num_steps=3, batch_size=3)),
        r"minibatches.*global latents",
    ),
    "autoguide on minibatches beside shared latents": (
        on(
            lambda x: pyro.sample("mu", dist.Normal(0.0, 1.0)) is None or local(x),
            engine=SVI(num_steps=5, batch_size=3, guide="AutoNormal"),
        ),
        r"site 'z'.*batch_size=None",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_engine_that_does_not_serve_says_why_and_does_not_run(name, worked):
    call, reason = UNSUPPORTED[name]
    result = call()
    assert result.status.state == "unsupported"
    assert worked == []
    assert_said(reason, result.status.reason)
    posterior = result if isinstance(result, Posterior) else result.posterior
    assert posterior is None or (posterior.draws == {} and posterior.log_evidence is None)


# -- failed: only the run can tell ------------------------------------------------------------------------------------

FAR = torch.tensor([1e308, 1.0], dtype=torch.float64)

FAILED = {
    **{
        f"data of 1e308 by {name}": (on(local, FAR, engine=engine), r"finite|zero|undefined|inf")
        for name, engine in (
            ("prior", PRIOR),
            ("laplace", LAPLACE),
            ("svi", SHORT_SVI),
            ("quadrature", Quadrature()),
        )
    },
    "a prior of 1e308 sampled": (on(vast_prior), r"zero|undefined|finite"),
    "a prior of 1e308 sampled by nuts": (on(vast_prior, engine=SHORT_NUTS), r"finite"),
    "a scale that may be negative": (on(negative_scale), r"nan|NaN|undefined|not defined"),
    "a scale that may be negative, SVI": (on(negative_scale, engine=SVI(num_steps=200)), r"nan|NaN|undefined"),
}


def test_a_datum_without_density_spoils_no_other_where_each_has_its_own_chains():
    posterior = on(local, FAR, engine=SHORT_NUTS)()
    assert posterior.status.done
    assert posterior.diagnostics.level == "bad"
    assert "not finite at datum 0: its draws mean nothing" in posterior.diagnostics.verdict
    assert bool((posterior.draws["z"][..., 1].std(1) > 0).all())


@pytest.mark.parametrize("name", FAILED)
def test_what_breaks_in_the_run_is_a_failed_status_with_the_reason(name):
    call, reason = FAILED[name]
    result = call()
    assert result.status.state == "failed"
    assert_said(reason, result.status.reason)
    assert result.draws == {}
    assert result.log_evidence is None


SUPPORTS = {
    "exponential": lambda: dist.Exponential(1.0),
    "gamma": lambda: dist.Gamma(2.0, 1.0),
    "half-normal": lambda: dist.HalfNormal(1.0),
    "beta": lambda: dist.Beta(1.0, 1.0),
    "uniform": lambda: dist.Uniform(0.0, 1.0),
}


@pytest.mark.parametrize("engine", [SHORT_SVI, GUIDE], ids=["svi", "importance"])
@pytest.mark.parametrize("name", SUPPORTS)
def test_a_guide_that_leaves_the_support_gives_no_finite_looking_answer(name, engine):
    """A normal guide for a latent that lives above zero: formulas go on below zero, the density does not.

    Refused, or failed, or, for importance sampling, right: draws outside have weight zero, and the evidence is that of
    the draws inside."""
    problem = Problem(with_latent(SUPPORTS[name]), args=(X,), guide=local_guide)
    try:
        posterior = infer(problem, engine)
    except ProblemError as error:
        assert_said(r"guide site 'z'.*support", str(error))
        return
    if posterior.status.done and engine is GUIDE:
        outside = posterior.draws["z"] < 0
        assert float(posterior.weights()[outside].sum()) == 0.0
        assert bool((posterior.log_weights[outside] == -math.inf).all())
        return
    assert posterior.status.state == "failed"
    assert_said(r"support|-?inf|nan", posterior.status.reason)


# -- and what is no mistake -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine", [PRIOR, LAPLACE, GUIDE, SHORT_NUTS, SHORT_SVI, Quadrature()], ids=lambda e: f"{e.name}"
)
def test_one_datum_is_enough(engine):
    posterior = infer(Problem(local, args=(X[:1],), guide=local_guide), engine)
    assert posterior.status.done, posterior.status
    assert tuple(posterior.batch_shape) == (1,)
    assert posterior.draws["z"].shape[2:] == (1,)


def test_one_datum_is_enough_to_learn_from():
    fit = learn(Problem(learnable_observed, args=(X[:1],)), ML())
    assert fit.status.done, fit.status
    assert float(fit.parameters["theta"]) == pytest.approx(float(X[0]), abs=1e-5)


def test_whole_numbers_and_booleans_may_be_observed():
    """Counts are whole numbers; a normal takes them as they are."""
    exact = infer(Problem(local, args=(torch.tensor([1, 2]),)), Quadrature())
    floats = infer(Problem(local, args=(torch.tensor([1.0, 2.0]),)), Quadrature())
    assert torch.equal(exact.log_evidence.value, floats.log_evidence.value)
    counts = infer(Problem(observing(lambda mu: dist.Poisson(mu.exp())), args=(torch.tensor([1, 2]),)), PRIOR)
    assert counts.status.done, counts.status


def test_a_constant_column_is_data():
    posterior = infer(Problem(shared, args=(torch.zeros(6),)), Quadrature())
    assert float(posterior.mean("mu")) == pytest.approx(0.0, abs=1e-9)
    assert float(posterior.sd("mu")) == pytest.approx(7**-0.5, rel=1e-6)


def test_seeds_of_every_size_and_numpy_are_seeds():
    for seed in (0, 2**64 - 1, np.int64(3)):
        assert infer(Problem(local, args=(X,)), PRIOR, seed=seed).status.done


def test_quadrature_and_laplace_see_a_vast_prior_as_flat():
    """Evidence of N(z, 1) under a prior of sd 1e308: log N(x; 0, 1e308) = -log(1e308) - log(2 pi) / 2, to 1e-6."""
    posterior = infer(Problem(vast_prior, args=(X,)), Quadrature())
    expected = -math.log(1e308) - 0.5 * math.log(2 * math.pi)
    assert posterior.log_evidence.value.tolist() == pytest.approx([expected] * 6, abs=1e-6)
    assert posterior.mean("z").tolist() == pytest.approx(X.tolist(), abs=1e-6)


def test_a_guide_with_a_fault_stops_only_the_engines_that_ask_for_it():
    posterior = infer(Problem(local, args=(X,), guide=guide_with_more), PRIOR)
    assert posterior.status.done, posterior.status


def test_reasons_are_told_without_a_run(worked):
    """`why_not` answers as `infer` would, and costs a few runs of the model only."""
    assert why_not(Problem(local, args=(X,)), PRIOR) == ""
    assert "improper prior" in why_not(Problem(flat, args=(X,)), PRIOR)
    with pytest.raises(ProblemError, match="contains NaN"):
        why_not(Problem(local, args=(NAN,)), PRIOR)
    assert worked == []


def test_a_row_of_a_comparison_says_why_an_engine_did_not_run(worked):
    comparison = compare(Problem(local, args=(X,)), [Enumeration(), Quadrature()])
    states = {row.engine: row.status for row in comparison.rows}
    assert [s.state for s in states.values()] == ["unsupported", "done"]
    assert "continuous" in next(iter(states.values())).reason
    assert worked == ["Quadrature"]


def test_a_latent_whose_support_has_no_map_is_named():
    """The components of this mixture have supports of their own."""

    def model():
        mixing = dist.Categorical(torch.tensor([0.5, 0.5]))
        pyro.sample("z", dist.MixtureSameFamily(mixing, dist.Uniform(torch.tensor([-1.0, 1.0]), 2.0)))

    with pytest.raises(ProblemError, match="site 'z': torch knows no map onto the support of MixtureSameFamily"):
        infer(Problem(model), NUTS())
