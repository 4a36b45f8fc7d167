"""Data that can be simulated and have no density: declared like any observation, compared by ABC."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class Simulator(TorchDistribution):
    """The law of a value that the program has just drawn, by whatever torch operations.

        def model(x):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            y = (rate * torch.randn(x.shape)).cumsum(-1).abs()
            pyro.sample("x", Simulator(y, event_dim=1), obs=x)

    value      shape (*plates, *event), drawn anew in each run of the program
    event_dim  dimensions of one observation; those before them are plates

    Any Pyro distribution without `log_prob` declares the same: that its site is drawn from and never scored. Engines
    that need a density refuse it. Raises ValueError where a plate wants more values than were drawn.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real

    def __init__(self, value: Tensor, event_dim: int = 0) -> None:
        self.value = value
        shape = value.shape
        super().__init__(shape[: len(shape) - event_dim], shape[len(shape) - event_dim :], validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        if sample_shape:
            raise NotImplementedError("the value was drawn once by the program: run it again for another.")
        return self.value

    def expand(self, batch_shape: Any, _instance: Any = None) -> Simulator:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(
                f"Simulator: a value of shape {tuple(self.value.shape)} with event_dim={len(self.event_shape)} stands "
                f"where plates want {tuple(batch_shape)}: simulate one for each element."
            )
        return self

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError("a simulator has no density: use ABC.")
