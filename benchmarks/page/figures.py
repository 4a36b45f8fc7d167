"""Figures of errors, costs and evidence, and of where the nats go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

from ..report import count
from .canvas import GRID, INK, Picture, drawing, shortened, svg
from .marks import mark
from .summary import Block, Group, Interval

FAR = 20.0  # times the median: an engine whose evidence is so much further off
TINY = 1e-6  # errors below it are of the machine: they stand on the lower edge


# -- error against cost -----------------------------------------------------------------------------------------------


def error_against_cost(block: Block, metric: str) -> Picture | None:
    """Two panels: the error against calls and against seconds, both logarithmic, bars are intervals over seeds."""
    points = [g for g in block.groups if (e := g.error(metric)) is not None and math.isfinite(e.mean) and e.mean > 0]
    if not points:
        return None
    floor, low = max(group.reference_error(metric) for group in points), _lowest(points, metric)
    with drawing(1, 2, 9.2, 3.5) as (figure, (of_calls, of_seconds)):
        for axes, cost, name in (
            (of_calls, Group.calls, "calls of the density"),
            (of_seconds, Group.seconds, "seconds"),
        ):
            for engine in block.engines:
                _ladder(axes, [group for group in points if group.engine == engine], metric, cost, low)
            axes.set_ylim(low, 1.6 * max(e.upper for g in points if (e := g.error(metric)) is not None))
            _log(axes, name)
            if floor > low:
                axes.axhspan(low, floor, color=GRID, lw=0, zorder=0)
        below = any(e.mean < low for g in points if (e := g.error(metric)) is not None)
        of_calls.set_title(f"{metric} (on the lower edge: below it)" if below else metric)
        return svg(figure, _words_of_ladders(block, metric, floor))


def _ladder(
    axes: Axes, groups: Sequence[Group], metric: str, cost: Callable[[Group], Interval | None], low: float
) -> None:
    found = [(c, e) for g in groups if (c := cost(g)) and (e := g.error(metric)) and c.mean > 0]
    found.sort(key=lambda pair: pair[0].mean)
    if not found:
        return
    style = mark(groups[0].engine)
    x, y = [c.mean for c, _ in found], [max(e.mean, low) for _, e in found]
    seen = [e.mean >= low for _, e in found]
    below = [(e.mean - max(e.lower, 1e-3 * e.mean)) * s for (_, e), s in zip(found, seen, strict=True)]
    above = [(e.upper - e.mean) * s for (_, e), s in zip(found, seen, strict=True)]
    line, *_ = axes.errorbar(
        x, y, yerr=[below, above], color=style.colour, marker=style.marker, linestyle=style.line, markersize=6, lw=1.6,
        elinewidth=1, markeredgecolor="white", markeredgewidth=0.6,
    )  # fmt: skip
    line.set_clip_on(False)  # a marker on the edge is whole; a bar that goes beyond it is cut


def _lowest(groups: Sequence[Group], metric: str) -> float:
    """The lower edge: by the means, so that an interval which reaches zero does not squeeze all else, and not by
    rounding."""
    means = [e.mean for g in groups if (e := g.error(metric))]
    return min((mean for mean in means if mean > TINY), default=min(means)) / 2.5


def _log(axes: Axes, name: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        # under two decades the powers of ten are too few to read a value by
        between = (1.0, 2.0, 5.0) if high / low < 20 else (1.0, 3.0) if high / low < 300 else (1.0,)
        axis.set_major_locator(LogLocator(subs=between, numticks=9))
        axis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)
    axes.grid(color=GRID, lw=0.8)
    axes.tick_params(length=0, which="both")


def _words_of_ladders(block: Block, metric: str, floor: float) -> str:
    lines = []
    for engine in block.engines:
        steps = [
            f"{error.mean:.2g} at {count(calls.mean)} calls"
            for group in block.ladder(engine)
            if (error := group.error(metric)) and (calls := group.calls())
        ]
        if steps:
            lines.append(f"{engine}: {', '.join(steps)}")
    known = f" The truth is known to {floor:.2g}." if floor > 0 else ""
    return f"{metric} against cost. {'; '.join(lines)}.{known}"


# -- evidence ---------------------------------------------------------------------------------------------------------


def evidence(block: Block) -> Picture | None:
    """A dot for each engine at its largest budget: an estimate with its interval, a bound with an arrow to where the
    truth is; less the truth where that is known."""
    last = {name: groups[-1] for name in block.engines if (groups := [g for g in block.ladder(name) if g.evidence()])}
    relative = all(group.evidence_error() is not None for group in last.values())
    shown = {}
    for name, group in last.items():
        value = group.evidence_error() if relative else group.evidence()
        if value is not None and math.isfinite(value.mean):
            shown[name] = (group, value)
    if not shown:
        return None
    with drawing(1, 1, 9.2, 0.9 + 0.34 * len(shown)) as (figure, (axes,)):
        words = []
        for place, (name, (group, value)) in enumerate(shown.items()):
            words.append(_evidence_row(axes, place, name, group, value))
        if relative:
            axes.axvline(0.0, color=INK, lw=1.2)
        axes.set_yticks(range(len(shown)), [shortened(name) for name in shown], color=INK)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if relative:
            _spread(axes, [value.mean for _, value in shown.values()])
        axes.set_xlabel("log p(x) less the truth, nats per datum" if relative else "log p(x), nats per datum")
        axes.grid(axis="x", color=GRID, lw=0.8)
        axes.tick_params(length=0)
        title = "Log evidence less the truth" if relative else "Log evidence; the truth is not known"
        return svg(figure, f"{title}, nats per datum. {'; '.join(words)}.")


def _spread(axes: Axes, values: Sequence[float]) -> None:
    """Where one engine is far off, the others can be told apart all the same: beyond the median the axis is
    logarithmic, to both sides."""
    sizes = sorted(abs(value) for value in values)
    usual = max(sizes[len(sizes) // 2], 1e-3)
    if sizes[-1] > FAR * usual:
        axes.set_xscale("symlog", linthresh=usual)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=usual, subs=(1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _evidence_row(axes: Axes, place: int, name: str, group: Group, value: Interval) -> str:
    style, kind = mark(name), group.evidence_kind()
    claimed = group.claimed() or 0.0
    half = [value.mean - value.lower, value.upper - value.mean] if value.low is not None else [2 * claimed] * 2
    half = [h if math.isfinite(h) else 0.0 for h in half]
    axes.errorbar(
        [value.mean], [place], xerr=[[half[0]], [half[1]]], color=style.colour, marker=style.marker, markersize=7,
        elinewidth=1.4, capsize=3, linestyle="none",
    )  # fmt: skip
    if kind in ("lower bound", "upper bound"):
        step = 26 if kind == "lower bound" else -26
        axes.annotate(
            "", xy=(value.mean, place), xytext=(step, 0), textcoords="offset points",
            arrowprops={"arrowstyle": "<-", "color": style.colour, "lw": 1.4},
        )  # fmt: skip
    words = f"{name}: {value.mean:.4g}" + (f", a {kind}" if "bound" in kind else "")
    own, above = group.evidence(), group.above()
    if own is None or above is None or not math.isfinite(above.mean):
        return words
    end = value.mean + above.mean - own.mean
    axes.plot([value.mean, end], [place - 0.28] * 2, color=style.colour, lw=1.4)
    for x in (value.mean, end):
        axes.plot([x, x], [place - 0.28, place - 0.14], color=style.colour, lw=1.4)
    return f"{words}, bracketed from above {above.mean - own.mean:.2g} further up"


# -- gaps -------------------------------------------------------------------------------------------------------------


def gaps(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Picture | None:
    """Stacked bars: learning, approximation and amortisation, in nats per datum, of each learner."""
    parts = (("learning", "#555555", ""), ("approximation", "#009E73", "//"), ("amortisation", "#8888CC", ".."))
    usable = [(name, gap) for name, gap in rows if all(part in gap for part, _, _ in parts)]
    if not usable:
        return None
    with drawing(1, 1, 9.2, 1.2 + 0.4 * len(usable)) as (figure, (axes,)):
        left = np.zeros(len(usable))
        for part, colour, hatch in parts:
            width = np.array([max(float(gap[part]["value"]), 0.0) for _, gap in usable])
            axes.barh(
                range(len(usable)),
                width,
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=part,
                height=0.62,
            )
            left += width
        axes.set_yticks(range(len(usable)), [shortened(name) for name, _ in usable], color=INK)
        axes.invert_yaxis()
        axes.set_xlabel("nats per datum that the ELBO is below the best model found")
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        axes.grid(axis="x", color=GRID, lw=0.8)
        axes.tick_params(length=0)
        words = [
            f"{name}: " + ", ".join(f"{p} {float(gap[p]['value']):.3g}" for p, _, _ in parts) for name, gap in usable
        ]
        return svg(figure, f"Where the nats go. {'; '.join(words)}.")
