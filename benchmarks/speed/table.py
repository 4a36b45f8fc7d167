"""The benchmark as text, 120 columns wide: a table for each case, and what its numbers cannot say."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..folding import Folding
from . import cases
from .agreement import LIMIT
from .results import FITS, UNITS, Benchmark, Row
from .tools import OURS, is_floor, is_ours

R_HAT_LIMIT = 1.05

LEGEND = (
    "ours/it: our work per second over this tool's; above 1, we are faster. warm: seconds of the work with compilation",
    "taken out, median (least). again: the same call once more in one process, with what it compiles again. cold: the",
    "first call of a new process with empty caches on disk; cached: with those filled. Imports are left out.",
)
MEANING = {
    "posterior": "ESS: the smallest bulk effective sample size over the identified scalars. |z|: the largest "
    "difference to {to}, over means and mean squares, in standard errors.",
    "per-datum": "ESS: that of the median datum times the number of data. worst, median: a datum's bulk effective "
    "sample size, the least over its scalars. |z|: the largest difference to {to}, over means and mean squares of "
    "some data, in standard errors.",
    "hmc": "grad/s: gradients of a datum's log density that a chain moved by. worst, median: a datum's ESS, the least "
    "over its scalars. |z|: the largest difference to {to}, over means and mean squares of some data, in standard "
    "errors. products: the four matrix products of a gradient, alone.",
    "gibbs": "ESS: the smallest bulk effective sample size over the latents that all tools judge. |z|: the largest "
    "difference to {to}, over means and mean squares, in standard errors.",
    "svi": "warm, again, cold and cached are for {count} steps. loss: mean of the last hundred, in nats per datum; all "
    "start from the same weights and see the same data.",
    "mixture": "warm is for {count} EM steps without the set-up. loss: minus the log likelihood, in nats per datum; "
    "all start from the same parameters.",
    "chain": "warm is for {count} steps of Baum-Welch without the set-up. loss: minus the log likelihood, in nats per "
    "observation; all start from the same parameters.",
    "abc": "times are for {count} simulations. off: the posterior mean's error in true sds (1,000 exact draws: 0.03); "
    "sd: the posterior sd over the true one; ±: their standard errors over repeats.",
    "smc": "times are for {count} particles. error: mean absolute error of the log evidence in nats; ±: its standard "
    "error over repeats. |z|: the mean's difference to {to}, in standard errors told from the spread of repeats.",
    "latents-importance": "times are for {count} weights. |z|: the larger difference to {to}, of the mean log weight "
    "and the mean of its square, in standard errors. products: the two matrix products of a weight, alone.",
    "importance": "times are for {count} draws. |z|: difference of the log evidence to {to}, in standard errors.",
}

DRAWN = dict.fromkeys(("posterior", "gibbs"), ("grad/s", "ESS"))
DRAWN |= dict.fromkeys(("per-datum", "hmc"), ("worst", "median"))
AGREEMENT = dict.fromkeys(FITS, ("loss",)) | {"abc": ("off", "sd"), "smc": ("error", "|z|")}


def render(benchmark: Benchmark) -> RenderableType:
    """Every case, then the legend, the machine's load and the versions."""
    parts: list[RenderableType] = [part for case in benchmark.cases() for part in _case(benchmark, case)]
    plan = benchmark.plan
    loads = [m.load for m in benchmark.measurements if m.state == "done"]
    facts = [
        f"{plan.chains} chains of {plan.draws} draws, {plan.rounds} rounds, {plan.cores} cores, seed {plan.seed}"
        + (f", load of the machine {min(loads):.1f} to {max(loads):.1f}" if loads else ""),
        ", ".join(f"{name} {version}" for name, version in sorted(benchmark.versions().items())),
    ]
    if not benchmark.complete:
        facts.append("ended early: not all rounds")
    return Group(*parts, Text("\n".join(LEGEND)), Text(""), Text("\n".join(facts), style="dim"))


def _case(benchmark: Benchmark, case: str) -> list[RenderableType]:
    module, rows = cases.load(case), benchmark.rows(case)
    count = next((row.work for row in rows if row.work), 0.0)
    to = "the exact value" if hasattr(module, "truth") else "most of the other tools"
    title = (module.__doc__ or case).splitlines()[0]
    lines = [
        MEANING[module.KIND].format(to=to, count=f"{count:,.0f}"),
        *([f"chains of {module.LONGEST} draws and as many of warm-up, at most"] if hasattr(module, "LONGEST") else []),
        *([f"{module.REPEATS} repeats in each round, at least"] if hasattr(module, "REPEATS") else []),
        *_warmups(rows),
        *_imports(rows),
        *_notes(rows),
        *_verdict(rows, module.KIND),
        *_floors(rows, module.KIND),
    ]
    return [
        Text.assemble((case, "bold"), f"  {title}"),
        Folding(_table(rows, module.KIND)),
        *(Text(line) for line in lines),
        *(Text(line, style="red") for line in [*_warnings(rows), *_failures(rows)]),
        Text(""),
    ]


