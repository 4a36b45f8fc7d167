"""Stochastic variational inference: fit a guide by gradients of a bound on the evidence.

    ELBO(theta, phi) = E_{q_phi(z | x)}[log p_theta(x, z) - log q_phi(z | x)] <= log p_theta(x)

Hoffman et al. 2013, jmlr.org/papers/v14/hoffman13a.html; Kingma & Welling 2014, arXiv:1312.6114; the other bounds
stand in `objectives`. Draws that cannot be reparameterised get the score-function gradient, per datum (Ranganath et al.
2014, arXiv:1401.0118), in the ELBO with the mean of the other draws as baseline; discrete latents that the guide does
not sample are summed out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..density import Density
from ..engine import Draws, EngineError, Run, as_chain, no_sum
from ..flows import Flow, require_zuko
from ..guides import AutoGuide, Guide, make_guide
from ..learning import Learned, TrailWriter, descend, share_of_data
from ..objectives import LINEAR, PATHWISE, check_objective, loss
from ..posterior import Evidence, evidence_from_weights
from ..preflight import check_minibatch
from ..problem import Problem, ProblemError
from ..settings import check_optimizer, check_positive, settings
from .enumeration import Enumeration

FEWEST_STEPS = 40  # of which a trend can be told


@settings
class SVI:
    """Fit q_phi(z | x) by stochastic gradients of a bound; as a learner, theta moves in the same gradient.

    objective      'elbo'; 'iwae', the importance-weighted bound of `num_particles` draws, tighter with more of them;
                   'stl' and 'dreg', the gradients of these two that become exact with the guide, for reparameterised
                   draws; 'vimco', 'iwae' for draws that are not, such as discrete ones; 'renyi', between the two;
                   'enumerated', the ELBO of a guide of discrete latents, summed over all their values
    alpha          of 'renyi', 0.5 unless given: 0 is 'iwae', 1 is 'elbo'. From 0 up the mean of the estimate is a
                   lower bound of the evidence, whatever `num_particles` (for many draws and alpha in [0, 1) it rises
                   to Renyi's own); below 0 it is no bound, and the trail is of kind 'estimate'
    guide          None: the problem's own; 'AutoNormal', 'AutoMultivariateNormal', 'AutoLowRankMultivariateNormal',
                   'AutoDelta' (or the Pyro class): one per datum; 'flow' or a `flows.Flow`; another Pyro autoguide
                   class (AutoStructured ...), or an instance
    num_particles  draws of z for each gradient
    batch_size     data for each gradient; None: all
    optimizer      any torch optimiser class, called as optimizer(tensors, lr=learning_rate)
    num_samples    draws from the fitted guide, which also give the evidence
    """

    name: ClassVar[str] = "svi"
    objective: str = "elbo"
    alpha: float | None = None
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
        families = (*AutoGuide.FAMILIES, Flow.name)
        if isinstance(self.guide, str) and self.guide not in families:
            raise ProblemError(f"SVI(guide={self.guide!r}): expected one of {', '.join(families)}.")
        if getattr(self.guide, "__name__", type(self.guide).__name__) == "AutoLaplaceApproximation":
            raise ProblemError("SVI(guide=AutoLaplaceApproximation) would fit a point: use the engine Laplace().")
        if not (self.guide is None or isinstance(self.guide, str | Flow) or callable(self.guide)):
            raise ProblemError(f"SVI(guide={self.guide!r}): expected a name, a Pyro autoguide class or a guide.")
        check_objective(self)
        if self.objective != "elbo" and self._family() == "AutoDelta":
            raise ProblemError(f"SVI(objective={self.objective!r}) weighs draws; AutoDelta is a point: use 'elbo'.")

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
        if isinstance(family, Flow):
            require_zuko()
        if family is None and density.problem.guide is None:
            return "all latents are discrete, so no autoguide serves; pair the model with a guide"
        if family is None:
            density.require_guide()
        elif not density.continuous:
            return f"{family} needs continuous latents and the model has none; pair the model with a guide"
        if family is not None and density.unlisted:
            return f"{no_sum(density)}; pair the model with a guide"
        if reason := self._unserved(density, family):
            return reason
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

    def _unserved(self, density: Density, family: str | Flow | None) -> str:
        """Why the objective cannot be had with this guide, in words; '' where it can."""
        if self.batch_size is not None and not density.batch_plates and self.objective not in LINEAR:
            return (
                f"objective={self.objective!r} needs the whole weight of a draw, and with global latents a minibatch "
                "has a part of it: use batch_size=None or objective='elbo'"
            )
        if self.objective == "enumerated":
            return _unlisted(density, family)
        if self.objective not in LINEAR and family is None and density.guide_flaw:
            return f"objective={self.objective!r} weighs draws, and {density.guide_flaw}: use 'elbo'"
        if self.objective not in PATHWISE or family is not None:
            return ""
        if not density.guide_latents:
            return f"objective={self.objective!r} needs draws, and the guide samples nothing: use 'elbo'"
        if scored := make_guide(density, None).scored:
            return (
                f"objective={self.objective!r} needs reparameterised draws, which site {scored[0]!r} of the guide has "
                "not: use 'vimco' or 'elbo'"
            )
        if self.objective == "dreg" and (altered := [n for n, s in density.guide_latents.items() if s.reweighted]):
            reason = f"site {altered[0]!r} of the guide is masked or scaled"
            return f"objective='dreg' needs all of log q, and {reason}: use 'iwae'"
        return ""

    def sized(self, calls: float, density: Density) -> Self:
        """An eighth of the calls for draws of the guide, two each, and not more than the own number; the rest steps."""
        draws = min(self.num_samples, max(20, int(calls / 16)))
        start = 400 if self._family(density) else 0
        steps = (calls - 2 * draws - start) / (self.num_particles * share_of_data(density, self.batch_size))
        return replace(self, num_samples=draws, num_steps=max(20, int(steps)))

    def run(self, density: Density, run: Run) -> Draws:
        guide = make_guide(density, self._family(density))
        if run.warm:
            guide.load(run.warm)
        losses: list[float] = []
        if guide.tensors:
            with run.tuning():
                losses.extend(self._steps(density, guide, guide.tensors, run))
        notes = []
        if self.guide is None and self._family(density) is not None:
            notes.append(f"the problem has no guide: {self._family(density)} was used")
        draws = guide_draws(density, guide, self.num_samples, tuple(notes))
        if len(losses) < FEWEST_STEPS:
            return draws
        drift = still_rising(losses) / max(math.prod(density.batch_shape), 1)
        return replace(draws, figures={"elbo_drift": torch.tensor(drift, dtype=torch.float64)})

    def fit(self, density: Density, run: Run) -> Learned:
        """theta and phi move together, each step one gradient of the objective over both."""
        guide = make_guide(density, self._family(density))
        tensors = list({id(t): t for t in (*density.theta.tensors, *guide.tensors)}.values())
        kind = "estimate" if self.alpha is not None and self.alpha < 0 else "lower bound"
        writer = TrailWriter(kind, self.num_steps)
        for step, value in enumerate(self._steps(density, guide, tensors, run)):
            writer.add(step, -value)
        with torch.no_grad():
            return Learned(writer.trail(), guide_draws(density, guide, self.num_samples))

    def _family(self, density: Density | None = None) -> str | Flow | None:
        """The automatic family by name, or the flow; None for the problem's own guide."""
        if self.guide == Flow.name or self.guide is Flow:
            return Flow()
        if isinstance(self.guide, str | Flow):
            return self.guide
        if isinstance(self.guide, type) and self.guide.__name__ in AutoGuide.FAMILIES:
            return self.guide.__name__
        if self.guide is None and density is not None and density.problem.guide is None and density.continuous:
            return "AutoNormal"
        return None

    def _steps(self, density: Density, guide: Guide, tensors: list[Tensor], run: Run) -> Iterator[float]:
        """One optimiser step a turn; yields the loss, minus the objective of all data."""
        losses = descend(
            density, lambda: self.loss(density, guide), tensors, self.optimizer, self.learning_rate, self.batch_size,
            self.num_steps,
        )  # fmt: skip
        for step, value in enumerate(losses):
            if not math.isfinite(value):
                advice = "try a smaller learning_rate" if step else "the density is not finite where the guide starts"
                what = "ELBO" if self.objective == "elbo" else f"objective {self.objective!r}"
                raise EngineError(f"the {what} became {-value} at step {step}: {advice}")
            if step % 50 == 49:
                run.progress("gradient steps", step + 1, self.num_steps)
            yield value

    def loss(self, density: Density, guide: Guide) -> Tensor:
        """An estimate of minus the objective of all data, whose gradient is unbiased; () in nats."""
        return loss(density, guide, self.num_particles, self.objective, 0.5 if self.alpha is None else self.alpha)


def still_rising(losses: list[float]) -> float:
    """How much lower the mean loss of the last quarter of the steps is than that of the quarter before it, less three
    standard errors of the difference, in nats; 0 where it is not."""
    quarter = len(losses) // 4
    before, last = torch.tensor(losses[-2 * quarter :], dtype=torch.float64).split(quarter)
    error = ((before.var() + last.var()) / quarter).sqrt()
    return max(0.0, float(before.mean() - last.mean() - 3 * error))


def guide_draws(density: Density, guide: Guide, count: int, notes: tuple[str, ...] = ()) -> Draws:
    """The fitted guide's answer: draws, the ELBO, and the evidence by weighting them."""
    z, log_q, _ = guide.draw(1 if guide.point else count)
    values = density.complete(z)
    if guide.point:
        return Draws(as_chain(values), "point", state=guide.state(), notes=notes)
    if flaw := getattr(guide, "flaw", ""):
        unknown = f"{flaw}: there is no bound of the evidence, and no weight to judge the draws by"
        return Draws(as_chain(values), "iid", state=guide.state(), notes=notes, unknown=unknown)
    log_ratio = (density.log_joint(z) - log_q).double()
    error = log_ratio.std(0) / math.sqrt(count) if count > 1 else torch.full_like(log_ratio[0], math.inf)
    return Draws(
        as_chain(values),
        "iid",
        log_evidence=Evidence(
            log_ratio.mean(0).cpu(), error.cpu(), "lower bound", evidence_from_weights(log_ratio.cpu())
        ),
        sample_stats={"lp": (log_ratio + log_q)[None], "log_q": log_q[None]},
        state=guide.state(),
        notes=notes,
        log_ratio=log_ratio.cpu(),
    )


def _unlisted(density: Density, family: str | Flow | None) -> str:
    """Why the guide's latents cannot be listed, in words; '' where they can."""
    if density.continuous or family is not None:
        return (
            f"objective='enumerated' lists the values of a guide, and site {density.continuous[0]!r} is continuous: "
            "leave discrete sites out of the guide and they are summed out"
        )
    if reason := Enumeration(max_values=2**16).supports(density):
        return f"objective='enumerated' cannot list the latents: {reason}"
    if set(density.guide_latents) != set(density.latents):
        return "objective='enumerated' needs a guide that samples the model's latents, and no others"
    return ""
