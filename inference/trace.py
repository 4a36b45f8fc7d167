"""Recording which tensor operations a function runs.

Below autograd and vmap every operation passes one place; there it is written down, gradients included. The values are
real, so that nothing has to be simulated, and recording costs little more than one run of the function.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten


class TraceError(Exception):
    """The function cannot be written down as a list of operations; the message says why."""


@dataclass
class Traced:
    """A graph, and the tensors that it reads by name: constants and parameters."""

    graph: Graph
    tensors: dict[str, Tensor]

    def constant(self, tensor: Tensor) -> str:
        """The name under which a tensor is read."""
        name = f"constant_{len(self.tensors)}"
        self.tensors[name] = tensor
        return name

    def module(self) -> GraphModule:
        """The graph as something to call."""
        root = torch.nn.Module()
        for name, tensor in self.tensors.items():
            if isinstance(tensor, torch.nn.Parameter):
                root.register_parameter(name, tensor)
            else:
                root.register_buffer(name, tensor, persistent=False)
        return GraphModule(root, self.graph)


def trace(
    function: Callable[..., Any],
    args: Sequence[Tensor],
    moving: Sequence[Tensor] = (),
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    limit: int | None = None,
) -> Traced:
    """The operations that function(*args) runs, as a graph of the same arguments and results.

    moving          tensors that the function reads and that change between calls; all others it reads are constants
    decompositions  operation -> how to write it by others
    limit           how many operations are too many: `TooLongError`
    Every node has a tensor without memory in `meta["val"]`. Raises `TraceError` where a value that depends on the
    arguments decides what runs.
    """
    recorder = _Recorder(moving, decompositions or {}, limit)
    inputs = [a.detach().clone() for a in args]
    for i, a in enumerate(inputs):
        node = recorder.traced.graph.placeholder(f"arg_{i}")
        recorder.known[a] = recorder.add(node, a, live=True)
    with recorder:
        results = function(*inputs)
    outputs = results if isinstance(results, (tuple, list)) else (results,)
    recorder.traced.graph.output(tuple(recorder.node(r) for r in outputs))
    return recorder.traced


class TooLongError(TraceError):
    """The function runs more operations than are worth compiling."""


class _Recorder(TorchDispatchMode):
    def __init__(
        self, moving: Sequence[Tensor], decompositions: Mapping[Any, Callable[..., Any]], limit: int | None
    ) -> None:
        super().__init__()
        self.left = limit if limit is not None else sys.maxsize
        self.traced = Traced(Graph(), {})
        self.known = WeakTensorKeyDictionary()  # tensor -> the node that made it
        self.live: set[Node] = set()  # nodes that depend on arguments, moving tensors or random numbers
        self.moving = {id(t) for t in moving}
        self.decompositions = decompositions

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its answer True makes torch import its own compiler, for a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            write = self.decompositions.get(func, func.decompose)  # torch's own where it is made of others
            result = write(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self.left -= 1
        if self.left < 0:
            raise TooLongError("too many operations, as of a long loop")
        result = func(*args, **kwargs)
        tensors = [r for r in _flat(result) if isinstance(r, Tensor)]
        node_args, node_kwargs = _each(self.node, args), {k: _each(self.node, v) for k, v in kwargs.items()}
        inputs = [n for n in _flat((node_args, list(node_kwargs.values()))) if isinstance(n, Node)]
        live = any(n in self.live for n in inputs) or torch.Tag.nondeterministic_seeded in func.tags
        if not tensors:
            if live and func is not aten._linalg_check_errors.default:
                raise TraceError("its operations depend on values")
            if func is not aten._linalg_check_errors.default:
                return result
        target = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        node = self.traced.graph.call_function(target, node_args, node_kwargs)
        if isinstance(result, Tensor):
            self.known[result] = self.add(node, result, live)
        elif isinstance(result, (tuple, list)):
            self.add(node, result, live)
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    item = self.traced.graph.call_function(operator.getitem, (node, i))
                    self.known[part] = self.add(item, part, live)
        return result

    def add(self, node: Node, value: Any, live: bool) -> Node:
        node.meta["val"] = _each(_like, value)
        if live:
            self.live.add(node)
        return node

    def node(self, value: Any) -> Any:
        """What stands for a value in the graph: the node that made a tensor, or one that reads it where it lives."""
        if not isinstance(value, Tensor):
            return value
        if value not in self.known:
            name = self.traced.constant(value)  # kept there, so that none is taken for another
            self.known[value] = self.add(self.traced.graph.get_attr(name), value, id(value) in self.moving)
        return self.known[value]


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of each part of an operation's arguments or results, which are nested in tuples and lists alone."""
    if not isinstance(value, (tuple, list)):
        return function(value)
    parts = [_each(function, part) for part in value]
    return parts if isinstance(value, list) else tuple(parts)


def _flat(value: Any) -> list[Any]:
    return [v for part in value for v in _flat(part)] if isinstance(value, (tuple, list)) else [value]
