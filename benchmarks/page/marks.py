"""How an engine is drawn: a colour, a marker and a line that depend on its name alone, so on every page the same.

The colours are apart for people with any of the three kinds of colour blindness and have a contrast of at least 3 to 1
on white; marker and line tell apart what shares a colour.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

COLOURS = ("#D55E00", "#009E73", "#332288", "#555555", "#661100", "#7F3C8D", "#8888CC")
MARKERS = {  # matplotlib's name -> the same shape as an SVG path around 0 0, 5 wide to each side
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "s": "M-4 -4H4V4H-4z",
    "^": "M0 -5L5 4H-5z",
    "v": "M0 5L5 -4H-5z",
    "D": "M0 -5.5L5.5 0L0 5.5L-5.5 0z",
    "P": "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7z",
    "X": "M-5 -2.7L-2.7 -5L0 -2.3L2.7 -5L5 -2.7L2.3 0L5 2.7L2.7 5L0 2.3L-2.7 5L-5 2.7L-2.3 0z",
}
DASHES = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "6 2.5 1.5 2.5"}
SALT = "98055"  # found by trial: with it the engines that came first have colours of their own


@dataclass(frozen=True)
class Mark:
    colour: str
    marker: str
    line: str

    @property
    def path(self) -> str:
        return MARKERS[self.marker]

    @property
    def dashes(self) -> str:
        return DASHES[self.line]


def mark(engine: str) -> Mark:
    """Of this engine, whatever else is on the page."""
    number = int.from_bytes(hashlib.sha256(f"{SALT}\0{engine}".encode()).digest()[:8], "big")
    number, colour = divmod(number, len(COLOURS))
    number, marker = divmod(number, len(MARKERS))
    return Mark(COLOURS[colour], list(MARKERS)[marker], list(DASHES)[number % len(DASHES)])
