"""Write the page and, beside it, its numbers as CSV and JSON."""

from __future__ import annotations

import base64
import codecs
import csv
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from pyrometer.inference import ProblemError
from pyrometer.inference.storage import whole

from ..alarms import score
from ..cell import Record
from ..facts import plain
from ..reading import records as read_records
from .changes import Changes, changes
from .crossings import crossings
from .summary import Block, Group, Interval, Summary, better, entry_of, summarise
from .text import as_text
from .verdicts import ENOUGH, verdict

NEEDED = ("jinja2", "matplotlib")
HERE = Path(__file__).parent
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take for a formula


@dataclass(frozen=True)
class Written:
    """The page, the files beside it, the number of runs in it, and the runs that could not be read, key -> reason."""

    page: Path
    files: tuple[Path, ...]
    cells: int
    unreadable: dict[str, str]


def report(runs: str | Path, out: str | Path, *, against: str | Path | None = None, command: str = "") -> Written:
    """Read the folder of runs and write the page to `out`, whole or not at all; `against` is a folder to compare with.

    Beside it come `<name>.cells.csv` and `.json`, a line for each run, and `<name>.summary.csv` and `.json`, the
    page's numbers. `command` is what made it. Raises ProblemError where a folder is missing, where the page cannot
    stand there, or without jinja2 and matplotlib; OSError where the disk refuses.
    """
    runs, out = Path(runs), Path(out)
    for folder in [runs, *([Path(against)] if against is not None else [])]:
        if not folder.is_dir():
            raise ProblemError(f"{folder}: there is no folder of runs; pyrometer bench writes one.")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ProblemError(f"{out}: expected a name that ends in .html.")
    if not out.absolute().parent.is_dir():
        raise ProblemError(f"{out}: there is no folder {out.absolute().parent}; make it first.")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ProblemError(f"the report needs {' and '.join(missing)}: pip install 'pyrometer[report]'.")
    unreadable: dict[str, str] = {}
    summary = summarise(records(runs, unreadable), unreadable)
    summary.unreadable = unreadable
    found = changes(summarise(records(Path(against))), summary) if against is not None else None
    files = _downloads(runs, out, summary, found)
    _write(out, lambda file: file.write(_html(runs, out, summary, found, against, files, command)))
    return Written(out, tuple(files), summary.cells, unreadable)


def records(folder: Path, unreadable: dict[str, str] | None = None) -> Iterator[Record]:
    """The records of the folder as they may be shown."""
    return read_records(folder, unreadable, as_text)


# -- the page ---------------------------------------------------------------------------------------------------------


