"""What the page says in numbers: the cells of one engine at one budget, over seeds, as a mean and an interval.

    mean +- t_{n-1, 0.975} sd / sqrt(n)      over the n seeds of a group

A group is problem x learner x engine x budget; a block holds the groups of one problem and learner, which share the
truth. Records are taken one at a time, and of each only its numbers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from sys import intern
from typing import Any

from .. import distances as _distances  # noqa: F401  the metrics there join the tables by being defined,
from .. import scores as _scores  # noqa: F401  and these
from ..cell import Cell, Record
from ..comparison import PerDatum, Theta
from ..metrics import BETTER, METRICS, MORE, Score

LEVEL = 0.95
LEVELS = ("good", "caution", "unknown", "bad")  # from the best to the worst


def better(metric: str) -> str:
    """'lower', 'higher', or '' where neither is better or this installation does not know the metric."""
    return BETTER.get(metric, "")


def in_table(metric: str) -> bool:
    """Whether it has a column in the first table; the others stand in one of their own."""
    return metric in METRICS and metric not in MORE


@cache
def t_quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, freedom))


@dataclass(frozen=True)
class Interval:
    """The mean over n seeds and its interval; none for one seed, nor where a value is not finite."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Interval | None:
        """None for no values. Where none is negative, nor is the interval."""
        found = list(values)
        if not found:
            return None
        mean = math.fsum(found) / len(found) if all(map(math.isfinite, found)) else sum(found)
        if len(found) < 2 or not math.isfinite(mean):
            return cls(mean, None, None, len(found))
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1) / len(found))
        half = t_quantile(len(found) - 1) * spread
        low = mean - half if min(found) < 0 else max(mean - half, 0.0)
        return cls(mean, low, mean + half, len(found))

    @property
    def upper(self) -> float:
        """What the value may be: the end of the interval, or the mean where there is none."""
        return self.mean if self.high is None else self.high

    @property
    def lower(self) -> float:
        return self.mean if self.low is None else self.low


@dataclass(frozen=True, slots=True)
class Entry:
    """The numbers of one cell."""

    key: str
    seed: int
    state: str
    reason: str
    errors: Mapping[str, Score]
    evidence: PerDatum | None
    truth: PerDatum | None
    held_out: float | None
    level: str
    verdict: str
    notes: tuple[str, ...]
    calls: float
    seconds: float
    compile_seconds: float
    draws: str

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def evidence_error(self) -> float | None:
        """Estimate less truth, in nats per datum, where both are known."""
        return self.evidence.value - self.truth.value if self.evidence and self.truth else None


@dataclass
class Group:
    """One engine at one budget: its cells over seeds. `cell`, `settings`, `versions`, `machine` are of the first."""

    cell: Cell
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    entries: list[Entry] = field(default_factory=list)
    best: set[str] = field(default_factory=set)  # the metrics in which no other engine of the budget comes near

    @property
    def engine(self) -> str:
        return self.cell.engine

    @property
    def budget(self) -> str:
        return str(self.cell.budget)

    @property
    def name(self) -> tuple[str, str, str, str]:
        return (self.cell.problem, self.cell.learner, self.engine, self.budget)

    @property
    def done(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.done]

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.entries)

    def error(self, metric: str) -> Interval | None:
        """The average error over all latents and data."""
        return Interval.of(e.errors[metric].average for e in self.done if metric in e.errors)

    def largest(self, metric: str) -> tuple[float, str] | None:
        """The worst of any latent at any seed, and where: the largest, or the smallest where more is better."""
        scores = [e.errors[metric] for e in self.done if metric in e.errors]
        sign = -1.0 if better(metric) == "higher" else 1.0
        worst = max(scores, key=lambda s: math.inf if math.isnan(s.largest) else sign * s.largest, default=None)
        return None if worst is None else (worst.largest, worst.where)

    def reference_error(self, metric: str) -> float:
        """The truth's own error in this metric, the largest over seeds."""
        return max((e.errors[metric].reference_error for e in self.done if metric in e.errors), default=0.0)

    def at_reference_precision(self, metric: str) -> bool:
        error, known_to = self.error(metric), self.reference_error(metric)
        return error is not None and known_to > 0 and error.mean <= known_to

    def calls(self) -> Interval | None:
        return Interval.of(e.calls for e in self.done)

    def seconds(self) -> Interval | None:
        return Interval.of(e.seconds for e in self.done)

    def evidence(self) -> Interval | None:
        return Interval.of(e.evidence.value for e in self.done if e.evidence)

    def evidence_error(self) -> Interval | None:
        return Interval.of(error for e in self.done if (error := e.evidence_error) is not None)

    def above(self) -> Interval | None:
        """The upper bound of the log evidence of the same data, where the engine has one beside its estimate."""
        return Interval.of(
            e.evidence.refined.value
            for e in self.done
            if e.evidence and e.evidence.refined and e.evidence.refined.kind == "upper bound"
        )

    def claimed(self) -> float | None:
        """The standard error that the engine itself gives its evidence, the mean over seeds."""
        errors = Interval.of(e.evidence.std_error for e in self.done if e.evidence)
        return errors.mean if errors else None

    def evidence_kind(self) -> str:
        return next((e.evidence.kind for e in self.done if e.evidence), "")

    def level(self) -> str:
        """The worst word that the engine's own diagnostics have at any seed."""
        levels = [e.level for e in self.done]
        return max(levels, key=LEVELS.index, default="unknown") if set(levels) <= set(LEVELS) else "unknown"

    def values(self) -> dict[str, list[float]]:
        """Every figure that has an interval, by name, over the seeds: what two reports are compared by."""
        found: dict[str, list[float]] = {}
        for entry in self.done:
            of_entry = {m: s.average for m, s in entry.errors.items()}
            if entry.evidence is not None:
                of_entry["log evidence"] = entry.evidence.value
            of_entry |= {"calls": entry.calls, "seconds": entry.seconds}
            for name, value in of_entry.items():
                found.setdefault(name, []).append(value)
        return found


