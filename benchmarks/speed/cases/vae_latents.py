"""A thousand posteriors at once: the latents of 1,000 data under one decoder, 10 latents, 200 hidden units, 64 pixels.

z_i ~ N(0, I),   x_i ~ Bernoulli(logits = decoder(z_i))

The decoder is fixed and steep, so that data differ in how hard they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _maths as maths
from ._data import exact, tensors

KIND = "per-datum"
DATA, LATENT, HIDDEN, PIXELS = 1000, 10, 200, 64
SHAPES = {"z": (LATENT,)}
SHOWN = 100  # data whose scalars are judged


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(LATENT, HIDDEN)), rng.normal(size=(HIDDEN, PIXELS)) * 3 / HIDDEN**0.5
    scale = rng.gamma(2.0, 0.5, size=(DATA, 1))
    logits = np.tanh(scale * rng.normal(size=(DATA, LATENT)) @ a) @ b
    return exact(x=(rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float), a=a, b=b)


def problem(data: dict[str, np.ndarray]) -> Any:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyrometer.inference import Problem

    def model(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(a.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=torch.tanh(z @ a) @ b).to_event(1), obs=x)

    return Problem(model, args=tensors(data), name="latents of 1,000 data")


def log_joint(z: Any, x: Any, data: dict[str, Any], xp: Any) -> Any:
    """log p(x_i, z_i) of one datum."""
    logits = xp.tanh(z @ data["a"]) @ data["b"]
    return maths.normal(z, 0.0, 1.0, xp).sum() + maths.bernoulli(x, logits, xp).sum()


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"z": z["z"][:, :, :SHOWN]}
