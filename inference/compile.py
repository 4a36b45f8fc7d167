"""From a Python function of tensors to a graph of tensor operations.

A Pyro program costs Python at every site; traced once, what remains are the tensor operations themselves, gradients
included. The graph reads the program's parameters where they live, so a step of an optimiser is seen by the next call.
What is traced is compared with the program itself before it is used; where they differ (control flow that depends on
values), or where tracing fails, the program runs as it is: the same answer, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        agree = all(_agree(function, graph, args) for args in examples)
        for sign in (-1.0, 1.0, 5.0):
            with _moved(moving, sign):
                agree = agree and _agree(function, graph, examples[0], may_fail=True)
        if not agree:
            return function, "not traced: its operations depend on values"

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return graph.forward(*args)

    return run, ""


def _fold_constants(graph: torch.fx.GraphModule, moving: list[Tensor]) -> None:
    """Compute once what depends on no argument, no moving tensor and no random number."""
    live, written = {id(t) for t in moving}, _written(graph.graph)
    known: dict[torch.fx.Node, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = getattr(graph, node.target)
            if isinstance(value, Tensor) and id(value) not in live:
                known[node] = value
        elif (
            node.op == "call_function"
            and node not in written
            and not _draws(node)
            and not _schema(node).is_mutable
            and all(i in known for i in node.all_input_nodes)
        ):
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


def _written(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Nodes whose memory some node writes to: its arguments, and what these are views of."""
    written: set[torch.fx.Node] = set()
    stack = [i for node in graph.nodes if _schema(node) and _schema(node).is_mutable for i in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in written:
            written.add(node)
            if _schema(node) and any(r.alias_info is not None for r in _schema(node).returns):
                stack += node.all_input_nodes
    return written


def _schema(node: torch.fx.Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _draws(node: torch.fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or (torch.Tag.nondeterministic_seeded in node.target.tags)


@contextmanager
def _moved(tensors: list[Tensor], sign: float) -> Iterator[None]:
    """Inside, the tensors have other values: what the program decides by them, it may decide otherwise."""
    kept = [t.data for t in tensors]
    for t in tensors:
        if t.is_floating_point():
            t.data = sign * t.data * (1 + torch.rand_like(t.data)) + torch.randn_like(t.data) * 0.1
    try:
        yield
    finally:
        for t, value in zip(tensors, kept, strict=True):
            t.data = value


def _agree(function: Function, graph: Any, args: tuple[Tensor, ...], may_fail: bool = False) -> bool:
    """Whether both answer alike, random numbers included; a program that fails leaves nothing to compare."""
    outputs = []
    for run in (function, graph):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                outputs.append(run(*args))
        except Exception:
            return may_fail
    return all(
        a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True))
        for a, b in zip(*outputs, strict=True)
    )
