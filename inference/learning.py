"""What all learners share: the trail, minibatches, and Fisher's identity.

    grad_theta log p_theta(x) = E_{p_theta(z | x)}[ grad_theta log p_theta(x, z) ]

With weights and draws held fixed, the gradient of the expected log joint at the theta that made them is the gradient
of the evidence; its maximiser is the M-step.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compile import Compiled
from .density import Density
from .distributed import average, own_noise, processes, share
from .engine import Draws
from .posterior import Posterior
from .problem import ProblemError

POINTS = 200  # of a trail
TRACE_FROM = 20  # fewer steps than this are not worth tracing,
NATIVE_FROM = 200  # and fewer than this not worth compiling to machine code
BLOCK = 50  # steps a call of compiled Adam takes, between two looks at the progress


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
    """Collects a trail; long ones are averaged in blocks, so that at most about POINTS remain."""

    def __init__(self, kind: str, total: int) -> None:
        self.kind = kind
        self._block = max(1, math.ceil(total / POINTS))
        self._values: list[float | Tensor] = []
        self._rows: list[tuple[float, float, float, float]] = []
        self._last = (0, 0.0)
        self._start = time.perf_counter()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, value: float | Tensor, std_error: float = 0.0) -> None:
        """One figure after step number `step` (from 0)."""
        self._values.append(value)
        self._last = (step, std_error)
        if len(self._values) == self._block:
            self._close()

    def _close(self) -> None:
        step, std_error = self._last
        values = torch.as_tensor([float(v) for v in self._values], dtype=torch.float64)
        if len(values) > 1:
            std_error = float(values.std() / math.sqrt(len(values)))
        self._rows.append((step, float(values.mean()), std_error, time.perf_counter() - self._start))
        self._values = []

    def trail(self) -> Trail:
        if self._values:
            self._close()
        rows = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, 4)
        return Trail(rows[:, 0].long(), rows[:, 1], rows[:, 2], rows[:, 3], self.kind)


def minibatches(
    density: Density, batch_size: int | None, generator: torch.Generator | None = None
) -> Iterator[Tensor | None]:
    """Row indices, without end: the data are shuffled, cut into batches, and what is left over is dropped, so that
    every batch is a uniform draw without replacement. None, for all data, where batch_size is None."""
    if batch_size is None:
        while True:
            yield None
    size = density.sliceable().size
    while True:
        order = torch.randperm(size, generator=generator)
        if density.device is not None:
            order = order.to(density.device)
        for start in range(0, size - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def share_of_data(density: Density, batch_size: int | None) -> float:
    """The share of all data that a minibatch of this size is: what a gradient on it counts."""
    return 1.0 if batch_size is None else min(1.0, batch_size / density.sliceable().size)


def descend(
    density: Density,
    loss: Callable[[], Tensor],
    tensors: list[Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    learning_rate: float,
    batch_size: int | None,
    num_steps: int,
) -> Iterator[float]:
    """Stochastic gradient descent: the loss at the start of each step; its gradient moves the tensors.

    Compiled where there are enough steps to pay for it; Adam then runs in machine code too, `BLOCK` steps a call.
    Random numbers and minibatches come in the same order whatever the back end. A loss that is not finite moves
    nothing, and is the last. In a process group each process takes its share of the rows (`distributed`).
    """
    if not tensors:
        return
    with own_noise() as common:
        yield from _steps(
            density, loss, tensors, optimizer, learning_rate, _shared(density, batch_size, common), num_steps
        )


def _shared(
    density: Density, batch_size: int | None, common: torch.Generator | None
) -> Iterator[tuple[Tensor | None, float]]:
    """Minibatches, and the share of each that this process has."""
    for rows in minibatches(density, batch_size, common):
        if common is None:
            yield rows, 1.0
            continue
        whole = torch.arange(density.sliceable().size, device=density.device) if rows is None else rows
        mine = share(whole)
        yield mine, len(mine) / len(whole)


def _steps(
    density: Density,
    loss: Callable[[], Tensor],
    tensors: list[Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    learning_rate: float,
    batches: Iterator[tuple[Tensor | None, float]],
    num_steps: int,
) -> Iterator[float]:
    cost = dict[str, float]()

    def step(*index: Tensor) -> tuple[Tensor, ...]:
        before = dict(density.counts)
        with torch.enable_grad(), density.minibatch(index[0]) if index else nullcontext():
            value = loss()
            gradients = torch.autograd.grad(value, tensors, allow_unused=True)
        cost.update({key: counted - before[key] for key, counted in density.counts.items()})
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)]
        return (value.detach(), *filled)

    run: Callable[..., tuple[Tensor, ...]] = step
    if num_steps > TRACE_FROM:
        examples: list[tuple[Tensor, ...]] = [() if (b := next(batches)[0]) is None else (b,) for _ in range(2)]
        run = density.compile(step, examples, tensors, native=num_steps >= NATIVE_FROM)
    count = dict(cost) if run is not step else {}
    trainer = None
    if isinstance(run, Compiled) and optimizer is torch.optim.Adam and processes() == 1:
        trainer = run.trainer(tensors, (learning_rate, 0.9, 0.999, 1e-8))
    if trainer is not None:
        for start in range(0, num_steps, BLOCK):
            indices = itertools.islice(batches, min(BLOCK, num_steps - start))
            losses = trainer.run(() if index is None else (index,) for index, _ in indices)
            for key, counted in count.items():
                density.counts[key] += counted * len(losses)
            yield from losses.tolist()
        return
    moves = make_optimizer(optimizer, tensors, learning_rate)
    for _ in range(num_steps):
        index, weight = next(batches)
        found = run() if index is None else run(index)
        value, *gradients = found if processes() == 1 else average(found, weight)
        for key, counted in count.items():
            density.counts[key] += counted
        if value.isfinite():
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient
            moves.step()
        yield float(value)


def make_optimizer(kind: Callable[..., Any], tensors: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser; torch's Adam in its fused form, which is the same arithmetic in one pass."""
    extra = {"fused": True} if kind in (torch.optim.Adam, torch.optim.AdamW) else {}
    return kind(tensors, lr=learning_rate, **extra)


def flat_draws(draws: Draws | Posterior, batch_shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Draws without the chain dimension, site -> (S, *batch, *event), and weights (S, *batch) that sum to one."""
    named = draws.values if isinstance(draws, Draws) else draws.draws
    values = {n: v.flatten(0, 1) for n, v in named.items()}
    first = next(iter(values.values()))
    if draws.log_weights is not None:
        log_weights = draws.log_weights.to(device=first.device, dtype=torch.float64)
        return values, torch.softmax(log_weights.flatten(0, 1), 0)
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
