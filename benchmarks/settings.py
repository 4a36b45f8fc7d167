"""From words on a command line to a problem, engines and learners: `latent_dim=2`, `svi.num_steps=500`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pyrometer import models
from pyrometer.inference import Problem, ProblemError

from .methods import engines_from, label, learners_from


def configure(
    model: str, engines: str, learn: str | None, assignments: Iterable[str]
) -> tuple[Problem, dict[str, Any], dict[str, Any] | None]:
    """The problem, the engines and the learners by name, with these settings. Raises ProblemError."""
    for_model: dict[str, str] = {}
    for_methods: dict[str, str] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ProblemError(f"--set {assignment}: expected key=value, for example --set latent_dim=2.")
        (for_methods if "." in key else for_model)[key] = value
    try:
        family = models.find(model)
    except ProblemError:
        raise
    except ValueError as error:
        raise ProblemError(str(error)) from error
    problem = family.problem(**_typed(family.problem, for_model, f"model {model}"))
    chosen = _by_written_name(engines, engines_from)
    learners = _by_written_name(learn or "", learners_from)
    _apply(for_methods, [chosen, learners])
    finished = [{label(method): method for method in group.values()} for group in (chosen, learners)]
    return problem, finished[0], finished[1] or None


def _by_written_name(text: str, convert: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The name as written -> instance. Raises ProblemError where two names mean the same method."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return dict(zip(names, convert(text).values(), strict=True))


def _apply(assignments: Mapping[str, str], groups: list[dict[str, Any]]) -> None:
    """Put `name.setting=value` into every method called so: as written, in full, or without its E-step."""
    for key, text in assignments.items():
        name, *path = key.split(".")
        known: set[str] = set()
        refused: _UnknownSettingError | None = None
        taken = False
        for group in groups:
            for written, method in group.items():
                names = {written, written.partition(":")[0], method.name}
                known |= names
                if name not in names:
                    continue
                try:
                    group[written] = _replaced(method, path, text, key)
                    taken = True
                except _UnknownSettingError as error:
                    refused = error
        if not taken:
            raise refused or ProblemError(f"--set {key}: {name!r} is none of the methods; {_near(name, known)}")


class _UnknownSettingError(ProblemError):
    """This method has no such setting; another of the same name may."""


def _replaced(method: Any, path: list[str], text: str, key: str) -> Any:
    head, *rest = path
    hints = typing.get_type_hints(type(method))
    fields = [f.name for f in dataclasses.fields(method) if f.init]
    if head not in fields:
        raise _UnknownSettingError(f"--set {key}: {method.name} has no setting {head!r}; {_near(head, fields)}")
    if not rest:
        return dataclasses.replace(method, **{head: convert(text, hints[head], f"--set {key}={text}")})
    inner = getattr(method, head)
    if not dataclasses.is_dataclass(inner):
        raise ProblemError(f"--set {key}: {head} is chosen automatically here; name it first, as in --learn em:nuts.")
    return dataclasses.replace(method, **{head: _replaced(inner, rest, text, key)})


def _typed(function: Callable[..., Any], assignments: Mapping[str, str], what: str) -> dict[str, Any]:
    """The keyword arguments for `function`, converted by its annotations."""
    hints = typing.get_type_hints(function)
    known = list(inspect.signature(function).parameters)
    for key in assignments:
        if key not in known:
            raise ProblemError(f"--set {key}: {what} has no setting {key!r}; {_near(key, known)}")
    return {k: convert(text, hints.get(k, str), f"--set {k}={text}") for k, text in assignments.items()}


def _near(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}."


def convert(text: str, hint: Any, where: str) -> Any:
    """The value that `text` stands for where a `hint` is expected. Raises ProblemError, naming what was expected."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if Any in options:
        options = tuple(_READERS)
    words = [
        word for option in options if typing.get_origin(option) is typing.Literal for word in typing.get_args(option)
    ]
    if text in words:
        return text
    readers = [option for option in _READERS if option in options]
    for reader in readers:
        try:
            return _READERS[reader][0](text)
        except (KeyError, ValueError):
            continue
    expected = [repr(word) for word in words] + [_READERS[reader][1] for reader in readers]
    if not expected:
        raise ProblemError(f"{where}: this setting cannot be given on a command line; use Python.")
    raise ProblemError(f"{where}: expected {' or '.join(expected)}.")


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


# In the order in which they are tried: where words are allowed, a number is still a number.
_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    type(None): (_none, "none"),
    bool: (_boolean, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a word"),
}
