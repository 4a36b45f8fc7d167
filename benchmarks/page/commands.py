"""The command that repeats a cell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ..cell import Cell

SIZES = ("num_samples", "num_steps", "num_particles", "warmup_steps", "num_chains")  # what a budget sets


def command(cell: Cell, settings: Mapping[str, Any]) -> str:
    """`pyrometer compare ...` with the settings as they were run; a shell reads every name as one word."""
    engine = cell.engine.partition("(")[0]
    learner = cell.learner.partition("(")[0]
    sizes = {name: settings[name] for name in SIZES if name in settings and settings[name] is not None}
    assigned = {
        **cell.model_settings,
        **{f"{engine}.{name}": value for name, value in {**sizes, **cell.engine_settings}.items()},
        **{f"{learner}.{name}": value for name, value in cell.learner_settings.items()},
    }
    words = ["pyrometer", "compare", cell.model, "--engines", engine]
    words += ["--learn", learner] if learner else []
    for name, value in assigned.items():
        words += ["--set", f"{name}={value}"]
    return shlex.join([*words, "--seed", str(cell.seed)])
