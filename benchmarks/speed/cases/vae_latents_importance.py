"""Weights of the same thousand latents: draws of a normal of each datum's own, over its density.

z_i ~ q_i = N(m_i, diag(s_i^2)),   log w = log p(x_i, z_i) - log q_i(z_i)

m_i is near a mode, and s_i^2 the diagonal of the curvature's inverse there: what a good encoder would say. A weight
needs two matrix products, z a and tanh(z a) b; with their time alone as the floor, one sees what the rest costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import vae_latents
from ._data import exact, tensors
from .vae_latents import DATA as DATA
from .vae_latents import log_joint as log_joint

KIND = "latents-importance"
NUM_DRAWS = 1000  # of each datum


def data() -> dict[str, np.ndarray]:
    """x, a and b as of `vae-latents`, and the normals' loc and scale."""
    made = vae_latents.data()
    return exact(**made, **dict(zip(("loc", "scale"), proposal(**made), strict=True)))


def proposal(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and sds (N, D) by halved Gauss-Newton steps from zero, the curvature being I + J' diag(p (1 - p)) J."""
    z, identity = np.zeros((len(x), len(a))), np.eye(len(a))
    for _ in range(15):
        hidden = np.tanh(z @ a)
        p = 1 / (1 + np.exp(-hidden @ b))
        jacobian = ((1 - hidden**2)[:, None] * a) @ b  # (N, D, pixels)
        precision = identity + (jacobian * (p * (1 - p))[:, None]) @ jacobian.swapaxes(1, 2)
        gradient = (jacobian @ (x - p)[..., None])[..., 0] - z
        z = z + 0.5 * np.linalg.solve(precision, gradient[..., None])[..., 0]
    return z, np.sqrt(np.diagonal(np.linalg.inv(precision), axis1=1, axis2=2))


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, loc: torch.Tensor, scale: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(loc), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=torch.tanh(z @ a) @ b).to_event(1), obs=x)

    def guide(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, loc: torch.Tensor, scale: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return Problem(model, args=tensors(data), guide=guide, name="weighted latents of 1,000 data")
