"""What the page shows, as plain words and values: nothing is computed here that is not in the summary.

Every number in a table stands twice: as it is read, rounded, and in full, by which it is sorted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..report import count, seconds, state, style_of, with_error
from . import figures, figures_of_draws
from .changes import FALSE_ALARM, Changes
from .commands import command
from .posteriors import Drawn, drawn
from .summary import LEVELS, Block, Entry, Group, Interval, budget_order, in_table
from .verdicts import ends, short, time, verdict

STYLE = style_of(120, False)
LADDERS = 2  # metrics that have a curve


def block_view(folder: Path, block: Block, environments: Environments) -> dict[str, Any]:
    """Everything in the section of one problem and learner."""
    of_draws = drawn(folder, block)
    shown_metrics = [metric for metric in block.metrics if in_table(metric)]
    more = [metric for metric in block.metrics if not in_table(metric)]
    ladders = [picture for m in block.metrics[:LADDERS] if (picture := figures.error_against_cost(block, m))]
    last = [groups[-1] for name in block.engines if (groups := [g for g in block.ladder(name) if g.done])]
    of_keys = set(of_draws.keys.values())
    shown = [group for group in block.groups if any(entry.key in of_keys for entry in group.entries)]
    ran = [group for group in block.groups if any(entry.state != "unsupported" for entry in group.entries)]
    return {
        "id": identity(block.problem, block.learner),
        "title": title(block.problem, block.learner),
        "verdict": verdict(block),
        "truth": _truth(block),
        "theta": _theta(block),
        "metrics": shown_metrics,
        "more_metrics": more,
        "more_rows": [
            {"engine": g.engine, "budget": g.budget, "metrics": [_metric(g, m) for m in more]}
            for g in block.groups
            if g.done
        ],
        "budgets": block.budgets,
        "engines": sorted({group.engine for group in ran}),
        "rows": [_row(group, shown_metrics) for group in ran],
        "ladders": ladders,
        "evidence": figures.evidence(block),
        "commands": command(block.groups),
        "last_commands": command(last),
        "drawn_commands": command(shown, [of_draws.seed]),
        "distributions": figures_of_draws.distributions(of_draws),
        "draws_words": _draws_words(of_draws),
        "pairs": figures_of_draws.pairs(of_draws),
        "k_hats": figures_of_draws.k_hats(of_draws.doubts),
        "k_words": [f"{name}: {d.doubtful.words() or 'none is above'}" for name, d in of_draws.doubts.items()],
        "images": figures_of_draws.worst_images(of_draws.doubts),
        "missing": of_draws.missing,
        "diagnoses": [_diagnosis(group) for group in block.groups if group.done],
        "failures": _failures(block),
        "folds": [_fold(block.ladder(engine), environments) for engine in block.engines],
    }


def title(problem: str, learner: str) -> str:
    return f"{problem}, theta by {learner}" if learner else problem


def identity(*names: str) -> str:
    """An anchor for these names, the same on every page."""
    words = re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower()).strip("-")[:40]
    return f"m-{words}-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]}"


class Environments:
    """Machines and versions, each different one with a number."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []

    def number(self, group: Group) -> int:
        facts = {**group.machine, **group.versions}
        if facts not in self.facts:
            self.facts.append(facts)
        return self.facts.index(facts) + 1

    def view(self) -> list[dict[str, Any]]:
        return [{"name": n, "facts": [(k, str(v)) for k, v in f.items()]} for n, f in enumerate(self.facts, 1)]


# -- one engine at one budget -----------------------------------------------------------------------------------------


def number(interval: Interval | None, text: str | None = None) -> dict[str, str]:
    """A cell of a table: rounded, with its interval, and in full for sorting; empty where it is missing."""
    if interval is None:
        return {"text": "\u2013", "interval": "", "value": "", "more": ""}
    value = "" if math.isnan(interval.mean) else repr(interval.mean).replace("inf", "Infinity")
    return {"text": text or short(interval.mean), "interval": ends(interval), "value": value, "more": ""}


