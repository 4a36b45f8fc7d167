"""What chains tell of themselves: do they move, agree and hold enough draws, was the sampler able to follow?"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .accuracy import judged_by, of_chains
from .statistics import ess, rhat
from .words import Finding, Judgement, both, element, level_by, unravel

R_HAT_CAUTION, R_HAT_BAD = 1.01, 1.05
ESS_CAUTION, ESS_BAD = 100, 10  # per chain
E_BFMI_CAUTION = 0.3
DIVERGENT_BAD = 0.01  # share of the draws
BY_CHANCE = 0.01  # of many data so many may be beyond a limit by chance


def judge_chains(draws: Mapping[str, Tensor], sample_stats: Mapping[str, Tensor], batch_dims: int) -> Judgement:
    """Do the chains agree, do they hold enough independent draws, was the sampler able to follow the density?"""
    chains, samples = next(iter(draws.values())).shape[:2]
    figures: dict[str, Any] = {}
    findings: list[Finding] = []
    if samples < 4:
        findings.append(("caution", f"{samples} draws per chain are too few to judge by"))
    else:
        judged = {}
        some_move = any(bool((values != values[:1, :1]).any()) for values in draws.values())
        for site, values in draws.items():
            judged[site], found = _movement(site, values, batch_dims, some_move)
            findings += found
        if any(level == "bad" for level, _ in findings):  # what is stuck cannot be compared, and must not look well
            judged = {}
            figures |= dict.fromkeys(("r_hat", "ess_bulk", "ess_tail", "likely_error"), math.nan)
        if chains == 1:
            findings.append(("caution", "one chain only, so R-hat is not available: run four (num_chains=4)"))
        elif worst := _worst(rhat, draws, judged, batch_dims, largest=True):
            figures["r_hat"], where, of_data = worst
            beyond = partial(_share, of_data, figures["r_hat"], operator.ge)
            level = _level_of(beyond(R_HAT_CAUTION), beyond(R_HAT_BAD), of_data)
            wish = f" (should be < {R_HAT_CAUTION}{_some(of_data, beyond(R_HAT_CAUTION))}): chains disagree, run a "
            text = f"R-hat up to {figures['r_hat']:.3f} at {where}"
            findings.append((level, text + (wish + "longer warm-up") * (level != "good")))
            if of_data is not None:
                figures["r_hat_per_datum"] = of_data
        for kind in ("bulk", "tail"):
            if worst := _worst(partial(ess, kind=kind), draws, judged, batch_dims, largest=False):
                figures[f"ess_{kind}"], where, of_data = worst
                beyond = partial(_share, of_data, figures[f"ess_{kind}"], operator.le)
                few = ESS_CAUTION * chains
                level = _level_of(beyond(few), beyond(ESS_BAD * chains), of_data)
                wish = f" (should be > {few}{_some(of_data, beyond(few))}): draw more"
                text = f"{kind} ESS down to {figures[f'ess_{kind}']:.0f} at {where}"
                findings.append((level, text + wish * (level != "good")))
                if of_data is not None:
                    figures[f"ess_{kind}_per_datum"] = of_data
        figures, findings = both((figures, findings), judged_by(of_chains(draws, judged, batch_dims)))
    if "diverging" in sample_stats:
        diverging = sample_stats["diverging"]
        figures["divergences"] = count = int(diverging.sum())
        level = level_by(count == 0, count > DIVERGENT_BAD * diverging.numel())
        if batch_dims and diverging.dim() == 2 + batch_dims and diverging[0, 0].numel() > 1:
            figures["divergences_per_datum"] = by_datum = diverging.sum((0, 1))
            many = DIVERGENT_BAD * diverging.shape[:2].numel()
            some, bad = (float((by_datum > limit).double().mean()) for limit in (0, many))
            level = _level_of(some, bad, by_datum)
        wish = ": the sampler cannot follow the density, raise its target acceptance or reparameterise the model"
        text = f"{count} of {diverging.numel()} transitions diverged{wish}" if count else "no divergences"
        findings.append((level, text))
    if "energy" in sample_stats and samples >= 4:
        energy = sample_stats["energy"].double()
        figures["e_bfmi"] = value = float((energy.diff(dim=1).square().mean(1) / energy.var(1)).min())
        level = level_by(value >= E_BFMI_CAUTION, False)
        wish = f" (should be > {E_BFMI_CAUTION}): the energy hardly moves, reparameterise the model"
        findings.append((level, f"E-BFMI down to {value:.2f}" + wish * (level != "good")))
    return figures, findings


def _movement(site: str, values: Tensor, batch_dims: int, others: bool) -> tuple[Tensor, list[Finding]]:
    """Which scalars of (C, S, *batch, *event) R-hat and ESS can judge, and what to say of those that stand still.

    Bad: a chain that stands still. Not judged, with a caution, since they may be as they should: whole numbers that
    keep one value; zeros and ones in a value that moves otherwise (padding); a site that never moves while `others`
    do (a constant of the model). Not judged, no alarm: the zeros and ones of a square matrix (a Cholesky factor).
    """
    still = (values == values[:, :1]).all(1)
    everywhere = (values == values[:1, :1]).all(0).all(0)
    event = tuple(range(batch_dims, everywhere.dim()))
    moves = (~everywhere).any(event, keepdim=True) if event else ~everywhere
    padding = everywhere & moves & ((values[0, 0] == 0) | (values[0, 0] == 1))
    matrix = len(event) >= 2 and values.shape[-1] == values.shape[-2]
    whole = not values.is_floating_point() or bool((values == values.round()).all())
    apart = still.all(0) & ~everywhere  # each chain stands still, at another value
    certain = padding | (still.any(0) & ~apart & whole) | (everywhere & everywhere.all() & others)
    stuck = still.any(0) & ~certain
    judged = ~certain
    if matrix:
        certain = certain & ~padding
    findings = []
    for level, which, meaning in (
        ("bad", stuck, "the sampler is stuck, look at its start, step size and acceptance"),
        ("caution", certain, "constant or stuck, which R-hat cannot tell"),
    ):
        if which.any():
            at = int(which.flatten().nonzero()[0])
            chain = int(still.reshape(len(still), -1)[:, at].nonzero()[0])
            more = f" (nor do {int(which.sum()) - 1} more scalars)" if which.sum() > 1 else ""
            where = element(site, unravel(at, which.shape))
            findings.append((level, f"{where} never moves in chain {chain}{more}: {meaning}"))
    return judged, findings


def _worst(
    statistic: Callable[[Tensor], Tensor], draws: Mapping[str, Tensor], judged: Mapping[str, Tensor], batch_dims: int,
    largest: bool,
) -> tuple[float, str, Tensor | None] | None:  # fmt: skip
    """The worst value of a statistic over all judged scalars, where it is, and the worst of each datum, (*batch), where
    there are several; nan is worse than any number."""
    worst, worst_value, where = -math.inf, math.nan, ""
    of_data: Tensor | None = None
    for site, which in judged.items():
        if which.any():
            found = statistic(draws[site])
            badness = torch.nan_to_num(found if largest else -found, nan=math.inf, posinf=math.inf, neginf=-math.inf)
            badness = badness.masked_fill(~which, -math.inf)
            at = int(badness.argmax())
            if not where or float(badness.flatten()[at]) > worst:
                worst, worst_value = float(badness.flatten()[at]), float(found.flatten()[at])
                where = element(site, unravel(at, found.shape))
            own = badness.flatten(batch_dims).amax(-1) if badness.dim() > batch_dims else badness
            of_data = own if of_data is None else torch.maximum(of_data, own)
    if of_data is not None:
        of_data = of_data if largest else -of_data
    several = of_data is not None and batch_dims > 0 and of_data.numel() > 1
    return (worst_value, where, of_data if several else None) if where else None


def _share(of_data: Tensor | None, worst: float, beyond: Callable[[Any, float], Any], limit: float) -> float:
    """The share of the data that are beyond a limit; of one datum it is all or nothing. nan is beyond."""
    if of_data is None:
        return float(not math.isfinite(worst) or beyond(worst, limit))
    return float((beyond(of_data, limit) | ~of_data.isfinite()).double().mean())


def _level_of(cautions: float, bads: float, of_data: Tensor | None) -> str:
    """The level by the shares of the data that are beyond the two limits."""
    tolerated = BY_CHANCE if of_data is not None else 0.0
    return level_by(cautions <= tolerated, bads > tolerated)


def _some(of_data: Tensor | None, share: float) -> str:
    return "" if of_data is None else f", and is not at {round(share * of_data.numel())} of {of_data.numel()} data"
