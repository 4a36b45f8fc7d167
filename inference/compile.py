"""From a Python function of tensors to the fastest code that gives its answers.

A Pyro program costs Python at every site. Traced once, what remains are the tensor operations themselves, gradients
included; written as C and compiled, they cost what their arithmetic costs. Parameters are read where they live, so a
step of an optimiser is seen by the next call. Four back ends, the first that serves:

    native   machine code, which a sampler outside Python can call through a pointer (float arithmetic on the CPU)
    graph    the traced operations, one call of torch each
    eager    the program itself
    inductor torch's own compiler; only where it is asked for, since it takes tens of seconds to start

Every back end is compared with the program, at other arguments and other parameters, before it is used. Where one
differs (control flow that depends on values) or cannot be made, the next serves: the same answer, only slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from .problem import ProblemError
from .trace import TooLongError, Traced, TraceError, trace

if TYPE_CHECKING:
    from .native.function import NativeFunction, Trainer

Function = Callable[..., tuple[Tensor, ...]]
LARGEST_NATIVE = 30_000  # operations; a C compiler takes a second for a few thousand
LARGEST_GRAPH = 60_000  # what is longer runs as it is: a graph of it gains little, and takes a minute
BACKENDS = ("auto", "native", "graph", "eager", "inductor")


@dataclass(frozen=True)
class Compiled:
    """A function of tensors in its compiled form.

    backend  which one serves: 'native', 'inductor', 'graph' or 'eager'
    why      why no faster one does, in one line; '' where there is nothing to say
    seconds  what tracing and compiling took
    cached   whether the machine code was there from an earlier run
    """

    run: Function
    backend: str
    why: str = ""
    seconds: float = 0.0
    cached: bool = False
    native: _Native | None = field(default=None, repr=False)

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        return self.run(*args)

    def pointer(self) -> tuple[int, int] | None:
        """Addresses of a C function and its user data, for u -> (value, gradient) in float64; None elsewhere.

        `int64_t f(uint64_t dim, double* u, double* gradient, double* value, void* user)`; the value is summed over
        the batch. It answers 0, or a positive number where a result is not finite. Safe from several threads; valid
        while this object lives and the parameters stay where they are.
        """
        return self.native.function.pointer() if self.native and not self.native.draws else None

    def trainer(self, parameters: list[Tensor], settings: tuple[float, float, float, float]) -> BlockTrainer | None:
        """Adam in machine code on these parameters, for a function that answers (loss, gradient of each); None
        elsewhere. settings: learning rate, decay of the means, decay of the squares, epsilon."""
        if self.native is None or not self.native.function.trains(parameters):
            return None
        from .native.function import Trainer

        return BlockTrainer(Trainer(self.native.function, parameters, settings), self.native)


@dataclass(frozen=True)
class BlockTrainer:
    """Adam, many steps a call; random numbers are drawn by torch, step by step."""

    adam: Trainer
    native: _Native

    def run(self, rows: Iterable[tuple[Tensor, ...]]) -> Tensor:
        """One step for each row of arguments; the loss at the start of each, (steps,). One that is not finite ends
        the run before it moves anything, and is the last."""
        from .native.function import FaultError

        filled = [(*row, *(draw() for draw in self.native.draws)) for row in rows]
        try:
            return self.adam.run([torch.stack(column) for column in zip(*filled, strict=True)], len(filled))
        except FaultError:
            for row in filled:  # one of these raises what the program raises here
                self.native.program(*row[: len(row) - len(self.native.draws)])
            raise


def compiled(
    function: Function, examples: list[tuple[Tensor, ...]], moving: list[Tensor], *, backend: str = "auto"
) -> Compiled:
    """The function by the fastest back end that agrees with it, or by the one that is asked for.

    function  tensors -> a tuple of tensors, without gradients attached; it may draw random numbers
    examples  arguments of the shapes to come; the first is traced, and all are compared, equal up to rounding
    moving    tensors that the function reads and that change between calls (parameters); all else is constant
    Raises `ProblemError` on an unknown back end.
    """
    check_backend(backend)
    start = time.perf_counter()
    if backend == "eager":
        return Compiled(function, "eager")
    native, reason = None, ""
    if backend in ("auto", "native"):
        native, reason = _native(function, examples, moving)
    if native is not None:
        seconds = time.perf_counter() - start
        return Compiled(native, "native", "", seconds, native.function.cached, native)
    run, why = traced(function, examples, moving)
    name = "graph" if run is not function else "eager"
    if backend == "inductor" and name == "graph":
        faster = _without_gradients(
            torch.compile(_trace(function, examples, moving, LARGEST_GRAPH).module(), dynamic=False)
        )
        if _agrees(function, faster, examples, moving):
            run, name = faster, "inductor"
        else:
            why = "not compiled: inductor's code disagrees with the program"
    return Compiled(run, name, why or reason, time.perf_counter() - start)


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ProblemError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}.")


def traced(function: Function, examples: list[tuple[Tensor, ...]], moving: list[Tensor]) -> tuple[Function, str]:
    """The function as a graph that agrees with it, and ''; or the function itself, and why. Arguments as in
    `compiled`."""
    try:
        run = _without_gradients(_trace(function, examples, moving, LARGEST_GRAPH).module().forward)
    except Exception as error:
        return function, f"not traced: {_first_line(error)}"
    if not _agrees(function, run, examples, moving):
        return function, "not traced: its operations depend on values"
    return run, ""


def _without_gradients(function: Function) -> Function:
    def run(*args: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(function(*args))

    return run


def _trace(function: Function, examples: list[tuple[Tensor, ...]], moving: list[Tensor], limit: int) -> Traced:
    with _own_randomness(examples):
        traced = trace(function, examples[0], moving, limit=limit)
        _fold_constants(traced, moving)
    return traced


class _Native:
    """Machine code, with what it cannot do itself around it: random numbers are drawn by torch in the program's
    order, and where it meets a fault the program runs, to raise what it raises."""

    def __init__(self, program: Function, function: NativeFunction, draws: list[Callable[[], Tensor]]) -> None:
        self.program, self.function, self.draws = program, function, draws

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        from .native.function import FaultError

        noise = [draw() for draw in self.draws]
        try:
            return self.function(*args, *noise)
        except FaultError:
            return self.program(*args)


def _native(function: Function, examples: list[tuple[Tensor, ...]], moving: list[Tensor]) -> tuple[_Native | None, str]:
    """The function as machine code that agrees with it, and ''; or None, and why."""
    from .native.function import NativeFunction, decompositions, lowered
    from .native.lower import UnsupportedError
    from .native.toolchain import CompileError

    if any(t.device.type != "cpu" for t in [*examples[0], *moving]):
        return None, "not compiled: native code runs on the CPU only"
    try:
        graph = _trace(function, examples, moving, limit=LARGEST_NATIVE)
        entangled = _without_writes(graph.graph)
        with _own_randomness(examples):
            _fold_constants(graph, moving)
            draws = _draws_apart(graph)
            if entangled or not lowered(graph.graph):
                module = graph.module()
                inputs = [*examples[0], *[draw() for draw in draws]]
                with torch.no_grad():
                    pure = torch.func.functionalize(module) if entangled else module.forward
                    graph = trace(pure, inputs, moving, decompositions())
                _fold_constants(graph, moving)
        if fault := _without_writes(graph.graph):
            return None, f"not compiled: {fault} writes to memory that others read"
        native = _Native(function, NativeFunction(graph, moving), draws)
    except TooLongError as error:
        return None, f"not compiled: {error}"
    except TraceError:
        return None, ""  # said where the graph is made
    except (UnsupportedError, CompileError) as error:
        return None, f"not compiled: {_first_line(error)}"
    except Exception as error:  # whatever torch could not do here must not cost the answer
        return None, f"not compiled: {type(error).__name__}: {_first_line(error)}"
    if not _agrees(function, native, examples, moving):
        return None, "not compiled: native code disagrees with the program"
    return native, ""


def _draws_apart(traced: Traced) -> list[Callable[[], Tensor]]:
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


def _without_writes(graph: torch.fx.Graph) -> str:
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


PURE = {"normal_": ("normal_functional", "default"), "bernoulli_": ("bernoulli", "p")}


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


def _fold_constants(traced: Traced, moving: list[Tensor]) -> None:
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


@contextmanager
def _own_randomness(examples: list[tuple[Tensor, ...]]) -> Iterator[None]:
    """Inside, random numbers are drawn without moving the generators that the caller sees."""
    devices = {t.device.index or 0 for args in examples for t in args if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _agrees(function: Function, other: Any, examples: list[tuple[Tensor, ...]], moving: list[Tensor]) -> bool:
    """Whether both answer alike at all examples, and at the first with the parameters moved.

    Alike: equal up to rounding. In float32 rounding now and then takes the other side of a kink (a ReLU), so there a
    minority of the comparisons may be loose.
    """
    distances = []
    with _own_randomness(examples):
        for args in examples:
            distances += _distances(function, other, args)
        for sign in (-1.0, 1.0, 5.0):
            with _moved(moving, sign):
                distances += _distances(function, other, examples[0], may_fail=True)
    tight = sum(all(d <= LIMITS[dtype][0] for dtype, d in each) for each in distances)
    loose = all(d <= LIMITS[dtype][1] for each in distances for dtype, d in each)
    return loose and 2 * tight > len(distances)


LIMITS = {torch.float64: (1e-7, 1e-7), torch.float32: (1e-4, 3e-2)}  # others must be equal


def _distances(
    function: Function, other: Any, args: tuple[Tensor, ...], may_fail: bool = False
) -> list[list[tuple[torch.dtype, float]]]:
    """How far apart the answers are, random numbers included, each relative to the largest number in it. Where the
    program fails and may, there is nothing to compare."""
    outputs = []
    for run in (function, other):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                outputs.append(run(*args))
        except Exception:
            return [] if may_fail and not outputs else [[(torch.float64, math.inf)]]
    return [[_distance(a, b) for a, b in zip(*outputs, strict=True)]]


def _distance(expected: Tensor, actual: Tensor) -> tuple[torch.dtype, float]:
    dtype = expected.dtype if expected.dtype in LIMITS else torch.float64
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return dtype, math.inf
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return dtype, math.inf
    x, y = expected[finite].double(), actual[finite].double()
    return dtype, float((x - y).abs().max() / (1 + x.abs().max())) if x.numel() else 0.0
