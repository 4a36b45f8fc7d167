"""Which engine runs on which family of models, and why not where it does not: asked of the engines, never written."""

from __future__ import annotations

import re
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
    """A row for each engine: the families that it runs on, and those that it refuses with the number of the reason,
    the reasons below."""
    reasons: dict[str, int] = {}
    lines = ["| engine | runs on | refuses (why) |", "|---|---|---|"]
    for name, answers in found.items():
        runs = [f"`{family}`" for family, reason in answers.items() if not reason]
        refused: dict[int, list[str]] = {}
        for family, reason in answers.items():
            if reason:
                number = reasons.setdefault(re.sub(r"site '[^']*'", "a site", reason), len(reasons) + 1)
                refused.setdefault(number, []).append(f"`{family}`")
        others = "all others" if refused else "all"
        who = others if 2 * len(runs) > len(answers) else ", ".join(runs) or "none"
        why = "; ".join(f"{', '.join(names)} ({number})" for number, names in refused.items())
        lines.append(f"| `{name}` | {who} | {why} |")
    return "\n".join(
        [*lines, "", *(f"{number}. {reason[:1].upper()}{reason[1:]}." for reason, number in reasons.items())]
    )
