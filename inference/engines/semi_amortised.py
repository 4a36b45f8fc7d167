"""Semi-amortised inference: an amortised guide says where each datum's own normal begins, and gradients refine it.

    q_i(u) = N(m_i, L_i L_i'),   begun at the mean and covariance of q_phi(z | x_i), then `refine_steps` times
    (m_i, L_i) <- (m_i, L_i) + step of grad ELBO_i(m_i, L_i)

What a network shared by all data leaves open at a datum, the amortisation gap, closes as the steps go on (Kim et al.
2018, arXiv:1802.02550; Cremer et al. 2018, arXiv:1801.03558). As an E-step, theta learns from the refined posteriors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch

from ..density import Density
from ..engine import Draws, EngineError, Run, no_sum
from ..guides import AutoGuide, PairedGuide
from ..laplace import moments
from ..learning import descend, share_of_data
from ..objectives import loss
from ..settings import check_optimizer, check_positive, settings
from .svi import SVI, guide_draws

SPREAD_FROM = 1000  # draws of the guide that tell its mean and covariance


@settings
class SemiAmortised:
    """Fit the problem's guide, then each datum's own normal from where the guide puts it, in unconstrained space.

    The evidence is the refined normals' ELBO; the figure `elbo_gain` is what refining gained for each datum, in nats,
    and what it lost is an alarm. Discrete latents are summed out.

    num_steps      of the guide's fit, with batch_size, learning_rate and optimizer as in `SVI`
    refine_steps   gradient steps of the normals, all data at once, by Adam
    refine_rate    their rate, in units of the prior's width
    num_particles  draws of z for each gradient
    num_samples    draws from the refined normals, which also give the evidence
    """

    name: ClassVar[str] = "semi_amortised"
    num_steps: int = 1000
    refine_steps: int = 100
    refine_rate: float = 0.02
    num_particles: int = 4
    batch_size: int | None = None
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    num_samples: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "refine_rate")
        check_optimizer(self)

    def supports(self, density: Density) -> str:
        if density.problem.guide is None:
            return "the model has no guide to amortise: pair it with one, or use SVI(guide='AutoMultivariateNormal')"
        if not density.continuous:
            return "the latents are discrete, and a normal cannot refine their guide: use SVI"
        if density.unlisted:
            return no_sum(density)
        return self._amortised().supports(density)

    def sized(self, calls: float, density: Density) -> SemiAmortised:
        """A third for the guide, a third for refining, a third for the draws, which cost five evaluations each."""
        share = share_of_data(density, self.batch_size)
        third = calls / 3 / self.num_particles
        draws = max(2, int(calls / 3 / 5))
        return replace(self, num_steps=max(1, int(third / share)), refine_steps=max(1, int(third)), num_samples=draws)

    def run(self, density: Density, run: Run) -> Draws:
        with run.tuning():
            self._amortised().run(density, run.child(0, run.warm))
            local, amortised = self._begun(density)
            losses = descend(
                density, lambda: loss(density, local, self.num_particles, "stl"), local.tensors, torch.optim.Adam,
                self.refine_rate, None, self.refine_steps,
            )  # fmt: skip
            for step, value in enumerate(losses):
                if not math.isfinite(value):
                    raise EngineError(f"the ELBO became {-value} at refining step {step}: try a smaller refine_rate")
        draws = guide_draws(density, local, self.num_samples)
        assert draws.log_evidence is not None
        assert amortised.log_evidence is not None
        gain = draws.log_evidence.value - amortised.log_evidence.value
        error = torch.hypot(draws.log_evidence.std_error, amortised.log_evidence.std_error)
        lost = int((gain < -4 * error - 1e-9).sum())
        alarms = (f"refining made {lost} of {gain.numel()} posteriors worse: reduce refine_rate",) if lost else ()
        return replace(
            draws, state={**PairedGuide(density).state(), **draws.state}, figures={"elbo_gain": gain}, alarms=alarms
        )

    def _amortised(self) -> SVI:
        return SVI(
            num_steps=self.num_steps,
            num_particles=self.num_particles,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            num_samples=2,
        )

    def _begun(self, density: Density) -> tuple[AutoGuide, Draws]:
        """Normals with the guide's moments, and the guide's own answer to compare with."""
        guide = PairedGuide(density)
        values, _, _ = guide.draw(SPREAD_FROM)
        u = density.unconstrain({n: values[n] for n in density.continuous})
        fit = moments(u, torch.ones_like(u[..., 0]))
        local = AutoGuide(density, "AutoMultivariateNormal")
        local.stand(fit.mean, fit.tril)
        return local, guide_draws(density, guide, self.num_samples)
