"""From a graph of ATen operations to loops.

Every operation that computes becomes one loop into memory of its own; views become windows; nothing is fused here.
An operation that has no lowering raises `UnsupportedError` with its name: the caller runs the graph another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..shapes import broadcast_shapes
from ..trace import Traced
from .ir import C_TYPES, Access, Apply, Buffer, Call, Counter, Expr, Literal, Loop, Program, Window, dense
from .pointwise import COMPARE, FLOAT, SAME

VIEWS = frozenset(
    (
        "alias", "detach", "diagonal", "expand", "narrow", "permute", "reshape", "select", "slice", "split",
        "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsafe_split", "unsqueeze",
        "view", "_unsafe_view", "lift_fresh", "chunk", "movedim",
    )
)  # fmt: skip
COPIES = frozenset(
    ("clone", "contiguous", "lift_fresh_copy", "alias_copy", "detach_copy", "real", "resolve_conj", "conj_physical")
)  # fmt: skip
FILLS = {
    "full": None, "full_like": None, "new_full": None, "scalar_tensor": None, "zeros": 0, "zeros_like": 0,
    "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1, "empty": 0, "empty_like": 0, "new_empty": 0,
    "empty_strided": 0, "new_empty_strided": 0,
}  # fmt: skip
LITERALS = (0.0, 1.0, -1.0, 2.0, 0.5, -0.5)  # constants worth knowing when code is written; others are data
UNROLL = 4  # a dimension of at most this size is written out
SMALL_PRODUCT = 2048  # multiplications up to which a matrix product is a loop, not a call


class UnsupportedError(Exception):
    """This graph cannot be lowered; the message says which operation."""


@dataclass(frozen=True)
class Uniform:
    """A tensor whose elements are all one number known now."""

    value: Any
    shape: tuple[int, ...]
    dtype: torch.dtype


Value = Window | Uniform


def fix(expr: Any, loop: int, index: int) -> Any:
    """The expression with one loop's counter held at an index; later loops move up."""
    if isinstance(expr, Access):
        strides = expr.strides[:loop] + expr.strides[loop + 1 :]
        indirect = tuple((fix(e, loop, index), n, s) for e, n, s in expr.indirect)
        return Access(expr.buffer, expr.offset + expr.strides[loop] * index, strides, indirect)
    if isinstance(expr, Counter):
        if expr.loop == loop:
            return Literal(expr.start + expr.step * index, expr.dtype)
        return replace(expr, loop=expr.loop - (expr.loop > loop))
    return replace(expr, args=tuple(fix(a, loop, index) for a in expr.args)) if isinstance(expr, Apply) else expr


def moves(expr: Any, loop: int) -> bool:
    """Whether the expression depends on a loop's counter."""
    if isinstance(expr, Access):
        return expr.strides[loop] != 0 or any(moves(e, loop) for e, _, _ in expr.indirect)
    if isinstance(expr, Counter):
        return expr.loop == loop
    return isinstance(expr, Apply) and any(moves(a, loop) for a in expr.args)


