"""Figures that say how far an answer can be trusted, and a verdict in plain words."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .accuracy import Weighted, judged_by, of_chains, of_draws
from .statistics import all_finite, ess, k_hat_threshold, psis, rhat
from .words import Finding, Judgement, datum, element, level_by, unravel

LEVELS = ("good", "unknown", "caution", "bad")  # from best to worst

R_HAT_CAUTION, R_HAT_BAD = 1.01, 1.05
ESS_CAUTION, ESS_BAD = 100, 10  # per chain
E_BFMI_CAUTION = 0.3
DIVERGENT_BAD = 0.01  # share of the draws
KISH_CAUTION, KISH_BAD = 20, 5  # draws that carry the weight
K_HAT_BAD = 1.0
K_HAT_BAD_SHARE = 0.01  # among many data a few large k-hats are chance,
BY_CHANCE = 0.01  # and so are a few large R-hats

NEW_PROPOSAL = "draw more, or from a proposal closer to the posterior"
NEW_GUIDE = "the guide misses part of the posterior, take a richer one, or correct it by importance sampling"
WEIGHTED = "weighting the guide's draws"
ADJUSTED = "adjusting the draws to the observed data"
SMALLER_TOLERANCE = "the tolerance is too large, take more simulations, or regression=True"


@dataclass(frozen=True)
class Diagnostics:
    """Named figures (floats or small tensors) and what they mean.

    `level` is 'good', 'caution', 'bad' or 'unknown'; `verdict` is one sentence, worst finding first;
    `notes` are facts worth telling that are no alarm (sites marginalised, dtype used, a guide that was chosen).
    """

    figures: dict[str, Any] = field(default_factory=dict)
    level: str = "unknown"
    verdict: str = "not diagnosed"
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.figures[name]

    def __contains__(self, name: str) -> bool:
        return name in self.figures

    def over_data(self, worst: int = 5) -> dict[str, OverData]:
        """Each figure that every datum has for itself ('r_hat', 'ess_bulk', 'ess_tail', 'divergences'), in short."""
        suffix = "_per_datum"
        return {
            name.removesuffix(suffix): OverData.of(figure, worst, largest=not name.startswith("ess"))
            for name, figure in self.figures.items()
            if name.endswith(suffix)
        }


@dataclass(frozen=True)
class OverData:
    """A figure over the data: its 5, 50 and 95 % quantiles, and the worst data, (index, value), worst first.

    An index is that of the batch, (17,) or (3, 17); what is not a number counts as worst.
    """

    quantiles: tuple[float, float, float]
    worst: tuple[tuple[tuple[int, ...], float], ...]

    @classmethod
    def of(cls, figure: Tensor, worst: int, largest: bool) -> OverData:
        flat = figure.double().flatten()
        badness = torch.nan_to_num(flat if largest else -flat, nan=math.inf)
        order = badness.argsort(descending=True, stable=True)[:worst]
        low, middle, high = flat.nanquantile(torch.tensor([0.05, 0.5, 0.95], dtype=flat.dtype)).tolist()
        return cls((low, middle, high), tuple((tuple(unravel(int(i), figure.shape)), float(flat[i])) for i in order))


def diagnose(
    draws: Mapping[str, Tensor],
    log_weights: Tensor | None = None,
    kind: str = "mcmc",
    sample_stats: Mapping[str, Tensor] | None = None,
    batch_shape: tuple[int, ...] = (),
    notes: tuple[str, ...] = (),
    guide_log_ratio: Tensor | None = None,
    deterministic: bool = False,
    alarms: tuple[str, ...] = (),
    exact: bool = False,
    unknown: str = "",
    adjusted: Weighted | None = None,
) -> Diagnostics:
    """Judge draws by what can be known for their kind.

    mcmc      r_hat (largest), ess_bulk and ess_tail (smallest), divergences, e_bfmi (smallest); where the batch has
              several data, r_hat_, ess_bulk_, ess_tail_ and divergences_per_datum (*batch) too, and the verdict goes
              by the share of the data that are beyond a threshold, since among many some are by chance
    weighted  ess (Kish: smallest over the batch), ess_median, k_hat (largest), k_hat_threshold, k_hat_high (share of
              the batch above it), of `guide_log_ratio` where it is given: the weights before smoothing, since k-hat
              of smoothed weights is too small; with `deterministic` (every state listed, a quadrature rule) none:
              the weights are then exact, not drawn
    iid       num_draws and, with `guide_log_ratio` = log p(x, z) - log q(z), the figures of 'weighted'
    point     num_draws, 1, a caution: a point has no spread, and says nothing on how good it is
    With `exact` independent draws are the posterior's own, and num_draws (smallest over the batch) is what there is to
    judge: those of weight zero are none.
    All but a point and a rule have likely_error too, what the largest error of a mean or sd probably is, in sds (see
    `accuracy`); guides, and draws with others at hand that were `adjusted` to the data, moment_shift, the largest that
    means or sds move by weighting or adjusting them.

    draws: site -> (C, S, *batch, *event); log_weights: (C, S, *batch) and guide_log_ratio: (S, *batch), in nats;
    alarms: what the engine itself saw that speaks against its answer; each is a caution, and their number a figure.
    unknown: what no figure tells.
    sample_stats: (C, S, ...) by arviz's names, of which `diverging` and `energy` are used. A figure that is not to
    be had is left out, or nan where the draws should have given it. Draws that are not finite or never move are bad.

    Raises ValueError for another kind, and for 'weighted' without weights.
    Thresholds: R-hat < 1.01, ESS > 100 per chain (Vehtari et al. 2021, https://doi.org/10.1214/20-BA1221);
    E-BFMI > 0.3 (Betancourt 2016, https://arxiv.org/abs/1604.00695, as in CmdStan);
    k-hat < min(1 - 1 / log10 S, 0.7) (Vehtari et al. 2024, https://arxiv.org/abs/1507.02646); likely error < 0.2 sd.
    """
    figures: dict[str, Any] = {}
    dims = len(batch_shape)
    if not draws or any(0 in values.shape[:2] for values in draws.values()):
        findings = [("bad", "there are no draws")]
    elif findings := _not_finite(draws):
        pass  # figures of broken draws would only repeat the news
    elif exact:
        figures, findings = _both(_exact(draws, log_weights), judged_by(of_draws((draws, log_weights), None, dims)))
    elif kind == "mcmc":
        figures, findings = _mcmc(draws, sample_stats or {}, dims)
    elif kind == "weighted":
        if log_weights is None:
            raise ValueError("kind 'weighted' needs log_weights, (C, S, *batch).")
        weights = log_weights.flatten(0, 1)
        findings = _no_weight(weights)
        if not findings and deterministic:
            findings = [("good", "the weights are computed, not drawn: no sampling error")]
        elif not findings:
            figures, findings, _ = _weighted(weights if guide_log_ratio is None else guide_log_ratio, NEW_PROPOSAL)
            figures, findings = _both((figures, findings), _held_against((draws, log_weights), adjusted, dims))
    elif kind == "iid":
        figures, findings = _iid(draws, guide_log_ratio, adjusted, dims)
    elif kind == "point":
        figures = {"num_draws": 1}
        findings = [("caution", "one point: it has no spread, and nothing here tells how good it is")]
    else:
        raise ValueError(f"kind {kind!r}: expected 'mcmc', 'iid', 'weighted' or 'point'.")
    figures |= {"alarms": len(alarms)} if alarms else {}
    findings = [*findings, *(("caution", alarm) for alarm in alarms)] or [("unknown", "nothing here can be judged")]
    findings += [("unknown", unknown)] if unknown else []
    level = max((level for level, _ in findings), key=LEVELS.index)
    told = sorted(
        (finding for finding in findings if finding[0] != "good" or level == "good"),
        key=lambda finding: -LEVELS.index(finding[0]),
    )
    return Diagnostics(figures, level, _advised_once([text for _, text in told]), tuple(notes))


def _advised_once(texts: list[str]) -> str:
    """The findings one after the other, an advice that several end in with the first of them alone."""
    told = "; ".join(texts)
    for advice in (f": {NEW_GUIDE}", f": {NEW_PROPOSAL}"):
        first, found, others = told.partition(advice)
        told = first + found + others.replace(advice, "")
    return told


def _not_finite(draws: Mapping[str, Tensor]) -> list[Finding]:
    findings = []
    for site, values in draws.items():
        if not all_finite(values):
            broken = ~torch.isfinite(values)
            chain, draw, *index = (int(i) for i in broken.nonzero()[0])
            findings.append(
                (
                    "bad",
                    f"{int(broken.sum())} of {broken.numel()} values of {site} are not finite, the first at "
                    f"{element(site, index)} in chain {chain}, draw {draw}: the density or a transform overflows",
                )
            )
    return findings


# ---------------------------------------------------------------------------------------------------------------
# Chains


def _mcmc(draws: Mapping[str, Tensor], sample_stats: Mapping[str, Tensor], batch_dims: int) -> Judgement:
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
        figures, findings = _both((figures, findings), judged_by(of_chains(draws, judged, batch_dims)))
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


# ---------------------------------------------------------------------------------------------------------------
# Weights


def _weighted(log_weights: Tensor, advice: str) -> tuple[dict[str, Any], list[Finding], Tensor | None]:
    """On how many draws does each datum's answer rest, and is the tail of the weights light enough? (S, *batch). With
    the smoothed weights, unless they are broken."""
    findings = _no_weight(log_weights)
    if findings:
        return {}, findings, None
    draws, data = log_weights.shape[0], log_weights[0].numel()
    log_w = log_weights.double()
    kish = torch.exp(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0))
    figures: dict[str, Any] = {"ess": float(kish.min()), "ess_median": float(kish.median())}
    smoothed, k_hat = psis(log_w)
    known = ~k_hat.isnan()
    if known.any():
        threshold = k_hat_threshold(draws)
        worst = k_hat.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        largest, high = float(worst.max()), int((worst > threshold).sum())
        figures |= {"k_hat": largest, "k_hat_threshold": threshold, "k_hat_high": high / data}
        level = level_by(high == 0, int((worst > K_HAT_BAD).sum()) > K_HAT_BAD_SHARE * data)
        text = f"k-hat up to {largest:.2f}{datum(worst.argmax(), k_hat.shape)}"
        if high:
            share = f", and above that at {high} of {data} data" if data > 1 else ""
            text += f" (should be < {threshold:.2f}{share}): {advice}"
        findings.append((level, text))
    if not known.all():
        count = f" at {int((~known).sum())} of {data} data" if data > 1 else ""
        findings.append(("caution", f"k-hat is not available{count}: fewer than 25 draws have weight, draw more"))
    level = level_by(figures["ess"] > KISH_CAUTION, figures["ess"] <= KISH_BAD)
    text = f"Kish ESS down to {figures['ess']:.1f} of {draws} draws{datum(kish.argmin(), kish.shape)}"
    findings.append((level, text if level == "good" else f"{text} (should be > {KISH_CAUTION}): draw more"))
    return figures, findings, smoothed


def _iid(
    draws: Mapping[str, Tensor], guide_log_ratio: Tensor | None, adjusted: Weighted | None, batch_dims: int
) -> Judgement:
    chains, samples = next(iter(draws.values())).shape[:2]
    figures = {"num_draws": chains * samples}
    if guide_log_ratio is None:
        text = f"{chains * samples} independent draws, but nothing here tells how far they are from the posterior"
        return _both((figures, [("unknown", text)]), _held_against((draws, None), adjusted, batch_dims))
    of_guide, findings, smoothed = _weighted(guide_log_ratio, NEW_GUIDE)
    nowhere = (guide_log_ratio == -math.inf).double().mean(0)
    if bool((nowhere > 0).any()):
        share = f"{float(nowhere.max()):.0%} of the draws have no density{datum(nowhere.argmax(), nowhere.shape)}"
        findings = [("bad", f"{share}, so the ELBO is minus infinity: the guide leaves the support"), *findings]
    judged = figures | of_guide, findings
    if smoothed is None:
        return judged
    found = of_draws((draws, None), (draws, smoothed), batch_dims)
    return _both(judged, judged_by(found, WEIGHTED, NEW_GUIDE))


def _exact(draws: Mapping[str, Tensor], log_weights: Tensor | None) -> Judgement:
    values = next(iter(draws.values()))
    count = values.shape[0] * values.shape[1]
    if log_weights is not None:
        count = int((log_weights.flatten(0, 1) > -math.inf).sum(0).min())
    level = level_by(count > KISH_CAUTION, count <= KISH_BAD)
    text = f"{count} independent draws of the posterior itself"
    return {"num_draws": count}, [(level, text if level == "good" else f"{text} (should be > {KISH_CAUTION})")]


def _no_weight(log_weights: Tensor) -> list[Finding]:
    """Data, in (S, *batch), whose weights are broken or all zero."""
    broken = (log_weights.isnan() | (log_weights == math.inf)).any(0)
    zero = (log_weights == -math.inf).all(0)
    return [
        ("bad", f"{text}{datum(which.int().argmax(), which.shape)} ({int(which.sum())} of {which.numel()}): {meaning}")
        for which, text, meaning in (
            (broken, "log weights are nan or infinite", "the density overflows"),
            (zero, "no draw has any weight", "the proposal misses the posterior altogether"),
        )
        if which.any()
    ]


def _held_against(answer: Weighted, adjusted: Weighted | None, batch_dims: int) -> Judgement:
    return judged_by(of_draws(answer, adjusted, batch_dims), ADJUSTED if adjusted else "", SMALLER_TOLERANCE)


def _both(first: Judgement, second: Judgement) -> Judgement:
    return {**first[0], **second[0]}, [*first[1], *second[1]]
