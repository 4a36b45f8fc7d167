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
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..acceptance import until_accepted
from ..density import Density
from ..engine import Draws, EngineError, Run, as_chain
from ..laplace import climb, starting_points
from ..problem import ProblemError
from ..proposals import Proposal, Z, candidates, check_proposal, ready, refuse_undefined, settled, why_not_propose
from ..settings import check_positive, settings
from ..simulations import pick
from .enumeration import Enumeration, every_value

PILOT, STARTS = 500, 6
ROUNDING = 1e-9
RISING = 1e-3  # nats that the next step of a climb may still promise


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
        budget = max(int(calls) - search, 1)
        return replace(self, num_samples=max(1, budget // 10), max_proposals=budget)

    def run(self, density: Density, run: Run) -> Draws:
        with run.tuning():
            proposal, watch, notes, alarms = self._bounded(density, run)

        def draw(count: int) -> tuple[Z, Tensor]:
            z, log_w = proposal.draw(count)
            refuse_undefined(log_w)
            return z, watch.accepts(density, log_w)

        accepted = until_accepted(density, run, draw, self.num_samples, self.max_proposals)
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


@dataclass
class Watch:
    """A bound, (*batch), and the highest that any proposal came relative to it."""

    log_bound: Tensor
    margin: float | None = None  # of a bound that was found
    highest: Tensor = field(init=False)
    proposals_above: int = 0

    def __post_init__(self) -> None:
        self.highest = torch.full_like(self.log_bound, -math.inf)

    def accepts(self, density: Density, log_w: Tensor) -> Tensor:
        """Which of these draws (count, *batch) are accepted; inside a minibatch those of its rows."""
        excess = log_w - density.rows(self.log_bound)
        highest = torch.maximum(density.rows(self.highest), excess.amax(0))
        rows = density.row_numbers
        self.highest[... if rows is None or not density.batch_plates else rows] = highest
        self.proposals_above += int((excess > ROUNDING).sum())
        return torch.rand(log_w.shape, dtype=log_w.dtype, device=log_w.device).log() < excess

    def broken(self) -> tuple[str, ...]:
        above = (self.highest > ROUNDING).flatten()
        if not bool(above.any()):
            return ()
        bad = above.nonzero().flatten().tolist()
        return (
            f"not exact at {len(bad)} of {len(above)} data, first {bad[:5]}: {self.proposals_above} proposals weigh "
            f"more than the bound, by up to {float(self.highest.max()):.3g} nats; raise it, or take a "
            "proposal with heavier tails",
        )

    def notes(self) -> tuple[str, ...]:
        if self.margin is None:
            return ()
        used = self.highest + self.margin
        count = int((used > 1e-3).sum())
        if not count or bool((self.highest > ROUNDING).any()):
            return ()
        share = f"up to {float(used.max()):.2g} of the {self.margin:g} nats of margin"
        return (f"the search for the bound missed the maximum at {count} of {used.numel()} data: {share} were needed",)


class Largest(NamedTuple):
    """The largest log w that was found of each datum, (*batch); the proposals that an acceptance should take, on
    average over the data; and what speaks against the search."""

    log_w: Tensor
    work: float
    alarms: tuple[str, ...] = ()


def largest(proposal: Proposal, density: Density) -> Largest:
    """Look for the largest log w of each datum. Raises `EngineError` where one has no draw to start from.

    Discrete latents alone: over all their values, where these can be listed. Else the best of some pilot draws, and
    Newton steps in the continuous latents: from the best of these draws, from a few others, each at its own discrete
    values, and, without discrete ones, from draws of the prior, for modes that the proposal does not know.
    """
    z, log_w = proposal.draw(PILOT)
    refuse_undefined(log_w)
    top = log_w.amax(0)
    if not bool(top.isfinite().all()):
        bad = (~top.isfinite()).flatten().nonzero().flatten().tolist()
        raise EngineError(f"no draw of the proposal has a finite weight for {len(bad)} data, first {bad[:5]}")
    alarms: tuple[str, ...] = ()
    if density.continuous:
        top, rising = _climbed(proposal, density, z, log_w)
        if bool(rising.any()):
            bad = rising.flatten().nonzero().flatten().tolist()
            alarms = (
                f"p(x, z) / q(z) still rises where the search for its bound ended, at {len(bad)} of {rising.numel()} "
                f"data, first {bad[:5]}: it may have no bound, take a proposal with heavier tails",
            )
    elif not Enumeration(max_values=2**16).supports(density):
        every = proposal.log_ratio(every_value(density))
        if bool((every == math.inf).any()):
            raise EngineError("the proposal never draws values of the discrete latents that the posterior has")
        top = every.nan_to_num(nan=-math.inf, neginf=-math.inf).amax(0)
    log_rate = torch.logsumexp(log_w, 0) - math.log(PILOT) - top
    return Largest(top, float((-log_rate).exp().mean()), alarms)


def _climbed(proposal: Proposal, density: Density, z: Z, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value met, (*batch), and whether it still rose where it was met."""
    u = z if isinstance(z, Tensor) else density.unconstrain(z)
    ranked = log_w.argsort(0, descending=True)[: STARTS // 2]
    others = torch.arange(STARTS // 2, device=u.device).reshape(-1, *[1] * (log_w.dim() - 1)).expand_as(ranked)
    order = torch.cat([ranked, others])
    starts, discrete = pick(u, order), {}
    if not isinstance(z, Tensor):
        discrete = {n: pick(z[n], order) for n in density.discrete if n in z}
    if not discrete:
        starts = torch.cat([starts, starting_points(density)])
    flat = isinstance(z, Tensor)

    def ratio(u: Tensor) -> Tensor:
        return proposal.log_ratio(u if flat else {**density.constrain(u), **discrete})

    _, value, _, promise = climb(density, ratio, starts, num_steps=50)
    top, at = value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).max(0)
    rising = (promise.gather(0, at[None])[0] > RISING) & (top >= log_w.amax(0))
    return torch.maximum(top, log_w.amax(0)), rising