class Lowering:
    """Walks a graph whose nodes carry their shapes and dtypes in `meta["val"]`."""

    def __init__(self, traced: Traced, moving: Sequence[Tensor]) -> None:
        self.traced = traced
        self.moving = {id(t) for t in moving}
        self.steps: list[Loop | Call] = []
        self.arguments: list[Window] = []
        self.fixed: list[Buffer] = []
        self.constants: list[Tensor] = []
        self.values: dict[Node, Any] = {}
        self.known: dict[Buffer, Tensor] = {}  # constant indices and masks by buffer, flat
        self._seen: dict[Any, Window] = {}
        self._within: dict[tuple[Window, int], Window] = {}
        self._shared: dict[int, tuple[Tensor, Value]] = {}
        self._count = 0

    def lower(self) -> Program:
        results: list[Window] = []
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._argument(node.meta["val"])
            elif node.op == "get_attr":
                self.values[node] = self.constant(self.traced.tensors[node.target])
            elif node.op == "call_function":
                self.values[node] = self._operation(node)
            elif node.op == "output":
                outputs = node.args[0]
                for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
                    results.append(self._result(self.values[output], len(results)))
        return Program(
            tuple(self.steps), tuple(self.arguments), tuple(results), tuple(self.fixed), tuple(self.constants)
        )

    # -- memory --------------------------------------------------------------------------------------------------

    def _argument(self, like: Tensor) -> Window:
        shape = tuple(like.shape)
        buffer = Buffer(f"a{len(self.arguments)}", "argument", _known(like.dtype), like.numel(), len(self.arguments))
        self.arguments.append(Window(buffer, shape, dense(shape)))
        return self.arguments[-1]

    def constant(self, tensor: Tensor) -> Value:
        """A tensor that the graph reads: one number known now, or memory that holds it."""
        if id(tensor) not in self._shared:
            self._shared[id(tensor)] = (tensor, self._new_constant(tensor))  # kept, so that no other gets its id
        return self._shared[id(tensor)][1]

    def _new_constant(self, tensor: Tensor) -> Value:
        shape = tuple(tensor.shape)
        if id(tensor) in self.moving:
            if not tensor.is_contiguous():
                raise UnsupportedError("a parameter that is not contiguous")
            return self.hold(tensor)
        # what is true of all of today's data must not choose the code: one datum changed would move the last digit of
        # the others
        if tensor.numel() == 1 or (tensor.numel() and tensor.dtype != torch.bool):
            one = tensor.flatten()[0]
            if bool(((tensor == one) | ((tensor != tensor) & (one != one))).all()):
                if float(one) in LITERALS or not math.isfinite(float(one)):
                    return Uniform(one.item(), shape, _known(tensor.dtype))
                return self.hold(one.reshape(()).clone()).broadcast(shape)
        return self.hold(tensor.contiguous())

    def hold(self, tensor: Tensor) -> Window:
        """The memory of a tensor, there before the code runs."""
        index = len(self.fixed)
        buffer = Buffer(f"c{index}", "fixed", _known(tensor.dtype), tensor.numel(), index)
        self.fixed.append(buffer)
        # a constant stays what it is now, whoever else lets go of its memory
        self.constants.append(tensor if id(tensor) in self.moving else tensor.detach())
        if id(tensor) not in self.moving and not tensor.is_floating_point():
            self.known[buffer] = tensor.detach().flatten().clone()  # with a storage of its own, to be strided
        return Window(buffer, tuple(tensor.shape), dense(tuple(tensor.shape)))

    def scratch(self, shape: Sequence[int], dtype: torch.dtype, rows: bool = False) -> Window:
        """New memory; `rows`: contiguous as torch has it."""
        self._count += 1
        buffer = Buffer(f"t{self._count}", "scratch", _known(dtype), math.prod(shape))
        order = sorted(range(len(shape)), key=lambda d: not rows and shape[d] > UNROLL)
        strides = [0] * len(shape)  # what is written out comes first: long dimensions stay contiguous
        for d, stride in zip(order, dense([shape[d] for d in order]), strict=True):
            strides[d] = stride
        return Window(buffer, tuple(shape), tuple(strides))

    def _result(self, value: Value, index: int) -> Window:
        shape, size = value.shape, math.prod(value.shape)
        target = Window(Buffer(f"r{index}", "result", value.dtype, size, index), shape, dense(shape))
        self.store(target, value)
        return target

    # -- building loops ------------------------------------------------------------------------------------------

    def read(self, value: Any, shape: Sequence[int], dtype: torch.dtype) -> Expr:
        """The element of a value at a point of an index space of this shape."""
        if isinstance(value, Window):
            window = value.broadcast(tuple(shape))
            return Access(window.buffer, window.offset, window.strides)
        return Literal(value.value, value.dtype) if isinstance(value, Uniform) else Literal(value, dtype)

    def add(self, loop: Loop) -> None:
        """Append a loop, dimensions of size 1 dropped."""
        sizes, expr, target, over = loop.sizes, loop.expr, loop.target, loop.over
        if 0 in sizes and not loop.reduce:
            return
        for position in reversed(range(len(sizes))):
            if sizes[position] == 1:
                expr, target = fix(expr, position, 0), fix(target, position, 0)
                over = frozenset(o - (o > position) for o in over if o != position)
                sizes = sizes[:position] + sizes[position + 1 :]
        reduce = loop.reduce if over else ""
        self.steps.append(Loop(sizes, expr, target, reduce, over, loop.adds, loop.over_base))

    def store(self, target: Window, value: Value, over_base: bool = False) -> None:
        expr = self.read(value, target.shape, target.dtype)
        place = Access(target.buffer, target.offset, target.strides)
        self.add(Loop(target.shape, expr, place, over_base=over_base))

    def compute(self, shape: Sequence[int], expr: Expr, dtype: torch.dtype) -> Window:
        """A new tensor with this expression at every point; the same expression again is the same tensor."""
        shape = tuple(shape)
        varies = tuple(n if moves(expr, d) else 1 for d, n in enumerate(shape))
        if varies != shape and 0 not in shape:  # the same along a dimension: computed once, then repeated
            return self.compute(varies, expr, dtype).broadcast(shape)
        key = (shape, expr, dtype)
        if key not in self._seen:
            window = self.scratch(shape, dtype)
            self.add(Loop(shape, expr, Access(window.buffer, 0, window.strides)))
            self._seen[key] = window
        return self._seen[key]

    def reduce(self, kind: str, shape: Sequence[int], expr: Expr, dims: Sequence[int], dtype: torch.dtype) -> Window:
        """Combine over dims; what remains, without them."""
        same = [d for d in dims if shape[d] > 1 and not moves(expr, d)]
        if same and kind != "prod" and 0 not in shape:
            count = math.prod(shape[d] for d in same)
            inside = [1 if d in same else n for d, n in enumerate(shape)]
            once = self.reduce(kind, inside, expr, dims, dtype)
            return once if kind != "sum" else self.window(self.apply("{0} * {1}", (once, count), dtype, dtype))
        inside = [n if d in dims or moves(expr, d) else 1 for d, n in enumerate(shape)]
        if inside != list(shape):
            once = self.reduce(kind, inside, expr, dims, dtype)
            return once.broadcast(tuple(n for d, n in enumerate(shape) if d not in dims))
        key = (kind, tuple(shape), expr, tuple(dims), dtype)
        if key not in self._seen:
            kept = [d for d in range(len(shape)) if d not in dims]
            window = self.scratch([shape[d] for d in kept], dtype)
            strides = [0] * len(shape)
            for d, s in zip(kept, window.strides, strict=True):
                strides[d] = s
            target = Access(window.buffer, 0, tuple(strides))
            if 0 in shape:
                self.store(window, Uniform(int(kind in ("prod", "all")), window.shape, dtype))
            else:
                self.add(Loop(tuple(shape), expr, target, kind, frozenset(dims)))
            self._seen[key] = window
        return self._seen[key]

    def apply(self, template: str, args: Sequence[Any], dtype: torch.dtype, within: torch.dtype) -> Value:
        """An elementwise operation with broadcasting."""
        shape = broadcast_shapes(*[a.shape for a in args if isinstance(a, (Window, Uniform))])
        expr = Apply(template, tuple(self.read(a, shape, within) for a in args), _known(dtype), _known(within))
        return self.compute(shape, expr, dtype)

    def constant_of(self, value: Value) -> Tensor | None:
        """The tensor behind a value, where it is a constant."""
        if isinstance(value, Uniform):
            return torch.full(value.shape, value.value, dtype=value.dtype)
        known = self.known.get(value.buffer)
        return None if known is None else known.as_strided(value.shape, value.strides, value.offset)

    def within(self, index: Value, size: int) -> tuple[Value, int]:
        """An index to read, and the size that it is held against whenever it is used; 0: what is read is a constant
        within it, in memory that nobody else writes."""
        known = self.constant_of(index)
        if known is None or not isinstance(index, Window):
            return index, size
        key = index, size
        if key not in self._within:
            self._within[key] = self.hold((known % max(size, 1)).contiguous())
        return self._within[key], 0

    def copy(self, value: Value) -> Window:
        """Contiguous memory of its own."""
        window = self.scratch(value.shape, value.dtype, rows=True)
        self.store(window, value)
        return window

    def window(self, value: Value) -> Window:
        return value if isinstance(value, Window) else self.copy(value)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        if value.dtype == dtype:
            return value
        if isinstance(value, Uniform):
            return Uniform(torch.tensor(value.value, dtype=value.dtype).to(dtype).item(), value.shape, dtype)
        if dtype == torch.bool:
            return self.apply("{0} != 0", (value,), dtype, value.dtype)
        return self.apply("{0}", (value,), dtype, dtype)

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        return replace(value, shape=tuple(shape)) if isinstance(value, Uniform) else value.broadcast(tuple(shape))

    # -- operations ----------------------------------------------------------------------------------------------

    def _operation(self, node: Node) -> Any:
        if not isinstance(node.target, torch._ops.OpOverload):
            if getattr(node.target, "__name__", "") == "getitem":
                return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
            raise UnsupportedError(str(node.target))
        schema = node.target._schema
        name = schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise UnsupportedError(f"random operation {name}")
        a = {s.name: s.default_value for s in schema.arguments if s.has_default_value()}
        a |= {s.name: v for s, v in zip(schema.arguments, node.args, strict=False)} | node.kwargs
        a = {k: torch.fx.node.map_arg(v, lambda n: self.values[n]) for k, v in a.items()}
        out: Any = node.meta.get("val")
        if isinstance(out, Tensor) and out.dtype not in C_TYPES:
            raise UnsupportedError(f"{name} in {out.dtype}")
        if name in VIEWS:
            return self._view(node, a)
        if torch.Tag.pointwise in node.target.tags and isinstance(out, Tensor):
            known = _folded(node.target, a)
            if known is not None:
                return Uniform(known.to(out.dtype).item(), tuple(out.shape), out.dtype)
        args = [v for v in a.values() if isinstance(v, (Window, Uniform, int, float, bool))]
        for table, dtype, within in (
            (FLOAT, None, None),
            (SAME, None, None),
            (COMPARE, torch.bool, "promoted"),
        ):
            if name in table and name not in OPERATIONS:
                if node.target._overloadname == "decimals":
                    raise UnsupportedError(f"{name} to decimals")
                arity = max(i for i in range(4) if f"{{{i}}}" in table[name]) + 1
                inside = _promoted(args[:arity]) if within else out.dtype if isinstance(out, Tensor) else out[0].dtype
                result = self.apply(table[name], args[:arity], dtype or inside, inside)
                return result if isinstance(out, Tensor) else (result, None)
        if name in COPIES:
            return a[schema.arguments[0].name]
        if name in FILLS:
            value = FILLS[name] if FILLS[name] is not None else a.get("fill_value", a.get("s"))
            return Uniform(value, tuple(out.shape), out.dtype)
        if name not in OPERATIONS:
            raise UnsupportedError(name)
        return OPERATIONS[name](self, a, out)

    def _view(self, node: Node, a: dict[str, Any]) -> Any:
        """Windows move as torch's own views do: asked of torch on tensors without memory."""
        source = next(v for v in a.values() if isinstance(v, (Window, Uniform)))
        out = node.meta["val"]
        if isinstance(out, Tensor) and out.dtype != source.dtype:
            raise UnsupportedError("a view in another dtype")
        if isinstance(source, Uniform):
            shapes = [tuple(o.shape) for o in out] if isinstance(out, (tuple, list)) else tuple(out.shape)
            if isinstance(shapes, list):
                return tuple(replace(source, shape=s) for s in shapes)
            return replace(source, shape=shapes)
        for window in (source, None):
            window = window or self.copy(source)
            if any(s < 0 for s in window.strides):
                continue
            memory = torch.empty(max(window.buffer.size, 1), device="meta", dtype=window.dtype)
            like = memory.as_strided(window.shape, window.strides, window.offset)
            known = {n: like if self.values[n] is source else self.values[n] for n in node.all_input_nodes}
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            try:
                views = node.target(*args, **kwargs)  # type: ignore[operator]
            except RuntimeError:
                continue  # its strides do not allow this view: once more on a copy
            if isinstance(views, Tensor):
                return _window_of(window, views)
            return tuple(_window_of(window, v) for v in views)
        raise UnsupportedError(str(node.target))


