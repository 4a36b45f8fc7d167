"""The largest of p(x, z) / q(z), datum by datum: sought before draws are rejected by it, and watched while they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .density import Density
from .engine import EngineError
from .engines.enumeration import Enumeration, every_value
from .laplace import climb, starting_points
from .posterior import gathered
from .proposals import Proposal, Z, refuse_undefined

PILOT, STARTS = 500, 6
ROUNDING = 1e-9
RISING = 1e-3  # nats that the next step of a climb may still promise


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
    starts, discrete = gathered(u, order), {}
    if not isinstance(z, Tensor):
        discrete = {n: gathered(z[n], order) for n in density.discrete if n in z}
    if not discrete:
        starts = torch.cat([starts, starting_points(density)])
    flat = isinstance(z, Tensor)

    def ratio(u: Tensor) -> Tensor:
        return proposal.log_ratio(u if flat else {**density.constrain(u), **discrete})

    _, value, _, _, promise = climb(density, ratio, starts, num_steps=50)
    top, at = value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).max(0)
    rising = (promise.gather(0, at[None])[0] > RISING) & (top >= log_w.amax(0))
    return torch.maximum(top, log_w.amax(0)), rising
