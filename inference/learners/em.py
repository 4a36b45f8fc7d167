"""Expectation maximisation with any engine as E-step.

Dempster, Laird & Rubin 1977, doi:10.1111/j.2517-6161.1977.tb01600.x.

    E: weights and draws for p_theta(z | x) at the current theta;   M: theta <- argmax (or a step up) of
    Q(theta) = E[log p_theta(x, z)]

Enumeration or quadrature gives exact EM, NUTS Monte Carlo EM (Wei & Tanner 1990, doi:10.2307/2290005), importance
sampling the wake-phase update, a fitted guide variational EM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..density import Density
from ..engine import Draws, EngineError, Run
from ..engines.enumeration import Enumeration
from ..engines.importance_sampling import ImportanceSampling
from ..learning import Learned, TrailWriter, expected_log_joint, flat_draws, make_optimizer, minibatches
from ..preflight import check_minibatch
from ..problem import Problem, ProblemError
from ..registry import as_engine
from ..settings import check_optimizer, check_positive, settings


@settings
class EM:
    """Alternate an E-step by any engine with an M-step; `tolerance` ends it early where the E-step is exact.

    e_step          an engine; None: enumeration where it serves, else importance sampling with 100 draws
    num_steps       E-steps (each followed by an M-step)
    m_step          'closed' (the problem's own), 'full' (L-BFGS until Q is maximal), 'gradient', or 'auto': closed
                    where the problem has one, full where the E-step is exact, else gradient
    gradient_steps  optimiser steps for each M-step of kind 'gradient'
    batch_size      data for each E- and M-step; None: all
    optimizer       any torch optimiser class, called as optimizer(tensors, lr=learning_rate)
    tolerance       with an exact E-step on all data, stop when no parameter moves by more than this times 1 + |itself|
    """

    name: ClassVar[str] = "em"
    dtype: ClassVar[torch.dtype] = torch.float64
    e_step: Any = None
    num_steps: int = 100
    m_step: str = "auto"
    gradient_steps: int = 1
    batch_size: int | None = None
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    tolerance: float = 1e-10

    KINDS: ClassVar[tuple[str, ...]] = ("auto", "closed", "full", "gradient")

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate")
        check_optimizer(self)
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance < 1:
            raise ProblemError(f"EM(tolerance={self.tolerance!r}): expected a number of at least 0, below 1.")
        if self.m_step not in self.KINDS:
            raise ProblemError(f"EM(m_step={self.m_step!r}): expected one of {', '.join(self.KINDS)}.")
        if self.e_step is not None:
            as_engine(self.e_step)

    def prepare(self, problem: Problem) -> Problem:
        prepare = getattr(as_engine(self.e_step), "prepare", None) if self.e_step is not None else None
        return prepare(problem) if prepare else problem

    def supports(self, density: Density) -> str:
        if not density.latents:
            return "the model has no latent sites: learn(problem, ML()) fits a fully observed model"
        engine = self._engine(density)
        if self.m_step == "closed" and density.problem.m_step is None:
            raise ProblemError(
                f"problem {density.problem.name!r} declares no closed-form M-step: pass m_step=... to it."
            )
        if self.batch_size is not None:
            check_minibatch(density, self.batch_size)
            if not density.batch_plates:
                return "minibatches need latents that belong to one datum each; this model has global latents"
            if self._kind(density, engine) == "closed":
                raise ProblemError("a closed-form M-step needs all data: use batch_size=None or m_step='gradient'.")
        reason = engine.supports(density)
        return f"the E-step cannot run: {reason}" if reason else ""

    def fit(self, density: Density, run: Run) -> Learned:
        engine = self._engine(density)
        kind = self._kind(density, engine)
        optimizer = make_optimizer(self.optimizer, density.theta.tensors, self.learning_rate)
        batches = minibatches(density, self.batch_size)
        writer = TrailWriter("estimate", 1)
        draws: Draws | None = None
        chains = _Chains(density, persistent=getattr(engine, "persistent", False))
        notes: tuple[str, ...] = ()
        for step in range(self.num_steps):
            index = next(batches)
            with nullcontext() if index is None else density.minibatch(index):
                draws = self._expect(engine, density, run.child(step, chains.of(index)))
                chains.keep(index, draws.state)
                if draws.log_evidence is not None:
                    evidence = draws.log_evidence
                    value, error = evidence.total()
                    writer.kind = evidence.kind
                    writer.add(step, value * density.data_scale, error * density.data_scale)
                    if not math.isfinite(value):
                        raise EngineError(f"the log likelihood became {value} at step {step}")
                before = [t.detach().clone() for t in density.theta.tensors]
                self._maximise(kind, density, draws, optimizer)
                moved = max(
                    float(((t.detach() - old).abs() / (1 + old.abs())).max())
                    for t, old in zip(density.theta.tensors, before, strict=True)
                )
            if getattr(engine, "exact", False) and index is None and moved <= self.tolerance:
                notes = (f"converged after {step + 1} steps",)
                break
            run.progress("EM steps", step + 1, self.num_steps)
        if self.batch_size is None:
            draws = self._expect(engine, density, run.child(self.num_steps, chains.of(None)))
            if draws.log_evidence is not None:
                writer.add(step + 1, *draws.log_evidence.total())
        return Learned(writer.trail(), None if self.batch_size is not None else draws, notes)

    def _expect(self, engine: Any, density: Density, run: Run) -> Draws:
        with torch.no_grad():
            return engine.run(density, run)

    def _maximise(self, kind: str, density: Density, draws: Draws, optimizer: torch.optim.Optimizer) -> None:
        values, weights = flat_draws(draws, tuple(density.batch_shape))
        if kind == "closed":
            given = {n: v.double() if v.is_floating_point() else v for n, v in values.items()}
            density.theta.set(_closed_form(density.problem, given, weights, density.args))
            return
        tensors = density.theta.tensors
        if kind == "full":
            maximise(lambda: expected_log_joint(density, values, weights), tensors)
            return
        for _ in range(self.gradient_steps):
            with torch.enable_grad():
                loss = -expected_log_joint(density, values, weights)
                gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            if not bool(loss.isfinite()):
                raise EngineError("the expected log joint is not finite: a draw with weight has no density")
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()

    def _engine(self, density: Density) -> Any:
        if self.e_step is not None:
            return as_engine(self.e_step)
        if not Enumeration().supports(density):
            return Enumeration()
        # a pilot at every step would cost more than it saves
        proposal = "laplace" if density.continuous and not density.unlisted else "auto"
        return ImportanceSampling(num_samples=100, proposal=proposal)

    def _kind(self, density: Density, engine: Any) -> str:
        if self.m_step != "auto":
            return self.m_step
        if density.problem.m_step is not None and self.batch_size is None:
            return "closed"
        return "full" if getattr(engine, "exact", False) and self.batch_size is None else "gradient"


class _Chains:
    """The state of an E-step, kept from one step to the next: of all data at once, or, where an engine's state is per
    chain and datum, of each datum until it comes up again."""

    def __init__(self, density: Density, persistent: bool) -> None:
        self.data = density.batch_shape[0] if persistent and len(density.batch_shape) == 1 else 0
        self.state: dict[str, Tensor] = {}
        self.seen = torch.zeros(self.data, dtype=torch.bool)

    def of(self, index: Tensor | None) -> dict[str, Tensor]:
        """Where to go on from for these rows; {} where one of them has not been met."""
        if index is None:
            return self.state
        if not self.data or not bool(self.seen[index.cpu()].all()):
            return {}
        return {name: value[:, index] for name, value in self.state.items()}

    def keep(self, index: Tensor | None, state: Mapping[str, Tensor]) -> None:
        if index is None:
            self.state = dict(state)
        elif self.data:
            for name, value in state.items():  # (C, rows, ...)
                if name not in self.state:
                    self.state[name] = value.new_zeros((value.shape[0], self.data, *value.shape[2:]))
                self.state[name][:, index] = value
            self.seen[index.cpu()] = True


def _closed_form(problem: Problem, draws: dict[str, Tensor], weights: Tensor, args: tuple[Any, ...]) -> Any:
    """What the problem's own M-step answers. Raises `ProblemError` where that is no set of parameters."""
    assert problem.m_step is not None
    try:
        found = problem.m_step(draws, weights, *args)
    except Exception as error:
        raise ProblemError(
            f"m_step of problem {problem.name!r} failed when called with (draws, weights, *args): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Mapping) or not found:
        raise ProblemError(f"m_step of problem {problem.name!r} must return parameters by name, got {found!r}.")
    return found


def maximise(objective: Callable[[], Tensor], tensors: list[Tensor], num_steps: int = 100) -> None:
    """Climb to the nearest maximum of a smooth function of the tensors, by L-BFGS with strong-Wolfe line search."""
    free = [t.detach().clone() for t in tensors]  # what moves, so that no step is noted in the owner's tensors
    optimizer = torch.optim.LBFGS(
        free, max_iter=num_steps, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def put() -> None:
        for tensor, value in zip(tensors, free, strict=True):
            tensor.data.copy_(value)

    def closure() -> Tensor:
        put()
        with torch.enable_grad():
            loss = -objective()
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        for value, gradient in zip(free, gradients, strict=True):
            value.grad = torch.zeros_like(value) if gradient is None else gradient
        return loss.detach()

    optimizer.step(closure)
    put()
