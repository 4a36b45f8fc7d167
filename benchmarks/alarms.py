"""Which warning lights deserve trust: each alarm's hits, misses and false alarms where the truth is known.

An alarm looks at a figure that a run gives of itself (R-hat, k-hat, divergences ...), without the truth. A cell is
wrong where the truth shows an error above 0.2 sd. Crossing the two, over all cells that have the figure:

                  alarm          silence
    wrong         hit            miss
    right         false alarm    correct silence

    caught = hits / (hits + misses),   false = false alarms / (false alarms + correct silences)

with Wilson's (1927) intervals, doi:10.1080/01621459.1927.10502953. Figures are the worst over latents and data, and so
is the error that they are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrometer.inference import Posterior, accuracy
from pyrometer.inference.chain_diagnostics import E_BFMI_CAUTION, ESS_CAUTION, R_HAT_BAD, R_HAT_CAUTION
from pyrometer.inference.weight_diagnostics import KISH_CAUTION

if TYPE_CHECKING:
    from rich.table import Table

    from .cell import Record

WRONG = 0.2  # sd: an error above is one that somebody would want to know of
JUDGED_BY = ("error of means", "error of sds", "total variation")
LOW_ACCEPTANCE = 0.1
WIDE_BRACKET = 0.5  # nats
LOOSE_BOUND = 0.5  # nats
STILL_RISING = 0.05  # nats a datum

Figures = Mapping[str, float]


def figures_of(posterior: Posterior) -> dict[str, float]:
    """What the alarms look at, one number each, the worst over all latents and data; what the run has not is missing.

    r_hat            the largest
    ess              of chains: the smaller of bulk and tail ESS, for each chain; the smallest
    kish             of weights: draws that carry the weight; the smallest
    k_hat            the largest; `k_hat_threshold` is its limit at this number of draws
    divergences      their share of the draws
    e_bfmi           the smallest
    acceptance       mean of a chain, of chains at one datum, or of the last temperature; the smallest
    bound_gap        importance-weighted estimate less the bound, nats; the largest
    bracket          upper less lower bound of the log evidence, nats; the largest
    elbo_drift       what the bound still rose in the last quarter of the steps, beyond noise, nats a datum
    evidence_error   standard error of the log evidence, nats; the largest
    likely_error     what the largest error of a mean or sd probably is, by the run's own account, in sds
    alarms           how many the engine raised itself, in words: a tolerance not reached, a rule not settled ...
    num_draws        of an answer without chains or weights: one, of a point
    """
    if not posterior.status.done:
        return {}
    given = posterior.diagnostics.figures
    found: dict[str, float] = {}
    for name in ("r_hat", "k_hat", "k_hat_threshold", "e_bfmi", "likely_error", "num_draws"):
        if name in given:
            found[name] = float(given[name])
    found["alarms"] = float(given.get("alarms", 0))
    halves = [float(given[name]) for name in ("ess_bulk", "ess_tail") if name in given]
    if halves:
        found["ess"] = (math.nan if any(map(math.isnan, halves)) else min(halves)) / max(posterior.num_chains, 1)
    if "ess" in given:
        found["kish"] = float(given["ess"])
    if "divergences" in given:
        diverging = posterior.sample_stats["diverging"]
        found["divergences"] = float(diverging.double().mean(1).max())
    if "acceptance_rate" in posterior.sample_stats:
        found["acceptance"] = float(posterior.sample_stats["acceptance_rate"].double().mean(1).min())
    elif "acceptance" in given:
        found["acceptance"] = _worst(given["acceptance"], Tensor.amin)
    if "elbo_drift" in given:
        found["elbo_drift"] = _worst(given["elbo_drift"], Tensor.amax)
    evidence = posterior.log_evidence
    if evidence is not None:
        found["evidence_error"] = _worst(evidence.std_error, Tensor.amax)
        if evidence.kind == "lower bound" and evidence.refined is not None and evidence.refined.kind != "upper bound":
            found["bound_gap"] = _worst(evidence.refined.value - evidence.value, Tensor.amax)
    width = bracket(posterior)
    if width is not None:
        found["bracket"] = _worst(width, Tensor.amax)
    return found


def bracket(posterior: Posterior) -> Tensor | None:
    """Upper less lower bound of the log evidence, (*batch) in nats; None where the answer does not have both."""
    width, evidence = posterior.diagnostics.figures.get("bracket"), posterior.log_evidence
    if width is not None:
        return torch.as_tensor(width).double()
    if evidence is None or evidence.kind != "lower bound" or evidence.refined is None:
        return None
    return evidence.refined.value - evidence.value if evidence.refined.kind == "upper bound" else None


def _worst(figure: Any, of: Callable[[Tensor], Tensor]) -> float:
    return float(of(torch.as_tensor(figure).double()))  # nan is the worst of all: amin and amax hand it on


@dataclass(frozen=True)
class Alarm:
    """A warning light: when it is on, by the figures, and in words. nan figures switch it on."""

    name: str
    limit: str
    figure: str
    quiet: Callable[[float, Figures], bool]

    def on(self, figures: Figures) -> bool | None:
        """Whether it is on; None where the run has no such figure."""
        return not self.quiet(figures[self.figure], figures) if self.figure in figures else None


ALARMS = (
    Alarm("R-hat", f"> {R_HAT_CAUTION}", "r_hat", lambda v, _: v <= R_HAT_CAUTION),
    Alarm("R-hat, bad", f"> {R_HAT_BAD}", "r_hat", lambda v, _: v <= R_HAT_BAD),
    Alarm("ESS of a chain", f"< {ESS_CAUTION}", "ess", lambda v, _: v >= ESS_CAUTION),
    Alarm("divergences", "> 0", "divergences", lambda v, _: v == 0),
    Alarm("E-BFMI", f"< {E_BFMI_CAUTION}", "e_bfmi", lambda v, _: v >= E_BFMI_CAUTION),
    Alarm("k-hat", "> min(1 - 1/log10 S, 0.7)", "k_hat", lambda v, f: v <= f.get("k_hat_threshold", 0.7)),
    Alarm("Kish ESS", f"< {KISH_CAUTION}", "kish", lambda v, _: v >= KISH_CAUTION),
    Alarm("acceptance", f"< {LOW_ACCEPTANCE}", "acceptance", lambda v, _: v >= LOW_ACCEPTANCE),
    Alarm("ELBO convergence", f"> {STILL_RISING} nats a datum", "elbo_drift", lambda v, _: v <= STILL_RISING),
    Alarm("gap of the bound", f"> {LOOSE_BOUND} nats", "bound_gap", lambda v, _: v <= LOOSE_BOUND),
    Alarm("bracket width", f"> {WIDE_BRACKET} nats", "bracket", lambda v, _: v <= WIDE_BRACKET),
    Alarm("likely error", f"> {accuracy.CAUTION} sd", "likely_error", lambda v, _: v <= accuracy.CAUTION),
    Alarm("no spread", "one point", "num_draws", lambda v, _: v > 1),
    Alarm("the engine's own", "> 0", "alarms", lambda v, _: v == 0),
)
ANY, VERDICT, BAD_VERDICT = "any of these", "the verdict", "the verdict, bad"


@dataclass(frozen=True)
class AlarmScore:
    """How often an alarm was on where the answer was wrong, and where it was right; `absent`: cells without it."""

    name: str
    limit: str
    hits: int = 0
    misses: int = 0
    false_alarms: int = 0
    silences: int = 0
    absent: int = 0

    @property
    def caught(self) -> tuple[float, float, float] | None:
        """Share of the wrong cells with the alarm on, and its 95 % interval; None without wrong cells."""
        return wilson(self.hits, self.hits + self.misses)

    @property
    def false(self) -> tuple[float, float, float] | None:
        """Share of the right cells with the alarm on, and its 95 % interval; None without right cells."""
        return wilson(self.false_alarms, self.false_alarms + self.silences)


def wilson(count: int, total: int, z: float = 1.959964) -> tuple[float, float, float] | None:
    """A share and its interval (c + z^2/2 -+ z sqrt(c (n - c) / n + z^2/4)) / (n + z^2); None of nothing."""
    if total == 0:
        return None
    centre, half = count + z * z / 2, z * math.sqrt(count * (total - count) / total + z * z / 4)
    return count / total, max(0.0, (centre - half) / (total + z * z)), min(1.0, (centre + half) / (total + z * z))


def wrong(record: Record, limit: float = WRONG, by: str = "largest") -> bool | None:
    """Whether the cell's answer has an error above `limit` (sd, or total variation): its largest, or its `average`.

    None where it cannot be told: the cell did not end, nothing is known of the truth, or it is known to no better
    than half of the limit. nan is wrong.
    """
    scores = [record.row.errors[name] for name in JUDGED_BY if name in record.row.errors]
    if not record.row.status.done or not scores:
        return None
    if any(not score.reference_error <= limit / 2 for score in scores):
        return None
    return any(not getattr(score, by) <= limit for score in scores)


def score(records: Iterable[Record], limit: float = WRONG, by: str = "largest") -> tuple[AlarmScore, ...]:
    """Every alarm's score over the cells whose truth is known; last 'any of these', and the verdict, first 'caution' or
    'bad', then 'bad' alone.

    The share of the wrong cells that carry any alarm is the `caught` of 'any of these'. Cells that failed are left
    out: a failure is no answer, and no silence either.
    """
    judged = [(record, bad) for record in records if (bad := wrong(record, limit, by)) is not None]
    found = [_tally(alarm.name, alarm.limit, ((alarm.on(r.figures), bad) for r, bad in judged)) for alarm in ALARMS]
    lit = [[on for alarm in ALARMS if (on := alarm.on(r.figures)) is not None] for r, _ in judged]
    any_of = ((any(lights) if lights else None, bad) for lights, (_, bad) in zip(lit, judged, strict=True))
    verdicts = [
        _tally(name, limit, ((r.row.level in levels if r.row.level != "unknown" else None, bad) for r, bad in judged))
        for name, limit, levels in ((VERDICT, "caution or bad", ("caution", "bad")), (BAD_VERDICT, "bad", ("bad",)))
    ]
    return (*found, _tally(ANY, "", any_of), *verdicts)


def _tally(name: str, limit: str, seen: Iterable[tuple[bool | None, bool]]) -> AlarmScore:
    pairs = list(seen)
    return AlarmScore(
        name,
        limit,
        hits=pairs.count((True, True)),
        misses=pairs.count((False, True)),
        false_alarms=pairs.count((True, False)),
        silences=pairs.count((False, False)),
        absent=sum(on is None for on, _ in pairs),
    )


def render(scores: Iterable[AlarmScore]) -> Table:
    """The scores as a table, in 100 columns: shares with their 95 % intervals, and the counts behind them."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("alarm", "on where"):
        table.add_column(name)
    for name in ("wrong cells caught", "of", "right cells alarmed", "of", "without"):
        table.add_column(name, justify="right")
    for one in scores:
        wrongs, rights = one.hits + one.misses, one.false_alarms + one.silences
        cells = (_share(one.caught), str(wrongs), _share(one.false), str(rights), str(one.absent))
        table.add_row(one.name, one.limit, *cells)
    return table


def _share(share: tuple[float, float, float] | None) -> str:
    return "-" if share is None else f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})"
