"""Running a program once with many particles that change their ancestors between its statements.

The program's own variables cannot be exchanged from outside, so each tensor that it computes from a latent site is
remembered with the operation that made it, and is made again, from the sites' values as they stand now, when it is
used after they have changed:

    x = pyro.sample("x", ...)      a leaf: its value is exchanged when particles are resampled
    h = f(x)                       a recipe: f and its inputs; made again where x has changed since
    pyro.sample("y", p(h), obs=y)  the operations inside see the h of the x that is there now

All particles are lanes of one vmap, so a program needs no dimension for them. What depends on no site is never made
again; of a Markov model nothing is but what the next statement uses. A deterministic recurrence h_t = f(h_{t-1}, x_t)
that is carried through resampling is made again from the beginning each time: quadratic in its length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Across(torch.autograd.Function):
    """A function of all lanes of a vmap at once, called from inside of it."""

    @staticmethod
    def forward(function: Any, *tensors: Tensor) -> Tensor:
        raise RuntimeError("across() is called inside vmap, with a tensor that differs between lanes")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Any, *tensors: Tensor) -> tuple[Tensor, int]:
        whole = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return function(*whole), 0


def across(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function of whole tensors (lanes, ...) -> (lanes, ...), called with one lane's; one of them at least must
    differ between lanes."""
    return _Across.apply(function, *tensors)


NOTHING = torch.empty(0)


class Leaf:
    """The value of a site in all lanes: `read` answers it as it stands now, inside vmap."""

    def __init__(self, name: str, read: Callable[[], Tensor]) -> None:
        self.leaves = frozenset((name,))
        self.read = read
        self.born = self.made = -1
        self.value = NOTHING
        self.owner: object = None


class Recipe:
    """How a tensor was made: a function, its arguments, and the sites that they depend on."""

    __slots__ = ("arguments", "born", "function", "inputs", "leaves", "made", "owner", "part", "value")

    def __init__(
        self, function: Any, arguments: Any, inputs: list[Any], part: int | None, leaves: frozenset[str], born: int
    ) -> None:
        self.function, self.arguments, self.inputs, self.part, self.leaves = function, arguments, inputs, part, leaves
        self.owner: object = None
        self.born = born  # when the tensor that it stands for is right; that is not held, so that memory is given back
        self.made, self.value = -1, NOTHING


Entry = Leaf | Recipe

# Questions on shape and kind, which are answered by a tensor that is out of date as well as by any.
_TIMELESS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad")),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.ndimension, Tensor.is_floating_point, Tensor.is_complex),
}


Seen = dict[int, Entry | None]  # the tensors of a call by identity, with what is known of them


def _exchanged(value: Any, tensor: Callable[[Tensor, Seen], Any] | None, seen: Seen) -> Any:
    """Arguments with each tensor exchanged; without a function, each entry for its value."""
    if tensor is not None and isinstance(value, Tensor):
        return tensor(value, seen)
    if tensor is None and isinstance(value, Leaf | Recipe):
        return value.value
    if type(value) is tuple or type(value) is list:
        return type(value)([_exchanged(v, tensor, seen) for v in value])
    if type(value) is dict:
        return {k: _exchanged(v, tensor, seen) for k, v in value.items()}
    return value


class Lineage(TorchFunctionMode):
    """Keeps the recipes of all that is computed from leaves, and has old values made again before they are used. A
    tensor's entry stands in an attribute of the tensor: it goes with it, and is read faster than a dictionary is."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Leaf] = {}
        self.clock = 0
        self.drawing = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TIMELESS:
            return func(*args, **kwargs)
        seen: Seen = {}
        remembered = _exchanged((args, kwargs), self._entry, seen)
        known = [e for e in seen.values() if e is not None]
        if not known or func.__name__ == "custom_function_call":
            return func(*args, **kwargs)
        name: str = func.__name__
        if (name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))) and not self.drawing:
            raise RuntimeError(
                f"operation {name} writes into a tensor, with values of latent sites: particles that change their "
                "ancestors need it out of place (torch.stack, torch.where, x + y)"
            )
        if any(e.born != self.clock for e in known):
            seen = {}
            args, kwargs = _exchanged((args, kwargs), self._present, seen)
        result = func(*args, **kwargs)
        leaves = known[0].leaves if len(known) == 1 else frozenset().union(*(e.leaves for e in known))
        several = isinstance(result, (tuple, list))
        for i, part in enumerate(result) if several else [(None, result)]:
            if id(part) in seen:  # handed through as it was, say by broadcast_tensors
                if (entry := seen[id(part)]) is not None:
                    self._note(part, entry)
            elif isinstance(part, Tensor):
                self._note(part, Recipe(func, remembered, known, i, leaves, self.clock))
        return result

    def _note(self, tensor: Tensor, entry: Entry) -> None:
        entry.owner = self
        tensor._entry = entry  # type: ignore[attr-defined]

    def entry(self, tensor: Tensor) -> Entry | None:
        """What is known of a tensor; None where it depends on no site."""
        entry = getattr(tensor, "_entry", None)
        return entry if entry is not None and entry.owner is self else None

    def _entry(self, tensor: Tensor, seen: Seen) -> Any:
        entry = seen[id(tensor)] = self.entry(tensor)
        return tensor if entry is None else entry

    def _present(self, tensor: Tensor, seen: Seen) -> Tensor:
        entry = self.entry(tensor)
        if entry is not None and entry.born != self.clock:
            tensor = self.now(entry)
        seen[id(tensor)] = entry
        return tensor

    def plant(self, tensor: Tensor, leaf: Leaf) -> None:
        """From now on this tensor stands for the leaf."""
        leaf.born = leaf.made = self.clock
        leaf.value = tensor
        self._note(tensor, leaf)

    def now(self, entry: Entry) -> Tensor:
        """What the entry's tensor is with the leaves as they stand now. Without recursion over a long past."""
        stack = [entry]
        while stack:
            top = stack[-1]
            if top.made == self.clock:
                stack.pop()
            elif isinstance(top, Leaf):
                top.made, top.value = self.clock, top.read()
                stack.pop()
            else:
                old = [e for e in top.inputs if e.made != self.clock]
                if old:
                    stack.extend(old)
                    continue
                args, kwargs = _exchanged(top.arguments, None, {})
                result = top.function(*args, **kwargs)
                top.made, top.value = self.clock, result if top.part is None else result[top.part]
                stack.pop()
        return entry.value
