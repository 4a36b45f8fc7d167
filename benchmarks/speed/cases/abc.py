"""Approximate Bayesian computation on a normal in four dimensions: a million simulations, of which 1,000 are kept.

theta ~ N(0, I),   x ~ N(theta, I / 4)      so that theta | x ~ N(4 x / 5, I / 5)
"""

from __future__ import annotations

from typing import Any

import numpy as np

KIND = "abc"
DIM, NOISE = 4, 0.5
NUM_SIMULATIONS, NUM_SAMPLES = 1_000_000, 1000


def data() -> dict[str, np.ndarray]:
    return {"x": np.array([1.0, -0.5, 0.25, 0.75])}


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(x: torch.Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(theta, NOISE).to_event(1), obs=x)

    return Problem(model, args=(torch.from_numpy(data["x"]),), name="a normal by simulation")


def posterior(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The exact mean and sd of theta, (4,)."""
    precision = 1 + 1 / NOISE**2
    return data["x"] / NOISE**2 / precision, np.full(DIM, precision**-0.5)