def _row(group: Group, metrics: list[str]) -> dict[str, Any]:
    light, more = _light(group)
    clock, calls = group.seconds(), group.calls()
    order = budget_order(group)
    return {
        "engine": group.engine,
        "budget": group.budget,
        "budget_value": "" if order[0] == 2 else repr(order[1]),
        "done": len(group.done),
        "seeds": str(len(group.done)) if group.complete else f"{len(group.done)} of {len(group.entries)}",
        "metrics": [_metric(group, metric) for metric in metrics],
        "evidence": _evidence(group),
        "light": light,
        "light_more": more,
        "light_value": LEVELS.index(light) if light in LEVELS else len(LEVELS),
        "calls": number(calls, count(calls.mean) if calls else None),
        "seconds": number(
            clock, f"{clock.mean:.2g}" if clock and clock.mean < 0.1 else seconds(clock.mean) if clock else None
        ),
    }


def _metric(group: Group, metric: str) -> dict[str, Any]:
    error, largest = group.error(metric), group.largest(metric)
    text = f"< {group.reference_error(metric):.2g}" if group.at_reference_precision(metric) else None
    cell = number(error, text)
    more = f"worst {short(largest[0])}" if largest else ""
    return {**cell, "more": more, "best": metric in group.best}


def _evidence(group: Group) -> dict[str, str]:
    value, error, claimed = group.evidence(), group.evidence_error(), group.claimed()
    if value is None or claimed is None:
        return number(None)
    sign = {"lower bound": "\u2265 ", "upper bound": "\u2264 "}.get(group.evidence_kind(), "")
    cell = number(value, sign + with_error(value.mean, claimed, STYLE))
    more = ""
    if error is not None:
        of_seeds = number(error)
        sign = "+" if error.mean >= 0 else "\u2212"
        more = f"truth {sign} {short(abs(error.mean))} {of_seeds['interval']}".strip()
    above = group.above()
    if above is not None:
        more = ", ".join(filter(None, (more, f"upper bound {short(above.mean - value.mean)} above")))
    return {**cell, "interval": "", "more": more}


def _light(group: Group) -> tuple[str, str]:
    """The worst word, and how many seeds have which where they differ."""
    if not group.done:
        return state(group.entries[0].state), ""
    levels = [entry.level for entry in group.done]
    mixed = len(set(levels)) > 1
    return group.level(), ", ".join(f"{levels.count(w)} {w}" for w in LEVELS if w in levels) if mixed else ""


def _diagnosis(group: Group) -> dict[str, Any]:
    def badness(entry: Entry) -> int:
        return LEVELS.index(entry.level) if entry.level in LEVELS else 0

    worst = max(group.done, key=badness)
    return {
        "engine": group.engine,
        "budget": group.budget,
        "light": group.level(),
        "words": worst.verdict or "no diagnostics",
        "notes": worst.notes,
    }


def _fold(ladder: list[Group], environments: Environments) -> dict[str, Any]:
    """What is behind the rows of one engine, budget by budget, and the command that repeats them."""
    return {
        "engine": ladder[0].engine,
        "model_settings": _settings(ladder[0].cell.model_settings),
        "runs": [
            {
                "budget": group.budget,
                "settings": _settings(group.settings) or "no settings",
                "seeds": ", ".join(str(entry.seed) for entry in group.entries),
                "stored_as": " ".join(entry.key for entry in group.entries),
                "environment": environments.number(group),
            }
            for group in ladder
        ],
        "command": command(ladder),
    }


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())


# -- one problem ------------------------------------------------------------------------------------------------------


