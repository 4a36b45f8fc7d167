"""A comparison as text: one table that lines up in 120 columns, and notes in which nothing is cut short."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .folding import Folding
from .metrics import METRICS, MORE, HeldOut, Score

if TYPE_CHECKING:
    from .comparison import Comparison, PerDatum, Row, Theta

COLOURS = {"good": "green", "caution": "yellow", "bad": "red", "failed": "red", "timed out": "red"}

SHORT, LEAST = 10, 8  # columns of at most SHORT characters are never narrowed, the others to LEAST
SHOWN_FIRST = 2  # metrics that the table of engines has room for; others follow in one of their own

LEGEND = (
    "Errors are in units of the true sd: the average (max, the largest). '< x': below the reference's own error x.",
    "Evidence is log p(x) in nats: {ge} a lower bound; iw the importance-weighted estimate from the same draws.",
    "One evaluation is the log joint of all data once. {pm} is one standard error.",
)


@dataclass
class Notes:
    """Numbered notes; the same words get the same number."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> str:
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return str(self.texts.index(text) + 1)


@dataclass(frozen=True)
class Style:
    """Columns to fill, and the two signs that are not ASCII or what stands for them where only ASCII can be printed."""

    width: int
    pm: str
    ge: str


def style_of(width: int, ascii_only: bool) -> Style:
    return Style(width, "+-", ">=") if ascii_only else Style(width, "\u00b1", "\u2265")


def render(comparison: Comparison, width: int = 120, ascii_only: bool = False) -> RenderableType:
    """The title, the table of learners (where theta was learned), the table of engines, the notes and the legend."""
    style = style_of(width, ascii_only)
    notes = Notes()
    learned = [theta for theta in comparison.thetas if theta.learner]
    parts: list[RenderableType] = [_title(comparison)]
    if learned:
        parts += [_learners(learned, notes, style)]
    known = [title for title in METRICS if title not in MORE]
    metrics = [title for title in known if any(title in row.errors for row in comparison.rows)]
    for theta in comparison.thetas:
        parts += [_engines(comparison, theta, metrics[:SHOWN_FIRST], notes, style)]
        if metrics[SHOWN_FIRST:]:
            parts += [_more(comparison, theta, metrics[SHOWN_FIRST:], style)]
    if notes.texts:
        parts += [listed(notes)]
    parts += ["\n".join(line.format(pm=style.pm, ge=style.ge) for line in LEGEND)]
    return spaced(parts)


def spaced(parts: Iterable[RenderableType]) -> RenderableType:
    """A blank line behind each; tables with a head fold where they do not fit."""
    shown = [
        Folding(p) if isinstance(p, Table) and p.show_header else Text(p) if isinstance(p, str) else p for p in parts
    ]
    return Group(*(item for part in shown for item in (part, Text(""))))


def _title(comparison: Comparison) -> str:
    data = shapes(comparison.problem.get("data", ()))
    ended = "" if comparison.complete else " (ended early: not all rows)"
    return f"{comparison.problem.get('name', 'problem')}: data {data}, seed {comparison.seed}{ended}"


def shapes(described: Iterable[Any]) -> str:
    """'100x64, 100', of the shapes that `describe` gives."""
    return ", ".join("x".join(map(str, d)) if isinstance(d, list) else d for d in described) or "none"


