"""Importance sampling, per datum: each batch element has its own weights, evidence and effective sample size.

    w_s = p_theta(x, z_s) / q(z_s),   z_s ~ q;      log p_theta(x) ~ log mean_s w_s

unbiased for the evidence on the natural scale. Weighting all data jointly would multiply their weights and leave one
draw. Pareto smoothing: Vehtari et al. 2024, jmlr.org/papers/v25/19-556.html.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..density import Density, Values
from ..engine import Draws, EngineError, Run, as_chain
from ..guides import AutoGuide, PairedGuide, make_guide
from ..laplace import laplace, moments, student_t
from ..learning import flat_draws
from ..posterior import Posterior, evidence_from_weights
from ..problem import ProblemError
from ..registry import as_engine
from ..settings import check_positive, options, settings
from ..statistics import psis

Weighted = tuple[Tensor | Values, Tensor, tuple[str, ...]]


@settings
class ImportanceSampling:
    """Weight draws of a proposal q by p_theta(x, z) / q(z), each datum for itself.

    proposal         'prior'; 'guide', the problem's own as it stands; 'laplace', a t distribution at each datum's
                     mode; a fitted `Posterior` (its guide, or a t with its moments); an engine to fit first;
                     'auto': the guide where `parameters=Fit` brought a learned one or it has nothing to learn, else
                     laplace or prior, whichever a pilot of 200 draws finds more effective
    pareto_smoothed  smooth the largest weights of each datum before use (the evidence stays that of the raw weights)
    degrees          of freedom of the t proposals: small ones have tails that cover more
    """

    name: ClassVar[str] = "importance_sampling"
    num_samples: int = 1000
    proposal: Any = "auto"
    pareto_smoothed: bool = False
    degrees: float = 5.0

    NAMES: ClassVar[tuple[str, ...]] = ("auto", "prior", "guide", "laplace")

    def __post_init__(self) -> None:
        check_positive(self, "degrees")
        if isinstance(self.proposal, str):
            if self.proposal not in self.NAMES:
                raise ProblemError(
                    f"ImportanceSampling(proposal={self.proposal!r}): expected one of {', '.join(self.NAMES)}, "
                    "a fitted posterior or an engine."
                )
        elif not isinstance(self.proposal, Posterior):
            as_engine(self.proposal)

    def supports(self, density: Density) -> str:
        proposal = self._proposal(density)
        if proposal == "guide":
            density.require_guide()
            missing = [n for n in density.latents if n not in density.guide_sites]
            unlisted = [n for n in missing if n in density.unlisted]
            if unlisted:
                return f"the guide does not propose site {unlisted[0]!r}"
        if proposal == "prior" and density.improper:
            return f"site {density.improper[0]!r} has an improper prior, which cannot be drawn from"
        if proposal == "laplace" or isinstance(proposal, Posterior):
            if not density.continuous:
                return "the latents are discrete: a t proposal does not apply; use proposal='prior' or 'guide'"
            if density.unlisted:
                return f"discrete site {density.unlisted[0]!r} can be neither proposed nor summed out"
        if isinstance(proposal, Posterior) and not proposal.draws:
            raise ProblemError(f"the posterior given as proposal has no draws; status: {proposal.status}.")
        if isinstance(proposal, Posterior):
            lacking = [n for n in density.continuous if n not in proposal.draws]
            if lacking:
                raise ProblemError(f"the posterior given as proposal lacks site {lacking[0]!r}: it is another model's.")
            if tuple(proposal.batch_shape) != tuple(density.batch_shape):
                raise ProblemError(
                    f"the proposal is a posterior over data of shape {tuple(proposal.batch_shape)}, this problem has "
                    f"{tuple(density.batch_shape)}: fit it to the same data."
                )
        if proposal == "auto" and density.improper and density.unlisted:
            return f"site {density.improper[0]!r} has an improper prior and a discrete site cannot be summed out"
        if not isinstance(proposal, str | Posterior):
            reason = as_engine(proposal).supports(density)
            return f"the proposal engine cannot run: {reason}" if reason else ""
        return ""

    def run(self, density: Density, run: Run) -> Draws:
        proposal = self._proposal(density)
        notes: tuple[str, ...] = ()
        if proposal == "auto":
            proposal = self._pilot(density, run)
            notes = (f"proposal: {proposal}, the best of a pilot",)
        z, log_weights, alarms = self._weighted(proposal, density, run, self.num_samples)
        raw = log_weights.double().cpu()
        evidence = evidence_from_weights(raw)
        log_weights = psis(raw)[0] if self.pareto_smoothed else raw
        return Draws(
            as_chain(density.complete(z)),
            "weighted",
            log_weights[None],
            evidence,
            notes=notes,
            log_ratio=raw,
            alarms=alarms,
        )

    def _weighted(self, proposal: Any, density: Density, run: Run, count: int) -> Weighted:
        """Draws (count, *batch, ...) of a proposal, their log weights (count, *batch), and what speaks against it."""
        alarms: tuple[str, ...] = ()
        if proposal == "prior":
            draws = density.prior(count)
            z: Tensor | Values = draws.values
            log_weights = draws.log_likelihood
        elif proposal == "guide":
            z, log_q, _ = PairedGuide(density).draw(count)
            log_weights = density.log_joint(z) - log_q
        else:
            z, log_q, alarms = self._fitted(proposal, density, run, count)
            log_weights = density.log_joint(z) - log_q
        undefined = int(log_weights.isnan().sum())
        if undefined:
            raise EngineError(f"the log joint is undefined (NaN) at {undefined} of {log_weights.numel()} draws")
        best = log_weights.amax(0)
        if not bool(best.isfinite().all()):
            bad = (~best.isfinite()).flatten().nonzero().flatten().tolist()
            what = "a weight is infinite" if bool((best == math.inf).any()) else "all weights are zero"
            raise EngineError(f"{what} for {len(bad)} of {best.numel()} data, first {bad[:5]}")
        return z, log_weights, alarms

    def _fitted(self, proposal: Any, density: Density, run: Run, count: int) -> Weighted:
        """Draws, log q and alarms of 'laplace', of a posterior, or of an engine that is fitted first."""
        if proposal == "laplace":
            with run.tuning():
                fit = laplace(density)
            return *student_t(fit, count, self.degrees), fit.alarms
        if isinstance(proposal, Posterior):
            values, weights = flat_draws(proposal, proposal.batch_shape)
            name, family, state = proposal.engine, proposal.engine_options.get("guide"), proposal.state
        else:
            engine = as_engine(proposal)
            with run.tuning():
                fitted = engine.run(density, run.child(0))
            values, weights = flat_draws(fitted, tuple(density.batch_shape))
            name, family, state = engine.name, options(engine).get("guide"), fitted.state
        if name == "svi" and family != "AutoDelta" and (family is None or family in AutoGuide.FAMILIES):
            automatic = any(n.startswith("guide.") for n in state)
            guide = make_guide(density, (family or "AutoNormal") if automatic else None)
            guide.load(state)
            z, log_q, _ = guide.draw(count)
            return z, log_q, ()
        fit = moments(density.unconstrain({n: values[n] for n in density.continuous}), weights.to(density.dtype))
        return *student_t(fit, count, self.degrees), ()

    def _proposal(self, density: Density) -> Any:
        """'auto' is the learned guide where there is one; else a pilot decides."""
        return "guide" if self.proposal == "auto" and density.guide_ready else self.proposal

    def _pilot(self, density: Density, run: Run, count: int = 200) -> str:
        """Laplace or the prior, whichever gives the larger mean effective sample size in a few draws."""
        candidates = ["laplace"] if density.continuous and not density.unlisted else []
        candidates += [] if density.improper else ["prior"]
        if len(candidates) == 1:
            return candidates[0]
        found: dict[str, float] = {}
        with run.tuning():
            for candidate in candidates:
                try:
                    log_weights = self._weighted(candidate, density, run, count)[1]
                except EngineError:
                    continue
                found[candidate] = float(1 / torch.softmax(log_weights, 0).square().sum(0).mean())
        if not found:
            raise EngineError("neither a Laplace nor the prior proposal has a draw with finite weight")
        return max(found, key=lambda name: found[name])
