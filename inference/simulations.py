"""Simulated data beside the observed: summaries, distances, and the nearest of many simulations, datum by datum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .density import Density
from .engine import EngineError, Run
from .posterior import gathered
from .problem import ProblemError

NUMBERS = 2**20  # that are simulated at a time, roughly: more leave the processor's cache
MOVES, SURE = 0.2, 4.9  # sds, standard errors: what the tolerance may move unsaid
PER_SUMMARY = 5  # draws that a regression needs


class Simulated(NamedTuple):
    """Latents, site -> (n, *batch, *event) (or '' -> u), summaries (n, *batch, F) and distances (n, *batch)."""

    latents: dict[str, Tensor]
    summary: Tensor
    distance: Tensor


class Comparison(NamedTuple):
    """What simulations are held against.

    observed  summaries of the data, (*batch, F)
    scale     median absolute deviation of each summary under the prior, (*batch, F)
    usual     median distance of simulations from the prior, (*batch)
    """

    summary: Callable[[dict[str, Tensor]], Tensor] | None
    metric: Any
    observed: Tensor
    scale: Tensor
    usual: Tensor

    @classmethod
    def of(cls, density: Density, summary: Any, metric: Any, pilot: int) -> tuple[Comparison, Simulated]:
        """By the first simulations from the prior, which are given back. Raises `ProblemError` where a summary or a
        distance is not of the shape it should be."""
        batch = tuple(density.batch_shape)
        data = {n: v[None].to(density.device or "cpu") for n, v in density.observed.items()}
        observed = _summaries(density, data, summary)[0]
        if not bool(observed.isfinite().all()):
            raise ProblemError("the summaries of the observed data are not all finite.")
        sites = density.simulate(pilot)
        drawn = _summaries(density, sites, summary)
        usable = torch.where(drawn.isfinite(), drawn, observed)
        centre = usable.median(0).values
        scale = (usable - centre).abs().median(0).values
        spread = usable.std(0) if pilot > 1 else torch.ones_like(scale)
        scale = torch.where(scale > 0, scale, torch.where(spread > 0, spread, torch.ones_like(spread)))
        compare = cls(summary, metric, observed, scale, torch.ones(batch, dtype=density.dtype, device=scale.device))
        distance = compare.distance(density, drawn)
        first = Simulated({n: sites[n] for n in density.latents}, drawn, distance)
        return compare._replace(usual=distance.median(0).values), first

    def simulate(self, density: Density, count: int, given: Tensor | None = None) -> Simulated:
        """Simulations from the prior, or with continuous latents u given; inside a minibatch of its rows."""
        drawn = density.simulate(count, given)
        latents = {"": given} if given is not None else {n: drawn[n] for n in density.latents}
        found = _summaries(density, drawn, self.summary)
        return Simulated(latents, found, self.distance(density, found))

    def distance(self, density: Density, summary: Tensor) -> Tensor:
        """Of each simulation from the data, (n, *batch); of one that is not finite, infinite."""
        observed, scale = density.rows(self.observed), density.rows(self.scale)
        if self.metric == "euclidean":
            found = ((summary - observed) / scale).square().sum(-1).sqrt()
        else:
            found = self.metric(summary, observed)
            if not isinstance(found, Tensor) or found.shape != summary.shape[:-1]:
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ProblemError(f"ABC(distance=...) answers {shape}: expected {tuple(summary.shape[:-1])}.")
        return found.nan_to_num(nan=torch.inf)

    def alarms(self, epsilon: Tensor, far: float) -> tuple[str, ...]:
        share = epsilon / self.usual
        bad = (share > far).flatten().nonzero().flatten().tolist()
        if not bad:
            return ()
        return (
            f"the tolerance is up to {float(share.max()):.2g} of the usual distance of simulations from the prior, at "
            f"{len(bad)} of {share.numel()} data, first {bad[:5]}: the draws may be little more than the prior, take "
            "fewer summaries or more simulations",
        )

    def enough(self, weights: Tensor) -> bool:
        """Whether the draws of weight, (S, *batch), are enough for a regression on the summaries."""
        return bool(((weights > 0).sum(0) >= PER_SUMMARY * (self.observed.shape[-1] + 1)).all())

    def adjusted(self, density: Density, u: Tensor, summary: Tensor, weights: Tensor) -> Tensor:
        """u (S, *batch, D) less its weighted linear regression on the summaries' distance from the observed ones.
        Raises `EngineError` where there are too few draws for it."""
        x = ((summary - self.observed) / self.scale).movedim(0, -2)  # (*batch, S, F)
        if not self.enough(weights):
            least = PER_SUMMARY * (x.shape[-1] + 1)
            raise EngineError(f"a regression on {x.shape[-1]} summaries needs at least {least} draws; keep more")
        w = (weights / weights.sum(0)).movedim(0, -1)[..., None]  # (*batch, S, 1)
        y = u.movedim(0, -2)
        x_off, y_off = x - (w * x).sum(-2, keepdim=True), y - (w * y).sum(-2, keepdim=True)
        slope = torch.linalg.pinv((w * x_off).mT @ x_off, hermitian=True) @ ((w * x_off).mT @ y_off)
        return (y - x @ slope).movedim(-2, 0)


def nearest(
    density: Density,
    compare: Comparison,
    keep: int,
    count: int,
    run: Run,
    propose: Callable[[int], Tensor] | None = None,
    first: Simulated | None = None,
) -> Simulated:
    """The `keep` nearest of `count` simulations of each datum, in pieces that fit in memory: from the prior, or at u
    that are proposed; `first` of them are there already. Raises `EngineError` where fewer are finite."""
    size = max(keep, NUMBERS // max(1, compare.observed.numel() + density.batch_shape.numel() * density.dim))
    best = first
    for start in range(0 if first is None else len(first.distance), count, size):
        n = min(size, count - start)
        found = _best(compare.simulate(density, n, None if propose is None else propose(n)), keep)
        if best is not None:
            found = Simulated(
                {name: torch.cat([best.latents[name], v]) for name, v in found.latents.items()},
                torch.cat([best.summary, found.summary]),
                torch.cat([best.distance, found.distance]),
            )
        best = found if best is None else _best(found, keep)
        run.progress("simulations", start + n, count)
    assert best is not None
    best = _best(best, keep)
    if not bool(best.distance.isfinite().all()):
        bad = (~best.distance.isfinite()).any(0).flatten().nonzero().flatten().tolist()
        raise EngineError(f"fewer than {keep} of {count} simulations are finite for {len(bad)} data, first {bad[:5]}")
    return best


def _best(found: Simulated, keep: int) -> Simulated:
    distance, index = found.distance.topk(min(keep, len(found.distance)), 0, largest=False)
    return Simulated(
        {n: gathered(v, index) for n, v in found.latents.items()}, gathered(found.summary, index), distance
    )


def _summaries(density: Density, sites: dict[str, Tensor], summary: Any) -> Tensor:
    """(n, *batch, F) of the observations among the sites, (n, *batch, *event)."""
    data = {n: v for n, v in sites.items() if density.sites[n].role == "observed"}
    count = len(next(iter(data.values())))
    shape = (count, *density.batch_shape)
    if summary is None:
        return torch.cat([v.to(density.dtype).reshape(*shape, -1) for v in data.values()], -1)
    found = summary(data)
    if not isinstance(found, Tensor) or found.shape[:-1] != shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ProblemError(f"ABC(summary=...) answers {got}: expected {(*shape, 'F')}, a row for each datum.")
    return found.to(density.dtype)


def still_moving(u: Tensor, log_w: Tensor, distance: Tensor) -> tuple[str, ...]:
    """An alarm where the nearer and the farther half of the draws (S, *batch, D) have other means or second moments, so
    that a smaller tolerance would have moved them."""
    near = distance <= distance.median(0).values
    weights = torch.softmax(log_w, 0)[..., None]
    centred = u - (weights * u).sum(0)
    sd = (weights * centred.square()).sum(0).sqrt()
    moving = torch.zeros(distance.shape[1:], dtype=torch.bool, device=u.device)
    largest = 0.0
    for values, limit in ((centred / sd, MOVES), ((centred / sd).square(), 2 * MOVES)):
        means, errors = [], []
        for half in (near, ~near):
            w = torch.softmax(log_w.masked_fill(~half, -math.inf), 0)[..., None]
            means.append((w * values).sum(0))
            errors.append((w.square() * (values - means[-1]).square()).sum(0))
        off = (means[0] - means[1]).abs()
        found = (off > limit) & (off > SURE * (errors[0] + errors[1]).sqrt())  # nan, of one half alone, is not
        moving |= found.any(-1)
        largest = max([largest, *off[found].flatten().tolist()])
    if not bool(moving.any()):
        return ()
    return (
        f"the nearer half of the draws differs from the farther half by up to {largest:.2g} posterior sds, or as much "
        f"in the square, at {int(moving.sum())} of {moving.numel()} data: the tolerance is too large, take more "
        "simulations",
    )