@dataclass
class Block:
    """The groups of one problem and learner, and what is true there."""

    problem: str
    learner: str
    theta: Theta
    groups: list[Group] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)  # seed -> held-out log p(x) per datum, one for each theta
    learning: dict[int, tuple[float, float]] = field(default_factory=dict)  # seed -> calls and seconds of the learner

    @property
    def metrics(self) -> list[str]:
        """In the order in which they are defined; those that this installation does not know come last."""
        present = {metric for group in self.groups for entry in group.done for metric in entry.errors}
        return [m for m in METRICS if m in present] + sorted(present - set(METRICS))

    @property
    def engines(self) -> list[str]:
        return sorted({group.engine for group in self.groups})

    @property
    def budgets(self) -> list[str]:
        """From the smallest; an engine's own comes last."""
        return list(dict.fromkeys(group.budget for group in self.groups))

    @property
    def seeds(self) -> list[int]:
        return sorted({entry.seed for group in self.groups for entry in group.entries})

    def ladder(self, engine: str) -> list[Group]:
        return [group for group in self.groups if group.engine == engine]


@dataclass
class Summary:
    blocks: list[Block]
    cells: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        return [group for block in self.blocks for group in block.groups]

    @property
    def engines(self) -> list[str]:
        return sorted({group.engine for group in self.groups})


def summarise(records: Iterable[Record], unreadable: dict[str, str] | None = None) -> Summary:
    """All blocks by name, their groups by engine and budget, entries by seed."""
    blocks: dict[tuple[str, str], Block] = {}
    groups: dict[tuple[str, str, str, str], Group] = {}
    cells = 0
    for record in records:
        cells += 1
        cell, theta = record.cell, record.theta
        block = blocks.setdefault((cell.problem, cell.learner), Block(cell.problem, cell.learner, theta))
        if theta.reference != "none" and block.theta.reference == "none":
            block.theta = theta
        if theta.held_out is not None and theta.held_out.value is not None:
            block.held_out[cell.seed] = theta.held_out.value
        if cell.learner and theta.status.done:
            block.learning[cell.seed] = (theta.cost.calls, theta.cost.seconds)
        group = Group(cell, record.row.settings, record.versions, record.machine)
        if group.name not in groups:
            groups[group.name] = group
            block.groups.append(group)
        groups[group.name].entries.append(entry_of(record))
    for block in blocks.values():
        block.groups.sort(key=lambda g: (budget_order(g), g.engine))
        for group in block.groups:
            group.entries.sort(key=lambda e: (e.seed, e.key))
        for metric in block.metrics:
            _mark_best(block, metric)
    return Summary([blocks[name] for name in sorted(blocks)], cells, dict(unreadable or {}))


def entry_of(record: Record) -> Entry:
    row, theta = record.row, record.theta
    return Entry(
        key=record.key,
        seed=record.cell.seed,
        state=intern(row.status.state),
        reason=intern(row.status.reason),
        errors=row.errors,
        evidence=row.log_evidence,
        truth=theta.log_evidence if theta.reference != "none" else None,
        held_out=theta.held_out.value if theta.held_out else None,
        level=intern(row.level),
        verdict=intern(row.verdict),
        notes=row.notes,
        calls=row.cost.calls,
        seconds=row.cost.seconds,
        compile_seconds=row.cost.compile_seconds,
        draws=record.draws,
    )


def budget_order(group: Group) -> tuple[int, float]:
    budget = group.cell.budget
    if budget.calls is not None:
        return (0, budget.calls)
    return (1, budget.seconds) if budget.seconds is not None else (2, 0.0)


def _mark_best(block: Block, metric: str) -> None:
    """Best at its budget is an engine whose interval lies beyond every other's, at all of its seeds; and the others
    must be worse than the truth's own error, or the truth cannot tell them apart."""
    if not better(metric):
        return
    more = better(metric) == "higher"
    for budget in block.budgets:
        rivals = [(g, e) for g in block.groups if g.budget == budget and (e := g.error(metric)) is not None]
        rivals = [(g, e) for g, e in rivals if not math.isnan(e.mean)]
        if len(rivals) < 2:
            continue
        first, error = (max if more else min)(rivals, key=lambda pair: pair[1].mean)
        if error.high is None or not first.complete:
            continue
        others = [e for g, e in rivals if g is not first]
        limit = max(error.upper, first.reference_error(metric))
        if all(e.upper < error.lower if more else limit < e.lower for e in others):
            first.best.add(metric)