def table_of(style: Style, title: str, *columns: tuple[str, str, int]) -> Table:
    """Fixed widths: so the tables of all thetas line up, and what is too long is folded, never cut.

    Where there is less room the wide columns give way in proportion; the short ones would be unreadable.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding, table.show_edge = (0, 0, 0, 0), False
    missing = max(0, sum(width + 1 for _, _, width in columns) - 1 - style.width)
    wide = sum(width for _, _, width in columns if width > SHORT)
    for name, justify, width in columns:
        kept = max(LEAST, width - math.ceil(missing * width / wide)) if width > SHORT else width
        table.add_column(name, justify=justify, width=kept, overflow="fold")  # type: ignore[arg-type]
    return table


def _learners(thetas: list[Theta], notes: Notes, style: Style) -> Table:
    table = table_of(
        style,
        "Learned theta, by its log-likelihood on data not seen",
        ("theta by", "left", 24),
        ("held-out log p(x)\nper datum", "right", 18),
        (f"test set\n{style.pm}", "right", 8),
        ("by", "left", 21),
        ("trust", "left", 10),
        ("evalu-\nations", "right", 6),
        ("gradi-\nents", "right", 6),
        ("seconds", "right", 7),
        ("note", "right", 4),
    )
    for theta in thetas:
        held_out = theta.held_out
        trust = (held_out.level if held_out else "-") if theta.status.done else state(theta.status.state)
        reason = theta.status.reason or theta.held_out_reason
        reason = reason or ((held_out.status.reason or held_out.verdict) if held_out else "")
        table.add_row(
            Text(theta.learner),
            _held_out(held_out, style),
            f"{held_out.data_error:.2g}" if held_out and held_out.data_error is not None else "-",
            held_out.estimator if held_out else "-",
            coloured(trust),
            count(theta.cost.evaluations),
            count(theta.cost.gradients),
            seconds(theta.cost.seconds),
            notes.number(reason),
        )
    return table


def _held_out(held_out: HeldOut | None, style: Style) -> str:
    if held_out is None or held_out.value is None or held_out.std_error is None:
        return "-"
    sign = style.ge + " " if held_out.kind == "lower bound" else ""
    return sign + with_error(held_out.value, held_out.std_error, style)


def _engines(comparison: Comparison, theta: Theta, metrics: list[str], notes: Notes, style: Style) -> Table:
    """The truth at one theta, then what each engine says there."""
    rows = [row for row in comparison.rows if row.learner == theta.learner]
    shared = all(row.log_evidence is None or row.log_evidence.data == 1 for row in comparison.rows)
    table = table_of(
        style,
        f"Engines at the theta learned by {theta.learner}" if theta.learner else "Engines",
        ("engine", "left", 24 + 18 * (SHOWN_FIRST - len(metrics))),
        *((f"{metric}\n(max)", "right", 17) for metric in metrics),
        ("log evidence" + ("" if shared else "\nper datum"), "right", 20),
        ("trust", "left", 10),
        ("evalu-\nations", "right", 6),
        ("gradi-\nents", "right", 6),
        ("seconds", "right", 7),
        ("note", "right", 4),
    )
    if theta.status.done:
        known = theta.reference != "none"
        truth = _evidence(theta.log_evidence, style) if known else "-"
        name = f"truth ({theta.reference})" if known else "truth (not known)"
        table.add_row(name, *[""] * len(metrics), truth, *[""] * 4, notes.number(theta.provenance), style="italic")
    for row in rows:
        table.add_row(*_cells(row, metrics, notes, style))
    return table


def _more(comparison: Comparison, theta: Theta, metrics: list[str], style: Style) -> Table:
    """The measures beyond the first two, in the same form."""
    table = table_of(style, "", ("engine", "left", 24), *((f"{metric}\n(max)", "right", 17) for metric in metrics))
    for row in comparison.rows:
        if row.learner == theta.learner:
            table.add_row(Text(row.engine), *(_score(row.errors.get(metric)) for metric in metrics))
    return table


def _cells(row: Row, metrics: list[str], notes: Notes, style: Style) -> list[RenderableType]:
    words = "; ".join([row.status.reason or row.verdict, *row.notes])
    return [
        Text(row.engine),
        *(_score(row.errors.get(metric)) for metric in metrics),
        _evidence(row.log_evidence, style),
        coloured(row.level if row.status.done else state(row.status.state)),
        count(row.cost.evaluations),
        count(row.cost.gradients),
        seconds(row.cost.seconds),
        notes.number(words),
    ]


def listed(notes: Notes) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for number, text in enumerate(notes.texts, 1):
        table.add_row(f"{number}.", Text(text))
    return table


def state(state: str) -> str:
    return "cannot run" if state == "unsupported" else state


def coloured(word: str, of: str = "") -> Text:
    """The word in its colour, or in that of another word."""
    return Text(word, style=COLOURS.get(of or word, ""))


def _score(score: Score | None) -> str:
    if score is None:
        return "-"
    if score.at_reference_precision and score.reference_error > 0:
        return f"< {score.reference_error:.2g} ({score.largest:.2g})"
    return f"{score.average:.2g} ({score.largest:.2g})"


def _evidence(evidence: PerDatum | None, style: Style) -> str:
    if evidence is None:
        return "-"
    sign = {"lower bound": style.ge + " ", "upper bound": "< "}.get(evidence.kind, "")
    text = sign + with_error(evidence.value, evidence.std_error, style)
    return f"{text}\niw {_evidence(evidence.refined, style)}" if evidence.refined else text


def with_error(value: float, error: float, style: Style) -> str:
    """To two digits of the error, four decimals at most; all four where there is no error."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.4g} {style.pm} {error:.2g}"
    if error < 1e-4:
        return f"{value:.4f}" + (f" {style.pm} {error:.0e}" if error > 0 else "")
    digits = min(max(1 - math.floor(math.log10(error)), 0), 4)
    return f"{value:.{digits}f} {style.pm} {error:.{digits}f}"


def count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2f}"
