"""Particle gradient descent: theta and a cloud of latents for each datum move together, with no inner loop.

    z_k   <- z_k + h grad_z log p_theta(x, z_k) + sqrt(2 h) noise          k = 1..K, for each datum
    theta <- theta + step of mean_k grad_theta log p_theta(x, z_k)

Kuntz, Lim & Johansen 2023, proceedings.mlr.press/v206/kuntz23a.html: a gradient flow of the free energy, whose limit
for many particles and small steps is maximum likelihood. The particles live in the unconstrained space and take
unadjusted Langevin steps, so h leaves a bias of its own order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from ..density import Density
from ..engine import EngineError, Run, no_sum
from ..learning import Learned, TrailWriter, make_optimizer, minibatches
from ..preflight import check_minibatch
from ..settings import check_optimizer, check_positive, settings
from ..starts import starts


@settings
class ParticleGradient:
    """Learn theta with persistent particles; each datum keeps its own through all minibatches.

    The trail is the mean log joint of the particles, in nats over all data. It is no estimate of the evidence, which
    an engine gives at the theta that was learned.

    num_particles  latents of each datum
    step_size      h, in the unconstrained space; in units of the smallest posterior variance it should be below 0.1
    batch_size     data for each step; None: all
    optimizer      of theta: any torch optimiser class, called as optimizer(tensors, lr=learning_rate)
    """

    name: ClassVar[str] = "particle_gradient"
    num_steps: int = 2000
    num_particles: int = 10
    step_size: float = 0.01
    batch_size: int | None = None
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam

    def __post_init__(self) -> None:
        check_positive(self, "step_size", "learning_rate")
        check_optimizer(self)

    def supports(self, density: Density) -> str:
        if not density.continuous:
            return "particles move along gradients and the latents are all discrete: use EM, which enumerates them"
        if density.unlisted:
            return no_sum(density)
        if self.batch_size is not None:
            check_minibatch(density, self.batch_size)
            if not density.batch_plates:
                return "minibatches need latents that belong to one datum each; this model has global latents"
        return ""

    def fit(self, density: Density, run: Run) -> Learned:
        tensors = density.theta.tensors
        with torch.no_grad():
            particles = starts(density, run, self.num_particles, None, tries=10, apart=True)  # (K, *batch, D)

        def step(u: Tensor, *index: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad(), density.minibatch(index[0]) if index else nullcontext():
                v = u.detach().requires_grad_()
                value = density.log_joint(v)
                slope, *gradients = torch.autograd.grad(value.sum(), [v, *tensors], allow_unused=True)
                scale = density.data_scale / self.num_particles
            filled = [torch.zeros_like(t) if g is None else -scale * g for t, g in zip(tensors, gradients, strict=True)]
            return (scale * value.detach().sum(), slope, *filled)

        batches = minibatches(density, self.batch_size)
        examples: list[tuple[Tensor, ...]] = [
            (particles,) if (b := next(batches)) is None else (particles[:, b], b) for _ in range(2)
        ]
        compiled = density.compile(step, examples, tensors, native=True)
        moves = make_optimizer(self.optimizer, tensors, self.learning_rate)
        writer = TrailWriter("estimate", self.num_steps)
        size, noise = self.step_size, math.sqrt(2 * self.step_size)
        for number in range(self.num_steps):
            index = next(batches)
            u = particles if index is None else particles[:, index]
            value, slope, *gradients = compiled(u) if index is None else compiled(u, index)
            density.counts["gradients"] += self.num_particles if index is None else (
                self.num_particles * len(index) / particles.shape[1]
            )  # fmt: skip
            moved = u + size * slope + noise * torch.randn_like(u)
            if not bool(value.isfinite()) or not bool(moved.isfinite().all()):
                raise EngineError(
                    f"the log joint of the particles became {float(value)} at step {number}: try a smaller step_size"
                )
            if index is None:
                particles = moved
            else:
                particles[:, index] = moved
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient
            moves.step()
            writer.add(number, float(value))
            if number % 50 == 49:
                run.progress("steps", number + 1, self.num_steps)
        return Learned(writer.trail(), None, ("the trail is the mean log joint of the particles, not the evidence",))
