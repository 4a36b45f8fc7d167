"""Rejection sampling, per datum: exact independent draws, each datum with its own bound and its own acceptances.

    z ~ q,  accept where  log u < log w(z) - log M,   log w = log p_theta(x, z) - log q(z) <= log M,   u uniform

Accepted draws have the law p_theta(z | x), and the probability to accept is Z / M, so that the acceptances tell the
evidence: log Z = log M + log a-hat, unbiased on the natural scale given the bound (acceptance.py). For q the prior, M
is the largest likelihood. von Neumann 1951, "Various techniques used in connection with random digits".

All of it hangs on M. One that is found, by climbing from the best pilot draws, is a maximum that was seen and no proof:
every proposal is held against it, and one above it takes back the claim that the draws are exact.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..acceptance import until_accepted
from ..bounds import PILOT, Watch, largest
from ..density import Density
from ..engine import Draws, EngineError, Run, as_chain
from ..problem import ProblemError
from ..proposals import Proposal, Z, candidates, check_proposal, ready, refuse_undefined, settled, why_not_propose
from ..settings import check_positive, settings

FEWEST = 200  # proposals of the smallest run


@settings
class RejectionSampling:
    """Accept draws of a proposal q so that those left are independent draws of the posterior, each datum for itself.

    num_samples    accepted draws of each datum
    proposal       as for `ImportanceSampling`: 'prior', 'guide', 'laplace', a posterior, an engine, or 'auto'
    log_bound      log M in nats, a number or a tensor (*batch); for the prior the largest log likelihood. None: found
    margin         nats that a bound that was found is raised by: it costs a share 1 - exp(-margin) of the acceptances
    max_proposals  of a datum, at most: what it lacks then is told, and its draws are padded without weight
    degrees        of freedom of the t proposals
    """

    name: ClassVar[str] = "rejection_sampling"
    num_samples: int = 1000
    proposal: Any = "auto"
    log_bound: Any = None
    margin: float = 0.05
    max_proposals: int = 1_000_000
    degrees: float = 5.0

    def __post_init__(self) -> None:
        check_positive(self, "degrees", "margin")
        check_proposal(self)
        if self.log_bound is None:
            return
        try:
            bound = torch.as_tensor(self.log_bound, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            bound = torch.tensor(math.nan)
        if isinstance(self.log_bound, bool) or not bool(bound.isfinite().all()):
            raise ProblemError(f"RejectionSampling(log_bound={self.log_bound!r}): expected finite numbers, in nats.")
        if isinstance(self.proposal, str) and self.proposal == "auto":
            raise ProblemError("RejectionSampling(log_bound=...) bounds p(x, z) / q(z): say for which proposal=...")

    def supports(self, density: Density) -> str:
        if self.log_bound is not None:
            shape, batch = tuple(torch.as_tensor(self.log_bound).shape), tuple(density.batch_shape)
            if shape not in ((), batch):
                raise ProblemError(f"log_bound has shape {shape}: expected one number, or one for each datum, {batch}.")
        return why_not_propose(density, self.proposal)

    def sized(self, calls: float, density: Density) -> RejectionSampling:
        """About one accepted in ten is planned for; a smaller share ends at the budget and is told."""
        search = 0 if self.log_bound is not None else 3 * PILOT
        budget = max(int(calls) - search, FEWEST)
        return replace(self, num_samples=budget // 10, max_proposals=budget)

    def run(self, density: Density, run: Run) -> Draws:
        with run.tuning():
            proposal, watch, notes, alarms = self._bounded(density, run)

        def draw(count: int) -> tuple[Z, Tensor]:
            z, log_w = proposal.draw(count)
            refuse_undefined(log_w)
            return z, watch.accepts(density, log_w)

        try:
            accepted = until_accepted(density, run, draw, self.num_samples, self.max_proposals)
        except EngineError as error:
            raise EngineError("; ".join([str(error), *watch.broken(), *alarms])) from error
        batch, broken = tuple(density.batch_shape), watch.broken()
        log_weights = accepted.log_weights(batch)
        return Draws(
            as_chain(density.complete(accepted.z)),
            "iid" if log_weights is None else "weighted",
            log_weights,
            # what is cut off at the bound is lost, so that the rate tells too little
            accepted.evidence(watch.log_bound.flatten(), batch, "lower bound" if broken else "estimate"),
            notes=(*notes, *watch.notes()),
            exact=not broken,
            alarms=(*broken, *accepted.alarms(), *alarms),
            figures={
                "acceptance": accepted.rate.reshape(batch),
                "proposals": accepted.proposals.double().reshape(batch),
                "log_bound": watch.log_bound,
                "above_bound": watch.highest.clamp_min(0.0),
            },
        )

    def _bounded(self, density: Density, run: Run) -> tuple[Proposal, Watch, tuple[str, ...], tuple[str, ...]]:
        """A proposal and its bound, notes and alarms; for 'auto' the one that promises to accept more."""
        proposal = settled(density, self.proposal)
        if self.log_bound is not None:
            given = torch.as_tensor(self.log_bound, dtype=density.dtype, device=density.device)
            chosen = ready(proposal, density, run, self.degrees)
            return chosen, Watch(given.expand(tuple(density.batch_shape)).clone()), (), chosen.alarms
        auto = isinstance(proposal, str) and proposal == "auto"
        names = candidates(density) if auto else [proposal]
        found, failed = [], EngineError("")
        for name in names:
            try:
                chosen = ready(name, density, run, self.degrees)
                found.append((name, chosen, largest(chosen, density)))
            except EngineError as error:
                failed = error
        if not found:
            raise failed
        name, chosen, best = min(found, key=lambda each: each[2].work)
        notes = (f"proposal: {name}, which accepts more",) if auto and len(names) > 1 else ()
        return chosen, Watch(best.log_w + self.margin, margin=self.margin), notes, (*best.alarms, *chosen.alarms)
