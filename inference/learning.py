"""What all learners share: the trail, minibatches, and Fisher's identity.

    grad_theta log p_theta(x) = E_{p_theta(z | x)}[ grad_theta log p_theta(x, z) ]

With weights and draws held fixed, the gradient of the expected log joint at the theta that made them is the gradient
of the evidence; its maximiser is the M-step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .density import Density
from .engine import Draws
from .posterior import Posterior
from .problem import ProblemError


@dataclass(frozen=True, eq=False)
class Trail:
    """The objective as learning went on, (T,) each: `step`, `value` in nats (all data together), its `std_error`,
    and `seconds` since the start. `kind`: 'exact', 'estimate' or 'lower bound' of the log likelihood."""

    step: Tensor
    value: Tensor
    std_error: Tensor
    seconds: Tensor
    kind: str

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Learned:
    """What a learner answers; theta and phi are read off the density."""

    trail: Trail
    draws: Draws | None = None
    notes: tuple[str, ...] = field(default=())


class TrailWriter:
    """Collects a trail; long ones are averaged in blocks, so that at most about `points` remain."""

    def __init__(self, kind: str, total: int, points: int = 200) -> None:
        self.kind = kind
        self._block = max(1, math.ceil(total / points))
        self._values: list[float | Tensor] = []
        self._rows: list[tuple[float, float, float, float]] = []
        self._start = time.perf_counter()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, value: float | Tensor, std_error: float = 0.0) -> None:
        """One figure after step number `step` (from 0)."""
        self._values.append(value)
        if len(self._values) == self._block:
            self._close(step, std_error)

    def _close(self, step: int, std_error: float) -> None:
        values = torch.as_tensor([float(v) for v in self._values], dtype=torch.float64)
        if len(values) > 1:
            std_error = float(values.std() / math.sqrt(len(values)))
        self._rows.append((step, float(values.mean()), std_error, time.perf_counter() - self._start))
        self._values = []

    def trail(self) -> Trail:
        rows = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, 4)
        return Trail(rows[:, 0].long(), rows[:, 1], rows[:, 2], rows[:, 3], self.kind)


def minibatches(density: Density, batch_size: int | None) -> Iterator[Tensor | None]:
    """Row indices, without end: the data are shuffled, cut into batches, and what is left over is dropped, so that
    every batch is a uniform draw without replacement. None, for all data, where batch_size is None."""
    if batch_size is None:
        while True:
            yield None
    size = density.sliceable().size
    if batch_size > size:
        raise ProblemError(f"batch_size = {batch_size} is larger than the {size} data.")
    while True:
        order = torch.randperm(size)
        if density.device is not None:
            order = order.to(density.device)
        for start in range(0, size - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def flat_draws(draws: Draws | Posterior, batch_shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Draws without the chain dimension, site -> (S, *batch, *event), and weights (S, *batch) that sum to one."""
    named = draws.values if isinstance(draws, Draws) else draws.draws
    values = {n: v.flatten(0, 1) for n, v in named.items()}
    if draws.log_weights is not None:
        return values, torch.softmax(draws.log_weights.flatten(0, 1).double(), 0)
    first = next(iter(values.values()))
    shape = (first.shape[0], *batch_shape)
    return values, torch.full(shape, 1.0 / shape[0], dtype=torch.float64, device=first.device)


def expected_log_joint(density: Density, values: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Q(theta) = sum_i sum_s w_si log p_theta(x_i, z_si), () in nats; weights and draws held fixed.
    In a minibatch the rows stand for all data."""
    log_joint = density.log_joint({n: v.detach() for n, v in values.items() if n in density.latents})
    weights = weights.detach().to(log_joint)
    # a draw of weight zero may have a log joint of minus infinity: it counts for nothing
    terms = torch.where(weights > 0, weights * log_joint, torch.zeros_like(log_joint))
    return terms.sum() * density.data_scale


def check_learnable(density: Density) -> None:
    if not len(density.theta):
        raise ProblemError(
            f"problem {density.problem.name!r} has no parameters to learn: its log joint depends on no nn.Parameter, "
            "pyro.param or other tensor that requires gradients."
        )
