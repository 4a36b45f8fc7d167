"""Varying intercepts and slopes, non-centred and uncorrelated: 175 latents, 919 rows in 85 groups.

    m_a, m_b ~ N(0, 5),  s_a, s_b, noise ~ HalfNormal(1),  a_g, b_g ~ N(0, 1)
    y_n ~ N(m_a + s_a a_g(n) + (m_b + s_b b_g(n)) x_n, noise)

The shape of the radon survey, x_n telling two floors apart: Gelman & Hill 2006, doi:10.1017/CBO9780511790942, ch. 12.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _maths as maths
from ._data import exact, tensors

KIND = "posterior"
GROUPS, ROWS = 85, 919
SHAPES = {"m_a": (), "m_b": (), "s_a": (), "s_b": (), "noise": (), "a": (GROUPS,), "b": (GROUPS,)}


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    share = rng.dirichlet(np.ones(GROUPS))
    # two rows for every group, the others as they fall
    group = np.sort(np.concatenate([np.repeat(np.arange(GROUPS), 2), rng.choice(GROUPS, ROWS - 2 * GROUPS, p=share)]))
    x = (rng.random(ROWS) < 0.17).astype(float)
    a, b = rng.normal(1.5, 0.35, GROUPS), rng.normal(-0.7, 0.3, GROUPS)
    return exact(group=group, x=x, y=a[group] + b[group] * x + rng.normal(0.0, 0.75, ROWS))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(group: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        m_a = pyro.sample("m_a", dist.Normal(0.0, 5.0))
        m_b = pyro.sample("m_b", dist.Normal(0.0, 5.0))
        s_a = pyro.sample("s_a", dist.HalfNormal(1.0))
        s_b = pyro.sample("s_b", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("groups", GROUPS):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        loc = (m_a + s_a * a)[group] + (m_b + s_b * b)[group] * x
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, noise), obs=y)

    return Problem(model, args=tensors(data), name="varying slopes")


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        m_a = numpyro.sample("m_a", dist.Normal(0.0, 5.0))
        m_b = numpyro.sample("m_b", dist.Normal(0.0, 5.0))
        s_a = numpyro.sample("s_a", dist.HalfNormal(1.0))
        s_b = numpyro.sample("s_b", dist.HalfNormal(1.0))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        with numpyro.plate("groups", GROUPS):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        loc = (m_a + s_a * a)[data["group"]] + (m_b + s_b * b)[data["group"]] * data["x"]
        numpyro.sample("y", dist.Normal(loc, noise), obs=data["y"])

    return model


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm

    with pm.Model() as model:
        m_a, m_b = pm.Normal("m_a", 0.0, 5.0), pm.Normal("m_b", 0.0, 5.0)
        s_a, s_b, noise = (pm.HalfNormal(name, 1.0) for name in ("s_a", "s_b", "noise"))
        a, b = pm.Normal("a", 0.0, 1.0, shape=GROUPS), pm.Normal("b", 0.0, 1.0, shape=GROUPS)
        loc = (m_a + s_a * a)[data["group"]] + (m_b + s_b * b)[data["group"]] * data["x"]
        pm.Normal("y", loc, noise, observed=data["y"])
    return model


def constrain(u: dict[str, Any], xp: Any) -> tuple[dict[str, Any], Any]:
    return maths.positive(u, ["s_a", "s_b", "noise"], xp)


def log_joint(z: dict[str, Any], data: dict[str, Any], xp: Any) -> Any:
    a, b = z["m_a"] + z["s_a"] * z["a"], z["m_b"] + z["s_b"] * z["b"]
    loc = a[data["group"]] + b[data["group"]] * data["x"]
    return (
        sum(maths.normal(z[n], 0.0, 5.0, xp) for n in ("m_a", "m_b"))
        + sum(maths.half_normal(z[n], 1.0, xp) for n in ("s_a", "s_b", "noise"))
        + sum(maths.normal(z[n], 0.0, 1.0, xp).sum() for n in ("a", "b"))
        + maths.normal(data["y"], loc, z["noise"], xp).sum()
    )


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name: z[name] for name in ("m_a", "m_b", "s_a", "s_b", "noise")}
    for letter in ("a", "b"):
        found[letter] = z[f"m_{letter}"][..., None] + z[f"s_{letter}"][..., None] * z[letter]
    return found
