"""From words on a command line to a problem, engines and learners: `latent_dim=2`, `svi.num_steps=500`.

Settings stand beside a method for all of its name, or in brackets behind it for this one of several, as tables print
them: `svi,svi(objective=iwae, num_particles=5)`, `em(num_steps=20):nuts(num_samples=50)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyrometer.inference import Problem, ProblemError

from .grid import family, made
from .methods import engines_from, label, learners_from

_BRACKETS = re.compile(r"\(([^()]*)\)")


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
    module = family(model)
    problem = made(model, module, _typed(module.problem, for_model, f"model {model}"))
    groups = [_by_written_name(text, convert) for text, convert in ((engines, engines_from), (learn, learners_from))]
    _apply(for_methods, groups)
    chosen, learners = (_labelled(group) for group in groups)
    return problem, chosen, learners or None


def names(text: str) -> list[str]:
    """The names in a text with commas between them; those in brackets part settings."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]


def _by_written_name(text: str | None, convert: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The name as written -> instance, still without the settings in brackets. Raises ProblemError."""
    found: dict[str, Any] = {}
    for written in names(text or ""):
        if written in found:
            raise ProblemError(f"{written} is given twice.")
        (found[written],) = convert(_BRACKETS.sub("", written)).values()
    return found


def _labelled(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a table calls each method -> the method, with the settings in brackets. Raises ProblemError."""
    found: dict[str, Any] = {}
    for written, method in group.items():
        made = _replaced(method, dict(_in_brackets(written)), f"{written}: ")
        if label(made) in found:
            raise ProblemError(f"{label(made)} is given twice.")
        found[label(made)] = made
    return found


def _in_brackets(written: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, value) of each setting in the brackets of a name, those behind a colon being of the E-step."""
    for inside, part in zip(([], ["e_step"]), written.split(":", 1), strict=False):
        for assignment in filter(None, ",".join(_BRACKETS.findall(part)).split(",")):
            key, _, value = (word.strip() for word in assignment.partition("="))
            if not (key and value):
                raise ProblemError(f"{written}: expected key=value in the brackets, and not {assignment.strip()!r}.")
            yield (*inside, *key.split(".")), value


def _apply(assignments: Mapping[str, str], groups: list[dict[str, Any]]) -> None:
    """Put `name.setting=value` into every method called so: as written, without brackets, or without its E-step."""
    by_name: dict[str, dict[tuple[str, ...], str]] = {}
    for key, text in assignments.items():
        name, *places = key.split(".")
        by_name.setdefault(name, {})[tuple(places)] = text
    for name, given in by_name.items():
        known: set[str] = set()
        called_so, taken = [], set[tuple[str, ...]]()
        for group in groups:
            for written, method in group.items():
                called = {written, _BRACKETS.sub("", written), method.name}
                known |= called
                if name in called:
                    called_so.append(method)
                    own = {path: text for path, text in given.items() if _has(method, path)}
                    taken |= own.keys()
                    group[written] = _replaced(method, own, f"--set {name}.")
        for setting in given:
            if not called_so:
                where = ".".join((name, *setting))
                raise ProblemError(f"--set {where}: {name!r} is none of the methods; {_near(name, known)}")
            if setting not in taken:
                _replaced(called_so[-1], {setting: given[setting]}, f"--set {name}.")  # says what is wrong


def _has(method: Any, path: Sequence[str]) -> bool:
    """Whether there is a setting at the end of this path, or something on its way that has none of its own."""
    head, *rest = path
    if head not in _fields(method):
        return False
    return not rest or not dataclasses.is_dataclass(getattr(method, head)) or _has(getattr(method, head), rest)


def _replaced(method: Any, given: Mapping[tuple[str, ...], str], where: str) -> Any:
    """The method with these settings, path -> text, all at once. Raises ProblemError, beginning with `where`."""
    hints, known = typing.get_type_hints(type(method)), _fields(method)
    changes: dict[str, Any] = {}
    inner: dict[str, dict[tuple[str, ...], str]] = {}
    for (head, *rest), text in given.items():
        if head not in known:
            raise ProblemError(f"{where}{head}: {method.name} has no setting {head!r}; {_near(head, known)}")
        if rest:
            inner.setdefault(head, {})[tuple(rest)] = text
        else:
            changes[head] = convert(text, hints[head], f"{where}{head}={text}")
    for head, deeper in inner.items():
        if not dataclasses.is_dataclass(getattr(method, head)):
            advice = "is chosen automatically here; name it first, as in --learn em:nuts."
            raise ProblemError(f"{where}{'.'.join((head, *next(iter(deeper))))}: {head} {advice}")
        changes[head] = _replaced(getattr(method, head), deeper, f"{where}{head}.")
    return dataclasses.replace(method, **changes)


def _fields(method: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(method) if f.init]


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
