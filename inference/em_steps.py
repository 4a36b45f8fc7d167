"""The two halves of expectation maximisation, as its family shares them.

E: draws and weights for p_theta(z | x);    M: theta <- argmax (or a step up) of Q(theta) = E[log p_theta(x, z)]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .density import Density
from .engine import Draws, EngineError, Run
from .engines.enumeration import Enumeration
from .engines.forward_backward import ForwardBackward
from .engines.importance_sampling import ImportanceSampling
from .learning import expected_log_joint, flat_draws
from .problem import Problem, ProblemError

M_STEPS = ("auto", "closed", "full", "gradient")


def expect(engine: Any, density: Density, run: Run, marginals: bool = False) -> Draws:
    """The engine's draws; with `marginals` what it knows exactly in their place."""
    with torch.no_grad():
        return engine.expect(density, run) if marginals else engine.run(density, run)


def takes_marginals(engine: Any, problem: Problem) -> bool:
    """Whether exact marginals go from this E-step to the problem's own M-step."""
    if problem.m_step is None or not hasattr(engine, "expect"):
        return False
    return "marginals" in inspect.signature(problem.m_step).parameters


def e_step_for(density: Density) -> Any:
    """Enumeration where it serves, else forward-backward, else importance sampling with 100 draws."""
    if not Enumeration().supports(density):
        return Enumeration()
    if not density.continuous and not ForwardBackward().supports(density):
        return ForwardBackward()
    # a pilot at every step would cost more than it saves
    proposal = "laplace" if density.continuous and not density.unlisted else "auto"
    return ImportanceSampling(num_samples=100, proposal=proposal)


def check_m_step(density: Density, m_step: str) -> None:
    if m_step == "closed" and density.problem.m_step is None:
        raise ProblemError(f"problem {density.problem.name!r} declares no closed-form M-step: pass m_step=... to it.")


def move(kind: str, density: Density, draws: Draws, optimizer: torch.optim.Optimizer, gradient_steps: int) -> None:
    """The M-step of this kind on what the E-step answered."""
    if draws.marginals is not None:
        found = closed_form(density.problem, {}, torch.ones(0), density.args, marginals=draws.marginals)
        density.theta.set(found)
        return
    improve(kind, density, *flat_draws(draws, tuple(density.batch_shape)), optimizer, gradient_steps)


def improve(
    kind: str,
    density: Density,
    values: Mapping[str, Tensor],
    weights: Tensor,
    optimizer: torch.optim.Optimizer,
    gradient_steps: int,
) -> None:
    """The M-step of this kind on draws (S, *batch, *event) and weights (S, *batch) that sum to one."""
    if kind == "closed":
        given = {n: v.double() if v.is_floating_point() else v for n, v in values.items()}
        density.theta.set(closed_form(density.problem, given, weights, density.args))
        return
    tensors = density.theta.tensors
    if kind == "full":
        maximise(lambda: expected_log_joint(density, values, weights), tensors)
        return
    for _ in range(gradient_steps):
        with torch.enable_grad():
            loss = -expected_log_joint(density, values, weights)
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        if not bool(loss.isfinite()):
            raise EngineError("the expected log joint is not finite: a draw with weight has no density")
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()


class Chains:
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


def closed_form(
    problem: Problem, draws: dict[str, Tensor], weights: Tensor, args: tuple[Any, ...], **known: Any
) -> Any:
    """What the problem's own M-step answers. Raises `ProblemError` where that is no set of parameters."""
    assert problem.m_step is not None
    try:
        found = problem.m_step(draws, weights, *args, **known)
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
