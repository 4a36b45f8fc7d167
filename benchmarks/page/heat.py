"""Learners against evaluators: the heat map of the grid's own runs, and of a square beside them, with its gaps."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

from ..gaps import NAMES
from ..report import state, with_error
from . import figures
from .crossings import Crossed
from .summary import Block
from .view import STYLE, identity, number


def crossing_view(crossed: Crossed) -> dict[str, Any]:
    """The heat map of one square, and its gaps."""
    square = crossed.square
    rows, reasons = [], []
    for learner in square.learners:
        cells = []
        for name in square.evaluators:
            cell = next((c for c in square.cells if (c.learner, c.evaluator) == (learner.learner, name)), None)
            if cell is None or cell.value is None or cell.std_error is None:
                words = state(cell.status.state) if cell else "not run"
                cells.append({"text": "\u2013", "value": "", "shade": 0, "more": words, "words": ""})
                if cell is not None and cell.status.reason:
                    reasons.append(f"{learner.learner} by {name}: {cell.status.reason}")
                continue
            sign = {"lower bound": "\u2265 ", "upper bound": "\u2264 "}.get(cell.kind, "")
            d = cell.difference
            best = d is not None and d.to == cell.learner
            more = "best" if best else f"{d.value:.3g} \u00b1 {d.data_error or d.std_error:.2g}" if d else ""
            cells.append({
                "text": sign + with_error(cell.value, cell.std_error, STYLE),
                "value": repr(cell.value),
                "shade": f"{0.32 * crossed.shade(cell):.3f}",
                "more": more,
                "words": "" if cell.level == "good" else f"trust: {cell.level}",
            })  # fmt: skip
        rows.append({"learner": learner.learner, "cells": cells})
    gaps = crossed.gaps
    with_gaps = (
        [(row.learner, {k: {"value": g.value} for k, g in row.gaps.items()}) for row in gaps.rows] if gaps else []
    )
    return {
        "id": identity("square", crossed.file),
        "title": f"{square.problem.get('name', crossed.file)}, {square.judged} data",
        "paired": True,
        "evaluators": square.evaluators,
        "rows": rows,
        "reasons": reasons,
        "command": square.command,
        "gaps": figures.gaps(with_gaps),
        "gap_names": NAMES,
        "gap_words": f"{gaps.evaluator}, family {gaps.family}, {gaps.judged} data." if gaps else "",
        "gap_rows": [
            {
                "learner": row.learner,
                "gaps": [
                    with_error(g.value, g.std_error, STYLE) if (g := row.gaps.get(name)) else "\u2013" for name in NAMES
                ],
                "light": row.level if row.status.done else "failed",
                "notes": "; ".join(filter(None, (row.status.reason, *row.notes))),
            }
            for row in gaps.rows
        ]
        if gaps
        else [],
    }


def learned_view(blocks: list[Block]) -> dict[str, Any] | None:
    """The heat map of what the runs themselves tell: one problem at the thetas of several learners, judged by every
    engine that gives evidence, each at its largest budget; the difference to the best learner in nats per datum."""
    rated = {
        block.learner: {
            name: groups[-1] for name in block.engines if (groups := [g for g in block.ladder(name) if g.evidence()])
        }
        for block in blocks
        if block.learner
    }
    if len(rated) < 2:
        return None
    evaluators = sorted({name for groups in rated.values() for name in groups})
    rows: dict[str, list[dict[str, Any]]] = {learner: [] for learner in rated}
    for name in evaluators:
        column = {who: e for who, groups in rated.items() if name in groups and (e := groups[name].evidence())}
        values = [e.mean for e in column.values() if math.isfinite(e.mean)]
        best, worst = max(values, default=0.0), min(values, default=0.0)
        for learner in rated:
            if learner not in column:
                rows[learner].append({"text": "\u2013", "value": "", "shade": 0, "more": "", "words": ""})
                continue
            group, value = rated[learner][name], column[learner].mean
            sign = {"lower bound": "\u2265 ", "upper bound": "\u2264 "}.get(group.evidence_kind(), "")
            share = (best - value) / (best - worst) if best > worst and math.isfinite(value) else 0.0
            rows[learner].append({
                "text": sign + with_error(value, group.claimed() or 0.0, STYLE),
                "value": number(column[learner])["value"],
                "shade": f"{0.32 * share:.3f}",
                "more": "best" if value == best else f"{value - best:.3g}",
                "words": "" if group.level() == "good" else f"trust: {group.level()}",
            })  # fmt: skip
    cell = next(block for block in blocks if block.learner).groups[0].cell
    asked = [word for n, v in cell.model_settings.items() for word in ("--set", f"{n}={json.dumps(v)}")]
    words = [
        "pyrometer",
        "square",
        cell.model,
        "--learn",
        ",".join(rated),
        *asked,
        "--gaps",
        "--json",
        "RUNS/square.json",
    ]
    return {
        "id": identity("learned", cell.problem),
        "title": f"{cell.problem}, training data",
        "paired": False,
        "evaluators": evaluators,
        "rows": [{"learner": learner, "cells": cells} for learner, cells in rows.items()],
        "reasons": ["By the data that were learned from. Held-out data, and where the nats go: the command below."],
        "command": shlex.join(words),
        "gaps": None,
        "gap_names": NAMES,
        "gap_words": "",
        "gap_rows": [],
    }
