"""Rewriting the graph of a function: constants computed once, random numbers as arguments, no writes to memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .trace import Traced

# what returns its result in place of writing it, where that is not the name without the underscore
PURE = {"normal_": ("normal_functional", "default"), "bernoulli_": ("bernoulli", "p")}


def draws_apart(traced: Traced) -> list[Callable[[], Tensor]]:
    """Make arguments of the graph's random numbers, where none depends on its other arguments: what draws them, in
    order."""
    graph = traced.graph
    found = [n for n in graph.nodes if _draws(n)]
    if any(_mutates(n) or any(i.op != "get_attr" for i in n.all_input_nodes) for n in found):
        return []
    draws: list[Callable[[], Tensor]] = []
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    for node in found:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda i: traced.tensors[str(i.target)])
        draws.append(partial(node.target, *args, **kwargs))
        with graph.inserting_after(last) if last else graph.inserting_before(None):
            last = graph.placeholder(f"noise_{len(draws)}")
        last.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    return draws


def without_writes(graph: torch.fx.Graph) -> str:
    """Rewrite operations that write to their argument as ones that return the result; the name of one that could not
    be, since something else still reads that memory. Raises `UnsupportedError` where it is memory that outlives the
    call."""
    from .native.lower import UnsupportedError

    left = ""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _mutates(node):
            continue
        schema = _schema(node)
        name, source = schema.name.removeprefix("aten::"), node.args[0]
        pure, overload = PURE.get(name, (name.rstrip("_"), node.target._overloadname))
        twin = getattr(getattr(torch.ops.aten, pure, None), overload, None)
        aliases = _aliases(source)
        if any(alias.op in ("get_attr", "placeholder") for alias in aliases):
            raise UnsupportedError(f"{name} writes to memory that outlives the call")
        others = aliases - {node, source}
        if twin is None or any(place[user] > place[node] for other in others for user in other.users):
            left = left or name
            continue
        rest = [a for a in schema.arguments[len(node.args) :] if not a.kwarg_only and a.name not in node.kwargs]
        node.args = (*node.args, *(a.default_value for a in rest))
        node.target = twin
        source.replace_all_uses_with(node, delete_user_cb=lambda user, at=place[node]: place[user] > at)
    return left


def _aliases(node: Node) -> set[Node]:
    """The nodes that may share memory with this one."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if isinstance(n, Node) and n not in found:
            found.add(n)
            stack += [u for u in n.users if _is_view(u)]
            if _is_view(n):
                stack.append(n.args[0])  # type: ignore[arg-type]
    return found


def _is_view(node: Node) -> bool:
    if node.op != "call_function":
        return False
    schema = _schema(node)
    return schema is None or any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def fold_constants(traced: Traced, moving: list[Tensor]) -> None:
    """Compute once what depends on no argument, no moving tensor and no random number; drop what nobody reads."""
    graph, live = traced.graph, {id(t) for t in moving}
    written = {a for node in graph.nodes if _mutates(node) for i in node.all_input_nodes for a in _aliases(i)}
    known: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = traced.tensors[node.target]
            if id(value) not in live:
                known[node] = value
        elif (
            node.op == "call_function"
            and node not in written
            and not _draws(node)
            and not _mutates(node)
            and all(i in known for i in node.all_input_nodes)
        ):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda i: known[i])
            known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        if node.op != "get_attr" and isinstance(value, Tensor) and any(user not in known for user in node.users):
            with graph.inserting_before(node):
                folded = graph.get_attr(traced.constant(value.detach().clone()))
            folded.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(folded)
        elif value is None:  # a check of constants, which has passed
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _schema(node: Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _mutates(node: Node) -> bool:
    return _schema(node) is not None and _schema(node).is_mutable


def _draws(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
