"""The No-U-Turn sampler on all continuous latents together.

Hoffman & Gelman 2014, jmlr.org/papers/v15/hoffman14a.html, with the multinomial trajectories of Betancourt 2017,
arxiv.org/abs/1701.02434. It moves the unconstrained vector; discrete latents are summed out. The sampler is nutpie's
(github.com/pymc-devs/nuts-rs), or Pyro's own kernel as a cross-check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from .. import mcmc, nutpie_private, nuts_nutpie, nuts_pyro, recorded
from ..chains import ChainPlan, Tuning, answer
from ..density import Density
from ..engine import Draws, Run
from ..problem import ProblemError
from ..settings import check_choice, check_initial, check_share, settings
from ..starts import starts

CHOICES = {"mass_matrix": ("diagonal", "low_rank"), "backend": ("auto", "lanes", "nutpie", "pyro")}


@settings
class NUTS:
    """Hamiltonian Monte Carlo with adaptive path lengths; step size and mass matrix are tuned in warm-up, then fixed.
    In a problem that factorises every datum has chains of its own, each with its own tree, step size and mass matrix.

    num_samples, warmup_steps  per chain; `warm=` starts from an earlier run's last points and tuning, without warm-up
    target_acceptance          mean acceptance probability that the step size is tuned to, in (0, 1)
    max_tree_depth             at most 2**max_tree_depth leapfrog steps a draw
    mass_matrix                'diagonal', or 'low_rank' for strong correlations (nutpie only; nutpie does not hand it
                               out, so a warm start keeps the points and tunes again)
    initial                    site -> where to start, (num_chains, *shape) or (*shape,); sites not named, and None:
                               draws of the prior
    initial_tries              draws of the prior that are tried for each start
    backend                    'lanes': chains of many data side by side, each by itself; 'nutpie': all latents as one
                               vector, with one accept step; 'pyro': likewise by Pyro's own kernel, much slower, to
                               check by; 'auto': lanes where there are several data, else nutpie
    """

    name: ClassVar[str] = "nuts"
    num_samples: int = 1000
    warmup_steps: int = 500
    num_chains: int = 4
    target_acceptance: float = 0.8
    max_tree_depth: int = 10
    mass_matrix: str = "diagonal"
    initial: Mapping[str, Any] | None = None
    initial_tries: int = 100
    backend: str = "auto"

    @property
    def persistent(self) -> bool:
        """Whether the state is per chain and datum."""
        return self.backend in ("auto", "lanes") and self.mass_matrix == "diagonal"

    def __post_init__(self) -> None:
        check_share(self, "target_acceptance")
        if isinstance(self.max_tree_depth, int) and self.max_tree_depth > 20:
            raise ProblemError(f"NUTS(max_tree_depth={self.max_tree_depth}): expected at most 20.")
        for name, choices in CHOICES.items():
            check_choice(self, name, choices)
        if self.backend in ("pyro", "lanes") and self.mass_matrix != "diagonal":
            raise ProblemError("NUTS(mass_matrix='low_rank') needs backend='nutpie'.")
        check_initial(self)

    def supports(self, density: Density) -> str:
        return mcmc.why_not(density, "NUTS")

    def sized(self, calls: float, density: Density) -> Self:
        """Trees of seven leapfrog steps, as on well-conditioned posteriors."""
        return mcmc.sized(self, calls, per_draw=8, per_warmup=7)

    def run(self, density: Density, run: Run) -> Draws:
        several = density.batch_shape.numel() > 1 or bool(density.batch_plates and density.row_numbers is not None)
        if self.backend == "lanes" or (self.backend == "auto" and self.mass_matrix == "diagonal" and several):
            return self._on_lanes(density, run)
        notes: list[str] = []
        tuned = None
        if run.warm:
            points, tuned = self._earlier(density, run.warm)
            if tuned is None:
                notes.append("the mass matrix of the earlier run is not known: points kept, tuned again")
        else:
            with run.tuning():
                points = starts(density, run, self.num_chains, self.initial, self.initial_tries)
        compiled = density.compiled(points[0])
        if compiled.why:
            notes.append(f"the density runs as {compiled.backend}, which is slower: {compiled.why}")
        plan = ChainPlan(
            self.num_samples,
            self.warmup_steps,
            self.target_acceptance,
            self.max_tree_depth,
            self.mass_matrix == "low_rank",
        )
        if self.backend != "pyro" and not (fault := _nutpies_fault()):
            chains = nuts_nutpie.sample(density, compiled, points, tuned, run, plan)
        else:
            if self.backend != "pyro":
                notes.append(f"Pyro's own kernel, which is slow, took the place of nutpie: {fault}")
            chains = nuts_pyro.sample(density, points, tuned, run, plan)
        return answer(density, chains, self.num_chains, plan, notes)

    def _on_lanes(self, density: Density, run: Run) -> Draws:
        points, tuned = mcmc.begin(self, density, run)
        plan = mcmc.Schedule(self.num_samples, self.warmup_steps, self.target_acceptance)
        return recorded.answer(density, mcmc.by_turns(density, self.max_tree_depth, points, tuned, run, plan))

    def _earlier(self, density: Density, state: Mapping[str, Tensor]) -> tuple[Tensor, Tuning | None]:
        """Points and tuning of the run that this one goes on from; no tuning where its mass matrix is not known."""
        mcmc.check_one_start(self)
        points = state["position"].to(dtype=density.dtype, device=density.device)
        shape = (self.num_chains, *density.batch_shape, density.dim)
        if points.shape != shape:
            raise ProblemError(
                f"the warm start holds positions of shape {tuple(points.shape)}, this run needs "
                f"{shape}: same data, same num_chains."
            )
        if self.mass_matrix != "diagonal" or "inverse_mass" not in state:
            return points, None
        return points, Tuning(state["step_size"], state["inverse_mass"])


def _nutpies_fault() -> str:
    """Why nutpie cannot be used; '' where it can."""
    try:
        nutpie_private.load()
    except nutpie_private.UnavailableError as error:
        return str(error)
    return ""
