"""A mixture of three normals in the plane, labels summed out: 10 latents, 500 data.

    weight ~ Dirichlet(5, 5, 5),  left ~ N(-2, 1),  gap_1, gap_2 ~ LogNormal(log 2, 0.25),  high_k ~ N(0, 2),
    spread_d ~ LogNormal(0, 0.25)
    loc = left + (0, gap_1, gap_1 + gap_2)
    p(y_n) = sum_k weight_k N(y_n1; loc_k, spread_1) N(y_n2; high_k, spread_2)

Components are ordered by their first coordinate, through positive gaps, so that labels cannot switch, and share their
spread, so that none can cover two clusters: of 40 climbs from random starts all ended at one mode.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _maths as maths
from ._data import exact, tensors

KIND = "posterior"
ROWS = 500
LOG_2 = math.log(2.0)
LOG_DIRICHLET = math.lgamma(15.0) - 3 * math.lgamma(5.0)
SHAPES = {"weight": (2,), "left": (), "gap": (2,), "high": (3,), "spread": (2,)}


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    label = rng.choice(3, ROWS, p=[0.3, 0.45, 0.25])
    centre = np.array([[-2.0, 0.5], [0.0, -1.0], [2.0, 1.5]])
    return exact(y=centre[label] + rng.normal(size=(ROWS, 2)) * np.array([1.0, 0.8]))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(y: torch.Tensor) -> None:
        weight = pyro.sample("weight", dist.Dirichlet(torch.full((3,), 5.0, dtype=y.dtype)))
        left = pyro.sample("left", dist.Normal(-2.0, 1.0))
        gap = pyro.sample("gap", dist.LogNormal(LOG_2, 0.25).expand([2]).to_event(1))
        high = pyro.sample("high", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 0.25).expand([2]).to_event(1))
        loc = torch.cat([left[None], left + gap.cumsum(0)])
        components = dist.Normal(torch.stack([loc, high], -1), spread).to_event(1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weight), components), obs=y)

    return Problem(model, args=tensors(data), name="mixture")


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        weight = numpyro.sample("weight", dist.Dirichlet(jnp.full(3, 5.0)))
        left = numpyro.sample("left", dist.Normal(-2.0, 1.0))
        gap = numpyro.sample("gap", dist.LogNormal(LOG_2, 0.25).expand([2]).to_event(1))
        high = numpyro.sample("high", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        spread = numpyro.sample("spread", dist.LogNormal(0.0, 0.25).expand([2]).to_event(1))
        loc = jnp.concatenate([left[None], left + jnp.cumsum(gap)])
        components = dist.Normal(jnp.stack([loc, high], -1), spread).to_event(1)
        numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weight), components), obs=data["y"])

    return model


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm
    from pymc.math import concatenate, logsumexp, stack

    with pm.Model() as model:
        weight = pm.Dirichlet("weight", np.full(3, 5.0))
        left = pm.Normal("left", -2.0, 1.0)
        gap = pm.LogNormal("gap", LOG_2, 0.25, shape=2)
        high = pm.Normal("high", 0.0, 2.0, shape=3)
        spread = pm.LogNormal("spread", 0.0, 0.25, shape=2)
        loc = concatenate([left[None], left + gap.cumsum()])
        components = pm.logp(pm.Normal.dist(stack([loc, high], -1), spread), data["y"][:, None, :]).sum(-1)
        pm.Potential("y", logsumexp(pm.math.log(weight) + components, axis=1).sum())
    return model


def constrain(u: dict[str, Any], xp: Any) -> tuple[dict[str, Any], Any]:
    """The weights break a stick, the first piece even where u = 0."""
    z, log_jacobian = maths.positive(u, ["gap", "spread"], xp)
    piece = 1 / (1 + xp.exp(-(u["weight"] - xp.log(xp.asarray([2.0, 1.0])))))
    rest = xp.cumprod(1 - piece)
    left = xp.stack([1.0 + 0 * rest[0], rest[0]])  # of the stick, before each break
    z["weight"] = xp.concatenate([piece * left, rest[-1:]])
    return z, log_jacobian + xp.sum(xp.log(piece) + xp.log1p(-piece) + xp.log(left))


def log_joint(z: dict[str, Any], data: dict[str, Any], xp: Any) -> Any:
    loc = z["left"] + xp.concatenate([xp.zeros(1), xp.cumsum(z["gap"])])
    components = maths.normal(data["y"][:, None, :], xp.stack([loc, z["high"]], -1), z["spread"], xp).sum(-1)
    first, second, third = (xp.log(z["weight"]) + components).T
    return (
        LOG_DIRICHLET
        + 4.0 * xp.log(z["weight"]).sum()
        + maths.normal(z["left"], -2.0, 1.0, xp)
        + maths.log_normal(z["gap"], LOG_2, 0.25, xp).sum()
        + maths.normal(z["high"], 0.0, 2.0, xp).sum()
        + maths.log_normal(z["spread"], 0.0, 0.25, xp).sum()
        + xp.logaddexp(xp.logaddexp(first, second), third).sum()
    )


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(z)
