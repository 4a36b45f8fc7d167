"""Machine code against torch: every operation by itself, joined with others, and at the values where both may differ.

Nothing here is random but the arguments, which are seeded: a difference is a bug, never a false alarm. Answers of
float64 agree to 1e-9 of 1 + the largest input of that sum, those of float32 to 2e-5; integers, truth values, NaN and
infinities are equal.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pyrometer.inference.compile import Compiled, compiled
from pyrometer.inference.native.lower import COPIES, FILLS, OPERATIONS, VIEWS
from pyrometer.inference.native.pointwise import COMPARE, FLOAT, SAME
from pyrometer.inference.native.prelude import PRELUDE
from pyrometer.inference.native.toolchain import compiler
from pyrometer.inference.trace import trace

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler")

F64, F32, I64, I32, BOOL = torch.float64, torch.float32, torch.int64, torch.int32, torch.bool
INF, NAN = math.inf, math.nan
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _own_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYROMETER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# -- arguments: functions that draw one --------------------------------------------------------------------------------

Draw = Callable[[], Tensor]


def real(*shape: int, dtype: torch.dtype = F64) -> Draw:
    return lambda: torch.randn(shape, dtype=dtype)


def positive(*shape: int, dtype: torch.dtype = F64) -> Draw:
    return lambda: torch.rand(shape, dtype=dtype) * 3 + 0.1


def within(low: float, high: float, *shape: int, dtype: torch.dtype = F64) -> Draw:
    return lambda: torch.rand(shape, dtype=dtype) * (high - low) + low


def whole(*shape: int, low: int = -5, high: int = 6, dtype: torch.dtype = I64) -> Draw:
    return lambda: torch.randint(low, high, shape, dtype=dtype)


def truth(*shape: int) -> Draw:
    return lambda: torch.rand(shape) < 0.5


def spd(*shape: int, dtype: torch.dtype = F64) -> Draw:
    """Symmetric positive definite matrices."""

    def draw() -> Tensor:
        x = torch.randn(*shape, shape[-1], dtype=dtype)
        return x @ x.mT + torch.eye(shape[-1], dtype=dtype)

    return draw


def exactly(tensor: Tensor) -> Draw:
    return lambda: tensor.clone()


# -- one machine code for many functions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A function of tensors that answers a tensor or several, and what draws its arguments."""

    name: str
    function: Callable[..., Any]
    draws: tuple[Draw, ...] = ()
    tolerance: float | None = None

    def answers(self, args: tuple[Tensor, ...]) -> list[Tensor]:
        out = self.function(*args)
        return list(out) if isinstance(out, (tuple, list)) else [out]


