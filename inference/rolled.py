"""A program's long Python loop, rolled up: what every step computes alike is computed for all steps at once.

The operations that lead from the parameters to each result are recorded once. Results that are made by the same
operations and differ only in constants (the data of their step) form a group, whose constants are stacked:

    f(theta, x_1), f(theta, x_2) .. f(theta, x_T)    becomes    vmap(f)(theta, (x_1 .. x_T)),

so that evaluating T steps again, at another theta, costs a few operations in place of T times as many.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

SMALL = 32  # constants of up to so many numbers are compared by value, larger ones by identity


class RollError(Exception):
    """The function cannot be recorded: a value that depends on the parameters decides what runs."""


class Expr:
    """A tensor that depends on the parameters: an operation on others and constants. `kind` is the same for all that
    are made alike, up to constants; `exact` for all that are equal."""

    __slots__ = ("args", "exact", "func", "kind", "part")

    def __init__(self, func: Any, args: Any, part: int | None, kind: int, exact: int) -> None:
        self.func, self.args, self.part, self.kind, self.exact = func, args, part, kind, exact


class _Recorder(TorchDispatchMode):
    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()
        self.numbers: dict[Any, int] = {}
        self.held: list[Tensor] = []  # constants that are known by identity must live
        for i, tensor in enumerate(parameters):
            number = self.number(("parameter", i))
            self.known[tensor] = Expr(None, tensor, None, number, number)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its answer True makes torch import its own compiler

    def number(self, key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        live: list[Expr] = []
        given, kind, exact = self._read((args, kwargs), live)
        if not live:
            return result
        if func._schema.is_mutable:
            raise RollError(f"{func} writes in place")
        parts = [(None, result)] if isinstance(result, Tensor) else list(enumerate(result)) if _many(result) else []
        if not parts:
            raise RollError("its operations depend on values")
        for part, tensor in parts:
            if isinstance(tensor, Tensor):
                numbers = self.number((func, kind, part, "kind")), self.number((func, exact, part, "exact"))
                self.known[tensor] = Expr(func, given, part, *numbers)
        return result

    def _read(self, value: Any, live: list[Expr]) -> tuple[Any, Any, Any]:
        """Arguments with expressions for live tensors, and what they are of: up to constants, and exactly. The exact
        key is worked out only where something is live, so constants stand in it by themselves until then."""
        if isinstance(value, Tensor):
            expr = self.known.get(value)
            if expr is not None:
                live.append(expr)
                return expr, ("expr", expr.kind), ("expr", expr.exact)
            return value, (value.shape, value.dtype), self._constant(value)
        if type(value) is tuple or type(value) is list:
            if not value:
                return (), (), ()
            read = [self._read(v, live) for v in value]
            noted, kind, exact = zip(*read, strict=True)
            return noted, kind, exact
        if type(value) is dict:
            noted, kind, exact = self._read(tuple(value.values()), live)
            return dict(zip(value, noted, strict=True)), (tuple(value), kind), (tuple(value), exact)
        return value, (type(value), value), (type(value), value)

    def _constant(self, value: Tensor) -> Any:
        if value.numel() <= SMALL:
            return value.shape, value.dtype, tuple(value.reshape(-1).tolist())
        self.held.append(value)
        return value.shape, value.dtype, id(value)


def _many(value: Any) -> bool:
    return isinstance(value, (tuple, list))


class Group:
    """Results that are made alike: their numbers, and one function for all of them."""

    def __init__(self, numbers: list[int], members: list[Any]) -> None:
        self.numbers = numbers
        self.stacked: list[Tensor] = []
        self.root = self._merged(members, {})

    def __call__(self) -> Tensor:
        """The results at the parameters as they are now, (members, *shape); one row where all are the same."""
        if not self.stacked:
            return self._made(self.root, (), {})[None]
        return torch.func.vmap(lambda *rows: self._made(self.root, rows, {}))(*self.stacked)

    def _merged(self, values: list[Any], seen: dict[Any, Any]) -> Any:
        first = values[0]
        if isinstance(first, Expr):
            if all(v.exact == first.exact for v in values):
                return first
            key = tuple(map(id, values))
            if key not in seen:
                args = self._merged([v.args for v in values], seen)
                seen[key] = Expr(first.func, args, first.part, first.kind, -1)
            return seen[key]
        if isinstance(first, Tensor):
            if all(v is first or torch.equal(v, first) for v in values):
                return first
            self.stacked.append(torch.stack(values))
            return _Row(len(self.stacked) - 1)
        if isinstance(first, tuple):
            return tuple(self._merged(list(column), seen) for column in zip(*values, strict=True))
        if isinstance(first, dict):
            return {k: self._merged([v[k] for v in values], seen) for k in first}
        return first

    def _made(self, value: Any, rows: Sequence[Tensor], done: dict[int, Any]) -> Any:
        if isinstance(value, Expr):
            if value.func is None:
                return value.args
            if id(value) not in done:
                args, kwargs = self._made(value.args, rows, done)
                result = value.func(*args, **kwargs)
                done[id(value)] = result if value.part is None else result[value.part]
            return done[id(value)]
        if isinstance(value, _Row):
            return rows[value.number]
        if isinstance(value, tuple):
            return tuple(self._made(v, rows, done) for v in value)
        if isinstance(value, dict):
            return {k: self._made(v, rows, done) for k, v in value.items()}
        return value


class _Row:
    """A constant that differs between the members of a group."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of small objects, none of them garbage, would be looked through again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def rolled(function: Callable[[], Sequence[Tensor]], parameters: Sequence[Tensor]) -> list[Group]:
    """The groups of a function's results, which depend on these parameters as they are when a group is called.

    Raises `RollError` where a value that depends on them decides what runs.
    """
    recorder = _Recorder(parameters)
    with torch.no_grad(), recorder, _no_collection():
        results = list(function())
    groups: dict[Any, list[int]] = {}
    members = [recorder.known.get(r, r.detach()) for r in results]
    for i, member in enumerate(members):
        key = member.kind if isinstance(member, Expr) else ("constant", tuple(member.shape), member.dtype)
        groups.setdefault(key, []).append(i)
    return [Group(numbers, [members[i] for i in numbers]) for numbers in groups.values()]
