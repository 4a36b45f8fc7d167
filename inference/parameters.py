"""theta (or phi): the leaf tensors that a program's log density depends on, with names and constraints.

Pyro lets parameters live in `nn.Module`s, `PyroModule`s, `PyroParam`s, `pyro.param` and closures. All of them end
in leaf tensors of the autograd graph, so that is where they are found: nothing has to be registered with us. A run
borrows the leaves (`lend`): it may change their values, dtype and device, and gives them back as they were.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from .problem import ProblemError


@dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter: its unconstrained tensor and the constraint that its value obeys."""

    name: str
    tensor: Tensor
    constraint: Any

    def value(self) -> Tensor:
        """The constrained value, connected to the leaf."""
        return self.tensor if self.constraint is constraints.real else transform_to(self.constraint)(self.tensor)

    def set(self, value: Tensor) -> None:
        """Write a constrained value into the leaf. Raises `ProblemError` on a wrong shape or a value outside."""
        value = torch.as_tensor(value, dtype=self.tensor.dtype, device=self.tensor.device).detach()
        if value.shape != self.value().shape:
            raise ProblemError(
                f"parameter {self.name!r}: expected shape {tuple(self.value().shape)}, got {tuple(value.shape)}."
            )
        if not bool(self.constraint.check(value).all()):
            raise ProblemError(f"parameter {self.name!r}: a value lies outside {self.constraint}.")
        if self.constraint is not constraints.real:
            value = transform_to(self.constraint).inv(value)
        self.tensor.data = value.clone()


class Parameters:
    """The named leaves of one program, in a fixed order."""

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        self.by_name = dict(leaves)
        self.tensors = [leaf.tensor for leaf in leaves.values()]
        self._kept = [t.data.clone() for t in self.tensors]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    @property
    def dtype(self) -> torch.dtype | None:
        """The widest dtype among the leaves; None without leaves."""
        widest = None
        for tensor in self.tensors:
            widest = tensor.dtype if widest is None else torch.promote_types(widest, tensor.dtype)
        return widest

    def values(self) -> dict[str, Tensor]:
        """name -> constrained value: detached, copied, on the CPU."""
        with torch.no_grad():
            return {name: leaf.value().detach().cpu().clone() for name, leaf in self.by_name.items()}

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Write constrained values by name. Raises `ProblemError` on an unknown name, with the nearest one."""
        for name, value in values.items():
            if name not in self.by_name:
                near = difflib.get_close_matches(name, self.by_name, 1)
                hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(self.by_name) or 'none'}."
                raise ProblemError(f"no parameter {name!r} in the model.{hint}")
            self.by_name[name].set(value)

    def cast(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """Change what the next `lend` puts into the leaves."""
        self._kept = [value.to(dtype=dtype, device=device) for value in self._kept]

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Put this run's values into the leaves; at the end keep them here and give the owner's back."""
        owner = [(t.data, t.grad) for t in self.tensors]
        for tensor, value in zip(self.tensors, self._kept, strict=True):
            tensor.grad = None
            tensor.data = value
        try:
            yield
        finally:
            self._kept = [t.data for t in self.tensors]
            for tensor, (value, grad) in zip(self.tensors, owner, strict=True):
                tensor.grad = None
                tensor.data = value
                tensor.grad = grad


def find_parameters(outputs: list[Tensor], program: Callable[..., Any], exclude: list[Tensor]) -> Parameters:
    """The leaves that `outputs` depend on, with names as the user knows them."""
    excluded = {id(t) for t in exclude}
    found = [t for t in _graph_leaves(outputs) if id(t) not in excluded]
    state = pyro.get_param_store().get_state()
    stored = {id(t): name for name, t in state["params"].items()}
    named = _names_in_reach(program)
    leaves: dict[str, Leaf] = {}
    for i, tensor in enumerate(found):
        key = stored.get(id(tensor))
        constraint = state["constraints"].get(key, constraints.real) if key else constraints.real
        if constraint is not constraints.real and type(constraint) is type(constraints.real):
            constraint = constraints.real  # a copy that Pyro makes of the same constraint
        name = (key or named.get(id(tensor)) or f"parameter_{i}").replace("$$$", ".")
        leaves[name] = Leaf(name, tensor, constraint)
    order = {name: i for i, name in enumerate([*(n.replace("$$$", ".") for n in state["params"]), *named.values()])}
    return Parameters({name: leaves[name] for name in sorted(leaves, key=lambda n: order.get(n, len(order)))})


def _graph_leaves(outputs: list[Tensor]) -> list[Tensor]:
    seen: set[Any] = set()
    found: dict[int, Tensor] = {}
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    for t in outputs:
        if t.grad_fn is None and t.requires_grad:
            found[id(t)] = t
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    return list(found.values())


def _names_in_reach(program: Callable[..., Any]) -> dict[int, str]:
    """id -> name for parameters that the program owns (a module, a bound method) or closes over."""
    names: dict[int, str] = {}
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    if isinstance(owner, nn.Module):
        names.update({id(p): n for n, p in owner.named_parameters()})
    function = program.forward if isinstance(program, nn.Module) else program
    function = getattr(inspect.unwrap(function), "__func__", inspect.unwrap(function))
    if inspect.isfunction(function):
        scope = inspect.getclosurevars(function)
        for variable, value in {**scope.globals, **scope.nonlocals}.items():
            if isinstance(value, nn.Module):
                for n, p in value.named_parameters():
                    names.setdefault(id(p), f"{variable}.{n}")
            elif isinstance(value, Tensor) and value.requires_grad:
                names.setdefault(id(value), variable)
    return names
