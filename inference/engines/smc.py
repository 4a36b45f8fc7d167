"""Sequential Monte Carlo along a tempered path: particles of each datum, from the prior or the guide to the posterior.

    log Z = sum_k log sum_s W_s f_k(u_s) / f_{k-1}(u_s),    W_s: the weights carried into step k

At fixed temperatures and kernels the estimate is unbiased on the natural scale; temperatures, step sizes and numbers
of moves that are learned from the particles themselves, as here, leave a bias of order 1 / S. The standard error comes
from the families of the first generation's particles, E, relative to Z:

    variance = sum_e (sum_{s: E_s = e} W_s - 1 / S)^2 - sum_r sum_e (change of family e's weight in resampling r)^2

For multinomial resampling this is the estimator of Lee & Whiteley (2018, doi:10.1093/biomet/asy028; Chan & Lai 2013,
doi:10.1214/13-AOS1172), with the chance that resampling brings in as it happened in the place of its mean, so that it
serves the other schemes too; and never less than what the steps add up to where the moves forget all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..density import Density
from ..engine import Draws, Run, as_chain, seed_all
from ..groups import Bound, as_kernel
from ..kernels import streams
from ..kernels.metropolis import Point
from ..kernels.paths import PATHS, STARTS, begin, choose, why_not_start
from ..posterior import Evidence
from ..problem import ProblemError
from ..resampling import POLICIES, SCHEMES
from ..settings import check_choice, check_share, settings
from ..tempering import Carried, PathPlan, carry, seed_of

CRITERIA = ("cess", "ess")
FEW_FAMILIES = 10


@settings
class SMC:
    """Carry particles of each datum along a path, at a pace that each datum finds for itself.

    num_samples        particles of each datum
    start              'prior', 'guide', or 'auto': a guide that stands ready, else the prior
    path               'geometric' or 'arithmetic'
    num_temperatures   None: chosen by `target_ess`; a number: so many, evenly spaced in the cube root of b
    target_ess         share of the effective sample size that a step may leave: fewer and larger steps where small
    criterion          'cess', conditional on the weights carried, or 'ess', relative to the size before the step
    resampling         'systematic', 'stratified', 'residual' or 'multinomial'
    policy             resample 'always', 'never', or 'adaptive', below `threshold` of the particles
    kernel             'hmc', 'langevin', 'random_walk', 'nuts', or a kernel with its settings
    num_moves          for each temperature; None: until no coordinate keeps a correlation above 0.3 with where it
                       was, and `max_moves` at most
    """

    name: ClassVar[str] = "smc"
    num_samples: int = 1000
    start: str = "auto"
    path: str = "geometric"
    num_temperatures: int | None = None
    target_ess: float = 0.85
    criterion: str = "cess"
    resampling: str = "systematic"
    policy: str = "adaptive"
    threshold: float = 0.5
    kernel: Any = "hmc"
    num_moves: int | None = None
    max_moves: int = 10

    def __post_init__(self) -> None:
        check_choice(self, "start", STARTS)
        check_choice(self, "path", PATHS)
        check_choice(self, "criterion", CRITERIA)
        check_choice(self, "resampling", SCHEMES)
        check_choice(self, "policy", POLICIES)
        check_share(self, "target_ess", "threshold")
        as_kernel(self, self.kernel)
        if not isinstance(self.num_samples, bool) and isinstance(self.num_samples, int) and self.num_samples == 1:
            raise ProblemError("SMC(num_samples=1): one particle has no weights to compare; take at least 2.")

    def supports(self, density: Density) -> str:
        return why_not_start(density, self.start)

    def plan(self) -> PathPlan:
        steps = self.num_temperatures
        betas = None if steps is None else (torch.arange(steps + 1, dtype=torch.float64) / steps) ** 3
        return PathPlan(
            betas, self.criterion, self.target_ess, self.resampling, self.policy, self.threshold,
            self.num_moves or self.max_moves, self.num_moves is not None,
        )  # fmt: skip

    def sized(self, calls: float, density: Density) -> Self:
        """As many particles as the path allows: some thirty calls each, where it finds its own temperatures."""
        each = 30.0
        if self.num_temperatures is not None:
            each = 3 + self.num_temperatures * 3 * (self.num_moves or self.max_moves / 2)
        return replace(self, num_samples=max(10, int(calls / each)))

    def run(self, density: Density, run: Run) -> Draws:
        parts, draw = begin(density, choose(density, self.start))
        seed_all(run.child(0).seed)
        u = draw(self.num_samples).reshape(-1, density.dim)
        bound = Bound.of(density, self.num_samples, parts, as_kernel(self, self.kernel), PATHS[self.path], u)
        key = streams.keys(seed_of(run, 1), bound.lanes.total, u.device)
        datum_key = streams.keys(seed_of(run, 2), bound.lanes.data, u.device)
        plan = self.plan()

        def move(data: Tensor, lanes: Tensor, point: Point) -> tuple[Point, Carried]:
            point, carried = carry(bound, point, key[lanes], datum_key[data], plan)
            return point, replace(carried, stages=carried.stages[-1:])  # of thousands of groups

        return answer(density, *bound.through(u, move, run.progress))


def joined(told: list[tuple[Tensor, Carried]], name: str) -> Tensor:
    """A figure of all data, the last dimension theirs."""
    return torch.cat([getattr(carried, name)[..., : len(data)] for data, carried in told], -1)


def answer(density: Density, u: Tensor, told: list[tuple[Tensor, Carried]]) -> Draws:
    batch = tuple(density.batch_shape)
    log_z, variance = joined(told, "log_evidence"), joined(told, "variance")
    log_weights = joined(told, "log_weights").double()
    families, arrived = joined(told, "ancestors_left"), joined(told, "arrived")
    last = {f: torch.cat([getattr(c.stages[-1], f)[: len(d)] for d, c in told]) for f in ("acceptance", "moves")}
    alarms = []
    worst = int(families.min())
    if worst < FEW_FAMILIES and bool((variance > 0).any()):
        alarms.append(
            f"all particles of a datum descend from {worst} of the first, too few for its standard error: "
            "take more particles"
        )
    if any(carried.hurried for _, carried in told):
        alarms.append("the path was cut short, its steps had become tiny: take more particles or another start")
    return Draws(
        as_chain(density.complete(u.reshape(-1, *batch, density.dim))),
        "weighted",
        (log_weights + log_z.double()).reshape(1, -1, *batch).cpu(),
        Evidence(log_z.reshape(batch), variance.sqrt().reshape(batch), "estimate"),
        log_ratio=log_weights.reshape(-1, *batch).cpu(),
        alarms=tuple(alarms),
        figures={
            "temperatures": arrived.reshape(batch).double(),
            "families": families.reshape(batch).double(),
            "acceptance": last["acceptance"].reshape(batch),
            "moves": last["moves"].reshape(batch),
        },
    )
