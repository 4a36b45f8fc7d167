"""Importance sampling, per datum: each batch element has its own weights, evidence and effective sample size.

    w_s = p_theta(x, z_s) / q(z_s),   z_s ~ q;      log p_theta(x) ~ log mean_s w_s

unbiased for the evidence on the natural scale. Weighting all data jointly would multiply their weights and leave one
draw. Pareto smoothing: Vehtari et al. 2024, jmlr.org/papers/v25/19-556.html.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self

from ..density import Density
from ..engine import Draws, Run, as_chain
from ..posterior import Posterior, evidence_from_weights
from ..proposals import check_proposal, propose, settled, weighted, why_not_propose
from ..registry import as_engine
from ..settings import check_positive, settings
from ..statistics import psis

FEWEST = 50  # draws of the smallest run
PILOT_CALLS = {"auto": 600, "laplace": 200}


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

    def __post_init__(self) -> None:
        check_positive(self, "degrees")
        check_proposal(self)

    def supports(self, density: Density) -> str:
        return why_not_propose(density, self.proposal)

    def sized(self, calls: float, density: Density) -> Self:
        """One or two calls a draw; finding a proposal takes some hundred, fitting an engine half of all."""
        proposal = settled(density, self.proposal)
        if proposal in ("prior", "guide") or isinstance(proposal, Posterior):
            return replace(self, num_samples=max(FEWEST, int(calls / (1 if isinstance(proposal, str) else 2))))
        if isinstance(proposal, str):
            return replace(self, num_samples=max(FEWEST, int((calls - PILOT_CALLS[proposal]) / 2)))
        engine = as_engine(proposal)
        fitted = engine.sized(calls / 2, density) if hasattr(engine, "sized") else engine
        return replace(self, proposal=fitted, num_samples=max(FEWEST, int(calls / 4)))

    def run(self, density: Density, run: Run) -> Draws:
        proposal, notes = propose(self.proposal, density, run, self.degrees)
        z, log_weights = weighted(proposal, self.num_samples)
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
            alarms=proposal.alarms,
        )
