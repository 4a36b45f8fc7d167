"""One cell of a benchmark grid, and what became of it: the record that the runner writes and the report reads."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from pyrometer.inference import ProblemError

from .comparison import Row, Theta


@dataclass(frozen=True)
class Budget:
    """What one cell may spend, the same for every engine; neither given: as much as the engine's own settings take.

    calls    calls of the density, evaluations and gradients together, each over all data, tuning included: what
             `Cost.evaluations + Cost.gradients` counts
    seconds  of the engine's own time, compilation left out
    """

    calls: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.calls is not None and self.seconds is not None:
            raise ProblemError("a budget is of calls or of seconds, not of both.")
        for name in ("calls", "seconds"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ProblemError(f"budget: {name}={value!r}: expected a positive number.")
            if value is not None:
                object.__setattr__(self, name, float(value))  # 1000 and 1000.0 are the same cell

    def __str__(self) -> str:
        if self.calls is not None:
            return f"{self.calls:g} calls"
        return "its own" if self.seconds is None else f"{self.seconds:g} s"


@dataclass(frozen=True)
class Cell:
    """problem x learner x engine x budget x seed, all by name and plain settings, so that any process can run it.

    `problem`, `learner` and `engine` are labels as in a table, 'vae(latent_dim=2)', 'em:nuts', 'smc'; `learner` is ''
    for the problem's own theta. `model` is the family's name, or 'package.module' of another's; `*_settings` hold what
    differs from the defaults, where a method inside a method is {"name": ..., its settings}. `method` and
    `learn_by` are the registered names of engine and learner. '' in `model`, `method` or `learn_by`: an object that
    was given in Python under that label, which only the session that has it can run.
    """

    problem: str
    model: str
    engine: str
    learner: str = ""
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    model_settings: Mapping[str, Any] = field(default_factory=dict)
    engine_settings: Mapping[str, Any] = field(default_factory=dict)
    learner_settings: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    learn_by: str = ""

    def key(self, *context: str) -> str:
        """A name for this cell in this context (model source, data, versions): the same on every machine."""
        text = json.dumps([asdict(self), *context], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Record:
    """What became of a cell: theta, the engine's row (errors, evidence, verdict, cost, status), the alarms' figures.

    figures   what the alarms look at, one number each over all latents and data, the worst: 'r_hat', 'k_hat', 'ess',
              'divergences', ...; what the engine has not is missing
    key       of the cell, and the name of its files
    draws     the SHA-256 digest of the file of draws beside the record; '' where there are none
    """

    cell: Cell
    key: str
    theta: Theta
    row: Row
    figures: Mapping[str, float] = field(default_factory=dict)
    draws: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Record:
        """The record of what `facts.plain` made of one. Raises ValueError where it is none."""
        try:
            return typed(cls, data)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a record: {error}") from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def typed(kind: Any, value: Any) -> Any:
    """`value`, read from JSON, as the annotation `kind` says: dataclasses, tuples, mappings, 'nan' and 'inf'."""
    if value is None or kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return typed(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        return tuple(typed(args[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return {key: typed(args[1], item) for key, item in value.items()}
    if is_dataclass(kind):
        hints = _hints(typing.cast(Any, kind))
        return typing.cast(Any, kind)(**{name: typed(hints[name], item) for name, item in value.items()})
    return float(value) if kind is float else value