def _table(rows: Sequence[Row], kind: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("tool", no_wrap=True)
    times = ("ours/it", "warm s", "(least)", "again", "cold", "cached")
    for title in (UNITS[kind], *times, *DRAWN.get(kind, ()), *AGREEMENT.get(kind, ("|z|",)), "bits"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if row.rate is None:
            table.add_row(row.tool, Text(row.state, style="red"))
            continue
        table.add_row(
            row.tool,
            _count(row.rate),
            _number(row.ratio),
            *(_number(s) for s in (row.warm, row.least, row.called, row.cold, row.cached)),
            *map(_count, _drawn(row, kind)),
            *_agreement(row, kind),
            row.precision.removeprefix("float"),
        )
    return table


def _drawn(row: Row, kind: str) -> Sequence[float | None]:
    """What there is to say of draws: the columns `DRAWN`."""
    if DRAWN.get(kind) == ("worst", "median"):
        return row.ess or (None, None)
    return (row.gradient_rate, row.work) if kind in DRAWN else ()


def _agreement(row: Row, kind: str) -> list[RenderableType]:
    """What says that a tool is right: its loss, its errors, or its difference to the others."""
    if kind in FITS:
        return [_number(row.loss, 3)]
    if kind == "abc":
        return [_with_error(row.off, row.off_error), _with_error(row.width, row.width_error)]
    z = row.disagreement.z if row.disagreement else None
    shown = Text(_number(z, 1), style="red" if _high(z, LIMIT) else "")
    return [_with_error(row.off, row.off_error), shown] if kind == "smc" else [shown]


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value, 3) + (f"±{_number(error, 3)}" if error else "")


def _warmups(rows: Sequence[Row]) -> list[str]:
    """How many warm-up draws each took, tools with as many together."""
    by_count: dict[int, list[str]] = {}
    for row in rows:
        if row.warmup is not None:
            by_count.setdefault(row.warmup, []).append(row.tool)
    said = [f"{count} ({', '.join(tools)})" for count, tools in sorted(by_count.items())]
    return [f"warm-up draws of each chain: {'; '.join(said)}"] if said else []


def _imports(rows: Sequence[Row]) -> list[str]:
    said = [f"{row.tool} {_number(row.import_seconds)}" for row in rows if row.import_seconds is not None]
    return [f"seconds to import: {', '.join(said)}"] if said else []


def _notes(rows: Sequence[Row]) -> list[str]:
    return [f"{row.tool}: {row.note}" for row in rows if row.note]


def _verdict(rows: Sequence[Row], kind: str) -> list[str]:
    """Ours beside the best peer that agrees with the others, and beside the best of our precision."""
    ours = next((row for row in rows if row.tool == OURS and row.rate), None)
    peers = [row for row in rows if not (is_ours(row.tool) or is_floor(row.tool)) and row.rate and not _suspect(row)]
    if ours is None or not peers:
        return []
    found = {"the best peer": _fastest(peers)}
    alike = [row for row in peers if row.precision == ours.precision]
    if alike and _fastest(alike) is not _fastest(peers):
        found[f"the best in {ours.precision}"] = _fastest(alike)
    return [
        f"{OURS} {_count(ours.rate)} {UNITS[kind]}, {words} ({best.tool}) {_count(best.rate)}: "
        f"{_number(best.ratio)} times as fast"
        for words, best in found.items()
    ]


def _floors(rows: Sequence[Row], kind: str) -> list[str]:
    """Each beside the fastest products of its precision."""
    said = []
    for row in rows:
        floors = [f for f in rows if is_floor(f.tool) and f.rate and f.precision == row.precision]
        if row.rate and floors and not is_floor(row.tool):
            best = _fastest(floors)
            words = f"{row.tool} {_count(row.rate)} {UNITS[kind]}, the products alone ({best.tool}) {_count(best.rate)}"
            said.append(f"{words}: {_number((best.rate or 0.0) / row.rate)} times the products' time")
    return said


def _fastest(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.rate or 0.0)


def _suspect(row: Row) -> bool:
    return _high(row.disagreement.z if row.disagreement else None, LIMIT) or _high(row.r_hat, R_HAT_LIMIT)


def _warnings(rows: Sequence[Row]) -> list[str]:
    said = []
    for row in rows:
        if row.disagreement and _high(row.disagreement.z, LIMIT):
            words = f"{row.tool} disagrees on {row.disagreement.name}: {row.disagreement.z:.1f} standard errors"
            said.append(f"{words}; its speed counts for nothing")
        if _high(row.r_hat, R_HAT_LIMIT):
            said.append(f"{row.tool}: R-hat {row.r_hat:.2f}, its chains have not mixed; its ESS is not to be trusted")
    return said


def _failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row.tool} {row.state}: {row.reason}" for row in rows if row.state != "done"]


def _high(value: float | None, limit: float) -> bool:
    return value is not None and value > limit


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float | None, digits: int | None = None) -> str:
    """Three figures, or so many digits after the point."""
    if value is None:
        return "-"
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 0 < value < 100 else f"{value:.0f}"
