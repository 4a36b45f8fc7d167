"""Gaussian process regression, the function integrated out: 3 latents, 100 data.

    length ~ LogNormal(0, 1),  amplitude ~ HalfNormal(2),  noise ~ HalfNormal(1)
    y ~ N(0, K),  K_ij = amplitude^2 exp(-(x_i - x_j)^2 / (2 length^2)) + (noise^2 + 1e-6) [i = j]

Rasmussen & Williams 2006, gaussianprocess.org/gpml, eq. 2.30.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _maths as maths
from ._data import exact, tensors

KIND = "posterior"
ROWS = 100
JITTER = 1e-6
SHAPES = {"length": (), "amplitude": (), "noise": ()}


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    x = np.sort(rng.uniform(0.0, 10.0, ROWS))
    distance = (x[:, None] - x) ** 2
    covariance = 1.5**2 * np.exp(-0.5 * distance / 1.2**2) + 0.4**2 * np.eye(ROWS)
    return exact(distance=distance, y=np.linalg.cholesky(covariance) @ rng.normal(size=ROWS))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(distance: torch.Tensor, y: torch.Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(2.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        smooth = amplitude**2 * torch.exp(-0.5 * distance / length**2)
        covariance = smooth + (noise**2 + JITTER) * torch.eye(len(y), dtype=y.dtype)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance_matrix=covariance), obs=y)

    return Problem(model, args=tensors(data), name="Gaussian process")


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        length = numpyro.sample("length", dist.LogNormal(0.0, 1.0))
        amplitude = numpyro.sample("amplitude", dist.HalfNormal(2.0))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        smooth = amplitude**2 * jnp.exp(-0.5 * data["distance"] / length**2)
        covariance = smooth + (noise**2 + JITTER) * jnp.eye(ROWS)
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(ROWS), covariance_matrix=covariance), obs=data["y"])

    return model


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm

    with pm.Model() as model:
        length = pm.LogNormal("length", 0.0, 1.0)
        amplitude = pm.HalfNormal("amplitude", 2.0)
        noise = pm.HalfNormal("noise", 1.0)
        smooth = amplitude**2 * pm.math.exp(-0.5 * data["distance"] / length**2)
        pm.MvNormal("y", np.zeros(ROWS), cov=smooth + (noise**2 + JITTER) * np.eye(ROWS), observed=data["y"])
    return model


def constrain(u: dict[str, Any], xp: Any) -> tuple[dict[str, Any], Any]:
    return maths.positive(u, list(SHAPES), xp)


def log_joint(z: dict[str, Any], data: dict[str, Any], xp: Any) -> Any:
    smooth = z["amplitude"] ** 2 * xp.exp(-0.5 * data["distance"] / z["length"] ** 2)
    covariance = smooth + (z["noise"] ** 2 + JITTER) * xp.eye(ROWS)
    return (
        maths.log_normal(z["length"], 0.0, 1.0, xp)
        + maths.half_normal(z["amplitude"], 2.0, xp)
        + maths.half_normal(z["noise"], 1.0, xp)
        + maths.multivariate_normal(data["y"], covariance, xp)
    )


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(z)
