"""A mixture of three normals in the plane, labels drawn by Gibbs sampling: 2,000 labels and 11 other latents.

    weight ~ Dirichlet(2, 2, 2),  loc_k ~ N((3 k - 3, 0), 1/2),  precision_d ~ Gamma(2, 1),
    label_n ~ Categorical(weight),  y_n ~ N(loc_{label_n}, 1 / precision)

The prior of the locs, and 2,000 data, keep each label with its cluster.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._data import exact, tensors

KIND = "gibbs"
ROWS = 2000
CENTRES = np.array([[-3.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
SHAPES = {"weight": (3,), "loc": (3, 2), "precision": (2,)}


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    label = rng.choice(3, ROWS, p=[0.3, 0.45, 0.25])
    centre = np.array([[-2.6, 0.5], [0.1, -0.7], [2.7, 0.8]])
    return exact(y=centre[label] + rng.normal(size=(ROWS, 2)) * np.array([1.0, 0.8]))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(y: torch.Tensor) -> None:
        weight = pyro.sample("weight", dist.Dirichlet(y.new_full((3,), 2.0)))
        precision = pyro.sample("precision", dist.Gamma(y.new_full((2,), 2.0), 1.0).to_event(1))
        with pyro.plate("components", 3):
            loc = pyro.sample("loc", dist.Normal(torch.as_tensor(CENTRES).to(y), 0.5).to_event(1))
        with pyro.plate("rows", len(y)):
            label = pyro.sample("label", dist.Categorical(weight))
            pyro.sample("y", dist.Normal(loc[label], precision.rsqrt()).to_event(1), obs=y)

    return Problem(model, args=tensors(data), name="mixture by Gibbs")


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        weight = numpyro.sample("weight", dist.Dirichlet(jnp.full(3, 2.0)))
        precision = numpyro.sample("precision", dist.Gamma(jnp.full(2, 2.0), 1.0).to_event(1))
        with numpyro.plate("components", 3):
            loc = numpyro.sample("loc", dist.Normal(jnp.asarray(CENTRES), 0.5).to_event(1))
        with numpyro.plate("rows", ROWS):
            label = numpyro.sample("label", dist.Categorical(weight))
            numpyro.sample("y", dist.Normal(loc[label], precision**-0.5).to_event(1), obs=data["y"])

    return model


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(z)
