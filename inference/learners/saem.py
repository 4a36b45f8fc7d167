"""Stochastic-approximation EM: a few draws at each step, averaged over the steps.

    Q_t(theta) = (1 - g_t) Q_{t-1}(theta) + g_t mean_s log p_theta(x, z_ts),    z_ts from a kernel that leaves
    theta_t = argmax Q_t                                                        p_{theta_{t-1}}(z | x) as it is

with g_t = 1 for `warmup_steps` and then g_t = k^-decay, k = 1, 2 .. Monte Carlo EM has an error that only more draws
reduce; here it falls as the steps go on, and theta converges to a maximum of the likelihood. Delyon, Lavielle &
Moulines 1999, doi:10.1214/aos/1018031103; with chains Kuhn & Lavielle 2004, doi:10.1051/ps:2004007. Without a maximum
in closed form, the gradient of the last draws moves theta by steps that fall as g_t (Gu & Kong 1998,
doi:10.1073/pnas.95.13.7270).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..density import Density
from ..em_steps import M_STEPS, Chains, check_m_step, e_step_for, expect, improve
from ..engine import NO_LATENTS, Run
from ..engines.enumeration import Enumeration
from ..engines.hmc import HMC
from ..learning import Learned, TrailWriter, flat_draws, make_optimizer
from ..memory import MOST, Memory
from ..problem import Problem, ProblemError
from ..registry import as_engine, prepared
from ..settings import check_choice, check_optimizer, check_positive, settings

STUCK = 0.1  # a mean acceptance below which chains hardly move


@settings
class SAEM:
    """EM whose E-steps are a few draws, remembered with weights that fall.

    A closed or full M-step sees all draws since the warm-up; beyond 400 of each datum they are exchanged for fewer that
    say the same, where there are such, and else thinned, which `notes` tell (see `memory`): the cost of a step and the
    memory do not grow with the steps.

    e_step          an engine whose chains go on from step to step; None: two chains of one HMC draw each for every
                    datum, or enumeration where it serves
    num_steps       E-steps, each followed by an M-step
    warmup_steps    of them, those that forget what was before; then the chains are tuned afresh
    decay           of the step sizes, above 1/2 to 1
    m_step          'closed' (the problem's own), 'full' (L-BFGS), 'gradient', or 'auto': closed where the problem has
                    one, else gradient
    gradient_steps  optimiser steps for each M-step of kind 'gradient', at a rate of learning_rate x g_t
    optimizer       any torch optimiser class, called as optimizer(tensors, lr=learning_rate)
    """

    name: ClassVar[str] = "saem"
    dtype: ClassVar[torch.dtype] = torch.float64
    e_step: Any = None
    num_steps: int = 200
    warmup_steps: int = 50
    decay: float = 1.0
    m_step: str = "auto"
    gradient_steps: int = 1
    learning_rate: float = 0.1
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "decay")
        check_optimizer(self)
        check_choice(self, "m_step", M_STEPS)
        if not 0.5 < self.decay <= 1:
            raise ProblemError(f"SAEM(decay={self.decay!r}): expected a number above 1/2 and at most 1.")
        if self.e_step is not None:
            as_engine(self.e_step)

    def prepare(self, problem: Problem) -> Problem:
        return problem if self.e_step is None else prepared(as_engine(self.e_step), problem)

    def supports(self, density: Density) -> str:
        if not density.latents:
            return NO_LATENTS
        check_m_step(density, self.m_step)
        reason = self._engine(density).supports(density)
        return f"the E-step cannot run: {reason}" if reason else ""

    def fit(self, density: Density, run: Run) -> Learned:
        engine = self._engine(density)
        kind = self.m_step
        if kind == "auto":
            kind = "gradient" if density.problem.m_step is None else "closed"
        optimizer = make_optimizer(self.optimizer, density.theta.tensors, self.learning_rate)
        writer, notes = TrailWriter("estimate", 1), list[str]()
        chains = Chains(density, persistent=False)
        memory = Memory(density)
        for step in range(self.num_steps):
            gain = 1.0 if step < self.warmup_steps else (step - self.warmup_steps + 1.0) ** -self.decay
            afresh = step == self.warmup_steps  # theta has come far since the chains were tuned
            draws = expect(engine, density, run.child(step, {} if afresh else chains.of(None)))
            chains.keep(None, draws.state)
            if draws.log_evidence is not None:
                writer.kind = draws.log_evidence.kind
                writer.add(step, *draws.log_evidence.total())
            values, weights = flat_draws(draws, tuple(density.batch_shape))
            if kind == "gradient":
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * gain
            else:
                values, weights = memory.blended(values, weights, gain)
            improve(kind, density, values, weights, optimizer, self.gradient_steps)
            run.progress("SAEM steps", step + 1, self.num_steps)
        if memory.thinned:
            notes.append(
                f"what was drawn was thinned to {MOST // 2} draws of each datum at a time: theta keeps the error of "
                "about so many, however many steps there are"
            )
        accepted = draws.sample_stats.get("acceptance_rate")
        if accepted is not None and float(accepted.mean()) < STUCK:
            notes.append(f"the chains hardly move: they accepted {float(accepted.mean()):.0%} at the last step")
        draws = expect(engine, density, run.child(self.num_steps, chains.of(None)))
        return Learned(writer.trail(), draws, tuple(notes))

    def _engine(self, density: Density) -> Any:
        if self.e_step is not None:
            return as_engine(self.e_step)
        if not Enumeration().supports(density) or not density.continuous:
            return e_step_for(density)
        return HMC(num_chains=2, num_samples=1, warmup_steps=100)