def _window_of(window: Window, view: Tensor) -> Window:
    return Window(window.buffer, tuple(view.shape), tuple(view.stride()), int(view.storage_offset()))


def _known(dtype: torch.dtype) -> torch.dtype:
    if dtype not in C_TYPES:
        raise UnsupportedError(f"tensors of {dtype}")
    return dtype


def _folded(operation: torch._ops.OpOverload, a: dict[str, Any]) -> Tensor | None:
    """The one number that an operation makes of numbers that are known, as torch computes it; else None."""
    if not any(isinstance(v, Uniform) for v in a.values()) or any(isinstance(v, Window) for v in a.values()):
        return None
    numbers = {k: torch.full((), v.value, dtype=v.dtype) if isinstance(v, Uniform) else v for k, v in a.items()}
    return operation(**numbers)


def _promoted(args: Sequence[Any]) -> torch.dtype:
    """The dtype in which torch compares these."""
    likes = [
        torch.empty(a.shape, dtype=a.dtype, device="meta") if isinstance(a, (Window, Uniform)) else a for a in args
    ]
    return torch.result_type(*likes) if len(likes) == 2 else likes[0].dtype


Operation = Callable[[Lowering, dict[str, Any], Any], Any]
OPERATIONS: dict[str, Operation] = {}


def lowers(*names: str) -> Callable[[Operation], Operation]:
    """Register the lowering of ATen operations: (lowering, arguments by name, example of the result) -> values."""

    def register(operation: Operation) -> Operation:
        for name in names:
            OPERATIONS[name] = operation
        return operation

    return register