def _html(
    runs: Path, out: Path, summary: Summary, found: Changes | None, against: Any, files: dict[Path, str], command: str
) -> str:
    import jinja2
    import markupsafe

    from .heat import crossing_view, learned_view
    from .marks import mark
    from .view import Environments, block_view, changes_view

    environments = Environments()
    blocks = [block_view(runs, block, environments) for block in summary.blocks]
    page = {
        "cells": summary.cells,
        "engines": summary.engines,
        "problems": len({block.problem for block in summary.blocks}),
        "learners": len({block.learner for block in summary.blocks if block.learner}),
        "blocks": blocks,
        "downloads": [{"name": f.name, "href": quote(f.name), "words": words} for f, words in files.items()],
        "changes": changes_view(found, Path(against).name) if found is not None else None,
        "crossings": [
            *(view for same in _by_problem(summary) if (view := learned_view(same))),
            *(crossing_view(crossed) for crossed in crossings(runs, summary.unreadable)),
        ],
        "alarms": _alarms(runs),
        "environments": environments.view(),
        "unreadable": sorted(summary.unreadable.items()),
    }
    script = (HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["soft"] = lambda name: markupsafe.escape(name).replace("_", markupsafe.Markup("_<wbr>"))
    return environment.get_template("page.html").render(
        page=page,
        title=runs.resolve().name or "runs",
        enough=f"{ENOUGH:g}",
        command=command or f"pyrometer report {runs} --out {out}",
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        mark=mark,
        hints={m: f"{better(m)} is better" if better(m) else "" for block in summary.blocks for m in block.metrics},
    )


def _by_problem(summary: Summary) -> Iterator[list[Block]]:
    for _, same in groupby(summary.blocks, key=lambda block: block.problem):
        yield list(same)


def _alarms(runs: Path) -> dict[str, Any] | None:
    """The table of `alarms.score`: words, columns, and rows of values."""
    scores = score(records(runs))
    shares = [{"caught": one.caught, "false": one.false} for one in scores]
    rows = [{**plain(one), **share} for one, share in zip(scores, shares, strict=True)]
    if not any(row["hits"] + row["misses"] + row["false_alarms"] + row["silences"] for row in rows):
        return None
    return {
        "words": "Runs whose truth is known, by whether their answer is wrong and whether the alarm was on. Caught: "
        "the share of the wrong ones with the alarm on; false: that of the right ones; with 95 % intervals.",
        "columns": [name.replace("_", " ") for name in rows[0]],
        "rows": [[_cell(value) for value in row.values()] for row in rows],
    }


def _cell(value: Any) -> dict[str, str]:
    if value is None:
        return {"text": "\u2013", "value": ""}
    if isinstance(value, tuple):
        share, low, high = value
        return {"text": f"{share:.0%} ({low:.0%} to {high:.0%})", "value": repr(share)}
    return {"text": str(value), "value": str(value)}


# -- the files beside it ----------------------------------------------------------------------------------------------


def _downloads(runs: Path, out: Path, summary: Summary, found: Changes | None) -> dict[Path, str]:
    """Write them; path -> what it holds. Runs are read again one at a time, so that memory does not grow with them."""
    files = {
        out.with_suffix(".summary.json"): "this page's numbers",
        out.with_suffix(".summary.csv"): "the same as a table",
        out.with_suffix(".cells.json"): "every run, with settings, versions and machine",
        out.with_suffix(".cells.csv"): "every run, its errors and cost",
    }
    of_summary, table, of_cells, cells = files
    _write(of_summary, lambda file: json.dump(as_data(summary, found), file, indent=1, allow_nan=False))
    _write(table, lambda file: _csv(file, _summary_rows(summary)))
    _write(of_cells, lambda file: _json_lines(file, (plain(record) for record in records(runs))))
    _write(cells, lambda file: _csv(file, _cell_rows(records(runs), summary)))
    return files


def as_data(summary: Summary, found: Changes | None = None) -> dict[str, Any]:
    """Everything that the page has in its tables, as plain data."""
    return plain({
        "cells": summary.cells,
        "blocks": [
            {
                "problem": block.problem,
                "learner": block.learner,
                "verdict": verdict(block),
                "reference": block.theta.reference,
                "provenance": block.theta.provenance,
                "groups": [_group(group, block.metrics) for group in block.groups],
            }
            for block in summary.blocks
        ],
        "changes": found,
        "unreadable": summary.unreadable,
    })  # fmt: skip


def _group(group: Group, metrics: list[str]) -> dict[str, Any]:
    return {
        "engine": group.engine,
        "budget": group.budget,
        "seeds": [entry.seed for entry in group.entries],
        "done": len(group.done),
        "errors": {m: error for m in metrics if (error := group.error(m)) is not None},
        "largest": {m: largest for m in metrics if (largest := group.largest(m)) is not None},
        "reference_errors": {m: group.reference_error(m) for m in metrics if group.error(m) is not None},
        "best": sorted(group.best),
        "log_evidence": group.evidence(),
        "log_evidence_kind": group.evidence_kind(),
        "log_evidence_std_error": group.claimed(),
        "log_evidence_less_truth": group.evidence_error(),
        "level": group.level(),
        "calls": group.calls(),
        "seconds": group.seconds(),
    }


def _summary_rows(summary: Summary) -> Iterator[list[Any]]:
    yield ["problem", "learner", "engine", "budget", "figure", "mean", "low", "high", "seeds", "runs", "trust", "best"]
    for block in summary.blocks:
        for group in block.groups:
            figures: dict[str, Interval | None] = {m: group.error(m) for m in block.metrics}
            figures |= {"log evidence": group.evidence(), "log evidence less truth": group.evidence_error()}
            figures |= {"calls": group.calls(), "seconds": group.seconds()}
            for name, value in figures.items():
                if value is not None:
                    numbers = [value.mean, value.low, value.high, value.n]
                    yield [*group.name, name, *numbers, len(group.entries), group.level(), name in group.best]


def _cell_rows(every: Iterable[Record], summary: Summary) -> Iterator[list[Any]]:
    metrics = list(dict.fromkeys(metric for block in summary.blocks for metric in block.metrics))
    costs = ["evaluations", "gradients", "seconds", "compile_seconds"]
    yield [
        "key", "problem", "learner", "engine", "budget", "seed", "state", "reason", *metrics,
        *(f"largest {metric}" for metric in metrics), "log evidence", "its std error", "kind", "truth", "trust", *costs,
    ]  # fmt: skip
    for record in every:
        cell, row, entry = record.cell, record.row, entry_of(record)
        scores = [entry.errors.get(metric) for metric in metrics]
        evidence = (
            [entry.evidence.value, entry.evidence.std_error, entry.evidence.kind] if entry.evidence else [None] * 3
        )
        yield [
            record.key, cell.problem, cell.learner, cell.engine, str(cell.budget), cell.seed, entry.state, entry.reason,
            *(score.average if score else None for score in scores),
            *(score.largest if score else None for score in scores),
            *evidence, entry.truth.value if entry.truth else None, entry.level if entry.done else "",
            *(getattr(row.cost, cost) for cost in costs),
        ]  # fmt: skip


def _csv(file: IO[str], rows: Iterable[list[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        writer.writerow([f"'{c}" if isinstance(c, str) and c.startswith(FORMULA) else c for c in row])


def _json_lines(file: IO[str], items: Iterable[Any]) -> None:
    """A JSON array, a line for each item, written as they come."""
    separator = "[\n"
    for item in items:
        file.write(separator + json.dumps(item, allow_nan=False))
        separator = ",\n"
    file.write("[]\n" if separator == "[\n" else "\n]\n")


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Whole or not at all."""
    with whole(path) as file:
        write(codecs.getwriter("utf-8")(file))
