"""Figures that say how far an answer can be trusted, and a verdict in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chain_diagnostics import judge_chains
from .statistics import all_finite
from .weight_diagnostics import NEW_GUIDE, NEW_PROPOSAL, judge_exact, judge_independent, judge_weighted
from .words import Finding, element, unravel

if TYPE_CHECKING:
    from .engine import Draws

LEVELS = ("good", "unknown", "caution", "bad")  # from best to worst


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


def diagnose(answer: Draws, batch_shape: tuple[int, ...] = (), notes: tuple[str, ...] = ()) -> Diagnostics:
    """Judge what an engine answered by what can be known for its kind.

    mcmc      r_hat (largest), ess_bulk and ess_tail (smallest), divergences, e_bfmi (smallest); where the batch has
              several data, r_hat_, ess_bulk_, ess_tail_ and divergences_per_datum (*batch) too, and the verdict goes
              by the share of the data that are beyond a threshold, since among many some are by chance
    weighted  ess (Kish: smallest over the batch), ess_median, k_hat (largest), k_hat_threshold, k_hat_high (share of
              the batch above it), of `log_ratio` where it is given: the weights before smoothing, since k-hat
              of smoothed weights is too small; with `deterministic` (every state listed, a quadrature rule) none:
              the weights are then exact, not drawn
    iid       num_draws and, with `log_ratio` = log p(x, z) - log q(z), the figures of 'weighted'
    point     num_draws, 1, a caution: a point has no spread, and says nothing on how good it is
    With `exact` independent draws are the posterior's own, and num_draws (smallest over the batch) is what there is to
    judge: those of weight zero are none.
    All but a point and a rule have likely_error too, what the largest error of a mean or sd probably is, in sds (see
    `accuracy`); guides, and draws with others at hand that were `adjusted` to the data, moment_shift, the largest that
    means or sds move by weighting or adjusting them.

    values: site -> (C, S, *batch, *event); log_weights: (C, S, *batch) and log_ratio: (S, *batch), in nats;
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
    dims, values, kind = len(batch_shape), answer.values, answer.kind
    if not values or any(0 in value.shape[:2] for value in values.values()):
        findings = [("bad", "there are no draws")]
    elif findings := _not_finite(values):
        pass  # figures of broken draws would only repeat the news
    elif answer.exact:
        figures, findings = judge_exact(answer, dims)
    elif kind == "mcmc":
        figures, findings = judge_chains(values, answer.sample_stats, dims)
    elif kind == "weighted":
        figures, findings = judge_weighted(answer, dims)
    elif kind == "iid":
        figures, findings = judge_independent(answer, dims)
    elif kind == "point":
        figures = {"num_draws": 1}
        findings = [("caution", "one point: it has no spread, and nothing here tells how good it is")]
    else:
        raise ValueError(f"kind {kind!r}: expected 'mcmc', 'iid', 'weighted' or 'point'.")
    figures |= {"alarms": len(answer.alarms)} if answer.alarms else {}
    findings = [*findings, *(("caution", alarm) for alarm in answer.alarms)]
    findings = findings or [("unknown", "nothing here can be judged")]
    findings += [("unknown", answer.unknown)] if answer.unknown else []
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
