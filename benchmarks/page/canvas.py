"""What all figures are drawn on; each is an image in the page (a data URI in few letters) with words for those who do
not see it.

An image cannot run scripts nor load anything, whatever names stand in it. Text is never read as mathematics. Engines
have no legend inside: their marks stand once above the figures of a block.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .slim import slim

INK, QUIET, GRID = "#1a1a1a", "#5c5c5c", "#e3e3e3"
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
def drawing(rows: int, columns: int, width: float, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    with mpl.rc_context(RC), warnings.catch_warnings():
        # names may have letters that this font has not, and too many engines may leave an axis no room
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)


def svg(figure: Figure, alt: str) -> Picture:
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # the reader's own font: the one matplotlib measured with may not be there
    text = slim(buffer.getvalue().replace("'DejaVu Sans', sans-serif", "'DejaVu Sans',Verdana,system-ui,sans-serif"))
    return _picture(figure, f"data:image/svg+xml,{quote(text, safe=PLAIN)}", alt)


def png(figure: Figure, alt: str) -> Picture:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return _picture(figure, f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", alt)


def _picture(figure: Figure, uri: str, alt: str) -> Picture:
    width, height = figure.get_size_inches()
    return Picture(uri, alt, round(96 * width), round(96 * height))


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "\u2026"
