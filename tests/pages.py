"""Folders of runs that nobody has made, for the tests of the report page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from pyrometer.benchmarks.cell import Budget, Cell, Record
from pyrometer.benchmarks.comparison import PerDatum, Row, Theta
from pyrometer.benchmarks.facts import machine, plain, versions
from pyrometer.benchmarks.metrics import Score
from pyrometer.inference.posterior import Cost, Status

EXACT = Theta(reference="exact", provenance="closed form", log_evidence=PerDatum(-3.0, 0.0, "exact", 1))
VERSIONS, MACHINE = versions(), machine()  # looked up once: it takes a tenth of a second


def made(
    engine="svi", seed=0, means=0.05, sds=0.04, *, calls=1000.0, problem="coin", learner="", theta=EXACT, state="done",
    reason="", level="good", evidence=-3.0, largest=None, model="no_such_family", reference_error=0.0, seconds=None,
):  # fmt: skip
    """A record of a run that nobody has made."""
    cell = Cell(problem, model, engine, learner, Budget(calls=calls), seed)
    errors = {
        "error of means": Score(means, means * 3 if largest is None else largest, "z[1]", reference_error),
        "error of sds": Score(sds, sds * 3, "z[0]", reference_error),
    }
    row = Row(
        learner,
        engine,
        {"num_samples": 100},
        seed,
        Status(state, reason),
        errors if state == "done" and means is not None else {},
        PerDatum(evidence, 0.01, "estimate", 1) if state == "done" and evidence is not None else None,
        level,
        "all is well",
        (),
        Cost(evaluations=0.6 * calls, gradients=0.4 * calls, seconds=calls / 1000 if seconds is None else seconds),
    )
    return Record(cell, cell.key(), theta, row, versions=VERSIONS, machine=MACHINE)


def put(folder: Path, *found: Record, draws=None) -> Path:
    """Into the folder as a store writes them."""
    folder.mkdir(exist_ok=True)
    for record in found:
        place = folder / record.key
        place.mkdir(exist_ok=True)
        if draws is not None:
            draws.save(place / "draws.nc")
            digest = hashlib.sha256((place / "draws.nc").read_bytes()).hexdigest()
            record = dataclasses.replace(record, draws=digest)
        seal(place / "record.json", {**plain(record), "schema": 1})
    return folder


def seal(file: Path, data) -> None:
    body = (json.dumps(data, allow_nan=False)[1:] + "\n").encode()
    file.write_bytes(f'{{"digest": "{hashlib.sha256(body).hexdigest()}",\n'.encode() + body)


def ladder(engine, errors, calls=(1000.0, 4000.0), **other):
    """Records over seeds at each budget; the error halves from one budget to the next."""
    return [
        made(engine, seed, error / 2**step, error / 2**step, calls=cost, **other)
        for step, cost in enumerate(calls)
        for seed, error in enumerate(errors)
    ]
