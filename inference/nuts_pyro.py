"""NUTS by Pyro's own kernel: chain after chain, step after step in Python. Slow, and independent of nutpie.

Hoffman & Gelman 2014, jmlr.org/papers/v15/hoffman14a.html. Each chain has a seed of its own, derived so that no two
runs share one (Pyro's own seeding gives chain 1 of seed 0 and chain 0 of seed 1 the same draws).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from pyro.infer import mcmc
from torch import Tensor

from .chains import Chain, ChainPlan, Tuning
from .density import Density
from .engine import Run, seed_all


def sample(density: Density, starts: Tensor, tuned: Tuning | None, run: Run, plan: ChainPlan) -> list[Chain]:
    """Run a chain from each of `starts` (C, *batch, D), with what was tuned before or after a warm-up.

    On Ctrl-C what is there is returned, if any chain has a draw after its warm-up and the run stands alone.
    """
    value_and_grad = density.compiled_value_and_grad(starts[0])
    chains: list[Chain] = []
    for c, start in enumerate(starts):
        seed_all(run.child(c).child(0).seed)  # child(c) itself drew the start
        kernel = _kernel(value_and_grad, start, tuned, plan, c)
        rows: dict[str, list[Any]] = defaultdict(list)
        try:
            with torch.enable_grad():
                position = _warm_up(kernel, tuned, run, plan, c)
                _draw(kernel, position, density, run, plan, c, rows)
        except KeyboardInterrupt:
            if run.nested or not (chains or rows["lp"]):
                raise
            return [*chains, _read(kernel, rows)] if rows["lp"] else chains
        chains.append(_read(kernel, rows))
        kernel.cleanup()
    return chains


def _kernel(value_and_grad: Any, start: Tensor, tuned: Tuning | None, plan: ChainPlan, c: int) -> mcmc.NUTS:
    def potential(position: dict[str, Tensor]) -> Tensor:
        return _Potential.apply(position["u"], value_and_grad, start.shape)

    kernel = mcmc.NUTS(
        potential_fn=potential,
        step_size=float(tuned.step_size[c]) if tuned else 1.0,
        adapt_step_size=not tuned,
        adapt_mass_matrix=not tuned,
        target_accept_prob=plan.target_acceptance,
        max_tree_depth=plan.max_tree_depth,
    )
    kernel.initial_params = {"u": start.reshape(-1).clone()}
    return kernel


def _warm_up(kernel: Any, tuned: Tuning | None, run: Run, plan: ChainPlan, c: int) -> dict[str, Tensor]:
    position = kernel.initial_params
    if tuned:
        kernel.setup(0)
        mass = tuned.inverse_mass[c].to(position["u"])
        kernel.mass_matrix_adapter.inverse_mass_matrix = {("u",): mass}
        return position
    with run.tuning():
        kernel.setup(plan.warmup_steps)  # searches for a first step size
        for step in range(plan.warmup_steps):
            position = kernel.sample(position)
            run.progress(f"chain {c + 1} warm-up", step + 1, plan.warmup_steps)
    return position


def _draw(
    kernel: Any,
    position: dict[str, Tensor],
    density: Density,
    run: Run,
    plan: ChainPlan,
    c: int,
    rows: dict[str, list[Any]],
) -> None:
    for step in range(plan.num_samples):
        divergences, accepted = len(kernel._divergences), kernel._mean_accept_prob
        gradients = density.counts["gradients"]
        position = kernel.sample(position)
        count = kernel._t - kernel._warmup_steps  # Pyro keeps a running mean over the draws
        steps = round(density.counts["gradients"] - gradients)
        row = {
            "position": position["u"].detach(),
            "diverging": len(kernel._divergences) > divergences,
            "acceptance_rate": float(kernel._mean_accept_prob * count - accepted * (count - 1)),
            "n_steps": steps,
            "tree_depth": (steps + 1).bit_length() - 1,  # of the doublings that were completed
            "reached_max_treedepth": steps >= 2**plan.max_tree_depth - 1,
            "lp": -float(kernel._potential_energy_last),
        }
        for name, value in row.items():
            rows[name].append(value)
        run.progress(f"chain {c + 1} draws", step + 1, plan.num_samples)


def _read(kernel: Any, rows: dict[str, list[Any]]) -> Chain:
    positions = torch.stack(rows["position"])
    stats = {name: torch.tensor(values) for name, values in rows.items() if name != "position"}
    stats["step_size"] = torch.full((len(positions),), float(kernel.step_size), dtype=torch.float64)
    return Chain(
        positions=positions,
        stats={**stats, "lp": stats["lp"].double()},
        step_size=float(kernel.step_size),
        inverse_mass=kernel.inverse_mass_matrix[("u",)].detach().clone(),
        divergences=positions[stats["diverging"]],
    )


class _Potential(torch.autograd.Function):
    """-log joint, whose gradient was computed with it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, value_and_grad: Any, shape: tuple[int, ...]) -> Tensor:
        value, gradient = value_and_grad(u.detach().reshape(shape))
        ctx.save_for_backward(-gradient.reshape(-1))
        return -value.sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return scale * gradient, None, None
