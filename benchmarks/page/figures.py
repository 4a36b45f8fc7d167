"""The figures, each as an image in the page (a data URI in few letters) with words for those who do not see it.

An image cannot run scripts nor load anything, whatever names stand in it. Text is never read as mathematics. Engines
have no legend inside: their marks stand once above the figures of a block.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

from ..report import count
from .marks import mark
from .posteriors import Doubts, Drawn, Pair, Panel, name_of
from .slim import slim
from .summary import Block, Group, Interval

INK, QUIET, GRID = "#1a1a1a", "#5c5c5c", "#e3e3e3"
FAR = 20.0  # times the median: an engine whose evidence is so much further off
TINY = 1e-6  # errors below it are of the machine: they stand on the lower edge
PLAIN = "<>=/:;,.'(){}*+!?@[]|^~ "  # what stands for itself in a data URI, within double quotes in HTML
LONGEST = 40  # characters of a name in a figure; the page has it whole
RC: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "pyrometer",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "text.color": INK,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, its size in CSS pixels, and what it shows in words."""

    uri: str
    alt: str
    width: int
    height: int


@contextmanager
def _figure(rows: int, columns: int, width: float, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    with mpl.rc_context(RC), warnings.catch_warnings():
        # names may have letters that this font has not, and too many engines may leave an axis no room
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)


def _svg(figure: Figure, alt: str) -> Picture:
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # the reader's own font: the one matplotlib measured with may not be there
    text = slim(buffer.getvalue().replace("'DejaVu Sans', sans-serif", "'DejaVu Sans',Verdana,system-ui,sans-serif"))
    return _picture(figure, f"data:image/svg+xml,{quote(text, safe=PLAIN)}", alt)


def _png(figure: Figure, alt: str) -> Picture:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return _picture(figure, f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", alt)


def _picture(figure: Figure, uri: str, alt: str) -> Picture:
    width, height = figure.get_size_inches()
    return Picture(uri, alt, round(96 * width), round(96 * height))


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "\u2026"


# -- error against cost -----------------------------------------------------------------------------------------------


def error_against_cost(block: Block, metric: str) -> Picture | None:
    """Two panels: the error against calls and against seconds, both logarithmic, bars are intervals over seeds."""
    points = [g for g in block.groups if (e := g.error(metric)) is not None and math.isfinite(e.mean) and e.mean > 0]
    if not points:
        return None
    floor, low = max(group.reference_error(metric) for group in points), _lowest(points, metric)
    with _figure(1, 2, 9.2, 3.5) as (figure, (of_calls, of_seconds)):
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
        return _svg(figure, _words_of_ladders(block, metric, floor))


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
    with _figure(1, 1, 9.2, 0.9 + 0.34 * len(shown)) as (figure, (axes,)):
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
        return _svg(figure, f"{title}, nats per datum. {'; '.join(words)}.")


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


# -- draws ------------------------------------------------------------------------------------------------------------


def distributions(drawn: Drawn) -> Picture | None:
    """The weighted distribution function of some scalars by every engine, over the truth in black."""
    panels = [panel for panel in drawn.panels if panel.curves]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _figure(rows, columns, 4.6 * columns, 2.5 * rows) as (figure, axes):
        for panel, place in zip(panels, axes, strict=False):
            _distribution(place, panel)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        return _svg(figure, _words_of_panels(panels))


def _distribution(axes: Axes, panel: Panel) -> None:
    spans = []
    if panel.truth is not None:
        axes.step(panel.truth.x, panel.truth.p, where="post", color="black", lw=3.2, alpha=0.9)
        spans.append((panel.truth.x[0], panel.truth.x[-1]))
    elif panel.moments is not None:
        mean, sd = panel.moments
        axes.axvspan(mean - sd, mean + sd, color=GRID, lw=0, zorder=0)
        axes.axvline(mean, color="black", lw=1.8)
        spans.append((mean - 3 * sd, mean + 3 * sd))
    for engine, curve in panel.curves.items():
        style = mark(engine)
        far = 1e3 * (curve.x[-1] - curve.x[0] + 1.0)  # 0 before the first draw and 1 after the last, to the edges
        x, p = (curve.x[0] - far, *curve.x, curve.x[-1] + far), (0.0, *curve.p, 1.0)
        axes.step(x, p, where="post", color=style.colour, linestyle=style.line, lw=1.5)
        inner = [float(curve.x[min(int(np.searchsorted(curve.p, q)), len(curve.x) - 1)]) for q in (0.02, 0.98)]
        spans.append((inner[0], inner[1]))
    low, high = min(low for low, _ in spans), max(high for _, high in spans)
    margin = 0.04 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "\u00bd", "1"])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(shortened(panel.name))
    axes.grid(color=GRID, lw=0.8)
    axes.tick_params(length=0)


