"""Stochastic variational inference: fit a guide by gradients of the evidence lower bound.

    ELBO(theta, phi) = E_{q_phi(z | x)}[log p_theta(x, z) - log q_phi(z | x)] <= log p_theta(x)

Hoffman et al. 2013, jmlr.org/papers/v14/hoffman13a.html; Kingma & Welling 2014, arXiv:1312.6114. Draws that cannot be
reparameterised get the score-function gradient, per datum (Ranganath et al. 2014, arXiv:1401.0118); discrete latents
that the guide does not sample are summed out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..density import Density
from ..engine import Draws, EngineError, Run, as_chain
from ..guides import AutoGuide, Guide, make_guide
from ..learning import Learned, TrailWriter, descend
from ..posterior import Evidence, evidence_from_weights
from ..preflight import check_minibatch
from ..problem import Problem, ProblemError
from ..settings import check_optimizer, check_positive, settings


@settings
class SVI:
    """Fit q_phi(z | x) by stochastic gradients of the ELBO; as a learner, theta moves in the same gradient.

    guide          None: the problem's own; 'AutoNormal', 'AutoMultivariateNormal', 'AutoLowRankMultivariateNormal',
                   'AutoDelta' (or the Pyro class): one per datum; another Pyro autoguide class, or an instance
    num_particles  draws of z for each gradient
    batch_size     data for each gradient; None: all
    optimizer      any torch optimiser class, called as optimizer(tensors, lr=learning_rate)
    num_samples    draws from the fitted guide, which also give the evidence
    """

    name: ClassVar[str] = "svi"
    guide: Any = None
    num_steps: int = 1000
    num_particles: int = 1
    batch_size: int | None = None
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    num_samples: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate")
        check_optimizer(self)
        if isinstance(self.guide, str) and self.guide not in AutoGuide.FAMILIES:
            raise ProblemError(f"SVI(guide={self.guide!r}): expected one of {', '.join(AutoGuide.FAMILIES)}.")
        if not (self.guide is None or isinstance(self.guide, str) or callable(self.guide)):
            raise ProblemError(f"SVI(guide={self.guide!r}): expected a name, a Pyro autoguide class or a guide.")

    def prepare(self, problem: Problem) -> Problem:
        """The problem with the Pyro guide that was asked for; unchanged where a family or its own guide serves."""
        if self.guide is None or self._family() is not None:
            return problem
        guide = self.guide(problem.model) if isinstance(self.guide, type) else self.guide
        return replace(problem, guide=guide)

    def supports(self, density: Density) -> str:
        if self.batch_size is not None:
            check_minibatch(density, self.batch_size)
        family = self._family(density)
        if family is None and density.problem.guide is None:
            return "all latents are discrete, so no autoguide serves; pair the model with a guide"
        if family is None:
            density.require_guide()
        elif not density.continuous:
            return f"{family} needs continuous latents and the model has none; pair the model with a guide"
        if family is not None and density.unlisted:
            return f"discrete site {density.unlisted[0]!r} cannot be summed out; pair the model with a guide"
        if self.batch_size is not None and not density.batch_plates and density.data_plate is not None:
            inside = [
                n for n, s in density.latents.items() if density.data_plate in s.plates and n in density.continuous
            ]
            if inside and family is not None:
                return (
                    f"site {inside[0]!r} lies in the minibatched plate beside global latents: {family} has one joint "
                    "density for all; use batch_size=None or a paired guide"
                )
        return ""

    def run(self, density: Density, run: Run) -> Draws:
        guide = make_guide(density, self._family(density))
        if run.warm:
            guide.load(run.warm)
        if guide.tensors:
            with run.tuning():
                for _ in self._steps(density, guide, guide.tensors, run):
                    pass
        notes = []
        if self.guide is None and self._family(density) is not None:
            notes.append(f"the problem has no guide: {self._family(density)} was used")
        return self._draws(density, guide, tuple(notes))

    def fit(self, density: Density, run: Run) -> Learned:
        """theta and phi move together, each step one gradient of the ELBO over both."""
        guide = make_guide(density, self._family(density))
        tensors = list({id(t): t for t in (*density.theta.tensors, *guide.tensors)}.values())
        writer = TrailWriter("lower bound", self.num_steps)
        for step, loss in enumerate(self._steps(density, guide, tensors, run)):
            writer.add(step, -loss)
        with torch.no_grad():
            return Learned(writer.trail(), self._draws(density, guide, ()))

    def _family(self, density: Density | None = None) -> str | None:
        """The automatic family by name; None for the problem's own guide."""
        if isinstance(self.guide, str):
            return self.guide
        if isinstance(self.guide, type) and self.guide.__name__ in AutoGuide.FAMILIES:
            return self.guide.__name__
        if self.guide is None and density is not None and density.problem.guide is None and density.continuous:
            return "AutoNormal"
        return None

    def _steps(self, density: Density, guide: Guide, tensors: list[Tensor], run: Run) -> Iterator[float]:
        """One optimiser step a turn; yields the loss, the negative ELBO of all data."""
        losses = descend(
            density, lambda: self.loss(density, guide), tensors, self.optimizer, self.learning_rate, self.batch_size,
            self.num_steps,
        )  # fmt: skip
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                advice = "try a smaller learning_rate" if step else "the density is not finite where the guide starts"
                raise EngineError(f"the ELBO became {-loss} at step {step}: {advice}")
            if step % 50 == 49:
                run.progress("gradient steps", step + 1, self.num_steps)
            yield loss

    def loss(self, density: Density, guide: Guide) -> Tensor:
        """An estimate of the negative ELBO of all data, whose gradient is unbiased; () in nats."""
        z, log_q, log_score = guide.draw(self.num_particles)
        elbo = density.log_joint(z, jacobian=not guide.point) - log_q
        surrogate = (
            elbo if log_score is None else elbo + elbo.detach() * log_score - (elbo.detach() * log_score).detach()
        )
        return -surrogate.sum() * (density.data_scale / self.num_particles)

    def _draws(self, density: Density, guide: Guide, notes: tuple[str, ...]) -> Draws:
        z, log_q, _ = guide.draw(1 if guide.point else self.num_samples)
        values = density.complete(z)
        if guide.point:
            return Draws(as_chain(values), "point", state=guide.state(), notes=notes)
        log_ratio = (density.log_joint(z) - log_q).double()
        count = math.sqrt(self.num_samples)
        error = log_ratio.std(0) / count if self.num_samples > 1 else torch.full_like(log_ratio[0], math.inf)
        refined = evidence_from_weights(log_ratio.cpu())
        return Draws(
            as_chain(values),
            "iid",
            log_evidence=Evidence(log_ratio.mean(0).cpu(), error.cpu(), "lower bound", refined),
            sample_stats={"lp": (log_ratio + log_q)[None], "log_q": log_q[None]},
            state=guide.state(),
            notes=notes,
            log_ratio=log_ratio.cpu(),
        )
