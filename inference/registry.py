"""Which engines and learners there are: every file in the folders, and other people's by entry point."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from .problem import Problem, ProblemError


def engines() -> dict[str, type]:
    """name -> engine class: every file in `engines/`, and the entry points `pyrometer.engines`."""
    return _discover("engines", "run")


def learners() -> dict[str, type]:
    """name -> learner class: every file in `learners/`, engines that learn, entry points `pyrometer.learners`."""
    own = {name: cls for name, cls in engines().items() if hasattr(cls, "fit")}
    return dict(sorted({**own, **_discover("learners", "fit")}.items()))


def find_engine(name: str) -> type:
    """The engine of this name or unique beginning of a name. Raises `ProblemError`, with the nearest name."""
    return _find(name, engines(), "engine")


def find_learner(name: str) -> type:
    """The learner of this name or unique beginning of a name. Raises `ProblemError`, with the nearest name."""
    return _find(name, learners(), "learner")


def as_engine(engine: Any) -> Any:
    """An engine from an instance, a class or a name."""
    return _instance(engine, find_engine, "run", "engine")


def as_learner(learner: Any) -> Any:
    """A learner from an instance, a class or a name."""
    return _instance(learner, find_learner, "fit", "learner")


def prepared(method: Any, problem: Problem) -> Problem:
    """The problem as a method runs it: an engine may bring a guide of its own, and so a learner by its E-step."""
    prepare = getattr(method, "prepare", None)
    return prepare(problem) if prepare else problem


def _instance(method: Any, find: Callable[[str], type], verb: str, word: str) -> Any:
    if isinstance(method, str):
        method = find(method)
    if isinstance(method, type) and hasattr(method, verb):
        method = method()
    if isinstance(method, type) or not hasattr(method, verb):
        raise ProblemError(f"{method!r} is no {word}: pass an instance such as SVI(num_steps=500), a class or a name.")
    return method


def _discover(folder: str, verb: str) -> dict[str, type]:
    found: dict[str, type] = {}
    package = importlib.import_module(f".{folder}", __package__)
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f".{folder}.{module_info.name}", __package__)
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, verb):
                name = getattr(value, "name", None)
                if isinstance(name, str):
                    found[name] = value
    for entry in entry_points(group=f"pyrometer.{folder}"):
        found.setdefault(entry.name, entry.load())
    return dict(sorted(found.items()))


def _find(name: str, known: Mapping[str, type], word: str) -> type:
    key = name.strip().lower().replace("-", "_")
    matches = [n for n in known if n == key] or [n for n in known if n.startswith(key)] if key else []
    if len(matches) == 1:
        return known[matches[0]]
    near = matches or difflib.get_close_matches(key, known, 1)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There are: {', '.join(known)}."
    raise ProblemError(f"no {word} {name!r}. {hint}")
