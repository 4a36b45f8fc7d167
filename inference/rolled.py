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


class RollError(Exception):
    """The function cannot be recorded: a value that depends on the parameters decides what runs."""


class Expr:
    """A tensor that depends on the parameters: an operation on others and constants. `kind` is the same for all that
    are made alike, up to constants."""

    __slots__ = ("args", "func", "kind", "owner", "part")

    def __init__(self, func: Any, args: Any, part: int | None, kind: int, owner: object) -> None:
        self.func, self.args, self.part, self.kind, self.owner = func, args, part, kind, owner


class _Recorder(TorchDispatchMode):
    """Notes how each tensor that depends on the parameters was made, with the tensor itself: in an attribute, which
    goes when the tensor goes, and is read faster than a dictionary of weak references."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.numbers: dict[Any, int] = {}
        self.live = False
        for i, tensor in enumerate(parameters):
            self.note(tensor, Expr(None, tensor, None, self.number(("parameter", i)), self))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its answer True makes torch import its own compiler

    def number(self, key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def note(self, tensor: Tensor, expr: Expr) -> None:
        tensor._expr = expr  # type: ignore[attr-defined]

    def forget(self, tensor: Tensor) -> None:
        if hasattr(tensor, "_expr"):
            del tensor._expr

    def known(self, tensor: Tensor) -> Expr | None:
        expr = getattr(tensor, "_expr", None)
        return expr if expr is not None and expr.owner is self else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.live = False
        given, kind = self._read((args, kwargs) if kwargs else (args, None))
        if not self.live:
            return result
        if func._schema.is_mutable:
            raise RollError(f"{func} writes in place")
        parts = [(None, result)] if isinstance(result, Tensor) else list(enumerate(result)) if _many(result) else []
        if not parts:
            raise RollError("its operations depend on values")
        for part, tensor in parts:
            if isinstance(tensor, Tensor):
                self.note(tensor, Expr(func, given, part, self.number((func, kind, part)), self))
        return result

    def _read(self, value: Any) -> tuple[Any, Any]:
        """Arguments with expressions for live tensors, and what they are of, up to constants: the number of a live
        tensor, shape and type of another, type and value of what is none."""
        if isinstance(value, Tensor):
            expr = self.known(value)
            if expr is not None:
                self.live = True
                return expr, expr.kind
            return value, (value.shape, value.dtype)
        if type(value) is tuple or type(value) is list:
            if not value:
                return (), ()
            noted, kind = zip(*[self._read(v) for v in value], strict=True)
            return noted, kind
        if type(value) is dict:
            noted, kind = self._read(tuple(value.values()))
            return dict(zip(value, noted, strict=True)), (tuple(value), kind)
        return value, (type(value), value)


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
        """The members' expressions as one: the first's where all are equal, else with rows for what differs."""
        first = values[0]
        if all(v is first for v in values):
            return first
        if isinstance(first, Expr):
            key = tuple(map(id, values))
            if key not in seen:
                args = self._merged([v.args for v in values], seen)
                equal = args is first.args
                seen[key] = first if equal else Expr(first.func, args, first.part, first.kind, None)
            return seen[key]
        if isinstance(first, Tensor):
            if all(torch.equal(v, first) for v in values):
                return first
            self.stacked.append(torch.stack(values))
            return _Row(len(self.stacked) - 1)
        if isinstance(first, tuple):
            merged = tuple(self._merged(list(column), seen) for column in zip(*values, strict=True))
            return first if all(m is f for m, f in zip(merged, first, strict=True)) else merged
        if isinstance(first, dict):
            named = {k: self._merged([v[k] for v in values], seen) for k in first}
            return first if all(named[k] is first[k] for k in first) else named
        return first

    def _made(self, value: Any, rows: Sequence[Tensor], done: dict[int, Any]) -> Any:
        if isinstance(value, Expr):
            if value.func is None:
                return value.args
            if id(value) not in done:
                args, kwargs = self._made(value.args, rows, done)
                result = value.func(*args, **(kwargs or {}))
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
    with torch.no_grad(), _no_collection():
        try:
            with recorder:
                results = list(function())
        finally:
            for tensor in parameters:
                recorder.forget(tensor)
        groups: dict[Any, list[int]] = {}
        members = [recorder.known(r) or r.detach() for r in results]
        for i, member in enumerate(members):
            key = member.kind if isinstance(member, Expr) else ("constant", tuple(member.shape), member.dtype)
            groups.setdefault(key, []).append(i)
        try:
            return [Group(numbers, [members[i] for i in numbers]) for numbers in groups.values()]
        except RecursionError:
            raise RollError("each step depends on the steps before") from None