def _words_of_panels(panels: Sequence[Panel]) -> str:
    def medians(panel: Panel) -> str:
        of = {"truth": panel.truth} if panel.truth is not None else {}
        values = [
            f"{name} {float(c.x[min(int(np.searchsorted(c.p, 0.5)), len(c.x) - 1)]):.3g}"
            for name, c in {**of, **panel.curves}.items()
        ]
        mean = f"the truth {panel.moments[0]:.3g} with sd {panel.moments[1]:.2g} (mean); " if panel.moments else ""
        return f"{panel.name}: {mean}medians {', '.join(values)}"

    return f"Distribution functions. {'; '.join(map(medians, panels))}."


def pairs(drawn: Drawn) -> Picture | None:
    """A cloud for each engine over that of the truth, grey, or over the truth's means and two sds."""
    pair = drawn.pair
    if pair is None or not pair.clouds:
        return None
    columns = min(4, len(pair.clouds))
    rows = math.ceil(len(pair.clouds) / columns)
    low, high = _window(pair)
    with _figure(rows, columns, 9.2 if columns > 2 else 2.6 * columns, 2.5 * rows) as (figure, axes):
        for (engine, cloud), place in zip(pair.clouds.items(), axes, strict=False):
            style = mark(engine)
            if pair.truth is not None:
                _dots(place, pair.truth, 2.2, "#cdcdcd")
            _dots(place, cloud, 2.4, style.colour, alpha=0.6)
            if pair.moments is not None:
                (x, x_sd), (y, y_sd) = pair.moments
                place.errorbar([x], [y], xerr=[2 * x_sd], yerr=[2 * y_sd], color="black", lw=1.6)
            place.set_title(shortened(engine))
            place.set_xlim(low[0], high[0])
            place.set_ylim(low[1], high[1])
            place.xaxis.set_major_locator(MaxNLocator(3))
            place.yaxis.set_major_locator(MaxNLocator(3))
            place.tick_params(length=0)
        for place in axes[len(pair.clouds) :]:
            place.set_axis_off()
        names = [name_of(place) for place in pair.places]
        figure.supxlabel(shortened(names[0]), size=10)
        figure.supylabel(shortened(names[1]), size=10)
        words = [f"{engine} {_correlation(cloud)}" for engine, cloud in pair.clouds.items()]
        known = f"the truth {_correlation(pair.truth)}; " if pair.truth is not None else ""
        return _svg(figure, f"{names[1]} against {names[0]}. Correlations: {known}{', '.join(words)}.")


def _dots(axes: Axes, cloud: np.ndarray, size: float, colour: str, alpha: float | None = None) -> None:
    """Points as the round ends of lines without a length: one path, which takes a few letters for each."""
    cloud = cloud[np.isfinite(cloud).all(1)]
    path = Path(np.repeat(cloud, 2, 0), np.tile([Path.MOVETO, Path.LINETO], len(cloud)))
    path.should_simplify = False  # which would take what has no length away
    axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, lw=size, capstyle="round", alpha=alpha))


