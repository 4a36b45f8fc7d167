"""Logistic regression: 25 coefficients, 1,000 rows.

beta_k ~ N(0, 1),  y_n ~ Bernoulli(logits = x_n beta)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _maths as maths
from ._data import exact, tensors

KIND = "posterior"
ROWS, COLUMNS = 1000, 25
SHAPES = {"beta": (COLUMNS,)}


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(ROWS, COLUMNS))
    logits = x @ rng.normal(scale=0.5, size=COLUMNS)
    return exact(x=x, y=(rng.random(ROWS) < 1 / (1 + np.exp(-logits))).astype(float))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return Problem(model, args=tensors(data), name="logistic regression")


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=data["x"] @ beta), obs=data["y"])

    return model


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm

    with pm.Model() as model:
        beta = pm.Normal("beta", 0.0, 1.0, shape=COLUMNS)
        pm.Bernoulli("y", logit_p=data["x"] @ beta, observed=data["y"].astype(int))
    return model


def constrain(u: dict[str, Any], xp: Any) -> tuple[dict[str, Any], Any]:
    return u, 0.0


def log_joint(z: dict[str, Any], data: dict[str, Any], xp: Any) -> Any:
    likelihood = maths.bernoulli(data["y"], data["x"] @ z["beta"], xp)
    return maths.normal(z["beta"], 0.0, 1.0, xp).sum() + likelihood.sum()


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(z)
