"""The command that runs the cells of a figure again: a grid, written as TOML, and what to do with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..cell import Cell
from .summary import Group


def command(groups: Sequence[Group], seeds: Sequence[int] | None = None) -> str:
    """Lines for a shell, in which every name is quoted text; '' for no groups. `seeds`: None for all that were run."""
    if not groups:
        return ""
    cells = [group.cell for group in groups]
    own = any(cell.budget.calls is None and cell.budget.seconds is None for cell in cells)
    lines = [
        f"seeds = {_toml(sorted(seeds or {entry.seed for group in groups for entry in group.entries}))}",
        *([] if own else [f"budgets = {_toml(_once([_budget(cell) for cell in cells]))}"]),
        f"problems = {_toml(_once([_named(c.model, c.problem, c.model_settings) for c in cells]))}",
        f"engines = {_toml(_once([_named(_method(c), c.engine, c.engine_settings) for c in cells]))}",
    ]
    learners = _once([_named(_learner(c), c.learner, c.learner_settings) for c in cells if c.learner])
    lines += [f"learners = {_toml(learners)}"] if learners else []
    return "\n".join(["cat > grid.toml <<'END'", *lines, "END", "pyrometer bench grid.toml --out again"])


def _method(cell: Cell) -> str:
    """The registered name; the label's own word in records that do not have it."""
    return getattr(cell, "method", "") or cell.engine.partition("(")[0]


def _learner(cell: Cell) -> str:
    return getattr(cell, "learn_by", "") or cell.learner.partition("(")[0]


def _budget(cell: Cell) -> Any:
    return cell.budget.calls if cell.budget.calls is not None else {"seconds": cell.budget.seconds}


def _named(name: str, label: str, settings: Mapping[str, Any]) -> Any:
    """The bare name where that says all."""
    if label == name and not settings:
        return name
    return {"name": name, "label": label, **({"settings": settings} if settings else {})}


def _once(items: list[Any]) -> list[Any]:
    return [item for place, item in enumerate(items) if item not in items[:place]]


def _toml(value: Any) -> str:
    """A TOML value in one line; a string of JSON is one of TOML. None has no word there, and is left out of tables."""
    if isinstance(value, Mapping):
        inside = ", ".join(
            f"{json.dumps(str(key), ensure_ascii=False)} = {_toml(item)}"
            for key, item in value.items()
            if item is not None
        )
        return f"{{{inside}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)
