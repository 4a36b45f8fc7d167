"""Sums, extremes and their kin over dimensions, and running sums along one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .ir import Apply, Call, Window
from .lower import Lowering, Uniform, UnsupportedError, Value, lowers


def _dims(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    return sorted({d % rank for d in ([dim] if isinstance(dim, int) else dim)}) if rank else []


def _reduction(lower: Lowering, kind: str, value: Value, dims: list[int], out: Tensor) -> Value:
    """Over dims, shaped as `out` (with or without the reduced dimensions)."""
    shape = tuple(value.shape)
    count = math.prod(shape[d] for d in dims)
    if isinstance(value, Uniform):
        same = lower.cast(value, out.dtype)
        if kind == "sum" and isinstance(same, Uniform):
            return Uniform(same.value * count if count else 0, tuple(out.shape), out.dtype)
        if kind in ("max", "min", "any", "all") and count:
            return replace(same, shape=tuple(out.shape))
    if count == 1:
        flat = [d for d in range(len(shape)) if d not in dims]
        value = lower.cast(value, out.dtype)
        if isinstance(value, Uniform):
            return replace(value, shape=tuple(out.shape))
        kept = Window(value.buffer, tuple(shape[d] for d in flat), tuple(value.strides[d] for d in flat), value.offset)
    else:
        expr = lower.read(value, shape, out.dtype)
        if value.dtype != out.dtype:
            expr = Apply("{0} != 0" if out.dtype == torch.bool else "{0}", (expr,), out.dtype, value.dtype)
        kept = lower.reduce(kind, shape, expr, dims, out.dtype)
    if len(kept.shape) == out.dim():
        return kept
    strides = list(kept.strides)
    for d in dims:
        strides.insert(d, 0)
    return Window(kept.buffer, tuple(out.shape), tuple(strides), kept.offset)


def _register_reduction(name: str, kind: str) -> None:
    @lowers(name)
    def reduction(lower: Lowering, a: dict[str, Any], out: Any) -> Value:
        value = a["self"]
        return _reduction(lower, kind, value, _dims(a.get("dim"), len(value.shape)), out)


for _name, _kind in {"sum": "sum", "amax": "max", "amin": "min", "any": "any", "all": "all", "prod": "prod"}.items():
    _register_reduction(_name, _kind)


@lowers("mean")
def _mean(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    dims = _dims(a.get("dim"), len(a["self"].shape))
    total = _reduction(lower, "sum", lower.cast(a["self"], out.dtype), dims, out)
    count = math.prod(a["self"].shape[d] for d in dims)
    return lower.apply("{0} / {1}", (total, count), out.dtype, out.dtype)


def _variance(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if "unbiased" in a:
        raise UnsupportedError("var by its older signature")
    value, dims = a["self"], _dims(a.get("dim"), len(a["self"].shape))
    count = math.prod(value.shape[d] for d in dims)
    like = torch.empty([1 if d in dims else n for d, n in enumerate(value.shape)], dtype=out.dtype, device="meta")
    mean = lower.apply("{0} / {1}", (_reduction(lower, "sum", value, dims, like), count), out.dtype, out.dtype)
    away = lower.apply("({0} - {1}) * ({0} - {1})", (value, mean), out.dtype, out.dtype)
    total = _reduction(lower, "sum", away, dims, out)
    correction = 1 if a.get("correction") is None else a["correction"]
    return lower.apply("{0} / {1}", (total, max(count - correction, 0)), out.dtype, out.dtype)


lowers("var")(_variance)
lowers("std")(lambda lower, a, out: lower.apply("@sqrt({0})", (_variance(lower, a, out),), out.dtype, out.dtype))


@lowers("linalg_vector_norm")
def _vector_norm(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if a["ord"] != 2:
        raise UnsupportedError(f"a norm of order {a['ord']}")
    value = lower.cast(a["self"], out.dtype)
    squares = lower.apply("{0} * {0}", (value,), out.dtype, out.dtype)
    total = _reduction(lower, "sum", squares, _dims(a.get("dim"), len(value.shape)), out)
    return lower.apply("@sqrt({0})", (total,), out.dtype, out.dtype)


def _over(lower: Lowering, kind: str, value: Value, dims: Any) -> Value:
    """A reduction that keeps its dimensions, with size 1."""
    dims = _dims(dims, len(value.shape))
    like = torch.empty([1 if d in dims else n for d, n in enumerate(value.shape)], dtype=value.dtype, device="meta")
    return _reduction(lower, kind, value, dims, like)


@lowers("logsumexp")
def _logsumexp(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    value, dims = lower.cast(a["self"], out.dtype), _dims(a["dim"], len(a["self"].shape))
    largest = _over(lower, "max", value, dims)
    shift = lower.apply("({0} - {0} == 0 ? {0} : 0)", (largest,), out.dtype, out.dtype)  # not by infinity
    total = _over(lower, "sum", lower.apply("@exp({0} - {1})", (value, shift), out.dtype, out.dtype), dims)
    result = lower.apply("@log({0}) + {1}", (total, shift), out.dtype, out.dtype)
    return _reduction(lower, "sum", result, dims, out)  # over dimensions of size 1: they go


def _shifted(lower: Lowering, a: dict[str, Any], out: Tensor) -> tuple[Value, Value]:
    """x - max x, and the sum of its exponentials."""
    value = lower.cast(a["self"], out.dtype)
    moved = lower.apply("{0} - {1}", (value, _over(lower, "max", value, a["dim"])), out.dtype, out.dtype)
    return moved, _over(lower, "sum", lower.apply("@exp({0})", (moved,), out.dtype, out.dtype), a["dim"])


@lowers("_softmax")
def _softmax(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return lower.apply("@exp({0}) / {1}", _shifted(lower, a, out), out.dtype, out.dtype)


@lowers("_log_softmax")
def _log_softmax(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return lower.apply("{0} - @log({1})", _shifted(lower, a, out), out.dtype, out.dtype)


@lowers("_softmax_backward_data")
def _softmax_backward(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    slope, probs = a["grad_output"], a["output"]
    total = _over(lower, "sum", lower.apply("{0} * {1}", (slope, probs), out.dtype, out.dtype), a["dim"])
    return lower.apply("({0} - {2}) * {1}", (slope, probs, total), out.dtype, out.dtype)


@lowers("_log_softmax_backward_data")
def _log_softmax_backward(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    slope, log_probs = a["grad_output"], a["output"]
    total = _over(lower, "sum", lower.cast(slope, out.dtype), a["dim"])
    return lower.apply("{0} - @exp({1}) * {2}", (slope, log_probs, total), out.dtype, out.dtype)


def _extremes(kind: str) -> Any:
    def operation(lower: Lowering, a: dict[str, Any], out: Any) -> Any:
        if isinstance(out, Tensor):
            if "other" in a:
                return lower.apply(
                    f"@{kind}imum({{0}}, {{1}})",
                    (a["self"], a["other"]), out.dtype, out.dtype,
                )  # fmt: skip
            return _reduction(lower, kind, a["self"], list(range(len(a["self"].shape))), out)
        dims = _dims(a["dim"], len(a["self"].shape))
        return _reduction(lower, kind, a["self"], dims, out[0]), _position(lower, kind, a["self"], dims, out[1])

    return operation


lowers("max")(_extremes("max"))
lowers("min")(_extremes("min"))


def _position(lower: Lowering, kind: str, value: Value, dims: list[int], out: Tensor) -> Value:
    """The index of the first largest (smallest) along one dimension."""
    (dim,) = dims or [0]
    shape = tuple(value.shape)
    if not shape or shape[dim] == 1:
        return Uniform(0, tuple(out.shape), torch.int64)
    window = lower.window(value)
    kept = tuple(n for d, n in enumerate(shape) if d != dim)
    target = lower.scratch(kept, torch.int64)
    sign = ">" if kind == "max" else "<"
    moved = [*[s for d, s in enumerate(window.strides) if d != dim], window.strides[dim]]
    x = " + ".join(f"i{d} * {s}" for d, s in enumerate(moved[:-1])) or "0"
    y = " + ".join(f"i{d} * {s}" for d, s in enumerate(target.strides)) or "0"
    new, old = f"$0[{x} + k * {moved[-1]}]", f"$0[{x} + best * {moved[-1]}]"
    text = (  # the first NaN wins
        f"{heads(kept)} {{ int64_t best = 0; for (int64_t k = 1; k < {shape[dim]}; k++) "
        f"if ({new} {sign} {old} || ({new} != {new} && {old} == {old})) best = k; $1[{y}] = best; }}"
    )
    lower.steps.append(Call(text, (window, target), (target.buffer,)))
    strides = list(target.strides)
    if out.dim() == len(shape):
        strides.insert(dim, 0)
    return Window(target.buffer, tuple(out.shape), tuple(strides), 0)


def heads(sizes: Sequence[int], skip: int | None = None) -> str:
    """C text that runs what follows at every point, counters i0, i1 ..."""
    return "".join(f"for (int64_t i{d} = 0; i{d} < {n}; i{d}++) " for d, n in enumerate(sizes) if d != skip)


def _scan(template: str, start: str) -> Any:
    def operation(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
        value, dim = lower.cast(a["self"], out.dtype), a["dim"]
        shape = tuple(value.shape)
        if not shape or math.prod(shape) <= 1:
            return value
        window, target = lower.window(value), lower.scratch(shape, out.dtype)
        dim %= len(shape)
        x = " + ".join(f"i{d} * {s}" for d, s in enumerate(window.strides) if d != dim) or "0"
        y = " + ".join(f"i{d} * {s}" for d, s in enumerate(target.strides) if d != dim) or "0"
        step = template.format(v=f"$0[{x} + k * {window.strides[dim]}]")
        text = (
            f"{heads(shape, skip=dim)} {{ $T1 acc = {start}; for (int64_t k = 0; k < {shape[dim]}; k++) "
            f"{{ acc = {step}; $1[{y} + k * {target.strides[dim]}] = acc; }} }}"
        )
        lower.steps.append(Call(text, (window, target), (target.buffer,)))
        return target

    return operation


lowers("cumsum")(_scan("acc + {v}", "0"))
lowers("cumprod")(_scan("acc * {v}", "1"))