def _truth(block: Block) -> str:
    if block.theta.reference == "none":
        return f"The truth is not known. {block.theta.provenance}".strip()
    known = f"The truth: {block.theta.reference} ({block.theta.provenance})."
    evidence = block.theta.log_evidence
    if evidence is None:
        return known
    return f"{known} Its log evidence is {with_error(evidence.value, evidence.std_error, STYLE)} nats per datum" + (
        " at the first theta." if block.learner else "."
    )


def _theta(block: Block) -> str:
    """How well the learned theta predicts, and what learning cost."""
    if not block.learner:
        return ""
    held_out = Interval.of(block.held_out.values())
    calls = Interval.of(calls for calls, _ in block.learning.values())
    clock = Interval.of(clock for _, clock in block.learning.values())
    words = [f"Theta learned by {block.learner}"]
    words += [f"for {count(calls.mean)} calls and {time(clock.mean)} beside those below"] if calls and clock else []
    if held_out is not None:
        cell = number(held_out, f"{held_out.mean:.5g}")
        words += [f"held-out log p(x) {cell['text']} {cell['interval']}".rstrip() + " nats per datum"]
    return ", ".join(words) + "."


def _draws_words(of_draws: Drawn) -> str:
    exact = any(panel.truth is not None for panel in of_draws.panels)
    truth = "thick black: the truth" if exact else "black line and grey band: the truth's mean and sd"
    truth = truth if exact or any(panel.moments for panel in of_draws.panels) else "the truth is not known"
    return (
        "Weighted distribution functions P(z \u2264 x) of single latents, first those at which an engine is furthest "
        f"out; {truth}. Seed {of_draws.seed}, the largest budget of each engine."
    )


def _failures(block: Block) -> list[dict[str, Any]]:
    """The same engine with the same reason is one line."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for group in block.groups:
        for entry in group.entries:
            if not entry.done:
                found.setdefault((group.engine, entry.state, entry.reason), []).append(group.budget)
    return [
        {
            "engine": engine,
            "what": state(what),
            "reason": reason or "no reason was recorded",
            "count": len(budgets),
            "budgets": "all" if set(budgets) == set(block.budgets) else ", ".join(dict.fromkeys(budgets)),
        }
        for (engine, what, reason), budgets in sorted(found.items())
    ]


# -- beside the problems ----------------------------------------------------------------------------------------------


def changes_view(found: Changes, against: str) -> dict[str, Any]:
    words = (
        f"{len(found.changed)} of {found.compared} figures changed beyond their error (Welch's test over seeds, "
        f"Bonferroni: where nothing changed a page says so with {1 - FALSE_ALARM:.0%})."
    )
    if found.untold:
        words += f" {found.untold} more have one seed on a side, which tells nothing."
    if found.other_machine:
        words += " The machines differ, so a change of seconds may be theirs."
    rows = []
    for change in found.changed:
        before, after = change.before.mean, change.after.mean
        ratio = after / before if before > 0 and after > 0 else None
        rows.append({
            "model": title(change.problem, change.learner),
            "engine": change.engine,
            "budget": change.budget,
            "figure": change.figure,
            "before": number(change.before, f"{before:.4g}"),
            "after": number(change.after, f"{after:.4g}"),
            "ratio": f"\u00d7 {ratio:.2f}" if ratio else "\u2013",
            "ratio_value": repr(ratio) if ratio else "",
            "z": f"{change.z:+.1f}" if math.isfinite(change.z) else ("+\u221e" if change.z > 0 else "\u2212\u221e"),
            "z_value": repr(change.z).replace("inf", "Infinity"),
        })  # fmt: skip
    ended = [f"{_name(e.problem, e.learner, e.engine, e.budget)}: {e.before}; now {e.after}" for e in found.ended]
    return {
        "against": against,
        "words": words,
        "rows": rows,
        "ended": ended,
        "new": [_name(*name) for name in found.new],
        "gone": [_name(*name) for name in found.gone],
    }


def _name(problem: str, learner: str, engine: str, budget: str) -> str:
    return f"{title(problem, learner)}: {engine} ({budget})"
