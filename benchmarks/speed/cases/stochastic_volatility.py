"""Stochastic volatility over 500 steps: 503 latents.

    mu ~ N(0, 2),  (phi + 1) / 2 ~ Beta(20, 1.5),  sigma ~ HalfNormal(0.5)
    x_1 ~ N(0, 1 / sqrt(1 - phi^2)),  x_t ~ N(phi x_{t-1}, 1),  y_t ~ N(0, exp((mu + sigma x_t) / 2))

The log volatility is mu + sigma x, the form of Kastner & Fruehwirth-Schnatter 2014 (doi:10.1016/j.csda.2013.01.002)
that is non-centred in mu and sigma. The walk is one vector with its density as a factor: nothing loops over time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _maths as maths
from ._data import exact, tensors

KIND = "posterior"
STEPS = 500
SHAPES = {"mu": (), "rho": (), "sigma": (), "x": (STEPS,)}  # rho = (phi + 1) / 2
LOG_BETA = math.lgamma(20.0) + math.lgamma(1.5) - math.lgamma(21.5)


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    mu, phi, sigma = -1.0, 0.95, 0.25
    x = np.empty(STEPS)
    x[0] = rng.normal() / math.sqrt(1 - phi**2)
    for t in range(1, STEPS):
        x[t] = phi * x[t - 1] + rng.normal()
    return exact(y=np.exp(0.5 * (mu + sigma * x)) * rng.normal(size=STEPS))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        phi = 2 * pyro.sample("rho", dist.Beta(20.0, 1.5)) - 1
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        x = pyro.sample("x", dist.Normal(y.new_zeros(STEPS), 1.0).to_event(1).mask(False))  # Pyro starts from draws
        first = dist.Normal(0.0, (1 - phi**2).rsqrt()).log_prob(x[0])
        pyro.factor("walk", first + dist.Normal(phi * x[:-1], 1.0).log_prob(x[1:]).sum())
        with pyro.plate("steps", STEPS):
            pyro.sample("y", dist.Normal(0.0, ((mu + sigma * x) / 2).exp()), obs=y)

    return Problem(model, args=tensors(data), name="stochastic volatility")


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        phi = 2 * numpyro.sample("rho", dist.Beta(20.0, 1.5)) - 1
        sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (STEPS,)))
        first = dist.Normal(0.0, 1 / jnp.sqrt(1 - phi**2)).log_prob(x[0])
        numpyro.factor("walk", first + dist.Normal(phi * x[:-1], 1.0).log_prob(x[1:]).sum())
        numpyro.sample("y", dist.Normal(0.0, jnp.exp((mu + sigma * x) / 2)), obs=data["y"])

    return model


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm

    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 2.0)
        phi = 2 * pm.Beta("rho", 20.0, 1.5) - 1
        sigma = pm.HalfNormal("sigma", 0.5)
        x = pm.Flat("x", shape=STEPS)
        pm.Potential("first", pm.logp(pm.Normal.dist(0.0, 1 / pm.math.sqrt(1 - phi**2)), x[0]))
        pm.Potential("walk", pm.logp(pm.Normal.dist(phi * x[:-1], 1.0), x[1:]).sum())
        pm.Normal("y", 0.0, pm.math.exp((mu + sigma * x) / 2), observed=data["y"])
    return model


def constrain(u: dict[str, Any], xp: Any) -> tuple[dict[str, Any], Any]:
    rho = 1 / (1 + xp.exp(-u["rho"]))
    z = {**u, "rho": rho, "sigma": xp.exp(u["sigma"])}
    return z, u["sigma"] + xp.log(rho) + xp.log1p(-rho)


def log_joint(z: dict[str, Any], data: dict[str, Any], xp: Any) -> Any:
    phi, x = 2 * z["rho"] - 1, z["x"]
    return (
        maths.normal(z["mu"], 0.0, 2.0, xp)
        + 19.0 * xp.log(z["rho"])
        + 0.5 * xp.log1p(-z["rho"])
        - LOG_BETA
        + maths.half_normal(z["sigma"], 0.5, xp)
        + maths.normal(x[0], 0.0, (1 - phi**2) ** -0.5, xp)
        + maths.normal(x[1:], phi * x[:-1], 1.0, xp).sum()
        + maths.normal(data["y"], 0.0, xp.exp((z["mu"] + z["sigma"] * x) / 2), xp).sum()
    )


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    volatility = z["mu"][..., None] + z["sigma"][..., None] * z["x"]
    return {"mu": z["mu"], "phi": 2 * z["rho"] - 1, "sigma": z["sigma"], "log volatility": volatility}
