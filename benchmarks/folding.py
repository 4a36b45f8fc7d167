"""Tables on narrow terminals: where a number would be broken in two, each row is a paragraph with a line per column."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

NUMBER = re.compile(r"\(?[-+]?\d")  # how a word begins that must not be broken


class Folding:
    """A rich table whose first column names its rows."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if _fits(self.table, console, options):
            yield self.table
            return
        if self.table.title:
            yield Text(str(self.table.title), style="bold")
        yield from _paragraphs(self.table)


def _fits(table: Table, console: Console, options: ConsoleOptions) -> bool:
    """Whether every number has room; names may be folded anywhere."""
    widths = [column.width for column in table.columns]
    if None in widths:
        return Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width
    room = sum(width or 0 for width in widths) + len(widths) - 1 <= options.max_width
    return room and all(
        len(word) <= (column.width or 0)
        for column in table.columns[1:]
        for cell in column.cells
        for word in str(cell).split()
        if NUMBER.match(word)
    )


def _paragraphs(table: Table) -> Iterator[Any]:
    titles = [str(column.header).replace("-\n", "").replace("\n", " ") for column in table.columns]
    for row, (name, *cells) in zip(
        table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True
    ):
        paragraph = Table.grid(padding=(0, 2, 0, 0))
        paragraph.add_column(overflow="fold")
        paragraph.add_column(overflow="fold")
        for title, cell in zip(titles[1:], cells, strict=True):
            if str(cell):
                paragraph.add_row(f"  {title}", cell, style=row.style)
        yield Text(str(name), style="bold")
        yield paragraph
