"""The square of learners and evaluators, and the gaps of fits, as text: tables that line up, notes that are whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .gaps import NAMES
from .report import (
    Notes,
    Style,
    coloured,
    count,
    listed,
    seconds,
    shapes,
    spaced,
    state,
    style_of,
    table_of,
    with_error,
)

if TYPE_CHECKING:
    from .gaps import Gap, Gaps, Losses
    from .square import Cell, Square

PER_TABLE = 4  # evaluators that stand side by side; more follow below
SHOWN = 5  # worst data listed for each fit
IN_WORST = ("inference", "approximation", "amortisation")

SQUARE_LEGEND = (
    "log p(x) in nats per datum: {ge} a lower bound, = exact, else an estimate; {pm} the estimator's own error.",
    "'d' is the difference to the best learner of the column (*), datum by datum: {pm} the estimators' own errors,",
    "then in brackets the paired error over data, sd of the differences / sqrt(n), which holds both.",
    "{pm} is to be believed where the trust is good: weights with a heavy tail err by more, and mostly downwards.",
)
GAPS_LEGEND = (
    "Nats per datum, {pm} one standard error by the draws; in brackets the spread over data, sd / sqrt(n).",
    "total = learning + approximation + amortisation; inference = approximation + amortisation = KL(guide || truth).",
    "Learning is the loss to the fit of largest evidence (*); approximation what the best member of the family loses",
    "for each datum; amortisation what the guide loses to that member.",
)


def render(square: Square, width: int = 120, ascii_only: bool = False) -> RenderableType:
    """The title, the learners with their costs, the square, the notes and the legend."""
    style, notes = style_of(width, ascii_only), Notes()
    parts: list[RenderableType] = [_title(square), _learners(square, notes, style)]
    names = square.evaluators
    for first in range(0, len(names), PER_TABLE):
        parts += [_cells(square, names[first : first + PER_TABLE], notes, style)]
    return _grouped(parts, notes, SQUARE_LEGEND, style)


def render_gaps(gaps: Gaps, width: int = 120, ascii_only: bool = False) -> RenderableType:
    """The title, a row of gaps for each fit, its worst data, the notes and the legend."""
    style, notes = style_of(width, ascii_only), Notes()
    words = f"Gaps on the {gaps.judged} data: evidence by {gaps.evaluator}, best member of {gaps.family}"
    columns = [(name, "right", 16) for name in NAMES]
    table = table_of(style, words, ("theta by", "left", 24), *columns, ("trust", "left", 10), ("note", "right", 4))
    for row in gaps.rows:
        trust = coloured(row.level if row.status.done else state(row.status.state))
        figures = [_gap(row.gaps.get(name), style) for name in NAMES]
        number = notes.number("; ".join(text for text in (row.status.reason, *row.notes) if text))
        table.add_row(Text(row.learner + " *" * row.best), *figures, trust, number)
    parts: list[RenderableType] = [table]
    if any(row.worst for row in gaps.rows):
        parts += [_worst(gaps, style)]
    return _grouped(parts, notes, GAPS_LEGEND, style)


def _grouped(parts: list[RenderableType], notes: Notes, legend: tuple[str, ...], style: Style) -> RenderableType:
    if notes.texts:
        parts = [*parts, listed(notes)]
    parts = [*parts, "\n".join(line.format(pm=style.pm, ge=style.ge) for line in legend)]
    return spaced(parts)


def _title(square: Square) -> str:
    data = shapes(square.problem.get("held_out" if square.judged == "held-out" else "data", ()))
    ended = "" if square.complete else " (ended early: not all cells)"
    return f"{square.problem.get('name', 'problem')}: judged on {square.judged} data {data}, seed {square.seed}{ended}"


def _learners(square: Square, notes: Notes, style: Style) -> Table:
    table = table_of(
        style,
        "Learners",
        ("theta by", "left", 48),
        ("own objective\n(all training data)", "right", 20),
        ("kind", "left", 12),
        ("status", "left", 10),
        ("evalu-\nations", "right", 6),
        ("gradi-\nents", "right", 6),
        ("seconds", "right", 7),
        ("note", "right", 4),
    )
    for learner in square.learners:
        table.add_row(
            Text(learner.learner),
            "-" if learner.objective is None else f"{learner.objective:.1f}",
            learner.objective_kind if learner.objective is not None else "-",
            coloured(state(learner.status.state)),
            count(learner.cost.evaluations),
            count(learner.cost.gradients),
            seconds(learner.cost.seconds),
            notes.number("; ".join(text for text in (learner.status.reason, *learner.notes) if text)),
        )
    return table


def _cells(square: Square, evaluators: list[str], notes: Notes, style: Style) -> Table:
    """Rows learners, columns evaluators: value, difference to the best, trust with the number of its note."""
    # names have the room that evaluators leave
    longest = max(len(learner.learner) for learner in square.learners)
    name = max(24, min(longest, style.width - 21 * len(evaluators)))
    width = max(20, min(34, (style.width - name - 1) // len(evaluators) - 1))
    title = "Held-out log p(x)" if square.judged == "held-out" else "Log p(x) of the training data"
    table = table_of(style, title, ("theta by", "left", name), *((judge, "right", width) for judge in evaluators))
    for learner in square.learners:
        cells = [c for c in square.cells if c.learner == learner.learner]
        shown = [next((c for c in cells if c.evaluator == name), None) for name in evaluators]
        table.add_row(Text(learner.learner), *(_cell(cell, notes, style) for cell in shown))
    return table


def _cell(cell: Cell | None, notes: Notes, style: Style) -> Text:
    if cell is None:
        return Text("-")
    doubt = cell.doubtful.words() if cell.doubtful else ""
    number = notes.number("; ".join(text for text in (cell.status.reason or cell.verdict, doubt) if text))
    word = (cell.level if cell.value is not None else state(cell.status.state)) + (f" ({number})" if number else "")
    if cell.value is None or cell.std_error is None:
        return coloured(word, cell.status.state)
    sign = {"lower bound": style.ge + " ", "upper bound": "< ", "exact": "= "}.get(cell.kind, "")
    best = cell.difference is not None and cell.difference.to == cell.learner
    lines = [sign + with_error(cell.value, cell.std_error, style) + (" *" if best else "")]
    if cell.refined:
        lines += [f"iw {with_error(cell.refined.value, cell.refined.std_error, style)}"]
    if cell.difference is not None and not best:
        spread = cell.difference.data_error
        paired = "" if spread is None else f" ({spread:.2g})"
        lines += [f"d {with_error(cell.difference.value, cell.difference.std_error, style)}{paired}"]
    return Text("\n").join([*map(Text, lines), coloured(word, cell.level)])


def _gap(gap: Gap | None, style: Style) -> str:
    if gap is None:
        return "-"
    spread = "" if gap.data_error is None else f"\n({gap.data_error:.2g})"
    return with_error(gap.value, gap.std_error, style) + spread


def _worst(gaps: Gaps, style: Style) -> Table:
    table = table_of(
        style,
        "The data of largest inference gap, by index, in nats",
        ("theta by", "left", 24),
        ("datum", "right", 6),
        *((name, "right", 16) for name in IN_WORST),
    )
    for row in gaps.rows:
        for index in row.worst[:SHOWN]:
            table.add_row(Text(row.learner), str(index), *(_one(row, name, index, style) for name in IN_WORST))
    return table


def _one(row: Losses, name: str, index: int, style: Style) -> str:
    gap = row.gaps[name]
    return with_error(gap.values[index], gap.errors[index], style)
