"""From measurements to rows: medians, minima, ratios, and whether the tools agree."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from . import cases
from .agreement import Disagreement, disagreements
from .record import Estimate, Measurement, Plan, together
from .tools import OURS

UNITS = {
    "posterior": "ESS/s",
    "per-datum": "ESS/s",
    "hmc": "grad/s",
    "gibbs": "ESS/s",
    "svi": "steps/s",
    "importance": "draws/s",
    "latents-importance": "weights/s",
    "smc": "particles/s",
    "mixture": "steps/s",
    "chain": "steps/s",
    "abc": "sims/s",
}
FITS = ("svi", "mixture", "chain")  # agree on a loss, not on moments


@dataclass(frozen=True)
class Row:
    """One tool on one case over all rounds; None where a figure is not to be had. Seconds, and work per second.

    rate, best    work per second, median and largest; `ratio` is ours over this one's median
    warm, least   seconds of the work alone, median and smallest
    called        of a call as a user makes it again in one process, with what it compiles again
    cold, cached  of the first call in a new process, with caches on disk empty or filled
    work          effective draws, steps, weighted draws, particles, simulations or gradients in one answer
    ess           of the worst datum and of the median one
    off, width    of a posterior by simulation: its mean's error in true sds, and its sd over the true one; off of SMC
                  alone: the log evidence's mean absolute error in nats; with their standard errors over repeats,
                  `off_error` and `width_error`
    """

    tool: str
    precision: str
    state: str = "done"
    reason: str = ""
    rate: float | None = None
    best: float | None = None
    ratio: float | None = None
    warm: float | None = None
    least: float | None = None
    called: float | None = None
    cold: float | None = None
    cached: float | None = None
    import_seconds: float | None = None
    gradient_rate: float | None = None
    work: float | None = None
    least_scalar: str = ""
    ess: tuple[float | None, float | None] | None = None
    r_hat: float | None = None
    warmup: int | None = None
    loss: float | None = None
    off: float | None = None
    width: float | None = None
    off_error: float | None = None
    width_error: float | None = None
    note: str = ""
    disagreement: Disagreement | None = None


@dataclass(frozen=True)
class Benchmark:
    """All measurements, and what is needed to make them again. `complete` is false where the run was ended early."""

    plan: Plan
    measurements: tuple[Measurement, ...]
    command: str = ""
    complete: bool = True

    def cases(self) -> list[str]:
        return list(dict.fromkeys(m.case for m in self.measurements))

    def rows(self, case: str) -> list[Row]:
        """Ours first, then the fastest peers; those without an answer last."""
        found = rows_of(cases.load(case), [m for m in self.measurements if m.case == case])
        return sorted(found, key=lambda row: (row.tool != OURS, -(row.rate or 0.0)))

    def versions(self) -> dict[str, str]:
        return {name: version for m in self.measurements for name, version in m.versions.items()}

    def to_json(self, path: Path) -> None:
        from ..facts import machine, plain, versions
        from ..tabled import write_json

        record = {
            "command": self.command,
            "complete": self.complete,
            "plan": asdict(self.plan),
            "machine": machine(),
            "versions": {**versions(), **self.versions()},
            "cases": [
                {"case": case, "unit": UNITS[cases.load(case).KIND], "rows": [asdict(row) for row in self.rows(case)]}
                for case in self.cases()
            ],
            "measurements": [asdict(m) for m in self.measurements],
        }
        write_json(plain(record), path)


def rows_of(case: ModuleType, measurements: Sequence[Measurement]) -> list[Row]:
    """A row for each tool measured on this case."""
    by_tool: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        by_tool.setdefault(measurement.tool, []).append(measurement)
    done = {tool: [m for m in group if m.state == "done"] for tool, group in by_tool.items()}
    rates = {tool: _median(t.rate for m in group for t in m.warm) for tool, group in done.items()}
    estimates = {tool: together([m.estimates for m in group]) for tool, group in done.items() if group}
    judged_apart = case.KIND in FITS or case.KIND == "abc"  # whose answers are approximate, each in its way
    truth = case.truth() if hasattr(case, "truth") else None
    judged = estimates
    if case.KIND == "smc":  # errors are told from the spread of runs: one alone has none, and says nothing
        judged = {tool: {n: e for n, e in found.items() if e.error} for tool, found in estimates.items()}
    differing = {} if judged_apart else disagreements(judged, truth)
    return [
        _row(group, done[tool], rates[tool], rates.get(OURS), differing.get(tool), estimates.get(tool, {}))
        for tool, group in by_tool.items()
    ]


def _row(
    measurements: Sequence[Measurement],
    done: Sequence[Measurement],
    rate: float | None,
    ours: float | None,
    disagreement: Disagreement | None,
    estimates: Mapping[str, Estimate],
) -> Row:
    last = measurements[-1]
    if not done:
        return Row(last.tool, last.precision, last.state, last.reason)
    timings = [t for m in done for t in m.warm]
    return Row(
        last.tool,
        last.precision,
        last.state,  # a later round may have failed: its figures are shown, and so is that
        last.reason,
        rate=rate,
        best=max(t.rate for t in timings),
        ratio=ours / rate if ours and rate else None,
        warm=_median(t.seconds for t in timings),
        least=min(t.seconds for t in timings),
        called=_median(seconds for m in done for seconds in m.called),
        cold=_median(m.first for m in done if m.empty),
        cached=_median(m.first for m in done if not m.empty),
        import_seconds=_median(m.import_seconds for m in done),
        gradient_rate=_median(t.gradients / t.seconds for t in timings if t.gradients),
        work=_median(t.work for t in timings),
        least_scalar=min(done, key=lambda m: min(t.work for t in m.warm)).least_scalar,
        ess=_medians([m.ess for m in done if m.ess is not None]),
        r_hat=max((m.r_hat for m in done if m.r_hat is not None), default=None),
        warmup=done[0].warmup,
        **{
            field: estimates[name].value
            for field, name in (("loss", "loss"), ("off", "mean off"), ("off", "evidence off"), ("width", "sd ratio"))
            if name in estimates
        },
        **{
            field: estimates[name].error
            for field, name in (
                ("off_error", "mean off"),
                ("off_error", "evidence off"),
                ("width_error", "sd ratio"),
            )
            if name in estimates
        },
        note=done[-1].note,
        disagreement=disagreement,
    )


def _medians(pairs: Sequence[tuple[float | None, float]]) -> tuple[float | None, float | None] | None:
    """Of the rounds' worst data, none where a round has none; and of their median ones."""
    worst = [p[0] for p in pairs if p[0] is not None]
    return (_median(worst if len(worst) == len(pairs) else ()), _median(p[1] for p in pairs)) if pairs else None


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
