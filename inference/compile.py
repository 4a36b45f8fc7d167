"""From a Python function of tensors to a graph of tensor operations.

A Pyro program costs Python at every site; traced once, what remains are the tensor operations themselves, gradients
included. The graph reads the program's parameters where they live, so a step of an optimiser is seen by the next call.
What is traced is compared with the program itself before it is used; where they differ (control flow that depends on
values), or where tracing fails, the program runs as it is: the same answer, only slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[..., tuple[Tensor, ...]]


def traced(function: Function, examples: list[tuple[Tensor, ...]], moving: list[Tensor]) -> tuple[Function, str]:
    """The function as a graph, and ''; or the function itself, and why.

    function  tensors -> a tuple of tensors, without gradients attached; it may draw random numbers
    examples  arguments of the shapes to come; the first is traced, and all are compared, equal up to rounding
    moving    tensors that the function reads and that change between calls (parameters); all else is constant
    """
    devices = {t.device.index or 0 for args in examples for t in args if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            graph = make_fx(lambda *args: function(*args))(*examples[0])  # a bound method would count its self
        except Exception as error:
            return function, f"not traced: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
        _fold_constants(graph, moving)
        for args in examples:
            if not _agree(function, graph, args):
                return function, "not traced: its operations depend on values"

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return graph.forward(*args)

    return run, ""


def _fold_constants(graph: torch.fx.GraphModule, moving: list[Tensor]) -> None:
    """Compute once what depends on no argument, no moving tensor and no random number."""
    live = {id(t) for t in moving}
    known: dict[torch.fx.Node, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = getattr(graph, node.target)
            if isinstance(value, Tensor) and id(value) not in live:
                known[node] = value
        elif node.op == "call_function" and all(i in known for i in node.all_input_nodes) and _pure(node):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda i: known[i])
            value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                known[node] = value
    for node, value in known.items():
        if node.op != "get_attr" and any(user not in known for user in node.users):
            name = f"_folded_{node.name}"
            graph.register_buffer(name, value.detach().clone())
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _pure(node: torch.fx.Node) -> bool:
    """Whether the node draws nothing, writes nothing, and is written to by nothing."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    users: list[Any] = [user.target for user in node.users]
    return not any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in (target, *users))


def _agree(function: Function, graph: Any, args: tuple[Tensor, ...]) -> bool:
    outputs = []
    for run in (function, graph):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(run(*args))
    return all(
        a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True))
        for a, b in zip(*outputs, strict=True)
    )
