"""Random-walk Metropolis, every chain of every datum by itself.

    u' = u + eps sqrt(variance) n,  n ~ N(0, I),  accepted with probability min(1, p(u', x) / p(u, x))

Metropolis et al. 1953, doi:10.1063/1.1699114. It moves without gradients (only the start is asked for a finite one),
and pays for that in draws: a check for the others. Discrete latents are summed out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from .. import mcmc, recorded
from ..density import Density
from ..engine import Draws, Run
from ..kernels.metropolis import RandomWalk as Kernel
from ..settings import check_initial, check_positive, check_share, settings


@settings
class RandomWalk:
    """Normal proposals, scaled in warm-up by the variance of the draws.

    num_samples, warmup_steps  per chain; `warm=` goes on from an earlier run's last points and tuning, without warm-up
    target_acceptance          mean acceptance probability that step sizes are tuned to, in (0, 1)
                               (Roberts, Gelman & Gilks 1997, doi:10.1214/aoap/1034625254)
    step_size                  where tuning begins; without warm-up, the step size
    initial                    site -> where to start, (num_chains, *shape) or (*shape,); None: draws of the prior
    initial_tries              draws of the prior that are tried for each start
    """

    name: ClassVar[str] = "random_walk"
    persistent: ClassVar[bool] = True  # the state is per chain and datum
    num_samples: int = 5000
    warmup_steps: int = 2000
    num_chains: int = 4
    target_acceptance: float = 0.234
    step_size: float = 1.0
    initial: Mapping[str, Any] | None = None
    initial_tries: int = 100

    def __post_init__(self) -> None:
        check_positive(self, "step_size")
        check_share(self, "target_acceptance")
        check_initial(self)

    def supports(self, density: Density) -> str:
        return mcmc.why_not(density, "the random walk")

    def sized(self, calls: float, density: Density) -> Self:
        return mcmc.sized(self, calls, per_draw=2, per_warmup=1)

    def run(self, density: Density, run: Run) -> Draws:
        points, tuned = mcmc.begin(self, density, run)
        plan = mcmc.Schedule(self.num_samples, self.warmup_steps, self.target_acceptance, self.step_size)
        kernel = Kernel(self.target_acceptance)
        return recorded.answer(density, mcmc.in_step(density, kernel, points, tuned, run, plan))
