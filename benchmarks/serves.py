"""Which engine runs on which family of models, and why not where it does not: asked of the engines, never written."""

from __future__ import annotations

from collections.abc import Mapping

from pyrometer.inference import ProblemError
from pyrometer.inference.engine import why_not
from pyrometer.inference.registry import engines
from pyrometer.models import families


def serves() -> dict[str, dict[str, str]]:
    """engine -> family -> why it refuses, in words; '' where it runs. Families as by default."""
    problems = {name: module.problem() for name, module in families().items()}
    found: dict[str, dict[str, str]] = {}
    for name, cls in engines().items():
        found[name] = {}
        for family, problem in problems.items():
            try:
                found[name][family] = why_not(problem, cls())
            except ProblemError as error:
                found[name][family] = str(error)
    return found


def as_markdown(found: Mapping[str, Mapping[str, str]]) -> str:
    """A row for each engine: the families that it runs on, and those that it refuses, by reason."""
    lines = ["| engine | runs on | refuses, because |", "|---|---|---|"]
    for name, answers in found.items():
        refused: dict[str, list[str]] = {}
        for family, reason in answers.items():
            if reason:
                refused.setdefault(reason, []).append(f"`{family}`")
        runs = [f"`{family}`" for family, reason in answers.items() if not reason]
        who = "all" if not refused else ", ".join(runs) or "none"
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in refused.items()).replace("|", "\\|")
        lines.append(f"| `{name}` | {who} | {why} |")
    return "\n".join(lines)
