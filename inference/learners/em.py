"""Expectation maximisation with any engine as E-step.

Dempster, Laird & Rubin 1977, doi:10.1111/j.2517-6161.1977.tb01600.x.

    E: weights and draws for p_theta(z | x) at the current theta;   M: theta <- argmax (or a step up) of
    Q(theta) = E[log p_theta(x, z)]

Enumeration or quadrature gives exact EM, forward-backward Baum-Welch, a step up in place of the maximum generalised
EM, NUTS Monte Carlo EM (Wei & Tanner 1990, doi:10.2307/2290005), importance sampling the wake-phase update, a fitted
guide variational EM (Neal & Hinton 1998, doi:10.1007/978-94-011-5014-9_12), the most probable z alone hard EM (Celeux &
Govaert 1992, doi:10.1016/0167-9473(92)90042-E).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..density import Density
from ..em_steps import M_STEPS, Chains, check_m_step, e_step_for, expect, move, takes_marginals
from ..engine import NO_LATENTS, Draws, EngineError, Run
from ..engines.enumeration import Enumeration
from ..engines.map import MAP
from ..learning import Learned, Trail, TrailWriter, expected_log_joint, flat_draws, make_optimizer, minibatches
from ..posterior import gathered
from ..preflight import check_minibatch
from ..problem import Problem, ProblemError
from ..registry import as_engine, prepared
from ..settings import check_optimizer, check_positive, settings

FALL = 1e-9  # of the log likelihood, relative: what rounding may take from an exact EM step


@settings
class EM:
    """Alternate an E-step by any engine with an M-step; `tolerance` ends it early where the E-step is exact.

    An exact EM step cannot lower the log likelihood: one that does ends the run as failed, with the step.

    e_step          an engine; None: enumeration where it serves, else forward-backward, else importance sampling with
                    100 draws. Exact marginals of a chain go to the problem's M-step where it takes `marginals=`
    hard            put all weight on the most probable z (`Enumeration`, or `MAP` for continuous latents), which climbs
                    max_z log p_theta(x, z), the trail then: for discrete z a lower bound of the log likelihood
    num_steps       E-steps (each followed by an M-step)
    m_step          'closed' (the problem's own), 'full' (L-BFGS until Q is maximal), 'gradient', or 'auto': closed
                    where the problem has one, full where the E-step is exact, else gradient
    gradient_steps  optimiser steps for each M-step of kind 'gradient'
    batch_size      data for each E- and M-step; None: all
    optimizer       any torch optimiser class, called as optimizer(tensors, lr=learning_rate)
    tolerance       with an exact E-step on all data, stop when no parameter moves by more than this times 1 + |itself|
    num_starts      thetas to start from: the program's own, and others drawn around it, of which the one that ends
                    highest is kept; `notes` tell of all
    start_spread    sd of the other starts in unconstrained space, in units of max(1, |theta|)
    """

    name: ClassVar[str] = "em"
    dtype: ClassVar[torch.dtype] = torch.float64
    e_step: Any = None
    hard: bool = False
    num_steps: int = 100
    m_step: str = "auto"
    gradient_steps: int = 1
    batch_size: int | None = None
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    tolerance: float = 1e-10
    num_starts: int = 1
    start_spread: float = 1.0

    KINDS: ClassVar[tuple[str, ...]] = M_STEPS

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "start_spread")
        check_optimizer(self)
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance < 1:
            raise ProblemError(f"EM(tolerance={self.tolerance!r}): expected a number of at least 0, below 1.")
        if self.m_step not in self.KINDS:
            raise ProblemError(f"EM(m_step={self.m_step!r}): expected one of {', '.join(self.KINDS)}.")
        engine = None if self.e_step is None else as_engine(self.e_step)
        if self.hard and engine is not None and engine.name not in (Enumeration.name, MAP.name):
            raise ProblemError(f"EM(hard=True): e_step={engine.name!r} gives no mode; use Enumeration() or MAP().")
        if self.hard and getattr(engine, "space", "constrained") != "constrained":
            raise ProblemError("EM(hard=True) climbs log p(x, z) itself: use MAP(space='constrained').")
        if self.num_starts > 1 and self.batch_size is not None:
            raise ProblemError("EM(num_starts=...) compares starts by all data: use batch_size=None.")

    def prepare(self, problem: Problem) -> Problem:
        return problem if self.e_step is None else prepared(as_engine(self.e_step), problem)

    def supports(self, density: Density) -> str:
        if not density.latents:
            return NO_LATENTS
        engine = self._engine(density)
        check_m_step(density, self.m_step)
        if self.batch_size is not None:
            check_minibatch(density, self.batch_size)
            if not density.batch_plates:
                return "minibatches need latents that belong to one datum each; this model has global latents"
            if self._kind(density, engine) == "closed":
                raise ProblemError("a closed-form M-step needs all data: use batch_size=None or m_step='gradient'.")
        reason = engine.supports(density)
        return f"the E-step cannot run: {reason}" if reason else ""

    def fit(self, density: Density, run: Run) -> Learned:
        if self.num_starts == 1:
            return self._ascend(density, run)
        tensors = density.theta.tensors
        own = [t.detach().clone() for t in tensors]
        ends: list[tuple[float, Learned, list[Tensor]]] = []
        told, first_error = [], None
        for start in range(self.num_starts):
            for tensor, value in zip(tensors, own, strict=True):
                away = torch.zeros_like(value) if start == 0 else torch.randn_like(value)
                tensor.data.copy_(value + self.start_spread * value.abs().clamp_min(1) * away)
            try:
                learned = self._ascend(density, run if start == 0 else run.child(self.num_steps + start))
            except (EngineError, ProblemError) as error:
                first_error = first_error or error
                told.append(f"start {start + 1} failed: {error}")
                continue
            if not len(learned.trail):
                raise EngineError("num_starts compares evidence, and this E-step gives none: use num_starts=1")
            ends.append((float(learned.trail.value[-1]), learned, [t.detach().clone() for t in tensors]))
            told.append(f"start {start + 1} ended at {ends[-1][0]:.6g} nats")
        if first_error is not None and not ends:
            raise first_error
        _, learned, theta = max(ends, key=lambda end: end[0])
        for tensor, value in zip(tensors, theta, strict=True):
            tensor.data.copy_(value)
        return replace(learned, notes=(*learned.notes, *told))

    def _ascend(self, density: Density, run: Run) -> Learned:
        """EM from the theta that stands in the density."""
        engine = self._engine(density)
        kind = self._kind(density, engine)
        marginals = kind == "closed" and takes_marginals(engine, density.problem)
        exact = self.hard or marginals or getattr(engine, "exact", False)
        optimizer = make_optimizer(self.optimizer, density.theta.tensors, self.learning_rate)
        batches = minibatches(density, self.batch_size)
        ascent = _Ascent(density, kind)
        draws: Draws | None = None
        chains = Chains(density, persistent=getattr(engine, "persistent", False))
        notes: tuple[str, ...] = ()
        for step in range(self.num_steps):
            index = next(batches)
            with nullcontext() if index is None else density.minibatch(index):
                draws = self._expect(engine, density, run.child(step, chains.of(index)), marginals)
                chains.keep(index, draws.state)
                ascent.add(step, draws, whole=index is None, hard=self.hard)
                before = [t.detach().clone() for t in density.theta.tensors]
                move(kind, density, draws, optimizer, self.gradient_steps)
                moved = max(
                    float(((t.detach() - old).abs() / (1 + old.abs())).max())
                    for t, old in zip(density.theta.tensors, before, strict=True)
                )
            if exact and index is None and moved <= self.tolerance:
                notes = (f"converged after {step + 1} steps",)
                break
            run.progress("EM steps", step + 1, self.num_steps)
        if self.batch_size is None:
            draws = self._expect(engine, density, run.child(self.num_steps, chains.of(None)))
            ascent.add(step + 1, draws, whole=True, hard=self.hard)
        return Learned(ascent.trail(), None if self.batch_size is not None else draws, (*notes, *ascent.notes))

    def _expect(self, engine: Any, density: Density, run: Run, marginals: bool = False) -> Draws:
        draws = expect(engine, density, run, marginals)
        return _hardened(draws) if self.hard else draws

    def _engine(self, density: Density) -> Any:
        if self.e_step is not None:
            return as_engine(self.e_step)
        if self.hard and density.continuous:
            return MAP()
        return e_step_for(density)

    def _kind(self, density: Density, engine: Any) -> str:
        if self.m_step != "auto":
            return self.m_step
        if density.problem.m_step is not None and self.batch_size is None:
            return "closed"
        exact = self.hard or getattr(engine, "exact", False)
        return "full" if exact and self.batch_size is None else "gradient"


class _Ascent:
    """The trail of EM, and a watch over what cannot fall."""

    def __init__(self, density: Density, kind: str) -> None:
        self.density, self.kind = density, kind
        self.writer = TrailWriter("estimate", 1)
        self.notes: list[str] = []
        self.falls = 0
        self._last: tuple[float, float] | None = None

    def add(self, step: int, draws: Draws, whole: bool, hard: bool) -> None:
        """The objective at the theta of these draws. Raises `EngineError` where it is not finite or must not fall."""
        if hard:
            with torch.no_grad():
                figures = flat_draws(draws, tuple(self.density.batch_shape))
                value, error, slack = float(expected_log_joint(self.density, *figures)), 0.0, 0.0
            self.writer.kind = "estimate" if self.density.continuous else "lower bound"
        elif draws.log_evidence is not None:
            evidence, scale = draws.log_evidence, self.density.data_scale
            value, error = (scale * figure for figure in evidence.total())
            slack = float(evidence.std_error.sum())  # what a rule may be wrong by has one sign for all data
            self.writer.kind = evidence.kind
        else:
            return
        self.writer.add(step, value, error)
        if not math.isfinite(value):
            raise EngineError(f"the log likelihood became {value} at step {step}")
        if not whole or not (hard or draws.deterministic or draws.marginals is not None):
            return
        if self._last is not None and value < self._last[0] - FALL * (1 + abs(value)) - slack - self._last[1]:
            if self.kind != "gradient":
                raise EngineError(
                    f"the log likelihood fell from {self._last[0]:.10g} to {value:.10g} at step {step}, which an exact "
                    f"EM step cannot do: its M-step ({self.kind}) is no maximum of the expected log joint"
                )
            self.falls += 1
        self._last = value, slack

    def trail(self) -> Trail:
        if self.falls:
            words = "steps, which gradients overshot: reduce learning_rate"
            self.notes.append(f"the log likelihood fell at {self.falls} {words}")
        return self.writer.trail()


def _hardened(draws: Draws) -> Draws:
    """The draw of greatest weight alone, for each datum."""
    if draws.log_weights is None:
        return draws
    best = draws.log_weights.flatten(0, 1).argmax(0, keepdim=True)  # (1, *batch)
    values = {n: gathered(v.flatten(0, 1), best.to(v.device))[None] for n, v in draws.values.items()}
    return Draws(values, "point")
