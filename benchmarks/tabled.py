"""Records that print as a table and are written as JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrometer.inference.storage import whole

from .facts import plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


class Tabled(ABC):
    """What a dataclass of results needs to be shown and kept."""

    @abstractmethod
    def table(self, width: int = 120, ascii_only: bool = False) -> RenderableType:
        """The record as a rich renderable, at most `width` columns wide; made for 120."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(options.max_width, options.ascii_only)

    def __str__(self) -> str:
        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; an infinite or undefined number is 'inf', '-inf' or 'nan'."""
        return plain(self)

    def to_json(self, path: str | Path) -> Path:
        """Write everything to one JSON file, whole or not at all; returns the path. Raises OSError."""
        return write_json(self.to_dict(), path)


def as_text(printable: Any, width: int = 120) -> str:
    """What rich prints of it, so many columns wide, without colours."""
    from rich.console import Console

    console = Console(width=width, color_system=None)
    with console.capture() as text:
        console.print(printable)
    return text.get()


def write_json(record: Any, path: str | Path) -> Path:
    """Write plain data to one JSON file, whole or not at all; returns the path. Raises OSError."""
    path = Path(path)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    with whole(path) as file:
        file.write(text.encode())
    return path