def native(function: Callable[..., Any], *examples: tuple[Tensor, ...], moving: tuple[Tensor, ...] = ()) -> Compiled:
    made = compiled(function, list(examples), list(moving))
    assert made.backend == "native", made.why
    assert made.why == ""
    return made


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    if tolerance is None:
        tolerance = {F64: 1e-9, F32: 2e-5}.get(expected.dtype, 0.0)
    assert not actual.requires_grad
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def check(cases: list[Case], rounds: int = 2) -> None:
    """All in one function; where one is wrong, its name is told. Arguments of each call are drawn anew."""

    def split(flat: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        rest = iter(flat)
        return [tuple(itertools.islice(rest, len(case.draws))) for case in cases]

    def together(*flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(o for case, args in zip(cases, split(flat), strict=True) for o in case.answers(args))

    def draw() -> tuple[Tensor, ...]:
        return tuple(d() for case in cases for d in case.draws)

    made = compiled(together, [draw()], [])
    if made.backend != "native":
        alone = {
            c.name: compiled(lambda *a, c=c: tuple(c.answers(a)), [tuple(d() for d in c.draws)], []) for c in cases
        }
        pytest.fail(f"{made.why}; alone: { ({k: v.why for k, v in alone.items() if v.backend != 'native'}) }")
    for _ in range(rounds):
        args = draw()
        outputs = iter(made(*args))
        for case, own in zip(cases, split(args), strict=True):
            for expected in case.answers(own):
                close(case.name, next(outputs), expected, case.tolerance)
        assert next(outputs, None) is None


def reaching(function: Callable[..., Any], *args: Tensor) -> set[str]:
    """The names of the operations that reach the lowering."""
    targets = [n.target for n in trace(function, args).graph.nodes if n.op == "call_function"]
    return {t._schema.name.removeprefix("aten::") for t in targets if isinstance(t, torch._ops.OpOverload)}


def gradients(f: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Value and gradient of the sum of a function, by all its arguments."""

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in args]
            value = f(*leaves)
            by = [a for a in leaves if a.requires_grad]
            return (value.detach(), *torch.autograd.grad(value.sum(), by, allow_unused=True, materialize_grads=True))

    return run


# -- elementwise operations --------------------------------------------------------------------------------------------

ABOVE_ONE, POSITIVE, INSIDE = (
    {"acosh"},
    {"log", "log10", "log2", "sqrt", "rsqrt", "reciprocal"},
    {"acos", "asin", "atanh"},
)
SHIFTED = {"lgamma", "digamma", "log1p"}
SHIFTS = {"__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift"}
INTEGERS = {"bitwise_and", "bitwise_or", "bitwise_xor", *SHIFTS}
POINTWISE = sorted({*FLOAT, *SAME, *COMPARE})
SHAPES = [(), (1,), (3,), (7,), (85,), (1, 5), (4, 3), (5, 9), (2, 1, 6)]


def overload(name: str) -> Any:
    packet = getattr(aten, name)
    return getattr(packet, "Tensor" if "Tensor" in packet.overloads() else "default")


def arity(name: str) -> int:
    return sum(a.type.kind() == "TensorType" for a in overload(name)._schema.arguments)


def call(name: str) -> Callable[..., Tensor]:
    """The operation as a function of its tensors."""
    if name == "threshold_backward":
        return lambda x, y: overload(name)(x, y, 0.5)
    if name == "log_sigmoid_forward":
        return lambda x: overload(name)(x)[0]
    if name == "log_sigmoid_backward":
        return lambda x, y: overload(name)(x, y, aten.log_sigmoid_forward(y)[1])
    return overload(name)


def operands(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Draw, ...]:
    count = 2 if name == "log_sigmoid_backward" else arity(name)
    if dtype == BOOL:
        return (truth(*shape),) * count
    if not dtype.is_floating_point:
        low = 1 if name in POSITIVE | SHIFTED | ABOVE_ONE else -5
        return (whole(*shape, low=low, dtype=dtype),) * count
    if name in ABOVE_ONE:
        return (within(1.1, 4.0, *shape, dtype=dtype),)
    if name in POSITIVE | SHIFTED:
        return (positive(*shape, dtype=dtype),)
    if name in INSIDE:
        return (within(-0.95, 0.95, *shape, dtype=dtype),)
    if name == "xlogy":
        return real(*shape, dtype=dtype), positive(*shape, dtype=dtype)
    return (real(*shape, dtype=dtype),) * count


def knows(name: str, dtype: torch.dtype) -> bool:
    """Whether torch has the operation in this dtype."""
    example = [d() for d in operands(name, (2,), dtype)]
    try:
        call(name)(*example)
    except (RuntimeError, TypeError):
        return False
    return not (name in INSIDE and not dtype.is_floating_point)


@pytest.mark.parametrize("dtype", [F64, F32, I64, I32, BOOL], ids=str)
def test_elementwise_operations_in_every_dtype_and_shape(dtype):
    """Every name of the tables, in shapes that are unrolled, merged, of odd length, and without dimensions."""
    names = [n for n in POINTWISE if knows(n, dtype)]
    assert len(names) >= {F64: 57, F32: 57, I64: 40, I32: 40, BOOL: 20}[dtype]
    shapes = SHAPES if dtype in (F64, F32) else SHAPES[::3]
    for some in (shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]):
        check([Case(f"{n} {s}", call(n), operands(n, s, dtype)) for n in names for s in some])


def test_every_elementwise_operation_reaches_its_lowering():
    for name in POINTWISE:
        dtype = torch.int64 if name in SHIFTS else BOOL if name in INTEGERS else F64
        args = [d() for d in operands(name, (5,), dtype)]
        assert name in reaching(call(name), *args)


VIEWED: dict[str, Callable[[Tensor], Tensor]] = {  # of (6, 8)
    "transposed": lambda x: x.t(),
    "stepped": lambda x: x[1::2, ::3],
    "row": lambda x: x[-2],
    "column": lambda x: x[:, 3],
    "expanded": lambda x: x[:, :1].expand(6, 7),
    "new in front": lambda x: x[2].expand(5, 8),
    "flipped": lambda x: x.flip(0, 1)[1:],
    "diagonal": lambda x: x.diagonal(1),
    "windows": lambda x: x.unfold(1, 3, 2),
    "one entry": lambda x: x[3, 4],
    "nothing": lambda x: x[:0],
    "reshaped": lambda x: x.t().reshape(3, 16),
    "flipped, reshaped": lambda x: x.flip(1).reshape(48),
}


@pytest.mark.parametrize("name", ["exp", "atan2", "maximum", "lt", "sgn", "log_sigmoid_backward"])
def test_views_are_read_where_they_are(name):
    """Each view with itself, with another of its shape, and with a tensor to broadcast against."""
    many = operands(name, (6, 8), F64)
    second = torch.arange(48.0, dtype=F64).reshape(6, 8).sin()

    def through(view):
        def run(x, *rest):
            out = [call(name)(view(x), *[view(r) for r in rest])]
            if rest:
                out += [call(name)(view(x), view(second))]
                out += [call(name)(view(second), view(x)[..., :1])] if view(x).dim() else []
            return out

        return run

    check([Case(f"{name} {v}", through(view), many) for v, view in VIEWED.items()])


def test_arguments_that_are_views_are_read_as_they_are():
    made = native(lambda x, y: (x * 2 + y,), (torch.randn(4, 6, dtype=F64), torch.randn(6, dtype=F64)))
    x, y = torch.randn(6, 4, dtype=F64).t(), torch.randn(12, dtype=F64)[::2]
    close("views", made(x, y)[0], x * 2 + y)
    expanded = torch.randn(6, dtype=F64).expand(4, 6)
    close("expanded", made(expanded, y)[0], expanded * 2 + y)


SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        2.0,
        -3.0,
        2.5,
        1.5,
        -1.5,
        INF,
        -INF,
        NAN,
        1e308,
        -1e308,
        1e-300,
        -1e-300,
        20.0,
        -20.0,
        40.0,
        709.0,
        711.0,
        -745.0,
        -800.0,
        1e10,
        1e-10,
        36.0,
        170.5,
        -10.5,
        -7.0,
        1e-17,
    ],
    dtype=F64,
)
LARGEST = {  # beyond, torch's scalar and vector code differ, or what is left is subnormal
    "sin": 1e5,
    "cos": 1e5,
    "tan": 1e5,
    "log_sigmoid_backward": 80.0,
}


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_special_values(dtype):
    """Zeros, infinities, NaN, overflow and underflow: alone, and every pair of them."""
    values = SPECIAL.to(dtype)
    cases = []
    for name in POINTWISE:
        if name in INTEGERS:
            continue
        some = values[~((values.abs() > LARGEST.get(name, INF)) & values.isfinite())]
        some = some + 0 if name == "digamma" else some  # its infinity at 0 has the sign of zero, which is not kept
        left, right = torch.cartesian_prod(some, some).unbind(1)
        alone = len(operands(name, (1,), dtype)) == 1
        draws = (exactly(some),) if alone else (exactly(left.contiguous()), exactly(right.contiguous()))
        cases.append(Case(name, call(name), draws))
    check(cases, rounds=1)


SCALARS: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "rsub": torch.rsub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "add alpha": lambda x, y: torch.add(x, y, alpha=3),
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=-2),
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}
NUMBERS = [0, 1, -1, 2, 3, 0.5, -0.5, -2.0, 0.1, 7, True, INF, NAN]


def _valid(function, *args) -> bool:
    try:
        out = function(*args)
    except (RuntimeError, TypeError):
        return False
    return isinstance(out, Tensor)


@pytest.mark.parametrize("dtype", [F64, F32, I64, BOOL], ids=str)
def test_python_numbers_on_either_side(dtype):
    draw = {F64: positive(9), F32: positive(9, dtype=F32), I64: whole(9, low=1), BOOL: truth(9)}[dtype]
    cases = []
    for (name, f), n in itertools.product(SCALARS.items(), NUMBERS):
        whole_power = name == "pow" and not dtype.is_floating_point and (n not in (0, 1, 2, 3) or dtype == BOOL)
        if _valid(f, draw(), n) and not whole_power:
            cases.append(Case(f"{name} {n}", lambda x, f=f, n=n: f(x, n), (draw,)))
        if name in ("pow",) and dtype.is_floating_point:
            cases.append(Case(f"{n} {name}", lambda x, f=f, n=n: f(n, x), (draw,)))
    cases.append(Case("number first", lambda x: (2 - x * 1, 3 / (x + 2), 1.5 * x, 1 + x), (draw,)))
    if dtype == BOOL:
        cases.pop()
    assert len(cases) > 80
    check(cases)


@pytest.mark.parametrize("name", [n for n in SCALARS if n not in ("rsub",)])
def test_two_dtypes_are_brought_to_torchs_common_one(name):
    """Of all pairs, tensors without dimensions included, which do not decide; also known constants."""
    draws = {d: (lambda d=d: torch.randint(1, 4, (6,)).to(d)) for d in (F64, F32, I64, I32, BOOL)}
    f, cases = SCALARS[name], []
    for a, b in itertools.product(draws, draws):
        if name == "pow" and not torch.result_type(draws[a](), draws[b]()).is_floating_point:
            continue
        for label, cut in {"": lambda x: x, " 0-dim": lambda x: x[0]}.items():
            if _valid(f, draws[a](), draws[b]()):
                cases.append(Case(f"{a} {b}{label}", lambda x, y, cut=cut: f(x, cut(y)), (draws[a], draws[b])))
        one = torch.ones(6, dtype=b)
        if _valid(f, draws[a](), one):
            cases.append(Case(f"{a} with ones of {b}", lambda x, one=one: f(x, one), (draws[a],)))
            cases.append(Case(f"ones of {b} with {a}", lambda x, one=one: f(one, x), (draws[a],)))
    check(cases)


def test_shapes_are_broadcast():
    shapes = [(), (1,), (5,), (4, 1), (1, 5), (4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1), (0, 1, 5)]
    cases = [
        Case(f"{a} {b}", lambda x, y: (x * y - x, torch.where(x > y, x, y)), (real(*a), real(*b)))
        for a, b in itertools.product(shapes, shapes)
        if not (0 in a + b and 3 in a[:-2] + b[:-2])
    ]
    check(cases)


# -- all other operations: one case or more of each --------------------------------------------------------------------

M, V, W = real(6, 7), real(7), whole(6, 7)
PICKS = [torch.tensor(i) for i in ([3, 0, 3, -1], [0, 2, 4], [5, 4, 3, 2], [[0, 1], [2, 3]])]
places = whole(4, low=-6, high=6)
# constants that hold many values for each of 7 places: in order, in none, negative ones, and places without any
MANY = [
    torch.arange(40) * 7 // 40,
    torch.tensor([(i * i) % 7 for i in range(40)]),
    torch.tensor([(i * 5) % 7 - 7 for i in range(40)]),
    torch.tensor([3, 5] * 20),
]

# rows and columns with infinities, with NaN, with nothing but infinities, and with numbers that overflow
EXTREME = torch.tensor(
    [
        [INF, 1, 2, 3, -INF, INF, 5],
        [-INF, -INF, -INF, -INF, -INF, -INF, -INF],
        [NAN, 0, 1, 2, -INF, INF, -5],
        [1e3, 1e3, -1e3, 0, -INF, 999, 1],
        [0, -1e308, -1e3, 3, -INF, -800, 1e308],
        [-1e3, -1e3, -1001, -1e3, -INF, -999, -1e3],
    ],
    dtype=F64,
)


def over_dims(f: Callable[..., Tensor]) -> list[tuple[Any, ...]]:
    return [
        (lambda x: (f(x, 0), f(x, -1), f(x[0], 0), f(x[0, 0], 0), f(x[:, :1], 1)), M),
        (lambda x: (f(x, 1), f(x.mT, 2), f(x.exp(), 0)), real(2, 5, 3)),
        (lambda x: (f(x, 0), f(x, 1)), exactly(EXTREME)),
        (lambda x: (f(x[:0], 0), f(x.expand(3, 7), 0), f(torch.full_like(x, 0.3), 0)), V),
        (lambda x: f(x, -1), real(6, 7, dtype=F32)),
    ]


CASES: dict[str, list[tuple[Any, ...]]] = {
    # arithmetic
    "mul": [(lambda x, y: x * y, M, V)],
    "add": [(lambda x, y: x + y, M, V), (lambda x, y: x + y, truth(9), truth(9))],
    "sub": [(lambda x, y: x - y, M, V)],
    "rsub": [(lambda x: torch.rsub(x, 1.0, alpha=2), M)],
    "div": [(lambda x, y: x / y, M, positive(7)), (lambda x, y: x / y, W, whole(7, low=1))],
    "pow": [
        (torch.pow, positive(6), real(6)),
        (lambda x: (x**2, x**3, x**-1, x**-0.5, x**0.5, x**0, x**1, x**1.7), V),
        (lambda x: (x**2, x**3, x**1), whole(5)),
    ],
    "where": [
        (lambda x, y: torch.where(x > y, x, y), M, V),
        (lambda x: torch.where(x > 0, 1, 0), M),
        (lambda c, x, y: torch.where(c, x, y), truth(6, 1), M, W),
        (lambda x: torch.where(x > 0, x.log(), -INF), M),
    ],
    "clamp": [
        (lambda x: (x.clamp(-0.5, 0.5), x.clamp(0.5, -0.5), x.clamp(max=0.1), x.clamp(min=0)), M),
        (torch.clamp, M, V, V),
        (lambda x: x.clamp(-2, 2), W),
        (torch.clamp, exactly(SPECIAL), exactly(SPECIAL.flip(0)), exactly(SPECIAL.roll(5))),
    ],
    "clamp_min": [(lambda x: aten.clamp_min(x, 0.25), M), (aten.clamp_min, M, V)],
    "clamp_max": [(lambda x: aten.clamp_max(x, 0.25), M), (aten.clamp_max, M, V)],
    "_to_copy": [
        (lambda x: [x.to(d) for d in (F32, I64, I32, BOOL)], real(7)),
        (lambda x: [x.to(d) for d in (F64, F32, I32, BOOL)], whole(7)),
        (lambda x: [x.to(d) for d in (F64, I64)], truth(7)),
        (lambda x: [torch.full_like(x, 2**24 + 1.0).to(d) for d in (I64, F32, BOOL)], V),
    ],
    "copy": [(lambda x, y: aten.copy(x, y), M, V), (lambda x, y: aten.copy(x, y), truth(6, 7), V)],
    "binary_cross_entropy_with_logits": [
        (lambda x, y: functional.binary_cross_entropy_with_logits(x, y, reduction="none"), M, within(0, 1, 6, 7)),
        (
            lambda x, y: functional.binary_cross_entropy_with_logits(x, y, reduction="none"),
            exactly(SPECIAL.repeat(2)),
            exactly(torch.arange(2.0).repeat_interleave(len(SPECIAL)).double()),
        ),
    ],
    "bitwise_not": [(torch.bitwise_not, W), (torch.bitwise_not, truth(7))],
    "polygamma": [
        (lambda x: (torch.polygamma(1, x), torch.polygamma(0, x)), within(-3.9, 30, 85)),
        (lambda x: torch.polygamma(1, x), within(0.1, 9, 7, dtype=F32)),
    ],
    "tril": [(lambda x: [x.tril(k) for k in (-2, 0, 1, 9, -9)], M), (torch.tril, truth(300, 300)), (torch.tril, W)],
    "triu": [(lambda x: [x.triu(k) for k in (-2, 0, 1, 9, -9)], real(2, 6, 7)), (torch.triu, real(3, 3))],
    "masked_fill": [
        (lambda x: (x.masked_fill(x > 0, 1.5), x.masked_fill(x[:, :1] > 0, -INF)), M),
        (lambda x, v: x.masked_fill(x > 0, v[0]), M, V),
    ],
    "gelu": [(functional.gelu, V), (functional.gelu, M)],
    "gelu_backward": [(lambda x, g: aten.gelu_backward(g, x), M, M)],
    "var": [
        (lambda x: aten.var.correction(x), M),
        (lambda x: aten.var.correction(x, [1], correction=0, keepdim=True), M),
        (lambda x: aten.var.correction(x, [0, 1], correction=2), M),
    ],
    "std": [(lambda x: aten.std.correction(x, [0]), M)],
    "linalg_vector_norm": [
        (lambda x: aten.linalg_vector_norm(x), M),
        (lambda x: aten.linalg_vector_norm(x, 2, [1], True), M),
    ],
    "softplus": [
        (lambda x: (functional.softplus(x), functional.softplus(x, 2.0, 3.0)), within(-30, 30, 85)),
        (lambda x: functional.softplus(x), exactly(SPECIAL)),
    ],
    "softplus_backward": [
        (
            lambda x: gradients(lambda y: functional.softplus(y) + functional.softplus(y, 2.0, 3.0))(x),
            within(-30, 30, 85),
        )
    ],
    "select_backward": [(lambda x: [aten.select_backward(x, [7, 4], 1, i) for i in (0, 2, -1)], V)],
    "slice_backward": [
        (lambda x: aten.slice_backward(x, [9, 7], 0, 2, 8, 1), M),
        (lambda x: aten.slice_backward(x.exp(), [6, 20], 1, -20, 2**60, 3), M),
    ],
    "diagonal_backward": [(lambda x: [aten.diagonal_backward(x.exp(), [9, 9], k, 0, 1) for k in (2, -2)], V)],
    # reductions
    "sum": [
        (lambda x: (x.sum(), x.sum(0), x.sum(1), x.sum((0, -1)), x.sum(-1, keepdim=True)), M),
        (lambda x: (x.sum(), x.sum(1), x.sum(0, keepdim=True), x.sum((1, 2)), x.sum((0, 2))), real(3, 5, 9)),
        (lambda x: (x.sum(), x.sum(0), x.sum(0, dtype=F64)), truth(6, 7)),
        (lambda x: x.sum(0, dtype=F64), W),
        (lambda x: (x.sum(), x[:, :1].sum(1), x[:0].sum(0), x[:0].sum(1)), M),
        (lambda x: (x.expand(4, 7).sum(0), x[:, None].expand(7, 3).sum(1), torch.full_like(x, 0.1).sum()), V),
    ],
    "prod": [
        (lambda x: (x.prod(), x.prod(0), x.prod(-1, keepdim=True)), M),
        (lambda x: (x.prod(), x.prod(0)), W),
        (lambda x: (x[:0].prod(), x.expand(3, 7).prod(0), torch.full_like(x, 0.5).prod()), V),
    ],
    "amax": [(lambda x: (x.amax(), x.amax(0), x.amax((0, 1), keepdim=True), x[:3].amax(0)), M)],
    "amin": [(lambda x: (x.amin(), x.amin(1), x.amin((-1,), keepdim=True), x.t().amin(0)), M)],
    "any": [
        (lambda x: (x.any(), x.any(0), x.any(1, keepdim=True), x[:0].any(), x[:, :1].any(1)), truth(6, 7)),
        (lambda x: ((x * 0.1).any(), (0.1 * x)[:, :1].any(1), (x > 9).any(), torch.full_like(x, 2.0).any()), M),
    ],
    "all": [
        (lambda x: (x.all(), x.all(0), x.all(1, keepdim=True), x[:0].all(), x[:3].all(0)), truth(6, 7)),
        (lambda x: ((x * 0.1).all(), x[:, :1].all(1), (x > -9).all()), M),
    ],
    "mean": [
        (lambda x: (x.mean(), x.mean(0), x.mean((0, 1)), x.mean(-1, keepdim=True), x[:0].mean(0)), M),
        (lambda x: x.mean(0, dtype=F64), W),
        (lambda x: x.mean(1), real(6, 7, dtype=F32)),
    ],
    "max": [
        (lambda x: (x.max(), *x.max(0), *x.max(1, keepdim=True), *x.t().max(0), *x.max(1)), M),
        (lambda x: (*x.max(0), *x[:, None].max(1)), exactly(torch.tensor([1.0, 3, 3, NAN, 2, NAN, INF]))),
        (lambda x: (*x.max(0), *torch.zeros_like(x).max(0)), exactly(torch.tensor([1.0, 3, 3, 2, 3]))),
        (lambda x, y: torch.max(x, y), M, V),
    ],
    "min": [
        (lambda x: (x.min(), *x.min(0), *x.min(-1, keepdim=True), *x[:, 2:3].min(1)), M),
        (lambda x: x.min(0), exactly(torch.tensor([2.0, 1, -INF, 1, -INF]))),
        (torch.min, M, V),
    ],
    "cumsum": [
        (lambda x: [x.cumsum(d) for d in (0, 1, 2, -1)], real(3, 5, 9)),
        (lambda x: x.cumsum(1), truth(6, 7)),
        (lambda x: (x.t().cumsum(0), x.flip(1).cumsum(1), x[0, 0].cumsum(0), x[:0].cumsum(0)), M),
        (lambda x: x.cumsum(0), real(85, dtype=F32)),
    ],
    "logsumexp": [
        (lambda x: [torch.logsumexp(x, d) for d in (0, 1, (0, 1))], M),
        (lambda x: [torch.logsumexp(x, d, keepdim=True) for d in (1, (-1, 0))], real(2, 6, 1)),
        (
            lambda x: (
                torch.logsumexp(x.expand(3, 7), 0),
                torch.logsumexp(torch.full_like(x, 0.3), 0),
                x[0].logsumexp(0),
            ),
            V,
        ),
        (lambda x: (x[:0].logsumexp(0), x[:0].logsumexp(1)), M),
        (lambda x: (x.logsumexp(0), x.logsumexp(1)), exactly(EXTREME)),
        (lambda x: x.logsumexp(0), W),
    ],
    "_softmax": over_dims(torch.softmax),
    "_log_softmax": over_dims(torch.log_softmax),
    "_softmax_backward_data": [
        (lambda g, x: [aten._softmax_backward_data(g, x, d, F64) for d in (0, -1)], M, M),
        (lambda g, x: aten._softmax_backward_data(g, x.softmax(1), 1, F64), exactly(EXTREME), M),
        (lambda g: aten._softmax_backward_data(g, torch.full_like(g, 0.25), 0, F64), V),
    ],
    "_log_softmax_backward_data": [
        (lambda g, x: [aten._log_softmax_backward_data(g, x, d, F64) for d in (0, -1)], M, M),
        (lambda g, x: aten._log_softmax_backward_data(g, x.log_softmax(1), 1, F64), exactly(EXTREME), M),
        (lambda g: aten._log_softmax_backward_data(torch.ones_like(g), g, 0, F64), V),
    ],
    "cumprod": [(lambda x: [x.cumprod(d) for d in (0, 1, 2)], real(3, 5, 9)), (lambda x: x.cumprod(0), W)],
    # joining
    "cat": [
        (lambda x, y: (torch.cat([x, y[None], x[:2]]), torch.cat([x, x[:, :0], 2 * x], -1)), M, V),
        (lambda x, y: torch.cat([x, y]), V, whole(5)),
        (lambda x: torch.cat([x, x.new_zeros(0)], 1), M),
        (lambda x: torch.cat([torch.zeros_like(x), x, x.exp()]), V),
    ],
    "stack": [(lambda x, y: [torch.stack([x, y, x * y], d) for d in (0, 1, -1)], M, M)],
    "slice_scatter": [
        (lambda x, y: torch.slice_scatter(x, y, 0, 1, 3), M, real(2, 7)),
        (lambda x, y: torch.slice_scatter(x, y, 1, -3, 2**60), M, real(6, 3)),
        (lambda x, y: torch.slice_scatter(x, y.exp(), 0, 1, 6, 2), M, real(3, 7)),
        (lambda x, y: torch.slice_scatter(torch.zeros_like(x), y.exp(), 1, 0, 7, 3), M, real(6, 3)),
    ],
    "select_scatter": [
        (lambda x, y: [torch.select_scatter(x, y.exp(), 0, i) for i in (0, 2, -1)], M, V),
        (lambda x, y: torch.select_scatter(torch.ones_like(x), y, 1, 3), M, real(6)),
    ],
    "diagonal_scatter": [
        (lambda x, y: torch.diagonal_scatter(x, y.exp()), M, real(6)),
        (lambda x, y: torch.diagonal_scatter(x, y.exp(), 1, 2, 0), real(3, 2, 5), real(2, 2)),
        (lambda x, y: torch.diagonal_scatter(torch.zeros_like(x), y.exp(), -1), M, real(5)),
    ],
    "constant_pad_nd": [
        (lambda x: [functional.pad(x, p, value=1.5) for p in ((1, 2), (0, 0, 3, 1), (2, 0, 0, 1))], M),
        (lambda x: [functional.pad(x, p) for p in ((-1, -2), (-1, 2), (2, -3, -1, 4))], M),
        (lambda x: functional.pad(x, (1, 1)), W),
        (lambda x: functional.pad(x, (9, -5, 1, 1)), M),
    ],
    "flip": [
        (lambda x: (x.flip(0), x.flip(1), x.flip(0, -1), x.flip(1)[:, ::2], x[:0].flip(0)), M),
        (lambda x: (x.flip(0) + x, x.flip(0).flip(0) - x, x.flip(0)[2:].cumsum(0), x.flip(0).sum()), V),
    ],
    # indices
    "index": [
        (lambda x: [x[i] for i in PICKS], M),
        (lambda x: [x[:, i] for i in PICKS], M),
        (lambda x: (x[PICKS[0], PICKS[2]], x[PICKS[3], PICKS[3][:, :1]], x[PICKS[0]][:, PICKS[1]], x[PICKS[3], 2]), M),
        (lambda x, i: (x[i], x[:, i], x[i, i], x[i][:, None]), real(6, 6), places),
        (lambda x, i: (x[i, :, i], x[:, i], x[:, i, i], x[i, None]), real(6, 6, 6), places),
        (lambda x, i: (x[:, i, :, i], x[:, i, :, i[:1]]), real(2, 6, 3, 6), places),
        (lambda x: (x[torch.arange(6)], x[torch.arange(4, -1, -1)], x[torch.arange(0, 6, 2)[:, None], PICKS[1]]), M),
        (lambda x, i: x[i + 1, 6 - i], real(9, 7), whole(5, low=0, high=6)),
        (lambda x, i: (torch.ones_like(x)[i], x.flip(0)[i], x.t()[:, i], x[:, :1].expand(6, 3)[i]), M, places),
        (lambda x: x[torch.zeros(0, dtype=I64)], M),
        (lambda x, i: x[i.to(I32)], M, places),
    ],
    "index_put": [
        (lambda x: (x.index_put((x > 0,), x[0, 0]), x.index_put((x[:, 0] > 0,), x.sum())), M),
        (lambda x, y: x.index_put((PICKS[1],), y.exp()), M, real(3, 7)),
        (lambda x, y: x.index_put((torch.tensor([3, 0, 4]),), y), M, real(3, 7)),
        (lambda x, i, y: x.index_put((i,), y, accumulate=True), V, whole(30, low=-7, high=7), real(30)),
        (lambda x, y: x.index_put((torch.tensor([0, 0, 0]),), y, accumulate=True), V, real(3)),
        (lambda x, i, y: aten.index_put(x, [None, i], y, True), M, places, real(6, 4)),
        (lambda x, y: [x.index_put((i,), y.exp(), accumulate=True) for i in MANY], V, real(40)),
        (lambda x, y: [aten.index_put(x, [None, i], y * x[:, :1], True) for i in MANY], M, real(6, 40)),
        (lambda x, y: [x.index_put((i,), y[0], accumulate=True) for i in MANY], V, real(40)),
        (lambda x: [x.index_put((i,), torch.ones(40, dtype=x.dtype), accumulate=True) for i in MANY], V),
        (lambda x, i: torch.zeros_like(x).index_put((i, i), x[0, 0], accumulate=True), real(6, 6), places),
    ],
    "_unsafe_index_put": [
        (lambda x, i, y: aten._unsafe_index_put(x, [i], y, True), V, whole(9, low=0, high=7), real(9))
    ],
    "_index_put_impl": [(lambda x, i, y: aten._index_put_impl(x, [i], y, True), V, whole(9, low=0, high=7), real(9))],
    "gather": [
        (lambda x, i: x.gather(0, i), M, whole(4, 5, low=0)),
        (lambda x, i: x.gather(1, i), M, whole(3, 9, low=0)),
        (lambda x: (x.gather(1, torch.arange(6)[:, None]), x.gather(0, PICKS[3])), M),
        (lambda x, i: (x.gather(0, i), x[0].gather(0, i[0]), x[0].gather(0, i)), V, whole(3, low=0, high=1)),
        (lambda x, i: torch.ones_like(x).gather(0, i), V, whole(3, low=0, high=7)),
    ],
    "scatter": [
        (lambda x, y: x.scatter(0, torch.tensor([[0, 1, 2], [3, 4, 5]]), y.exp()), M, M),
        (lambda x, i: x.scatter(1, i, 2.5), M, whole(6, 1, low=0, high=7)),
        (lambda x, i, y: torch.zeros_like(x).scatter(1, i, y), M, whole(6, 1, low=0, high=7), M),
        (lambda x, y: x.scatter(0, torch.tensor([1, 3, 5]), y.exp()), V, real(3)),
    ],
    "scatter_add": [
        (lambda x, i, y: x.scatter_add(0, i, y), M, whole(9, 5, low=0), real(10, 8)),
        (lambda x, i, y: x.scatter_add(1, i, y.exp()), M, whole(4, 9, low=0), real(4, 9)),
        (lambda x, y: torch.zeros_like(x).scatter_add(0, torch.zeros(9, dtype=I64), y), V, real(9)),
        (lambda x, y: [x.scatter_add(0, i % 7, y.exp()) for i in MANY], V, real(50)),
    ],
    "index_select": [
        (lambda x, i: (x.index_select(0, i), x.index_select(1, i)), M, whole(9, low=0)),
        (lambda x: (x.index_select(-1, PICKS[1]), torch.ones_like(x).index_select(0, PICKS[1])), M),
    ],
    "index_add": [
        (lambda x, i, y: x.index_add(0, i, y), M, whole(9, low=0), real(9, 7)),
        (lambda x, y: x.index_add(1, PICKS[1], y.exp()), M, real(6, 3)),
        (lambda x, y: [x.index_add(1, i % 7, y) for i in MANY], M, real(6, 40)),
    ],
    "embedding": [(lambda i, x: functional.embedding(i, x), whole(3, 4, low=0), M)],
    # matrices
    "mm": [(torch.mm, M, real(7, 3))],
    "bmm": [(torch.bmm, real(3, 2, 5), real(3, 5, 4))],
    "mv": [(torch.mv, M, V)],
    "dot": [(torch.dot, V, V)],
    "addmm": [(torch.addmm, real(3), M, real(7, 3)), (torch.addmm, real(6, 1), M, real(7, 3))],
    "linalg_cholesky_ex": [
        (lambda x: torch.linalg.cholesky_ex(x), spd(5)),
        (lambda x: (torch.linalg.cholesky_ex(x, upper=True)[0], x), spd(2, 3, 4)),
    ],
    "_linalg_check_errors": [(torch.linalg.cholesky, spd(7)), (torch.linalg.cholesky, spd(3, 2))],
    "linalg_solve_triangular": [(lambda a, b: torch.linalg.solve_triangular(a.tril(), b, upper=False), spd(6), M)],
    "triangular_solve": [
        (lambda b, a, u=u, t=t: torch.triangular_solve(b, a, upper=u, transpose=t)[0], M, spd(6))
        for u, t in itertools.product((False, True), (False, True))
    ],
}
VIEW_CASES: dict[str, list[tuple[Any, ...]]] = {
    "alias": [(aten.alias, M)],
    "detach": [(lambda x: x.detach() + 1, M)],
    "diagonal": [(lambda x: (x.diagonal(), x.diagonal(-2), x.diagonal(1, 1, 0), x.flip(1).diagonal()), M)],
    "expand": [(lambda x: (x.expand(3, 6, 7), x[:, :1].expand(-1, 4)), M)],
    "permute": [(lambda x: x.permute(2, 0, 1), real(2, 3, 5))],
    "select": [(lambda x: (x[2], x[:, -1], x.flip(0)[1], x[1, 1]), M)],
    "slice": [(lambda x: (x[1:4], x[:, -3:], x[::2, 1::3], x.flip(1)[:, 1:], x[4:2]), M)],
    "split": [(lambda x: x.split(4, 1), M)],
    "split_with_sizes": [(lambda x: x.split([1, 0, 5]), M)],
    "unsafe_split": [(lambda x: torch.unsafe_split(x, 2), M)],
    "squeeze": [(lambda x: (x.squeeze(), x.squeeze(1), x.squeeze((1, 2)), x.squeeze(0)), real(6, 1, 1, 3))],
    "t": [(lambda x: (x.t(), x[0].t()), M)],
    "transpose": [(lambda x: x.transpose(0, -1), real(2, 3, 5))],
    "unbind": [(lambda x: x.unbind(1), M)],
    "unfold": [(lambda x: (x.unfold(0, 2, 1), x.unfold(1, 3, 3)), M)],
    "unsqueeze": [(lambda x: (x[:, None], x[..., None]), M)],
    "view": [(lambda x: (x.view(42), x.view(2, 3, 7), x.view(-1, 1), x[:, :1].view(6)), M)],
    "_unsafe_view": [(lambda x: x.t().reshape(3, 14), M)],
    "lift_fresh": [(lambda x: x + torch.tensor([1.0, 2, 3, 4, 5, 6, 7]), M)],
}


def copied(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda x: (f(x), f(x.t()) * 2)


COPY_CASES: dict[str, list[tuple[Any, ...]]] = {name: [(copied(getattr(aten, name)), M)] for name in COPIES}
FILL_CASES: dict[str, list[tuple[Any, ...]]] = {
    "full": [(lambda x: x + torch.full((7,), 0.3), V)],
    "scalar_tensor": [(lambda x: x + aten.scalar_tensor(0.3), V)],
    "zeros": [(lambda x: x + torch.zeros(7), V)],
    "ones": [(lambda x: x + torch.ones(7), V)],
    "full_like": [(lambda x: (torch.full_like(x, 0.3), torch.full_like(x, 2.7, dtype=I64)), V)],
    "new_full": [(lambda x: x.new_full((3,), INF), V)],
    "zeros_like": [(lambda x: (torch.zeros_like(x), torch.zeros_like(x, dtype=BOOL)), V)],
    "ones_like": [(lambda x: (torch.ones_like(x), torch.ones_like(x, dtype=I64) * 3), V)],
    "new_zeros": [(lambda x: x.new_zeros(2, 2), V)],
    "new_ones": [(lambda x: x.new_ones(2, 0, 2), V)],
    "empty": [(lambda x: torch.empty(7, dtype=F64).copy_(x), V)],
    "empty_like": [(lambda x: torch.empty_like(x).fill_(2.0), V)],
    "new_empty": [(lambda x: x.new_empty(0), V)],
    "empty_strided": [(lambda x: torch.empty_strided((2, 3), (1, 2), dtype=F64).fill_(2.0) + x[0], V)],
    "new_empty_strided": [(lambda x: x.new_empty_strided((2, 3), (1, 2)).copy_(x[:3]), V)],
}
TABLES = {
    "operations": (CASES, OPERATIONS),
    "views": (VIEW_CASES, VIEWS),
    "copies": (COPY_CASES, COPIES),
    "fills": (FILL_CASES, FILLS),
}


def written_by_others(name: str) -> bool:
    """Whether torch itself writes the operation by others, before any graph could hold it."""
    overloads = [getattr(getattr(aten, name), o)._schema for o in getattr(aten, name).overloads()]
    names = [f"{s.name}.{s.overload_name}".rstrip(".") for s in overloads]
    known = [n for n in names if torch._C._dispatch_has_kernel(n)]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(n, "CompositeImplicitAutograd") for n in known)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve")
@pytest.mark.parametrize("table", TABLES)
def test_every_operation_with_a_lowering_has_a_case_that_reaches_it(table):
    cases, own = TABLES[table]
    assert set(own) - set(cases) <= {name for name in own if written_by_others(name)}
    for name, several in cases.items():
        reached = set().union(*(reaching(f, *[d() for d in draws]) for f, *draws in several))
        assert name in reached or written_by_others(name) or name == "lift_fresh", name  # that becomes a copy


@pytest.mark.filterwarnings("ignore:torch.triangular_solve")
@pytest.mark.parametrize("table", TABLES)
def test_operations_answer_as_torch_does(table):
    cases = [
        Case(f"{name} {i}", f, tuple(draws))
        for name, several in TABLES[table][0].items()
        for i, (f, *draws) in enumerate(several)
    ]
    for start in range(0, len(cases), 40):
        check(cases[start : start + 40])


# -- matrices ----------------------------------------------------------------------------------------------------------


def _turned(x: Tensor, turned: bool) -> Tensor:
    return x.mT.contiguous().mT if turned else x


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_matrix_products_of_every_layout_and_size(dtype):
    """By rows, by columns, stepped, flipped, repeated; with a call of BLAS (over 2048 products) and without."""
    cases = []
    for m, k, n in [
        (2, 3, 4),
        (1, 9, 5),
        (5, 9, 1),
        (3, 1, 4),
        (0, 3, 2),
        (2, 0, 3),
        (17, 19, 13),
        (1, 70, 60),
        (40, 1, 60),
    ]:
        for s, t in itertools.product((False, True), (False, True)):
            for batch in ((), (3,)) if m * k * n < 5000 else ((),):
                left, right = (*batch, k, m) if s else (*batch, m, k), (*batch, n, k) if t else (*batch, k, n)
                f = lambda x, y, s=s, t=t: (x.mT if s else x) @ (y.mT if t else y)  # noqa: E731
                draws = (real(*left, dtype=dtype), real(*right, dtype=dtype))
                cases.append(Case(f"{m} {k} {n} {s} {t} {batch}", f, draws, 1e-4 if dtype == F32 else None))
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "stepped": lambda x: x[::2, ::2] @ x[1::2, 1::2],
        "flipped": lambda x: x.flip(0) @ x.flip(1),
        "one row repeated": lambda x: x[:1].expand(40, 40) @ x,
        "column": lambda x: x @ x[:, 3],
        "row": lambda x: x[2] @ x,
        "rows of a wider one": lambda x: x[:, :30] @ x[:30, 3:],
        "with itself": lambda x: x @ x.t() @ x,
        "one by one": lambda x: x[:1, :1] @ x[:1, :1],
        "zeros": lambda x: x @ torch.zeros_like(x),
        "ones": lambda x: x @ torch.ones_like(x),
        "sum": lambda x: torch.addmm(x[0], x, x).tanh() @ x,
        "batch of one": lambda x: x.expand(3, 40, 40) @ x[None] + x,
    }
    cases += [Case(n, f, (real(40, 40, dtype=dtype),), 1e-3 if dtype == F32 else None) for n, f in views.items()]
    check(cases)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_triangular_solves_in_all_sixteen_ways(dtype):
    ways = itertools.product(*[(False, True)] * 4, ((), (2,)))
    cases = []
    for upper, left, unit, by_columns, batch in ways:
        b = (*batch, 5, 3) if left else (*batch, 3, 5)

        def solve(a, b, upper=upper, left=left, unit=unit, by_columns=by_columns):
            a = _turned(a.triu() if upper else a.tril(), by_columns) * (0.1 if unit else 1)
            return torch.linalg.solve_triangular(a, b, upper=upper, left=left, unitriangular=unit)

        name = f"upper={upper} left={left} unit={unit} by_columns={by_columns} {batch}"
        cases.append(
            Case(name, solve, (spd(*batch, 5, dtype=dtype), real(*b, dtype=dtype)), 1e-3 if dtype == F32 else None)
        )
    turned = lambda a, b: torch.linalg.solve_triangular(a.tril().mT, b.mT, upper=True)  # noqa: E731
    one = lambda a, b: torch.linalg.solve_triangular(a.tril()[None], b.expand(3, 5, 3), upper=False)  # noqa: E731
    cases += [Case("turned", turned, (spd(5), real(2, 5))), Case("one for a batch", one, (spd(5), real(5, 3)))]
    check(cases)


def test_a_matrix_that_is_not_positive_definite_raises_what_the_program_raises():
    """And the next call, with a good one, answers again."""
    good, bad = spd(4)(), torch.diag(torch.tensor([1.0, 2.0, -1.0, 1.0], dtype=F64))
    made = native(lambda x: (torch.linalg.cholesky(x).sum(),), (good,))
    with pytest.raises(torch.linalg.LinAlgError) as expected:
        torch.linalg.cholesky(bad)
    for _ in range(2):
        with pytest.raises(torch.linalg.LinAlgError) as actual:
            made(bad)
        assert str(actual.value) == str(expected.value)
        close("again", made(good)[0], torch.linalg.cholesky(good).sum())
    batch = torch.stack([good, bad, good])
    several = native(lambda x: torch.linalg.cholesky_ex(x), (torch.stack([good] * 3),))
    assert several(batch)[1].tolist() == [0, 3, 0]


def test_an_index_out_of_range_raises_what_the_program_raises():
    """And one from the end is no fault: the program does not run for it."""
    runs = []

    def function(x, i):
        runs.append(1)
        return (x[i],)

    made = native(function, (torch.randn(5, dtype=F64), torch.tensor([0, 4])))
    x = torch.randn(5, dtype=F64)
    for wrong in (5, -6, 2**40):
        with pytest.raises(IndexError):
            made(x, torch.tensor([0, wrong]))
    runs.clear()
    assert torch.equal(made(x, torch.tensor([-5, 4]))[0], x[[0, 4]])
    assert runs == []


def test_an_index_is_held_against_its_size_outside_the_loops_that_it_does_not_move_with():
    """With a check inside, a loop is not vectorised: rows by number are what minibatches and blocks of data read."""
    made = native(lambda x, i: (x[i].exp(), x[8 - i].exp()), (real(9, 200)(), whole(40, low=0, high=9)()))
    assert made.native is not None
    text = made.native.function.text.split("static int64_t body")[1]
    inner = [loop.split("}")[0] for loop in text.split("#pragma GCC ivdep")[1:]]
    assert text.count("return 6") == 2
    assert any("exp(" in loop for loop in inner)
    assert not any("return 6" in loop for loop in inner if "exp(" in loop)


def test_numbers_that_are_known_are_not_computed_again():
    """Nor kept in memory: a factor of -1 that autograd makes joins the loop before it."""
    function = lambda x: (x.exp() * -(torch.ones_like(x) / 2),)  # noqa: E731
    made, x = native(function, (real(200)(),)), real(200)()
    assert made.native is not None
    assert "scratch +" not in made.native.function.text
    assert torch.allclose(made(x)[0], function(x)[0], rtol=1e-12)


def test_an_index_is_a_copy_that_nobody_else_writes():
    """A constant index is seen to be within once, so what its owner writes there later must not reach the code."""
    index = torch.tensor([0, 4, 1, 2] * 8)
    expected = index.clone()
    function = lambda x, y: (x[index], torch.zeros_like(x).index_add(0, index, y))  # noqa: E731
    made = native(function, (real(5)(), real(32)()))
    index.fill_(3)
    x, y = real(5)(), real(32)()
    taken, summed = made(x, y)
    assert torch.equal(taken, x[expected])
    assert torch.allclose(summed, torch.zeros_like(x).index_add(0, expected, y), rtol=1e-12)


@pytest.mark.parametrize("rows", [2, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 33])
def test_triangles_of_every_size(rows):
    """Each alone, since what a compiler does with known conditions depends on what else the loop holds."""
    for dtype, f in itertools.product((F64, F32), (torch.tril, torch.triu)):
        check([Case(f"{rows} {dtype} {f.__name__}", lambda x, f=f: f(x), (real(rows, rows, dtype=dtype),))], rounds=1)
    many = lambda x: [f(x, k) for k in (-3, -1, 0, 1, 2) for f in (torch.tril, torch.triu)]  # noqa: E731
    check([Case(f"{rows}", many, (real(rows, rows),))], rounds=1)


# -- gradients ---------------------------------------------------------------------------------------------------------


def _stick_breaking(x: Tensor) -> Tensor:
    z = torch.sigmoid(x - torch.arange(x.shape[-1], 0, -1).log())
    left = functional.pad((1 - z).cumprod(-1), (1, 0), value=1.0)
    return (functional.pad(z, (0, 1), value=1.0) * left).log() * torch.arange(x.shape[-1] + 1)


def _normal_density(a: Tensor, x: Tensor) -> Tensor:
    root = torch.linalg.cholesky(a @ a.mT + torch.eye(a.shape[-1], dtype=a.dtype))
    half = torch.linalg.solve_triangular(root, x[:, None], upper=False)
    return -half.square().sum() / 2 - root.diagonal(dim1=-2, dim2=-1).log().sum()


COMPOSITIONS: dict[str, tuple[Any, ...]] = {
    "logsumexp": (lambda x: x.logsumexp(1), M),
    "logsumexp 0": (lambda x: x.logsumexp((0, 1)), M),
    "by hand softmax": (lambda x: (x - x.logsumexp(-1, keepdim=True)).exp().square(), M),
    "layer norm by hand": (
        lambda x: ((x - x.mean(1, True)) / ((x - x.mean(1, True)) ** 2).mean(1, True).sqrt()).tanh(),
        M,
    ),
    "softplus": (lambda x: functional.softplus(x).log(), M),
    "log sigmoid": (lambda x: functional.logsigmoid(x) * x, M),
    "stick breaking": (_stick_breaking, M),
    "cumsum": (lambda x: x.cumsum(1).sin() * x.cumsum(0), M),
    "ordered": (lambda x: torch.cat([x[..., :1], x[..., 1:].exp()], -1).cumsum(-1).sin(), M),
    "cholesky": (_normal_density, real(6, 6), real(6)),
    "small cholesky": (_normal_density, real(3, 3), real(3)),
    "gather": (lambda x, i: x.gather(1, i).square(), M, whole(6, 9, low=0, high=7)),
    "index": (lambda x, i: x[i].exp() * x[:, i[:1]].sum(), real(6, 6), places),
    "scatter": (lambda x, i: x.exp().scatter(1, i, 2.0) * x, M, whole(6, 1, low=0, high=7)),
    "scatter add": (lambda x, i, y: x.scatter_add(0, i, y.exp()).square(), M, whole(9, 7, low=0), real(9, 7)),
    "guarded": (lambda x: torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), x), M),
    "gamma": (lambda x: torch.lgamma(x) * torch.digamma(x + 1), positive(6, 7)),
    "clamp": (lambda x: x.clamp(-0.3, 0.4).exp() + x.clamp(min=0.1) * x.clamp(max=torch.tensor(0.2)), M),
    "abs": (lambda x: x.abs().sqrt() + x.sign() * x.relu(), M),
    "max": (lambda x: x.amax(1) * x.max(0)[0].sum(), M),
    "products": (lambda x, y: (x @ y).tanh() @ x, M, real(7, 6)),
    "large product": (lambda x: (x @ x.t()).tanh() @ x, real(17, 15)),
    "prod": (lambda x: x.prod(1), M),
    "power": (lambda x, y: x**y + 2**y + x**1.5, positive(6, 7), M),
    "sections": (lambda x: (x[1:] - x[:-1]).square().sum() + x[::2].exp().sum() * x.flip(0)[0], M),
    "unfold": (lambda x: x.unfold(1, 3, 2).prod(-1), M),
    "broadcast": (lambda x, y: (x[:, None] * y).exp() - y.sum(), real(6), V),
    "trigonometry": (lambda x: x.sin() * x.cos() + x.tanh().atan() + x.atan2(x.exp()) + x.sinh() / x.cosh(), M),
    "error function": (lambda x: x.erf().log1p() + torch.erfc(x).log() + x.expm1().square(), within(-0.6, 3, 6, 7)),
    "joined": (lambda x, y: torch.stack([x, y * x, y.exp()]).logsumexp(0).cumsum(0), M, M),
}


def test_gradients_of_what_models_are_made_of():
    cases = [Case(name, gradients(f), tuple(draws)) for name, (f, *draws) in COMPOSITIONS.items()]
    check(cases[: len(cases) // 2])
    check(cases[len(cases) // 2 :])


# -- loops that run together -------------------------------------------------------------------------------------------


def _scattered_and_read(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
    before = x.exp()
    target = before.scatter_add(0, i, x)
    return before * 2, target, target - before, target.flip(0) + x, target.scatter_add(0, i, target).sum()


def _many_statements(x: Tensor) -> tuple[Tensor, ...]:
    total = x
    for i in range(300):
        total = (total * 1.01 + i % 7).sin() if i % 3 else total - 0.5 * x
    return total, total.sum()


def _many_nests(x: Tensor) -> tuple[Tensor, ...]:
    total = x
    for _ in range(80):
        total = total.cumsum(0).tanh() + x.sum()  # none can join another
    return (total,)


HAZARDS: dict[str, tuple[Any, ...]] = {
    "shifted": (lambda x: (x.exp()[1:] - x.exp()[:-1], x.exp().sin()[2:] * x.exp()[:-2]), real(9)),
    "reversed": (lambda x: (x.exp() - x.exp().flip(0), x.sin().flip(0).cos() * x.sin()), real(9)),
    "transposed": (lambda x: (x.exp() + x.exp().t(), (x.sin() * 2).t() - x.sin()), real(6, 6)),
    "reduced and used": (
        lambda x: (x.exp() / x.exp().sum(), x.exp() - x.exp().sum(0), x.exp() * x.exp().amax(1, True)),
        M,
    ),
    "reduced twice": (lambda x: ((x - x.mean(0)).square().sum(0) * x, (x - x.sum()).sum(1)), M),
    "joined and read whole": (
        lambda x, y: (torch.cat([x.exp(), y.sin(), x]).cumsum(0), torch.cat([y, x]).flip(0) * 2),
        real(7),
        real(5),
    ),
    "joined and read across": (
        lambda x: (torch.cat([x[1:].exp(), x[:1]]) - torch.cat([x[-1:], x[:-1].exp()]),),
        real(8),
    ),
    "section over a base": (
        lambda x, y: (torch.slice_scatter(x, y.exp(), 0, 0, 10, 2), y.exp() * 2),
        real(10),
        real(5),
    ),
    "section over a base, unrolled": (
        lambda x, y: (torch.slice_scatter(x, y.exp(), 0, 1, 4, 2), y.exp()),
        real(4),
        real(2),
    ),
    "section over a base, twice": (
        lambda x, y: (torch.slice_scatter(torch.slice_scatter(x, y.exp(), 0, 0, 10, 2), y, 0, 1, 10, 2),),
        real(10),
        real(5),
    ),
    "diagonal over a base": (
        lambda x, y: (torch.diagonal_scatter(x, y.exp()), y.exp().sum()),
        real(5, 5),
        real(5),
    ),
    "diagonal, unrolled": (lambda x, y: (torch.diagonal_scatter(x, y.exp()), y.exp().sum()), real(3, 3), real(3)),
    "gradient of a diagonal": (gradients(lambda x: x.exp().diagonal().log() * x.diagonal()), real(5, 5)),
    "gradient of steps": (gradients(lambda x: x.exp()[::2].log() * x[1::2]), real(10)),
    "put in a pattern": (
        lambda x, y: (x.index_put((torch.arange(0, 10, 2),), y.exp()), y.exp()),
        real(10),
        real(5),
    ),
    "put by an index": (
        lambda x, y, i: (x.exp().index_put((i,), y.exp()), y.exp()),
        real(10),
        real(1),
        whole(1, low=0),
    ),
    "read by what is computed": (
        lambda x, i: (x[-1 - i] * x[i].exp(), x[i][:, i + 1].sin(), x.gather(0, (x > 0).long() + 1)),
        M,
        places,
    ),
    "put twice": (lambda x, i: (x.index_put((i,), x[0]).index_put((i + 1,), x[1]),), real(10), whole(1, low=0)),
    "scatter in a pattern": (
        lambda x, y: (x.scatter(0, torch.arange(5)[:, None].expand(5, 2), y.exp()), y.exp()),
        real(6, 3),
        real(5, 2),
    ),
    "scattered and read": (_scattered_and_read, real(9), whole(9, low=0, high=9)),
    "scattered to where it is read": (
        lambda x, i: (x.scatter_add(0, i, x[i]), x[i].exp()),
        real(9),
        whole(9, low=0, high=9),
    ),
    "the same twice": (lambda x: (x.exp(), x.exp(), x.exp()[1:]), V),
    "arguments": (lambda x, y: (x, y, x[1:], x.t(), y.expand(3, 7), x), M, V),
    "constants": (
        lambda x: (torch.arange(3.0), torch.zeros(2, 2), torch.tensor(0.3), torch.full_like(x, 7.0), torch.ones(0)),
        V,
    ),
    "nothing to read": (lambda: (torch.arange(4.0) * 2, torch.ones(3)),),
    "empty": (
        lambda x: (x[:0], x[:0].exp(), x[:0].sum(), torch.cat([x[:0], x]), x[:0].cumsum(0), x[:, :0] @ x[:0, :]),
        M,
    ),
    "many statements": (_many_statements, real(33)),
    "many nests": (_many_nests, real(9)),
    "chosen and reversed": (
        lambda c, x: (torch.where(c, x.flip(1), 0.0), torch.where(c.flip(1), x, -1.0)),
        truth(6, 6),
        real(6, 6),
    ),
    "chosen and stepped": (
        lambda c, x: (torch.where(c, x[:, ::2], 0.0), torch.where(c, x[:, 1::2].t().flip(0).t(), 1.0)),
        truth(9, 7),
        real(9, 14),
    ),
    "clamped and reversed": (
        lambda x: (
            x.flip(1).clamp(-0.1, 0.2),
            x.flip(0).relu(),
            gradients(lambda y: y.clamp(-1, 1).cumsum(1).sin())(x)[1],
        ),
        real(6, 6),
    ),
    "one entry": (lambda x: (x.exp() * 2, x.exp().sum(), x[None] @ x[:, None]), real(1)),
    "unrolled": (
        lambda x: (x.exp().sum((0, 1)), x.exp().sum(-1), x.cumsum(-1), x.exp().flip(0) - x.exp()),
        real(2, 3, 9),
    ),
    "reduced outside in": (
        lambda x: (x.exp().sum(0), x.exp().sum((0, 1)), x.exp().sum(1), x.sin().prod(0)),
        real(5, 7, 9),
    ),
    "copied before a factor": (lambda x: (torch.linalg.cholesky(x), x.exp(), torch.linalg.cholesky(x) @ x), spd(6)),
    "solved twice": (lambda a, b: (torch.linalg.solve_triangular(a, b, upper=False), b * 2, a), spd(6), real(6, 2)),
    "written to": (lambda x: (x.clone().add_(1).mul_(x), x.exp().clamp_(max=1.0).sub_(x)), V),
    "long": (lambda x: (x.exp().sum(), (x[1:] * x[:-1]).sum(), x.flip(0)[::2].cumsum(0)[-1], x.amax()), real(257)),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_loops_that_run_together_read_what_they_should(name):
    function, *draws = HAZARDS[name]
    check([Case(name, function, tuple(draws))])


# -- random programs ---------------------------------------------------------------------------------------------------


def random_program(rng: random.Random) -> Callable[..., tuple[Tensor, ...]]:
    """5 to 40 operations on two vectors of 6, a matrix of 6 x 6 and what they make; all stays within [-3, 3]."""
    unary = [
        lambda x: x.sin(),
        lambda x: x.tanh(),
        lambda x: x.exp().clamp(max=3.0),
        lambda x: x.abs().log1p(),
        lambda x: -x,
        lambda x: x.sigmoid(),
        lambda x: x.flip(-1),
        lambda x: x.cumsum(-1).sin(),
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x.square().cos(),
        lambda x: torch.cat([x[..., 1:], x[..., :1]], -1),
        lambda x: functional.pad(x[..., 1:-1], (1, 1)),
        lambda x: x[..., torch.tensor([0, 2, 4, 1, 1, 5])],
        lambda x: x.expand(6, 6).t() * 0.5,
        lambda x: x.sign() * 0.3,
        lambda x: torch.slice_scatter(x, x[..., ::2] * 2, -1, 1, 6, 2).tanh(),
        lambda x: x.logsumexp(-1, True).expand_as(x).sin(),
        lambda x: (x.amax(-1, True) - x).tanh(),
        lambda x: (x > 0.2).to(F64),
        lambda x: x.expand(6, 6).diagonal(0, -2, -1) * 1.0,
        lambda x: x.index_add(x.dim() - 1, torch.tensor([0, 0, 3]), x[..., :3]).sin(),
        lambda x: x.expand(6, 6).tril(1),
    ]
    binary = [
        lambda x, y: (x + y).tanh(),
        lambda x, y: x - y.sin(),
        lambda x, y: x * y.cos(),
        lambda x, y: torch.maximum(x, y),
        lambda x, y: x / (1 + y.abs()),
        lambda x, y: torch.where(x < y, x, y * 0.5),
        lambda x, y: torch.logaddexp(x, y).sin(),
        lambda x, y: (x.expand(6, 6) @ y.expand(6, 6)).tanh(),
        lambda x, y: x.gather(-1, (y.abs() * 2).long().clamp(0, 5).expand_as(x)) if x.dim() >= y.dim() else x.atan2(y),
    ]
    plan = []
    for step in range(rng.randint(5, 40)):
        two = rng.random() < 0.4
        plan.append((rng.choice(binary if two else unary), [rng.randrange(3 + step) for _ in range(2 if two else 1)]))
    ends = sorted({3 + len(plan) - 1, rng.randrange(3, 3 + len(plan)), rng.randrange(3, 3 + len(plan))})

    def program(*args: Tensor) -> tuple[Tensor, ...]:
        values = list(args)
        for operation, places in plan:
            values.append(operation(*[values[i] for i in places]).clamp(-3, 3))
        return (*[values[i] for i in ends], values[ends[-1]].sum(-1))

    return program


@pytest.mark.parametrize("seed", range(6))
def test_random_programs(seed):
    """Ten in one code, and their gradients; alone, the first of them."""
    rng = random.Random(seed)
    programs = [random_program(rng) for _ in range(8)]
    draws = (real(6), real(6), real(6, 6))
    total = lambda f: gradients(lambda *args: sum(o.sum() for o in f(*args)))  # noqa: E731
    check([Case(f"{seed}.{i}", total(f) if i % 4 == 3 else f, draws, 1e-8) for i, f in enumerate(programs)])
    check([Case(f"{seed} alone", programs[0], draws, 1e-8)])


# -- what changes between calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start", [torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.zeros(3)], ids=["any", "ones", "zeros"]
)
def test_parameters_are_read_where_they_live_and_constants_are_not(start):
    """Also where all entries of a parameter are the same number when the code is made: it may become another."""
    w, constant = start.to(F64).requires_grad_(True), torch.tensor([0.5, -1.0, 2.0], dtype=F64)

    def function(x):
        with torch.enable_grad():
            value = (w.exp() * x * constant + w * w).sum()
            return value.detach(), *torch.autograd.grad(value, w)

    x = torch.randn(3, dtype=F64)
    made = native(function, (x,), moving=(w,))
    for change in ("in place", "data", "smaller steps"):
        with torch.no_grad():
            if change == "data":
                w.data = torch.randn(3, dtype=F64)
            else:
                w.sub_(0.7)
        for a, b in zip(made(x), function(x), strict=True):
            close(change, a, b)


def test_a_parameter_that_moved_to_another_layout_or_type_is_not_misread():
    """The same numbers by columns, in float32, or fewer of them: the answer is the program's, or an error."""
    for other in (torch.randn(4, 3, dtype=F64).t(), torch.randn(3, 4), torch.randn(4, 4, dtype=F64)[:3]):
        w = torch.randn(3, 4, dtype=F64)
        made = native(lambda x, w=w: ((w * x).to(F64).sum(0),), (torch.randn(4, dtype=F64),), moving=(w,))
        x = torch.randn(4, dtype=F64)
        w.data = other
        close("moved", made(x)[0], (w * x).to(F64).sum(0))


def test_arguments_of_another_shape_or_type_are_not_misread():
    made = native(lambda x: (x.exp().sum(),), (torch.randn(5, dtype=F64),))
    for x in (torch.randn(3, dtype=F64), torch.randn(9, dtype=F64), torch.randn(5, dtype=F32)):
        try:
            answer = made(x)[0]
        except (RuntimeError, ValueError, TypeError):
            continue
        close("other", answer.to(F64), x.exp().sum().to(F64), 1e-6)


def test_memory_that_a_program_writes_to_is_written_to():
    """A running mean, kept outside the program: it moves as it does without machine code."""
    state = torch.zeros(3, dtype=F64)

    def function(x):
        state.copy_(x * 2)
        return (state.sum() + x,)

    made = compiled(function, [(torch.randn(3, dtype=F64),)], [state])
    x = torch.randn(3, dtype=F64)
    close("answer", made(x)[0], (x * 2).sum() + x)
    assert torch.equal(state, x * 2)


def test_constants_are_kept_alive_and_as_they_were():
    """Whoever made them may forget them, or lend their names to other memory."""
    constant = torch.randn(1000, dtype=F64)
    made = native(lambda x: (x + constant.sum() * 0 + (constant * x).sum(),), (torch.tensor(1.0, dtype=F64),))
    before = made(torch.tensor(2.0, dtype=F64))[0]
    constant.data = torch.empty(0, dtype=F64)
    rubbish = [torch.full((1000,), 1e9, dtype=F64) for _ in range(50)]
    close("after", made(torch.tensor(2.0, dtype=F64))[0], before)
    del rubbish


OTHER_CONSTANTS = """
import sys, torch
from pyrometer.inference.compile import compiled
for seed in map(int, sys.argv[1:]):
    torch.manual_seed(seed)
    constant, x = torch.randn(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    made = compiled(lambda x: ((x * constant).sum(), x * float(seed)), [(x,)], [])
    total, scaled = made(x)
    print(made.backend, made.cached, bool((total - constant.sum()).abs() < 1e-12), scaled[0].item())
"""


def test_the_same_code_with_other_constants_answers_for_those():
    """A process, then another: data, parameters and numbers of one never answer for another."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", OTHER_CONSTANTS, *seeds], capture_output=True, text=True, check=True, env=os.environ
        )
        for seeds in (("3", "4"), ("5", "3"))
    ]
    lines = [line.split() for run in runs for line in run.stdout.splitlines()]
    assert [line[0] for line in lines] == ["native"] * 4
    assert [line[2] for line in lines] == ["True"] * 4
    assert [float(line[3]) for line in lines] == [3.0, 4.0, 5.0, 3.0]
    assert lines[3][1] == "True"


def test_threads_share_a_function_and_not_its_memory():
    """Eight at once, each with its own arguments, on code with working memory: the answers of one alone."""
    function = lambda x: (x.cumsum(0).sin().cumsum(0) @ x[:, None], (x[:, None] * x).exp().sum(0).log())  # noqa: E731
    made = native(function, (torch.randn(60, dtype=F64) * 0.1,))
    arguments = [torch.randn(60, dtype=F64) * 0.1 for _ in range(8)]
    expected = [made(x) for x in arguments]
    wrong: list[int] = []
    ready = threading.Barrier(8)

    def work(i: int) -> None:
        ready.wait()
        for _ in range(300):
            if not all(torch.equal(a, b) for a, b in zip(made(arguments[i]), expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


# -- loops over time, written out --------------------------------------------------------------------------------------


def _autoregression(steps: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    data = torch.randn(steps, dtype=F64)

    def density(u: Tensor) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for t in range(1, steps):
            total = total - ((data[t] - u[0] - u[1].tanh() * data[t - 1]) / u[2].exp()) ** 2 / 2 - u[2]
        return total

    return gradients(density)


def _hidden_states(steps: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    data = torch.randn(steps, dtype=F64)

    def density(u: Tensor) -> Tensor:
        moves = u[:9].reshape(3, 3) - u[:9].reshape(3, 3).logsumexp(1, keepdim=True)
        state = torch.zeros(3, dtype=F64)
        for t in range(steps):
            state = (state[:, None] + moves).logsumexp(0) - (data[t] - u[9:]) ** 2 / 2
        return state.logsumexp(0)

    return gradients(density)


@pytest.mark.parametrize(
    ("make", "size"), [(_autoregression, 3), (_hidden_states, 12)], ids=["autoregression", "hidden states"]
)
def test_a_loop_over_time_is_right_whatever_runs_it(make, size):
    function = make(60)
    made = compiled(function, [(torch.randn(size, dtype=F64) * 0.3,)], [])
    assert made.backend == "native" or made.why.count("\n") == 0 < len(made.why)
    u = torch.randn(size, dtype=F64) * 0.3
    for a, b in zip(made(u), function(u), strict=True):
        close("loop", a, b)


# -- where there is no machine code ------------------------------------------------------------------------------------


def _falls_back(function, *args, contains: str) -> Compiled:
    made = compiled(function, [args], [])
    assert made.backend in ("graph", "eager")
    assert contains in made.why
    assert "\n" not in made.why
    assert made.pointer() is None
    torch.manual_seed(1)
    expected = function(*args)
    torch.manual_seed(1)
    for a, b in zip(made(*args), expected, strict=True):
        close("fallback", a, b, 1e-12)
    return made


def test_functions_of_both_precisions_are_offered_to_the_vectoriser():
    """A function that is not declared for vectors runs number by number, three times slower, and nothing else tells."""
    found = compiler()
    preprocess = [found.path, "-E", "-P", "-DVECTOR_MATH", "-x", "c", "-"]
    text = subprocess.run(preprocess, input=PRELUDE, capture_output=True, text=True, check=True).stdout
    for name in ("exp", "log", "log1p", "tanh", "sin", "erf"):
        for declaration in (f"double {name}(double)", f"float {name}f(float)"):
            assert f'__attribute__((__simd__("notinbranch"))) {declaration};' in text


def test_without_a_compiler_the_graph_serves(monkeypatch):
    for command, path in (("/nonexistent", os.environ["PATH"]), ("", "/nonexistent")):
        monkeypatch.setenv("CC", command)
        monkeypatch.setenv("PATH", path)
        _falls_back(lambda x: (x.exp() * 3.25,), torch.randn(5, dtype=F64), contains="no C compiler")


UNKNOWN: dict[str, tuple[Any, ...]] = {
    "sort": (lambda x: (x.sort()[0],), V),
    "linalg_eigh": (lambda x: (torch.linalg.eigvalsh(x),), spd(3)),
    "float16": (lambda x: (x.half(),), V),
    "complex": (lambda x: (torch.fft.fft(x).real,), V),
    "rounding": (lambda x: (torch.div(x, 0.1, rounding_mode="floor"),), V),
    "decimals": (lambda x: (x.round(decimals=1),), V),
    "dtype": (lambda x: (x.view(I64),), V),
    "polygamma": (lambda x: (torch.polygamma(3, x),), positive(5)),
    "reduction": (lambda x, i: (x.scatter_reduce(0, i, x, "amax"),), V, whole(7, low=0, high=7)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operation_without_lowering_is_named_and_runs(name):
    function, *draws = UNKNOWN[name]
    _falls_back(function, *[d() for d in draws], contains="not compiled: ")


def test_control_flow_on_values_runs_the_program():
    made = _falls_back(
        lambda x: (x * 2 if float(x.sum()) > 0 else -x,), torch.ones(3, dtype=F64), contains="not traced"
    )
    assert torch.equal(made(-torch.ones(3, dtype=F64))[0], torch.ones(3, dtype=F64))


def test_random_numbers_that_depend_on_arguments_run_as_torch_draws_them():
    _falls_back(lambda x: (torch.bernoulli(x.sigmoid()) + x,), torch.randn(5, dtype=F64), contains="random")


def test_random_numbers_are_drawn_in_the_programs_order():
    def function(x):
        return torch.randn(5, dtype=F64) * x, torch.rand(3, dtype=F64).cumsum(0), x + torch.randn(5, dtype=F64)

    made, x = native(function, (torch.randn(5, dtype=F64),)), torch.randn(5, dtype=F64)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected, after = function(x), torch.get_rng_state()
        torch.manual_seed(seed)
        for a, b in zip(made(x), expected, strict=True):
            close("draw", a, b)
        assert torch.equal(torch.get_rng_state(), after)


def test_memory_that_is_written_under_two_names():
    """A view is taken, its base is written to, the view is read: whatever runs it, the answer is the program's."""

    def function(x):
        base = x * 1.0
        view, other = base[1:3], base.t() if base.dim() > 1 else base.flip(0)
        base.add_(1)
        view.mul_(2)
        return view, base, other, base[1:].sum()

    made = compiled(function, [(torch.randn(5, dtype=F64),)], [])
    x = torch.randn(5, dtype=F64)
    for a, b in zip(made(x), function(x), strict=True):
        close("aliases", a, b)


# -- the pointer -------------------------------------------------------------------------------------------------------


def test_the_pointer_answers_as_the_function_and_says_where_it_cannot():
    import ctypes

    made = native(gradients(lambda u: -(u.exp() - 1).square().sum() + u.log1p().sum()), (torch.rand(6, dtype=F64),))
    address, user = made.pointer()
    pointers = [ctypes.POINTER(ctypes.c_double)] * 3
    call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_uint64, *pointers, ctypes.c_void_p)(address)
    for values, good in (
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], True),
        ([0.0, 0.0, -2.0, 0.0, 0.0, 0.0], False),
        ([NAN] * 6, False),
    ):
        u, gradient, value = (ctypes.c_double * 6)(*values), (ctypes.c_double * 6)(), ctypes.c_double()
        fault = call(6, u, gradient, ctypes.byref(value), user)
        assert (fault == 0) == good
        if good:
            expected, slope = made(torch.tensor(values, dtype=F64))
            assert value.value == expected.item()
            assert list(gradient) == slope.tolist()
