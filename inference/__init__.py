"""Pyrometer's inference: problems, engines, learners, and the records they answer with.

Engines and learners are found by folder scan and loaded when first named, so adding one touches no list.
"""

from typing import Any

from . import registry
from .engine import infer, why_not
from .learn import Fit, learn
from .posterior import Cost, Evidence, Posterior, Status
from .problem import Problem, ProblemError, Reference
from .registry import find_engine, find_learner
from .simulator import Simulator

__all__ = [
    "Cost",
    "Evidence",
    "Fit",
    "Posterior",
    "Problem",
    "ProblemError",
    "Reference",
    "Simulator",
    "Status",
    "find_engine",
    "find_learner",
    "infer",
    "learn",
    "why_not",
]


def _methods() -> list[type]:
    return [*registry.engines().values(), *registry.learners().values()]


def __getattr__(name: str) -> Any:
    """An engine or learner by its class name: `from pyrometer.inference import SVI`."""
    if name[:1].isupper():
        for cls in _methods():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(cls.__name__ for cls in _methods())})
