"""Draw and reject, each datum until it has its own S acceptances or its budget is spent.

Rounds are batched over draws and data; data that are done drop out of the work where the data can be sliced. What a
datum tells of its acceptance probability a is a function of its own sequence alone, cut at its S-th acceptance:

    a-hat = (S - 1) / (N - 1)   where the S-th acceptance came at proposal N
    a-hat = k / N               where the budget N ended it with k < S acceptances

which together are unbiased (Girshick, Mosteller & Savage 1946, doi:10.1214/aoms/1177731018); S / N would be too large
by a share of (1 - a) / S. Of S = 1 nothing unbiased can be told, so no evidence is. The standard error of log a-hat is
sqrt((1 - a) / (a (N - 2))) at a = (k + 1) / (N + 2), so that no run of luck passes for certainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .density import Density, Values
from .engine import EngineError, Run
from .posterior import Evidence
from .preflight import check_minibatch
from .problem import ProblemError
from .proposals import Z

FIRST = 100  # proposals of the first round, which tells how many the next should take
NUMBERS = 2**22  # that a round may hold, roughly


@dataclass
class Accepted:
    """What S acceptances for each of N data came to: z (S, N, ...), where rows from `count` on are copies of earlier
    ones; acceptances `count` (N) and the `proposals` (N) that they took."""

    z: Z
    count: Tensor
    proposals: Tensor
    num_samples: int

    @property
    def short(self) -> Tensor:
        """Which data have fewer acceptances than were asked for, (N)."""
        return self.count < self.num_samples

    @property
    def rate(self) -> Tensor:
        return self.count.double() / self.proposals.double()

    def log_weights(self, batch: tuple[int, ...]) -> Tensor | None:
        """Zero weight for the rows that are copies, (1, S, *batch); None: there are none."""
        if not bool(self.short.any()):
            return None
        rank = torch.arange(self.num_samples)[:, None]
        weights = torch.zeros(self.num_samples, len(self.count), dtype=torch.float64)
        return weights.masked_fill(rank >= self.count.cpu(), -math.inf).reshape(1, -1, *batch)

    def evidence(self, log_bound: Tensor, batch: tuple[int, ...], kind: str = "estimate") -> Evidence | None:
        """log Z = log bound + log a-hat; None where a datum's single acceptance tells nothing unbiased."""
        k, n = self.count.double().cpu(), self.proposals.double().cpu()
        rate = torch.where(self.short.cpu(), k / n, (k - 1) / (n - 1))
        if not bool((rate > 0).all()):
            return None
        cautious = (k + 1) / (n + 2)
        error = ((1 - cautious) / (cautious * (n - 2).clamp_min(1.0))).sqrt()
        return Evidence((log_bound.cpu() + rate.log()).reshape(batch), error.reshape(batch), kind)

    def alarms(self) -> tuple[str, ...]:
        if not bool(self.short.any()):
            return ()
        bad = self.short.nonzero().flatten().tolist()
        return (
            f"the budget of proposals was spent at {len(bad)} of {len(self.count)} data, first {bad[:5]}, with as few "
            f"as {int(self.count.min())} of {self.num_samples} draws; the rest are copies without weight",
        )


def until_accepted(
    density: Density,
    run: Run,
    draw: Callable[[int], tuple[Z, Tensor]],
    num_samples: int,
    max_proposals: int,
) -> Accepted:
    """S acceptances for each datum. draw: count -> z and which of them are accepted (count, *batch), inside a
    minibatch those of its rows. Raises `EngineError` where a datum has none within its budget."""
    data = density.batch_shape.numel()
    taken = torch.zeros(data, dtype=torch.long)
    count, store = torch.zeros(data, dtype=torch.long), {}
    active, sliced = torch.arange(data), data > 1 and _slices(density, draw)
    size, spent = min(FIRST, max_proposals), 0
    while len(active):
        with density.minibatch(active.to(density.device)) if sliced else nullcontext():
            z, accepted = draw(size)
        accepted = accepted.reshape(size, -1).cpu()
        spent += size
        columns = active if sliced else torch.arange(data)
        rank = count[columns] + accepted.cumsum(0)  # of each acceptance in its datum's sequence, from 1
        kept = accepted & (rank <= num_samples)
        rows, at = kept.nonzero(as_tuple=True)
        for name, value in _parts(z, len(columns), len(density.batch_shape)):
            if name not in store:
                store[name] = value.new_zeros((num_samples, data, *value.shape[2:]))
            place = rank[rows, at] - 1, columns[at]
            store[name][tuple(i.to(value.device) for i in place)] = value[rows.to(value.device), at.to(value.device)]
        found = count[columns] + kept.sum(0)
        last = (rank >= num_samples).int().argmax(0) + 1  # proposals up to the S-th acceptance, where it came
        open_before = count[columns] < num_samples
        taken[columns] += torch.where(found < num_samples, size, last) * open_before
        count[columns] = found
        active = (count < num_samples).nonzero().flatten()
        run.progress("acceptances", int(count.sum()), num_samples * data)
        if spent >= max_proposals:
            break
        if len(active):
            wanted = ((num_samples - count) / ((count + 0.5) / taken.clamp_min(1)))[active].quantile(0.5)
            room = NUMBERS // max(1, (len(active) if sliced else data) * density.dim)
            size = max(1, min(int(1.2 * float(wanted)) + 10, 4 * spent, max(room, FIRST), max_proposals - spent))
    if bool((count == 0).any()):
        bad = (count == 0).nonzero().flatten().tolist()
        raise EngineError(f"none of {spent} proposals was accepted for {len(bad)} of {data} data, first {bad[:5]}")
    copies = (torch.arange(num_samples)[:, None] % count).to(density.device or "cpu")
    batch = tuple(density.batch_shape)
    filled = {n: v[copies, torch.arange(data)].reshape(num_samples, *batch, *v.shape[2:]) for n, v in store.items()}
    return Accepted(filled if isinstance(z, dict) else filled[""], count, taken, num_samples)


def _slices(density: Density, draw: Callable[[int], tuple[Z, Tensor]]) -> bool:
    """Whether program and proposal can be shown some of the data only."""
    if not density.batch_plates:
        return False
    try:
        check_minibatch(density)
        with density.uncounted(), torch.random.fork_rng(devices=[]), density.minibatch(torch.arange(1)):
            draw(1)
    except (ProblemError, RuntimeError, ValueError, IndexError):  # a guide may have parameters for each datum
        return False
    return True


def _parts(z: Z, data: int, batch_dim: int) -> list[tuple[str, Tensor]]:
    """(S, *batch, ...) as (S, N, ...), by name."""
    named: Values = {"": z} if isinstance(z, Tensor) else z
    return [(n, v.reshape(len(v), data, *v.shape[1 + batch_dim :])) for n, v in named.items()]
