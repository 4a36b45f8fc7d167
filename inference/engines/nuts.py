"""The No-U-Turn sampler on all continuous latents together.

Hoffman & Gelman 2014, jmlr.org/papers/v15/hoffman14a.html.

Pyro's kernel moves the unconstrained vector; chains have seeds of their own, derived so that no two runs share one
(Pyro's own seeding gives chain 1 of seed 0 and chain 0 of seed 1 the same draws). Discrete latents are summed out.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from pyro.infer import mcmc
from torch import Tensor

from ..density import Density
from ..engine import Draws, EngineError, Run, seed_all
from ..problem import ProblemError
from ..settings import check_positive, settings


@settings
class NUTS:
    """Hamiltonian Monte Carlo with adaptive path lengths; step size and diagonal mass matrix are tuned in warm-up,
    then fixed. On a problem that factorises, all data move together, with one accept step.

    num_samples, warmup_steps  per chain; `warm=` starts from an earlier run's last points and tuning, without warm-up
    target_acceptance          mean acceptance probability that the step size is tuned to, in (0, 1)
    max_tree_depth             at most 2**max_tree_depth leapfrog steps a draw
    """

    name: ClassVar[str] = "nuts"
    num_samples: int = 500
    warmup_steps: int = 500
    num_chains: int = 4
    target_acceptance: float = 0.8
    max_tree_depth: int = 10
    initial_tries: int = 100

    def __post_init__(self) -> None:
        check_positive(self, "target_acceptance")
        if self.target_acceptance >= 1:
            raise ProblemError(f"NUTS(target_acceptance={self.target_acceptance}): expected a number in (0, 1).")
        if isinstance(self.max_tree_depth, int) and self.max_tree_depth > 20:
            raise ProblemError(f"NUTS(max_tree_depth={self.max_tree_depth}): expected at most 20.")

    def supports(self, density: Density) -> str:
        if not density.continuous:
            return "the latents are all discrete; NUTS moves continuous ones (enumeration serves these)"
        if density.unlisted:
            return f"discrete site {density.unlisted[0]!r} cannot be summed out: its support cannot be listed"
        return ""

    def run(self, density: Density, run: Run) -> Draws:
        warm = {n: t.to(density.dtype) for n, t in run.warm.items() if n in ("position", "step_size", "inverse_mass")}
        shape = (*density.batch_shape, density.dim)
        if warm and warm["position"].shape != (self.num_chains, *shape):
            raise ProblemError(
                f"the warm start holds positions of shape {tuple(warm['position'].shape)}, this run needs "
                f"{(self.num_chains, *shape)}: same data, same num_chains."
            )
        chains = [self._chain(density, run, chain, shape, warm) for chain in range(self.num_chains)]
        u = torch.stack([c["u"] for c in chains])
        stats = {
            n: torch.stack([c[n] for c in chains])
            for n in ("lp", "diverging", "acceptance_rate", "step_size", "n_steps")
        }
        state = {
            "position": u[:, -1],
            "step_size": torch.stack([c["step_size"][-1] for c in chains]),
            "inverse_mass": torch.stack([c["inverse_mass"] for c in chains]),
        }
        return Draws(density.complete(u), "mcmc", sample_stats=stats, state=state)

    def _chain(
        self, density: Density, run: Run, chain: int, shape: tuple[int, ...], warm: dict[str, Tensor]
    ) -> dict[str, Any]:
        seed_all(run.child(chain).seed)

        with run.tuning() if not warm else nullcontext():
            start = warm["position"][chain] if warm else self._start(density, shape)
        value_and_grad = density.traced_value_and_grad(start)

        def potential(position: dict[str, Tensor]) -> Tensor:
            return _Potential.apply(position["u"], value_and_grad, shape)

        with torch.enable_grad():
            kernel = mcmc.NUTS(
                potential_fn=potential,
                step_size=float(warm["step_size"][chain]) if warm else 1.0,
                adapt_step_size=not warm,
                adapt_mass_matrix=not warm,
                target_accept_prob=self.target_acceptance,
                max_tree_depth=self.max_tree_depth,
            )
            position = {"u": start.reshape(-1).clone()}
            kernel.initial_params = position
            warmup = 0 if warm else self.warmup_steps
            with run.tuning() if not warm else nullcontext():  # its search for a step size too
                kernel.setup(warmup)
            if warm:
                kernel.mass_matrix_adapter.inverse_mass_matrix = {("u",): warm["inverse_mass"][chain]}
            with run.tuning():
                for step in range(warmup):
                    position = kernel.sample(position)
                    run.progress(f"chain {chain + 1} warm-up", step + 1, warmup)
            rows: dict[str, list[Any]] = {"u": [], "lp": [], "diverging": [], "acceptance_rate": [], "n_steps": []}
            for step in range(self.num_samples):
                divergences, accepted = len(kernel._divergences), kernel._mean_accept_prob
                gradients = density.counts["gradients"]
                position = kernel.sample(position)
                count = kernel._t - kernel._warmup_steps  # Pyro keeps a running mean over the draws
                rows["u"].append(position["u"].detach().reshape(shape))
                rows["lp"].append(-float(kernel._potential_energy_last))
                rows["diverging"].append(len(kernel._divergences) > divergences)
                rows["acceptance_rate"].append(float(kernel._mean_accept_prob * count - accepted * (count - 1)))
                rows["n_steps"].append(round(density.counts["gradients"] - gradients))
                run.progress(f"chain {chain + 1} draws", step + 1, self.num_samples)
            mass = kernel.inverse_mass_matrix[("u",)].detach().clone()
            step_size = torch.full((self.num_samples,), float(kernel.step_size), dtype=torch.float64)
            kernel.cleanup()
        out = {n: torch.tensor(v) for n, v in rows.items() if n != "u"}
        return {**out, "u": torch.stack(rows["u"]), "step_size": step_size, "inverse_mass": mass}

    def _start(self, density: Density, shape: tuple[int, ...]) -> Tensor:
        """A point with finite density and gradient: a draw of the prior, or near zero where it is improper."""
        for attempt in range(self.initial_tries):
            if density.improper:
                u = (torch.rand(shape, dtype=density.dtype) * 4 - 2) * min(1.0, 2.0 / (attempt + 1))
            else:
                u = density.unconstrain({n: v[0] for n, v in density.prior(1).values.items()})
            value, gradient = density.value_and_grad(u)
            if bool(value.isfinite().all()) and bool(gradient.isfinite().all()):
                return u
        raise EngineError(
            f"no start with a finite log density and gradient in {self.initial_tries} draws of the prior; check the "
            "scale of the prior and the support of the data"
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
