"""A Bayesian neural network of 161 weights: 6 inputs, one layer of 20 tanh units, one logit; 200 data.

    every weight and bias ~ N(0, 1),  y_n ~ Bernoulli(logits = tanh(x_n W + b) v + c)

Hidden units may be permuted and change sign, so single weights have many modes; the logits at ten new inputs have one
meaning in all of them, and they are what effective draws are counted for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _maths as maths
from ._data import exact, tensors

KIND = "posterior"
ROWS, INPUTS, HIDDEN = 200, 6, 20
SHAPES = {"w": (INPUTS, HIDDEN), "b": (HIDDEN,), "v": (HIDDEN,), "c": ()}


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(ROWS, INPUTS))
    logits = 2.0 * np.sin(x[:, 0] + x[:, 1]) + x[:, 2] * x[:, 3]
    return exact(x=x, y=(rng.random(ROWS) < 1 / (1 + np.exp(-logits))).astype(float))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([INPUTS, HIDDEN]).to_event(2))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([HIDDEN]).to_event(1))
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([HIDDEN]).to_event(1))
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        logits = torch.tanh(x @ w + b) @ v + c
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return Problem(model, args=tensors(data), name="neural network")


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([INPUTS, HIDDEN]).to_event(2))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([HIDDEN]).to_event(1))
        v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([HIDDEN]).to_event(1))
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
        logits = jnp.tanh(data["x"] @ w + b) @ v + c
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=data["y"])

    return model


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm

    with pm.Model() as model:
        w = pm.Normal("w", 0.0, 1.0, shape=(INPUTS, HIDDEN))
        b = pm.Normal("b", 0.0, 1.0, shape=HIDDEN)
        v = pm.Normal("v", 0.0, 1.0, shape=HIDDEN)
        c = pm.Normal("c", 0.0, 1.0)
        logits = pm.math.tanh(pm.math.dot(data["x"], w) + b) @ v + c
        pm.Bernoulli("y", logit_p=logits, observed=data["y"].astype(int))
    return model


def constrain(u: dict[str, Any], xp: Any) -> tuple[dict[str, Any], Any]:
    return u, 0.0


def log_joint(z: dict[str, Any], data: dict[str, Any], xp: Any) -> Any:
    logits = xp.tanh(data["x"] @ z["w"] + z["b"]) @ z["v"] + z["c"]
    prior = sum(maths.normal(value, 0.0, 1.0, xp).sum() for value in z.values())
    return prior + maths.bernoulli(data["y"], logits, xp).sum()


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x = np.random.default_rng(7).normal(size=(10, INPUTS))
    hidden = np.tanh(x @ z["w"] + z["b"][..., None, :])  # (C, S, 10, hidden)
    return {"logit": (hidden * z["v"][..., None, :]).sum(-1) + z["c"][..., None]}
