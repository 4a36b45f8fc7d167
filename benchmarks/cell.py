"""One cell of a benchmark grid, and what became of it: the record that the runner writes and the report reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

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

    def __str__(self) -> str:
        if self.calls is not None:
            return f"{self.calls:g} calls"
        return "its own" if self.seconds is None else f"{self.seconds:g} s"


@dataclass(frozen=True)
class Cell:
    """problem x learner x engine x budget x seed, all by name and plain settings, so that any process can run it.

    `problem`, `learner` and `engine` are labels as in a table, 'vae(latent_dim=2)', 'em:nuts', 'smc'; `learner` is ''
    for the problem's own theta. `model` is the family's name, or 'package.module' of another's; `*_settings` hold what
    differs from the defaults.
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
