"""`learn`: move theta. The harness around every learner, as `infer` is around every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from .density import Density
from .engine import Run, check_problem, finish, isolated, measured, no_density, reporter
from .learning import Learned, Trail, TrailWriter, check_learnable
from .posterior import Cost, Posterior, Status
from .problem import Problem
from .registry import as_learner, prepared
from .settings import options


class Learner(Protocol):
    """A way to move theta. One file in `learners/` (or an engine with `fit`), decorated with `settings`."""

    name: ClassVar[str]

    def supports(self, density: Density) -> str:
        """Why it cannot learn this problem, in words; '' where it can."""

    def fit(self, density: Density, run: Run) -> Learned:
        """Move the density's theta. Called inside the density, with gradients enabled for theta and phi."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What was learned: theta by name, phi where a guide was trained, the objective on the way, the last posterior,
    cost and status.

    `infer(problem, engine, parameters=fit)` judges it with any engine.
    """

    parameters: Mapping[str, Tensor]
    guide_parameters: Mapping[str, Tensor] = field(default_factory=dict)
    trail: Trail = field(default_factory=lambda: TrailWriter("estimate", 1).trail())
    posterior: Posterior | None = None
    cost: Cost = field(default_factory=Cost)
    status: Status = field(default_factory=lambda: Status("done"))
    notes: tuple[str, ...] = ()
    learner: str = ""
    learner_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


def learn(
    problem: Problem,
    learner: Learner | type[Learner] | str,
    *,
    seed: int = 0,
    parameters: Mapping[str, Tensor] | Fit | None = None,
    progress: bool | Callable[[str, int, int], None] = False,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Fit:
    """Maximise log p_theta(x) (or the learner's own objective) over theta.

    The problem's modules and the param store are left as they were: what was learned is in `Fit.parameters`.
    Arguments as for `infer`. Raises `ProblemError` for input that cannot be used.
    """
    method: Learner = as_learner(learner)
    check_problem(problem)
    with isolated(seed, device):
        density = Density(
            prepared(method, problem),
            device=device,
            dtype=getattr(method, "dtype", None),
            learning=True,
            backend=backend,
        )
        if parameters is not None:
            density.set_parameters(parameters)
        check_learnable(density)
        record: dict[str, Any] = {"learner": method.name, "learner_options": options(method), "seed": seed}
        with density, reporter(progress, method.name) as report:
            with torch.no_grad():
                reason = no_density(density) if density.simulated else method.supports(density)
            if reason:
                return Fit(density.theta.values(), status=Status("unsupported", reason), **record)
            run = Run(density, np.random.SeedSequence(seed), report=report)
            untrained = density.phi.values()
            learned, status, cost = measured(lambda: method.fit(density, run), run)
            theta = density.theta.values()
            broken = [n for n, v in theta.items() if not bool(v.isfinite().all())]
            if broken and status.done:
                status = Status("failed", f"parameter {broken[0]!r} is not finite")
            phi = density.phi.values()
            if all(bool((value == untrained[name]).all()) for name, value in phi.items()):
                phi = {}  # a guide that nothing trained must not pass for a learned one
            common = {"cost": cost, "status": status, "guide_parameters": phi, **record}
            if learned is None:
                return Fit(theta, **common)
            posterior = None
            if learned.draws is not None and status.done:
                posterior = finish(learned.draws, density, Status("done"), cost, method, seed)
            return Fit(theta, trail=learned.trail, posterior=posterior, notes=learned.notes, **common)
