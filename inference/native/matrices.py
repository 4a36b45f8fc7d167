"""Matrix products, Cholesky factors and triangular solves: loops where they are small, BLAS and LAPACK elsewhere.

Those read matrices by columns; a matrix kept by rows is its transpose to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import sum_of
from .ir import Access, Apply, Call, Window
from .lower import SMALL_PRODUCT, Lowering, Uniform, UnsupportedError, Value, lowers
from .reductions import heads


def _letter(dtype: torch.dtype) -> str:
    letters = {torch.float64: "d", torch.float32: "s"}
    if dtype not in letters:
        raise UnsupportedError(f"matrix operations in {dtype}")
    return letters[dtype]


def product(lower: Lowering, x: Value, y: Value, shape: tuple[int, ...]) -> Value:
    """x (*batch, m, k) times y (*batch, k, n)."""
    if any(isinstance(v, Uniform) and v.value == 0 for v in (x, y)):
        return Uniform(0, shape, x.dtype)
    *batch, m, n = shape
    k = x.shape[-1]
    if min(m, n) == 1 or m * n * k <= SMALL_PRODUCT or k == 1 or not x.dtype.is_floating_point:
        b = len(batch)
        space = (*batch, m, n, k)
        left = _aligned(lower, x, (*range(b), b, b + 2), len(space))
        right = _aligned(lower, y, (*range(b), b + 2, b + 1), len(space))
        term = Apply("{0} * {1}", (left, right), x.dtype, x.dtype)
        return lower.reduce("sum", space, term, [b + 2], x.dtype)
    letter, target = _letter(x.dtype), lower.scratch(shape, x.dtype, rows=True)
    (x, ldx, tx), (y, ldy, ty) = _matrix(lower, x), _matrix(lower, y)
    text = (
        f"{heads(batch)} {{ int m = {n}, n = {m}, k = {k}, lda = {ldy}, ldb = {ldx}, ldc = {n}; $T2 one = 1, zero = 0; "
        f'$R0("{"NT"[ty]}", "{"NT"[tx]}", &m, &n, &k, &one, {_at(1, y)}, &lda, {_at(0, x)}, &ldb, &zero, '
        f"{_at(2, target)}, &ldc); }}"
    )
    lower.steps.append(Call(text, (x, y, target), (target.buffer,), (f"{letter}gemm",)))
    return target


def _aligned(lower: Lowering, value: Value, places: tuple[int, ...], rank: int) -> Any:
    """The element of a value whose dimensions are these places of the index space."""
    expr = lower.read(value, value.shape, value.dtype)
    if not isinstance(expr, Access):
        return expr
    strides = [0] * rank
    for place, stride in zip(places, expr.strides, strict=True):
        strides[place] = stride
    return Access(expr.buffer, expr.offset, tuple(strides))


def _matrix(lower: Lowering, value: Value) -> tuple[Window, int, bool]:
    """A window that BLAS can read, the distance between its rows, and whether it is kept by columns."""
    window = lower.window(value)
    for attempt in (window, None):
        window = attempt or lower.copy(value)
        rows, columns = window.shape[-2:]
        r, c = window.strides[-2:]
        if (c == 1 or columns == 1) and r >= columns:
            return window, r, False
        if (r == 1 or rows == 1) and c >= rows:
            return window, c, True
    raise UnsupportedError("a matrix of these strides")


def _at(index: int, window: Window) -> str:
    """The matrix of a window at a point of its batch."""
    return f"${index}" + "".join(f" + i{d} * {s}" for d, s in enumerate(window.strides[:-2]))


@lowers("mm", "bmm")
def _mm(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return product(lower, a["self"], a["mat2"], tuple(out.shape))


@lowers("mv")
def _mv(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return _reshaped(product(lower, a["self"], _reshaped(a["vec"], (*a["vec"].shape, 1)), (*out.shape, 1)), out.shape)


@lowers("dot")
def _dot(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    n = a["self"].shape[0]
    row, column = _reshaped(a["self"], (1, n)), _reshaped(a["tensor"], (n, 1))
    return _reshaped(product(lower, row, column, (1, 1)), ())


@lowers("addmm")
def _addmm(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise UnsupportedError("addmm with factors")
    return sum_of(lower, a["self"], product(lower, a["mat1"], a["mat2"], tuple(out.shape)), out, "+", 1)


def _reshaped(value: Value, shape: Sequence[int]) -> Value:
    """Dimensions of size 1 added or dropped."""
    if isinstance(value, Uniform):
        return replace(value, shape=tuple(shape))
    strides = iter([s for n, s in zip(value.shape, value.strides, strict=True) if n != 1])
    return Window(value.buffer, tuple(shape), tuple(0 if n == 1 else next(strides) for n in shape), value.offset)


@lowers("linalg_cholesky_ex")
def _cholesky(lower: Lowering, a: dict[str, Any], out: Any) -> Any:
    """L with L L' = a; by columns, the upper factor of the same matrix."""
    factor, info = lower.copy(a["self"]), lower.scratch(out[1].shape, torch.int32)
    n, batch = out[0].shape[-1], out[0].shape[:-2]
    place = " + ".join(f"i{d} * {s}" for d, s in enumerate(info.strides)) or "0"
    outside = "c > r" if not a["upper"] else "c < r"
    text = (
        f"{heads(batch)} {{ int n = {n}, info = 0; "
        f'$R0("{"L" if a["upper"] else "U"}", &n, {_at(0, factor)}, &n, &info); '
        f"$1[{place}] = info; $T0* m = {_at(0, factor)}; "
        f"for (int r = 0; r < n; r++) for (int c = 0; c < n; c++) if ({outside}) m[r * n + c] = 0; }}"
    )
    lower.steps.append(Call(text, (factor, info), (factor.buffer, info.buffer), (f"{_letter(factor.dtype)}potrf",)))
    return factor, info


