"""A compiled graph as a Python function of tensors, and as a C pointer."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..trace import Traced
from . import arithmetic, indexing, matrices, reductions  # noqa: F401  (they register their operations)
from .emit import source
from .lower import COPIES, FILLS, OPERATIONS, VIEWS, Lowering
from .pointwise import COMPARE, FLOAT, SAME
from .toolchain import load, routine


@functools.cache
def decompositions() -> dict[Any, Any]:
    """How torch writes an operation that has no lowering here by ones that have."""
    import torch._decomp

    table: dict[Any, Any] = {**torch._decomp._core_aten_decompositions_post_autograd()}
    for op, written in torch._decomp.decomposition_table.items():
        if written.__module__ == "torch._decomp.decompositions":  # by ATen itself; others are by primitives
            table.setdefault(op, written)
    return {op: f for op, f in table.items() if isinstance(op, torch._ops.OpOverload) and not _is_lowered(op)}


def lowered(graph: torch.fx.Graph) -> bool:
    """Whether all its operations have a lowering."""
    return all(_is_lowered(n.target) for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload))


def _is_lowered(operation: torch._ops.OpOverload) -> bool:
    name = operation._schema.name.removeprefix("aten::")
    return any(name in table for table in (OPERATIONS, VIEWS, COPIES, FILLS, FLOAT, SAME, COMPARE))


class FaultError(Exception):
    """The code met something that the graph would have raised for (a matrix that is not positive definite ...)."""


class NativeFunction:
    """Tensors -> tuple of tensors, through machine code. Constants and parameters are read where they live.

    Thread-safe: working memory is per thread, and the interpreter's lock is not held during a call.
    """

    def __init__(self, graph: Traced, moving: Sequence[Tensor]) -> None:
        """Raises `UnsupportedError` on an operation without lowering, `CompileError` where compiling fails."""
        program = Lowering(graph, moving).lower()
        self.text, routines = source(program)
        self._library, self.cached = load(self.text)
        self._call = self._library.pyrometer_call
        self._call.restype = ctypes.c_int64
        self._inputs = [(w.shape, w.dtype) for w in program.arguments]
        floats = [w.dtype for w in (*program.arguments, *program.results)]
        self._samples = len(program.arguments) == 1 and floats == [torch.float64] * 3
        self._outputs = [(w.shape, w.dtype) for w in program.results]
        self._constants, self._buffers = program.constants, program.fixed
        identities = {id(t) for t in moving}
        self._moving = [(i, t) for i, t in enumerate(program.constants) if id(t) in identities]
        addresses = [t.data_ptr() for t in program.constants] + [routine(name) for name in routines]
        self._fixed = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        self._args = ctypes.c_void_p * max(1, len(self._inputs))
        self._results = ctypes.c_void_p * max(1, len(self._outputs))

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        if [(a.shape, a.dtype) for a in args] != self._inputs:
            raise FaultError("an argument of another shape or type")
        inputs = [a.contiguous() for a in args]
        outputs = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in self._outputs)
        self.refresh()
        fault = self._call(
            self._args(*[t.data_ptr() for t in inputs]), self._results(*[t.data_ptr() for t in outputs]), self._fixed
        )
        if fault:
            raise FaultError(fault)
        return outputs

    def trains(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a `Trainer` can move these: the function answers (loss, gradient of each), all in one dtype."""
        outputs = [((), parameters[0].dtype), *((tuple(t.shape), parameters[0].dtype) for t in parameters)]
        return self._outputs == outputs and all(t.is_contiguous() for t in parameters)

    def refresh(self) -> None:
        """Read parameters where they are now. Raises `FaultError` where one is not the array that it was."""
        for index, tensor in self._moving:
            buffer = self._buffers[index]
            if tensor.dtype != buffer.dtype or tensor.numel() != buffer.size or not tensor.is_contiguous():
                raise FaultError(f"a parameter is now {tuple(tensor.shape)} of {tensor.dtype}")
            self._fixed[index] = tensor.data_ptr()

    def pointer(self) -> tuple[int, int] | None:
        """The addresses of a C function and of its user data, for a function u -> (values, gradient) in float64.

        `int64_t f(uint64_t dim, double* x, double* gradient, double* value, void* user)` answers 0, or a positive
        number where value or gradient is not finite. Valid while this object lives and parameters stay.
        """
        if not self._samples:
            return None
        self.refresh()
        address: Any = ctypes.cast(self._library.pyrometer_log_density, ctypes.c_void_p).value
        return address, ctypes.addressof(self._fixed)


class Trainer:
    """Many steps of Adam in one call, each with the loss and its gradient by machine code; parameters move in place.

    parameters  what the gradients are of, in order; one that the loss does not read stays where it is
    settings    learning rate, decay of the means, decay of the squares, epsilon
    """

    def __init__(self, function: NativeFunction, parameters: Sequence[Tensor], settings: Sequence[float]) -> None:
        places = {id(t): i for i, t in function._moving}
        read = [(places[id(t)], p + 1, t) for p, t in enumerate(parameters) if id(t) in places]
        self._function, self._done = function, 0
        self._results = [torch.zeros(shape, dtype=dtype) for shape, dtype in function._outputs]
        self._moments = [[torch.zeros_like(t) for _, _, t in read] for _ in range(2)]
        self._tables = [
            (ctypes.c_int64 * max(1, len(read)))(*numbers)
            for numbers in ([i for i, _, _ in read], [p for _, p, _ in read], [t.numel() for _, _, t in read])
        ]
        self._count, self._settings = len(read), (ctypes.c_double * 4)(*settings)
        self._call = function._library.pyrometer_adam
        self._call.restype = ctypes.c_int64

    def run(self, arguments: Sequence[Tensor], steps: int) -> Tensor:
        """Take steps; arguments are stacked, (steps, ...) each. The loss at the start of each step, (steps,); where
        one is not finite the steps end before it is used, and it is the last. Raises `FaultError`."""
        function = self._function
        rows = [a.contiguous() for a in arguments]
        strides = (ctypes.c_int64 * max(1, len(rows)))(*[a.stride(0) * a.element_size() for a in rows])
        losses, fault = torch.zeros(steps, dtype=torch.float64), ctypes.c_int64(0)
        function.refresh()
        taken = self._call(
            ctypes.c_int64(steps),
            ctypes.c_int64(self._done),
            function._args(*[a.data_ptr() for a in rows]),
            strides,
            _pointers(self._results),
            function._fixed,
            ctypes.c_int64(self._count),
            *self._tables,
            *[_pointers(moments) for moments in self._moments],
            self._settings,
            ctypes.c_void_p(losses.data_ptr()),
            ctypes.byref(fault),
        )
        if fault.value:
            raise FaultError(fault.value)
        self._done += taken
        return losses[: min(steps, taken + 1)]


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * max(1, len(tensors)))(*[t.data_ptr() for t in tensors])
