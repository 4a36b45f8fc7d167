"""Prior draws of eight schools, each weighted by its likelihood."""

from __future__ import annotations

from ..record import Estimate
from .eight_schools import data as data
from .eight_schools import problem as problem

KIND = "importance"
NUM_DRAWS = 100_000


def truth() -> dict[str, Estimate]:
    return {"log evidence": Estimate(problem(data()).reference_at({}).log_evidence.total()[0], 0.0)}
