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

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .problem import ProblemError
from .rewrites import draws_apart, fold_constants, without_writes
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
        fold_constants(traced, moving)
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
        entangled = without_writes(graph.graph)
        with _own_randomness(examples):
            fold_constants(graph, moving)
            draws = draws_apart(graph)
            if entangled or not lowered(graph.graph):
                module = graph.module()
                inputs = [*examples[0], *[draw() for draw in draws]]
                with torch.no_grad():
                    pure = torch.func.functionalize(module) if entangled else module.forward
                    graph = trace(pure, inputs, moving, decompositions())
                fold_constants(graph, moving)
        if fault := without_writes(graph.graph):
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
    with _own_randomness(examples):
        found = [_compared(function, other, args) for args in examples]
        for sign in (-1.0, 1.0, 5.0):
            with _moved(moving, sign):
                found.append(_compared(function, other, examples[0], may_fail=True))
    made = [how for how in found if how is not None]
    return all(how != APART for how in made) and 2 * made.count(TIGHT) > len(made)


TIGHT, LOOSE, APART = range(3)
LIMITS = {torch.float64: (1e-7, 1e-7), torch.float32: (1e-4, 3e-2)}  # tight and loose; others must be equal


def _compared(function: Function, other: Any, args: tuple[Tensor, ...], may_fail: bool = False) -> int | None:
    """How far apart the answers are, random numbers included. None where the program fails and may: there is nothing to
    compare."""
    outputs = []
    for run in (function, other):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                outputs.append(run(*args))
        except Exception:
            return None if may_fail and not outputs else APART
    return max((_distance(a, b) for a, b in zip(*outputs, strict=True)), default=TIGHT)


def _distance(expected: Tensor, actual: Tensor) -> int:
    """Relative to the largest number expected."""
    same = expected.shape == actual.shape and expected.dtype == actual.dtype
    finite = expected.isfinite()
    if not same or not torch.equal(finite, actual.isfinite()):
        return APART
    x, y = expected[finite].double(), actual[finite].double()
    distance = float((x - y).abs().max() / (1 + x.abs().max())) if x.numel() else 0.0
    tight, loose = LIMITS.get(expected.dtype, LIMITS[torch.float64])
    return TIGHT if distance <= tight else LOOSE if distance <= loose else APART
