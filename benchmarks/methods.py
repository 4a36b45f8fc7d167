"""Engines and learners by name: from 'em:nuts' to an instance, from an instance to its label, from labels to a seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pyrometer.inference import Problem, ProblemError, Status, learn
from pyrometer.inference.learn import Fit
from pyrometer.inference.registry import as_engine, as_learner
from pyrometer.inference.settings import options

from .facts import plain


def engines_from(given: Any) -> dict[str, Any]:
    """label -> engine, from instances, classes, names or a dict of these. Raises ProblemError."""
    return _labelled(given, as_engine, "engine")


def learners_from(given: Any) -> dict[str, Any]:
    """label -> learner, likewise; 'em:nuts' is EM with a NUTS E-step. Raises ProblemError."""
    return _labelled(given, _learner, "learner")


def _learner(item: Any) -> Any:
    if not isinstance(item, str) or ":" not in item:
        return as_learner(item)
    name, e_step = item.split(":", 1)
    learner = as_learner(name)
    if not hasattr(learner, "e_step"):
        raise ProblemError(f"learner {item!r}: {learner.name} has no E-step; write {learner.name!r} alone.")
    return dataclasses.replace(learner, e_step=as_engine(e_step))


def _labelled(given: Any, convert: Callable[[Any], Any], what: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return {str(name): convert(item) for name, item in given.items()}
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",") if name.strip()]
    elif not isinstance(given, Sequence):
        given = [given]
    found: dict[str, Any] = {}
    for method in map(convert, given):
        if label(method) in found:
            raise ProblemError(
                f"{what} {label(method)} is given twice; tell them apart by a dict: {{'first': ..., 'second': ...}}."
            )
        found[label(method)] = method
    return found


def label(method: Any) -> str:
    """What a method is called in the table: 'svi(num_steps=500)', with the settings that are not the usual ones."""
    changed = {
        f.name: plain(getattr(method, f.name))
        for f in dataclasses.fields(method)
        if f.name != "e_step" and plain(getattr(method, f.name)) != plain(f.default)
    }
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
    name = method.name + (f"({', '.join(words)})" if words else "")
    e_step = getattr(method, "e_step", None)
    return f"{name}:{label(as_engine(e_step))}" if e_step is not None else name


def settings(method: Any) -> dict[str, Any]:
    """Every setting of a method, as plain values."""
    return plain(options(method))


def row_seed(seed: int, *names: str) -> int:
    """A seed below 2**32 for the row of these names: the same whatever other rows there are and in whatever order.

    Raises ProblemError for a seed that is not a whole number from 0 to 2**64 - 1.
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ProblemError(f"seed = {seed!r}: expected a whole number from 0 to 2**64 - 1.")
    # numpy takes a key of whole numbers; the names become one through a hash that is the same on every machine.
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    key = tuple(np.frombuffer(digest, "<u4").tolist())
    return int(np.random.SeedSequence(int(seed), spawn_key=key).generate_state(1)[0])


def trained(problem: Problem, name: str, learner: Any, seed: int, **running: Any) -> tuple[dict[str, Any], Fit | None]:
    """What a record says of theta learned by this learner: learner, settings, seed, status, objective, objective_kind,
    notes and cost; and the fit, where there is one."""
    facts: dict[str, Any] = {"learner": name, "settings": settings(learner), "seed": row_seed(seed, name)}
    try:
        fit = learn(problem, learner, seed=facts["seed"], **running)
    except ProblemError as error:
        return {**facts, "status": Status("unsupported", str(error))}, None
    last = len(fit.trail.value) - 1
    facts |= {
        "status": fit.status,
        "cost": fit.cost,
        "objective": float(fit.trail.value[last]) if last >= 0 else None,
        "objective_kind": fit.trail.kind,
        "notes": fit.notes,
    }
    return facts, fit if fit.status.done else None
