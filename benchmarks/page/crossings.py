"""Squares of learners and evaluators, and gaps of fits, where the folder has what `pyrometer square --json` wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cell import typed
from ..gaps import Gaps
from ..reading import UNREADABLE, parse
from ..square import Cell, Square
from .text import as_text

LARGEST = 2**26  # bytes of a file that is looked into


@dataclass(frozen=True)
class Crossed:
    """One file: the square, and the gaps where it has them."""

    file: str
    square: Square
    gaps: Gaps | None

    def shade(self, cell: Cell) -> float:
        """0 for the best learner of the evaluator to 1 for the worst, by the difference in nats."""
        of_column = [
            -c.difference.value
            for c in self.square.cells
            if c.evaluator == cell.evaluator and c.difference and math.isfinite(c.difference.value)
        ]
        worst = max(of_column, default=0.0)
        if cell.difference is None or worst <= 0 or not math.isfinite(cell.difference.value):
            return 0.0
        return min(max(0.0, -cell.difference.value / worst), 1.0)


def crossings(folder: Path, unreadable: dict[str, str]) -> Iterator[Crossed]:
    """Every JSON file that lies in the folder itself and is a square. Others are passed over; a square that cannot be
    read is put into `unreadable`, name -> reason."""
    for file in sorted(folder.glob("*.json")):
        if file.is_symlink() or not file.is_file() or file.stat().st_size > LARGEST:
            continue
        try:
            text = file.read_text(encoding="utf-8")
            if '"learners"' not in text or '"cells"' not in text:
                continue
            read = as_text(parse(text))
            if not isinstance(read, dict) or not {"learners", "cells"} <= set(read):
                continue
            gaps = typed(Gaps, read["gaps"]) if read.get("gaps") is not None else None
            yield Crossed(file.name, typed(Square, read), gaps)
        except UNREADABLE as error:
            unreadable[file.name] = f"{type(error).__name__}: {error}"[:300]
