"""Exact EM on a mixture of five normals with full covariances: 20,000 data in 10 dimensions, from equal starts."""

from __future__ import annotations

from typing import Any

import numpy as np

KIND = "mixture"
ROWS, COMPONENTS, DIM = 20_000, 5, 10
NUM_STEPS = 100


def problem() -> Any:
    from pyrometer.models import gaussian_mixture

    return gaussian_mixture.problem(
        covariance="full", num_data=ROWS, num_components=COMPONENTS, data_dim=DIM, separation=2.0
    )


def start() -> dict[str, np.ndarray]:
    """The data, and where every tool starts: equal weights, locs at data far apart, the covariance that stands in the
    program as `scale_trils`."""
    import torch

    from pyrometer.inference.density import Density

    program = problem()
    with Density(program, learning=True) as density, torch.no_grad():
        values = density.theta.values()
    return {"x": program.args[0].numpy(), **{name: value.numpy() for name, value in values.items()}}
