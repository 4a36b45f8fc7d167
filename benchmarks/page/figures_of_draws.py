"""Figures of draws: distributions and pairs over the truth, and the data whose weights are doubtful."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from .canvas import GRID, Picture, drawing, png, shortened, svg
from .marks import mark
from .posteriors import Doubts, Drawn, Pair, Panel, name_of

# -- draws ------------------------------------------------------------------------------------------------------------


def distributions(drawn: Drawn) -> Picture | None:
    """The weighted distribution function of some scalars by every engine, over the truth in black."""
    panels = [panel for panel in drawn.panels if panel.curves]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with drawing(rows, columns, 4.6 * columns, 2.5 * rows) as (figure, axes):
        for panel, place in zip(panels, axes, strict=False):
            _distribution(place, panel)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        return svg(figure, _words_of_panels(panels))


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
    with drawing(rows, columns, 9.2 if columns > 2 else 2.6 * columns, 2.5 * rows) as (figure, axes):
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
        return svg(figure, f"{names[1]} against {names[0]}. Correlations: {known}{', '.join(words)}.")


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
    with drawing(1, 1, 9.2, 3.0) as (figure, (axes,)):
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
        return svg(figure, f"k-hat of each datum. {'; '.join(words)}.")


def worst_images(doubts: Mapping[str, Doubts]) -> Picture | None:
    """A row for each engine: the data of largest k-hat, as images."""
    rows = {engine: doubt for engine, doubt in doubts.items() if doubt.images}
    if not rows:
        return None
    columns = max(len(doubt.images) for doubt in rows.values())
    with drawing(len(rows), columns, 1.15 * columns, 1.4 * len(rows)) as (figure, axes):
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
        return png(figure, f"The data of largest k-hat as images, by index and k-hat. {words}.")
