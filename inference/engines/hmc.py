"""Hamiltonian Monte Carlo, every chain of every datum by itself.

    u' = leapfrog^num_steps(u, r),  r ~ N(0, M),  accepted with probability min(1, exp(-change of energy))

Duane et al. 1987, doi:10.1016/0370-2693(87)91197-X; Neal 2011, arXiv:1206.1901. In a problem that factorises each
datum has its own accept step, step size and mass matrix. Discrete latents are summed out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from .. import mcmc, recorded
from ..density import Density
from ..engine import Draws, Run
from ..kernels import metropolis
from ..settings import check_initial, check_positive, check_share, settings


@settings
class HMC:
    """Trajectories of 1 to 2 `num_steps` - 1 leapfrog steps, of a size within 20 % of the tuned one, both drawn.

    num_samples, warmup_steps  per chain; `warm=` goes on from an earlier run's last points and tuning, without warm-up
    num_steps          leapfrog steps of a trajectory, on average; 1 is the Metropolis-adjusted Langevin algorithm
    target_acceptance  mean acceptance probability that step sizes are tuned to, in (0, 1); None: 0.8, or 0.574 for one
                       step (Roberts & Rosenthal 1998, doi:10.1111/1467-9868.00123)
    step_size          where tuning begins; without warm-up, the step size
    initial            site -> where to start, (num_chains, *shape) or (*shape,); None: draws of the prior
    initial_tries      draws of the prior that are tried for each start
    """

    name: ClassVar[str] = "hmc"
    persistent: ClassVar[bool] = True  # the state is per chain and datum
    num_samples: int = 1000
    warmup_steps: int = 500
    num_chains: int = 4
    num_steps: int = 5
    target_acceptance: float | None = None
    step_size: float = 0.1
    initial: Mapping[str, Any] | None = None
    initial_tries: int = 100

    def __post_init__(self) -> None:
        check_positive(self, "step_size")
        check_share(self, "target_acceptance")
        check_initial(self)

    def supports(self, density: Density) -> str:
        return mcmc.why_not(density, "HMC")

    def sized(self, calls: float, density: Density) -> Self:
        return mcmc.sized(self, calls, per_draw=self.num_steps + 1, per_warmup=self.num_steps)

    def run(self, density: Density, run: Run) -> Draws:
        target = self.target_acceptance or (0.574 if self.num_steps == 1 else 0.8)
        points, tuned = mcmc.begin(self, density, run)
        plan = mcmc.Schedule(self.num_samples, self.warmup_steps, target, self.step_size)
        kernel = metropolis.HMC(self.num_steps, target)
        return recorded.answer(density, mcmc.in_step(density, kernel, points, tuned, run, plan))
