"""Particles of several filters and many data side by side: weights, evidence, and who descends from whom."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .density import Density
from .posterior import gathered
from .resampling import ancestors, takes
from .tempering import added, of_families


@dataclass(frozen=True)
class CloudPlan:
    """How particles are carried: `count` in each of `runs` independent filters; the rest as in `tempering.PathPlan`."""

    count: int
    runs: int = 1
    guided: bool = False
    scheme: str = "systematic"
    policy: str = "adaptive"
    threshold: float = 0.5


class Cloud:
    """Particles of all filters and data, (S, R, *batch) each figure; what is told of them so far.

    Lanes are numbered s R + r. `ancestors` holds, for each time of resampling, who descends from whom.
    """

    def __init__(self, density: Density, plan: CloudPlan) -> None:
        self.plan, self.batch = plan, tuple(density.batch_shape)
        self.values: dict[str, tuple[Tensor, int]] = {}  # site -> (S, R, *batch, *own) as drawn, and when
        self.present: dict[str, tuple[Tensor, int]] = {}  # the same, as far as it was brought up to date
        self.ancestors: list[Tensor] = []
        shape = (plan.count, plan.runs, *self.batch)
        self.even = torch.full(shape, -math.log(plan.count), dtype=torch.float64, device=density.device)
        self.log_weights = self.even
        self.log_evidence = torch.zeros_like(self.even[0])
        self.chance, self.apart = torch.zeros_like(self.log_evidence), torch.zeros_like(self.log_evidence)
        self.eve = torch.arange(plan.count, device=density.device).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        self.filtered: list[tuple[Tensor, int]] = []  # the weights at the end of each step, and when
        self.least = torch.full_like(self.log_evidence, plan.count)  # the smallest effective sample size
        self.log_joint = torch.zeros_like(self.even)  # of each particle's line
        self.fixed: dict[str, Tensor] = {}  # the given sites' values, constrained, (R, *own)

    def lanes(self, own: Tensor) -> Tensor:
        return own.flatten(0, 1)

    def spread(self, lanes: Tensor) -> Tensor:
        """(lanes, ...) -> (S, R, ...)."""
        return lanes.reshape(self.plan.count, self.plan.runs, *lanes.shape[1:])

    def draw(self, name: str, lanes: Tensor) -> None:
        self.values[name] = self.present[name] = (self.spread(lanes), len(self.ancestors))

    def read(self, name: str) -> Tensor:
        """A site's values in the lanes that stand now, (lanes, *batch, *own)."""
        value, since = self.present[name]
        for index in self.ancestors[since:]:
            value = gathered(value, index)
        self.present[name] = value, len(self.ancestors)
        return self.lanes(value)

    def weigh(self, increment: Tensor, log_joint: Tensor, final: bool) -> None:
        """End a step: weights, evidence and, but at the end, resampling. Both (lanes, *batch), of this step."""
        plan = self.plan
        self.log_joint = self.log_joint + self.spread(log_joint.to(self.even))
        new = added(self.log_weights, self.spread(increment.to(self.even)))
        total = torch.logsumexp(new, 0)
        self.log_evidence = self.log_evidence + total
        alive = self.log_evidence.isfinite()
        held = of_families(self.eve, self.log_weights)
        self.log_weights = torch.where(alive, new - total, self.even)
        self.apart = self.apart + (of_families(self.eve, self.log_weights) - held).square().sum(0)
        self.filtered.append((self.log_weights, len(self.ancestors)))
        size = 1 / (2 * self.log_weights).exp().sum(0)
        self.least = torch.minimum(self.least, size)
        if final or plan.policy == "never":  # the weights of the end are kept: resampling would only add noise
            return
        again = alive & (size < plan.threshold * plan.count) if plan.policy == "adaptive" else alive
        if not bool(again.any()):
            return
        S = plan.count
        shape = (takes(plan.scheme, S), again.numel())
        uniform = torch.rand(shape, dtype=self.even.dtype, device=self.even.device)
        index = ancestors(plan.scheme, torch.where(again, self.log_weights, self.even).reshape(S, -1), uniform)
        stay = torch.arange(S, device=index.device).reshape(-1, *[1] * again.dim())
        index = torch.where(again, index.reshape(S, *again.shape), stay)
        held = of_families(self.eve, self.log_weights)
        self.eve, self.log_joint = self.eve.gather(0, index), self.log_joint.gather(0, index)
        self.log_weights = torch.where(again, self.even, self.log_weights)
        self.chance = self.chance + (of_families(self.eve, self.log_weights) - held).square().sum(0)
        self.ancestors.append(index)

    def variance(self) -> Tensor:
        """Relative variance of each filter's evidence, by the families of the first particles (as `smc` does)."""
        families = of_families(self.eve, self.log_weights)
        around = (families - 1 / self.plan.count).square().sum(0)
        return torch.maximum(around - self.chance, self.apart)

    def families(self) -> Tensor:
        return (of_families(self.eve, self.log_weights) > 0).sum(0)

    def paths(self) -> dict[str, Tensor]:
        """The lines of the particles of the end, site -> (S, R, *batch, *own)."""
        found, index, at = {}, None, len(self.ancestors)
        for name, (value, when) in sorted(self.values.items(), key=lambda item: -item[1][1]):
            for earlier in reversed(self.ancestors[when:at]):
                index = earlier if index is None else earlier.gather(0, index)
            at = min(at, when)
            found[name] = value if index is None else gathered(value, index)
        return {name: found[name] for name in self.values}
