"""Runs of a given cost: an engine sizes itself, and the harness sees to it that the size was right.

One call is one evaluation or gradient of the log joint of all data, tuning included (`Cost.calls`). How many a run
takes is not known before it for adaptive methods, such as trees of leapfrog steps or temperatures that are found on
the way. So a run that spent less than 1/2 or more than 5/4 of what it was given is a trial: the engine is sized again
by what was learned, and runs afresh. Trials are not part of the answer's cost, and a note says that there were some.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .posterior import Posterior, Status
from .problem import ProblemError

LEAST, MOST = 0.5, 1.25  # of the calls given: a run within them is the answer
STOP = 2.0  # times the calls given: there a run is stopped
TRIALS = 6  # runs, the answer's among them


class ExhaustedError(Exception):
    """The run has spent `STOP` times what it was given."""


class Counts(dict[str, float]):
    """The density's account of its calls, which ends a run at `limit` of them."""

    def __init__(self, limit: float) -> None:
        super().__init__(evaluations=0.0, gradients=0.0)
        self.limit = limit

    @property
    def exhausted(self) -> bool:
        return sum(self.values()) > self.limit

    def __setitem__(self, key: str, value: float) -> None:
        super().__setitem__(key, value)
        if self.exhausted:
            raise ExhaustedError


def check_calls(calls: Any) -> float:
    """`calls`, a positive number. Raises `ProblemError`."""
    if isinstance(calls, bool) or not isinstance(calls, int | float) or not 0 < calls < float("inf"):
        raise ProblemError(f"calls={calls!r}: expected a positive number, of evaluations and gradients together.")
    return float(calls)


def within(calls: float, attempt: Callable[[float, float], Posterior]) -> Posterior:
    """The answer of `attempt(size, limit)` that spends about `calls`: `size` is what the engine is told.

    A run that cannot be made small enough is 'timed out', and has no draws.
    """
    size, fits, too_large = calls, 0.0, math.inf  # sizes that were found to fit, and not to
    best: Posterior | None = None
    options: Any = None
    for trial in range(TRIALS):
        posterior = attempt(size, STOP * calls)
        spent, state = posterior.cost.calls, posterior.status.state
        if state in ("failed", "unsupported") or posterior.engine_options == options:
            break  # the same again: it is as large or as small as it can be
        if trial:
            noted = f"sized in {trial} trial{'s' * (trial > 1)}, whose cost is not counted"
            notes = (*posterior.diagnostics.notes, noted)
            posterior = replace(posterior, diagnostics=replace(posterior.diagnostics, notes=notes))
        if state == "done" and spent <= MOST * calls:
            fits, best = size, posterior
            if spent >= LEAST * calls:
                break
        else:
            too_large = min(too_large, size)
        options = posterior.engine_options
        size *= calls / max(spent, 1.0) if state == "done" else 0.25  # what a stopped run would have spent is not known
        if fits > 0 and too_large < math.inf:
            size = math.sqrt(fits * too_large)
    answer = best if best is not None and state != "failed" else posterior
    if not answer.status.done or answer.cost.calls <= STOP * calls:
        return answer
    reason = f"the smallest run took {answer.cost.calls:.0f} calls of the density, of {calls:.0f} given"
    return Posterior(
        {}, parameters=answer.parameters, status=Status("timed out", reason), cost=answer.cost, engine=answer.engine,
        engine_options=answer.engine_options, seed=answer.seed, batch_shape=answer.batch_shape, problem=answer.problem,
    )  # fmt: skip
