"""Settings of engines and learners: frozen dataclasses that refuse what they do not know, by name."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

from .posterior import Posterior
from .problem import ProblemError

_FOREIGN = {  # spellings of PyMC, Stan and NumPyro
    "draws": "num_samples",
    "n_samples": "num_samples",
    "iter_sampling": "num_samples",
    "tune": "warmup_steps",
    "target_accept": "target_acceptance",
    "target_accept_prob": "target_acceptance",
    "adapt_delta": "target_acceptance",
    "max_treedepth": "max_tree_depth",
    "num_warmup": "warmup_steps",
    "iter_warmup": "warmup_steps",
    "chains": "num_chains",
    "lr": "learning_rate",
    "step_size": "learning_rate",
    "epochs": "num_steps",
    "max_iter": "num_steps",
    "tol": "tolerance",
    "steps": "num_steps",
    "n": "num_steps",
    "particles": "num_particles",
}

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass whose unknown settings are refused with the nearest name, and whose counts are checked."""
    cls = dataclass(frozen=True, kw_only=True)(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    counts = [f.name for f in fields(cls) if f.type in ("int", "int | None")]  # type: ignore[arg-type]
    plain = cls.__init__

    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise ProblemError(f"{cls.__name__} takes settings by name: {', '.join(names)}.")
        for key in kwargs:
            if key not in names:
                raise ProblemError(f"{cls.__name__} has no setting {key!r}. {_nearest(key, names)}")
        for name in counts:  # before anything is done with them
            if name in kwargs:
                check_count(cls, name, kwargs[name])
        plain(self, **kwargs)

    cls.__init__ = checked_init  # type: ignore[method-assign]
    return cls


def check_count(kind: type, name: str, value: Any) -> None:
    """A count is a whole number of at least 1 (warmup_steps: 0); None stays None where it is the default."""
    if value is None and getattr(kind, name, 0) is None:
        return
    least = 0 if name == "warmup_steps" else 1
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
        raise ProblemError(f"{kind.__name__}({name}={value!r}): expected a whole number of at least {least}.")


def check_positive(engine: Any, *names: str) -> None:
    for name in names:
        value = getattr(engine, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
            raise ProblemError(f"{type(engine).__name__}({name}={value!r}): expected a positive number.")


def check_share(engine: Any, *names: str) -> None:
    """A number between 0 and 1, neither of them; None stays None where it is the default."""
    for name in names:
        value = getattr(engine, name)
        if value is None and getattr(type(engine), name, 0) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < 1:
            raise ProblemError(f"{type(engine).__name__}({name}={value!r}): expected a number between 0 and 1.")


def check_choice(engine: Any, name: str, choices: Iterable[str]) -> None:
    value = getattr(engine, name)
    if value not in (choices := list(choices)):
        raise ProblemError(f"{type(engine).__name__}({name}={value!r}): expected one of {', '.join(choices)}.")


def check_initial(engine: Any) -> None:
    """`initial`: site -> values, or None."""
    if engine.initial is not None and not isinstance(engine.initial, Mapping):
        kind = type(engine.initial).__name__
        raise ProblemError(f"{type(engine).__name__}(initial=...): expected site -> values, got {kind}.")


def check_optimizer(method: Any) -> None:
    """Any torch optimiser class, or a function of (tensors, lr=...); None where it is the default."""
    value = method.optimizer
    if not callable(value) and not (value is None and type(method).optimizer is None):
        raise ProblemError(
            f"{type(method).__name__}(optimizer={value!r}): expected a torch optimiser class, such as torch.optim.Adam."
        )


def options(method: Any) -> dict[str, Any]:
    """The settings of an engine or learner as plain data: what a record needs to say how it was run."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if is_dataclass(value) and hasattr(value, "name") and not isinstance(value, type):
            return {"name": value.name, **options(value)}
        if isinstance(value, Posterior):
            return f"posterior of {value.engine}"
        return getattr(value, "__name__", type(value).__name__)

    return {f.name: plain(getattr(method, f.name)) for f in fields(method)}


def _nearest(name: str, names: list[str]) -> str:
    if name in ("seed", "device", "progress", "parameters", "warm"):
        return f"Give it to the call: infer(problem, engine, {name}=...)."
    if _FOREIGN.get(name) in names:
        return f"Did you mean {_FOREIGN[name]!r}?"
    near = difflib.get_close_matches(name, names, 1)
    return f"Did you mean {near[0]!r}?" if near else f"Settings: {', '.join(names)}."