@lowers("_linalg_check_errors")
def _check(lower: Lowering, a: dict[str, Any], out: Any) -> None:
    info = lower.window(a["info"])
    lower.steps.append(Call(f"for (int64_t i = 0; i < {math.prod(info.shape)}; i++) if ($0[i]) return 5;", (info,), ()))


@lowers("linalg_solve_triangular")
def _solve_triangular(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    """X with A X = B, or X A = B."""
    matrix, ld, by_columns = _matrix(lower, lower.expand(a["self"], (*out.shape[:-2], *a["self"].shape[-2:])))
    solution = lower.copy(lower.expand(a["B"], out.shape))
    rows, columns = out.shape[-2:]
    side = "R" if a["left"] else "L"
    triangle = "U" if bool(a["upper"]) == by_columns else "L"
    text = (
        f"{heads(out.shape[:-2])} {{ int m = {columns}, n = {rows}, lda = {ld}, ldb = {columns}; $T1 one = 1; "
        f'$R0("{side}", "{triangle}", "{"NT"[by_columns]}", "{"U" if a["unitriangular"] else "N"}", &m, &n, &one, '
        f"{_at(0, matrix)}, &lda, {_at(1, solution)}, &ldb); }}"
    )
    lower.steps.append(Call(text, (matrix, solution), (solution.buffer,), (f"{_letter(out.dtype)}trsm",)))
    return solution


@lowers("triangular_solve")
def _triangular_solve(lower: Lowering, a: dict[str, Any], out: Any) -> Any:
    matrix = a["A"]
    if a["transpose"]:
        window = lower.window(matrix)
        swap = lambda t: (*t[:-2], t[-1], t[-2])  # noqa: E731
        matrix = Window(window.buffer, swap(window.shape), swap(window.strides), window.offset)
    upper = bool(a["upper"]) != bool(a["transpose"])
    options = {"self": matrix, "B": a["self"], "upper": upper, "left": True, "unitriangular": a["unitriangular"]}
    return _solve_triangular(lower, options, out[0]), a["A"]
