"""A calibration as a table, and as a picture of rank-ECDF differences with simultaneous bands."""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy import stats

from pyrometer.inference import ProblemError
from pyrometer.inference.storage import whole

from .folding import Folding
from .report import count

if TYPE_CHECKING:
    from .calibrate import Calibration
    from .ranks import Quantity

COLOURS = {"passed": "green", "rejected": "red", "undecided": "yellow"}
LEVEL = 0.95
POINTS = 100
SIMULATIONS = 2000


def render(calibration: Calibration) -> RenderableType:
    """The verdict, the quantities of the last round, the rounds."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("test quantity")
    for name in ("shift, sd", "spread", "smallest p", "by", f"in {LEVEL:.0%} band"):
        table.add_column(name, justify="right")
    for quantity in calibration.quantities:
        test = min(quantity.p_values, key=lambda name: quantity.p_values[name])
        outside = leaves_band(quantity)
        cells = (f"{quantity.shift:+.3f}", f"{quantity.spread:.3f}", f"{quantity.p_value:.1g}", test)
        table.add_row(Text(quantity.name), *cells, "yes" if not outside else f"no, at {outside:.2f}")
    lines = []
    for number, one in enumerate(calibration.rounds, 1):
        lines.append(
            f"round {number}: {count(one.replicates)} replicates ranked among {one.draws:.0f} draws (median), "
            f"p = {one.p_value:.2g} for all tests together"
        )
        lines += [f"  failed {times} times: {reason}" for reason, times in one.failures.items()]
    state = Text(calibration.state, style=COLOURS[calibration.state])
    title = Text.assemble(f"{calibration.engine} on {calibration.problem}: ", state, f", {calibration.verdict}")
    legend = (
        "shift: how far the truth lies above the answer; spread: of the truth, in the answer's sds; 0 and 1 are right."
    )
    return Group(title, Text(""), Folding(table), Text(""), *(Text(line) for line in lines), Text(legend))


@cache
def band(replicates: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points z (K), and the lowest and highest ECDF - z there of uniform ranks, all points together.

    Each point has a binomial interval of coverage 1 - gamma, with gamma such that all hold the ECDF at once in a share
    LEVEL of simulated ones (Sailynoja, Buerkner and Vehtari 2022, doi:10.1007/s11222-022-10090-6).
    """
    points = min(POINTS, replicates)
    z = np.arange(1, points) / points
    rng = np.random.default_rng(0)
    cells = rng.multinomial(replicates, np.full(points, 1 / points), size=SIMULATIONS)
    below = cells.cumsum(1)[:, :-1]
    tail = np.minimum(stats.binom.cdf(below, replicates, z), stats.binom.sf(below - 1, replicates, z))
    gamma = np.quantile(2 * tail.min(1), 1 - LEVEL)
    low, high = (stats.binom.ppf(q, replicates, z) / replicates - z for q in (gamma / 2, 1 - gamma / 2))
    return z, low, high


def difference(quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
    """Points z (K), and ECDF(z) - z there."""
    z = band(len(quantity.u))[0]
    return z, np.searchsorted(np.sort(quantity.u), z, side="right") / len(quantity.u) - z


def leaves_band(quantity: Quantity) -> float | None:
    """Where the ECDF is farthest outside of its band; None where it stays inside."""
    z, low, high = band(len(quantity.u))
    beyond = np.maximum(low - difference(quantity)[1], difference(quantity)[1] - high)
    return float(z[beyond.argmax()]) if beyond.max() > 1e-12 else None


def check_pictures() -> None:
    """Raises `ProblemError` where pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ProblemError("a picture needs matplotlib: pip install pyrometer[report].")


def picture(calibration: Calibration, path: str | Path) -> Path:
    """Write ECDF differences of all quantities to a PNG; returns the path. Raises `ProblemError` without matplotlib,
    or where there is nothing to draw; OSError."""
    shown = calibration.quantities
    if not shown:
        raise ProblemError("there is nothing to draw: no replicate gave a rank.")
    check_pictures()
    from matplotlib.figure import Figure

    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.8 * columns, 2.2 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis, quantity in zip(axes.flat, shown, strict=False):
        z, low, high = band(len(quantity.u))
        axis.fill_between(z, low, high, color="#bbbbbb", linewidth=0)
        outside = leaves_band(quantity) is not None
        axis.plot(*difference(quantity), color="#d55e00" if outside else "#0072b2", linewidth=1.2)
        axis.axhline(0.0, color="black", linewidth=0.5)
        axis.set_title(quantity.name, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    title = f"{calibration.engine} on {calibration.problem}: {calibration.state}"
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("rank of the truth among the draws", fontsize=8)
    figure.supylabel(f"ECDF less uniform, {LEVEL:.0%} band", fontsize=8)
    path = Path(path)
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path
