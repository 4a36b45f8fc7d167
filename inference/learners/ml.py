"""Maximum likelihood where the likelihood is there to be evaluated: fully observed models.

    theta_ML = argmax_theta sum_i log p_theta(x_i),    gradient from minibatches: (N / B) sum_{i in batch}

Discrete latents, which can be summed out exactly, are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch

from ..density import Density
from ..em_steps import maximise
from ..engine import EngineError, Run, no_sum
from ..learning import Learned, TrailWriter, descend
from ..preflight import check_minibatch
from ..problem import ProblemError
from ..settings import check_optimizer, check_positive, settings


@settings
class ML:
    """Maximise log p_theta(x) over theta, by minibatch gradients or (batch_size=None, optimizer=None) L-BFGS.

    num_steps   optimiser steps; for L-BFGS its iterations
    batch_size  data for each gradient; None: all
    optimizer   any torch optimiser class, called as optimizer(tensors, lr=learning_rate); None: L-BFGS on all data,
                Adam on minibatches
    """

    name: ClassVar[str] = "ml"
    num_steps: int = 1000
    batch_size: int | None = None
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate")
        check_optimizer(self)

    def supports(self, density: Density) -> str:
        if density.continuous:
            return f"site {density.continuous[0]!r} is latent: its likelihood is an integral; use EM or SVI"
        if density.unlisted:
            return no_sum(density)
        if self.batch_size is not None:
            if density.discrete and not density.batch_plates:
                raise ProblemError("minibatches need latents that belong to one datum each; use batch_size=None.")
            check_minibatch(density, self.batch_size)
        return ""

    def fit(self, density: Density, run: Run) -> Learned:
        tensors = density.theta.tensors
        if self.optimizer is None and self.batch_size is None:
            writer = TrailWriter("exact", 1)

            def objective() -> torch.Tensor:
                value = density.log_joint({}).sum()
                writer.add(len(writer), value.detach())
                return value

            maximise(objective, tensors, self.num_steps)
            return Learned(writer.trail())
        writer = TrailWriter("exact" if self.batch_size is None else "estimate", self.num_steps)

        def loss() -> torch.Tensor:
            return -density.log_joint({}).sum() * density.data_scale

        optimizer = self.optimizer or torch.optim.Adam
        for step, value in enumerate(
            descend(density, loss, tensors, optimizer, self.learning_rate, self.batch_size, self.num_steps)
        ):
            if not math.isfinite(value):
                raise EngineError(f"the log likelihood became {-value} at step {step}; try a smaller learning_rate")
            writer.add(step, -value)
            run.progress("gradient steps", step + 1, self.num_steps)
        return Learned(writer.trail())
