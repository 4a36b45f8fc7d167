"""Probabilistic PCA with random loadings, the scores integrated out: 16 latents, 200 data in 5 dimensions.

    W_dk ~ N(0, 1),  mean_d ~ N(0, 3),  noise ~ HalfNormal(1),  x_n ~ N(mean, W W' + noise^2 I)

W is known up to a rotation only: effective draws are counted for the noise, the mean and the entries of W W'.
Tipping & Bishop 1999, doi:10.1111/1467-9868.00196.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _maths as maths
from ._data import exact, tensors

KIND = "posterior"
ROWS, DIM, RANK = 200, 5, 2
SHAPES = {"w": (DIM, RANK), "mean": (DIM,), "noise": ()}


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    w = rng.normal(size=(DIM, RANK))
    return exact(x=rng.normal(size=(ROWS, RANK)) @ w.T + rng.normal(size=DIM) + 0.5 * rng.normal(size=(ROWS, DIM)))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([DIM, RANK]).to_event(2))
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([DIM]).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        covariance = w @ w.T + noise**2 * torch.eye(DIM, dtype=x.dtype)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mean, covariance_matrix=covariance), obs=x)

    return Problem(model, args=tensors(data), name="PPCA")


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([DIM, RANK]).to_event(2))
        mean = numpyro.sample("mean", dist.Normal(0.0, 3.0).expand([DIM]).to_event(1))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        covariance = w @ w.T + noise**2 * jnp.eye(DIM)
        numpyro.sample("x", dist.MultivariateNormal(mean, covariance_matrix=covariance), obs=data["x"])

    return model


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm

    with pm.Model() as model:
        w = pm.Normal("w", 0.0, 1.0, shape=(DIM, RANK))
        mean = pm.Normal("mean", 0.0, 3.0, shape=DIM)
        noise = pm.HalfNormal("noise", 1.0)
        pm.MvNormal("x", mean, cov=pm.math.dot(w, w.T) + noise**2 * np.eye(DIM), observed=data["x"])
    return model


def constrain(u: dict[str, Any], xp: Any) -> tuple[dict[str, Any], Any]:
    return maths.positive(u, ["noise"], xp)


def log_joint(z: dict[str, Any], data: dict[str, Any], xp: Any) -> Any:
    covariance = z["w"] @ z["w"].T + z["noise"] ** 2 * xp.eye(DIM)
    return (
        maths.normal(z["w"], 0.0, 1.0, xp).sum()
        + maths.normal(z["mean"], 0.0, 3.0, xp).sum()
        + maths.half_normal(z["noise"], 1.0, xp)
        + maths.multivariate_normal(data["x"] - z["mean"], covariance, xp).sum()
    )


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows, columns = np.tril_indices(DIM)
    gram = z["w"] @ z["w"].swapaxes(-1, -2)
    return {"noise": z["noise"], "mean": z["mean"], "W W'": gram[..., rows, columns]}
