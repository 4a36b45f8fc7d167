"""Two moons: a simulator whose posterior is two crescents, bent towards each other.

    theta ~ U(-1, 1)^2,   a ~ U(-pi/2, pi/2),   r ~ N(0.1, 0.01^2)
    x = (r cos a + 1/4 - |theta_1 + theta_2| / sqrt(2),   r sin a + (theta_2 - theta_1) / sqrt(2))

The task of that name in the sbi benchmark. Though meant to be simulated it has a likelihood: with (v, w) = x less what
theta adds and less (1/4, 0), p(x | theta) = N(|(v, w)|; 0.1, 0.01^2) / (pi |(v, w)|) where v > 0.

Reference: theta and (r, a, the sign of theta_1 + theta_2) are the same three quarters turned and shifted, with Jacobian
one, so that given x, a and r are as in the prior, both signs equally probable, all cut to the square:

    |theta_1 + theta_2| = sqrt(2) (1/4 + r cos a - x_1) >= 0,   theta_2 - theta_1 = sqrt(2) (x_2 - r sin a)

and the evidence is the share that is left, times 2 / 4. Both follow by the midpoint rule on (r, a).

Greenberg, Nonnenmacher & Macke 2019, https://arxiv.org/abs/1905.07488; Lueckmann et al. 2021,
https://arxiv.org/abs/2101.04653 (T.8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, ProblemError, Reference
from pyrometer.inference.simulator import Simulator

from . import _settings

RADIUS, WIDTH, SHIFT = 0.1, 0.01, 0.25
SMOKE = {"num_data": 5}  # settings that it joins a smoke test with


class Crescent(TorchDistribution):
    """x given theta (*batch, 2). Without density where v <= 0."""

    arg_constraints: ClassVar[dict[str, Any]] = {"theta": constraints.real_vector}
    support = constraints.real_vector

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta
        super().__init__(theta.shape[:-1], torch.Size((2,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Crescent:
        return Crescent(self.theta.expand((*batch_shape, 2)))

    @property
    def added(self) -> Tensor:
        first, second = self.theta[..., 0], self.theta[..., 1]
        return torch.stack([SHIFT - (first + second).abs() / math.sqrt(2), (second - first) / math.sqrt(2)], -1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape)
        like: dict[str, Any] = {"dtype": self.theta.dtype, "device": self.theta.device}
        angle, radius = _moon(torch.rand(shape, **like), torch.randn(shape, **like))
        return self.added + torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        left = value - self.added
        inside = left[..., 0] > 0
        radius = torch.where(inside[..., None], left, torch.ones_like(left)).norm(dim=-1)
        log_density = -0.5 * ((radius - RADIUS) / WIDTH).square() - math.log(WIDTH * math.sqrt(2 * math.pi))
        return torch.where(inside, log_density - (math.pi * radius).log(), -math.inf)


def _moon(uniform: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
    return math.pi * (uniform - 0.5), RADIUS + WIDTH * normal


def problem(*, num_data: int = 10, simulated: bool = True, seed: int = 0) -> Problem:
    """N observations, each with a theta of its own, drawn from the model.

    simulated  declare the data as a simulator's, without their likelihood, as the task has it: for ABC alone

    Raises `ProblemError` on a setting out of range.
    """
    num_data = _settings.count("num_data", num_data)
    if not isinstance(simulated, bool):
        raise ProblemError(f"simulated={simulated!r}: expected True or False.")
    generator = _settings.generator("seed", seed)
    theta = 2 * torch.rand(num_data, 2, generator=generator, dtype=torch.float64) - 1
    noise = torch.rand(num_data, generator=generator, dtype=torch.float64)
    angle, radius = _moon(noise, torch.randn(num_data, generator=generator, dtype=torch.float64))
    x = Crescent(theta).added + torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            theta = pyro.sample("theta", dist.Uniform(-torch.ones_like(x), 1.0).to_event(1))
            law = Crescent(theta)
            pyro.sample("x", Simulator(law.sample(), event_dim=1) if simulated else law, obs=x)

    return Problem(model, args=(x,), reference=reference, name="two_moons")


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """Moments of theta and the log evidence of each datum, x (N, 2), with errors from half as many points."""
    fine, coarse = (_integrate(x.double(), points) for points in (2000, 1000))
    error = {name: (fine[name] - coarse[name]).abs() for name in fine}
    return Reference(
        "quadrature",
        mean={"theta": fine["mean"]},
        sd={"theta": fine["sd"]},
        mean_error={"theta": error["mean"]},
        sd_error={"theta": error["sd"]},
        log_evidence=Evidence(fine["log evidence"], error["log evidence"], "estimate"),
        provenance="angle and radius of the crescents by the midpoint rule; error from half as many points",
    )


def _integrate(x: Tensor, points: int) -> dict[str, Tensor]:
    share = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    spread = torch.special.ndtri((torch.arange(points // 20, dtype=torch.float64) + 0.5) * 20 / points)
    angle, radius = (v.flatten() for v in torch.meshgrid(*_moon(share, spread), indexing="ij"))
    found = {"mean": [], "sd": [], "log evidence": []}  # type: dict[str, list[Tensor]]
    for row in x:
        both = torch.cat([_given(row, angle, radius, sign) for sign in (-1.0, 1.0)])
        inside = (both.abs() <= 1).all(-1)
        kept = both[inside]
        found["mean"].append(kept.mean(0))
        found["sd"].append(kept.std(0, correction=0))
        found["log evidence"].append((inside.double().mean() / 2).log())
    return {name: torch.stack(values) for name, values in found.items()}


def _given(x: Tensor, angle: Tensor, radius: Tensor, sign: float) -> Tensor:
    """theta (n, 2) of a datum x (2); outside of the square where there is none."""
    total = math.sqrt(2) * (SHIFT + radius * angle.cos() - x[0])
    difference = math.sqrt(2) * (x[1] - radius * angle.sin())
    theta = torch.stack([sign * total - difference, sign * total + difference], -1) / 2
    return torch.where(total[:, None] >= 0, theta, 2.0)


def exact_draws(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """Independent draws of theta given each datum, x (N, 2) -> (count, N, 2)."""
    generator, drawn = _settings.generator("seed", seed), []
    for row in x.double():
        kept = torch.empty(0, 2, dtype=torch.float64)
        while len(kept) < count:
            uniform, normal = (
                f(2 * count, generator=generator, dtype=torch.float64) for f in (torch.rand, torch.randn)
            )
            both = torch.stack([_given(row, *_moon(uniform, normal), sign) for sign in (-1.0, 1.0)], 1)
            choice = both[torch.arange(2 * count), torch.randint(2, (2 * count,), generator=generator)]
            kept = torch.cat([kept, choice[(choice.abs() <= 1).all(-1)]])
        drawn.append(kept[:count])
    return torch.stack(drawn, 1)
