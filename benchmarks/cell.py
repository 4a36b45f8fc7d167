"""One cell of a benchmark grid, and what became of it: the record that the runner writes and the report reads."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
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
            return typing.cast(Record, typed(cls, data))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a record: {error}") from error


def typed(hint: Any, value: Any) -> Any:
    """`value`, plain data as `facts.plain` writes them, as the type of this annotation: dataclasses by their fields,
    'inf', '-inf' and 'nan' as numbers where a number is due. Fields that are not known are left out.

    Raises ValueError or TypeError where the data are of another form.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inside:
            return None
        return typed(next(option for option in inside if option is not type(None)), value)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"expected the fields of {hint.__name__}, got {type(value).__name__}")
        hints = _fields(hint)
        return hint(**{name: typed(hints[name], item) for name, item in value.items() if name in hints})
    if origin is tuple:
        items = _of(list, value)
        of_items = inside if Ellipsis not in inside else [inside[0]] * len(items)
        return tuple(typed(of, item) for of, item in zip(of_items, items, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {str(name): typed(inside[1], item) for name, item in _of(dict, value).items()}
    if hint is float:
        return float(value if isinstance(value, str) else _of((int, float), value))
    return value if hint is Any else _of(hint, value)


@functools.cache
def _fields(of: type) -> dict[str, Any]:
    """The fields of a dataclass with their types, looked up once."""
    hints = typing.get_type_hints(of)
    return {field.name: hints[field.name] for field in fields(of) if field.init}


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, Any)):
        raise ValueError(f"expected {getattr(kind, '__name__', 'a number')}, got {type(value).__name__}")
    return value