def _window(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """What holds 98 % of every cloud and the truth."""
    clouds = [*pair.clouds.values(), *([pair.truth] if pair.truth is not None else [])]
    low = np.min([np.quantile(cloud, 0.01, axis=0) for cloud in clouds], axis=0)
    high = np.max([np.quantile(cloud, 0.99, axis=0) for cloud in clouds], axis=0)
    if pair.moments is not None:
        centre, sd = np.array(pair.moments).T
        low, high = np.minimum(low, centre - 2.2 * sd), np.maximum(high, centre + 2.2 * sd)
    margin = np.where(high > low, 0.06 * (high - low), 0.5)
    return low - margin, high + margin


def _correlation(cloud: np.ndarray) -> str:
    sd = cloud.std(0)
    if not (sd > 0).all():
        return "none, one coordinate stands still"
    return f"{float(((cloud - cloud.mean(0)) / sd).prod(1).mean()):.2f}"


# -- doubtful data ----------------------------------------------------------------------------------------------------


def k_hats(doubts: Mapping[str, Doubts]) -> Picture | None:
    """k-hat of all data from the largest down, by engine, and the line above which the weights are not reliable."""
    if not doubts:
        return None
    with _figure(1, 1, 9.2, 3.0) as (figure, (axes,)):
        words = []
        for engine, doubt in doubts.items():
            style = mark(engine)
            known = np.sort(doubt.k_hats[np.isfinite(doubt.k_hats)])[::-1]
            if len(known):
                share = 100 * (np.arange(len(known)) + 0.5) / len(known)
                axes.plot(share, known, color=style.colour, linestyle=style.line, lw=1.6)
            axes.axhline(doubt.doubtful.threshold, color=style.colour, lw=1, ls=(0, (4, 3)))
            words.append(f"{engine}: {doubt.doubtful.words(3) or 'none above'}")
        axes.set_xlabel("% of the data, the worst first")
        axes.set_title("k-hat of each datum; dashed, in each colour: above it the weights are not reliable")
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.5))  # lighter tails than that are all the same
        axes.grid(color=GRID, lw=0.8)
        axes.tick_params(length=0)
        return _svg(figure, f"k-hat of each datum. {'; '.join(words)}.")


def worst_images(doubts: Mapping[str, Doubts]) -> Picture | None:
    """A row for each engine: the data of largest k-hat, as images."""
    rows = {engine: doubt for engine, doubt in doubts.items() if doubt.images}
    if not rows:
        return None
    columns = max(len(doubt.images) for doubt in rows.values())
    with _figure(len(rows), columns, 1.15 * columns, 1.4 * len(rows)) as (figure, axes):
        for place in axes:
            place.set_axis_off()
        for row, (engine, doubt) in enumerate(rows.items()):
            hats = dict(doubt.doubtful.worst)
            for column, (index, image) in enumerate(doubt.images.items()):
                place = axes[row * columns + column]
                place.imshow(image, cmap="gray_r")
                place.set_title(f"{index}: {hats[index]:.2f}", size=8)
            axes[row * columns].text(
                0, 1.42, shortened(engine), transform=axes[row * columns].transAxes, size=9, weight="bold"
            )
        words = "; ".join(f"{engine}: {', '.join(map(str, doubt.images))}" for engine, doubt in rows.items())
        return _png(figure, f"The data of largest k-hat as images, by index and k-hat. {words}.")


# -- gaps -------------------------------------------------------------------------------------------------------------


def gaps(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Picture | None:
    """Stacked bars: learning, approximation and amortisation, in nats per datum, of each learner."""
    parts = (("learning", "#555555", ""), ("approximation", "#009E73", "//"), ("amortisation", "#8888CC", ".."))
    usable = [(name, gap) for name, gap in rows if all(part in gap for part, _, _ in parts)]
    if not usable:
        return None
    with _figure(1, 1, 9.2, 1.2 + 0.4 * len(usable)) as (figure, (axes,)):
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
        return _svg(figure, f"Where the nats go. {'; '.join(words)}.")
