"""Tempered SMC on linear regression with known noise: 10 coefficients, 100 rows, 2,000 particles.

    beta_k ~ N(0, 1),  y_n ~ N(x_n beta, 1)      so that log p(y) = log N(y; 0, X X' + I)

Each tool moves its particles by the kernel it offers for that; see the tools for what had to be tuned by hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..record import Estimate
from . import _maths as maths
from ._data import exact, tensors

KIND = "smc"
ROWS, COLUMNS = 100, 10
NUM_PARTICLES = 2000
REPEATS = 10  # at least, for the error of the evidence shows in many runs only


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(ROWS, COLUMNS))
    return exact(x=x, y=x @ rng.normal(size=COLUMNS) + rng.normal(size=ROWS))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)

    return Problem(model, args=tensors(data), name="linear regression")


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm

    with pm.Model() as model:
        beta = pm.Normal("beta", 0.0, 1.0, shape=COLUMNS)
        pm.Normal("y", data["x"] @ beta, 1.0, observed=data["y"])
    return model


def log_prior(beta: Any, xp: Any) -> Any:
    return maths.normal(beta, 0.0, 1.0, xp).sum()


def log_likelihood(beta: Any, data: dict[str, Any], xp: Any) -> Any:
    return maths.normal(data["y"], data["x"] @ beta, 1.0, xp).sum()


def truth() -> dict[str, Estimate]:
    given = data()
    covariance = given["x"] @ given["x"].T + np.eye(ROWS)
    return {"log evidence": Estimate(float(maths.multivariate_normal(given["y"], covariance, np)), 0.0)}
