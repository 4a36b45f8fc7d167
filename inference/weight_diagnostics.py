"""What weights tell of draws, and of a guide: on how many draws does the answer rest, how heavy is the tail?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .accuracy import judged_by, of_draws
from .statistics import k_hat_threshold, psis
from .words import Finding, Judgement, both, datum, level_by

if TYPE_CHECKING:
    from .engine import Draws

KISH_CAUTION, KISH_BAD = 20, 5  # draws that carry the weight
K_HAT_BAD = 1.0
K_HAT_BAD_SHARE = 0.01  # among many data a few large k-hats are chance
NEW_PROPOSAL = "draw more, or from a proposal closer to the posterior"
NEW_GUIDE = "the guide misses part of the posterior, take a richer one, or correct it by importance sampling"
WEIGHTED = "weighting the guide's draws"
ADJUSTED = "adjusting the draws to the observed data"
SMALLER_TOLERANCE = "the tolerance is too large, take more simulations, or regression=True"


def judge_weighted(answer: Draws, batch_dims: int) -> Judgement:
    """Of weighted draws: log_weights (C, S, *batch); of smoothed ones by the raw ones, log_ratio (S, *batch)."""
    if answer.log_weights is None:
        raise ValueError("kind 'weighted' needs log_weights, (C, S, *batch).")
    weights, ratio = answer.log_weights.flatten(0, 1), answer.log_ratio
    if findings := _no_weight(weights):
        return {}, findings
    if answer.deterministic:
        return {}, [("good", "the weights are computed, not drawn: no sampling error")]
    figures, findings, _ = _weighted(weights if ratio is None else ratio, NEW_PROPOSAL)
    return both((figures, findings), _held_against(answer, batch_dims))


def judge_independent(answer: Draws, batch_dims: int) -> Judgement:
    """Of equally weighted draws; log_ratio (S, *batch) tells how far their guide is from the posterior."""
    draws, ratio = answer.values, answer.log_ratio
    chains, samples = next(iter(draws.values())).shape[:2]
    figures = {"num_draws": chains * samples}
    if ratio is None:
        text = f"{chains * samples} independent draws, but nothing here tells how far they are from the posterior"
        return both((figures, [("unknown", text)]), _held_against(answer, batch_dims))
    of_guide, findings, smoothed = _weighted(ratio, NEW_GUIDE)
    nowhere = (ratio == -math.inf).double().mean(0)
    if bool((nowhere > 0).any()):
        share = f"{float(nowhere.max()):.0%} of the draws have no density{datum(nowhere.argmax(), nowhere.shape)}"
        findings = [("bad", f"{share}, so the ELBO is minus infinity: the guide leaves the support"), *findings]
    judged = figures | of_guide, findings
    if smoothed is None:
        return judged
    found = of_draws((draws, None), (draws, smoothed), batch_dims)
    return both(judged, judged_by(found, WEIGHTED, NEW_GUIDE))


def judge_exact(answer: Draws, batch_dims: int) -> Judgement:
    """Of draws of the posterior itself: their number is what there is to judge, those of weight zero are none."""
    draws, log_weights = answer.values, answer.log_weights
    count = next(iter(draws.values())).shape[:2].numel()
    if log_weights is not None:
        count = int((log_weights.flatten(0, 1) > -math.inf).sum(0).min())
    level = level_by(count > KISH_CAUTION, count <= KISH_BAD)
    text = f"{count} independent draws of the posterior itself"
    findings = [(level, text if level == "good" else f"{text} (should be > {KISH_CAUTION})")]
    return both(({"num_draws": count}, findings), judged_by(of_draws((draws, log_weights), None, batch_dims)))


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


def _held_against(answer: Draws, batch_dims: int) -> Judgement:
    accuracy = of_draws((answer.values, answer.log_weights), answer.adjusted, batch_dims)
    return judged_by(accuracy, ADJUSTED if answer.adjusted else "", SMALLER_TOLERANCE)
